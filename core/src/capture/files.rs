//! Open files and descriptors, of a running process (preflight) or a frozen one (capture).
//!
//! Everything comes from `/proc/PID/fd`, `fdinfo`, `kcmp` and duplicates taken with `pidfd_getfd`; the
//! process runs nothing and its descriptions stay as they are (in particular nothing here moves an
//! offset). Paths are as this process sees them: for a process in the same mount namespace, with
//! another root directory, that is the path below our root.

mod clock;
mod eventfd;
mod kinds;
mod memfd;
mod paths;
mod pipes;

pub(crate) use memfd::data_runs;
pub use paths::file_id;
pub(crate) use paths::lookup_root;

use crate::capture::presend::Presend;
use crate::error::Error;
use crate::manifest::{Descriptor, FileId, FileKind, OpenFile, PathFile};
use crate::preflight::Blocker;
use crate::proc::fdinfo::{self, FdInfo};
use crate::proc::holders::{Holders, Object};
use crate::proc::maps::MapLine;
use crate::sys::files as sys;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstatat};
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::time::Instant;

/// What becomes of standard streams that can't be moved: terminals, sockets, pipes to other processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StdioPolicy {
    /// They are refused.
    #[default]
    Keep,
    /// They become `/dev/null`.
    Null,
    /// Output goes to the end of this file at the destination (made if need be); input is `/dev/null`.
    File(Vec<u8>),
}

/// How to capture.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions<'a> {
    /// Standard streams.
    pub stdio: &'a StdioPolicy,
    /// Who else holds this process's pipes and memory, from before the freeze.
    pub holders: &'a Holders,
    /// Read what the destination has not yet of the content of memfds, or leave all content out.
    pub content: Option<&'a Presend>,
}

/// The open files of a process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CapturedFiles {
    /// Open file descriptions, by lowest descriptor; then memfds that are mapped but not open.
    pub files: Vec<OpenFile>,
    /// Descriptors, ascending.
    pub descriptors: Vec<Descriptor>,
    /// Pipes and memory that [`FileOptions::holders`] was not asked about, because they are newer.
    pub unexamined: Vec<Object>,
    /// Where each memfd can be opened, by [`crate::manifest::Memfd::inode`].
    pub memfd_paths: BTreeMap<u64, String>,
    /// Bytes of content of memfds.
    pub content_bytes: u64,
    /// A memfd whose content is too much to be sent while the process is stopped, and how many bytes.
    pub changing: Option<(String, u64)>,
}

/// The most content of all memfds together: all of it is looked at while the process is stopped.
pub const MEMFD_BYTES_MAX: u64 = 256 << 20;

const O_CLOEXEC: u32 = libc::O_CLOEXEC as u32;
const O_PATH: u32 = libc::O_PATH as u32;

/// Captures the open files of `pid`, whose mappings are `maps`; all blockers together.
pub fn capture_files(
    pid: i32,
    maps: &[MapLine],
    options: &FileOptions<'_>,
) -> Result<CapturedFiles, Vec<Blocker>> {
    let fail = |e: &Error| vec![Blocker::unknown(format!("process {pid}"), e)];
    let mut capture = Capture::new(pid, options).map_err(|e| fail(&e))?;
    let open = capture.list().map_err(|e| fail(&e))?;
    let groups = capture.group(open);
    capture.redirect(&groups);
    for group in &groups {
        capture.description(group);
    }
    capture.mapped_memfds(maps);
    capture.finish()
}

/// One descriptor as `/proc` shows it.
#[derive(Debug)]
struct Open {
    fd: i32,
    link: Vec<u8>,
    info: FdInfo,
    stat: FileStat,
}

impl Open {
    fn flags(&self) -> u32 {
        self.info.flags & !O_CLOEXEC
    }

    fn is_path_only(&self) -> bool {
        self.flags() & O_PATH != 0
    }

    fn type_bits(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }

    /// For messages.
    fn name(&self) -> String {
        format!("fd {}", self.fd)
    }

    fn link_text(&self) -> String {
        String::from_utf8_lossy(&self.link).into_owned()
    }

    fn blocker(&self, reason: impl AsRef<str>, remedy: &str) -> Blocker {
        Blocker::new(self.name(), reason, remedy)
    }
}

/// The descriptors of one open file description; the first is the lowest.
type Group = Vec<Open>;

