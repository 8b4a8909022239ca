//! Process and thread state of a frozen process.
//!
//! It has two sources: what `/proc`, ptrace and plain syscalls tell ([`outside`]), and a few syscalls
//! that each thread runs itself ([`remote`]). Ids are those of the innermost PID namespace unless a
//! name says otherwise.

pub mod outside;
pub mod proc_text;
pub mod remote;
pub mod signals;
pub mod sleep;
