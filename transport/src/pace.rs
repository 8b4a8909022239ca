//! Bulk lanes make room for urgent ones.
//!
//! A long system call of a bulk lane keeps its processor, on kernels that don't preempt themselves, and the
//! thread that a faulting program waits for can't run there meanwhile (measured: 300 KiB sent over loopback take as long as
//! three faults). So while faults come, bulk lanes send and receive one record at a time; when none does, many.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Bulk lanes are short of breath for so long after a fault.
const AFTER_FAULT: Duration = Duration::from_millis(2);

/// Shared by the lanes of one side of a migration.
#[derive(Debug)]
pub struct Pace {
    start: Instant,
    /// Microseconds after `start` up to which there is hurry.
    hurry_until_us: AtomicU64,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { start: Instant::now(), hurry_until_us: AtomicU64::new(0) }
    }
}

impl Pace {
    /// A page is urgent.
    pub fn hurry(&self) {
        let until = self.start.elapsed() + AFTER_FAULT;
        self.hurry_until_us.store(until.as_micros() as u64, Relaxed);
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
        std::thread::sleep(2 * AFTER_FAULT);
        assert!(!pace.is_hurried());
    }
}
