//! Reading a process on the source.

pub mod state;
