//! The commands against an engine that only remembers what it was asked.

use super::*;
use crate::engine::{Control, Findings, Result};
use clap::Parser;
use slipstream_faultd::events::Status;
use std::cell::RefCell;
use std::ffi::OsString;
use std::io::Cursor;
use std::net::SocketAddr;

#[derive(Default)]
struct Fake {
    asked: RefCell<Vec<String>>,
    blockers: Vec<Blocker>,
    fails: Option<Outcome>,
}

struct Deaf;

impl Control for Deaf {
    fn request_rollback(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Fake {
    fn ask<T>(&self, what: String, answer: T) -> Result<T> {
        self.asked.borrow_mut().push(what);
        match self.fails {
            None => Ok(answer),
            Some(outcome) => Err(Failed {
                phase: "start".into(),
                reason: "it does".into(),
                remedy: String::new(),
                outcome,
            }),
        }
    }

    fn moved() -> Migration {
        let events = include_bytes!("../testdata/moved.jsonl");
        Migration {
            committed: None,
            events: Box::new(Cursor::new(events)),
            control: Box::new(Deaf),
        }
    }
}

impl Engine for Fake {
    fn migrate(&self, r: &MigrateRequest) -> Result<Migration> {
        self.ask(format!("migrate {} {} {}", r.args.pid, r.host, r.port), Self::moved())
    }
    fn agent(&self, args: &AgentArgs, listening: &mut dyn FnMut(SocketAddr)) -> Result<()> {
        listening(args.listen);
        self.ask(format!("agent {}", args.listen), ())
    }
    fn check(&self, args: &CheckArgs) -> Result<Findings> {
        let preflight = Some(Preflight { blockers: self.blockers.clone() });
        self.ask(format!("check {:?}", args.pid), Findings { facts: Vec::new(), preflight })
    }
    fn status(&self, run_dir: &Path, id: Option<&str>) -> Result<Vec<Status>> {
        self.ask(format!("status {} {id:?}", run_dir.display()), Vec::new())
    }
    fn recover(&self, _: &Path, id: &str) -> Result<Migration> {
        self.ask(format!("recover {id}"), Self::moved())
    }
    fn abort(&self, _: &Path, id: &str) -> Result<String> {
        self.ask(format!("abort {id}"), "runs on".into())
    }
    fn keygen(&self, file: &Path) -> Result<()> {
        self.ask(format!("keygen {}", file.display()), ())
    }
    fn session(&self, session: Session, args: &[OsString]) -> Result<u8> {
        self.ask(format!("{session:?} {args:?}"), 42)
    }
    fn fail_points(&self) -> Vec<&'static str> {
        vec!["freeze"]
    }
}

fn try_run(fake: &Fake, line: &str) -> u8 {
    let cli = Cli::try_parse_from(line.split_whitespace()).expect("a valid command line");
    run(fake, &cli.command)
}

fn asked(line: &str) -> (u8, Vec<String>) {
    let fake = Fake::default();
    let code = try_run(&fake, line);
    (code, fake.asked.take())
}

#[test]
fn commands_reach_the_engine() {
    let cases = [
        ("slipstream migrate 7 tcp://b:9 --key k", "migrate 7 b 9"),
        ("slipstream agent --listen 127.0.0.1:0 --key k", "agent 127.0.0.1:0"),
        ("slipstream check 7", "check Some(7)"),
        ("slipstream status", "status /run/slipstream None"),
        ("slipstream status a1 --run-dir /r", "status /r Some(\"a1\")"),
        ("slipstream recover a1", "recover a1"),
        ("slipstream abort a1", "abort a1"),
        ("slipstream keygen f", "keygen f"),
    ];
    for (line, call) in cases {
        assert_eq!(asked(line), (0, vec![call.to_owned()]), "{line}");
    }
    assert_eq!(asked("slipstream __init -- -x").0, 42);
}

#[test]
fn what_comes_later_is_refused_before_the_engine_is_asked() {
    for line in [
        "slipstream migrate 7 me@b",
        "slipstream migrate 7 tcp://b:9 --key k --tree",
        "slipstream check 7 b",
    ] {
        assert_eq!(asked(line), (3, vec![]), "{line}");
    }
    assert_eq!(later(true, Some(&Destination::Ssh("b".into()))).len(), 2);
}

#[test]
fn an_agent_is_not_asked_without_a_key() {
    assert_eq!(asked("slipstream migrate 7 tcp://b:9"), (2, vec![]));
    assert_eq!(asked("slipstream check 7 tcp://b:9"), (2, vec![]));
}

#[test]
fn failures_decide_the_exit_code() {
    let codes = [
        (Outcome::Internal, 1),
        (Outcome::Refused, 3),
        (Outcome::RolledBack, 4),
        (Outcome::Waiting, 5),
        (Outcome::Lost, 6),
    ];
    for (outcome, code) in codes {
        let fake = Fake { fails: Some(outcome), ..Fake::default() };
        for line in ["slipstream migrate 7 tcp://b:9 --key k --json", "slipstream keygen f"] {
            assert_eq!(try_run(&fake, line), code, "{line}");
        }
    }
}

#[test]
fn check_says_by_its_exit_code_whether_something_stands_in_the_way() {
    let blocker = later(true, None);
    let fake = Fake { blockers: blocker, ..Fake::default() };
    assert_eq!(try_run(&fake, "slipstream check 7"), 3);
}

#[test]
fn manual_pages_exist_for_every_command() {
    let dir = std::env::temp_dir().join(format!("slipstream-man-{}", std::process::id()));
    assert_eq!(manual(Some(&dir)), 0);
    let names: Vec<String> = std::fs::read_dir(&dir)
        .expect("the directory")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    std::fs::remove_dir_all(&dir).expect("removed");
    for name in ["slipstream.1", "slipstream-migrate.1", "slipstream-keygen.1"] {
        assert!(names.contains(&name.to_owned()), "{name} is missing from {names:?}");
    }
    assert!(names.iter().all(|name| !name.contains("__")), "hidden commands in {names:?}");
}
