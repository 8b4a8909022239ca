//! The page service's decisions, without any I/O: which pages are here, which to fetch next, and
//! where each belongs by now.
//!
//! A *source page* is a page of the frozen source, named by its source address. A *space* is an
//! address space of the destination: the process ([`SpaceId::PROCESS`]), or a child forked during
//! the drain. At resume every region of the process sits at its source address; `mremap` moves it.
//!
//! # What the edge must do
//!
//! The edge keeps [`Pages`] in a read-write lock.
//!
//! - **Events** (`&mut self`: `remove`, `unmap`, `remap`, `alias`, `fork`, `exit`) under the
//!   exclusive half, held from before the event is read until the method returns. After `remove`,
//!   `unmap` and `remap` it wakes the range returned, so that threads which waited there fault again.
//! - **Everything that changes memory** under the shared half, held from the decision (`fault`,
//!   `begin_copy`, `begin_zero`) until the ioctl has returned and `end_copy` has been called.
//! - `EAGAIN`, a short count, or `ENOENT` from an ioctl: call `end_copy` for what was done, release
//!   the lock, read the events, begin again. `ENOENT` says nothing by itself: the kernel finds out
//!   that a mapping moved before it looks whether the event was read, and an `mremap` raises its
//!   events one after the other. It also comes when a range isn't all in one mapping, which
//!   `mprotect` may have split: go page by page. Only where a [`Piece::doubtful`] mapping goes on answering `ENOENT`
//!   for one page, with no event to read, has it ended: `unmap` that page, begin again. (Better: after a `REMAP` of
//!   shared memory see in `/proc/PID/maps` whether the old mapping is there, and `unmap` it if not.)
//! - `EEXIST`: the page is there; `end_copy` it and wake the range (the kernel doesn't).
//! - [`FaultAction::AlreadyPresent`]: fill with zeros, and wake on `EEXIST`. A page that was installed
//!   and is missing again was zapped without an event (`MADV_GUARD_INSTALL`); only waking the thread
//!   would have it fault for ever.
//! - Zeros for huge pages are copied: the kernel has no `UFFDIO_ZEROPAGE` for them.
//! - A run ends by `finish_run`, a page asked for urgently by `urgent_done`, however it went.
//! - **Unregistering** ([`Unregister`]) under the exclusive half with no event unread; if one is
//!   unread *after* it, the memory there may be another's: register the range again, read the
//!   event. Whoever raised it is blocked until then, so nothing was read meanwhile.
//! - It calls [`Pages::next_run`] until that yields nothing before it believes [`Pages::complete`].

pub mod memory;
pub mod table;

mod hints;
mod intervals;
mod layout;
mod prefetch;
mod space;
mod spans;
mod statistics;
mod taken_up;

#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

pub use layout::{Layout, PAGES_MAX, REGIONS_MAX, Region};
pub use memory::TableMemory;
pub use prefetch::RunClaim;
pub use space::{Located, Piece, PieceKind, SharedRemove, Space};
pub use spans::Span;
pub use statistics::Statistics;
pub use table::{Counts, PageState, PageTable};

use intervals::IntervalSet;
use prefetch::{Prefetch, Urgent};
use statistics::Counters;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Least length of an absent range worth unregistering, in bytes.
const UNREGISTER_LEN_BYTES_MIN: u64 = 2 << 20;
/// Most ranges unregistered in a migration: each may split a mapping, and those are limited.
const UNREGISTER_MAX: usize = 1024;
/// Most intervals of the present map, in either set (about 100 MiB of memory).
const INTERVALS_MAX: usize = 1 << 21;
/// Most ranges of the hot list.
const HOT_MAX: usize = 1 << 16;

/// Why something was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PagesError {
    /// A range outside the regions, or not in whole pages.
    #[error("memory range {start:#x}, {len_bytes} bytes, is not in whole pages of one region")]
    BadRange {
        /// First address.
        start: u64,
        /// Length in bytes.
        len_bytes: u64,
    },
    /// More of something than is served.
    #[error("more than {limit} {what}")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The memory given for a page table is too short.
    #[error("the page table needs {needed_bytes} bytes of memory")]
    ShortMemory {
        /// What it needs, in bytes.
        needed_bytes: u64,
    },
    /// No such address space, or it has ended.
    #[error("address space {0:?} is not known")]
    NoSpace(SpaceId),
}

