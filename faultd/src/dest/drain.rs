//! What the threads of a drain share: the pages under their lock, the userfaultfds, and how it goes.

use crate::at_end::AtEnd;
use crate::dest::fault_times::{FaultTimes, Moments};
use crate::dest::held::{Account, Holdings};
use crate::dest::journal::{Record, Unfinished};
use crate::dest::shared_memory::{Sleepers, mapped_until};
use crate::dest::surplus;
use crate::error::{Error, Result};
use crate::failpoints;
use crate::pages::{
    Layout, PageTable, Pages, Piece, PieceKind, Region, RunClaim, SpaceId, Unregister,
};
use crate::protocol::{FaultParts, Figures, PresentRun};
use slipstream_core::manifest::Manifest;
use slipstream_core::restore::engine::Mapped;
use slipstream_core::restore::keeper::Keeper;
use slipstream_core::restore::memory::{LazyView, lazy_views};
use slipstream_core::sys::pidfd::PidFd;
use slipstream_core::sys::poll;
use slipstream_core::sys::uffd::{Event, Installed, Uffd};
use slipstream_transport::Pace;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

/// All addresses a program can have mapped, for waking whoever waits.
const WAKE_START: u64 = 0x1_0000;
const WAKE_END: u64 = 0x7fff_ffff_f000;

/// For an event that another one overtook: its thread only has to get a processor.
const OVERTAKEN_MAX: Duration = Duration::from_secs(5);
/// For children that are too many to have ended, when a drain is taken up.
const ROOM_MAX: Duration = Duration::from_secs(5);
const ROOM_PAUSE: Duration = Duration::from_millis(2);

/// Everything a drain's threads share.
#[derive(Debug)]
pub struct Drain {
    state: RwLock<State>,
    /// The process, as this host sees it.
    pid: i32,
    /// There is anonymous shared memory, of which events don't tell all.
    has_shared: bool,
    /// Has bulk lanes make room for faults.
    pace: Arc<Pace>,
    /// Signalled when there may be new work for bulk lanes, or an end.
    news: Condvar,
    news_lock: Mutex<()>,
    ended: AtomicBool,
    failure: Mutex<Option<Error>>,
    fault_times: Mutex<FaultTimes>,
    huge: Mutex<Vec<PresentRun>>,
    overtaken_since: Mutex<Option<Instant>>,
}

/// What the lock protects: see [`crate::pages`] for which half is needed for what.
#[derive(Debug)]
pub struct State {
    /// The pages.
    pub pages: Pages,
    uffds: BTreeMap<SpaceId, Uffd>,
    held: Holdings,
    /// Spaces of which an event was read since they last had nothing to say.
    unsettled: BTreeSet<SpaceId>,
    sleepers: Sleepers,
}

/// What an event changed, for the thread that waits on descriptors.
#[derive(Debug)]
pub enum Happened {
    /// A thread waits for a page.
    Fault {
        /// Where.
        address: u64,
        /// Which thread.
        tid: i32,
    },
    /// A child was forked: there is one more descriptor to wait on.
    Forked(SpaceId),
    /// Something else was dealt with.
    Other,
    /// Nothing to read.
    Nothing,
}

/// How much of what arrived went in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// All that is still wanted.
    All,
    /// An event must be read first.
    Blocked,
    /// The kernel has no mapping for this page, and perhaps an event that says so.
    NotMapped(Piece),
}

/// A page with no mapping and no event that says why is given up after this.
const NOT_MAPPED_MAX: Duration = Duration::from_secs(2);

/// For how long the kernel has had no mapping for a page, with nothing in between that could be the reason.
#[derive(Clone, Copy, Debug, Default)]
pub struct NotMapped {
    since: Option<Instant>,
}

