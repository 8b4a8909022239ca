//! Pipes whose ends are all inside the process.

use super::{Capture, Open};
use crate::error::Error;
use crate::manifest::PipeEnd;
use crate::preflight::Blocker;
use crate::proc::holders::{Object, pipe_ino};
use crate::sys::files as sys;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use std::os::fd::{AsFd, BorrowedFd};

const F_GETPIPE_SZ: i32 = 1032;
const ACCESS: u32 = libc::O_ACCMODE as u32;

/// True for a pipe without a name.
pub(super) fn is_pipe(one: &Open) -> bool {
    pipe_ino(&one.link).is_some()
}

impl Capture<'_> {
    /// One end of a pipe; the first end that can be read carries the content.
    pub(super) fn pipe(&mut self, one: &Open) -> Result<PipeEnd, Blocker> {
        let ino = one.stat.st_ino;
        if let Some(other) = self.held_elsewhere(Object::Pipe { ino }) {
            let remedy = if one.fd <= 2 {
                "redirect it with --stdio null or --stdio FILE"
            } else {
                "let the program close it"
            };
            return Err(one.blocker(format!("a pipe shared with process {other}"), remedy));
        }
        let dup = self.duplicate(one)?;
        let capacity = sys::fcntl_get(dup.as_fd(), F_GETPIPE_SZ)
            .map_err(|e| Blocker::unknown(one.name(), &Error::sys("ask for its capacity", e)))?;
        let readable = one.flags() & ACCESS != libc::O_WRONLY as u32;
        let content = if readable && self.pipes_read.insert(ino) {
            read_content(dup.as_fd(), capacity).map_err(|e| {
                Blocker::new(
                    one.name(),
                    format!("the content of a pipe of {capacity} bytes can't be read: {e}"),
                    "raise fs.pipe-max-size",
                )
            })?
        } else {
            Vec::new()
        };
        Ok(PipeEnd {
            pipe: ino,
            capacity_bytes: capacity as u32,
            content,
            write_end: one.flags() & ACCESS == libc::O_WRONLY as u32,
        })
    }
}

/// What is in a pipe, without taking it out: `tee` to a pipe of our own. A read from that returns one
/// packet where the writer used packet mode; other writes are joined into one element.
fn read_content(pipe: BorrowedFd<'_>, capacity: i32) -> nix::Result<Vec<Vec<u8>>> {
    let waiting = sys::bytes_waiting(pipe)?;
    if waiting == 0 {
        return Ok(Vec::new());
    }
    let (from, to) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    // As many slots as the original, since short writes fill a slot each.
    sys::set_pipe_capacity(to.as_fd(), capacity)?;
    let copied = match sys::tee(pipe, to.as_fd(), waiting) {
        Err(Errno::EAGAIN) => 0,
        other => other?,
    };
    // Of a running process (preflight) the content may just have been read; that of a frozen one stays.
    if copied != waiting && sys::bytes_waiting(pipe)? == waiting {
        return Err(Errno::EMSGSIZE);
    }
    drop(to);
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let mut buffer = vec![0; copied.max(1)];
    loop {
        match nix::unistd::read(from.as_fd(), &mut buffer) {
            Ok(0) => return Ok(pieces),
            Ok(n) => pieces.push(buffer[..n].to_vec()),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}
