//! The run directory: one folder a migration and side, readable by its owner only.
//!
//! `RUN/source-ID/` and `RUN/destination-ID/` hold `status.json` (rewritten whole, for `slipstream
//! status`), the gate (destination), the journal of the commit and the parked registers (source), and
//! how the process ended.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Which side of a migration a folder belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The process came from here.
    Source,
    /// The process went here.
    Destination,
}

impl Side {
    fn prefix(self) -> &'static str {
        match self {
            Side::Source => "source-",
            Side::Destination => "destination-",
        }
    }
}

/// What `slipstream status` shows of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusFile {
    /// Name of the migration.
    pub id: String,
    /// Which side wrote this.
    pub side: Side,
    /// Phase it is in.
    pub phase: String,
    /// The process as this host sees it.
    pub pid: i32,
    /// Command name of the process.
    pub comm: String,
    /// The other host.
    pub peer: String,
    /// The session that wrote this.
    pub session_pid: i32,
    /// Pages there and in all, while it drains.
    pub pages_present: u64,
    /// Pages in all.
    pub pages_total: u64,
    /// When this phase began, seconds since 1970.
    pub since_unix_s: u64,
}

/// The folder of one side of one migration.
#[derive(Debug)]
pub struct MigrationDir {
    path: PathBuf,
}

/// A migration's name: twelve hexadecimal digits.
pub fn new_id() -> Result<String> {
    let mut raw = [0u8; 6];
    fill_random(&mut raw)?;
    Ok(raw.iter().map(|b| format!("{b:02x}")).collect())
}

/// Random bytes from the kernel.
pub fn fill_random(out: &mut [u8]) -> Result<()> {
    use std::io::Read;
    fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(out))
        .map_err(|e| Error::io("read /dev/urandom", e))
}

/// True for what [`new_id`] makes: names from a peer become parts of paths.
pub fn is_id(id: &str) -> bool {
    id.len() == 12 && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The run directory when none is named: `/run/slipstream` for root, else below `XDG_RUNTIME_DIR`.
pub fn default_path() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return PathBuf::from("/run/slipstream");
    }
    std::env::var_os("XDG_RUNTIME_DIR").map_or_else(
        || PathBuf::from(format!("/tmp/slipstream-{}", nix::unistd::geteuid())),
        |dir| PathBuf::from(dir).join("slipstream"),
    )
}

/// Makes the run directory if need be, and refuses one that others could write to or own.
pub fn ensure(path: &Path) -> Result<()> {
    let make = DirBuilder::new().recursive(true).mode(0o700).create(path);
    make.map_err(|e| Error::io(format!("create run directory {}", path.display()), e))?;
    let meta = fs::symlink_metadata(path)
        .map_err(|e| Error::io(format!("stat run directory {}", path.display()), e))?;
    let own = meta.uid() == nix::unistd::geteuid().as_raw();
    if !meta.is_dir() || !own || meta.mode() & 0o077 != 0 {
        return Err(Error::Refused {
            reason: format!("run directory {} is open to others", path.display()),
            remedy: format!("chmod 700 {0}, or name another with --run-dir", path.display()),
        });
    }
    Ok(())
}

impl MigrationDir {
    /// Makes the folder of a new migration; it must not exist.
    pub fn create(run_dir: &Path, side: Side, id: &str) -> Result<Self> {
        ensure(run_dir)?;
        let path = run_dir.join(format!("{}{id}", side.prefix()));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|e| Error::io(format!("create {}", path.display()), e))?;
        Ok(Self { path })
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a file whole: a reader sees the old or the new content.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let partial = self.path.join(format!("{name}.part"));
        let write = || {
            let mut f = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&partial)?;
            f.write_all(bytes)?;
            fs::rename(&partial, self.path.join(name))
        };
        write().map_err(|e| Error::io(format!("write {}", self.path.join(name).display()), e))
    }

    /// Rewrites the status.
    pub fn write_status(&self, status: &StatusFile) -> Result<()> {
        let json = serde_json::to_vec(status).map_err(|e| Error::Internal(e.to_string()))?;
        self.write("status.json", &json)
    }

    /// Removes the folder: the migration left nothing to tell.
    pub fn remove(self) {
        if let Err(e) = fs::remove_dir_all(&self.path) {
            tracing::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

/// The status files of a run directory. Unreadable ones are left out: they may just be going away.
pub fn list(run_dir: &Path) -> Result<Vec<StatusFile>> {
    let dir = match fs::read_dir(run_dir) {
        Ok(dir) => dir,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(format!("list {}", run_dir.display()), e)),
    };
    let mut all: Vec<StatusFile> = dir
        .filter_map(|entry| fs::read(entry.ok()?.path().join("status.json")).ok())
        .filter_map(|bytes| serde_json::from_slice(&bytes).ok())
        .collect();
    all.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names() {
        assert!(is_id(&new_id().unwrap()));
        assert!(!is_id("../../../etc"));
    }

    #[test]
    fn a_run_directory_open_to_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(ensure(dir.path()).is_err());
        assert!(ensure(&dir.path().join("fresh")).is_ok());
    }
}
