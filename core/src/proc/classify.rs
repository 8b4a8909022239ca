//! Mappings as the kernel reports them, classified into what a manifest can hold.
//!
//! Flags come from `smaps`, which is too slow for a frozen process. So smaps is read just before the
//! freeze, and a line of `maps` read in the freeze inherits from it. This is sound for a line that
//! overlaps an entry of the same sort: a line is one area of the kernel, whose flags hold for all of
//! it, and areas merge only where their flags are equal.

use super::maps::MapLine;
use super::smaps::{SmapsEntry, VmFlags};
use crate::manifest::{FileKind, Mapping, MappingKind, OpenFile, PAGE_SIZE_MAX, vm_flag};
use crate::preflight::Blocker;
use std::collections::HashMap;
use std::ops::Range;

/// Why mappings could not be classified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unclassified {
    /// These lines (by index) are newer than the smaps: read it again.
    Stale(Vec<usize>),
    /// These can't be moved.
    Blocked(Vec<Blocker>),
}

/// Classifies the mappings of a process.
///
/// `smaps` was read no later than `maps`; both ascend. `files` is what
/// [`crate::capture::files::capture_files`] found with the same `maps`: a mapping of a memfd refers to
/// its first description there.
pub fn classify(
    maps: &[MapLine],
    smaps: &[SmapsEntry],
    files: &[OpenFile],
) -> Result<Vec<Mapping>, Unclassified> {
    let mut objects = Objects::new(files);
    let mut mappings = Vec::with_capacity(maps.len());
    let (mut stale, mut blockers) = (Vec::new(), Vec::new());
    let mut first = 0;
    for (index, line) in maps.iter().enumerate() {
        if line.path == b"[vsyscall]" {
            continue;
        }
        while smaps.get(first).is_some_and(|e| e.line.end <= line.start) {
            first += 1;
        }
        let Some(entry) = inherit(line, &smaps[first..]) else {
            stale.push(index);
            continue;
        };
        match kind(line, entry.flags) {
            Ok(MappingKind::HugetlbAnon) if entry.page_size > PAGE_SIZE_MAX => {
                let reason = format!("pages of {} MiB can't be moved", entry.page_size >> 20);
                blockers.push(blocker(line, &reason, "use pages of 2 MiB (MAP_HUGE_2MB)"));
            }
            Ok(kind) => match objects.id(kind, line) {
                Ok(object) => mappings.push(mapping(line, entry, kind, object)),
                Err(blocker) => blockers.push(blocker),
            },
            Err(blocker) => blockers.push(blocker),
        }
    }
    if !stale.is_empty() {
        Err(Unclassified::Stale(stale))
    } else if !blockers.is_empty() {
        Err(Unclassified::Blocked(blockers))
    } else {
        Ok(mappings)
    }
}

/// The entry whose flags hold for `line`: all entries that overlap it and are of the same sort agree.
fn inherit<'a>(line: &MapLine, smaps: &'a [SmapsEntry]) -> Option<&'a SmapsEntry> {
    let mut found: Option<&SmapsEntry> = None;
    for entry in smaps.iter().take_while(|e| e.line.start < line.end) {
        if !same_sort(line, &entry.line) {
            continue;
        }
        match found {
            Some(f) if f.flags != entry.flags || f.page_size != entry.page_size => return None,
            _ => found = Some(entry),
        }
    }
    found
}

/// True if `line` may be a later state of `entry`: same protection, and the same file at the same
/// place, or no file. The name is left out, since `[heap]` and names of anonymous memory come and go.
fn same_sort(line: &MapLine, entry: &MapLine) -> bool {
    let place = |l: &MapLine| l.offset.wrapping_sub(l.start);
    line.prot == entry.prot
        && line.shared == entry.shared
        && (line.dev, line.ino) == (entry.dev, entry.ino)
        && (line.ino == 0 || place(line) == place(entry))
        && special(line) == special(entry)
}

/// The kernel's own mappings (`[vdso]` and the like), as opposed to memory with a name.
fn special(line: &MapLine) -> Option<&[u8]> {
    let memory: [&[u8]; 4] = [b"[heap]", b"[stack]", b"[anon:", b"[anon_shmem:"];
    let own = line.path.starts_with(b"[") && !memory.iter().any(|name| line.path.starts_with(name));
    own.then_some(&line.path)
}

