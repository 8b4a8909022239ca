//! After the commit a migration outlives everything of Slipstream: it goes on where it stopped, with no byte lost.

use std::process::Stdio;
use std::time::Duration;

use slipstream_tests::migration::code;
use slipstream_tests::process::{Pidfd, status_field};
use slipstream_tests::program::Verdict;
use slipstream_tests::settle::assert_settles;
use slipstream_tests::{Build, Hosts, Migration, Program, Side, build, wait};

const LIMIT: Duration = wait::LIMIT;

/// Slipstream's processes on a host with one of these names (`slipstream-init` is part of the moved process).
fn processes(hosts: &Hosts, side: Side, names: &[&str]) -> Vec<Pidfd> {
    let pids = hosts.host(side).pids().into_iter();
    let named = |pid: &i32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm"))
            .is_ok_and(|comm| names.contains(&comm.trim()))
    };
    pids.filter(named).filter_map(Pidfd::open).collect()
}

fn kill(hosts: &Hosts, side: Side, names: &[&str]) {
    let victims = processes(hosts, side, names);
    assert!(!victims.is_empty(), "nothing called {names:?} runs");
    for victim in victims {
        victim.signal(libc::SIGKILL);
    }
}

fn id_of(migration: &Migration) -> String {
    migration.wait_event("committed")["id"].as_str().expect("an id").to_owned()
}

/// Runs `recover` on a host; returns when it has ended.
fn recover(hosts: &Hosts, side: Side, id: &str) {
    let mut command = hosts.host(side).command(build::slipstream());
    command.args(["recover", id, "--run-dir"]).arg(hosts.run_dir(side)).stdin(Stdio::null());
    let output = command.output().expect("running slipstream recover");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "recover on {side:?}: {said}");
}

/// A copy that is let go by its tracer, or that ends, is running for as long as the kernel takes.
fn assert_stopped(program: &Program) {
    wait::until("the source's copy to stand still (there are two)", Duration::from_secs(2), || {
        let state = status_field(program.pid, "State").unwrap_or_else(|| "gone".to_owned());
        (!state.starts_with(['R', 'S', 'D'])).then_some(())
    });
    assert!(!matches!(program.verdict(), Verdict::Fail(_)), "{}", program.output());
}

fn finish(program: &Program, moved: &slipstream_tests::process::Moved) {
    program.tell();
    moved.wait_end(LIMIT);
    program.assert_ok();
}

/// The fault daemon is killed again and again; the agent starts another each time.
fn destination_session_killed(name: &'static str) {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic(name), &[]);
    let migration = hosts.migrate(&program, &agent);
    let moved = migration.wait_resumed();
    for pause_ms in [0, 150, 60, 230] {
        std::thread::sleep(Duration::from_millis(pause_ms));
        for victim in processes(&hosts, Side::Destination, &["slipstream-dst"]) {
            victim.signal(libc::SIGKILL);
        }
        assert_stopped(&program);
    }
    migration.wait().assert_completed();
    program.assert_source_dropped();
    finish(&program, &moved);
}

macro_rules! destination_sessions_killed {
    ($($name:ident,)*) => {$(
        #[test]
        fn $name() {
            destination_session_killed(&stringify!($name)["killed_under_".len()..]);
        }
    )*};
}

destination_sessions_killed! {
    killed_under_drain_touch,
    killed_under_drain_fork,
    killed_under_drain_children,
    killed_under_drain_unmap,
    killed_under_drain_heap,
    killed_under_drain_shared,
    killed_under_drain_threads,
}

/// The fault daemon is killed in the moment in which it has read that the process forked, and nobody else has the child's
/// userfaultfd but its twin.
#[test]
fn killed_with_a_forked_child_in_hand() {
    let hosts = Hosts::two();
    let agent = hosts.agent_with(|command| {
        command.env("SLIPSTREAM_KILL_AT", "destination-fork-read");
    });
    let program = Program::start(&hosts, Build::dynamic("drain_fork"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let moved = migration.wait_resumed();
    let outcome = migration.wait();
    outcome.assert_completed();
    let paused = |e: &serde_json::Value| e["event"] == "note";
    assert!(outcome.events.iter().any(paused), "nothing was killed: {outcome:#?}");
    program.assert_source_dropped();
    finish(&program, &moved);
    let twins = || processes(&hosts, Side::Destination, &["slipstream-twin"]);
    wait::until("the twins to end", Duration::from_secs(10), || twins().is_empty().then_some(()));
}

/// The process has exited, and a child that it forked still lacks pages: it gets them, whoever is killed, and is left alone
/// afterwards.
#[test]
fn killed_under_an_orphan() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_orphan"), &[]);
    let slowly = |command: &mut std::process::Command| {
        command.args(["--prefetch-limit", "5"]);
    };
    let migration = Migration::start(&hosts, program.pid, &agent.destination(), slowly);
    let moved = migration.wait_resumed();
    program.wait_for_line("orphan");
    moved.wait_end(LIMIT);
    kill(&hosts, Side::Destination, &["slipstream-dst"]);
    assert_eq!(migration.wait().code, Some(0));
    program.wait_for_line("OK");
    program.assert_source_dropped();
}

/// Init is killed, and everything with it: that is no end of the process's own.
#[test]
fn killed_with_its_init() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_idle"), &[]);
    let slowly = |command: &mut std::process::Command| {
        command.args(["--prefetch-limit", "5"]);
    };
    let migration = Migration::start(&hosts, program.pid, &agent.destination(), slowly);
    let moved = migration.wait_resumed();
    kill(&hosts, Side::Destination, &["slipstream-dst", "slipstream-init"]);
    moved.wait_end(LIMIT);
    assert_eq!(migration.wait().code, Some(6));
}

