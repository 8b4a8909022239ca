//! Bulk lanes make room for urgent ones.
//!
//! A long system call of a bulk lane keeps its processor, on kernels that don't preempt themselves, and the
//! thread that a faulting program waits for can't run there meanwhile (measured: 300 KiB sent over loopback take as long as
//! three faults). So while faults come, bulk lanes send and receive one record at a time; when none does, many.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Bulk lanes are short of breath for so long after a fault: the next one of a program that runs into missing pages comes sooner.
const AFTER_FAULT: Duration = Duration::from_millis(2);
/// Where pages take long, for so many times as long as the last one took...
const FAULTS: u32 = 16;
/// ...but no longer than this.
const AFTER_FAULT_MAX: Duration = Duration::from_millis(100);
const NO_CPU: u32 = u32::MAX;

/// Shared by the lanes of one side of a migration.
#[derive(Debug)]
pub struct Pace {
    start: Instant,
    /// Microseconds after `start` up to which there is hurry.
    hurry_until_us: AtomicU64,
    /// Where urgent work is done, if it is done on one CPU.
    cpu: AtomicU32,
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            start: Instant::now(),
            hurry_until_us: AtomicU64::new(0),
            cpu: AtomicU32::new(NO_CPU),
        }
    }
}

impl Pace {
    /// A page is urgent.
    pub fn hurry(&self) {
        self.hurry_for(AFTER_FAULT);
    }

    /// A page was urgent, and took so long to come.
    pub fn hurry_on(&self, took: Duration) {
        self.hurry_for((took * FAULTS).clamp(AFTER_FAULT, AFTER_FAULT_MAX));
    }

    fn hurry_for(&self, time: Duration) {
        let until = self.start.elapsed() + time;
        self.hurry_until_us.fetch_max(until.as_micros() as u64, Relaxed);
    }

    /// Urgent work is done on this CPU from now on.
    pub fn settle_on(&self, cpu: u32) {
        self.cpu.store(cpu, Relaxed);
    }

    /// The CPU of urgent work, if there is any now.
    pub fn urgent_cpu(&self) -> Option<u32> {
        let cpu = self.cpu.load(Relaxed);
        (cpu != NO_CPU && self.is_hurried()).then_some(cpu)
    }

    /// True if urgent and bulk work have to share CPUs now.
    pub fn is_cramped(&self) -> bool {
        self.cpu.load(Relaxed) == NO_CPU && self.is_hurried()
    }

    /// True if a page was urgent a moment ago.
    pub fn is_hurried(&self) -> bool {
        let now_us = self.start.elapsed().as_micros() as u64;
        now_us < self.hurry_until_us.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hurry_passes() {
        let pace = Pace::default();
        assert!(!pace.is_hurried());
        pace.hurry();
        assert!(pace.is_hurried());
        assert_eq!(pace.urgent_cpu(), None);
        pace.settle_on(3);
        assert_eq!(pace.urgent_cpu(), Some(3));
        std::thread::sleep(2 * AFTER_FAULT);
        assert!(!pace.is_hurried());
        assert_eq!(pace.urgent_cpu(), None);
    }
}
