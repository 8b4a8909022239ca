//! Children that the process forks beyond those that can be kept are ended: one that lived on would read zeros where
//! its pages are missing as soon as the session ends.
//!
//! The kernel tells of a fork by a userfaultfd, and not by a number. So the child is *marked*: the first page of our
//! scratch memory, which no thread uses any more, is registered with that userfaultfd, and the one process in which
//! this shows is the child.

use crate::dest::drain::State;
use crate::dest::finish::namespace_members;
use crate::dest::held::CHILDREN_MAX;
use crate::pages::SpaceId;
use slipstream_core::proc::maps;
use slipstream_core::proc::smaps::{self, VmFlags};
use slipstream_core::sys::pidfd::PidFd;
use slipstream_core::sys::uffd::Installed;

const PAGE: u64 = 4096;

/// Ends the children that are too many, as far as they can be found: one that was forked this moment may not be there
/// yet. Yields those that have ended.
pub fn end(state: &State) -> Vec<SpaceId> {
    let surplus = state.surplus();
    if surplus.is_empty() {
        return Vec::new();
    }
    let mut members = namespace_members(state.init());
    // Mostly the newest has the highest number.
    members.sort_unstable_by_key(|pid| std::cmp::Reverse(*pid));
    let Some(place) = members.iter().find_map(|pid| scratch(*pid)) else { return Vec::new() };
    let (ended, living): (Vec<_>, Vec<_>) =
        surplus.into_iter().partition(|id| !mark(state, *id, place));
    let mut found = 0;
    for pid in members {
        if found == living.len() {
            break;
        }
        // Its number could pass to another process between the look and the signal.
        let Ok(process) = PidFd::open(pid) else { continue };
        if is_marked(pid, place) {
            tracing::error!(
                "process {pid} is killed: more than {CHILDREN_MAX} children live whose pages are still on their way"
            );
            if let Err(e) = process.kill(libc::SIGKILL) {
                tracing::warn!("{e}");
            }
            found += 1;
        }
    }
    ended
}

/// Marks a child; false when its address space is no more.
fn mark(state: &State, id: SpaceId, place: u64) -> bool {
    let Some(uffd) = state.uffd(id) else { return false };
    if let Err(e) = uffd.register(place, PAGE) {
        tracing::debug!("mark a child: {e}");
    }
    // Of these two calls only this one says so; the page is there, so that it changes nothing.
    !matches!(uffd.zero(place, PAGE), Ok(Installed::Gone))
}

/// Where a process has our scratch memory.
fn scratch(pid: i32) -> Option<u64> {
    let lines = maps::read(pid).ok()?;
    let name = b"slipstream-scratch";
    lines.iter().find(|l| l.path.windows(name.len()).any(|w| w == name)).map(|l| l.start)
}

fn is_marked(pid: i32, place: u64) -> bool {
    smaps::read(pid).is_ok_and(|entries| {
        entries.iter().any(|e| e.line.start == place && e.flags.has(VmFlags::UFFD_MISSING))
    })
}
