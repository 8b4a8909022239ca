//! The commands: each takes its arguments, asks the engine, says what came of it, and returns the exit code.

use crate::display::Screen;
use crate::engine::{Engine, MigrateRequest, Migration, Session};
use crate::events::block_signals;
use crate::flags::{
    AgentArgs, CheckArgs, Cli, Command, Destination, MigrateArgs, MigrationId, RecoverArgs,
};
use crate::report::{exit_code, failure_text};
use crate::tables;
use crate::watch::watch;
use anyhow::Context;
use clap::CommandFactory;
use slipstream_faultd::events::{Blocker, Event, Failed, Outcome, Preflight};
use std::io::{self, IsTerminal, Write};
use std::path::Path;

/// Wrong usage that only shows when options are seen together.
const EXIT_USAGE: u8 = 2;

/// Runs a command and returns its exit code.
pub fn run(engine: &dyn Engine, command: &Command) -> u8 {
    match command {
        Command::Agent(args) => agent(engine, args),
        Command::Migrate(args) => migrate(engine, args),
        Command::Check(args) => check(engine, args),
        Command::Status(args) => {
            let id = args.id.as_ref().map(|MigrationId(id)| id.as_str());
            end(engine.status(&args.run_dir, id), |all| {
                out(&if args.json { tables::status_json(&all) } else { tables::status_text(&all) });
            })
        }
        Command::Recover(args) => recover(engine, args),
        Command::Abort(args) => {
            end(engine.abort(&args.run_dir, &args.id.0), |text| out(&format!("{text}\n")))
        }
        Command::Keygen(args) => end(engine.keygen(&args.file), |()| {}),
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "slipstream", &mut io::stdout());
            0
        }
        Command::Man { dir } => manual(dir.as_deref()),
        Command::FailPoints => {
            engine.fail_points().iter().for_each(|point| out(&format!("{point}\n")));
            0
        }
        Command::SourceSession(p) => session(engine, Session::Source, &p.args),
        Command::DestinationSession(p) => session(engine, Session::Destination, &p.args),
        Command::Init(p) => session(engine, Session::Init, &p.args),
    }
}

fn agent(engine: &dyn Engine, args: &AgentArgs) -> u8 {
    // In one piece: who waits for this line would take a part of the address for the whole.
    let tell = |address| {
        let _ = io::stderr().write_all(format!("listening on {address}\n").as_bytes());
    };
    end(engine.agent(args, &mut |address| tell(address)), |()| {})
}

fn migrate(engine: &dyn Engine, args: &MigrateArgs) -> u8 {
    let blockers = later(args.tree, Some(&args.destination));
    if !blockers.is_empty() {
        return refuse(blockers, args.json);
    }
    match MigrateRequest::new(args) {
        Some(request) => follow(|| engine.migrate(&request), args.json),
        None => no_key(),
    }
}

fn recover(engine: &dyn Engine, args: &RecoverArgs) -> u8 {
    follow(|| engine.recover(&args.run_dir, &args.id.0), args.json)
}

fn check(engine: &dyn Engine, args: &CheckArgs) -> u8 {
    let blockers = later(false, args.destination.as_ref());
    if !blockers.is_empty() {
        return refuse(blockers, args.json);
    }
    if args.destination.is_some() && args.key.is_none() {
        return no_key();
    }
    let mut clear = true;
    let code = end(engine.check(args), |findings| {
        clear = tables::all_clear(&findings);
        out(&if args.json {
            tables::findings_json(&findings)
        } else {
            tables::findings_text(&findings, args.pid)
        });
    });
    if clear { code } else { exit_code(Outcome::Refused) }
}

fn session(engine: &dyn Engine, session: Session, args: &[std::ffi::OsString]) -> u8 {
    engine.session(session, args).unwrap_or_else(|failed| fail(&failed))
}

