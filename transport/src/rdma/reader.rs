//! The destination's side: an adapter that reads.

use super::choice::{best_pair, local_candidates};
use super::health::Health;
use super::lane::RdmaPageLane;
use super::regions::Regions;
use super::source::{end, here, peer};
use super::sys::{Buffer, Completion, Domain, QueuePair, ReadRequest, Use, status_name};
use super::wire::{
    Candidate, End, Endpoint, Pick, QUEUE_PAIRS_MAX, decode_candidates, decode_endpoint,
    encode_pick, malformed,
};
use super::{PROBE_LEN, Selection, probe_content};
use crate::error::{Error, Result};
use crate::lane::{PAGE_LEN_BYTES, PageLane};
use crate::tcp::TcpPageLane;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// READs that may be posted at a time on one queue pair; each has a buffer slot.
const DEPTH: u32 = 64;
/// For one READ of the probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Most READs that are timed.
const TIMED_READS_MAX: u32 = 10_000;
/// For all of them.
const TIMED_READS_TIMEOUT: Duration = Duration::from_secs(5);

/// An adapter of this host, and queue pairs for the lanes. Queue pairs are dropped before the domain.
#[derive(Debug)]
pub struct Reader {
    pairs: Vec<QueuePair>,
    domain: Arc<Domain>,
    candidate: Candidate,
    health: Arc<Health>,
    /// Of the source: where the probe lies, and its key.
    probe: Option<(u64, u32)>,
}

impl Reader {
    /// Chooses an adapter that fits one of the source's candidates, and makes `lanes` queue pairs. `local` and `peer` are the
    /// addresses that the hosts use for TCP.
    pub fn pick(
        selection: &Selection,
        candidates: &[u8],
        local: IpAddr,
        peer: IpAddr,
        lanes: usize,
    ) -> Result<(Self, Vec<u8>)> {
        if !(1..=QUEUE_PAIRS_MAX).contains(&lanes) {
            return Err(malformed("number of lanes"));
        }
        let theirs = decode_candidates(candidates)?;
        let ours = local_candidates(selection)?;
        let list: Vec<Candidate> = ours.iter().map(|l| l.candidate.clone()).collect();
        let Some((our_index, their_index)) = best_pair(&list, &theirs, (local, peer)) else {
            let what = "no adapter of this host is on a network of one of the source's".into();
            return Err(Error::Rdma { what });
        };
        let chosen = &ours[our_index];
        let (context, candidate) = (Arc::clone(&chosen.context), chosen.candidate.clone());
        let here = here(&candidate)?;
        let health = Arc::new(Health::new(Arc::clone(&context), here));
        let domain = Domain::new(context)?;
        let pairs = (0..lanes).map(|_| QueuePair::new(&domain, DEPTH, here, Use::Target));
        let pairs = pairs.collect::<Result<Vec<_>>>()?;
        let pick = Pick { candidate: their_index as u16, end: end(&candidate, here, &pairs) };
        Ok((Self { pairs, domain, candidate, health, probe: None }, encode_pick(&pick)))
    }

    /// Connects to the source's endpoint, and reads the probe over every queue pair.
    pub fn connect(&mut self, endpoint: &[u8]) -> Result<()> {
        let Endpoint { end, probe_address, probe_rkey, probe_seed } = decode_endpoint(endpoint)?;
        if end.queue_pairs.len() != self.pairs.len() {
            return Err(malformed("number of queue pairs"));
        }
        self.connect_pairs(&end)?;
        self.probe = Some((probe_address, probe_rkey));
        let content = probe_content(probe_seed);
        let buffer = Buffer::new(&self.domain, PROBE_LEN * self.pairs.len(), Use::Target)?;
        let probed = self.pairs.iter().enumerate().try_for_each(|(index, pair)| {
            let request = ReadRequest {
                remote_address: probe_address,
                rkey: probe_rkey,
                offset: index * PROBE_LEN,
                len_bytes: PROBE_LEN as u32,
                signalled: Some(0),
            };
            pair.read(&buffer, &[request])?;
            await_read(pair, || std::thread::sleep(Duration::from_micros(100)))?;
            let right = buffer.bytes(index * PROBE_LEN, PROBE_LEN) == content;
            let wrong =
                || Error::Rdma { what: "a READ brought other bytes than were there".into() };
            right.then_some(()).ok_or_else(wrong)
        });
        if probed.is_err() {
            // Nothing may be written to the buffer once it is gone.
            self.pairs.clear();
        }
        probed
    }

    /// Times READs of a page, one after the other, on the queue pair for faults: from posting to completion, ascending. Of
    /// so many, no more than fit a few seconds.
    pub fn time_reads(&mut self, reads: u32) -> Result<Vec<Duration>> {
        let (Some((remote_address, rkey)), Some(pair)) = (self.probe, self.pairs.first()) else {
            return Ok(Vec::new());
        };
        let buffer = Buffer::new(&self.domain, PAGE_LEN_BYTES as usize, Use::Target)?;
        let mut times = Vec::new();
        let deadline = Instant::now() + TIMED_READS_TIMEOUT;
        let timed = (0..reads.min(TIMED_READS_MAX)).take_while(|_| Instant::now() < deadline);
        let outcome = timed.into_iter().try_for_each(|_| {
            let request = ReadRequest {
                remote_address,
                rkey,
                offset: 0,
                len_bytes: PAGE_LEN_BYTES,
                signalled: Some(0),
            };
            let posted = Instant::now();
            pair.read(&buffer, &[request])?;
            await_read(pair, std::hint::spin_loop)?;
            times.push(posted.elapsed());
            Ok(())
        });
        if let Err(e) = outcome {
            // Nothing may be written to the buffer once it is gone.
            self.pairs.clear();
            return Err(e);
        }
        times.sort_unstable();
        Ok(times)
    }

    fn connect_pairs(&self, end: &End) -> Result<()> {
        self.pairs.iter().enumerate().try_for_each(|(index, pair)| {
            let peer = peer(&self.candidate, end, index).ok_or_else(|| malformed("queue pairs"))?;
            pair.connect(&peer)
        })
    }

    /// How reading goes, for all lanes.
    pub fn health(&self) -> Arc<Health> {
        Arc::clone(&self.health)
    }

    /// Makes lanes, the first of them urgent, that read what regions cover. A lane for which there is no memory is TCP alone.
    pub fn into_lanes(
        self,
        tcp: Vec<TcpPageLane>,
        regions: &Arc<Regions>,
    ) -> Vec<Box<dyn PageLane>> {
        let mut pairs = self.pairs.into_iter();
        let lanes = tcp.into_iter().enumerate().map(|(index, tcp)| -> Box<dyn PageLane> {
            let Some(pair) = pairs.next() else { return Box::new(tcp) };
            let shared = (Arc::clone(regions), Arc::clone(&self.health));
            RdmaPageLane::boxed(tcp, pair, &self.domain, shared, index == 0)
        });
        lanes.collect()
    }
}

/// Takes the completion of the only READ under way.
fn await_read(pair: &QueuePair, pause: impl Fn()) -> Result<()> {
    let deadline = Instant::now() + PROBE_TIMEOUT;
    let mut found = Vec::new();
    while Instant::now() < deadline {
        pair.poll(&mut found)?;
        match found.first() {
            None => pause(),
            Some(Completion { error: None, .. }) => return Ok(()),
            Some(Completion { error: Some(status), .. }) => {
                let what = format!("a READ failed: {}", status_name(*status));
                return Err(Error::Rdma { what });
            }
        }
    }
    Err(Error::Rdma { what: "a READ was not answered".into() })
}
