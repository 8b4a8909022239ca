//! A control group for each migration, outside the service that the agent belongs to: stopping that service, or the login
//! session that `migrate` was called from, ends neither the sessions nor the moved process (cgroups(7), systemd.kill(5)).
//!
//! Only of the unified hierarchy (version 2), which is the one that systemd kills by. Where it is not mounted, or may not be
//! written to, everything stays where it was started.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// The parent of all of them.
const PARENT: &str = "slipstream";
/// A write of a PID moves that process.
const MEMBERS: &str = "cgroup.procs";
/// Others, too, remove empty groups: ours may go before we are in it.
const TRIES: u32 = 10;

/// This process's being in the group of a migration. Ends, and the group with it if nobody else is there, on drop.
#[derive(Debug)]
pub struct Membership(Option<PathBuf>);

/// Moves this process, and all that it starts from now on, into the group of a migration.
pub fn enter(id: &str) -> Membership {
    Membership(parent().and_then(|parent| match enter_below(&parent, id) {
        Ok(group) => Some(group),
        Err(e) => {
            tracing::debug!("no control group of its own for migration {id}: {e}");
            None
        }
    }))
}

fn enter_below(parent: &Path, id: &str) -> io::Result<PathBuf> {
    let group = parent.join(id);
    let mut tries = 0;
    loop {
        fs::create_dir_all(&group)?;
        tries += 1;
        match fs::write(group.join(MEMBERS), std::process::id().to_string()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && tries < TRIES => {}
            // Removed since it was opened.
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) && tries < TRIES => {}
            other => return other.map(|()| group),
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let Some(group) = &self.0 else { return };
        let Some(parent) = group.parent() else { return };
        // What fails here is left to whoever sweeps next.
        let left = fs::write(parent.join(MEMBERS), std::process::id().to_string());
        if let Err(e) = left.and_then(|()| fs::remove_dir(group)) {
            tracing::debug!("{}: {e}", group.display());
        }
    }
}

/// Removes the groups in which nobody is any more: their processes have ended.
pub fn sweep() {
    let Some(groups) = parent().and_then(|parent| fs::read_dir(parent).ok()) else { return };
    for group in groups.flatten().filter(|entry| entry.path().is_dir()) {
        // The kernel refuses to remove one with members.
        let _ = fs::remove_dir(group.path());
    }
}

/// Where the groups of migrations are; whether it exists or not.
fn parent() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    Some(unified_hierarchy(&mounts)?.join(PARENT))
}

fn unified_hierarchy(mounts: &str) -> Option<&Path> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (place, file_system) = (fields.next()?, fields.next()?);
        (file_system == "cgroup2").then(|| Path::new(place))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_hierarchy_is_found_among_others() {
        let hybrid = "sysfs /sys sysfs rw 0 0\n\
                      cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(unified_hierarchy(hybrid), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(unified_hierarchy("cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"), None);
        assert_eq!(unified_hierarchy("what is this\n"), None);
    }
}
