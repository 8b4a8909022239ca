//! A page lane that reads by RDMA what regions cover, and asks for the rest over TCP.

use super::health::Health;
use super::reads::{Piece, Read, Reads};
use super::regions::{Part, Regions};
use super::sys::{
    Buffer, Completion, Domain, QueuePair, ReadRequest, Use, status_name, unwatch, watch,
};
use crate::error::{Error, Result};
use crate::lane::{
    Block, Content, OUTSTANDING_REQUESTS_MAX, PageLane, PageReply, PageRequest, WindowLimits,
};
use crate::tcp::TcpPageLane;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollTimeout};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Buffer slots of the urgent lane: faults ask for a page, or for a huge one.
const URGENT_SLOTS: u16 = 64;
const URGENT_SLOT_LEN: u32 = 64 << 10;
/// Of a bulk lane: 6 MiB.
const BULK_SLOTS: u16 = 24;
const BULK_SLOT_LEN: u32 = 256 << 10;
/// A READ that takes this long has failed. Most adapters give up themselves before.
const READ_TIMEOUT: Duration = Duration::from_secs(4);
/// Longest sleep before looking at the adapter's health.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Bounds on how long an expected completion is polled for rather than slept on.
const SPIN_MIN: Duration = Duration::from_micros(20);
const SPIN_MAX: Duration = Duration::from_millis(2);

/// The destination's end of a lane. Fields are dropped in this order: the queue pair before the buffer that it writes to.
pub(super) struct RdmaPageLane {
    pair: QueuePair,
    buffer: Buffer,
    slot_len: u32,
    slots: u16,
    tcp: TcpPageLane,
    regions: Arc<Regions>,
    health: Arc<Health>,
    reads: Reads,
    /// RDMA is over for this lane.
    over: bool,
    urgent: bool,
    /// The next completion makes the channel readable.
    armed: bool,
    epoll: Epoll,
    completions: Vec<Completion>,
    parts: Vec<Part>,
    started: Vec<Read>,
    /// When READs were posted last, and how long they take of late.
    posted: Instant,
    usual: Duration,
}

impl RdmaPageLane {
    /// Makes a lane; one of TCP alone where an adapter's memory can't be had.
    pub(super) fn boxed(
        tcp: TcpPageLane,
        pair: QueuePair,
        domain: &Arc<Domain>,
        (regions, health): (Arc<Regions>, Arc<Health>),
        urgent: bool,
    ) -> Box<dyn PageLane> {
        let (slots, slot_len) =
            if urgent { (URGENT_SLOTS, URGENT_SLOT_LEN) } else { (BULK_SLOTS, BULK_SLOT_LEN) };
        let len = usize::from(slots) * slot_len as usize;
        let made = Buffer::new(domain, len, Use::Target)
            .and_then(|buffer| Ok((buffer, watch(&pair, tcp.raw_fd())?)));
        let (buffer, epoll) = match made {
            Ok(made) => made,
            Err(e) => {
                health.fail(e.to_string());
                return Box::new(tcp);
            }
        };
        Box::new(Self {
            pair,
            buffer,
            slot_len,
            slots,
            tcp,
            regions,
            health,
            reads: Reads::new(slots),
            over: false,
            urgent,
            armed: false,
            epoll,
            completions: Vec::new(),
            parts: Vec::new(),
            started: Vec::new(),
            posted: Instant::now(),
            usual: SPIN_MIN,
        })
    }

    /// Posts the READs of requests that there are buffers for, by one call.
    fn start(&mut self) -> Result<()> {
        self.started.clear();
        self.reads.start(&mut self.started);
        if self.started.is_empty() {
            return Ok(());
        }
        let slot_len = self.slot_len as usize;
        let requests: Vec<ReadRequest> = self
            .started
            .iter()
            .map(|read| ReadRequest {
                remote_address: read.part.address,
                rkey: read.part.rkey,
                offset: usize::from(read.slot) * slot_len,
                len_bytes: read.part.len_bytes,
                signalled: read.signalled,
            })
            .collect();
        self.posted = Instant::now();
        if self.armed && self.pair.take_notice() {
            self.armed = false;
        }
        if let Err(e) = self.pair.read(&self.buffer, &requests) {
            self.health.fail(e.to_string());
        }
        self.look()
    }

    /// Goes on over TCP when reading has failed, here or in another lane.
    fn look(&mut self) -> Result<()> {
        if self.over {
            return Ok(());
        }
        if !self.health.has_failed() {
            return Ok(());
        }
        self.over = true;
        unwatch(&self.epoll, &self.pair);
        self.pair.stop();
        for (request, tag) in self.reads.give_up() {
            self.tcp.post(request, tag)?;
        }
        self.tcp.flush()
    }

    /// Takes completions until a request has arrived whole; true if one has.
    fn arrived(&mut self) -> Result<bool> {
        if self.over {
            return Ok(false);
        }
        if self.completions.is_empty() {
            let found = &mut self.completions;
            if let Err(e) = self.pair.poll(found) {
                self.health.fail(e.to_string());
            }
            // They are taken from the end.
            self.completions.reverse();
        }
        let Some(completion) = self.completions.pop() else { return Ok(false) };
        match completion.error {
            None if self.reads.complete(completion.number) => {
                self.usual = (self.usual * 7 + self.posted.elapsed()) / 8;
                return Ok(true);
            }
            None => self.health.fail("a READ completed out of order".into()),
            Some(status) => self.health.fail(format!("a READ failed: {}", status_name(status))),
        }
        self.look()?;
        Ok(false)
    }

