use super::*;
use crate::preflight::destination::check_destination;
use crate::preflight::requirements::FileRole;
use crate::testing::{Child, ok};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// A program of its own, killed and reaped at the end.
struct Program(std::process::Child);

impl Program {
    fn run(command: &mut Command) -> Program {
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // What started the tests may have left them descriptors without FD_CLOEXEC.
        let close = || {
            // SAFETY: integers only.
            ok(unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) });
            Ok(())
        };
        // SAFETY: the closure makes one syscall.
        let quiet = unsafe { quiet.pre_exec(close) };
        let program = Program(quiet.spawn().unwrap());
        // Until it has become what it is to be.
        std::thread::sleep(std::time::Duration::from_millis(100));
        program
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn options() -> SourceOptions {
    SourceOptions { allow_own_executable: true, ..SourceOptions::default() }
}

/// Asserts that one of the blockers of `pid` reads like this.
fn assert_blocked(pid: i32, text: &str) {
    let blockers = check_process(pid, &options()).unwrap_err();
    let lines: Vec<String> = blockers.iter().map(ToString::to_string).collect();
    assert!(lines.iter().any(|l| l.contains(text)), "no {text:?} in {lines:#?}");
}

fn child_blocked(work: impl FnOnce(), text: &str) {
    let child = Child::new(work);
    assert_blocked(child.pid, text);
}

#[test]
fn a_plain_program_can_be_moved_here() {
    let program = Program::run(Command::new("sleep").arg("60"));
    let mut report = check_process(program.pid(), &SourceOptions::default()).unwrap();
    let needs = &report.requirements;
    assert_eq!((needs.pid, needs.tids.as_slice()), (program.pid(), [program.pid()].as_slice()));
    assert!(needs.memory_bytes > 0 && needs.descriptors >= 3);
    assert!(needs.files.iter().any(|f| f.role() == FileRole::Mapped));
    assert!(needs.files.iter().any(|f| f.object == "current directory"));
    assert!(needs.cpu_flags.iter().any(|f| f == "sse2"));
    assert_eq!(check_destination(needs), []);
    // As another host sees it: digests in place of inodes.
    report.fill_digests().unwrap();
    let mut far = report.requirements.clone();
    far.boot_id = "another".into();
    assert_eq!(check_destination(&far), []);
    for file in far.files.iter_mut().filter(|f| f.role() == FileRole::Mapped) {
        file.id.digest[1] ^= 1;
    }
    let blockers = check_destination(&far);
    assert!(!blockers.is_empty());
    assert!(blockers.iter().all(|b| b.reason.contains("another version")), "{blockers:?}");
}

#[test]
fn what_is_no_movable_process() {
    let one = |pid| check_process(pid, &SourceOptions::default()).unwrap_err()[0].to_string();
    assert!(one(i32::MAX).contains("does not exist"));
    assert!(one(-1).contains("no process id"));
    assert!(one(std::process::id() as i32).contains("slipstream itself"));
    let zombie = Child::new(|| ());
    // SAFETY: a child of ours, not yet reaped.
    unsafe { libc::kill(zombie.pid, libc::SIGKILL) };
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(one(zombie.pid).contains("zombie"), "{}", one(zombie.pid));
    let own_executable = Child::new(|| ());
    assert!(one(own_executable.pid).contains("part of slipstream"));
    if let Ok(status) = crate::proc::status::read(2)
        && status.kernel_thread
    {
        assert!(one(2).contains("kernel thread"));
    }
    // SAFETY: an integer.
    let tid = unsafe { libc::gettid() };
    if tid != std::process::id() as i32 {
        assert!(one(tid).contains("is a thread"), "{}", one(tid));
    }
}

