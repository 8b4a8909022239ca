//! What of the source's memory can be read.

use crate::error::{Error, Result};
use crate::lane::PAGE_LEN_BYTES;
use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

/// Most regions taken from a peer.
const REGIONS_MAX: usize = 64 << 10;

/// The regions of one migration, shared by its lanes.
#[derive(Debug, Default)]
pub struct Regions {
    /// Length and key by first address; they don't overlap.
    map: RwLock<BTreeMap<u64, (u64, u32)>>,
}

/// A part of a request that lies in one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) address: u64,
    pub(super) len_bytes: u32,
    pub(super) rkey: u32,
}

impl Regions {
    /// Adds one, as the peer told it.
    pub fn add(&self, start: u64, len_bytes: u64, rkey: u32) -> Result<()> {
        let page = u64::from(PAGE_LEN_BYTES);
        let refused = || Error::Rdma { what: "a region of the peer that can't be".into() };
        let end = start.checked_add(len_bytes).ok_or_else(refused)?;
        let whole = len_bytes > 0 && start.is_multiple_of(page) && len_bytes.is_multiple_of(page);
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        let before = map.range(..end).next_back();
        let free = before.is_none_or(|(other, (len, _))| other + len <= start);
        if !whole || !free || map.len() >= REGIONS_MAX {
            return Err(refused());
        }
        map.insert(start, (len_bytes, rkey));
        Ok(())
    }

    /// Cuts a range at the borders of regions, pieces of at most `part_len_max`; false if they don't cover it whole.
    pub(super) fn parts(
        &self,
        address: u64,
        len_bytes: u32,
        part_len_max: u32,
        parts: &mut Vec<Part>,
    ) -> bool {
        parts.clear();
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let end = address + u64::from(len_bytes);
        let mut at = address;
        while at < end {
            let Some((start, (len, rkey))) = map.range(..=at).next_back() else { return false };
            let until = (start + len).min(end);
            if until <= at {
                return false;
            }
            while at < until {
                let len = (until - at).min(u64::from(part_len_max)) as u32;
                parts.push(Part { address: at, len_bytes: len, rkey: *rkey });
                at += u64::from(len);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    #[test]
    fn a_request_is_cut_at_borders_or_not_covered() {
        let regions = Regions::default();
        regions.add(0, 4 * PAGE, 1).unwrap();
        regions.add(4 * PAGE, 4 * PAGE, 2).unwrap();
        regions.add(16 * PAGE, PAGE, 3).unwrap();
        let mut parts = Vec::new();
        assert!(regions.parts(PAGE, 6 * 4096, 2 * 4096, &mut parts));
        let got: Vec<_> =
            parts.iter().map(|p| (p.address / PAGE, p.len_bytes / 4096, p.rkey)).collect();
        assert_eq!(got, [(1, 2, 1), (3, 1, 1), (4, 2, 2), (6, 1, 2)]);
        assert!(!regions.parts(7 * PAGE, 2 * 4096, 4096, &mut parts));
        assert!(!regions.parts(20 * PAGE, 4096, 4096, &mut parts));
        assert!(regions.parts(16 * PAGE, 4096, 4096, &mut parts));
    }

    #[test]
    fn what_can_not_be_is_refused() {
        let regions = Regions::default();
        regions.add(8 * PAGE, 8 * PAGE, 1).unwrap();
        for (start, len) in [
            (0, 0),
            (1, PAGE),
            (0, 9 * PAGE),
            (15 * PAGE, PAGE),
            (10 * PAGE, PAGE),
            (u64::MAX - 4095, 2 * PAGE),
        ] {
            assert!(regions.add(start, len, 1).is_err(), "{start:#x} {len:#x}");
        }
        regions.add(0, 8 * PAGE, 1).unwrap();
        regions.add(16 * PAGE, PAGE, 1).unwrap();
    }
}
