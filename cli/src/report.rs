//! What is known of a migration from its events, and what is said about it at the end.

use slipstream_faultd::events::{
    Blocker, Completed, Event, Failed, Figures, Frozen, Outcome, Progress, Resumed,
};
use std::fmt::Write;

/// Exit code of an outcome (`docs/design.md`, "The command line").
pub fn exit_code(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Internal => 1,
        Outcome::Refused => 3,
        Outcome::RolledBack => 4,
        Outcome::Waiting => 5,
        Outcome::Lost => 6,
    }
}

/// How it ended.
#[derive(Debug, PartialEq)]
pub enum End {
    /// With success.
    Completed(Box<Completed>),
    /// Without.
    Failed(Failed),
    /// The display was told to end while the migration goes on.
    Left,
}

/// What the events have told so far.
#[derive(Debug, Default)]
pub struct Story {
    /// The migration's name, once committed.
    pub committed: Option<String>,
    /// What stands in the way.
    pub blockers: Vec<Blocker>,
    /// What the freeze found.
    pub frozen: Option<Frozen>,
    /// That it runs at the destination, and the blackout.
    pub resumed: Option<Resumed>,
    /// The last word on how far it is.
    pub progress: Option<Progress>,
    /// How it ended.
    pub end: Option<End>,
}

impl Story {
    /// Takes in an event. Nothing that comes after an end changes it.
    pub fn see(&mut self, event: Event) {
        if self.end.is_some() {
            return;
        }
        match event {
            Event::Preflight(p) => self.blockers = p.blockers,
            Event::Frozen(f) => self.frozen = Some(f),
            Event::Committed(c) => self.committed = Some(c.id),
            Event::Resumed(r) => self.resumed = Some(r),
            Event::Progress(p) => self.progress = Some(p),
            Event::Completed(c) => self.end = Some(End::Completed(Box::new(c))),
            Event::Failed(f) => self.end = Some(End::Failed(f)),
            Event::Note(_) | Event::HostFact(_) | Event::Status(_) => {}
        }
    }

    /// The session is silent for good, or the display is to end: makes of what is known an end.
    pub fn close(&mut self) {
        if self.end.is_some() {
            return;
        }
        let failed = |reason: &str, remedy: String, outcome| {
            End::Failed(Failed {
                phase: self.phase().into(),
                reason: reason.into(),
                remedy,
                outcome,
            })
        };
        self.end = Some(if let Some(id) = &self.committed {
            let remedy = format!("`slipstream status {id}`, then `slipstream recover {id}`");
            failed("the source session ended before the last page", remedy, Outcome::Waiting)
        } else if self.blockers.is_empty() {
            let remedy = "see `slipstream status` whether it was committed".into();
            failed("the source session ended without saying how it went", remedy, Outcome::Internal)
        } else {
            failed("the process can't be moved", String::new(), Outcome::Refused)
        });
    }

    /// The phase the last event belongs to.
    pub fn phase(&self) -> &str {
        match &self.progress {
            Some(progress) => &progress.phase,
            None if self.resumed.is_some() => "drain",
            None if self.committed.is_some() => "commit",
            None if self.frozen.is_some() => "restore",
            None => "preflight",
        }
    }

    /// The exit code, once there is an end; 1 before.
    pub fn exit_code(&self) -> u8 {
        match &self.end {
            Some(End::Completed(_)) => 0,
            Some(End::Failed(failed)) => exit_code(failed.outcome),
            Some(End::Left) if self.committed.is_some() => exit_code(Outcome::Waiting),
            Some(End::Left) | None => exit_code(Outcome::Internal),
        }
    }

    /// What is said on stdout at the end of a migration that succeeded.
    pub fn summary(&self) -> Option<String> {
        let Some(End::Completed(completed)) = &self.end else { return None };
        let mut text = headline(self, completed);
        if let Some(resumed) = &self.resumed {
            blackout(&mut text, resumed);
        }
        drain(&mut text, completed);
        Some(text)
    }

    /// What is said on stderr at the end of one that did not: a line for each thing to know.
    pub fn failure(&self) -> Option<String> {
        match self.end.as_ref()? {
            End::Completed(_) => None,
            End::Left => Some(match &self.committed {
                Some(id) => format!(
                    "slipstream: the migration goes on without this display; \
                     see `slipstream status {id}`\n"
                ),
                None => "slipstream: left before it was known how the migration ends; \
                         see `slipstream status`\n"
                    .into(),
            }),
            End::Failed(failed) => {
                Some(failure_text(failed, &self.blockers, self.committed.as_deref()))
            }
        }
    }
}

fn headline(story: &Story, completed: &Completed) -> String {
    let id = story.committed.as_deref().unwrap_or("unnamed");
    let end = if completed.exited { ", and ended by itself before its last page came" } else { "" };
    match &story.resumed {
        Some(resumed) => format!("migration {id}: moved, PID {} there{end}\n", resumed.dest_pid),
        None => format!("migration {id}: completed{end}\n"),
    }
}

