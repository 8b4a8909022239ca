//! The edge as the module documentation asks for it, one small step at a time.

use super::super::{
    FaultAction, Layout, PageTable, Pages, Piece, PieceKind, Region, RunClaim, SharedRemove,
    SpaceId, TableMemory,
};
use super::kernel::{CopyError, Event, Kernel};
use super::{HUGE, Rng};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

thread_local! {
    /// Makes the edge read events between the state check and the copy, as if there were no lock.
    pub static CARELESS: Cell<bool> = const { Cell::new(false) };
}

pub fn regions() -> Vec<Region> {
    let small = |start, pages: u64, shared, forks| Region {
        start,
        len_bytes: pages * 4096,
        page_size: 4096,
        shared,
        forks,
    };
    vec![
        small(0x10_0000, 40, false, true),
        small(0x20_0000, 12, false, false),
        small(0x30_0000, 24, true, true),
        small(0x31_8000, 6, false, true),
        Region {
            start: 0x4000_0000,
            len_bytes: 5 * HUGE,
            page_size: HUGE as u32,
            shared: false,
            forks: true,
        },
    ]
}

/// A run on a bulk lane.
#[derive(Debug)]
struct Run {
    claim: RunClaim,
    lane: u64,
    /// Source address up to which replies have come.
    answered: u64,
    /// Replies not yet dealt with.
    open: u32,
    failed: bool,
}

/// A reply to be installed.
#[derive(Debug)]
struct Landing {
    space: SpaceId,
    source: u64,
    len: u64,
    zero: bool,
    /// The run it belongs to; none for the urgent lane.
    run: Option<u64>,
}

/// A landing between `begin` and `end`: the shared half of the lock is held.
#[derive(Debug)]
struct Open {
    landing: Landing,
    pieces: Vec<Piece>,
}

#[derive(Debug)]
pub struct Edge {
    pages: Pages,
    table_len_bytes: u64,
    source: BTreeMap<u64, (u64, u64)>,
    /// Present map yet to come.
    map: Vec<(u64, u64, bool)>,
    runs: BTreeMap<u64, Run>,
    next_run: u64,
    urgent: Vec<(SpaceId, u64, u64)>,
    landings: Vec<Landing>,
    open: Vec<Open>,
    /// Faults to be decided again: the kernel answered `EAGAIN`.
    again: Vec<(usize, usize, u64)>,
    /// Pages delivered by bulk or on their way.
    bulk: BTreeSet<(SpaceId, u64)>,
}

impl Edge {
    pub fn new(source: BTreeMap<u64, (u64, u64)>, rng: &mut Rng) -> Self {
        let layout = Layout::new(regions()).unwrap();
        let table_len_bytes = PageTable::len_bytes(&layout);
        let memory = || TableMemory::anonymous(table_len_bytes).unwrap();
        let pages = Pages::new(layout, memory(), memory()).unwrap();
        let map = map_runs(&source, rng);
        if rng.chance(2) {
            pages.hot(0x10_4000, 0x6000).unwrap();
        }
        Self {
            pages,
            table_len_bytes,
            source,
            map,
            runs: BTreeMap::new(),
            next_run: 0,
            urgent: Vec::new(),
            landings: Vec::new(),
            open: Vec::new(),
            again: Vec::new(),
            bulk: BTreeSet::new(),
        }
    }

    /// Nothing is left to do, and the page service says so.
    pub fn done(&self) -> bool {
        let idle = self.map.is_empty()
            && self.runs.is_empty()
            && self.urgent.is_empty()
            && self.landings.is_empty()
            && self.open.is_empty()
            && self.again.is_empty();
        // Asked only when lanes are idle, as here a run picked could not be given back.
        idle && self.pages.complete()
    }

    pub fn step(&mut self, kernel: &mut Kernel, rng: &mut Rng) {
        match rng.below(12) {
            0..=2 => self.read(kernel, rng),
            3 => self.present_map(kernel),
            4 => self.pick(rng),
            5 | 6 => self.bulk_reply(rng),
            7 => self.urgent_reply(rng),
            8 | 9 => self.begin(rng),
            10 => self.install(kernel, rng),
            // The real edge waits some seconds: threads need no longer from a change to its event.
            11 if self.pages.is_overtaken() && !kernel.is_changing() => {
                self.pages.forget_overtaken();
            }
            _ if rng.chance(20) => self.fail_lane(rng),
            _ => self.decide_again(kernel),
        }
    }

    // ---- Reading faults and events ----

    fn read(&mut self, kernel: &mut Kernel, rng: &mut Rng) {
        if !self.open.is_empty() && !CARELESS.get() {
            return; // the exclusive half is not to be had
        }
        let process = rng.below(kernel.processes.len() as u64) as usize;
        let Some(id) = kernel.processes[process].id else { return };
        if !kernel.processes[process].alive {
            self.pages.exit(id);
            return;
        }
        if rng.chance(2)
            && let Some((thread, page)) = kernel.processes[process].faults.pop_front()
        {
            return self.fault(kernel, process, thread, page);
        }
        if let Some(event) = kernel.read_event(process) {
            self.event(kernel, process, id, &event);
        }
    }

