//! In which order runs of pages are registered: where the program faults first, then the largest.
//!
//! Registering costs about a tenth of copying for large runs, and many times a copy for a page or two (FACTS.md: 256
//! MiB 0.06 to 0.13 of a memcpy, 64 KiB 2 to 3, 4 KiB 26 to 36). So small runs are left out.

use std::ops::Range;

/// Runs below this are not worth it.
pub const RUN_BYTES_MIN: u64 = 128 << 10;
/// Longest piece registered by one call: it must not keep a faulting program's page waiting for long.
const PIECE_BYTES_MAX: u64 = 32 << 20;
/// Most pieces: each is an object in the kernel and the adapter, and an entry in the peer's table.
const PIECES_MAX: usize = 16 << 10;
/// Of one batch.
const BATCH_BYTES_MAX: u64 = 64 << 20;
const BATCH_PIECES_MAX: usize = 128;

#[derive(Clone, Debug)]
struct Piece {
    range: Range<u64>,
    taken: bool,
}

/// What is left to register.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Ascending by address, once sealed.
    pieces: Vec<Piece>,
    /// Indexes, the largest piece first.
    by_size: Vec<u32>,
    next: usize,
}

impl Plan {
    /// Adds a run of registrable pages. When there are too many, the smallest are left out.
    pub fn add(&mut self, run: Range<u64>) {
        if run.end - run.start < RUN_BYTES_MIN {
            return;
        }
        let mut start = run.start;
        while start < run.end {
            let end = (start + PIECE_BYTES_MAX).min(run.end);
            self.pieces.push(Piece { range: start..end, taken: false });
            start = end;
        }
        if self.pieces.len() > 2 * PIECES_MAX {
            self.keep_largest();
        }
    }

    fn keep_largest(&mut self) {
        self.pieces.sort_by_key(|p| std::cmp::Reverse(p.range.end - p.range.start));
        self.pieces.truncate(PIECES_MAX);
    }

    /// Ends the adding.
    pub fn seal(&mut self) {
        self.keep_largest();
        self.pieces.sort_by_key(|p| p.range.start);
        self.by_size = (0..self.pieces.len() as u32).collect();
        let len = |i: &u32| {
            let range = &self.pieces[*i as usize].range;
            range.end - range.start
        };
        self.by_size.sort_by_key(|i| std::cmp::Reverse(len(i)));
    }

    /// Bytes of all pieces.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|p| p.range.end - p.range.start).sum()
    }

    /// The next pieces, beginning with the one around `hot` if it is still to do. Empty at the end.
    pub fn batch(&mut self, hot: Option<u64>) -> Vec<Range<u64>> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        if let Some(index) = hot.and_then(|address| self.index_of(address)) {
            self.take(index, &mut batch, &mut bytes);
        }
        while self.next < self.by_size.len()
            && bytes < BATCH_BYTES_MAX
            && batch.len() < BATCH_PIECES_MAX
        {
            self.take(self.by_size[self.next] as usize, &mut batch, &mut bytes);
            self.next += 1;
        }
        batch
    }

    fn index_of(&self, address: u64) -> Option<usize> {
        let after = self.pieces.partition_point(|p| p.range.start <= address);
        let index = after.checked_sub(1)?;
        self.pieces[index].range.contains(&address).then_some(index)
    }

    fn take(&mut self, index: usize, batch: &mut Vec<Range<u64>>, bytes: &mut u64) {
        let piece = &mut self.pieces[index];
        if !std::mem::replace(&mut piece.taken, true) {
            *bytes += piece.range.end - piece.range.start;
            batch.push(piece.range.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn hot_first_then_the_largest() {
        let mut plan = Plan::default();
        let hot = 100 * MIB..101 * MIB;
        for run in [0..MIB / 16, 10 * MIB..12 * MIB, hot.clone(), 200 * MIB..204 * MIB] {
            plan.add(run);
        }
        plan.seal();
        assert_eq!(
            plan.batch(Some(100 * MIB + 4096)),
            [hot, 200 * MIB..204 * MIB, 10 * MIB..12 * MIB]
        );
        assert!(plan.batch(Some(100 * MIB)).is_empty());
    }

    proptest! {
        #[test]
        fn every_piece_comes_once_in_bounded_batches(
            lens in prop::collection::vec(1u64..50_000, 1..60),
            hot in prop::collection::vec(0u64..4_000_000, 0..60),
        ) {
            let (mut plan, mut at, mut wanted) = (Plan::default(), 0, 0);
            for pages in lens {
                let run = at..at + pages * 4096;
                wanted += if run.end - run.start < RUN_BYTES_MIN { 0 } else { run.end - run.start };
                at = run.end + 4096;
                plan.add(run);
            }
            plan.seal();
            prop_assert_eq!(plan.bytes(), wanted);
            let (mut got, mut hot) = (Vec::new(), hot.into_iter());
            loop {
                let batch = plan.batch(hot.next().map(|page| page * 4096));
                prop_assert!(batch.len() <= BATCH_PIECES_MAX);
                let bytes: u64 = batch.iter().map(|r| r.end - r.start).sum();
                prop_assert!(bytes < BATCH_BYTES_MAX + PIECE_BYTES_MAX);
                if batch.is_empty() { break }
                got.extend(batch);
            }
            got.sort_by_key(|r| r.start);
            prop_assert!(got.windows(2).all(|w| w[0].end <= w[1].start));
            prop_assert_eq!(got.iter().map(|r| r.end - r.start).sum::<u64>(), wanted);
        }
    }
}
