//! The Noise handshake and the greetings behind it, without any I/O.

use crate::cipher::{Open, Seal, Secret};
use crate::error::{Error, Result};
use crate::key::Key;
use crate::preamble::{Route, VERSION};
use snow::{Builder, HandshakeState};
use zeroize::Zeroizing;

/// Both sides prove the key, and a stolen key does not open what was recorded before (ephemeral Diffie-Hellman).
pub(crate) const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";

/// Mixed into the handshake: a key used by some other program with the same pattern opens nothing here.
const PROLOGUE: &[u8] = b"slipstream transport";

/// An ephemeral public key and a tag.
pub(crate) const BODY_LEN_BYTES: usize = 48;

/// A handshake message: `u16` length and body.
pub const MESSAGE_LEN_BYTES: usize = 2 + BODY_LEN_BYTES;

/// What the bytes of a handshake message turn out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// They are no handshake message at all.
    Foreign,
    /// They were not made with our key, or not for this handshake.
    Unproven,
}

/// The ciphers of the two directions.
#[derive(Debug)]
pub struct Ciphers {
    pub(crate) seal: Seal,
    pub(crate) open: Open,
}

/// The client's half of a handshake.
#[derive(Debug)]
pub struct Initiator(HandshakeState);

impl Initiator {
    /// Begins a handshake and gives the first message.
    pub fn new(key: &Key) -> Result<(Self, [u8; MESSAGE_LEN_BYTES])> {
        let mut state = builder(key)?
            .build_initiator()
            .map_err(|_| Error::Crypto("the handshake can't be set up"))?;
        let message = write(&mut state)?;
        Ok((Initiator(state), message))
    }

    /// Takes the server's message, which proves that it holds the key.
    pub fn finish(mut self, message: &[u8]) -> std::result::Result<Ciphers, Failure> {
        read(&mut self.0, message)?;
        let (mine, theirs) = self.0.dangerously_get_raw_split();
        ciphers(mine, theirs)
    }
}

/// The server's whole handshake: takes the client's message, gives the answer.
pub fn respond(
    key: &Key,
    message: &[u8],
) -> Result<std::result::Result<([u8; MESSAGE_LEN_BYTES], Ciphers), Failure>> {
    let mut state = builder(key)?
        .build_responder()
        .map_err(|_| Error::Crypto("the handshake can't be set up"))?;
    if let Err(failure) = read(&mut state, message) {
        return Ok(Err(failure));
    }
    let answer = write(&mut state)?;
    let (theirs, mine) = state.dangerously_get_raw_split();
    Ok(ciphers(mine, theirs).map(|ciphers| (answer, ciphers)))
}

/// True unless the bytes, the first of a handshake message, show already that it is none.
pub fn may_become_message(bytes: &[u8]) -> bool {
    let head = (BODY_LEN_BYTES as u16).to_le_bytes();
    let len = bytes.len().min(head.len());
    bytes[..len] == head[..len]
}

fn builder(key: &Key) -> Result<Builder<'_>> {
    let fail = |_| Error::Crypto("the handshake can't be set up");
    let params = PATTERN.parse().map_err(fail)?;
    Builder::new(params).psk(0, key.bytes()).and_then(|b| b.prologue(PROLOGUE)).map_err(fail)
}

fn write(state: &mut HandshakeState) -> Result<[u8; MESSAGE_LEN_BYTES]> {
    let mut message = [0; MESSAGE_LEN_BYTES];
    let (head, body) = message.split_at_mut(2);
    head.copy_from_slice(&(BODY_LEN_BYTES as u16).to_le_bytes());
    match state.write_message(&[], body) {
        Ok(BODY_LEN_BYTES) => Ok(message),
        _ => Err(Error::Crypto("a handshake message can't be made")),
    }
}

fn read(state: &mut HandshakeState, message: &[u8]) -> std::result::Result<(), Failure> {
    if message.len() != MESSAGE_LEN_BYTES || !may_become_message(message) {
        return Err(Failure::Foreign);
    }
    let mut payload = [0; BODY_LEN_BYTES];
    match state.read_message(&message[2..], &mut payload) {
        Ok(0) => Ok(()),
        _ => Err(Failure::Unproven),
    }
}

fn ciphers(mine: [u8; 32], theirs: [u8; 32]) -> std::result::Result<Ciphers, Failure> {
    let (mine, theirs): (Secret, Secret) = (Zeroizing::new(mine), Zeroizing::new(theirs));
    match (Seal::new(&mine), Open::new(&theirs)) {
        (Some(seal), Some(open)) => Ok(Ciphers { seal, open }),
        _ => Err(Failure::Unproven),
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Messages of the two sessions.
    Control,
    /// Pages that a thread waits for.
    Urgent,
    /// Prefetch; the number tells a migration's bulk lanes apart.
    Bulk(u16),
}

/// Which side a greeting comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The side that connected.
    Client,
    /// The side that accepted.
    Server,
}

/// The first encrypted record of each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// Whose it is.
    pub side: Side,
    /// Newest minor version this side speaks.
    pub minor: u16,
    /// Oldest minor version this side still speaks.
    pub minor_min: u16,
    /// What the connection is for; the server repeats the client's.
    pub purpose: Purpose,
    /// The route of the preamble, here proven to be what the client sent; the server repeats it.
    pub route: Route,
}

/// Length of a greeting. Later minor versions may add to its end, up to `GREETING_LEN_BYTES_MAX`.
pub const GREETING_LEN_BYTES: usize = 32;
/// Longest greeting that is taken.
pub const GREETING_LEN_BYTES_MAX: usize = 1024;

