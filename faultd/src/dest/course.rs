//! The course of a drain, from the first page to the last: the same for the session that restored the
//! process and for one that took over.

use crate::control::{hear_source, say_to_source, unexpected};
use crate::dest::drain::Drain;
use crate::dest::held::Account;
use crate::dest::limit::Limit;
use crate::dest::present::receive_present_map;
use crate::dest::rdma::Watch;
use crate::dest::{bulk, finish};
use crate::error::{Error, Result};
use crate::events::{Role, Status};
use crate::failpoints;
use crate::protocol::{Completed, DestinationMessage, Figures, SourceMessage};
use crate::rundir::{self, MigrationDir};
use prost::Message;
use slipstream_core::manifest::Manifest;
use slipstream_core::restore::engine::TimedThread;
use slipstream_core::restore::settle::settle_timed;
use slipstream_core::sys::pidfd::PidFd;
use slipstream_core::sys::{poll, task};
use slipstream_transport::{Channel, Key, PageLane, Purpose, Receiver, Sender, Timeouts};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// Between two looks at the adapter, and for regions that the source has made readable; and whether the drain is at its end,
/// where nobody told. Not more often: each time a CPU leaves what it does for faults.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// While only the end of something short is waited for.
const TICK: Duration = Duration::from_millis(1);
/// For the rest of a message that has begun to arrive.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);
/// For init to note how the process ended.
const NOTE_TIMEOUT: Duration = Duration::from_secs(1);
/// For the source to say goodbye after completion.
const BYE_TIMEOUT: Duration = Duration::from_secs(10);
/// For a thread that is in a system call on a connection which is no more.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The control connection, and the socket through which the agent hands connections over.
#[derive(Debug)]
pub struct Link<'a> {
    /// To the source.
    pub sender: &'a mut Sender,
    /// From the source.
    pub receiver: &'a mut Receiver,
    /// From the agent.
    pub newcomers: &'a UnixStream,
    /// Of the source.
    pub key: &'a Key,
}

/// A drain, and all that is needed to finish it.
#[derive(Debug)]
pub struct Course<'a> {
    /// The migration's name.
    pub id: &'a str,
    /// The source's address.
    pub peer: &'a str,
    /// Its folder.
    pub dir: &'a MigrationDir,
    /// The pages.
    pub drain: Arc<Drain>,
    /// What is needed at the end.
    pub account: Account,
    /// The process.
    pub process: &'a PidFd,
    /// When the process resumed, or the drain was taken up.
    pub since: Instant,
    /// What is read by RDMA, if anything is.
    pub rdma: Option<Watch>,
}

