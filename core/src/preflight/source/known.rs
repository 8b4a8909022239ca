//! Files that the destination was asked about. It finds files by path, so one that the process uses since has
//! been compared with nothing there.

use crate::manifest::{FileKind, OpenFile};
use crate::proc::maps::MapLine;
use std::collections::HashSet;

type Identity = (Vec<u8>, u64, u64);

/// Files by path, device and inode number.
#[derive(Clone, Debug, Default)]
pub struct KnownFiles {
    open: HashSet<Identity>,
    /// Devices are as in `maps`, and those differ from what `stat` says on some file systems.
    mapped: HashSet<Identity>,
}

impl KnownFiles {
    /// Those of a process.
    pub fn of<'a>(files: &[OpenFile], lines: impl IntoIterator<Item = &'a MapLine>) -> Self {
        Self {
            open: files.iter().filter_map(open).collect(),
            mapped: lines.into_iter().filter_map(mapped).collect(),
        }
    }

    /// What a process does to a file that is not among these: for the middle of a sentence.
    pub fn newer<'a>(
        &self,
        files: &[OpenFile],
        lines: impl IntoIterator<Item = &'a MapLine>,
    ) -> Option<String> {
        let told =
            |verb: &str, (path, ..): Identity| format!("{verb} {}", String::from_utf8_lossy(&path));
        let opened = files.iter().filter_map(open).find(|f| !self.open.contains(f));
        let mut mapped = lines.into_iter().filter_map(mapped);
        opened
            .map(|f| told("opened", f))
            .or_else(|| mapped.find(|f| !self.mapped.contains(f)).map(|f| told("mapped", f)))
    }
}

/// A file with an identity: not one that the kernel makes, nor one that redirected output goes to.
fn open(file: &OpenFile) -> Option<Identity> {
    match file.kind.as_ref()? {
        FileKind::Regular(f) | FileKind::Directory(f) if f.id.ino != 0 => {
            Some((f.path.clone(), f.id.dev, f.id.ino))
        }
        _ => None,
    }
}

fn mapped(line: &MapLine) -> Option<Identity> {
    let by_path = line.ino != 0
        && line.path.starts_with(b"/")
        && !line.path.starts_with(b"/dev/zero")
        && !line.path.ends_with(b" (deleted)");
    by_path.then(|| (line.path.clone(), line.dev, line.ino))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{FileId, PathFile};

    fn file(path: &str, ino: u64) -> OpenFile {
        let id = FileId { ino, ..FileId::default() };
        let kind = FileKind::Regular(PathFile { path: path.into(), id });
        OpenFile { kind: Some(kind), ..OpenFile::default() }
    }

    fn line(text: &str) -> MapLine {
        crate::proc::maps::parse_line(text.as_bytes()).expect("a line of maps")
    }

    #[test]
    fn files_that_are_new_or_replaced_are_told() {
        let library = line("1000-2000 r--p 00000000 08:01 12                         /lib/a.so");
        let known = KnownFiles::of(&[file("/a", 7)], [&library]);
        assert_eq!(known.newer(&[file("/a", 7), file("/proc/stat", 0)], [&library]), None);
        assert_eq!(known.newer(&[file("/a", 8)], []), Some("opened /a".into()));
        assert_eq!(known.newer(&[file("/b", 7)], []), Some("opened /b".into()));
        let other = line("1000-2000 r--p 00000000 08:01 13                         /lib/a.so");
        assert_eq!(known.newer(&[], [&other]), Some("mapped /lib/a.so".into()));
        let memory =
            line("1000-2000 rw-s 00000000 00:01 13                         /memfd:x (deleted)");
        assert_eq!(known.newer(&[], [&memory]), None);
    }
}
