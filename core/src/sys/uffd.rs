//! userfaultfd: registration, page installation, events. See `ioctl_userfaultfd(2)`.

use crate::sys::mapped::Shared;
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `UFFDIO_API` request number.
pub const UFFDIO_API: u64 = 0xc018_aa3f;
/// `UFFDIO_REGISTER` request number.
pub const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const UFFD_API: u64 = 0xaa;
const MODE_MISSING: u64 = 1;

/// Event features: FORK, REMAP, REMOVE, UNMAP, missing faults on shmem and hugetlbfs, thread ids.
pub const FEATURES: u64 =
    (1 << 1) | (1 << 2) | (1 << 3) | (1 << 4) | (1 << 5) | (1 << 6) | (1 << 8);

/// The words of `struct uffdio_api` that ask for [`FEATURES`].
pub fn api_words() -> [u64; 3] {
    [UFFD_API, FEATURES, 0]
}

/// The words of `struct uffdio_register` for missing faults in a range.
pub fn register_words(start: u64, len: u64) -> [u64; 4] {
    [start, len, MODE_MISSING, 0]
}

/// What a read of the descriptor yields.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page.
    Fault {
        /// Address within the page.
        address: u64,
        /// Thread, in the PID namespace of the process that reads.
        tid: u32,
    },
    /// The process forked.
    Fork {
        /// The child's userfaultfd; none in an event that another process had read.
        child: Option<Uffd>,
    },
    /// `mremap` moved pages.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Old length in bytes.
        len: u64,
    },
    /// `MADV_DONTNEED` or `MADV_REMOVE`; the pages go after this event has been read.
    Remove {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// The range is no longer mapped.
    Unmap {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
}

/// How an installation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Installed {
    /// All of it.
    All,
    /// So many bytes; an event must be read before the rest can go in.
    Partly(u64),
    /// After so many bytes: the page is there already.
    Exists(u64),
    /// After so many bytes: nothing is mapped there, or it is not registered.
    NotMapped(u64),
    /// After so many bytes: this host has no memory for more, or the process's control group may not have it.
    NoMemory(u64),
    /// The address space is gone.
    Gone,
}

/// A userfaultfd of another process, non-blocking.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

/// Length of an event as the kernel writes it, in bytes.
pub const MESSAGE_LEN: usize = 32;

impl Uffd {
    /// Takes a descriptor that is a userfaultfd with its API handshake done.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Reads one event into `record` at `offset`, [`MESSAGE_LEN`] bytes; `None` when there is none.
    /// Taking the event and recording it are one system call.
    pub fn read_event(&self, record: &Shared, offset: usize) -> io::Result<Option<Event>> {
        loop {
            match record.fill_from(self.fd.as_fd(), offset, MESSAGE_LEN) {
                Ok(MESSAGE_LEN) => {
                    let mut raw = [0u8; MESSAGE_LEN];
                    record.read(offset, &mut raw);
                    return decode(&raw, true).map(Some);
                }
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Installs `bytes` at `address` and wakes who waits there.
    pub fn copy(&self, address: u64, bytes: &[u8]) -> io::Result<Installed> {
        let mut arg = [address, bytes.as_ptr() as u64, bytes.len() as u64, 0, 0];
        let errno = self.ioctl(UFFDIO_COPY, arg.as_mut_ptr());
        installed(errno, arg[4], bytes.len() as u64)
    }

    /// Installs zero pages and wakes who waits there.
    pub fn zero(&self, address: u64, len: u64) -> io::Result<Installed> {
        let mut arg = [address, len, 0, 0];
        let errno = self.ioctl(UFFDIO_ZEROPAGE, arg.as_mut_ptr());
        installed(errno, arg[3], len)
    }

    /// Wakes who waits in a range, so that the access is tried again.
    pub fn wake(&self, address: u64, len: u64) -> io::Result<()> {
        let mut arg = [address, len];
        self.ioctl(UFFDIO_WAKE, arg.as_mut_ptr()).map_or(Ok(()), |e| Err(e.into()))
    }

    /// Registers a range for missing faults.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut arg = register_words(start, len);
        self.ioctl(UFFDIO_REGISTER, arg.as_mut_ptr()).map_or(Ok(()), |e| Err(e.into()))
    }

    /// Ends fault handling of a range and wakes who waits there: missing pages are zeros from now on.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut arg = [start, len];
        self.ioctl(UFFDIO_UNREGISTER, arg.as_mut_ptr()).map_or(Ok(()), |e| Err(e.into()))
    }

    fn ioctl(&self, request: u64, arg: *mut u64) -> Option<Errno> {
        // SAFETY: each caller passes an array as long as the request's structure, alive for the call;
        // addresses inside it belong to the other process, but for the source of a copy, which is a
        // live slice.
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, arg) };
        Errno::result(ret).err()
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn installed(errno: Option<Errno>, done: u64, len: u64) -> io::Result<Installed> {
    // The kernel writes either the bytes done or a negated errno.
    let count = if (done as i64) < 0 { 0 } else { done.min(len) };
    match errno {
        None => Ok(Installed::All),
        Some(Errno::EAGAIN) => Ok(Installed::Partly(count)),
        Some(Errno::EEXIST) => Ok(Installed::Exists(count)),
        Some(Errno::ENOENT) => Ok(Installed::NotMapped(count)),
        Some(Errno::ENOMEM) => Ok(Installed::NoMemory(count)),
        Some(Errno::ESRCH) => Ok(Installed::Gone),
        Some(e) => Err(e.into()),
    }
}

/// The number that a child's userfaultfd got in the table of whoever read the event, by the first two words of it.
pub fn forked_child(words: [u64; 2]) -> Option<RawFd> {
    (words[0] as u8 == FORK).then_some(words[1] as u32 as RawFd)
}

/// An event that a process which has died recorded; a child's userfaultfd went with that process, or is with its twin.
pub fn decode_recorded(raw: &[u8; MESSAGE_LEN]) -> io::Result<Event> {
    decode(raw, false)
}

const FORK: u8 = 0x13;

fn decode(raw: &[u8; MESSAGE_LEN], ours: bool) -> io::Result<Event> {
    let word = |i: usize| u64::from_le_bytes(raw[i..i + 8].try_into().expect("eight bytes"));
    Ok(match raw[0] {
        0x12 => Event::Fault { address: word(16), tid: word(24) as u32 },
        FORK => {
            // SAFETY: with this event the kernel has put a new descriptor into our table, and tells
            // nobody else about it.
            let own = || unsafe { OwnedFd::from_raw_fd(word(8) as u32 as RawFd) };
            Event::Fork { child: ours.then(|| Uffd::from_fd(own())) }
        }
        0x14 => Event::Remap { from: word(8), to: word(16), len: word(24) },
        0x15 => Event::Remove { start: word(8), end: word(16) },
        0x16 => Event::Unmap { start: word(8), end: word(16) },
        other => {
            return Err(io::Error::other(format!("userfaultfd event {other:#x} is unknown")));
        }
    })
}