/// More children live than can be kept: those beyond are ended, for the others it goes on as ever.
#[test]
fn killed_under_a_crowd() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_crowd"), &[]);
    let slowly = |command: &mut std::process::Command| {
        command.args(["--prefetch-limit", "1"]);
    };
    let migration = Migration::start(&hosts, program.pid, &agent.destination(), slowly);
    let moved = migration.wait_resumed();
    program.wait_for_line("crowd");
    kill(&hosts, Side::Destination, &["slipstream-dst"]);
    migration.wait().assert_completed();
    finish(&program, &moved);
}

/// Everything of Slipstream on the destination is killed at once: `recover` there goes on, without an agent.
#[test]
fn everything_at_the_destination_killed() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let id = id_of(&migration);
    let moved = migration.wait_resumed();
    for victim in processes(&hosts, Side::Destination, &["slipstream", "slipstream-dst"]) {
        victim.signal(libc::SIGKILL);
    }
    std::thread::sleep(Duration::from_secs(2));
    assert_stopped(&program);
    recover(&hosts, Side::Destination, &id);
    migration.wait().assert_completed();
    finish(&program, &moved);
}

/// Everything there is killed when all pages have come, but the source does not know: `recover` sees to that before it ends.
#[test]
fn killed_before_the_source_was_told() {
    let hosts = Hosts::two();
    let agent = hosts.agent_with(|command| {
        command.env("SLIPSTREAM_KILL_AT", "destination-noted");
    });
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let id = id_of(&migration);
    let moved = migration.wait_resumed();
    let sessions = || processes(&hosts, Side::Destination, &["slipstream-dst"]);
    let [session] = &sessions()[..] else { panic!("not one session") };
    wait::until("the session to be killed", LIMIT, || session.ended().then_some(()));
    agent.kill();
    recover(&hosts, Side::Destination, &id);
    program.assert_source_dropped();
    migration.wait().assert_completed();
    finish(&program, &moved);
}

/// The same before the session had said anything of the process that it let go.
#[test]
fn killed_before_its_first_status() {
    let hosts = Hosts::two();
    let agent = hosts.agent_with(|command| {
        command.env("SLIPSTREAM_STOP_AT", "destination-run");
    });
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let stopped = wait::until("the session to stop", wait::LIMIT, || {
        let sessions = processes(&hosts, Side::Destination, &["slipstream-dst"]);
        let stopped = |s: &Pidfd| status_field(s.pid, "State").is_some_and(|s| s.starts_with('T'));
        sessions.into_iter().find(stopped)
    });
    kill(&hosts, Side::Destination, &["slipstream"]);
    stopped.signal(libc::SIGKILL);
    let folders = std::fs::read_dir(hosts.run_dir(Side::Destination)).expect("the run directory");
    let names = folders.flatten().filter_map(|f| f.file_name().into_string().ok());
    let ids: Vec<_> =
        names.filter_map(|n| n.strip_prefix("destination-").map(str::to_owned)).collect();
    let [id] = &ids[..] else { panic!("migrations at the destination: {ids:?}") };
    recover(&hosts, Side::Destination, id);
    assert_eq!(migration.wait().code, Some(code::COMPLETED));
    program.tell();
    wait::until("a verdict", LIMIT, || (program.verdict() != Verdict::None).then_some(()));
    program.assert_ok();
}

/// The agent is killed and started again at the same address: the migration goes on by itself.
#[test]
fn agent_restarted() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let moved = migration.wait_resumed();
    kill(&hosts, Side::Destination, &["slipstream"]);
    for victim in processes(&hosts, Side::Destination, &["slipstream-dst"]) {
        victim.signal(libc::SIGKILL);
    }
    let _again = hosts.agent_at(agent.address);
    migration.wait().assert_completed();
    finish(&program, &moved);
}

