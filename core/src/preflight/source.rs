//! Everything that keeps a running process from being moved, and what it needs where it goes.
//!
//! Some things no one outside the process can see, and they are not checked: Landlock domains,
//! membarrier registrations, semaphore adjustments (`SEM_UNDO`; the kernel gives every program with
//! threads a list of them, empty or not), dnotify marks without an owner, descriptors on their way
//! through a socket, and events of performance counters that others attached.

mod known;
mod namespaces;
mod needs;
mod sharing;
mod state;
pub use known::KnownFiles;
pub(crate) use state::{dispatched, filtered};
pub use state::{group_stop, stopped};

use super::requirements::Requirements;
use super::{Blocker, digest};
use crate::capture::files::{CapturedFiles, FileOptions, StdioPolicy, capture_files};
use crate::capture::presend::WRITTEN_LEN_MAX;
use crate::manifest::{FileKind, Mapping};
use crate::proc::classify::{self, Unclassified};
use crate::proc::holders::{Holders, Object, objects_of};
use crate::proc::maps::MapLine;
use crate::proc::smaps::{self, SmapsEntry};
use crate::proc::status::Status;
use std::collections::HashSet;

/// What may be moved and how.
#[derive(Clone, Debug, Default)]
pub struct SourceOptions {
    /// Standard streams that can't be moved.
    pub stdio: StdioPolicy,
    /// Let a process run the same executable as this one (tests fork themselves).
    pub allow_own_executable: bool,
}

/// A process that can be moved, as it was when it was looked at.
#[derive(Clone, Debug)]
pub struct SourceReport {
    /// Its id here.
    pub pid: i32,
    /// Its status.
    pub status: Status,
    /// Ids of its threads here.
    pub tids: Vec<i32>,
    /// Its mappings, classified. Memfds among them refer to `files.files`.
    pub mappings: Vec<Mapping>,
    /// `smaps`, to classify what the freeze finds.
    pub smaps: Vec<SmapsEntry>,
    /// Open files, without the content of memfds.
    pub files: CapturedFiles,
    /// Who else holds its pipes and memory: nobody but for redirected streams.
    pub holders: Holders,
    /// What it needs at the destination.
    pub requirements: Requirements,
    /// Where its paths are found here: empty, or its root directory in another mount namespace.
    lookup_root: Vec<u8>,
}

impl SourceReport {
    /// Adds digests of mapped files, which a destination on another boot of another host compares.
    /// Reads every mapped file that has no build-id.
    pub fn fill_digests(&mut self) -> Result<(), Vec<Blocker>> {
        let mut blockers = Vec::new();
        for file in &mut self.requirements.files {
            if file.role() != super::requirements::FileRole::Mapped || !file.id.digest.is_empty() {
                continue;
            }
            match digest::of_file(&[&self.lookup_root, file.path.as_slice()].concat()) {
                Ok(digest) => file.id.digest = digest,
                Err(e) => blockers.push(Blocker::new(
                    &file.object,
                    format!("{} can't be read: {e}", String::from_utf8_lossy(&file.path)),
                    "see the reason",
                )),
            }
        }
        if blockers.is_empty() { Ok(()) } else { Err(blockers) }
    }
}

/// Looks at a running process; all blockers together. It is not stopped, so what it does meanwhile is
/// only seen in the freeze.
pub fn check_process(pid: i32, options: &SourceOptions) -> Result<SourceReport, Vec<Blocker>> {
    // What is not a process, or can't be looked into, has no further properties.
    let status = state::look(pid, options).map_err(|b| vec![b])?;
    let mut blockers = Vec::new();
    let tids = state::threads(pid, &mut blockers);
    state::check(pid, &status, &mut blockers);
    namespaces::check(pid, &mut blockers);
    sharing::check(pid, &tids, &mut blockers);
    match memory_and_files(pid, &[pid], options, &mut blockers) {
        Some((smaps, holders, mappings, files)) if blockers.is_empty() => {
            let seen =
                needs::Seen { pid, status: &status, tids: &tids, smaps: &smaps, files: &files };
            let (requirements, lookup_root) = needs::requirements(&seen, &mappings)?;
            Ok(SourceReport {
                pid,
                status,
                tids,
                mappings,
                smaps,
                files,
                holders,
                requirements,
                lookup_root,
            })
        }
        _ => Err(blockers),
    }
}

/// What changes while preparations go on.
#[derive(Debug)]
pub struct Again {
    /// `smaps` of now.
    pub smaps: Vec<SmapsEntry>,
    /// Who holds what now.
    pub holders: Holders,
}

