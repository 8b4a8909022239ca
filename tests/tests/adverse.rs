//! A host that is short of something, or stands still: the migration is refused, rolled back, or goes on.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use slipstream_tests::migration::code;
use slipstream_tests::process::Pidfd;
use slipstream_tests::proxy::Proxy;
use slipstream_tests::{Agent, Build, Hosts, Migration, Outcome, Program, Side, skipped, wait};

const LIMIT: Duration = Duration::from_secs(90);

fn migrate_with_timeout(program: &Program, to: &str, seconds: &str) -> Outcome {
    let start = |command: &mut Command| _ = command.args(["--timeout", seconds]);
    Migration::start(program.hosts(), program.pid, to, start).wait()
}

fn assert_stayed(outcome: &Outcome) {
    let stayed = matches!(outcome.code, Some(code::REFUSED | code::ROLLED_BACK));
    assert!(stayed, "{outcome:#?}");
}

/// An agent that is stopped answers nobody: before the commit that is given up in time.
#[test]
fn stopped_agent_before_the_commit() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let process = Pidfd::open(agent.pid()).expect("the agent");
    process.signal(libc::SIGSTOP);
    assert_stayed(&migrate_with_timeout(&program, &agent.destination(), "2"));
    process.signal(libc::SIGCONT);
    // And it is as good as new.
    hosts.migrate(&program, &agent).wait().assert_completed();
    program.tell();
    wait::until("a verdict", LIMIT, || program.output().ends_with("OK\n").then_some(()));
}

/// All of Slipstream at the destination stands still for longer than every time-out of the source (silence 10 s, a
/// handshake 10 s): the source takes the connection for broken and tries again, until somebody is there.
#[test]
fn stopped_destination_after_the_commit() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let moved = migration.wait_resumed();
    let stopped: Vec<_> = hosts
        .host(Side::Destination)
        .pids()
        .into_iter()
        .filter(|pid| {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            ["slipstream", "slipstream-dst"].contains(&comm.trim())
        })
        .filter_map(Pidfd::open)
        .collect();
    assert!(!stopped.is_empty());
    for process in &stopped {
        process.signal(libc::SIGSTOP);
    }
    std::thread::sleep(Duration::from_secs(24));
    for process in &stopped {
        process.signal(libc::SIGCONT);
    }
    migration.wait().assert_completed();
    program.tell();
    moved.wait_end(LIMIT);
    program.assert_ok();
}

/// Moves a host's clock, and back when it is dropped.
struct Jumps<'a> {
    hosts: &'a Hosts,
    side: Side,
    days: i32,
}

impl Jumps<'_> {
    fn by(&mut self, days: i32) {
        self.days += days;
        let mut date = self.hosts.host(self.side).command("date");
        let set = date.arg("--set").arg(format!("{days} days")).stdout(std::process::Stdio::null());
        let status = set.status().expect("running date");
        assert!(status.success() || std::thread::panicking(), "date: {status}");
    }
}

impl Drop for Jumps<'_> {
    fn drop(&mut self) {
        self.by(-self.days);
    }
}

/// The time of day jumps forward and back on both hosts, before the commit and after it: nothing depends on it.
#[test]
fn clocks_jump() {
    let hosts = Hosts::two();
    if hosts.host(Side::Destination).far().is_none() {
        let missing = "hosts with clocks of their own; `scripts/softroce-lab test tcp` runs it";
        return skipped("clocks_jump", missing);
    }
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let mut here = Jumps { hosts: &hosts, side: Side::Source, days: 0 };
    let mut there = Jumps { hosts: &hosts, side: Side::Destination, days: 0 };
    let slow = |command: &mut Command| _ = command.args(["--prefetch-limit", "5"]);
    let migration = Migration::start(&hosts, program.pid, &agent.destination(), slow);
    here.by(-1);
    there.by(400);
    let moved = migration.wait_resumed();
    here.by(3);
    there.by(-800);
    assert!(!migration.ended(), "it was over before the clocks had jumped");
    migration.wait().assert_completed();
    program.assert_source_dropped();
    program.tell();
    moved.wait_end(LIMIT);
    program.assert_ok();
}

const DISK_BYTES: &str = "size=256k,mode=700";

/// Gives the agent a small disk of its own for its run directory: it goes with the agent's mount namespace.
fn with_small_disk(command: &mut Command, run_dir: &Path) {
    std::fs::create_dir_all(run_dir).expect("a run directory");
    let path = CString::new(run_dir.as_os_str().as_bytes()).expect("a path");
    let mounts = move || {
        let none: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("tmpfs"), path.as_c_str(), Some("tmpfs"), MsFlags::empty(), Some(DISK_BYTES))?;
        Ok(())
    };
    // SAFETY: system calls on prepared strings, in the child of a fork.
    unsafe { command.pre_exec(mounts) };
}

