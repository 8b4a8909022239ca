//! A limit on what prefetch takes of the network.

use std::time::{Duration, Instant};

/// Time for which unused bytes are saved up.
const SAVED: Duration = Duration::from_millis(50);
/// A run is at most what may be had in this time, so that faults are not kept waiting by it...
const RUN: Duration = Duration::from_millis(20);
/// ...but never shorter than this.
const RUN_BYTES_MIN: u64 = 16 << 10;

/// What one lane may still ask for. Runs may run it into debt.
#[derive(Debug)]
pub struct Limit {
    /// Bytes a second; none: as many as it can.
    rate: Option<f64>,
    left: f64,
    at: Instant,
}

impl Limit {
    /// `bytes_per_s` of zero is no limit.
    pub fn new(bytes_per_s: u64, now: Instant) -> Self {
        let rate = (bytes_per_s > 0).then_some(bytes_per_s as f64);
        Self { rate, left: 0.0, at: now }
    }

    /// The longest run that may be asked for now; zero for none.
    pub fn run_bytes_max(&mut self, now: Instant) -> u64 {
        let Some(rate) = self.rate else { return u64::MAX };
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * rate).min(rate * SAVED.as_secs_f64());
        self.at = now;
        if self.left < 0.0 {
            return 0;
        }
        ((rate * RUN.as_secs_f64()) as u64).max(RUN_BYTES_MIN)
    }

    /// How long until something may be asked for again; `None` if that is so now.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let rate = self.rate?;
        (self.run_bytes_max(now) == 0)
            .then(|| Duration::from_secs_f64((-self.left / rate).max(1e-6)))
    }

    /// A run is asked for.
    pub fn spend(&mut self, bytes: u64) {
        self.left -= bytes as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes asked for in ten seconds by who asks every millisecond for as much as may be.
    fn in_ten_seconds(bytes_per_s: u64, want: u64) -> u64 {
        let begin = Instant::now();
        let mut limit = Limit::new(bytes_per_s, begin);
        (0..10_000u64).fold(0, |sum, ms| {
            let run = limit.run_bytes_max(begin + Duration::from_millis(ms)).min(want);
            limit.spend(run);
            sum + run
        })
    }

    #[test]
    fn the_rate_is_kept() {
        for rate in [1u64 << 20, 30 << 20, 1 << 30] {
            let bytes = in_ten_seconds(rate, 256 << 10);
            let most = 10 * rate;
            let possible = 10_000 * (256u64 << 10);
            assert!(bytes <= most + most / 50 + (256 << 10), "{bytes} of {most}");
            assert!(bytes >= (most - most / 20).min(possible), "{bytes} of {most}");
        }
    }

    #[test]
    fn who_waits_as_long_as_said_may_ask() {
        let mut now = Instant::now();
        let mut limit = Limit::new(1_000_000, now);
        assert_eq!(limit.wait(now), None);
        limit.spend(20_000);
        let pause = limit.wait(now).unwrap();
        assert!((19..=21).contains(&pause.as_millis()), "{pause:?}");
        now += pause + Duration::from_micros(1);
        assert_eq!(limit.wait(now), None);
    }

    #[test]
    fn no_limit_is_none() {
        assert_eq!(in_ten_seconds(0, 4096), 40_960_000);
        assert_eq!(Limit::new(0, Instant::now()).wait(Instant::now()), None);
    }

    #[test]
    fn what_was_not_used_is_not_saved_up_for_long() {
        let begin = Instant::now();
        let mut limit = Limit::new(1_000_000, begin);
        let later = begin + Duration::from_secs(100);
        let mut burst = 0;
        while limit.run_bytes_max(later) > 0 {
            limit.spend(20_000);
            burst += 20_000;
        }
        assert!(burst <= 80_000, "{burst}");
    }
}
