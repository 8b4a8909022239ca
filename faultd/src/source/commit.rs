//! Commit on the source: the copy is stopped for good, the fact is journalled, then told.
//!
//! Parked threads have registers that can only pause and all signals blocked; the process is then
//! stopped. A SIGCONT from anywhere wakes threads that pause. The registers they had are in the
//! journal: only an answer of NEVER brings them back.

use crate::commit_protocol::Journal;
use crate::error::{Error, Result};
use crate::failpoints;
use crate::rundir::MigrationDir;
use slipstream_core::arch::Regs;
use slipstream_core::capture::state::signals::Watch;
use slipstream_core::freeze::Frozen;
use slipstream_core::inject::SourceScratch;
use slipstream_core::program::{Arg, Program};
use slipstream_core::sys::pidfd::PidFd;
use std::time::Duration;

/// File of the journal that says how far the commit is: `committing`, then `committed`.
const JOURNAL: &str = "commit";
/// File of the journal with the parked registers: for each thread its number, mask and registers.
pub const REGISTERS: &str = "parked-registers";
const END_TIMEOUT: Duration = Duration::from_secs(5);
const DROP_ATTEMPTS: u32 = 3;

/// Journals the registers that parking takes away, and prepares the word that they matter. Done early, while the
/// destination restores.
pub fn prepare_journal(frozen: &Frozen, dir: &MigrationDir) -> Result<()> {
    let mut image = Vec::new();
    for t in frozen.threads() {
        image.extend_from_slice(&i64::from(t.tid).to_le_bytes());
        image.extend_from_slice(&t.sigmask.to_le_bytes());
        image.extend_from_slice(&t.regs.to_bytes());
    }
    dir.write(REGISTERS, &image)?;
    dir.prepare(JOURNAL, Journal::Committing.content())
}

/// Journals that the commit may be on its way, parks every thread, and stops the process. From here on
/// the source copy runs only after NEVER, whatever happens to this session.
///
/// `signals` are those that were captured; others that came since are a reason to fail.
///
/// Not before the destination is ready: a session that is killed leaves a frozen process that runs on,
/// but a parked one that pauses. An error lets the caller's freeze undo all of it.
pub fn declare(
    frozen: &mut Frozen,
    scratch: &SourceScratch,
    process: &PidFd,
    dir: &MigrationDir,
    signals: &Watch,
) -> Result<()> {
    dir.publish(JOURNAL)?;
    failpoints::reached("source-journalled");
    frozen.park(scratch.pause_loop())?;
    failpoints::pass("source-parked")?;
    refuse_lost_signals(frozen, signals)?;
    process.kill(libc::SIGSTOP)?;
    failpoints::reached("source-stopped");
    frozen.forget();
    Ok(())
}

/// A signal that came after the capture is in no manifest. Nobody takes it while the process is stopped, so
/// when that goes on here it has it.
fn refuse_lost_signals(frozen: &Frozen, signals: &Watch) -> Result<()> {
    match signals.arrived(frozen)? {
        Some(signal) => Err(Error::Refused {
            reason: format!(
                "process {}: signal {signal} arrived while it was being moved",
                frozen.pid()
            ),
            remedy: "try again".into(),
        }),
        None => Ok(()),
    }
}

/// How far the commit of a migration is.
pub fn journal(dir: &MigrationDir) -> Result<Journal> {
    Ok(Journal::parse(dir.read(JOURNAL)?.as_deref()))
}

/// Notes that the destination has said that its copy runs.
pub fn note_committed(dir: &MigrationDir) {
    // "committing" stands there already; a full disk must not end what has gone well.
    if let Err(e) = dir.write(JOURNAL, Journal::Committed.content()) {
        tracing::warn!("{e}");
    }
}

/// The destination's copy never runs: the copy here goes on as if nothing had happened.
pub fn bring_back(pid: i32, scratch: SourceScratch, dir: &MigrationDir) -> Result<()> {
    let process = PidFd::open(pid)?;
    let image = dir.read(REGISTERS)?.unwrap_or_default();
    let known = parse_registers(&image)
        .ok_or_else(|| Error::Internal("the journal of registers is damaged".into()))?;
    let mut frozen = Frozen::freeze(pid, END_TIMEOUT)?;
    // A copy that can't be brought back stays as it is: stopped, whatever becomes of this session.
    if let Err(e) = frozen.bring_back(&scratch.range(), &known) {
        frozen.abandon();
        return Err(e.into());
    }
    frozen.thaw()?;
    process.kill(libc::SIGCONT)?;
    match scratch.unmap(END_TIMEOUT) {
        Ok(()) | Err(slipstream_core::Error::Gone { .. }) => {}
        Err(e) => tracing::warn!("scratch memory stays mapped: {e}"),
    }
    Ok(())
}

/// Reads the journal of registers: of each thread its number, mask and registers.
pub fn parse_registers(image: &[u8]) -> Option<Vec<(i32, u64, Regs)>> {
    let len = 16 + size_of::<Regs>();
    if !image.len().is_multiple_of(len) {
        return None;
    }
    image
        .chunks_exact(len)
        .map(|raw| {
            let tid = i64::from_le_bytes(raw[..8].try_into().ok()?);
            let mask = u64::from_le_bytes(raw[8..16].try_into().ok()?);
            Some((i32::try_from(tid).ok()?, mask, Regs::from_bytes(&raw[16..])?))
        })
        .collect()
}

/// Ends the frozen copy as a program that exits, not as one that is killed: its parent sees an exit,
/// and nothing is written to memory that others share. On a host that is short of processors it may take
/// more than one attempt.
pub fn drop_copy(pid: i32, scratch: &SourceScratch) -> Result<()> {
    for _ in 1..DROP_ATTEMPTS {
        match try_drop(pid, scratch) {
            Ok(()) => return Ok(()),
            Err(e) => tracing::warn!("the frozen copy has not ended yet: {e}"),
        }
    }
    try_drop(pid, scratch)
}

fn try_drop(pid: i32, scratch: &SourceScratch) -> Result<()> {
    let frozen = match Frozen::freeze(pid, END_TIMEOUT) {
        Ok(frozen) => frozen,
        Err(slipstream_core::Error::Gone { .. }) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    scratch.run(&frozen, &mut |_, program: &mut Program| {
        let none: [Arg; 1] = [0.into()];
        program.may("clear_child_tid", libc::SYS_set_tid_address, none);
        program.may("robust list", libc::SYS_set_robust_list, [0.into(), 24.into()]);
    })?;
    scratch.exit_group(frozen, 0, END_TIMEOUT).map_err(Error::from)
}
