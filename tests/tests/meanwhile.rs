//! What a program does, or has done to it, between the first look at it and the commit is noticed: it runs on at the
//! source, and has lost nothing. `SLIPSTREAM_STOP_AT=NAME` holds the session at a step meanwhile.

use std::fs::File;
use std::time::Duration;

use slipstream_tests::migration::code::{REFUSED, ROLLED_BACK};
use slipstream_tests::process::{Pidfd, status_field};
use slipstream_tests::program::Verdict;
use slipstream_tests::{Build, Hosts, Migration, Outcome, Program, Side, skipped, wait};

const SOON: Duration = wait::LIMIT;

/// The session that has stopped itself.
fn held_session(hosts: &Hosts, program: &Program) -> Pidfd {
    wait::until("the session to stop", SOON, || {
        let pids = hosts.host(Side::Source).pids().into_iter();
        pids.filter(|&pid| pid != program.pid)
            .find(|&pid| status_field(pid, "State").is_some_and(|s| s.starts_with('T')))
            .and_then(Pidfd::open)
    })
}

/// Moves the program; when the session is at `point`, `act` is called.
fn moved_meanwhile(program: &Program, point: &str, act: impl FnOnce()) -> Outcome {
    let hosts = program.hosts();
    let agent = hosts.agent();
    let migration = Migration::start(hosts, program.pid, &agent.destination(), |command| {
        command.env("SLIPSTREAM_STOP_AT", point);
    });
    let session = held_session(hosts, program);
    act();
    session.signal(libc::SIGCONT);
    migration.wait_at_most(SOON)
}

fn signalled(point: &str, signal: i32, words: &[&str]) {
    let hosts = Hosts::two();
    let program = Program::start(&hosts, Build::dynamic("meanwhile"), &["signal"]);
    let itself = Pidfd::open(program.pid).expect("the program");
    let outcome = moved_meanwhile(&program, point, || itself.signal(signal));
    outcome.assert_refused(ROLLED_BACK, words);
    if signal == libc::SIGSTOP {
        let state = || status_field(program.pid, "State");
        wait::until("the program to be stopped", SOON, || {
            state().is_some_and(|s| s.starts_with('T')).then_some(())
        });
        itself.signal(libc::SIGCONT);
        itself.signal(libc::SIGUSR1);
    }
    program.assert_finishes_at_home();
}

#[test]
fn a_signal_after_the_capture_is_not_lost() {
    signalled("source-ready", libc::SIGUSR1, &["signal 10", "try again"]);
}

#[test]
fn a_stop_after_the_freeze_is_not_lost() {
    signalled("source-frozen", libc::SIGSTOP, &["stopped by SIGSTOP", "kill -CONT"]);
}

#[test]
fn a_stop_after_the_capture_is_not_lost() {
    signalled("source-captured", libc::SIGSTOP, &["signal 19", "try again"]);
}

/// What the program does by itself before the freeze.
fn acted(what: &str, words: &[&str]) {
    let hosts = Hosts::two();
    let program = Program::start(&hosts, Build::dynamic("meanwhile"), &[what]);
    let go = program.directory().join("go");
    let outcome = moved_meanwhile(&program, "source-connected", || {
        File::create(go).expect("the file");
        program.wait_for_line("done");
    });
    outcome.assert_refused(REFUSED, words);
    program.assert_finishes_at_home();
}

#[test]
fn seccomp_since_the_first_look() {
    acted("seccomp", &["seccomp", "sandbox"]);
}

#[test]
fn a_file_opened_since_the_first_look() {
    acted("open", &["opened", "try again"]);
}

#[test]
fn a_file_mapped_since_the_first_look() {
    acted("map", &["mapped", "try again"]);
}

#[test]
fn a_child_forked_since_the_first_look() {
    acted("fork", &["child", "try again"]);
}

/// What only the process itself, or its tracer, is told.
fn refused_late(what: &str, codes: i32, words: &[&str]) {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("meanwhile"), &[what]);
    if let Verdict::Skip(missing) = program.verdict() {
        return skipped(what, &missing);
    }
    let outcome = hosts.migrate(&program, &agent).wait_at_most(SOON);
    outcome.assert_refused(codes, words);
    program.assert_finishes_at_home();
}

#[test]
fn syscall_user_dispatch() {
    refused_late("dispatch", REFUSED, &["PR_SET_SYSCALL_USER_DISPATCH"]);
}

#[test]
fn local_descriptor_table() {
    refused_late("ldt", ROLLED_BACK, &["modify_ldt"]);
}

#[test]
fn eventfd_held_by_another_process() {
    refused_late("eventfd", REFUSED, &["eventfd shared with process"]);
}