impl Course<'_> {
    /// Serves pages until nothing is missing, and tells the source.
    pub fn run(
        &mut self,
        link: &mut Link<'_>,
        fault_thread: JoinHandle<()>,
        bulk: Vec<Box<dyn PageLane>>,
        timed: &[TimedThread],
    ) -> Result<()> {
        task::give_way();
        self.tell("drain", "");
        if let Err(e) = settle_timed(self.process.pid(), timed) {
            tracing::warn!("{e}");
        }
        let limit = self.account.prefetch_limit.div_ceil(bulk.len().max(1) as u64);
        let lanes = bulk.into_iter().map(|lane| {
            bulk::start(Arc::clone(&self.drain), lane, Limit::new(limit, Instant::now()))
        });
        let threads: Vec<_> = lanes.chain(std::iter::once(fault_thread)).collect();
        let manifest = self.account.manifest();
        if let Err(e) = self.fetch(link, &manifest) {
            // In good order: an event that was read is dealt with before this process ends.
            self.drain.end();
            join(threads);
            self.tell("waiting", &format!("paused since {}: {e}", now()));
            return Err(e);
        }
        let drain_us = self.since.elapsed().as_micros() as u64;
        let exited = finish::has_exited(self.process);
        if exited {
            self.look_at_init()?;
        }
        failpoints::reached("destination-drained");
        self.finish(link, &manifest)?;
        self.drain.end();
        join(threads);
        let rdma_bytes = self.rdma.as_ref().map_or(0, Watch::bytes);
        let figures = self.drain.figures();
        let fault_parts = Some(self.drain.fault_parts());
        let completed = Completed { figures, drain_us, exited, rdma_bytes, fault_parts };
        failpoints::reached("destination-finished");
        // Noted before anything that could take the drain up is let go.
        let noted = self.dir.write(rundir::COMPLETED, &completed.encode_to_vec());
        failpoints::reached("destination-noted");
        if let Err(e) = noted {
            // A full disk. Then the source has to know instead; if it doesn't hear, it will ask again.
            tracing::warn!("{e}");
            say_to_source(link.sender, DestinationMessage::Completed(completed))?;
            hear_source(link.receiver, Some(BYE_TIMEOUT))?;
            self.drain.release();
            note_bye(self.dir);
            return Ok(());
        }
        self.drain.release();
        self.tell("completed", "");
        goodbye(link, self.dir, completed)
    }

    fn fetch(&mut self, link: &mut Link<'_>, manifest: &Manifest) -> Result<()> {
        receive_present_map(link.receiver, &self.drain, manifest, self.rdma.as_ref())?;
        let (mut reported, mut looked, mut seen) = (Instant::now(), Instant::now(), 0);
        let mut short_of_memory = false;
        let mut door = Door::default();
        while !self.drain.complete() {
            if let Some(e) = self.drain.take_failure() {
                return Err(e);
            }
            self.drain.wait_news(&mut seen, LOOK_INTERVAL);
            if looked.elapsed() >= LOOK_INTERVAL {
                looked = Instant::now();
                self.look_after_rdma(link)?;
            }
            if reported.elapsed() >= PROGRESS_INTERVAL {
                reported = Instant::now();
                if self.drain.is_short_of_memory() != short_of_memory {
                    short_of_memory = !short_of_memory;
                    self.tell_of_memory(short_of_memory);
                }
                let figures: Figures = self.drain.figures();
                say_to_source(link.sender, DestinationMessage::Progress(figures))?;
                if door.has_let_in(link) {
                    return Err(Error::Protocol("the source came back by another way".into()));
                }
            }
        }
        Ok(())
    }

    /// Takes everything of ours out of the process and what it forked; tries again for as long as that fails.
    fn finish(&self, link: &mut Link<'_>, manifest: &Manifest) -> Result<()> {
        let ours = self.account.ours();
        loop {
            self.await_tracer(link, &ours)?;
            match self.finish_once(link, manifest, &ours) {
                Ok(()) => return Ok(()),
                Err(e) => {
                    tracing::warn!("{e}");
                    self.tell("waiting", &format!("every page is there, but {e}"));
                }
            }
            say_to_source(link.sender, DestinationMessage::Progress(self.drain.figures()))?;
            std::thread::sleep(PROGRESS_INTERVAL);
        }
    }

    /// On a thread of its own, for all requests to a stopped thread have to come from the one that stopped it, and the
    /// source takes silence for a broken connection.
    fn finish_once(
        &self,
        link: &mut Link<'_>,
        manifest: &Manifest,
        ours: &[Range<u64>],
    ) -> Result<()> {
        let (drain, process) = (&self.drain, self.process);
        std::thread::scope(|scope| {
            let finishing = scope.spawn(|| finish::finish(drain, manifest, process, ours));
            let mut reported = Instant::now();
            while !finishing.is_finished() {
                std::thread::sleep(TICK);
                if reported.elapsed() >= PROGRESS_INTERVAL {
                    reported = Instant::now();
                    // A source that has gone comes back, and is told then.
                    let figures = DestinationMessage::Progress(self.drain.figures());
                    if let Err(e) = say_to_source(link.sender, figures) {
                        tracing::debug!("{e}");
                    }
                }
            }
            finishing.join().unwrap_or_else(|_| Err(Error::Internal("the end failed".into())))
        })
    }

    /// Waits until nobody traces what has something of ours: it could not be taken out.
    fn await_tracer(&self, link: &mut Link<'_>, ours: &[Range<u64>]) -> Result<()> {
        let mut told = None;
        while let Some((pid, tracer)) = finish::traced(&self.drain, ours) {
            if told.replace(tracer) != Some(tracer) {
                let what = format!("process {pid} is traced by process {tracer}: end that tracer");
                self.tell("waiting", &format!("every page is there, but {what}"));
            }
            say_to_source(link.sender, DestinationMessage::Progress(self.drain.figures()))?;
            std::thread::sleep(PROGRESS_INTERVAL);
        }
        Ok(())
    }

    /// The process has exited. Init notes how; where init was killed, all was killed with it.
    fn look_at_init(&self) -> Result<()> {
        let (noted, until) = (self.dir.file(rundir::EXIT), Instant::now() + NOTE_TIMEOUT);
        let init_ended = || self.drain.shared(|state| state.init().exited());
        while !init_ended() && !noted.exists() && Instant::now() < until {
            std::thread::sleep(TICK);
        }
        if noted.exists() || !init_ended() {
            return Ok(());
        }
        self.dir.write(rundir::LOST, rundir::ENDED_WITH_INIT.as_bytes())?;
        self.drain.end();
        Err(Error::Lost)
    }

    fn look_after_rdma(&mut self, link: &mut Link<'_>) -> Result<()> {
        let Some(watch) = &mut self.rdma else { return Ok(()) };
        let readable = |receiver: &Receiver| {
            receiver.has_buffered() || poll::readable(receiver, Duration::ZERO).unwrap_or(true)
        };
        while readable(link.receiver) {
            match hear_source(link.receiver, Some(STEP_TIMEOUT))? {
                SourceMessage::Regions(regions) => watch.add(&regions)?,
                _ => return unexpected("regions"),
            }
        }
        match watch.news() {
            Some(reason) => say_to_source(link.sender, DestinationMessage::RdmaLost(reason)),
            None => Ok(()),
        }
    }

    fn tell_of_memory(&self, short: bool) {
        if !short {
            return self.tell("drain", "");
        }
        let what = format!(
            "paused since {}: no memory for the process's pages: free some on this host, or raise the limit of its control group",
            now()
        );
        tracing::warn!("migration {}: {what}", self.id);
        self.tell("waiting", &what);
    }

    /// The process runs: from here on a full disk must not end what brings its pages.
    fn tell(&self, phase: &str, detail: &str) {
        let status = Status {
            id: self.id.to_owned(),
            role: Role::Destination,
            phase: phase.to_owned(),
            pid: Some(self.process.pid()).filter(|pid| *pid > 0),
            peer: self.peer.to_owned(),
            figures: None,
            detail: detail.to_owned(),
        };
        if let Err(e) = self.dir.write_status(&status) {
            tracing::warn!("{e}");
        }
    }
}

