//! One address space of the destination: what of the source it shows where, and in which state.
//!
//! Page size is that of the region; events of the kernel are whole pages of it. The states of
//! private pages belong to the space. Those of shared memory belong to the object, hence to all
//! spaces: a page fetched, or punched out, by a parent is fetched or punched out for its children.

use super::PagesError;
use super::layout::{Layout, Placed};
use super::memory::TableMemory;
use super::spans::{Span, SpanMap};
use super::table::PageTable;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Discarding at least this much private memory at once (64 MiB) forgets where it came from
/// instead of writing two bits for each of its pages; both read as zeros afterwards.
const FORGET_LEN_BYTES: u64 = 64 << 20;

/// Most places remembered that mappings have moved away from.
const LEFT_MAX: usize = 4096;

/// What `REMOVE` did to shared memory; the event doesn't tell. It can be seen in
/// `/proc/PID/task/TID/syscall` of the thread that waits for the event to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SharedRemove {
    /// `MADV_DONTNEED`: only this mapping's page tables were cleared, the object keeps its pages.
    Keep,
    /// `MADV_REMOVE`: the pages of the object were discarded.
    Punch,
}

/// What lies at a current address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// First address of the page.
    pub current_address: u64,
    /// First source address of the page.
    pub source_address: u64,
    /// Index in the page table.
    pub page_index: u64,
    /// Page size in bytes.
    pub page_size: u64,
    /// Bytes from `current_address` to the end of the span.
    pub run_left: u64,
    /// The region is shared memory.
    pub shared: bool,
}

/// What to do with a part of what has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// Install it here, then call [`Pages::end_copy`](super::Pages::end_copy).
    Install,
    /// It is installed through another address, was before, or must not be: wake this range, so
    /// that threads waiting in it fault again.
    Wake,
}

/// A part of what has arrived, and where it belongs now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// What to do.
    pub kind: PieceKind,
    /// Where it belongs.
    pub current_address: u64,
    /// Where it came from.
    pub source_address: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// The mapping may have ended without an event (see [`Pages::remap`](super::Pages::remap)).
    pub doubtful: bool,
}

/// One address space. Changed only by [`Pages`](super::Pages).
#[derive(Debug)]
pub struct Space {
    layout: Arc<Layout>,
    private: PageTable,
    shared: Arc<PageTable>,
    spans: SpanMap,
    left: VecDeque<Range<u64>>,
    /// Parts over which another mapping was moved although nothing had said that they were gone: the event that
    /// says it, or where they went, was overtaken and is yet to come.
    overtaken: Vec<Span>,
}

impl Space {
    /// The process as restored: every region at its source address.
    pub(super) fn new(layout: Arc<Layout>, private: PageTable, shared: Arc<PageTable>) -> Self {
        let mut spans = SpanMap::default();
        for region in layout.regions() {
            let (start, len_bytes) = (region.start, region.len_bytes);
            spans.insert(Span { start, len_bytes, source: start, doubtful: false });
        }
        Self { layout, private, shared, spans, left: VecDeque::new(), overtaken: Vec::new() }
    }

    /// What lies at a current address; nothing when no page of the source does.
    pub fn locate(&self, current: u64) -> Option<Located> {
        let span = self.spans.at(current)?;
        let placed = self.layout.find(span.source)?;
        let offset = (current & !(placed.page_size() - 1)).saturating_sub(span.start);
        let source_address = span.source + offset;
        Some(Located {
            current_address: span.start + offset,
            source_address,
            page_index: placed.page_of(source_address),
            page_size: placed.page_size(),
            run_left: span.len_bytes - offset,
            shared: placed.region.shared,
        })
    }

    /// Current address of a source address; of several aliases, one that surely exists if any does.
    pub fn current_of(&self, source: u64) -> Option<u64> {
        let (_, span) = self.spans.leading(&(source..source.checked_add(1)?));
        span.map(|span| span.start)
    }

