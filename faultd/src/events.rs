//! What a migration tells whoever watches it: one JSON object a line.
//!
//! The source session writes these lines, the display reads them, and `--json` hands them on as they
//! are. Every object has `"v":1` and `"event"`. Fields may be added; none changes its meaning while
//! the version stays.
//!
//! Units: `_us` are microseconds, `_s` seconds, `mb_per_s` is 10^6 bytes a second, `bytes` are bytes of
//! page data that arrived, pages are the process's pages of 4 KiB (hugetlb: of their own size).

use serde::{Deserialize, Serialize};

/// Version of the lines, the `"v"` of each.
pub const VERSION: u32 = 1;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// What both hosts looked at before the freeze, and everything that stands in the way.
    Preflight(Preflight),
    /// All threads are stopped.
    Frozen(Frozen),
    /// From here on only the destination copy may run.
    Committed(Committed),
    /// The destination copy runs.
    Resumed(Resumed),
    /// How far it is.
    Progress(Progress),
    /// The last page is in, or the process ended; nothing of Slipstream is left in it.
    Completed(Completed),
    /// The migration, or this attempt at it, is over without success.
    Failed(Failed),
    /// Something worth a line that changes nothing.
    Note(Note),
    /// One finding of `slipstream check` about this host.
    HostFact(HostFact),
    /// One line of `slipstream status`.
    Status(Status),
}

/// Everything that stands in the way; empty when nothing does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Preflight {
    /// What stands in the way.
    pub blockers: Vec<Blocker>,
}

/// One reason why a process can't be moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// The thing: `fd 7`, `mapping 7f..`, `thread 4712`, `destination`.
    pub object: String,
    /// Why it can't be moved.
    pub reason: String,
    /// What to do about it.
    pub remedy: String,
}

/// What the freeze found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// Threads stopped.
    pub threads: u64,
    /// Mappings of the address space.
    pub mappings: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

/// The migration's name, for `status`, `recover` and `abort`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// The migration's name.
    pub id: String,
}

/// The destination copy runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// The process's PID as the destination host sees it.
    pub dest_pid: i32,
    /// From the last instruction on the source to the first on the destination.
    pub blackout_us: u64,
    /// Where that time went.
    pub blackout_parts: BlackoutParts,
}

/// Where the time of the blackout went. What the parts leave over is waiting between them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlackoutParts {
    /// Stopping all threads.
    pub freeze_us: u64,
    /// Reading the manifest.
    pub capture_us: u64,
    /// Sending the manifest and the pages that go with it.
    pub send_us: u64,
    /// Restoring on the destination.
    pub restore_us: u64,
    /// Stopping the source copy for good, and the exchange that lets the destination run.
    pub commit_us: u64,
    /// Bytes that were sent meanwhile: the manifest, with the pages that go with it.
    #[serde(default)]
    pub state_bytes: u64,
}

/// Figures that progress and the end of a migration share.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Pages that arrived, or need not come any more because the process discarded them.
    pub pages_present: u64,
    /// Pages the process had when it was frozen.
    pub pages_total: u64,
    /// Bytes of page data that arrived.
    pub bytes: u64,
    /// Touches of missing pages that raised a fault.
    pub faults: u64,
    /// Median time from such a touch to the page's arrival.
    pub fault_us_p50: u64,
    /// 99th percentile of it.
    pub fault_us_p99: u64,
    /// Page data arriving: since the last event in `progress`, over the whole drain in `completed`.
    pub mb_per_s: f64,
    /// Faults a second, over the same time.
    pub faults_per_s: f64,
}

/// How far it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// `preflight`, `prepare`, `freeze`, `restore`, `commit`, `drain`, `waiting`.
    pub phase: String,
    /// The figures so far.
    #[serde(flatten)]
    pub figures: Figures,
    /// Time left, when it can be guessed.
    #[serde(default)]
    pub eta_s: Option<f64>,
}

