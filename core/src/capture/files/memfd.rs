//! memfds, open or only mapped.

use super::{Capture, MEMFD_BYTES_MAX, Open};
use crate::error::Error;
use crate::manifest::{FileKind, Memfd, OpenFile, PageData};
use crate::preflight::Blocker;
use crate::proc::classify::{self, memory_id};
use crate::proc::holders::Object;
use crate::proc::maps::MapLine;
use crate::sys::files as sys;
use nix::errno::Errno;
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek};
use std::collections::HashSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

const F_GET_SEALS: i32 = 1034;
const HUGETLBFS: i64 = 0x9584_58f6;
const PREFIX: &[u8] = b"/memfd:";
const SUFFIX: &[u8] = b" (deleted)";

/// True for the link of a memfd.
pub(super) fn is_memfd(link: &[u8]) -> bool {
    link.starts_with(PREFIX) && link.ends_with(SUFFIX)
}

impl Capture<'_> {
    /// An open memfd. A second description of the same one carries no content.
    pub(super) fn memfd(&mut self, one: &Open) -> Result<Memfd, Blocker> {
        let path = format!("/proc/{}/fd/{}", self.pid, one.fd);
        self.memfd_at(&path, &one.link, &one.name())
    }

    /// Adds memfds that are mapped, but no longer open, after all others.
    pub(super) fn mapped_memfds(&mut self, maps: &[MapLine]) {
        let mut known: HashSet<u64> = HashSet::new();
        for file in &self.out.files {
            if let Some(FileKind::Memfd(memfd)) = &file.kind {
                known.insert(memfd.inode);
            }
        }
        for line in maps.iter().filter(|l| classify::is_memfd(l)) {
            if !known.insert(memory_id(line.dev, line.ino)) {
                continue;
            }
            let name = format!("{:x}-{:x}", line.start, line.end);
            let path = format!("/proc/{}/map_files/{name}", self.pid);
            match self.memfd_at(&path, &line.path, &format!("mapping {name}")) {
                Ok(memfd) => self.out.files.push(OpenFile {
                    flags: libc::O_RDWR as u32,
                    kind: Some(FileKind::Memfd(memfd)),
                    ..OpenFile::default()
                }),
                Err(blocker) => self.blockers.push(blocker),
            }
        }
    }

    fn memfd_at(&mut self, path: &str, link: &[u8], name: &str) -> Result<Memfd, Blocker> {
        // A description of our own, so that seeking moves nobody's offset.
        let unknown = |e| Blocker::unknown(name, &e);
        let file =
            File::open(path).map_err(|e| unknown(crate::proc::from_io(self.pid, path, e)))?;
        let sys_error = |e| unknown(Error::sys("ask for the state of a memfd", e));
        let stat = fstat(&file).map_err(sys_error)?;
        if let Some(other) =
            self.held_elsewhere(Object::Memory { dev: stat.st_dev, ino: stat.st_ino })
        {
            let reason = format!("a memfd shared with process {other}");
            return Err(Blocker::new(name, reason, "move it when the other process has ended"));
        }
        let inode = memory_id(stat.st_dev, stat.st_ino);
        let seals = sys::fcntl_get(file.as_fd(), F_GET_SEALS).map_err(sys_error)?;
        let fs = nix::sys::statfs::fstatfs(&file).map_err(sys_error)?;
        let huge = fs.filesystem_type().0 == HUGETLBFS;
        let mut memfd = Memfd {
            inode,
            name: link[PREFIX.len()..link.len() - SUFFIX.len()].to_vec(),
            size: stat.st_size as u64,
            seals: seals as u32,
            huge_page_size: if huge { fs.block_size() as u64 } else { 0 },
            mode: stat.st_mode & 0o7777,
            extents: Vec::new(),
        };
        if !self.has_memfd(inode) {
            self.memfd_bytes = self.memfd_bytes.saturating_add(stat.st_blocks as u64 * 512);
            if self.memfd_bytes > MEMFD_BYTES_MAX {
                return Err(Blocker::new(
                    name,
                    format!("memfds of more than {} MiB altogether", MEMFD_BYTES_MAX >> 20),
                    "use anonymous shared memory instead",
                ));
            }
            if self.options.memfd_content {
                memfd.extents = read_extents(&file, &memfd).map_err(sys_error)?;
            }
        }
        Ok(memfd)
    }

    fn has_memfd(&self, inode: u64) -> bool {
        self.out
            .files
            .iter()
            .any(|f| matches!(&f.kind, Some(FileKind::Memfd(m)) if m.inode == inode))
    }
}

/// Length of a piece of content, where pages are small. A huge page is a piece: restore relies on it.
const PIECE_LEN: u64 = 1 << 20;

/// The data of a memfd as pieces, without holes where the file system knows them (hugetlbfs does
/// not) and without pieces that are all zeros.
fn read_extents(file: &File, memfd: &Memfd) -> nix::Result<Vec<PageData>> {
    let size = memfd.size;
    let piece_len = if memfd.huge_page_size > 0 { memfd.huge_page_size } else { PIECE_LEN };
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let (start, end) = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) => (start as u64, lseek(file, start, Whence::SeekHole)? as u64),
            Err(Errno::ENXIO) => break,
            Err(_) => (at, size),
        };
        let end = end.min(size);
        let mut piece = start;
        while piece < end {
            let mut bytes = vec![0; (end - piece).min(piece_len) as usize];
            file.read_exact_at(&mut bytes, piece)
                .map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
            let len = bytes.len() as u64;
            if bytes.iter().any(|b| *b != 0) {
                extents.push(PageData { address: piece, bytes });
            }
            piece += len;
        }
        at = end.max(at + 1);
    }
    Ok(extents)
}
