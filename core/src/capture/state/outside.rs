//! What can be seen of a frozen process from outside.
//!
//! Everything here runs in the blackout, so a thread costs one file and a handful of syscalls. The
//! process must be ptrace-stopped by the calling thread.

use super::proc_text::{self, Status, gone_or};
use crate::error::{Error, Result};
use crate::manifest::{Creds, PosixTimer, Process, Sched, Thread};
use crate::sys::{ptrace, task};
use nix::errno::Errno;
use std::os::unix::ffi::OsStringExt;

/// `SCHED_OTHER`, `SCHED_BATCH`, `SCHED_IDLE`.
const FAIR: [u32; 3] = [0, 3, 5];

/// What is read of the host once, before the freeze.
#[derive(Clone, Debug)]
pub struct Host {
    /// Online CPUs as a little-endian bit mask.
    cpus: Vec<u8>,
    /// Offset of our own `CLOCK_MONOTONIC` in nanoseconds.
    monotonic_offset_ns: i64,
    /// Time slice that fair threads get here unless they ask for another (reported since Linux 6.12).
    slice_ns: u64,
}

impl Host {
    /// Reads it.
    pub fn read() -> Result<Self> {
        let online = proc_text::read(0, "/sys/devices/system/cpu/online")?;
        let cpus = cpu_list(&String::from_utf8_lossy(&online))?;
        let own = task::sched_attr(0).map_err(|e| Error::sys("own scheduling", e))?;
        let slice_ns = if FAIR.contains(&own.policy) { own.runtime } else { 0 };
        Ok(Self { cpus, monotonic_offset_ns: monotonic_offset_ns(0, "/proc/self")?, slice_ns })
    }
}

/// Parses a list like `0-3,8`.
fn cpu_list(text: &str) -> Result<Vec<u8>> {
    const CPUS_MAX: usize = 8192;
    let bad = || Error::parse("/sys/devices/system/cpu/online", text);
    let mut mask = Vec::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let first: usize = first.parse().map_err(|_| bad())?;
        let last: usize = last.parse().map_err(|_| bad())?;
        if last >= CPUS_MAX {
            return Err(bad());
        }
        for cpu in first..=last {
            mask.resize(mask.len().max(cpu / 8 + 1), 0);
            mask[cpu / 8] |= 1 << (cpu % 8);
        }
    }
    Ok(mask)
}

/// Offset of a process's monotonic clock; 0 on kernels without time namespaces.
fn monotonic_offset_ns(pid: i32, dir: &str) -> Result<i64> {
    match proc_text::read(pid, &format!("{dir}/timens_offsets")) {
        Ok(text) => proc_text::monotonic_offset_ns(&text),
        Err(Error::Gone { .. }) => Ok(0),
        Err(e) => Err(e),
    }
}

/// A thread as seen from outside.
#[derive(Clone, Debug)]
pub struct ThreadOutside {
    /// What is known; registers, extended state and what [`super::remote`] asks for are left empty.
    pub thread: Thread,
    /// Seccomp mode; 0 is none.
    pub seccomp: u32,
    /// Times the thread gave up its CPU by itself, for [`super::sleep`].
    pub voluntary_switches: u64,
}

/// Reads a stopped thread. Ids given are those of our own PID namespace.
pub fn thread_outside(host: &Host, pid: i32, tid: i32) -> Result<ThreadOutside> {
    let status = status(pid, tid)?;
    let sys = |what: &str, e: Errno| match e {
        Errno::ESRCH => Error::Gone { pid: tid },
        e => Error::sys(format!("{what} of thread {tid}"), e),
    };
    let (robust_list, robust_list_len) =
        task::robust_list(tid).map_err(|e| sys("robust list", e))?;
    let rseq = rseq(tid)?;
    let thread = Thread {
        tid: status.inner_tid(),
        comm: status.comm,
        sigmask: ptrace::get_sigmask(tid)?,
        pending: pending(tid, false, status.pending[0])?,
        robust_list,
        robust_list_len,
        rseq: rseq.address,
        rseq_len: rseq.len,
        rseq_sig: rseq.signature,
        creds: Creds {
            uids: status.uids,
            gids: status.gids,
            groups: status.groups,
            caps: status.caps,
            securebits: 0,
            no_new_privs: status.no_new_privs,
        },
        sched: sched(host, tid).map_err(|e| sys("scheduling", e))?,
        time_left_ns: -1,
        ..Thread::default()
    };
    Ok(ThreadOutside {
        thread,
        seccomp: status.seccomp,
        voluntary_switches: status.voluntary_switches,
    })
}

fn status(pid: i32, tid: i32) -> Result<Status> {
    Status::parse(&proc_text::read(tid, &format!("/proc/{pid}/task/{tid}/status"))?)
}

/// Kernels without rseq, or built without this request, have nothing registered that could be read.
fn rseq(tid: i32) -> Result<ptrace::RseqConfig> {
    match ptrace::rseq_config(tid) {
        Err(Error::Sys { errno: Errno::EIO | Errno::EINVAL, .. }) => {
            Ok(ptrace::RseqConfig::default())
        }
        other => other,
    }
}

/// Pending signals with their siginfo. A signal whose queue entry the kernel could not allocate is only
/// in the set: it is given the siginfo that the kernel would deliver (`collect_signal`).
pub(super) fn pending(tid: i32, shared: bool, set: u64) -> Result<Vec<Vec<u8>>> {
    if set == 0 { Ok(Vec::new()) } else { queued(tid, shared, set) }
}

