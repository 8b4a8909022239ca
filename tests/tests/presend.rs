//! What can't be fetched on demand travels before the freeze, and no byte of it is stale.

use std::time::Duration;

use slipstream_tests::compare::Untouched;
use slipstream_tests::huge_pages;
use slipstream_tests::migration::code;
use slipstream_tests::moves::{moves, moves_between};
use slipstream_tests::{Build, Hosts, Migration, Program, Side, wait};

/// More than a manifest may bring of this sort, and what else is in one.
const STATE_BYTES_MAX: u64 = (4 << 20) + (1 << 20);

/// Writers through a mapping, by write(2) and to private file pages go on through all of it.
#[test]
fn busy_writers() {
    for _ in 0..3 {
        moves(Build::dynamic("presend_busy"), &[]);
    }
}

#[test]
fn busy_writers_on_one_host() {
    moves_between(&Hosts::one(), Build::dynamic("presend_busy"), &["4"]);
}

#[test]
fn huge_pages_of_a_memfd() {
    let _pages = huge_pages::Reserved::new(16);
    moves(Build::dynamic("memfd_huge"), &[]);
}

/// What is sent in the blackout does not grow with the memory sent ahead.
#[test]
fn little_is_sent_in_the_blackout() {
    for arguments in [["64", "0"], ["0", "48"], ["24", "24"]] {
        let hosts = Hosts::two();
        let agent = hosts.agent();
        let program = Program::start(&hosts, Build::dynamic("presend_idle"), &arguments);
        let outcome = hosts.migrate(&program, &agent).wait();
        let moved = outcome.assert_completed();
        let resumed = outcome.event("resumed").expect("an event resumed");
        let sent = resumed["blackout_parts"]["state_bytes"].as_u64().expect("state_bytes");
        assert!(sent > 0 && sent <= STATE_BYTES_MAX, "{arguments:?}: {sent} bytes");
        program.tell();
        moved.wait_end(wait::LIMIT);
        program.assert_ok();
    }
}

/// A program that changes more than can be sent is refused by name, and goes on.
#[test]
fn too_fast() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("presend_fast"), &[]);
    let outcome = hosts.migrate(&program, &agent).wait_at_most(wait::LIMIT);
    assert!(matches!(outcome.code, Some(code::REFUSED | code::ROLLED_BACK)), "{outcome:#?}");
    let failed = outcome.event("failed").expect("an event failed");
    assert!(failed["reason"].as_str().is_some_and(|r| r.contains("memfd too fast")), "{failed}");
    assert!(failed["remedy"].as_str().is_some_and(|r| !r.is_empty()), "{failed}");
    program.assert_finishes_at_home();
    assert_only(&hosts, agent.pid());
}

/// Failing with half of it sent costs nothing, and leaves nothing at the destination.
#[test]
fn rolls_back_what_was_sent_ahead() {
    for point in ["destination-staged", "source-staged", "source-captured", "destination-mapped"] {
        let hosts = Hosts::two();
        let agent = hosts.agent_with(|command| {
            command.env("SLIPSTREAM_FAIL_AT", point);
        });
        let program = Program::start(&hosts, Build::dynamic("presend_busy"), &["8"]);
        let before = Untouched::remember(program.pid);
        let outcome = Migration::start(&hosts, program.pid, &agent.destination(), |command| {
            command.env("SLIPSTREAM_FAIL_AT", point);
        })
        .wait_at_most(wait::LIMIT);
        assert!(
            matches!(outcome.code, Some(code::REFUSED | code::ROLLED_BACK)),
            "{point}: {outcome:#?}"
        );
        before.assert_untouched();
        assert_only(&hosts, agent.pid());
        program.assert_finishes_at_home();
    }
}

/// Nothing is left on the destination but the agent.
fn assert_only(hosts: &Hosts, agent: i32) {
    wait::until("the destination to drop its copy", Duration::from_secs(15), || {
        hosts.host(Side::Destination).pids().iter().all(|&pid| pid == agent).then_some(())
    });
}
