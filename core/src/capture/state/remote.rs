//! What only the process itself can tell: tables of syscalls for its threads, and how to read the answers.
//!
//! No entry here may end the process: every one is of the kind that may fail.

use crate::arch::syscall_restart::{ReadMemory, timed_wait};
use crate::error::{Error, Result};
use crate::manifest::{AltStack, Interval, PosixTimer, Process, SigAction, Thread};
use crate::program::{Program, Ref};
use nix::errno::Errno;

const PR_GET_TID_ADDRESS: u64 = 40;
const PR_GET_TIMERSLACK: u64 = 30;
const PR_GET_SECUREBITS: u64 = 27;
const PR_GET_THP_DISABLE: u64 = 42;
const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
const MEMBARRIER_GET_REGISTRATIONS: u64 = 1 << 9;
const READ_LDT: u64 = 0;
const SIGSET_LEN: u64 = 8;
const SIGACTION_LEN: usize = 32;
const NS_PER_S: i64 = 1_000_000_000;

/// A program that has run: its table and its data as they are now in the process.
struct Ran<'a> {
    program: &'a Program,
    entries: &'a [u8],
    data: &'a [u8],
}

impl Ran<'_> {
    fn result(&self, r: Ref) -> std::result::Result<u64, Errno> {
        Program::result(self.entries, r)
    }

    fn expect(&self, what: &str, r: Ref) -> Result<u64> {
        self.result(r).map_err(|e| Error::sys(format!("{what} in the process"), e))
    }

    /// The 64-bit word at an address in the data.
    fn word(&self, address: u64) -> Result<u64> {
        let at = (address - self.program.data_base()) as usize;
        let bytes = self.data.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map(u64::from_le_bytes).ok_or_else(|| Error::parse("results", "cut short"))
    }

    fn words<const N: usize>(&self, address: u64) -> Result<[u64; N]> {
        let mut out = [0; N];
        for (i, w) in out.iter_mut().enumerate() {
            *w = self.word(address + i as u64 * 8)?;
        }
        Ok(out)
    }
}

/// The questions to one thread.
#[derive(Clone, Copy, Debug)]
pub struct ThreadProbe {
    altstack: (Ref, u64),
    tid_address: (Ref, u64),
    pdeathsig: (Ref, u64),
    tsc: (Ref, u64),
    securebits: Ref,
    timer_slack: Ref,
}

impl ThreadProbe {
    /// Adds them to the thread's program.
    pub fn plan(p: &mut Program) -> Self {
        let ask = |p: &mut Program, what: u64| {
            let at = p.words(&[0]);
            (p.may("ask prctl", libc::SYS_prctl, [what.into(), at.into()]), at)
        };
        let stack = p.words(&[0; 3]);
        Self {
            altstack: (
                p.may("get altstack", libc::SYS_sigaltstack, [0.into(), stack.into()]),
                stack,
            ),
            tid_address: ask(p, PR_GET_TID_ADDRESS),
            pdeathsig: ask(p, libc::PR_GET_PDEATHSIG as u64),
            tsc: ask(p, libc::PR_GET_TSC as u64),
            securebits: p.may("get securebits", libc::SYS_prctl, [PR_GET_SECUREBITS.into()]),
            timer_slack: p.may("get timer slack", libc::SYS_prctl, [PR_GET_TIMERSLACK.into()]),
        }
    }

    /// Takes the answers from the table and data as they are after the program ran.
    pub fn collect(
        &self,
        program: &Program,
        entries_ran: &[u8],
        data_ran: &[u8],
        thread: &mut Thread,
    ) -> Result<()> {
        let ran = Ran { program, entries: entries_ran, data: data_ran };
        ran.expect("sigaltstack", self.altstack.0)?;
        let [sp, flags, size] = ran.words(self.altstack.1)?;
        thread.altstack = AltStack { sp, flags: flags as u32, size };
        ran.expect("PR_GET_TID_ADDRESS", self.tid_address.0)?;
        thread.clear_child_tid = ran.word(self.tid_address.1)?;
        ran.expect("PR_GET_PDEATHSIG", self.pdeathsig.0)?;
        thread.pdeathsig = ran.word(self.pdeathsig.1)? as i32;
        if ran.result(self.tsc.0).is_ok() && ran.word(self.tsc.1)? as i32 == libc::PR_TSC_SIGSEGV {
            return Err(Error::Refused(format!(
                "thread {}: it may not read the time stamp counter (PR_SET_TSC), which does not come along \
                 yet; start the program without",
                thread.tid
            )));
        }
        thread.creds.securebits = ran.expect("PR_GET_SECUREBITS", self.securebits)? as u32;
        thread.timer_slack_ns = ran.expect("PR_GET_TIMERSLACK", self.timer_slack)?;
        Ok(())
    }
}

