//! One migration of a process at a time, whoever asks for it and whatever run directory they use.

use crate::error::{Error, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;

/// The right to migrate a process. It ends when this is dropped, or its holder dies.
///
/// It is a lock on `/proc/PID/mem`: bound to the process itself and not to its number, forgotten with it,
/// and open to those only who could trace the process anyway.
#[derive(Debug)]
pub struct Claim {
    _lock: Flock<File>,
}

impl Claim {
    /// Claims a process; `None` if somebody else has done so.
    pub fn take(pid: i32) -> Result<Option<Self>> {
        let path = format!("/proc/{pid}/mem");
        let file = File::open(&path).map_err(|e| super::from_io(pid, &path, e))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Self { _lock: lock })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(Error::sys(format!("lock {path}"), errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        let first = Claim::take(pid).unwrap();
        assert!(first.is_some());
        assert!(Claim::take(pid).unwrap().is_none());
        drop(first);
        assert!(Claim::take(pid).unwrap().is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(Claim::take(pid), Err(Error::Gone { .. })));
    }
}
