//! The journal of a drain: what happened to the address spaces, in memory that outlives the session.
//!
//! ```text
//! header   number of records · the event being dealt with, and what was known before it was read
//! records  five words each
//! ```
//! The userfaultfd is read *into* the header, so that an event which the kernel has handed out is
//! recorded even if the session dies right then. It is dealt with by records, which are written before
//! they take effect. A session that takes over replays all records, and then deals with the event if no
//! record followed it. When the journal is full it is written anew, as the records that lead to what is so
//! now; the keeper exchanges the old one for the new in one step.

use crate::error::{Error, Result};
use crate::pages::{Pages, SharedRemove, SpaceId, Span};
use slipstream_core::sys::mapped::{Shared, memfd};
use slipstream_core::sys::twin;
use slipstream_core::sys::uffd::{self, Event, MESSAGE_LEN, Uffd};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

const HEADER_LEN: usize = 4096;
const COUNT: usize = 0;
/// Number of records when the event below was read.
const EVENT_AT: usize = 8;
const EVENT_SPACE: usize = 16;
/// The slot a forked child's userfaultfd is being put into, plus one.
const FORK_SLOT: usize = 24;
const EVENT: usize = 32;
const REMOVING_COUNT: usize = 64;
const REMOVING: usize = 72;
/// Ranges noted as being discarded; threads that do so at the same instant.
const REMOVING_MAX: usize = 200;
const _: () = assert!(REMOVING + REMOVING_MAX * 16 <= HEADER_LEN);
const RECORD_LEN: usize = 40;
/// Records before the journal is written anew.
const RECORDS_MIN: usize = 1 << 16;

