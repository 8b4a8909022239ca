//! The page table: two bits a page, changed by compare-and-swap.

use super::PagesError;
use super::layout::{Layout, WORD_PAGES};
use super::memory::TableMemory;
use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

/// The low bit of every page in a word.
const LOW: u64 = 0x5555_5555_5555_5555;
/// Words of a chunk: one memory page of table, the grain in which untouched parts are skipped.
const CHUNK_WORDS: u64 = 512;

/// What is known of a page at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageState {
    /// Not here, nobody has asked for it.
    Missing = 0,
    /// Not here, a lane has been asked for it.
    Requested = 1,
    /// Installed.
    Present = 2,
    /// The program discarded it: reads as zeros.
    Gone = 3,
}

/// Pages of a table that are not missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages in [`PageState::Requested`].
    pub requested: u64,
    /// Pages in [`PageState::Present`].
    pub present: u64,
    /// Pages in [`PageState::Gone`].
    pub gone: u64,
}

/// States of all pages of a [`Layout`], indexed by page.
///
/// Page indices are those of the layout; one beyond it is a bug of the caller, and panics.
///
/// The memory holds a bitmap of chunks that may hold anything but `Missing`, then the states. Both
/// are in it so that a table in a file is complete for the daemon that opens it after a crash.
#[derive(Debug)]
pub struct PageTable {
    memory: TableMemory,
    first_state: usize,
    words: u64,
}

impl PageTable {
    /// Bytes of memory the table of a layout needs.
    pub fn len_bytes(layout: &Layout) -> u64 {
        let words = layout.pages().div_ceil(WORD_PAGES);
        (bitmap_words(words) + words) * 8
    }

    /// A table over zeroed memory (all missing) or over memory an earlier table of the same layout
    /// used.
    pub fn new(layout: &Layout, memory: TableMemory) -> Result<Self, PagesError> {
        let words = layout.pages().div_ceil(WORD_PAGES);
        if (memory.words().len() as u64) * 8 < Self::len_bytes(layout) {
            return Err(PagesError::ShortMemory { needed_bytes: Self::len_bytes(layout) });
        }
        Ok(Self { memory, first_state: bitmap_words(words) as usize, words })
    }

    /// State of one page.
    pub fn state(&self, page: u64) -> PageState {
        match (self.word(page).load(Acquire) >> shift(page)) & 3 {
            0 => PageState::Missing,
            1 => PageState::Requested,
            2 => PageState::Present,
            _ => PageState::Gone,
        }
    }

    /// Moves one page from one state to another; false when it was in a third.
    pub fn set(&self, page: u64, from: PageState, to: PageState) -> bool {
        self.note_touched(page);
        let clear = !(3 << shift(page));
        let to = (to as u64) << shift(page);
        self.word(page)
            .fetch_update(AcqRel, Acquire, |word| {
                ((word >> shift(page)) & 3 == from as u64).then_some((word & clear) | to)
            })
            .is_ok()
    }

    /// Claims the missing pages from `start` on, at most `max_pages`, up to the first page that is
    /// not missing. The range is empty when `start` isn't missing.
    pub fn claim_run(&self, start: u64, max_pages: u64) -> Range<u64> {
        let end = start.saturating_add(max_pages).min(self.words * WORD_PAGES);
        let mut at = start;
        while at < end {
            self.note_touched(at);
            let stop = end.min(word_end(at));
            let mut claimed = 0;
            let update = self.word(at).fetch_update(AcqRel, Acquire, |word| {
                claimed = leading_in_word(missing(word), at, stop);
                (claimed > 0).then(|| word | (LOW & mask(at, at + claimed)))
            });
            at += if update.is_ok() { claimed } else { 0 };
            if at < stop {
                break;
            }
        }
        start..at
    }

    /// Makes pages present, except those the program has discarded; says how many were not before.
    pub fn mark_present(&self, range: Range<u64>) -> u64 {
        self.update(range, |word, lanes| {
            let lanes = lanes & !gone(word);
            ((word & !(lanes | lanes << 1)) | lanes << 1, lanes & !present(word))
        })
    }

    /// Makes pages gone; says how many of them had not arrived.
    pub fn mark_gone(&self, range: Range<u64>) -> u64 {
        self.update(range, |word, lanes| (word | lanes | lanes << 1, lanes & wanted(word)))
    }

