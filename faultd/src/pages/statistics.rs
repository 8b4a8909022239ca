//! How far a drain is.

use super::Pages;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// How far the drain is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Pages known to be present on the source.
    pub pages_total: u64,
    /// Pages installed in the process itself.
    pub pages_present: u64,
    /// Pages the process discarded or unmapped before they arrived.
    pub pages_gone: u64,
    /// Bytes installed, in all spaces.
    pub bytes: u64,
    /// Pages asked for on the urgent lane.
    pub urgent: u64,
}

/// What is counted on the way; of the process alone, but for the bytes.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) total: AtomicU64,
    pub(super) present: AtomicU64,
    pub(super) gone: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) urgent: AtomicU64,
}

impl Pages {
    /// How far the drain is.
    pub fn statistics(&self) -> Statistics {
        let pages_total = self.counters.total.load(Relaxed);
        let pages_present = self.counters.present.load(Relaxed).min(pages_total);
        // What came before the present map may be zeros, of which the source has no pages; what was removed while it was under
        // way is not counted one by one.
        let left = pages_total - pages_present;
        let pages_gone =
            if self.complete() { left } else { self.counters.gone.load(Relaxed).min(left) };
        Statistics {
            pages_total,
            pages_present,
            pages_gone,
            bytes: self.counters.bytes.load(Relaxed),
            urgent: self.counters.urgent.load(Relaxed),
        }
    }
}
