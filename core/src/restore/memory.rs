//! Stage 1, memory: the program that builds the address space of a manifest inside the new process.
//!
//! Lazy mappings are registered with a userfaultfd before anything could collapse them into huge
//! pages. The userfaultfd is put into an `io_uring`'s table of fixed files, and the ring is mapped: so
//! the address space itself holds the last reference, whatever the program closes and whoever dies.

use crate::capture::presend::continues;
use crate::error::{Error, Result};
use crate::manifest::{Manifest, Mapping, MappingKind, vm_flag};
use crate::program::{Arg, Op, Program, Ref};
use crate::restore::files::PlannedFiles;
use crate::restore::scratch::Scratch;
use crate::sys::uffd;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Bytes of the ring that are mapped.
pub const RING_LEN: u64 = 4096;
const UFFD_FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;
const IO_URING_REGISTER_FILES: u64 = 2;
/// Slots in the ring: one for the process, the others for children it forks during the drain.
pub const RING_SLOTS: usize = 64;
const MREMAP_MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;

/// A range whose pages come later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LazyRange {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// Size of its pages in bytes.
    pub page_size: u32,
}

/// Where the results of the memory program are.
#[derive(Debug)]
pub struct MemoryPlan {
    /// The userfaultfd's number in the new process.
    pub uffd: Ref,
    /// The ring's number in the new process.
    pub ring: Ref,
    /// Where the ring is mapped, [`RING_LEN`] bytes.
    pub ring_mapping: Ref,
    /// What is registered.
    pub lazy: Vec<LazyRange>,
}

/// What becomes of the vdso.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdsoParts {
    /// Where a new process's own parts are, in address order.
    pub own: Vec<(u64, u64)>,
    /// The image the program knows, when this kernel's differs: see [`crate::arch::vdso`].
    pub foreign: Option<Vec<u8>>,
}

/// True when pages of this mapping are fetched on demand.
pub fn is_lazy(mapping: &Mapping) -> bool {
    matches!(
        MappingKind::try_from(mapping.kind),
        Ok(MappingKind::Anon | MappingKind::ShmemAnon | MappingKind::HugetlbAnon)
    )
}

/// The lazy ranges of a manifest, ascending.
pub fn lazy_ranges(m: &Manifest) -> Vec<LazyRange> {
    m.mappings.iter().filter(|v| is_lazy(v)).map(lazy_range).collect()
}

fn lazy_range(v: &Mapping) -> LazyRange {
    LazyRange { start: v.start, len_bytes: v.end - v.start, page_size: v.page_size }
}

/// A lazy mapping as the page service sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LazyView {
    /// Where it is.
    pub range: LazyRange,
    /// A view of an object of shared memory.
    pub shared: bool,
    /// A forked child gets a copy.
    pub forks: bool,
    /// The object's pages are named by their addresses in an earlier view, which begins to show this
    /// view's part at this address.
    pub alias_of: Option<u64>,
}

/// The lazy mappings of a manifest. Of several views of one part of shared memory the first names its
/// pages; both hosts must agree on which.
pub fn lazy_views(m: &Manifest) -> Vec<LazyView> {
    // For each object by where they begin: end of a part, and the address of the view that names it. None of them
    // is within another, so that of those that begin before some place the last reaches furthest.
    let mut named: HashMap<u32, BTreeMap<u64, (u64, u64)>> = HashMap::new();
    let mut views = Vec::new();
    for v in m.mappings.iter().filter(|v| is_lazy(v)) {
        let range = lazy_range(v);
        let shared = v.flags & vm_flag::SHARED != 0;
        let end = v.offset.saturating_add(range.len_bytes);
        let alias_of = if shared {
            let parts = named.entry(v.object).or_default();
            let before = parts.range(..=v.offset).next_back().filter(|(_, part)| end <= part.0);
            let alias_of = before.map(|(offset, part)| part.1 + (v.offset - offset));
            if alias_of.is_none() {
                let within = parts.range(v.offset..end).take_while(|(_, part)| part.0 <= end);
                for offset in within.map(|(offset, _)| *offset).collect::<Vec<_>>() {
                    parts.remove(&offset);
                }
                parts.insert(v.offset, (end, v.start));
            }
            alias_of
        } else {
            None
        };
        let forks = v.flags & (vm_flag::DONTFORK | vm_flag::WIPEONFORK) == 0;
        views.push(LazyView { range, shared, forks, alias_of });
    }
    views
}

