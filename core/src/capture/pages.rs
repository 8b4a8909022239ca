//! The pages that travel with the manifest: those certain to be touched at once, those the kernel
//! itself writes (a missing page would lose the write), and written pages of private file mappings,
//! which can't be fetched on demand, as far as they were not sent before ([`super::presend`]).

use crate::arch::Regs;
use crate::capture::presend::written_runs;
use crate::error::Result;
use crate::manifest::{AddressRange, Manifest, Mapping, MappingKind, PageData};
use crate::restore::memory::is_lazy;
use crate::sys::mem::{ProcMem, read_process};
use crate::sys::pagemap::{Pagemap, Wanted};
use std::collections::BTreeSet;
use std::ops::Range;

const PAGE: u64 = 4096;
/// Argument and environment areas larger than this are left to faults.
const ARGS_LEN_MAX: u64 = 128 * 1024;
/// Entries of a robust futex list that are looked at (`ROBUST_LIST_LIMIT` of the kernel is 2048).
const ROBUST_ENTRIES_MAX: usize = 64;
/// Pages that registers point to, of all threads: what these touch next.
const POINTED_PAGES_MAX: usize = 64;

/// Finds guard regions in anonymous memory.
pub fn collect_guards(mappings: &[Mapping], map: &Pagemap) -> Result<Vec<AddressRange>> {
    let mut guards: Vec<AddressRange> = Vec::new();
    for v in mappings.iter().filter(|v| v.kind == MappingKind::Anon as i32) {
        map.scan(v.start, v.end, Wanted::Guards, &mut |r| match guards.last_mut() {
            Some(last) if last.end == r.start => last.end = r.end,
            _ => guards.push(AddressRange { start: r.start, end: r.end }),
        })?;
    }
    Ok(guards)
}

/// Reads runs of pages.
pub fn read_runs(pid: i32, mem: &ProcMem, runs: &[Range<u64>]) -> Result<Vec<PageData>> {
    runs.iter().map(|run| read_run(pid, mem, run)).collect()
}

fn read_run(pid: i32, mem: &ProcMem, run: &Range<u64>) -> Result<PageData> {
    let mut bytes = vec![0u8; (run.end - run.start) as usize];
    if read_process(pid, run.start, &mut bytes) != Ok(bytes.len()) {
        mem.read(run.start, &mut bytes)?;
    }
    Ok(PageData { address: run.start, bytes })
}

/// Written pages of private file mappings that the destination has nothing of.
pub fn unstaged_runs(m: &Manifest, map: &Pagemap) -> Result<Vec<Range<u64>>> {
    let mut runs = Vec::new();
    for v in m.mappings.iter().filter(|v| is_private_file(v) && !v.staged) {
        runs.extend(written_runs(v, map)?);
    }
    Ok(runs)
}

/// Pages of lazy mappings that travel with the manifest.
pub fn certain_runs(m: &Manifest, mem: &ProcMem, map: &Pagemap) -> Result<Vec<Range<u64>>> {
    let mut runs = Vec::new();
    for page in certain_pages(m, mem) {
        if map.exists(page)? {
            runs.push(page..page + PAGE);
        }
    }
    Ok(runs)
}

fn is_private_file(v: &Mapping) -> bool {
    // A private mapping of a memfd is treated like that of any other file.
    v.kind == MappingKind::FilePrivate as i32
        || (v.kind == MappingKind::Memfd as i32 && v.flags & crate::manifest::vm_flag::SHARED == 0)
}

/// Pages in lazy mappings that travel with the manifest if they exist.
fn certain_pages(m: &Manifest, mem: &ProcMem) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    let mut add = |start: u64, len: u64| {
        let mut at = start & !(PAGE - 1);
        while at < start.saturating_add(len) {
            pages.insert(at);
            at += PAGE;
        }
    };
    for t in &m.threads {
        if let Some(regs) = Regs::from_bytes(&t.regs) {
            // The red zone below, and the frames that return next.
            add(regs.rsp.saturating_sub(256), 256 + 2048);
            add(regs.rip, 16);
            add(regs.fs_base, 8);
        }
        if t.clear_child_tid != 0 {
            add(t.clear_child_tid, 4);
        }
        if t.rseq != 0 {
            add(t.rseq, u64::from(t.rseq_len));
        }
        if t.robust_list != 0 {
            add(t.robust_list, 24);
            robust_entries(t.robust_list, mem, &mut add);
        }
    }
    let mm = &m.process.mm;
    for (start, end) in [(mm.arg_start, mm.arg_end), (mm.env_start, mm.env_end)] {
        add(start, end.saturating_sub(start).min(ARGS_LEN_MAX));
    }
    pages.retain(|page| in_lazy(m, *page));
    pages.extend(pointed_pages(m));
    pages
}

/// Where registers point to.
fn pointed_pages(m: &Manifest) -> BTreeSet<u64> {
    let regs = m.threads.iter().filter_map(|t| Regs::from_bytes(&t.regs));
    let pages = regs.flat_map(|r| r.general()).map(|pointer| pointer & !(PAGE - 1));
    let mut pointed = BTreeSet::new();
    for page in pages.filter(|page| in_lazy(m, *page)) {
        if pointed.len() == POINTED_PAGES_MAX {
            break;
        }
        pointed.insert(page);
    }
    pointed
}

/// Walks a robust futex list: the kernel does the same when the thread dies, and gives up at the first
/// missing page.
fn robust_entries(head: u64, mem: &ProcMem, add: &mut dyn FnMut(u64, u64)) {
    let word = |at: u64| {
        let mut raw = [0u8; 8];
        mem.read(at, &mut raw).ok().map(|()| u64::from_le_bytes(raw))
    };
    let Some(offset) = word(head.wrapping_add(8)) else { return };
    let mut next = word(head);
    for _ in 0..ROBUST_ENTRIES_MAX {
        // The lowest bit marks priority-inheriting futexes.
        let Some(entry) = next.map(|e| e & !1).filter(|e| *e != head && *e != 0) else { return };
        add(entry, 8);
        add(entry.wrapping_add(offset), 4);
        next = word(entry);
    }
}

fn in_lazy(m: &Manifest, page: u64) -> bool {
    let after = m.mappings.partition_point(|v| v.start <= page);
    after > 0 && {
        let v = &m.mappings[after - 1];
        page < v.end && is_lazy(v) && v.page_size == PAGE as u32
    }
}
