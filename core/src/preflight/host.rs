//! What this host can do: `slipstream check`, and the numbers other checks compare with.

use crate::proc::status;
use crate::sys::{files, probe};
use nix::errno::Errno;
use std::fs;

/// One thing a host can or can't do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFact {
    /// What it is about.
    pub name: &'static str,
    /// It is as it should be.
    pub ok: bool,
    /// Without it nothing can be moved from or to here; other facts cost speed or some features.
    pub required: bool,
    /// What was found, and what to do about it.
    pub detail: String,
}

/// Features of userfaultfd that a migration needs: events of fork, remap, remove and unmap, missing
/// pages of hugetlb and shared memory (`UFFD_FEATURE_*`).
pub(super) const UFFD_FEATURES: [(u64, &str); 6] = [
    (1 << 1, "EVENT_FORK"),
    (1 << 2, "EVENT_REMAP"),
    (1 << 3, "EVENT_REMOVE"),
    (1 << 4, "MISSING_HUGETLBFS"),
    (1 << 5, "MISSING_SHMEM"),
    (1 << 6, "EVENT_UNMAP"),
];

const CAP_IPC_LOCK: u32 = 14;
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;
const CAP_CHECKPOINT_RESTORE: u32 = 40;

/// Everything there is to know about this host.
pub fn check_host() -> Vec<HostFact> {
    vec![
        kernel(),
        capabilities(),
        resource_capability(),
        userfaultfd(),
        namespaces(),
        descriptors(),
        io_uring(),
        pagemap_scan(),
        memory(),
    ]
}

fn fact(name: &'static str, required: bool, found: Result<String, String>) -> HostFact {
    let ok = found.is_ok();
    let (Ok(detail) | Err(detail)) = found;
    HostFact { name, ok, required, detail }
}

/// Major and minor version of the kernel.
pub(super) fn kernel_version() -> Option<(u32, u32)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let mut numbers = release.trim().split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel() -> HostFact {
    let found = match kernel_version() {
        Some((major, minor)) if (major, minor) >= (5, 15) => Ok(format!("Linux {major}.{minor}")),
        Some((major, minor)) => Err(format!("Linux {major}.{minor}; install 5.15 or newer")),
        None => Err("unknown version; is /proc mounted?".into()),
    };
    fact("kernel", true, found)
}

/// Effective capabilities of this process.
pub(super) fn own_caps() -> [u64; 5] {
    status::read(std::process::id() as i32).map(|s| s.caps).unwrap_or_default()
}

/// True if this process has a capability.
pub(super) fn has_cap(cap: u32) -> bool {
    own_caps()[2] & 1 << cap != 0
}

pub(super) fn may_raise_limits() -> bool {
    has_cap(CAP_SYS_RESOURCE)
}

fn capabilities() -> HostFact {
    let wanted = [(CAP_SYS_PTRACE, "CAP_SYS_PTRACE"), (CAP_SYS_ADMIN, "CAP_SYS_ADMIN")];
    let missing: Vec<&str> =
        wanted.iter().filter(|(cap, _)| !has_cap(*cap)).map(|(_, name)| *name).collect();
    let found = if missing.is_empty() {
        Ok("CAP_SYS_PTRACE, CAP_SYS_ADMIN".into())
    } else {
        Err(format!("{} missing; run as root", missing.join(", ")))
    };
    fact("capabilities", true, found)
}

pub(super) fn may_lock_memory() -> bool {
    has_cap(CAP_IPC_LOCK)
}

/// True where the kernel may put huge pages into shared memory behind userfaultfd's back: before 6.4,
/// when shared memory may be huge without being asked.
pub(super) fn shared_memory_is_collapsed() -> bool {
    let path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    let setting = fs::read_to_string(path).unwrap_or_default();
    let huge = ["[always]", "[within_size]", "[force]"].iter().any(|s| setting.contains(s));
    huge && kernel_version().is_none_or(|version| version < (6, 4))
}

