//! Test helper: a forked process that holds something while the test looks at it.

// Shared memory begins at a page.
#![allow(clippy::cast_ptr_alignment)]

use crate::capture::files::{CapturedFiles, FileOptions, StdioPolicy, capture_files};
use crate::capture::presend::Presend;
use crate::preflight::Blocker;
use crate::proc::holders::{Holders, objects_of};
use crate::proc::maps;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

/// Memory shared between the test and its forked processes; never given back.
pub(crate) fn shared(len: usize) -> *mut u8 {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: no address is given, so nothing that exists is replaced.
    let at = unsafe {
        libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

/// A forked process; killed and reaped at the end.
pub(crate) struct Child {
    pub(crate) pid: i32,
    state: &'static AtomicI64,
}

const RUNNING: i64 = 0;
const READY: i64 = 1;

impl Child {
    /// Forks a process with `/dev/null` as standard streams and no other descriptors, that runs
    /// `work` and then sleeps. Returns at once.
    pub(crate) fn start(work: impl FnOnce()) -> Child {
        // SAFETY: eight bytes of zeros, aligned to a page, shared and never given back.
        let state = unsafe { &*shared(4096).cast::<AtomicI64>() };
        // SAFETY: the child only works with its own memory, descriptors and raw syscalls, and never
        // returns from this function.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid > 0 {
            return Child { pid, state };
        }
        // SAFETY: integers and a constant string only.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::close_range(0, u32::MAX, 0);
            libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
            libc::dup(0);
            libc::dup(0);
        }
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        state.store(if done.is_ok() { READY } else { -1 }, Ordering::Release);
        loop {
            // SAFETY: no memory is involved.
            unsafe { libc::pause() };
        }
    }

    /// Forks and waits until `work` is done.
    pub(crate) fn new(work: impl FnOnce()) -> Child {
        let child = Child::start(work);
        child.wait();
        child
    }

    /// Waits until `work` is done.
    pub(crate) fn wait(&self) {
        let end = Instant::now() + Duration::from_secs(20);
        while self.state.load(Ordering::Acquire) == RUNNING {
            assert!(Instant::now() < end, "the child does not get ready");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.state.load(Ordering::Acquire), READY, "the child failed");
    }

    pub(crate) fn holders(&self) -> Holders {
        let maps = maps::read(self.pid).unwrap();
        let objects = objects_of(self.pid, &maps).unwrap();
        Holders::find(self.pid, objects).unwrap()
    }

    pub(crate) fn capture_with(&self, stdio: &StdioPolicy) -> Result<CapturedFiles, Vec<Blocker>> {
        let maps = maps::read(self.pid).unwrap();
        let holders = self.holders();
        let nothing_sent = Presend::new().unwrap();
        let options = FileOptions { stdio, holders: &holders, content: Some(&nothing_sent) };
        capture_files(self.pid, &maps, &options)
    }

    pub(crate) fn capture(&self) -> Result<CapturedFiles, Vec<Blocker>> {
        self.capture_with(&StdioPolicy::Keep)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: a child of ours, not yet reaped.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}

/// Fails the test (or the child) if a syscall failed.
pub(crate) fn ok(ret: i32) -> i32 {
    assert!(ret >= 0, "{}", std::io::Error::last_os_error());
    ret
}
