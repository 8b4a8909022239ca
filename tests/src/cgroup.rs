//! A control group that holds what a test starts on a host which isn't its own: the way to find all of it, and to end it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::process::describe;
use crate::wait;

/// A control group by its name; whoever has the name may ask for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    name: String,
}

impl Cgroup {
    /// `None` if that can't be the name of one of ours: it comes from another host.
    pub fn named(name: &str) -> Option<Self> {
        let sound = name.starts_with("slipstream-test-")
            && name.len() < 100
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        sound.then(|| Self { name: name.to_owned() })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/sys/fs/cgroup").join(&self.name)
    }

    /// Makes it if it isn't there, and opens the file to which a process writes `0` to enter.
    pub fn entrance(&self) -> io::Result<std::fs::File> {
        match std::fs::create_dir(self.path()) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        std::fs::OpenOptions::new().write(true).open(self.path().join("cgroup.procs"))
    }

    /// The processes in it. Nothing that is tested here makes control groups of its own.
    pub fn pids(&self) -> Vec<i32> {
        let text = std::fs::read_to_string(self.path().join("cgroup.procs")).unwrap_or_default();
        // Those that this host's first PID namespace doesn't have are listed as 0.
        text.lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid != 0).collect()
    }

    /// The state of every process in it.
    pub fn describe(&self) -> String {
        self.pids().into_iter().map(describe).collect()
    }

    /// Ends every process in it, at once (Linux 5.14), and removes it.
    pub fn end(&self) {
        if !self.path().exists() {
            return;
        }
        let killed = std::fs::write(self.path().join("cgroup.kill"), "1");
        killed.unwrap_or_else(|error| panic!("ending control group {}: {error}", self.name));
        wait::until("a control group to be empty", Duration::from_secs(20), || {
            std::fs::remove_dir(self.path()).is_ok().then_some(())
        });
    }
}