impl NotMapped {
    /// Takes how a delivery ended; yields the page to be given up, if it is time for that.
    pub fn after(&mut self, delivered: Delivered, now: Instant) -> Option<Piece> {
        let Delivered::NotMapped(piece) = delivered else {
            self.since = None;
            return None;
        };
        let since = *self.since.get_or_insert(now);
        let over = now.saturating_duration_since(since) > NOT_MAPPED_MAX;
        over.then(|| {
            self.since = None;
            piece
        })
    }
}

impl Drain {
    /// The drain of a restored process. Pages that came with the manifest are there already.
    pub fn new(
        m: &Manifest,
        mapped: Mapped,
        pid: i32,
        keeper: Arc<Keeper>,
        pace: Arc<Pace>,
    ) -> Result<Self> {
        let (regions, aliases) = regions(m);
        let layout = Layout::new(regions)?;
        let holdings = Holdings::create(keeper, mapped.ring, PageTable::len_bytes(&layout))?;
        let drain = Self::build(layout, aliases, (mapped.uffd, pid), holdings, pace)?;
        drain.shared(|state| {
            for page in &m.pages {
                state.pages.end_copy(SpaceId::PROCESS, page.address, page.bytes.len() as u64);
            }
        });
        Ok(drain)
    }

    /// Takes up the drain of a session that has ended.
    pub fn take_up(
        m: &Manifest,
        uffd: Uffd,
        pid: i32,
        holdings: Holdings,
        pace: Arc<Pace>,
    ) -> Result<Self> {
        let (regions, aliases) = regions(m);
        let layout = Layout::new(regions)?;
        let drain = Self::build(layout, aliases, (uffd, pid), holdings, pace)?;
        drain.exclusive(|state| -> Result<()> {
            let (children, unfinished) = state.held.replay(&mut state.pages)?;
            state.uffds.extend(children);
            state.make_room()?;
            if let Some(unfinished) = unfinished {
                drain.finish_event(state, unfinished)?;
            }
            state.held.start_twin()?;
            // What a dead session had read is not told again, unless the thread tries again.
            for uffd in state.uffds.values() {
                if let Err(e) = uffd.wake(WAKE_START, WAKE_END - WAKE_START) {
                    tracing::debug!("wake all: {e}");
                }
            }
            Ok(())
        })?;
        Ok(drain)
    }

    fn build(
        layout: Layout,
        aliases: Vec<(u64, u64, u64)>,
        (uffd, pid): (Uffd, i32),
        held: Holdings,
        pace: Arc<Pace>,
    ) -> Result<Self> {
        let has_shared = layout.regions().any(|r| r.shared);
        let [private, shared] = held.tables(PageTable::len_bytes(&layout))?;
        let mut pages = Pages::new(layout, private, shared)?;
        for (current, source, len) in aliases {
            pages.track_alias(current, source, len)?;
        }
        Ok(Self {
            state: RwLock::new(State {
                pages,
                uffds: BTreeMap::from([(SpaceId::PROCESS, uffd)]),
                held,
                unsettled: BTreeSet::new(),
                sleepers: Sleepers::default(),
            }),
            pid,
            has_shared,
            pace,
            news: Condvar::new(),
            news_lock: Mutex::new(()),
            ended: AtomicBool::new(false),
            failure: Mutex::new(None),
            fault_times: Mutex::new(FaultTimes::new()?),
            huge: Mutex::new(Vec::new()),
            overtaken_since: Mutex::new(None),
        })
    }

    /// From here on another session can take the drain up.
    pub fn keep(&self, account: &Account) -> Result<()> {
        self.exclusive(|state| match state.uffds.get(&SpaceId::PROCESS) {
            Some(uffd) => state.held.keep(uffd, account),
            None => Ok(()),
        })
    }

    /// The spaces, each of which has a userfaultfd to wait on.
    pub fn spaces(&self) -> Vec<SpaceId> {
        self.shared(|state| state.uffds.keys().copied().collect())
    }

