//! The control connection: typed messages over a channel.

use crate::error::{Error, Result};
use crate::protocol::{
    DestinationMessage, FromDestination, FromSource, MANIFEST_LEN_MAX, MESSAGE_LEN_MAX, Reason,
    SourceMessage,
};
use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint};
use slipstream_transport::{Receiver, Sender};
use std::time::{Duration, Instant};

/// Of [`SourceMessage::Manifest`].
const MANIFEST_TAG: u32 = 3;

/// Sends a message of the source.
pub fn say_to_destination(sender: &mut Sender, message: SourceMessage) -> Result<()> {
    let envelope = FromSource { message: Some(message) };
    Ok(sender.send(&envelope.encode_to_vec())?)
}

/// Sends a message of the destination.
pub fn say_to_source(sender: &mut Sender, message: DestinationMessage) -> Result<()> {
    let envelope = FromDestination { message: Some(message) };
    Ok(sender.send(&envelope.encode_to_vec())?)
}

/// Waits for a message of the destination. A `Failed` becomes an error.
pub fn hear_destination(
    receiver: &mut Receiver,
    timeout: Option<Duration>,
) -> Result<DestinationMessage> {
    let bytes = match timeout {
        Some(t) => receiver.recv_by(MESSAGE_LEN_MAX, Instant::now() + t)?,
        None => receiver.recv(MESSAGE_LEN_MAX)?,
    };
    let envelope = FromDestination::decode(&*bytes).map_err(|e| malformed(&e))?;
    match envelope.message {
        Some(DestinationMessage::Failed(r)) => Err(peer_failed(r)),
        Some(message) => Ok(message),
        None => Err(Error::Protocol("an empty message".into())),
    }
}

/// Waits for a message of the source. An `Abort` becomes an error.
pub fn hear_source(receiver: &mut Receiver, timeout: Option<Duration>) -> Result<SourceMessage> {
    let bytes = match timeout {
        Some(t) => receiver.recv_by(MANIFEST_LEN_MAX, Instant::now() + t)?,
        None => receiver.recv(MANIFEST_LEN_MAX)?,
    };
    if bytes.len() > MESSAGE_LEN_MAX && !is_manifest(&bytes) {
        return Err(Error::Protocol("a message that is too long".into()));
    }
    let envelope = FromSource::decode(&*bytes).map_err(|e| malformed(&e))?;
    match envelope.message {
        Some(SourceMessage::Abort(r)) => Err(peer_failed(r)),
        Some(message) => Ok(message),
        None => Err(Error::Protocol("an empty message".into())),
    }
}

/// Whether a message of the source is a manifest and nothing else: any other that is as long may be far longer once it is
/// decoded.
fn is_manifest(mut bytes: &[u8]) -> bool {
    let key = decode_key(&mut bytes);
    matches!(key, Ok((MANIFEST_TAG, WireType::LengthDelimited)))
        && decode_varint(&mut bytes).is_ok_and(|len| len == bytes.len() as u64)
}

fn malformed(e: &prost::DecodeError) -> Error {
    Error::Protocol(format!("a malformed message ({e})"))
}

/// Reasons come from a peer and go to a terminal: bounded, and without control characters.
fn peer_failed(r: Reason) -> Error {
    let clean = |s: String| s.chars().filter(|c| !c.is_control()).take(1000).collect();
    Error::Peer { reason: clean(r.reason), remedy: clean(r.remedy) }
}

/// An answer that does not fit.
pub fn unexpected<T>(wanted: &str) -> Result<T> {
    Err(Error::Protocol(format!("something else than {wanted}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Reason, Stage};

    fn encoded(message: SourceMessage) -> Vec<u8> {
        FromSource { message: Some(message) }.encode_to_vec()
    }

    #[test]
    fn only_a_manifest_may_be_long() {
        let manifest = encoded(SourceMessage::Manifest(vec![7; 1000]));
        let stage = encoded(SourceMessage::Stage(Stage::default()));
        assert!(is_manifest(&manifest));
        assert!(!is_manifest(&stage));
        assert!(!is_manifest(&encoded(SourceMessage::Abort(Reason::default()))));
        // The last of several counts, and all are decoded.
        assert!(!is_manifest(&[manifest, stage].concat()));
    }
}
