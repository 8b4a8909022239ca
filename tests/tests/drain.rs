//! While its memory is on its way a program may do anything.

use std::time::Duration;

use slipstream_tests::moves::moves;
use slipstream_tests::{Build, Hosts, Migration, Program, Side, wait};

macro_rules! moved_programs {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() { moves(Build::dynamic(stringify!($name)), &[]); })*
    };
}

moved_programs! {
    drain_fork,
    drain_fork_storm,
    drain_children,
    drain_spawn,
    drain_exec,
    drain_unmap,
    drain_heap,
    drain_threads,
    drain_io,
    drain_protect,
    drain_touch,
    drain_shared,
    drain_punch,
    drain_moves,
    drain_signals,
    drain_exit,
    drain_thread_exit,
}

/// Killed at its new place while it faults: the migration ends, nothing hangs, the agent serves the next one.
#[test]
fn drain_killed() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_killed"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let moved = migration.wait_resumed();
    program.wait_for_line("faulting");
    moved.signal(libc::SIGKILL);
    moved.wait_end(Duration::from_secs(10));
    let outcome = migration.wait_at_most(Duration::from_secs(30));
    assert_eq!(outcome.code, Some(0), "the end of the process ends its migration: {outcome:#?}");
    let completed = outcome.event("completed").expect("the event completed");
    assert_eq!(completed["exited"], true, "{completed:#}");
    program.assert_source_dropped();
    let next = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let moved = hosts.migrate(&next, &agent).wait().assert_completed();
    next.tell();
    moved.wait_end(wait::LIMIT);
    next.assert_ok();
}

/// A signal from outside in the middle of the drain ends a program that doesn't handle it.
#[test]
fn drain_terminated() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_killed"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let moved = migration.wait_resumed();
    program.wait_for_line("faulting");
    moved.signal(libc::SIGTERM);
    moved.wait_end(Duration::from_secs(10));
    assert_eq!(migration.wait_at_most(Duration::from_secs(30)).code, Some(0));
}

/// A debugger on a forked child when the last page comes is waited for, too: nothing of ours stays in that child.
#[test]
fn child_traced_at_the_end() {
    use nix::sys::ptrace;
    use nix::unistd::Pid;
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_orphan"), &[]);
    let slowly = |command: &mut std::process::Command| {
        command.args(["--prefetch-limit", "20"]);
    };
    let migration = Migration::start(&hosts, program.pid, &agent.destination(), slowly);
    let moved = migration.wait_resumed();
    program.wait_for_line("orphan");
    moved.wait_end(wait::LIMIT);
    let named = |pid: &i32| {
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        comm.starts_with("drain_orphan")
    };
    let pids = hosts.host(Side::Destination).pids();
    let pid = Pid::from_raw(pids.into_iter().find(named).expect("the child"));
    ptrace::seize(pid, ptrace::Options::empty()).expect("tracing it");
    let run_dir = hosts.run_dir(Side::Destination);
    wait::until("the drain to wait for the tracer", wait::LIMIT, || {
        let folders = std::fs::read_dir(&run_dir).expect("the run directory").flatten();
        let status = |path: std::path::PathBuf| std::fs::read_to_string(path.join("status.json"));
        let tracer = format!("process {pid} is traced by process {}", nix::unistd::gettid());
        let told = |path| status(path).is_ok_and(|s| s.contains(&tracer));
        folders.map(|f| f.path()).any(told).then_some(())
    });
    assert!(!migration.ended(), "the drain is over, and the child has still what is ours");
    ptrace::interrupt(pid).expect("stopping it");
    nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::__WALL)).expect("its stop");
    ptrace::detach(pid, None).expect("letting go");
    assert_eq!(migration.wait().code, Some(0));
    program.wait_for_line("OK");
}

/// Several programs at once, to one agent.
#[test]
fn drain_side_by_side() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let programs: Vec<_> = ["drain_touch", "drain_fork", "anon"]
        .map(|name| Program::start(&hosts, Build::dynamic(name), &[]))
        .into();
    let migrations: Vec<_> =
        programs.iter().map(|program| hosts.migrate(program, &agent)).collect();
    let moved: Vec<_> =
        migrations.into_iter().map(|migration| migration.wait().assert_completed()).collect();
    for (program, moved) in programs.iter().zip(&moved) {
        program.tell();
        moved.wait_end(Duration::from_secs(90));
        program.assert_ok();
    }
}

/// What faults don't bring comes at the rate that was allowed.
#[test]
fn prefetch_limit_is_kept() {
    const MB_PER_S: f64 = 100.0;
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_idle"), &[]);
    let limited = |command: &mut std::process::Command| {
        command.args(["--prefetch-limit", &MB_PER_S.to_string()]);
    };
    let outcome = Migration::start(&hosts, program.pid, &agent.destination(), limited).wait();
    let completed = outcome.event("completed").expect("the event completed").clone();
    let moved = outcome.assert_completed();
    let number = |key: &str| completed[key].as_f64().expect("a number");
    let prefetched = number("bytes") - 4096.0 * number("faults");
    let rate = prefetched / number("drain_us");
    assert!(prefetched > 50e6, "faults brought it all: nothing was tested: {completed:#}");
    assert!(rate <= 1.05 * MB_PER_S, "{rate} MB/s: {completed:#}");
    program.tell();
    moved.wait_end(wait::LIMIT);
    program.assert_ok();
}

/// A debugger at its new place when the last page comes: it is waited for, and `status` says so.
#[test]
fn traced_at_the_end() {
    use nix::sys::ptrace;
    use nix::unistd::Pid;
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_idle"), &[]);
    let slowly = |command: &mut std::process::Command| {
        command.args(["--prefetch-limit", "150"]);
    };
    let migration = Migration::start(&hosts, program.pid, &agent.destination(), slowly);
    let moved = migration.wait_resumed();
    let pid = Pid::from_raw(moved.pid);
    ptrace::seize(pid, ptrace::Options::empty()).expect("tracing it");
    let run_dir = hosts.run_dir(Side::Destination);
    wait::until("status to name the tracer", wait::LIMIT, || {
        let arguments = ["status", "--json", "--run-dir", run_dir.to_str().expect("a path")];
        let output = hosts.slipstream_on(Side::Destination, &arguments);
        let tracer = format!("is traced by process {}", nix::unistd::gettid());
        String::from_utf8_lossy(&output.stdout).contains(&tracer).then_some(())
    });
    // Letting go needs a stop.
    ptrace::interrupt(pid).expect("stopping it");
    nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::__WALL)).expect("its stop");
    ptrace::detach(pid, None).expect("letting go");
    migration.wait().assert_completed();
    program.tell();
    moved.wait_end(wait::LIMIT);
    program.assert_ok();
}
