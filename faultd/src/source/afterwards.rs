//! What a source session does after the commit: it serves pages, and when the connection breaks it keeps
//! the frozen copy and connects again, for as long as it takes. It is told what was decided, and never
//! guesses.
//!
//! A session that takes over from one that was killed begins here.

use crate::cgroup;
use crate::commit_protocol::{self, Heard, Journal, Next};
use crate::control::{hear_destination, say_to_destination, unexpected};
use crate::error::{Error, Result};
use crate::events::{self, Event, Outcome as End, Role, Status};
use crate::failpoints;
use crate::protocol::{
    Completed, DestinationMessage, Empty, Figures, Outcome, PresentMap, PresentMapEnd, Reason,
    Rejoin, SourceMessage,
};
use crate::rundir::{self, MigrationDir};
use crate::source::commit;
use crate::source::cost::Meter;
use crate::source::figures::{completed, progress};
use crate::source::gone;
use crate::source::page_server::{PageServers, send_present_map};
use crate::source::presend::freeze_outside;
use crate::source::rdma::{Registering, Registration, SharedSender};
use crate::source::record::Record;
use slipstream_core::capture::frozen_memory::FrozenMemory;
use slipstream_core::inject::{SourceScratch, is_parked};
use slipstream_core::proc::claim::Claim;
use slipstream_core::sys::pidfd::PidFd;
use slipstream_core::sys::task;
use slipstream_transport::rdma::Source;
use slipstream_transport::{Channel, Key, Purpose, Receiver, Sender, Timeouts, resolve};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Shortest silence of a destination that is taken for a broken connection: it reports five times a
/// second, but for moments at the end.
const SILENCE_MIN: Duration = Duration::from_secs(10);
/// Pause before a connection is tried again: the first, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// For a thread of the process to be stopped for a moment.
const CLEAR_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections to the destination's session.
#[derive(Debug)]
pub struct Live {
    /// Control connection, to it.
    pub sender: SharedSender,
    /// Control connection, from it.
    pub receiver: Receiver,
    /// Of pages.
    pub servers: PageServers,
    /// The adapter that the destination reads by.
    pub rdma: Option<Arc<Source>>,
}

/// A migration past its commit.
pub struct Afterwards<'a> {
    /// What it is.
    pub record: Record,
    /// Its folder.
    pub dir: MigrationDir,
    /// The frozen copy.
    pub pid: i32,
    /// Its memory.
    pub memory: Arc<FrozenMemory>,
    /// Ours in it.
    pub scratch: SourceScratch,
    /// The key.
    pub key: Key,
    /// Whether the destination is known to have resumed.
    pub journal: Journal,
    /// Why pages travel over TCP, as far as they do.
    pub why_tcp: String,
    /// What it costs here.
    pub meter: Meter,
    /// When the migration, or this session's part of it, began.
    pub started: Instant,
    /// Where events go.
    pub sink: &'a mut dyn FnMut(Event),
}

/// Of a peer's reason, what is shown.
const LOST_LEN_MAX: usize = 500;

enum Joined {
    Live(Box<Live>),
    Never(SharedSender),
    Over(SharedSender, Box<Completed>),
    /// The destination's copy was ended.
    Lost(String),
}

