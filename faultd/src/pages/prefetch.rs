//! Which run a bulk lane fetches next.
//!
//! For each space there is a *to-do* set of source ranges: pages known to be present on the source
//! that prefetch hasn't dealt with. It may hold pages that have arrived by a fault meanwhile; the
//! page table sorts those out when their turn comes, so that a fault needs no change here. What
//! holds at any time: a page known present and tracked that is `Missing` is in the to-do set; one
//! that is `Requested` is there, or in a claim, or urgent, or (shared memory asked for by another
//! space) deferred. So nothing is left to fetch when all four are empty.

use super::SpaceId;
use super::hints::{Hint, Hints};
use super::intervals::IntervalSet;
use super::layout::Placed;
use super::space::Space;
use super::table::PageState;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

/// Deferred ranges looked at again in one pick.
const DEFERRED_PER_PICK: usize = 16;

/// Pages claimed for a bulk lane: consecutive on the source and, when picked, in the space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunClaim {
    /// The space it was picked for.
    pub space: SpaceId,
    /// First source address.
    pub source_address: u64,
    /// Length in bytes, whole pages.
    pub len_bytes: u64,
    /// Where it belonged when it was picked; only a hint, see [`Pages::begin_copy`](super::Pages::begin_copy).
    pub current_address: u64,
}

impl RunClaim {
    /// Source addresses.
    pub fn sources(&self) -> Range<u64> {
        self.source_address..self.source_address + self.len_bytes
    }
}

/// Outcome of asking for a page because of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urgent {
    /// To be asked for on the urgent lane.
    Ask,
    /// That was done before.
    Asked,
    /// It has arrived since the caller looked.
    Settled,
}

/// What is left to do for one space.
#[derive(Debug, Default)]
struct Queue {
    todo: IntervalSet,
    /// Shared pages that another space has asked for.
    deferred: IntervalSet,
    deferred_cursor: u64,
    /// Source start to end of what bulk lanes have been asked for.
    claims: BTreeMap<u64, u64>,
    /// Source addresses of pages the urgent lane has been asked for.
    urgent: BTreeSet<u64>,
}

/// The order of prefetch, for all spaces.
#[derive(Debug, Default)]
pub(super) struct Prefetch {
    /// Source pages known to be present.
    known: IntervalSet,
    queues: BTreeMap<SpaceId, Queue>,
    /// Spaces whose to-do set isn't empty.
    active: BTreeSet<SpaceId>,
    hints: Hints,
    hot: VecDeque<Range<u64>>,
}

impl Prefetch {
    pub fn add_space(&mut self, id: SpaceId) {
        self.queues.insert(id, Queue::default());
    }

    /// A child starts with all its parent has not got: also what is on its way, which will be
    /// installed in the parent alone.
    pub fn fork(&mut self, parent: SpaceId, child: SpaceId, layout: &super::Layout) {
        let mut queue = Queue::default();
        if let Some(parent) = self.queues.get(&parent) {
            queue.todo = parent.todo.clone();
            parent.deferred.iter().for_each(|range| queue.todo.insert(range));
            parent.claims.iter().for_each(|(start, end)| queue.todo.insert(*start..*end));
            for source in &parent.urgent {
                let page_size = layout.find(*source).map_or(0, Placed::page_size);
                insert_known(&mut queue.todo, &self.known, *source..*source + page_size);
            }
        }
        if !queue.todo.is_empty() {
            self.active.insert(child);
        }
        self.queues.insert(child, queue);
    }

    /// Forgets a space that has ended. What it had asked for of shared memory is for others to fetch.
    pub fn exit(&mut self, id: SpaceId, space: &Space) {
        self.active.remove(&id);
        self.hints.forget(id);
        let Some(queue) = self.queues.remove(&id) else { return };
        let claims = queue.claims.into_iter().map(|(start, end)| start..end);
        for range in claims.chain(queue.urgent.into_iter().map(|source| source..source + 1)) {
            if let Some(placed) = space.layout().find(range.start)
                && placed.region.shared
            {
                space.table(true).unclaim(placed.pages_of(range));
            }
        }
    }

    /// Source pages are known to be present; the range lies in one region.
    pub fn add_present(&mut self, range: &Range<u64>) {
        self.known.insert(range.clone());
        for (id, queue) in &mut self.queues {
            queue.todo.insert(range.clone());
            self.active.insert(*id);
        }
    }

    /// Source pages are known to be absent.
    pub fn drop_absent(&mut self, range: &Range<u64>) {
        self.known.remove(range.clone());
        for queue in self.queues.values_mut() {
            queue.todo.remove(range.clone());
            queue.deferred.remove(range.clone());
        }
    }

    /// A space doesn't need these private or punched pages any more; yields what was still to do.
    pub fn drop_range(&mut self, id: SpaceId, range: Range<u64>) -> Vec<Range<u64>> {
        self.queues.get_mut(&id).map_or_else(Vec::new, |queue| queue.todo.remove(range))
    }

    /// A space has these source pages after all.
    pub fn restore(&mut self, id: SpaceId, range: Range<u64>) {
        let Some(queue) = self.queues.get_mut(&id) else { return };
        insert_known(&mut queue.todo, &self.known, range);
        self.active.insert(id);
    }

