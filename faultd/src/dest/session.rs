//! The destination session: one migration, from the first message to the last page.

use crate::agent::SessionArgs;
use crate::cgroup;
use crate::clocks::{self, Exchange, Offsets};
use crate::commit_protocol::Call;
use crate::control::{hear_source, say_to_source, unexpected};
use crate::dest::course::{Course, Link};
use crate::dest::drain::Drain;
use crate::dest::held::{Account, Ahead};
use crate::dest::rdma::{Choice, PageLanes};
use crate::dest::staged;
use crate::dest::take_over::{self, wish};
use crate::error::{Error, Result};
use crate::events::Role;
use crate::failpoints;
use crate::protocol::{
    Blocker, DestinationMessage, Empty, Hello, MESSAGE_LEN_MAX, Ready, Reason, Resumed,
    SourceMessage, Verdict,
};
use crate::rundir::{self, MigrationDir};
use prost::Message;
use slipstream_core::arch::vdso;
use slipstream_core::preflight::destination::check_destination;
use slipstream_core::preflight::requirements::Requirements;
use slipstream_core::restore::decode::decode_manifest;
use slipstream_core::restore::engine::{PrepareConfig, Restorer, TimedThread};
use slipstream_core::restore::newborn::own_vdso;
use slipstream_core::restore::scratch::{Gate, gate};
use slipstream_core::sys::mem::ProcMem;
use slipstream_core::sys::poll;
use slipstream_core::sys::spawn::{recv_descriptors, take_handed};
use slipstream_transport::{Channel, Key, Pace, Purpose, Receiver, Route, Sender, Timeouts};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
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

/// Runs the session that a peer's connection started. Descriptor 3 is the connection, 4 the socket
/// through which the agent hands over lanes.
pub fn run(args: &SessionArgs) -> Result<()> {
    let io = |e| Error::io("take over the agent's descriptors", e);
    let connection = take_handed(0).map_err(io)?;
    let lanes = UnixStream::from(take_handed(1).map_err(io)?);
    let key = Key::take_over(&lanes).map_err(io)?;
    let channel = Channel::accept(connection, &key, Timeouts::default())?;
    let expected = if args.id.is_some() { args.route } else { Route::NEW };
    if channel.route() != expected || channel.purpose() != Purpose::Control {
        return Err(Error::Protocol("a connection for something else".into()));
    }
    let peer = channel.peer().to_string();
    let ends = (channel.local_ip(), channel.peer_ip());
    let (mut sender, mut receiver) = channel.split();
    if let Some(id) = &args.id {
        let from = Lanes { socket: &lanes, key: &key, route: args.route };
        return take_over::run(args, id, &mut sender, &mut receiver, &from, &peer);
    }
    let mut session = Session {
        args,
        key,
        lanes,
        sender,
        receiver,
        peer,
        ends,
        rdma: Choice::default(),
        vdso: None,
        said_ready: false,
        group: None,
    };
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
    /// This host's address and the source's.
    ends: (IpAddr, IpAddr),
    rdma: Choice,
    /// The process's vdso, if this kernel's is another.
    vdso: Option<Vec<u8>>,
    /// From here on the source may commit without our knowing.
    said_ready: bool,
    group: Option<cgroup::Membership>,
}

/// What is ready before the freeze.
struct Prepared {
    dir: MigrationDir,
    gate: Gate,
    restorer: Restorer,
    lanes: PageLanes,
    pace: Arc<Pace>,
}

/// The restored process at its gate.
struct AtTheGate {
    account: Account,
    drain: Arc<Drain>,
    timed: Vec<TimedThread>,
    /// Answers faults from the first on.
    faults: JoinHandle<()>,
}

