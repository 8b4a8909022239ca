//! Descriptors of other processes: `pidfd_getfd`, `kcmp`, `tee`, counters, and the `fcntl`s that libraries lack.

use libc::{c_int, c_long};
use nix::errno::Errno;
use std::cmp::Ordering;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Resources that [`same_resource`] compares (`linux/kcmp.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Resource {
    /// Address space.
    Memory = 1,
    /// Descriptor table.
    Files = 2,
    /// Root, current directory and umask.
    Fs = 3,
}

const KCMP_FILE: c_long = 0;
const KCMP_EPOLL_TFD: c_long = 7;
const F_SETPIPE_SZ: c_int = 1031;
const F_GETOWN_EX: c_int = 16;

/// `struct kcmp_epoll_slot`.
#[repr(C)]
struct EpollSlot {
    epoll_fd: u32,
    target_fd: u32,
    target_index: u32,
}
const _: () = assert!(size_of::<EpollSlot>() == 12);

fn owned(ret: c_long) -> nix::Result<OwnedFd> {
    let fd = Errno::result(ret)? as c_int;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Opens a pidfd of a process.
pub fn pidfd_open(pid: i32) -> nix::Result<OwnedFd> {
    // SAFETY: integers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A duplicate, in this process, of descriptor `fd` of another.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> nix::Result<OwnedFd> {
    // SAFETY: integers only.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) })
}

fn kcmp(pids: [i32; 2], kind: c_long, a: c_long, b: c_long) -> nix::Result<c_long> {
    // SAFETY: the only kind with a pointer is KCMP_EPOLL_TFD, whose caller passes a live slot as `b`.
    Errno::result(unsafe { libc::syscall(libc::SYS_kcmp, pids[0], pids[1], kind, a, b) })
}

/// Orders two descriptors of a process by their open file description; equal means the same one.
pub fn compare_descriptions(pid: i32, a: i32, b: i32) -> nix::Result<Ordering> {
    match kcmp([pid, pid], KCMP_FILE, c_long::from(a), c_long::from(b))? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3: the kernel knows no order.
        _ => Err(Errno::EINVAL),
    }
}

/// True if the epoll set `epoll_fd` holds, under the number `fd`, what `fd` refers to now.
pub fn watches_current(pid: i32, epoll_fd: i32, fd: i32) -> nix::Result<bool> {
    let slot = EpollSlot { epoll_fd: epoll_fd as u32, target_fd: fd as u32, target_index: 0 };
    let at = std::ptr::from_ref(&slot) as c_long;
    Ok(kcmp([pid, pid], KCMP_EPOLL_TFD, c_long::from(fd), at)? == 0)
}

/// True if two tasks share a resource.
pub fn same_resource(a: i32, b: i32, resource: Resource) -> nix::Result<bool> {
    Ok(kcmp([a, b], resource as c_long, 0, 0)? == 0)
}

/// Copies what is in the pipe `from` to the pipe `to` without taking it out; bytes copied.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: usize) -> nix::Result<usize> {
    // SAFETY: integers only.
    let ret = unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), len, libc::SPLICE_F_NONBLOCK) };
    Errno::result(ret).map(|n| n as usize)
}

/// Reads an eventfd, without waiting (since Linux 5.8) however it was opened.
pub fn read_counter(fd: BorrowedFd<'_>) -> nix::Result<u64> {
    let mut value = 0u64;
    let part = libc::iovec { iov_base: (&raw mut value).cast(), iov_len: size_of::<u64>() };
    // SAFETY: one part that describes `value`; an offset of -1 means that of the file, which has none.
    let ret = unsafe { libc::preadv2(fd.as_raw_fd(), &raw const part, 1, -1, libc::RWF_NOWAIT) };
    match Errno::result(ret)? {
        8 => Ok(value),
        _ => Err(Errno::EIO),
    }
}

/// Adds to an eventfd.
pub fn write_counter(fd: BorrowedFd<'_>, value: u64) -> nix::Result<()> {
    nix::unistd::write(fd, &value.to_ne_bytes()).map(drop)
}

/// Sets the capacity of a pipe in bytes.
pub fn set_pipe_capacity(fd: BorrowedFd<'_>, bytes: i32) -> nix::Result<()> {
    // SAFETY: integers only.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_SETPIPE_SZ, bytes) }).map(drop)
}

/// An `fcntl` without argument (`F_GETSIG`, `F_GETPIPE_SZ`, `F_GET_SEALS`).
pub fn fcntl_get(fd: BorrowedFd<'_>, command: c_int) -> nix::Result<i32> {
    debug_assert_ne!(command, F_GETOWN_EX, "it takes a pointer");
    // SAFETY: the commands listed ignore the argument.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), command, 0) })
}

/// `F_GETOWN_EX`: type and id of who gets `SIGIO`; id 0 when nobody.
pub fn owner(fd: BorrowedFd<'_>) -> nix::Result<(i32, i32)> {
    let mut owner = [0i32; 2];
    // SAFETY: the kernel writes a struct of two ints.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) })?;
    Ok((owner[0], owner[1]))
}

/// Bytes that wait to be read from a pipe.
pub fn bytes_waiting(fd: BorrowedFd<'_>) -> nix::Result<usize> {
    let mut n: c_int = 0;
    // SAFETY: FIONREAD writes one int.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut n) })?;
    Ok(n.max(0) as usize)
}

/// Nanoseconds until a timerfd expires next; 0 when it is disarmed.
pub fn timer_left(fd: BorrowedFd<'_>) -> nix::Result<i64> {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut now = libc::itimerspec { it_interval: zero, it_value: zero };
    // SAFETY: the kernel writes one itimerspec.
    Errno::result(unsafe { libc::timerfd_gettime(fd.as_raw_fd(), &raw mut now) })?;
    Ok(now.it_value.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.it_value.tv_nsec))
}
