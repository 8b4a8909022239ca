//! The destination's side of a migration.

pub mod bulk;
pub mod course;
pub mod drain;
pub mod faults;
pub mod finish;
pub mod held;
pub mod journal;
pub mod lost;
pub mod present;
pub mod recover;
pub mod session;
pub mod shared_memory;
pub mod staged;
pub mod take_over;
mod window;