    /// All mappings that show a part of a source range, clipped to it.
    pub fn currents_of(&self, source: Range<u64>) -> Vec<Span> {
        let mut spans = Vec::new();
        self.spans.each_of_source(&source, |span| spans.push(span));
        spans
    }

    /// The table that holds the states of a region's pages.
    pub(super) fn table(&self, shared: bool) -> &PageTable {
        if shared { &self.shared } else { &self.private }
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// See [`SpanMap::leading`].
    pub(super) fn leading(&self, source: &Range<u64>) -> (u64, Option<Span>) {
        self.spans.leading(source)
    }

    /// `MADV_DONTNEED`, `MADV_FREE` or `MADV_REMOVE`. Calls with each source range whose pages
    /// won't be needed any more, before that takes effect.
    pub(super) fn remove(
        &mut self,
        range: Range<u64>,
        shared: SharedRemove,
        mut dropped: impl FnMut(&Self, Range<u64>),
    ) {
        for part in self.spans.in_range(&range) {
            let Some(placed) = self.layout.find(part.source).copied() else { continue };
            if placed.region.shared && shared == SharedRemove::Keep {
                continue;
            }
            dropped(self, part.sources());
            let small_pages = placed.page_size() == 4096;
            if !placed.region.shared && small_pages && part.len_bytes >= FORGET_LEN_BYTES {
                self.spans.cut(part.current());
            } else {
                let pages = placed.pages_of(part.sources());
                self.table(placed.region.shared).mark_gone(pages);
            }
        }
    }

    /// `munmap`, or anything else that ends a mapping. Calls as [`Space::remove`] does; shared
    /// memory isn't reported, as it may be mapped elsewhere.
    ///
    /// A mapping that moved away is unmapped by a second event, before which another thread may have moved a
    /// mapping of its own to the same place: that one stays.
    pub(super) fn unmap(&mut self, range: Range<u64>, mut dropped: impl FnMut(&Self, Range<u64>)) {
        let mut left = self.take_left(&range);
        for span in self.take_overtaken(&range) {
            left.push(span.current());
            if !self.is_shared(span.source) {
                dropped(self, span.sources());
            }
        }
        for part in self.spans.cut(range.clone()) {
            // Whatever is not as new as what has left goes, and of a span the part that lies elsewhere.
            let gone = if part.doubtful {
                vec![part.current()]
            } else {
                without(&part.current(), left.clone())
            };
            for kept in without(&part.current(), gone.clone()) {
                self.spans.insert(part.clip_current(&kept));
            }
            for range in gone {
                let part = part.clip_current(&range);
                if !self.is_shared(part.source) {
                    dropped(self, part.sources());
                }
            }
        }
    }

    /// Places in a range that mappings have moved away from and that were not reported as unmapped yet. Each is
    /// taken once: there is one such event for each byte, at once, or when what `MREMAP_DONTUNMAP` left is unmapped.
    fn take_left(&mut self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut taken: Vec<Range<u64>> = Vec::new();
        let mut rest = VecDeque::with_capacity(self.left.len());
        for left in std::mem::take(&mut self.left) {
            let part = left.start.max(range.start)..left.end.min(range.end);
            let parts = without(&part, taken.clone());
            rest.extend(without(&left, parts.clone()));
            taken.extend(parts);
        }
        self.left = rest;
        taken
    }

    /// Stops tracking a range, whatever is there.
    pub(super) fn forget(&mut self, range: Range<u64>, mut dropped: impl FnMut(&Self, Range<u64>)) {
        for part in self.spans.cut(range) {
            if !self.is_shared(part.source) {
                dropped(self, part.sources());
            }
        }
    }

    /// `mremap` that moved. What is tracked at the target has been moved or unmapped by another thread, whose
    /// event is yet to come. Yields source ranges for which this was such an event. The event doesn't tell whether the old
    /// mapping stays (`MREMAP_DONTUNMAP`). If a private one does, it reads as zeros, as untracked
    /// addresses do. A shared one goes on showing the object: it stays tracked as *doubtful*.
    pub(super) fn remap(
        &mut self,
        from: u64,
        to: u64,
        len_bytes: u64,
        mut dropped: impl FnMut(&Self, Range<u64>),
    ) -> Vec<Range<u64>> {
        let (old, new) = (from..from.saturating_add(len_bytes), to..to.saturating_add(len_bytes));
        // What is there by now came after what moved away.
        let overtaken = self.take_overtaken(&old);
        let found = overtaken.iter().map(Span::sources).collect();
        let newer: Vec<Range<u64>> = overtaken.iter().map(Span::current).collect();
        let mut moved = overtaken;
        for range in without(&old, newer.clone()) {
            moved.extend(self.spans.cut(range));
        }
        // The kernel reports what it unmaps at the target before it reports the move.
        let (doubtful, sure) =
            self.spans.cut(new).into_iter().partition::<Vec<_>, _>(|span| span.doubtful);
        for span in doubtful.iter().filter(|span| !self.is_shared(span.source)) {
            dropped(self, span.sources());
        }
        self.overtaken.extend(sure);
        for empty in without(&old, moved.iter().map(Span::current).collect()) {
            // What an earlier move left there moves on.
            self.take_left(&empty);
        }
        if self.left.len() == LEFT_MAX {
            self.left.pop_front();
        }
        self.left.push_back(old);
        for span in moved {
            let Some(start) = to.checked_add(span.start - from) else { continue };
            if start.checked_add(span.len_bytes).is_none() {
                continue;
            }
            self.spans.insert(Span { start, ..span });
            if self.is_shared(span.source) && !newer.contains(&span.current()) {
                self.spans.insert(Span { doubtful: true, ..span });
            }
        }
        found
    }

    fn take_overtaken(&mut self, range: &Range<u64>) -> Vec<Span> {
        let mut taken = Vec::new();
        for span in std::mem::take(&mut self.overtaken) {
            if span.start < range.end && range.start < span.current().end {
                taken.push(span.clip_current(range));
                let outside = [0..range.start, range.end..u64::MAX];
                let outside = outside
                    .iter()
                    .filter(|o| span.start.max(o.start) < span.current().end.min(o.end));
                self.overtaken.extend(outside.map(|o| span.clip_current(o)));
            } else {
                self.overtaken.push(span);
            }
        }
        taken
    }

    /// True while an event is yet to come that was overtaken.
    pub fn is_overtaken(&self) -> bool {
        !self.overtaken.is_empty()
    }

    /// No event is to come any more for what was overtaken: it is gone.
    pub(super) fn forget_overtaken(&mut self, mut dropped: impl FnMut(&Self, Range<u64>)) {
        for span in std::mem::take(&mut self.overtaken) {
            if !self.is_shared(span.source) {
                dropped(self, span.sources());
            }
        }
    }

    /// A further mapping at `to` of the shared memory at current address `from`.
    pub(super) fn alias(&mut self, from: u64, to: u64, len_bytes: u64) {
        let shown = self.spans.in_range(&(from..from.saturating_add(len_bytes)));
        self.spans.cut(to..to.saturating_add(len_bytes));
        for span in shown {
            if let Some(start) = to.checked_add(span.start - from)
                && start.checked_add(span.len_bytes).is_some()
                && self.is_shared(span.source)
            {
                self.spans.insert(Span { start, ..span });
            }
        }
    }

    /// A mapping of shared memory beside the one its region names, at resume.
    pub(super) fn track_alias(
        &mut self,
        current: u64,
        source: u64,
        len_bytes: u64,
    ) -> Result<(), PagesError> {
        let bad = PagesError::BadRange { start: source, len_bytes };
        let Some(end) = source.checked_add(len_bytes) else { return Err(bad) };
        let pieces = self.layout.split(source..end)?;
        if current.checked_add(len_bytes).is_none()
            || !pieces.iter().all(|p| self.is_shared(p.start))
        {
            return Err(bad);
        }
        self.spans.cut(current..current + len_bytes);
        for piece in pieces {
            let start = current + (piece.start - source);
            let len_bytes = piece.end - piece.start;
            self.spans.insert(Span { start, len_bytes, source: piece.start, doubtful: false });
        }
        Ok(())
    }

    /// The address space of a forked child, its table in zeroed `memory`.
    pub(super) fn fork(&self, memory: TableMemory) -> Result<Self, PagesError> {
        let mut spans = self.spans.clone();
        for span in self.spans.iter() {
            if self.layout.find(span.source).is_some_and(|placed| !placed.region.forks) {
                spans.cut(span.current());
            }
        }
        Ok(Self {
            layout: Arc::clone(&self.layout),
            private: self.private.snapshot_for_fork(&self.layout, memory)?,
            shared: Arc::clone(&self.shared),
            spans,
            // What is raised of the parent's address space is raised to the parent.
            left: VecDeque::new(),
            overtaken: Vec::new(),
        })
    }

    /// What of a source range that has arrived is still wanted, and where.
    pub(super) fn plan(&self, source: Range<u64>, pieces: &mut Vec<Piece>) {
        let mut at = source.start;
        while at < source.end {
            let Some(placed) = self.layout.find(at) else { return };
            let end = source.end.min(placed.region.end());
            let (part_end, best) = self.spans.leading(&(at..end));
            if let Some(span) = best {
                self.plan_part(placed, span, pieces);
            }
            at = part_end;
        }
    }

    /// [`Space::plan`] for a part that the same mappings show throughout.
    fn plan_part(&self, placed: &Placed, span: Span, pieces: &mut Vec<Piece>) {
        let table = self.table(placed.region.shared);
        let mut pages = placed.pages_of(span.sources());
        while !pages.is_empty() {
            let wanted = table.leading_wanted(pages.clone());
            let present = if wanted == 0 { table.leading_present(pages.clone()) } else { 0 };
            let gone = if wanted + present == 0 { table.leading_gone(pages.clone()) } else { 0 };
            // All three can be zero when another thread changed the page in between: look again.
            let next = pages.start + wanted + present + gone;
            let part = placed.source_of(pages.start).max(span.source)
                ..placed.source_of(next).min(span.sources().end);
            pages.start = next;
            if wanted > 0 {
                pieces.push(piece(PieceKind::Install, span.clip_source(&part)));
            }
            // Present private pages were woken by whoever installed them; gone ones by the event,
            // but in shared memory neither reaches the waiters of other mappings and spaces.
            if gone > 0 || (placed.region.shared && (present > 0 || self.spans.has_aliases())) {
                self.spans.each_of_source(&part, |alias| {
                    let installed_here = wanted > 0
                        && alias.start.wrapping_sub(alias.source)
                            == span.start.wrapping_sub(span.source);
                    if !installed_here {
                        pieces.push(piece(PieceKind::Wake, alias));
                    }
                });
            }
        }
    }

    /// Wake pieces for every mapping of a source range.
    pub(super) fn plan_wake(&self, source: &Range<u64>, pieces: &mut Vec<Piece>) {
        self.spans.each_of_source(source, |span| {
            pieces.push(piece(PieceKind::Wake, span));
        });
    }

    fn is_shared(&self, source: u64) -> bool {
        self.layout.find(source).is_some_and(|placed| placed.region.shared)
    }
}

/// A range without others, which may overlap each other.
fn without(range: &Range<u64>, mut others: Vec<Range<u64>>) -> Vec<Range<u64>> {
    others.sort_unstable_by_key(|other| other.start);
    let mut rest = Vec::new();
    let mut at = range.start;
    for other in others {
        if at < other.start.min(range.end) {
            rest.push(at..other.start.min(range.end));
        }
        at = at.max(other.end);
    }
    if at < range.end {
        rest.push(at..range.end);
    }
    rest
}

fn piece(kind: PieceKind, span: Span) -> Piece {
    let Span { start, len_bytes, source, doubtful } = span;
    Piece { kind, current_address: start, source_address: source, len_bytes, doubtful }
}
