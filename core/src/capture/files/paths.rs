//! Files that are found again by path.

use super::{Capture, O_PATH, Open};
use crate::error::Error;
use crate::manifest::{FileId, PathFile};
use crate::preflight::Blocker;
use nix::sys::stat::FileStat;
use std::fs;
use std::os::unix::ffi::OsStrExt;

// Magic numbers of statfs(2).
const PROC: i64 = 0x9fa0;
const NSFS: i64 = 0x6e73_6673;
const MQUEUE: i64 = 0x1980_0202;
/// sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs: made by the kernel, so that inode numbers,
/// sizes and times mean nothing elsewhere.
const KERNEL: [i64; 6] =
    [0x6265_6572, 0x0027_e0eb, 0x6367_7270, 0x6462_6720, 0x7472_6163, 0x7363_6673];

/// Where to look up paths of `pid`: nothing to add in our own mount namespace, else its root.
pub(crate) fn lookup_root(pid: i32) -> crate::Result<Vec<u8>> {
    let mount_namespace = |pid: &str| {
        let path = format!("/proc/{pid}/ns/mnt");
        fs::read_link(&path).map_err(|e| (path, e))
    };
    let theirs = mount_namespace(&pid.to_string())
        .map_err(|(path, e)| crate::proc::from_io(pid, &path, e))?;
    let ours = mount_namespace("self").map_err(|(path, e)| Error::io(path, e))?;
    Ok(if theirs == ours { Vec::new() } else { format!("/proc/{pid}/root").into_bytes() })
}

/// Identity of a file as the kernel reports it now, without digest.
pub fn file_id(stat: &FileStat) -> FileId {
    FileId {
        dev: stat.st_dev,
        ino: stat.st_ino,
        mode: stat.st_mode,
        rdev: stat.st_rdev,
        size: stat.st_size as u64,
        mtime_ns: stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(stat.st_mtime_nsec),
        digest: Vec::new(),
    }
}

impl Capture<'_> {
    /// A regular file, directory or device that its path still leads to.
    pub(super) fn by_path(&mut self, one: &Open) -> Result<PathFile, Blocker> {
        let gone = || {
            one.blocker(
                format!("{} was deleted or replaced since it was opened", one.link_text()),
                "let the program close it or open it again",
            )
        };
        if one.stat.st_nlink == 0 || one.link.first() != Some(&b'/') {
            return Err(gone());
        }
        let found = self.look_up(&one.link, one.flags() & O_PATH != 0).ok_or_else(gone)?;
        if (found.st_dev, found.st_ino) != (one.stat.st_dev, one.stat.st_ino) {
            return Err(gone());
        }
        let mut id = file_id(&one.stat);
        match self.filesystem(one)? {
            NSFS => return Err(one.blocker("a namespace", "let the program close it")),
            MQUEUE => return Err(one.blocker("a POSIX message queue", "let the program close it")),
            PROC => {
                self.own_proc_file(one)?;
                id = FileId { mode: id.mode, ..FileId::default() };
            }
            magic if KERNEL.contains(&magic) => {
                id = FileId { mode: id.mode, ..FileId::default() };
            }
            _ => {}
        }
        Ok(PathFile { path: one.link.clone(), id })
    }

    /// What is found at `path` now. A path-only descriptor may stand for a symbolic link itself.
    fn look_up(&self, path: &[u8], path_only: bool) -> Option<FileStat> {
        let full = [&self.root, path].concat();
        let full = std::ffi::OsStr::from_bytes(&full);
        if path_only
            && let Ok(stat) = nix::sys::stat::lstat(full)
            && stat.st_mode & libc::S_IFMT == libc::S_IFLNK
        {
            return Some(stat);
        }
        nix::sys::stat::stat(full).ok()
    }

    /// Magic number of the file system `one` is on.
    fn filesystem(&mut self, one: &Open) -> Result<i64, Blocker> {
        if let Some(magic) = self.filesystems.get(&one.stat.st_dev) {
            return Ok(*magic);
        }
        let path = format!("/proc/{}/fd/{}", self.pid, one.fd);
        let found = nix::sys::statfs::statfs(path.as_str()).map_err(|e| {
            Blocker::unknown(one.name(), &Error::sys("ask for its file system (statfs)", e))
        })?;
        let magic = found.filesystem_type().0;
        self.filesystems.insert(one.stat.st_dev, magic);
        Ok(magic)
    }

    /// Files of `/proc` are found again if they are the host's or the process's own.
    fn own_proc_file(&self, one: &Open) -> Result<(), Blocker> {
        let mut parts = one.link.split(|b| *b == b'/').skip_while(|p| *p != b"proc").skip(1);
        let number = |part: Option<&[u8]>| {
            std::str::from_utf8(part?).ok().and_then(|text| text.parse::<i32>().ok())
        };
        let Some(pid) = number(parts.next()) else { return Ok(()) };
        let thread = (parts.next() == Some(b"task")).then(|| number(parts.next())).flatten();
        if pid == self.own_pid && thread.is_none_or(|tid| tid == pid) {
            return Ok(());
        }
        Err(one.blocker(
            format!("{} belongs to another process or thread", one.link_text()),
            "let the program close it",
        ))
    }
}
