//! A program with self-checking memory is moved to and fro while Slipstream's processes are killed and stopped, and the
//! wire is cut and slow: it sees no wrong byte, never runs twice, and has arrived or stayed.
//!
//! `SLIPSTREAM_CHAOS_MOVES=N` moves it N times, `SLIPSTREAM_CHAOS_SEED=X` replays what the monkey did (`scripts/chaos`).

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime};

use slipstream_tests::Hosts;
use slipstream_tests::chaos::{Arena, Plan, Random};

const MOVES: u64 = 20;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

#[test]
fn arrived_or_stayed() {
    let seconds = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seed = number("SLIPSTREAM_CHAOS_SEED")
        .unwrap_or_else(|| seconds().expect("a clock after 1970").as_secs());
    let moves = number("SLIPSTREAM_CHAOS_MOVES").unwrap_or(MOVES);
    // First: a failure's output has it.
    eprintln!("replay with: scripts/chaos {moves} {seed}");
    let hosts = Hosts::two();
    let mut random = Random::new(seed);
    let mut arena = Arena::new(&hosts, seed);
    let mut arrived = 0;
    let mut codes = BTreeMap::<String, u32>::new();
    for round in 0..moves {
        let plan = Plan::draw(&mut random);
        let (before, began) = (arena.at(), Instant::now());
        eprintln!("round {round} from {before:?}: {plan:?}");
        let code = arena.round(&plan);
        arrived += u32::from(arena.at() != before);
        let code = code.map_or("killed".into(), |code| code.to_string());
        eprintln!(
            "round {round}: exit code {code}, now at {:?}, {:.1?}",
            arena.at(),
            began.elapsed()
        );
        *codes.entry(code).or_default() += 1;
    }
    arena.finish();
    eprintln!("{moves} moves, {arrived} arrived; exit codes {codes:?}");
    assert!(moves < 10 || arrived > 0, "it never arrived: nothing was tested");
}