/// Where the time of faults went, at the destination.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultParts {
    /// From reading the event to the waking of the thread.
    pub whole: FaultPart,
    /// From reading the event to asking for the page.
    pub ask: FaultPart,
    /// From there to the page's arrival.
    pub network: FaultPart,
    /// From there to the waking of the thread.
    pub install: FaultPart,
}

/// How long a part of the faults took.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultPart {
    /// Median.
    pub us_p50: f64,
    /// 99th percentile.
    pub us_p99: f64,
    /// Upper ends of buckets, each with the number of faults in it; ascending, empty buckets left out.
    pub histogram_us: Vec<(f64, u64)>,
}

/// What a drain cost the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceCost {
    /// Processor time of the session, and of the frozen copy which registers its memory, from the commit on.
    pub cpu_us: u64,
    /// Of that, what registering took.
    pub registration_cpu_us: u64,
    /// Bytes that were registered for RDMA.
    pub registered_bytes: u64,
}

/// The end of a migration that succeeded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Completed {
    /// The figures of the whole drain.
    #[serde(flatten)]
    pub figures: Figures,
    /// From the command to the last page.
    pub total_us: u64,
    /// From resume to the last page.
    pub drain_us: u64,
    /// What carried the pages: `tcp`, or `rdma` if any were read so.
    pub transport: String,
    /// Why not RDMA, or not RDMA alone; empty when nothing stood against it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why_tcp: String,
    /// Bytes that were read by RDMA.
    #[serde(default)]
    pub rdma_bytes: u64,
    /// Where the time of faults went.
    #[serde(default)]
    pub fault_parts: FaultParts,
    /// What it cost the source.
    #[serde(default)]
    pub source: SourceCost,
    /// The process ended by itself before the last page was in.
    pub exited: bool,
}

/// What an attempt that did not succeed leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing was done; the process was not touched.
    Refused,
    /// The process runs on at the source.
    RolledBack,
    /// Committed; the process waits for pages until the migration is recovered.
    Waiting,
    /// Neither copy can go on.
    Lost,
    /// Slipstream itself is at fault, or what is left is not known.
    Internal,
}

/// Why and where it failed, and what is left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{phase}: {reason}")]
pub struct Failed {
    /// The phase it failed in.
    pub phase: String,
    /// Why, naming the object.
    pub reason: String,
    /// What to do about it; empty when there is nothing to be done.
    #[serde(default)]
    pub remedy: String,
    /// What is left.
    pub outcome: Outcome,
}

/// Something worth a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// One line of text.
    pub text: String,
}

/// One finding about this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostFact {
    /// What was looked at.
    pub name: String,
    /// False when no process can be moved from or to this host because of it.
    pub ok: bool,
    /// What was found.
    pub detail: String,
    /// Of the transport, if it is RDMA: how long the destination took to read a page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_us: Option<ReadTimes>,
}

/// How long READs of a page took, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReadTimes {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
}

/// A side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The process leaves this host.
    Source,
    /// The process comes to this host.
    Destination,
}

/// A migration or moved process of this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The migration's name.
    pub id: String,
    /// Which side of it this host is.
    pub role: Role,
    /// As in [`Progress::phase`], or `completed`, `exited`, `lost`.
    pub phase: String,
    /// The process's PID on this host, if it has one here.
    #[serde(default)]
    pub pid: Option<i32>,
    /// The other host.
    pub peer: String,
    /// Figures of the drain, once it began.
    #[serde(default)]
    pub figures: Option<Figures>,
    /// More in words: exit status, why it waits, what to do.
    #[serde(default)]
    pub detail: String,
}

/// Why a line is not an event.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// It is not JSON, or no event this version knows.
    #[error("not an event: {0}")]
    Json(#[from] serde_json::Error),
    /// It is an event of another version.
    #[error("event of version {0}, this is version {VERSION}")]
    Version(u32),
}

#[derive(Serialize)]
struct LineOut<'a> {
    v: u32,
    #[serde(flatten)]
    event: &'a Event,
}

