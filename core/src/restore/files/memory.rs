//! memfds.

use super::{O_CLOEXEC, PlannedFiles, Planner, Result, bad};
use crate::capture::files::MEMFD_BYTES_MAX;
use crate::manifest::{FileKind, Manifest, Memfd, OpenFile, PageData};
use crate::program::{Program, Ref};
use std::collections::HashSet;

const MFD_CLOEXEC: u64 = 1;
const MFD_ALLOW_SEALING: u64 = 2;
const MFD_HUGETLB: u64 = 4;
const MFD_HUGE_SHIFT: u32 = 26;
const F_ADD_SEALS: i32 = 1033;
const F_SEAL_SEAL: u32 = 1;
const PIECES_MAX: usize = 1 << 20;

impl Planner<'_> {
    /// A description of a memfd, made at the first. The one that `memfd_create` makes is kept at a
    /// temporary number to map from, and serves the first description that can read and write; others
    /// were opened through `/proc`, and are again.
    pub(super) fn memfd(&mut self, memfd: &Memfd, file: &OpenFile, at: i32) -> Result<()> {
        let known = self.planned.memfds.get(&memfd.inode).copied();
        let first = self.memfds_met.insert(memfd.inode);
        let master = match known {
            Some(master) => master,
            None => self.make_memfd(memfd)?,
        };
        let read_write = file.flags & libc::O_ACCMODE as u32 == libc::O_RDWR as u32;
        if first && read_write {
            let args = [master.into(), at.into(), O_CLOEXEC.into()];
            self.program.must("take a memfd", libc::SYS_dup3, args);
            return Ok(());
        }
        self.open(format!("/proc/self/fd/{master}").as_bytes(), file, at)
    }

    fn make_memfd(&mut self, memfd: &Memfd) -> Result<i32> {
        check(memfd)?;
        if memfd.staged {
            return Err(bad(format!("memfd {:#x} was not sent before", memfd.inode)));
        }
        let name = String::from_utf8_lossy(&memfd.name).into_owned();
        let fd = plan_memfd(memfd, self.program);
        let master = self.temporary();
        self.shift(fd, master);
        for piece in &memfd.extents {
            if memfd.huge_page_size > 0 {
                self.fill_huge(master, piece);
            } else {
                let at = self.program.data(&piece.bytes);
                let args =
                    [master.into(), at.into(), piece.bytes.len().into(), piece.address.into()];
                self.program.must(format!("fill memfd {name}"), libc::SYS_pwrite64, args);
            }
        }
        self.planned.memfds.insert(memfd.inode, master);
        Ok(master)
    }

    /// hugetlbfs has no write: the page is mapped, and filled by a copy from this process to itself.
    fn fill_huge(&mut self, master: i32, piece: &PageData) {
        let p = &mut *self.program;
        let len = piece.bytes.len() as u64;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let args = [
            0.into(),
            len.into(),
            prot.into(),
            libc::MAP_SHARED.into(),
            master.into(),
            piece.address.into(),
        ];
        let map = p.must("map a huge page to fill it", libc::SYS_mmap, args);
        let from = p.data(&piece.bytes);
        let from = p.words(&[from, len]);
        let to = p.words(&[0, len]);
        p.op(crate::program::Op::Store, [to.into(), map.into()]);
        let own = p.must("getpid", libc::SYS_getpid, []);
        let args = [own.into(), to.into(), 1.into(), from.into(), 1.into(), 0.into()];
        p.must("fill a huge page", libc::SYS_process_vm_readv, args);
        p.must("unmap a huge page", libc::SYS_munmap, [map.into(), len.into()]);
    }
}

/// Appends the making of an empty memfd.
pub(crate) fn plan_memfd(memfd: &Memfd, p: &mut Program) -> Ref {
    let name = String::from_utf8_lossy(&memfd.name).into_owned();
    let text = p.c_string(&memfd.name);
    let mut flags = MFD_CLOEXEC;
    if memfd.seals != F_SEAL_SEAL {
        flags |= MFD_ALLOW_SEALING;
    }
    if memfd.huge_page_size > 0 {
        let log2 = u64::from(memfd.huge_page_size.trailing_zeros());
        flags |= MFD_HUGETLB | log2 << MFD_HUGE_SHIFT;
    }
    let args = [text.into(), flags.into()];
    let fd = p.must(format!("make memfd {name}"), libc::SYS_memfd_create, args);
    let args = [fd.into(), memfd.size.into()];
    p.must(format!("size memfd {name}"), libc::SYS_ftruncate, args);
    let args = [fd.into(), memfd.mode.into()];
    p.must(format!("set the mode of memfd {name}"), libc::SYS_fchmod, args);
    fd
}

/// Refuses what no source sends.
pub(crate) fn check(memfd: &Memfd) -> Result<()> {
    let huge = memfd.huge_page_size;
    let within = |piece: &PageData| {
        let end = piece.address.checked_add(piece.bytes.len() as u64);
        let page = huge == 0
            || memfd.staged
            || piece.address.is_multiple_of(huge) && piece.bytes.len() as u64 == huge;
        page && !piece.bytes.is_empty() && end.is_some_and(|end| end <= memfd.size)
    };
    let bytes = memfd.extents.iter().fold(0u64, |n, p| n.saturating_add(p.bytes.len() as u64));
    let zeros =
        memfd.zeros.iter().fold(0u64, |n, z| n.saturating_add(z.end.saturating_sub(z.start)));
    let good = !memfd.name.contains(&0)
        && i64::try_from(memfd.size).is_ok()
        && (huge == 0 || huge.is_power_of_two() && huge > 4096 && memfd.size.is_multiple_of(huge))
        && memfd.mode & !0o7777 == 0
        && memfd.extents.len() <= PIECES_MAX
        && bytes <= MEMFD_BYTES_MAX
        && memfd.extents.iter().all(within)
        && (memfd.staged || memfd.zeros.is_empty())
        && memfd.zeros.len() <= PIECES_MAX
        && memfd.zeros.iter().all(|z| z.start < z.end && z.end <= memfd.size)
        && zeros <= MEMFD_BYTES_MAX;
    if good { Ok(()) } else { Err(bad(format!("memfd {:#x}", memfd.inode))) }
}

/// Seals each memfd, when it is mapped: a seal against writing refuses what was there before.
pub(super) fn add_seals(manifest: &Manifest, planned: &PlannedFiles, program: &mut Program) {
    let mut done = HashSet::new();
    for file in &manifest.files {
        let Some(FileKind::Memfd(memfd)) = &file.kind else { continue };
        let Some(master) = planned.memfds.get(&memfd.inode) else { continue };
        if memfd.seals == 0 || !done.insert(memfd.inode) {
            continue;
        }
        let args = [(*master).into(), F_ADD_SEALS.into(), memfd.seals.into()];
        if memfd.seals == F_SEAL_SEAL {
            // That is how a memfd that may not be sealed begins: then it is refused, and there already.
            program.may("seal a memfd", libc::SYS_fcntl, args);
        } else {
            program.must("seal a memfd", libc::SYS_fcntl, args);
        }
    }
}
