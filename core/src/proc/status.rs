//! `/proc/PID/status`.

use crate::error::{Error, Result};

/// The fields of `/proc/PID/status` that matter here; one that an older kernel lacks is zero or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Command name, with the kernel's escapes.
    pub name: String,
    /// `R`, `S`, `D`, `T`, `t`, `Z`, `X`, `I`.
    pub state: char,
    /// Thread-group id in our PID namespace.
    pub tgid: i32,
    /// Parent, or 0.
    pub ppid: i32,
    /// Tracer, or 0.
    pub tracer_pid: i32,
    /// Real, effective, saved and file-system uid.
    pub uids: [u32; 4],
    /// Real, effective, saved and file-system gid.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Its id in each PID namespace from ours to its own.
    pub ns_pids: Vec<i32>,
    /// Its process group in the same namespaces.
    pub ns_pgids: Vec<i32>,
    /// Its session in the same namespaces.
    pub ns_sids: Vec<i32>,
    /// True for a kernel thread, where the kernel tells (6.8).
    pub kernel_thread: bool,
    /// Resident bytes.
    pub rss_bytes: u64,
    /// Resident anonymous bytes.
    pub rss_anon_bytes: u64,
    /// Resident bytes of shared memory.
    pub rss_shmem_bytes: u64,
    /// Swapped-out bytes.
    pub swap_bytes: u64,
    /// Bytes in huge pages.
    pub hugetlb_bytes: u64,
    /// True if it has an address space.
    pub has_memory: bool,
    /// Number of threads.
    pub threads: u32,
    /// Inheritable, permitted, effective, bounding and ambient capabilities.
    pub caps: [u64; 5],
    /// `no_new_privs`.
    pub no_new_privs: bool,
    /// Seccomp mode: 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// `shstk`, `wrss`: shadow stack features in use.
    pub thread_features: Vec<String>,
    /// Umask.
    pub umask: u32,
}

/// Reads and parses `/proc/PID/status`.
pub fn read(pid: i32) -> Result<Status> {
    parse(&super::read(pid, "status")?)
}

/// Reads and parses `/proc/PID/task/TID/status`.
pub fn read_thread(pid: i32, tid: i32) -> Result<Status> {
    parse(&super::read(pid, &format!("task/{tid}/status"))?)
}

/// Parses the text of `/proc/PID/status`.
pub fn parse(text: &[u8]) -> Result<Status> {
    let mut status = Status::default();
    for line in text.split(|b| *b == b'\n') {
        let text = String::from_utf8_lossy(line);
        if let Some((name, value)) = text.split_once(':') {
            take(&mut status, name, value.trim())
                .ok_or_else(|| Error::parse("a line of /proc/PID/status", &text))?;
        }
    }
    if status.tgid <= 0 {
        return Err(Error::parse("/proc/PID/status", "no Tgid"));
    }
    Ok(status)
}

fn take(s: &mut Status, name: &str, value: &str) -> Option<()> {
    match name {
        "Name" => value.clone_into(&mut s.name),
        "State" => s.state = value.chars().next()?,
        "Umask" => s.umask = u32::from_str_radix(value, 8).ok()?,
        "Tgid" => s.tgid = value.parse().ok()?,
        "PPid" => s.ppid = value.parse().ok()?,
        "TracerPid" => s.tracer_pid = value.parse().ok()?,
        "Uid" => s.uids = list(value)?.try_into().ok()?,
        "Gid" => s.gids = list(value)?.try_into().ok()?,
        "Groups" => s.groups = list(value)?,
        "NSpid" => s.ns_pids = list(value)?,
        "NSpgid" => s.ns_pgids = list(value)?,
        "NSsid" => s.ns_sids = list(value)?,
        "Kthread" => s.kernel_thread = value != "0",
        "VmSize" => s.has_memory = true,
        "VmRSS" => s.rss_bytes = kilobytes(value)?,
        "RssAnon" => s.rss_anon_bytes = kilobytes(value)?,
        "RssShmem" => s.rss_shmem_bytes = kilobytes(value)?,
        "VmSwap" => s.swap_bytes = kilobytes(value)?,
        "HugetlbPages" => s.hugetlb_bytes = kilobytes(value)?,
        "Threads" => s.threads = value.parse().ok()?,
        "CapInh" => s.caps[0] = mask(value)?,
        "CapPrm" => s.caps[1] = mask(value)?,
        "CapEff" => s.caps[2] = mask(value)?,
        "CapBnd" => s.caps[3] = mask(value)?,
        "CapAmb" => s.caps[4] = mask(value)?,
        "NoNewPrivs" => s.no_new_privs = value != "0",
        "Seccomp" => s.seccomp = value.parse().ok()?,
        "x86_Thread_features" => {
            s.thread_features = value.split_whitespace().map(str::to_owned).collect();
        }
        _ => {}
    }
    Some(())
}

fn list<T: std::str::FromStr>(value: &str) -> Option<Vec<T>> {
    value.split_whitespace().map(|v| v.parse().ok()).collect()
}

fn kilobytes(value: &str) -> Option<u64> {
    value.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn mask(value: &str) -> Option<u64> {
    u64::from_str_radix(value, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn own_status() {
        let pid = std::process::id() as i32;
        let s = read(pid).unwrap();
        assert_eq!((s.tgid, s.ns_pids.last()), (pid, Some(&pid)));
        assert!(s.threads > 0 && s.has_memory && s.rss_anon_bytes > 0 && !s.kernel_thread);
        assert_eq!(read_thread(pid, pid).unwrap().tgid, pid);
    }

    #[test]
    fn a_process_that_is_not() {
        assert!(matches!(read(i32::MAX), Err(Error::Gone { .. })));
    }

    #[test]
    fn names_are_anyones_choice() {
        let s = parse(b"Name:\tTgid: 7\nTgid:\t12\nCapEff:\t000001fffeffffff\nUid:\t1\t2\t3\t4\n");
        let s = s.unwrap();
        assert_eq!((s.tgid, s.caps[2], s.uids), (12, 0x1ff_feff_ffff, [1, 2, 3, 4]));
        assert!(parse(b"Tgid:\tx\n").is_err());
        assert!(parse(b"").is_err());
    }

    proptest! {
        #[test]
        fn any_text_does_no_harm(name in "(Tgid|Uid|VmRSS|CapEff|NSpid|State|Groups):", value in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut text = name.into_bytes();
            text.extend(value);
            let _ = parse(&text);
        }
    }
}