/// Tells the source that nothing is missing any more. It ends its copy then.
pub fn goodbye(link: &mut Link<'_>, dir: &MigrationDir, completed: Completed) -> Result<()> {
    say_to_source(link.sender, DestinationMessage::Completed(completed))?;
    // One that doesn't say goodbye may ask again.
    if let Ok(SourceMessage::Bye(_)) = hear_source(link.receiver, Some(BYE_TIMEOUT)) {
        note_bye(dir);
    }
    Ok(())
}

fn note_bye(dir: &MigrationDir) {
    if let Err(e) = dir.write(rundir::BYE, b"") {
        tracing::warn!("{e}");
    }
}

/// Connections that the agent hands over while a drain goes on: of the source, whose own connection has broken without
/// our knowing, or of anybody who has seen the route go by.
#[derive(Default)]
struct Door {
    /// Whether the one at the door has shown that it holds the key. Others wait for that.
    handshake: Option<JoinHandle<bool>>,
}

impl Door {
    /// True once the source has come back. Asks no more than one handshake at a time, elsewhere: a stranger may take its time.
    fn has_let_in(&mut self, link: &Link<'_>) -> bool {
        if let Some(handshake) = self.handshake.take_if(|handshake| handshake.is_finished()) {
            return handshake.join().unwrap_or(false);
        }
        if self.handshake.is_none()
            && poll::readable(link.newcomers, Duration::ZERO).unwrap_or(false)
            && let Some(connection) = newcomer(link.newcomers)
        {
            let key = link.key.clone();
            self.handshake = Some(std::thread::spawn(move || {
                let accepted = Channel::accept(connection, &key, Timeouts::default());
                accepted.is_ok_and(|channel| channel.purpose() == Purpose::Control)
            }));
        }
        false
    }
}

/// What the agent has handed over; `None` when it has ended, which is no reason to end.
fn newcomer(newcomers: &UnixStream) -> Option<OwnedFd> {
    let mut byte = [0u8; 1];
    let (_, fds) = slipstream_core::sys::spawn::recv_descriptors(newcomers, &mut byte).ok()?;
    fds.into_iter().next()
}

fn join(threads: Vec<JoinHandle<()>>) {
    let deadline = Instant::now() + JOIN_TIMEOUT;
    for thread in threads {
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(TICK);
        }
        if thread.is_finished() {
            let _ = thread.join();
        }
    }
}

/// Seconds since 1970, for a status.
pub fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
