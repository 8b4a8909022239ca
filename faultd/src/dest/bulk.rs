//! Prefetch: one thread a bulk lane. It keeps the lane's pipeline full with runs, and installs what
//! arrives.

use crate::dest::drain::Drain;
use crate::dest::faults::unreadable;
use crate::dest::install::{Data, Delivered, NotMapped};
use crate::dest::limit::Limit;
use crate::dest::window::Window;
use crate::error::{Error, Result};
use crate::pages::{Piece, RunClaim};
use crate::placement::Placement;
use slipstream_core::manifest::PAGE_SIZE_MAX;
use slipstream_core::sys::task;
use slipstream_transport::lane::REQUEST_LEN_BYTES_MAX;
use slipstream_transport::{Block, Content, PageLane, PageReply, PageRequest};
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest run asked for at once.
const RUN_BYTES_MAX: u64 = 256 << 10;
/// A page is asked for as a whole.
const _: () = assert!(PAGE_SIZE_MAX <= REQUEST_LEN_BYTES_MAX as u64);
/// While faults come, so much is installed at a time: the fault thread waits for its end.
const HURRIED_LEN_MAX: usize = 16 << 10;
/// Longest wait for work before looking whether the drain has ended.
const IDLE: Duration = Duration::from_millis(50);
/// Pause while the fault thread reads the event that keeps a copy out.
const BLOCKED_PAUSE: Duration = Duration::from_micros(20);
/// Pause while this host has no memory for a page.
const NO_MEMORY_PAUSE: Duration = Duration::from_millis(20);

struct Worker {
    drain: Arc<Drain>,
    lane: Box<dyn PageLane>,
    runs: VecDeque<Run>,
    next_tag: u64,
    pieces: Vec<Piece>,
    placement: Placement,
    window: Window,
    limit: Limit,
    /// There was nothing to ask for.
    rests: bool,
}

/// A run under way.
struct Run {
    /// Of the request. Runs of forked children may be of the same source pages.
    tag: u64,
    claim: RunClaim,
    posted: Instant,
    answered: u64,
    /// Page size of the region; larger than 4096 only for huge pages, which are put together here.
    page_size: u64,
    partial: Vec<u8>,
}

/// Starts the thread of a lane. Failures are noted in the drain.
pub fn start(drain: Arc<Drain>, lane: Box<dyn PageLane>, limit: Limit) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let _guard = drain.fail_on_panic();
        task::give_way();
        let mut worker = Worker {
            drain,
            lane,
            runs: VecDeque::new(),
            next_tag: 0,
            pieces: Vec::new(),
            placement: Placement::of_this_thread(),
            window: Window::new(Instant::now()),
            limit,
            rests: false,
        };
        if let Err(e) = worker.run() {
            for run in &worker.runs {
                worker.drain.finish_run(&run.claim);
            }
            worker.drain.fail(e);
        }
    })
}

impl Worker {
    fn run(&mut self) -> Result<()> {
        let mut seen = 0;
        while !self.drain.has_ended() {
            self.placement.make_room(self.drain.pace());
            self.fill()?;
            if self.runs.is_empty() {
                if let Some(pause) = self.limit.wait(Instant::now()) {
                    std::thread::sleep(pause.min(IDLE));
                } else {
                    self.rest(true);
                    self.drain.wait_news(&mut seen, IDLE);
                }
                continue;
            }
            self.take_reply()?;
        }
        Ok(())
    }

    fn rest(&mut self, rests: bool) {
        if self.rests != rests {
            self.rests = rests;
            self.drain.lane_rests(rests);
        }
    }

