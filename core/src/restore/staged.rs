//! What comes before the freeze: memfds with their content and private file mappings with their
//! written pages, made and filled in the new process while it waits. After the freeze only what has
//! changed is left to be done. If the migration fails all of it goes with the new process.

use crate::capture::files::MEMFD_BYTES_MAX;
use crate::capture::presend::{
    OWN_MEMORY, STAGED_MAPPINGS_MAX, STAGED_MEMFDS_MAX, WRITTEN_LEN_MAX,
};
use crate::error::{Error, Result};
use crate::manifest::{FileKind, Manifest, Mapping, MappingKind, Memfd};
use crate::program::{Program, Ref};
use crate::restore::check::check_mapping;
use crate::restore::files::memory::{check, plan_memfd};
use crate::restore::files::raise_limit;
use crate::restore::memory::plan_staged;
use crate::sys::mapped::Shared;
use crate::sys::mem::ProcMem;
use crate::sys::pidfd::PidFd;
use nix::fcntl::{FallocateFlags, fallocate};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Permissions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

const PAGE: u64 = 4096;
/// Rounds may send pages that are given back before the next: a source never has twice its limits.
const SLACK: u64 = 2;
const NUMBERS_ROOM: usize = 256;

/// What the new process has from before the freeze.
#[derive(Debug, Default)]
pub struct Staged {
    memfds: BTreeMap<u64, StagedMemfd>,
    mappings: Vec<Mapping>,
    mem: Option<ProcMem>,
    /// Pages written to mappings.
    pages: BTreeSet<u64>,
    /// Bytes that memfds take.
    memfd_bytes: u64,
}

#[derive(Debug)]
struct StagedMemfd {
    /// In the new process.
    number: i32,
    /// The same description here.
    file: File,
    huge_page_size: u64,
    bytes: u64,
}

fn bad<T>(what: impl Into<String>) -> Result<T> {
    Err(Error::Manifest(what.into()))
}

impl Staged {
    /// Refuses what no source sends. `reserved` is the scratch range.
    pub fn check_new(
        &self,
        memfds: &[Memfd],
        mappings: &[Mapping],
        reserved: &Range<u64>,
    ) -> Result<()> {
        let mut ids: BTreeSet<u64> = self.memfds.keys().copied().collect();
        for memfd in memfds {
            let empty = memfd.extents.is_empty() && !memfd.staged;
            if memfd.inode == OWN_MEMORY || !empty || !ids.insert(memfd.inode) {
                return bad(format!("memfd {:#x} ahead", memfd.inode));
            }
            check(memfd)?;
        }
        let all: Vec<&Mapping> = self.mappings.iter().chain(mappings).collect();
        if ids.len() > STAGED_MEMFDS_MAX || all.len() > STAGED_MAPPINGS_MAX {
            return bad("too much sent ahead");
        }
        for v in mappings {
            check_mapping(v, reserved)?;
            if v.kind != MappingKind::FilePrivate as i32 || v.staged {
                return bad(format!("mapping {:#x} ahead", v.start));
            }
        }
        let mut ranges: Vec<(u64, u64)> = all.iter().map(|v| (v.start, v.end)).collect();
        ranges.sort_unstable();
        if ranges.windows(2).any(|pair| pair[0].1 > pair[1].0) {
            return bad("overlapping mappings ahead");
        }
        Ok(())
    }

    /// Appends what makes them; the results are the memfds' descriptors.
    pub fn plan(&self, memfds: &[Memfd], mappings: &[Mapping], p: &mut Program) -> Vec<Ref> {
        let limit = raise_limit(p);
        p.set_words(limit, &[(STAGED_MEMFDS_MAX + NUMBERS_ROOM) as u64]);
        let made = memfds.iter().map(|memfd| plan_memfd(memfd, p)).collect();
        plan_staged(mappings, p);
        made
    }

    /// Takes over what a program of [`Self::plan`] has made in `process`.
    pub fn made(
        &mut self,
        memfds: &[Memfd],
        mappings: &[Mapping],
        made: &[Ref],
        ran: &[u8],
        process: &PidFd,
    ) -> Result<()> {
        for (memfd, fd) in memfds.iter().zip(made) {
            let number = Program::result(ran, *fd).map_err(|e| Error::sys("make a memfd", e))?;
            let number = number as i32;
            let file = File::from(process.get_fd(number)?);
            let huge_page_size = memfd.huge_page_size;
            let staged = StagedMemfd { number, file, huge_page_size, bytes: 0 };
            self.memfds.insert(memfd.inode, staged);
        }
        self.mappings.extend_from_slice(mappings);
        self.mappings.sort_unstable_by_key(|v| v.start);
        if self.mem.is_none() {
            self.mem = Some(ProcMem::open(process.pid())?);
        }
        Ok(())
    }

