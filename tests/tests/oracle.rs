//! The oracle: random memory operations, moved at a random moment, and never a difference.
//!
//! `SLIPSTREAM_ORACLE_SEEDS=N` runs N seeds instead of a few; `SLIPSTREAM_ORACLE_SEED=X` replays one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, SystemTime};

use slipstream_tests::{Build, Hosts, Program, wait};

const SEEDS_LEN: u64 = 16;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

/// When to move, after how long to tell: both follow from the seed.
fn run(seed: u64) {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("oracle"), &[&seed.to_string()]);
    std::thread::sleep(Duration::from_millis(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54));
    // The program forks now and then, and a process with a child is refused until trees can be moved.
    let moved = loop {
        let outcome = hosts.migrate(&program, &agent).wait();
        let has_child = ["has a child", "holds too"].iter().any(|w| outcome.errors.contains(w));
        if !has_child {
            break outcome.assert_completed();
        }
    };
    std::thread::sleep(Duration::from_millis(seed.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 55));
    program.tell();
    moved.wait_end(wait::LIMIT);
    program.assert_ok();
}

#[test]
fn oracle_never_sees_a_difference() {
    let seeds: Vec<u64> = if let Some(seed) = number("SLIPSTREAM_ORACLE_SEED") {
        vec![seed]
    } else {
        let now =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock after 1970");
        let first = now.as_secs() * 1000;
        (first..first + number("SLIPSTREAM_ORACLE_SEEDS").unwrap_or(SEEDS_LEN)).collect()
    };
    let failed: Vec<_> = seeds
        .iter()
        .filter(|&&seed| catch_unwind(AssertUnwindSafe(|| run(seed))).is_err())
        .collect();
    assert!(
        failed.is_empty(),
        "of {} seeds these failed; replay with SLIPSTREAM_ORACLE_SEED=X: {failed:?}",
        seeds.len()
    );
}
