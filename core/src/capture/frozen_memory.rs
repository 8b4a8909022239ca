//! The memory of the frozen copy, as the page server reads it.
//!
//! The copy never runs again, so what is read here never changes. Absent pages are never read: a read
//! would make the kernel allocate them.

use crate::error::{Error, Result};
use crate::manifest::{Manifest, vm_flag};
use crate::restore::memory::{is_lazy, lazy_views};
use crate::sys::mem::{ProcMem, read_process};
use crate::sys::pagemap::{PageRun, Pagemap, Wanted};
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::ops::Range;

const PAGE: u64 = 4096;
/// Addresses looked through in one go: a multiple of every page size.
const SCAN_STEP_BYTES: u64 = 64 << 30;

/// The lazy part of a frozen process's memory.
#[derive(Debug)]
pub struct FrozenMemory {
    pid: i32,
    mem: ProcMem,
    map: Pagemap,
    areas: Vec<Area>,
}

#[derive(Debug)]
struct Area {
    start: u64,
    end: u64,
    page_size: u64,
    /// Shared memory: pages may exist in the object without being in this process's page tables, so
    /// the object is asked. With the offset of the area in it.
    object: Option<(File, u64)>,
    /// A further view of pages that an earlier area names.
    alias: bool,
}

/// A run of pages that all exist, or all don't.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len_bytes: u64,
    /// True when the pages exist.
    pub present: bool,
}

impl FrozenMemory {
    /// Opens the lazy mappings of a frozen process.
    pub fn open(pid: i32, m: &Manifest) -> Result<Self> {
        let mut areas = Vec::new();
        let lazy = m.mappings.iter().filter(|v| is_lazy(v));
        for (v, view) in lazy.zip(lazy_views(m)) {
            let object = if v.flags & vm_flag::SHARED != 0 {
                let path = format!("/proc/{pid}/map_files/{:x}-{:x}", v.start, v.end);
                let file = File::open(&path).map_err(|e| Error::io(format!("open {path}"), e))?;
                Some((file, v.offset))
            } else {
                None
            };
            let page_size = u64::from(v.page_size);
            let alias = view.alias_of.is_some();
            areas.push(Area { start: v.start, end: v.end, page_size, object, alias });
        }
        Ok(Self { pid, mem: ProcMem::open(pid)?, map: Pagemap::open(pid)?, areas })
    }

    fn area(&self, address: u64) -> Option<&Area> {
        let after = self.areas.partition_point(|a| a.start <= address);
        self.areas[..after].last().filter(|a| address < a.end)
    }

    /// The leading run of `address..address+len` that exists as a whole, or not at all. `None` when the
    /// address is in no lazy mapping.
    pub fn extent(&self, address: u64, len: u64) -> Result<Option<Extent>> {
        let Some(area) = self.area(address) else { return Ok(None) };
        let end = address.saturating_add(len).min(area.end);
        if area.object.is_none() && end - address == PAGE {
            let present = self.map.exists(address)?;
            return Ok(Some(Extent { len_bytes: PAGE, present }));
        }
        let mut first: Option<PageRun> = None;
        self.scan_area(area, address..end, &mut |run| {
            first.get_or_insert(run);
        })?;
        Ok(Some(match first {
            None => Extent { len_bytes: end - address, present: false },
            Some(r) if r.start > address => Extent { len_bytes: r.start - address, present: false },
            Some(r) => Extent { len_bytes: r.end.min(end) - address, present: true },
        }))
    }

    /// Reads pages that exist.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<()> {
        if read_process(self.pid, address, out) == Ok(out.len()) {
            return Ok(());
        }
        // Not readable by its own protections, or only partly.
        self.mem.read(address, out)
    }

    /// Calls `found` for every run of existing pages, ascending; for pages with several views once. Now and then it calls
    /// `on_the_way`, however little is found: without `PAGEMAP_SCAN` terabytes of reserved addresses take many seconds.
    pub fn scan<E: From<Error>>(
        &self,
        found: &mut dyn FnMut(PageRun),
        on_the_way: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        for area in self.areas.iter().filter(|a| !a.alias) {
            let mut at = area.start;
            while at < area.end {
                let end = area.end.min(at + SCAN_STEP_BYTES);
                self.scan_area(area, at..end, found)?;
                on_the_way()?;
                at = end;
            }
        }
        Ok(())
    }

    /// Calls `found` for runs of pages that can be pinned without making the kernel allocate any, until `go_on`
    /// answers no. Runs shorter than `len_bytes_min` may be left out.
    pub fn scan_pinnable(
        &self,
        len_bytes_min: u64,
        found: &mut dyn FnMut(PageRun),
        go_on: &dyn Fn() -> bool,
    ) -> Result<()> {
        for area in self.areas.iter().filter(|a| !a.alias) {
            let mut at = area.start;
            while at < area.end && go_on() {
                let end = area.end.min(at + SCAN_STEP_BYTES);
                let mut existing = Vec::new();
                self.scan_area(area, at..end, &mut |run| {
                    if run.end - run.start >= len_bytes_min {
                        existing.push(run);
                    }
                })?;
                for run in existing {
                    if area.object.is_some() {
                        found(run);
                    } else {
                        self.map.scan(run.start, run.end, Wanted::Own, found)?;
                    }
                }
                at = end;
            }
        }
        Ok(())
    }

    fn scan_area(
        &self,
        area: &Area,
        range: Range<u64>,
        found: &mut dyn FnMut(PageRun),
    ) -> Result<()> {
        let Some((file, base)) = &area.object else {
            return self.scan_page_tables(area, range, found);
        };
        let offset = |address: u64| (base + (address - area.start)) as i64;
        let mut at = range.start;
        while at < range.end {
            let data = match lseek(file, offset(at), Whence::SeekData) {
                Ok(data) => area.start + (data as u64 - base),
                Err(nix::errno::Errno::ENXIO) => return Ok(()),
                Err(e) => return Err(Error::sys("find data in shared memory", e)),
            };
            if data >= range.end {
                return Ok(());
            }
            let hole = lseek(file, offset(data), Whence::SeekHole)
                .map_err(|e| Error::sys("find holes in shared memory", e))?;
            let hole = area.start + (hole as u64 - base);
            found(PageRun { start: data.max(at), end: hole.min(range.end), huge: false });
            at = hole;
        }
        Ok(())
    }

    /// Runs are widened to whole pages of the area's size (hugetlb).
    fn scan_page_tables(
        &self,
        area: &Area,
        range: Range<u64>,
        found: &mut dyn FnMut(PageRun),
    ) -> Result<()> {
        let size = area.page_size;
        if size == PAGE {
            return self.map.scan(range.start, range.end, Wanted::Existing, found);
        }
        let mut reached = 0;
        self.map.scan(range.start, range.end, Wanted::Existing, &mut |run| {
            let start = (run.start / size * size).max(reached);
            let end = run.end.next_multiple_of(size);
            if start < end {
                found(PageRun { start, end, huge: false });
                reached = end;
            }
        })
    }
}
