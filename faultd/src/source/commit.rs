//! Commit on the source: the copy is stopped for good, the fact is journalled, then told.
//!
//! Parked threads have registers that can only pause and all signals blocked; the process is then
//! stopped. A SIGCONT from anywhere wakes threads that pause. The registers they had are in the
//! journal: only an answer of NEVER brings them back.

use crate::error::{Error, Result};
use crate::failpoints;
use crate::rundir::MigrationDir;
use slipstream_core::freeze::Frozen;
use slipstream_core::inject::SourceScratch;
use slipstream_core::program::{Arg, Program};
use slipstream_core::sys::pidfd::PidFd;
use std::time::Duration;

/// File of the journal that says how far the commit is: `committing`, then `committed`.
pub const JOURNAL: &str = "commit";
/// File of the journal with the parked registers: for each thread its number, mask and registers.
pub const REGISTERS: &str = "parked-registers";
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Journals the registers that parking takes away. Done early, while the destination restores.
pub fn journal_registers(frozen: &Frozen, dir: &MigrationDir) -> Result<()> {
    let mut image = Vec::new();
    for t in frozen.threads() {
        image.extend_from_slice(&i64::from(t.tid).to_le_bytes());
        image.extend_from_slice(&t.sigmask.to_le_bytes());
        image.extend_from_slice(&t.regs.to_bytes());
    }
    dir.write(REGISTERS, &image)
}

/// Journals that the commit may be on its way, parks every thread, and stops the process. From here on
/// the source copy runs only after NEVER, whatever happens to this session.
///
/// Not before the destination is ready: a session that is killed leaves a frozen process that runs on,
/// but a parked one that pauses. An error lets the caller's freeze undo all of it.
pub fn declare(
    frozen: &mut Frozen,
    scratch: &SourceScratch,
    process: &PidFd,
    dir: &MigrationDir,
) -> Result<()> {
    dir.write(JOURNAL, b"committing\n")?;
    frozen.park(scratch.pause_loop())?;
    failpoints::pass("source-parked")?;
    process.kill(libc::SIGSTOP)?;
    frozen.forget();
    Ok(())
}

/// Ends the tracing of the stopped copy, once the destination has said that its copy runs.
pub fn settle(frozen: Frozen, dir: &MigrationDir) {
    frozen.abandon();
    // "committing" stands there already; a full disk must not end what has gone well.
    if let Err(e) = dir.write(JOURNAL, b"committed\n") {
        tracing::warn!("{e}");
    }
}

/// Ends the frozen copy as a program that exits, not as one that is killed: its parent sees an exit,
/// and nothing is written to memory that others share.
pub fn drop_copy(pid: i32, scratch: &SourceScratch) -> Result<()> {
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
