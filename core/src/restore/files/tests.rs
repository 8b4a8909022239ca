//! Capture, plan, run, capture again: both captures must be equal.

// Regions begin at a page.
#![allow(clippy::cast_ptr_alignment)]

use super::*;
use crate::capture::files::{CapturedFiles, StdioPolicy};
use crate::manifest::{Descriptor, Memfd, PipeEnd};
use crate::program::ENTRY_LEN;
use crate::testing::{Child, ok, shared};
use proptest::prelude::*;
use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const REGION_LEN: usize = 64 << 20;

/// Works through a program in this process, as the loop of `arch` does in another.
fn interpret(entries: *mut u8, count: usize) {
    for index in 0..count {
        // SAFETY: the table lies in the region `entries`, and the addresses in it in mapped regions.
        unsafe {
            let entry = entries.add(index * ENTRY_LEN as usize).cast::<u64>();
            let flags = *entry.add(7);
            let mut args = [0u64; 6];
            for (i, arg) in args.iter_mut().enumerate() {
                *arg = *entry.add(1 + i);
                if flags & 1 << i != 0 {
                    *arg = (*arg as *const u64).read_unaligned();
                }
            }
            let nr = *entry;
            let result = if nr == Op::Store as u64 {
                *(args[0] as *mut u64) = args[1];
                0
            } else {
                libc::syscall(nr as i64, args[0], args[1], args[2], args[3], args[4], args[5])
            };
            let failed = result == -1 && flags & 1 << 8 != 0;
            let errno = std::io::Error::last_os_error();
            *entry.add(8) = result as u64;
            assert!(!failed, "entry {index} (syscall {nr} {args:x?}): {errno}");
        }
    }
}

fn manifest(captured: &CapturedFiles) -> Manifest {
    Manifest {
        files: captured.files.clone(),
        descriptors: captured.descriptors.clone(),
        ..Manifest::default()
    }
}

/// Restores into a new process. Memfds that are not open are mapped.
fn restore(captured: &CapturedFiles) -> Child {
    let (entries, data) = (shared(REGION_LEN), shared(REGION_LEN));
    // SAFETY: a page of its own, shared with the child.
    let go = unsafe { &*shared(4096).cast::<std::sync::atomic::AtomicU64>() };
    let child = Child::start(|| {
        // SAFETY: integers only; closes the standard streams, so that the program finds nothing.
        unsafe { libc::close_range(0, 2, 0) };
        let mut count;
        while {
            count = go.load(std::sync::atomic::Ordering::Acquire);
            count == 0
        } {
            std::thread::yield_now();
        }
        interpret(entries, count as usize);
    });
    let mut manifest = manifest(captured);
    for file in &mut manifest.files {
        // The copy has another id here; in its own namespace it would not.
        file.owner = if file.owner == 0 { 0 } else { child.pid };
    }
    let mut program = Program::new(entries as u64, data as u64);
    let planned = plan_files(&manifest, &mut program, &[], &[]).unwrap();
    for index in 0..manifest.files.len() as u32 {
        if manifest.descriptors.iter().all(|d| d.file != index) {
            let from = planned.memfd(&manifest, index).unwrap();
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let args = [
                0.into(),
                4096.into(),
                prot.into(),
                libc::MAP_SHARED.into(),
                from.into(),
                0.into(),
            ];
            program.must("map", libc::SYS_mmap, args);
        }
    }
    place_files(&manifest, &planned, &mut program);
    assert!(program.entries().len() < REGION_LEN && program.data_bytes().len() < REGION_LEN);
    // SAFETY: both regions are large enough, and the child has not looked at them yet.
    unsafe {
        entries.copy_from(program.entries().as_ptr(), program.entries().len());
        data.copy_from(program.data_bytes().as_ptr(), program.data_bytes().len());
    }
    go.store(program.len() as u64, std::sync::atomic::Ordering::Release);
    child.wait();
    child
}