/// Oldest minor version this build speaks.
pub const MINOR_MIN: u16 = 0;

const TAG: [u8; 8] = *b"greeting";

impl Greeting {
    /// The greeting of this build.
    pub fn new(side: Side, purpose: Purpose, route: Route) -> Self {
        Greeting { side, minor: VERSION.minor, minor_min: MINOR_MIN, purpose, route }
    }

    /// The bytes of the greeting.
    pub fn encode(&self) -> [u8; GREETING_LEN_BYTES] {
        let side = match self.side {
            Side::Client => 0,
            Side::Server => 1,
        };
        let (purpose, number) = match self.purpose {
            Purpose::Control => (0, 0),
            Purpose::Urgent => (1, 0),
            Purpose::Bulk(number) => (2, number),
        };
        let mut bytes = [0; GREETING_LEN_BYTES];
        bytes[..8].copy_from_slice(&TAG);
        bytes[8..10].copy_from_slice(&self.minor.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.minor_min.to_le_bytes());
        bytes[12] = side;
        bytes[13] = purpose;
        bytes[14..16].copy_from_slice(&number.to_le_bytes());
        bytes[16..].copy_from_slice(self.route.bytes());
        bytes
    }

    /// Reads a greeting; None if it is none.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        if bytes.len() > GREETING_LEN_BYTES_MAX {
            return None;
        }
        let bytes: &[u8; GREETING_LEN_BYTES] = bytes.first_chunk()?;
        let number = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let side = match bytes[12] {
            0 => Side::Client,
            1 => Side::Server,
            _ => return None,
        };
        let purpose = match (bytes[13], number(14)) {
            (0, 0) => Purpose::Control,
            (1, 0) => Purpose::Urgent,
            (2, number) => Purpose::Bulk(number),
            _ => return None,
        };
        let route = Route::from_bytes(*bytes.last_chunk()?);
        (bytes[..8] == TAG).then_some(Greeting {
            side,
            minor: number(8),
            minor_min: number(10),
            purpose,
            route,
        })
    }

    /// The minor version both sides speak, if there is one.
    pub fn agree(&self, other: &Greeting) -> Option<u16> {
        let minor = self.minor.min(other.minor);
        (minor >= self.minor_min && minor >= other.minor_min).then_some(minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_sides_end_with_the_same_ciphers() {
        let key = Key::random().unwrap();
        let (initiator, first) = Initiator::new(&key).unwrap();
        let (second, mut server) = respond(&key, &first).unwrap().unwrap();
        let mut client = initiator.finish(&second).unwrap();
        let mut record = [5; 30];
        client.seal.seal(&mut record).unwrap();
        assert_eq!(server.open.open(&mut record), Ok(14));
        let mut record = [6; 30];
        server.seal.seal(&mut record).unwrap();
        assert_eq!(client.open.open(&mut record), Ok(14));
    }

    #[test]
    fn another_key_proves_nothing() {
        let (key, other) = (Key::random().unwrap(), Key::random().unwrap());
        let (_, first) = Initiator::new(&other).unwrap();
        assert_eq!(respond(&key, &first).unwrap().unwrap_err(), Failure::Unproven);
    }

    #[test]
    fn reflected_and_replayed_answers_prove_nothing() {
        let key = Key::random().unwrap();
        let (initiator, first) = Initiator::new(&key).unwrap();
        assert_eq!(initiator.finish(&first).unwrap_err(), Failure::Unproven);
        let (old, _) = respond(&key, &first).unwrap().unwrap();
        let (initiator, _) = Initiator::new(&key).unwrap();
        assert_eq!(initiator.finish(&old).unwrap_err(), Failure::Unproven);
    }

    #[test]
    fn versions_agree_on_the_older_if_both_still_speak_it() {
        let ours = Greeting {
            minor: 5,
            minor_min: 3,
            ..Greeting::new(Side::Client, Purpose::Control, Route::NEW)
        };
        let with = |minor, minor_min| ours.agree(&Greeting { minor, minor_min, ..ours });
        assert_eq!(with(5, 5), Some(5));
        assert_eq!(with(9, 4), Some(5));
        assert_eq!(with(3, 0), Some(3));
        assert_eq!(with(2, 0), None);
        assert_eq!(with(9, 6), None);
    }

    fn purposes() -> impl Strategy<Value = Purpose> {
        prop_oneof![
            Just(Purpose::Control),
            Just(Purpose::Urgent),
            any::<u16>().prop_map(Purpose::Bulk)
        ]
    }

    proptest! {
        #[test]
        fn greetings_survive(purpose in purposes(), route: [u8; 16], server: bool, minor: u16, minor_min: u16) {
            let side = if server { Side::Server } else { Side::Client };
            let greeting = Greeting { side, minor, minor_min, purpose, route: Route::from_bytes(route) };
            let bytes = greeting.encode();
            prop_assert_eq!(Greeting::decode(&bytes), Some(greeting));
            let longer = [&bytes[..], b"later"].concat();
            prop_assert_eq!(Greeting::decode(&longer), Some(greeting));
            prop_assert_eq!(Greeting::decode(&bytes[..31]), None);
        }

        #[test]
        fn any_bytes_are_judged_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Greeting::decode(&bytes);
            prop_assert!(respond(&Key::from_bytes([1; 32]), &bytes).unwrap().is_err());
        }
    }
}
