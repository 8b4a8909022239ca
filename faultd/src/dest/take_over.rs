//! A destination session that goes on where another one ended.
//!
//! The source has come back and named its migration by the route. What has been decided stands in the
//! gate; where nothing was, it is decided now: NEVER. What of the drain is left is with the keeper.

use crate::agent::SessionArgs;
use crate::cgroup;
use crate::commit_protocol::{Call, wishes_run};
use crate::control::{hear_source, say_to_source, unexpected};
use crate::dest::course::{Course, Link, goodbye};
use crate::dest::drain::Drain;
use crate::dest::held::Holdings;
use crate::dest::lost;
use crate::dest::rdma::{Choice, PageLanes};
use crate::dest::session::Lanes;
use crate::error::{Error, Result};
use crate::events::Role;
use crate::protocol::{Completed, DestinationMessage, Outcome, SourceMessage};
use crate::rundir::{self, MigrationDir};
use prost::Message;
use slipstream_core::restore::keeper::Keeper;
use slipstream_core::restore::scratch::{Gate, gate};
use slipstream_core::sys::pidfd::PidFd;
use slipstream_transport::{Pace, Receiver, Sender};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For the source to say what it wants.
const STEP_TIMEOUT: Duration = Duration::from_secs(30);
/// For a session that was killed to be gone.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const BULK_LANES_MAX: u32 = 4;
/// A source that has not asked by then has been told, or has ended. It stays stopped for as long as it can't ask.
const NEVER_KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// What the destination wishes the gate to say; what was decided first holds.
pub fn wish(call: Call) -> u32 {
    if wishes_run(call) { gate::RUN } else { gate::NEVER }
}

/// What giving a migration up has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aborted {
    /// The process never runs here; it goes on at its source.
    BeforeCommit,
    /// The process, which waited for its pages here, was ended.
    Ended,
    /// It runs here, and its pages are here or on their way: nothing was done.
    TooLate,
}

/// A user gives a migration up that is coming here, or that has come and waits for its source.
pub fn abort(run_dir: &Path, id: &str) -> Result<Aborted> {
    let gate = Gate::open(&rundir::destination_file(run_dir, id, rundir::GATE))?;
    if gate.decide(wish(Call::GiveUp)) == gate::NEVER {
        return Ok(Aborted::BeforeCommit);
    }
    Ok(match lost::waiting(run_dir, id) {
        Some(dir) => {
            lost::end(&dir, "given up here (`slipstream abort`) before its last page had come");
            Aborted::Ended
        }
        None => Aborted::TooLate,
    })
}

/// Takes the migration `id` up for a source that has come back on this control connection.
pub fn run(
    args: &SessionArgs,
    id: &str,
    sender: &mut Sender,
    receiver: &mut Receiver,
    lanes: &Lanes<'_>,
    peer: &str,
) -> Result<()> {
    let rejoin = match hear_source(receiver, Some(STEP_TIMEOUT))? {
        SourceMessage::Rejoin(rejoin) if rejoin.id == id => rejoin,
        _ => return unexpected("the name of the migration"),
    };
    // It holds the key and knows the route: whoever works here has a connection that is no more.
    rundir::end_destination_session(&args.run_dir, id);
    let dir = MigrationDir::open(&args.run_dir, Role::Destination, id, LOCK_TIMEOUT)?;
    dir.note_session()?;
    let _group = cgroup::enter(id);
    let gate = Gate::open(&dir.file(rundir::GATE))?;
    let init = dir.read(rundir::INIT)?.and_then(|name| String::from_utf8(name).ok());
    let init = init.as_deref().and_then(rundir::named_process);
    if gate.decide(wish(Call::Rejoin)) != gate::RUN {
        if let Some(init) = init {
            PidFd::open(init)?.kill(libc::SIGKILL)?;
        }
        let never = Outcome { run: false, ..Outcome::default() };
        say_to_source(sender, DestinationMessage::Outcome(never))?;
        // Until the source knows, the folder is the record of the decision.
        if let Ok(SourceMessage::Bye(_)) = hear_source(receiver, Some(STEP_TIMEOUT)) {
            dir.remove();
        }
        return Ok(());
    }
    let mut link = Link { sender, receiver, newcomers: lanes.socket, key: lanes.key };
    if rejoin.gone && init.is_some() && dir.read(rundir::COMPLETED)?.is_none() {
        lost::end(&dir, "its memory at the source was destroyed before the last page had left");
    }
    if let Some(why) = rundir::lost(&args.run_dir, id) {
        lost::finish_end(&dir);
        let lost = Outcome { run: true, lost: why, ..Outcome::default() };
        return say_to_source(link.sender, DestinationMessage::Outcome(lost));
    }
    let over = dir.read(rundir::COMPLETED)?.and_then(|bytes| Completed::decode(&*bytes).ok());
    let held = match (over, init) {
        (Some(completed), _) => return tell_over(&mut link, &dir, completed),
        (None, None) => return tell_ended(&mut link, &dir),
        (None, Some(init)) => find(init),
    };
    let Some((holdings, found)) = held? else { return tell_ended(&mut link, &dir) };
    // It may have exited, and left children that still lack pages.
    let process = PidFd::adopt_exited(found.process)?;
    let manifest = found.account.manifest();
    let pace = Arc::new(Pace::default());
    let (uffd, at_work) = (found.uffd, Arc::clone(&pace));
    let drain = Arc::new(Drain::take_up(&manifest, uffd, process.pid(), holdings, at_work)?);
    let outcome = Outcome { run: true, host_pid: process.pid(), ..Outcome::default() };
    say_to_source(link.sender, DestinationMessage::Outcome(outcome))?;
    let (urgent, bulk) = lanes.accept(rejoin.bulk_lanes.clamp(1, BULK_LANES_MAX), link.receiver)?;
    let mut lanes = Choice::default().lanes(urgent, bulk, &pace);
    let faults = lanes.start_faults(&drain)?;
    let PageLanes { bulk, watch: rdma, .. } = lanes;
    let (account, since) = (found.account, Instant::now());
    let mut course = Course { id, peer, dir: &dir, drain, account, process: &process, since, rdma };
    course.run(&mut link, faults, bulk, &[])
}

