//! What the process shares with others, and its children.

use crate::preflight::Blocker;
use crate::proc::status;
use crate::sys::files::{Resource, same_resource};
use nix::errno::Errno;

/// Looks at every process of the host: who is a child, and who shares memory, descriptors or
/// directories (`clone` flags, `vfork`).
pub(super) fn check(pid: i32, tids: &[i32], blockers: &mut Vec<Blocker>) {
    let others = match crate::proc::pids() {
        Ok(pids) => pids,
        Err(e) => return blockers.push(Blocker::unknown("/proc", &e)),
    };
    for other in others.into_iter().filter(|other| *other != pid) {
        // One that has ended since is no obstacle.
        let Ok(status) = status::read(other) else { continue };
        if status.ppid == pid {
            blockers.push(Blocker::new(
                format!("process {pid}"),
                format!("has a child, process {other} ({})", status.name),
                "process trees can't be moved yet: wait until its children have ended",
            ));
        }
        if status.has_memory {
            shared(pid, other, blockers);
        }
    }
    threads(pid, tids, blockers);
}

fn shared(pid: i32, other: i32, blockers: &mut Vec<Blocker>) {
    for (resource, name) in [
        (Resource::Memory, "its memory"),
        (Resource::Files, "its descriptor table"),
        (Resource::Fs, "its current directory and umask"),
    ] {
        if same_resource(pid, other, resource) == Ok(true) {
            blockers.push(Blocker::new(
                format!("process {pid}"),
                format!("shares {name} with process {other}"),
                "wait until that process execs or ends",
            ));
        }
    }
}

/// A thread may have left what threads share (`unshare`).
fn threads(pid: i32, tids: &[i32], blockers: &mut Vec<Blocker>) {
    for tid in tids.iter().filter(|tid| **tid != pid) {
        for (resource, name) in [
            (Resource::Files, "a descriptor table"),
            (Resource::Fs, "a current directory and umask"),
        ] {
            match same_resource(pid, *tid, resource) {
                Ok(true) | Err(Errno::ESRCH) => {}
                Ok(false) => blockers.push(Blocker::new(
                    format!("thread {tid}"),
                    format!("has {name} of its own (unshare)"),
                    "such threads can't be moved yet",
                )),
                Err(e) => blockers.push(Blocker::unknown(
                    format!("thread {tid}"),
                    &crate::Error::sys("compare with its process (kcmp)", e),
                )),
            }
        }
    }
}
