//! The present map: which pages the source has.

use crate::control::{hear_source, unexpected};
use crate::dest::drain::Drain;
use crate::dest::rdma::Watch;
use crate::error::{Error, Result};
use crate::protocol::{PresentRun, SourceMessage};
use slipstream_core::manifest::Manifest;
use slipstream_core::restore::memory::{LazyRange, lazy_views};
use slipstream_transport::Receiver;
use std::time::Duration;

/// For the next piece of the map.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// The ranges by whose addresses the source names pages.
fn named_ranges(m: &Manifest) -> Vec<LazyRange> {
    lazy_views(m).into_iter().filter(|v| v.alias_of.is_none()).map(|v| v.range).collect()
}

/// Takes the present map as it comes; what lies between two runs does not exist.
pub fn receive_present_map(
    receiver: &mut Receiver,
    drain: &Drain,
    manifest: &Manifest,
    rdma: Option<&Watch>,
) -> Result<()> {
    let mut gaps = Gaps::new(&named_ranges(manifest));
    loop {
        match hear_source(receiver, Some(STEP_TIMEOUT))? {
            SourceMessage::PresentMap(map) => {
                let runs = map
                    .unpack()
                    .ok_or_else(|| Error::Protocol("a malformed present map".into()))?;
                for run in &runs {
                    gaps.must_follow(run)?;
                    for (start, len) in gaps.before(run) {
                        drain.absent(start, len)?;
                    }
                    drain.present(run)?;
                }
                drain.tell_news();
            }
            SourceMessage::PresentMapEnd(_) => break,
            SourceMessage::Regions(regions) => match rdma {
                Some(watch) => watch.add(&regions)?,
                None => return unexpected("the present map"),
            },
            _ => return unexpected("the present map"),
        }
    }
    for (start, len) in gaps.rest() {
        drain.absent(start, len)?;
    }
    drain.map_complete();
    Ok(())
}

/// What lies between runs, within the lazy ranges.
struct Gaps {
    ranges: Vec<(u64, u64)>,
    index: usize,
    at: u64,
    /// Of the last run.
    end: u64,
}

impl Gaps {
    fn new(lazy: &[LazyRange]) -> Self {
        let ranges: Vec<_> = lazy.iter().map(|r| (r.start, r.start + r.len_bytes)).collect();
        let at = ranges.first().map_or(u64::MAX, |r| r.0);
        Self { ranges, index: 0, at, end: 0 }
    }

    /// Refuses a run that is not behind all before: there are no more runs than pages then.
    fn must_follow(&mut self, run: &PresentRun) -> Result<()> {
        if run.start < self.end || run.len_bytes == 0 {
            let what = format!("the present map goes back to {:#x}", run.start);
            return Err(Error::Protocol(what));
        }
        self.end = run.start.saturating_add(run.len_bytes);
        Ok(())
    }

    /// The gaps up to a run.
    fn before(&mut self, run: &PresentRun) -> Vec<(u64, u64)> {
        let gaps = self.up_to(run.start);
        self.at = self.at.max(run.start + run.len_bytes);
        gaps
    }

    /// The gaps after the last run.
    fn rest(&mut self) -> Vec<(u64, u64)> {
        self.up_to(u64::MAX)
    }

    fn up_to(&mut self, limit: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        while let Some((start, end)) = self.ranges.get(self.index).copied() {
            let from = self.at.max(start);
            let to = end.min(limit);
            if from < to {
                gaps.push((from, to - from));
                self.at = to;
            }
            if limit <= end {
                break;
            }
            self.index += 1;
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, len_bytes: u64) -> PresentRun {
        PresentRun { start, len_bytes, huge: false }
    }

    #[test]
    fn gaps_are_what_runs_leave() {
        let lazy = [
            LazyRange { start: 0x1000, len_bytes: 0x4000, page_size: 4096 },
            LazyRange { start: 0x10000, len_bytes: 0x2000, page_size: 4096 },
        ];
        let mut gaps = Gaps::new(&lazy);
        assert_eq!(gaps.before(&run(0x2000, 0x1000)), [(0x1000, 0x1000)]);
        assert_eq!(gaps.before(&run(0x3000, 0x1000)), []);
        assert_eq!(gaps.before(&run(0x10000, 0x1000)), [(0x4000, 0x1000)]);
        assert_eq!(gaps.rest(), [(0x11000, 0x1000)]);
    }

    #[test]
    fn runs_ascend_over_all_pieces() {
        let mut gaps = Gaps::new(&[]);
        assert!(gaps.must_follow(&run(0x2000, 0x1000)).is_ok());
        assert!(gaps.must_follow(&run(0x3000, 0x1000)).is_ok());
        assert!(gaps.must_follow(&run(0x3000, 0x1000)).is_err());
        assert!(gaps.must_follow(&run(0x2000, 0x1000)).is_err());
        assert!(gaps.must_follow(&run(0x5000, 0)).is_err());
    }
}
