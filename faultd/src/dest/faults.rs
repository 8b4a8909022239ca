//! The fault service: one thread for all userfaultfds and the urgent lane.
//!
//! A fault is resolved on the thread that polls: handing it to another doubles its time. The thread
//! also reads every other event, so a copy that the kernel refuses while an event is unread is simply
//! tried again after the next round.

use crate::dest::drain::{Drain, Happened};
use crate::dest::fault_times::Moments;
use crate::dest::install::{Data, Delivered, NotMapped};
use crate::error::{Error, Result};
use crate::pages::{FaultAction, Piece, SpaceId};
use crate::placement::Placement;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use slipstream_core::proc::cpu::{self, ThreadNumbers};
use slipstream_core::sys::task;
use slipstream_transport::{Block, Content, Pace, PageLane, PageRequest};
use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The descriptor of the urgent lane among those of spaces.
const LANE: u64 = u64::MAX;
/// How often an idle thread looks whether it shall end.
const IDLE_MS: u16 = 50;
/// Events read in a row before copies get their turn.
const EVENTS_IN_A_ROW: usize = 64;
/// Faults between two looks at the CPU that they come from.
const FOLLOW_INTERVAL: u32 = 8;
/// Between two looks at the processes for children that are too many.
const SURPLUS_PAUSE: Duration = Duration::from_millis(5);

/// What is left to do about a fault.
enum Next {
    Ask { source: u64, len_bytes: u64 },
    TryAgain,
}

/// A page asked for on the urgent lane.
#[derive(Debug)]
struct Asked {
    space: SpaceId,
    len_bytes: u64,
    since: Instant,
    posted: Instant,
    /// What has arrived of a huge page, which can only be installed whole.
    arrived: Vec<u8>,
    absent: bool,
}

/// A fault that could not be answered before an event is read. Its thread is not woken: the fault it would
/// raise again is read before any event, and so for ever.
#[derive(Clone, Copy, Debug)]
struct Unanswered {
    space: SpaceId,
    address: u64,
    tid: i32,
}

/// A page that arrived but could not be installed yet.
#[derive(Debug)]
struct Stuck {
    source: u64,
    asked: Asked,
    since: Instant,
    not_mapped: NotMapped,
}

struct Service {
    drain: Arc<Drain>,
    lane: Box<dyn PageLane>,
    epoll: Epoll,
    asked: HashMap<u64, Vec<Asked>>,
    /// Of what was asked for, what the lane had no room for yet: more threads may fault than it holds requests.
    unposted: VecDeque<PageRequest>,
    stuck: Vec<Stuck>,
    unanswered: Vec<Unanswered>,
    /// Children that are too many are there; when they were last looked for.
    surplus: Option<Instant>,
    pieces: Vec<Piece>,
    follower: Follower,
}

/// Keeps the thread on the CPU of the threads that fault.
struct Follower {
    pid: i32,
    threads: ThreadNumbers,
    placement: Placement,
    faults: u32,
}

impl Follower {
    /// Called for every fault of the process.
    fn fault(&mut self, own_tid: i32, pace: &Pace) {
        self.faults = self.faults.wrapping_add(1);
        if self.faults % FOLLOW_INTERVAL != 1 {
            return;
        }
        // A real-time thread may keep a CPU from ours for as long as it likes.
        if let Some(tid) = self.threads.host_tid(own_tid)
            && task::sched_attr(tid).is_ok_and(|attr| !attr.is_real_time())
            && let Ok(Some(cpu)) = cpu::last_cpu(self.pid, tid)
            && self.placement.follow(cpu)
        {
            pace.settle_on(cpu);
        }
    }
}

/// Starts the thread. Failures are noted in the drain.
pub fn start(drain: Arc<Drain>, lane: Box<dyn PageLane>) -> Result<JoinHandle<()>> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
        .map_err(|e| Error::io("epoll_create", e.into()))?;
    let pid = drain.pid();
    let mut service = Service {
        drain,
        lane,
        epoll,
        asked: HashMap::new(),
        unposted: VecDeque::new(),
        stuck: Vec::new(),
        unanswered: Vec::new(),
        surplus: Some(Instant::now()),
        pieces: Vec::new(),
        follower: Follower {
            pid,
            threads: ThreadNumbers::new(pid),
            placement: Placement::of_this_thread(),
            faults: 0,
        },
    };
    service.watch_lane()?;
    for id in service.drain.spaces() {
        service.watch_space(id)?;
    }
    Ok(std::thread::spawn(move || {
        let _guard = service.drain.fail_on_panic();
        task::prefer_this_thread();
        if let Err(e) = service.run() {
            service.drain.fail(e);
        }
    }))
}

