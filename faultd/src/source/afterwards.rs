//! What a source session does after the commit: it serves pages, and when the connection breaks it keeps
//! the frozen copy and connects again, for as long as it takes. It is told what was decided, and never
//! guesses.
//!
//! A session that takes over from one that was killed begins here.

use crate::commit_protocol::{self, Heard, Journal, Next};
use crate::control::{hear_destination, say_to_destination, unexpected};
use crate::error::{Error, Result};
use crate::events::{self, Event, Outcome as End, Role, Status};
use crate::failpoints;
use crate::protocol::{
    Completed, DestinationMessage, Empty, Figures, Outcome, PresentMap, PresentMapEnd, Reason,
    Rejoin, SourceMessage,
};
use crate::rundir::MigrationDir;
use crate::source::commit;
use crate::source::figures::{fault_parts, figures, progress};
use crate::source::page_server::{PageServers, send_present_map};
use crate::source::rdma::{Registering, Registration, SharedSender};
use crate::source::record::Record;
use slipstream_core::capture::frozen_memory::FrozenMemory;
use slipstream_core::inject::SourceScratch;
use slipstream_core::sys::pidfd::PidFd;
use slipstream_transport::rdma::Source;
use slipstream_transport::{Channel, Key, Purpose, Receiver, Timeouts, resolve};
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
    /// When the migration, or this session's part of it, began.
    pub started: Instant,
    /// Where events go.
    pub sink: &'a mut dyn FnMut(Event),
}

enum Joined {
    Live(Box<Live>),
    Never(SharedSender),
    Over(SharedSender, Completed),
}

/// Takes over a migration whose session is gone.
pub fn recover(run_dir: &Path, id: &str, sink: &mut dyn FnMut(Event)) -> Result<()> {
    let dir = MigrationDir::open(run_dir, Role::Source, id, Duration::ZERO)?;
    dir.note_session()?;
    let refused = |reason: &str| Error::Refused { reason: reason.into(), remedy: String::new() };
    let journal = commit::journal(&dir)?;
    let (Some(record), Journal::Committing | Journal::Committed) = (Record::read(&dir)?, journal)
    else {
        dir.remove();
        return Err(refused("its session ended before the commit: the process runs on here"));
    };
    let Some(pid) = record.pid() else {
        // Its memory may have been needed: whoever asks at the destination sees whether.
        return Err(refused("the copy that this migration left here is gone"));
    };
    let range = record.scratch_start..record.scratch_end;
    let after = Afterwards {
        pid,
        memory: Arc::new(FrozenMemory::open(pid, &record.manifest())?),
        scratch: SourceScratch::find(pid, range)?,
        key: Key::load(&record.key_path())?,
        journal,
        why_tcp: "the migration was taken up again".into(),
        started: Instant::now(),
        sink,
        dir,
        record,
    };
    after.run(None)
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
                return Err(self.lost());
            }
            self.note_pause(&mut paused_since, &error);
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Connects again and asks what was decided.
    fn rejoin(&mut self) -> Result<Joined> {
        let addresses = resolve(&self.record.destination)?;
        let channel = self.connect(&addresses, Purpose::Control)?;
        let (mut sender, mut receiver) = channel.split();
        let bulk_lanes = self.record.bulk_lanes;
        let rejoin = Rejoin { id: self.record.id.clone(), bulk_lanes };
        say_to_destination(&mut sender, SourceMessage::Rejoin(rejoin))?;
        let outcome: Outcome = match hear_destination(&mut receiver, Some(self.silence()))? {
            DestinationMessage::Outcome(outcome) => outcome,
            _ => return unexpected("the outcome"),
        };
        match commit_protocol::source(self.journal, Heard::Outcome { run: outcome.run }) {
            Next::Serve => self.note_resumed(outcome.host_pid),
            Next::BringBack => return Ok(Joined::Never(SharedSender::new(sender))),
            Next::Ask => return Err(Error::Protocol("RUN was taken back".into())),
        }
        if let Some(completed) = outcome.completed {
            return Ok(Joined::Over(SharedSender::new(sender), completed));
        }
        let bulk = u16::try_from(bulk_lanes).unwrap_or(1).max(1);
        let purposes = std::iter::once(Purpose::Urgent).chain((0..bulk).map(Purpose::Bulk));
        let lanes =
            purposes.map(|purpose| self.connect(&addresses, purpose)).collect::<Result<_>>()?;
        let servers = PageServers::start(lanes, &self.memory);
        self.why_tcp = "the connection was made again".into();
        let sender = SharedSender::new(sender);
        Ok(Joined::Live(Box::new(Live { sender, receiver, servers, rdma: None })))
    }

    fn connect(&self, addresses: &[SocketAddr], purpose: Purpose) -> Result<Channel> {
        let timeout = self.record.timeout();
        let timeouts = Timeouts { connect: timeout, handshake: timeout };
        Ok(Channel::connect(addresses, &self.key, self.record.route()?, purpose, timeouts)?)
    }

    fn silence(&self) -> Duration {
        self.record.timeout().max(SILENCE_MIN)
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
        self.write_status("drain", None, String::new());
        let registering = rdma.as_ref().map(|source| {
            Registering::start(Registration {
                source: Arc::clone(source),
                memory: Arc::clone(&self.memory),
                pid: self.pid,
                scratch: self.scratch.range(),
                hot: Arc::clone(servers.hot()),
                sender: sender.clone(),
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
            match hear_destination(receiver, Some(self.silence()))? {
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
        commit::drop_copy(self.pid, &self.scratch)?;
        failpoints::reached("source-dropped");
        // The destination may be gone already: it has nothing left to do.
        let _ = say_to_destination(&mut sender.lock(), SourceMessage::Bye(Empty {}));
        self.dir.remove();
        let read = done.rdma_bytes > 0;
        (self.sink)(Event::Completed(events::Completed {
            figures: figures(&done.figures, &Figures::default(), done.drain_us),
            total_us: self.started.elapsed().as_micros() as u64,
            drain_us: done.drain_us,
            transport: if read { "rdma" } else { "tcp" }.into(),
            why_tcp: self.why_tcp,
            rdma_bytes: done.rdma_bytes,
            fault_parts: fault_parts(done.fault_parts),
            exited: done.exited,
        }));
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

    fn lost(&mut self) -> Error {
        let reason = "the frozen copy was killed before the last page had left";
        self.write_status("lost", None, reason.into());
        (self.sink)(Event::Failed(events::Failed {
            phase: "drain".into(),
            reason: reason.into(),
            remedy: "end the process at the destination: pages of it will never come".into(),
            outcome: End::Lost,
        }));
        Error::Lost
    }

    /// Says once that it is paused, and since when.
    fn note_pause(&mut self, since: &mut Option<u64>, error: &Error) {
        let first = since.is_none();
        let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let at = *since.get_or_insert_with(|| now().map_or(0, |d| d.as_secs()));
        self.write_status("waiting", None, format!("paused since {at}: {error}"));
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
