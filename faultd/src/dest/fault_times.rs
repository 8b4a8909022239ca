//! How long threads waited for pages, and where the time went.

use crate::error::{Error, Result};
use crate::protocol::FaultParts;
use hdrhistogram::Histogram;
use std::time::{Duration, Instant};

/// Fault times from a microsecond to a minute, to two digits.
const US_MAX: u64 = 60_000_000;

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
            || Histogram::new_with_bounds(1, US_MAX, 2).map_err(|e| Error::Internal(e.to_string()));
        Ok(Self { whole: empty()?, ask: empty()?, network: empty()?, install: empty()? })
    }

    /// Notes a fault.
    pub fn record(&mut self, at: &Moments) {
        let us = |time: Duration| (time.as_micros() as u64).clamp(1, US_MAX);
        self.whole.saturating_record(us(at.woken - at.read));
        self.ask.saturating_record(us(at.asked - at.read));
        self.network.saturating_record(us(at.arrived - at.asked));
        self.install.saturating_record(us(at.woken - at.arrived));
    }

    /// Number, median and 99th percentile.
    pub fn whole(&self) -> (u64, u64, u64) {
        let h = &self.whole;
        (h.len(), h.value_at_quantile(0.5), h.value_at_quantile(0.99))
    }

    /// Where the time went.
    pub fn parts(&self) -> FaultParts {
        let (p50, p99) = (0.5, 0.99);
        FaultParts {
            ask_us_p50: self.ask.value_at_quantile(p50),
            ask_us_p99: self.ask.value_at_quantile(p99),
            network_us_p50: self.network.value_at_quantile(p50),
            network_us_p99: self.network.value_at_quantile(p99),
            install_us_p50: self.install.value_at_quantile(p50),
            install_us_p99: self.install.value_at_quantile(p99),
        }
    }
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
        assert_eq!(times.whole(), (1, 50, 50));
        let p = times.parts();
        assert_eq!((p.ask_us_p50, p.network_us_p50, p.install_us_p50), (2, 40, 8));
    }
}