/// The questions to the process, asked of its leader.
#[derive(Clone, Debug)]
pub struct ProcessProbe {
    /// Signal number, result, where the structure is.
    actions: Vec<(usize, Ref, u64)>,
    itimers: [(Ref, u64); 3],
    /// Id, settings, where they are, overruns.
    timers: Vec<(i32, Ref, u64, Ref)>,
    dumpable: Ref,
    thp_disable: Ref,
    subreaper: (Ref, u64),
    brk: Ref,
    xcomp: (Ref, u64),
    membarrier: Ref,
    /// Bytes of its local descriptor table, the first only.
    ldt: Ref,
}

impl ProcessProbe {
    /// Adds them to the leader's program. `timers` are those that `/proc/PID/timers` lists.
    pub fn plan(p: &mut Program, timers: &[PosixTimer]) -> Self {
        let word = |p: &mut Program| p.words(&[0]);
        let (subreaper, xcomp, ldt) = (word(p), word(p), word(p));
        let prctl = |p: &mut Program, what: u64, at: u64| {
            p.may("ask prctl", libc::SYS_prctl, [what.into(), at.into()])
        };
        Self {
            actions: (1..=64).filter(|s| settable(*s)).map(|s| ask_action(p, s)).collect(),
            itimers: [0u64, 1, 2].map(|which| {
                let at = p.words(&[0; 4]);
                (p.may("getitimer", libc::SYS_getitimer, [which.into(), at.into()]), at)
            }),
            timers: timers.iter().map(|t| ask_timer(p, t.id)).collect(),
            dumpable: prctl(p, libc::PR_GET_DUMPABLE as u64, 0),
            thp_disable: prctl(p, PR_GET_THP_DISABLE, 0),
            subreaper: (prctl(p, libc::PR_GET_CHILD_SUBREAPER as u64, subreaper), subreaper),
            ldt: p.may("read LDT", libc::SYS_modify_ldt, [READ_LDT.into(), ldt.into(), 8.into()]),
            brk: p.may("get brk", libc::SYS_brk, [0.into()]),
            xcomp: (
                p.may(
                    "get xcomp",
                    libc::SYS_arch_prctl,
                    [ARCH_GET_XCOMP_PERM.into(), xcomp.into()],
                ),
                xcomp,
            ),
            membarrier: p.may(
                "get membarrier",
                libc::SYS_membarrier,
                [MEMBARRIER_GET_REGISTRATIONS.into(), 0.into()],
            ),
        }
    }

    /// Takes the answers. `process.timers` must be those given to [`ProcessProbe::plan`], but for
    /// timers that ended meanwhile, which are dropped.
    pub fn collect(
        &self,
        program: &Program,
        entries_ran: &[u8],
        data_ran: &[u8],
        process: &mut Process,
    ) -> Result<()> {
        let ran = Ran { program, entries: entries_ran, data: data_ran };
        process.sigactions = vec![SigAction::default(); 64];
        for (signal, call, at) in &self.actions {
            ran.expect("rt_sigaction", *call)?;
            let [handler, flags, restorer, mask] = ran.words(*at)?;
            process.sigactions[signal - 1] = SigAction { handler, flags, restorer, mask };
        }
        process.itimers.clear();
        for (call, at) in &self.itimers {
            ran.expect("getitimer", *call)?;
            process.itimers.push(interval(ran.words(*at)?, 1000)?);
        }
        self.collect_timers(&ran, process)?;
        // Kernels without it have none.
        if ran.result(self.ldt).is_ok_and(|bytes| bytes as i32 > 0) {
            return Err(Error::Refused(format!(
                "process {}: it has a local descriptor table (modify_ldt), which does not come along yet; \
                 start the program without",
                process.pid
            )));
        }
        process.dumpable = ran.expect("PR_GET_DUMPABLE", self.dumpable)? as u32;
        process.thp_disable = ran.expect("PR_GET_THP_DISABLE", self.thp_disable)? != 0;
        ran.expect("PR_GET_CHILD_SUBREAPER", self.subreaper.0)?;
        process.child_subreaper = ran.word(self.subreaper.1)? as u32 != 0;
        process.mm.brk = ran.expect("brk", self.brk)?;
        // Kernels that don't know the two questions have nothing to grant or to register.
        process.xcomp_perm = match ran.result(self.xcomp.0) {
            Ok(_) => ran.word(self.xcomp.1)?,
            Err(_) => 0,
        };
        process.membarrier = ran.result(self.membarrier).unwrap_or(0) as u32;
        Ok(())
    }

