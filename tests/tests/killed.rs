//! Sessions are killed at their system calls: at some of them, chosen by a seed; at all of them in the long run.
//!
//! `SLIPSTREAM_KILLS=N` kills at so many calls of each stretch (`all`: at every one), `SLIPSTREAM_KILLS_SEED=N` chooses them.

use std::cell::Cell;

use slipstream_tests::settle::assert_settles;
use slipstream_tests::stepper::{End, Stepper};
use slipstream_tests::{Build, Hosts, Migration, Program, Side, wait};

/// Kills in one stretch, unless told otherwise.
const KILLS: u64 = 8;

/// From one point (`faultd::failpoints`) to an event of the migration.
struct Stretch {
    side: Side,
    session: &'static str,
    from: &'static str,
    until: &'static str,
}

/// The session of a stretch is killed at that call. Yields how it ended, and how many calls it has made.
fn killed_in(stretch: &Stretch, kill_at: u64) -> (End, u64) {
    let hosts = Hosts::two();
    let agent = hosts.agent_with(|command| {
        command.env("SLIPSTREAM_STOP_AT", stretch.from);
    });
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let migration = Migration::start(&hosts, program.pid, &agent.destination(), |command| {
        command.env("SLIPSTREAM_STOP_AT", stretch.from);
    });
    let mut stepper = Stepper::take(&hosts, stretch.side, stretch.session);
    let over = Cell::new(false);
    let end = stepper.run(kill_at, || {
        over.set(over.get() || migration.find(stretch.until).is_some() || migration.ended());
        over.get()
    });
    let calls = stepper.calls;
    drop(stepper);
    let what = format!("{}, call {calls}: {end:?}", stretch.from);
    migration.wait_at_most(wait::LIMIT);
    assert_settles(&hosts, &program, &what);
    (end, calls)
}

fn killed_throughout(stretch: &Stretch) {
    let (end, calls) = killed_in(stretch, u64::MAX);
    assert_eq!(end, End::Over, "killed at no call, it goes through");
    let wanted = std::env::var("SLIPSTREAM_KILLS").unwrap_or_else(|_| KILLS.to_string());
    let kills = if wanted == "all" { calls } else { wanted.parse().expect("a number, or all") };
    let seed = std::env::var("SLIPSTREAM_KILLS_SEED").map_or_else(
        |_| u64::from(std::process::id()),
        |seed| seed.parse().expect("SLIPSTREAM_KILLS_SEED: a number"),
    );
    eprintln!("{} calls from {}; SLIPSTREAM_KILLS_SEED={seed}", calls, stretch.from);
    let mut killed = 0;
    for kill in 0..kills {
        let stride = (calls / kills).max(1);
        // One in each part of the stretch, anywhere in that part.
        let within = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(kill as u32 * 7) % stride;
        let (end, _) = killed_in(stretch, kill * stride + within + 1);
        killed += u64::from(end == End::Killed);
    }
    assert!(killed >= kills / 2, "{killed} of {kills} sessions were killed");
}

#[test]
fn source_up_to_the_resume() {
    killed_throughout(&Stretch {
        side: Side::Source,
        session: "slipstream-src",
        from: "source-lanes",
        until: "resumed",
    });
}

#[test]
fn source_from_the_commit_on() {
    killed_throughout(&Stretch {
        side: Side::Source,
        session: "slipstream-src",
        from: "source-stopped",
        until: "completed",
    });
}

#[test]
fn destination_up_to_the_resume() {
    killed_throughout(&Stretch {
        side: Side::Destination,
        session: "slipstream-dst",
        from: "destination-lanes",
        until: "resumed",
    });
}

#[test]
fn destination_to_the_end() {
    killed_throughout(&Stretch {
        side: Side::Destination,
        session: "slipstream-dst",
        from: "destination-run",
        until: "completed",
    });
}
