//! What a drain costs the source in processor time.

use crate::events::SourceCost;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts from when it is made.
#[derive(Debug)]
pub struct Meter {
    pid: i32,
    session_us: u64,
    frozen_us: u64,
    registered_bytes: Arc<AtomicU64>,
}

impl Meter {
    /// Begins to count, for the session and the frozen copy `pid`.
    pub fn start(pid: i32) -> Self {
        let (session_us, frozen_us) = (session_us(), frozen_us(pid));
        Self { pid, session_us, frozen_us, registered_bytes: Arc::default() }
    }

    /// Where whoever registers memory adds its bytes.
    pub fn registered_bytes(&self) -> &Arc<AtomicU64> {
        &self.registered_bytes
    }

    /// What it has been so far. The frozen copy must still be there: all that it ever does then is to register memory.
    pub fn read(&self) -> SourceCost {
        let registration_cpu_us = frozen_us(self.pid).saturating_sub(self.frozen_us);
        SourceCost {
            cpu_us: session_us().saturating_sub(self.session_us) + registration_cpu_us,
            registration_cpu_us,
            registered_bytes: self.registered_bytes.load(Ordering::Relaxed),
        }
    }
}

fn session_us() -> u64 {
    let time = getrusage(UsageWho::RUSAGE_SELF).map(|u| u.user_time() + u.system_time());
    time.map_or(0, |t| t.num_microseconds() as u64)
}

/// Processor time of all threads of a process; 0 where the kernel does not count it, or the process is gone.
fn frozen_us(pid: i32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of = |thread: fs::DirEntry| -> Option<u64> {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse().ok()
    };
    threads.filter_map(of).sum::<u64>() / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_counted() {
        let meter = Meter::start(std::process::id() as i32);
        while meter.read().registration_cpu_us < 1000 || meter.read().cpu_us < 2000 {
            std::hint::spin_loop();
        }
    }
}