    /// Makes requested pages missing again (a lane failed); says how many.
    pub fn unclaim(&self, range: Range<u64>) -> u64 {
        self.update(range, |word, lanes| {
            let lanes = lanes & requested(word);
            (word & !lanes, lanes)
        })
    }

    /// Pages in each state but missing. Costs what has been touched, not what could be.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        self.for_touched(|_, word| {
            counts.requested += u64::from(requested(word).count_ones());
            counts.present += u64::from(present(word).count_ones());
            counts.gone += u64::from(gone(word).count_ones());
        });
        counts
    }

    /// A copy for a forked child, into zeroed memory: what was requested for the parent is missing
    /// in the child. Costs what has been touched.
    pub fn snapshot_for_fork(
        &self,
        layout: &Layout,
        memory: TableMemory,
    ) -> Result<Self, PagesError> {
        let copy = Self::new(layout, memory)?;
        self.for_touched(|index, word| {
            let word = word & !requested(word);
            if word != 0 {
                copy.note_touched(index * WORD_PAGES);
                copy.states()[index as usize].store(word, Release);
            }
        });
        Ok(copy)
    }

    /// Makes all requested pages missing: whoever asked for them is dead.
    pub fn forget_requests(&self) {
        self.for_touched(|index, word| {
            if requested(word) != 0 {
                self.unclaim(index * WORD_PAGES..(index + 1) * WORD_PAGES);
            }
        });
    }

    /// Leading pages of a range that are missing or requested.
    pub(super) fn leading_wanted(&self, range: Range<u64>) -> u64 {
        self.leading(range, wanted)
    }

    /// Leading pages of a range that are present.
    pub(super) fn leading_present(&self, range: Range<u64>) -> u64 {
        self.leading(range, present)
    }

    /// Leading pages of a range that are gone.
    pub(super) fn leading_gone(&self, range: Range<u64>) -> u64 {
        self.leading(range, gone)
    }

    /// Leading pages of a range that are requested.
    pub(super) fn leading_requested(&self, range: Range<u64>) -> u64 {
        self.leading(range, requested)
    }

    /// Leading pages of a range that are anything but requested.
    pub(super) fn leading_not_requested(&self, range: Range<u64>) -> u64 {
        self.leading(range, |word| !requested(word) & LOW)
    }

    /// Leading pages of a range that are present or gone.
    pub(super) fn leading_settled(&self, range: Range<u64>) -> u64 {
        self.leading(range, |word| !wanted(word) & LOW)
    }

    /// Pages of a range that are missing or requested.
    pub(super) fn count_wanted(&self, range: Range<u64>) -> u64 {
        let mut count = 0;
        let mut at = range.start;
        while at < range.end {
            let stop = range.end.min(word_end(at));
            let lanes = wanted(self.word(at).load(Relaxed)) & mask(at, stop);
            count += u64::from(lanes.count_ones());
            at = stop;
        }
        count
    }

    fn leading(&self, range: Range<u64>, lanes: impl Fn(u64) -> u64) -> u64 {
        let mut at = range.start;
        while at < range.end {
            let stop = range.end.min(word_end(at));
            at += leading_in_word(lanes(self.word(at).load(Acquire)), at, stop);
            if at < stop {
                break;
            }
        }
        at - range.start
    }

    /// Applies a change word by word; the change yields the new word and the lanes to count.
    fn update(&self, range: Range<u64>, change: impl Fn(u64, u64) -> (u64, u64)) -> u64 {
        let mut count = 0;
        let mut at = range.start;
        while at < range.end {
            let stop = range.end.min(word_end(at));
            let lanes = LOW & mask(at, stop);
            self.note_touched(at);
            let mut counted = 0;
            // An unchanged word is left alone: `Err` then means "nothing to do".
            let changed = self.word(at).fetch_update(AcqRel, Acquire, |word| {
                let (new, lanes) = change(word, lanes);
                counted = lanes;
                (new != word).then_some(new)
            });
            count += changed.map_or(0, |_| u64::from(counted.count_ones()));
            at = stop;
        }
        count
    }

    /// Calls with the index and value of every word that may be other than zero.
    fn for_touched(&self, mut each: impl FnMut(u64, u64)) {
        let chunks = self.words.div_ceil(CHUNK_WORDS);
        for (index, bits) in self.memory.words()[..chunks.div_ceil(64) as usize].iter().enumerate()
        {
            let mut bits = bits.load(Acquire);
            while bits != 0 {
                let chunk = index as u64 * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                let end = ((chunk + 1) * CHUNK_WORDS).min(self.words);
                for word in chunk * CHUNK_WORDS..end {
                    match self.states()[word as usize].load(Acquire) {
                        0 => {}
                        value => each(word, value),
                    }
                }
            }
        }
    }

    /// Records that the chunk of a page may change, before it does.
    fn note_touched(&self, page: u64) {
        let chunk = page / WORD_PAGES / CHUNK_WORDS;
        let bits = &self.memory.words()[(chunk / 64) as usize];
        let bit = 1 << (chunk % 64);
        if bits.load(Relaxed) & bit == 0 {
            bits.fetch_or(bit, AcqRel);
        }
    }

    fn states(&self) -> &[AtomicU64] {
        &self.memory.words()[self.first_state..]
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        &self.states()[(page / WORD_PAGES) as usize]
    }
}

