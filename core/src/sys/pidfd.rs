//! Process descriptors: they name a process without the risk that its number is reused.

use crate::error::{Error, Result};
use libc::pid_t;
use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// A reference to a process that stays right when its number is reused.
#[derive(Debug)]
pub struct PidFd {
    pid: pid_t,
    fd: OwnedFd,
}

impl PidFd {
    /// Opens a process by number.
    pub fn open(pid: pid_t) -> Result<Self> {
        // SAFETY: takes integers only.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = Errno::result(fd).map_err(|e| match e {
            Errno::ESRCH => Error::Gone { pid },
            e => Error::sys(format!("pidfd_open of process {pid}"), e),
        })?;
        // SAFETY: the kernel just returned this descriptor; nobody else owns it.
        Ok(Self { pid, fd: unsafe { OwnedFd::from_raw_fd(fd as RawFd) } })
    }

    /// Takes a descriptor that names a process; the number is the one this PID namespace sees.
    pub fn adopt(fd: OwnedFd) -> Result<Self> {
        let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
        let text =
            std::fs::read_to_string(&path).map_err(|e| Error::io(format!("read {path}"), e))?;
        let pid: pid_t = text
            .lines()
            .find_map(|l| l.strip_prefix("Pid:"))
            .and_then(|n| n.trim().parse().ok())
            .ok_or_else(|| Error::parse("fdinfo of a process descriptor", &text))?;
        if pid <= 0 {
            return Err(Error::Gone { pid });
        }
        Ok(Self { pid, fd })
    }

    /// The same for a process that may have been reaped; its number is then zero.
    pub fn adopt_exited(fd: OwnedFd) -> Result<Self> {
        let copy = fd.try_clone().map_err(|e| Error::io("duplicate a descriptor", e))?;
        match Self::adopt(fd) {
            Err(Error::Gone { .. }) => Ok(Self::adopt_unnamed(copy)),
            adopted => adopted,
        }
    }

    /// Takes a descriptor that names a process which this PID namespace may not see; its number is
    /// then zero here.
    pub fn adopt_unnamed(fd: OwnedFd) -> Self {
        Self { pid: 0, fd }
    }

    /// The process number.
    pub fn pid(&self) -> pid_t {
        self.pid
    }

    /// Duplicates descriptor `fd` of the process into ours.
    pub fn get_fd(&self, fd: RawFd) -> Result<OwnedFd> {
        // SAFETY: takes integers only.
        let got = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.fd.as_raw_fd(), fd, 0) };
        let got = Errno::result(got)
            .map_err(|e| Error::sys(format!("pidfd_getfd {fd} of process {}", self.pid), e))?;
        // SAFETY: the kernel just returned this descriptor; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(got as RawFd) })
    }

    /// Sends a signal; a process that is gone is not an error.
    pub fn kill(&self, signal: i32) -> Result<()> {
        // SAFETY: takes integers and a null pointer.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(ret) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(Error::sys(format!("signal {signal} to process {}", self.pid), e)),
        }
    }

    /// Has the kernel put the pages of a range together into huge pages (`MADV_COLLAPSE`, Linux 6.1).
    pub fn collapse(&self, start: u64, len: u64) -> nix::Result<()> {
        const MADV_COLLAPSE: i32 = 25;
        let range = libc::iovec { iov_base: start as *mut libc::c_void, iov_len: len as usize };
        // SAFETY: `range` outlives the call; its address belongs to the other process.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                self.fd.as_raw_fd(),
                &raw const range,
                1,
                MADV_COLLAPSE,
                0,
            )
        };
        Errno::result(ret).map(drop)
    }

    /// True when the process has exited (it may still be a zombie).
    pub fn exited(&self) -> bool {
        self.wait_exit(Duration::ZERO)
    }

    /// Waits for the exit for at most `timeout`; true when the process has exited.
    pub fn wait_exit(&self, timeout: Duration) -> bool {
        let mut fds = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let millis = timeout.as_millis().min(i32::MAX as u128) as i32;
        // SAFETY: `fds` is one live pollfd.
        unsafe { libc::poll(&raw mut fds, 1, millis) == 1 }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
