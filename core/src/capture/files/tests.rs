//! Every refusal, with a real process that holds the thing.

use super::*;
use crate::capture::presend::Presend;
use crate::testing::{Child, ok};
use std::ffi::CString;
use std::os::fd::AsRawFd;
use std::path::Path;

fn open(path: &str, flags: i32) -> i32 {
    let path = CString::new(path).unwrap();
    // SAFETY: a NUL-terminated path.
    ok(unsafe { libc::open(path.as_ptr(), flags, 0o600) })
}

/// The only blocker of a process that did `work`.
fn blocker(work: impl FnOnce()) -> String {
    let child = Child::new(work);
    let blockers = child.capture().unwrap_err();
    assert_eq!(blockers.len(), 1, "{blockers:?}");
    blockers[0].to_string()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn kernel_objects_by_name() {
    // SAFETY: integers only, or pointers to live values.
    unsafe {
        for (what, make) in [
            ("fd 3: an inotify instance", (|| libc::inotify_init1(0)) as fn() -> i32),
            ("fd 3: a socket", || libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)),
            ("fd 3: a pidfd", || libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) as i32),
            ("fd 3: a userfaultfd", || libc::syscall(libc::SYS_userfaultfd, 1) as i32),
            ("fd 3: /dev/ptmx is a terminal", || open("/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY)),
            ("fd 3: /dev/kmsg is a device", || open("/dev/kmsg", libc::O_RDONLY)),
            ("fd 3: /proc/1/stat belongs to another", || open("/proc/1/stat", libc::O_RDONLY)),
            ("fd 3: a kernel object (net:[", || open("/proc/self/ns/net", libc::O_RDONLY)),
        ] {
            let got = blocker(|| {
                ok(make());
            });
            assert!(got.starts_with(what) || got.contains("a namespace"), "{what}: {got}");
        }
    }
}

#[test]
fn files_that_are_not_there_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let got = blocker(|| {
        open(text(&path), libc::O_CREAT | libc::O_RDWR);
        std::fs::remove_file(&path).unwrap();
    });
    assert!(got.contains("deleted or replaced"), "{got}");
    let got = blocker(|| {
        open(text(&path), libc::O_CREAT | libc::O_RDWR);
        std::fs::rename(&path, dir.path().join("moved")).unwrap();
        std::fs::write(&path, b"another").unwrap();
        std::fs::rename(dir.path().join("moved"), dir.path().join("gone")).unwrap();
        std::fs::remove_file(dir.path().join("gone")).unwrap();
    });
    assert!(got.contains("deleted or replaced"), "{got}");
}

#[test]
fn fifos_locks_and_stale_watches() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let got = blocker(|| {
        open(text(&fifo), libc::O_RDWR);
    });
    assert!(got.contains("is a FIFO"), "{got}");
    let file = dir.path().join("locked");
    let got = blocker(|| {
        let fd = open(text(&file), libc::O_CREAT | libc::O_RDWR);
        // SAFETY: integers only.
        ok(unsafe { libc::flock(fd, libc::LOCK_EX) });
    });
    assert!(got.contains("FLOCK"), "{got}");
    // SAFETY: the event is a live value.
    let got = blocker(|| unsafe {
        let event = ok(libc::eventfd(0, 0));
        let set = ok(libc::epoll_create1(0));
        let mut what = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
        ok(libc::epoll_ctl(set, libc::EPOLL_CTL_ADD, event, &raw mut what));
        ok(libc::dup(event));
        libc::close(event);
    });
    assert!(got.contains("watches a file by fd 3"), "{got}");
}