impl Service {
    fn watch_lane(&self) -> Result<()> {
        let Some(fd) = self.lane.raw_fd() else {
            return Err(Error::Internal("an urgent lane without a descriptor".into()));
        };
        // SAFETY: the lane owns the descriptor and lives as long as this service, whose epoll set goes
        // with it.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        self.epoll
            .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, LANE))
            .map_err(|e| Error::io("watch the urgent lane", e.into()))
    }

    fn watch_space(&self, id: SpaceId) -> Result<()> {
        self.drain.shared(|state| {
            let Some(uffd) = state.uffd(id) else { return Ok(()) };
            let event = EpollEvent::new(EpollFlags::EPOLLIN, u64::from(id.0));
            self.epoll.add(uffd, event).map_err(|e| Error::io("watch a userfaultfd", e.into()))
        })
    }

    fn run(&mut self) -> Result<()> {
        let mut ready = [EpollEvent::empty(); 16];
        while !self.drain.has_ended() {
            let timeout = if self.lane.busy_poll() {
                EpollTimeout::ZERO
            } else if self.stuck.is_empty()
                && self.unanswered.is_empty()
                && self.unposted.is_empty()
            {
                EpollTimeout::from(IDLE_MS)
            } else {
                EpollTimeout::from(1u16)
            };
            let count = match self.epoll.wait(&mut ready, timeout) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(e) => return Err(Error::io("wait for faults", e.into())),
            };
            for event in &ready[..count] {
                match event.data() {
                    LANE => self.arrivals()?,
                    id => self.events(SpaceId(id as u32))?,
                }
            }
            // Its descriptor is only readable for those that sleep on it.
            if self.lane.busy_poll() {
                self.drain.pace().hurry();
                self.arrivals()?;
            }
            self.retry()?;
        }
        Ok(())
    }

    /// Reads what a space has to say.
    fn events(&mut self, id: SpaceId) -> Result<()> {
        for _ in 0..EVENTS_IN_A_ROW {
            match self.drain.read_event(id)? {
                Happened::Nothing => break,
                // Seldom is there another, and a look needs no lock that others wait for.
                Happened::Fault { address, tid } => {
                    self.fault(id, address, tid)?;
                    if !self.drain.has_event(id)? {
                        break;
                    }
                }
                Happened::Other => {}
                Happened::Forked(child) => {
                    self.watch_space(child)?;
                    self.end_surplus();
                }
            }
        }
        self.lane.flush()?;
        Ok(())
    }

    fn fault(&mut self, id: SpaceId, address: u64, tid: i32) -> Result<()> {
        let since = Instant::now();
        // Decided and done under one guard: an event may not come in between.
        let action = self.drain.shared(|state| -> Result<_> {
            let action = state.pages.fault(id, tid, address);
            let Some(uffd) = state.uffd(id) else { return Ok(None) };
            match action {
                Ok(
                    FaultAction::Zero { start, len_bytes }
                    | FaultAction::AlreadyPresent { start, len_bytes },
                ) => {
                    let filled = fill_zero(uffd, start, len_bytes)?;
                    Ok((!filled).then_some(Next::TryAgain))
                }
                Ok(FaultAction::Fetch { source_address, len_bytes, .. }) => {
                    Ok(Some(Next::Ask { source: source_address, len_bytes }))
                }
                Ok(FaultAction::Wait) | Err(_) => Ok(None),
            }
        })?;
        if let Some(Next::TryAgain) = action {
            self.unanswered.push(Unanswered { space: id, address, tid });
        }
        if let Some(Next::Ask { source, len_bytes }) = action {
            self.drain.pace().hurry();
            if id == SpaceId::PROCESS {
                self.follower.fault(tid, self.drain.pace());
            }
            let alone = self.asked.is_empty();
            let (posted, arrived) = (Instant::now(), Vec::new());
            let asked = Asked { space: id, len_bytes, since, posted, arrived, absent: false };
            let waiting = self.asked.entry(source).or_default();
            waiting.push(asked);
            // Another space may be waiting for the same source page already.
            if waiting.len() == 1 {
                self.unposted
                    .push_back(PageRequest { address: source, len_bytes: len_bytes as u32 });
                self.post()?;
                if alone {
                    // Others may have faulted, too, but this one is not kept waiting while that is found out.
                    self.lane.flush()?;
                }
            }
        }
        Ok(())
    }

    /// Asks for pages, as many as the lane holds; for the others when some have come.
    fn post(&mut self) -> Result<()> {
        while let Some(request) = self.unposted.front() {
            match self.lane.post(*request, request.address) {
                Ok(()) => drop(self.unposted.pop_front()),
                Err(slipstream_transport::Error::QueueFull { .. }) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Takes what the urgent lane has brought.
    fn arrivals(&mut self) -> Result<()> {
        loop {
            let Some(reply) = self.lane.next(Block::No)? else { return Ok(()) };
            let (address, len) = (reply.address, u64::from(reply.len_bytes));
            // Pages of an ordinary size come whole; a huge page comes in parts, from its first on.
            let source = reply.tag;
            let Some(waiting) = self.asked.get_mut(&source) else {
                return Err(Error::Internal("an answer to no fault".into()));
            };
            let whole = waiting.first().is_some_and(|a| a.len_bytes == len);
            match reply.content {
                Content::Data(bytes) if whole => {
                    let bytes = bytes.to_vec();
                    self.finish(source, &bytes, false)?;
                }
                Content::Absent if whole => self.finish(source, &[], true)?,
                Content::Data(bytes) => {
                    let first = &mut waiting[0];
                    first.arrived.extend_from_slice(bytes);
                    if first.arrived.len() as u64 == first.len_bytes {
                        let bytes = std::mem::take(&mut first.arrived);
                        self.finish(source, &bytes, false)?;
                    }
                }
                Content::Absent => {
                    let first = &mut waiting[0];
                    first.arrived.resize(first.arrived.len() + len as usize, 0);
                    if first.arrived.len() as u64 == first.len_bytes {
                        let bytes = std::mem::take(&mut first.arrived);
                        self.finish(source, &bytes, false)?;
                    }
                }
                Content::Failed(errno) => return Err(unreadable(address, errno)),
            }
        }
    }

    /// A page is complete: every space that waits for it gets it.
    fn finish(&mut self, source: u64, bytes: &[u8], absent: bool) -> Result<()> {
        for mut asked in self.asked.remove(&source).unwrap_or_default() {
            asked.absent = absent;
            asked.arrived = bytes.to_vec();
            let (since, not_mapped) = (Instant::now(), NotMapped::default());
            let stuck = Stuck { source, asked, since, not_mapped };
            if let Some(stuck) = self.install(stuck)? {
                self.stuck.push(stuck);
            }
        }
        Ok(())
    }

    /// Installs a page; gives it back if an event must be read first.
    fn install(&mut self, stuck: Stuck) -> Result<Option<Stuck>> {
        let Stuck { source, asked, since, mut not_mapped } = stuck;
        let data =
            if asked.absent { Data::Zeros(asked.len_bytes) } else { Data::Bytes(&asked.arrived) };
        match self.drain.deliver(asked.space, source, data, &mut self.pieces)? {
            Delivered::All => {
                self.drain.shared(|state| state.pages.urgent_done(asked.space, source));
                if self.asked.is_empty() {
                    self.drain.faults_answered();
                }
                // The thread goes on, and likely to its next fault.
                self.drain.pace().hurry_on(since - asked.posted);
                let (read, woken) = (asked.since, Instant::now());
                let moments = Moments { read, asked: asked.posted, arrived: since, woken };
                self.drain.record_fault(&moments);
                Ok(None)
            }
            delivered => {
                if let Some(piece) = not_mapped.after(delivered, Instant::now()) {
                    self.drain.give_up(asked.space, &piece);
                }
                Ok(Some(Stuck { source, asked, since, not_mapped }))
            }
        }
    }

    fn end_surplus(&mut self) {
        self.surplus = self.drain.end_surplus().then(Instant::now);
    }

    fn retry(&mut self) -> Result<()> {
        if !self.unposted.is_empty() {
            self.post()?;
            self.lane.flush()?;
        }
        if self.surplus.is_some_and(|since| since.elapsed() > SURPLUS_PAUSE) {
            self.end_surplus();
        }
        let unanswered = std::mem::take(&mut self.unanswered);
        for Unanswered { space, address, tid } in &unanswered {
            self.fault(*space, *address, *tid)?;
        }
        if !unanswered.is_empty() {
            self.lane.flush()?;
        }
        for stuck in std::mem::take(&mut self.stuck) {
            if let Some(stuck) = self.install(stuck)? {
                self.stuck.push(stuck);
            }
        }
        Ok(())
    }
}

/// The source could not read a page that it said exists.
pub fn unreadable(address: u64, errno: i32) -> Error {
    let why = nix::errno::Errno::from_raw(errno);
    Error::Protocol(format!("the source can't read the page at {address:#x}: {why}"))
}

/// Fills a missing page with zeros; wakes if it is there. False when that must be tried again, an event read first.
fn fill_zero(uffd: &slipstream_core::sys::uffd::Uffd, start: u64, len: u64) -> Result<bool> {
    use slipstream_core::sys::uffd::Installed;
    // The kernel has no ZEROPAGE for huge pages.
    let result = if len == 4096 {
        uffd.zero(start, len)
    } else {
        uffd.copy(start, &vec![0u8; len as usize])
    };
    match result {
        Ok(Installed::All | Installed::Gone) => Ok(true),
        Ok(Installed::Partly(_) | Installed::NoMemory(_)) => Ok(false),
        // Present, or no longer what it was: the access is tried again and says what it wants.
        Ok(Installed::Exists(_) | Installed::NotMapped(_)) => {
            uffd.wake(start, len).map_err(|e| Error::io("wake a thread", e))?;
            Ok(true)
        }
        Err(e) => Err(Error::io(format!("fill the page at {start:#x} with zeros"), e)),
    }
}
