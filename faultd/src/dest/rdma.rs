//! RDMA on the destination: the choice of an adapter, and what of the source's memory can be read.

use crate::carrier::{Carrier, Wish, refusal};
use crate::control::{hear_source, say_to_source, unexpected};
use crate::dest::drain::Drain;
use crate::dest::faults;
use crate::error::{Error, Result};
use crate::protocol::{DestinationMessage, RdmaVerdict, Reason, Regions as Told, SourceMessage};
use slipstream_transport::rdma::{Health, Reader, Regions};
use slipstream_transport::{Channel, Pace, PageLane, Receiver, Sender, TcpPageLane};
use std::net::IpAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// What this host would read by.
#[derive(Debug, Default)]
pub struct Choice {
    reader: Option<Reader>,
    /// For the verdict; empty for TCP.
    pub pick: Vec<u8>,
    /// Why, if it is TCP.
    pub why_tcp: String,
}

impl Choice {
    /// Chooses among the source's candidates. `ends` are this host's address and the source's, as the control
    /// connection has them. An error means that this host takes nothing but RDMA.
    pub fn new(
        carrier: &Carrier,
        candidates: &[u8],
        ends: (IpAddr, IpAddr),
        lanes: usize,
    ) -> Result<Self> {
        let why_tcp = if carrier.wish == Wish::Tcp {
            "the destination's agent was started with --transport tcp".to_owned()
        } else if candidates.is_empty() {
            "the source has no adapter for it, or was told to use TCP".to_owned()
        } else {
            match Reader::pick(&carrier.selection, candidates, ends.0, ends.1, lanes) {
                Ok((reader, pick)) => {
                    return Ok(Self { reader: Some(reader), pick, why_tcp: String::new() });
                }
                Err(e) => format!("destination: {e}"),
            }
        };
        if carrier.wish == Wish::Rdma {
            return Err(refusal(&why_tcp));
        }
        Ok(Self { reader: None, pick: Vec::new(), why_tcp })
    }

    /// Connects to the source's adapter and reads, once or as often as shall be timed. Where that fails it will be TCP;
    /// only a broken control connection is an error.
    pub fn connect(
        &mut self,
        (sender, receiver): (&mut Sender, &mut Receiver),
        timeout: Duration,
        timed_reads: u32,
    ) -> Result<()> {
        let Some(reader) = &mut self.reader else { return Ok(()) };
        let endpoint = match hear_source(receiver, Some(timeout))? {
            SourceMessage::RdmaEndpoint(endpoint) => endpoint,
            _ => return unexpected("the source's end of an RDMA connection"),
        };
        let tried = reader.connect(&endpoint).and_then(|()| reader.time_reads(timed_reads));
        let (reason, times) = match tried {
            Ok(times) => (String::new(), times),
            Err(e) => (format!("destination: {e}"), Vec::new()),
        };
        let at = |percent: usize| {
            times.get(times.len() * percent / 100).map_or(0, |t| t.as_nanos() as u64)
        };
        let (read_ns_p50, read_ns_p99) = (at(50), at(99));
        if !reason.is_empty() || endpoint.is_empty() {
            self.reader = None;
        }
        let verdict = RdmaVerdict { reason, read_ns_p50, read_ns_p99 };
        say_to_source(sender, DestinationMessage::RdmaVerdict(verdict))
    }

    /// Makes lanes of connections, which read by RDMA where they can.
    pub fn lanes(self, urgent: Channel, bulk: Vec<Channel>, pace: &Arc<Pace>) -> PageLanes {
        let bulk = bulk.into_iter().map(|c| TcpPageLane::new(c).with_pace(Arc::clone(pace)));
        let tcp = std::iter::once(TcpPageLane::new(urgent)).chain(bulk);
        let Some(reader) = self.reader else {
            let boxed: Vec<_> = tcp.map(|lane| Box::new(lane) as Box<dyn PageLane>).collect();
            return PageLanes::new(boxed, None);
        };
        let regions = Arc::new(Regions::default());
        let health = reader.health();
        let lanes = reader.into_lanes(tcp.collect(), &regions);
        PageLanes::new(lanes, Some(Watch { regions, health, told: false }))
    }
}

/// The lanes of a drain.
pub struct PageLanes {
    /// Until a thread answers faults by it.
    urgent: Option<Box<dyn PageLane>>,
    /// For prefetch.
    pub bulk: Vec<Box<dyn PageLane>>,
    /// Of RDMA, if they read by it.
    pub watch: Option<Watch>,
}

impl PageLanes {
    /// The first lane is the urgent one.
    fn new(lanes: Vec<Box<dyn PageLane>>, watch: Option<Watch>) -> Self {
        let mut lanes = lanes.into_iter();
        Self { urgent: lanes.next(), bulk: lanes.collect(), watch }
    }

    /// Starts the thread that answers faults; once.
    pub fn start_faults(&mut self, drain: &Arc<Drain>) -> Result<JoinHandle<()>> {
        let urgent = self.urgent.take();
        let urgent = urgent.ok_or_else(|| Error::Internal("no urgent lane".into()))?;
        faults::start(Arc::clone(drain), urgent)
    }
}

/// What a session looks after while pages are read by RDMA.
#[derive(Debug)]
pub struct Watch {
    regions: Arc<Regions>,
    health: Arc<Health>,
    told: bool,
}

impl Watch {
    /// The source has made memory readable.
    pub fn add(&self, told: &Told) -> Result<()> {
        let malformed = || Error::Protocol("malformed regions".into());
        for r in told.unpack().ok_or_else(malformed)? {
            self.regions.add(r.start, r.len_bytes, r.rkey)?;
        }
        Ok(())
    }

    /// Why reading has failed, once.
    pub fn news(&mut self) -> Option<Reason> {
        if self.told {
            return None;
        }
        let reason = self.health.failure()?;
        self.told = true;
        Some(Reason { reason, remedy: String::new() })
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.health.bytes()
    }
}
