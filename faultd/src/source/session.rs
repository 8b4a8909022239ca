//! The source session: one migration, from preflight to the end of the frozen copy.
//!
//! It runs in a process and session of its own, so that a closed terminal ends only the display. All
//! ptrace requests come from the thread that calls [`run`].

use crate::carrier::Carrier;
use crate::cgroup;
use crate::clocks;
use crate::commit_protocol::{self, Heard, Journal, Next};
use crate::control::{hear_destination, say_to_destination, unexpected};
use crate::error::{Error, Result};
use crate::events::{self, BlackoutParts, Event, Outcome, Role, Status};
use crate::failpoints;
use crate::protocol::{DestinationMessage, Empty, Reason, SourceMessage, Verdict};
use crate::rundir::{self, MigrationDir};
use crate::source::afterwards::{Afterwards, Live};
use crate::source::commit;
use crate::source::cost::Meter;
use crate::source::interrupt::Interrupts;
use crate::source::local::{self, Local};
use crate::source::opening::{self, Connections, Hindrance, destination_blocker, event_blocker};
use crate::source::page_server::PageServers;
use crate::source::presend::{Captured, Presender};
use crate::source::rdma::{Agreed, SharedSender};
use crate::source::record::Record;
use prost::Message;
use slipstream_core::capture::files::StdioPolicy;
use slipstream_core::capture::frozen_memory::FrozenMemory;
use slipstream_core::capture::state::signals::Watch;
use slipstream_core::freeze::Frozen;
use slipstream_core::inject::SourceScratch;
use slipstream_core::manifest::Manifest;
use slipstream_core::proc::claim::Claim;
use slipstream_core::sys::pidfd::PidFd;
use slipstream_core::sys::task::Haste;
use slipstream_transport::{Channel, Key, resolve};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a migration is asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceConfig {
    /// The process, as this host sees it.
    pub pid: i32,
    /// `HOST:PORT` of the agent.
    pub destination: String,
    /// Key file.
    pub key: PathBuf,
    /// Run directory.
    pub run_dir: PathBuf,
    /// Standard streams.
    pub stdio: StdioPolicy,
    /// What shall carry the pages.
    pub carrier: Carrier,
    /// Most that prefetch may take, in bytes a second; zero for no limit.
    pub prefetch_limit: u64,
    /// Bound on connecting, each handshake, the freeze, and the destination's preparations.
    pub timeout: Duration,
}

/// Where events go. Nobody may be listening any more; that is no error.
pub type Sink<'a> = &'a mut dyn FnMut(Event);

/// Runs a migration and reports its end as an event.
pub fn run(config: &SourceConfig, interrupts: &Interrupts, sink: Sink) {
    let mut session = Session {
        config,
        interrupts,
        started: Instant::now(),
        phase: "preflight",
        committed: false,
        sink,
    };
    if let Err(e) = session.run() {
        let failed = session.failure(&e);
        (session.sink)(Event::Failed(failed));
    }
}

struct Session<'a> {
    config: &'a SourceConfig,
    interrupts: &'a Interrupts,
    started: Instant,
    phase: &'static str,
    /// The commit message may have left.
    committed: bool,
    sink: Sink<'a>,
}

/// The frozen process, its manifest sent, the destination ready.
struct AtTheBrink {
    frozen: Frozen,
    signals: Watch,
    memory: Arc<FrozenMemory>,
    servers: PageServers,
    parts: BlackoutParts,
    frozen_at: Instant,
    haste: Haste,
    /// Told after the blackout.
    report: Event,
}

/// The commit has left. Whether the destination has said that its copy runs:
struct Past {
    memory: Arc<FrozenMemory>,
    servers: PageServers,
    journal: Journal,
}

/// What is there before the freeze, and the route of the migration.
type Ahead<'a> = (Connections, SourceScratch, Presender<'a>, Vec<u8>);

