//! The destination session: one migration, from the first message to the last page.

use crate::agent::SessionArgs;
use crate::clocks::{self, Exchange, Offsets};
use crate::control::{hear_source, say_to_source, unexpected};
use crate::dest::drain::Drain;
use crate::dest::{bulk, faults, finish, staged};
use crate::error::{Error, Result};
use crate::events::{Role, Status};
use crate::failpoints;
use crate::protocol::{
    Blocker, Completed, DestinationMessage, Empty, Figures, Hello, MESSAGE_LEN_MAX, PresentRun,
    Ready, Reason, Resumed, SourceMessage, Verdict,
};
use crate::rundir::{self, MigrationDir};
use prost::Message;
use slipstream_core::arch::vdso;
use slipstream_core::manifest::Manifest;
use slipstream_core::preflight::destination::check_destination;
use slipstream_core::preflight::requirements::Requirements;
use slipstream_core::restore::engine::{PrepareConfig, Restorer, TimedThread};
use slipstream_core::restore::memory::{LazyRange, lazy_views};
use slipstream_core::restore::newborn::own_vdso;
use slipstream_core::restore::scratch::{Gate, gate};
use slipstream_core::restore::settle::settle_timed;
use slipstream_core::sys::mem::ProcMem;
use slipstream_core::sys::poll;
use slipstream_core::sys::spawn::{recv_descriptors, take_handed};
use slipstream_transport::{Channel, Key, Purpose, Receiver, Sender, TcpPageLane, Timeouts};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Name of the hidden subcommand that becomes init.
pub const INIT_SUBCOMMAND: &str = "__init";
/// For the peer's next step while nothing is stopped yet.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);
/// For messages while the source is frozen: it rolls back when we give up.
const FROZEN_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two looks at both connections while lanes are awaited.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
const CLOCK_PROBES: usize = 5;
const BULK_LANES_MAX: u32 = 4;
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// The end of a drain is noticed this fast.
const TICK: Duration = Duration::from_millis(1);
/// For the source to say goodbye after completion.
const BYE_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs the session that a peer's connection started. Descriptor 3 is the connection, 4 the socket
/// through which the agent hands over lanes.
pub fn run(args: &SessionArgs) -> Result<()> {
    let io = |e| Error::io("take over the agent's descriptors", e);
    let connection = take_handed(0).map_err(io)?;
    let lanes = UnixStream::from(take_handed(1).map_err(io)?);
    let key = Key::take_over(&lanes).map_err(io)?;
    let channel = Channel::accept(connection, &key, Timeouts::default())?;
    if !channel.route().is_new() || channel.purpose() != Purpose::Control {
        return Err(Error::Protocol("a connection for something else".into()));
    }
    let peer = channel.peer().to_string();
    let (sender, receiver) = channel.split();
    let mut session = Session { args, key, lanes, sender, receiver, peer, vdso: None };
    let result = session.run();
    if let Err(e) = &result {
        let reason = Reason { reason: e.to_string(), remedy: e.remedy().to_owned() };
        let _ = say_to_source(&mut session.sender, DestinationMessage::Failed(reason));
    }
    result
}

struct Session<'a> {
    args: &'a SessionArgs,
    key: Key,
    lanes: UnixStream,
    sender: Sender,
    receiver: Receiver,
    peer: String,
    /// The process's vdso, if this kernel's is another.
    vdso: Option<Vec<u8>>,
}

/// What is ready before the freeze.
struct Prepared {
    dir: MigrationDir,
    gate: Gate,
    restorer: Restorer,
    urgent: Channel,
    bulk: Vec<Channel>,
}

/// The restored process at its gate.
struct AtTheGate {
    manifest: Manifest,
    /// What restore left mapped in the process.
    ours: Vec<Range<u64>>,
    drain: Arc<Drain>,
    timed: Vec<TimedThread>,
}

