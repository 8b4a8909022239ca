//! Authenticated, encrypted connections.

use crate::error::{Error, Result};
use crate::handshake::{
    self, Ciphers, Failure, Greeting, Initiator, MESSAGE_LEN_BYTES, Purpose, Side,
};
use crate::key::Key;
use crate::lane::Block;
use crate::message::{Receiver, Sender};
use crate::preamble::{self, Route, VERSION, Version};
use crate::record::{Fill, RecordReader, RecordWriter};
use crate::socket::{Socket, Wait};
use nix::sys::socket::Shutdown;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Records that a channel's buffers hold.
const BUFFER_RECORDS: usize = 2;

/// How long connecting may take.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For the far host to accept the connection; over all of its addresses.
    pub connect: Duration,
    /// For the handshake as a whole, however the peer dribbles.
    pub handshake: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { connect: Duration::from_secs(10), handshake: Duration::from_secs(10) }
    }
}

/// Turns `HOST:PORT` into addresses. Takes as long as the system's resolver.
pub fn resolve(host_port: &str) -> Result<Vec<SocketAddr>> {
    let fail = |source| Error::Resolve { name: host_port.into(), source };
    let addresses: Vec<_> = host_port.to_socket_addrs().map_err(fail)?.collect();
    if addresses.is_empty() {
        return Err(fail(io::Error::new(io::ErrorKind::NotFound, "no address")));
    }
    Ok(addresses)
}

/// A connection to a peer that has proven to hold our key.
#[derive(Debug)]
pub struct Channel {
    sender: Sender,
    receiver: Receiver,
    greeting: Greeting,
    minor: u16,
}

/// Ends a connection from another thread.
#[derive(Debug, Clone)]
pub struct Closer(Arc<Socket>);

impl Closer {
    pub(crate) fn new(socket: &Arc<Socket>) -> Self {
        Closer(Arc::clone(socket))
    }

    /// Ends the connection: calls that wait on it, here and at the peer, return.
    pub fn close(&self) {
        self.0.shutdown(Shutdown::Both);
    }
}

impl AsFd for Closer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Channel {
    /// Connects to the first of `addresses` that accepts, and does the client's part.
    pub fn connect(
        addresses: &[SocketAddr],
        key: &Key,
        route: Route,
        purpose: Purpose,
        timeouts: Timeouts,
    ) -> Result<Self> {
        let stream = dial(addresses, timeouts.connect)?;
        Self::initiate(stream, key, route, purpose, timeouts)
    }

    /// Does the client's part, from the preamble on, over a connected stream socket.
    pub fn initiate(
        stream: impl Into<OwnedFd>,
        key: &Key,
        route: Route,
        purpose: Purpose,
        timeouts: Timeouts,
    ) -> Result<Self> {
        let link = Link::new(stream.into(), timeouts);
        let (initiator, message) = Initiator::new(key)?;
        let opening = [&preamble::encode(route)[..], &message[..]].concat();
        let answer = link
            .send(&opening)
            .and_then(|()| link.handshake_message())
            .map_err(|error| turned_away(error, &link.socket))?;
        let ciphers = initiator.finish(&answer).map_err(|failure| link.failure(failure))?;
        let ours = Greeting::new(Side::Client, purpose, route);
        let mut channel = link.into_channel(ciphers, ours);
        channel.greet(&ours, timeouts)?;
        let theirs = channel.greeted(Side::Server, timeouts)?;
        if (theirs.purpose, theirs.route) != (purpose, route) {
            let what = "it answers for another connection";
            return Err(Error::Protocol { peer: channel.peer(), what });
        }
        channel.agree(&ours, &theirs)
    }