impl<'a> Session<'a> {
    fn run(&mut self) -> Result<()> {
        let pid = self.config.pid;
        let (mut local, _claim) = self.preflight()?;
        let process = PidFd::open(pid)?;
        let id = rundir::new_id()?;
        let dir = MigrationDir::create(&self.config.run_dir, Role::Source, &id)?;
        let _group = cgroup::enter(&id);
        self.write_status(&dir, &id, "prepare", None);
        let prepared = self.before_freeze(&mut local, &id);
        let (mut link, scratch, mut presender, route) = match prepared {
            Ok(prepared) => prepared,
            Err(e) => {
                dir.remove();
                return Err(e);
            }
        };
        let mut record = match self.record(&id, &scratch, route, &link.lanes) {
            Ok(record) => record,
            Err(e) => {
                dir.remove();
                return self.roll_back(&mut link, scratch, e);
            }
        };
        let moved =
            self.move_state(&mut link, &scratch, &mut local, &mut presender, &dir, &mut record);
        let brink = match moved {
            Ok(brink) => brink,
            Err(e) => {
                dir.remove();
                return self.roll_back(&mut link, scratch, e);
            }
        };
        match self.commit(&mut link, brink, &scratch, &process, &dir, &record) {
            Ok(past) => {
                // What was kept to compare pages with is of no more use.
                drop(presender);
                self.see_through(link, scratch, dir, record, past)
            }
            Err(e) => {
                dir.remove();
                self.roll_back(&mut link, scratch, e)
            }
        }
    }

    /// Past the commit: the drain, however often connections break, or the way back.
    fn see_through(
        &mut self,
        link: Connections,
        scratch: SourceScratch,
        dir: MigrationDir,
        record: Record,
        past: Past,
    ) -> Result<()> {
        let resumed = past.journal == Journal::Committed;
        if resumed {
            self.enter("drain");
        }
        let Connections { sender, receiver, key, rdma: Agreed { source, why_tcp, .. }, .. } = link;
        let live = resumed.then(|| Live {
            sender: SharedSender::new(sender),
            receiver,
            servers: past.servers,
            rdma: source.map(Arc::new),
        });
        let after = Afterwards {
            pid: self.config.pid,
            memory: past.memory,
            journal: past.journal,
            why_tcp,
            meter: Meter::start(self.config.pid),
            started: self.started,
            sink: &mut *self.sink,
            scratch,
            dir,
            key,
            record,
        };
        match after.run(live) {
            // It has been told already.
            Err(Error::Lost) => Ok(()),
            other => other,
        }
    }