/// What can't be opened again by name, as an identity that duplicates and reopened ones share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stream {
    Terminal(u64),
    Socket(u64),
    Pipe(u64),
}

struct Capture<'a> {
    pid: i32,
    /// Its id in its own PID namespace.
    own_pid: i32,
    pidfd: OwnedFd,
    options: &'a FileOptions<'a>,
    /// Where its paths are looked up: empty, or its root directory in another mount namespace.
    root: Vec<u8>,
    out: CapturedFiles,
    blockers: Vec<Blocker>,
    /// Streams of descriptors 0 to 2 that are redirected.
    redirected: HashSet<Stream>,
    /// Index of the description that took the place of redirected ones: input, output.
    replacements: [Option<u32>; 2],
    /// Magic number of the file system of each device met.
    filesystems: HashMap<u64, i64>,
    /// Pipes whose content is in the manifest already.
    pipes_read: HashSet<u64>,
    memfd_bytes: u64,
    /// Timers that were due at the first look at one that may be have expired by then: the wait is for all of them together.
    due_until: Option<Instant>,
}

impl<'a> Capture<'a> {
    fn new(pid: i32, options: &'a FileOptions<'a>) -> crate::Result<Self> {
        let pidfd = sys::pidfd_open(pid).map_err(|e| match e {
            Errno::ESRCH => Error::Gone { pid },
            e => Error::sys(format!("open a pidfd of process {pid}"), e),
        })?;
        let status = crate::proc::status::read(pid)?;
        Ok(Capture {
            pid,
            own_pid: status.ns_pids.last().copied().unwrap_or(pid),
            pidfd,
            options,
            root: paths::lookup_root(pid)?,
            out: CapturedFiles::default(),
            blockers: Vec::new(),
            redirected: HashSet::new(),
            replacements: [None; 2],
            filesystems: HashMap::new(),
            pipes_read: HashSet::new(),
            memfd_bytes: 0,
            due_until: None,
        })
    }

    /// Reads all descriptors, ascending. One that is closed meanwhile (a running process) is left out.
    fn list(&self) -> crate::Result<Vec<Open>> {
        let path = format!("/proc/{}/fd", self.pid);
        let io = |e| crate::proc::from_io(self.pid, &path, e);
        let dir = File::open(&path).map_err(io)?;
        let infos = File::open(format!("/proc/{}/fdinfo", self.pid)).map_err(io)?;
        let mut open = Vec::new();
        for fd in crate::proc::numbers(&path).map_err(io)? {
            match read_one(&dir, &infos, fd) {
                Ok(one) => open.push(one),
                Err(Error::Sys { errno: Errno::ENOENT, .. }) => {}
                Err(Error::Sys { errno: Errno::ESRCH, .. }) => {
                    return Err(Error::Gone { pid: self.pid });
                }
                Err(e) => return Err(e),
            }
        }
        Ok(open)
    }

    /// Puts descriptors of the same description together. Only those that look the same are compared,
    /// in the order the kernel gives them.
    fn group(&mut self, open: Vec<Open>) -> Vec<Group> {
        type Key = (Vec<u8>, u64, u32, u64, u64);
        let mut groups: Vec<Group> = Vec::new();
        let mut alike: HashMap<Key, Vec<usize>> = HashMap::new();
        for one in open {
            let key =
                (one.link.clone(), one.info.pos, one.flags(), one.stat.st_dev, one.stat.st_ino);
            let sorted = alike.entry(key).or_default();
            match self.find(&groups, sorted, one.fd) {
                Ok(Ok(group)) => groups[group].push(one),
                Ok(Err(place)) => {
                    sorted.insert(place, groups.len());
                    groups.push(vec![one]);
                }
                Err(errno) => {
                    let error = Error::sys("compare open files (kcmp)", errno);
                    self.blockers.push(Blocker::unknown(one.name(), &error));
                }
            }
        }
        groups
    }

    /// The group of `fd` among those in `sorted`, or the place for a new one.
    fn find(
        &self,
        groups: &[Group],
        sorted: &[usize],
        fd: i32,
    ) -> nix::Result<Result<usize, usize>> {
        let (mut low, mut high) = (0, sorted.len());
        while low < high {
            let middle = low.midpoint(high);
            let other = groups[sorted[middle]][0].fd;
            match sys::compare_descriptions(self.pid, fd, other)? {
                Ordering::Equal => return Ok(Ok(sorted[middle])),
                Ordering::Less => high = middle,
                Ordering::Greater => low = middle + 1,
            }
        }
        Ok(Err(low))
    }

