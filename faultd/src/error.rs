//! The error of this crate.

use std::io;

/// What can go wrong in a migration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A process could not be captured or restored.
    #[error(transparent)]
    Core(#[from] slipstream_core::Error),
    /// A connection failed.
    #[error(transparent)]
    Transport(#[from] slipstream_transport::Error),
    /// A file or socket of ours failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Refused by name.
    #[error("{reason}")]
    Refused {
        /// Why, naming the object.
        reason: String,
        /// What to do about it.
        remedy: String,
    },
    /// The peer gave up.
    #[error("{reason}")]
    Peer {
        /// What it said.
        reason: String,
        /// What it said to do about it.
        remedy: String,
    },
    /// The peer said something that makes no sense here.
    #[error("the other side broke the protocol: {0}")]
    Protocol(String),
    /// The user, or a signal, asked for the migration to end.
    #[error("interrupted")]
    Interrupted,
    /// The source memory or the destination copy was destroyed before the last page.
    #[error("the process is lost: its memory was destroyed before the last page had left")]
    Lost,
    /// A fault point was reached.
    #[error("failing at {0} as asked")]
    FailPoint(&'static str),
    /// The page service refused something that should have been checked before.
    #[error("internal error: {0}")]
    Pages(#[from] crate::pages::PagesError),
    /// Our own mistake.
    #[error("internal error: {0}")]
    Internal(String),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wraps an I/O error with what was being done.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Error::Io { what: what.into(), source }
    }

    /// What the user can do about it; empty when there is nothing.
    pub fn remedy(&self) -> &str {
        match self {
            Error::Refused { remedy, .. } | Error::Peer { remedy, .. } => remedy,
            _ => "",
        }
    }
}