/// Sets of the signals pending for the first thread, and for all.
pub(super) fn pending_sets(pid: i32) -> Result<[u64; 2]> {
    Ok(status(pid, pid)?.pending)
}

/// The same when more may be queued than is known to be in the set.
pub(super) fn queued(tid: i32, shared: bool, set: u64) -> Result<Vec<Vec<u8>>> {
    let mut all = ptrace::pending_signals(tid, shared)?;
    let queued = all.iter().fold(0u64, |q, info| q | signal_bit(info));
    for signal in (1..=64u32).filter(|s| (set & !queued) >> (s - 1) & 1 == 1) {
        let mut info = vec![0; ptrace::SIGINFO_LEN];
        info[..4].copy_from_slice(&signal.to_le_bytes());
        all.push(info);
    }
    Ok(all)
}

fn signal_bit(info: &[u8]) -> u64 {
    1u64.checked_shl(u32::from(info[0]).wrapping_sub(1)).unwrap_or(0)
}

fn sched(host: &Host, tid: i32) -> nix::Result<Sched> {
    let attr = task::sched_attr(tid)?;
    let allowed = task::affinity(tid)?;
    let at = |mask: &[u8], i: usize| mask.get(i).copied().unwrap_or(0);
    let all = host.cpus.iter().enumerate().all(|(i, b)| at(&allowed, i) & b == *b);
    let default_slice = FAIR.contains(&attr.policy) && attr.runtime == host.slice_ns;
    let runtime = if default_slice { 0 } else { attr.runtime };
    let deadline = [runtime, attr.deadline, attr.period];
    Ok(Sched {
        policy: attr.policy,
        flags: attr.flags,
        nice: task::nice(tid)?,
        priority: attr.priority,
        deadline_ns: if deadline == [0; 3] { Vec::new() } else { deadline.to_vec() },
        affinity: if all { Vec::new() } else { allowed },
        ioprio: task::ioprio(tid)?,
    })
}

/// Reads what the threads of a stopped process share, but for descriptors, memory and what
/// [`super::remote`] asks for.
pub fn process_outside(host: &Host, pid: i32) -> Result<Process> {
    let status = status(pid, pid)?;
    let read = |name: &str| proc_text::read(pid, &format!("/proc/{pid}/{name}"));
    let offset = monotonic_offset_ns(pid, &format!("/proc/{pid}"))?;
    let mut process = Process {
        pid: status.inner_tid(),
        pgid: status.pgid,
        sid: status.sid,
        exe: link(pid, "exe")?,
        cwd: link(pid, "cwd")?,
        root: link(pid, "root")?,
        umask: status.umask,
        personality: proc_text::hexadecimal("personality", &read("personality")?)? as u32,
        oom_score_adj: proc_text::decimal("oom_score_adj", &read("oom_score_adj")?)? as i32,
        coredump_filter: coredump_filter(read("coredump_filter"))?,
        pending: pending(pid, true, status.pending[1])?,
        timers: timers(pid, &status, read("timers"))?,
        rlimits: proc_text::limits(&read("limits")?)?,
        mm: proc_text::mm_fields(&read("stat")?)?,
        auxv: read("auxv")?,
        comm: status.comm,
        ..Process::default()
    };
    process.monotonic_ns = task::monotonic_ns() + offset - host.monotonic_offset_ns;
    Ok(process)
}

fn link(pid: i32, name: &str) -> Result<Vec<u8>> {
    let path = format!("/proc/{pid}/{name}");
    let target = std::fs::read_link(&path).map_err(|e| gone_or(pid, &path, e))?;
    Ok(target.into_os_string().into_vec())
}

/// Missing on kernels without core dumps: then the filter is the default.
fn coredump_filter(text: Result<Vec<u8>>) -> Result<u32> {
    const DEFAULT: u32 = 0x33;
    match text {
        Ok(text) => Ok(proc_text::hexadecimal("coredump_filter", &text)? as u32),
        Err(Error::Gone { .. }) => Ok(DEFAULT),
        Err(e) => Err(e),
    }
}

/// Timers with the thread ids of the process's own PID namespace.
fn timers(pid: i32, leader: &Status, text: Result<Vec<u8>>) -> Result<Vec<PosixTimer>> {
    let mut timers = match text {
        Ok(text) => proc_text::timers(&text)?,
        // Without CONFIG_CHECKPOINT_RESTORE nobody tells what timers there are.
        Err(Error::Gone { .. }) => {
            return Err(Error::Refused(format!(
                "process {pid}: this kernel does not tell its timers (/proc/PID/timers); use one with \
                 CONFIG_CHECKPOINT_RESTORE"
            )));
        }
        Err(e) => return Err(e),
    };
    if leader.ns_tids.len() > 1 {
        for timer in timers.iter_mut().filter(|t| t.tid != 0) {
            timer.tid = status(pid, timer.tid)?.inner_tid();
        }
    }
    Ok(timers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list("0-3,8\n").expect("list"), [0x0f, 0x01]);
        assert_eq!(cpu_list("1").expect("list"), [0x02]);
        assert!(cpu_list("0-99999").is_err());
        assert!(cpu_list("").is_err());
    }

    #[test]
    fn signals_as_bits() {
        assert_eq!(signal_bit(&[1]), 1);
        assert_eq!(signal_bit(&[64]), 1 << 63);
        assert_eq!(signal_bit(&[0]), 0);
    }
}
