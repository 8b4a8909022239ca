//! Waiting with a limit.

use std::time::{Duration, Instant};

/// How long anything may take before a test calls it a hang, unless it says otherwise. Long, for the scheduler of Linux 6.18 was
/// seen to keep a session from two loaded processors for a minute, which ended by itself.
pub const LIMIT: Duration = Duration::from_secs(180);

/// Between two looks at what is waited for.
pub const PAUSE: Duration = Duration::from_millis(2);

/// `SLIPSTREAM_TEST_SLOWNESS`: how many times longer everything may take, for emulated machines.
fn slowness() -> u32 {
    std::env::var("SLIPSTREAM_TEST_SLOWNESS").map_or(1, |text| {
        text.parse().unwrap_or_else(|error| panic!("SLIPSTREAM_TEST_SLOWNESS={text}: {error}"))
    })
}

/// Polls until `probe` has a value; panics with `what` after `limit`.
pub fn until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    let limit = limit * slowness();
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(begin.elapsed() < limit, "waited {limit:?} in vain: {what}");
        std::thread::sleep(PAUSE);
    }
}
