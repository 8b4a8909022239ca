//! The error of this crate.

use crate::preamble::Version;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between two hosts. `peer` is the far end as this side names it, for messages.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key file can't be used or made.
    #[error("key file {path}: {problem}; {remedy}", path = path.display())]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do about it.
        remedy: String,
    },
    /// A host name or address can't be turned into socket addresses.
    #[error("cannot resolve {name}: {source}; give an address as HOST:PORT")]
    Resolve {
        /// As the user wrote it.
        name: String,
        /// What the resolver says.
        source: io::Error,
    },
    /// Reading by RDMA can't be had, or has failed.
    #[error("{what}")]
    Rdma {
        /// Why, naming the adapter or the step.
        what: String,
    },
    /// Nobody listens at the address.
    #[error(
        "{peer} refused the connection; start `slipstream agent` there or check the port and the firewall"
    )]
    Refused {
        /// The far end.
        peer: Arc<str>,
    },
    /// The peer proved not to hold our key, or ended the handshake because we don't hold its key.
    #[error(
        "{peer} holds another key, or is no slipstream agent of this version; use the same key file on both hosts"
    )]
    WrongKey {
        /// The far end.
        peer: Arc<str>,
    },
    /// The peer speaks some other protocol.
    #[error("{peer} does not speak the slipstream protocol; check the address and the port")]
    NotSlipstream {
        /// The far end.
        peer: Arc<str>,
    },
    /// The peer's protocol version can't work with ours.
    #[error(
        "{peer} speaks protocol version {theirs}, this host {ours}; install the same slipstream on both"
    )]
    Version {
        /// The far end.
        peer: Arc<str>,
        /// The version of the peer.
        theirs: Version,
        /// The version of this side.
        ours: Version,
    },
    /// The peer did not do its part in time.
    #[error("{peer}: timed out {what}; check the network and the load of that host")]
    Timeout {
        /// The far end.
        peer: Arc<str>,
        /// What was being waited for, as "waiting for ...".
        what: &'static str,
    },
    /// A socket call failed.
    #[error("{peer}: {what}: {source}")]
    Io {
        /// The far end.
        peer: Arc<str>,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The peer closed the connection between two messages.
    #[error("{peer} closed the connection")]
    Closed {
        /// The far end.
        peer: Arc<str>,
    },
    /// The connection ended inside a message.
    #[error("{peer}: the connection ended in the middle of a message")]
    Truncated {
        /// The far end.
        peer: Arc<str>,
    },
    /// The peer sent what the protocol forbids, or somebody in between changed what it sent.
    #[error("{peer} broke the protocol: {what}")]
    Protocol {
        /// The far end.
        peer: Arc<str>,
        /// What it did.
        what: &'static str,
    },
    /// A message is longer than the receiver takes.
    #[error("{peer}: a message of {len_bytes} bytes is over the limit of {len_bytes_max}")]
    TooLong {
        /// The far end.
        peer: Arc<str>,
        /// The length announced.
        len_bytes: u64,
        /// The longest that is taken.
        len_bytes_max: u64,
    },
    /// The connection has sent as many records as its key allows; open a new one.
    #[error("{peer}: the connection's nonces are used up")]
    Exhausted {
        /// The far end.
        peer: Arc<str>,
    },
    /// An earlier error left this direction of the connection in the middle of a message.
    #[error("{peer}: the connection failed earlier")]
    Broken {
        /// The far end.
        peer: Arc<str>,
    },
    /// More requests are outstanding than a lane keeps; take replies first.
    #[error("{peer}: too many page requests are outstanding")]
    QueueFull {
        /// The far end.
        peer: Arc<str>,
    },
    /// A request of our own is not whole pages or too long: a bug of the caller.
    #[error("a request for {len_bytes} bytes at {address:#x} is not valid on a page lane")]
    BadRequest {
        /// Its first address.
        address: u64,
        /// Its length.
        len_bytes: u32,
    },
    /// The system's random numbers or cryptography failed.
    #[error("cryptography failed: {0}")]
    Crypto(&'static str),
}

impl Error {
    /// True when a new connection may do better: the peer or the network went away.
    pub fn is_disconnect(&self) -> bool {
        matches!(
            self,
            Error::Refused { .. }
                | Error::Timeout { .. }
                | Error::Io { .. }
                | Error::Closed { .. }
                | Error::Truncated { .. }
                | Error::Broken { .. }
        )
    }
}
