//! Which pages of a process exist, from `/proc/PID/pagemap`.
//!
//! `PAGEMAP_SCAN` (Linux 6.7) is used where the kernel has it; reading the file gives the same answer
//! more slowly.

use crate::error::{Error, Result};
use libc::pid_t;
use nix::errno::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

const PAGE: u64 = 4096;
const PAGEMAP_SCAN: u64 = 0xc060_6610;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_HUGE: u64 = 1 << 6;
/// Since Linux 6.15; guards exist since 6.13 and look like swapped pages in between.
const IS_GUARD: u64 = 1 << 8;

const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_FILE: u64 = 1 << 61;
const ENTRY_GUARD: u64 = 1 << 58;
const ENTRY_EXCLUSIVE: u64 = 1 << 56;

/// The first kernel with guard regions (`MADV_GUARD_INSTALL`).
const GUARDS_SINCE: (u32, u32) = (6, 13);

/// Older kernels are not asked: without `PAGEMAP_SCAN` for guards the answer costs a read of the whole pagemap, and a
/// program may have reserved terabytes.
fn kernel_may_have_guards() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let name = nix::sys::utsname::uname().ok();
        let release = name.as_ref().and_then(|name| name.release().to_str());
        release.and_then(version).is_none_or(|version| version >= GUARDS_SINCE)
    })
}

/// The first two numbers of a kernel's release, such as `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<ScanArg>() == 96);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Consecutive pages that exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// True when a huge page maps them.
    pub huge: bool,
}

/// Which pages to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All pages that exist, in memory or in swap.
    Existing,
    /// Of a private file mapping: pages that were written and so differ from the file.
    Written,
    /// Guard regions.
    Guards,
    /// Anonymous pages in memory that no other process maps. Neither zero pages nor those that a forked child
    /// shares are among them.
    Own,
}

impl Wanted {
    /// Categories that must be absent, must be present, and of which one must be present, with or
    /// without a kernel that tells guards apart.
    fn categories(self, guards: bool) -> [u64; 3] {
        let guard = if guards { IS_GUARD } else { 0 };
        let exists = IS_PRESENT | IS_SWAPPED;
        match self {
            Wanted::Existing => [guard, guard, exists],
            Wanted::Written => [guard | IS_FILE, guard | IS_FILE, exists],
            Wanted::Guards => [0, IS_GUARD, 0],
            Wanted::Own => [0, 0, 0],
        }
    }

    /// Whether `PAGEMAP_SCAN` knows of it at all.
    fn by_ioctl(self) -> bool {
        self != Wanted::Own
    }

    fn matches(self, entry: u64) -> bool {
        let guard = entry & ENTRY_GUARD != 0;
        let exists = !guard && entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0;
        match self {
            Wanted::Existing => exists,
            Wanted::Written => exists && entry & ENTRY_FILE == 0,
            Wanted::Guards => guard,
            Wanted::Own => {
                let own = ENTRY_PRESENT | ENTRY_EXCLUSIVE;
                entry & (own | ENTRY_FILE | ENTRY_GUARD) == own
            }
        }
    }
}

/// An open pagemap.
#[derive(Debug)]
pub struct Pagemap {
    pid: pid_t,
    file: File,
}

