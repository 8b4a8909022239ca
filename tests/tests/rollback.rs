//! Whatever fails before commit, the program goes on at the source as if nothing had happened.
//!
//! `slipstream fail-points` prints the names of the steps that can be made to fail, one a line; `SLIPSTREAM_FAIL_AT=NAME` makes
//! that step fail, on whichever side it is.

use std::time::Duration;

use slipstream_tests::compare::Untouched;
use slipstream_tests::migration::code;
use slipstream_tests::process::status_field;
use slipstream_tests::proxy::Proxy;
use slipstream_tests::{Build, Hosts, Migration, Program, Side, build, wait};

/// Between them: registers in user mode and in a call, waits, pending signals, descriptors with data, timers, memory.
const PROGRAMS: [&str; 6] =
    ["registers", "waits_endless", "pending_signals", "pipes", "posix_timers", "anon"];

/// No copy may be left that could ever run.
fn assert_destination_empty(hosts: &Hosts, agent: i32) {
    wait::until("the destination to drop its copy", Duration::from_secs(15), || {
        hosts.host(Side::Destination).pids().iter().all(|&pid| pid == agent).then_some(())
    });
}

fn fails_at(point: &str, name: &'static str) {
    let hosts = Hosts::two();
    let agent = hosts.agent_with(|command| {
        command.env("SLIPSTREAM_FAIL_AT", point);
    });
    let program = Program::start(&hosts, Build::dynamic(name), &[]);
    let before = Untouched::remember(program.pid);
    let outcome = Migration::start(&hosts, program.pid, &agent.destination(), |command| {
        command.env("SLIPSTREAM_FAIL_AT", point);
    })
    .wait_at_most(wait::LIMIT);
    assert!(
        matches!(outcome.code, Some(code::REFUSED | code::ROLLED_BACK)),
        "{point}, {name}: {outcome:#?}"
    );
    let failed = outcome
        .event("failed")
        .unwrap_or_else(|| panic!("{point}, {name}: no event failed: {outcome:#?}"));
    assert!(
        failed["reason"].as_str().is_some_and(|reason| !reason.is_empty()),
        "{point}, {name}: no reason in {failed}"
    );
    assert!(outcome.event("committed").is_none(), "{point}, {name}: committed: {outcome:#?}");
    before.assert_untouched();
    assert_destination_empty(&hosts, agent.pid());
    program.assert_finishes_at_home();
}

#[test]
fn every_step_can_fail() {
    let points = build::fail_points();
    assert!(points.len() >= 8, "only {} steps can fail: {points:?}", points.len());
    for (number, point) in points.iter().enumerate() {
        // Each step with two of the programs, in turns; all of them if asked for.
        let all = std::env::var_os("SLIPSTREAM_ROLLBACK_ALL").is_some();
        let some = [number % PROGRAMS.len(), (number + 3) % PROGRAMS.len()];
        for (at, name) in PROGRAMS.iter().enumerate() {
            if all || some.contains(&at) {
                eprintln!("failing at {point}, {name}");
                fails_at(point, name);
            }
        }
    }
}

/// A failed attempt leaves nothing behind that would disturb the next.
#[test]
fn moves_after_a_rollback() {
    let point = build::fail_points().pop().expect("a step that can fail");
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("pipes"), &[]);
    let outcome = Migration::start(&hosts, program.pid, &agent.destination(), |command| {
        command.env("SLIPSTREAM_FAIL_AT", &point);
    })
    .wait();
    if matches!(outcome.code, Some(code::REFUSED | code::ROLLED_BACK)) {
        hosts.migrate(&program, &agent).wait().assert_completed();
    } else {
        // The step is the destination's, whose agent was not told to fail: then this was already the second attempt.
        outcome.assert_completed();
    }
    program.tell();
    wait::until("the program to finish", wait::LIMIT, || {
        program.output().ends_with("OK\n").then_some(())
    });
}

/// The wire is cut after more and more bytes. Up to commit that costs nothing; afterwards the source's copy stays stopped.
#[test]
fn cut_at_any_byte() {
    let mut bytes = 1;
    let mut committed = false;
    while !committed && bytes < 4 << 20 {
        let hosts = Hosts::two();
        let agent = hosts.agent();
        let proxy = Proxy::start(&hosts, agent.address);
        proxy.cut_after(bytes);
        let program = Program::start(&hosts, Build::dynamic("waits_endless"), &[]);
        let before = Untouched::remember(program.pid);
        let migration = Migration::start(&hosts, program.pid, &proxy.destination(), |_| {});
        // Past the commit it waits for the wire, and says so.
        let paused = || migration.find("note").is_some();
        wait::until("an end or a pause", wait::LIMIT, || {
            (migration.ended() || paused()).then_some(())
        });
        if paused() {
            let state = status_field(program.pid, "State").unwrap_or_else(|| "gone".to_owned());
            assert!(
                !state.starts_with(['R', 'S', 'D']),
                "cut after {bytes}: perhaps committed, but the source's copy is {state}"
            );
        }
        proxy.mend();
        let outcome = migration.wait_at_most(wait::LIMIT);
        match outcome.code {
            Some(code::REFUSED | code::ROLLED_BACK) => {
                before.assert_untouched();
                program.assert_finishes_at_home();
            }
            Some(code::COMPLETED) => {
                committed = true;
                program.assert_source_dropped();
            }
            other => panic!("cut after {bytes} bytes: {other:?}: {outcome:#?}"),
        }
        bytes = bytes * 2 + bytes / 3;
    }
    assert!(committed, "never got as far as commit");
}

/// Ctrl-C before commit.
#[test]
fn interrupted() {
    for delay_ms in [0, 5, 20, 60] {
        let hosts = Hosts::two();
        let agent = hosts.agent();
        let program = Program::start(&hosts, Build::dynamic("registers"), &[]);
        let migration = hosts.migrate(&program, &agent);
        std::thread::sleep(Duration::from_millis(delay_ms));
        migration.signal(libc::SIGINT);
        let outcome = migration.wait_at_most(Duration::from_secs(30));
        if outcome.event("committed").is_some() {
            // Too late to go back: the display ends, the migration goes on by itself.
            program.tell();
            wait::until("the moved program to finish", wait::LIMIT, || {
                program.output().ends_with("OK\n").then_some(())
            });
        } else {
            program.assert_finishes_at_home();
        }
    }
}
