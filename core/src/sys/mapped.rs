//! Memory shared with another process through a file: memfds and small files, mapped whole.

use crate::error::{Error, Result};
use nix::errno::Errno;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

/// A shared mapping of a file that this process owns. Other processes write to it at any time, so it
/// is only ever read and written by copies and atomics.
#[derive(Debug)]
pub struct Shared {
    base: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain shared memory for the life of the value; all access is by raw copies or
// atomics, which are valid from any thread.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps the first `len` bytes of `file`, which must be at least that long.
    pub fn map(file: &File, len: usize) -> Result<Self> {
        Self::map_at(file, 0, len)
    }

    /// Maps `len` bytes of `file` from `offset`, a multiple of its page size; they must exist.
    pub fn map_at(file: &File, offset: i64, len: usize) -> Result<Self> {
        // SAFETY: a new mapping at an address the kernel chooses, of a descriptor we hold.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Error::sys("map shared memory", Errno::last()));
        }
        Ok(Self { base: base.cast(), len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for an empty mapping.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Panics
    /// When out of range: offsets are ours, never a peer's.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len));
        // SAFETY: the range was just checked to lie in the mapping; source and target don't overlap
        // because `bytes` is a Rust slice outside of it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset), bytes.len()) }
    }

    /// Copies `out.len()` bytes from `offset`.
    ///
    /// # Panics
    /// When out of range.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        assert!(offset.checked_add(out.len()).is_some_and(|end| end <= self.len));
        // SAFETY: as in `write`.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base.add(offset), out.as_mut_ptr(), out.len());
        }
    }

    /// The 32-bit word at `offset`.
    ///
    /// # Panics
    /// When out of range, or not a multiple of four.
    pub fn word32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.len);
        // SAFETY: aligned, in range, and alive as long as `self`; atomics tolerate other writers.
        unsafe { AtomicU32::from_ptr(self.base.add(offset).cast()) }
    }

    /// The 64-bit word at `offset`.
    ///
    /// # Panics
    /// When out of range, or not a multiple of eight.
    pub fn word64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: as in `word32`.
        unsafe { AtomicU64::from_ptr(self.base.add(offset).cast()) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length and nothing borrows it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// Makes a memfd of `len` bytes that may be mapped executable.
pub fn memfd_executable(name: &std::ffi::CStr, len: u64) -> Result<File> {
    const MFD_EXEC: u32 = 0x10; // since Linux 6.3; older kernels allow it without the flag
    let create = |flags| {
        // SAFETY: `name` is a live C string.
        Errno::result(unsafe { libc::memfd_create(name.as_ptr(), flags) })
    };
    let fd = create(libc::MFD_CLOEXEC | MFD_EXEC)
        .or_else(|_| create(libc::MFD_CLOEXEC))
        .map_err(|e| Error::sys("memfd_create", e))?;
    // SAFETY: the kernel just returned this descriptor; nobody else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len).map_err(|e| Error::io("size a memfd", e))?;
    Ok(file)
}

/// Waits while `word` holds `value`, for at most `timeout`. Spurious returns happen.
pub fn futex_wait(word: &AtomicU32, value: u32, timeout: Duration) {
    let time = libc::timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    // SAFETY: `word` and `time` are live; FUTEX_WAIT only reads them.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const time);
    }
}

/// Wakes everyone who waits on `word`.
pub fn futex_wake_all(word: &AtomicU32) {
    // SAFETY: `word` is live; FUTEX_WAKE uses its address only.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}