/// Takes over a migration whose session is gone.
pub fn recover(run_dir: &Path, id: &str, sink: &mut dyn FnMut(Event)) -> Result<()> {
    let dir = MigrationDir::open(run_dir, Role::Source, id, rundir::GLANCE)?;
    dir.note_session()?;
    let _group = cgroup::enter(id);
    let journal = commit::journal(&dir)?;
    let (Some(record), Journal::Committing | Journal::Committed) = (Record::read(&dir)?, journal)
    else {
        clear_away(run_dir, id)?;
        dir.remove();
        sink(Event::Failed(events::Failed {
            phase: "recover".into(),
            reason: "its session ended before the commit: the process runs on here".into(),
            remedy: "nothing is left to be recovered; move it again".into(),
            outcome: End::RolledBack,
        }));
        return Ok(());
    };
    let key = Key::load(&record.key_path())?;
    let Some(pid) = record.pid() else {
        return gone::settle(&record, dir, &key, Instant::now(), sink);
    };
    let range = record.scratch_start..record.scratch_end;
    let after = Afterwards {
        pid,
        memory: Arc::new(FrozenMemory::open(pid, &record.manifest())?),
        scratch: SourceScratch::find(pid, range)?,
        key,
        journal,
        why_tcp: "the migration was taken up again".into(),
        meter: Meter::start(pid),
        started: Instant::now(),
        sink,
        dir,
        record,
    };
    after.run(None)
}

/// Takes what a killed session had mapped out of a process that runs on here. It is left alone where it may be the copy that
/// another migration has stopped: one with a session has a claim, one without a folder.
fn clear_away(run_dir: &Path, id: &str) -> Result<()> {
    let all = rundir::list(run_dir)?;
    let mut here = all.iter().filter(|s| s.role == Role::Source);
    let Some(pid) = here.clone().find(|s| s.id == id).and_then(|s| s.pid) else { return Ok(()) };
    if here.any(|s| s.id != id && s.pid == Some(pid)) || is_parked(pid).unwrap_or(true) {
        return Ok(());
    }
    let Ok(Some(_claim)) = Claim::take(pid) else { return Ok(()) };
    let cleared = SourceScratch::left_in(pid).map_err(Error::from).and_then(|left| {
        let Some(scratch) = left else { return Ok(()) };
        // A thread may be on its way out of it yet; none enters it any more.
        freeze_outside(pid, Some(&scratch.range()), CLEAR_TIMEOUT)?.thaw()?;
        Ok(scratch.unmap(CLEAR_TIMEOUT)?)
    });
    match cleared {
        Ok(()) | Err(Error::Core(slipstream_core::Error::Gone { .. })) => {}
        Err(e) => tracing::warn!("scratch memory stays mapped in process {pid}: {e}"),
    }
    Ok(())
}

fn connect(
    record: &Record,
    key: &Key,
    addresses: &[SocketAddr],
    purpose: Purpose,
) -> Result<Channel> {
    let timeout = record.timeout();
    let timeouts = Timeouts { connect: timeout, handshake: timeout };
    Ok(Channel::connect(addresses, key, record.route()?, purpose, timeouts)?)
}

fn silence(record: &Record) -> Duration {
    record.timeout().max(SILENCE_MIN)
}

/// Connects again and asks what was decided. `gone`: the copy here is no more.
pub fn ask(record: &Record, key: &Key, gone: bool) -> Result<(Sender, Receiver, Outcome)> {
    let addresses = resolve(&record.destination)?;
    let (mut sender, mut receiver) = connect(record, key, &addresses, Purpose::Control)?.split();
    let rejoin = Rejoin { id: record.id.clone(), bulk_lanes: record.bulk_lanes, gone };
    say_to_destination(&mut sender, SourceMessage::Rejoin(rejoin))?;
    match hear_destination(&mut receiver, Some(silence(record)))? {
        DestinationMessage::Outcome(outcome) => Ok((sender, receiver, outcome)),
        _ => unexpected("the outcome"),
    }
}

/// Since when it has been paused, for a status; notes the time at first.
pub fn paused_since(since: &mut Option<u64>) -> String {
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    format!("paused since {}", since.get_or_insert_with(|| now().map_or(0, |d| d.as_secs())))
}

