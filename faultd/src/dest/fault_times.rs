//! How long threads waited for pages, and where the time went.

use crate::error::{Error, Result};
use crate::protocol::{FaultPart, FaultParts};
use hdrhistogram::Histogram;
use std::time::{Duration, Instant};

/// Fault times up to a minute, to two digits.
const NS_MAX: u64 = 60_000_000_000;
/// Of the histograms that are told: buckets for each doubling of the time.
const BUCKETS_PER_DOUBLING: f64 = 4.0;

/// When what happened to a fault.
#[derive(Clone, Copy, Debug)]
pub struct Moments {
    /// The event was read.
    pub read: Instant,
    /// The page was asked for.
    pub asked: Instant,
    /// It had arrived whole.
    pub arrived: Instant,
    /// It was installed, and whoever waited was woken.
    pub woken: Instant,
}

/// Histograms of a drain.
#[derive(Debug)]
pub struct FaultTimes {
    whole: Histogram<u64>,
    ask: Histogram<u64>,
    network: Histogram<u64>,
    install: Histogram<u64>,
}

impl FaultTimes {
    /// Without faults.
    pub fn new() -> Result<Self> {
        let empty =
            || Histogram::new_with_bounds(1, NS_MAX, 2).map_err(|e| Error::Internal(e.to_string()));
        Ok(Self { whole: empty()?, ask: empty()?, network: empty()?, install: empty()? })
    }

    /// Notes a fault.
    pub fn record(&mut self, at: &Moments) {
        let ns = |time: Duration| (time.as_nanos() as u64).clamp(1, NS_MAX);
        self.whole.saturating_record(ns(at.woken - at.read));
        self.ask.saturating_record(ns(at.asked - at.read));
        self.network.saturating_record(ns(at.arrived - at.asked));
        self.install.saturating_record(ns(at.woken - at.arrived));
    }

    /// Number, median and 99th percentile, in microseconds.
    pub fn whole_us(&self) -> (u64, u64, u64) {
        let h = &self.whole;
        let us = |quantile| (h.value_at_quantile(quantile) + 500) / 1000;
        (h.len(), us(0.5), us(0.99))
    }

    /// Where the time went.
    pub fn parts(&self) -> FaultParts {
        FaultParts {
            whole: part(&self.whole),
            ask: part(&self.ask),
            network: part(&self.network),
            install: part(&self.install),
        }
    }
}

fn part(h: &Histogram<u64>) -> FaultPart {
    let mut histogram: Vec<u64> = Vec::new();
    for value in h.iter_recorded() {
        let (ns, count) = (value.value_iterated_to(), value.count_since_last_iteration());
        let bucket = (BUCKETS_PER_DOUBLING * (ns as f64).log2()).floor();
        let end = ((bucket + 1.0) / BUCKETS_PER_DOUBLING).exp2().ceil() as u64;
        match histogram.as_chunks_mut::<2>().0.last_mut() {
            Some([last, counted]) if *last == end => *counted += count,
            _ => histogram.extend([end, count]),
        }
    }
    FaultPart { ns_p50: h.value_at_quantile(0.5), ns_p99: h.value_at_quantile(0.99), histogram }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_up_the_whole() {
        let mut times = FaultTimes::new().unwrap();
        let read = Instant::now();
        let after = |us| read + Duration::from_micros(us);
        times.record(&Moments { read, asked: after(2), arrived: after(42), woken: after(50) });
        assert_eq!(times.whole_us(), (1, 50, 50));
        let p = times.parts();
        let us = [p.ask.ns_p50, p.network.ns_p50, p.install.ns_p50].map(|ns| (ns + 500) / 1000);
        assert_eq!(us, [2, 40, 8]);
    }

    #[test]
    fn every_fault_is_in_a_bucket() {
        let mut times = FaultTimes::new().unwrap();
        let read = Instant::now();
        for ns in (0..100_000).chain([u64::MAX / 4]) {
            let woken = read + Duration::from_nanos(ns);
            times.record(&Moments { read, asked: read, arrived: read, woken });
        }
        let whole = times.parts().whole;
        let (buckets, []) = whole.histogram.as_chunks::<2>() else { panic!("pairs") };
        assert_eq!(buckets.iter().map(|b| b[1]).sum::<u64>(), 100_001);
        assert!(buckets.is_sorted_by(|a, b| a[0] < b[0]));
        assert!(buckets.len() < 200, "{}", buckets.len());
    }
}
