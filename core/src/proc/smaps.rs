//! `/proc/PID/smaps`: what `maps` leaves out. Walks page tables, so never while a process is frozen.

use super::maps::{self, MapLine};
use crate::error::{Error, Result};

/// One mapping of `smaps`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SmapsEntry {
    /// Its line, as in `maps`.
    pub line: MapLine,
    /// Page size of the mapping in bytes (`KernelPageSize`).
    pub page_size: u64,
    /// Resident bytes.
    pub rss_bytes: u64,
    /// Resident anonymous bytes (for a private file mapping: written pages).
    pub anonymous_bytes: u64,
    /// Swapped-out bytes.
    pub swap_bytes: u64,
    /// Locked bytes.
    pub locked_bytes: u64,
    /// Resident bytes of huge pages (`Private_Hugetlb` and `Shared_Hugetlb`).
    pub hugetlb_bytes: u64,
    /// `VmFlags`.
    pub flags: VmFlags,
}

/// The set of two-letter flags of a `VmFlags` line that matter here (proc(5)); others are left out.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct VmFlags(u32);

macro_rules! vm_flags {
    ($($name:ident = $bit:literal $letters:literal $doc:literal),* $(,)?) => {
        impl VmFlags {
            $(#[doc = $doc] pub const $name: VmFlags = VmFlags(1 << $bit);)*

            fn of(letters: &[u8]) -> VmFlags {
                $(if letters == $letters { return VmFlags::$name; })*
                VmFlags(0)
            }
        }

        impl std::fmt::Debug for VmFlags {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("VmFlags(")?;
                $(if self.has(VmFlags::$name) { write!(f, " {}", stringify!($name))?; })*
                f.write_str(" )")
            }
        }
    };
}

vm_flags! {
    MAY_WRITE = 0 b"mw" "may be made writable",
    GROWS_DOWN = 1 b"gd" "grows down",
    PFN_MAP = 2 b"pf" "maps page frames without page structures",
    LOCKED = 3 b"lo" "locked in memory",
    LOCK_ON_FAULT = 4 b"lf" "pages are locked as they are touched",
    IO = 5 b"io" "memory of a device",
    SEQUENTIAL = 6 b"sr" "`MADV_SEQUENTIAL`",
    RANDOM = 7 b"rr" "`MADV_RANDOM`",
    DONT_COPY = 8 b"dc" "`MADV_DONTFORK`",
    NO_RESERVE = 9 b"nr" "swap space is not reserved",
    HUGETLB = 10 b"ht" "hugetlb pages",
    WIPE_ON_FORK = 11 b"wf" "`MADV_WIPEONFORK`",
    DONT_DUMP = 12 b"dd" "`MADV_DONTDUMP`",
    HUGE_PAGE = 13 b"hg" "`MADV_HUGEPAGE`",
    NO_HUGE_PAGE = 14 b"nh" "`MADV_NOHUGEPAGE`",
    MERGEABLE = 15 b"mg" "`MADV_MERGEABLE`",
    UFFD_MISSING = 16 b"um" "userfaultfd: missing faults",
    UFFD_WP = 17 b"uw" "userfaultfd: write-protect faults",
    UFFD_MINOR = 18 b"ui" "userfaultfd: minor faults",
    SHADOW_STACK = 19 b"ss" "shadow stack",
    SEALED = 20 b"sl" "sealed by `mseal(2)`",
    SYNC = 21 b"sf" "`MAP_SYNC`",
    DROPPABLE = 22 b"dp" "`MAP_DROPPABLE`",
    TAGGED = 23 b"mt" "memory tagging",
}

