//! Huge pages for the time of a test. They are the machine's, so tests that want some take turns.

use std::fs::File;
use std::os::fd::AsRawFd;

const COUNT_FILE: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages reserved beyond those there were. Given back when dropped.
pub struct Reserved {
    before: u64,
    _lock: File,
}

fn count() -> u64 {
    std::fs::read_to_string(COUNT_FILE).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

impl Reserved {
    /// Reserves as many more as the machine will give; a test that needs them finds out by itself if those are too few.
    pub fn new(more: u64) -> Self {
        let lock = File::open(COUNT_FILE).expect("the count of huge pages");
        // SAFETY: a plain system call on an open descriptor.
        let locked = unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) };
        assert_eq!(locked, 0, "flock: {}", std::io::Error::last_os_error());
        let before = count();
        if let Err(error) = std::fs::write(COUNT_FILE, format!("{}", before + more)) {
            eprintln!("{COUNT_FILE}: {error}");
        }
        Self { before, _lock: lock }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(COUNT_FILE, format!("{}", self.before));
    }
}
