use super::*;
use crate::manifest::Rlimit;
use crate::preflight::requirements::HugePages;
use proptest::prelude::*;

/// A process that needs next to nothing.
fn needs() -> Requirements {
    Requirements { pid: 7, tids: vec![7], caps: vec![0; 5], ..Requirements::default() }
}

fn one(needs: &Requirements) -> String {
    let blockers = check_destination(needs);
    assert_eq!(blockers.len(), 1, "{blockers:?}");
    blockers[0].to_string()
}

#[test]
fn a_process_without_needs_is_welcome() {
    assert_eq!(check_destination(&needs()), []);
}

#[test]
fn each_lack_is_named() {
    let cpu_flags = vec!["sse2".into(), "avx10".into(), "constant_tsc".into(), "xop".into()];
    let got = one(&Requirements { cpu_flags, ..needs() });
    assert!(
        got.contains("lacks avx10, xop")
            || got.contains("lacks xop")
            || got.contains("lacks avx10")
    );
    let got = one(&Requirements { affinity: [vec![0; 8000], vec![1]].concat(), ..needs() });
    assert!(got.contains("bound to CPU 64000"), "{got}");
    let got = one(&Requirements { memory_bytes: 1 << 60, ..needs() });
    assert!(got.contains("destination's memory"), "{got}");
    let huge_pages = vec![HugePages { size: 2 << 20, count: 1 << 40 }];
    let got = one(&Requirements { huge_pages, ..needs() });
    assert!(got.contains("of 2048 kB free"), "{got}");
    let got = one(&Requirements { mappings: u32::MAX, ..needs() });
    assert!(got.contains("vm.max_map_count"), "{got}");
    let got = one(&Requirements { tids: vec![7, i32::MAX], ..needs() });
    assert!(got.contains("kernel.pid_max"), "{got}");
    let got = one(&Requirements { caps: vec![0, 1 << 63, 0, 0, 0], ..needs() });
    assert!(got.contains("number 63 (permitted)"), "{got}");
}

#[test]
fn limits_above_ours() {
    let theirs = Rlimit { soft: 10, hard: 2000 };
    let ours = Rlimit { soft: 10, hard: 1000 };
    let needs = Requirements { rlimits: vec![theirs; 16], ..needs() };
    let mut blockers = Vec::new();
    rlimits(&needs, &[ours; 16], true, &mut blockers);
    assert_eq!(blockers, []);
    rlimits(&needs, &[ours; 16], false, &mut blockers);
    assert_eq!(blockers.len(), 16);
    assert!(blockers[7].to_string().contains("\"Max open files\": is 1000, the process has 2000"));
}

fn required(path: &std::path::Path, role: FileRole) -> RequiredFile {
    let id = crate::capture::files::file_id(&nix::sys::stat::stat(path).unwrap());
    RequiredFile {
        path: path.as_os_str().as_bytes().to_vec(),
        id,
        role: role as i32,
        writable: false,
        object: "fd 7".into(),
    }
}

#[test]
fn files_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, b"content").unwrap();
    let open = required(&path, FileRole::Open);
    assert_eq!(file(&open, false), Ok(()));
    let mut later = open.clone();
    later.id.mtime_ns += 1;
    assert_eq!(file(&later, true), Ok(()), "the same inode is the same file");
    assert!(file(&later, false).unwrap_err().reason.contains("another time"));
    let mut longer = open.clone();
    longer.id.size += 1;
    assert!(file(&longer, false).unwrap_err().reason.contains("7 bytes at the destination"));
    let mut growing = open.clone();
    (growing.writable, growing.id.size, growing.id.mtime_ns) = (true, 3, 1);
    assert_eq!(file(&growing, false), Ok(()), "it grows, on a file system both hosts mount");
    growing.id.ino += 1;
    assert!(file(&growing, false).is_err());
    let mut other_type = required(dir.path(), FileRole::Present);
    assert_eq!(file(&other_type, false), Ok(()));
    other_type.path.clone_from(&open.path);
    assert!(file(&other_type, true).unwrap_err().reason.contains("another type"));
    let mut mapped = required(&path, FileRole::Mapped);
    assert_eq!(file(&mapped, true), Ok(()));
    assert!(file(&mapped, false).is_err(), "no digest is no proof");
    mapped.id.digest = digest::of_file(&mapped.path).unwrap();
    assert_eq!(file(&mapped, false), Ok(()));
    std::fs::remove_file(&path).unwrap();
    assert!(file(&open, true).unwrap_err().reason.contains("can't be found"));
}

#[test]
fn hostile_requirements_are_refused() {
    let refused = |needs: &Requirements| one(needs).contains("requirements");
    assert!(refused(&Requirements { tids: vec![], ..needs() }));
    assert!(refused(&Requirements { caps: vec![], ..needs() }));
    assert!(refused(&Requirements { cpu_flags: vec!["x".repeat(300)], ..needs() }));
    assert!(refused(&Requirements {
        huge_pages: vec![HugePages { size: 0, count: 1 }],
        ..needs()
    }));
    let file = RequiredFile { path: b"relative".to_vec(), ..RequiredFile::default() };
    assert!(refused(&Requirements { files: vec![file], ..needs() }));
}

proptest! {
    #[test]
    fn any_message_does_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        use prost::Message;
        if let Ok(needs) = Requirements::decode(bytes.as_slice()) {
            let _ = check_destination(&needs);
        }
    }
}