impl Session<'_> {
    fn run(&mut self) -> Result<()> {
        let Some(hello) = self.negotiate()? else { return Ok(()) };
        let mut prepared = self.prepare(&hello)?;
        let ready = self.restore(&mut prepared).and_then(|at| {
            self.await_commit(&prepared)?;
            Ok(at)
        });
        let at = match ready {
            Ok(at) => at,
            Err(e) => {
                // Whoever asks from now on is told NEVER; the copy that waits at the gate ends.
                prepared.gate.decide(gate::NEVER);
                prepared.restorer.newborn().kill();
                prepared.dir.remove();
                return Err(e);
            }
        };
        self.drain(&hello, prepared, at)
    }

    /// Hears what the source wants, and answers with all that stands in the way. `None` when that
    /// ended it.
    fn negotiate(&mut self) -> Result<Option<Hello>> {
        let mut hello = self.hear_hello()?;
        if !hello.has_digests && hello.boot_id != clocks::boot_id()? {
            let verdict = Verdict { wants_digests: true, ..Verdict::default() };
            say_to_source(&mut self.sender, DestinationMessage::Verdict(verdict))?;
            hello = self.hear_hello()?;
        }
        failpoints::pass("destination-hello")?;
        let sound = rundir::is_id(&hello.id)
            && hello.ranges.len().is_multiple_of(2)
            && hello.ranges.is_sorted();
        if !sound {
            return Err(Error::Protocol("a malformed hello".into()));
        }
        let requirements = Requirements::decode(&*hello.requirements)
            .map_err(|e| Error::Protocol(format!("malformed requirements ({e})")))?;
        let mut blockers: Vec<Blocker> = check_destination(&requirements)
            .into_iter()
            .map(|b| Blocker { object: b.object, reason: b.reason, remedy: b.remedy })
            .collect();
        self.vdso = foreign_vdso(&hello)?;
        blockers.extend(self.vdso.as_ref().and_then(|foreign| vdso_blocker(foreign)));
        let refused = !blockers.is_empty();
        let verdict = Verdict {
            blockers,
            route: self.args.route.bytes().to_vec(),
            boot_id: failpoints::told_boot_id(clocks::boot_id()?),
            bulk_lanes: hello.bulk_lanes.clamp(1, BULK_LANES_MAX),
            wants_digests: false,
            foreign_vdso: self.vdso.is_some(),
        };
        say_to_source(&mut self.sender, DestinationMessage::Verdict(verdict))?;
        Ok((!refused).then_some(hello))
    }

    fn hear_hello(&mut self) -> Result<Hello> {
        match hear_source(&mut self.receiver, Some(STEP_TIMEOUT))? {
            SourceMessage::Hello(hello) => Ok(hello),
            _ => unexpected("hello"),
        }
    }

    fn prepare(&mut self, hello: &Hello) -> Result<Prepared> {
        let bulk_lanes = hello.bulk_lanes.clamp(1, BULK_LANES_MAX);
        let (urgent, bulk) = self.accept_lanes(bulk_lanes)?;
        failpoints::pass("destination-lanes")?;
        let offsets = self.clock_offsets(hello)?;
        let dir = MigrationDir::create(&self.args.run_dir, Role::Destination, &hello.id)?;
        let prepared = Self::make_newborn(hello, offsets, &dir, self.vdso.clone());
        let (gate, restorer) = match prepared {
            Ok(both) => both,
            Err(e) => {
                dir.remove();
                return Err(e);
            }
        };
        let prepared = Prepared { dir, gate, restorer, urgent, bulk };
        let told = failpoints::pass("destination-prepared")
            .and_then(|()| say_to_source(&mut self.sender, DestinationMessage::Prepared(Empty {})));
        if let Err(e) = told {
            prepared.restorer.newborn().kill();
            prepared.dir.remove();
            return Err(e);
        }
        Ok(prepared)
    }

    fn make_newborn(
        hello: &Hello,
        offsets: Offsets,
        dir: &MigrationDir,
        foreign_vdso: Option<Vec<u8>>,
    ) -> Result<(Gate, Restorer)> {
        let gate = Gate::create(&dir.file("gate"))?;
        let config = PrepareConfig {
            exe: PathBuf::from("/proc/self/exe"),
            init_subcommand: INIT_SUBCOMMAND.into(),
            pid: hello.pid,
            ranges: hello.ranges.chunks_exact(2).map(|r| (r[0], r[1])).collect(),
            monotonic_offset_ns: offsets.monotonic_ns,
            boottime_offset_ns: offsets.boottime_ns,
            exit_file: dir.file(rundir::EXIT),
            foreign_vdso,
        };
        let restorer = Restorer::prepare(&config, &gate)?;
        Ok((gate, restorer))
    }

    /// Takes the lanes that the agent hands over, in whatever order they come.
    fn accept_lanes(&mut self, bulk_lanes: u32) -> Result<(Channel, Vec<Channel>)> {
        let (mut urgent, mut bulk) = (None, Vec::new());
        while urgent.is_none() || bulk.len() < bulk_lanes as usize {
            let channel = Channel::accept(self.next_lane()?, &self.key, Timeouts::default())?;
            if channel.route() != self.args.route {
                return Err(Error::Protocol("a lane for another session".into()));
            }
            match channel.purpose() {
                Purpose::Urgent if urgent.is_none() => urgent = Some(channel),
                Purpose::Bulk(_) if bulk.len() < bulk_lanes as usize => bulk.push(channel),
                _ => return Err(Error::Protocol("a lane too many".into())),
            }
        }
        match urgent {
            Some(urgent) => Ok((urgent, bulk)),
            None => unexpected("an urgent lane"),
        }
    }

    fn next_lane(&mut self) -> Result<OwnedFd> {
        self.wait_lane_or_end()?;
        let mut byte = [0u8; 1];
        let (_, fds) = recv_descriptors(&self.lanes, &mut byte)
            .map_err(|e| Error::io("wait for a lane", e.into()))?;
        fds.into_iter().next().ok_or_else(|| Error::Protocol("the agent ended".into()))
    }

    /// Waits until the agent has a lane for us. The source says nothing meanwhile, unless it gives up.
    fn wait_lane_or_end(&mut self) -> Result<()> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        while Instant::now() < deadline {
            if poll::readable(&self.lanes, POLL_INTERVAL).map_err(|e| Error::io("poll", e))? {
                return Ok(());
            }
            match self.receiver.recv_by(MESSAGE_LEN_MAX, Instant::now()) {
                Err(slipstream_transport::Error::Timeout { .. }) => {}
                Ok(_) => return Err(Error::Protocol("the source gave up".into())),
                Err(e) => return Err(e.into()),
            }
        }
        Err(Error::Protocol("no lanes in time".into()))
    }

    /// Offsets that make the process's clocks go on. Within one boot they are what they were.
    fn clock_offsets(&mut self, hello: &Hello) -> Result<Offsets> {
        if hello.boot_id == clocks::boot_id()? {
            return Ok(Offsets {
                monotonic_ns: hello.monotonic_offset_ns,
                boottime_ns: hello.boottime_offset_ns,
            });
        }
        let mut exchanges = Vec::with_capacity(CLOCK_PROBES);
        for _ in 0..CLOCK_PROBES {
            let sent = clocks::host_clocks()?;
            say_to_source(&mut self.sender, DestinationMessage::ClockProbe(Empty {}))?;
            let theirs = match hear_source(&mut self.receiver, Some(STEP_TIMEOUT))? {
                SourceMessage::ClockReading(reading) => reading,
                _ => return unexpected("a clock reading"),
            };
            exchanges.push(Exchange { sent, theirs, received: clocks::host_clocks()? });
        }
        clocks::best_offsets(&exchanges).ok_or_else(|| Error::Internal("no clock".into()))
    }

    /// Hears the manifest and brings the process to its gate.
    fn restore(&mut self, prepared: &mut Prepared) -> Result<AtTheGate> {
        let encoded = staged::receive_manifest(
            &mut self.sender,
            &mut self.receiver,
            &mut prepared.restorer,
            STEP_TIMEOUT,
        )?;
        let began = Instant::now();
        let manifest = Manifest::decode(&*encoded)
            .map_err(|e| Error::Protocol(format!("malformed manifest ({e})")))?;
        let mapped = prepared.restorer.map(&manifest)?;
        failpoints::pass("destination-mapped")?;
        prepared.restorer.install(&manifest, &mapped.uffd)?;
        failpoints::pass("destination-pages")?;
        let timed = prepared.restorer.finish(&manifest, &mapped)?;
        let mut ours = prepared.restorer.ranges();
        ours.push(mapped.ring_range.clone());
        let drain =
            Arc::new(Drain::new(&manifest, mapped, prepared.restorer.newborn().process.pid())?);
        failpoints::pass("destination-restored")?;
        let restore_us = began.elapsed().as_micros() as u64;
        say_to_source(&mut self.sender, DestinationMessage::Ready(Ready { restore_us }))?;
        Ok(AtTheGate { manifest, ours, drain, timed })
    }

    /// Waits for the source to commit. On any other end the caller says NEVER.
    fn await_commit(&mut self, prepared: &Prepared) -> Result<()> {
        match hear_source(&mut self.receiver, Some(FROZEN_TIMEOUT))? {
            SourceMessage::Commit(_) => {}
            _ => return unexpected("commit"),
        }
        let _ = prepared;
        Ok(())
    }

    /// Opens the gate, and serves pages until nothing is missing.
    fn drain(&mut self, hello: &Hello, prepared: Prepared, at: AtTheGate) -> Result<()> {
        let Prepared { dir, gate: gate_file, restorer, urgent, bulk } = prepared;
        let AtTheGate { manifest, ours, drain, timed } = at;
        let process = &restorer.newborn().process;
        let fault_thread = faults::start(Arc::clone(&drain), Box::new(TcpPageLane::new(urgent)))?;
        let resumed_at = Instant::now();
        if gate_file.decide(gate::RUN) != gate::RUN {
            return Err(Error::Refused {
                reason: "the migration was aborted".into(),
                remedy: String::new(),
            });
        }
        let resumed = Resumed { host_pid: process.pid() };
        say_to_source(&mut self.sender, DestinationMessage::Resumed(resumed))?;
        let (peer, pid) = (self.peer.clone(), process.pid());
        let status = |phase: &str, detail: &str| Status {
            id: hello.id.clone(),
            role: Role::Destination,
            phase: phase.to_owned(),
            pid: Some(pid),
            peer: peer.clone(),
            figures: None,
            detail: detail.to_owned(),
        };
        // The process runs: from here on a full disk must not end what brings its pages.
        let tell = |phase: &str| {
            if let Err(e) = dir.write_status(&status(phase, "")) {
                tracing::warn!("{e}");
            }
        };
        tell("drain");
        if let Err(e) = settle_timed(process.pid(), &timed) {
            tracing::warn!("{e}");
        }
        let bulk_threads: Vec<_> = bulk
            .into_iter()
            .map(|lane| {
                let lane = TcpPageLane::new(lane).with_pace(Arc::clone(drain.pace()));
                bulk::start(Arc::clone(&drain), Box::new(lane))
            })
            .collect();
        receive_present_map(&mut self.receiver, &drain, &named_ranges(&manifest))?;
        self.report_until_complete(&drain)?;
        let drain_us = resumed_at.elapsed().as_micros() as u64;
        let exited = process.exited();
        finish::finish(&drain, &manifest, process, &ours)?;
        drain.end();
        for thread in bulk_threads.into_iter().chain(std::iter::once(fault_thread)) {
            let _ = thread.join();
        }
        let figures = drain.figures();
        drop(drain);
        tell("completed");
        let completed = Completed { figures, drain_us, exited };
        say_to_source(&mut self.sender, DestinationMessage::Completed(completed))?;
        // The source ends its copy; whether it says goodbye matters to nobody here.
        let _ = hear_source(&mut self.receiver, Some(BYE_TIMEOUT));
        Ok(())
    }

    fn report_until_complete(&mut self, drain: &Drain) -> Result<()> {
        let mut reported = Instant::now();
        while !drain.complete() {
            if let Some(e) = drain.take_failure() {
                return Err(e);
            }
            drain.wait_news(TICK);
            if reported.elapsed() >= PROGRESS_INTERVAL {
                reported = Instant::now();
                let figures: Figures = drain.figures();
                say_to_source(&mut self.sender, DestinationMessage::Progress(figures))?;
            }
        }
        Ok(())
    }
}