fn disk_of(agent: &Agent, run_dir: &Path) -> PathBuf {
    let inside = run_dir.strip_prefix("/").expect("an absolute path");
    Path::new(&format!("/proc/{}/root", agent.pid())).join(inside)
}

/// Leaves not a byte.
fn fill(disk: &Path) {
    let filler = std::fs::OpenOptions::new().create(true).append(true).open(disk.join("filler"));
    let mut filler = filler.expect("a file to fill the disk with");
    while std::io::Write::write(&mut filler, &[1; 4096]).is_ok_and(|len| len > 0) {}
}

/// No room for what has to be noted: refused before the freeze, and done once there is room again.
#[test]
fn full_disk_at_the_destination() {
    let hosts = Hosts::two();
    let run_dir = hosts.run_dir(Side::Destination);
    let agent = hosts.agent_with(|command| with_small_disk(command, &run_dir));
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let disk = disk_of(&agent, &run_dir);
    fill(&disk);
    let outcome = hosts.migrate(&program, &agent).wait();
    assert_stayed(&outcome);
    assert!(outcome.errors.contains("No space left"), "{}", outcome.errors);
    std::fs::remove_file(disk.join("filler")).expect("removing the filler");
    hosts.migrate(&program, &agent).wait().assert_completed();
    program.tell();
    wait::until("a verdict", LIMIT, || program.output().ends_with("OK\n").then_some(()));
}

/// The disk fills up after the commit: that ends nothing.
#[test]
fn disk_full_during_the_drain() {
    let hosts = Hosts::two();
    let run_dir = hosts.run_dir(Side::Destination);
    let agent = hosts.agent_with(|command| with_small_disk(command, &run_dir));
    let proxy = Proxy::start(&hosts, agent.address);
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = Migration::start(&hosts, program.pid, &proxy.destination(), |_| {});
    let moved = migration.wait_resumed();
    proxy.set_delay(Duration::from_millis(200));
    fill(&disk_of(&agent, &run_dir));
    proxy.set_delay(Duration::ZERO);
    migration.wait().assert_completed();
    program.assert_source_dropped();
    program.tell();
    moved.wait_end(LIMIT);
    program.assert_ok();
}

/// A disk on the source, gone with this.
struct Disk(PathBuf);

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn full_disk_at_the_source() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let disk = hosts.run_dir(Side::Source);
    std::fs::create_dir_all(&disk).expect("a run directory");
    mount(Some("tmpfs"), &disk, Some("tmpfs"), MsFlags::empty(), Some(DISK_BYTES))
        .expect("a small disk");
    let disk = Disk(disk);
    fill(&disk.0);
    let outcome = hosts.migrate(&program, &agent).wait();
    assert_stayed(&outcome);
    assert!(outcome.errors.contains("No space left"), "{}", outcome.errors);
    program.assert_finishes_at_home();
}

fn limit_files(command: &mut Command, soft: u64, hard: u64) {
    let limit = move || Ok(setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?);
    // SAFETY: one system call in the child of a fork.
    unsafe { command.pre_exec(limit) };
}

/// A low limit of open files that may be raised is raised.
#[test]
fn few_open_files() {
    let hosts = Hosts::two();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("our own limit");
    let agent = hosts.agent_with(|command| limit_files(command, 20, hard));
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let moved = hosts.migrate(&program, &agent).wait().assert_completed();
    program.tell();
    moved.wait_end(LIMIT);
    program.assert_ok();
}

/// So few that a session could not keep what must outlive it: the agent says so, and does not begin. (Where root may
/// raise hard limits nothing is too few.)
#[test]
fn too_few_open_files() {
    let hosts = Hosts::two();
    let mut command = hosts.host(Side::Destination).command(slipstream_tests::build::slipstream());
    command.args(["agent", "--listen", "10.77.0.2:0", "--key"]).arg(hosts.key());
    command.arg("--run-dir").arg(hosts.run_dir(Side::Destination));
    limit_files(&mut command, 64, 64);
    let log = hosts.path().join("agent.log");
    let child = hosts.spawn(&mut command, &log);
    let ended = || child.lock().expect("nobody panics with it").try_wait().expect("waiting");
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    wait::until("the agent to begin or not", LIMIT, || {
        (ended().is_some() || said().contains("listening on")).then_some(())
    });
    if !said().contains("listening on") {
        let status = wait::until("the agent's end", LIMIT, ended);
        assert_eq!(status.code(), Some(code::REFUSED), "{}", said());
        assert!(said().contains("LimitNOFILE"), "{}", said());
    }
}