/// Adds the making of private file mappings before the freeze.
pub(super) fn plan_staged(mappings: &[Mapping], p: &mut Program) {
    let mut open = OpenFiles::default();
    for v in mappings {
        let fd = open.open(v, p);
        map_file(v, fd.into(), p);
    }
    open.close_all(p);
}

/// Adds what makes of the mappings of before the freeze (`staged`) those of the manifest, and removes
/// the others.
fn plan_kept(m: &Manifest, staged: &[Mapping], p: &mut Program) -> Result<()> {
    let kept: Vec<&Mapping> = m.mappings.iter().filter(|v| v.staged).collect();
    for s in staged {
        for gap in gaps(s, &kept) {
            let args = [gap.start.into(), (gap.end - gap.start).into()];
            p.must("drop what was mapped ahead", libc::SYS_munmap, args);
        }
    }
    for v in &kept {
        let before = staged
            .iter()
            .find(|s| continues(s, v))
            .ok_or_else(|| Error::Manifest(format!("mapping {} was not sent before", hex(v))))?;
        if before.prot != v.prot {
            let args = [v.start.into(), (v.end - v.start).into(), v.prot.into()];
            p.must(format!("protect {}", hex(v)), libc::SYS_mprotect, args);
        }
    }
    for r in &m.reverted {
        if !kept.iter().any(|v| v.start <= r.start && r.end <= v.end) {
            return Err(Error::Manifest(format!("reverted pages at {:#x}", r.start)));
        }
        let args = [r.start.into(), (r.end - r.start).into(), libc::MADV_DONTNEED.into()];
        p.must("take back pages sent ahead", libc::SYS_madvise, args);
    }
    Ok(())
}

/// What of `staged` no kept mapping covers. `kept` ascends.
fn gaps(staged: &Mapping, kept: &[&Mapping]) -> Vec<Range<u64>> {
    let mut gaps = Vec::new();
    let mut at = staged.start;
    for v in kept.iter().filter(|v| staged.start <= v.start && v.end <= staged.end) {
        if at < v.start {
            gaps.push(at..v.start);
        }
        at = v.end;
    }
    if at < staged.end {
        gaps.push(at..staged.end);
    }
    gaps
}

/// Adds the entries that build the address space, around what is there from before the freeze
/// (`staged`). `files` knows the descriptors of memfds to be mapped.
pub fn plan_mappings(
    m: &Manifest,
    scratch: &Scratch,
    vdso: &VdsoParts,
    files: &PlannedFiles,
    staged: &[Mapping],
    p: &mut Program,
) -> Result<()> {
    plan_kept(m, staged, p)?;
    plan_vdso(m, scratch, vdso, p)?;
    plan_shmem(m, scratch, p)?;
    let mut open = OpenFiles::default();
    for v in m.mappings.iter().filter(|v| !v.staged) {
        match MappingKind::try_from(v.kind) {
            Ok(MappingKind::Anon) => map_anon(v, 0, p),
            Ok(MappingKind::HugetlbAnon) => {
                let log = v.page_size.trailing_zeros() as i32;
                map_anon(v, libc::MAP_HUGETLB | (log << libc::MAP_HUGE_SHIFT), p);
            }
            Ok(MappingKind::FilePrivate | MappingKind::FileShared) => {
                let fd = open.open(v, p);
                map_file(v, fd.into(), p);
            }
            Ok(MappingKind::Memfd) => {
                let fd = files
                    .memfd(m, v.object)
                    .ok_or_else(|| Error::Manifest(format!("mapping {:#x}: no memfd", v.start)))?;
                map_file(v, fd.into(), p);
            }
            Ok(MappingKind::ShmemAnon | MappingKind::Vdso | MappingKind::Vvar) => {}
            Err(_) => return Err(Error::Manifest(format!("mapping kind {}", v.kind))),
        }
    }
    open.close_all(p);
    for guard in &m.guards {
        const MADV_GUARD_INSTALL: i32 = 102;
        p.must(
            format!("install guard {:x}-{:x} (Linux 6.13)", guard.start, guard.end),
            libc::SYS_madvise,
            [guard.start.into(), (guard.end - guard.start).into(), MADV_GUARD_INSTALL.into()],
        );
    }
    Ok(())
}

