//! The program that is moved. It fills its memory with known words, touches it all the time, checks what it
//! reads, and keeps what it saw: the longest gaps between two looks at the clock, and how long the touches took
//! that raised a fault.
//!
//! SIGUSR1 has it publish what it saw since the last time, SIGUSR2 has it check every page first.

use crate::lab;
use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};
use slipstream_core::sys::task::monotonic_ns;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

/// It ends by itself after this, whatever became of the harness.
const LIFE_S: u32 = 900;
const PAGE_WORDS: usize = 512;
/// Shorter gaps are of no interest.
const GAP_NS_MIN: i64 = 100_000;
/// Longest gaps kept, of each thread.
const GAPS_MAX: usize = 512;
/// No fault that another process resolves is over sooner; faster touches are not looked into.
const FAULT_NS_MIN: i64 = 2_000;
const FAULT_NS_MAX: u64 = 100_000_000_000;

/// Which page is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Mode {
    /// Any.
    Random,
    /// The one after the last.
    Sequential,
    /// None at all.
    Idle,
}

impl Mode {
    /// As an argument.
    pub fn word(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::Sequential => "sequential",
            Self::Idle => "idle",
        }
    }

    fn parse(word: &str) -> Result<Self> {
        let all = [Self::Random, Self::Sequential, Self::Idle];
        all.into_iter().find(|m| m.word() == word).with_context(|| format!("mode {word}"))
    }
}

/// What the program saw since the last time it said so.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    /// `CLOCK_MONOTONIC` of this report.
    pub at_ns: i64,
    /// Address of the first whole page of its memory.
    pub address: u64,
    /// Touches since it began.
    pub touches: u64,
    /// Pages that did not hold what they should.
    pub wrong: u64,
    /// Touches that raised a fault.
    pub faults: u64,
    /// Median time of those.
    pub fault_ns_p50: u64,
    /// 99th percentile of those.
    pub fault_ns_p99: u64,
    /// The longest of those.
    pub fault_ns_max: u64,
    /// The longest gaps: beginning and length, nanoseconds.
    pub gaps: Vec<(i64, i64)>,
}

/// What a thread rarely has to do with.
struct Slow {
    fault_ns: Histogram<u64>,
    gaps: Vec<(i64, i64)>,
    wrong: u64,
}

/// A thread's figures, on cache lines of their own.
#[repr(align(128))]
struct Counters {
    touches: AtomicU64,
    slow: Mutex<Slow>,
}

impl Counters {
    fn new() -> Result<Self> {
        let fault_ns = Histogram::new_with_bounds(1, FAULT_NS_MAX, 2).context("a histogram")?;
        let slow = Slow { fault_ns, gaps: Vec::with_capacity(GAPS_MAX), wrong: 0 };
        Ok(Self { touches: AtomicU64::new(0), slow: Mutex::new(slow) })
    }

