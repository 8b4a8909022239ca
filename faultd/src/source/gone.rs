//! A committed migration whose frozen copy is gone: dropped after the last page by a session that died then, or
//! destroyed before. Only the destination knows which, so it is asked for as long as it takes.

use crate::control::say_to_destination;
use crate::error::{Error, Result};
use crate::events::{self, Event, Outcome as End, Role, SourceCost, Status};
use crate::protocol::{Empty, Outcome, SourceMessage};
use crate::rundir::MigrationDir;
use crate::source::afterwards::{ask, paused_since};
use crate::source::figures::completed;
use crate::source::record::Record;
use slipstream_transport::Key;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(1);

/// Asks the destination what has become of the process, and tells it that no page will come any more.
pub fn settle(
    record: &Record,
    dir: MigrationDir,
    key: &Key,
    started: Instant,
    sink: &mut dyn FnMut(Event),
) -> Result<()> {
    let mut since = None;
    let (mut sender, outcome) = loop {
        match ask(record, key, true) {
            Ok((sender, _, outcome)) => break (sender, outcome),
            Err(e) => {
                let text = format!("the copy here is gone; {}: {e}", paused_since(&mut since));
                write_status(&dir, record, "waiting", &text);
                std::thread::sleep(PAUSE);
            }
        }
    };
    if let Outcome { completed: Some(done), .. } = outcome {
        let _ = say_to_destination(&mut sender, SourceMessage::Bye(Empty {}));
        dir.remove();
        sink(Event::Completed(completed(
            &done,
            started.elapsed().as_micros() as u64,
            String::new(),
            SourceCost::default(),
        )));
        return Ok(());
    }
    let reason = match outcome.lost.as_str() {
        "" => "the frozen copy was destroyed, and the destination's never runs",
        at_the_destination => at_the_destination,
    };
    Err(lost(record, &dir, reason, sink))
}

/// Says that the process is lost.
pub fn lost(
    record: &Record,
    dir: &MigrationDir,
    reason: &str,
    sink: &mut dyn FnMut(Event),
) -> Error {
    write_status(dir, record, "lost", reason);
    sink(Event::Failed(events::Failed {
        phase: "drain".into(),
        reason: reason.into(),
        remedy: String::new(),
        outcome: End::Lost,
    }));
    Error::Lost
}

fn write_status(dir: &MigrationDir, record: &Record, phase: &str, detail: &str) {
    let status = Status {
        id: record.id.clone(),
        role: Role::Source,
        phase: phase.to_owned(),
        pid: record.pid(),
        peer: record.destination.clone(),
        figures: None,
        detail: detail.to_owned(),
    };
    if let Err(e) = dir.write_status(&status) {
        tracing::warn!("{e}");
    }
}