/// Words of the bitmap in front, rounded so that the states start on a memory page.
fn bitmap_words(words: u64) -> u64 {
    words.div_ceil(CHUNK_WORDS).div_ceil(64).next_multiple_of(CHUNK_WORDS)
}

fn shift(page: u64) -> u64 {
    (page % WORD_PAGES) * 2
}

/// First page of the next word.
fn word_end(page: u64) -> u64 {
    (page / WORD_PAGES + 1) * WORD_PAGES
}

/// All bits of pages `from..to` of one word.
fn mask(from: u64, to: u64) -> u64 {
    match to - from {
        WORD_PAGES.. => u64::MAX,
        pages => ((1 << (pages * 2)) - 1) << shift(from),
    }
}

/// Pages from `from` on, before `stop`, whose lane is set without a gap.
fn leading_in_word(lanes: u64, from: u64, stop: u64) -> u64 {
    let first_unset = (!(lanes >> shift(from)) & LOW).trailing_zeros() / 2;
    u64::from(first_unset).min(stop - from)
}

fn missing(word: u64) -> u64 {
    !(word | word >> 1) & LOW
}

fn requested(word: u64) -> u64 {
    word & !(word >> 1) & LOW
}

fn present(word: u64) -> u64 {
    !word & (word >> 1) & LOW
}

fn gone(word: u64) -> u64 {
    word & (word >> 1) & LOW
}