/// Adds the userfaultfd with its holder, and the advice that must come after it. When all descriptors
/// are in place: the two it makes take free numbers, and are closed again before the program runs.
pub fn plan_faults(m: &Manifest, p: &mut Program) -> MemoryPlan {
    let lazy = lazy_ranges(m);
    let (uffd, ring, ring_mapping) = plan_uffd(&lazy, p);
    let kernels = [MappingKind::Vdso as i32, MappingKind::Vvar as i32];
    for v in m.mappings.iter().filter(|v| !kernels.contains(&v.kind)) {
        plan_advice(v, p);
    }
    MemoryPlan { uffd, ring, ring_mapping, lazy }
}

fn hex(v: &Mapping) -> String {
    format!("{:x}-{:x}", v.start, v.end)
}

fn share(v: &Mapping) -> i32 {
    if v.flags & vm_flag::SHARED != 0 { libc::MAP_SHARED } else { libc::MAP_PRIVATE }
}

fn map_anon(v: &Mapping, extra: i32, p: &mut Program) {
    let mut flags = share(v) | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | extra;
    if v.flags & vm_flag::GROWSDOWN != 0 {
        flags |= libc::MAP_GROWSDOWN;
    }
    if v.flags & vm_flag::NORESERVE != 0 {
        flags |= libc::MAP_NORESERVE;
    }
    map(v, flags, Arg::Val(u64::MAX), 0, p);
}

fn map_file(v: &Mapping, fd: Arg, p: &mut Program) {
    let noreserve = if v.flags & vm_flag::NORESERVE != 0 { libc::MAP_NORESERVE } else { 0 };
    map(v, share(v) | noreserve | libc::MAP_FIXED_NOREPLACE, fd, v.offset, p);
}

fn map(v: &Mapping, flags: i32, fd: Arg, offset: u64, p: &mut Program) {
    p.must(
        format!("map {} {}", hex(v), String::from_utf8_lossy(&v.path)),
        libc::SYS_mmap,
        [v.start.into(), (v.end - v.start).into(), v.prot.into(), flags.into(), fd, offset.into()],
    );
}

/// Descriptors of mapped files, each opened once per access mode.
#[derive(Default)]
struct OpenFiles(BTreeMap<(Vec<u8>, bool), Ref>);

impl OpenFiles {
    fn open(&mut self, v: &Mapping, p: &mut Program) -> Ref {
        let shared = v.flags & vm_flag::SHARED != 0;
        let write = shared && v.flags & vm_flag::MAYWRITE != 0;
        *self.0.entry((v.path.clone(), write)).or_insert_with(|| {
            let path = p.c_string(&v.path);
            let mode = if write { libc::O_RDWR } else { libc::O_RDONLY };
            p.must(
                format!("open mapped file {}", String::from_utf8_lossy(&v.path)),
                libc::SYS_open,
                [path.into(), (mode | libc::O_CLOEXEC | libc::O_NOCTTY).into()],
            )
        })
    }

    fn close_all(self, p: &mut Program) {
        for (_, fd) in self.0 {
            p.may("close a mapped file", libc::SYS_close, [fd.into()]);
        }
    }
}

