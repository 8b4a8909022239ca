//! The edge to the kernel: every `unsafe` block of this crate is below this module or in [`crate::arch`].
//!
//! Rules that make it sound: a raw pointer given to a syscall points to a live buffer whose length is
//! passed with it; integers from the kernel become types only after a check; nothing here keeps a
//! borrowed pointer beyond the call; addresses in *another* process are plain `u64` and never
//! dereferenced.

pub mod clone;
pub mod files;
pub mod mapped;
pub mod mem;
pub mod pagemap;
pub mod pidfd;
pub mod poll;
pub mod probe;
pub mod ptrace;
pub mod ring;
pub mod spawn;
pub mod task;
pub mod twin;
pub mod uffd;
