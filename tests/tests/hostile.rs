//! Bytes from strangers: the connection ends, the agent lives, and goes on serving.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use slipstream_tests::process::status_field;
use slipstream_tests::proxy::Proxy;
use slipstream_tests::{Agent, Build, Hosts, Migration, Program, Side, wait};

/// Sends bytes, and returns what came back before the agent closed (or `patience` ran out).
fn send(hosts: &Hosts, agent: &Agent, bytes: &[u8], patience: Duration) -> Vec<u8> {
    hosts.host(Side::Source).enter(|| {
        let mut stream = TcpStream::connect(agent.address).expect("connecting to the agent");
        stream.set_read_timeout(Some(patience)).expect("a time-out");
        // The agent may close in the middle: that is its right.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer
    })
}

fn resident_kib(pid: i32) -> u64 {
    let text = status_field(pid, "VmRSS").expect("the agent's VmRSS");
    text.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number of KiB")
}

fn move_one(hosts: &Hosts, agent: &Agent, destination: &str) {
    let program = Program::start(hosts, Build::dynamic("anon"), &[]);
    let moved = Migration::start(hosts, program.pid, destination, |_| {}).wait().assert_completed();
    program.tell();
    moved.wait_end(wait::LIMIT);
    program.assert_ok();
    assert!(agent.alive(), "the agent died:\n{}", agent.said());
}

fn assert_well(hosts: &Hosts, agent: &Agent) {
    assert!(agent.alive(), "the agent died:\n{}", agent.said());
    assert!(!agent.said().contains("panicked"), "the agent panicked:\n{}", agent.said());
    let resident = resident_kib(agent.pid());
    assert!(resident < 64 * 1024, "the agent grew to {resident} KiB");
    move_one(hosts, agent, &agent.destination());
}

/// Pseudo-random bytes: the same in every run.
fn garbage(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    })
    .take(len)
    .collect()
}

#[test]
fn garbage_ends_the_connection() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    for (seed, len) in
        [0, 1, 15, 31, 32, 33, 64, 100, 1000, 65_536, 1 << 20].into_iter().enumerate()
    {
        let answer = send(&hosts, &agent, &garbage(seed as u64, len), Duration::from_secs(15));
        assert!(answer.is_empty(), "a stranger got an answer: {answer:?}");
    }
    for text in
        [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], b"SSH-2.0-x\r\n", &[0xff; 4096], &[0; 4096]]
    {
        assert!(
            send(&hosts, &agent, text, Duration::from_secs(15)).is_empty(),
            "a stranger got an answer"
        );
    }
    assert_well(&hosts, &agent);
}

/// What a real migration sent, sent again: whole, cut short, and with one bit turned. Nothing of it may start anything.
#[test]
fn replayed_and_mutilated_migrations() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let proxy = Proxy::start(&hosts, agent.address);
    move_one(&hosts, &agent, &proxy.destination());
    let recordings = proxy.recordings();
    assert!(
        !recordings.is_empty() && recordings.iter().any(|recording| recording.len() > 100),
        "nothing was recorded"
    );
    let patience = Duration::from_millis(300);
    for recording in recordings.iter().take(3) {
        send(&hosts, &agent, recording, patience);
        for part in 0..20 {
            let len = recording.len().min(400) * part / 20;
            send(&hosts, &agent, &recording[..len], patience);
            let mut turned = recording.clone();
            if let Some(byte) = turned.get_mut(len) {
                *byte ^= 1 << (part % 8);
            }
            send(&hosts, &agent, &turned, patience);
        }
        // Every length on the wire as large as it can be, wherever it stands.
        for at in (32..recording.len().min(200)).step_by(6) {
            let mut huge = recording.clone();
            huge[at..(at + 8).min(recording.len())].fill(0xff);
            send(&hosts, &agent, &huge, patience);
        }
    }
    assert_well(&hosts, &agent);
}

/// Somebody who has seen where the lanes of a migration go, but has no key, interrupts nothing.
#[test]
fn strangers_at_a_drain() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let proxy = Proxy::start(&hosts, agent.address);
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let migration = Migration::start(&hosts, program.pid, &proxy.destination(), |command| {
        command.args(["--prefetch-limit", "15"]);
    });
    let moved = migration.wait_resumed();
    let lanes = proxy.recordings();
    assert!(lanes.len() > 1, "no lane was recorded");
    for lane in &lanes[1..] {
        // The preamble alone, a whole recording, and garbage after the preamble.
        for opening in [&lane[..32], &lane[..], &[&lane[..32], &garbage(1, 300)].concat()] {
            send(&hosts, &agent, opening, Duration::from_millis(50));
        }
    }
    assert!(!migration.ended(), "it was over before the strangers were gone");
    let outcome = migration.wait();
    outcome.assert_completed();
    assert!(outcome.event("note").is_none(), "{outcome:#?}");
    program.tell();
    moved.wait_end(wait::LIMIT);
    program.assert_ok();
}

/// Strangers who connect and say nothing don't keep others out, and are shown the door.
#[test]
fn silent_strangers() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let mut streams: Vec<_> = hosts.host(Side::Source).enter(|| {
        (0..300)
            .map_while(|_| TcpStream::connect_timeout(&agent.address, Duration::from_secs(5)).ok())
            .collect::<Vec<_>>()
    });
    assert!(!streams.is_empty(), "no connection at all");
    let begin = Instant::now();
    move_one(&hosts, &agent, &agent.destination());
    assert!(
        begin.elapsed() < Duration::from_secs(60),
        "a migration took {:?} beside silent strangers",
        begin.elapsed()
    );
    let first = streams.first_mut().expect("a stream");
    first.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
    let ended =
        matches!(first.read(&mut [0; 1]), Ok(0)) || first.take_error().ok().flatten().is_some();
    assert!(ended, "a silent stranger is still connected after a minute");
    assert_well(&hosts, &agent);
}
