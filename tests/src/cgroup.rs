//! A control group that holds what a test starts on a host which isn't its own: the way to find all of it, and to end it.
//!
//! Of a hierarchy of the tests' own, for Slipstream moves its processes from group to group of the unified one.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::process::{Pidfd, describe};
use crate::wait;

/// Where the lab's hosts have that hierarchy (`scripts/lab/host`).
const HIERARCHY: &str = "/run/test-cgroups";

/// Where Slipstream makes control groups, if it can (`faultd/src/cgroup.rs`).
const OF_MIGRATIONS: [&str; 2] = ["/sys/fs/cgroup/slipstream", "/sys/fs/cgroup/unified/slipstream"];

/// Removes control groups of migrations in which nobody is any more; those of other tests stay.
pub fn sweep() {
    for group in OF_MIGRATIONS.iter().flat_map(std::fs::read_dir).flatten().flatten() {
        let _ = std::fs::remove_dir(group.path());
    }
}

/// A control group by its name; whoever has the name may ask for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    hierarchy: PathBuf,
    name: String,
}

impl Cgroup {
    /// One of the tests' hierarchy; `None` if that can't be the name of one of ours: it comes from another host.
    pub fn named(name: &str) -> Option<Self> {
        let sound = name.starts_with("slipstream-test-")
            && name.len() < 100
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        sound.then(|| Self { hierarchy: HIERARCHY.into(), name: name.to_owned() })
    }

    /// Makes one of another hierarchy.
    pub fn create(hierarchy: &Path, name: &str) -> io::Result<Self> {
        let group = Self { hierarchy: hierarchy.to_owned(), name: name.to_owned() };
        std::fs::create_dir(group.path())?;
        Ok(group)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its folder.
    pub fn path(&self) -> PathBuf {
        self.hierarchy.join(&self.name)
    }

    /// Makes it if it isn't there, and opens the file to which a process writes `0` to enter.
    pub fn entrance(&self) -> io::Result<std::fs::File> {
        match std::fs::create_dir(self.path()) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        std::fs::OpenOptions::new().write(true).open(self.path().join("cgroup.procs"))
    }

    /// The processes in it.
    pub fn pids(&self) -> Vec<i32> {
        let text = std::fs::read_to_string(self.path().join("cgroup.procs")).unwrap_or_default();
        // Those that this host's first PID namespace doesn't have are listed as 0.
        text.lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid != 0).collect()
    }

    /// The state of every process in it.
    pub fn describe(&self) -> String {
        self.pids().into_iter().map(describe).collect()
    }

    /// Ends every process in it, and removes it.
    pub fn end(&self) {
        if !self.path().exists() {
            return;
        }
        wait::until("a control group to be empty", Duration::from_secs(20), || {
            for process in self.pids().into_iter().filter_map(Pidfd::open) {
                process.signal(libc::SIGKILL);
            }
            std::fs::remove_dir(self.path()).is_ok().then_some(())
        });
    }
}