fn resource_capability() -> HostFact {
    let found = if may_raise_limits() {
        Ok("hard limits can be raised (CAP_SYS_RESOURCE)".into())
    } else {
        Err("no CAP_SYS_RESOURCE: processes with higher hard limits than ours are refused".into())
    };
    fact("resource limits", false, found)
}

/// What is wrong with userfaultfd here.
pub(super) fn userfaultfd_problem() -> Option<(String, &'static str)> {
    let features = match probe::userfaultfd_features() {
        Ok(features) => features,
        Err(Errno::ENOSYS) => {
            return Some(("not in this kernel".into(), "use one with CONFIG_USERFAULTFD"));
        }
        Err(e) => return Some((format!("not allowed ({e})"), "run as root (CAP_SYS_PTRACE)")),
    };
    let missing: Vec<&str> =
        UFFD_FEATURES.iter().filter(|(bit, _)| features & bit == 0).map(|(_, n)| *n).collect();
    (!missing.is_empty())
        .then(|| (format!("without {}", missing.join(", ")), "run as root, on Linux 4.14 or newer"))
}

fn userfaultfd() -> HostFact {
    let found = match userfaultfd_problem() {
        None => Ok("all events, shared memory and huge pages".into()),
        Some((problem, remedy)) => Err(format!("{problem}; {remedy}")),
    };
    fact("userfaultfd", true, found)
}

/// What is wrong with namespaces and chosen thread ids here.
pub(super) fn namespace_problem() -> Option<(&'static str, &'static str)> {
    for name in ["pid", "mnt", "time"] {
        if fs::symlink_metadata(format!("/proc/self/ns/{name}")).is_err() {
            return Some((
                "pid, mount and time namespaces are not all there",
                "Linux 5.6 has them",
            ));
        }
    }
    if !has_cap(CAP_SYS_ADMIN) && !has_cap(CAP_CHECKPOINT_RESTORE) {
        return Some(("thread ids can't be chosen", "run as root (CAP_CHECKPOINT_RESTORE)"));
    }
    None
}

fn namespaces() -> HostFact {
    let found = match namespace_problem() {
        None => Ok("pid, mount and time; thread ids can be chosen".into()),
        Some((problem, remedy)) => Err(format!("{problem}; {remedy}")),
    };
    fact("namespaces", true, found)
}

fn descriptors() -> HostFact {
    let own = std::process::id() as i32;
    let found = match files::same_resource(own, own, files::Resource::Files) {
        Ok(_) => Ok("shared descriptors can be told (kcmp)".into()),
        Err(e) => Err(format!("kcmp: {e}; use a kernel with CONFIG_KCMP")),
    };
    fact("descriptors", true, found)
}

fn io_uring() -> HostFact {
    let found = if probe::io_uring_allowed() {
        Ok("allowed: missing pages are guarded even if every Slipstream process is killed".into())
    } else {
        Err("not allowed: a weaker guard is used; set kernel.io_uring_disabled=0".into())
    };
    fact("io_uring", false, found)
}

fn pagemap_scan() -> HostFact {
    let found = match kernel_version() {
        Some(version) if version >= (6, 7) => Ok("fast".into()),
        _ => Err("before Linux 6.7 finding present pages is several times slower".into()),
    };
    fact("page scan", false, found)
}

/// A field of `/proc/meminfo` in bytes.
pub(super) fn memory_bytes(field: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn memory() -> HostFact {
    let found = memory_bytes("MemAvailable")
        .map(|bytes| format!("{} MiB available", bytes >> 20))
        .ok_or_else(|| "unknown; is /proc mounted?".to_owned());
    fact("memory", true, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_can_move_processes() {
        let facts = check_host();
        for fact in &facts {
            println!("{fact:?}");
        }
        assert!(facts.iter().all(|f| f.ok || !f.required));
        assert!(memory_bytes("MemTotal").unwrap() > 1 << 20);
        assert_eq!(memory_bytes("Mem"), None);
    }
}
