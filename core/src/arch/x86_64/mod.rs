//! x86-64: registers, the loop that runs syscall programs, signal frames, interrupted syscalls.

mod regs;
mod runner;
pub mod sigframe;
mod syscall;
pub mod syscall_restart;
pub mod vdso;
mod way_back;
pub mod xstate;

pub use regs::{
    Context, Regs, SYSCALL_INSN, current_entry, return_value, set_start, set_syscall,
    syscall_result,
};
pub use runner::{Runner, runner};
pub use syscall::raw_syscall;
pub use way_back::{Landing, WayBack};