fn tell_over(link: &mut Link<'_>, dir: &MigrationDir, completed: Completed) -> Result<()> {
    let outcome = Outcome { run: true, completed: Some(completed.clone()), ..Outcome::default() };
    say_to_source(link.sender, DestinationMessage::Outcome(outcome))?;
    goodbye(link, dir, completed)
}

/// There is nothing here any more. If it ended by itself or was killed, nobody misses its pages; but only init knows of that.
fn tell_ended(link: &mut Link<'_>, dir: &MigrationDir) -> Result<()> {
    if dir.file(rundir::EXIT).exists() {
        return tell_over(link, dir, Completed { exited: true, ..Completed::default() });
    }
    let why = rundir::ENDED_WITH_INIT;
    dir.write(rundir::LOST, why.as_bytes())?;
    let lost = Outcome { run: true, lost: why.into(), ..Outcome::default() };
    say_to_source(link.sender, DestinationMessage::Outcome(lost))
}

/// What the keeper has; `None` when the process has ended meanwhile.
fn find(init: i32) -> Result<Option<(Holdings, crate::dest::held::Found)>> {
    let gone = |e: &slipstream_core::Error| matches!(e, slipstream_core::Error::Gone { .. });
    let keeper = match PidFd::open(init).and_then(Keeper::find) {
        Ok(keeper) => Arc::new(keeper),
        Err(e) if gone(&e) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    match Holdings::find(Arc::clone(&keeper)) {
        Ok(both) => Ok(Some(both)),
        Err(_) if keeper.init().exited() => Ok(None),
        Err(Error::Core(e)) if gone(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Settles what sessions that were killed before the decision have left: the copy here never runs. The
/// folder stays as the record of that, for the source may ask; for a month.
pub fn clean_up(run_dir: &Path) {
    for id in rundir::destinations(run_dir) {
        let Ok(dir) = MigrationDir::open(run_dir, Role::Destination, &id, Duration::ZERO) else {
            continue; // A session is at work there.
        };
        lost::finish_end(&dir);
        let Ok(gate) = Gate::open(&dir.file(rundir::GATE)) else { continue };
        if gate.decide(wish(Call::GiveUp)) != gate::NEVER {
            continue;
        }
        let name = dir.read(rundir::INIT).ok().flatten().and_then(|n| String::from_utf8(n).ok());
        if let Some(init) = name.as_deref().and_then(rundir::named_process)
            && let Ok(init) = PidFd::open(init)
        {
            let _ = init.kill(libc::SIGKILL);
        }
        if dir.age().is_some_and(|age| age > NEVER_KEPT) {
            dir.remove();
        }
    }
}