/// Looks once more at a process that could be moved: what it shares with others, and its files, of which the
/// destination has heard of those in `known` only.
pub fn check_again(
    pid: i32,
    options: &SourceOptions,
    known: &KnownFiles,
) -> Result<Again, Vec<Blocker>> {
    let process = format!("process {pid}");
    let mut blockers = Vec::new();
    match crate::proc::threads(pid) {
        Ok(tids) => sharing::check(pid, &tids, &mut blockers),
        Err(e) => blockers.push(Blocker::unknown(&process, &e)),
    }
    // We have the memfds that were sent ahead.
    let ours = [pid, std::process::id() as i32];
    match memory_and_files(pid, &ours, options, &mut blockers) {
        Some((smaps, holders, _, files)) => {
            if let Some(what) = known.newer(&files.files, smaps.iter().map(|e| &e.line)) {
                blockers.push(Blocker::new(process, format!("it {what}"), ""));
            }
            if blockers.is_empty() { Ok(Again { smaps, holders }) } else { Err(blockers) }
        }
        None if blockers.is_empty() => {
            Err(vec![Blocker::new(process, "its mappings change all the time", "")])
        }
        None => Err(blockers),
    }
}

type Found = (Vec<SmapsEntry>, Holders, Vec<Mapping>, CapturedFiles);

/// Mappings and files, of which other processes than `beside` may have some as well; `None` if some can't be moved, and the blockers say which.
fn memory_and_files(
    pid: i32,
    beside: &[i32],
    options: &SourceOptions,
    blockers: &mut Vec<Blocker>,
) -> Option<Found> {
    let process = format!("process {pid}");
    let unknown = |e: crate::Error| Blocker::unknown(&process, &e);
    let smaps = smaps::read(pid).map_err(|e| blockers.push(unknown(e))).ok()?;
    // The lines in smaps are those of maps: this way both are from one moment.
    let maps: Vec<MapLine> = smaps.iter().map(|e| e.line.clone()).collect();
    let holders = objects_of(pid, &maps)
        .and_then(|objects| Holders::find_beside(beside, objects))
        .map_err(|e| blockers.push(unknown(e)))
        .ok()?;
    shared_memory(&maps, &holders, blockers);
    written_pages(&smaps, blockers);
    let file_options = FileOptions { stdio: &options.stdio, holders: &holders, content: None };
    let files = capture_files(pid, &maps, &file_options);
    let none = CapturedFiles::default();
    let known = files.as_ref().unwrap_or(&none);
    let mappings = match classify::classify(&maps, &smaps, &known.files) {
        Ok(mappings) => Some(mappings),
        Err(Unclassified::Blocked(more)) => {
            // Without files no memfd is known; the files' blockers say why.
            let memfd = |b: &Blocker| b.reason.starts_with("/memfd:");
            blockers.extend(more.into_iter().filter(|b| files.is_ok() || !memfd(b)));
            None
        }
        Err(Unclassified::Stale(_)) => None,
    };
    match files {
        Ok(files) => Some((smaps, holders, mappings?, files)),
        Err(more) => {
            blockers.extend(more);
            None
        }
    }
}

/// Anonymous shared memory that another process maps too, once an object.
fn shared_memory(maps: &[MapLine], holders: &Holders, blockers: &mut Vec<Blocker>) {
    let mut seen = HashSet::new();
    for line in maps.iter().filter(|l| l.shared && !classify::is_memfd(l)) {
        let object = Object::Memory { dev: line.dev, ino: line.ino };
        if let Some(other) = holders.other(object).filter(|_| seen.insert(object)) {
            blockers.push(Blocker::new(
                format!("mapping {:x}-{:x}", line.start, line.end),
                format!("shared memory that process {other} holds too"),
                "move it when the other process has ended",
            ));
        }
    }
}

/// More written pages of private file mappings than can be compared while the process is stopped.
fn written_pages(smaps: &[SmapsEntry], blockers: &mut Vec<Blocker>) {
    let of_file =
        |e: &&SmapsEntry| !e.line.shared && e.line.ino != 0 && e.line.path.starts_with(b"/");
    let written = |e: &SmapsEntry| e.anonymous_bytes + e.swap_bytes;
    let files = || smaps.iter().filter(of_file);
    let bytes: u64 = files().map(written).sum();
    let Some(largest) = files().max_by_key(|e| written(e)) else { return };
    if bytes > WRITTEN_LEN_MAX {
        let line = &largest.line;
        blockers.push(Blocker::new(
            format!("mapping {:x}-{:x}", line.start, line.end),
            format!(
                "{} MiB of {} and other private file mappings were written, and at most {} MiB can be \
                 moved",
                bytes >> 20,
                String::from_utf8_lossy(&line.path),
                WRITTEN_LEN_MAX >> 20
            ),
            "map the files shared, or read them into memory",
        ));
    }
}

/// Largest pipe among the files, in bytes.
fn largest_pipe(files: &CapturedFiles) -> u32 {
    let capacity = |kind: &Option<FileKind>| match kind {
        Some(FileKind::Pipe(end)) => end.capacity_bytes,
        _ => 0,
    };
    files.files.iter().map(|f| capacity(&f.kind)).max().unwrap_or(0)
}

#[cfg(test)]
#[path = "source/tests.rs"]
mod tests;