/// Starts a migration and shows it to its end.
fn follow(start: impl FnOnce() -> crate::engine::Result<Migration>, json: bool) -> u8 {
    // Blocked before anything is under way, so that no Ctrl-C falls between start and display.
    let signals = match block_signals() {
        Ok(signals) => signals,
        Err(error) => return fail(&internal(format!("blocking signals: {error}"))),
    };
    let migration = match start() {
        Ok(migration) => migration,
        Err(failed) => {
            if json {
                out(&(Event::Failed(failed.clone()).to_line() + "\n"));
            }
            return fail(&failed);
        }
    };
    let mut screen = screen(json);
    let mut stdout = io::stdout();
    let story = watch(migration, signals, &mut screen, json.then_some(&mut stdout as _));
    if let Some(summary) = story.summary().filter(|_| !json) {
        out(&summary);
    }
    if let Some(failure) = story.failure() {
        err(&failure);
    }
    story.exit_code()
}

/// A live line where someone sees it; never between the lines of JSON on the same terminal.
fn screen(json: bool) -> Screen {
    if json && io::stdout().is_terminal() {
        Screen::Quiet
    } else if io::stderr().is_terminal() {
        Screen::live()
    } else if json {
        Screen::Quiet
    } else {
        Screen::plain(Box::new(io::stderr()))
    }
}

/// What the command line allows and this version can't do yet.
fn later(tree: bool, destination: Option<&Destination>) -> Vec<Blocker> {
    let blocker = |object: &str, reason: &str, remedy: &str| Blocker {
        object: object.into(),
        reason: reason.into(),
        remedy: remedy.into(),
    };
    let mut blockers = Vec::new();
    if tree {
        let remedy = "leave --tree out and move a process that has no children";
        blockers.push(blocker("--tree", "this version moves single processes", remedy));
    }
    if let Some(Destination::Ssh(host)) = destination {
        let remedy = "run `slipstream agent` there and give tcp://HOST:PORT";
        let reason = "this version starts no receiver over ssh";
        blockers.push(blocker(&format!("destination {host}"), reason, remedy));
    }
    blockers
}

fn refuse(blockers: Vec<Blocker>, json: bool) -> u8 {
    let failed = Failed {
        phase: "preflight".into(),
        reason: blockers[0].reason.clone(),
        remedy: blockers[0].remedy.clone(),
        outcome: Outcome::Refused,
    };
    err(&failure_text(&failed, &blockers, None));
    if json {
        let events = [Event::Preflight(Preflight { blockers }), Event::Failed(failed)];
        out(&events.map(|event| event.to_line() + "\n").concat());
    }
    exit_code(Outcome::Refused)
}

fn no_key() -> u8 {
    err("slipstream: a tcp:// destination needs --key FILE, the same key as its agent's; \
         `slipstream keygen FILE` makes one\n");
    EXIT_USAGE
}

fn manual(dir: Option<&Path>) -> u8 {
    let write = || -> anyhow::Result<()> {
        let Some(dir) = dir else {
            return Ok(clap_mangen::Man::new(Cli::command()).render(&mut io::stdout())?);
        };
        std::fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        clap_mangen::generate_to(Cli::command(), dir)
            .with_context(|| format!("writing manual pages to {}", dir.display()))
    };
    match write() {
        Ok(()) => 0,
        Err(error) => fail(&internal(format!("{error:#}"))),
    }
}

fn end<T>(result: crate::engine::Result<T>, then: impl FnOnce(T)) -> u8 {
    match result {
        Ok(value) => {
            then(value);
            0
        }
        Err(failed) => fail(&failed),
    }
}

fn fail(failed: &Failed) -> u8 {
    err(&failure_text(failed, &[], None));
    exit_code(failed.outcome)
}

fn internal(reason: String) -> Failed {
    Failed { phase: "start".into(), reason, remedy: String::new(), outcome: Outcome::Internal }
}

/// Who stopped reading misses the text; the exit code still tells.
fn out(text: &str) {
    let mut stdout = io::stdout();
    if let Err(error) = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        tracing::debug!("writing to stdout: {error}");
    }
}

fn err(text: &str) {
    if let Err(error) = io::stderr().write_all(text.as_bytes()) {
        tracing::debug!("writing to stderr: {error}");
    }
}

#[cfg(test)]
mod tests;
