//! Descriptors that outlive every session: init of the moved process's namespace keeps them.
//!
//! A session that takes a drain up needs the userfaultfds, the ring, the page tables and the journal
//! of the session before it, which may have been killed at any moment. Init can't be killed without
//! ending the process, so it holds them, each in a numbered *slot*. What was sent to it is safe at
//! once: until init has run, the socket's queue holds the descriptor.
//!
//! Init holds both ends of the socket, so it never sees an end. A later session takes the far end, and
//! what is in a slot, by `pidfd_getfd`.

use crate::error::{Error, Result};
use crate::sys::pidfd::PidFd;
use crate::sys::poll;
use crate::sys::spawn::{recv_descriptors, send_descriptors};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Number, in init, of the socket's end that sessions use.
const PORT: RawFd = 40;
/// Number, in init, of its own end.
const OWN: RawFd = 41;
/// Number, in init, of slot 0.
const SLOTS: RawFd = 64;
/// Number of slots.
pub const SLOTS_MAX: u32 = 1152;
/// Length of a request: what to do, the slot, and a number.
const REQUEST_LEN: usize = 9;
const FETCH: u8 = b'f';
const HOLD: u8 = b'h';
const DROP: u8 = b'd';
const SYNC: u8 = b's';
/// Init has nothing else to do than to answer.
const SYNC_TIMEOUT: Duration = Duration::from_secs(10);

/// A session's side.
#[derive(Debug)]
pub struct Keeper {
    init: PidFd,
    port: UnixStream,
}

impl Keeper {
    /// The keeper of a process that was just made; `port` came with it.
    pub fn new(init: PidFd, port: OwnedFd) -> Self {
        Self { init, port: port.into() }
    }

    /// The keeper of a process that an earlier session made.
    pub fn find(init: PidFd) -> Result<Self> {
        let port = UnixStream::from(init.get_fd(PORT)?);
        let keeper = Self { init, port };
        // The session before may have died between a question and its answer.
        let mut stale = [0u8; REQUEST_LEN];
        while poll::readable(&keeper.port, Duration::ZERO)
            .map_err(|e| Error::io("poll the keeper's socket", e))?
        {
            recv_descriptors(&keeper.port, &mut stale)
                .map_err(|e| Error::sys("hear from the keeper", e))?;
        }
        keeper.sync()?;
        Ok(keeper)
    }

    /// Init itself.
    pub fn init(&self) -> &PidFd {
        &self.init
    }

    /// Puts a descriptor into a slot, in place of what is there. One system call: it is held when this
    /// returns, also if this process dies then.
    pub fn hold(&self, slot: u32, fd: BorrowedFd<'_>) -> Result<()> {
        self.ask(HOLD, slot, 0, &[fd])
    }

    /// The same for a descriptor that no message may carry, as that of an `io_uring` (Linux 6.7): init
    /// fetches it from this process. It is held after the next [`Keeper::sync`].
    pub fn hold_fetched(&self, slot: u32, fd: BorrowedFd<'_>) -> Result<()> {
        let own = PidFd::open(std::process::id() as i32)?;
        self.ask(FETCH, slot, fd.as_raw_fd() as u32, &[own.as_fd()])
    }

    /// Empties a slot.
    pub fn drop_slot(&self, slot: u32) -> Result<()> {
        self.ask(DROP, slot, 0, &[])
    }