/// The page server is killed: the frozen copy stays frozen, and `recover` serves it again.
#[test]
fn source_session_killed() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let id = id_of(&migration);
    let moved = migration.wait_resumed();
    kill(&hosts, Side::Source, &["slipstream-src"]);
    std::thread::sleep(Duration::from_secs(1));
    assert_stopped(&program);
    let status = hosts.status(Side::Source, &id);
    assert_eq!(status["phase"], "waiting", "{status}");
    assert!(status["detail"].as_str().is_some_and(|d| d.contains("recover")), "{status}");
    recover(&hosts, Side::Source, &id);
    program.assert_source_dropped();
    finish(&program, &moved);
}

/// Where an agent runs at the source, too, it replaces a page server that is killed: nobody has to notice.
#[test]
fn source_session_killed_under_an_agent() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let _at_the_source = hosts.agent_on(Side::Source, "127.0.0.1:0", |_| {});
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let moved = migration.wait_resumed();
    kill(&hosts, Side::Source, &["slipstream-src"]);
    program.assert_source_dropped();
    finish(&program, &moved);
}

/// Everything on both hosts is killed, and only the agents are started again, as by systemd.
#[test]
fn both_agents_restarted() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let moved = migration.wait_resumed();
    for side in [Side::Destination, Side::Source] {
        for victim in processes(&hosts, side, &["slipstream", "slipstream-dst", "slipstream-src"]) {
            victim.signal(libc::SIGKILL);
        }
    }
    std::thread::sleep(Duration::from_secs(1));
    assert_stopped(&program);
    let _at_the_destination = hosts.agent_at(agent.address);
    let _at_the_source = hosts.agent_on(Side::Source, "127.0.0.1:0", |_| {});
    program.assert_source_dropped();
    finish(&program, &moved);
    wait::until("the folder of the migration to go", Duration::from_secs(10), || {
        let left = std::fs::read_dir(hosts.run_dir(Side::Source)).expect("a run directory");
        let of_a_migration =
            |name: std::ffi::OsString| name.to_string_lossy().starts_with("source-");
        (!left.flatten().any(|entry| of_a_migration(entry.file_name()))).then_some(())
    });
}

/// Everything on both hosts is killed, and taken up again on both.
#[test]
fn everything_killed_and_recovered() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let id = id_of(&migration);
    let moved = migration.wait_resumed();
    for side in [Side::Destination, Side::Source] {
        for victim in processes(&hosts, side, &["slipstream", "slipstream-dst", "slipstream-src"]) {
            victim.signal(libc::SIGKILL);
        }
    }
    std::thread::sleep(Duration::from_secs(1));
    assert_stopped(&program);
    let _again = hosts.agent_at(agent.address);
    recover(&hosts, Side::Source, &id);
    finish(&program, &moved);
    let over = || program.source_status();
    wait::until("the source's copy to end", Duration::from_secs(30), over);
}

/// Every step of both sides at which a session can be killed (`faultd::failpoints`).
const STEPS: [&str; 30] = [
    "source-connected",
    "source-lanes",
    "source-staged",
    "source-scratch",
    "source-frozen",
    "source-captured",
    "source-sent",
    "source-ready",
    "source-journalled",
    "source-parked",
    "source-stopped",
    "source-commit-sent",
    "source-resumed",
    "source-map-sent",
    "source-completed",
    "source-dropped",
    "destination-hello",
    "destination-lanes",
    "destination-prepared",
    "destination-staged",
    "destination-mapped",
    "destination-pages",
    "destination-restored",
    "destination-ready",
    "destination-kept",
    "destination-commit",
    "destination-run",
    "destination-drained",
    "destination-finished",
    "destination-noted",
];

fn killed_at(step: &str) {
    eprintln!("killed at {step}");
    let hosts = Hosts::two();
    let agent = hosts.agent_with(|command| {
        command.env("SLIPSTREAM_KILL_AT", step);
    });
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let migration = Migration::start(&hosts, program.pid, &agent.destination(), |command| {
        command.env("SLIPSTREAM_KILL_AT", step);
    });
    let outcome = migration.wait_at_most(wait::LIMIT);
    // Killed at the destination past the commit, it is completed all the same, but not without a word.
    let completed = outcome.event("completed").is_some();
    let told = step.starts_with("destination") && outcome.event("note").is_some();
    assert!(!completed || told, "{step}: nothing was killed: {outcome:#?}");
    assert_settles(&hosts, &program, step);
}

#[test]
fn killed_at_every_step() {
    let missing: Vec<_> =
        build::fail_points().into_iter().filter(|point| !STEPS.contains(&point.as_str())).collect();
    assert!(missing.is_empty(), "steps at which nobody is killed: {missing:?}");
    for step in STEPS {
        killed_at(step);
    }
}
