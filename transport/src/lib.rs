//! How bytes travel between the two hosts of a migration: authenticated, encrypted channels for messages, and page
//! lanes. Knows no processes.
//!
//! # A connection, byte by byte
//! 1. The client sends a [`preamble`] in the clear: magic, major version, [`Route`]. The server answers nothing.
//! 2. Noise `NNpsk0_25519_AESGCM_SHA256`: each side sends one message of 48 bytes behind a `u16` length. The server
//!    stays silent when the first does not prove the [`Key`].
//! 3. Records from here on: `u16` length, AES-256-GCM ciphertext. The client's first record is its greeting (minor
//!    version, [`Purpose`], route), and only when that is good the server sends its own. A recorded handshake played
//!    again ends here, since it can't make a greeting for the server's fresh key.
//! 4. Messages ([`Sender`], [`Receiver`]) or page requests and replies ([`tcp`]).
//!
//! All numbers are little-endian. Blocking calls; the threads are the caller's.

pub mod channel;
mod cipher;
pub mod error;
pub mod handshake;
pub mod key;
pub mod lane;
mod message;
pub mod mock;
mod outstanding;
pub mod pace;
pub mod preamble;
#[cfg(feature = "rdma")]
pub mod rdma;
#[cfg(not(feature = "rdma"))]
#[path = "without_rdma.rs"]
pub mod rdma;
mod record;
mod socket;
pub mod tcp;
pub mod wire;

pub use channel::{Channel, Closer, Timeouts, resolve};
pub use error::{Error, Result};
pub use handshake::Purpose;
pub use key::Key;
pub use lane::{
    Block, Content, Extent, PageLane, PageReply, PageRequest, PageSource, WindowLimits,
};
pub use message::{Receiver, Sender};
pub use mock::{MockLane, MockOptions};
pub use pace::Pace;
pub use preamble::{Route, VERSION, Version, read_preamble, send_preamble};
pub use tcp::{PageServer, TcpPageLane};
