use super::*;
use crate::manifest::Memfd;
use crate::proc::{maps, smaps};
use proptest::prelude::*;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A mapping of this process, unmapped at the end.
struct Map(u64, usize);

impl Map {
    fn new(len: usize, prot: i32, flags: i32, fd: i32) -> Map {
        // SAFETY: no address is given, so nothing that exists is replaced.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Map(at as u64, len)
    }

    fn anon() -> Map {
        // MAP_GROWSDOWN keeps the kernel from merging it with a neighbour of other tests.
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        Map::new(8192, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN, -1)
    }

    fn advise(&self, advice: i32) {
        // SAFETY: the range is ours and holds nothing.
        assert_eq!(unsafe { libc::madvise(self.0 as *mut _, self.1, advice) }, 0);
    }

    /// Classified as the kernel reports it now.
    fn classify(&self, files: &[OpenFile]) -> Result<Mapping, Unclassified> {
        let smaps = smaps::read(std::process::id() as i32).unwrap();
        let lines: Vec<MapLine> =
            smaps.iter().map(|e| e.line.clone()).filter(|l| l.start == self.0).collect();
        assert_eq!(lines.len(), 1, "{smaps:?}");
        classify(&lines, &smaps, files).map(|mut m| m.remove(0))
    }

    fn blocker(&self) -> String {
        match self.classify(&[]) {
            Err(Unclassified::Blocked(b)) => b[0].to_string(),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the range is ours and nothing points into it.
        unsafe { libc::munmap(self.0 as *mut _, self.1) };
    }
}

fn memfd(name: &std::ffi::CStr) -> OwnedFd {
    // SAFETY: the name is NUL-terminated; the result is checked before it is owned.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: as above; nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: plain integers.
    assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), 8192) }, 0);
    fd
}

#[test]
fn advice_and_kind_of_anonymous_memory() {
    let map = Map::anon();
    map.advise(libc::MADV_DONTFORK);
    map.advise(libc::MADV_DONTDUMP);
    map.advise(libc::MADV_NOHUGEPAGE);
    let m = map.classify(&[]).unwrap();
    assert_eq!(m.kind(), MappingKind::Anon);
    let set = vm_flag::GROWSDOWN | vm_flag::DONTFORK | vm_flag::DONTDUMP | vm_flag::NOHUGEPAGE;
    assert_eq!(m.flags, set);
    assert_eq!(m.page_size, 4096);
}

#[test]
fn shared_memory_is_told_apart_by_object() {
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let (a, b) = (Map::new(4096, rw, flags, -1), Map::new(8192, rw, flags, -1));
    let smaps = smaps::read(std::process::id() as i32).unwrap();
    let lines: Vec<MapLine> =
        smaps.iter().map(|e| e.line.clone()).filter(|l| l.start == a.0 || l.start == b.0).collect();
    let both = classify(&lines, &smaps, &[]).unwrap();
    assert!(both.iter().all(|m| m.kind() == MappingKind::ShmemAnon));
    assert!(both.iter().all(|m| m.flags & vm_flag::SHARED != 0));
    assert_ne!(both[0].object, both[1].object);
}

#[test]
fn a_memfd_mapping_names_its_file() {
    let fd = memfd(c"the name");
    let map = Map::new(4096, libc::PROT_READ, libc::MAP_SHARED, fd.as_raw_fd());
    assert!(map.blocker().contains("while descriptors were being listed"));
    let line = maps::read(std::process::id() as i32).unwrap();
    let line = line.iter().find(|l| l.start == map.0).unwrap();
    let inode = memory_id(line.dev, line.ino);
    let kind = FileKind::Memfd(Memfd { inode, ..Memfd::default() });
    let files = [OpenFile::default(), OpenFile { kind: Some(kind), ..OpenFile::default() }];
    let m = map.classify(&files).unwrap();
    assert_eq!((m.kind(), m.object), (MappingKind::Memfd, 1));
}

#[test]
fn files_are_taken_by_path_and_refused_when_deleted() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let map = Map::new(4096, libc::PROT_READ, libc::MAP_PRIVATE, file.as_file().as_raw_fd());
    let m = map.classify(&[]).unwrap();
    assert_eq!(m.kind(), MappingKind::FilePrivate);
    assert_eq!(m.path, file.path().as_os_str().as_encoded_bytes());
    let shared = Map::new(4096, libc::PROT_READ, libc::MAP_SHARED, file.as_file().as_raw_fd());
    assert_eq!(shared.classify(&[]).unwrap().kind(), MappingKind::FileShared);
    drop(file);
    assert!(map.blocker().contains("deleted or replaced"), "{}", map.blocker());
}

#[test]
fn system_v_memory_is_refused() {
    // SAFETY: a private segment; attached where the kernel likes, and removed at the last detach.
    let at = unsafe {
        let id = libc::shmget(libc::IPC_PRIVATE, 4096, 0o600);
        assert!(id >= 0);
        let at = libc::shmat(id, std::ptr::null(), 0);
        libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut());
        at
    };
    let map = Map(at as u64, 4096);
    assert!(map.blocker().contains("System V"));
    // SAFETY: attached above, and nothing points into it.
    unsafe { libc::shmdt(at) };
    std::mem::forget(map);
}