    /// Pages to fetch early, after those around faults.
    pub fn add_hot(&mut self, range: Range<u64>) {
        self.hot.push_back(range);
    }

    /// Ranges waiting in the hot list.
    pub fn hot_len(&self) -> usize {
        self.hot.len()
    }

    /// A fault on a page that has not arrived.
    pub fn urgent(&mut self, id: SpaceId, space: &Space, at: &super::Located, tid: i32) -> Urgent {
        let table = space.table(at.shared);
        table.set(at.page_index, PageState::Missing, PageState::Requested);
        if table.state(at.page_index) != PageState::Requested {
            return Urgent::Settled;
        }
        self.hints.note(id, tid, at.source_address, at.page_size);
        let Some(queue) = self.queues.get_mut(&id) else { return Urgent::Settled };
        if queue.urgent.insert(at.source_address) { Urgent::Ask } else { Urgent::Asked }
    }

    /// The urgent lane is done with a page. If it could not be installed it is to do again.
    pub fn urgent_done(&mut self, id: SpaceId, space: &Space, source: u64) {
        let Some(queue) = self.queues.get_mut(&id) else { return };
        let Some(placed) = space.layout().find(source) else { return };
        let claimed =
            queue.claims.range(..=source).next_back().is_some_and(|(_, end)| source < *end);
        if queue.urgent.remove(&source) && !claimed {
            self.requeue(id, space, &(source..source + placed.page_size()));
        }
    }

    /// What the urgent lane has been asked for, to ask a new one.
    pub fn urgent_outstanding(&self) -> impl Iterator<Item = (SpaceId, u64)> + '_ {
        self.queues.iter().flat_map(|(id, queue)| queue.urgent.iter().map(|source| (*id, *source)))
    }

    /// A bulk lane is done with a run, well or not: what has not arrived is to do again.
    pub fn finish(&mut self, run: &RunClaim, space: &Space) {
        let Some(queue) = self.queues.get_mut(&run.space) else { return };
        if queue.claims.remove(&run.source_address) == Some(run.sources().end) {
            self.requeue(run.space, space, &run.sources());
        }
    }

    /// Makes what is still requested of a range (in one region) missing and to do. A page that is
    /// urgent too stays requested: the urgent lane will see to it.
    fn requeue(&mut self, id: SpaceId, space: &Space, range: &Range<u64>) {
        let Some(placed) = space.layout().find(range.start) else { return };
        let Some(queue) = self.queues.get_mut(&id) else { return };
        let table = space.table(placed.region.shared);
        let mut pages = placed.pages_of(range.clone());
        loop {
            pages.start += table.leading_not_requested(pages.clone());
            if pages.is_empty() {
                break;
            }
            let source = placed.source_of(pages.start);
            let mut end = pages.start + table.leading_requested(pages.clone());
            if queue.urgent.contains(&source) {
                pages.start += 1;
                continue;
            }
            if let Some(urgent) = queue.urgent.range(source..placed.source_of(end)).next() {
                end = placed.page_of(*urgent);
            }
            table.unclaim(pages.start..end);
            insert_known(&mut queue.todo, &self.known, source..placed.source_of(end));
            pages.start = end;
        }
        if !queue.todo.is_empty() {
            self.active.insert(id);
        }
    }

    /// Claims the next run of at most `max_bytes` (but at least one page).
    pub fn next_run(
        &mut self,
        spaces: &BTreeMap<SpaceId, Space>,
        max_bytes: u64,
    ) -> Option<RunClaim> {
        if let Some(run) = self.next_hinted(spaces, max_bytes) {
            return Some(run);
        }
        while let Some(range) = self.hot.front().cloned() {
            let run = self.take(spaces, SpaceId::PROCESS, range, max_bytes, false);
            if run.is_some() {
                return run;
            }
            self.hot.pop_front();
        }
        self.revisit_deferred(spaces);
        while let Some(id) = self.active.first().copied() {
            let run = self.take(spaces, id, 0..u64::MAX, max_bytes, false);
            if run.is_some() {
                return run;
            }
            self.active.remove(&id);
        }
        None
    }

    fn next_hinted(
        &mut self,
        spaces: &BTreeMap<SpaceId, Space>,
        max_bytes: u64,
    ) -> Option<RunClaim> {
        while let Some((key, hint)) = self.hints.take() {
            let (run, rest) = match hint {
                Hint::Window { range, backward } => {
                    let run = self.take(spaces, key.0, range.clone(), max_bytes, backward);
                    (run, Some(Hint::Window { range, backward }))
                }
                Hint::Stride { mut next, step, page_size, mut left } => {
                    let mut run = None;
                    while left > 0 && run.is_none() {
                        let page = next..next.saturating_add(page_size);
                        run = self.take(spaces, key.0, page, page_size, false);
                        next = next.wrapping_add_signed(step);
                        left -= 1;
                    }
                    (run, (left > 0).then_some(Hint::Stride { next, step, page_size, left }))
                }
            };
            if run.is_some() {
                if let Some(rest) = rest {
                    self.hints.put_back(key, rest);
                }
                return run;
            }
        }
        None
    }

    /// Claims a run in a range, from its upper end when `backward`. Whatever is found not to need
    /// fetching leaves the to-do set, so that nothing is looked at twice.
    fn take(
        &mut self,
        spaces: &BTreeMap<SpaceId, Space>,
        id: SpaceId,
        range: Range<u64>,
        max_bytes: u64,
        backward: bool,
    ) -> Option<RunClaim> {
        let (space, queue) = (spaces.get(&id)?, self.queues.get_mut(&id)?);
        loop {
            let mut part = if backward {
                queue.todo.last_in(range.clone())?
            } else {
                queue.todo.first_in(range.clone())?
            };
            let Some(placed) =
                space.layout().find(if backward { part.end - 1 } else { part.start })
            else {
                queue.todo.remove(part);
                continue;
            };
            part = whole_pages(placed, &part);
            let max_pages = (max_bytes / placed.page_size()).max(1);
            if backward {
                let reach = part.end - part.start.max(placed.region.start);
                part.start = part.end - reach.min(max_pages * placed.page_size());
            }
            if let Some(run) = queue.take_part(id, space, placed, part, max_pages) {
                return Some(run);
            }
        }
    }

    /// Shared pages that were asked for by another space may have failed there.
    fn revisit_deferred(&mut self, spaces: &BTreeMap<SpaceId, Space>) {
        for (id, queue) in &mut self.queues {
            let Some(space) = spaces.get(id) else { continue };
            if !queue.deferred.is_empty() && queue.revisit_deferred(space) {
                self.active.insert(*id);
            }
        }
    }

    /// Nothing of a space is left to fetch, as far as is known.
    pub fn idle(&self, id: SpaceId) -> bool {
        self.queues.get(&id).is_none_or(|queue| {
            queue.todo.is_empty()
                && queue.deferred.is_empty()
                && queue.claims.is_empty()
                && queue.urgent.is_empty()
        })
    }

    /// Intervals of the present map.
    pub fn intervals(&self) -> usize {
        self.known.len()
    }
}