impl Afterwards<'_> {
    /// Sees the migration through. Returns when it is over, one way or the other.
    pub fn run(mut self, mut live: Option<Live>) -> Result<()> {
        let mut pause = PAUSE_MIN;
        let mut paused_since = None;
        loop {
            let joined = match live.take() {
                Some(live) => Ok(Joined::Live(Box::new(live))),
                None => self.rejoin(),
            };
            let error = match joined {
                Ok(Joined::Never(sender)) => return self.bring_back(&sender),
                Ok(Joined::Over(sender, done)) => return self.finish(&sender, &done),
                Ok(Joined::Lost(reason)) => {
                    // Of no use to anybody; and its parent shall see that it did not end well.
                    if self.record.pid() == Some(self.pid) {
                        PidFd::open(self.pid)?.kill(libc::SIGKILL)?;
                    }
                    return Err(gone::lost(&self.record, &self.dir, &reason, self.sink));
                }
                Ok(Joined::Live(live)) => {
                    (pause, paused_since) = (PAUSE_MIN, None);
                    match self.drain(*live) {
                        Ok((sender, done)) => return self.finish(&sender, &done),
                        Err(e) => e,
                    }
                }
                Err(e) => e,
            };
            if PidFd::open(self.pid).is_ok_and(|p| p.exited()) || self.record.pid().is_none() {
                return gone::settle(&self.record, self.dir, &self.key, self.started, self.sink);
            }
            self.note_pause(&mut paused_since, &error);
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Connects again and asks what was decided.
    fn rejoin(&mut self) -> Result<Joined> {
        let (sender, receiver, outcome) = ask(&self.record, &self.key, false)?;
        match commit_protocol::source(self.journal, Heard::Outcome { run: outcome.run }) {
            Next::Serve => self.note_resumed(outcome.host_pid),
            Next::BringBack => return Ok(Joined::Never(SharedSender::new(sender))),
            Next::Ask => return Err(Error::Protocol("RUN was taken back".into())),
        }
        if let Some(done) = outcome.completed {
            return Ok(Joined::Over(SharedSender::new(sender), Box::new(done)));
        }
        if !outcome.lost.is_empty() {
            return Ok(Joined::Lost(outcome.lost.chars().take(LOST_LEN_MAX).collect()));
        }
        let addresses = resolve(&self.record.destination)?;
        let bulk = u16::try_from(self.record.bulk_lanes).unwrap_or(1).max(1);
        let purposes = std::iter::once(Purpose::Urgent).chain((0..bulk).map(Purpose::Bulk));
        let lanes = purposes
            .map(|purpose| connect(&self.record, &self.key, &addresses, purpose))
            .collect::<Result<_>>()?;
        let servers = PageServers::start(lanes, &self.memory);
        self.why_tcp = "the connection was made again".into();
        let sender = SharedSender::new(sender);
        Ok(Joined::Live(Box::new(Live { sender, receiver, servers, rdma: None })))
    }

    /// The journal says so from now on, and whoever watches is told once.
    fn note_resumed(&mut self, host_pid: i32) {
        if std::mem::replace(&mut self.journal, Journal::Committed) == Journal::Committed {
            return;
        }
        commit::note_committed(&self.dir);
        (self.sink)(Event::Committed(events::Committed { id: self.record.id.clone() }));
        if host_pid > 0 {
            (self.sink)(Event::Note(events::Note {
                text: format!("the process runs at the destination, as PID {host_pid} there"),
            }));
        }
    }

    /// Serves pages until the destination has them all.
    fn drain(&mut self, live: Live) -> Result<(SharedSender, Completed)> {
        let Live { sender, mut receiver, servers, rdma } = live;
        // Finding out what is there takes a processor for a while: the first faults come before it.
        task::give_way();
        self.write_status("drain", None, String::new());
        let registering = rdma.as_ref().map(|source| {
            Registering::start(Registration {
                source: Arc::clone(source),
                memory: Arc::clone(&self.memory),
                pid: self.pid,
                scratch: self.scratch.range(),
                hot: Arc::clone(servers.hot()),
                sender: sender.clone(),
                registered_bytes: Arc::clone(self.meter.registered_bytes()),
            })
        });
        let done = self.serve(&sender, &mut receiver, registering);
        drop(servers);
        done.map(|done| (sender, done))
    }

    /// Ends when the destination has every page. What registers memory has ended then, too.
    fn serve(
        &mut self,
        sender: &SharedSender,
        receiver: &mut Receiver,
        mut registering: Option<Registering>,
    ) -> Result<Completed> {
        let bytes = send_present_map(&self.memory, &mut |runs| {
            let map = SourceMessage::PresentMap(PresentMap::pack(runs));
            say_to_destination(&mut sender.lock(), map)
        })?;
        let end = SourceMessage::PresentMapEnd(PresentMapEnd { bytes });
        say_to_destination(&mut sender.lock(), end)?;
        failpoints::reached("source-map-sent");
        let mut last = (Instant::now(), Figures::default());
        loop {
            match hear_destination(receiver, Some(silence(&self.record)))? {
                DestinationMessage::Progress(now) => {
                    let progress = progress(&now, last.0, &last.1);
                    self.write_status("drain", Some(progress.figures.clone()), String::new());
                    (self.sink)(Event::Progress(progress));
                    last = (Instant::now(), now);
                }
                DestinationMessage::RdmaLost(lost) => {
                    registering = None;
                    self.note_rdma_lost(&lost);
                }
                DestinationMessage::Completed(done) => {
                    drop(registering);
                    return Ok(done);
                }
                _ => return unexpected("progress"),
            }
        }
    }

    fn note_rdma_lost(&mut self, lost: &Reason) {
        let clean: String = lost.reason.chars().filter(|c| !c.is_control()).take(300).collect();
        let text = format!("RDMA has failed, the rest of the pages go over TCP: {clean}");
        self.why_tcp = format!("RDMA has failed: {clean}");
        (self.sink)(Event::Note(events::Note { text }));
    }

    fn finish(self, sender: &SharedSender, done: &Completed) -> Result<()> {
        failpoints::reached("source-completed");
        let cost = self.meter.read();
        commit::drop_copy(self.pid, &self.scratch)?;
        failpoints::reached("source-dropped");
        // The destination may be gone already: it has nothing left to do.
        let _ = say_to_destination(&mut sender.lock(), SourceMessage::Bye(Empty {}));
        self.dir.remove();
        let total_us = self.started.elapsed().as_micros() as u64;
        (self.sink)(Event::Completed(completed(done, total_us, self.why_tcp, cost)));
        Ok(())
    }

    /// The destination has recorded that its copy never runs: this one goes on.
    fn bring_back(self, sender: &SharedSender) -> Result<()> {
        commit::bring_back(self.pid, self.scratch, &self.dir)?;
        let _ = say_to_destination(&mut sender.lock(), SourceMessage::Bye(Empty {}));
        self.dir.remove();
        (self.sink)(Event::Failed(events::Failed {
            phase: "commit".into(),
            reason: "the destination gave up before its copy ran; the process runs on here".into(),
            remedy: "try again".into(),
            outcome: End::RolledBack,
        }));
        Ok(())
    }

    /// Says once that it is paused, and since when.
    fn note_pause(&mut self, since: &mut Option<u64>, error: &Error) {
        let first = since.is_none();
        let paused = paused_since(since);
        self.write_status("waiting", None, format!("{paused}: {error}"));
        if first {
            let text = format!("paused: {error}; trying to reach the destination again");
            (self.sink)(Event::Note(events::Note { text }));
        }
    }

    fn write_status(&self, phase: &str, figures: Option<events::Figures>, detail: String) {
        let status = Status {
            id: self.record.id.clone(),
            role: Role::Source,
            phase: phase.to_owned(),
            pid: Some(self.pid),
            peer: self.record.destination.clone(),
            figures,
            detail,
        };
        if let Err(e) = self.dir.write_status(&status) {
            tracing::warn!("{e}");
        }
    }
}
