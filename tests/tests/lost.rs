//! When no page can come any more, the process is ended with a cause that can be read; when that is not known, it waits.

use std::process::Stdio;
use std::time::{Duration, Instant};

use slipstream_tests::migration::code;
use slipstream_tests::process::{Moved, Pidfd, status_field};
use slipstream_tests::proxy::Proxy;
use slipstream_tests::{Agent, Build, Hosts, Migration, Program, Side, build, wait};

const LIMIT: Duration = wait::LIMIT;

/// Everything of Slipstream on the source dies, and the network with it.
fn lose_source(hosts: &Hosts, proxy: &Proxy) {
    proxy.cut();
    for pid in hosts.host(Side::Source).pids() {
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if let ("slipstream" | "slipstream-src", Some(process)) = (comm.trim(), Pidfd::open(pid)) {
            process.signal(libc::SIGKILL);
        }
    }
}

fn run(hosts: &Hosts, side: Side, command: &str, id: &str) -> (Option<i32>, String) {
    let mut slipstream = hosts.host(side).command(build::slipstream());
    slipstream.args([command, id, "--run-dir"]).arg(hosts.run_dir(side)).stdin(Stdio::null());
    let output = slipstream.output().expect("running slipstream");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into_owned())
}

fn assert_lost(hosts: &Hosts, side: Side, id: &str, why: &str) {
    let status = hosts.status(side, id);
    assert_eq!(status["phase"], "lost", "{status}");
    assert!(status["detail"].as_str().is_some_and(|d| d.contains(why)), "{why:?} not in {status}");
}

struct Slow<'a> {
    proxy: Proxy,
    program: Program<'a>,
    migration: Migration,
    moved: Moved,
    id: String,
}

/// A program that has just resumed, and whose pages come very slowly.
fn slow<'a>(hosts: &'a Hosts, agent: &Agent) -> Slow<'a> {
    let proxy = Proxy::start(hosts, agent.address);
    let program = Program::start(hosts, Build::dynamic("drain_touch"), &[]);
    let migration = Migration::start(hosts, program.pid, &proxy.destination(), |_| {});
    let moved = migration.wait_resumed();
    proxy.set_delay(Duration::from_millis(300));
    let id = migration.wait_event("committed")["id"].as_str().expect("an id").to_owned();
    Slow { proxy, program, migration, moved, id }
}

/// Somebody kills the frozen copy: everybody who watches hears that the process is lost, and why.
#[test]
fn frozen_copy_killed() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let Slow { proxy, program, migration, moved, id } = slow(&hosts, &agent);
    Pidfd::open(program.pid).expect("the frozen copy").signal(libc::SIGKILL);
    proxy.set_delay(Duration::ZERO);
    let outcome = migration.wait_at_most(LIMIT);
    assert_eq!(outcome.code, Some(code::LOST), "{outcome:#?}");
    moved.wait_end(LIMIT);
    assert_lost(&hosts, Side::Destination, &id, "at the source was destroyed");
    assert_lost(&hosts, Side::Source, &id, "at the source was destroyed");
    let (code, said) = run(&hosts, Side::Destination, "recover", &id);
    assert_eq!(code, Some(code::LOST), "{said}");
}

/// Told to end what has lost its source, the agent does so; the source, should it come back, hears of it.
#[test]
fn source_lost_ends() {
    let hosts = Hosts::two();
    let agent = hosts.agent_with(|command| {
        command.args(["--source-lost", "end", "--source-lost-after", "2"]);
    });
    let Slow { proxy, program, moved, id, .. } = slow(&hosts, &agent);
    lose_source(&hosts, &proxy);
    let lost = Instant::now();
    moved.wait_end(LIMIT);
    assert!(lost.elapsed() > Duration::from_millis(1500), "ended after {:?}", lost.elapsed());
    assert_lost(&hosts, Side::Destination, &id, "its source had been lost for 2s");
    let (code, said) = run(&hosts, Side::Destination, "recover", &id);
    assert_eq!(code, Some(code::LOST), "{said}");
    proxy.mend();
    proxy.set_delay(Duration::ZERO);
    let (code, said) = run(&hosts, Side::Source, "recover", &id);
    assert_eq!(code, Some(code::LOST), "{said}");
    let status = wait::until("the frozen copy's end", LIMIT, || program.source_status());
    assert!(!status.success(), "its parent has to see that it did not end well: {status}");
}

/// The default is to wait, as long as nobody says otherwise; `abort` at the destination does.
#[test]
fn source_lost_waits_until_aborted() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let Slow { proxy, moved, id, .. } = slow(&hosts, &agent);
    let (code, said) = run(&hosts, Side::Destination, "abort", &id);
    assert_eq!(code, Some(code::REFUSED), "its pages are on their way: {said}");
    lose_source(&hosts, &proxy);
    std::thread::sleep(Duration::from_secs(4));
    assert!(!moved.ended(), "it did not wait");
    let (code, said) = run(&hosts, Side::Destination, "abort", &id);
    assert_eq!(code, Some(0), "{said}");
    moved.wait_end(LIMIT);
    assert_lost(&hosts, Side::Destination, &id, "given up here");
    let (code, said) = run(&hosts, Side::Destination, "abort", &id);
    assert_eq!(code, Some(code::REFUSED), "there is nothing left to give up: {said}");
}

/// Whoever was ending a process whose source is lost was killed after it had noted so: the next agent finishes that.
#[test]
fn half_ended() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let Slow { proxy, moved, id, .. } = slow(&hosts, &agent);
    lose_source(&hosts, &proxy);
    agent.kill();
    let folder = hosts.run_dir(Side::Destination).join(format!("destination-{id}"));
    std::fs::write(folder.join("lost"), "given up here").expect("the note");
    assert!(!moved.ended());
    let _again = hosts.agent();
    moved.wait_end(LIMIT);
    assert_lost(&hosts, Side::Destination, &id, "given up here");
}

/// `abort` at the destination before the commit: the process never runs there, and goes on at home.
#[test]
fn aborted_at_the_destination_before_the_commit() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let proxy = Proxy::start(&hosts, agent.address);
    // Everything takes a while, so that the word comes in time.
    proxy.set_delay(Duration::from_millis(40));
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let migration = Migration::start(&hosts, program.pid, &proxy.destination(), |_| {});
    let id = wait::until("the destination's folder", LIMIT, || {
        let entries = std::fs::read_dir(hosts.run_dir(Side::Destination)).ok()?;
        let mut names = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
        names.find_map(|name| name.strip_prefix("destination-").map(str::to_owned))
    });
    let gate = hosts.run_dir(Side::Destination).join(format!("destination-{id}/gate"));
    wait::until("the gate", LIMIT, || {
        gate.metadata().is_ok_and(|gate| gate.len() > 0).then_some(())
    });
    let (code, said) = run(&hosts, Side::Destination, "abort", &id);
    assert_eq!(code, Some(0), "{said}");
    proxy.set_delay(Duration::ZERO);
    let outcome = migration.wait_at_most(LIMIT);
    assert!(matches!(outcome.code, Some(code::ROLLED_BACK | code::REFUSED)), "{outcome:#?}");
    assert!(status_field(program.pid, "State").is_some_and(|s| !s.starts_with(['T', 't'])));
    program.assert_finishes_at_home();
}