impl Pagemap {
    /// Opens the pagemap of a process.
    pub fn open(pid: pid_t) -> Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(|e| Error::io(format!("open {path}"), e))?;
        Ok(Self { pid, file })
    }

    /// Calls `found` for every run of wanted pages in `start..end`, ascending.
    pub fn scan(
        &self,
        start: u64,
        end: u64,
        wanted: Wanted,
        found: &mut dyn FnMut(PageRun),
    ) -> Result<()> {
        if wanted == Wanted::Guards && !kernel_may_have_guards() {
            return Ok(());
        }
        for guards in [true, false].into_iter().filter(|_| wanted.by_ioctl()) {
            match self.scan_ioctl(start, end, wanted, guards, found) {
                // Refused before anything was found: by the category, or as a whole.
                Err(Errno::ENOTTY | Errno::EINVAL) => {}
                other => return other.map_err(|e| self.fail(e)),
            }
            if wanted == Wanted::Guards {
                break;
            }
        }
        self.scan_read(start, end, wanted, found)
    }

    /// True when the page at `address` exists.
    pub fn exists(&self, address: u64) -> Result<bool> {
        let mut raw = [0u8; 8];
        self.file
            .read_exact_at(&mut raw, address / PAGE * 8)
            .map_err(|e| Error::io(format!("read pagemap of process {}", self.pid), e))?;
        Ok(Wanted::Existing.matches(u64::from_le_bytes(raw)))
    }

    fn fail(&self, errno: Errno) -> Error {
        Error::sys(format!("scan pagemap of process {}", self.pid), errno)
    }

    fn scan_ioctl(
        &self,
        start: u64,
        end: u64,
        wanted: Wanted,
        guards: bool,
        found: &mut dyn FnMut(PageRun),
    ) -> std::result::Result<(), Errno> {
        let mut regions = [ScanRegion::default(); 256];
        let [inverted, mask, any] = wanted.categories(guards);
        let mut at = start;
        while at < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start: at,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                category_inverted: inverted,
                category_mask: mask,
                category_anyof_mask: any,
                return_mask: if wanted == Wanted::Existing { IS_HUGE } else { IS_PRESENT },
                ..ScanArg::default()
            };
            // SAFETY: `arg` is the request's structure; `vec` and `vec_len` describe `regions`.
            let got = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            let got = Errno::result(got)? as usize;
            for r in regions.iter().take(got) {
                found(PageRun { start: r.start, end: r.end, huge: r.categories & IS_HUGE != 0 });
            }
            if arg.walk_end <= at {
                break;
            }
            at = arg.walk_end;
        }
        Ok(())
    }

    fn scan_read(
        &self,
        start: u64,
        end: u64,
        wanted: Wanted,
        found: &mut dyn FnMut(PageRun),
    ) -> Result<()> {
        const BATCH: usize = 8192;
        let mut raw = vec![0u8; BATCH * 8];
        let mut run: Option<PageRun> = None;
        let mut at = start;
        while at < end {
            let pages = (((end - at) / PAGE) as usize).min(BATCH);
            let buf = &mut raw[..pages * 8];
            self.file
                .read_exact_at(buf, at / PAGE * 8)
                .map_err(|e| Error::io(format!("read pagemap of process {}", self.pid), e))?;
            for entry in buf.chunks_exact(8) {
                let entry = u64::from_le_bytes(entry.try_into().expect("eight bytes"));
                let hit = wanted.matches(entry);
                match (&mut run, hit) {
                    (Some(r), true) => r.end = at + PAGE,
                    (None, true) => {
                        run = Some(PageRun { start: at, end: at + PAGE, huge: false });
                    }
                    (_, false) => {
                        if let Some(r) = run.take() {
                            found(r);
                        }
                    }
                }
                at += PAGE;
            }
        }
        if let Some(r) = run {
            found(r);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(map: &Pagemap, at: u64, pages: u64, read: bool) -> Vec<(u64, u64)> {
        let mut got = Vec::new();
        let mut push = |r: PageRun| got.push(((r.start - at) / PAGE, (r.end - at) / PAGE));
        if read {
            map.scan_read(at, at + pages * PAGE, Wanted::Existing, &mut push).unwrap();
        } else {
            map.scan(at, at + pages * PAGE, Wanted::Existing, &mut push).unwrap();
        }
        got
    }

    #[test]
    fn versions_compare_by_number() {
        assert_eq!(version("6.1.0-56-amd64"), Some((6, 1)));
        assert_eq!(version("6.13-rc1+"), Some((6, 13)));
        assert!(version("6.9.12") < Some(GUARDS_SINCE));
        assert_eq!(version("six"), None);
    }

    #[test]
    fn finds_touched_pages_both_ways() {
        // SAFETY: a new private mapping; only touched below, inside its bounds.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                16 * PAGE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        }
        .cast::<u8>();
        for page in [1usize, 2, 7] {
            // SAFETY: inside the mapping made above.
            unsafe { base.add(page * PAGE as usize).write(1) };
        }
        let map = Pagemap::open(std::process::id() as i32).unwrap();
        let want = vec![(1, 3), (7, 8)];
        assert_eq!(runs(&map, base as u64, 16, false), want);
        assert_eq!(runs(&map, base as u64, 16, true), want);
        assert!(map.exists(base as u64 + PAGE).unwrap());
        assert!(!map.exists(base as u64).unwrap());
        // Reading maps the zero page: it exists, but it is nobody's own.
        // SAFETY: inside the mapping made above.
        unsafe { base.add(3 * PAGE as usize).read_volatile() };
        let mut own = Vec::new();
        let end = base as u64 + 16 * PAGE;
        map.scan(base as u64, end, Wanted::Own, &mut |r| {
            own.push(((r.start - base as u64) / PAGE, (r.end - base as u64) / PAGE));
        })
        .unwrap();
        assert_eq!(own, want);
        assert_eq!(runs(&map, base as u64, 16, false), vec![(1, 4), (7, 8)]);
    }
}
