//! The 32 bytes that open every connection, in the clear.
//!
//! They tell the agent which session a connection is for, so that it can pass it on without knowing anything else
//! about it. The agent never answers to a preamble: whoever lacks the key learns nothing, not even a version.

use crate::error::{Error, Result};
use crate::lane::Block;
use crate::socket::{Socket, Wait};
use ring::rand::{SecureRandom, SystemRandom};
use std::fmt;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Version of the wire protocol. Major versions can't talk to each other; minor versions may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Travels in the clear, in the preamble.
    pub major: u16,
    /// Travels in the encrypted greeting.
    pub minor: u16,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The version of this build.
pub const VERSION: Version = Version { major: 1, minor: 0 };

/// Length of a preamble.
pub const PREAMBLE_LEN_BYTES: usize = 32;

/// What every preamble begins with, before the major version: not text in any encoding, and changed by any
/// line-ending conversion.
const MAGIC: [u8; 14] = *b"\x89SLIPSTREAM\r\n\x1a";
const ROUTE_AT: usize = 16;

/// Where on the agent's host a connection is to go.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Route([u8; 16]);

impl Route {
    /// A new migration.
    pub const NEW: Route = Route([0; 16]);

    /// A random route, for a destination session to be reached by. It is no secret and no proof of anything.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 16];
        let random = SystemRandom::new();
        while bytes == [0; 16] {
            random
                .fill(&mut bytes)
                .map_err(|_| Error::Crypto("no random numbers from the system"))?;
        }
        Ok(Route(bytes))
    }

    /// The route with these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Route(bytes)
    }

    /// The bytes of the route.
    pub const fn bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// True for a new migration.
    pub fn is_new(&self) -> bool {
        *self == Route::NEW
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Route({self})")
    }
}

/// What a beginning of a preamble turns out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded {
    /// All well so far, more bytes are needed.
    Incomplete,
    /// A whole preamble of our major version.
    Route(Route),
    /// A preamble of another major version.
    OtherMajor(u16),
    /// Something else.
    Foreign,
}

/// The preamble for a route.
pub fn encode(route: Route) -> [u8; PREAMBLE_LEN_BYTES] {
    let mut bytes = [0; PREAMBLE_LEN_BYTES];
    bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
    bytes[MAGIC.len()..ROUTE_AT].copy_from_slice(&VERSION.major.to_le_bytes());
    bytes[ROUTE_AT..].copy_from_slice(&route.0);
    bytes
}

/// Judges the bytes that have come so far, so that a stranger is turned away at its first wrong byte.
pub fn decode(bytes: &[u8]) -> Decoded {
    let len = bytes.len().min(MAGIC.len());
    if bytes[..len] != MAGIC[..len] || bytes.len() > PREAMBLE_LEN_BYTES {
        return Decoded::Foreign;
    }
    if let Some(major) = bytes.get(MAGIC.len()..ROUTE_AT) {
        let major = u16::from_le_bytes([major[0], major[1]]);
        if major != VERSION.major {
            return Decoded::OtherMajor(major);
        }
    }
    match bytes.get(ROUTE_AT..PREAMBLE_LEN_BYTES).and_then(|route| route.try_into().ok()) {
        Some(route) => Decoded::Route(Route(route)),
        None => Decoded::Incomplete,
    }
}

/// Reads the preamble a client opens its connection with, and not one byte more, within `timeout` in all. Nothing is sent,
/// whatever comes.
pub fn read_preamble(stream: &impl AsFd, timeout: Duration) -> Result<Route> {
    let socket = Socket::duplicate(stream)?;
    let until = Block::Until(Instant::now() + timeout);
    let mut bytes = [0; PREAMBLE_LEN_BYTES];
    let mut len = 0;
    loop {
        match socket.recv(&mut bytes[len..], until)? {
            Wait::Done(0) if len == 0 => return Err(Error::Closed { peer: socket.peer() }),
            Wait::Done(0) => return Err(Error::Truncated { peer: socket.peer() }),
            Wait::Done(more) => len += more,
            Wait::NotYet => {
                return Err(Error::Timeout {
                    peer: socket.peer(),
                    what: "waiting for the first bytes",
                });
            }
        }
        match decode(&bytes[..len]) {
            Decoded::Incomplete => {}
            Decoded::Route(route) => return Ok(route),
            Decoded::Foreign => return Err(Error::NotSlipstream { peer: socket.peer() }),
            Decoded::OtherMajor(major) => {
                let theirs = Version { major, minor: 0 };
                return Err(Error::Version { peer: socket.peer(), theirs, ours: VERSION });
            }
        }
    }
}

/// Sends the preamble for `route`, within `timeout`.
pub fn send_preamble(stream: &impl AsFd, route: Route, timeout: Duration) -> Result<()> {
    let until = Block::Until(Instant::now() + timeout);
    Socket::duplicate(stream)?.send_all(&encode(route), until, "sending the first bytes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    const SOON: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn preamble_travels_and_nothing_comes_back() {
        let (client, server) = UnixStream::pair().unwrap();
        let route = Route::random().unwrap();
        send_preamble(&client, route, LONG).unwrap();
        (&client).write_all(b"more").unwrap();
        assert_eq!(read_preamble(&server, LONG).unwrap(), route);
        let mut rest = [0; 4];
        (&server).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"more", "not a byte beyond the preamble is taken");
        drop(server);
        assert_eq!((&client).read(&mut rest).unwrap(), 0, "the server says nothing");
    }

    #[test]
    fn strangers_are_told_apart() {
        let read = |bytes: &[u8], close: bool| {
            let (client, server) = UnixStream::pair().unwrap();
            (&client).write_all(bytes).unwrap();
            let client = (!close).then_some(client);
            let result = read_preamble(&server, SOON);
            drop(client);
            result
        };
        assert!(matches!(read(b"", true), Err(Error::Closed { .. })));
        assert!(matches!(read(b"", false), Err(Error::Timeout { .. })));
        assert!(matches!(read(b"GET", false), Err(Error::NotSlipstream { .. })));
        let mut good = encode(Route::NEW);
        for len in 1..PREAMBLE_LEN_BYTES {
            assert!(matches!(read(&good[..len], true), Err(Error::Truncated { .. })));
        }
        good[MAGIC.len()] = 9;
        match read(&good, false) {
            Err(Error::Version { theirs, .. }) => assert_eq!(theirs.major, 9),
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn any_route_survives(bytes in any::<[u8; 16]>()) {
            let route = Route::from_bytes(bytes);
            prop_assert_eq!(decode(&encode(route)), Decoded::Route(route));
        }

        #[test]
        fn any_changed_magic_is_foreign(at in 0..MAGIC.len(), flip in 1u8..) {
            let mut bytes = encode(Route::NEW);
            bytes[at] ^= flip;
            prop_assert_eq!(decode(&bytes), Decoded::Foreign);
        }
    }
}