fn blackout(text: &mut String, resumed: &Resumed) {
    let whole_us = resumed.blackout_us;
    row(text, "blackout", &duration(whole_us));
    let parts = &resumed.blackout_parts;
    let named = [
        ("  freeze", parts.freeze_us),
        ("  capture", parts.capture_us),
        ("  send", parts.send_us),
        ("  restore", parts.restore_us),
        ("  commit", parts.commit_us),
    ];
    let rest_us = whole_us.saturating_sub(named.iter().map(|(_, us)| us).sum());
    for (name, us) in named.into_iter().chain([("  between", rest_us)]) {
        let percent = 100.0 * us as f64 / whole_us.max(1) as f64;
        row(text, name, &format!("{:>9}  {percent:>3.0} %", duration(us)));
    }
}

fn drain(text: &mut String, completed: &Completed) {
    let f = &completed.figures;
    let pages = format!("{} of {} pages", grouped(f.pages_present), grouped(f.pages_total));
    let mut carrier = completed.transport.clone();
    if completed.rdma_bytes > 0 && completed.rdma_bytes < f.bytes {
        carrier = format!("rdma, {} of it over tcp", size(f.bytes - completed.rdma_bytes));
    }
    let rate = format!("{}, {} over {carrier}", size(f.bytes), rate(f.mb_per_s));
    row(text, "drain", &format!("{:>9}  {pages}, {rate}", duration(completed.drain_us)));
    if !completed.why_tcp.is_empty() {
        row(text, "why tcp", &completed.why_tcp);
    }
    row(text, "faults", &format!("{:>9}  {}", grouped(f.faults), fault_figures(f)));
    row(text, "total", &duration(completed.total_us));
}

fn row(text: &mut String, name: &str, value: &str) {
    // Values of one column only are right-aligned with the first column of the others.
    writeln!(text, "  {name:<12}{value:>9}").expect("a String takes everything");
}

/// The text of a failure: a line for each blocker, or one with the reason.
pub fn failure_text(failed: &Failed, blockers: &[Blocker], id: Option<&str>) -> String {
    let mut text = String::new();
    if failed.outcome == Outcome::Refused && !blockers.is_empty() {
        for b in blockers {
            let line = format!("{}: {}", b.object, b.reason);
            text.push_str(&error_line("refused", &line, &b.remedy));
        }
        if blockers.len() > 1 {
            let count = blockers.len();
            text.push_str(&error_line(
                "refused",
                &format!("{count} blockers"),
                "the process was not touched",
            ));
        }
        return text;
    }
    let (what, remedy) = match failed.outcome {
        Outcome::Refused => ("refused".to_owned(), String::new()),
        Outcome::RolledBack => ("rolled back, the process runs on here".to_owned(), String::new()),
        Outcome::Waiting => (
            "committed, waiting for recovery".to_owned(),
            id.map(|id| format!("`slipstream recover {id}`")).unwrap_or_default(),
        ),
        Outcome::Lost => ("the process is lost".to_owned(), String::new()),
        Outcome::Internal => ("internal error".to_owned(), String::new()),
    };
    let remedy = if failed.remedy.is_empty() { &remedy } else { &failed.remedy };
    // A refusal names its object; the phase would only stand in the way of reading it.
    let reason = match failed.outcome {
        Outcome::Refused => failed.reason.clone(),
        _ => failed.to_string(),
    };
    error_line(&what, &reason, remedy)
}

/// One line, whatever the parts hold: a file's name may hold a newline or an escape sequence.
fn error_line(what: &str, reason: &str, remedy: &str) -> String {
    let semicolon = if remedy.is_empty() { "" } else { "; " };
    format!("{}\n", one_line(&format!("slipstream: {what}: {reason}{semicolon}{remedy}")))
}

/// The text with everything a terminal could take for a command made visible.
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Faults a second and how long they take, or nothing when there were none.
pub fn fault_figures(f: &Figures) -> String {
    if f.faults == 0 {
        return String::new();
    }
    format!(
        "{:.0} faults/s  p50 {}  p99 {}",
        f.faults_per_s,
        duration(f.fault_us_p50),
        duration(f.fault_us_p99)
    )
}

/// A time with three digits or so.
pub fn duration(us: u64) -> String {
    let us_f = us as f64;
    match us {
        0..1_000 => format!("{us} us"),
        1_000..10_000 => format!("{:.2} ms", us_f / 1e3),
        10_000..100_000 => format!("{:.1} ms", us_f / 1e3),
        100_000..1_000_000 => format!("{:.0} ms", us_f / 1e3),
        1_000_000..100_000_000 => format!("{:.2} s", us_f / 1e6),
        _ => format!("{:.0} s", us_f / 1e6),
    }
}

/// Bytes, in powers of ten like the rates.
pub fn size(bytes: u64) -> String {
    let b = bytes as f64;
    match bytes {
        0..1_000_000 => format!("{:.0} kB", b / 1e3),
        1_000_000..1_000_000_000 => format!("{:.0} MB", b / 1e6),
        _ => format!("{:.2} GB", b / 1e9),
    }
}

/// A rate, from 10^6 bytes a second.
pub fn rate(mb_per_s: f64) -> String {
    format!("{mb_per_s:.0} MB/s")
}

/// A number with its thousands apart.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
