//! The destination's side of a migration.

pub mod bulk;
pub mod drain;
pub mod faults;
pub mod finish;
pub mod session;
pub mod shared_memory;
pub mod staged;
mod window;