/// The ranges by whose addresses the source names pages.
fn named_ranges(m: &Manifest) -> Vec<LazyRange> {
    lazy_views(m).into_iter().filter(|v| v.alias_of.is_none()).map(|v| v.range).collect()
}

/// Takes the present map as it comes; what lies between two runs does not exist.
fn receive_present_map(receiver: &mut Receiver, drain: &Drain, lazy: &[LazyRange]) -> Result<()> {
    let mut gaps = Gaps::new(lazy);
    loop {
        match hear_source(receiver, Some(STEP_TIMEOUT))? {
            SourceMessage::PresentMap(map) => {
                let runs = map
                    .unpack()
                    .ok_or_else(|| Error::Protocol("a malformed present map".into()))?;
                for run in &runs {
                    for (start, len) in gaps.before(run) {
                        drain.absent(start, len)?;
                    }
                    drain.present(run)?;
                }
            }
            SourceMessage::PresentMapEnd(_) => break,
            _ => return unexpected("the present map"),
        }
    }
    for (start, len) in gaps.rest() {
        drain.absent(start, len)?;
    }
    drain.map_complete();
    Ok(())
}

/// What lies between runs, within the lazy ranges.
struct Gaps {
    ranges: Vec<(u64, u64)>,
    index: usize,
    at: u64,
}

