//! What the source finds out by itself before it talks to anybody: preflight, and what is too slow for
//! the blackout.

use crate::clocks;
use crate::control::{hear_destination, say_to_destination, unexpected};
use crate::error::{Error, Result};
use crate::protocol::{DestinationMessage, Hello, SourceMessage, Verdict};
use prost::Message;
use slipstream_core::capture::assemble::{Prior, uses_guards};
use slipstream_core::capture::files::StdioPolicy;
use slipstream_core::capture::state::outside::Host;
use slipstream_core::capture::state::sleep::Sleeps;
use slipstream_core::freeze::list_threads;
use slipstream_core::preflight::Blocker;
use slipstream_core::preflight::source::{
    KnownFiles, SourceOptions, SourceReport, check_again, check_process, stopped,
};
use slipstream_core::proc::{maps, status};
use slipstream_core::sys::mem::ProcMem;
use slipstream_transport::{Receiver, Sender};
use std::ops::Range;
use std::time::Duration;

/// Bulk lanes asked for: with two at each end both cores of a small machine are busy.
const BULK_LANES: u32 = 2;

/// Everything known about the process before the freeze.
#[derive(Debug)]
pub struct Local {
    /// What preflight found.
    pub report: SourceReport,
    /// What capture needs.
    pub prior: Prior,
    /// Where no thread may be when it is frozen.
    pub avoid: Option<Range<u64>>,
    /// The destination is another host: it sees only what was written back of files.
    pub elsewhere: bool,
}

/// Where the process has its vdso.
pub fn vdso_range(pid: i32) -> Result<Option<Range<u64>>> {
    let lines = maps::read(pid)?;
    Ok(lines.iter().find(|l| l.path == b"[vdso]").map(|l| l.start..l.end))
}

/// Looks at the process. All blockers are found in one pass.
pub fn look(pid: i32, stdio: &StdioPolicy) -> std::result::Result<Local, Vec<Blocker>> {
    let options = SourceOptions { stdio: stdio.clone(), ..SourceOptions::default() };
    let report = check_process(pid, &options)?;
    let prior = prior(pid, &report, stdio)
        .map_err(|e| vec![Blocker::unknown(format!("process {pid}"), &e)])?;
    Ok(Local { report, prior, avoid: None, elsewhere: false })
}

fn prior(pid: i32, report: &SourceReport, stdio: &StdioPolicy) -> slipstream_core::Result<Prior> {
    let mut sleeps = Sleeps::default();
    sleeps.look(pid, &list_threads(pid)?);
    Ok(Prior {
        host: Host::read()?,
        sleeps,
        holders: report.holders.clone(),
        known_files: KnownFiles::of(&report.files.files, report.smaps.iter().map(|e| &e.line)),
        smaps: report.smaps.clone(),
        uses_guards: uses_guards(pid)?,
        stdio: stdio.clone(),
    })
}

/// Reads again, just before the freeze, what changes while preparations go on.
pub fn refresh(pid: i32, local: &mut Local) -> Result<()> {
    if let Some(b) = stopped(pid, &status::read(pid)?) {
        return Err(Error::Refused {
            reason: format!("{}: {}", b.object, b.reason),
            remedy: b.remedy,
        });
    }
    let options = SourceOptions { stdio: local.prior.stdio.clone(), ..SourceOptions::default() };
    let again = check_again(pid, &options, &local.prior.known_files).map_err(|b| since(&b))?;
    local.prior.smaps = again.smaps;
    local.prior.holders = again.holders;
    local.prior.uses_guards = uses_guards(pid)?;
    local.prior.sleeps.look(pid, &list_threads(pid)?);
    Ok(())
}

/// The first of the blockers that were not there when the process was first looked at.
fn since(blockers: &[Blocker]) -> Error {
    blockers.first().map_or(Error::Internal("no blocker".into()), |b| Error::Refused {
        reason: format!("{}: {}, while it was being moved", b.object, b.reason),
        remedy: if b.remedy.is_empty() {
            "try again".into()
        } else {
            format!("{}; try again", b.remedy)
        },
    })
}

/// The opening message.
fn hello(id: &str, pid: i32, local: &Local, wants: &Wants<'_>) -> Result<Hello> {
    let lines = maps::read(pid)?;
    let offsets = clocks::namespace_offsets(&pid.to_string())?;
    let vdso = match lines.iter().find(|l| l.path == b"[vdso]") {
        Some(line) => {
            let mut image = vec![0u8; line.len() as usize];
            ProcMem::open(pid)?.read(line.start, &mut image)?;
            image
        }
        None => Vec::new(),
    };
    let threads = slipstream_core::freeze::list_threads(pid)?.len();
    Ok(Hello {
        id: id.to_owned(),
        requirements: local.report.requirements.encode_to_vec(),
        ranges: lines.iter().flat_map(|l| [l.start, l.end]).collect(),
        threads: u32::try_from(threads).map_err(|e| Error::Internal(e.to_string()))?,
        pid: local.report.requirements.pid,
        boot_id: clocks::boot_id()?,
        monotonic_offset_ns: offsets.monotonic_ns,
        boottime_offset_ns: offsets.boottime_ns,
        vdso,
        bulk_lanes: BULK_LANES,
        has_digests: false,
        rdma_candidates: wants.rdma_candidates.to_vec(),
        timed_reads: wants.timed_reads,
        prefetch_limit: wants.prefetch_limit,
    })
}

/// What is asked of the destination beside the process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wants<'a> {
    /// The source's adapters; empty for TCP.
    pub rdma_candidates: &'a [u8],
    /// READs that shall be timed.
    pub timed_reads: u32,
    /// Most that prefetch may take, in bytes a second; zero for no limit.
    pub prefetch_limit: u64,
}

/// Says hello and hears the verdict; a destination that can't tell files by device and inode is told
/// digests of those that are mapped.
pub fn agree(
    sender: &mut Sender,
    receiver: &mut Receiver,
    id: &str,
    pid: i32,
    local: &mut Local,
    wants: &Wants<'_>,
    timeout: Duration,
) -> Result<Verdict> {
    let mut hello = hello(id, pid, local, wants)?;
    loop {
        say_to_destination(sender, SourceMessage::Hello(hello.clone()))?;
        let verdict = match hear_destination(receiver, Some(timeout))? {
            DestinationMessage::Verdict(verdict) => verdict,
            _ => return unexpected("a verdict"),
        };
        if !verdict.wants_digests || hello.has_digests {
            return Ok(verdict);
        }
        local.report.fill_digests().map_err(|blockers| refusal(&blockers))?;
        hello.requirements = local.report.requirements.encode_to_vec();
        hello.has_digests = true;
    }
}

/// The first of several blockers as an error.
fn refusal(blockers: &[Blocker]) -> Error {
    blockers.first().map_or(Error::Internal("no blocker".into()), |b| Error::Refused {
        reason: format!("{}: {}", b.object, b.reason),
        remedy: b.remedy.clone(),
    })
}