/// Names an address space. Never used again within a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u32);

impl SpaceId {
    /// The migrated process itself.
    pub const PROCESS: SpaceId = SpaceId(0);
}

/// How to answer a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAction {
    /// Nothing of the source is there: fill with zeros.
    Zero {
        /// First current address.
        start: u64,
        /// Length in bytes: one page.
        len_bytes: u64,
    },
    /// Ask the urgent lane for this page, now.
    Fetch {
        /// Source address of the page.
        source_address: u64,
        /// Page size in bytes.
        len_bytes: u64,
        /// Where it faulted, start of the page.
        current_address: u64,
    },
    /// It has arrived: wake this page (see the module for how).
    AlreadyPresent {
        /// First current address.
        start: u64,
        /// Page size in bytes.
        len_bytes: u64,
    },
    /// The urgent lane has been asked for it already.
    Wait,
}

/// Addresses of a space at which the source has nothing: they needn't be registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unregister {
    /// The space.
    pub space: SpaceId,
    /// Current addresses.
    pub range: Range<u64>,
}

/// All of a migration's pages. See the module for who may call what when.
#[derive(Debug)]
pub struct Pages {
    layout: Arc<Layout>,
    spaces: BTreeMap<SpaceId, Space>,
    next_space: u32,
    /// Source ranges known to be absent.
    absent: IntervalSet,
    map_complete: bool,
    unregister_left: usize,
    /// Taken for a fault on a missing page and for picking a run; never for a copy.
    prefetch: Mutex<Prefetch>,
    counters: Counters,
}

impl Pages {
    /// The pages of a restored process. The two memories need [`PageTable::len_bytes`] each, for
    /// private and for shared regions; zeroed, or as an earlier fault daemon left them.
    pub fn new(
        layout: Layout,
        private: TableMemory,
        shared: TableMemory,
    ) -> Result<Self, PagesError> {
        let layout = Arc::new(layout);
        let private = PageTable::new(&layout, private)?;
        let shared = PageTable::new(&layout, shared)?;
        private.forget_requests();
        shared.forget_requests();
        let counters = Counters::default();
        let arrived = private.counts().present + shared.counts().present;
        counters.present.store(arrived, Relaxed);
        let mut prefetch = Prefetch::default();
        prefetch.add_space(SpaceId::PROCESS);
        let process = Space::new(Arc::clone(&layout), private, Arc::new(shared));
        Ok(Self {
            layout,
            spaces: BTreeMap::from([(SpaceId::PROCESS, process)]),
            next_space: 1,
            absent: IntervalSet::default(),
            map_complete: false,
            unregister_left: UNREGISTER_MAX,
            prefetch: Mutex::new(prefetch),
            counters,
        })
    }

    /// The regions.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// An address space.
    pub fn space(&self, id: SpaceId) -> Option<&Space> {
        self.spaces.get(&id)
    }

