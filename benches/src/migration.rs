//! One `slipstream migrate --json`, with the time each of its events came.

use crate::lab::{Lab, Program};
use crate::memory::{self, Peaks};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use slipstream_core::sys::task::monotonic_ns;
use std::io::{BufRead, BufReader};
use std::process::Child;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A migration that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(180);
/// Between looks at the memory of Slipstream's processes: rare, for they cost time on the cores that are measured.
const LOOK: Duration = Duration::from_millis(50);

/// What was said while a process was moved.
pub struct Migration {
    /// When the harness heard that the process had resumed, `CLOCK_MONOTONIC`.
    pub resumed_at_ns: i64,
    /// The event.
    pub resumed: Value,
    /// The event.
    pub completed: Value,
    /// Peaks of the processes that took part.
    pub peaks: Peaks,
}

/// Moves the program, and gives it the PID it has afterwards.
pub fn migrate(lab: &Lab, program: &mut Program) -> Result<Migration> {
    let mut child = lab.migrate(program.pid)?.spawn().context("starting slipstream migrate")?;
    let result = follow(lab, program, &mut child);
    if result.is_err() {
        // A display that ended by itself is no error here.
        let _ = child.kill();
    }
    let status = child.wait().context("waiting for slipstream migrate")?;
    let migration = result?;
    if !status.success() {
        bail!("slipstream migrate: {status}: {}", lab.log("migrate.log"));
    }
    Ok(migration)
}

fn follow(lab: &Lab, program: &mut Program, child: &mut Child) -> Result<Migration> {
    let output = child.stdout.take().context("the output of slipstream migrate")?;
    let (to, events) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
            if to.send((monotonic_ns(), line)).is_err() {
                return;
            }
        }
    });
    let began = Instant::now();
    let mut peaks = Peaks::new();
    let mut resumed = None;
    loop {
        let (at_ns, line) = match events.recv_timeout(LOOK) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) if began.elapsed() < LIMIT => {
                memory::look(&mut peaks);
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {
                bail!("not over after {} s", LIMIT.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => {
                bail!("slipstream migrate ended early: {}", lab.log("migrate.log"))
            }
        };
        let event: Value = serde_json::from_str(&line).with_context(|| format!("event {line}"))?;
        match event["event"].as_str() {
            Some("resumed") => {
                program.pid = event["dest_pid"].as_i64().context("dest_pid")? as i32;
                resumed = Some((at_ns, event));
            }
            Some("completed") => {
                memory::look(&mut peaks);
                let (resumed_at_ns, resumed) = resumed.context("completed, but never resumed")?;
                return Ok(Migration { resumed_at_ns, resumed, completed: event, peaks });
            }
            Some("failed") => bail!("failed: {line}"),
            _ => {}
        }
    }
}
