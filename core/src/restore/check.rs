//! Whether a manifest from a peer is well-formed, before anything is built from it.

use crate::arch::Regs;
use crate::capture::presend::CHANGED_BYTES_MAX;
use crate::error::{Error, Result};
use crate::manifest::{AddressRange, Manifest, Mapping, MappingKind, PAGE_SIZE_MAX};
use std::collections::BTreeSet;
use std::ops::Range;

const PAGE: u64 = 4096;
const ADDRESS_MAX: u64 = 0x7fff_ffff_f000;
/// `vm.max_map_count` can be raised; nobody raises it beyond this.
pub(super) const MAPPINGS_MAX: usize = 4 << 20;
pub(super) const THREADS_MAX: usize = 65536;
/// Each takes a place in the queue of signals (`RLIMIT_SIGPENDING`).
const TIMERS_MAX: usize = 1 << 20;
pub(super) const GUARDS_MAX: usize = 1 << 20;
pub(super) const FILES_MAX: usize = 1 << 20;
/// Largest process number the kernel knows (`PID_MAX_LIMIT`).
const PID_MAX: i32 = 4 << 20;
const XSTATE_LEN_MAX: usize = 64 * 1024;
const XSTATE_LEN_MIN: usize = 576;

/// Checks everything that restore relies on. `reserved` is the scratch range.
pub fn check_manifest(m: &Manifest, reserved: &Range<u64>) -> Result<()> {
    check_mappings(m, reserved)?;
    check_threads(m)?;
    check_timers(m)?;
    check_files(m)?;
    check_pages(m)
}

fn bad<T>(what: impl Into<String>) -> Result<T> {
    Err(Error::Manifest(what.into()))
}

fn check_mappings(m: &Manifest, reserved: &Range<u64>) -> Result<()> {
    if m.mappings.len() > MAPPINGS_MAX {
        return bad("too many mappings");
    }
    let mut last = 0;
    for v in &m.mappings {
        if v.start < last {
            return bad(format!("mapping {:#x} is not behind the one before", v.start));
        }
        check_mapping(v, reserved)?;
        last = v.end;
    }
    Ok(())
}

/// Checks one mapping. `reserved` is the scratch range.
pub(super) fn check_mapping(v: &Mapping, reserved: &Range<u64>) -> Result<()> {
    let Ok(kind) = MappingKind::try_from(v.kind) else {
        return bad(format!("mapping {:#x} is of unknown kind {}", v.start, v.kind));
    };
    let size = u64::from(v.page_size);
    let page_ok = size.is_power_of_two() && (PAGE..=PAGE_SIZE_MAX).contains(&size);
    if v.start >= v.end
        || v.end > ADDRESS_MAX
        || !page_ok
        || !v.start.is_multiple_of(size)
        || !v.end.is_multiple_of(size)
        || !v.offset.is_multiple_of(PAGE)
    {
        return bad(format!("mapping {:#x}-{:#x} is malformed", v.start, v.end));
    }
    if v.start < reserved.end && v.end > reserved.start {
        return Err(Error::Refused(format!(
            "the process mapped {:#x}-{:#x} where restore has its scratch memory; try again",
            v.start, v.end
        )));
    }
    let needs_path = matches!(kind, MappingKind::FilePrivate | MappingKind::FileShared);
    if needs_path && !v.path.starts_with(b"/") {
        return bad(format!("mapping {:#x} has no path", v.start));
    }
    if v.staged && kind != MappingKind::FilePrivate {
        return bad(format!("mapping {:#x} can't have been sent before", v.start));
    }
    Ok(())
}

fn check_threads(m: &Manifest) -> Result<()> {
    if m.threads.is_empty() || m.threads.len() > THREADS_MAX {
        return bad(format!("{} threads", m.threads.len()));
    }
    let mut seen = BTreeSet::new();
    for t in &m.threads {
        if !(2..PID_MAX).contains(&t.tid) || !seen.insert(t.tid) {
            return bad(format!("thread number {}", t.tid));
        }
        if Regs::from_bytes(&t.regs).is_none() {
            return bad(format!("registers of thread {}", t.tid));
        }
        if !(XSTATE_LEN_MIN..=XSTATE_LEN_MAX).contains(&t.xstate.len()) {
            return bad(format!("XSAVE area of thread {}", t.tid));
        }
        if t.creds.uids.len() != 4 || t.creds.gids.len() != 4 || t.creds.caps.len() != 5 {
            return bad(format!("credentials of thread {}", t.tid));
        }
    }
    if m.threads[0].tid != m.process.pid {
        return bad("the first thread is not the leader");
    }
    Ok(())
}

fn check_timers(m: &Manifest) -> Result<()> {
    let mut seen = BTreeSet::new();
    if m.process.timers.len() > TIMERS_MAX {
        return bad("too many timers");
    }
    match m.process.timers.iter().find(|t| t.id < 0 || !seen.insert(t.id)) {
        Some(timer) => bad(format!("timer {}", timer.id)),
        None => Ok(()),
    }
}

fn check_files(m: &Manifest) -> Result<()> {
    if m.files.len() > FILES_MAX || m.descriptors.len() > FILES_MAX {
        return bad("too many descriptors");
    }
    let mut seen = BTreeSet::new();
    for d in &m.descriptors {
        if d.fd < 0 || d.file as usize >= m.files.len() || !seen.insert(d.fd) {
            return bad(format!("descriptor {}", d.fd));
        }
    }
    Ok(())
}

fn check_pages(m: &Manifest) -> Result<()> {
    let sound = |g: &AddressRange| {
        g.start < g.end && g.start.is_multiple_of(PAGE) && g.end.is_multiple_of(PAGE)
    };
    if m.guards.len() > GUARDS_MAX || !m.guards.iter().all(sound) {
        return bad("guard regions");
    }
    if m.reverted.len() as u64 > CHANGED_BYTES_MAX / PAGE || !m.reverted.iter().all(sound) {
        return bad("reverted pages");
    }
    for run in &m.pages {
        let len = run.bytes.len() as u64;
        let end = run.address.checked_add(len);
        if !run.address.is_multiple_of(PAGE)
            || len == 0
            || !len.is_multiple_of(PAGE)
            || end.is_none()
        {
            return bad(format!("pages at {:#x}", run.address));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::PosixTimer;

    #[test]
    fn ids_of_timers() {
        let with = |ids: &[i32]| {
            let timer = |id: &i32| PosixTimer { id: *id, ..PosixTimer::default() };
            let mut m = Manifest::default();
            m.process.timers = ids.iter().map(timer).collect();
            check_timers(&m)
        };
        assert!(with(&[0, 7, i32::MAX]).is_ok());
        assert!(with(&[-1]).is_err());
        assert!(with(&[7, 7]).is_err());
    }
}
