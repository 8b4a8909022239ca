//! The end of a drain: nothing of Slipstream stays in the process, nor in children it forked.

use crate::dest::drain::Drain;
use crate::error::{Error, Result};
use crate::pages::{SpaceId, Span};
use crate::protocol::PresentRun;
use slipstream_core::freeze::Frozen;
use slipstream_core::manifest::{Manifest, vm_flag};
use slipstream_core::proc::maps::{self, MapLine};
use slipstream_core::proc::status;
use slipstream_core::restore::settle::{lock_future, lock_range, unmap_range, wait_left};
use slipstream_core::sys::pidfd::PidFd;
use slipstream_core::sys::uffd::Uffd;
use std::ops::Range;
use std::time::{Duration, Instant};

/// For a thread of a running process to stop for a moment.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// For a process without memory to have ended.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// Looks for what has still mappings of ours. A child that was forked meanwhile needs another one.
const PASSES: u32 = 8;
const PASS_PAUSE: Duration = Duration::from_millis(5);

/// Ends fault handling, removes our mappings, and puts back what had to wait for the last page.
/// `ours` are the ranges that restore mapped, that with its code first. On failure the drain has to go on: something of ours is
/// still there.
pub fn finish(drain: &Drain, m: &Manifest, process: &PidFd, ours: &[Range<u64>]) -> Result<()> {
    if !process.exited() {
        unregister_process(drain, process.pid())?;
        unless_gone(wait_left(process.pid(), &ours[0]))?;
    }
    leave_all(drain, ours)?;
    if !process.exited() {
        collapse(process, &drain.huge_runs());
        lock_again(process.pid(), m);
    }
    Ok(())
}

/// Takes what is ours out of the process and out of all that it forked, until a look finds nothing.
fn leave_all(drain: &Drain, ours: &[Range<u64>]) -> Result<()> {
    for _ in 0..PASSES {
        unregister_children(drain)?;
        let holders = holders(drain, ours);
        if holders.is_empty() {
            return Ok(());
        }
        for pid in holders {
            unless_gone(leave(pid, ours))?;
        }
        std::thread::sleep(PASS_PAUSE);
    }
    Err(Error::Refused {
        reason: "the process forks faster than what is Slipstream's can be taken out of it".into(),
        remedy: String::new(),
    })
}

