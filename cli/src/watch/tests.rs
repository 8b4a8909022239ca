//! Recorded streams of events, and what is said about them.

use super::*;
use crate::engine::Control;
use std::io::{self, Cursor};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const MOVED: &str = include_str!("../testdata/moved.jsonl");
const REFUSED: &str = include_str!("../testdata/refused.jsonl");
const ROLLED_BACK: &str = include_str!("../testdata/rolled_back.jsonl");
const WAITING: &str = include_str!("../testdata/waiting.jsonl");

/// Counts the requests for a rollback.
#[derive(Clone, Default)]
struct Asked(Arc<AtomicUsize>);

impl Control for Asked {
    fn request_rollback(&mut self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

fn play(stream: &str, json: Option<&mut dyn Write>) -> Story {
    let events = Box::new(Cursor::new(stream.to_owned().into_bytes()));
    let control = Box::new(Asked::default());
    let migration = Migration { committed: None, events, control };
    watch(migration, SigSet::empty(), &mut Screen::Quiet, json)
}

/// Plays inputs, `^C` two seconds after each other, `^c` at the same time as the one before; what no
/// input follows is a session that is still at work.
fn play_inputs(inputs: &[&str]) -> (Story, usize) {
    let (to, from) = sync_channel(inputs.len() + 1);
    let mut now = Instant::now();
    for input in inputs {
        to.send(match *input {
            "^C" => {
                now += Duration::from_secs(2);
                Input::Interrupt(now)
            }
            "^c" => Input::Interrupt(now),
            "end" => Input::End,
            line => Input::Line(line.into()),
        })
        .expect("there is room");
    }
    let asked = Asked::default();
    let control = Box::new(asked.clone());
    let story = follow(Story::default(), control, &from, &mut Screen::Quiet, None);
    (story, asked.0.load(Ordering::Relaxed))
}

#[test]
fn a_move_ends_with_a_summary() {
    let story = play(MOVED, None);
    assert_eq!(story.exit_code(), 0);
    assert_eq!(story.failure(), None);
    let expected = "\
migration k3f9: moved, PID 52114 there
  blackout      3.91 ms
    freeze       402 us   10 %
    capture      900 us   23 %
    send         610 us   16 %
    restore     1.48 ms   38 %
    commit       500 us   13 %
    between       20 us    1 %
  drain          1.21 s  262,144 of 262,144 pages, 1.07 GB, 887 MB/s over tcp
  faults          8,912  7365 faults/s  p50 41 us  p99 182 us
  total          1.32 s
";
    assert_eq!(story.summary().as_deref(), Some(expected));
}

#[test]
fn json_is_passed_on_as_it_is() {
    let mut json = Vec::new();
    play(MOVED, Some(&mut json));
    assert_eq!(String::from_utf8(json).expect("text"), MOVED);
}

#[test]
fn every_blocker_has_its_line_and_no_line_drives_the_terminal() {
    let story = play(REFUSED, None);
    assert_eq!((story.exit_code(), story.summary()), (3, None));
    assert_eq!(
        story.failure().as_deref(),
        Some(
            "slipstream: refused: fd 7: a TCP socket to 10.0.0.9:80; close it before moving\n\
             slipstream: refused: mapping 7f0000000000: file /tmp/x\u{fffd}[2J was replaced; \
             restart the program\n\
             slipstream: refused: 2 blockers; the process was not touched\n"
        )
    );
}

#[test]
fn a_rollback_says_that_the_process_runs_here() {
    let story = play(ROLLED_BACK, None);
    assert_eq!(story.exit_code(), 4);
    assert_eq!(
        story.failure().as_deref(),
        Some(
            "slipstream: rolled back, the process runs on here: restore: the destination closed \
             the connection; see the agent's log on 10.0.0.2\n"
        )
    );
}

#[test]
fn waiting_names_the_way_on() {
    let story = play(WAITING, None);
    assert_eq!(story.exit_code(), 5);
    assert_eq!(
        story.failure().as_deref(),
        Some(
            "slipstream: committed, waiting for recovery: drain: 10.0.0.2:7070 does not answer; \
             `slipstream recover k3f9`\n"
        )
    );
}

#[test]
fn a_session_that_falls_silent_is_no_success() {
    let silent = |lines: usize| {
        let stream: String = MOVED.split_inclusive('\n').take(lines).collect();
        let mut json = Vec::new();
        let story = play(&stream, Some(&mut json));
        let last = String::from_utf8(json).expect("text").lines().last().map(str::to_owned);
        assert!(last.expect("an end").contains(r#""event":"failed""#));
        story.exit_code()
    };
    assert_eq!([silent(0), silent(2), silent(3), silent(6)], [1, 1, 5, 5]);
    assert_eq!(play(REFUSED.lines().next().expect("one"), None).exit_code(), 3);
}

#[test]
fn nonsense_between_the_events_is_passed_over() {
    let stream = MOVED.replace('\n', "\nnonsense\n{\"v\":1,\"event\":\"later\"}\n");
    assert_eq!(play(&stream, None).exit_code(), 0);
}

#[test]
fn ctrl_c_before_the_commit_rolls_back() {
    let mut inputs: Vec<&str> = ROLLED_BACK.lines().collect();
    inputs.insert(1, "^C");
    let (story, asked) = play_inputs(&inputs);
    assert_eq!((story.exit_code(), asked), (4, 1));
}

#[test]
fn ctrl_c_after_the_commit_ends_the_display_only() {
    let mut inputs: Vec<&str> = MOVED.lines().take(5).collect();
    inputs.push("^C");
    let (story, asked) = play_inputs(&inputs);
    assert_eq!((story.exit_code(), asked), (5, 0));
    let text = story.failure().expect("a word");
    assert!(text.contains("goes on") && text.contains("slipstream status k3f9"), "{text}");
}

#[test]
fn a_rollback_that_comes_too_late_is_no_rollback() {
    let mut inputs: Vec<&str> = MOVED.lines().collect();
    inputs.insert(1, "^C");
    let (story, asked) = play_inputs(&inputs);
    assert_eq!((story.exit_code(), asked), (0, 1));
}

#[test]
fn the_second_ctrl_c_does_not_wait() {
    let (story, asked) = play_inputs(&["^C", "^C"]);
    assert_eq!((story.exit_code(), asked), (1, 1));
    assert!(story.failure().expect("a word").contains("slipstream status"));
}

#[test]
fn signals_that_come_together_are_one_wish() {
    let mut inputs: Vec<&str> = ROLLED_BACK.lines().collect();
    inputs.splice(1..1, ["^C", "^c", "^c"]);
    let (story, asked) = play_inputs(&inputs);
    assert_eq!((story.exit_code(), asked), (4, 1));
}
