//! How long a thread has been asleep, when the kernel doesn't say how much of its wait is left.
//!
//! poll, relative futex waits and nanosleep without a second argument keep their end in the kernel
//! only. But the scheduler notes when a thread last left its CPU (`se.exec_start` in
//! `/proc/PID/task/TID/sched`), and that doesn't change while it sleeps. So a sample taken *before* the
//! freeze, together with proof that the thread slept on until then (one more voluntary switch: into the
//! ptrace stop), tells when the wait began.
//!
//! The scheduler's clock differs from `CLOCK_MONOTONIC` by an amount of each CPU's own (time stolen by a
//! hypervisor and spent in interrupts is left out), so it is calibrated per CPU. What was
//! stolen since the wait began makes the estimate err to the late side, as a wait may.

use super::proc_text;
use super::remote::timespec_ns;
use crate::arch::Regs;
use crate::arch::syscall_restart::{ReadMemory, Timeout, timed_wait};
use crate::sys::task;
use std::collections::HashMap;

/// Field of `/proc/PID/stat` that holds the CPU last run on.
const STAT_CPU: usize = 39;

/// Maps the scheduler's clocks to `CLOCK_MONOTONIC`.
#[derive(Debug, Default)]
pub struct SleepClock {
    /// What to add to a CPU's clock, in nanoseconds; `None` where it can't be found out.
    offsets_ns: HashMap<u32, Option<i64>>,
}

impl SleepClock {
    /// A clock without calibration; each CPU is calibrated when first needed, in about half a
    /// millisecond, for which the calling thread moves to it.
    pub fn new() -> Self {
        Self::default()
    }

    fn offset_ns(&mut self, cpu: u32) -> Option<i64> {
        *self.offsets_ns.entry(cpu).or_insert_with(|| calibrate(cpu))
    }
}

/// Three tries, the middle one: a tick in between makes one too small, a late wake-up too large.
fn calibrate(cpu: u32) -> Option<i64> {
    let before = task::affinity(0).ok()?;
    let mut only = vec![0u8; cpu as usize / 8 + 1];
    only[cpu as usize / 8] = 1 << (cpu % 8);
    task::set_affinity(0, &only).ok()?;
    let mut tries: Vec<i64> = (0..3)
        .filter_map(|_| {
            // Going to sleep and waking up makes the scheduler note the time.
            std::thread::sleep(std::time::Duration::from_micros(100));
            let now = task::monotonic_ns();
            Some(now - Scheduled::read(0, "/proc/thread-self")?.left_cpu_ns)
        })
        .collect();
    task::set_affinity(0, &before).ok()?;
    tries.sort_unstable();
    tries.get(1).copied()
}

/// What the scheduler tells about a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scheduled {
    /// When it last left (or got) its CPU, on that CPU's clock.
    left_cpu_ns: i64,
    voluntary_switches: u64,
}

impl Scheduled {
    /// `None` on kernels that don't have the file.
    fn read(pid: i32, dir: &str) -> Option<Self> {
        let text = proc_text::read(pid, &format!("{dir}/sched")).ok()?;
        let text = String::from_utf8_lossy(&text);
        let field = |name: &str| {
            let line = text.lines().find(|l| l.split([' ', ':']).next() == Some(name))?;
            line.rsplit(':').next().map(str::trim)
        };
        // Milliseconds, a point, and the six digits below.
        let (ms, below) = field("se.exec_start")?.split_once('.')?;
        let ms: i64 = ms.parse().ok()?;
        let below: i64 = below.parse().ok()?;
        Some(Self {
            left_cpu_ns: ms.checked_mul(1_000_000)?.checked_add(below)?,
            voluntary_switches: field("nr_voluntary_switches")?.parse().ok()?,
        })
    }
}

/// A thread seen asleep in a syscall, before the freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SleepSample {
    args: [u64; 6],
    sp: u64,
    voluntary_switches: u64,
    /// When it fell asleep, on our `CLOCK_MONOTONIC`.
    since_ns: i64,
    /// It goes on with a wait that was stopped before.
    restarted: bool,
}

/// All sleeping threads of a process.
#[derive(Debug, Default)]
pub struct Sleeps {
    clock: SleepClock,
    samples: HashMap<i32, SleepSample>,
}

