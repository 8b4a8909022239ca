//! A running `slipstream migrate --json`, its events, and how it ended.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;

use crate::build;
use crate::far::Far;
use crate::hosts::{Hosts, SharedChild, Side};
use crate::process::Moved;
use crate::wait::{self, LIMIT};

/// Exit codes of `slipstream migrate`.
pub mod code {
    /// Moved, all pages present.
    pub const COMPLETED: i32 = 0;
    /// Wrong arguments.
    pub const USAGE: i32 = 2;
    /// Refused, the source untouched.
    pub const REFUSED: i32 = 3;
    /// Rolled back, running on the source.
    pub const ROLLED_BACK: i32 = 4;
    /// Committed, waiting for recovery.
    pub const WAITING: i32 = 5;
    /// Gone.
    pub const LOST: i32 = 6;
}

/// A migration under way.
pub struct Migration {
    child: SharedChild,
    events: Arc<Mutex<Vec<Value>>>,
    reader: std::thread::JoinHandle<()>,
    log: PathBuf,
    far: Option<Far>,
}

impl Migration {
    /// Starts moving `pid` to `destination`, a `tcp://HOST:PORT`; `adjust` may add arguments and environment.
    pub fn start(
        hosts: &Hosts,
        pid: i32,
        destination: &str,
        adjust: impl FnOnce(&mut Command),
    ) -> Self {
        Self::start_on(hosts, Side::Source, pid, destination, adjust)
    }

    /// The same from either host.
    pub fn start_on(
        hosts: &Hosts,
        side: Side,
        pid: i32,
        destination: &str,
        adjust: impl FnOnce(&mut Command),
    ) -> Self {
        let log = hosts.path().join(hosts.unique("migrate") + ".log");
        let mut command = hosts.host(side).command(build::slipstream());
        command
            .args(["migrate", &pid.to_string(), destination, "--json", "--key"])
            .arg(hosts.key());
        command
            .arg("--run-dir")
            .arg(hosts.run_dir(side))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let more = std::env::var("SLIPSTREAM_TEST_MIGRATE_ARGUMENTS").unwrap_or_default();
        command.args(more.split_whitespace());
        adjust(&mut command);
        let child = hosts.spawn(&mut command, &log);
        let stdout = child
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .stdout
            .take()
            .expect("a piped output");
        let events = Arc::<Mutex<Vec<Value>>>::default();
        let sink = Arc::clone(&events);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // What is no JSON is kept as a string, and found when the events are checked.
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                sink.lock().unwrap_or_else(PoisonError::into_inner).push(event);
            }
        });
        Self { child, events, reader, log, far: hosts.host(Side::Destination).far().cloned() }
    }

    /// Whether `slipstream migrate` has ended.
    pub fn ended(&self) -> bool {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.try_wait().expect("waiting for migrate").is_some()
    }

    /// An event, if it has been told.
    pub fn find(&self, event: &str) -> Option<Value> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().find(|value| value["event"] == event).cloned()
    }

    /// The PID of the migrating process itself.
    pub fn pid(&self) -> i32 {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).id() as i32
    }

    /// Waits for an event; panics if the migration ends without it.
    pub fn wait_event(&self, event: &str) -> Value {
        wait::until(&format!("the event {event}"), LIMIT, || {
            let ended = self
                .child
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .try_wait()
                .expect("waiting for migrate");
            let found = self.find(event);
            let log = || std::fs::read_to_string(&self.log).unwrap_or_default();
            assert!(
                found.is_some() || ended.is_none() || !self.reader.is_finished(),
                "no event {event}; it ended: {ended:?}\n{}",
                log()
            );
            found
        })
    }

    /// Waits until the process runs at the destination.
    pub fn wait_resumed(&self) -> Moved {
        moved(&self.wait_event("resumed"), self.far.as_ref())
    }

    /// Sends `slipstream migrate` a signal.
    pub fn signal(&self, signal: i32) {
        if let Some(process) = crate::process::Pidfd::open(self.pid()) {
            process.signal(signal);
        }
    }

    /// Waits for the end.
    pub fn wait(self) -> Outcome {
        self.wait_at_most(LIMIT)
    }

    /// Waits for the end, which has to come soon.
    pub fn wait_at_most(self, limit: Duration) -> Outcome {
        let status = wait::until("slipstream migrate to end", limit, || {
            self.child
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .try_wait()
                .expect("waiting for migrate")
        });
        // Its children may hold the pipe a little longer than it.
        wait::until("the last event", Duration::from_secs(20), || {
            self.reader.is_finished().then_some(())
        });
        let events =
            std::mem::take(&mut *self.events.lock().unwrap_or_else(PoisonError::into_inner));
        let errors = std::fs::read_to_string(&self.log).unwrap_or_default();
        let outcome = Outcome { code: status.code(), events, errors, far: self.far };
        outcome.check_form();
        outcome
    }
}

fn moved(resumed: &Value, far: Option<&Far>) -> Moved {
    let pid = resumed["dest_pid"].as_i64().unwrap_or_else(|| panic!("no dest_pid in {resumed}"));
    Moved::new(pid as i32, far)
}

/// How a migration ended.
#[derive(Debug)]
pub struct Outcome {
    /// The exit code; `None` if it died of a signal.
    pub code: Option<i32>,
    /// All events, in order.
    pub events: Vec<Value>,
    /// What it said on standard error.
    pub errors: String,
    far: Option<Far>,
}

impl Outcome {
    /// Every line has to be an object with version and name.
    fn check_form(&self) {
        for event in &self.events {
            assert!(event["v"] == 1 && event["event"].is_string(), "not an event: {event}");
        }
    }

    /// The first event of a name.
    pub fn event(&self, name: &str) -> Option<&Value> {
        self.events.iter().find(|event| event["event"] == name)
    }

    /// Panics unless everything went well; returns where the process is now.
    pub fn assert_completed(&self) -> Moved {
        assert_eq!(self.code, Some(code::COMPLETED), "{self:#?}");
        for name in ["frozen", "committed", "resumed", "completed"] {
            assert!(self.event(name).is_some(), "no event {name}: {self:#?}");
        }
        moved(self.event("resumed").expect("just seen"), self.far.as_ref())
    }

    /// Panics unless it was refused with one line for each reason, every word of `words` in them.
    pub fn assert_refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(self.event("frozen").is_none(), "frozen, and then refused: {self:#?}");
        let said = format!("{}\n{:?}", self.errors, self.events).to_lowercase();
        for word in words {
            assert!(said.contains(&word.to_lowercase()), "{word:?} is not in: {said}");
        }
        assert!(!self.errors.contains("panicked"), "{}", self.errors);
    }
}
