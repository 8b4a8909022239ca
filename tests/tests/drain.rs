//! While its memory is on its way a program may do anything.

use std::time::Duration;

use slipstream_tests::moves::moves;
use slipstream_tests::{Build, Hosts, Program};

macro_rules! moved_programs {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() { moves(Build::dynamic(stringify!($name)), &[]); })*
    };
}

moved_programs! {
    drain_fork,
    drain_fork_storm,
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
    moved.wait_end(Duration::from_secs(60));
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
