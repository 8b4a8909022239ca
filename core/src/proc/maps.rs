//! `/proc/PID/maps`, read while the process is frozen: thousands of lines, so every line counts.

use super::{decimal, hex};
use crate::error::{Error, Result};
use libc::{PROT_EXEC, PROT_READ, PROT_WRITE};

/// One line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MapLine {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// `PROT_*`.
    pub prot: u32,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Device of the file as `st_dev` has it; 0 without a file.
    pub dev: u64,
    /// Inode number; 0 without a file.
    pub ino: u64,
    /// Path or `[name]`, with newlines as they are; " (deleted)" is part of it.
    pub path: Vec<u8>,
}

impl MapLine {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// True for a mapping of no bytes, which the kernel never reports.
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }
}

/// Reads and parses `/proc/PID/maps`.
pub fn read(pid: i32) -> Result<Vec<MapLine>> {
    parse(&super::read(pid, "maps")?)
}

/// Parses the text of `/proc/PID/maps`.
pub fn parse(text: &[u8]) -> Result<Vec<MapLine>> {
    let mut lines = Vec::with_capacity(text.len() / 90);
    for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        lines.push(parse_line(line).ok_or_else(|| bad(line))?);
    }
    Ok(lines)
}

fn bad(line: &[u8]) -> Error {
    Error::parse("a line of /proc/PID/maps", &String::from_utf8_lossy(line))
}

/// Parses one line without its newline; `None` if it is not one.
pub fn parse_line(line: &[u8]) -> Option<MapLine> {
    let (start, rest) = hex(line)?;
    let (end, rest) = hex(rest.strip_prefix(b"-")?)?;
    let (perms, rest) = rest.strip_prefix(b" ")?.split_at_checked(4)?;
    let (prot, shared) = parse_perms(perms)?;
    let (offset, rest) = hex(rest.strip_prefix(b" ")?)?;
    let (major, rest) = hex(rest.strip_prefix(b" ")?)?;
    let (minor, rest) = hex(rest.strip_prefix(b":")?)?;
    let (ino, rest) = decimal(rest.strip_prefix(b" ")?)?;
    if start >= end || major > u64::from(u32::MAX) || minor > u64::from(u32::MAX) {
        return None;
    }
    let dev = libc::makedev(major as u32, minor as u32);
    Some(MapLine { start, end, prot, shared, offset, dev, ino, path: parse_path(rest)? })
}

fn parse_perms(perms: &[u8]) -> Option<(u32, bool)> {
    let mut prot = 0;
    for (at, letter, bit) in [(0, b'r', PROT_READ), (1, b'w', PROT_WRITE), (2, b'x', PROT_EXEC)] {
        match perms[at] {
            b if b == letter => prot |= bit as u32,
            b'-' => {}
            _ => return None,
        }
    }
    match perms[3] {
        b's' => Some((prot, true)),
        b'p' => Some((prot, false)),
        _ => None,
    }
}

/// The path after the padding. The kernel pads with spaces up to a fixed column, and a path starts
/// with `/`, `[` or a letter, so leading spaces are never part of it. It escapes newlines (only) in
/// octal, and leaves backslashes: a file whose name holds the four characters `\012` reads as one
/// with a newline, which the comparison of inodes finds out.
fn parse_path(rest: &[u8]) -> Option<Vec<u8>> {
    let Some(rest) = rest.strip_prefix(b" ") else {
        return rest.is_empty().then(Vec::new);
    };
    let path = rest.trim_ascii_start();
    if !path.contains(&b'\\') {
        return Some(path.to_vec());
    }
    let mut plain = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&first, tail)) = rest.split_first() {
        if let Some(tail) = rest.strip_prefix(b"\\012") {
            plain.push(b'\n');
            rest = tail;
        } else {
            plain.push(first);
            rest = tail;
        }
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_of_each_sort() {
        let text = b"55ec03286000-55ec03287000 r--p 00001000 fe:00 18504                      /usr/bin/x y\n\
            7fd20416a000-7fd20416c000 rw-p 00000000 00:00 0 \n\
            7fd2040ab000-7fd2040ad000 rw-s 00000000 00:01 1026                       /dev/zero (deleted)\n\
            7fd204dcb000-7fd204dcd000 r-xp 00000000 00:00 0                          [vdso]\n\
            7fd204dcd000-7fd204dce000 ---p 00000000 fe:00 7 /a\\012b\\x\n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";
        let lines = parse(text).unwrap();
        assert_eq!(lines.len(), 6);
        assert_eq!(
            lines[0],
            MapLine {
                start: 0x55ec_0328_6000,
                end: 0x55ec_0328_7000,
                prot: PROT_READ as u32,
                shared: false,
                offset: 0x1000,
                dev: libc::makedev(0xfe, 0),
                ino: 18504,
                path: b"/usr/bin/x y".to_vec(),
            }
        );
        assert_eq!(lines[1].path, b"");
        assert!(lines[2].shared);
        assert_eq!(lines[2].path, b"/dev/zero (deleted)");
        assert_eq!(lines[4].path, b"/a\nb\\x");
        assert_eq!(lines[5].start, 0xffff_ffff_ff60_0000);
    }

    #[test]
    fn own_maps() {
        let lines = read(std::process::id() as i32).unwrap();
        assert!(lines.windows(2).all(|w| w[0].end <= w[1].start));
        assert!(lines.iter().any(|l| l.path == b"[vdso]"));
    }

    #[test]
    fn a_line_takes_less_than_a_microsecond() {
        let line: &[u8] = b"7fd2040e0000-7fd2040e1000 rw-p 0000c000 fe:00 21536                      /usr/lib/x86_64-linux-gnu/libc.so.6\n";
        let text = line.repeat(20_000);
        let best_ns = (0..5)
            .map(|_| {
                let start = std::time::Instant::now();
                assert_eq!(parse(&text).unwrap().len(), 20_000);
                start.elapsed().as_nanos() / 20_000
            })
            .min()
            .unwrap();
        println!("{best_ns} ns a line");
        // Twice the target: tests are barely optimised and share the machine.
        assert!(best_ns < 2_000, "{best_ns} ns a line");
    }

    proptest! {
        #[test]
        fn any_bytes_do_no_harm(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&text);
        }

        #[test]
        fn near_misses_do_no_harm(text in "[0-9a-f]{0,20}-?[0-9a-f]{0,20} ?[rwxps-]{0,6} ?[0-9a-f: ]{0,40}[\\[/\\\\0-9]{0,20}") {
            let _ = parse(text.as_bytes());
        }

        #[test]
        fn what_is_printed_is_read(
            start in 0u64..1 << 47, len in 1u64..1 << 40, prot in 0u32..8, shared: bool,
            offset: u64, major in 0u32..1 << 12, minor in 0u32..1 << 20, ino: u64, path in "(/[ -~\n]{0,30})?",
        ) {
            prop_assume!(!path.contains("\\012"));
            let letter = |bit, l| if prot & bit != 0 { l } else { '-' };
            let text = format!(
                "{start:08x}-{:08x} {}{}{}{} {offset:08x} {major:02x}:{minor:02x} {ino} {}{}\n",
                start + len, letter(1, 'r'), letter(2, 'w'), letter(4, 'x'), if shared { 's' } else { 'p' },
                "      ", path.replace('\n', "\\012"),
            );
            let want = MapLine {
                start, end: start + len, prot, shared, offset,
                dev: libc::makedev(major, minor), ino, path: path.into_bytes(),
            };
            prop_assert_eq!(parse(text.as_bytes()).unwrap(), vec![want]);
        }
    }
}
