//! Open files, compiled into a program that makes them in the new process.
//!
//! Two steps, because mappings are made between them: [`plan_files`] opens every description at a
//! number above all that the process will use; [`place_files`] duplicates them to their numbers and
//! closes the high ones. While the first runs, every low number is free, so that what `open` returns
//! (the lowest free number) never collides with anything, whatever the process's numbers are.

mod kinds;
pub(super) mod memory;
mod pipes;

use crate::error::{Error, Result};
use crate::manifest::{FileKind, Manifest, OpenFile};
use crate::program::{Arg, Op, Program, Ref};
use std::collections::{HashMap, HashSet};

const O_CLOEXEC: i32 = libc::O_CLOEXEC;
const F_SETFL: i32 = libc::F_SETFL;
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;
/// `O_LARGEFILE` as the kernel has it (libc says 0 on 64-bit machines).
const O_LARGEFILE: u32 = 0o100_000;

/// What `F_SETFL` can change.
const SETFL: u32 =
    (libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME) as u32;
/// Flags that are given to `open`. `O_CREAT` is in the manifest for redirected output only.
const OPEN: u32 = (libc::O_ACCMODE
    | libc::O_CREAT
    | libc::O_APPEND
    | libc::O_SYNC
    | libc::O_DIRECT
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW
    | libc::O_NOATIME
    | libc::O_PATH) as u32
    | O_LARGEFILE;

/// Limits on what a peer may ask for; the kernel's own are below these or as high.
const NUMBER_MAX: i32 = 1 << 22;
const FILES_MAX: usize = 1 << 20;
/// Free numbers kept below the first high one, so that a temporary descriptor never gets that far.
const ROOM: i32 = 16;
/// Least soft limit on descriptors while restoring: the table of the ring that holds userfaultfds counts too.
const NUMBERS_MIN: i32 = 256;

/// Where [`plan_files`] has put the descriptions.
#[derive(Debug)]
pub struct PlannedFiles {
    base: i32,
    next: i32,
    memfds: HashMap<u64, i32>,
}

impl PlannedFiles {
    /// Number at which description `index` of the manifest is open until [`place_files`] is through.
    fn at(&self, index: u32) -> i32 {
        self.base + index as i32
    }

    /// Descriptor to map the memfd `files[index]` from, between [`plan_files`] and [`place_files`].
    /// It can be read and written, and has no seals yet.
    pub fn memfd(&self, manifest: &Manifest, index: u32) -> Option<i32> {
        match &manifest.files.get(index as usize)?.kind {
            Some(FileKind::Memfd(memfd)) => self.memfds.get(&memfd.inode).copied(),
            _ => None,
        }
    }
}

/// The lowest number above all descriptors of the process: `reserved` ones should start there.
pub fn numbers_end(manifest: &Manifest) -> i32 {
    manifest.descriptors.iter().map(|d| d.fd.saturating_add(1)).max().unwrap_or(0)
}

/// Appends what opens every description of `manifest`, at high numbers, in a process that has no
/// descriptors but `reserved` and memfds made before (`staged`: ids and numbers), which become the
/// manifest's. The soft limit on descriptors is raised as far as that needs (the hard
/// limit is left), and `/proc` must be that of the process's PID namespace. Paths are the session's:
/// the program runs before the process takes on its root directory and credentials.
pub fn plan_files(
    manifest: &Manifest,
    program: &mut Program,
    reserved: &[i32],
    staged: &[(u64, i32)],
) -> Result<PlannedFiles> {
    check(manifest, reserved)?;
    let taken = reserved.iter().copied().chain(staged.iter().map(|s| s.1));
    let highest = taken.max().unwrap_or(-1).max(numbers_end(manifest) - 1);
    let base = highest + 1 + ROOM;
    let next = base + manifest.files.len() as i32;
    let mut planner = Planner {
        manifest,
        program,
        planned: PlannedFiles { base, next, memfds: HashMap::new() },
        pipes: HashMap::new(),
        memfds_met: HashSet::new(),
    };
    let limit = raise_limit(planner.program);
    for (id, number) in staged {
        let master = planner.temporary();
        planner.shift(*number, master);
        planner.planned.memfds.insert(*id, master);
    }
    for (index, file) in manifest.files.iter().enumerate() {
        planner.file(index as u32, file)?;
    }
    let planned = planner.planned;
    // Every description takes at most itself and two temporary numbers; now the need is known.
    program.set_words(limit, &[(planned.next + ROOM).max(NUMBERS_MIN) as u64]);
    Ok(planned)
}

