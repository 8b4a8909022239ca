//! System calls without libc: where not even `errno` may be touched.

use libc::c_long;
use std::arch::asm;

/// Makes a system call of at most five arguments; the result is what the kernel returns, negative errnos included.
///
/// # Safety
/// As for the call itself.
pub unsafe fn raw_syscall(number: c_long, args: [usize; 5]) -> isize {
    let result: isize;
    // SAFETY: the caller answers for what the call does; the kernel changes rax, rcx and r11 only.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result
}