    fn event(&mut self, kernel: &mut Kernel, process: usize, id: SpaceId, event: &Event) {
        let wake = match *event {
            Event::Remove { start, end, punch } => {
                let shared = if punch { SharedRemove::Punch } else { SharedRemove::Keep };
                self.pages.remove(id, start, end, shared)
            }
            Event::Unmap { start, end } => self.pages.unmap(id, start, end),
            Event::Remap { from, to, len } => self.pages.remap(id, from, to, len),
            Event::Alias { from, to, len } => {
                self.pages.alias(id, from, to, len);
                0..0
            }
            Event::Fork { child } => {
                let memory = TableMemory::anonymous(self.table_len_bytes).unwrap();
                kernel.processes[child].id = Some(self.pages.fork(id, memory).unwrap());
                0..0
            }
        };
        kernel.wake(process, wake.start, wake.end);
    }

    fn fault(&mut self, kernel: &mut Kernel, process: usize, thread: usize, page: u64) {
        let Some(id) = kernel.processes[process].id.filter(|_| kernel.processes[process].alive)
        else {
            return;
        };
        let Ok(action) = self.pages.fault(id, thread as i32, page) else { return };
        match action {
            FaultAction::Zero { start, .. } | FaultAction::AlreadyPresent { start, .. } => {
                let size = kernel.size_at(process, start);
                match kernel.copy(process, start, 0) {
                    Ok(()) | Err(CopyError::NoProcess) => {}
                    Err(CopyError::Again) => self.again.push((process, thread, page)),
                    // Unmapped or unregistered: let it fault again, if it still waits.
                    Err(CopyError::Exists | CopyError::NotRegistered) => {
                        kernel.wake(process, start, start + size);
                    }
                }
            }
            FaultAction::Fetch { source_address, len_bytes, .. } => {
                assert!(
                    !self.urgently_asked(id, source_address),
                    "page {source_address:#x} asked for twice on the urgent lane"
                );
                self.urgent.push((id, source_address, len_bytes));
            }
            FaultAction::Wait => {
                let at = self.pages.space(id).unwrap().locate(page).unwrap();
                assert!(
                    self.urgently_asked(id, at.source_address),
                    "a fault on {page:#x} waits, but the urgent lane was not asked"
                );
            }
        }
    }

    fn decide_again(&mut self, kernel: &mut Kernel) {
        if let Some((process, thread, page)) = self.again.pop() {
            self.fault(kernel, process, thread, page);
        }
    }

    fn urgently_asked(&self, id: SpaceId, source: u64) -> bool {
        let landing = |landing: &Landing| {
            landing.run.is_none() && landing.space == id && landing.source == source
        };
        self.urgent.iter().any(|(space, at, _)| *space == id && *at == source)
            || self.landings.iter().any(landing)
            || self.open.iter().any(|open| landing(&open.landing))
    }

    // ---- What the source sends ----

    fn present_map(&mut self, kernel: &mut Kernel) {
        if !self.open.is_empty() {
            return;
        }
        let Some((start, len, present)) = self.map.pop() else { return };
        if present {
            self.pages.present_run(start, len).unwrap();
        } else {
            for range in self.pages.absent_run(start, len).unwrap() {
                let process =
                    kernel.processes.iter().position(|process| process.id == Some(range.space));
                let Some(process) = process else { continue };
                if !kernel.processes[process].changing() {
                    kernel.unregister(process, range.range.start, range.range.end);
                }
            }
        }
        if self.map.is_empty() {
            self.pages.map_complete();
        }
    }

    fn pick(&mut self, rng: &mut Rng) {
        if self.runs.len() >= 6 {
            return;
        }
        let Some(claim) = self.pages.next_run((1 + rng.below(16)) * 4096) else { return };
        for (source, _) in self.source.range(claim.sources()) {
            let content = self.source[source].0;
            let known_absent = content == 0;
            assert!(!known_absent, "prefetch of {source:#x}, which is known to be absent");
            let fresh = self.bulk.insert((claim.space, *source));
            assert!(fresh, "page {source:#x} of {:?} fetched by bulk twice", claim.space);
        }
        let (lane, answered) = (rng.below(2), claim.source_address);
        self.runs.insert(self.next_run, Run { claim, lane, answered, open: 0, failed: false });
        self.next_run += 1;
    }

    fn bulk_reply(&mut self, rng: &mut Rng) {
        let index = rng.below(self.runs.len() as u64) as usize;
        let Some((key, run)) = self.runs.iter_mut().nth(index) else { return };
        let end = run.claim.sources().end;
        if run.failed || run.answered == end {
            return;
        }
        let size = self.source[&run.answered].1;
        let len = ((1 + rng.below(6)) * size).min(end - run.answered);
        let landing = Landing {
            space: run.claim.space,
            source: run.answered,
            len,
            zero: false,
            run: Some(*key),
        };
        run.answered += len;
        run.open += 1;
        self.landings.push(landing);
    }