    /// Has the descriptor become readable by the next completion; true if one has come meanwhile.
    fn arm(&mut self) -> Result<bool> {
        if self.over {
            return Ok(false);
        }
        // Left there, it would keep the descriptor readable.
        if self.armed && self.pair.take_notice() {
            self.armed = false;
        }
        if !self.reads.is_posted() {
            return Ok(false);
        }
        if !self.armed {
            self.armed = true;
            if let Err(e) = self.pair.arm() {
                self.health.fail(e.to_string());
                self.look()?;
            }
        }
        self.arrived()
    }

    /// A fault's page is expected so soon that it is worth waiting for.
    fn is_soon(&self) -> bool {
        let expected = (self.usual * 4).clamp(SPIN_MIN, SPIN_MAX);
        self.urgent && self.reads.is_posted() && !self.armed && self.posted.elapsed() < expected
    }

    fn is_overdue(&self) -> bool {
        self.reads.is_posted() && self.posted.elapsed() > READ_TIMEOUT
    }

    fn reply(&self, piece: Piece) -> PageReply<'_> {
        let Piece { tag, address, slot, offset, len_bytes } = piece;
        self.health.count(u64::from(len_bytes));
        let at = usize::from(slot) * self.slot_len as usize + offset as usize;
        let content = Content::Data(self.buffer.bytes(at, len_bytes as usize));
        PageReply { tag, address, len_bytes, content }
    }

    /// Waits for either way; false when the time is up.
    fn wait(&mut self, block: Block) -> Result<bool> {
        if self.is_overdue() {
            self.health.fail("a READ was not answered".into());
            self.look()?;
        }
        if block == Block::No {
            return Ok(false);
        }
        // What the socket did not take before.
        self.tcp.flush()?;
        let now = Instant::now();
        let until = match block {
            Block::No => now,
            Block::Until(until) if until <= now => return Ok(false),
            Block::Until(until) => until.min(now + LOOK_INTERVAL),
            Block::Forever => now + LOOK_INTERVAL,
        };
        let left_ms = (until - now).as_millis() as u16 + 1;
        let mut ready = [EpollEvent::empty(); 2];
        match self.epoll.wait(&mut ready, EpollTimeout::from(left_ms)) {
            Ok(_) | Err(Errno::EINTR) => Ok(true),
            Err(errno) => Err(Error::Rdma { what: format!("wait for pages: {errno}") }),
        }
    }
}

impl PageLane for RdmaPageLane {
    fn post(&mut self, request: PageRequest, tag: u64) -> Result<()> {
        let PageRequest { address, len_bytes } = request;
        if !request.is_valid() {
            return Err(Error::BadRequest { address, len_bytes });
        }
        let covered = !self.over
            && self.regions.parts(address, len_bytes, self.slot_len, &mut self.parts)
            && self.parts.len() <= usize::from(self.slots);
        // Bounded together: should reading fail, all of them have to fit the connection.
        let requests = self.reads.requests() + self.tcp.outstanding_requests();
        if requests >= OUTSTANDING_REQUESTS_MAX {
            return Err(Error::QueueFull { peer: "the adapter".into() });
        }
        if !covered {
            return self.tcp.post(request, tag);
        }
        self.reads.add(request, tag, &self.parts);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.over {
            self.start()?;
        }
        self.tcp.flush()
    }

    fn next(&mut self, block: Block) -> Result<Option<PageReply<'_>>> {
        loop {
            if let Some(piece) = self.reads.piece() {
                return Ok(Some(self.reply(piece)));
            }
            self.look()?;
            if self.arrived()? {
                continue;
            }
            if !self.over {
                // Slots may have become free.
                self.start()?;
            }
            // A caller that polls does not sleep on the descriptor yet, and a look at the socket is a system call.
            let soon = block == Block::No && self.is_soon();
            let look_at_tcp = !soon || self.tcp.outstanding_requests() > 0;
            if look_at_tcp && self.tcp.has_reply()? {
                return self.tcp.next(Block::No);
            }
            if soon {
                return Ok(None);
            }
            if self.arm()? {
                continue;
            }
            if !self.wait(block)? {
                return Ok(None);
            }
        }
    }

    fn outstanding_bytes(&self) -> u64 {
        self.reads.outstanding_bytes() + self.tcp.outstanding_bytes()
    }

    fn raw_fd(&self) -> Option<RawFd> {
        Some(self.epoll.0.as_raw_fd())
    }

    fn window_limits(&self) -> WindowLimits {
        if self.over { WindowLimits::TCP } else { WindowLimits::RDMA }
    }

    fn busy_poll(&self) -> bool {
        // Until the descriptor tells of the next completion.
        let untold = self.reads.is_posted() && !self.armed;
        !self.over && (self.health.has_failed() || untold || self.is_overdue())
    }
}

#[cfg(test)]
#[path = "lane_tests.rs"]
mod tests;