    /// Writes pages that came ahead.
    pub fn write(&mut self, object: u64, address: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let end = address.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
        let whole = address.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0;
        let (Some(end), true) = (end, whole) else {
            return bad(format!("pages ahead at {address:#x}"));
        };
        if object == OWN_MEMORY {
            return self.write_own(address..end, bytes);
        }
        let Some(memfd) = self.memfds.get_mut(&object) else {
            return bad(format!("pages of memfd {object:#x}"));
        };
        memfd.write(address, bytes)?;
        let stat = memfd.file.metadata().map_err(|e| Error::io("stat a memfd", e))?;
        let before = std::mem::replace(&mut memfd.bytes, stat.blocks() * 512);
        self.memfd_bytes = self.memfd_bytes - before + memfd.bytes;
        if self.memfd_bytes > SLACK * MEMFD_BYTES_MAX {
            return bad("too much content of memfds");
        }
        Ok(())
    }

    fn write_own(&mut self, range: Range<u64>, bytes: &[u8]) -> Result<()> {
        // Neighbours come in one piece.
        let mut covered = range.start;
        let first = self.mappings.partition_point(|v| v.end <= range.start);
        for v in &self.mappings[first..] {
            if v.start > covered || covered >= range.end {
                break;
            }
            covered = v.end;
        }
        let inside = covered >= range.end;
        let (Some(mem), true) = (&self.mem, inside) else {
            return bad(format!("pages ahead at {:#x}", range.start));
        };
        self.pages.extend(range.clone().step_by(PAGE as usize));
        if self.pages.len() as u64 * PAGE > SLACK * WRITTEN_LEN_MAX {
            return bad("too many written pages");
        }
        mem.write(range.start, bytes)
    }

    /// Bound on the entries that the rest takes after the freeze.
    pub fn entries(&self) -> usize {
        4 * self.memfds.len() + 4 * self.mappings.len()
    }

    /// The mappings, ascending.
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Ids and numbers of the memfds in the new process.
    pub fn memfd_numbers(&self) -> Vec<(u64, i32)> {
        self.memfds.iter().map(|(id, memfd)| (*id, memfd.number)).collect()
    }

    /// Brings the memfds to what the (checked) manifest says.
    pub fn finish_memfds(&self, m: &Manifest) -> Result<()> {
        let mut done = BTreeSet::new();
        for file in &m.files {
            let Some(FileKind::Memfd(memfd)) = &file.kind else { continue };
            if !done.insert(memfd.inode) {
                continue;
            }
            let staged = self.memfds.get(&memfd.inode);
            match staged {
                Some(staged) if memfd.staged => staged.finish(memfd)?,
                None if !memfd.staged => {}
                _ => return bad(format!("memfd {:#x} and what came ahead", memfd.inode)),
            }
        }
        Ok(())
    }
}

impl StagedMemfd {
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        if self.huge_page_size == 0 {
            return self.file.write_all_at(bytes, offset).map_err(|e| Error::io("fill a memfd", e));
        }
        self.write_huge(offset, bytes)
    }

    /// hugetlbfs has no write: the pages are mapped.
    fn write_huge(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let size = self.huge_page_size;
        let (start, end) = (offset / size * size, offset + bytes.len() as u64);
        let io = |e| Error::io("size a memfd of huge pages", e);
        if self.file.metadata().map_err(io)?.len() < end {
            self.file.set_len(end.next_multiple_of(size)).map_err(io)?;
        }
        let len = (end.next_multiple_of(size) - start) as usize;
        let window = Shared::map_at(&self.file, start as i64, len)?;
        window.write((offset - start) as usize, bytes);
        Ok(())
    }

    fn finish(&self, memfd: &Memfd) -> Result<()> {
        check(memfd)?;
        if memfd.huge_page_size != self.huge_page_size {
            return bad(format!("page size of memfd {:#x}", memfd.inode));
        }
        self.file.set_len(memfd.size).map_err(|e| Error::io("size a memfd", e))?;
        for z in &memfd.zeros {
            self.clear(z.start, z.end - z.start)?;
        }
        for piece in &memfd.extents {
            self.write(piece.address, &piece.bytes)?;
        }
        self.file
            .set_permissions(Permissions::from_mode(memfd.mode))
            .map_err(|e| Error::io("set the mode of a memfd", e))
    }

    fn clear(&self, start: u64, len: u64) -> Result<()> {
        if self.huge_page_size > 0 {
            return self.write_huge(start, &vec![0; len as usize]);
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, flags, start as i64, len as i64)
            .map_err(|e| Error::sys("clear part of a memfd", e))
    }
}