/// Takes out what differs between two copies: inode numbers, owners' ids, running times.
fn normal(mut captured: CapturedFiles) -> CapturedFiles {
    captured.unexamined.clear();
    let mut ids = Vec::new();
    let mut number = |id: &mut u64| {
        let at = ids.iter().position(|known| known == id);
        *id = at.unwrap_or_else(|| {
            ids.push(*id);
            ids.len() - 1
        }) as u64;
    };
    for file in &mut captured.files {
        file.owner = file.owner.signum();
        match file.kind.as_mut().unwrap() {
            FileKind::Pipe(end) => number(&mut end.pipe),
            FileKind::Memfd(memfd) => number(&mut memfd.inode),
            FileKind::TimerFd(timer) => {
                // Ten seconds are more than a test takes.
                timer.time.value_ns /= 10_000_000_000;
                timer.deadline_ns = (timer.deadline_ns + 500_000_000) / 1_000_000_000;
            }
            _ => {}
        }
    }
    captured
}

/// Captures what `work` makes, restores it, and checks that the copy looks the same. Returns the first.
fn round_trip(work: impl FnOnce()) -> CapturedFiles {
    let source = Child::new(work);
    let captured = source.capture().unwrap();
    assert_eq!(captured.unexamined, []);
    let copy = restore(&captured);
    let again = copy.capture().unwrap();
    assert_eq!(normal(again), normal(captured.clone()));
    captured
}

fn path_of(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn open(path: &Path, flags: i32) -> i32 {
    // SAFETY: a NUL-terminated path.
    ok(unsafe { libc::open(path_of(path).as_ptr(), flags, 0o600) })
}

/// `fcntl` and the like with integers.
fn call(nr: i64, args: [i64; 4]) -> i32 {
    // SAFETY: callers pass integers, or pointers to live values of the size the call takes.
    ok(unsafe { libc::syscall(nr, args[0], args[1], args[2], args[3]) } as i32)
}

fn write(fd: i32, bytes: &[u8]) {
    assert_eq!(nix::unistd::write(borrow(fd), bytes).unwrap(), bytes.len());
}

fn borrow(fd: i32) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: the descriptor is open for the rest of the child's life.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}

fn pipe(flags: i32) -> (i32, i32) {
    let mut ends = [0; 2];
    // SAFETY: two ints.
    ok(unsafe { libc::pipe2(ends.as_mut_ptr(), flags) });
    (ends[0], ends[1])
}

#[test]
fn files_offsets_flags_and_duplicates() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, b"0123456789").unwrap();
    std::os::unix::fs::symlink(&file, dir.path().join("link")).unwrap();
    let captured = round_trip(|| {
        let a = open(&file, libc::O_RDWR | libc::O_CLOEXEC);
        call(libc::SYS_lseek, [a.into(), 7, 0, 0]);
        // A duplicate shares the offset; a second open that looks the same does not.
        call(libc::SYS_dup3, [a.into(), 700, 0, 0]);
        let b = open(&file, libc::O_RDWR);
        call(libc::SYS_lseek, [b.into(), 7, 0, 0]);
        open(&file, libc::O_WRONLY | libc::O_APPEND | libc::O_DSYNC);
        open(dir.path(), libc::O_RDONLY | libc::O_DIRECTORY);
        open(&dir.path().join("link"), libc::O_PATH | libc::O_NOFOLLOW);
        open(&file, libc::O_PATH | libc::O_CLOEXEC);
        open(Path::new("/dev/urandom"), libc::O_RDONLY | libc::O_NONBLOCK);
        open(Path::new("/proc/cpuinfo"), libc::O_RDONLY);
    });
    let shared: Vec<&Descriptor> =
        captured.descriptors.iter().filter(|d| d.fd == 3 || d.fd == 700).collect();
    assert_eq!(shared[0].file, shared[1].file);
    assert!(shared[0].cloexec && !shared[1].cloexec);
    assert_eq!(captured.files[shared[0].file as usize].offset, 7);
    // Standard streams are one description, and so are the two above.
    assert_eq!(captured.descriptors.len(), 12);
    assert_eq!(captured.files.len(), 9);
}