#[test]
fn namespaces_apart() {
    for (flag, name) in [("-u", "another uts"), ("-n", "another net"), ("-i", "another ipc")] {
        let program = Program::run(Command::new("unshare").args([flag, "sleep", "60"]));
        assert_blocked(program.pid(), name);
    }
    let program = Program::run(Command::new("unshare").args([
        "-m",
        "sh",
        "-c",
        "mount -t tmpfs none /mnt && exec sleep 60",
    ]));
    assert_blocked(program.pid(), "another mount namespace, which differs at /mnt");
    let program = Program::run(Command::new("unshare").args(["-p", "sleep", "60"]));
    assert_blocked(program.pid(), "another pid namespace for its children");
    // With the same mounts a namespace of its own is none in the way.
    let program = Program::run(Command::new("unshare").args(["-m", "sleep", "60"]));
    check_process(program.pid(), &options()).unwrap();
}

#[test]
fn children_and_shared_memory() {
    let program = Program::run(Command::new("sh").args(["-c", "sleep 60 & wait"]).process_group(0));
    assert_blocked(program.pid(), "has a child");
    // SAFETY: the group of the program started above.
    unsafe { libc::kill(-program.pid(), libc::SIGKILL) };
    // A forked process shares the page that it reports through.
    child_blocked(|| (), "shared memory that process");
}

#[test]
fn states_of_threads() {
    let sandboxed = || {
        // SAFETY: integers only. The child then calls nothing but what strict mode kills it for, so
        // a filter that allows everything is used.
        unsafe {
            let allow = libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 };
            let filter = libc::sock_fprog { len: 1, filter: (&raw const allow).cast_mut() };
            ok(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
            ok(libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const filter));
        }
    };
    child_blocked(sandboxed, "under seccomp");
    let child = Child::new(|| ());
    std::thread::scope(|scope| {
        // A thread of its own, since a tracer's end detaches.
        scope.spawn(|| {
            crate::sys::ptrace::seize(child.pid).unwrap();
            assert_blocked(child.pid, "is traced by");
        });
    });
}

#[test]
fn directories_and_aio() {
    let dir = tempfile::tempdir().unwrap();
    let gone = dir.path().join("gone");
    std::fs::create_dir(&gone).unwrap();
    child_blocked(
        || {
            std::env::set_current_dir(&gone).unwrap();
            std::fs::remove_dir(&gone).unwrap();
        },
        "current directory: ",
    );
    child_blocked(
        || {
            let mut context = 0u64;
            // SAFETY: the kernel writes one word.
            ok(unsafe { libc::syscall(libc::SYS_io_setup, 8, &raw mut context) } as i32);
        },
        "AIO",
    );
}

#[test]
fn a_shared_descriptor_table() {
    let child = Child::new(|| {
        // SAFETY: a new thread with a table of its own; it ends with the process.
        std::thread::spawn(|| unsafe {
            ok(libc::unshare(libc::CLONE_FILES));
            libc::pause();
        });
        std::thread::sleep(std::time::Duration::from_millis(50));
    });
    assert_blocked(child.pid, "has a descriptor table of its own");
}

#[test]
fn all_blockers_in_one_report() {
    let child = Child::new(|| {
        // SAFETY: integers only.
        unsafe {
            ok(libc::inotify_init1(0));
            ok(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0));
            ok(libc::unshare(libc::CLONE_NEWUTS));
        }
    });
    for text in ["fd 3: an inotify", "fd 4: a socket", "another uts", "shared memory"] {
        assert_blocked(child.pid, text);
    }
}

#[test]
fn too_many_written_pages_of_files() {
    let text = |kib: u64| {
        format!(
            "7f0000000000-7f0040000000 rw-p 00000000 fe:01 17 /data/big\nKernelPageSize: 4 kB\n\
             Anonymous: {kib} kB\nVmFlags: rd wr mr mw me ac\n"
        )
    };
    let blockers = |kib: u64| {
        let mut blockers = Vec::new();
        written_pages(&smaps::parse(text(kib).as_bytes()).unwrap(), &mut blockers);
        blockers
    };
    let most = WRITTEN_LEN_MAX / 1024;
    assert!(blockers(most).is_empty());
    let found = blockers(most + 4);
    assert_eq!(found.len(), 1);
    assert!(found[0].to_string().contains("/data/big"), "{}", found[0]);
}
