//! The error of this crate.

use nix::errno::Errno;
use std::io;

/// What can go wrong with a process as data.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process ended while it was being worked on.
    #[error("process {pid} ended")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// A system call failed.
    #[error("{what}: {errno}")]
    Sys {
        /// What was being done, with the object's name.
        what: String,
        /// Why it failed.
        errno: Errno,
    },
    /// Reading or writing a file failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, with the file's name.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel's text was not as expected.
    #[error("cannot understand {what}: {text:?}")]
    Parse {
        /// What was being read.
        what: &'static str,
        /// The offending text, shortened.
        text: String,
    },
    /// The process can't be moved as it is now.
    #[error("{0}")]
    Refused(String),
    /// More has changed since the last look than may be sent while the process is stopped.
    #[error(
        "{object}: {} KiB changed since they were last sent, and at most {} KiB may be sent while the \
         process is stopped",
        .bytes.div_ceil(1024),
        crate::capture::presend::CHANGED_BYTES_MAX / 1024
    )]
    Changing {
        /// What changes: a memfd, or private file mappings.
        object: String,
        /// How much, in bytes, as far as was looked.
        bytes: u64,
    },
    /// A manifest from a peer is not well-formed.
    #[error("manifest: {0}")]
    Manifest(String),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wraps an errno with what was being done.
    pub fn sys(what: impl Into<String>, errno: Errno) -> Self {
        Error::Sys { what: what.into(), errno }
    }

    /// Wraps an I/O error with what was being done.
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        Error::Io { what: what.into(), source }
    }

    /// A parse error with the text shortened to what a log line bears.
    pub fn parse(what: &'static str, text: &str) -> Self {
        Error::Parse { what, text: text.chars().take(80).collect() }
    }
}