    fn slow<T>(&self, f: impl FnOnce(&mut Slow) -> T) -> T {
        f(&mut self.slow.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Slow {
    fn gap(&mut self, start: i64, len: i64) {
        if self.gaps.len() < GAPS_MAX {
            self.gaps.push((start, len));
        } else if let Some(least) = self.gaps.iter_mut().min_by_key(|gap| gap.1)
            && least.1 < len
        {
            *least = (start, len);
        }
    }
}

/// What the word at an index holds: nothing another page holds, and never zero in practice.
fn content(index: usize) -> u64 {
    let mixed = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

/// `BYTES THREADS MODE DIR`
pub fn main(words: &[&str]) -> Result<()> {
    let [bytes, threads, mode, directory] = words else {
        bail!("__touch BYTES THREADS MODE DIR");
    };
    nix::unistd::alarm::set(LIFE_S);
    let directory = Path::new(directory);
    let pages = bytes.parse::<usize>().context("BYTES")? / 4096;
    let threads = threads.parse::<usize>().context("THREADS")?;
    let mode = Mode::parse(mode)?;
    let signals: SigSet = [Signal::SIGUSR1, Signal::SIGUSR2].into_iter().collect();
    signals.thread_block().context("blocking signals")?;
    let memory: Arc<Vec<AtomicU64>> =
        Arc::new((0..pages * PAGE_WORDS).map(|i| AtomicU64::new(content(i))).collect());
    let mut counters = Vec::new();
    for number in 0..if mode == Mode::Idle { 0 } else { threads } {
        let own = Arc::new(Counters::new()?);
        counters.push(Arc::clone(&own));
        let memory = Arc::clone(&memory);
        std::thread::spawn(move || touch_forever(&memory, mode, number, &own));
    }
    report(&directory.join("ready"), &memory, &counters, 0)?;
    for number in 0u64.. {
        let signal = signals.wait().context("waiting for a signal")?;
        let wrong = if signal == Signal::SIGUSR2 { check_all(&memory) } else { 0 };
        report(&directory.join(format!("seen.{number}")), &memory, &counters, wrong)?;
    }
    Ok(())
}

/// Pages whose words, but for the one that touches write, aren't what they were filled with.
fn check_all(memory: &[AtomicU64]) -> u64 {
    let wrong = |(page, words): (usize, &[AtomicU64])| {
        words
            .iter()
            .enumerate()
            .any(|(i, word)| i != 1 && word.load(Relaxed) != content(page * PAGE_WORDS + i))
    };
    memory.chunks(PAGE_WORDS).enumerate().filter(|page| wrong(*page)).count() as u64
}

fn touch_forever(memory: &[AtomicU64], mode: Mode, number: usize, counters: &Counters) {
    let pages = memory.len() / PAGE_WORDS;
    let mut random = 0x1234_5678_9abc_def1u64.wrapping_mul(number as u64 * 2 + 1);
    let mut page = 0;
    let mut usage = Usage::now();
    let mut last = monotonic_ns();
    let mut touches = 0u64;
    loop {
        page = if mode == Mode::Random {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            ((u128::from(random) * pages as u128) >> 64) as usize
        } else {
            (page + 1) % pages
        };
        let before = monotonic_ns();
        let first = page * PAGE_WORDS;
        let right = memory[first].load(Relaxed) == content(first);
        memory[first + 1].store(touches, Relaxed);
        let after = monotonic_ns();
        touches += 1;
        counters.touches.store(touches, Relaxed);
        if after - last > FAULT_NS_MIN || !right {
            look_into(counters, [last, before, after], right, &mut usage);
        }
        last = after;
    }
}

/// Deals with a touch that took long, or read something wrong.
#[cold]
fn look_into(counters: &Counters, [last, before, after]: [i64; 3], right: bool, usage: &mut Usage) {
    let now = Usage::now();
    // A thread that has just been moved is a new one to the kernel: its figures begin again, and what took so
    // long was not a fault but the blackout.
    let moved = now.cpu_us < usage.cpu_us;
    let fault = after - before > FAULT_NS_MIN && !moved && now.faults != usage.faults;
    counters.slow(|slow| {
        slow.wrong += u64::from(!right);
        for (start, len) in [(last, before - last), (before, after - before)] {
            if len > GAP_NS_MIN {
                slow.gap(start, len);
            }
        }
        if fault {
            slow.fault_ns.saturating_record((after - before) as u64);
        }
    });
    *usage = Usage::now();
}

/// What the kernel counts of a thread.
struct Usage {
    /// Page faults, with those that another process resolved.
    faults: i64,
    cpu_us: i64,
}

impl Usage {
    fn now() -> Self {
        getrusage(UsageWho::RUSAGE_THREAD).map_or(Self { faults: 0, cpu_us: 0 }, |u| Self {
            faults: u.minor_page_faults() + u.major_page_faults(),
            cpu_us: u.user_time().num_microseconds() + u.system_time().num_microseconds(),
        })
    }
}

/// Publishes what was seen, and begins anew.
fn report(path: &Path, memory: &[AtomicU64], counters: &[Arc<Counters>], wrong: u64) -> Result<()> {
    let mut seen =
        Seen { address: (memory.as_ptr() as u64).next_multiple_of(4096), wrong, ..Seen::default() };
    let mut faults =
        Histogram::<u64>::new_with_bounds(1, FAULT_NS_MAX, 2).context("a histogram")?;
    seen.at_ns = monotonic_ns();
    for thread in counters {
        seen.touches += thread.touches.load(Relaxed);
    }
    for thread in counters {
        thread.slow(|slow| {
            seen.wrong += std::mem::take(&mut slow.wrong);
            seen.gaps.append(&mut slow.gaps);
            slow.gaps.reserve(GAPS_MAX);
            faults.add(&slow.fault_ns).context("adding histograms")?;
            slow.fault_ns.reset();
            anyhow::Ok(())
        })?;
    }
    seen.faults = faults.len();
    seen.fault_ns_p50 = faults.value_at_quantile(0.5);
    seen.fault_ns_p99 = faults.value_at_quantile(0.99);
    seen.fault_ns_max = faults.max();
    lab::publish(path, &serde_json::to_string(&seen).context("writing JSON")?)
}
