//! Descriptors come along: number, flags, offset, sharing, and what is inside; and standard streams can be redirected.

use std::process::Stdio;
use std::time::Duration;

use slipstream_tests::moves::moves;
use slipstream_tests::{Build, Hosts, Migration, Program};

macro_rules! moved_programs {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() { moves(Build::dynamic(stringify!($name)), &[]); })*
    };
}

moved_programs! {
    files,
    directories,
    devices,
    pipes,
    half_pipes,
    event_descriptors,
    epolls,
    memfds,
}

/// A program whose output goes to somebody else's pipe can be moved once its streams are redirected to a file.
#[test]
fn stdio_to_a_file() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program =
        Program::run(&hosts, "redirected", Build::dynamic("heap").executable(), |command, flag| {
            command.arg(flag).stdout(Stdio::piped());
        });
    std::thread::sleep(Duration::from_millis(500));
    let file = hosts.path().join("redirected.log");
    let outcome = Migration::start(&hosts, program.pid, &agent.destination(), |command| {
        command.arg("--stdio").arg(&file);
    })
    .wait();
    let moved = outcome.assert_completed();
    program.tell();
    moved.wait_end(Duration::from_secs(30));
    let said = std::fs::read_to_string(&file).expect("the file standard output was redirected to");
    assert!(said.ends_with("OK\n"), "the file holds {said:?}");
}

#[test]
fn stdio_to_null() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program =
        Program::run(&hosts, "redirected", Build::dynamic("heap").executable(), |command, flag| {
            command.arg(flag).stdin(Stdio::piped()).stdout(Stdio::piped());
        });
    std::thread::sleep(Duration::from_millis(500));
    let outcome = Migration::start(&hosts, program.pid, &agent.destination(), |command| {
        command.args(["--stdio", "null"]);
    })
    .wait();
    let moved = outcome.assert_completed();
    for fd in [0, 1] {
        let link =
            std::fs::read_link(format!("/proc/{}/fd/{fd}", moved.pid)).expect("a standard stream");
        assert_eq!(link.to_str(), Some("/dev/null"), "descriptor {fd}");
    }
    program.tell();
    moved.wait_end(Duration::from_secs(30));
}