/// Missing or requested.
fn wanted(word: u64) -> u64 {
    !(word >> 1) & LOW
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::layout::Region;
    use proptest::prelude::*;

    fn table(pages: u64) -> (Layout, PageTable) {
        let region = Region {
            start: 0,
            len_bytes: pages * 4096,
            page_size: 4096,
            shared: false,
            forks: true,
        };
        let layout = Layout::new(vec![region]).unwrap();
        let memory = TableMemory::anonymous(PageTable::len_bytes(&layout)).unwrap();
        let table = PageTable::new(&layout, memory).unwrap();
        (layout, table)
    }

    fn resident_bytes() -> u64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    #[test]
    fn a_tebibyte_costs_address_space_only() {
        let before = resident_bytes();
        let (layout, table) = table(1 << 28);
        assert_eq!(table.claim_run((1 << 27) + 5, 1000).end, (1 << 27) + 1005);
        table.mark_present((1 << 27) + 5..(1 << 27) + 10);
        let started = std::time::Instant::now();
        let memory = TableMemory::anonymous(PageTable::len_bytes(&layout)).unwrap();
        let copy = table.snapshot_for_fork(&layout, memory).unwrap();
        assert!(started.elapsed().as_millis() < 20, "a fork walked the untouched table");
        assert_eq!(copy.counts(), Counts { requested: 0, present: 5, gone: 0 });
        assert_eq!(table.counts(), Counts { requested: 995, present: 5, gone: 0 });
        assert!(resident_bytes() < before + (16 << 20));
    }

    #[test]
    fn short_memory_is_refused() {
        let (layout, _) = table(1 << 20);
        let memory = TableMemory::anonymous(4096).unwrap();
        assert!(matches!(PageTable::new(&layout, memory), Err(PagesError::ShortMemory { .. })));
    }

    #[test]
    fn concurrent_claims_share_out_every_page_once() {
        let (_, table) = table(20_000);
        let claimed: u64 = std::thread::scope(|scope| {
            let claimers: Vec<_> = (0..4)
                .map(|thread| {
                    let table = &table;
                    scope.spawn(move || {
                        (0..20_000)
                            .step_by(7)
                            .map(|at| {
                                let run = table.claim_run(at, 7 + thread);
                                run.end - run.start
                            })
                            .sum::<u64>()
                    })
                })
                .collect();
            claimers.into_iter().map(|claimer| claimer.join().unwrap()).sum()
        });
        assert_eq!(claimed, table.counts().requested);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Claim(u64, u64),
        Present(u64, u64),
        Gone(u64, u64),
        Unclaim(u64, u64),
        Set(u64, u8, u8),
    }

    fn op() -> impl Strategy<Value = Op> {
        let range = || (0_u64..100, 0_u64..80);
        prop_oneof![
            range().prop_map(|(at, len)| Op::Claim(at, len)),
            range().prop_map(|(at, len)| Op::Present(at, len)),
            range().prop_map(|(at, len)| Op::Gone(at, len)),
            range().prop_map(|(at, len)| Op::Unclaim(at, len)),
            (0_u64..100, 0_u8..4, 0_u8..4).prop_map(|(at, from, to)| Op::Set(at, from, to)),
        ]
    }

    fn state_of(value: u8) -> PageState {
        [PageState::Missing, PageState::Requested, PageState::Present, PageState::Gone]
            [usize::from(value)]
    }

    proptest! {
        #[test]
        fn behaves_like_a_list_of_states(ops in prop::collection::vec(op(), 0..40)) {
            let (layout, table) = table(192);
            let mut model = [0_u8; 192];
            for op in ops {
                match op {
                    Op::Claim(at, len) => {
                        let from = at as usize;
                        let run = model[from..from + len as usize].iter().take_while(|s| **s == 0).count();
                        prop_assert_eq!(table.claim_run(at, len), at..at + run as u64);
                        model[from..from + run].fill(1);
                    }
                    Op::Present(at, len) => {
                        let mut changed = 0;
                        for state in &mut model[at as usize..(at + len) as usize] {
                            if *state < 2 { *state = 2; changed += 1; }
                        }
                        prop_assert_eq!(table.mark_present(at..at + len), changed);
                    }
                    Op::Gone(at, len) => {
                        let slice = &mut model[at as usize..(at + len) as usize];
                        let wanted = slice.iter().filter(|s| **s < 2).count() as u64;
                        prop_assert_eq!(table.count_wanted(at..at + len), wanted);
                        slice.fill(3);
                        prop_assert_eq!(table.mark_gone(at..at + len), wanted);
                    }
                    Op::Unclaim(at, len) => {
                        let mut changed = 0;
                        for state in &mut model[at as usize..(at + len) as usize] {
                            if *state == 1 { *state = 0; changed += 1; }
                        }
                        prop_assert_eq!(table.unclaim(at..at + len), changed);
                    }
                    Op::Set(at, from, to) => {
                        let holds = model[at as usize] == from;
                        prop_assert_eq!(table.set(at, state_of(from), state_of(to)), holds);
                        if holds { model[at as usize] = to; }
                    }
                }
                for (page, state) in model.iter().enumerate() {
                    prop_assert_eq!(table.state(page as u64) as u8, *state);
                }
            }
            let memory = TableMemory::anonymous(PageTable::len_bytes(&layout)).unwrap();
            let copy = table.snapshot_for_fork(&layout, memory).unwrap();
            table.forget_requests();
            for (page, state) in model.iter().enumerate() {
                let expected = if *state == 1 { 0 } else { *state };
                prop_assert_eq!(copy.state(page as u64) as u8, expected);
                prop_assert_eq!(table.state(page as u64) as u8, expected);
            }
            for page in 0..100 {
                let rest = &model[page..];
                let leading = |wanted: &dyn Fn(u8) -> bool| rest.iter().take_while(|s| wanted(**s)).count() as u64;
                let range = page as u64..192;
                prop_assert_eq!(table.leading_wanted(range.clone()), leading(&|s| s < 2));
                prop_assert_eq!(table.leading_settled(range.clone()), leading(&|s| s > 1));
                prop_assert_eq!(table.leading_present(range.clone()), leading(&|s| s == 2));
                prop_assert_eq!(table.leading_gone(range), leading(&|s| s == 3));
            }
        }
    }
}
