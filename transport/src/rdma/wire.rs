//! The three messages by which two adapters find each other. Little-endian; every count is bounded, and trailing bytes are refused.

use crate::error::{Error, Result};
use std::net::{IpAddr, Ipv6Addr};

/// Most candidates of one host.
pub(super) const CANDIDATES_MAX: usize = 64;
/// Most queue pairs of one migration.
pub(super) const QUEUE_PAIRS_MAX: usize = 16;
const NAME_LEN_MAX: usize = 64;

/// What is below the transport: an address of one kind can't reach the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// `InfiniBand`, addressed by LID.
    InfiniBand,
    /// Ethernet, `RoCEv2`, addressed by GID.
    Ethernet,
}

/// A port that is up, with one of its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Device, for messages.
    pub device: String,
    /// Port of it.
    pub port: u8,
    /// Its link.
    pub link: Link,
    /// Address on `InfiniBand`.
    pub lid: u16,
    /// Active MTU, as verbs number them: 1 is 256 bytes, 5 is 4096.
    pub mtu: u8,
    /// READs it answers at a time.
    pub reads_answered: u8,
    /// Index of the GID.
    pub gid_index: u8,
    /// The GID.
    pub gid: [u8; 16],
}

/// One host's end of the queue pairs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Address on `InfiniBand`.
    pub lid: u16,
    /// Active MTU.
    pub mtu: u8,
    /// READs it answers at a time.
    pub reads_answered: u8,
    /// The GID.
    pub gid: [u8; 16],
    /// First packet number of both directions, 24 bits.
    pub psn: u32,
    /// Numbers of the queue pairs, 24 bits each.
    pub queue_pairs: Vec<u32>,
}

/// What the destination chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pick {
    /// Index of the candidate.
    pub candidate: u16,
    /// The destination's end.
    pub end: End,
}

/// The source's end, and what to read from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The end.
    pub end: End,
    /// Address of the probe.
    pub probe_address: u64,
    /// Its key.
    pub probe_rkey: u32,
    /// Its content.
    pub probe_seed: u64,
}

pub(super) fn malformed(what: &str) -> Error {
    Error::Rdma { what: format!("malformed {what} of the peer") }
}

/// Takes numbers off the front.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self, len: usize) -> Option<u64> {
        Some(self.bytes(len)?.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)))
    }

    fn byte(&mut self) -> Option<u8> {
        self.number(1).map(|n| n as u8)
    }

    fn gid(&mut self) -> Option<[u8; 16]> {
        self.bytes(16)?.try_into().ok()
    }

    fn ended(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

/// An MTU that exists.
fn mtu(number: u8) -> Option<u8> {
    (1..=5).contains(&number).then_some(number)
}

impl Candidate {
    /// The IP address that a `RoCEv2` GID is made of.
    pub fn ip(&self) -> Option<IpAddr> {
        let ip = IpAddr::V6(Ipv6Addr::from(self.gid)).to_canonical();
        (self.link == Link::Ethernet).then_some(ip)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        let name = &self.device.as_bytes()[..self.device.len().min(NAME_LEN_MAX)];
        out.push(name.len() as u8);
        out.extend_from_slice(name);
        let link = u8::from(self.link == Link::Ethernet);
        out.extend_from_slice(&[self.port, link, self.mtu, self.reads_answered, self.gid_index]);
        out.extend_from_slice(&self.lid.to_le_bytes());
        out.extend_from_slice(&self.gid);
    }

    fn decode(input: &mut Input<'_>) -> Option<Self> {
        let len = usize::from(input.byte()?);
        let name = input.bytes((len <= NAME_LEN_MAX).then_some(len)?)?;
        let plain = |c: char| if c.is_control() { '?' } else { c };
        Some(Self {
            device: String::from_utf8_lossy(name).chars().map(plain).collect(),
            port: input.byte()?,
            link: match input.byte()? {
                0 => Link::InfiniBand,
                1 => Link::Ethernet,
                _ => return None,
            },
            mtu: mtu(input.byte()?)?,
            reads_answered: input.byte()?,
            gid_index: input.byte()?,
            lid: input.number(2)? as u16,
            gid: input.gid()?,
        })
    }
}

impl End {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.lid.to_le_bytes());
        out.extend_from_slice(&[self.mtu, self.reads_answered]);
        out.extend_from_slice(&self.gid);
        out.extend_from_slice(&self.psn.to_le_bytes());
        out.push(self.queue_pairs.len() as u8);
        for number in &self.queue_pairs {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }

    fn decode(input: &mut Input<'_>) -> Option<Self> {
        let bits24 = |n: u64| (n < 1 << 24).then_some(n as u32);
        let (lid, mtu, reads_answered) =
            (input.number(2)? as u16, mtu(input.byte()?)?, input.byte()?);
        let (gid, psn) = (input.gid()?, bits24(input.number(4)?)?);
        let count = usize::from(input.byte()?);
        let count = (1..=QUEUE_PAIRS_MAX).contains(&count).then_some(count)?;
        let numbers = (0..count).map(|_| bits24(input.number(4)?));
        let queue_pairs = numbers.collect::<Option<_>>()?;
        Some(Self { lid, mtu, reads_answered, gid, psn, queue_pairs })
    }
}