/// Appends what puts every description at its numbers, fills epoll sets, adds seals, and closes the
/// high numbers. After the mappings of memfds are made.
pub fn place_files(manifest: &Manifest, planned: &PlannedFiles, program: &mut Program) {
    for d in &manifest.descriptors {
        let flags = if d.cloexec { O_CLOEXEC } else { 0 };
        let from = planned.at(d.file);
        let args = [from.into(), d.fd.into(), flags.into()];
        program.must(format!("put a file at fd {}", d.fd), libc::SYS_dup3, args);
    }
    for (index, file) in manifest.files.iter().enumerate() {
        if let Some(FileKind::Epoll(epoll)) = &file.kind {
            kinds::fill_epoll(program, planned.at(index as u32), epoll);
        }
    }
    memory::add_seals(manifest, planned, program);
    if planned.next > planned.base {
        let args = [planned.base.into(), (planned.next - 1).into(), 0.into()];
        program.must("close temporary descriptors", libc::SYS_close_range, args);
    }
}

/// Appends the opening of a file that is to be mapped; the caller appends `mmap` and
/// [`close`]. `flags` is `O_RDONLY` or `O_RDWR`.
pub fn open_mapped_file(program: &mut Program, path: &[u8], flags: i32) -> Result<Ref> {
    check_path(path)?;
    let at = program.c_string(path);
    let flags = flags & libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_NOCTTY | O_CLOEXEC;
    let what = format!("open {} to map it", String::from_utf8_lossy(path));
    Ok(program.must(what, libc::SYS_openat, [libc::AT_FDCWD.into(), at.into(), flags.into()]))
}

/// Appends the closing of a descriptor.
pub fn close(program: &mut Program, fd: impl Into<Arg>) {
    program.must("close", libc::SYS_close, [fd.into()]);
}

fn bad(text: impl Into<String>) -> Error {
    Error::Manifest(text.into())
}

/// An absolute path without NUL, of at most the kernel's length.
fn check_path(path: &[u8]) -> Result<()> {
    if path.first() != Some(&b'/') || path.contains(&0) || path.len() >= libc::PATH_MAX as usize {
        return Err(bad(format!("path {:?}", String::from_utf8_lossy(path))));
    }
    Ok(())
}

/// What every index and number in the tables must fulfil.
fn check(manifest: &Manifest, reserved: &[i32]) -> Result<()> {
    if manifest.files.len() > FILES_MAX || manifest.descriptors.len() > FILES_MAX {
        return Err(bad("too many files"));
    }
    let mut numbers = HashSet::with_capacity(manifest.descriptors.len());
    for d in &manifest.descriptors {
        if !(0..NUMBER_MAX).contains(&d.fd) || !numbers.insert(d.fd) {
            return Err(bad(format!("descriptor {}", d.fd)));
        }
        if d.file as usize >= manifest.files.len() {
            return Err(bad(format!("descriptor {} of file {}", d.fd, d.file)));
        }
    }
    if let Some(fd) = reserved.iter().find(|fd| numbers.contains(fd)) {
        return Err(bad(format!("descriptor {fd} is taken by slipstream")));
    }
    let epolls = manifest.files.iter().filter_map(|f| match &f.kind {
        Some(FileKind::Epoll(epoll)) => Some(epoll),
        _ => None,
    });
    for watch in epolls.flat_map(|e| &e.watches) {
        if !numbers.contains(&watch.fd) {
            return Err(bad(format!("an epoll set watches fd {}, which is not open", watch.fd)));
        }
    }
    Ok(())
}

/// Sets the soft limit on descriptors to the value at the address returned, and keeps the hard one.
pub(super) fn raise_limit(p: &mut Program) -> u64 {
    let limits = p.words(&[0, 0]);
    let needed = p.words(&[0]);
    let nofile = libc::RLIMIT_NOFILE;
    let ask = [0.into(), nofile.into(), 0.into(), limits.into()];
    p.must("read the limit on descriptors", libc::SYS_prlimit64, ask);
    p.op(Op::Store, [limits.into(), Arg::At(needed)]);
    let set = [0.into(), nofile.into(), limits.into(), 0.into()];
    p.must("raise the limit on descriptors", libc::SYS_prlimit64, set);
    needed
}

