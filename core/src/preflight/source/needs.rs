//! What a process needs at its destination.

use super::largest_pipe;
use crate::capture::files::{CapturedFiles, file_id};
use crate::manifest::{FileId, FileKind, Mapping, MappingKind, OpenFile, PathFile, vm_flag};
use crate::preflight::requirements::{FileRole, HugePages, RequiredFile, Requirements};
use crate::preflight::{Blocker, cpu, destination};
use crate::proc::limits;
use crate::proc::smaps::{SmapsEntry, VmFlags};
use crate::proc::status::{self, Status};
use nix::sys::stat::stat;
use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// Temporary numbers that restore takes: one a description, two a pipe or memfd, and some room.
const DESCRIPTORS_ROOM: u32 = 64;

/// What was seen of a process.
pub(super) struct Seen<'a> {
    pub(super) pid: i32,
    pub(super) status: &'a Status,
    pub(super) tids: &'a [i32],
    pub(super) smaps: &'a [SmapsEntry],
    pub(super) files: &'a CapturedFiles,
}

/// Puts the needs together; also where the process's paths are looked up here.
pub(super) fn requirements(
    seen: &Seen<'_>,
    mappings: &[Mapping],
) -> Result<(Requirements, Vec<u8>), Vec<Blocker>> {
    let process = format!("process {}", seen.pid);
    let unknown = |e: crate::Error| vec![Blocker::unknown(&process, &e)];
    let root = crate::capture::files::lookup_root(seen.pid).map_err(unknown)?;
    let mut files = mapped_files(seen, mappings, &root)?;
    files.extend(directories(seen.pid).map_err(unknown)?);
    files.extend(open_files(seen.files));
    let threads: Vec<Status> =
        seen.tids.iter().filter_map(|tid| status::read_thread(seen.pid, *tid).ok()).collect();
    let needs = Requirements {
        pid: own_id(seen.status, seen.pid),
        tids: threads.iter().map(|t| own_id(t, seen.pid)).collect(),
        boot_id: destination::boot_id().unwrap_or_default(),
        files,
        cpu_flags: cpu::flags().into_iter().collect(),
        rlimits: limits::read(seen.pid).map_err(unknown)?,
        memory_bytes: seen.status.rss_anon_bytes
            + seen.status.rss_shmem_bytes
            + seen.status.swap_bytes,
        huge_pages: huge_pages(seen.smaps),
        mappings: mappings.len() as u32,
        affinity: affinity(seen.pid),
        caps: capabilities(&threads),
        descriptors: descriptors(seen.files),
        pipe_bytes: largest_pipe(seen.files),
        shared_memory: mappings.iter().any(|m| m.kind() == MappingKind::ShmemAnon),
        locked_bytes: seen.smaps.iter().map(|e| e.locked_bytes).sum(),
    };
    Ok((needs, root))
}

fn own_id(status: &Status, pid: i32) -> i32 {
    status.ns_pids.last().copied().unwrap_or(pid)
}

/// Files behind mappings, once each, as the kernel holds them; their paths must lead to the same.
fn mapped_files(
    seen: &Seen<'_>,
    mappings: &[Mapping],
    root: &[u8],
) -> Result<Vec<RequiredFile>, Vec<Blocker>> {
    let (mut files, mut blockers, mut known) = (Vec::new(), Vec::new(), HashSet::new());
    for m in mappings {
        let by_path = matches!(m.kind(), MappingKind::FilePrivate | MappingKind::FileShared);
        let writable = m.kind() == MappingKind::FileShared && m.flags & vm_flag::MAYWRITE != 0;
        if !by_path || !known.insert((&m.path, writable)) {
            continue;
        }
        let object = format!("mapping {:x}-{:x}", m.start, m.end);
        let held = format!("/proc/{}/map_files/{:x}-{:x}", seen.pid, m.start, m.end);
        // A mapping that has changed since is looked at again in the freeze.
        let Ok(held) = stat(held.as_str()) else { continue };
        let path = [root, &m.path].concat();
        let found = stat(OsStr::from_bytes(&path));
        let same = found.is_ok_and(|f| (f.st_dev, f.st_ino) == (held.st_dev, held.st_ino));
        if !same || held.st_mode & libc::S_IFMT != libc::S_IFREG {
            let shown = String::from_utf8_lossy(&m.path).into_owned();
            let reason = format!("{shown} is not, or no longer, the file that is mapped");
            blockers.push(Blocker::new(&object, reason, "start the program again"));
            continue;
        }
        // A file that is shared and written to is one on a file system both hosts have: its
        // content goes on changing, so that size and time must do.
        let role = if writable { FileRole::Open } else { FileRole::Mapped };
        files.push(RequiredFile {
            path: m.path.clone(),
            id: file_id(&held),
            role: role as i32,
            writable,
            object,
        });
    }
    if blockers.is_empty() { Ok(files) } else { Err(blockers) }
}