    fn urgent_reply(&mut self, rng: &mut Rng) {
        if self.urgent.is_empty() {
            return;
        }
        let index = rng.below(self.urgent.len() as u64) as usize;
        let (space, source, len) = self.urgent.swap_remove(index);
        let zero = self.source[&source].0 == 0;
        self.landings.push(Landing { space, source, len, zero, run: None });
    }

    fn fail_lane(&mut self, rng: &mut Rng) {
        if rng.chance(3) {
            // The urgent lane: whatever it was asked for is asked again, on a new one.
            self.urgent.clear();
            for (id, source, len) in self.pages.urgent_outstanding() {
                if !self.urgently_asked(id, source) {
                    self.urgent.push((id, source, len));
                }
            }
            return;
        }
        let lane = rng.below(2);
        for run in self.runs.values_mut().filter(|run| run.lane == lane) {
            run.failed = true;
        }
        self.finish_runs();
    }

    fn finish_runs(&mut self) {
        let ended =
            |run: &Run| run.open == 0 && (run.failed || run.answered == run.claim.sources().end);
        let keys: Vec<u64> =
            self.runs.iter().filter(|(_, run)| ended(run)).map(|(key, _)| *key).collect();
        for key in keys {
            let Some(run) = self.runs.remove(&key) else { continue };
            for (source, _) in self.source.range(run.answered..run.claim.sources().end) {
                self.bulk.remove(&(run.claim.space, *source));
            }
            self.pages.finish_run(&run.claim);
        }
    }

    // ---- Installing ----

    fn begin(&mut self, rng: &mut Rng) {
        if self.landings.is_empty() || self.open.len() >= 2 {
            return;
        }
        let index = rng.below(self.landings.len() as u64) as usize;
        let landing = self.landings.swap_remove(index);
        let mut pieces = Vec::new();
        let Landing { space, source, len, zero, .. } = landing;
        if zero {
            self.pages.begin_zero(space, source, len, &mut pieces);
        } else {
            self.pages.begin_copy(space, source, len, &mut pieces);
        }
        if self.pages.is_overtaken() {
            // It may belong to a place that isn't known yet, and is then fetched again.
            for (source, _) in self.source.range(source..source + len) {
                self.bulk.remove(&(space, *source));
            }
        }
        self.open.push(Open { landing, pieces });
    }

    fn install(&mut self, kernel: &mut Kernel, rng: &mut Rng) {
        if self.open.is_empty() {
            return;
        }
        let index = rng.below(self.open.len() as u64) as usize;
        let Open { landing, pieces } = self.open.swap_remove(index);
        let process = kernel.processes.iter().position(|process| process.id == Some(landing.space));
        let process = process.expect("a space has a process");
        for piece in pieces {
            let end = piece.current_address + piece.len_bytes;
            if piece.kind == PieceKind::Wake {
                kernel.wake(process, piece.current_address, end);
                continue;
            }
            match self.install_piece(kernel, process, &landing, &piece) {
                Ok(()) => {}
                Err((CopyError::NotRegistered, page))
                    if piece.doubtful
                        && !kernel.processes[process].changing()
                        && self.open.is_empty() =>
                {
                    // By now it is sure: the mapping of this page ended long ago.
                    self.pages.unmap(landing.space, page, page + 4096);
                    self.landings.push(landing);
                    return;
                }
                Err((CopyError::NoProcess, _)) => {
                    // Until its exit is noticed it may be fetched for again.
                    self.bulk.retain(|(space, _)| *space != landing.space);
                    break;
                }
                Err(_) => {
                    self.landings.push(landing);
                    return;
                }
            }
        }
        match landing.run {
            None => self.pages.urgent_done(landing.space, landing.source),
            Some(key) => {
                if let Some(run) = self.runs.get_mut(&key) {
                    run.open -= 1;
                }
                self.finish_runs();
            }
        }
    }

    /// Page by page, as the edge must do after `ENOENT`; on failure says at which page.
    fn install_piece(
        &self,
        kernel: &mut Kernel,
        process: usize,
        landing: &Landing,
        piece: &Piece,
    ) -> Result<(), (CopyError, u64)> {
        let end = piece.source_address + piece.len_bytes;
        for (source, (content, size)) in self.source.range(piece.source_address..end) {
            let page = piece.current_address + (source - piece.source_address);
            match kernel.copy(process, page, *content) {
                Ok(()) => {}
                Err(CopyError::Exists) => kernel.wake(process, page, page + size),
                Err(error) => return Err((error, page)),
            }
            self.pages.end_copy(landing.space, *source, *size);
        }
        Ok(())
    }
}

/// The present map in random order, as runs of either kind.
fn map_runs(source: &BTreeMap<u64, (u64, u64)>, rng: &mut Rng) -> Vec<(u64, u64, bool)> {
    let mut runs: Vec<(u64, u64, bool)> = Vec::new();
    for (start, (content, size)) in source {
        match runs.last_mut() {
            Some((last, len, present)) if *last + *len == *start && *present == (*content != 0) => {
                *len += size;
            }
            _ => runs.push((*start, *size, *content != 0)),
        }
    }
    for index in (1..runs.len()).rev() {
        runs.swap(index, rng.below(index as u64 + 1) as usize);
    }
    runs
}
