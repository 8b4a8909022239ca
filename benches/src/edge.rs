//! The edge to the kernel: all `unsafe` of the harness.
//!
//! Rules that make it sound: what is given to the kernel outlives the call; memory that it fills behind the
//! compiler's back is never made a reference; what runs between fork and exec makes system calls only.

use anyhow::{Context, Result};
use nix::errno::Errno;
use slipstream_core::sys::uffd::{UFFDIO_API, Uffd};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Starts the command in a session of its own and without the descriptors this program inherited: a pipe shared
/// with the outside can't be moved.
pub fn detach(command: &mut Command) {
    // SAFETY: the closure makes two system calls with integer arguments, which are allowed after fork.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            let last = libc::c_uint::MAX;
            Errno::result(libc::syscall(
                libc::SYS_close_range,
                3,
                last,
                libc::CLOSE_RANGE_CLOEXEC,
            ))?;
            Ok(())
        });
    }
}

/// Processor time of the calling thread, in nanoseconds.
pub fn thread_cpu_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` outlives the call, which can't fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A userfaultfd of this process and an empty range of `len` bytes that waits for its pages through it.
pub fn range_to_fill(len: u64) -> Result<(OwnedFd, u64)> {
    // SAFETY: takes integers only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let fd = Errno::result(fd).context("userfaultfd")?;
    // SAFETY: the kernel just returned this descriptor; nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = [0xaau64, 0, 0];
    // SAFETY: `api` is as long as the request's structure and outlives the call.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
    Errno::result(ret).context("agreeing with userfaultfd")?;
    // SAFETY: a new anonymous mapping at an address the kernel chooses; no reference to it is ever made.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(Errno::last()).context("mapping memory to be filled");
    }
    let uffd = Uffd::from_fd(fd.try_clone().context("dup of a userfaultfd")?);
    uffd.register(base as u64, len).context("registering memory to be filled")?;
    Ok((fd, base as u64))
}