#[test]
fn pipes_keep_content_packets_and_ends() {
    let captured = round_trip(|| {
        let (_, w) = pipe(libc::O_CLOEXEC);
        write(w, &[7; 5000]);
        write(w, b"more");
        let (_, w) = pipe(libc::O_DIRECT | libc::O_NONBLOCK);
        for packet in [&b"one"[..], b"second", b"3"] {
            write(w, packet);
        }
        // Only the read end is left, with data before the end of file.
        let (_, w) = pipe(0);
        write(w, b"last words");
        call(libc::SYS_close, [w.into(), 0, 0, 0]);
        // Only the write end is left.
        let (r, w) = pipe(0);
        call(libc::SYS_close, [r.into(), 0, 0, 0]);
        call(libc::SYS_fcntl, [w.into(), 1031, 4096, 0]);
        // Ends opened again through /proc, at crossed numbers.
        let (r, w) = pipe(0);
        open(Path::new(&format!("/proc/self/fd/{r}")), libc::O_RDWR);
        open(Path::new(&format!("/proc/self/fd/{r}")), libc::O_RDONLY);
        call(libc::SYS_dup3, [r.into(), 0, 0, 0]);
        call(libc::SYS_dup3, [w.into(), i64::from(r), 0, 0]);
        // Signals on arrival.
        let (r, _) = pipe(0);
        call(libc::SYS_fcntl, [r.into(), libc::F_SETOWN.into(), std::process::id().into(), 0]);
        call(libc::SYS_fcntl, [r.into(), F_SETSIG.into(), libc::SIGURG.into(), 0]);
        call(libc::SYS_fcntl, [r.into(), F_SETFL.into(), libc::O_ASYNC.into(), 0]);
    });
    let contents: Vec<&Vec<Vec<u8>>> = captured
        .files
        .iter()
        .filter_map(|f| match &f.kind {
            Some(FileKind::Pipe(end)) if !end.content.is_empty() => Some(&end.content),
            _ => None,
        })
        .collect();
    assert_eq!(contents[0].concat().len(), 5004);
    assert_eq!(*contents[1], [b"one".to_vec(), b"second".to_vec(), b"3".to_vec()]);
    assert_eq!(*contents[2], [b"last words".to_vec()]);
    assert!(captured.files.iter().any(|f| f.owner != 0 && f.owner_signal == libc::SIGURG));
}

#[test]
fn counters_timers_signals_and_sets() {
    let captured = round_trip(|| {
        // SAFETY: pointers to live values of the size each call takes.
        unsafe {
            let e = ok(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC));
            write(e, &0x1_0000_0005u64.to_le_bytes());
            let s = ok(libc::eventfd(3, libc::EFD_SEMAPHORE));
            let arm = |clock: i32, flags: i32, value_ns: i64, interval_ns: i64| {
                let t = ok(libc::timerfd_create(clock, libc::TFD_NONBLOCK));
                let spec = |ns: i64| libc::timespec {
                    tv_sec: ns / 1_000_000_000,
                    tv_nsec: ns % 1_000_000_000,
                };
                let new =
                    libc::itimerspec { it_interval: spec(interval_ns), it_value: spec(value_ns) };
                ok(libc::timerfd_settime(t, flags, &raw const new, std::ptr::null_mut()));
                t
            };
            let t = arm(libc::CLOCK_MONOTONIC, 0, 3_605_000_000_000, 7_000_000_001);
            let mut now = std::mem::zeroed();
            libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now);
            let later = (now.tv_sec + 3605) * 1_000_000_000;
            arm(libc::CLOCK_REALTIME, 3, later, 0);
            arm(libc::CLOCK_BOOTTIME, 0, 0, 0);
            // One expired once, and one periodic that has expired and was not looked at since.
            arm(libc::CLOCK_MONOTONIC, 0, 1, 0);
            arm(libc::CLOCK_MONOTONIC, 0, 1, 3_605_000_000_000);
            std::thread::sleep(std::time::Duration::from_millis(5));
            let mask = 0x204u64;
            let g = call(libc::SYS_signalfd4, [-1, &raw const mask as i64, 8, 0]);
            let set = ok(libc::epoll_create1(0));
            let outer = ok(libc::epoll_create1(libc::EPOLL_CLOEXEC));
            let watch = |set: i32, fd: i32, events: i32, data: u64| {
                let mut event = libc::epoll_event { events: events as u32, u64: data };
                ok(libc::epoll_ctl(set, libc::EPOLL_CTL_ADD, fd, &raw mut event));
            };
            watch(set, e, libc::EPOLLIN | libc::EPOLLET, 0x7f00_dead_beef);
            watch(set, s, libc::EPOLLOUT | libc::EPOLLONESHOT, u64::MAX);
            watch(set, t, libc::EPOLLIN | libc::EPOLLEXCLUSIVE, 1);
            watch(outer, set, libc::EPOLLIN, 2);
            watch(outer, g, libc::EPOLLIN, 3);
        }
    });
    let timers: Vec<_> = captured
        .files
        .iter()
        .filter_map(|f| match &f.kind {
            Some(FileKind::TimerFd(t)) => Some(t),
            _ => None,
        })
        .collect();
    assert_eq!(timers.iter().map(|t| t.ticks).collect::<Vec<_>>(), [0, 0, 0, 1, 1]);
    assert!(timers[1].deadline_ns > 0 && timers[0].deadline_ns == 0);
    assert!(timers[4].time.value_ns > 3_600_000_000_000, "it was set going again");
    let event = captured.files.iter().find_map(|f| match &f.kind {
        Some(FileKind::EventFd(e)) if e.count > 3 => Some(e.clone()),
        _ => None,
    });
    assert_eq!(event.unwrap().count, 0x1_0000_0005);
}

