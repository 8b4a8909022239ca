//! The program, or somebody else, does what a migration can't work with at that very moment.

use std::time::Duration;

use slipstream_tests::migration::code::{COMPLETED, REFUSED, ROLLED_BACK};
use slipstream_tests::process::{Pidfd, status_field};
use slipstream_tests::proxy::Proxy;
use slipstream_tests::{Build, Hosts, Migration, Program, Side, wait};

/// A program that executes itself without end is moved or not, but never harmed: neither at the source, nor when the
/// last traces are removed from it at the destination.
#[test]
fn executing_without_end() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let mut rounds = Vec::new();
    for _ in 0..6 {
        let program = Program::start(&hosts, Build::dynamic("execs"), &[]);
        let outcome = hosts.migrate(&program, &agent).wait();
        let known = [COMPLETED, REFUSED, ROLLED_BACK].map(Some).contains(&outcome.code);
        assert!(known, "{outcome:#?}");
        assert!(!outcome.errors.contains("WARN"), "{}", outcome.errors);
        rounds.push(outcome.code);
        program.tell();
        wait::until("the program to end", Duration::from_secs(20), || {
            program.output().ends_with("OK\n").then_some(())
        });
        program.assert_ok();
        let status = program.wait_source_end();
        assert!(status.success(), "ended with {status} after {rounds:?}");
    }
    assert!(!agent.said().contains("ETIMEDOUT"), "{}", agent.said());
}

/// Two who want the same process at the same time: one gets it, the other is told so.
#[test]
fn two_migrations_of_one_process() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    for _ in 0..3 {
        let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
        let both = [hosts.migrate(&program, &agent), hosts.migrate(&program, &agent)];
        let outcomes: Vec<_> = both.into_iter().map(Migration::wait).collect();
        let winner = usize::from(outcomes[0].code != Some(COMPLETED));
        let moved = outcomes[winner].assert_completed();
        outcomes[1 - winner].assert_refused(REFUSED, &[&program.pid.to_string()]);
        program.assert_source_dropped();
        program.tell();
        moved.wait_end(wait::LIMIT);
        program.assert_ok();
    }
}

/// The copy that a broken migration leaves stopped holds the only pages: nobody may move it as if it were a process.
#[test]
fn stopped_copies_are_not_moved() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let proxy = Proxy::start(&hosts, agent.address);
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = Migration::start(&hosts, program.pid, &proxy.destination(), |_| {});
    migration.wait_event("committed");
    proxy.cut();
    // It would wait for the wire to be mended.
    if let Some(session) = session(&hosts, Side::Source, "__source-session") {
        session.signal(libc::SIGKILL);
    }
    let outcome = migration.wait_at_most(wait::LIMIT);
    if outcome.code == Some(COMPLETED) {
        return program.assert_source_dropped(); // Everything had arrived before the cut.
    }
    for _ in 0..2 {
        let again = hosts.migrate(&program, &agent).wait();
        again.assert_refused(REFUSED, &["stopped copy", "recover"]);
    }
}

/// The session of one side.
fn session(hosts: &Hosts, side: Side, name: &str) -> Option<Pidfd> {
    let binary = slipstream_tests::build::slipstream().canonicalize().expect("the binary's path");
    let is_it = |pid: &i32| {
        let ours = std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == binary);
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        ours && command.split(|byte| *byte == 0).any(|argument| argument == name.as_bytes())
    };
    hosts.host(side).pids().into_iter().find(is_it).and_then(Pidfd::open)
}

/// The source session is killed while it waits for the destination to restore the process: the program goes on at home.
#[test]
fn session_killed_in_the_blackout() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    for _ in 0..20 {
        let program = Program::start(&hosts, Build::dynamic("registers"), &[]);
        let migration = hosts.migrate(&program, &agent);
        // Once it is frozen the destination is held up: "ready" can't come, if this is in time.
        let mut destination = None;
        wait::until("the freeze", Duration::from_secs(20), || {
            destination = destination
                .take()
                .or_else(|| session(&hosts, Side::Destination, "__destination-session"));
            let frozen = status_field(program.pid, "State").is_some_and(|s| s.starts_with('t'));
            (destination.is_some() && frozen).then_some(())
        });
        let destination = destination.expect("just found");
        destination.signal(libc::SIGSTOP);
        std::thread::sleep(Duration::from_millis(200));
        let frozen = status_field(program.pid, "State").is_some_and(|s| s.starts_with('t'));
        let tracer = session(&hosts, Side::Source, "__source-session");
        if let (true, Some(tracer)) = (frozen, tracer) {
            tracer.signal(libc::SIGKILL);
            let outcome = migration.wait();
            assert!(outcome.event("committed").is_none(), "{outcome:#?}");
            destination.signal(libc::SIGKILL);
            return program.assert_finishes_at_home();
        }
        // Too late, or only the moment in which scratch memory is mapped.
        destination.signal(libc::SIGCONT);
        migration.wait().assert_completed();
    }
    panic!("the freeze was never caught");
}

/// What is stopped is refused: it would run at the destination.
#[test]
fn stopped_programs() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let process = Pidfd::open(program.pid).expect("the program");
    process.signal(libc::SIGSTOP);
    wait::until("the program to stop", Duration::from_secs(20), || {
        status_field(program.pid, "State").filter(|state| state.starts_with('T'))
    });
    hosts.migrate(&program, &agent).wait().assert_refused(REFUSED, &["stopped", "kill -CONT"]);
    process.signal(libc::SIGCONT);
    program.assert_finishes_at_home();
}
