//! After the last page nothing of Slipstream is left in the process, nor on the hosts.

use std::time::Duration;

use slipstream_tests::process::{Inventory, proc_file, status_field};
use slipstream_tests::{Build, Hosts, Program, Side, wait};

fn move_and_compare(name: &'static str) {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic(name), &[]);
    let before = Inventory::of(program.pid);
    let moved = hosts.migrate(&program, &agent).wait().assert_completed();
    assert_eq!(Inventory::of(moved.pid), before, "threads, descriptors or mappings differ");
    assert_eq!(status_field(moved.pid, "TracerPid").as_deref(), Some("0"));
    let state = status_field(moved.pid, "State").expect("the moved process");
    assert!(!state.starts_with(['T', 't']), "it is stopped: {state}");
    let smaps = proc_file(moved.pid, "smaps");
    assert!(smaps.contains("VmFlags:"), "no smaps of the moved process");
    for line in smaps.lines().filter(|line| line.starts_with("VmFlags:")) {
        assert!(
            !line.split_whitespace().any(|flag| ["um", "uw", "ui"].contains(&flag)),
            "still registered: {line}"
        );
    }
    let in_namespace = status_field(moved.pid, "NSpid").expect("the moved process");
    let innermost = in_namespace.split_whitespace().last().map(str::to_owned);
    assert_eq!(
        innermost,
        Some(program.pid.to_string()),
        "it has another PID in its own eyes: {in_namespace}"
    );
    program.assert_source_dropped();
    program.tell();
    moved.wait_end(wait::LIMIT);
    program.assert_ok();
    wait::until("everything but the agent to be gone", Duration::from_secs(15), || {
        let left = hosts
            .host(Side::Destination)
            .pids()
            .into_iter()
            .filter(|&pid| pid != agent.pid())
            .count();
        (left + hosts.host(Side::Source).pids().len() == 0).then_some(())
    });
}

#[test]
fn invisible_with_one_thread() {
    move_and_compare("heap");
}

#[test]
fn invisible_with_threads() {
    move_and_compare("waits_endless");
}

#[test]
fn invisible_with_shared_memory() {
    move_and_compare("memfd_mapped");
}

#[test]
fn invisible_with_many_mappings() {
    move_and_compare("many_mappings");
}

/// A moved process is a process like any other: it can be moved again, with all that is special about a restored one.
#[test]
fn moved_twice() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let once = hosts.migrate(&program, &agent).wait().assert_completed();
    let host = hosts.host(Side::Destination);
    let output = host
        .command(slipstream_tests::build::slipstream())
        .args(["migrate", &once.pid.to_string(), &agent.destination(), "--json", "--key"])
        .arg(hosts.key())
        .arg("--run-dir")
        .arg(hosts.path().join("run-again"))
        .output()
        .expect("running slipstream");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    once.wait_end(Duration::from_secs(20));
    program.tell();
    wait::until("the twice moved program to finish", wait::LIMIT, || {
        (program.verdict() != slipstream_tests::program::Verdict::None).then_some(())
    });
    program.assert_ok();
}
