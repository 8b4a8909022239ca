//! The memory a page table lives in: the only `unsafe` of the page service.
//!
//! Rules that make it sound: the mapping is made here with a length checked for overflow, is at
//! least as long as the slice handed out, is page-aligned (so aligned for `AtomicU64`), starts as
//! bytes that are valid in any pattern, is only ever accessed through atomics, and lives until drop.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

const PAGE_BYTES: u64 = 4096;

/// Zeroed memory for a page table, either private to this process or a file others hold too.
///
/// It costs physical memory only where it has been written, so that the table of a 1 TiB
/// reservation costs address space alone.
#[derive(Debug)]
pub struct TableMemory {
    base: NonNull<AtomicU64>,
    len_words: usize,
}

// SAFETY: the mapping belongs to this value alone and is accessed through atomics only.
unsafe impl Send for TableMemory {}
// SAFETY: as above; shared references give out `&[AtomicU64]`, which is `Sync`.
unsafe impl Sync for TableMemory {}

impl TableMemory {
    /// Private memory of at least `len_bytes`, all zero.
    pub fn anonymous(len_bytes: u64) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::map(round_up(len_bytes)?, flags, -1)
    }

    /// The first `len_bytes` of a file (a memfd or a file of the run directory), shared with
    /// whoever else maps it. What the file holds already is kept, which is how a table outlives a
    /// fault daemon. Nobody may shrink the file while this lives: seal it (`F_SEAL_SHRINK`) or own it.
    pub fn file(fd: BorrowedFd<'_>, len_bytes: u64) -> io::Result<Self> {
        let size = nix::sys::stat::fstat(fd).map_err(io::Error::from)?.st_size;
        let len_bytes = round_up(len_bytes)?;
        if u64::try_from(size).unwrap_or(0) < len_bytes {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "page table file is too short",
            ));
        }
        Self::map(len_bytes, libc::MAP_SHARED, fd.as_raw_fd())
    }

    /// The memory as atomic words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `base` is a live mapping of at least `len_words` words (see the rules above).
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len_words) }
    }

    fn map(len_bytes: u64, flags: i32, fd: RawFd) -> io::Result<Self> {
        let len = usize::try_from(len_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Huge pages would make a sparse table resident. Advice only: a kernel without them
        // refuses it, and nothing is lost.
        // SAFETY: the range is the mapping just made.
        unsafe { libc::madvise(base, len, libc::MADV_NOHUGEPAGE) };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len_words: len / size_of::<AtomicU64>() })
    }
}

impl Drop for TableMemory {
    fn drop(&mut self) {
        let len = self.len_words * size_of::<AtomicU64>();
        // SAFETY: the mapping made in `map`, of which no borrow can be alive any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), len) };
    }
}

/// Whole pages, at least one: `mmap` refuses length zero.
fn round_up(len_bytes: u64) -> io::Result<u64> {
    len_bytes
        .max(1)
        .checked_next_multiple_of(PAGE_BYTES)
        .filter(|len| i64::try_from(*len).is_ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "page table is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn a_file_keeps_what_was_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let memory = TableMemory::file(file.as_fd(), 8000).unwrap();
        memory.words()[7].store(42, Relaxed);
        drop(memory);
        let again = TableMemory::file(file.as_fd(), 8192).unwrap();
        assert_eq!(again.words()[7].load(Relaxed), 42);
        assert!(TableMemory::file(file.as_fd(), 8193).is_err());
    }

    #[test]
    fn absurd_lengths_are_refused() {
        assert!(TableMemory::anonymous(u64::MAX).is_err());
        assert!(TableMemory::anonymous(1 << 63).is_err());
        assert_eq!(TableMemory::anonymous(0).unwrap().words().len(), 512);
    }
}
