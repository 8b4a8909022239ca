//! Restore: from a manifest to a running process, by syscall programs run inside it.

pub mod check;
pub mod decode;
pub mod engine;
pub mod files;
pub mod keeper;
pub mod memory;
pub mod newborn;
pub mod scratch;
pub mod settle;
pub mod staged;
pub mod state;
