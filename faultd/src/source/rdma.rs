//! RDMA on the source: what it offers, the connection, and the frozen copy's memory made readable piece by piece.

use crate::carrier::{Carrier, Wish};
use crate::control::{hear_destination, say_to_destination, unexpected};
use crate::error::Result;
use crate::protocol::{
    DestinationMessage, RdmaVerdict, RegionKey, Regions, SourceMessage, Verdict,
};
use slipstream_core::capture::frozen_memory::FrozenMemory;
use slipstream_core::inject::SourceScratch;
use slipstream_core::register::{Plan, RUN_BYTES_MIN, Registrar, Target};
use slipstream_core::sys::pagemap::PageRun;
use slipstream_transport::rdma::Source;
use slipstream_transport::{Receiver, Sender};
use std::net::IpAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// What the source has for RDMA before the destination has said what it has.
#[derive(Debug)]
pub struct Offer {
    source: Option<Source>,
    /// For the hello; empty where there is nothing to offer.
    pub candidates: Vec<u8>,
    why_tcp: String,
}

/// What the two hosts have agreed on.
#[derive(Debug)]
pub struct Agreed {
    /// Connected to the destination, and read from once.
    pub source: Option<Source>,
    /// Why it is TCP, if it is.
    pub why_tcp: String,
    /// Median of the READs that the destination timed, nanoseconds; zero for none.
    pub read_ns_p50: u64,
    /// Their 99th percentile.
    pub read_ns_p99: u64,
}

impl Offer {
    /// Looks for adapters; `local` is the address that the destination knows this host by.
    pub fn new(carrier: &Carrier, local: IpAddr) -> Self {
        let none = |why_tcp| Self { source: None, candidates: Vec::new(), why_tcp };
        if carrier.wish == Wish::Tcp {
            return none("TCP was asked for".into());
        }
        match Source::candidates(&carrier.selection, local) {
            Ok((source, candidates)) => {
                Self { source: Some(source), candidates, why_tcp: String::new() }
            }
            Err(e) => none(e.to_string()),
        }
    }

    /// Why it can't be RDMA, as far as is known without connecting.
    pub fn hindrance(&self, verdict: &Verdict) -> Option<String> {
        match &self.source {
            None => Some(self.why_tcp.clone()),
            Some(_) if verdict.rdma_pick.is_empty() => {
                let clean = |c: &char| !c.is_control();
                Some(verdict.why_tcp.chars().filter(clean).take(300).collect())
            }
            Some(_) => None,
        }
    }

    /// Connects, and hears whether the destination can read. Only a broken control connection is an error.
    pub fn connect(
        self,
        verdict: &Verdict,
        sender: &mut Sender,
        receiver: &mut Receiver,
        timeout: Duration,
    ) -> Result<Agreed> {
        if let Some(why_tcp) = self.hindrance(verdict) {
            return Ok(Agreed::tcp(why_tcp));
        }
        let Some(mut source) = self.source else { return unexpected("an adapter") };
        let lanes = verdict.bulk_lanes.min(64) as usize + 1;
        let (endpoint, ours) = match source.connect(&verdict.rdma_pick, lanes) {
            Ok(endpoint) => (endpoint, None),
            Err(e) => (Vec::new(), Some(e.to_string())),
        };
        say_to_destination(sender, SourceMessage::RdmaEndpoint(endpoint))?;
        let theirs = match hear_destination(receiver, Some(timeout))? {
            DestinationMessage::RdmaVerdict(verdict) => verdict,
            _ => return unexpected("whether RDMA works"),
        };
        let RdmaVerdict { reason, read_ns_p50, read_ns_p99 } = theirs;
        Ok(match ours.or_else(|| (!reason.is_empty()).then_some(reason)) {
            None => {
                let why_tcp = String::new();
                Agreed { source: Some(source), why_tcp, read_ns_p50, read_ns_p99 }
            }
            Some(why_tcp) => Agreed::tcp(why_tcp),
        })
    }
}

impl Agreed {
    fn tcp(why_tcp: String) -> Self {
        Self { source: None, why_tcp, read_ns_p50: 0, read_ns_p99: 0 }
    }
}

/// The sending half of the control connection, for two threads.
#[derive(Clone, Debug)]
pub struct SharedSender(Arc<Mutex<Sender>>);

impl SharedSender {
    /// Shares it.
    pub fn new(sender: Sender) -> Self {
        Self(Arc::new(Mutex::new(sender)))
    }

    /// Takes it for a message.
    pub fn lock(&self) -> MutexGuard<'_, Sender> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is made readable, and how the destination hears of it.
#[derive(Debug)]
pub struct Registration {
    /// The adapter.
    pub source: Arc<Source>,
    /// The frozen copy's memory.
    pub memory: Arc<FrozenMemory>,
    /// The frozen copy.
    pub pid: i32,
    /// Ours in it.
    pub scratch: Range<u64>,
    /// Where the destination waits for a page.
    pub hot: Arc<AtomicU64>,
    /// To the destination.
    pub sender: SharedSender,
    /// Counts what has been registered.
    pub registered_bytes: Arc<AtomicU64>,
}

/// A thread that registers memory. Dropping it ends it; regions stay until the adapter is dropped.
#[derive(Debug)]
pub struct Registering {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Registering {
    /// Starts it.
    pub fn start(registration: Registration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            slipstream_core::sys::task::give_way();
            // What is not registered is served over TCP.
            if let Err(e) = registration.run(&told) {
                tracing::warn!("registering memory: {e}");
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Registering {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Registration {
    fn run(&self, stop: &AtomicBool) -> Result<()> {
        let mut plan = Plan::default();
        let go_on = || !stop.load(Ordering::SeqCst);
        let mut add = |run: PageRun| plan.add(run.start..run.end);
        self.memory.scan_pinnable(RUN_BYTES_MIN, &mut add, &go_on)?;
        plan.seal();
        if plan.bytes() == 0 {
            return Ok(());
        }
        let scratch = SourceScratch::find(self.pid, self.scratch.clone())?;
        let target =
            Target { pd_handle: self.source.pd_handle(), driver_id: self.source.driver_id() };
        let registrar = Registrar::open(&scratch, self.source.command_fd(), target)?;
        let done = self.register(&registrar, &mut plan, stop);
        registrar.close()?;
        done
    }

    fn register(
        &self,
        registrar: &Registrar<'_>,
        plan: &mut Plan,
        stop: &AtomicBool,
    ) -> Result<()> {
        while !stop.load(Ordering::SeqCst) {
            let hot = Some(self.hot.load(Ordering::Relaxed)).filter(|at| *at != 0);
            let batch = plan.batch(hot);
            if batch.is_empty() {
                break;
            }
            let results = registrar.register(&batch)?;
            for (range, result) in batch.iter().zip(&results) {
                if let Err(e) = result {
                    tracing::debug!("{:#x}-{:#x} is not registered: {e}", range.start, range.end);
                }
            }
            let keys = results.iter().flatten().map(|r| RegionKey {
                start: r.start,
                len_bytes: r.len_bytes,
                rkey: r.rkey,
            });
            let bytes = results.iter().flatten().map(|r| r.len_bytes).sum();
            self.registered_bytes.fetch_add(bytes, Ordering::Relaxed);
            let regions = Regions::pack(keys);
            if !regions.records.is_empty() {
                say_to_destination(&mut self.sender.lock(), SourceMessage::Regions(regions))?;
            }
        }
        Ok(())
    }
}