#[test]
fn what_others_hold_too() {
    let (from, to) = nix::unistd::pipe().unwrap();
    let memory =
        nix::sys::memfd::memfd_create(c"both", nix::sys::memfd::MFdFlags::empty()).unwrap();
    let child = Child::new(|| {
        let test = std::os::unix::process::parent_id();
        // Reopened through /proc, since a child of the tests begins without descriptors.
        open(&format!("/proc/{test}/fd/{}", to.as_raw_fd()), libc::O_WRONLY);
        open(&format!("/proc/{test}/fd/{}", memory.as_raw_fd()), libc::O_RDWR);
    });
    let blockers = child.capture().unwrap_err();
    let own = std::process::id();
    assert_eq!(blockers.len(), 2, "{blockers:?}");
    assert!(
        blockers[0].to_string().starts_with(&format!("fd 3: a pipe shared with process {own}"))
    );
    assert!(
        blockers[1].to_string().starts_with(&format!("fd 4: a memfd shared with process {own}"))
    );
    drop((from, to, memory));
    // With the others gone, both are the child's own.
    assert!(child.capture().is_ok());
    // What nobody looked for is reported, not guessed at.
    let holders = Holders::default();
    let options = FileOptions { stdio: &StdioPolicy::Keep, holders: &holders, content: None };
    let captured = capture_files(child.pid, &[], &options).unwrap();
    assert_eq!(captured.unexamined.len(), 2);
}

#[test]
fn redirection_takes_duplicates_along() {
    let child = Child::new(|| {
        let tty = open("/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY);
        for fd in [0, 1, 2, 9] {
            // SAFETY: integers only.
            ok(unsafe { libc::dup2(tty, fd) });
        }
    });
    let blockers = child.capture().unwrap_err();
    assert!(blockers[0].to_string().contains("--stdio null or --stdio FILE"), "{blockers:?}");
    let captured = child.capture_with(&StdioPolicy::Null).unwrap();
    assert_eq!(captured.files.len(), 1);
    let numbers: Vec<i32> = captured.descriptors.iter().map(|d| d.fd).collect();
    assert_eq!(numbers, [0, 1, 2, 3, 9]);
    let captured = child.capture_with(&StdioPolicy::File(b"/tmp/out".to_vec())).unwrap();
    let of = |fd| captured.descriptors.iter().find(|d| d.fd == fd).unwrap().file;
    assert!(matches!(&captured.files[of(0) as usize].kind, Some(FileKind::Device(_))));
    assert!(matches!(&captured.files[of(1) as usize].kind, Some(FileKind::Regular(_))));
    assert_eq!(of(1), of(9));
    let relative = child.capture_with(&StdioPolicy::File(b"out".to_vec())).unwrap_err();
    assert!(relative[0].to_string().starts_with("--stdio: out is not"), "{relative:?}");
    // Only what is on a standard stream may be redirected.
    let child = Child::new(|| {
        open("/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY);
    });
    assert!(child.capture_with(&StdioPolicy::Null).is_err());
}

#[test]
fn a_thousand_descriptors_take_no_time() {
    let child = Child::new(|| {
        for _ in 0..500 {
            // SAFETY: integers only.
            let fd = ok(unsafe { libc::eventfd(0, 0) });
            // SAFETY: integers only.
            ok(unsafe { libc::dup(fd) });
        }
    });
    let holders = child.holders();
    let nothing_sent = Presend::new().unwrap();
    let options =
        FileOptions { stdio: &StdioPolicy::Keep, holders: &holders, content: Some(&nothing_sent) };
    let (mut best_us, mut files) = (u128::MAX, 0);
    for _ in 0..5 {
        let start = std::time::Instant::now();
        files = capture_files(child.pid, &[], &options).unwrap().files.len();
        best_us = best_us.min(start.elapsed().as_micros());
    }
    assert_eq!(files, 501);
    println!("{best_us} us for 1003 descriptors");
    assert!(best_us < 100_000, "{best_us} us");
}

#[test]
fn a_process_that_is_not() {
    let nothing_sent = Presend::new().unwrap();
    let options = FileOptions {
        stdio: &StdioPolicy::Keep,
        holders: &Holders::default(),
        content: Some(&nothing_sent),
    };
    let got = capture_files(i32::MAX, &[], &options).unwrap_err();
    assert!(got[0].to_string().contains("ended"), "{}", got[0]);
}