    /// All that can be done while the process runs. Nothing is left of it on failure.
    fn before_freeze(&mut self, local: &mut Local, id: &str) -> Result<Ahead<'a>> {
        let (mut link, verdict) = self.negotiate(local, id)?;
        self.enter("prepare");
        if verdict.foreign_vdso {
            local.avoid = local::vdso_range(self.config.pid)?;
        }
        local.elsewhere = verdict.boot_id != clocks::boot_id()?;
        link.open_lanes(self.config, self.interrupts, &verdict)?;
        link.await_prepared(self.config)?;
        let mut presender = Presender::new(self.config.pid, self.interrupts, self.config.timeout)?;
        presender.ahead(&mut link.sender, &mut link.receiver, local, false)?;
        let scratch = self.map_scratch(&mut link, local)?;
        Ok((link, scratch, presender, verdict.route))
    }

    /// The claim comes first: what is seen without it may be a process that another migration stops.
    fn preflight(&mut self) -> Result<(Local, Claim)> {
        rundir::ensure(&self.config.run_dir)?;
        let pid = self.config.pid;
        let claim = match Claim::take(pid) {
            Ok(Some(claim)) => Ok(claim),
            Ok(None) => {
                return Err(self.refuse(vec![events::Blocker {
                    object: format!("process {pid}"),
                    reason: "is being moved by another migration".into(),
                    remedy: "wait for its end, or interrupt it (see slipstream status)".into(),
                }]));
            }
            // Preflight has a better name for it.
            Err(e) => Err(e),
        };
        match local::look(pid, &self.config.stdio) {
            Ok(local) => Ok((local, claim?)),
            Err(blockers) => {
                // The destination's view completes the report if it can be had.
                let mut all: Vec<events::Blocker> = blockers.iter().map(event_blocker).collect();
                if let Err(e) = Key::load(&self.config.key).map_err(Error::from) {
                    all.push(destination_blocker(&e));
                } else if let Err(e) = resolve(&self.config.destination).map_err(Error::from) {
                    all.push(destination_blocker(&e));
                }
                Err(self.refuse(all))
            }
        }
    }

    /// Reports blockers; the error carries the first in its one line.
    fn refuse(&mut self, blockers: Vec<events::Blocker>) -> Error {
        let first = &blockers[0];
        let more = match blockers.len() {
            1 => String::new(),
            n => format!(" (and {} more)", n - 1),
        };
        let error = Error::Refused {
            reason: format!("{}: {}{more}", first.object, first.reason),
            remedy: first.remedy.clone(),
        };
        (self.sink)(Event::Preflight(events::Preflight { blockers }));
        error
    }

    fn negotiate(&mut self, local: &mut Local, id: &str) -> Result<(Connections, Verdict)> {
        match opening::negotiate(self.config, self.interrupts, local, id) {
            Ok(agreed) => {
                (self.sink)(Event::Preflight(events::Preflight { blockers: Vec::new() }));
                failpoints::pass("source-connected").map(|()| agreed)
            }
            Err(Hindrance::Blockers(blockers)) => Err(self.refuse(blockers)),
            Err(Hindrance::Error(e)) => Err(e),
        }
    }

    /// The last thing before the freeze.
    fn map_scratch(&mut self, link: &mut Connections, local: &mut Local) -> Result<SourceScratch> {
        let scratch = SourceScratch::map(self.config.pid, self.config.timeout)?;
        let prepared = failpoints::pass("source-scratch")
            .and_then(|()| local::refresh(self.config.pid, local))
            .and_then(|()| self.interrupts.check());
        match prepared {
            Ok(()) => Ok(scratch),
            Err(e) => self.roll_back(link, scratch, e),
        }
    }

    /// Freeze, capture, send: until the destination is ready. Failing thaws.
    fn move_state(
        &mut self,
        link: &mut Connections,
        scratch: &SourceScratch,
        local: &mut Local,
        presender: &mut Presender<'_>,
        dir: &MigrationDir,
        record: &mut Record,
    ) -> Result<AtTheBrink> {
        self.enter("freeze");
        let Captured { frozen, manifest, frozen_at, mut parts, haste } =
            presender.freeze(&mut link.sender, &mut link.receiver, scratch, local)?;
        let encoded = manifest.encode_to_vec();
        parts.state_bytes = encoded.len() as u64;
        failpoints::pass("source-captured")?;
        let sent_at = Instant::now();
        say_to_destination(&mut link.sender, SourceMessage::Manifest(encoded))?;
        failpoints::pass("source-sent")?;
        self.phase = "restore";
        // While the destination restores: what commit and the page server need.
        let memory = Arc::new(FrozenMemory::open(self.config.pid, &manifest)?);
        // The program's first touch comes before this session hears that it has resumed.
        let servers = PageServers::start(std::mem::take(&mut link.lanes), &memory);
        record.mappings.clone_from(&manifest.mappings);
        record.write(dir)?;
        commit::prepare_journal(&frozen, dir)?;
        let ready = match hear_destination(&mut link.receiver, Some(self.config.timeout))? {
            DestinationMessage::Ready(ready) => ready,
            _ => return unexpected("ready"),
        };
        parts.restore_us = ready.restore_us;
        parts.send_us = us(sent_at).saturating_sub(ready.restore_us);
        failpoints::pass("source-ready")?;
        let report = frozen_event(&manifest);
        let signals = Watch::of(&manifest);
        Ok(AtTheBrink { frozen, signals, memory, servers, parts, frozen_at, haste, report })
    }

    /// What another session would need in place of this one.
    fn record(
        &self,
        id: &str,
        scratch: &SourceScratch,
        route: Vec<u8>,
        lanes: &[Channel],
    ) -> Result<Record> {
        Ok(Record {
            id: id.to_owned(),
            process: rundir::full_name(self.config.pid)?,
            destination: self.config.destination.clone(),
            key: self.config.key.as_os_str().as_bytes().to_vec(),
            route,
            bulk_lanes: lanes.len().saturating_sub(1) as u32,
            scratch_start: scratch.range().start,
            scratch_end: scratch.range().end,
            timeout_us: self.config.timeout.as_micros() as u64,
            mappings: Vec::new(),
        })
    }

    /// An error is one before the commit: everything can still be undone. Past it, there is none.
    fn commit(
        &mut self,
        link: &mut Connections,
        mut brink: AtTheBrink,
        scratch: &SourceScratch,
        process: &PidFd,
        dir: &MigrationDir,
        record: &Record,
    ) -> Result<Past> {
        let began = Instant::now();
        // From here on an interrupt ends nothing.
        self.interrupts.commit()?;
        commit::declare(&mut brink.frozen, scratch, process, dir, &brink.signals)?;
        self.committed = true;
        self.phase = "commit";
        let answer = say_to_destination(&mut link.sender, SourceMessage::Commit(Empty {}))
            .and_then(|()| {
                failpoints::reached("source-commit-sent");
                hear_destination(&mut link.receiver, Some(self.config.timeout))
            });
        failpoints::reached("source-resumed");
        brink.parts.commit_us = us(began);
        let blackout_us = us(brink.frozen_at);
        brink.frozen.abandon();
        drop(brink.haste);
        let resumed = match answer {
            Ok(DestinationMessage::Resumed(resumed)) => Some(resumed),
            Ok(_) => None,
            Err(e) => {
                tracing::warn!("the commit is in doubt: {e}");
                None
            }
        };
        let AtTheBrink { memory, servers, report, parts, .. } = brink;
        let heard = if resumed.is_some() { Heard::Resumed } else { Heard::Nothing };
        let (Next::Serve, Some(resumed)) =
            (commit_protocol::source(Journal::Committing, heard), resumed)
        else {
            return Ok(Past { memory, servers, journal: Journal::Committing });
        };
        commit::note_committed(dir);
        (self.sink)(report);
        (self.sink)(Event::Committed(events::Committed { id: record.id.clone() }));
        (self.sink)(Event::Resumed(events::Resumed {
            dest_pid: resumed.host_pid,
            blackout_us,
            blackout_parts: parts,
        }));
        Ok(Past { memory, servers, journal: Journal::Committed })
    }

    /// Ends a migration before commit: the process goes on, without our scratch memory. Whatever was
    /// frozen has been thawed by the drop of its owner.
    fn roll_back<T>(
        &mut self,
        link: &mut Connections,
        scratch: SourceScratch,
        error: Error,
    ) -> Result<T> {
        let reason = Reason { reason: "the source gave up".into(), remedy: String::new() };
        let _ = say_to_destination(&mut link.sender, SourceMessage::Abort(reason));
        match scratch.unmap(self.config.timeout) {
            Ok(()) | Err(slipstream_core::Error::Gone { .. }) => {}
            Err(e) => tracing::warn!("scratch memory stays mapped: {e}"),
        }
        Err(error)
    }

    fn write_status(
        &self,
        dir: &MigrationDir,
        id: &str,
        phase: &str,
        figures: Option<events::Figures>,
    ) {
        let status = Status {
            id: id.to_owned(),
            role: Role::Source,
            phase: phase.to_owned(),
            pid: Some(self.config.pid),
            peer: self.config.destination.clone(),
            figures,
            detail: String::new(),
        };
        if let Err(e) = dir.write_status(&status) {
            tracing::warn!("{e}");
        }
    }

    fn enter(&mut self, phase: &'static str) {
        self.phase = phase;
        (self.sink)(Event::Progress(events::Progress {
            phase: phase.to_owned(),
            figures: events::Figures::default(),
            eta_s: None,
        }));
    }

    fn failure(&self, error: &Error) -> events::Failed {
        let touched = matches!(self.phase, "freeze" | "restore" | "commit" | "drain");
        let outcome = if self.committed {
            Outcome::Waiting
        } else if touched || matches!(error, Error::Interrupted | Error::FailPoint(_)) {
            Outcome::RolledBack
        } else if matches!(error, Error::Internal(_)) {
            Outcome::Internal
        } else {
            Outcome::Refused
        };
        let reason = if self.interrupts.interrupted() && !self.committed {
            Error::Interrupted.to_string()
        } else {
            error.to_string()
        };
        let outcome = match outcome {
            Outcome::Refused if self.interrupts.interrupted() => Outcome::RolledBack,
            other => other,
        };
        events::Failed {
            phase: self.phase.to_owned(),
            reason,
            remedy: error.remedy().to_owned(),
            outcome,
        }
    }
}

fn frozen_event(m: &Manifest) -> Event {
    Event::Frozen(events::Frozen {
        threads: m.threads.len() as u64,
        mappings: m.mappings.len() as u64,
        descriptors: m.descriptors.len() as u64,
    })
}

fn us(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}
