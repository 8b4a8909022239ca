//! The usual test: start, move, ask.

use std::time::Duration;

use crate::build::Build;
use crate::hosts::Hosts;
use crate::program::{Program, Verdict};

/// Says that a test could not run, and why. A skipped test is visible, or it is no test.
pub fn skipped(name: &str, missing: &str) {
    eprintln!("SKIPPED {name}: {missing}");
}

/// Moves a test program while it holds its state, between two hosts, and insists that it finds everything in order.
pub fn moves(build: Build, arguments: &[&str]) {
    moves_between(&Hosts::two(), build, arguments);
}

/// The same between given hosts.
pub fn moves_between(hosts: &Hosts, build: Build, arguments: &[&str]) {
    if let Some(missing) = build.missing() {
        return skipped(build.name, &missing);
    }
    let agent = hosts.agent();
    let program = Program::start(hosts, build, arguments);
    if let Verdict::Skip(missing) = program.verdict() {
        return skipped(build.name, &missing);
    }
    assert_eq!(program.verdict(), Verdict::None, "{} at home: {}", build.name, program.output());
    let outcome = hosts.migrate(&program, &agent).wait();
    let moved = outcome.assert_completed();
    program.assert_source_dropped();
    program.tell();
    moved.wait_end(Duration::from_secs(90));
    program.assert_ok();
    assert!(agent.alive(), "the agent died:\n{}", agent.said());
}

/// Runs a test program without moving it: the test of the tests.
pub fn stays(build: Build, arguments: &[&str], before_told: Duration) {
    if let Some(missing) = build.missing() {
        return skipped(build.name, &missing);
    }
    let hosts = Hosts::without_slipstream();
    let program = Program::start(&hosts, build, arguments);
    if let Verdict::Skip(missing) = program.verdict() {
        return skipped(build.name, &missing);
    }
    std::thread::sleep(before_told);
    program.assert_finishes_at_home();
}
