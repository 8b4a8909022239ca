//! What the kernel tells about another thread or process by plain syscalls.

use libc::{c_long, pid_t};
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct sched_attr` up to the utilisation clamps.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)] // named as in sched_setattr(2)
pub struct SchedAttr {
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}
/// Length of [`SchedAttr`] (`SCHED_ATTR_SIZE_VER0`).
pub const SCHED_ATTR_LEN: usize = 48;
const _: () = assert!(size_of::<SchedAttr>() == SCHED_ATTR_LEN);

impl SchedAttr {
    /// Runs before all ordinary threads: `SCHED_FIFO`, `SCHED_RR`, `SCHED_DEADLINE`.
    pub fn is_real_time(&self) -> bool {
        const SCHED_DEADLINE: u32 = 6;
        [libc::SCHED_FIFO as u32, libc::SCHED_RR as u32, SCHED_DEADLINE].contains(&self.policy)
    }
}

/// Longest CPU mask asked for: 8192 CPUs, the most an x86-64 kernel can be built for.
const CPU_MASK_LEN: usize = 1024;
const IOPRIO_WHO_PROCESS: i32 = 1;

fn result(ret: c_long) -> nix::Result<u64> {
    Errno::result(ret).map(|v| v as u64)
}

/// `sched_getattr(2)`.
pub fn sched_attr(tid: pid_t) -> nix::Result<SchedAttr> {
    let mut attr = SchedAttr::default();
    // SAFETY: the kernel writes at most the length given.
    let ret = unsafe {
        libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attr, SCHED_ATTR_LEN as u32, 0)
    };
    result(ret).map(|_| attr)
}

/// Nice value of a thread, also where its policy ignores it.
pub fn nice(tid: pid_t) -> nix::Result<i32> {
    // SAFETY: integers only. The raw syscall answers 20 - nice, so that it is never negative.
    let ret = unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, tid) };
    result(ret).map(|v| 20 - v as i32)
}

/// Sets the limit on locked memory of a process.
pub fn set_memlock_limit(pid: pid_t, soft: u64, hard: u64) -> nix::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` outlives the call; nothing is written back.
    let ret = unsafe {
        libc::prlimit64(pid, libc::RLIMIT_MEMLOCK, &raw const limit, std::ptr::null_mut())
    };
    Errno::result(ret).map(drop)
}

/// CPUs a thread may run on, as a little-endian bit mask without trailing zero bytes.
pub fn affinity(tid: pid_t) -> nix::Result<Vec<u8>> {
    let mut mask = vec![0u8; CPU_MASK_LEN];
    // SAFETY: the kernel writes at most the length given.
    let ret =
        unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, CPU_MASK_LEN, mask.as_mut_ptr()) };
    result(ret)?;
    let used = mask.iter().rposition(|b| *b != 0).map_or(0, |i| i + 1);
    mask.truncate(used);
    Ok(mask)
}

/// Sets the CPUs a thread may run on.
pub fn set_affinity(tid: pid_t, mask: &[u8]) -> nix::Result<()> {
    // SAFETY: the kernel reads at most the length given.
    let ret = unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, mask.len(), mask.as_ptr()) };
    result(ret).map(drop)
}

/// The CPU on which the kernel last did the receive processing of a socket (`SO_INCOMING_CPU`).
pub fn incoming_cpu(socket: BorrowedFd<'_>) -> Option<u32> {
    let mut cpu: i32 = -1;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, both outlive the call.
    let ret = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_INCOMING_CPU,
            (&raw mut cpu).cast(),
            &raw mut len,
        )
    };
    (ret == 0).then(|| u32::try_from(cpu).ok()).flatten()
}

/// `ioprio_get(2)` of a thread.
pub fn ioprio(tid: pid_t) -> nix::Result<u32> {
    // SAFETY: integers only.
    let ret = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) };
    result(ret).map(|v| v as u32)
}

/// Head and length of a thread's robust futex list.
pub fn robust_list(tid: pid_t) -> nix::Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both are 64-bit words that outlive the call.
    let ret = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) };
    result(ret).map(|_| if head == 0 { (0, 0) } else { (head, len) })
}

/// Our own `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> i64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` outlives the call, which can't fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

/// True when this kernel lets a process choose timer ids (`PR_TIMER_CREATE_RESTORE_IDS`, Linux 6.15).
pub fn can_restore_timer_ids() -> bool {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: u64 = 2;
    // SAFETY: integers only; the query changes nothing.
    unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, 0u64, 0u64, 0u64) >= 0 }
}

/// Has the scheduler let others run as soon as they can, in place of the calling thread, which gets its
/// share of the processor all the same: for threads that work a lot and that nobody waits for. (The
/// longer the slice a thread asks for, the later its deadline; Linux 6.12, elsewhere without effect.)
pub fn give_way() {
    const SLICE_NS: u64 = 100_000_000;
    let Ok(mut attr) = sched_attr(0) else { return };
    attr.runtime = SLICE_NS;
    // SAFETY: `attr` is a whole structure that says its size and outlives the call; 0 is this thread.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw mut attr, 0) };
}

/// Has the scheduler run the calling thread soon whenever it has something to do: for threads that
/// others wait for and that never compute for long. As nice as is, with a short slice; not real-time,
/// which stays on the CPU it last ran on and takes it from the work it serves (measured: first touches
/// half as long again, drains under faults up to twice as long). Without the privilege nothing changes.
pub fn prefer_this_thread() {
    const SLICE_NS: u64 = 100_000;
    let Ok(mut attr) = sched_attr(0) else { return };
    attr.nice = -20;
    attr.runtime = SLICE_NS;
    // SAFETY: `attr` is a whole structure that says its size and outlives the call; 0 is this thread.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw mut attr, 0) };
}

/// Has the scheduler put the processes of this session (setsid(2)) before those of others for as long as it
/// lives: for the few milliseconds in which a program runs nowhere. Sessions share processors as groups
/// (sched(7), "The autogroup feature"), and on a busy host a share is little. Without the privilege, or
/// where there are no such groups, nothing changes.
#[derive(Debug)]
pub struct Haste(());

impl Haste {
    const GROUP: &str = "/proc/self/autogroup";

    /// From now on.
    pub fn begin() -> Self {
        let _ = std::fs::write(Self::GROUP, "-20");
        Self(())
    }
}

impl Drop for Haste {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::GROUP, "0");
    }
}

/// Waits until every processor, virtual ones too, has run something else than what it was in the middle of in the kernel, or has taken an
/// interrupt there: a grace period of RCU. Some hundredths of a second; nothing where the kernel lacks the call.
pub fn every_processor_got_ahead() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: integers only.
    unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_thread_answers() {
        assert!(sched_attr(0).is_ok());
        assert!((-20..20).contains(&nice(0).expect("nice")));
        assert!(!affinity(0).expect("affinity").is_empty());
        assert!(ioprio(0).is_ok());
        assert_eq!(robust_list(0).expect("robust list").1, 24);
        assert!(monotonic_ns() > 0);
    }
}