impl Session<'_> {
    fn run(&mut self) -> Result<()> {
        let Some(hello) = self.negotiate()? else { return Ok(()) };
        let (mut prepared, ahead) = self.prepare(&hello)?;
        let ready = self.restore(&mut prepared, ahead, hello.prefetch_limit).and_then(|at| {
            self.await_commit()?;
            Ok(at)
        });
        let at = match ready {
            Ok(at) => at,
            Err(e) => {
                // Whoever asks from now on is told NEVER; the copy that waits at the gate ends.
                prepared.gate.decide(wish(Call::GiveUp));
                prepared.restorer.newborn().kill();
                // A source that was told "ready" may be past its commit: it will ask, and be told.
                if !self.said_ready || matches!(e, Error::Peer { .. }) {
                    prepared.dir.remove();
                }
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
        let bulk_lanes = hello.bulk_lanes.clamp(1, BULK_LANES_MAX);
        let (candidates, lanes) = (&hello.rdma_candidates, bulk_lanes as usize + 1);
        match Choice::new(&self.args.carrier, candidates, self.ends, lanes) {
            Ok(choice) => self.rdma = choice,
            Err(e) => blockers.push(Blocker {
                object: "destination".into(),
                reason: e.to_string(),
                remedy: e.remedy().to_owned(),
            }),
        }
        let refused = !blockers.is_empty();
        let verdict = Verdict {
            blockers,
            route: self.args.route.bytes().to_vec(),
            boot_id: failpoints::told_boot_id(clocks::boot_id()?),
            bulk_lanes,
            rdma_pick: self.rdma.pick.clone(),
            why_tcp: self.rdma.why_tcp.clone(),
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

    fn prepare(&mut self, hello: &Hello) -> Result<(Prepared, Ahead)> {
        let ends = (&mut self.sender, &mut self.receiver);
        self.rdma.connect(ends, STEP_TIMEOUT, hello.timed_reads)?;
        let bulk_lanes = hello.bulk_lanes.clamp(1, BULK_LANES_MAX);
        let lanes = Lanes { socket: &self.lanes, key: &self.key, route: self.args.route };
        let (urgent, bulk) = lanes.accept(bulk_lanes, &mut self.receiver)?;
        failpoints::pass("destination-lanes")?;
        let pace = Arc::new(Pace::default());
        let lanes = std::mem::take(&mut self.rdma).lanes(urgent, bulk, &pace);
        let offsets = self.clock_offsets(hello)?;
        let dir = MigrationDir::create(&self.args.run_dir, Role::Destination, &hello.id)?;
        self.group = Some(cgroup::enter(&hello.id));
        let prepared = Self::make_newborn(hello, offsets, &dir, self.vdso.clone()).and_then(
            |(gate, restorer)| {
                // By these a later session finds what this one leaves.
                let init = restorer.newborn().keeper.init().pid();
                let made = rundir::full_name(init)
                    .and_then(|name| dir.write(rundir::INIT, name.as_bytes()))
                    .and_then(|()| dir.write(rundir::ROUTE, self.args.route_text().as_bytes()))
                    .and_then(|()| Ahead::make(Arc::clone(&restorer.newborn().keeper)));
                match made {
                    Ok(ahead) => Ok((gate, restorer, ahead)),
                    Err(e) => {
                        restorer.newborn().kill();
                        Err(e)
                    }
                }
            },
        );
        let (gate, restorer, ahead) = match prepared {
            Ok(all) => all,
            Err(e) => {
                dir.remove();
                return Err(e);
            }
        };
        let prepared = Prepared { dir, gate, restorer, lanes, pace };
        let told = failpoints::pass("destination-prepared")
            .and_then(|()| say_to_source(&mut self.sender, DestinationMessage::Prepared(Empty {})));
        if let Err(e) = told {
            prepared.restorer.newborn().kill();
            prepared.dir.remove();
            return Err(e);
        }
        Ok((prepared, ahead))
    }

    fn make_newborn(
        hello: &Hello,
        offsets: Offsets,
        dir: &MigrationDir,
        foreign_vdso: Option<Vec<u8>>,
    ) -> Result<(Gate, Restorer)> {
        let gate = Gate::create(&dir.file(rundir::GATE))?;
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
    fn restore(
        &mut self,
        prepared: &mut Prepared,
        ahead: Ahead,
        prefetch_limit: u64,
    ) -> Result<AtTheGate> {
        let encoded = staged::receive_manifest(
            &mut self.sender,
            &mut self.receiver,
            &mut prepared.restorer,
            STEP_TIMEOUT,
        )?;
        let began = Instant::now();
        let manifest = decode_manifest(&encoded)?;
        drop(encoded);
        let mapped = prepared.restorer.map(&manifest)?;
        failpoints::pass("destination-mapped")?;
        prepared.restorer.install(&manifest, &mapped.uffd)?;
        failpoints::pass("destination-pages")?;
        let last = prepared.restorer.begin_last(&manifest, &mapped)?;
        // While the process makes its threads: what the drain needs.
        let mut ours = prepared.restorer.ranges();
        ours.push(mapped.ring_range.clone());
        let account = Account::new(&manifest, &ours, prefetch_limit);
        let pid = prepared.restorer.newborn().process.pid();
        let drain = Drain::new(&manifest, mapped, pid, ahead, Arc::clone(&prepared.pace));
        let timed = prepared.restorer.end_last(last)?;
        let drain = Arc::new(drain?);
        failpoints::pass("destination-restored")?;
        let restore_us = began.elapsed().as_micros() as u64;
        self.said_ready = true;
        say_to_source(&mut self.sender, DestinationMessage::Ready(Ready { restore_us }))?;
        failpoints::reached("destination-ready");
        // While the source parks its threads. Should it not commit, the thread ends with this process.
        drain.keep(&account)?;
        failpoints::reached("destination-kept");
        let faults = prepared.lanes.start_faults(&drain)?;
        Ok(AtTheGate { account, drain, timed, faults })
    }

    /// Waits for the source to commit. On any other end the caller says NEVER.
    fn await_commit(&mut self) -> Result<()> {
        match hear_source(&mut self.receiver, Some(FROZEN_TIMEOUT))? {
            SourceMessage::Commit(_) => Ok(()),
            _ => unexpected("commit"),
        }
    }

    /// Opens the gate, and serves pages until nothing is missing.
    fn drain(&mut self, hello: &Hello, prepared: Prepared, at: AtTheGate) -> Result<()> {
        let Prepared { dir, gate: gate_file, restorer, lanes, .. } = prepared;
        let AtTheGate { account, drain, timed, faults } = at;
        let process = &restorer.newborn().process;
        let mut course = Course {
            id: &hello.id,
            peer: &self.peer,
            dir: &dir,
            drain,
            account,
            process,
            since: Instant::now(),
            rdma: lanes.watch,
        };
        failpoints::reached("destination-commit");
        if gate_file.decide(wish(Call::Commit)) != gate::RUN {
            return Err(Error::Refused {
                reason: "the migration was aborted".into(),
                remedy: String::new(),
            });
        }
        failpoints::reached("destination-run");
        let resumed = Resumed { host_pid: process.pid() };
        let told = say_to_source(&mut self.sender, DestinationMessage::Resumed(resumed));
        if let Err(e) = told {
            // The source will ask; until then nobody can bring pages.
            tracing::warn!("{e}");
        }
        // A source that has heard so never takes its copy back; to one that has not, RUN must not be forgotten.
        // A disk takes its time, and pages shall come.
        std::thread::spawn(move || {
            if let Err(e) = gate_file.flush() {
                tracing::warn!("{e}");
            }
        });
        let mut link = Link {
            sender: &mut self.sender,
            receiver: &mut self.receiver,
            newcomers: &self.lanes,
            key: &self.key,
        };
        course.run(&mut link, faults, lanes.bulk, &timed)
    }
}

/// Where lanes come from.
#[derive(Debug)]
pub struct Lanes<'a> {
    /// From the agent.
    pub socket: &'a UnixStream,
    /// Of the peer that may open them.
    pub key: &'a Key,
    /// Of this migration.
    pub route: Route,
}

impl Lanes<'_> {
    /// Takes the lanes that the agent hands over, in whatever order they come.
    /// Connections of strangers are dropped.
    pub fn accept(
        &self,
        bulk_lanes: u32,
        receiver: &mut Receiver,
    ) -> Result<(Channel, Vec<Channel>)> {
        let (mut urgent, mut bulk, until) = (None, Vec::new(), Instant::now() + STEP_TIMEOUT);
        while urgent.is_none() || bulk.len() < bulk_lanes as usize {
            if Instant::now() > until {
                return Err(Error::Protocol("no lanes in time".into()));
            }
            let lane = self.next_lane(receiver)?;
            let channel = match Channel::accept(lane, self.key, Timeouts::default()) {
                Ok(channel) if channel.route() == self.route => channel,
                // A stranger, who has seen the route go by.
                Ok(_) => continue,
                Err(e) => {
                    tracing::debug!("no lane of ours: {e}");
                    continue;
                }
            };
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

    fn next_lane(&self, receiver: &mut Receiver) -> Result<OwnedFd> {
        self.wait_lane_or_end(receiver)?;
        let mut byte = [0u8; 1];
        let (_, fds) = recv_descriptors(self.socket, &mut byte)
            .map_err(|e| Error::io("wait for a lane", e.into()))?;
        fds.into_iter().next().ok_or_else(|| Error::Protocol("the agent ended".into()))
    }

    /// Waits until the agent has a lane for us. The source says nothing meanwhile, unless it gives up.
    fn wait_lane_or_end(&self, receiver: &mut Receiver) -> Result<()> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        while Instant::now() < deadline {
            if poll::readable(self.socket, POLL_INTERVAL).map_err(|e| Error::io("poll", e))? {
                return Ok(());
            }
            match receiver.recv_by(MESSAGE_LEN_MAX, Instant::now()) {
                Err(slipstream_transport::Error::Timeout { .. }) => {}
                Ok(_) => return Err(Error::Protocol("the source gave up".into())),
                Err(e) => return Err(e.into()),
            }
        }
        Err(Error::Protocol("no lanes in time".into()))
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