/// Something that happened to an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// Pages were discarded.
    Remove {
        /// Where.
        space: SpaceId,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
        /// Of shared memory, the object's pages too.
        punch: bool,
    },
    /// A range was unmapped.
    Unmap {
        /// Where.
        space: SpaceId,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// A range was moved.
    Remap {
        /// Where.
        space: SpaceId,
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Shared memory was mapped once more.
    Alias {
        /// Where.
        space: SpaceId,
        /// Address of the first mapping.
        from: u64,
        /// Address of the new one.
        to: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A child was forked.
    Fork {
        /// Whose.
        parent: SpaceId,
        /// What it is called.
        child: SpaceId,
        /// What keeps it.
        slot: u64,
    },
    /// Nothing is mapped in a range, whatever events say.
    Forget {
        /// Where.
        space: SpaceId,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// Events that were overtaken don't come any more.
    ForgetOvertaken,
    /// A space has ended.
    Exit {
        /// Which.
        space: SpaceId,
    },
    /// In a journal written anew: a space, of which only the spans that follow are tracked.
    Space {
        /// Which.
        space: SpaceId,
        /// What keeps it, plus one; zero for the process.
        slot: u64,
    },
    /// A span of a space.
    Span {
        /// Whose.
        space: SpaceId,
        /// The span.
        span: Span,
    },
    /// A place that a mapping has moved away from.
    Left {
        /// Of which space.
        space: SpaceId,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// A part whose event is yet to come.
    Overtaken {
        /// Of which space.
        space: SpaceId,
        /// The part.
        span: Span,
    },
}

impl Record {
    fn words(self) -> [u64; 5] {
        let tag = |kind: u64, space: SpaceId| kind | u64::from(space.0) << 32;
        match self {
            Self::Remove { space, start, end, punch } => {
                [tag(1, space), start, end, u64::from(punch), 0]
            }
            Self::Unmap { space, start, end } => [tag(2, space), start, end, 0, 0],
            Self::Remap { space, from, to, len } => [tag(3, space), from, to, len, 0],
            Self::Alias { space, from, to, len } => [tag(4, space), from, to, len, 0],
            Self::Fork { parent, child, slot } => [tag(5, parent), u64::from(child.0), slot, 0, 0],
            Self::Exit { space } => [tag(6, space), 0, 0, 0, 0],
            Self::Space { space, slot } => [tag(7, space), slot, 0, 0, 0],
            Self::Span { space, span } => {
                let doubtful = u64::from(span.doubtful);
                [tag(8, space), span.start, span.len_bytes, span.source, doubtful]
            }
            Self::Overtaken { space, span } => {
                let doubtful = u64::from(span.doubtful);
                [tag(9, space), span.start, span.len_bytes, span.source, doubtful]
            }
            Self::Left { space, start, end } => [tag(10, space), start, end, 0, 0],
            Self::Forget { space, start, end } => [tag(11, space), start, end, 0, 0],
            Self::ForgetOvertaken => [12, 0, 0, 0, 0],
        }
    }

    fn from_words(w: [u64; 5]) -> Option<Self> {
        let space = SpaceId((w[0] >> 32) as u32);
        Some(match w[0] as u32 {
            1 => Self::Remove { space, start: w[1], end: w[2], punch: w[3] != 0 },
            2 => Self::Unmap { space, start: w[1], end: w[2] },
            3 => Self::Remap { space, from: w[1], to: w[2], len: w[3] },
            4 => Self::Alias { space, from: w[1], to: w[2], len: w[3] },
            5 => Self::Fork { parent: space, child: SpaceId(w[1] as u32), slot: w[2] },
            6 => Self::Exit { space },
            7 => Self::Space { space, slot: w[1] },
            kind @ (8 | 9) => {
                let (start, len_bytes, source) = (w[1], w[2], w[3]);
                let span = Span { start, len_bytes, source, doubtful: w[4] != 0 };
                if kind == 8 { Self::Span { space, span } } else { Self::Overtaken { space, span } }
            }
            10 => Self::Left { space, start: w[1], end: w[2] },
            11 => Self::Forget { space, start: w[1], end: w[2] },
            12 => Self::ForgetOvertaken,
            _ => return None,
        })
    }

    /// Has the change take effect; yields the range to wake. Forks and spaces are for who has their
    /// descriptors.
    pub fn apply(self, pages: &mut Pages) -> Range<u64> {
        match self {
            Self::Remove { space, start, end, punch } => {
                let shared = if punch { SharedRemove::Punch } else { SharedRemove::Keep };
                pages.remove(space, start, end, shared)
            }
            Self::Unmap { space, start, end } => pages.unmap(space, start, end),
            Self::Remap { space, from, to, len } => pages.remap(space, from, to, len),
            Self::Alias { space, from, to, len } => {
                pages.alias(space, from, to, len);
                to..to
            }
            Self::Exit { space } => {
                pages.exit(space);
                0..0
            }
            Self::Forget { space, start, end } => pages.forget(space, start, end),
            Self::ForgetOvertaken => {
                pages.forget_overtaken();
                0..0
            }
            Self::Fork { .. }
            | Self::Space { .. }
            | Self::Span { .. }
            | Self::Left { .. }
            | Self::Overtaken { .. } => 0..0,
        }
    }
}

/// An event that was read and not dealt with.
#[derive(Debug)]
pub struct Unfinished {
    /// Whose.
    pub space: SpaceId,
    /// The event.
    pub event: Event,
    /// What was being discarded when it was read.
    pub removing: Vec<Range<u64>>,
    /// The slot a child's userfaultfd may be in.
    pub fork_slot: Option<u64>,
    /// Its number in the table of the session that read the event, which that session's twin has still.
    pub child: Option<RawFd>,
}

/// What a session's twin has to keep if the session dies now: the userfaultfd of a child, as long as no record says that it was handed over.
pub fn needed_descriptor(header: &[u64; twin::WORDS]) -> Option<RawFd> {
    let unfinished = header[COUNT / 8] == header[EVENT_AT / 8];
    uffd::forked_child([header[EVENT / 8], header[EVENT / 8 + 1]]).filter(|_| unfinished)
}
const _: () = assert!(EVENT / 8 + 1 < twin::WORDS);

/// The journal.
#[derive(Debug)]
pub struct Journal {
    file: File,
    memory: Arc<Shared>,
    records_max: usize,
}

impl Journal {
    /// An empty one.
    pub fn create() -> Result<Self> {
        Self::with_room(RECORDS_MIN)
    }

    fn with_room(records_max: usize) -> Result<Self> {
        let len = HEADER_LEN + records_max * RECORD_LEN;
        let file = memfd(c"slipstream-journal", len as u64)?;
        Ok(Self { memory: Arc::new(Shared::map(&file, len)?), file, records_max })
    }

    /// One that an earlier session wrote.
    pub fn open(file: File) -> Result<Self> {
        let len = file.metadata().map_err(|e| Error::io("stat the journal", e))?.len() as usize;
        let records_max = len.saturating_sub(HEADER_LEN) / RECORD_LEN;
        let journal = Self { memory: Arc::new(Shared::map(&file, len)?), file, records_max };
        if records_max == 0 || journal.len() > records_max {
            return Err(Error::Internal("the journal of the drain is damaged".into()));
        }
        Ok(journal)
    }

    /// The file, to be kept.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.memory.word64(COUNT).load(Ordering::Acquire) as usize
    }

    /// True when nothing has happened.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when the next record may not find room: an event makes two at most.
    pub fn is_full(&self) -> bool {
        self.len() + 4 > self.records_max
    }

    /// All records, in order.
    pub fn records(&self) -> Result<Vec<Record>> {
        (0..self.len())
            .map(|index| {
                let at = HEADER_LEN + index * RECORD_LEN;
                let word = |i: usize| self.memory.word64(at + 8 * i).load(Ordering::Relaxed);
                Record::from_words([word(0), word(1), word(2), word(3), word(4)])
                    .ok_or_else(|| Error::Internal("the journal of the drain is damaged".into()))
            })
            .collect()
    }

    /// Writes records, all of which count at once.
    ///
    /// # Panics
    /// When there is no room: see [`Journal::is_full`].
    pub fn append(&self, records: &[Record]) {
        let count = self.len();
        assert!(count + records.len() <= self.records_max, "the journal is full");
        for (index, record) in records.iter().enumerate() {
            let at = HEADER_LEN + (count + index) * RECORD_LEN;
            for (i, word) in record.words().into_iter().enumerate() {
                self.memory.word64(at + 8 * i).store(word, Ordering::Relaxed);
            }
        }
        self.memory.word64(COUNT).store((count + records.len()) as u64, Ordering::Release);
    }

    /// Reads the next event of a space. `removing`: what is being discarded right now.
    pub fn read(
        &self,
        uffd: &Uffd,
        space: SpaceId,
        removing: &[Range<u64>],
    ) -> io::Result<Option<Event>> {
        let put = |at: usize, value: u64| self.memory.word64(at).store(value, Ordering::Relaxed);
        put(EVENT, 0);
        put(EVENT_AT, self.len() as u64);
        put(EVENT_SPACE, u64::from(space.0));
        put(FORK_SLOT, 0);
        let noted = removing.len().min(REMOVING_MAX);
        put(REMOVING_COUNT, noted as u64);
        for (index, range) in removing[..noted].iter().enumerate() {
            put(REMOVING + 16 * index, range.start);
            put(REMOVING + 16 * index + 8, range.end);
        }
        fence(Ordering::SeqCst);
        uffd.read_event(&self.memory, EVENT)
    }

    /// Notes where a forked child's userfaultfd will be, before it is put there.
    pub fn note_fork(&self, slot: u64) {
        self.memory.word64(FORK_SLOT).store(slot + 1, Ordering::SeqCst);
    }

    /// The event that was read last, if no record came of it.
    pub fn unfinished(&self) -> Result<Option<Unfinished>> {
        let get = |at: usize| self.memory.word64(at).load(Ordering::Acquire);
        let mut raw = [0u8; MESSAGE_LEN];
        self.memory.read(EVENT, &mut raw);
        if raw[0] == 0 || get(EVENT_AT) != self.len() as u64 {
            return Ok(None);
        }
        let event = uffd::decode_recorded(&raw).map_err(|e| Error::io("read the journal", e))?;
        // A fault that was read is raised again when its thread is woken.
        if matches!(event, Event::Fault { .. }) {
            return Ok(None);
        }
        let removing = (0..(get(REMOVING_COUNT) as usize).min(REMOVING_MAX))
            .map(|i| get(REMOVING + 16 * i)..get(REMOVING + 16 * i + 8))
            .collect();
        let space = SpaceId(get(EVENT_SPACE) as u32);
        let words = [0, 1, 2, 3, 4, 5, 6, 7].map(|index| get(8 * index));
        let child = needed_descriptor(&words);
        Ok(Some(Unfinished {
            space,
            event,
            removing,
            fork_slot: get(FORK_SLOT).checked_sub(1),
            child,
        }))
    }

    /// Its memory, whose first words tell [`needed_descriptor`] enough.
    pub fn memory(&self) -> &Arc<Shared> {
        &self.memory
    }

    /// A journal that leads to the same, with as few records as that takes. `slot_of` says what keeps
    /// a child. Not while an event is unfinished.
    pub fn written_anew(pages: &Pages, slot_of: &dyn Fn(SpaceId) -> Option<u64>) -> Result<Self> {
        let mut records = Vec::new();
        for id in pages.spaces() {
            let slot = match slot_of(id) {
                _ if id == SpaceId::PROCESS => 0,
                Some(slot) => slot + 1,
                // Nothing keeps it: no later session can serve it.
                None => continue,
            };
            records.push(Record::Space { space: id, slot });
            let Some(space) = pages.space(id) else { continue };
            records.extend(space.spans().map(|span| Record::Span { space: id, span }));
            let overtaken = space.overtaken().iter().copied();
            records.extend(overtaken.map(|span| Record::Overtaken { space: id, span }));
            let left = space.left().map(|r| (r.start, r.end));
            records.extend(left.map(|(start, end)| Record::Left { space: id, start, end }));
        }
        let journal = Self::with_room(RECORDS_MIN.max(records.len() * 2))?;
        journal.append(&records);
        Ok(journal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::{Layout, PageTable, Region, TableMemory};
    use proptest::prelude::*;

    const PAGES: u64 = 64;

    fn pages() -> Pages {
        let region = Region {
            start: 0x10_0000,
            len_bytes: PAGES * 4096,
            page_size: 4096,
            shared: false,
            forks: true,
        };
        let layout = Layout::new(vec![region]).unwrap();
        let table = || TableMemory::anonymous(PageTable::len_bytes(&layout)).unwrap();
        let (private, shared) = (table(), table());
        Pages::new(layout, private, shared).unwrap()
    }

    fn spans(pages: &Pages) -> Vec<Span> {
        let mut merged: Vec<Span> = Vec::new();
        for span in pages.space(SpaceId::PROCESS).unwrap().spans() {
            match merged.last_mut() {
                Some(last)
                    if last.start + last.len_bytes == span.start
                        && last.source + last.len_bytes == span.source =>
                {
                    last.len_bytes += span.len_bytes;
                }
                _ => merged.push(span),
            }
        }
        merged
    }

    fn record() -> impl Strategy<Value = Record> {
        let space = SpaceId::PROCESS;
        let at = |page: u64| 0x10_0000 + page * 4096;
        let moves_within_itself = |from: u64, len: u64, to: u64| to < from + len && from < to + len;
        (0..3u8, 0..PAGES, 1..20u64, 0..200u64)
            .prop_filter("mremap refuses that", move |(kind, from, len, to)| {
                *kind < 2 || !moves_within_itself(*from, *len, *to)
            })
            .prop_map(move |(kind, from, len, to)| match kind {
                0 => Record::Remove { space, start: at(from), end: at(from + len), punch: false },
                1 => Record::Unmap { space, start: at(from), end: at(from + len) },
                _ => Record::Remap { space, from: at(from), to: at(to), len: len * 4096 },
            })
    }

    fn replay(journal: &Journal) -> Pages {
        let mut pages = pages();
        for record in journal.records().unwrap() {
            match record {
                Record::Space { space, .. } => pages.restore_space(space, None).unwrap(),
                Record::Span { space, span } => pages.restore_span(space, span).unwrap(),
                Record::Left { space, start, end } => {
                    pages.restore_left(space, start..end).unwrap();
                }
                Record::Overtaken { space, span } => pages.restore_overtaken(space, span).unwrap(),
                other => drop(other.apply(&mut pages)),
            }
        }
        pages
    }

    proptest! {
        #[test]
        fn replaying_leads_to_the_same(records in prop::collection::vec(record(), 0..40)) {
            let journal = Journal::create().unwrap();
            let mut original = pages();
            for record in &records {
                journal.append(&[*record]);
                record.apply(&mut original);
            }
            let again = Journal::open(journal.file().try_clone().unwrap()).unwrap();
            prop_assert_eq!(again.records().unwrap(), records);
            prop_assert_eq!(spans(&replay(&again)), spans(&original));
            // Moves that no kernel would make in this order may leave spans that overlap.
            let sound = spans(&original).windows(2).all(|w| w[0].start + w[0].len_bytes <= w[1].start);
            prop_assume!(sound);
            let short = Journal::written_anew(&original, &|_| None).unwrap();
            prop_assert_eq!(spans(&replay(&short)), spans(&original));
            let of = |pages: &Pages| {
                let space = pages.space(SpaceId::PROCESS).unwrap();
                (space.left().cloned().collect::<Vec<_>>(), space.overtaken().to_vec())
            };
            prop_assert_eq!(of(&replay(&again)), of(&original));
            prop_assert_eq!(of(&replay(&short)), of(&original));
        }

        #[test]
        fn records_round_trip(words: [u64; 5]) {
            if let Some(record) = Record::from_words(words) {
                prop_assert_eq!(Record::from_words(record.words()), Some(record));
            }
        }
    }

    #[test]
    fn an_event_without_a_record_is_unfinished() {
        let journal = Journal::create().unwrap();
        assert!(journal.unfinished().unwrap().is_none());
        let mut raw = [0u8; MESSAGE_LEN];
        raw[0] = 0x16;
        raw[8..16].copy_from_slice(&4096u64.to_le_bytes());
        raw[16..24].copy_from_slice(&8192u64.to_le_bytes());
        journal.memory.write(EVENT, &raw);
        let unfinished = journal.unfinished().unwrap().unwrap();
        assert!(matches!(unfinished.event, Event::Unmap { start: 4096, end: 8192 }));
        journal.append(&[Record::Unmap { space: SpaceId::PROCESS, start: 4096, end: 8192 }]);
        assert!(journal.unfinished().unwrap().is_none());
    }
}
