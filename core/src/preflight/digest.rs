//! What tells that two hosts have the same file: the linker's build-id, or a hash of the content.

use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

const BUILD_ID: u8 = 1;
const CONTENT: u8 = 2;
/// Largest table or note section looked at: build-ids lie in small ones.
const SECTION_MAX: usize = 64 << 10;

/// The digest of a regular file: a byte that tells the sort, then the build-id or SHA-256.
pub fn of_file(path: &[u8]) -> io::Result<Vec<u8>> {
    let path = std::ffi::OsStr::from_bytes(path);
    // What has become a FIFO must not make us wait.
    let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if let Some(id) = build_id(&file) {
        return Ok([&[BUILD_ID], id.as_slice()].concat());
    }
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => hash.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok([&[CONTENT], hash.finalize().as_slice()].concat())
}

/// The GNU build-id of a 64-bit ELF file.
fn build_id(file: &File) -> Option<Vec<u8>> {
    let header = read_at(file, 0, 64)?;
    if header.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (table, size, count) = (word(&header, 32)?, half(&header, 54)?, half(&header, 56)?);
    let headers = read_at(file, table, size.checked_mul(count)?)?;
    for program in headers.chunks_exact(size.max(56)) {
        const PT_NOTE: u32 = 4;
        if program.get(..4)? != PT_NOTE.to_le_bytes() {
            continue;
        }
        let notes = read_at(file, word(program, 8)?, usize::try_from(word(program, 32)?).ok()?);
        if let Some(id) = notes.and_then(|notes| find_note(&notes)) {
            return Some(id);
        }
    }
    None
}

/// The content of the note "GNU" of type 3.
fn find_note(mut notes: &[u8]) -> Option<Vec<u8>> {
    const NT_GNU_BUILD_ID: usize = 3;
    loop {
        let (name_len, len, kind) = (int(notes, 0)?, int(notes, 4)?, int(notes, 8)?);
        let name = notes.get(12..12usize.checked_add(name_len)?)?;
        let start = 12 + name_len.checked_next_multiple_of(4)?;
        let end = start.checked_add(len)?;
        let content = notes.get(start..end)?;
        // The limit is that of a digest in a manifest, with room for the sort.
        if kind == NT_GNU_BUILD_ID && name == b"GNU\0" && (1..=63).contains(&len) {
            return Some(content.to_vec());
        }
        notes = notes.get(end.checked_next_multiple_of(4)?..)?;
    }
}

fn read_at(file: &File, at: u64, len: usize) -> Option<Vec<u8>> {
    if len > SECTION_MAX {
        return None;
    }
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at).ok()?;
    Some(bytes)
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn int(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize)
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn content_and_build_ids() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        let digest = of_file(file.path().as_os_str().as_bytes()).unwrap();
        assert_eq!(digest[..5], [CONTENT, 0xba, 0x78, 0x16, 0xbf]);
        let own = std::env::current_exe().unwrap();
        assert_eq!(of_file(own.as_os_str().as_bytes()).unwrap()[0], BUILD_ID);
        assert!(of_file(b"/").is_err());
    }

    proptest! {
        #[test]
        fn any_notes_do_no_harm(notes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = find_note(&notes);
        }

        #[test]
        fn any_elf_does_no_harm(mut bytes in proptest::collection::vec(any::<u8>(), 64..400)) {
            use std::io::Write;
            bytes[..5].copy_from_slice(b"\x7fELF\x02");
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            let _ = build_id(&file);
        }
    }
}
