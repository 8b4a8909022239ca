//! `clone3` with chosen process numbers, and the jump into the runner.

use crate::error::{Error, Result};
use libc::pid_t;
use nix::errno::Errno;
use std::arch::asm;
use std::os::fd::{FromRawFd, OwnedFd};

/// `struct clone_args` up to `set_tid_size`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CloneArgs {
    /// `CLONE_*`.
    pub flags: u64,
    /// Where the pidfd is stored.
    pub pidfd: u64,
    /// Where the child's id is stored in the child.
    pub child_tid: u64,
    /// Where the child's id is stored in the parent.
    pub parent_tid: u64,
    /// Signal sent to the parent at exit.
    pub exit_signal: u64,
    /// Lowest address of the stack.
    pub stack: u64,
    /// Size of the stack.
    pub stack_size: u64,
    /// TLS base.
    pub tls: u64,
    /// Address of the array of wanted ids.
    pub set_tid: u64,
    /// Length of that array.
    pub set_tid_size: u64,
}
/// Size of [`CloneArgs`] as the kernel is told it.
pub const CLONE_ARGS_LEN: usize = 80;
const _: () = assert!(size_of::<CloneArgs>() == CLONE_ARGS_LEN);

impl CloneArgs {
    /// The structure as bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
        ]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect()
    }
}

/// Forks a child with the number `pid` in the caller's PID namespace. Returns in both; the parent gets
/// a process descriptor of the child. The caller must have one thread.
pub fn fork_with_pid(pid: pid_t) -> Result<Option<OwnedFd>> {
    let mut pidfd: i32 = -1;
    let set_tid = [pid];
    let mut args = CloneArgs {
        flags: libc::CLONE_PIDFD as u64,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        set_tid: set_tid.as_ptr() as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM this is a fork: the child has its own copy of everything, and the
    // process has one thread, so no lock can be held by a thread that is not copied.
    let ret = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, CLONE_ARGS_LEN) };
    match Errno::result(ret) {
        Ok(0) => Ok(None),
        // SAFETY: the kernel stored a new descriptor that nobody else owns.
        Ok(_) => Ok(Some(unsafe { OwnedFd::from_raw_fd(pidfd) })),
        Err(Errno::EEXIST) => Err(Error::Refused(format!("process number {pid} is taken"))),
        Err(e) => Err(Error::sys(format!("clone3 with process number {pid}"), e)),
    }
}

/// Maps `len` bytes of `fd` from `offset`, shared and executable, at exactly `address`.
///
/// # Safety
/// Nothing the caller still uses may lie in the range.
pub unsafe fn map_fixed(fd: i32, address: u64, len: u64, offset: u64, prot: i32) -> Result<()> {
    // SAFETY: NOREPLACE never touches an existing mapping.
    let got = unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            len as usize,
            prot,
            libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE,
            fd,
            offset as i64,
        )
    };
    if got == libc::MAP_FAILED {
        return Err(Error::sys(format!("map {len} bytes at {address:#x}"), Errno::last()));
    }
    Ok(())
}

/// Leaves Rust for good: continues in the runner at `code` with the table at `entries`.
///
/// # Safety
/// `code` must be an executable mapping of the runner, `entries` a table for it and `header` its
/// header, all mapped and staying so whatever the table unmaps.
pub unsafe fn enter_runner(code: u64, entries: u64, header: u64) -> ! {
    // SAFETY: see above; nothing of this process is used afterwards.
    unsafe {
        asm!(
            "mov rbx, {entries}",
            "jmp {code}",
            entries = in(reg) entries,
            code = in(reg) code,
            in("r15") header,
            options(noreturn)
        )
    }
}
