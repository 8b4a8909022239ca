//! What this kernel lets this process do, found out by trying.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `UFFDIO_API`.
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFD_API: u64 = 0xaa;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<Api>() == 24);

/// Features of userfaultfd (`UFFD_FEATURE_*`), for a descriptor that also handles faults inside
/// syscalls.
pub fn userfaultfd_features() -> nix::Result<u64> {
    // SAFETY: integers only.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) })?;
    // SAFETY: just made, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = Api { version: UFFD_API, features: 0, ioctls: 0 };
    // SAFETY: the ioctl reads and writes the struct above.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
    Ok(api.features)
}

/// True if `io_uring` may be used. A call without parameters fails with `EFAULT` when it is allowed, and
/// earlier when it is not.
pub fn io_uring_allowed() -> bool {
    // SAFETY: the kernel refuses the null pointer.
    let ret = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, 0) };
    Errno::result(ret) == Err(Errno::EFAULT)
}