    /// Does the server's part, from after the preamble on. Nothing is sent before the peer has shown a message made with
    /// the key, and no greeting before the peer has shown that it is no replay.
    ///
    /// The caller compares `route()` with the route it read from the preamble or knows as its own: only the one in here is
    /// proven to be the client's.
    pub fn accept(stream: impl Into<OwnedFd>, key: &Key, timeouts: Timeouts) -> Result<Self> {
        let link = Link::new(stream.into(), timeouts);
        let first = link.handshake_message()?;
        let (answer, ciphers) =
            handshake::respond(key, &first)?.map_err(|failure| link.failure(failure))?;
        link.send(&answer)?;
        let placeholder = Greeting::new(Side::Server, Purpose::Control, Route::NEW);
        let mut channel = link.into_channel(ciphers, placeholder);
        let theirs = channel.greeted(Side::Client, timeouts)?;
        let ours = Greeting::new(Side::Server, theirs.purpose, theirs.route);
        channel.greeting = ours;
        channel.greet(&ours, timeouts)?;
        channel.agree(&ours, &theirs)
    }

    /// What the client opened the connection for.
    pub fn purpose(&self) -> Purpose {
        self.greeting.purpose
    }

    /// The route the client asked for.
    pub fn route(&self) -> Route {
        self.greeting.route
    }

    /// The minor version both sides speak.
    pub fn minor(&self) -> u16 {
        self.minor
    }

    /// The name of the far end, for messages.
    pub fn peer(&self) -> Arc<str> {
        self.sender.socket.peer()
    }

    /// The address of this end.
    pub fn local_ip(&self) -> IpAddr {
        self.sender.socket.local_ip()
    }

    /// The address of the far end.
    pub fn peer_ip(&self) -> IpAddr {
        self.sender.socket.peer_ip()
    }

    /// A handle to end the connection by.
    pub fn closer(&self) -> Closer {
        Closer::new(&self.sender.socket)
    }

    /// Sends a message; see [`Sender::send`].
    pub fn send(&mut self, message: &[u8]) -> Result<()> {
        self.sender.send(message)
    }

    /// Sends a message until `deadline`; see [`Sender::send_by`].
    pub fn send_by(&mut self, message: &[u8], deadline: Instant) -> Result<()> {
        self.sender.send_by(message, deadline)
    }

    /// Waits for a message; see [`Receiver::recv`].
    pub fn recv(&mut self, len_bytes_max: usize) -> Result<Vec<u8>> {
        self.receiver.recv(len_bytes_max)
    }

    /// Waits for a message until `deadline`; see [`Receiver::recv_by`].
    pub fn recv_by(&mut self, len_bytes_max: usize, deadline: Instant) -> Result<Vec<u8>> {
        self.receiver.recv_by(len_bytes_max, deadline)
    }

    /// The two directions, for two threads.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }

    /// The parts a page lane is made of.
    pub(crate) fn into_parts(self) -> (Arc<Socket>, RecordWriter, RecordReader) {
        (self.sender.socket, self.sender.writer, self.receiver.reader)
    }

    fn greet(&mut self, ours: &Greeting, timeouts: Timeouts) -> Result<()> {
        let sender = &mut self.sender;
        sender.writer.append(&ours.encode());
        if sender.writer.flush(&sender.socket, until(timeouts.handshake))? {
            return Ok(());
        }
        Err(Error::Timeout { peer: sender.socket.peer(), what: "sending the greeting" })
    }

    /// Waits for the peer's greeting. Only who holds the key and takes part in this very handshake can make one.
    fn greeted(&mut self, side: Side, timeouts: Timeouts) -> Result<Greeting> {
        let receiver = &mut self.receiver;
        let peer = receiver.socket.peer();
        let until = until(timeouts.handshake);
        let record = loop {
            match receiver.reader.next(&receiver.socket) {
                Ok(Some(range)) => break receiver.reader.plain(range),
                Ok(None) => {}
                Err(Error::Protocol { .. }) => return Err(Error::WrongKey { peer }),
                Err(error) => return Err(error),
            }
            match receiver.reader.fill(&receiver.socket, until)? {
                Fill::More => {}
                Fill::NotYet => {
                    return Err(Error::Timeout { peer, what: "waiting for its greeting" });
                }
                Fill::End => return Err(Error::Truncated { peer }),
            }
        };
        match Greeting::decode(record) {
            Some(greeting) if greeting.side == side => Ok(greeting),
            _ => Err(Error::Protocol { peer, what: "its greeting is malformed" }),
        }
    }