struct Planner<'a> {
    manifest: &'a Manifest,
    program: &'a mut Program,
    planned: PlannedFiles,
    /// Temporary numbers of the ends of pipes, and which of them a description has taken.
    pipes: HashMap<u64, pipes::Ends>,
    /// Memfds that a description was made of.
    memfds_met: HashSet<u64>,
}

impl Planner<'_> {
    /// A number for a temporary descriptor.
    fn temporary(&mut self) -> i32 {
        self.planned.next += 1;
        self.planned.next - 1
    }

    /// Moves a descriptor just made to the number `to`.
    fn shift(&mut self, from: impl Into<Arg>, to: i32) {
        let from = from.into();
        self.program.must("move fd", libc::SYS_dup3, [from, to.into(), O_CLOEXEC.into()]);
        close(self.program, from);
    }

    fn file(&mut self, index: u32, file: &OpenFile) -> Result<()> {
        let at = self.planned.at(index);
        let path_only = file.flags & libc::O_PATH as u32 != 0;
        match file.kind.as_ref().ok_or_else(|| bad("a file of no known kind"))? {
            FileKind::Regular(path) | FileKind::Directory(path) | FileKind::Device(path) => {
                check_path(&path.path)?;
                let text = path.path.clone();
                self.open(&text, file, at)?;
            }
            FileKind::Pipe(end) => self.pipe_end(end, file, at)?,
            FileKind::EventFd(event) => self.eventfd(event, at),
            FileKind::TimerFd(timer) => self.timerfd(timer, at)?,
            FileKind::SignalFd(mask) => self.signalfd(*mask, at),
            FileKind::Epoll(_) => {
                let fd = self.program.must(
                    "make an epoll set",
                    libc::SYS_epoll_create1,
                    [O_CLOEXEC.into()],
                );
                self.shift(fd, at);
            }
            FileKind::Memfd(memfd) => self.memfd(memfd, file, at)?,
        }
        if !path_only {
            self.state(file, at);
        }
        Ok(())
    }

    /// Opens a path. Without `O_NONBLOCK` the open of what has become a FIFO would never return; the
    /// flag is taken back by [`Planner::state`].
    fn open(&mut self, path: &[u8], file: &OpenFile, at: i32) -> Result<()> {
        if path.len() >= libc::PATH_MAX as usize {
            return Err(bad("a path too long"));
        }
        let text = self.program.c_string(path);
        let flags = file.flags & OPEN | (libc::O_NONBLOCK | libc::O_NOCTTY | O_CLOEXEC) as u32;
        let what = format!("open {}", String::from_utf8_lossy(path));
        let args = [libc::AT_FDCWD.into(), text.into(), flags.into(), 0o600.into()];
        let fd = self.program.must(what, libc::SYS_openat, args);
        self.shift(fd, at);
        Ok(())
    }

    /// Offset, owner of `SIGIO` and status flags.
    fn state(&mut self, file: &OpenFile, at: i32) {
        let p = &mut *self.program;
        if file.offset != 0 {
            if matches!(file.kind, Some(FileKind::Directory(_))) {
                // ext4 notes where a listing begins at the first read; if that were the end, the first
                // read after a rewind would find nothing (seen on Linux 6.18).
                let entries = p.data(&[0; 1024]);
                p.may(
                    "begin a listing",
                    libc::SYS_getdents64,
                    [at.into(), entries.into(), 1024.into()],
                );
            }
            let args = [at.into(), file.offset.into(), libc::SEEK_SET.into()];
            p.must("set an offset", libc::SYS_lseek, args);
        }
        if file.owner != 0 {
            // F_OWNER_PID
            let owner = p.data(&[1i32.to_le_bytes(), file.owner.to_le_bytes()].concat());
            let args = [at.into(), F_SETOWN_EX.into(), owner.into()];
            p.must("set who gets SIGIO", libc::SYS_fcntl, args);
        }
        if file.owner_signal != 0 {
            let args = [at.into(), F_SETSIG.into(), file.owner_signal.into()];
            p.must("set the signal in place of SIGIO", libc::SYS_fcntl, args);
        }
        let args = [at.into(), F_SETFL.into(), (file.flags & SETFL).into()];
        p.must("set status flags", libc::SYS_fcntl, args);
    }
}

#[cfg(test)]
#[path = "files/tests.rs"]
mod tests;