    /// Takes a copy of what is in a slot; `None` when it is empty. All requests before the last
    /// [`Keeper::sync`] have taken effect.
    pub fn take(&self, slot: u32) -> Result<Option<OwnedFd>> {
        match self.init.get_fd(SLOTS + slot.min(SLOTS_MAX) as RawFd) {
            Ok(fd) => Ok(Some(fd)),
            Err(Error::Sys { errno: Errno::EBADF, .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Waits until init has done all it was asked for.
    pub fn sync(&self) -> Result<()> {
        self.ask(SYNC, 0, 0, &[])?;
        let answered = poll::readable(&self.port, SYNC_TIMEOUT)
            .map_err(|e| Error::io("poll the keeper's socket", e))?;
        if !answered {
            return Err(Error::sys("wait for init of the moved process", Errno::ETIMEDOUT));
        }
        let mut byte = [0u8; REQUEST_LEN];
        recv_descriptors(&self.port, &mut byte)
            .map(drop)
            .map_err(|e| Error::sys("hear from the keeper", e))
    }

    fn ask(&self, what: u8, slot: u32, number: u32, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut request = [what; REQUEST_LEN];
        request[1..5].copy_from_slice(&slot.to_le_bytes());
        request[5..].copy_from_slice(&number.to_le_bytes());
        send_descriptors(&self.port, &request, fds)
            .map_err(|e| Error::sys("hand a descriptor to init of the moved process", e))
    }
}

/// Init's side. Its numbers are fixed, for they are what a later session asks for.
#[derive(Debug)]
pub struct Held {
    own: UnixStream,
}

impl Held {
    /// Makes the socket, and puts `process` into slot 0. Returns the far end for the first session.
    pub fn start(process: BorrowedFd<'_>) -> Result<(Self, OwnedFd)> {
        // Messages keep their bounds, and a pair has no limit but the size of its buffer.
        let (own, port) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|e| Error::sys("make the keeper's socket", e))?;
        make_room()?;
        place(port.as_fd(), PORT)?;
        place(own.as_fd(), OWN)?;
        place(process, SLOTS)?;
        Ok((Self { own: own.into() }, port))
    }

    /// Init's end, to wait on.
    pub fn socket(&self) -> &UnixStream {
        &self.own
    }

    /// Does what has been asked for. Nobody is told of errors: who takes finds the slot empty.
    pub fn serve(&self) {
        while poll::readable(&self.own, Duration::ZERO).unwrap_or(false) {
            let mut request = [0u8; REQUEST_LEN];
            let Ok((REQUEST_LEN, mut fds)) = recv_descriptors(&self.own, &mut request) else {
                return;
            };
            let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i: usize| request[at + i]));
            let (slot, theirs) = (word(1), word(5));
            if slot >= SLOTS_MAX {
                continue;
            }
            let number = SLOTS + slot as RawFd;
            match (request[0], fds.pop()) {
                (HOLD, Some(fd)) => drop(place(fd.as_fd(), number)),
                (FETCH, Some(session)) => {
                    let fetched = PidFd::adopt_unnamed(session).get_fd(theirs as RawFd);
                    drop(fetched.and_then(|fd| place(fd.as_fd(), number)));
                }
                (DROP, _) => {
                    // SAFETY: integers only; numbers of slots belong to no Rust value.
                    unsafe { libc::close(number) };
                }
                (SYNC, _) => drop(send_descriptors(&self.own, b"s", &[])),
                _ => {}
            }
        }
    }
}

/// Slots have numbers up to a fixed one: a limit below it would lose what is handed over, unnoticed.
fn make_room() -> Result<()> {
    let needed = SLOTS as u64 + u64::from(SLOTS_MAX);
    let limits = getrlimit(Resource::RLIMIT_NOFILE);
    let (soft, hard) = limits.map_err(|e| Error::sys("read the limit of open files", e))?;
    if soft >= needed {
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, needed, hard.max(needed)).map_err(|_| {
        Error::Refused(format!(
            "the agent may have {hard} files open, {needed} are needed: raise its limit (ulimit -n, LimitNOFILE)"
        ))
    })
}

fn place(fd: BorrowedFd<'_>, number: RawFd) -> Result<()> {
    // SAFETY: integers only; the numbers used here belong to no Rust value.
    Errno::result(unsafe { libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC) })
        .map(drop)
        .map_err(|e| Error::sys("keep a descriptor", e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    /// A child keeps what it was handed; a keeper found later takes it.
    #[test]
    fn what_was_handed_over_can_be_taken_later() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let pidfd = PidFd::open(child.id() as i32).unwrap();
        let (held, port) = Held::start(pidfd.as_fd()).unwrap();
        let keeper = Keeper::new(PidFd::open(std::process::id() as i32).unwrap(), port);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        keeper.hold(7, theirs.as_fd()).unwrap();
        drop(theirs);
        assert!(keeper.take(7).unwrap().is_none(), "init has not run yet");
        held.serve();
        let mut taken = UnixStream::from(keeper.take(7).unwrap().unwrap());
        ours.write_all(b"x").unwrap();
        let mut byte = [0u8];
        taken.read_exact(&mut byte).unwrap();
        keeper.drop_slot(7).unwrap();
        held.serve();
        assert!(keeper.take(7).unwrap().is_none());
        assert!(keeper.take(0).unwrap().is_some());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
