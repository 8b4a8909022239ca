//! The control connection: typed messages over a channel.

use crate::error::{Error, Result};
use crate::protocol::{
    DestinationMessage, FromDestination, FromSource, MANIFEST_LEN_MAX, MESSAGE_LEN_MAX, Reason,
    SourceMessage,
};
use prost::Message;
use slipstream_transport::{Receiver, Sender};
use std::time::{Duration, Instant};

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
    let envelope = FromSource::decode(&*bytes).map_err(|e| malformed(&e))?;
    match envelope.message {
        Some(SourceMessage::Abort(r)) => Err(peer_failed(r)),
        Some(message) => Ok(message),
        None => Err(Error::Protocol("an empty message".into())),
    }
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
