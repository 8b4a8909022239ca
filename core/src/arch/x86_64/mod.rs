//! x86-64: registers, the loop that runs syscall programs, signal frames, interrupted syscalls.

mod regs;
mod runner;

pub use regs::{
    Context, Regs, SYSCALL_INSN, current_entry, return_value, set_start, set_syscall, syscall_result,
};
pub use runner::{Runner, runner};

/// TEMP until merged.
pub fn heal_regs(regs: &Regs) -> Regs {
    let mut r = *regs;
    if r.orig_rax as i64 >= 0 {
        match r.rax as i64 {
            -514..=-512 => {
                r.rax = r.orig_rax;
                r.rip -= 2;
            }
            -516 => {
                r.rax = 219;
                r.rip -= 2;
            }
            _ => {}
        }
    }
    r
}