fn line(start: u64, end: u64, prot: u32) -> MapLine {
    MapLine { start, end, prot, ..MapLine::default() }
}

fn entry(start: u64, end: u64, prot: u32, flags: VmFlags) -> SmapsEntry {
    SmapsEntry { line: line(start, end, prot), page_size: 4096, flags, ..SmapsEntry::default() }
}

#[test]
fn flags_are_inherited_by_parts_and_by_what_has_grown() {
    let smaps = [
        entry(0x1000, 0x9000, 3, VmFlags::NO_RESERVE),
        entry(0x9000, 0xa000, 1, VmFlags::default()),
    ];
    let maps = [line(0x1000, 0x2000, 3), line(0x3000, 0x4000, 3), line(0x8000, 0xb000, 3)];
    let got = classify(&maps, &smaps, &[]).unwrap();
    assert!(got.iter().all(|m| m.flags == vm_flag::NORESERVE));
}

#[test]
fn what_the_smaps_do_not_know_is_stale() {
    let smaps = [
        entry(0x1000, 0x2000, 3, VmFlags::NO_RESERVE),
        entry(0x2000, 0x3000, 3, VmFlags::default()),
        entry(0x5000, 0x6000, 1, VmFlags::default()),
    ];
    let maps = [line(0x1000, 0x3000, 3), line(0x5000, 0x6000, 3), line(0x8000, 0x9000, 3)];
    assert_eq!(classify(&maps, &smaps, &[]), Err(Unclassified::Stale(vec![0, 1, 2])));
    let mut file = line(0x1000, 0x2000, 3);
    (file.ino, file.path) = (7, b"/x".to_vec());
    assert_eq!(classify(&[file], &smaps, &[]), Err(Unclassified::Stale(vec![0])));
}

#[test]
fn own_mappings_of_the_kernel() {
    let smaps = smaps::read(std::process::id() as i32).unwrap();
    let lines: Vec<MapLine> =
        smaps.iter().map(|e| e.line.clone()).filter(|l| l.path.starts_with(b"[v")).collect();
    let got = classify(&lines, &smaps, &[]).unwrap();
    assert!(got.iter().any(|m| m.kind() == MappingKind::Vdso));
    assert!(got.iter().any(|m| m.kind() == MappingKind::Vvar));
    assert!(got.iter().all(|m| m.start < 1 << 47), "vsyscall is left out");
}

#[test]
fn names_that_are_refused() {
    for (path, word) in [
        ("anon_inode:[io_uring]", "kernel object"),
        ("/[aio] (deleted)", "AIO"),
        ("/secretmem (deleted)", "secret"),
        ("/dev/dri/card0", "device"),
        ("[uprobes]", "special"),
        ("socket:[12]", "kernel object"),
    ] {
        let mut l = line(0x1000, 0x2000, 3);
        l.path = path.as_bytes().to_vec();
        let mut e = entry(0x1000, 0x2000, 3, VmFlags::default());
        e.line = l.clone();
        match classify(&[l], &[e], &[]) {
            Err(Unclassified::Blocked(b)) => assert!(b[0].to_string().contains(word), "{b:?}"),
            other => panic!("{path}: {other:?}"),
        }
    }
}

proptest! {
    #[test]
    fn any_maps_do_no_harm(
        maps in proptest::collection::vec((0u64..64, 1u64..9, 0u32..8, "[/\\[a-z() ]{0,12}"), 0..12),
        smaps in proptest::collection::vec((0u64..64, 1u64..9, 0u32..8), 0..12),
    ) {
        let mut maps: Vec<MapLine> = maps.into_iter().map(|(s, n, p, path)| {
            MapLine { path: path.into_bytes(), ..line(s, s + n, p) }
        }).collect();
        maps.sort_by_key(|l| l.start);
        let mut smaps: Vec<SmapsEntry> =
            smaps.into_iter().map(|(s, n, p)| entry(s, s + n, p, VmFlags::default())).collect();
        smaps.sort_by_key(|e| e.line.start);
        if let Ok(got) = classify(&maps, &smaps, &[]) {
            prop_assert_eq!(got.len(), maps.len());
        }
    }
}

/// What a page is asked for as a whole has a bound.
#[test]
fn huge_pages_that_are_too_large_are_refused_by_name() {
    let line = MapLine {
        path: b"/anon_hugepage (deleted)".to_vec(),
        ino: 7,
        end: 1 << 30,
        ..MapLine::default()
    };
    let of_size = |page_size: u64| {
        let entry = SmapsEntry { line: line.clone(), page_size, ..SmapsEntry::default() };
        classify(std::slice::from_ref(&line), &[entry], &[])
    };
    assert!(of_size(2 << 20).is_ok());
    let Err(Unclassified::Blocked(blockers)) = of_size(1 << 30) else {
        panic!("it is not refused")
    };
    assert!(blockers[0].to_string().contains("pages of 1024 MiB"), "{}", blockers[0]);
}
