//! Namespaces and directories. A process that Slipstream has moved here lives in PID, mount and time
//! namespaces of its own, and must be able to move on: those are accepted if its file systems are ours
//! but for `/proc`.

use crate::error::{Error, Result};
use crate::preflight::Blocker;
use nix::sys::stat::stat;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Namespaces that must be those of slipstream.
const SAME: [(&str, &str); 5] = [
    ("user", "run slipstream in that namespace (nsenter -U)"),
    ("net", "run the agents in that namespace (ip netns exec, nsenter -n)"),
    ("ipc", "run the agents in that namespace (nsenter -i)"),
    ("uts", "run the agents in that namespace (nsenter -u)"),
    ("cgroup", "run the agents in that namespace (nsenter -C)"),
];

pub(super) fn check(pid: i32, blockers: &mut Vec<Blocker>) {
    for (name, remedy) in SAME {
        match same(pid, name) {
            Ok(true) => {}
            Ok(false) => blockers.push(Blocker::new(
                format!("process {pid}"),
                format!("is in another {name} namespace"),
                remedy,
            )),
            Err(e) => blockers.push(Blocker::unknown(format!("process {pid}"), &e)),
        }
    }
    children_elsewhere(pid, blockers);
    match mounts(pid) {
        Ok(None) => directories(pid, blockers),
        Ok(Some(reason)) => blockers.push(Blocker::new(
            format!("process {pid}"),
            reason,
            "run slipstream in that namespace (nsenter -m)",
        )),
        Err(e) => blockers.push(Blocker::unknown(format!("process {pid}"), &e)),
    }
}

fn link(pid: &str, name: &str) -> Result<PathBuf> {
    let path = format!("/proc/{pid}/{name}");
    fs::read_link(&path).map_err(|e| match pid.parse() {
        Ok(pid) => crate::proc::from_io(pid, &path, e),
        Err(_) => Error::io(path, e),
    })
}

/// True if `pid` shares the namespace with this process, or the kernel knows none of that sort.
fn same(pid: i32, name: &str) -> Result<bool> {
    let name = format!("ns/{name}");
    match link("self", &name) {
        Err(_) => Ok(true),
        Ok(ours) => Ok(link(&pid.to_string(), &name)? == ours),
    }
}

/// `unshare` without a fork leaves the namespaces of children apart from one's own. A PID namespace
/// that has no process yet has no name, either.
fn children_elsewhere(pid: i32, blockers: &mut Vec<Blocker>) {
    for name in ["pid", "time"] {
        let own = link(&pid.to_string(), &format!("ns/{name}"));
        let children = link(&pid.to_string(), &format!("ns/{name}_for_children"));
        if own.is_ok_and(|own| children.ok() != Some(own)) {
            blockers.push(Blocker::new(
                format!("process {pid}"),
                format!("has another {name} namespace for its children"),
                "let it exec in a child (unshare --fork)",
            ));
        }
    }
}

/// Why its file systems are not ours, if they are not.
fn mounts(pid: i32) -> Result<Option<String>> {
    if same(pid, "mnt")? {
        return Ok(None);
    }
    let own = std::process::id() as i32;
    let (ours, theirs) = (mount_table(own)?, mount_table(pid)?);
    let Some(first) = ours.symmetric_difference(&theirs).next() else {
        return Ok(None);
    };
    let at = String::from_utf8_lossy(&first.point).into_owned();
    Ok(Some(format!("is in another mount namespace, which differs at {at}")))
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Mount {
    point: Vec<u8>,
    device: Vec<u8>,
    root: Vec<u8>,
}

/// What is mounted where, without `/proc`, which each PID namespace has its own of.
fn mount_table(pid: i32) -> Result<BTreeSet<Mount>> {
    let text = crate::proc::read(pid, "mountinfo")?;
    let bad =
        |line: &[u8]| Error::parse("a line of /proc/PID/mountinfo", &String::from_utf8_lossy(line));
    let mut table = BTreeSet::new();
    for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let mount = parse_mount(line).ok_or_else(|| bad(line))?;
        if mount.point != b"/proc" {
            table.insert(mount);
        }
    }
    Ok(table)
}

/// `ID PARENT MAJOR:MINOR ROOT POINT ...`; spaces in names are escaped, and stay so here.
fn parse_mount(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|b| *b == b' ').skip(2).map(<[u8]>::to_vec);
    let (device, root, point) = (words.next()?, words.next()?, words.next()?);
    Some(Mount { point, device, root })
}

/// Root and current directory and executable must be found by their paths.
fn directories(pid: i32, blockers: &mut Vec<Blocker>) {
    for (name, object) in
        [("cwd", "current directory"), ("root", "root directory"), ("exe", "executable")]
    {
        if let Err(e) = directory(pid, name).map(|found| {
            found.map(|reason| {
                blockers.push(Blocker::new(
                    object,
                    reason,
                    "let the program change to a directory that exists, or start it again",
                ));
            })
        }) {
            blockers.push(Blocker::unknown(object, &e));
        }
    }
}

fn directory(pid: i32, name: &str) -> Result<Option<String>> {
    let path = link(&pid.to_string(), name)?;
    let magic = format!("/proc/{pid}/{name}");
    let there = stat(magic.as_str()).map_err(|e| Error::sys(magic, e))?;
    let lookup = if same(pid, "mnt")? {
        path.as_os_str().as_bytes().to_vec()
    } else {
        [format!("/proc/{pid}/root").as_bytes(), path.as_os_str().as_bytes()].concat()
    };
    let found = stat(std::ffi::OsStr::from_bytes(&lookup));
    let same_file = found.is_ok_and(|f| (f.st_dev, f.st_ino) == (there.st_dev, there.st_ino));
    Ok((!same_file).then(|| format!("{} was deleted or replaced", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_mounts() {
        let own = std::process::id() as i32;
        let table = mount_table(own).unwrap();
        assert!(table.iter().any(|m| m.point == b"/"));
        assert!(table.iter().all(|m| m.point != b"/proc"));
        assert_eq!(mounts(own).unwrap(), None);
        assert!(parse_mount(b"1 2 3").is_none());
    }
}
