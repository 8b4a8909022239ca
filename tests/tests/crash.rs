//! After commit nothing that happens to Slipstream shows the program a wrong byte, or lets two copies run.

use std::time::Duration;

use slipstream_tests::process::{Pidfd, proc_file, status_field};
use slipstream_tests::program::Verdict;
use slipstream_tests::proxy::Proxy;
use slipstream_tests::{Build, Hosts, Migration, Program, Side, wait};

/// Slipstream's processes on a host, but for the inits of namespaces: killing such a one is killing the process.
fn slipstream_processes(hosts: &Hosts, side: Side) -> Vec<Pidfd> {
    let binary = slipstream_tests::build::slipstream().canonicalize().expect("the binary's path");
    let is_init = |pid| {
        status_field(pid, "NSpid")
            .is_some_and(|ids| ids.split_whitespace().nth(1).is_some_and(|id| id == "1"))
    };
    let pids = hosts.host(side).pids().into_iter();
    pids.filter(|&pid| {
        std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == binary)
            && !is_init(pid)
    })
    .filter_map(Pidfd::open)
    .collect()
}

fn assert_source_stopped(program: &Program) {
    let state = status_field(program.pid, "State").unwrap_or_else(|| "gone".to_owned());
    assert!(!state.starts_with(['R', 'S', 'D']), "the source's copy is {state}: two copies");
}

/// How often the threads of a process have given a processor up. At home the program does so thousands of times a second.
fn switches(pid: i32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of = |tid: &str, field| {
        let status = proc_file(pid, &format!("task/{tid}/status"));
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or("0");
        line.trim().parse::<u64>().expect("a count")
    };
    tasks
        .map(|task| task.file_name().to_string_lossy().into_owned())
        .map(|tid| of(&tid, "voluntary_ctxt_switches:") + of(&tid, "nonvoluntary_ctxt_switches:"))
        .sum()
}

/// Whatever is sent to the source's copy, it does not run: each signal at most has every thread pause again.
fn provoke_source(program: &Program) {
    let Some(copy) = Pidfd::open(program.pid) else { return };
    let before = switches(program.pid);
    for signal in [libc::SIGCONT, libc::SIGHUP, libc::SIGCONT] {
        copy.signal(signal);
        std::thread::sleep(Duration::from_millis(100));
    }
    let now = switches(program.pid);
    assert!(now < before + 300, "the source's copy ran after commit: {before}, {now} switches");
}

/// The wire is cut right after the process resumed: what it has not got yet it waits for; mended, it goes on by itself.
#[test]
fn cable_pulled_and_mended() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let proxy = Proxy::start(&hosts, agent.address);
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    // Slow enough for the cut to come in time on any machine.
    let migration = Migration::start(&hosts, program.pid, &proxy.destination(), |command| {
        command.args(["--prefetch-limit", "20"]);
    });
    let moved = migration.wait_resumed();
    proxy.cut();
    std::thread::sleep(Duration::from_secs(3));
    assert_source_stopped(&program);
    provoke_source(&program);
    assert!(!matches!(program.verdict(), Verdict::Fail(_)), "{}", program.output());
    let run_dir = hosts.run_dir(Side::Source);
    let status =
        hosts.slipstream(&["status", "--json", "--run-dir", run_dir.to_str().expect("a path")]);
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("paused since"), "{status}");
    proxy.mend();
    migration.wait().assert_completed();
    program.assert_source_dropped();
    program.tell();
    moved.wait_end(Duration::from_secs(90));
    program.assert_ok();
}

/// A cable that is really pulled: nothing comes back, not even a refusal.
#[test]
fn link_down_and_up() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let moved = migration.wait_resumed();
    hosts.host(Side::Source).set_link(false);
    // Longer than a silence that is taken for a cut.
    std::thread::sleep(Duration::from_secs(14));
    assert_source_stopped(&program);
    assert!(!matches!(program.verdict(), Verdict::Fail(_)), "{}", program.output());
    hosts.host(Side::Source).set_link(true);
    migration.wait().assert_completed();
    program.tell();
    moved.wait_end(Duration::from_secs(90));
    program.assert_ok();
}

/// Cut after so many bytes, wherever that is: before, in, or after the commit. Exactly one copy goes on, and the
/// mended wire settles it.
#[test]
fn cut_anywhere() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let proxy = Proxy::start(&hosts, agent.address);
    let measured = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let migration = Migration::start(&hosts, measured.pid, &proxy.destination(), |_| {});
    migration.wait_resumed();
    let until_resumed = proxy.carried_bytes().min(400_000);
    migration.wait().assert_completed();
    for step in 0..12 {
        let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
        proxy.cut_after(proxy.carried_bytes() + until_resumed * step / 10 + 512);
        let migration = Migration::start(&hosts, program.pid, &proxy.destination(), |_| {});
        std::thread::sleep(Duration::from_millis(700));
        proxy.mend();
        let outcome = migration.wait_at_most(wait::LIMIT);
        match outcome.code {
            Some(0) => {
                program.tell();
                wait::until("a verdict", wait::LIMIT, || {
                    (program.verdict() != Verdict::None).then_some(())
                });
                program.assert_ok();
                program.assert_source_dropped();
            }
            Some(3 | 4) => program.assert_finishes_at_home(),
            other => panic!("step {step} ended with {other:?}: {outcome:#?}"),
        }
    }
}

/// Every Slipstream process of both hosts is killed: the source's copy stays stopped, the moved one reads no zeros.
#[test]
fn everything_killed() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let moved = migration.wait_resumed();
    for side in [Side::Destination, Side::Source] {
        for process in slipstream_processes(&hosts, side) {
            process.signal(libc::SIGKILL);
        }
    }
    // Long enough for it to touch all its memory, were it there.
    std::thread::sleep(Duration::from_secs(3));
    assert_source_stopped(&program);
    provoke_source(&program);
    assert!(!matches!(program.verdict(), Verdict::Fail(_)), "{}", program.output());
    assert!(
        !moved.ended() || program.verdict() == Verdict::Ok,
        "the moved process died:\n{}",
        program.output()
    );
}

/// The terminal goes away after commit: the migration does not.
#[test]
fn display_killed() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let moved = migration.wait_resumed();
    migration.signal(libc::SIGKILL);
    program.tell();
    moved.wait_end(Duration::from_secs(90));
    program.assert_ok();
    wait::until("the source's copy to end", Duration::from_secs(30), || program.source_status());
}