    /// Captures one description and its descriptors.
    fn description(&mut self, group: &Group) {
        let first = &group[0];
        if self.stream(first).is_some_and(|stream| self.redirected.contains(&stream)) {
            for one in group {
                let index = self.replacement(one);
                self.out.descriptors.push(descriptor(one, index));
            }
            return;
        }
        match self.kind(first).and_then(|kind| self.open_file(first, kind)) {
            Ok(file) => {
                let index = self.out.files.len() as u32;
                self.out.files.push(file);
                self.out.descriptors.extend(group.iter().map(|one| descriptor(one, index)));
            }
            Err(blocker) => self.blockers.push(blocker),
        }
    }

    fn open_file(&self, one: &Open, kind: FileKind) -> Result<OpenFile, Blocker> {
        if let Some(lock) = one.info.locks.first() {
            let reason = format!("{} is locked ({lock})", one.link_text());
            return Err(one.blocker(reason, "let the program give up its file locks and leases"));
        }
        let (owner, owner_signal) = if one.is_path_only() { (0, 0) } else { self.owner(one)? };
        let offset = match kind {
            FileKind::Regular(_) | FileKind::Directory(_) | FileKind::Memfd(_) => one.info.pos,
            _ => 0,
        };
        Ok(OpenFile { flags: one.flags(), offset, kind: Some(kind), owner, owner_signal })
    }

    /// Who gets `SIGIO`: nobody or the process itself, and by which signal.
    fn owner(&self, one: &Open) -> Result<(i32, i32), Blocker> {
        const F_GETSIG: i32 = 11;
        let dup = self.duplicate(one)?;
        let sys_error = |e| Blocker::unknown(one.name(), &Error::sys("ask who gets SIGIO", e));
        let (kind, id) = sys::owner(dup.as_fd()).map_err(sys_error)?;
        let signal = sys::fcntl_get(dup.as_fd(), F_GETSIG).map_err(sys_error)?;
        if id == 0 {
            return Ok((0, signal));
        }
        if one.type_bits() == libc::S_IFDIR {
            return Err(one.blocker(
                "a directory with a SIGIO owner, as dnotify (F_NOTIFY) leaves it",
                "use inotify in the program, or close it",
            ));
        }
        // F_OWNER_PID is 1; the id is in our PID namespace.
        if (kind, id) == (1, self.pid) {
            return Ok((self.own_pid, signal));
        }
        Err(one.blocker(
            "SIGIO goes to another process, a thread or a group",
            "let the program set itself as owner (F_SETOWN)",
        ))
    }

    fn duplicate(&self, one: &Open) -> Result<OwnedFd, Blocker> {
        sys::pidfd_getfd(self.pidfd.as_fd(), one.fd)
            .map_err(|e| Blocker::unknown(one.name(), &Error::sys("duplicate (pidfd_getfd)", e)))
    }

    /// Notes an object that was not looked for before the freeze, or says who else holds it.
    fn held_elsewhere(&mut self, object: Object) -> Option<i32> {
        let holders = self.options.holders;
        if !holders.examined(object) && !self.out.unexamined.contains(&object) {
            self.out.unexamined.push(object);
        }
        holders.other(object)
    }

    /// Decides which standard streams are redirected.
    fn redirect(&mut self, groups: &[Group]) {
        match self.options.stdio {
            StdioPolicy::Keep => return,
            StdioPolicy::File(path) if path.first() != Some(&b'/') => {
                let shown = String::from_utf8_lossy(path);
                self.blockers.push(Blocker::new(
                    "--stdio",
                    format!("{shown} is not an absolute path"),
                    "give the path as it is at the destination, from the root",
                ));
            }
            _ => {}
        }
        for one in groups.iter().flatten().filter(|one| one.fd <= 2) {
            if let Some(stream) = self.stream(one) {
                self.redirected.insert(stream);
            }
        }
    }

