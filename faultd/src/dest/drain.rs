//! What the threads of a drain share: the pages under their lock, the userfaultfds, and how it goes.

use crate::at_end::AtEnd;
use crate::dest::fault_times::{FaultTimes, Moments};
use crate::dest::held::{Account, Ahead, Holdings};
use crate::dest::install::{Data, Delivered, install};
use crate::dest::journal::Record;
use crate::dest::shared_memory::{Sleepers, mapped_until};
use crate::dest::surplus;
use crate::error::{Error, Result};
use crate::pages::{Layout, PageTable, Pages, Piece, Region, RunClaim, SpaceId, Unregister};
use crate::protocol::{FaultParts, Figures, PresentRun};
use slipstream_core::manifest::Manifest;
use slipstream_core::restore::engine::Mapped;
use slipstream_core::restore::memory::{LazyView, lazy_views};
use slipstream_core::sys::pidfd::PidFd;
use slipstream_core::sys::uffd::Uffd;
use slipstream_transport::Pace;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, TryLockError,
};
use std::time::{Duration, Instant};

mod events;
pub use events::Happened;

/// All addresses a program can have mapped, for waking whoever waits.
const WAKE_START: u64 = 0x1_0000;
const WAKE_END: u64 = 0x7fff_ffff_f000;

/// A thread that is woken up later than this gains nothing by sleeping.
const SPIN_MAX: Duration = Duration::from_micros(20);
/// For an event that another one overtook: its thread only has to get a processor.
const OVERTAKEN_MAX: Duration = Duration::from_secs(5);
/// For children that are too many to have ended, when a drain is taken up.
const ROOM_MAX: Duration = Duration::from_secs(5);
const ROOM_PAUSE: Duration = Duration::from_millis(2);

/// Everything a drain's threads share.
#[derive(Debug)]
pub struct Drain {
    state: RwLock<State>,
    /// The fault thread waits for the exclusive half.
    is_wanted: AtomicBool,
    /// The process, as this host sees it.
    pid: i32,
    /// There is anonymous shared memory, of which events don't tell all.
    has_shared: bool,
    /// Has bulk lanes make room for faults.
    pace: Arc<Pace>,
    /// Signalled when there may be new work for bulk lanes, or an end; counts that.
    news: Condvar,
    news_len: Mutex<u64>,
    /// A bulk lane has found nothing more to ask for.
    is_at_rest: AtomicBool,
    short_of_memory: AtomicBool,
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
    /// Spaces of which an event was read since they last had nothing to say; only where there is shared memory.
    unsettled: BTreeSet<SpaceId>,
    sleepers: Sleepers,
}

impl Drain {
    /// The drain of a restored process. Pages that came with the manifest are there already.
    pub fn new(
        m: &Manifest,
        mapped: Mapped,
        pid: i32,
        ahead: Ahead,
        pace: Arc<Pace>,
    ) -> Result<Self> {
        let (regions, aliases) = regions(m);
        let layout = Layout::new(regions)?;
        let holdings = Holdings::create(ahead, mapped.ring, PageTable::len_bytes(&layout))?;
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
            is_wanted: AtomicBool::new(false),
            pid,
            has_shared,
            pace,
            news: Condvar::new(),
            news_len: Mutex::new(0),
            is_at_rest: AtomicBool::new(false),
            short_of_memory: AtomicBool::new(false),
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

    /// The same for the thread that programs wait for. It would sleep for longer than the lock is held: while faults
    /// come, bulk lanes hold it for a few pages at a time, and [let it go first](Self::give_way).
    fn exclusive_at_once<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        self.is_wanted.store(true, Ordering::Relaxed);
        let until = Instant::now() + SPIN_MAX;
        let mut state = loop {
            match self.state.try_write() {
                Ok(state) => break state,
                Err(TryLockError::Poisoned(e)) => break e.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() < until => std::hint::spin_loop(),
                Err(TryLockError::WouldBlock) => {
                    break self.state.write().unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        self.is_wanted.store(false, Ordering::Relaxed);
        f(&mut state)
    }

    /// For bulk lanes, before they take the lock.
    pub fn give_way(&self) {
        if self.is_wanted.load(Ordering::Relaxed) {
            let until = Instant::now() + SPIN_MAX;
            while self.is_wanted.load(Ordering::Relaxed) && Instant::now() < until {
                std::hint::spin_loop();
            }
        }
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
        let short = outcome == Delivered::NoMemory;
        if short != self.is_short_of_memory() && (short || !pieces.is_empty()) {
            self.short_of_memory.store(short, Ordering::Relaxed);
        }
        Ok(outcome)
    }

    /// There was no memory for the last page that was to be installed: it is tried again until there is.
    pub fn is_short_of_memory(&self) -> bool {
        self.short_of_memory.load(Ordering::Relaxed)
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

    /// Waits for news that come after those that were `seen`, for at most `timeout`.
    pub fn wait_news(&self, seen: &mut u64, timeout: Duration) {
        let len = lock(&self.news_len);
        let waited = self.news.wait_timeout_while(len, timeout, |len| *len == *seen);
        *seen = *waited.unwrap_or_else(PoisonError::into_inner).0;
    }

    /// Has whoever waits for news look.
    pub fn tell_news(&self) {
        *lock(&self.news_len) += 1;
        self.news.notify_all();
    }

    /// A bulk lane has nothing to ask for, or something again. All may be done.
    pub fn lane_rests(&self, rests: bool) {
        self.is_at_rest.store(rests, Ordering::Relaxed);
        if rests {
            self.tell_news();
        }
    }

    /// No fault waits for a page any more: the last page may have come.
    pub fn faults_answered(&self) {
        if self.is_at_rest.load(Ordering::Relaxed) {
            self.tell_news();
        }
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
