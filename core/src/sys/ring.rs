//! The `io_uring` whose table of fixed files holds userfaultfds for as long as its mapping lives.

use crate::error::{Error, Result};
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

const IORING_REGISTER_FILES_UPDATE: u64 = 6;

/// Puts a descriptor into a slot of the ring.
pub fn hold(ring: BorrowedFd<'_>, slot: u32, fd: BorrowedFd<'_>) -> Result<()> {
    #[repr(C)]
    struct Update {
        offset: u32,
        resv: u32,
        fds: u64,
    }
    const _: () = assert!(size_of::<Update>() == 16);
    let number: RawFd = fd.as_raw_fd();
    let mut update = Update { offset: slot, resv: 0, fds: (&raw const number) as u64 };
    // SAFETY: `update` and the number it points to outlive the call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.as_raw_fd(),
            IORING_REGISTER_FILES_UPDATE,
            &raw mut update,
            1,
        )
    };
    Errno::result(ret).map(drop).map_err(|e| Error::sys("hold a userfaultfd in the ring", e))
}