fn unless_gone(done: slipstream_core::Result<()>) -> Result<()> {
    match done {
        Ok(()) | Err(slipstream_core::Error::Gone { .. }) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// A process that has something of ours and is traced, and by whom: nothing can be removed from it meanwhile.
pub fn traced(drain: &Drain, ours: &[Range<u64>]) -> Option<(i32, i32)> {
    let tracer = |pid: i32| status::read(pid).map_or(0, |status| status.tracer_pid);
    let holders = holders(drain, ours).into_iter();
    holders.map(|pid| (pid, tracer(pid))).find(|(_, tracer)| *tracer != 0)
}

/// The process and those it forked, as far as they have mappings of ours.
fn holders(drain: &Drain, ours: &[Range<u64>]) -> Vec<i32> {
    let members = drain.shared(|state| namespace_members(state.init())).into_iter();
    members
        .filter(|pid| {
            let lines = maps::read(*pid).unwrap_or_default();
            ours.iter().any(|range| own_line(&lines, range).is_some())
        })
        .collect()
}

/// Whether the process has ended. One that is ending loses its memory first, and that is what a drain notices.
pub fn has_exited(process: &PidFd) -> bool {
    let until = Instant::now() + EXIT_TIMEOUT;
    // Of a main thread that ended before the others there are no mappings, either: that is what the bound is for.
    while !process.exited() && maps::read(process.pid()).is_ok_and(|lines| lines.is_empty()) {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    process.exited()
}

/// Unregisters all mappings of the process. It stands still meanwhile: a mapping that moves between the look and
/// the call would be unregistered in part, and a mapping in two parts can't be moved (`mremap` answers EFAULT).
/// What is missed here ends when the last reference goes.
fn unregister_process(drain: &Drain, pid: i32) -> Result<()> {
    let frozen = match Frozen::freeze(pid, STOP_TIMEOUT) {
        Ok(frozen) => frozen,
        Err(slipstream_core::Error::Gone { .. }) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    let done = maps::read(pid).map_err(Error::from).and_then(|lines| {
        drain.shared(|state| match state.uffd(SpaceId::PROCESS) {
            Some(uffd) => lines.iter().try_for_each(|line| unregister(uffd, line.start..line.end)),
            None => Ok(()),
        })
    });
    // Who can't be let go by hand is let go by the end of this thread.
    unless_gone(frozen.thaw().map(drop))?;
    done
}

fn unregister_children(drain: &Drain) -> Result<()> {
    drain.shared(|state| {
        for id in state.pages.spaces().filter(|id| *id != SpaceId::PROCESS) {
            let (Some(space), Some(uffd)) = (state.pages.space(id), state.uffd(id)) else {
                continue;
            };
            let spans = space.currents_of(0..u64::MAX);
            spans.iter().map(Span::current).try_for_each(|range| unregister(uffd, range))?;
        }
        Ok(())
    })
}

fn unregister(uffd: &Uffd, range: Range<u64>) -> Result<()> {
    match uffd.unregister(range.start, range.end - range.start) {
        // EINVAL: what can't be registered, or is not mapped any more. ENOMEM: the address space is no more (for that this call
        // has no other answer), or has too many mappings for one to be divided; it ends with the last reference then.
        Err(e) if !matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOMEM)) => {
            Err(Error::io(format!("end fault handling at {:#x}", range.start), e))
        }
        _ => Ok(()),
    }
}

/// Processes under an init, as this host numbers them; without init itself.
pub fn namespace_members(init: &PidFd) -> Vec<i32> {
    let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let Some(own) = namespace(init.pid()) else { return Vec::new() };
    // While it has not ended its number is its own.
    if init.exited() {
        return Vec::new();
    }
    let pids = slipstream_core::proc::pids().unwrap_or_default().into_iter();
    pids.filter(|pid| *pid != init.pid() && namespace(*pid).as_ref() == Some(&own)).collect()
}

/// Removes our mappings from a process, if it has them.
fn leave(pid: i32, ours: &[Range<u64>]) -> slipstream_core::Result<()> {
    for range in ours {
        let lines = maps::read(pid)?;
        let Some(first) = own_line(&lines, range) else { continue };
        unmap_range(pid, range, &(first.start..first.end), STOP_TIMEOUT)?;
    }
    Ok(())
}

/// The first of our mappings in a range. A session that was killed may have removed them before: the place may have
/// another mapping now.
fn own_line<'a>(lines: &'a [MapLine], range: &Range<u64>) -> Option<&'a MapLine> {
    lines.iter().find(|l| range.contains(&l.start) && is_ours(&l.path))
}

/// The gate, the scratch memory, or the ring.
fn is_ours(path: &[u8]) -> bool {
    let has = |part: &[u8]| path.windows(part.len()).any(|w| w == part);
    has(b"slipstream-scratch") || has(b"/gate") || has(b"[io_uring]")
}

/// Puts huge pages together again where the source had them.
fn collapse(process: &PidFd, runs: &[PresentRun]) {
    for run in runs {
        if let Err(e) = process.collapse(run.start, run.len_bytes) {
            // No huge page free, or the mapping has changed: ordinary pages do as well.
            tracing::debug!("collapse {:#x}: {e}", run.start);
        }
    }
}

/// `mlock` proper: during the drain only pages that had arrived could be locked.
fn lock_again(pid: i32, m: &Manifest) {
    let locked = |flags: u32| flags & vm_flag::LOCKED != 0 && flags & vm_flag::LOCKONFAULT == 0;
    for v in m.mappings.iter().filter(|v| locked(v.flags)) {
        if let Err(e) = lock_range(pid, v.start, v.end - v.start, STOP_TIMEOUT) {
            tracing::warn!("{e}");
        }
    }
    // Not before: mappings that restore makes would be locked, and filled with what has not come.
    let flags = m.process.future_locks;
    if flags != 0
        && let Err(e) = lock_future(pid, flags, STOP_TIMEOUT)
    {
        tracing::warn!("{e}");
    }
}