fn mapping(line: &MapLine, entry: &SmapsEntry, kind: MappingKind, object: u32) -> Mapping {
    let by_path = matches!(kind, MappingKind::FilePrivate | MappingKind::FileShared);
    Mapping {
        start: line.start,
        end: line.end,
        prot: line.prot,
        kind: kind as i32,
        flags: manifest_flags(line, entry.flags),
        offset: line.offset,
        path: if by_path { line.path.clone() } else { Vec::new() },
        object,
        page_size: entry.page_size as u32,
        name: anon_name(&line.path).to_vec(),
        staged: false,
    }
}

/// `NAME` of `[anon:NAME]` and `[anon_shmem:NAME]`.
fn anon_name(path: &[u8]) -> &[u8] {
    path.strip_prefix(b"[anon:")
        .or_else(|| path.strip_prefix(b"[anon_shmem:"))
        .and_then(|rest| rest.strip_suffix(b"]"))
        .unwrap_or_default()
}

fn manifest_flags(line: &MapLine, vm: VmFlags) -> u32 {
    const BITS: [(VmFlags, u32); 13] = [
        (VmFlags::GROWS_DOWN, vm_flag::GROWSDOWN),
        (VmFlags::NO_RESERVE, vm_flag::NORESERVE),
        (VmFlags::LOCKED, vm_flag::LOCKED),
        (VmFlags::LOCK_ON_FAULT, vm_flag::LOCKONFAULT),
        (VmFlags::DONT_COPY, vm_flag::DONTFORK),
        (VmFlags::WIPE_ON_FORK, vm_flag::WIPEONFORK),
        (VmFlags::DONT_DUMP, vm_flag::DONTDUMP),
        (VmFlags::HUGE_PAGE, vm_flag::HUGEPAGE),
        (VmFlags::NO_HUGE_PAGE, vm_flag::NOHUGEPAGE),
        (VmFlags::MERGEABLE, vm_flag::MERGEABLE),
        (VmFlags::SEQUENTIAL, vm_flag::SEQUENTIAL),
        (VmFlags::RANDOM, vm_flag::RANDOM),
        (VmFlags::MAY_WRITE, vm_flag::MAYWRITE),
    ];
    let mut flags = if line.shared { vm_flag::SHARED } else { 0 };
    for (letters, bit) in BITS {
        if vm.has(letters) {
            flags |= bit;
        }
    }
    // A private mapping may always be made writable.
    if line.shared { flags } else { flags & !vm_flag::MAYWRITE }
}

/// True for the memory of a memfd, by the name the kernel gives it.
pub fn is_memfd(line: &MapLine) -> bool {
    line.path.starts_with(b"/memfd:") && line.path.ends_with(b" (deleted)")
}

/// Decides what a mapping is, or why it can't be moved.
fn kind(line: &MapLine, vm: VmFlags) -> Result<MappingKind, Blocker> {
    let no = |reason: &str, remedy: &str| Err(blocker(line, reason, remedy));
    match line.path.as_slice() {
        b"[vdso]" => return Ok(MappingKind::Vdso),
        name if name.starts_with(b"[vvar") => return Ok(MappingKind::Vvar),
        _ => {}
    }
    if let Some((reason, remedy)) = refused_flags(vm) {
        return no(reason, remedy);
    }
    match line.path.as_slice() {
        b"" | b"[heap]" | b"[stack]" => Ok(MappingKind::Anon),
        name if name.starts_with(b"[anon:") => Ok(MappingKind::Anon),
        name if name.starts_with(b"[anon_shmem:") => Ok(MappingKind::ShmemAnon),
        name if name.starts_with(b"[") => {
            no("a special mapping of the kernel", "stop what made it (a probe or tracer)")
        }
        b"/dev/zero (deleted)" => Ok(MappingKind::ShmemAnon),
        b"/dev/zero" if !line.shared => Ok(MappingKind::Anon),
        b"/anon_hugepage (deleted)" => Ok(MappingKind::HugetlbAnon),
        _ if is_memfd(line) => Ok(MappingKind::Memfd),
        name if name.starts_with(b"/SYSV") && name.ends_with(b" (deleted)") => {
            no("System V shared memory", "end its use in the program (shmdt)")
        }
        b"/secretmem (deleted)" => no("secret memory can't be read", "unmap it in the program"),
        b"/[aio] (deleted)" => {
            no("an AIO context (io_setup)", "let the program destroy it (io_destroy)")
        }
        name if !name.starts_with(b"/") => {
            no("memory of a kernel object", "let the program unmap and close it")
        }
        name if name.starts_with(b"/dev/") && !name.starts_with(b"/dev/shm/") => {
            no("memory of a device", "let the program close the device")
        }
        _ if vm.has(VmFlags::HUGETLB) => {
            no("a file of hugetlbfs", "use MAP_HUGETLB or memfd_create(MFD_HUGETLB) instead")
        }
        name if name.ends_with(b" (deleted)") => no(
            "the mapped file was deleted or replaced",
            "restart the program (an upgrade of it or its libraries does this)",
        ),
        _ if line.shared => Ok(MappingKind::FileShared),
        _ => Ok(MappingKind::FilePrivate),
    }
}

