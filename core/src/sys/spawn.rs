//! Handing descriptors to a child program at known numbers, and sending them over sockets.

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// Number of the first descriptor handed over; the others follow.
pub const FIRST_HANDED: RawFd = 3;
/// Descriptors are moved out of the way to numbers from here on, before they are put in place.
const ASIDE: RawFd = 64;
/// Most descriptors handed over at once.
const HANDED_MAX: usize = 8;

/// Starts a child in which `fds` are open as 3, 4, ... in order.
///
/// # Panics
/// With more than eight descriptors.
pub fn spawn_with(command: &mut Command, fds: &[BorrowedFd<'_>]) -> io::Result<Child> {
    assert!(fds.len() <= HANDED_MAX);
    let mut raw = [-1; HANDED_MAX];
    for (slot, fd) in raw.iter_mut().zip(fds) {
        *slot = fd.as_raw_fd();
    }
    let len = fds.len();
    // SAFETY: between fork and exec only fcntl, dup2 and close are called, all async-signal-safe, on
    // integers copied into the closure.
    unsafe { command.pre_exec(move || place(&raw[..len])).spawn() }
}

fn place(fds: &[RawFd]) -> io::Result<()> {
    let mut aside = [-1; HANDED_MAX];
    for (to, from) in aside.iter_mut().zip(fds) {
        // SAFETY: integers only.
        *to = Errno::result(unsafe { libc::fcntl(*from, libc::F_DUPFD, ASIDE) })?;
    }
    for (i, from) in aside[..fds.len()].iter().enumerate() {
        // SAFETY: integers only.
        Errno::result(unsafe { libc::dup2(*from, FIRST_HANDED + i as RawFd) })?;
        // SAFETY: integers only; this duplicate was made above.
        unsafe { libc::close(*from) };
    }
    Ok(())
}

/// Takes over descriptor number `FIRST_HANDED + index`, close-on-exec from now on. To be called once
/// for each, early in a program that was started by [`spawn_with`].
pub fn take_handed(index: usize) -> io::Result<OwnedFd> {
    let fd = FIRST_HANDED + index as RawFd;
    // SAFETY: integers only.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: the descriptor is open (checked by fcntl) and was handed over for this program to own.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends bytes and descriptors in one message.
pub fn send_descriptors(
    socket: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> nix::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL;
    let fd = socket.as_raw_fd();
    uninterrupted(|| sendmsg::<()>(fd, &[IoSlice::new(bytes)], control, flags, None).map(drop))
}

/// A socket with a time-out answers EINTR when this process is stopped and goes on, whatever handlers it has.
fn uninterrupted<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// Receives one message into `bytes`, with the descriptors that came along (at most four).
pub fn recv_descriptors(
    socket: &UnixStream,
    bytes: &mut [u8],
) -> nix::Result<(usize, Vec<OwnedFd>)> {
    uninterrupted(|| receive_once(socket, bytes))
}

fn receive_once(socket: &UnixStream, bytes: &mut [u8]) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut iov = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(got) = control {
            // SAFETY: the kernel just installed these descriptors for us.
            fds.extend(got.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, fds))
}
