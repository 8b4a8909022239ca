//! The run directory: one folder a migration and side, readable by its owner only.
//!
//! `RUN/source-ID/` and `RUN/destination-ID/` hold `status.json` (rewritten whole, for `slipstream
//! status`), the gate (destination), the journal of the commit and the parked registers (source), and
//! how the process ended.

use crate::error::{Error, Result};
use crate::events::{Role, Status};
use std::fs::{self, DirBuilder};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

fn prefix(side: Role) -> &'static str {
    match side {
        Role::Source => "source-",
        Role::Destination => "destination-",
    }
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
    pub fn create(run_dir: &Path, side: Role, id: &str) -> Result<Self> {
        ensure(run_dir)?;
        let path = run_dir.join(format!("{}{id}", prefix(side)));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|e| Error::io(format!("create {}", path.display()), e))?;
        let dir = Self { path };
        match dir.write(SESSION, std::process::id().to_string().as_bytes()) {
            Ok(()) => Ok(dir),
            Err(e) => {
                dir.remove();
                Err(e)
            }
        }
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
    pub fn write_status(&self, status: &Status) -> Result<()> {
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

/// File with the number of the session that works in a folder.
const SESSION: &str = "session";

/// Sends SIGINT to the source session of a migration.
pub fn interrupt_session(run_dir: &Path, id: &str) -> Result<()> {
    let path = run_dir.join(format!("{}{id}", prefix(Role::Source))).join(SESSION);
    let gone = || Error::Refused {
        reason: format!("the session of migration {id} is gone"),
        remedy: String::new(),
    };
    let text = fs::read_to_string(&path).map_err(|_| gone())?;
    let pid: i32 = text.trim().parse().map_err(|_| gone())?;
    // The number may have been used again.
    let command = fs::read(format!("/proc/{pid}/cmdline")).map_err(|_| gone())?;
    if !command.split(|b| *b == 0).any(|arg| arg == b"__source-session") {
        return Err(gone());
    }
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT)
        .map_err(|e| Error::io("interrupt the session", e.into()))
}

/// File in which init notes how the process ended.
pub const EXIT: &str = "exit";

fn read_status(dir: &Path) -> Option<Status> {
    let mut status: Status =
        serde_json::from_slice(&fs::read(dir.join("status.json")).ok()?).ok()?;
    if let Ok(how) = fs::read_to_string(dir.join(EXIT)) {
        status.phase = "exited".into();
        status.pid = None;
        how.trim().clone_into(&mut status.detail);
    }
    Some(status)
}

/// Exit notes that are kept.
const EXITS_MAX: usize = 100;

/// Removes the folders of moved processes that have ended, but for the newest: nobody else would.
pub fn prune(run_dir: &Path) {
    let Ok(dir) = fs::read_dir(run_dir) else { return };
    let mut ended: Vec<_> = dir
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_str()?;
            let id = name.strip_prefix(prefix(Role::Destination))?;
            let exited = fs::metadata(path.join(EXIT)).ok()?.modified().ok()?;
            is_id(id).then_some((exited, path))
        })
        .collect();
    ended.sort_unstable();
    let old = ended.len().saturating_sub(EXITS_MAX);
    for (_, path) in &ended[..old] {
        if let Err(e) = fs::remove_dir_all(path) {
            tracing::warn!("cannot remove {}: {e}", path.display());
        }
    }
}

/// The status files of a run directory. Unreadable ones are left out: they may just be going away.
pub fn list(run_dir: &Path) -> Result<Vec<Status>> {
    let dir = match fs::read_dir(run_dir) {
        Ok(dir) => dir,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(format!("list {}", run_dir.display()), e)),
    };
    let mut all: Vec<Status> = dir.filter_map(|entry| read_status(&entry.ok()?.path())).collect();
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
    fn the_newest_exit_notes_stay() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let running = MigrationDir::create(&run_dir, Role::Destination, "aaaaaaaaaaaa").unwrap();
        let source = MigrationDir::create(&run_dir, Role::Source, "bbbbbbbbbbbb").unwrap();
        source.write(EXIT, b"exit status 0").unwrap();
        let start = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
        let ended: Vec<MigrationDir> = (0..EXITS_MAX as u64 + 3)
            .map(|i| {
                let id = format!("{i:012x}");
                let dir = MigrationDir::create(&run_dir, Role::Destination, &id).unwrap();
                dir.write(EXIT, b"exit status 0").unwrap();
                let exit = fs::File::options().write(true).open(dir.file(EXIT)).unwrap();
                exit.set_modified(start + std::time::Duration::from_secs(i)).unwrap();
                dir
            })
            .collect();
        prune(&run_dir);
        assert!(running.path.exists() && source.path.exists());
        let left: Vec<bool> = ended.iter().map(|dir| dir.path.exists()).collect();
        assert_eq!(left[..3], [false; 3]);
        assert!(left[3..].iter().all(|exists| *exists));
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
