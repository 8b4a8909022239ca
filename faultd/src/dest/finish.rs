//! The end of a drain: nothing of Slipstream stays in the process, nor in children it forked.

use crate::dest::drain::Drain;
use crate::error::Result;
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

/// Ends fault handling, removes our mappings, and puts back what had to wait for the last page.
/// `ours` are the ranges that restore mapped, that with its code first.
pub fn finish(drain: &Drain, m: &Manifest, process: &PidFd, ours: &[Range<u64>]) -> Result<()> {
    let pid = process.pid();
    unregister_process(drain, pid);
    unregister_children(drain);
    match wait_left(pid, &ours[0]) {
        Ok(()) | Err(slipstream_core::Error::Gone { .. }) => {}
        Err(e) => return Err(e.into()),
    }
    for member in drain.shared(|state| namespace_members(state.init())) {
        leave(member, ours);
    }
    if !process.exited() {
        collapse(process, &drain.huge_runs());
        lock_again(pid, m);
    }
    Ok(())
}

/// Who traces a process, if anybody does: nothing can be removed from it meanwhile.
pub fn tracer(pid: i32) -> Option<i32> {
    status::read(pid).ok().map(|status| status.tracer_pid).filter(|tracer| *tracer != 0)
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
fn unregister_process(drain: &Drain, pid: i32) {
    let frozen = match Frozen::freeze(pid, STOP_TIMEOUT) {
        Ok(frozen) => frozen,
        Err(slipstream_core::Error::Gone { .. }) => return,
        Err(e) => return tracing::warn!("{e}"),
    };
    if let Ok(lines) = maps::read(pid) {
        drain.shared(|state| {
            let Some(uffd) = state.uffd(SpaceId::PROCESS) else { return };
            for line in lines {
                // Mappings that can't be registered answer EINVAL.
                let _ = uffd.unregister(line.start, line.len());
            }
        });
    }
    if let Err(e) = frozen.thaw() {
        tracing::warn!("{e}");
    }
}

fn unregister_children(drain: &Drain) {
    drain.shared(|state| {
        for id in state.pages.spaces().filter(|id| *id != SpaceId::PROCESS) {
            let (Some(space), Some(uffd)) = (state.pages.space(id), state.uffd(id)) else {
                continue;
            };
            unregister_spans(space.currents_of(0..u64::MAX).iter().map(Span::current), uffd);
        }
    });
}

fn unregister_spans(spans: impl Iterator<Item = Range<u64>>, uffd: &Uffd) {
    for span in spans {
        let _ = uffd.unregister(span.start, span.end - span.start);
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
fn leave(pid: i32, ours: &[Range<u64>]) {
    for range in ours {
        let Ok(lines) = maps::read(pid) else { return };
        // A session that was killed may have done this before: the place may have another mapping now.
        let own = |l: &&MapLine| range.contains(&l.start) && is_ours(&l.path);
        let Some(first) = lines.iter().find(own) else { continue };
        match unmap_range(pid, range, &(first.start..first.end), STOP_TIMEOUT) {
            Ok(()) | Err(slipstream_core::Error::Gone { .. }) => {}
            Err(e) => tracing::warn!("{e}"),
        }
    }
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
