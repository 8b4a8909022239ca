//! The source's side: an adapter that answers READs. It posts nothing itself.

use super::choice::{Local, READS_MAX, local_candidates};
use super::sys::{Buffer, Domain, Here, Peer, QueuePair, Use};
use super::wire::{
    Candidate, End, Endpoint, Link, QUEUE_PAIRS_MAX, decode_pick, encode_candidates,
    encode_endpoint, malformed,
};
use super::{PROBE_LEN, Selection, probe_content};
use crate::error::{Error, Result};
use ring::rand::{SecureRandom, SystemRandom};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Adapters to choose from, then the one that was chosen.
#[derive(Debug)]
pub struct Source {
    candidates: Vec<Local>,
    connected: Option<Connected>,
}

/// Fields are dropped in this order: queue pairs before the memory that they give access to.
#[derive(Debug)]
struct Connected {
    _pairs: Vec<QueuePair>,
    _probe: Buffer,
    domain: Arc<Domain>,
    driver_id: u32,
}

impl Source {
    /// Opens the adapters; with them comes what the destination chooses from, those with the address `local` first.
    pub fn candidates(selection: &Selection, local: IpAddr) -> Result<(Self, Vec<u8>)> {
        let mut candidates = local_candidates(selection)?;
        candidates.sort_by_key(|c| c.candidate.ip() != Some(local));
        let told: Vec<Candidate> = candidates.iter().map(|c| c.candidate.clone()).collect();
        Ok((Self { candidates, connected: None }, encode_candidates(&told)))
    }

    /// Makes `lanes` queue pairs, connected to those of the destination's pick.
    pub fn connect(&mut self, pick: &[u8], lanes: usize) -> Result<Vec<u8>> {
        let pick = decode_pick(pick)?;
        let local = self.candidates.get(usize::from(pick.candidate));
        let Local { context, candidate } = local.ok_or_else(|| malformed("choice"))?.clone();
        if pick.end.queue_pairs.len() != lanes || lanes > QUEUE_PAIRS_MAX {
            return Err(malformed("number of queue pairs"));
        }
        let no_driver = || Error::Rdma {
            what: format!(
                "the driver of {} registers no memory of other processes",
                context.name()
            ),
        };
        let driver_id = context.driver_id().ok_or_else(no_driver)?;
        let domain = Domain::new(Arc::clone(&context))?;
        let here = here(&candidate)?;
        let pairs = connect(&domain, here, &candidate, &pick.end, 1)?;
        let probe_seed = random()?;
        let mut probe = Buffer::new(&domain, PROBE_LEN, Use::Source)?;
        probe.fill(&probe_content(probe_seed));
        let endpoint = Endpoint {
            end: end(&candidate, here, &pairs),
            probe_address: probe.address(),
            probe_rkey: probe.rkey(),
            probe_seed,
        };
        self.connected = Some(Connected { _pairs: pairs, _probe: probe, domain, driver_id });
        self.candidates.clear();
        Ok(encode_endpoint(&endpoint))
    }

    fn connected(&self) -> &Connected {
        self.connected.as_ref().expect("connected before use")
    }

    /// Where tests register memory of their own.
    #[cfg(test)]
    pub(super) fn domain(&self) -> &Arc<Domain> {
        &self.connected().domain
    }

    /// The open device.
    ///
    /// # Panics
    /// Before [`Source::connect`] has succeeded.
    pub fn command_fd(&self) -> BorrowedFd<'_> {
        self.connected().domain.context().command_fd()
    }

    /// The kernel's number of the protection domain.
    ///
    /// # Panics
    /// Before [`Source::connect`] has succeeded.
    pub fn pd_handle(&self) -> u32 {
        self.connected().domain.handle()
    }

    /// The kernel's number of the driver.
    ///
    /// # Panics
    /// Before [`Source::connect`] has succeeded.
    pub fn driver_id(&self) -> u32 {
        self.connected().driver_id
    }
}

pub(super) fn random() -> Result<u64> {
    let mut bytes = [0; 8];
    let failed = |_| Error::Rdma { what: "no random numbers".into() };
    SystemRandom::new().fill(&mut bytes).map_err(failed)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Our address on a candidate's port.
pub(super) fn here(candidate: &Candidate) -> Result<Here> {
    Ok(Here {
        port: candidate.port,
        ethernet: candidate.link == Link::Ethernet,
        gid_index: candidate.gid_index,
        gid: candidate.gid,
        psn: (random()? & 0xff_ffff) as u32,
    })
}

/// What the peer has to know of our end.
pub(super) fn end(candidate: &Candidate, here: Here, pairs: &[QueuePair]) -> End {
    End {
        lid: candidate.lid,
        mtu: candidate.mtu,
        reads_answered: candidate.reads_answered,
        gid: candidate.gid,
        psn: here.psn,
        queue_pairs: pairs.iter().map(QueuePair::number).collect(),
    }
}

/// What queue pair `index` of ours has to know of the peer's.
pub(super) fn peer(candidate: &Candidate, end: &End, index: usize) -> Option<Peer> {
    Some(Peer {
        queue_pair: *end.queue_pairs.get(index)?,
        lid: end.lid,
        gid: end.gid,
        psn: end.psn,
        mtu: end.mtu.min(candidate.mtu),
        reads: end.reads_answered.min(candidate.reads_answered).clamp(1, READS_MAX),
    })
}

/// Makes queue pairs, one for each of the peer's, and connects them.
fn connect(
    domain: &Arc<Domain>,
    here: Here,
    candidate: &Candidate,
    theirs: &End,
    depth: u32,
) -> Result<Vec<QueuePair>> {
    let pairs = (0..theirs.queue_pairs.len()).map(|index| {
        let pair = QueuePair::new(domain, depth, here, Use::Source)?;
        let peer = peer(candidate, theirs, index).ok_or_else(|| malformed("queue pairs"))?;
        pair.connect(&peer)?;
        Ok(pair)
    });
    pairs.collect()
}
