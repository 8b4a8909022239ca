//! Small work on a restored process that runs already, by ptrace.
//!
//! Each piece of work has a thread of its own. A thread of the program that waits for a page inside the kernel
//! can't be stopped, and would be as soon as its page comes; when its tracer ends it is free of that.

use crate::arch::Regs;
use crate::error::{Error, Result};
use crate::freeze::{inner_tids, list_threads};
use crate::one_stopped::OneStopped;
use crate::restore::engine::TimedThread;
use crate::sys::ptrace::{self, Stop};
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// For threads that were woken to get a processor.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(60);

/// Does `work` on a thread that traces what it likes and then ends.
fn tracing_ends<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let tracer = thread::Builder::new().name("settle".into()).spawn_scoped(scope, work);
        match tracer.map_err(|e| Error::io("start a thread", e))?.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Gives threads that went on with the rest of a timed wait their own registers back. A thread that has
/// left the wait, or is in a signal handler, is left alone.
pub fn settle_timed(pid: i32, timed: &[TimedThread]) -> Result<()> {
    if timed.is_empty() {
        return Ok(());
    }
    let inner = inner_tids(pid, &list_threads(pid)?)?;
    tracing_ends(|| {
        for t in timed {
            let Some((tid, _)) = inner.iter().find(|(_, inner)| **inner == t.tid) else { continue };
            match settle_one(*tid, t) {
                Ok(()) | Err(Error::Gone { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    })
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
            // The tracing ends with the calling thread (`tracing_ends`); nothing is lost.
            None => return Ok(None),
            Some(Stop::Gone) => return Err(Error::Gone { pid: tid }),
            Some(Stop::Signal(signal)) => ptrace::cont(tid, signal)?,
            Some(Stop::Event | Stop::Group | Stop::Syscall) => break,
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
    tracing_ends(|| all_left(pid, range))
}

fn all_left(pid: i32, range: &Range<u64>) -> Result<()> {
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
    let first = format!("/proc/{pid}/map_files/{:x}-{:x}", inside.start, inside.end);
    let args = [range.start, range.end - range.start, 0, 0, 0, 0];
    tracing_ends(|| {
        let stopped = OneStopped::stop(pid, timeout)?;
        if std::fs::symlink_metadata(first).is_ok() {
            stopped
                .syscall(libc::SYS_munmap, args, timeout)?
                .map_err(|e| Error::sys(format!("unmap scratch memory in process {pid}"), e))?;
        }
        stopped.thaw().map(drop)
    })
}

/// Locks a range whose pages have all arrived.
pub fn lock_range(pid: i32, start: u64, len: u64, timeout: Duration) -> Result<()> {
    have(pid, "mlock", libc::SYS_mlock, [start, len], timeout)
}

/// Has the kernel lock mappings to come. `flags` is `MCL_FUTURE`, perhaps with `MCL_ONFAULT`.
pub fn lock_future(pid: i32, flags: u32, timeout: Duration) -> Result<()> {
    let known = (libc::MCL_FUTURE | libc::MCL_ONFAULT) as u32;
    if flags & !known != 0 || flags & libc::MCL_FUTURE as u32 == 0 {
        return Err(Error::Manifest(format!("mlockall flags {flags:#x}")));
    }
    have(pid, "mlockall", libc::SYS_mlockall, [u64::from(flags), 0], timeout)
}

/// Has the process execute a syscall.
fn have(pid: i32, name: &str, nr: i64, [a, b]: [u64; 2], timeout: Duration) -> Result<()> {
    tracing_ends(|| {
        let stopped = OneStopped::stop(pid, timeout)?;
        stopped
            .syscall(nr, [a, b, 0, 0, 0, 0], timeout)?
            .map_err(|e| Error::sys(format!("{name} in process {pid}"), e))?;
        stopped.thaw().map(drop)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::freeze::tests::{assert_comes_to, wait_unstoppably};
    use crate::proc::status;
    use crate::testing::Child;

    /// Such a thread would be stopped for good as soon as it can be.
    #[test]
    fn a_thread_that_does_not_stop_is_traced_no_longer() {
        let child = Child::start(wait_unstoppably);
        assert_comes_to(child.pid, child.pid, 'D');
        wait_left(child.pid, &(0..1)).unwrap();
        assert_eq!(status::read(child.pid).unwrap().tracer_pid, 0);
        assert!(unmap_range(child.pid, &(0..1), &(0..1), Duration::from_millis(1)).is_err());
        assert_eq!(status::read(child.pid).unwrap().tracer_pid, 0);
    }
}