/// Moves the new process's own vdso, parked in the scratch range, to where the program knows it.
fn plan_vdso(m: &Manifest, scratch: &Scratch, vdso: &VdsoParts, p: &mut Program) -> Result<()> {
    if vdso.foreign.is_some() {
        // The image is written there once it is mapped; its data pages are used by nobody any more.
        for v in m.mappings.iter().filter(|v| v.kind == MappingKind::Vdso as i32) {
            map_anon(v, 0, p);
        }
        return Ok(());
    }
    let special =
        |v: &&Mapping| v.kind == MappingKind::Vdso as i32 || v.kind == MappingKind::Vvar as i32;
    let wanted: Vec<&Mapping> = m.mappings.iter().filter(special).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let own = &vdso.own;
    let same = wanted.len() == own.len()
        && wanted.iter().zip(own).all(|(w, o)| {
            w.end - w.start == o.1 - o.0 && w.start - wanted[0].start == o.0 - own[0].0
        });
    if !same {
        return Err(Error::Refused("the two kernels' vdsos differ in layout".into()));
    }
    for (w, o) in wanted.iter().zip(own) {
        let from = scratch.vdso_parking() + (o.0 - own[0].0);
        let len = w.end - w.start;
        p.must(
            format!("move the vdso to {}", hex(w)),
            libc::SYS_mremap,
            [from.into(), len.into(), len.into(), MREMAP_MOVE.into(), w.start.into()],
        );
    }
    Ok(())
}

/// Anonymous shared memory: one object may be mapped in several places. It is made once, beside the
/// scratch range, duplicated into place (`mremap` with old length zero), and the first mapping removed.
fn plan_shmem(m: &Manifest, scratch: &Scratch, p: &mut Program) -> Result<()> {
    let mut objects: BTreeMap<u32, Vec<&Mapping>> = BTreeMap::new();
    for v in m.mappings.iter().filter(|v| v.kind == MappingKind::ShmemAnon as i32) {
        objects.entry(v.object).or_default().push(v);
    }
    let at = scratch.range().end.next_multiple_of(2 << 20) + (2 << 20);
    for views in objects.values() {
        let end = |v: &&Mapping| v.offset.saturating_add(v.end - v.start);
        let len = views.iter().map(end).max().unwrap_or(0);
        let stop =
            at.checked_add(len).ok_or_else(|| Error::Manifest("shared memory size".into()))?;
        if m.mappings.iter().any(|v| v.start < stop && v.end > at) {
            return Err(Error::Refused(format!(
                "no room to build {len} bytes of shared memory; try again"
            )));
        }
        let flags = libc::MAP_SHARED
            | libc::MAP_ANONYMOUS
            | libc::MAP_NORESERVE
            | libc::MAP_FIXED_NOREPLACE;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        p.must(
            "make shared memory",
            libc::SYS_mmap,
            [at.into(), len.into(), rw.into(), flags.into(), u64::MAX.into(), 0.into()],
        );
        for v in views {
            let len = v.end - v.start;
            p.must(
                format!("map shared memory {}", hex(v)),
                libc::SYS_mremap,
                [(at + v.offset).into(), 0.into(), len.into(), MREMAP_MOVE.into(), v.start.into()],
            );
            p.must(
                format!("protect shared memory {}", hex(v)),
                libc::SYS_mprotect,
                [v.start.into(), len.into(), v.prot.into()],
            );
        }
        p.must("drop the builder's view", libc::SYS_munmap, [at.into(), len.into()]);
    }
    Ok(())
}