impl Queue {
    /// Claims the first missing pages of a part of one region, or takes what needs no fetching out
    /// of the to-do set. Either way the set shrinks.
    fn take_part(
        &mut self,
        id: SpaceId,
        space: &Space,
        placed: &Placed,
        part: Range<u64>,
        max_pages: u64,
    ) -> Option<RunClaim> {
        let end = part.end.min(placed.region.end());
        let (mapped_end, span) = space.leading(&(part.start..end));
        let Some(span) = span else {
            self.todo.remove(part.start..mapped_end);
            return None;
        };
        let table = space.table(placed.region.shared);
        let pages = placed.pages_of(part.start..mapped_end);
        let claimed = table.claim_run(pages.start, max_pages.min(pages.end - pages.start));
        if !claimed.is_empty() {
            let sources = part.start..placed.source_of(claimed.end);
            self.todo.remove(sources.clone());
            self.claims.insert(sources.start, sources.end);
            return Some(RunClaim {
                space: id,
                source_address: sources.start,
                len_bytes: sources.end - sources.start,
                current_address: span.start,
            });
        }
        let requested = table.leading_requested(pages.clone());
        // At least one page: it was not missing a moment ago, so it is requested or settled.
        let skipped = requested.max(table.leading_settled(pages.clone())).max(1);
        let sources = part.start..placed.source_of(pages.start + skipped);
        if requested > 0 && placed.region.shared {
            self.deferred.insert(sources.clone());
        }
        self.todo.remove(sources);
        None
    }

    /// Sorts out some deferred pages; true when some are to do again.
    fn revisit_deferred(&mut self, space: &Space) -> bool {
        for _ in 0..DEFERRED_PER_PICK {
            let Some(part) = self.deferred.first_in(self.deferred_cursor..u64::MAX) else {
                self.deferred_cursor = 0;
                break;
            };
            let Some(placed) = space.layout().find(part.start) else { break };
            let pages = placed.pages_of(part.start..part.end.min(placed.region.end()));
            let requested = space.table(true).leading_requested(pages.clone());
            if requested > 0 {
                self.deferred_cursor = placed.source_of(pages.start + requested);
                continue;
            }
            let other = space.table(true).leading_not_requested(pages.clone());
            let sources = part.start..placed.source_of(pages.start + other);
            self.deferred.remove(sources.clone());
            self.todo.insert(sources);
        }
        !self.todo.is_empty()
    }
}

/// A part of the to-do set widened to whole pages: only a misbehaving kernel event can have cut one.
fn whole_pages(placed: &Placed, part: &Range<u64>) -> Range<u64> {
    let size = placed.page_size();
    part.start / size * size..part.end.next_multiple_of(size)
}

/// Adds the parts of a range that are known to be present. Of others the present map has yet to
/// tell; only the urgent lane asks for such pages.
fn insert_known(todo: &mut IntervalSet, known: &IntervalSet, range: Range<u64>) {
    let mut at = range.start;
    while let Some(part) = known.first_in(at..range.end) {
        at = part.end;
        todo.insert(part);
    }
}
