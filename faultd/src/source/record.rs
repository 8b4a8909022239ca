//! What a source session leaves for one that has to go on in its place: a file of the run directory,
//! written while the destination restores.

use crate::error::{Error, Result};
use crate::rundir::{self, MigrationDir};
use prost::Message;
use slipstream_core::manifest::{Manifest, Mapping};
use slipstream_transport::Route;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

const FILE: &str = "source";

/// All that is needed to see a committed migration through.
#[derive(Clone, PartialEq, Message)]
pub struct Record {
    /// The migration's name.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The frozen copy, by [`rundir::full_name`].
    #[prost(string, tag = "2")]
    pub process: String,
    /// `HOST:PORT` of the agent.
    #[prost(string, tag = "3")]
    pub destination: String,
    /// Path of the key file.
    #[prost(bytes = "vec", tag = "4")]
    pub key: Vec<u8>,
    /// Route of the migration at the destination, 16 bytes.
    #[prost(bytes = "vec", tag = "5")]
    pub route: Vec<u8>,
    /// Bulk lanes to open.
    #[prost(uint32, tag = "6")]
    pub bulk_lanes: u32,
    /// First address of our memory in the copy.
    #[prost(uint64, tag = "7")]
    pub scratch_start: u64,
    /// Address after the last.
    #[prost(uint64, tag = "8")]
    pub scratch_end: u64,
    /// Bound on connecting, and on silence, microseconds.
    #[prost(uint64, tag = "9")]
    pub timeout_us: u64,
    /// The copy's address space.
    #[prost(message, repeated, tag = "10")]
    pub mappings: Vec<Mapping>,
}

impl Record {
    /// Writes it. A session that is killed from now on can be replaced.
    pub fn write(&self, dir: &MigrationDir) -> Result<()> {
        dir.write(FILE, &self.encode_to_vec())
    }

    /// Reads it; `None` when the session ended before it wrote one.
    pub fn read(dir: &MigrationDir) -> Result<Option<Self>> {
        let Some(bytes) = dir.read(FILE)? else { return Ok(None) };
        Self::decode(&*bytes)
            .map(Some)
            .map_err(|e| Error::Internal(format!("the record of the migration is damaged ({e})")))
    }

    /// Number of the frozen copy, if it is there.
    pub fn pid(&self) -> Option<i32> {
        rundir::named_process(&self.process)
    }

    /// Path of the key file.
    pub fn key_path(&self) -> PathBuf {
        OsString::from_vec(self.key.clone()).into()
    }

    /// Route of the migration.
    pub fn route(&self) -> Result<Route> {
        let bytes: [u8; 16] = self
            .route
            .as_slice()
            .try_into()
            .map_err(|_| Error::Protocol("a malformed route".into()))?;
        Ok(Route::from_bytes(bytes))
    }

    /// The time-out.
    pub fn timeout(&self) -> Duration {
        Duration::from_micros(self.timeout_us)
    }

    /// As much of the manifest as a page server needs.
    pub fn manifest(&self) -> Manifest {
        Manifest { mappings: self.mappings.clone(), ..Manifest::default() }
    }
}