    fn fill(&mut self) -> Result<()> {
        let limits = self.lane.window_limits();
        let mut window = self.window.bytes(limits);
        if self.drain.pace().is_hurried() {
            window = window.min(limits.hurried);
        }
        while self.lane.outstanding_bytes() < window {
            // At least two requests under way, or the pipe runs dry between them.
            let allowed = self.limit.run_bytes_max(Instant::now());
            let len_max = (window / 2).min(RUN_BYTES_MAX).min(allowed);
            if len_max == 0 {
                break;
            }
            let Some(claim) = self.drain.next_run(len_max) else { break };
            self.rest(false);
            self.limit.spend(claim.len_bytes);
            let page_size = self.drain.shared(|state| {
                let space = state.pages.space(claim.space);
                space.and_then(|s| s.locate(claim.current_address)).map_or(4096, |l| l.page_size)
            });
            let request =
                PageRequest { address: claim.source_address, len_bytes: claim.len_bytes as u32 };
            let (posted, partial) = (Instant::now(), Vec::new());
            let tag = self.next_tag;
            self.next_tag += 1;
            self.runs.push_back(Run { tag, claim, posted, answered: 0, page_size, partial });
            self.lane.post(request, tag)?;
        }
        Ok(self.lane.flush()?)
    }

    fn take_reply(&mut self) -> Result<()> {
        let until = Block::Until(Instant::now() + IDLE);
        let Some(reply) = self.lane.next(until)? else { return Ok(()) };
        let Some(index) = self.runs.iter().position(|r| r.tag == reply.tag) else {
            return Err(Error::Internal("an answer to no run".into()));
        };
        let (run, now) = (&mut self.runs[index], Instant::now());
        if run.answered == 0 {
            self.window.delay(now - run.posted);
        }
        self.window.arrived(u64::from(reply.len_bytes), now);
        run.answered += u64::from(reply.len_bytes);
        land(&self.drain, run, &reply, &mut self.pieces)?;
        if run.answered >= run.claim.len_bytes {
            let claim = run.claim;
            self.runs.remove(index);
            self.drain.finish_run(&claim);
        }
        Ok(())
    }
}

/// Installs a reply; of huge pages, as soon as one is whole.
fn land(
    drain: &Drain,
    run: &mut Run,
    reply: &PageReply<'_>,
    pieces: &mut Vec<Piece>,
) -> Result<()> {
    let len = u64::from(reply.len_bytes);
    if run.page_size == 4096 {
        return match reply.content {
            Content::Data(bytes) => {
                let len_max = if drain.pace().is_hurried() { HURRIED_LEN_MAX } else { usize::MAX };
                let mut address = reply.address;
                for part in bytes.chunks(len_max) {
                    drain.give_way();
                    deliver(drain, run, address, Data::Bytes(part), pieces)?;
                    address += part.len() as u64;
                }
                Ok(())
            }
            Content::Absent => deliver(drain, run, reply.address, Data::Zeros(len), pieces),
            Content::Failed(errno) => Err(unreadable(reply.address, errno)),
        };
    }
    match reply.content {
        Content::Data(bytes) => run.partial.extend_from_slice(bytes),
        Content::Absent => run.partial.resize(run.partial.len() + len as usize, 0),
        Content::Failed(errno) => return Err(unreadable(reply.address, errno)),
    }
    let size = run.page_size as usize;
    while run.partial.len() >= size {
        let arrived = run.partial.len() as u64;
        let source = reply.address + len - arrived;
        let page: Vec<u8> = run.partial.drain(..size).collect();
        deliver(drain, run, source, Data::Bytes(&page), pieces)?;
    }
    Ok(())
}

fn deliver(
    drain: &Drain,
    run: &Run,
    source: u64,
    data: Data<'_>,
    pieces: &mut Vec<Piece>,
) -> Result<()> {
    let mut not_mapped = NotMapped::default();
    loop {
        let delivered = drain.deliver(run.claim.space, source, data, pieces)?;
        if delivered == Delivered::All || drain.has_ended() {
            return Ok(());
        }
        if let Some(piece) = not_mapped.after(delivered, Instant::now()) {
            drain.give_up(run.claim.space, &piece);
        }
        let short = delivered == Delivered::NoMemory;
        std::thread::sleep(if short { NO_MEMORY_PAUSE } else { BLOCKED_PAUSE });
    }
}