    fn agree(mut self, ours: &Greeting, theirs: &Greeting) -> Result<Self> {
        match ours.agree(theirs) {
            Some(minor) => {
                self.minor = minor;
                Ok(self)
            }
            None => Err(Error::Version {
                peer: self.peer(),
                theirs: Version { major: VERSION.major, minor: theirs.minor },
                ours: VERSION,
            }),
        }
    }
}

fn until(timeout: Duration) -> Block {
    Block::Until(Instant::now() + timeout)
}

/// A connection before there are ciphers.
struct Link {
    socket: Socket,
    deadline: Block,
}

impl Link {
    fn new(fd: OwnedFd, timeouts: Timeouts) -> Self {
        Link { socket: Socket::new(fd), deadline: until(timeouts.handshake) }
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        self.socket.send_all(bytes, self.deadline, "sending the handshake")
    }

    /// Reads a handshake message and not a byte more; foreign bytes are noticed as they come.
    fn handshake_message(&self) -> Result<[u8; MESSAGE_LEN_BYTES]> {
        let mut message = [0; MESSAGE_LEN_BYTES];
        let mut len = 0;
        while len < message.len() {
            match self.socket.recv(&mut message[len..], self.deadline)? {
                Wait::Done(0) if len == 0 => {
                    return Err(Error::Closed { peer: self.socket.peer() });
                }
                Wait::Done(0) => return Err(Error::Truncated { peer: self.socket.peer() }),
                Wait::Done(more) => len += more,
                Wait::NotYet => {
                    let what = "waiting for the handshake";
                    return Err(Error::Timeout { peer: self.socket.peer(), what });
                }
            }
            if !handshake::may_become_message(&message[..len]) {
                return Err(self.failure(Failure::Foreign));
            }
        }
        Ok(message)
    }

    fn failure(&self, failure: Failure) -> Error {
        let peer = self.socket.peer();
        match failure {
            Failure::Foreign => Error::NotSlipstream { peer },
            Failure::Unproven => Error::WrongKey { peer },
        }
    }

    fn into_channel(self, ciphers: Ciphers, greeting: Greeting) -> Channel {
        let socket = Arc::new(self.socket);
        let writer = RecordWriter::new(ciphers.seal, BUFFER_RECORDS);
        let reader = RecordReader::new(ciphers.open, BUFFER_RECORDS);
        Channel {
            sender: Sender::new(Arc::clone(&socket), writer),
            receiver: Receiver::new(socket, reader),
            greeting,
            minor: 0,
        }
    }
}

/// An agent with another key, or of another major version, hangs up without a word.
fn turned_away(error: Error, socket: &Socket) -> Error {
    let hung_up = match &error {
        Error::Closed { .. } => true,
        Error::Io { source, .. } => {
            matches!(source.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
        }
        _ => false,
    };
    if hung_up { Error::WrongKey { peer: socket.peer() } } else { error }
}

/// Connects to the first address that accepts; the time is shared out evenly over those not yet tried.
fn dial(addresses: &[SocketAddr], timeout: Duration) -> Result<TcpStream> {
    let deadline = Instant::now() + timeout;
    let mut result = Err(Error::Io {
        peer: "destination".into(),
        what: "connecting",
        source: io::Error::new(io::ErrorKind::InvalidInput, "no address given"),
    });
    for (i, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (addresses.len() - i) as u32;
        // A time-out of zero is an error to the standard library.
        match TcpStream::connect_timeout(address, share.max(Duration::from_millis(1))) {
            Ok(stream) => return Ok(stream),
            Err(source) => result = Err(dial_error(*address, source)),
        }
    }
    result
}

fn dial_error(address: SocketAddr, source: io::Error) -> Error {
    let peer: Arc<str> = address.to_string().into();
    match source.kind() {
        io::ErrorKind::ConnectionRefused => Error::Refused { peer },
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            Error::Timeout { peer, what: "waiting for it to accept the connection" }
        }
        _ => Error::Io { peer, what: "connecting", source },
    }
}
