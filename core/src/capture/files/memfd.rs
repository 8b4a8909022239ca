//! memfds, open or only mapped.

use super::{Capture, MEMFD_BYTES_MAX, Open};
use crate::capture::presend::{CHANGED_BYTES_MAX, MemfdChanges, Presend};
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
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

const F_GET_SEALS: i32 = 1034;
const PAGE: u64 = 4096;
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
            ..Memfd::default()
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
            if let Some(presend) = self.options.content {
                self.content(presend, &file, &mut memfd).map_err(unknown)?;
            } else {
                self.out.memfd_paths.insert(inode, path.to_owned());
            }
        }
        Ok(memfd)
    }

    /// Adds what the destination does not have yet, as far as there is room for it.
    fn content(
        &mut self,
        presend: &Presend,
        file: &File,
        memfd: &mut Memfd,
    ) -> crate::error::Result<()> {
        if self.out.changing.is_some() {
            return Ok(());
        }
        let room = CHANGED_BYTES_MAX.saturating_sub(self.out.content_bytes);
        let changes = match presend.memfd_changes(memfd, room) {
            Ok(Some(changes)) => {
                memfd.staged = true;
                changes
            }
            Ok(None) => match read_whole(file, memfd, room)? {
                Ok(changes) => changes,
                Err(bytes) => {
                    let name = String::from_utf8_lossy(&memfd.name);
                    self.out.changing = Some((format!("memfd {name}"), bytes));
                    return Ok(());
                }
            },
            Err(Error::Changing { object, bytes }) => {
                self.out.changing = Some((object, bytes));
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        self.out.content_bytes += changes.bytes;
        memfd.extents = changes.extents;
        memfd.zeros = changes.zeros;
        Ok(())
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

/// The content of a memfd that was not sent ahead, or how much it is if that is more than `room`.
fn read_whole(
    file: &File,
    memfd: &Memfd,
    room: u64,
) -> crate::error::Result<Result<MemfdChanges, u64>> {
    let piece_len = if memfd.huge_page_size > 0 { memfd.huge_page_size } else { PIECE_LEN };
    let mut changes = MemfdChanges::default();
    for run in data_runs(file, memfd)? {
        let mut at = run.start;
        while at < run.end {
            let mut bytes = vec![0; (run.end.min(memfd.size) - at).min(piece_len) as usize];
            file.read_exact_at(&mut bytes, at).map_err(|e| Error::io("read a memfd", e))?;
            let len = bytes.len() as u64;
            if bytes.iter().any(|b| *b != 0) {
                changes.bytes += len;
                if changes.bytes > room {
                    return Ok(Err(changes.bytes));
                }
                changes.extents.push(PageData { address: at, bytes });
            }
            at += piece_len.min(len.next_multiple_of(PAGE));
        }
    }
    Ok(Ok(changes))
}

/// The pages of a memfd that may hold data: without holes where the file system knows them (hugetlbfs
/// does not). Ends at a page, perhaps behind the end of the file.
pub(crate) fn data_runs(file: &File, memfd: &Memfd) -> crate::error::Result<Vec<Range<u64>>> {
    let fail = |e| Error::sys("find data in a memfd", e);
    let size = memfd.size.next_multiple_of(PAGE);
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let (start, end) = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) => (start as u64, lseek(file, start, Whence::SeekHole).map_err(fail)? as u64),
            Err(Errno::ENXIO) => break,
            Err(_) => (at, size),
        };
        let end = end.next_multiple_of(PAGE).min(size);
        if start < end {
            runs.push(start / PAGE * PAGE..end);
        }
        at = end.max(at + 1);
    }
    Ok(runs)
}
