//! Small work on a restored process that runs already, by ptrace.

use crate::arch::Regs;
use crate::error::{Error, Result};
use crate::freeze::{inner_tids, list_threads};
use crate::one_stopped::OneStopped;
use crate::restore::engine::TimedThread;
use crate::sys::ptrace::{self, Stop};
use std::ops::Range;
use std::time::{Duration, Instant};

const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// For threads that were woken to get a processor.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(60);

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
    with_stopped(tid, &mut |regs| t.timed.settle(regs)).map(drop)
}

/// Stops one thread, looks at its registers, sets them if `change` says so, and lets it go. `None` when
/// it could not be stopped in time: then it is inside the kernel.
fn with_stopped(tid: i32, change: &mut dyn FnMut(&Regs) -> Option<Regs>) -> Result<Option<Regs>> {
    ptrace::seize(tid)?;
    ptrace::interrupt(tid)?;
    let deadline = Instant::now() + STOP_TIMEOUT;
    loop {
        match ptrace::wait_stop_until(tid, deadline)? {
            // The tracing ends with the calling thread; nothing is lost.
            None => return Ok(None),
            Some(Stop::Gone) => return Err(Error::Gone { pid: tid }),
            Some(Stop::Signal(signal)) => ptrace::cont(tid, signal)?,
            Some(Stop::Event | Stop::Syscall) => break,
        }
    }
    let regs = ptrace::get_regs(tid)?;
    if let Some(new) = change(&regs) {
        ptrace::set_regs(tid, &new)?;
    }
    ptrace::detach(tid, 0)?;
    Ok(Some(regs))
}

/// Waits until no thread of the process is in the runner any more: one that was woken at the gate may
/// not have run yet. None ever comes back to it.
pub fn wait_left(pid: i32, range: &Range<u64>) -> Result<()> {
    let deadline = Instant::now() + LEAVE_TIMEOUT;
    for tid in list_threads(pid)? {
        loop {
            match with_stopped(tid, &mut |_| None) {
                Ok(Some(regs)) if range.contains(&regs.rip) => {
                    if Instant::now() >= deadline {
                        return Err(Error::Refused(format!("thread {tid} does not leave restore")));
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(_) | Err(Error::Gone { .. }) => break,
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

/// Removes `range`, which restore left mapped in a process; `inside` is a mapping in it, the first. A
/// process that has executed another program meanwhile has none of it.
pub fn unmap_range(
    pid: i32,
    range: &Range<u64>,
    inside: &Range<u64>,
    timeout: Duration,
) -> Result<()> {
    let stopped = OneStopped::stop(pid, timeout)?;
    let first = format!("/proc/{pid}/map_files/{:x}-{:x}", inside.start, inside.end);
    if std::fs::symlink_metadata(first).is_ok() {
        let args = [range.start, range.end - range.start, 0, 0, 0, 0];
        stopped
            .syscall(libc::SYS_munmap, args, timeout)?
            .map_err(|e| Error::sys(format!("unmap scratch memory in process {pid}"), e))?;
    }
    stopped.thaw().map(drop)
}

/// Locks a range whose pages have all arrived.
pub fn lock_range(pid: i32, start: u64, len: u64, timeout: Duration) -> Result<()> {
    let stopped = OneStopped::stop(pid, timeout)?;
    stopped
        .syscall(libc::SYS_mlock, [start, len, 0, 0, 0, 0], timeout)?
        .map_err(|e| Error::sys(format!("mlock in process {pid}"), e))?;
    stopped.thaw().map(drop)
}

/// Has the kernel lock mappings to come. `flags` is `MCL_FUTURE`, perhaps with `MCL_ONFAULT`.
pub fn lock_future(pid: i32, flags: u32, timeout: Duration) -> Result<()> {
    let known = (libc::MCL_FUTURE | libc::MCL_ONFAULT) as u32;
    if flags & !known != 0 || flags & libc::MCL_FUTURE as u32 == 0 {
        return Err(Error::Manifest(format!("mlockall flags {flags:#x}")));
    }
    let stopped = OneStopped::stop(pid, timeout)?;
    stopped
        .syscall(libc::SYS_mlockall, [u64::from(flags), 0, 0, 0, 0, 0], timeout)?
        .map_err(|e| Error::sys(format!("mlockall in process {pid}"), e))?;
    stopped.thaw().map(drop)
}