impl Gaps {
    fn new(lazy: &[LazyRange]) -> Self {
        let ranges: Vec<_> = lazy.iter().map(|r| (r.start, r.start + r.len_bytes)).collect();
        let at = ranges.first().map_or(u64::MAX, |r| r.0);
        Self { ranges, index: 0, at }
    }

    /// The gaps up to a run.
    fn before(&mut self, run: &PresentRun) -> Vec<(u64, u64)> {
        let gaps = self.up_to(run.start);
        self.at = self.at.max(run.start + run.len_bytes);
        gaps
    }

    /// The gaps after the last run.
    fn rest(&mut self) -> Vec<(u64, u64)> {
        self.up_to(u64::MAX)
    }

    fn up_to(&mut self, limit: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        while let Some((start, end)) = self.ranges.get(self.index).copied() {
            let from = self.at.max(start);
            let to = end.min(limit);
            if from < to {
                gaps.push((from, to - from));
                self.at = to;
            }
            if limit <= end {
                break;
            }
            self.index += 1;
        }
        gaps
    }
}

/// The image of the process's vdso, if this kernel's is another.
fn foreign_vdso(hello: &Hello) -> Result<Option<Vec<u8>>> {
    if hello.vdso.is_empty() {
        return Ok(None);
    }
    let same = own_vdso_image()? == hello.vdso && !failpoints::pretends_foreign_vdso();
    Ok((!same).then(|| hello.vdso.clone()))
}

