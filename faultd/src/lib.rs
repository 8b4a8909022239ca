//! The two sides of a migration and the page-fault service between them.

pub mod agent;
mod at_end;
pub mod carrier;
pub mod cgroup;
pub mod clocks;
pub mod commit_protocol;
pub mod control;
pub mod dest;
pub mod error;
pub mod events;
pub mod failpoints;
pub mod pages;
mod placement;
pub mod protocol;
pub mod rundir;
pub mod source;

pub use error::{Error, Result};