#[test]
fn memfds_keep_content_seals_and_mappings() {
    let captured = round_trip(|| {
        // SAFETY: constant strings and integers.
        unsafe {
            let m = ok(libc::memfd_create(c"holes and seals".as_ptr(), libc::MFD_ALLOW_SEALING));
            ok(libc::ftruncate(m, 10 << 20));
            ok(libc::pwrite(m, b"begin".as_ptr().cast(), 5, 4096) as i32);
            ok(libc::pwrite(m, b"end".as_ptr().cast(), 3, (10 << 20) - 3) as i32);
            ok(libc::lseek(m, 99, libc::SEEK_SET) as i32);
            ok(libc::fchmod(m, 0o640));
            ok(libc::fcntl(m, libc::F_ADD_SEALS, libc::F_SEAL_GROW | libc::F_SEAL_WRITE));
            open(Path::new(&format!("/proc/self/fd/{m}")), libc::O_RDONLY);
            ok(libc::memfd_create(c"".as_ptr(), libc::MFD_CLOEXEC));
            let only_mapped = ok(libc::memfd_create(c"mapped".as_ptr(), 0));
            write(only_mapped, b"still here");
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let at = libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_SHARED, only_mapped, 0);
            assert_ne!(at, libc::MAP_FAILED);
            libc::close(only_mapped);
        }
    });
    let memfds: Vec<&Memfd> = captured
        .files
        .iter()
        .filter_map(|f| match &f.kind {
            Some(FileKind::Memfd(m)) => Some(m),
            _ => None,
        })
        .collect();
    assert_eq!(memfds.len(), 4);
    assert_eq!(memfds[0].name, b"holes and seals");
    let bytes: usize = memfds[0].extents.iter().map(|e| e.bytes.len()).sum();
    assert!(bytes <= 8192, "holes stay holes: {bytes}");
    assert_eq!(memfds[1].inode, memfds[0].inode);
    assert!(memfds[1].extents.is_empty());
    assert_eq!(&memfds[3].extents[0].bytes[..10], b"still here");
}

#[test]
fn huge_memfds() {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u64 = free.unwrap_or_default().trim().parse().unwrap_or(0);
    if free < 3 {
        println!("skipped: needs three free huge pages (vm.nr_hugepages)");
        return;
    }
    let captured = round_trip(|| {
        // SAFETY: the mapping is of two huge pages, and written within.
        unsafe {
            let m = ok(libc::memfd_create(c"huge".as_ptr(), libc::MFD_HUGETLB));
            ok(libc::ftruncate(m, 4 << 20));
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let at = libc::mmap(std::ptr::null_mut(), 4 << 20, prot, libc::MAP_SHARED, m, 0);
            assert_ne!(at, libc::MAP_FAILED);
            *at.cast::<u8>().add(3 << 20) = 9;
            libc::munmap(at, 4 << 20);
        }
    });
    let huge = captured.files.iter().find_map(|f| match &f.kind {
        Some(FileKind::Memfd(m)) => Some(m.clone()),
        _ => None,
    });
    assert_eq!(huge.unwrap().extents.len(), 1);
}

