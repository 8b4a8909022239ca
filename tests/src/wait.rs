//! Waiting with a limit.

use std::time::{Duration, Instant};

/// How long anything may take before a test calls it a hang, unless it says otherwise.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Polls until `probe` has a value; panics with `what` after `limit`.
pub fn until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(begin.elapsed() < limit, "waited {limit:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