fn refused_flags(vm: VmFlags) -> Option<(&'static str, &'static str)> {
    const REFUSED: [(VmFlags, &str, &str); 8] = [
        (VmFlags::SHADOW_STACK, "a shadow stack", "start the program without it (GLIBC_TUNABLES)"),
        (VmFlags::UFFD_MISSING, "watched by a userfaultfd", "wait until it is unregistered"),
        (VmFlags::UFFD_WP, "watched by a userfaultfd", "wait until it is unregistered"),
        (VmFlags::UFFD_MINOR, "watched by a userfaultfd", "wait until it is unregistered"),
        (VmFlags::SEALED, "sealed by mseal(2)", "start the program without memory sealing"),
        (VmFlags::SYNC, "mapped with MAP_SYNC", "use a file system without DAX"),
        (VmFlags::TAGGED, "tagged memory", "start the program without memory tagging"),
        (VmFlags::IO, "memory of a device", "let the program close the device"),
    ];
    REFUSED
        .iter()
        .find(|(flag, ..)| vm.has(*flag))
        .or_else(|| vm.has(VmFlags::PFN_MAP).then_some(&REFUSED[7]))
        .map(|(_, reason, remedy)| (*reason, *remedy))
}

fn blocker(line: &MapLine, reason: &str, remedy: &str) -> Blocker {
    let name = String::from_utf8_lossy(&line.path);
    let separator = if name.is_empty() { "" } else { ", " };
    Blocker::new(
        format!("mapping {:x}-{:x}", line.start, line.end),
        format!("{name}{separator}{reason}"),
        remedy,
    )
}

/// Ids of the objects behind shared mappings.
struct Objects {
    /// Memfds by [`crate::manifest::Memfd::inode`].
    memfds: HashMap<u64, u32>,
    /// Anonymous shared memory by device and inode, numbered in order of appearance.
    anonymous: HashMap<(u64, u64), u32>,
    /// What of each shared object of huge pages is mapped.
    huge: HashMap<u32, Vec<Range<u64>>>,
}

impl Objects {
    fn new(files: &[OpenFile]) -> Objects {
        let mut memfds = HashMap::new();
        for (index, file) in files.iter().enumerate() {
            if let Some(FileKind::Memfd(memfd)) = &file.kind {
                memfds.entry(memfd.inode).or_insert(index as u32);
            }
        }
        Objects { memfds, anonymous: HashMap::new(), huge: HashMap::new() }
    }

    /// Each mapping of huge pages is made as an object of its own, so no two may show the same part of one.
    fn huge_once(&mut self, id: u32, line: &MapLine) -> Result<u32, Blocker> {
        let part = line.offset..line.offset.saturating_add(line.len());
        let parts = self.huge.entry(id).or_default();
        if parts.iter().any(|p| p.start < part.end && part.start < p.end) {
            return Err(blocker(
                line,
                "shared huge pages mapped twice",
                "unmap one in the program",
            ));
        }
        parts.push(part);
        Ok(id)
    }

    fn id(&mut self, kind: MappingKind, line: &MapLine) -> Result<u32, Blocker> {
        match kind {
            MappingKind::Memfd => {
                self.memfds.get(&memory_id(line.dev, line.ino)).copied().ok_or_else(|| {
                    blocker(line, "mapped while descriptors were being listed", "try again")
                })
            }
            // A private huge page mapping has a file of its own, which no one else can map.
            MappingKind::ShmemAnon | MappingKind::HugetlbAnon if line.shared => {
                let next = self.anonymous.len() as u32;
                let id = *self.anonymous.entry((line.dev, line.ino)).or_insert(next);
                if kind == MappingKind::HugetlbAnon { self.huge_once(id, line) } else { Ok(id) }
            }
            MappingKind::ShmemAnon => {
                Err(blocker(line, "a private mapping of shared memory", "unmap it in the program"))
            }
            _ => Ok(0),
        }
    }
}

/// Id of a memory object within a manifest. Inode numbers of ordinary and huge memfds come from
/// different counters, so the device counts; both are small, so nothing is lost.
pub fn memory_id(dev: u64, ino: u64) -> u64 {
    (dev << 40) ^ ino
}

#[cfg(test)]
#[path = "classify_tests.rs"]
mod tests;
