//! Small work on a restored process that runs already, by ptrace.

use crate::error::{Error, Result};
use crate::freeze::{inner_tids, list_threads};
use crate::inject::one_remote_syscall;
use crate::restore::engine::TimedThread;
use crate::sys::mem::ProcMem;
use crate::sys::ptrace::{self, Stop};
use std::ops::Range;
use std::time::{Duration, Instant};

const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Gives threads that went on with the rest of a timed wait their own registers back. A thread that has
/// left the wait, or is in a signal handler, is left alone.
pub fn settle_timed(pid: i32, timed: &[TimedThread]) -> Result<()> {
    if timed.is_empty() {
        return Ok(());
    }
    let inner = inner_tids(pid, &list_threads(pid)?)?;
    for t in timed {
        let Some((tid, _)) = inner.iter().find(|(_, inner)| **inner == t.tid) else { continue };
        match settle_one(*tid, t) {
            Ok(()) | Err(Error::Gone { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn settle_one(tid: i32, t: &TimedThread) -> Result<()> {
    ptrace::seize(tid)?;
    ptrace::interrupt(tid)?;
    let deadline = Instant::now() + STOP_TIMEOUT;
    loop {
        match ptrace::wait_stop_until(tid, deadline)? {
            // Still on its way: the tracing ends with this process, nothing is lost.
            None | Some(Stop::Gone) => return Ok(()),
            Some(Stop::Signal(signal)) => ptrace::cont(tid, signal)?,
            Some(Stop::Trap) => ptrace::cont(tid, libc::SIGTRAP)?,
            Some(Stop::Event) => break,
        }
    }
    if let Some(regs) = t.timed.settle(&ptrace::get_regs(tid)?) {
        ptrace::set_regs(tid, &regs)?;
    }
    ptrace::detach(tid, 0)
}

/// Removes what restore left mapped in a process.
pub fn unmap_range(pid: i32, range: &Range<u64>, timeout: Duration) -> Result<()> {
    let args = [range.start, range.end - range.start, 0, 0, 0, 0];
    remote(pid, libc::SYS_munmap, args, timeout, "unmap scratch memory")
}

/// Locks a range whose pages have all arrived.
pub fn lock_range(pid: i32, start: u64, len: u64, timeout: Duration) -> Result<()> {
    remote(pid, libc::SYS_mlock, [start, len, 0, 0, 0, 0], timeout, "mlock")
}

fn remote(pid: i32, nr: i64, args: [u64; 6], timeout: Duration, what: &str) -> Result<()> {
    let mem = ProcMem::open(pid)?;
    one_remote_syscall(pid, nr, args, timeout, &mem)?
        .map(drop)
        .map_err(|e| Error::sys(format!("{what} in process {pid}"), e))
}