    /// All address spaces that have not ended.
    pub fn spaces(&self) -> impl Iterator<Item = SpaceId> + '_ {
        self.spaces.keys().copied()
    }

    /// A mapping at `current` of shared memory that the source has mapped at `source` too. Before
    /// resume.
    pub fn track_alias(
        &mut self,
        current: u64,
        source: u64,
        len_bytes: u64,
    ) -> Result<(), PagesError> {
        let space = self.spaces.get_mut(&SpaceId::PROCESS);
        space.ok_or(PagesError::NoSpace(SpaceId::PROCESS))?.track_alias(current, source, len_bytes)
    }

    // ---- What the source says ----

    /// Source pages are present.
    pub fn present_run(&self, source_start: u64, len_bytes: u64) -> Result<(), PagesError> {
        let pieces = self.layout.split(checked(source_start, len_bytes)?)?;
        let mut prefetch = self.prefetch();
        if prefetch.intervals() + pieces.len() > INTERVALS_MAX {
            return Err(PagesError::TooMuch {
                what: "runs of present pages",
                limit: INTERVALS_MAX as u64,
            });
        }
        for piece in pieces {
            let size = self.layout.find(piece.start).map_or(4096, layout::Placed::page_size);
            self.counters.total.fetch_add((piece.end - piece.start) / size, Relaxed);
            prefetch.add_present(&piece);
        }
        Ok(())
    }

    /// Source pages are absent. Yields ranges to unregister, when large.
    pub fn absent_run(
        &mut self,
        source_start: u64,
        len_bytes: u64,
    ) -> Result<Vec<Unregister>, PagesError> {
        let mut unregister = Vec::new();
        let pieces = self.layout.split(checked(source_start, len_bytes)?)?;
        if self.absent.len() + pieces.len() > INTERVALS_MAX {
            return Err(PagesError::TooMuch {
                what: "runs of absent pages",
                limit: INTERVALS_MAX as u64,
            });
        }
        for piece in pieces {
            self.absent.insert(piece.clone());
            self.prefetch.get_mut().unwrap_or_else(PoisonError::into_inner).drop_absent(&piece);
            if piece.end - piece.start >= UNREGISTER_LEN_BYTES_MIN {
                self.unregister(&piece, &mut unregister);
            }
        }
        Ok(unregister)
    }

    fn unregister(&mut self, source: &Range<u64>, out: &mut Vec<Unregister>) {
        for (id, space) in &self.spaces {
            for span in space.currents_of(source.clone()) {
                let worthwhile = span.len_bytes >= UNREGISTER_LEN_BYTES_MIN && !span.doubtful;
                if worthwhile && self.unregister_left > 0 {
                    self.unregister_left -= 1;
                    out.push(Unregister { space: *id, range: span.current() });
                }
            }
        }
    }

    /// The source has said all it has.
    pub fn map_complete(&mut self) {
        self.map_complete = true;
    }

    /// Pages worth fetching early, in order of heat.
    pub fn hot(&self, source_start: u64, len_bytes: u64) -> Result<(), PagesError> {
        let range = checked(source_start, len_bytes)?;
        let mut prefetch = self.prefetch();
        if prefetch.hot_len() >= HOT_MAX {
            return Err(PagesError::TooMuch { what: "hot ranges", limit: HOT_MAX as u64 });
        }
        prefetch.add_hot(range);
        Ok(())
    }

    // ---- Faults and copies (shared half of the caller's lock) ----

    /// A thread faulted. Target: below 300 ns.
    pub fn fault(&self, id: SpaceId, tid: i32, current: u64) -> Result<FaultAction, PagesError> {
        let space = self.spaces.get(&id).ok_or(PagesError::NoSpace(id))?;
        let Some(at) = space.locate(current) else {
            return Ok(FaultAction::Zero { start: current & !4095, len_bytes: 4096 });
        };
        let (start, len_bytes) = (at.current_address, at.page_size);
        let urgent = match space.table(at.shared).state(at.page_index) {
            PageState::Present => return Ok(FaultAction::AlreadyPresent { start, len_bytes }),
            PageState::Gone => return Ok(FaultAction::Zero { start, len_bytes }),
            _ if self.absent.at(at.source_address).is_some() => {
                return Ok(FaultAction::Zero { start, len_bytes });
            }
            _ => self.prefetch().urgent(id, space, &at, tid),
        };
        Ok(match urgent {
            Urgent::Ask => {
                self.counters.urgent.fetch_add(1, Relaxed);
                let source_address = at.source_address;
                FaultAction::Fetch { source_address, len_bytes, current_address: start }
            }
            Urgent::Asked => FaultAction::Wait,
            Urgent::Settled => FaultAction::AlreadyPresent { start, len_bytes },
        })
    }

    /// Data has arrived for a source range: what of it is still wanted, and where. `pieces` is
    /// cleared first. Takes no lock.
    pub fn begin_copy(
        &self,
        id: SpaceId,
        source_start: u64,
        len_bytes: u64,
        pieces: &mut Vec<Piece>,
    ) {
        pieces.clear();
        if let (Some(space), Ok(range)) = (self.spaces.get(&id), checked(source_start, len_bytes)) {
            space.plan(range, pieces);
        }
    }

    /// As [`Pages::begin_copy`], when the answer is that the source has no such pages: install zeros.
    /// What the present map knows to be absent is only woken, as it may be unregistered.
    pub fn begin_zero(
        &self,
        id: SpaceId,
        source_start: u64,
        len_bytes: u64,
        pieces: &mut Vec<Piece>,
    ) {
        pieces.clear();
        let (Some(space), Ok(range)) = (self.spaces.get(&id), checked(source_start, len_bytes))
        else {
            return;
        };
        let mut at = range.start;
        while at < range.end {
            let known = self.absent.first_in(at..range.end).unwrap_or(range.end..range.end);
            space.plan(at..known.start, pieces);
            space.plan_wake(&known, pieces);
            at = known.end;
        }
    }

    /// An [`PieceKind::Install`] piece, or a leading part of it, was installed; also for pages that
    /// came with the manifest. Takes no lock.
    pub fn end_copy(&self, id: SpaceId, source_start: u64, len_bytes: u64) {
        let Some(space) = self.spaces.get(&id) else { return };
        let Some(placed) = self.layout.find(source_start) else { return };
        let end = source_start.saturating_add(len_bytes).min(placed.region.end());
        let pages = placed.pages_of(source_start..end);
        let new = space.table(placed.region.shared).mark_present(pages);
        self.counters.bytes.fetch_add(new * placed.page_size(), Relaxed);
        if id == SpaceId::PROCESS {
            self.counters.present.fetch_add(new, Relaxed);
        }
    }

    /// The urgent lane has answered for a page and the answer has been dealt with. Not when the
    /// lane failed: ask a new one for [`Pages::urgent_outstanding`].
    pub fn urgent_done(&self, id: SpaceId, source_address: u64) {
        if let Some(space) = self.spaces.get(&id) {
            self.prefetch().urgent_done(id, space, source_address);
        }
    }

    /// Pages the urgent lane has been asked for: space, source address, page size in bytes.
    pub fn urgent_outstanding(&self) -> Vec<(SpaceId, u64, u64)> {
        let size = |source| self.layout.find(source).map_or(4096, layout::Placed::page_size);
        self.prefetch().urgent_outstanding().map(|(id, at)| (id, at, size(at))).collect()
    }

    // ---- Prefetch (shared half) ----

    /// Claims the next run for a bulk lane, at most `max_bytes` (but at least a page).
    pub fn next_run(&self, max_bytes: u64) -> Option<RunClaim> {
        self.prefetch().next_run(&self.spaces, max_bytes)
    }

    /// A bulk lane is done with a run: all was answered and dealt with, or the lane failed. What has
    /// not arrived will be picked again.
    pub fn finish_run(&self, run: &RunClaim) {
        if let Some(space) = self.spaces.get(&run.space) {
            self.prefetch().finish(run, space);
        }
    }

    // ---- Events (exclusive half) ----

    /// `REMOVE`: a range was discarded. Yields the range to wake.
    pub fn remove(
        &mut self,
        id: SpaceId,
        start: u64,
        end: u64,
        shared: SharedRemove,
    ) -> Range<u64> {
        self.event(id, |space, dropped| space.remove(start..end, shared, dropped));
        start..end
    }

    /// `UNMAP`: a range was unmapped. Yields the range to wake.
    pub fn unmap(&mut self, id: SpaceId, start: u64, end: u64) -> Range<u64> {
        self.event(id, |space, dropped| space.unmap(start..end, dropped));
        start..end
    }

    /// Nothing is mapped in a range any more, whatever events say. Yields the range to wake.
    pub fn forget(&mut self, id: SpaceId, start: u64, end: u64) -> Range<u64> {
        self.event(id, |space, dropped| space.forget(start..end, dropped));
        start..end
    }

    /// `REMAP`: a range was moved. The event doesn't say whether the old mapping stays
    /// (`MREMAP_DONTUNMAP`): of shared memory it stays tracked as *doubtful*. Yields the range to wake. With length zero (`mremap` of shared
    /// memory with old length zero) find the length in `/proc/PID/maps` and call [`Pages::alias`].
    pub fn remap(&mut self, id: SpaceId, from: u64, to: u64, len_bytes: u64) -> Range<u64> {
        let mut found = Vec::new();
        self.event(id, |space, dropped| found = space.remap(from, to, len_bytes, dropped));
        for sources in found {
            self.prefetch().restore(id, sources);
        }
        from..from.saturating_add(len_bytes)
    }

    /// Shared memory got a further mapping.
    pub fn alias(&mut self, id: SpaceId, from: u64, to: u64, len_bytes: u64) {
        self.event(id, |space, dropped| {
            space.forget(to..to.saturating_add(len_bytes), dropped);
            space.alias(from, to, len_bytes);
        });
    }

    /// `FORK`: a space was copied. `memory`: zeroed, [`PageTable::len_bytes`].
    pub fn fork(&mut self, parent: SpaceId, memory: TableMemory) -> Result<SpaceId, PagesError> {
        let space = self.spaces.get(&parent).ok_or(PagesError::NoSpace(parent))?.fork(memory)?;
        let id = SpaceId(self.next_space);
        self.next_space += 1;
        self.spaces.insert(id, space);
        let prefetch = self.prefetch.get_mut().unwrap_or_else(PoisonError::into_inner);
        prefetch.fork(parent, id, &self.layout);
        Ok(id)
    }

    /// A space has ended: exit, exec or a signal.
    pub fn exit(&mut self, id: SpaceId) {
        if let Some(space) = self.spaces.remove(&id) {
            self.prefetch.get_mut().unwrap_or_else(PoisonError::into_inner).exit(id, &space);
        }
    }

    /// Applies an event and takes what the space has dropped out of prefetch.
    fn event(
        &mut self,
        id: SpaceId,
        apply: impl FnOnce(&mut Space, &mut dyn FnMut(&Space, Range<u64>)),
    ) {
        let Some(space) = self.spaces.get_mut(&id) else { return };
        let prefetch = self.prefetch.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut gone = 0;
        apply(space, &mut |space, sources| {
            for part in prefetch.drop_range(id, sources) {
                if let Some(placed) = space.layout().find(part.start) {
                    let end = part.end.min(placed.region.end());
                    let pages = placed.pages_of(part.start..end);
                    gone += space.table(placed.region.shared).count_wanted(pages);
                }
            }
        });
        if id == SpaceId::PROCESS {
            self.counters.gone.fetch_add(gone, Relaxed);
        }
    }

    /// Two mappings were moved one after the other, and the events came the other way round: one is
    /// missing yet. It comes within moments.
    pub fn is_overtaken(&self) -> bool {
        self.spaces.values().any(Space::is_overtaken)
    }

    /// The missing event doesn't come: its pages are gone.
    pub fn forget_overtaken(&mut self) {
        for id in self.spaces().collect::<Vec<_>>() {
            self.event(id, |space, dropped| space.forget_overtaken(dropped));
        }
    }

    // ---- The end ----

    /// Every page of a space that is present on the source has arrived or is gone.
    pub fn space_complete(&self, id: SpaceId) -> bool {
        self.map_complete && self.prefetch().idle(id)
    }

    /// The same of all spaces.
    pub fn complete(&self) -> bool {
        let prefetch = self.prefetch();
        let done = |(id, space): (&SpaceId, &Space)| prefetch.idle(*id) && !space.is_overtaken();
        self.map_complete && self.spaces.iter().all(done)
    }

    /// A panic elsewhere leaves the sets as they were between two changes of theirs, each whole.
    fn prefetch(&self) -> MutexGuard<'_, Prefetch> {
        self.prefetch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A range from outside, if it doesn't wrap.
fn checked(start: u64, len_bytes: u64) -> Result<Range<u64>, PagesError> {
    let end = start.checked_add(len_bytes).ok_or(PagesError::BadRange { start, len_bytes })?;
    Ok(start..end)
}