impl VmFlags {
    /// True if all flags of `other` are set.
    pub fn has(self, other: VmFlags) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for VmFlags {
    type Output = VmFlags;
    fn bitor(self, other: VmFlags) -> VmFlags {
        VmFlags(self.0 | other.0)
    }
}

impl VmFlags {
    fn parse(letters: &[u8]) -> VmFlags {
        letters
            .split(|b| *b == b' ')
            .filter(|w| !w.is_empty())
            .fold(VmFlags(0), |flags, word| flags | VmFlags::of(word))
    }
}

/// Reads and parses `/proc/PID/smaps`.
pub fn read(pid: i32) -> Result<Vec<SmapsEntry>> {
    parse(&super::read(pid, "smaps")?)
}

/// Parses the text of `/proc/PID/smaps`.
pub fn parse(text: &[u8]) -> Result<Vec<SmapsEntry>> {
    let mut entries: Vec<SmapsEntry> = Vec::with_capacity(text.len() / 800);
    for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        // Fields start with a capital letter, mappings with a lower-case hexadecimal digit.
        if !line[0].is_ascii_uppercase() {
            let line = maps::parse_line(line).ok_or_else(|| bad(line))?;
            entries.push(SmapsEntry { line, ..SmapsEntry::default() });
        } else if let Some(entry) = entries.last_mut() {
            field(entry, line).ok_or_else(|| bad(line))?;
        } else {
            return Err(bad(line));
        }
    }
    Ok(entries)
}

fn bad(line: &[u8]) -> Error {
    Error::parse("a line of /proc/PID/smaps", &String::from_utf8_lossy(line))
}

fn field(entry: &mut SmapsEntry, line: &[u8]) -> Option<()> {
    let colon = line.iter().position(|b| *b == b':')?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    let bytes = || super::decimal(value.trim_ascii_start())?.0.checked_mul(1024);
    match name {
        b"KernelPageSize" => entry.page_size = bytes()?,
        b"Rss" => entry.rss_bytes = bytes()?,
        b"Anonymous" => entry.anonymous_bytes = bytes()?,
        b"Swap" => entry.swap_bytes = bytes()?,
        b"Locked" => entry.locked_bytes = bytes()?,
        b"Private_Hugetlb" | b"Shared_Hugetlb" => {
            entry.hugetlb_bytes = entry.hugetlb_bytes.checked_add(bytes()?)?;
        }
        b"VmFlags" => entry.flags = VmFlags::parse(value),
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &[u8] = b"7fd204dba000-7fd204dbc000 rw-p 00000000 00:00 0 \n\
        Size:                  8 kB\nKernelPageSize:        4 kB\nMMUPageSize:           4 kB\n\
        Rss:                   8 kB\nAnonymous:             4 kB\nSwap:                 12 kB\n\
        Locked:                4 kB\nTHPeligible:           0\nVmFlags: rd wr mr mw me lo lf ac  \n\
        7fd204dc5000-7fd204dc9000 r--p 00000000 00:00 0                          [vvar]\n\
        Size:                 16 kB\nVmFlags: rd mr pf io de dd \n";

    #[test]
    fn fields_and_flags() {
        let entries = parse(TEXT).unwrap();
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].page_size, 4096);
        assert_eq!(entries[0].anonymous_bytes, 4096);
        assert_eq!(entries[0].swap_bytes, 12 << 10);
        assert_eq!(entries[0].flags, VmFlags::MAY_WRITE | VmFlags::LOCKED | VmFlags::LOCK_ON_FAULT);
        assert!(entries[1].flags.has(VmFlags::IO | VmFlags::DONT_DUMP));
        assert!(!entries[1].flags.has(VmFlags::MAY_WRITE));
    }

    #[test]
    fn own_smaps() {
        let entries = read(std::process::id() as i32).unwrap();
        assert!(entries.iter().all(|e| e.page_size >= 4096));
        assert!(entries.iter().any(|e| e.anonymous_bytes > 0));
    }

    #[test]
    fn a_field_without_a_mapping_is_an_error() {
        assert!(parse(b"Rss: 4 kB\n").is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_do_no_harm(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&text);
        }

        #[test]
        fn damaged_text_does_no_harm(at in 0..TEXT.len(), byte: u8, cut in 0..TEXT.len()) {
            let mut text = TEXT.to_vec();
            text[at] = byte;
            text.truncate(cut);
            let _ = parse(&text);
        }
    }
}
