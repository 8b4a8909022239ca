//! A connected stream socket with time limits, whatever its blocking mode.
//!
//! Everything goes through `recv` and `send` with `MSG_DONTWAIT` (or none, where waiting for ever is asked for), so that
//! a descriptor inherited in either mode works, and no time-out is kept in the socket, where the other direction would share it.

use crate::error::{Error, Result};
use crate::lane::Block;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{self, MsgFlags, Shutdown, SockaddrStorage, sockopt};
use nix::sys::time::TimeSpec;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Idle time after which the kernel asks whether the peer is still there.
const KEEPALIVE_IDLE_S: u32 = 5;
/// Time between two such questions.
const KEEPALIVE_INTERVAL_S: u32 = 5;
/// Unanswered questions after which the connection is given up.
const KEEPALIVE_COUNT: u32 = 4;
/// Time after which sent bytes that nobody acknowledged end the connection: the kernel's own limit is a quarter of an hour.
/// It also ends a connection whose peer lives and has not read for so long that nothing could be sent.
const UNACKNOWLEDGED_MS: u32 = 60_000;

/// The outcome of a call with a time limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait<T> {
    /// It was done.
    Done(T),
    /// The time is over, or it would have had to wait.
    NotYet,
}

/// A stream socket and the name of its far end.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    peer: Arc<str>,
}

impl Socket {
    /// Takes over a connected socket and sets what every connection of ours wants: no delay, and notice of dead peers.
    pub(crate) fn new(fd: OwnedFd) -> Self {
        let peer = peer_name(&fd);
        let socket = Socket { fd, peer };
        socket.tune();
        socket
    }

    /// A second handle of a socket that stays the caller's.
    pub(crate) fn duplicate(stream: &impl AsFd) -> Result<Self> {
        let fd = stream.as_fd();
        let peer = peer_name(&fd);
        match fd.try_clone_to_owned() {
            Ok(fd) => Ok(Socket { fd, peer }),
            Err(source) => Err(Error::Io { peer, what: "duplicating a descriptor", source }),
        }
    }

    /// Each option is an improvement, not a need, and sockets of other families than TCP have none of them: errors are
    /// left aside.
    fn tune(&self) {
        let _ = socket::setsockopt(&self.fd, sockopt::TcpNoDelay, &true);
        let _ = socket::setsockopt(&self.fd, sockopt::KeepAlive, &true);
        let _ = socket::setsockopt(&self.fd, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S);
        let _ = socket::setsockopt(&self.fd, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S);
        let _ = socket::setsockopt(&self.fd, sockopt::TcpKeepCount, &KEEPALIVE_COUNT);
        let _ = socket::setsockopt(&self.fd, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MS);
    }

    /// Sizes of the kernel's buffers; the kernel caps them (`net.core.[rw]mem_max`) and turns its own sizing off.
    pub(crate) fn set_buffers(&self, send_bytes: usize, recv_bytes: usize) -> Result<()> {
        let set = |result: nix::Result<()>| {
            result.map_err(|errno| self.io("setting the size of a socket buffer", errno))
        };
        set(socket::setsockopt(&self.fd, sockopt::SndBuf, &send_bytes))?;
        set(socket::setsockopt(&self.fd, sockopt::RcvBuf, &recv_bytes))
    }

    /// The name of the far end, for messages.
    pub(crate) fn peer(&self) -> Arc<str> {
        Arc::clone(&self.peer)
    }

    /// The address of this end; the unspecified one where a socket has none.
    pub(crate) fn local_ip(&self) -> IpAddr {
        ip_of(socket::getsockname(self.as_raw_fd()))
    }

    /// The address of the far end.
    pub(crate) fn peer_ip(&self) -> IpAddr {
        ip_of(socket::getpeername(self.as_raw_fd()))
    }

    /// Reads what is there, at least one byte; 0 is the end of the stream.
    pub(crate) fn recv(&self, buf: &mut [u8], block: Block) -> Result<Wait<usize>> {
        loop {
            match socket::recv(self.as_raw_fd(), buf, flags(block)) {
                Ok(len) => return Ok(Wait::Done(len)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if !self.wait(PollFlags::POLLIN, block)? {
                        return Ok(Wait::NotYet);
                    }
                }
                Err(errno) => return Err(self.io("receiving", errno)),
            }
        }
    }

    /// Sends what fits, at least one byte.
    pub(crate) fn send(&self, buf: &[u8], block: Block) -> Result<Wait<usize>> {
        loop {
            match socket::send(self.as_raw_fd(), buf, flags(block) | MsgFlags::MSG_NOSIGNAL) {
                Ok(len) => return Ok(Wait::Done(len)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    if !self.wait(PollFlags::POLLOUT, block)? {
                        return Ok(Wait::NotYet);
                    }
                }
                Err(errno) => return Err(self.io("sending", errno)),
            }
        }
    }

    /// Sends all of it; `what` says in a time-out what was being done.
    pub(crate) fn send_all(&self, mut buf: &[u8], block: Block, what: &'static str) -> Result<()> {
        while !buf.is_empty() {
            match self.send(buf, block)? {
                Wait::Done(len) => buf = &buf[len..],
                Wait::NotYet => return Err(Error::Timeout { peer: self.peer(), what }),
            }
        }
        Ok(())
    }

    /// Waits for any of `events` (or an error, which the next call will show); false when the time is over.
    pub(crate) fn wait(&self, events: PollFlags, block: Block) -> Result<bool> {
        self.wait_which(events, block).map(|which| which.is_some())
    }

    /// Waits for any of `events` and says which came; None when the time is over.
    pub(crate) fn wait_which(&self, events: PollFlags, block: Block) -> Result<Option<PollFlags>> {
        loop {
            let timeout = match block {
                Block::No => return Ok(None),
                Block::Forever => None,
                Block::Until(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left == Duration::ZERO {
                        return Ok(None);
                    }
                    Some(TimeSpec::from_duration(left))
                }
            };
            let mut fds = [PollFd::new(self.fd.as_fd(), events)];
            match ppoll(&mut fds, timeout, None) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(Some(fds[0].revents().unwrap_or(events))),
                Err(errno) => return Err(self.io("waiting", errno)),
            }
        }
    }

    /// Ends the connection in both directions: whoever waits on it, on either side, wakes up.
    pub(crate) fn shutdown(&self, how: Shutdown) {
        // It fails only when the connection has ended already.
        let _ = socket::shutdown(self.as_raw_fd(), how);
    }

    fn io(&self, what: &'static str, errno: Errno) -> Error {
        Error::Io { peer: self.peer(), what, source: errno.into() }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn flags(block: Block) -> MsgFlags {
    match block {
        Block::Forever => MsgFlags::empty(),
        Block::No | Block::Until(_) => MsgFlags::MSG_DONTWAIT,
    }
}

fn ip_of(address: nix::Result<SockaddrStorage>) -> IpAddr {
    let Ok(address) = address else { return IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    let v6 = address.as_sockaddr_in6().map(|a| a.ip().to_canonical());
    let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
    v4.or(v6).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

fn peer_name(fd: &impl AsFd) -> Arc<str> {
    match socket::getpeername::<SockaddrStorage>(fd.as_fd().as_raw_fd()) {
        Ok(address)
            if address.as_sockaddr_in().is_some() || address.as_sockaddr_in6().is_some() =>
        {
            address.to_string().into()
        }
        _ => "peer".into(),
    }
}