pub(super) fn encode_candidates(candidates: &[Candidate]) -> Vec<u8> {
    let mut out = vec![candidates.len().min(CANDIDATES_MAX) as u8];
    candidates.iter().take(CANDIDATES_MAX).for_each(|c| c.encode(&mut out));
    out
}

/// Decodes the source's candidates.
pub fn decode_candidates(bytes: &[u8]) -> Result<Vec<Candidate>> {
    let decode = || {
        let mut input = Input(bytes);
        let count = usize::from(input.byte()?);
        let count = (count <= CANDIDATES_MAX).then_some(count)?;
        let all = (0..count).map(|_| Candidate::decode(&mut input)).collect::<Option<Vec<_>>>()?;
        input.ended().map(|()| all)
    };
    decode().ok_or_else(|| malformed("candidates"))
}

pub(super) fn encode_pick(pick: &Pick) -> Vec<u8> {
    let mut out = pick.candidate.to_le_bytes().to_vec();
    pick.end.encode(&mut out);
    out
}

/// Decodes the destination's pick.
pub fn decode_pick(bytes: &[u8]) -> Result<Pick> {
    let decode = || {
        let mut input = Input(bytes);
        let candidate = input.number(2)? as u16;
        let end = End::decode(&mut input)?;
        input.ended().map(|()| Pick { candidate, end })
    };
    decode().ok_or_else(|| malformed("choice of an adapter"))
}

pub(super) fn encode_endpoint(endpoint: &Endpoint) -> Vec<u8> {
    let mut out = Vec::new();
    endpoint.end.encode(&mut out);
    out.extend_from_slice(&endpoint.probe_address.to_le_bytes());
    out.extend_from_slice(&endpoint.probe_rkey.to_le_bytes());
    out.extend_from_slice(&endpoint.probe_seed.to_le_bytes());
    out
}

/// Decodes the source's endpoint.
pub fn decode_endpoint(bytes: &[u8]) -> Result<Endpoint> {
    let decode = || {
        let mut input = Input(bytes);
        let end = End::decode(&mut input)?;
        let (probe_address, probe_rkey) = (input.number(8)?, input.number(4)? as u32);
        let probe_seed = input.number(8)?;
        input.ended().map(|()| Endpoint { end, probe_address, probe_rkey, probe_seed })
    };
    decode().ok_or_else(|| malformed("endpoint"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn end() -> End {
        let queue_pairs = vec![17, 0xff_ffff];
        End { lid: 7, mtu: 5, reads_answered: 16, gid: [9; 16], psn: 0xab_cdef, queue_pairs }
    }

    #[test]
    fn messages_round_trip() {
        let candidate = Candidate {
            device: "rxe0".into(),
            port: 1,
            link: Link::Ethernet,
            lid: 0,
            mtu: 3,
            reads_answered: 128,
            gid_index: 1,
            gid: [3; 16],
        };
        let all = vec![candidate.clone(), Candidate { link: Link::InfiniBand, ..candidate }];
        assert_eq!(decode_candidates(&encode_candidates(&all)).unwrap(), all);
        let pick = Pick { candidate: 1, end: end() };
        assert_eq!(decode_pick(&encode_pick(&pick)).unwrap(), pick);
        let (probe_address, probe_rkey, probe_seed) = (1 << 46, 5, 6);
        let endpoint = Endpoint { end: end(), probe_address, probe_rkey, probe_seed };
        let bytes = encode_endpoint(&endpoint);
        assert_eq!(decode_endpoint(&bytes).unwrap(), endpoint);
        assert!(decode_endpoint(&bytes[1..]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(pick) = decode_pick(&bytes) {
                prop_assert_eq!(encode_pick(&pick), bytes.clone());
            }
            if let Ok(endpoint) = decode_endpoint(&bytes) {
                prop_assert_eq!(encode_endpoint(&endpoint), bytes.clone());
            }
            let _ = decode_candidates(&bytes);
        }
    }
}
