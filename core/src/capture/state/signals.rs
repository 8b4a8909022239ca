//! Pending signals, looked at again: time goes by while a process is captured, and timers and other processes
//! send signals to one that is stopped, too.

use super::outside;
use crate::error::Result;
use crate::freeze::Frozen;
use crate::manifest::{Manifest, Process, SigAction, Thread};
use std::collections::HashMap;

const SI_KERNEL: i32 = 0x80;
const SI_TIMER: i32 = -2;
/// Where the id of the timer is in a siginfo of that code.
const SI_TIMER_ID_AT: usize = 16;
const SIG_DFL: u64 = 0;
const SIG_IGN: u64 = 1;
/// Signals of `ITIMER_REAL`, `ITIMER_VIRTUAL` and `ITIMER_PROF`.
const OF_INTERVAL_TIMERS: [i32; 3] = [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF];

/// Raw siginfos of the pending signals of a stopped process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    shared: Vec<Vec<u8>>,
    /// In the order of the threads.
    threads: Vec<Vec<Vec<u8>>>,
}

impl Pending {
    /// Those that were found.
    pub fn of(process: &Process, threads: &[Thread]) -> Self {
        Self {
            shared: process.pending.clone(),
            threads: threads.iter().map(|t| t.pending.clone()).collect(),
        }
    }

    /// Those of now, of the same process.
    pub fn again(&self, frozen: &Frozen) -> Result<Self> {
        let [own, shared] = outside::pending_sets(frozen.pid())?;
        let known = |i: usize| self.threads.get(i).map_or(0, |infos| signals_of(infos));
        let mut threads = Vec::with_capacity(frozen.threads().len());
        for (i, t) in frozen.threads().iter().enumerate() {
            // Only the first thread's set is read: one that lacks a queue entry as well as room for it is rare.
            let set = if i == 0 { own } else { known(i) };
            threads.push(outside::queued(t.tid, false, set)?);
        }
        Ok(Self { shared: outside::pending(frozen.pid(), true, shared)?, threads })
    }

    /// Puts them where they belong.
    pub fn put(self, process: &mut Process, threads: &mut [Thread]) {
        process.pending = self.shared;
        for (thread, pending) in threads.iter_mut().zip(self.threads) {
            thread.pending = pending;
        }
    }

    /// True if a signal is among them.
    pub fn holds(&self, signal: i32) -> bool {
        self.all().any(|info| number(info) == signal)
    }

    fn all(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.shared.iter().chain(self.threads.iter().flatten())
    }

    fn sent_by_timer(&self, id: i32) -> bool {
        self.all().any(|info| code(info) == SI_TIMER && word(info, SI_TIMER_ID_AT) == id)
    }

    fn sent_by_kernel(&self, signal: i32) -> bool {
        self.shared.iter().any(|info| number(info) == signal && code(info) == SI_KERNEL)
    }
}

/// A timer may have expired between the look at it and that at its signal, `elapsed_ns` at most: then it is as
/// after its signal. And `ITIMER_REAL` rests between its signal and the taking of that; its copy would rest for
/// ever, as the signal that is queued there comes from no timer, so it runs already.
pub fn settle_timers(process: &mut Process, pending: &Pending, elapsed_ns: i64) {
    let expired = |value_ns: i64| (1..=elapsed_ns).contains(&value_ns);
    for (timer, signal) in process.itimers.iter_mut().zip(OF_INTERVAL_TIMERS) {
        let rests = timer.value_ns == 0 && pending.holds(signal);
        if rests || expired(timer.value_ns) && pending.sent_by_kernel(signal) {
            timer.value_ns = timer.interval_ns;
        }
    }
    for timer in &mut process.timers {
        if expired(timer.time.value_ns) && pending.sent_by_timer(timer.id) {
            timer.time.value_ns = timer.time.interval_ns;
        }
    }
}

/// What is known of a captured process's signals, to find those that come later.
#[derive(Clone, Debug)]
pub struct Watch {
    captured: Pending,
    /// Signals that come to nothing.
    ignored: u64,
}

impl Watch {
    /// Remembers what a manifest has.
    pub fn of(m: &Manifest) -> Self {
        Self {
            captured: Pending::of(&m.process, &m.threads),
            ignored: ignored(&m.process.sigactions, &m.threads),
        }
    }

    /// A signal that came since, and would be lost: not one of the process's timers, which send theirs at the
    /// destination too.
    pub fn arrived(&self, frozen: &Frozen) -> Result<Option<i32>> {
        let now = self.captured.again(frozen)?;
        Ok(self.lost(&now))
    }

    fn lost(&self, now: &Pending) -> Option<i32> {
        let none = Vec::new();
        let threads = now.threads.iter().enumerate();
        let lists = threads.map(|(i, l)| (self.captured.threads.get(i).unwrap_or(&none), l));
        std::iter::once((&self.captured.shared, &now.shared))
            .chain(lists)
            .flat_map(|(before, now)| fresh(before, now))
            .find(|info| !of_a_timer(info) && bit(number(info)) & self.ignored == 0)
            .map(number)
    }
}

/// Signals whose action is to ignore them and that no thread blocks: the kernel keeps them only because the
/// process is traced.
fn ignored(actions: &[SigAction], threads: &[Thread]) -> u64 {
    const BY_DEFAULT: [i32; 4] = [libc::SIGCHLD, libc::SIGCONT, libc::SIGURG, libc::SIGWINCH];
    let ignores = |signal: i32, a: &SigAction| {
        a.handler == SIG_IGN || a.handler == SIG_DFL && BY_DEFAULT.contains(&signal)
    };
    let set =
        (1i32..).zip(actions).filter(|(s, a)| ignores(*s, a)).fold(0, |set, (s, _)| set | bit(s));
    threads.iter().fold(set, |set, t| set & !t.sigmask)
}

fn fresh<'a>(before: &[Vec<u8>], now: &'a [Vec<u8>]) -> Vec<&'a [u8]> {
    let mut known: HashMap<&[u8], usize> = HashMap::new();
    for info in before {
        *known.entry(info).or_default() += 1;
    }
    let new = |info: &&[u8]| match known.get_mut(*info) {
        Some(left) if *left > 0 => {
            *left -= 1;
            false
        }
        _ => true,
    };
    now.iter().map(Vec::as_slice).filter(new).collect()
}

fn of_a_timer(info: &[u8]) -> bool {
    code(info) == SI_TIMER || code(info) == SI_KERNEL && OF_INTERVAL_TIMERS.contains(&number(info))
}

fn signals_of(infos: &[Vec<u8>]) -> u64 {
    infos.iter().fold(0, |set, info| set | bit(number(info)))
}

fn bit(signal: i32) -> u64 {
    1u64.checked_shl((signal as u32).wrapping_sub(1)).unwrap_or(0)
}

fn number(info: &[u8]) -> i32 {
    word(info, 0)
}

fn code(info: &[u8]) -> i32 {
    word(info, 8)
}

fn word(info: &[u8], at: usize) -> i32 {
    let bytes = info.get(at..at + 4).and_then(|b| b.try_into().ok());
    bytes.map_or(0, i32::from_le_bytes)
}

#[cfg(test)]
#[path = "signals_tests.rs"]
mod tests;
