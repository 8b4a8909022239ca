//! The destination's side of a migration.

pub mod bulk;
pub mod course;
pub mod drain;
pub mod fault_times;
pub mod faults;
pub mod finish;
pub mod held;
pub mod install;
pub mod journal;
pub mod limit;
pub mod lost;
pub mod present;
pub mod rdma;
pub mod recover;
pub mod session;
pub mod shared_memory;
pub mod staged;
mod surplus;
pub mod take_over;
mod window;