/// Current directory, root and executable. The executable is also mapped, and compared as such.
fn directories(pid: i32) -> crate::Result<Vec<RequiredFile>> {
    let mut files = Vec::new();
    for (name, object) in
        [("cwd", "current directory"), ("root", "root directory"), ("exe", "executable")]
    {
        let magic = format!("/proc/{pid}/{name}");
        let path = std::fs::read_link(&magic).map_err(|e| crate::proc::from_io(pid, &magic, e))?;
        let held = stat(magic.as_str()).map_err(|e| crate::Error::sys(&magic, e))?;
        files.push(RequiredFile {
            path: path.as_os_str().as_bytes().to_vec(),
            id: file_id(&held),
            role: FileRole::Present as i32,
            writable: false,
            object: object.into(),
        });
    }
    Ok(files)
}

fn open_files(captured: &CapturedFiles) -> Vec<RequiredFile> {
    let mut lowest: BTreeMap<u32, i32> = BTreeMap::new();
    for d in captured.descriptors.iter().rev() {
        lowest.insert(d.file, d.fd);
    }
    let needed = |(index, fd): (&u32, &i32)| {
        let file = captured.files.get(*index as usize)?;
        required(file, format!("fd {fd}"))
    };
    lowest.iter().filter_map(needed).collect()
}

fn required(file: &OpenFile, object: String) -> Option<RequiredFile> {
    let writable = file.flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
    let make = |path: &[u8], id: FileId, role: FileRole| RequiredFile {
        path: path.to_vec(),
        id,
        role: role as i32,
        writable,
        object,
    };
    match file.kind.as_ref()? {
        // Redirected output: the file is made, its directory must be there.
        FileKind::Regular(PathFile { path, .. }) if file.flags & libc::O_CREAT as u32 != 0 => {
            let slash = path.iter().rposition(|b| *b == b'/')?;
            let parent = &path[..slash.max(1)];
            let id = FileId { mode: libc::S_IFDIR, ..FileId::default() };
            Some(make(parent, id, FileRole::Present))
        }
        // Files made by the kernel, and what is open by path only, have no content to compare.
        FileKind::Regular(f) if f.id.ino == 0 || file.flags & libc::O_PATH as u32 != 0 => {
            Some(make(&f.path, f.id.clone(), FileRole::Present))
        }
        FileKind::Regular(f) => Some(make(&f.path, f.id.clone(), FileRole::Open)),
        FileKind::Directory(f) | FileKind::Device(f) => {
            Some(make(&f.path, f.id.clone(), FileRole::Present))
        }
        _ => None,
    }
}

/// Huge pages of all mappings; a reservation without pages (`MAP_NORESERVE`) counts what is in use.
fn huge_pages(smaps: &[SmapsEntry]) -> Vec<HugePages> {
    let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
    for e in smaps.iter().filter(|e| e.flags.has(VmFlags::HUGETLB) && e.page_size > 0) {
        let reserved = !e.flags.has(VmFlags::NO_RESERVE);
        let bytes = if reserved { e.line.len() } else { e.hugetlb_bytes };
        *counts.entry(e.page_size).or_default() += bytes.div_ceil(e.page_size);
    }
    counts.into_iter().map(|(size, count)| HugePages { size, count }).collect()
}

/// Allowed CPUs of the main thread; empty if they are all.
fn affinity(pid: i32) -> Vec<u8> {
    let Ok(set) = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(pid)) else {
        return Vec::new();
    };
    let mut mask = vec![0u8; nix::sched::CpuSet::count().div_ceil(8)];
    let mut allowed = 0;
    for cpu in 0..nix::sched::CpuSet::count() {
        if set.is_set(cpu).unwrap_or(false) {
            mask[cpu / 8] |= 1 << (cpu % 8);
            allowed += 1;
        }
    }
    let all = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_CONF).ok().flatten();
    if all.is_some_and(|all| allowed >= all) {
        return Vec::new();
    }
    mask.truncate(mask.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1));
    mask
}

fn capabilities(threads: &[Status]) -> Vec<u64> {
    (0..5).map(|set| threads.iter().fold(0, |all, t| all | t.caps[set])).collect()
}

fn descriptors(captured: &CapturedFiles) -> u32 {
    let end = captured.descriptors.iter().map(|d| d.fd + 1).max().unwrap_or(0) as u32;
    end + captured.files.len() as u32 * 2 + DESCRIPTORS_ROOM
}