    /// Nothing needs to be taken up any more.
    pub fn release(&self) {
        self.shared(|state| state.held.release());
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` under the shared half of the lock.
    pub fn shared<T>(&self, f: impl FnOnce(&State) -> T) -> T {
        f(&self.read())
    }

    /// Runs `f` under the exclusive half of the lock.
    pub fn exclusive<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads one event of a space and applies it, in one go under the exclusive half: no copy is
    /// decided before it and lands after it.
    pub fn read_event(&self, id: SpaceId) -> Result<Happened> {
        let happened = self.exclusive(|state| self.apply_event(state, id))?;
        if matches!(happened, Happened::Forked(_) | Happened::Other) {
            self.tell_news();
        }
        Ok(happened)
    }

    fn apply_event(&self, state: &mut State, id: SpaceId) -> Result<Happened> {
        let Some(uffd) = state.uffds.get(&id) else { return Ok(Happened::Nothing) };
        // Only while the event is unread does its thread wait in the call that raised it; and what is
        // raised after this look must not be what is read.
        let removing = if self.has_shared {
            if !poll::readable(uffd, Duration::ZERO)
                .map_err(|e| Error::io("poll userfaultfd", e))?
            {
                state.unsettled.remove(&id);
                return Ok(Happened::Nothing);
            }
            // Children of a process that has exited are init's.
            let root = state.held.init().pid();
            state.sleepers.being_removed(root, state.unsettled.contains(&id))
        } else {
            Vec::new()
        };
        let event = state
            .held
            .journal
            .read(uffd, id, &removing)
            .map_err(|e| Error::io("read userfaultfd", e))?;
        match event {
            None => Ok(Happened::Nothing),
            Some(Event::Fault { address, tid }) => Ok(Happened::Fault { address, tid: tid as i32 }),
            Some(event) => {
                if matches!(event, Event::Fork { .. }) {
                    failpoints::reached("destination-fork-read");
                }
                state.unsettled.insert(id);
                self.deal_with(state, id, event, &removing)
            }
        }
    }

    /// Notes an event in the journal, and has it take effect.
    fn deal_with(
        &self,
        state: &mut State,
        id: SpaceId,
        event: Event,
        removing: &[Range<u64>],
    ) -> Result<Happened> {
        let woken = match event {
            Event::Fork { child: Some(child) } => {
                let adopted = state.held.adopt(&mut state.pages, id, &child);
                let Ok(child_id) = adopted else {
                    // Nobody else may have it yet. It goes with this process, and then its twin has it.
                    std::mem::forget(child);
                    return adopted.map(Happened::Forked);
                };
                state.uffds.insert(child_id, child);
                return Ok(Happened::Forked(child_id));
            }
            Event::Fault { .. } | Event::Fork { child: None } => return Ok(Happened::Other),
            Event::Remove { start, end } => {
                let punch = removing.iter().any(|r| r.start <= start && end <= r.end);
                state.apply(&[Record::Remove { space: id, start, end, punch }])?
            }
            Event::Unmap { start, end } => {
                state.apply(&[Record::Unmap { space: id, start, end }])?
            }
            Event::Remap { from, to, len } => {
                let records = self.remap(id, from, to, len);
                state.apply(&records)?
            }
        };
        if let Some(uffd) = state.uffds.get(&id)
            && let Err(e) = uffd.wake(woken.start, woken.end - woken.start)
        {
            tracing::debug!("wake {woken:x?}: {e}");
        }
        Ok(Happened::Other)
    }

    /// Moved pages. Of shared memory the old mapping may still be there.
    fn remap(&self, space: SpaceId, from: u64, to: u64, len: u64) -> Vec<Record> {
        let moved = Record::Remap { space, from, to, len };
        if !self.has_shared || space != SpaceId::PROCESS {
            return vec![moved];
        }
        if len == 0 {
            let end = mapped_until(self.pid, to);
            return vec![Record::Alias { space, from, to, len: end.map_or(0, |end| end - to) }];
        }
        if mapped_until(self.pid, from).is_some() {
            return vec![moved];
        }
        vec![moved, Record::Forget { space, start: from, end: from.saturating_add(len) }]
    }

    /// Ends children that are too many. True while there are any: to be called again soon.
    pub fn end_surplus(&self) -> bool {
        let ended = self.shared(surplus::end);
        for id in &ended {
            self.space_ended(*id);
        }
        self.shared(|state| !state.held.surplus().is_empty())
    }

    /// Deals with an event that a session had read before it died.
    fn finish_event(&self, state: &mut State, unfinished: Unfinished) -> Result<()> {
        if state.uffd(unfinished.space).is_none() {
            return Ok(());
        }
        let event = match state.held.unfinished_child(&unfinished)? {
            Some(child) => Event::Fork { child: Some(child) },
            None => unfinished.event,
        };
        if matches!(event, Event::Fork { child: None }) {
            tracing::error!(
                "process {} forked, and the session that read so was killed together with its twin: that child can't be served",
                self.pid
            );
        }
        self.deal_with(state, unfinished.space, event, &unfinished.removing).map(drop)
    }

    /// Installs what arrived for a source range, wherever it belongs by now.
    pub fn deliver(
        &self,
        id: SpaceId,
        source: u64,
        data: Data<'_>,
        pieces: &mut Vec<Piece>,
    ) -> Result<Delivered> {
        let (outcome, gone) = {
            let state = self.read();
            let Some(uffd) = state.uffds.get(&id) else { return Ok(Delivered::All) };
            match data {
                Data::Bytes(bytes) => {
                    state.pages.begin_copy(id, source, bytes.len() as u64, pieces);
                }
                Data::Zeros(len) => state.pages.begin_zero(id, source, len, pieces),
            }
            install(&state.pages, uffd, id, source, data, pieces)?
        };
        if gone {
            self.space_ended(id);
        }
        Ok(outcome)
    }

    /// A page for which the kernel goes on having no mapping, with no event to say why: it is taken as
    /// unmapped, so that nothing waits for it for ever.
    pub fn give_up(&self, id: SpaceId, piece: &Piece) {
        let (start, len) = (piece.current_address, 4096);
        // Of a child no number is known, and what the kernel says has to do.
        if id == SpaceId::PROCESS && mapped_until(self.pid, start).is_some() {
            return tracing::warn!(
                "the page at {start:#x} can't be installed, though something is mapped there"
            );
        }
        tracing::warn!("nothing is mapped at {start:#x}; its page is dropped");
        self.exclusive(|state| {
            if let Err(e) = state.apply(&[Record::Forget { space: id, start, end: start + len }]) {
                self.fail(e);
            }
        });
        self.tell_news();
    }

    /// An address space is gone: nobody waits there any more.
    pub fn space_ended(&self, id: SpaceId) {
        if let Err(e) = self.exclusive(|state| state.end_space(id)) {
            self.fail(e);
        }
        self.tell_news();
    }

    /// The next run for a bulk lane.
    pub fn next_run(&self, max_bytes: u64) -> Option<RunClaim> {
        self.read().pages.next_run(max_bytes)
    }

    /// A bulk lane is done with a run.
    pub fn finish_run(&self, run: &RunClaim) {
        self.read().pages.finish_run(run);
    }

    /// Source pages exist.
    pub fn present(&self, run: &PresentRun) -> Result<()> {
        self.read()
            .pages
            .present_run(run.start, run.len_bytes)
            .map_err(|e| Error::Protocol(e.to_string()))?;
        if run.huge {
            lock(&self.huge).push(*run);
        }
        Ok(())
    }

    /// Source pages don't exist. Large ranges need no fault handling any more.
    pub fn absent(&self, start: u64, len_bytes: u64) -> Result<Vec<Unregister>> {
        self.exclusive(|state| state.pages.absent_run(start, len_bytes))
            .map_err(|e| Error::Protocol(e.to_string()))
    }

    /// The present map is complete.
    pub fn map_complete(&self) {
        self.exclusive(|state| state.pages.map_complete());
        self.tell_news();
    }

    /// Runs that huge pages mapped on the source.
    pub fn huge_runs(&self) -> Vec<PresentRun> {
        lock(&self.huge).clone()
    }

    /// Every page of every space has arrived or is gone. To be asked every few moments.
    pub fn complete(&self) -> bool {
        let (complete, overtaken) = self.shared(|s| (s.pages.complete(), s.pages.is_overtaken()));
        let mut since = lock(&self.overtaken_since);
        if !overtaken {
            *since = None;
        } else if since.get_or_insert_with(Instant::now).elapsed() > OVERTAKEN_MAX {
            self.exclusive(|state| {
                if let Err(e) = state.apply(&[Record::ForgetOvertaken]) {
                    self.fail(e);
                }
            });
        }
        complete
    }

    /// The process, as this host sees it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What has bulk lanes make room for faults.
    pub fn pace(&self) -> &Arc<Pace> {
        &self.pace
    }

    /// Notes how long a thread waited for a page.
    pub fn record_fault(&self, moments: &Moments) {
        lock(&self.fault_times).record(moments);
    }

    /// Where the time of faults went.
    pub fn fault_parts(&self) -> FaultParts {
        lock(&self.fault_times).parts()
    }

    /// How far it is.
    pub fn figures(&self) -> Figures {
        let s = self.read().pages.statistics();
        let (faults, fault_us_p50, fault_us_p99) = lock(&self.fault_times).whole_us();
        Figures {
            pages_present: s.pages_present + s.pages_gone,
            pages_total: s.pages_total,
            bytes: s.bytes,
            faults,
            fault_us_p50,
            fault_us_p99,
        }
    }

    /// Waits for news, for at most `timeout`.
    pub fn wait_news(&self, timeout: Duration) {
        let guard = lock(&self.news_lock);
        drop(self.news.wait_timeout(guard, timeout));
    }

    fn tell_news(&self) {
        self.news.notify_all();
    }

    /// Ends the threads: all is done, or has failed.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.tell_news();
    }

    /// True once the threads shall end.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Notes the first failure and ends the threads.
    pub fn fail(&self, error: Error) {
        lock(&self.failure).get_or_insert(error);
        self.end();
    }

    /// For a thread of the drain: should it panic, the drain fails rather than hang.
    pub fn fail_on_panic(self: &Arc<Self>) -> AtEnd<impl FnMut() + use<>> {
        let drain = Arc::clone(self);
        AtEnd::new(move || {
            if std::thread::panicking() {
                drain.fail(Error::Internal("a thread of the drain panicked".into()));
            }
        })
    }

    /// The failure, if there was one.
    pub fn take_failure(&self) -> Option<Error> {
        lock(&self.failure).take()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What arrived.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// The pages.
    Bytes(&'a [u8]),
    /// The source has no such pages; so many bytes.
    Zeros(u64),
}

impl State {
    /// Notes changes in the journal, then makes them. Yields the range to wake.
    fn apply(&mut self, records: &[Record]) -> Result<Range<u64>> {
        self.held.note(&self.pages, records)?;
        let mut woken = 0..0;
        for (index, record) in records.iter().enumerate() {
            let range = record.apply(&mut self.pages);
            if index == 0 {
                woken = range;
            }
        }
        Ok(woken)
    }

    /// Before an event of another session is dealt with: no child of it may be refused for want of room.
    fn make_room(&mut self) -> Result<()> {
        let until = Instant::now() + ROOM_MAX;
        while !self.held.surplus().is_empty() && Instant::now() < until {
            for id in surplus::end(self) {
                self.end_space(id)?;
            }
            std::thread::sleep(ROOM_PAUSE);
        }
        Ok(())
    }

    fn end_space(&mut self, id: SpaceId) -> Result<()> {
        let noted = self.apply(&[Record::Exit { space: id }]);
        self.uffds.remove(&id);
        self.held.let_go(id);
        noted.map(drop)
    }

    /// Children that are too many.
    pub fn surplus(&self) -> Vec<SpaceId> {
        self.held.surplus()
    }

    /// The first process of the moved process's namespace.
    pub fn init(&self) -> &PidFd {
        self.held.init()
    }

    /// The userfaultfd of a space.
    pub fn uffd(&self, id: SpaceId) -> Option<&Uffd> {
        self.uffds.get(&id)
    }
}

/// Installs pieces; returns how it went, and whether the address space is gone.
fn install(
    pages: &Pages,
    uffd: &Uffd,
    id: SpaceId,
    source: u64,
    data: Data<'_>,
    pieces: &[Piece],
) -> Result<(Delivered, bool)> {
    for piece in pieces {
        let len = piece.len_bytes;
        if piece.kind != PieceKind::Install {
            let _ = uffd.wake(piece.current_address, len);
            continue;
        }
        let (mut done, mut part) = (0, len);
        while done < len {
            let at = piece.current_address + done;
            let want = part.min(len - done);
            let result = match data {
                Data::Bytes(bytes) => {
                    let from = (piece.source_address - source + done) as usize;
                    uffd.copy(at, &bytes[from..from + want as usize])
                }
                Data::Zeros(_) => uffd.zero(at, want),
            };
            let page = pages.space(id).and_then(|s| s.locate(at)).map_or(4096, |l| l.page_size);
            let mut landed = |count: u64| {
                pages.end_copy(id, piece.source_address + done, count);
                done += count;
            };
            match result.map_err(|e| Error::io(format!("install a page at {at:#x}"), e))? {
                Installed::All => landed(want),
                Installed::Exists(count) => {
                    landed(count + page);
                    let _ = uffd.wake(at + count, page);
                }
                Installed::Partly(count) => {
                    landed(count);
                    return Ok((Delivered::Blocked, false));
                }
                // A copy never spans two mappings (one `mprotect` makes two): go on page by page.
                Installed::NotMapped(0) if part > page => part = page,
                Installed::NotMapped(0) => return Ok((Delivered::NotMapped(*piece), false)),
                Installed::NotMapped(count) => landed(count),
                Installed::Gone => return Ok((Delivered::All, true)),
            }
        }
    }
    Ok((Delivered::All, false))
}

/// The lazy regions of a manifest, and the further views of shared memory as (current address, source
/// address, length).
fn regions(m: &Manifest) -> (Vec<Region>, Vec<(u64, u64, u64)>) {
    let (mut regions, mut aliases) = (Vec::new(), Vec::new());
    for LazyView { range, shared, forks, alias_of } in lazy_views(m) {
        let (start, len_bytes, page_size) = (range.start, range.len_bytes, range.page_size);
        match alias_of {
            Some(source) => aliases.push((start, source, len_bytes)),
            None => regions.push(Region { start, len_bytes, page_size, shared, forks }),
        }
    }
    (regions, aliases)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_given_up_when_nothing_else_was_said_for_long_enough() {
        let piece = Piece {
            source_address: 0x1000,
            current_address: 0x2000,
            len_bytes: 4096,
            kind: PieceKind::Install,
            doubtful: false,
        };
        let begin = Instant::now();
        let at = |seconds: f64| begin + Duration::from_secs_f64(seconds);
        let mut clock = NotMapped::default();
        // What it waited for before is no reason.
        assert_eq!(clock.after(Delivered::Blocked, at(0.0)), None);
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(10.0)), None);
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(11.9)), None);
        assert_eq!(clock.after(Delivered::Blocked, at(11.95)), None);
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(12.5)), None);
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(14.4)), None);
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(14.6)), Some(piece));
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(14.7)), None);
    }
}
