//! Who else holds a pipe, an eventfd or a piece of shared memory. Looks at every process of the host, so it is
//! done before the freeze only.

use super::fdinfo;
use super::maps::{self, MapLine};
use crate::error::Result;
use nix::fcntl::{AtFlags, readlinkat};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;

/// Something processes share without a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// A pipe.
    Pipe {
        /// Its inode number.
        ino: u64,
    },
    /// An eventfd.
    Event {
        /// The kernel's number of it.
        id: u64,
    },
    /// A memfd, anonymous shared memory, or a file of huge pages.
    Memory {
        /// Device as `st_dev`.
        dev: u64,
        /// Its inode number.
        ino: u64,
    },
}

/// Which of a process's objects others hold as well.
#[derive(Clone, Debug, Default)]
pub struct Holders {
    examined: BTreeSet<Object>,
    outside: BTreeMap<Object, i32>,
}

impl Holders {
    /// Looks for `objects` in every process but `pid`. Processes that come and go meanwhile, and
    /// descriptors on their way through a socket, are not seen.
    pub fn find(pid: i32, objects: BTreeSet<Object>) -> Result<Holders> {
        Self::find_beside(&[pid], objects)
    }

    /// The same, in every process but `pids`.
    pub fn find_beside(pids: &[i32], objects: BTreeSet<Object>) -> Result<Holders> {
        let mut holders = Holders { examined: objects, outside: BTreeMap::new() };
        let any = |f: fn(&Object) -> bool| holders.examined.iter().any(f);
        let pipes = any(|o| matches!(o, Object::Pipe { .. }));
        let memory = any(|o| matches!(o, Object::Memory { .. }));
        let events = any(|o| matches!(o, Object::Event { .. }));
        if !pipes && !memory && !events {
            return Ok(holders);
        }
        for other in super::pids()?.into_iter().filter(|other| !pids.contains(other)) {
            // A process that ends meanwhile holds nothing.
            for object in descriptors(other, events).unwrap_or_default() {
                holders.note(object, other);
            }
            if memory {
                for object in mapped(&maps_of_memory(other).unwrap_or_default()) {
                    holders.note(object, other);
                }
            }
        }
        Ok(holders)
    }

    fn note(&mut self, object: Object, pid: i32) {
        if self.examined.contains(&object) {
            self.outside.entry(object).or_insert(pid);
        }
    }

    /// Another process that holds `object`.
    pub fn other(&self, object: Object) -> Option<i32> {
        self.outside.get(&object).copied()
    }

    /// True if `object` was looked for.
    pub fn examined(&self, object: Object) -> bool {
        self.examined.contains(&object)
    }
}

/// The objects that `pid` holds by descriptors and by the mappings `maps`.
pub fn objects_of(pid: i32, maps: &[MapLine]) -> Result<BTreeSet<Object>> {
    let mut objects = descriptors(pid, true)?;
    objects.extend(mapped(maps));
    Ok(objects)
}

/// The objects behind shared mappings.
fn mapped(maps: &[MapLine]) -> BTreeSet<Object> {
    maps.iter()
        .filter(|l| is_memory(&l.path))
        .map(|l| Object::Memory { dev: l.dev, ino: l.ino })
        .collect()
}

/// True for names of memory objects: unlinked files, and shared memory that was given a name.
fn is_memory(path: &[u8]) -> bool {
    path.ends_with(b" (deleted)") || path.starts_with(b"[anon_shmem:")
}

fn maps_of_memory(pid: i32) -> Result<Vec<MapLine>> {
    let text = super::read(pid, "maps")?;
    Ok(text
        .split(|b| *b == b'\n')
        .filter(|l| l.ends_with(b" (deleted)") || l.ends_with(b"]"))
        .filter_map(maps::parse_line)
        .collect())
}

/// `events` for eventfds as well: of those another file is read.
fn descriptors(pid: i32, events: bool) -> Result<BTreeSet<Object>> {
    let path = format!("/proc/{pid}/fd");
    let list = |e| super::from_io(pid, &path, e);
    let dir = File::open(&path).map_err(list)?;
    let mut objects = BTreeSet::new();
    for entry in fs::read_dir(&path).map_err(list)? {
        let name = entry.map_err(list)?.file_name();
        // Closed meanwhile.
        let Ok(link) = readlinkat(&dir, name.as_os_str()) else { continue };
        let link = link.as_bytes();
        if let Some(ino) = pipe_ino(link) {
            objects.insert(Object::Pipe { ino });
        } else if link == b"anon_inode:[eventfd]" {
            let info = |fd: &str| super::read(pid, &format!("fdinfo/{fd}"));
            let text = name.to_str().filter(|_| events).and_then(|fd| info(fd).ok());
            if let Some(id) = text.and_then(|text| fdinfo::parse(&text).ok()?.eventfd_id) {
                objects.insert(Object::Event { id });
            }
        } else if is_memory(link)
            && let Ok(stat) = nix::sys::stat::fstatat(&dir, name.as_os_str(), AtFlags::empty())
        {
            objects.insert(Object::Memory { dev: stat.st_dev, ino: stat.st_ino });
        }
    }
    Ok(objects)
}

/// The inode number in `pipe:[N]`.
pub(crate) fn pipe_ino(link: &[u8]) -> Option<u64> {
    let (ino, rest) = super::decimal(link.strip_prefix(b"pipe:[")?)?;
    (rest == b"]").then_some(ino)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::process::{Child, Command, Stdio};

    struct Killed(Child);
    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_pipe_to_a_child_has_two_holders() {
        let child = Command::new("sleep").arg("60").stdout(Stdio::piped()).spawn().unwrap();
        let child = Killed(child);
        let out = child.0.stdout.as_ref().unwrap().as_raw_fd();
        let link = fs::read_link(format!("/proc/self/fd/{out}")).unwrap();
        let pipe = Object::Pipe { ino: pipe_ino(link.as_os_str().as_bytes()).unwrap() };
        let objects = objects_of(child.0.id() as i32, &[]).unwrap();
        assert!(objects.contains(&pipe));
        let holders = Holders::find(child.0.id() as i32, objects).unwrap();
        assert_eq!(holders.other(pipe), Some(std::process::id() as i32));
        let inside = Object::Pipe { ino: u64::MAX };
        assert!(!holders.examined(inside));
    }

    #[test]
    fn an_eventfd_that_a_child_inherits_has_two_holders() {
        // SAFETY: integers only; without the flag to close it on exec the child has it, too.
        let fd = unsafe { libc::eventfd(0, 0) };
        assert!(fd >= 0);
        let child = Killed(Command::new("sleep").arg("60").spawn().unwrap());
        let pid = child.0.id() as i32;
        let info =
            fdinfo::parse(&crate::proc::read(pid, &format!("fdinfo/{fd}")).unwrap()).unwrap();
        let event = Object::Event { id: info.eventfd_id.unwrap() };
        let holders = Holders::find(pid, objects_of(pid, &[]).unwrap()).unwrap();
        assert_eq!(holders.other(event), Some(std::process::id() as i32));
        // SAFETY: made above.
        unsafe { libc::close(fd) };
    }

    #[test]
    fn links_that_are_no_pipes() {
        for link in [&b"pipe:[]"[..], b"pipe:[12", b"socket:[12]", b"/pipe:[1]", b""] {
            assert_eq!(pipe_ino(link), None);
        }
    }
}
