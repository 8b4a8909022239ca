//! A Linux process as data: freeze, capture, manifest, restore, preflight and remote syscalls.
//!
//! Nothing here knows how bytes travel between hosts.

pub mod arch;
pub mod capture;
pub mod error;
pub mod freeze;
pub mod inject;
pub mod manifest;
pub mod one_stopped;
pub mod preflight;
pub mod proc;
pub mod program;
pub mod register;
pub mod restore;
pub mod sys;
#[cfg(test)]
mod testing;

pub use error::{Error, Result};