impl Sleeps {
    /// Looks at every thread. To be called early, and again after anything of ours that stopped a
    /// thread for a moment: a wait it goes on with began when it was first seen.
    pub fn look(&mut self, pid: i32, tids: &[i32]) {
        let earlier = std::mem::take(&mut self.samples);
        for &tid in tids {
            let Some(mut now) = SleepSample::take(&mut self.clock, pid, tid) else { continue };
            if let Some(before) = earlier.get(&tid)
                && now.restarted
                && (now.args, now.sp) == (before.args, before.sp)
            {
                now.since_ns = before.since_ns;
            }
            self.samples.insert(tid, now);
        }
    }

    /// See [`SleepSample::time_left`]; -1 for a thread that was not seen asleep.
    pub fn time_left(
        &self,
        tid: i32,
        regs: &Regs,
        voluntary_switches: u64,
        frozen_ns: i64,
        read: ReadMemory,
    ) -> i64 {
        let sample = self.samples.get(&tid);
        sample.map_or(-1, |s| s.time_left(regs, voluntary_switches, frozen_ns, read))
    }
}

impl SleepSample {
    /// Looks at a thread; `None` when it isn't asleep in a syscall, or the kernel doesn't tell.
    pub fn take(clock: &mut SleepClock, pid: i32, tid: i32) -> Option<Self> {
        let dir = format!("/proc/{pid}/task/{tid}");
        let read = |name: &str| {
            let text = proc_text::read(tid, &format!("{dir}/{name}")).ok()?;
            Some(String::from_utf8_lossy(&text).into_owned())
        };
        let first = Scheduled::read(tid, &dir)?;
        let (nr, args, sp) = blocked_in(&read("syscall")?)?;
        let stat = read("stat")?;
        let cpu = stat.rsplit(')').next()?.split_whitespace().nth(STAT_CPU - 3)?.parse().ok()?;
        // It must not have run while we were reading.
        if Scheduled::read(tid, &dir)? != first {
            return None;
        }
        let since_ns = first.left_cpu_ns + clock.offset_ns(cpu)?;
        let restarted = nr == libc::SYS_restart_syscall as u64;
        let voluntary_switches = first.voluntary_switches;
        Some(Self { args, sp, voluntary_switches, since_ns, restarted })
    }

    /// Time left, in nanoseconds, of the wait that the thread was stopped in with `regs` at `frozen_ns`
    /// (our `CLOCK_MONOTONIC`); -1 when it isn't the wait that was sampled.
    /// `voluntary_switches` is what [`super::outside::ThreadOutside`] found after the stop.
    pub fn time_left(
        &self,
        regs: &Regs,
        voluntary_switches: u64,
        frozen_ns: i64,
        read: ReadMemory,
    ) -> i64 {
        let Some(wait) = timed_wait(regs) else { return -1 };
        let timeout_ns = match wait.timeout {
            Timeout::Millis(ms) => i64::from(ms) * 1_000_000,
            Timeout::Timespec(at) => {
                let mut spec = [0; 16];
                if read(at, &mut spec) { timespec_ns(&spec) } else { -1 }
            }
        };
        if timeout_ns < 0 || !self.slept_on(regs, voluntary_switches) {
            return -1;
        }
        self.left_of(timeout_ns, frozen_ns)
    }

    /// True when the thread has not run between the sample and its stop.
    fn slept_on(&self, regs: &Regs, voluntary_switches: u64) -> bool {
        let args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
        voluntary_switches == self.voluntary_switches + 1
            && args == self.args
            && regs.rsp == self.sp
    }

    fn left_of(&self, timeout_ns: i64, now_ns: i64) -> i64 {
        let asleep_ns = now_ns.saturating_sub(self.since_ns).max(0);
        timeout_ns.saturating_sub(asleep_ns).max(0)
    }
}

/// Number, arguments and stack pointer from `/proc/PID/syscall`: "nr args... sp pc", or "running".
fn blocked_in(text: &str) -> Option<(u64, [u64; 6], u64)> {
    let hex = |w: &str| u64::from_str_radix(w.strip_prefix("0x")?, 16).ok();
    let words: Vec<u64> = text.split_whitespace().skip(1).map_while(hex).collect();
    let args = words.get(..6)?.try_into().ok()?;
    let nr = text.split_whitespace().next()?.parse().ok()?;
    (words.len() == 8).then(|| (nr, args, words[6]))
}

#[cfg(test)]
#[path = "sleep_tests.rs"]
mod tests;