#[test]
fn redirected_streams_are_restored() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("output");
    let source = Child::new(|| {
        let mut pair = [0; 2];
        // SAFETY: two ints.
        ok(unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()) });
        for fd in 0..3 {
            call(libc::SYS_dup3, [pair[0].into(), fd, 0, 0]);
        }
        for fd in pair {
            call(libc::SYS_close, [fd.into(), 0, 0, 0]);
        }
    });
    let blockers = source.capture().unwrap_err();
    assert!(blockers[0].to_string().contains("--stdio"), "{}", blockers[0]);
    let policy = StdioPolicy::File(output.as_os_str().as_bytes().to_vec());
    let captured = source.capture_with(&policy).unwrap();
    let copy = restore(&captured);
    let link = |fd| std::fs::read_link(format!("/proc/{}/fd/{fd}", copy.pid)).unwrap();
    assert_eq!((link(0), link(1), link(2)), ("/dev/null".into(), output.clone(), output));
}

/// Hostile tables end in an error, never in a panic.
fn refused(files: Vec<OpenFile>, descriptors: Vec<Descriptor>, reserved: &[i32]) -> String {
    let manifest = Manifest { files, descriptors, ..Manifest::default() };
    let mut program = Program::new(0x1000, 0x8000);
    plan_files(&manifest, &mut program, reserved, &[]).unwrap_err().to_string()
}

fn file(kind: FileKind) -> OpenFile {
    OpenFile { kind: Some(kind), ..OpenFile::default() }
}

#[test]
fn hostile_tables_are_refused() {
    let at = |fd, file| Descriptor { fd, file, cloexec: false };
    let signalfd = || file(FileKind::SignalFd(0));
    assert!(refused(vec![signalfd()], vec![at(-1, 0)], &[]).contains("descriptor -1"));
    assert!(refused(vec![signalfd()], vec![at(i32::MAX, 0)], &[]).contains("descriptor"));
    assert!(refused(vec![signalfd()], vec![at(1, 0), at(1, 0)], &[]).contains("descriptor 1"));
    assert!(refused(vec![signalfd()], vec![at(1, 1)], &[]).contains("of file 1"));
    assert!(refused(vec![signalfd()], vec![at(7, 0)], &[7]).contains("taken"));
    assert!(refused(vec![OpenFile::default()], vec![], &[]).contains("kind"));
    let pipe = PipeEnd { capacity_bytes: 4096, content: vec![vec![0; 5000]], ..PipeEnd::default() };
    assert!(refused(vec![file(FileKind::Pipe(pipe))], vec![], &[]).contains("5000"));
    let memfd = Memfd { name: b"a\0b".to_vec(), ..Memfd::default() };
    assert!(refused(vec![file(FileKind::Memfd(memfd))], vec![], &[]).contains("memfd"));
    let path = crate::manifest::PathFile { path: b"relative".to_vec(), ..Default::default() };
    assert!(refused(vec![file(FileKind::Regular(path))], vec![], &[]).contains("relative"));
}

proptest! {
    #[test]
    fn any_pipe_does_no_harm(capacity: u32, lens in proptest::collection::vec(0usize..9000, 0..20), flags: u32, pipe: u64) {
        let content = lens.into_iter().map(|n| vec![0; n]).collect();
        let end = PipeEnd { pipe, capacity_bytes: capacity, content, write_end: true };
        let file = OpenFile { flags, ..file(FileKind::Pipe(end)) };
        let manifest = Manifest { files: vec![file.clone(), file], ..Manifest::default() };
        let mut program = Program::new(0x1000, 0x8000);
        if let Ok(planned) = plan_files(&manifest, &mut program, &[3, 1000], &[]) {
            place_files(&manifest, &planned, &mut program);
        }
    }
}