fn own_vdso_image() -> Result<Vec<u8>> {
    let Some((start, end)) = own_vdso().last().copied() else { return Ok(Vec::new()) };
    let mut image = vec![0u8; (end - start) as usize];
    ProcMem::open(std::process::id() as i32)?.read(start, &mut image)?;
    Ok(image)
}

/// Whether the functions of a foreign vdso can be had here.
fn vdso_blocker(foreign: &[u8]) -> Option<Blocker> {
    let reason = match own_vdso_image() {
        Ok(own) => vdso::redirect(foreign, &own, 0).err()?,
        Err(e) => e.to_string(),
    };
    let remedy = "move to a host whose kernel is as new".into();
    Some(Blocker { object: "destination".into(), reason, remedy })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, len_bytes: u64) -> PresentRun {
        PresentRun { start, len_bytes, huge: false }
    }

    #[test]
    fn gaps_are_what_runs_leave() {
        let lazy = [
            LazyRange { start: 0x1000, len_bytes: 0x4000, page_size: 4096 },
            LazyRange { start: 0x10000, len_bytes: 0x2000, page_size: 4096 },
        ];
        let mut gaps = Gaps::new(&lazy);
        assert_eq!(gaps.before(&run(0x2000, 0x1000)), [(0x1000, 0x1000)]);
        assert_eq!(gaps.before(&run(0x3000, 0x1000)), []);
        assert_eq!(gaps.before(&run(0x10000, 0x1000)), [(0x4000, 0x1000)]);
        assert_eq!(gaps.rest(), [(0x11000, 0x1000)]);
    }
}