    /// What `one` is, if it can only be redirected.
    fn stream(&self, one: &Open) -> Option<Stream> {
        if one.is_path_only() {
            return None;
        }
        match one.type_bits() {
            libc::S_IFCHR if kinds::is_terminal(one.stat.st_rdev) => {
                Some(Stream::Terminal(one.stat.st_rdev))
            }
            libc::S_IFSOCK => Some(Stream::Socket(one.stat.st_ino)),
            libc::S_IFIFO => {
                let ino = one.stat.st_ino;
                let outside = !pipes::is_pipe(one)
                    || self.options.holders.other(Object::Pipe { ino }).is_some();
                outside.then_some(Stream::Pipe(ino))
            }
            _ => None,
        }
    }

    /// Index of the description that takes the place of a redirected one: two serve all, one for
    /// input and one for output.
    fn replacement(&mut self, one: &Open) -> u32 {
        let read_only = one.flags() & libc::O_ACCMODE as u32 == libc::O_RDONLY as u32;
        let (slot, file) = match self.options.stdio {
            StdioPolicy::File(path) if one.fd != 0 && !read_only => (1, appended(path)),
            _ => (0, null()),
        };
        *self.replacements[slot].get_or_insert_with(|| {
            self.out.files.push(file);
            self.out.files.len() as u32 - 1
        })
    }

    fn finish(mut self) -> Result<CapturedFiles, Vec<Blocker>> {
        self.check_watches();
        if self.blockers.is_empty() {
            self.out.descriptors.sort_unstable_by_key(|d| d.fd);
            Ok(self.out)
        } else {
            Err(self.blockers)
        }
    }

    /// An epoll set can't watch a stream that has become a file.
    fn check_watches(&mut self) {
        let replaced: Vec<u32> = self.replacements.iter().flatten().copied().collect();
        if replaced.is_empty() {
            return;
        }
        let file_of: BTreeMap<i32, u32> =
            self.out.descriptors.iter().map(|d| (d.fd, d.file)).collect();
        for d in &self.out.descriptors {
            let Some(FileKind::Epoll(epoll)) = &self.out.files[d.file as usize].kind else {
                continue;
            };
            for watch in &epoll.watches {
                if file_of.get(&watch.fd).is_some_and(|file| replaced.contains(file)) {
                    self.blockers.push(Blocker::new(
                        format!("fd {}", d.fd),
                        format!("an epoll set that watches the redirected fd {}", watch.fd),
                        "start the program with its standard streams on files or /dev/null",
                    ));
                }
            }
        }
    }
}

fn descriptor(one: &Open, file: u32) -> Descriptor {
    Descriptor { fd: one.fd, file, cloexec: one.info.flags & O_CLOEXEC != 0 }
}

fn read_one(dir: &File, infos: &File, fd: i32) -> crate::Result<Open> {
    let name = fd.to_string();
    let sys = |e| Error::sys(format!("read fd {fd}"), e);
    let link = readlinkat(dir, name.as_str()).map_err(sys)?.into_vec();
    let stat = fstatat(dir, name.as_str(), AtFlags::empty()).map_err(sys)?;
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let mut info = File::from(openat(infos, name.as_str(), flags, Mode::empty()).map_err(sys)?);
    let mut text = Vec::with_capacity(512);
    info.read_to_end(&mut text)
        .map_err(|e| sys(e.raw_os_error().map_or(Errno::EIO, Errno::from_raw)))?;
    Ok(Open { fd, link, info: fdinfo::parse(&text)?, stat })
}

/// `/dev/null` in place of a stream.
fn null() -> OpenFile {
    let id = FileId { mode: libc::S_IFCHR | 0o666, rdev: libc::makedev(1, 3), ..FileId::default() };
    let file = PathFile { path: b"/dev/null".to_vec(), id };
    let flags = libc::O_RDWR as u32;
    OpenFile { flags, kind: Some(FileKind::Device(file)), ..OpenFile::default() }
}

/// The file that output is redirected to. `O_CREAT`, which no captured file has, tells restore to
/// make it, and preflight not to look for it.
fn appended(path: &[u8]) -> OpenFile {
    let id = FileId { mode: libc::S_IFREG | 0o600, ..FileId::default() };
    let file = PathFile { path: path.to_vec(), id };
    let flags = (libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT) as u32;
    OpenFile { flags, kind: Some(FileKind::Regular(file)), ..OpenFile::default() }
}

#[cfg(test)]
#[path = "files/tests.rs"]
mod tests;
