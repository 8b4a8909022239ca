//! What recent faults say about the next ones: a detector of sequences and strides for each thread.

use super::SpaceId;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// First window around a fault, in bytes.
const WINDOW_BYTES_MIN: u64 = 64 << 10;
/// Largest window ahead of a sequence of faults, in bytes.
const WINDOW_BYTES_MAX: u64 = 8 << 20;
/// Most pages ahead of a strided sequence.
const STRIDE_PAGES_MAX: u32 = 64;
/// After so many faults in a row that follow no pattern, a thread's next one says nothing about its
/// neighbourhood: small runs all over would only keep prefetch from long ones.
const PATTERNLESS_MAX: u32 = 8;
/// Threads remembered; beyond, the one known longest is forgotten.
const THREADS_MAX: usize = 256;

/// What to fetch next for one thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hint {
    /// All of a source range, from its upper end when backward.
    Window { range: Range<u64>, backward: bool },
    /// Single pages `step` apart.
    Stride { next: u64, step: i64, page_size: u64, left: u32 },
}

#[derive(Debug)]
struct Detector {
    last: u64,
    step: i64,
    window_bytes: u64,
    stride_pages: u32,
    /// Faults in a row that followed no pattern.
    patternless: u32,
    hint: Option<Hint>,
    queued: bool,
}

/// The detectors, and the order in which their hints are served.
#[derive(Debug, Default)]
pub(super) struct Hints {
    detectors: BTreeMap<(SpaceId, i32), Detector>,
    /// Threads by age, for forgetting.
    ages: VecDeque<(SpaceId, i32)>,
    /// Threads with a hint, the next to serve in front.
    ready: VecDeque<(SpaceId, i32)>,
}

impl Hints {
    /// A thread faulted on a source page: its hint is replaced by a better one, and is served next.
    pub fn note(&mut self, space: SpaceId, tid: i32, source: u64, page_size: u64) {
        let key = (space, tid);
        if !self.detectors.contains_key(&key) {
            self.make_room();
            self.ages.push_back(key);
        }
        let detector = self.detectors.entry(key).or_insert(Detector {
            last: u64::MAX,
            step: 0,
            window_bytes: WINDOW_BYTES_MIN,
            stride_pages: 0,
            patternless: 0,
            hint: None,
            queued: false,
        });
        detector.hint = detector.observe(source, page_size);
        if detector.hint.is_some() && !detector.queued {
            detector.queued = true;
            self.ready.push_front(key);
        }
    }

    /// The hint to serve now. To be given back by [`Hints::put_back`] unless it is exhausted.
    pub fn take(&mut self) -> Option<((SpaceId, i32), Hint)> {
        while let Some(key) = self.ready.pop_front() {
            let Some(detector) = self.detectors.get_mut(&key) else { continue };
            detector.queued = false;
            if let Some(hint) = detector.hint.take() {
                return Some((key, hint));
            }
        }
        None
    }

    /// Queues a hint behind those of other threads.
    pub fn put_back(&mut self, key: (SpaceId, i32), hint: Hint) {
        if let Some(detector) = self.detectors.get_mut(&key) {
            detector.hint = Some(hint);
            detector.queued = true;
            self.ready.push_back(key);
        }
    }

    /// Forgets the threads of a space.
    pub fn forget(&mut self, space: SpaceId) {
        self.detectors.retain(|key, _| key.0 != space);
        self.ages.retain(|key| key.0 != space);
        self.ready.retain(|key| key.0 != space);
    }

    fn make_room(&mut self) {
        if self.detectors.len() >= THREADS_MAX
            && let Some(oldest) = self.ages.pop_front()
        {
            self.detectors.remove(&oldest);
            self.ready.retain(|key| *key != oldest);
        }
    }
}

