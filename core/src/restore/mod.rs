//! Rebuilding a process on the destination.

pub mod state;