fn plan_uffd(lazy: &[LazyRange], p: &mut Program) -> (Ref, Ref, Ref) {
    let uffd = p.must("userfaultfd", libc::SYS_userfaultfd, [UFFD_FLAGS.into()]);
    let api = p.words(&uffd::api_words());
    p.must(
        "enable userfaultfd events (needs CAP_SYS_PTRACE)",
        libc::SYS_ioctl,
        [uffd.into(), uffd::UFFDIO_API.into(), api.into()],
    );
    for range in lazy {
        let words = p.words(&uffd::register_words(range.start, range.len_bytes));
        p.must(
            format!("register {:x}+{:x} for faults", range.start, range.len_bytes),
            libc::SYS_ioctl,
            [uffd.into(), uffd::UFFDIO_REGISTER.into(), words.into()],
        );
    }
    let params = p.data(&[0u8; 120]);
    let ring = p.must(
        "io_uring_setup (is kernel.io_uring_disabled set?)",
        libc::SYS_io_uring_setup,
        [1.into(), params.into()],
    );
    let mapping = p.must(
        "map the ring",
        libc::SYS_mmap,
        [
            // The kernel lets nobody choose where a ring is mapped.
            0.into(),
            RING_LEN.into(),
            libc::PROT_READ.into(),
            libc::MAP_SHARED.into(),
            ring.into(),
            0.into(),
        ],
    );
    // The loop stores 64 bits: the number in the first slot and zeros in the second, which become -1
    // (an empty slot) again.
    let slots = p.data(&[0xff; RING_SLOTS * 4]);
    p.op(Op::Store, [slots.into(), uffd.into()]);
    p.op(Op::Add, [(slots + 4).into(), u32::MAX.into()]);
    p.must(
        "put the userfaultfd into the ring",
        libc::SYS_io_uring_register,
        [ring.into(), IO_URING_REGISTER_FILES.into(), slots.into(), RING_SLOTS.into()],
    );
    (uffd, ring, mapping)
}

fn plan_advice(v: &Mapping, p: &mut Program) {
    const ADVICE: [(u32, i32); 8] = [
        (vm_flag::DONTFORK, libc::MADV_DONTFORK),
        (vm_flag::WIPEONFORK, libc::MADV_WIPEONFORK),
        (vm_flag::DONTDUMP, libc::MADV_DONTDUMP),
        (vm_flag::HUGEPAGE, libc::MADV_HUGEPAGE),
        (vm_flag::NOHUGEPAGE, libc::MADV_NOHUGEPAGE),
        (vm_flag::MERGEABLE, libc::MADV_MERGEABLE),
        (vm_flag::SEQUENTIAL, libc::MADV_SEQUENTIAL),
        (vm_flag::RANDOM, libc::MADV_RANDOM),
    ];
    let len = v.end - v.start;
    for (flag, advice) in ADVICE {
        if v.flags & flag != 0 {
            p.must(
                format!("madvise {} {advice}", hex(v)),
                libc::SYS_madvise,
                [v.start.into(), len.into(), advice.into()],
            );
        }
    }
    if v.flags & vm_flag::LOCKED != 0 {
        // Populating would need pages that have not arrived; the rest follows after the drain.
        p.must(
            format!("mlock {}", hex(v)),
            libc::SYS_mlock2,
            [v.start.into(), len.into(), libc::MLOCK_ONFAULT.into()],
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(start: u64, offset: u64, pages: u64, object: u32) -> Mapping {
        Mapping {
            start,
            end: start + pages * 4096,
            kind: MappingKind::ShmemAnon as i32,
            flags: vm_flag::SHARED,
            offset: offset * 4096,
            object,
            page_size: 4096,
            ..Mapping::default()
        }
    }

    #[test]
    fn the_first_view_of_a_part_names_it() {
        let mappings = vec![
            view(0x10000, 2, 2, 1),
            view(0x20000, 2, 2, 2),
            view(0x30000, 3, 1, 1),
            view(0x40000, 0, 8, 1),
            view(0x50000, 3, 2, 1),
            view(0x60000, 7, 2, 1),
        ];
        let aliases = lazy_views(&Manifest { mappings, ..Manifest::default() });
        let aliases: Vec<_> = aliases.iter().map(|v| v.alias_of).collect();
        assert_eq!(aliases, [None, None, Some(0x11000), None, Some(0x43000), None]);
    }
}