impl Detector {
    fn observe(&mut self, source: u64, page_size: u64) -> Option<Hint> {
        let step = source.wrapping_sub(self.last) as i64;
        let first = self.last == u64::MAX;
        // The next fault of a sequence is the first page that prefetch hasn't got to: anywhere up
        // to just past the window.
        let reach = self.window_bytes + 2 * page_size;
        let sequential = !first && step != 0 && step.unsigned_abs() <= reach;
        let strided = !first && step != 0 && step == self.step;
        (self.last, self.step) = (source, step);
        let after = source.saturating_add(page_size);
        if sequential {
            (self.stride_pages, self.patternless) = (0, 0);
            self.window_bytes =
                (self.window_bytes * 2).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX.max(page_size));
            if step < 0 {
                let range = source.saturating_sub(self.window_bytes)..source;
                return Some(Hint::Window { range, backward: true });
            }
            let range = after..after.saturating_add(self.window_bytes);
            return Some(Hint::Window { range, backward: false });
        }
        self.window_bytes = WINDOW_BYTES_MIN.max(page_size);
        if strided {
            self.stride_pages = (self.stride_pages * 2).clamp(4, STRIDE_PAGES_MAX);
            self.patternless = 0;
            let next = source.wrapping_add_signed(step);
            return Some(Hint::Stride { next, step, page_size, left: self.stride_pages });
        }
        self.stride_pages = 0;
        self.patternless = self.patternless.saturating_add(1);
        if self.patternless > PATTERNLESS_MAX {
            return None;
        }
        let block = source & !(self.window_bytes - 1);
        let range = block..block.saturating_add(self.window_bytes);
        Some(Hint::Window { range, backward: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: SpaceId = SpaceId(0);

    fn after(faults: &[u64]) -> Hint {
        let mut hints = Hints::default();
        for source in faults {
            hints.note(SPACE, 1, *source, 4096);
        }
        let (_, hint) = hints.take().unwrap();
        assert!(hints.take().is_none());
        hint
    }

    #[test]
    fn one_fault_asks_for_its_neighbourhood() {
        let expected = Hint::Window { range: 0x10_0000..0x11_0000, backward: false };
        assert_eq!(after(&[0x10_5000]), expected);
    }

    #[test]
    fn a_sequence_grows_its_window_to_the_limit_in_both_directions() {
        let mut at = 1 << 30;
        let mut faults = vec![at];
        for _ in 0..12 {
            at += 0x1000;
            faults.push(at);
        }
        let range = at + 4096..at + 4096 + WINDOW_BYTES_MAX;
        assert_eq!(after(&faults), Hint::Window { range, backward: false });
        faults.reverse();
        let range = (1 << 30) - WINDOW_BYTES_MAX..1 << 30;
        assert_eq!(after(&faults), Hint::Window { range, backward: true });
    }

    #[test]
    fn a_stride_is_followed_and_a_jump_starts_anew() {
        let mut faults: Vec<u64> = (1..5).map(|i| i << 20).collect();
        let expected = Hint::Stride { next: 5 << 20, step: 1 << 20, page_size: 4096, left: 8 };
        assert_eq!(after(&faults), expected);
        faults.push(1 << 30);
        let range = 1 << 30..(1 << 30) + WINDOW_BYTES_MIN;
        assert_eq!(after(&faults), Hint::Window { range, backward: false });
    }

    #[test]
    fn threads_are_bounded_and_served_in_turn() {
        let mut hints = Hints::default();
        for tid in 0..1000 {
            hints.note(SPACE, tid, 4096, 4096);
        }
        assert_eq!(hints.detectors.len(), THREADS_MAX);
        assert_eq!(hints.ready.len(), THREADS_MAX);
        let (first, hint) = hints.take().unwrap();
        assert_eq!(first.1, 999, "the latest fault comes first");
        hints.put_back(first, hint);
        assert_eq!(hints.take().unwrap().0.1, 998);
        hints.forget(SPACE);
        assert!(hints.take().is_none());
    }
}
