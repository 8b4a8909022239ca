//! How much a bulk lane has outstanding.
//!
//! Less than what the network holds (rate times delay) leaves it idle; much more only fills buffers: faults
//! wait behind them on a shared link, and data falls out of the CPU's cache between sender and receiver
//! (measured over loopback: drains a fifth longer with 2 MiB than with 512 KiB). So the window is twice rate
//! times delay. The delay is the least ever seen: the first request finds an empty pipe. Since a window that is
//! too small limits the rate to window over delay, it doubles until something else is the limit.

use slipstream_transport::WindowLimits;
use std::time::{Duration, Instant};

/// Over which the rate is taken.
const INTERVAL: Duration = Duration::from_millis(20);

/// The window of one lane.
#[derive(Debug)]
pub struct Window {
    wanted: u64,
    delay_min: Option<Duration>,
    interval_start: Instant,
    interval_bytes: u64,
}

impl Window {
    /// Before the first request.
    pub fn new(now: Instant) -> Self {
        Self { wanted: 0, delay_min: None, interval_start: now, interval_bytes: 0 }
    }

    /// Bytes that may be outstanding on a lane with these limits.
    pub fn bytes(&self, limits: WindowLimits) -> u64 {
        self.wanted.clamp(limits.min, limits.max)
    }

    /// The first answer to a request came so long after it.
    pub fn delay(&mut self, delay: Duration) {
        self.delay_min = Some(self.delay_min.map_or(delay, |least| least.min(delay)));
    }

    /// Data came.
    pub fn arrived(&mut self, bytes: u64, now: Instant) {
        self.interval_bytes += bytes;
        let elapsed = now.saturating_duration_since(self.interval_start);
        if elapsed < INTERVAL {
            return;
        }
        if let Some(delay) = self.delay_min {
            let rate = self.interval_bytes as f64 / elapsed.as_secs_f64();
            self.wanted = (2.0 * rate * delay.as_secs_f64()) as u64;
        }
        self.interval_start = now;
        self.interval_bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: WindowLimits = WindowLimits::TCP;

    /// A link of that rate and delay, used at most as far as the window lets.
    fn window_bytes_on(rate_bytes_per_s: f64, delay: Duration) -> u64 {
        let mut now = Instant::now();
        let mut window = Window::new(now);
        window.delay(delay);
        for _ in 0..100 {
            let limited = window.bytes(LIMITS) as f64 / delay.as_secs_f64();
            now += INTERVAL;
            let bytes = rate_bytes_per_s.min(limited) * INTERVAL.as_secs_f64();
            window.arrived(bytes as u64, now);
        }
        window.bytes(LIMITS)
    }

    #[test]
    fn twice_what_the_link_holds() {
        let bytes = window_bytes_on(3e9, Duration::from_micros(500));
        assert!((2_900_000..3_100_000).contains(&bytes), "{bytes}");
        assert_eq!(window_bytes_on(1e9, Duration::from_micros(50)), LIMITS.min);
        assert_eq!(window_bytes_on(1e10, Duration::from_millis(80)), LIMITS.max);
    }

    #[test]
    fn own_queues_are_no_delay() {
        let mut window = Window::new(Instant::now());
        window.delay(Duration::from_micros(100));
        window.delay(Duration::from_millis(100));
        assert_eq!(window.delay_min, Some(Duration::from_micros(100)));
    }
}