    fn collect_timers(&self, ran: &Ran, process: &mut Process) -> Result<()> {
        let mut kept = Vec::with_capacity(process.timers.len());
        for mut timer in std::mem::take(&mut process.timers) {
            let asked = self.timers.iter().find(|t| t.0 == timer.id);
            let Some((_, get, at, overrun)) = asked else {
                return Err(Error::Refused(format!(
                    "timer {} was made during the freeze; try again",
                    timer.id
                )));
            };
            match ran.result(*get) {
                Ok(_) => {}
                Err(Errno::EINVAL) => continue,
                Err(e) => return Err(Error::sys("timer_gettime in the process", e)),
            }
            timer.time = interval(ran.words(*at)?, 1)?;
            timer.overrun = ran.result(*overrun).unwrap_or(0) as i32;
            kept.push(timer);
        }
        process.timers = kept;
        Ok(())
    }
}

fn ask_action(p: &mut Program, signal: usize) -> (usize, Ref, u64) {
    let at = p.data(&[0; SIGACTION_LEN]);
    let args = [signal.into(), 0.into(), at.into(), SIGSET_LEN.into()];
    (signal, p.may("get signal action", libc::SYS_rt_sigaction, args), at)
}

fn ask_timer(p: &mut Program, id: i32) -> (i32, Ref, u64, Ref) {
    let at = p.words(&[0; 4]);
    let get = p.may("timer_gettime", libc::SYS_timer_gettime, [id.into(), at.into()]);
    (id, get, at, p.may("timer_getoverrun", libc::SYS_timer_getoverrun, [id.into()]))
}

/// True for signals whose action can be chosen.
pub fn settable(signal: usize) -> bool {
    signal != libc::SIGKILL as usize && signal != libc::SIGSTOP as usize
}

/// `itimerval` (fractions in microseconds: `unit_ns` = 1000) or `itimerspec` (1): period, time left.
fn interval([period_s, period, left_s, left]: [u64; 4], unit_ns: i64) -> Result<Interval> {
    let ns = |s: u64, fraction: u64| {
        let whole = (s as i64).checked_mul(NS_PER_S)?;
        whole.checked_add((fraction as i64).checked_mul(unit_ns)?)
    };
    match (ns(left_s, left), ns(period_s, period)) {
        (Some(value_ns), Some(interval_ns)) => Ok(Interval { value_ns, interval_ns }),
        _ => Err(Error::parse("timer", &format!("{left_s} s, every {period_s} s"))),
    }
}

/// Time left, in nanoseconds, of the relative sleep that a thread was stopped in, if the kernel has
/// written it down; -1 when it has not (see [`super::sleep`]) or the thread isn't in such a sleep.
pub fn time_left(regs: &crate::arch::Regs, read: ReadMemory) -> i64 {
    let mut spec = [0; 16];
    match timed_wait(regs) {
        Some(wait) if wait.left_at != 0 && read(wait.left_at, &mut spec) => timespec_ns(&spec),
        _ => -1,
    }
}

/// A `timespec` in nanoseconds; -1 when it makes no sense.
pub(super) fn timespec_ns(bytes: &[u8; 16]) -> i64 {
    let word = |at: usize| bytes[at..at + 8].iter().rev().fold(0u64, |w, b| w << 8 | u64::from(*b));
    let (s, ns) = (word(0) as i64, word(8) as i64);
    if s < 0 || !(0..NS_PER_S).contains(&ns) {
        return -1;
    }
    s.saturating_mul(NS_PER_S).saturating_add(ns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Regs;

    #[test]
    fn the_time_left_is_read_where_the_kernel_wrote_it() {
        let regs = Regs {
            orig_rax: libc::SYS_nanosleep as u64,
            rax: -516i64 as u64,
            rsi: 0x500,
            ..Regs::default()
        };
        let read = |at: u64, out: &mut [u8]| {
            assert_eq!(at, 0x500);
            out[..8].copy_from_slice(&2u64.to_le_bytes());
            out[8..].copy_from_slice(&7u64.to_le_bytes());
            true
        };
        assert_eq!(time_left(&regs, &read), 2_000_000_007);
        assert_eq!(time_left(&regs, &|_, _| false), -1);
        assert_eq!(time_left(&Regs { rsi: 0, ..regs }, &read), -1);
        assert_eq!(time_left(&Regs { rax: 0, ..regs }, &read), -1);
        assert_eq!(timespec_ns(&[0xff; 16]), -1);
    }

    #[test]
    fn timer_values() {
        let both = interval([1, 2, 3, 4], 1000).expect("fits");
        assert_eq!((both.value_ns, both.interval_ns), (3_000_004_000, 1_000_002_000));
        assert!(interval([u64::MAX / 4, 0, 0, 0], 1).is_err());
    }
}
