//! Written data reaches the file system that both hosts see, before another host opens the files.

use crate::error::{Error, Result};
use crate::manifest::{Descriptor, FileKind, Mapping, MappingKind, OpenFile, vm_flag};
use nix::errno::Errno;
use std::collections::HashSet;
use std::fs::File;

/// Writes back what the page cache holds of files that the process may write: open for writing, or
/// mapped shared and writable. Those that are gone by now (the process runs) are left out.
pub fn flush_files(
    pid: i32,
    files: &[OpenFile],
    descriptors: &[Descriptor],
    mappings: &[Mapping],
) -> Result<()> {
    let mut done: HashSet<&[u8]> = HashSet::new();
    for d in descriptors {
        if let Some(path) = files.get(d.file as usize).and_then(written_path)
            && done.insert(path)
        {
            flush(&format!("/proc/{pid}/fd/{}", d.fd), path)?;
        }
    }
    let writable =
        |v: &&Mapping| v.kind == MappingKind::FileShared as i32 && v.flags & vm_flag::MAYWRITE != 0;
    for v in mappings.iter().filter(writable) {
        if done.insert(&v.path) {
            flush(&format!("/proc/{pid}/map_files/{:x}-{:x}", v.start, v.end), &v.path)?;
        }
    }
    Ok(())
}

/// The path of a regular file that is open for writing.
fn written_path(file: &OpenFile) -> Option<&[u8]> {
    let (path_only, made_there) = (libc::O_PATH as u32, libc::O_CREAT as u32);
    let reads = file.flags & libc::O_ACCMODE as u32 == libc::O_RDONLY as u32;
    match &file.kind {
        Some(FileKind::Regular(f)) if !reads && file.flags & (path_only | made_there) == 0 => {
            Some(&f.path)
        }
        _ => None,
    }
}

fn flush(link: &str, path: &[u8]) -> Result<()> {
    let fail = |errno| Error::sys(format!("write back {}", String::from_utf8_lossy(path)), errno);
    let Ok(file) = File::open(link) else { return Ok(()) };
    match nix::unistd::fsync(&file) {
        // Files made by the kernel know no such thing.
        Ok(()) | Err(Errno::EINVAL | Errno::EROFS | Errno::ENOSYS) => Ok(()),
        Err(e) => Err(fail(e)),
    }
}