/// `amount` a second when it took `elapsed_us`; zero when it took no time, so that it is always a
/// number JSON can hold.
pub fn per_second(amount: f64, elapsed_us: u64) -> f64 {
    if elapsed_us == 0 { 0.0 } else { amount * 1e6 / elapsed_us as f64 }
}

impl Event {
    /// The event as one line of JSON, without the newline.
    ///
    /// # Panics
    /// Never: events are structs of numbers and strings, which JSON can hold.
    pub fn to_line(&self) -> String {
        serde_json::to_string(&LineOut { v: VERSION, event: self }).expect("events are plain data")
    }

    /// Reads a line.
    pub fn parse(line: &str) -> Result<Self, LineError> {
        #[derive(Deserialize)]
        struct Head {
            v: u32,
        }
        let head: Head = serde_json::from_str(line)?;
        if head.v != VERSION {
            return Err(LineError::Version(head.v));
        }
        Ok(serde_json::from_str(line)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_documented_shape() {
        let event = Event::Progress(Progress {
            phase: "drain".into(),
            figures: Figures { pages_present: 3, pages_total: 9, ..Figures::default() },
            eta_s: None,
        });
        let value: serde_json::Value = serde_json::from_str(&event.to_line()).expect("JSON");
        assert_eq!(value["v"], 1);
        assert_eq!(value["event"], "progress");
        assert_eq!(value["pages_total"], 9);
        assert!(value["eta_s"].is_null());
        assert_eq!(Event::parse(&event.to_line()).expect("round trip"), event);
    }

    #[test]
    fn every_event_survives_the_round_trip() {
        let figures = Figures { mb_per_s: 12.5, bytes: u64::MAX, ..Figures::default() };
        let events = [
            Event::Preflight(Preflight {
                blockers: vec![Blocker {
                    object: "fd 7".into(),
                    reason: "a \"socket\"\n".into(),
                    remedy: "close it".into(),
                }],
            }),
            Event::Frozen(Frozen { threads: 1, mappings: 2, descriptors: 3 }),
            Event::Committed(Committed { id: "a1".into() }),
            Event::Resumed(Resumed {
                dest_pid: 4,
                blackout_us: 5,
                blackout_parts: BlackoutParts { freeze_us: 1, ..BlackoutParts::default() },
            }),
            Event::Completed(Completed {
                figures: figures.clone(),
                total_us: 9,
                drain_us: 8,
                transport: "tcp".into(),
                why_tcp: String::new(),
                rdma_bytes: 0,
                fault_parts: FaultParts {
                    ask: FaultPart { us_p50: 0.5, us_p99: 2.0, histogram_us: vec![(0.6, 7)] },
                    ..FaultParts::default()
                },
                source: SourceCost { cpu_us: 3, ..SourceCost::default() },
                exited: false,
            }),
            Event::Failed(Failed {
                phase: "freeze".into(),
                reason: "r".into(),
                remedy: String::new(),
                outcome: Outcome::RolledBack,
            }),
            Event::Note(Note { text: "n".into() }),
            Event::HostFact(HostFact {
                name: "n".into(),
                ok: true,
                detail: "d".into(),
                read_us: Some(ReadTimes { p50: 1.5, p99: 2.0 }),
            }),
            Event::Status(Status {
                id: "a1".into(),
                role: Role::Source,
                phase: "drain".into(),
                pid: Some(7),
                peer: "h".into(),
                figures: Some(figures),
                detail: String::new(),
            }),
        ];
        for event in events {
            let line = event.to_line();
            assert!(!line.contains('\n'), "one line: {line}");
            assert_eq!(Event::parse(&line).expect("round trip"), event);
        }
    }

    #[test]
    fn other_versions_and_garbage_are_told_apart() {
        assert!(matches!(Event::parse(r#"{"v":2,"event":"thing"}"#), Err(LineError::Version(2))));
        assert!(matches!(Event::parse("nonsense"), Err(LineError::Json(_))));
        assert!(matches!(Event::parse(r#"{"v":1,"event":"thing"}"#), Err(LineError::Json(_))));
    }
}
