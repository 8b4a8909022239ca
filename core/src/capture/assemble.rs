//! Capture proper: everything about a frozen process, put together into a manifest.
//!
//! This is the blackout: its cost is that of threads, mappings and descriptors. What is slow was read
//! just before the freeze ([`Prior`]).

use crate::arch::syscall_restart::{RseqFix, name_restarted, rseq_fixup};
use crate::arch::xstate::XsaveLayout;
use crate::capture::files::{FileOptions, StdioPolicy, capture_files};
use crate::capture::pages::collect_pages;
use crate::capture::state::outside::{Host, process_outside, thread_outside};
use crate::capture::state::remote::{ProcessProbe, ThreadProbe, time_left};
use crate::error::{Error, Result};
use crate::freeze::Frozen;
use crate::inject::SourceScratch;
use crate::manifest::{Manifest, Mapping, OpenFile, PageData, Process, Thread};
use crate::preflight::Blocker;
use crate::proc::classify::{Unclassified, classify};
use crate::proc::holders::Holders;
use crate::proc::maps::{self, MapLine};
use crate::proc::smaps::{self, SmapsEntry};
use crate::sys::pagemap::Pagemap;
use crate::sys::ptrace;

/// What is read before the freeze, because it is too slow for it.
#[derive(Debug)]
pub struct Prior {
    /// The host.
    pub host: Host,
    /// Flags of the mappings.
    pub smaps: Vec<SmapsEntry>,
    /// Who else holds the process's pipes and memory.
    pub holders: Holders,
    /// What becomes of standard streams.
    pub stdio: StdioPolicy,
}

/// Captures a frozen process. Afterwards its threads are still stopped, and thaw exactly.
pub fn capture(frozen: &Frozen, scratch: &SourceScratch, prior: &Prior) -> Result<Manifest> {
    let pid = frozen.pid();
    let mut process = process_outside(&prior.host, pid)?;
    let mut threads = threads_outside(frozen, prior)?;
    run_probes(frozen, scratch, &mut process, &mut threads)?;
    process.xsave_layout = XsaveLayout::this_cpu().to_words();
    let fixes = finish_registers(frozen, scratch, &mut threads)?;
    let lines = own_lines(pid, scratch)?;
    let options =
        FileOptions { stdio: &prior.stdio, holders: &prior.holders, memfd_content: true };
    let captured = capture_files(pid, &lines, &options).map_err(|b| refuse(&b))?;
    if let Some(object) = captured.unexamined.first() {
        return Err(Error::Refused(format!(
            "process {pid} opened {object:?} while it was being frozen; try again"
        )));
    }
    let mappings = classify_frozen(pid, &lines, prior, &captured.files)?;
    let mut manifest = Manifest {
        process,
        mappings,
        threads,
        files: captured.files,
        descriptors: captured.descriptors,
        pages: Vec::new(),
    };
    manifest.pages = collect_pages(pid, &manifest, scratch.mem(), &Pagemap::open(pid)?)?;
    for fix in fixes {
        clear_word(&mut manifest.pages, fix.clear_at);
    }
    Ok(manifest)
}

/// One line for several blockers: they were all found in the freeze, when preflight had passed.
fn refuse(blockers: &[Blocker]) -> Error {
    let all: Vec<String> = blockers.iter().map(ToString::to_string).collect();
    Error::Refused(all.join("; "))
}

fn threads_outside(frozen: &Frozen, prior: &Prior) -> Result<Vec<Thread>> {
    frozen
        .threads()
        .iter()
        .map(|t| {
            let mut thread = thread_outside(&prior.host, frozen.pid(), t.tid)?.thread;
            thread.sigmask = t.sigmask;
            thread.xstate = ptrace::get_xstate(t.tid)?;
            Ok(thread)
        })
        .collect()
}

/// Runs the questions that only the process itself can answer.
fn run_probes(
    frozen: &Frozen,
    scratch: &SourceScratch,
    process: &mut Process,
    threads: &mut [Thread],
) -> Result<()> {
    let mut probes = Vec::with_capacity(threads.len());
    let mut process_probe = None;
    let ran = scratch.run(frozen, &mut |_, program| {
        probes.push(ThreadProbe::plan(program));
        if process_probe.is_none() {
            process_probe = Some(ProcessProbe::plan(program, &process.timers));
        }
    })?;
    for ((probe, ran), thread) in probes.iter().zip(&ran).zip(threads) {
        probe.collect(&ran.program, &ran.entries, &ran.data, thread)?;
    }
    let (Some(probe), Some(leader)) = (process_probe, ran.first()) else {
        return Err(Error::Gone { pid: frozen.pid() });
    };
    probe.collect(&leader.program, &leader.entries, &leader.data, process)
}

/// Registers as the destination shall interpret them, with the time left of timed waits. Returns the
/// rseq words to be cleared.
fn finish_registers(
    frozen: &Frozen,
    scratch: &SourceScratch,
    threads: &mut [Thread],
) -> Result<Vec<RseqFix>> {
    let read = |address: u64, out: &mut [u8]| scratch.mem().read(address, out).is_ok();
    let mut fixes = Vec::new();
    for (thread, stopped) in threads.iter_mut().zip(frozen.threads()) {
        let mut regs = name_restarted(&stopped.regs, &read);
        thread.time_left_ns = time_left(&regs, &read);
        if let Some(fix) = rseq_fixup(&regs, thread.rseq, thread.rseq_sig, &read) {
            regs = fix.regs;
            fixes.push(fix);
        }
        thread.regs = regs.to_bytes();
    }
    Ok(fixes)
}

/// The program's own mappings: ours is left out.
fn own_lines(pid: i32, scratch: &SourceScratch) -> Result<Vec<MapLine>> {
    let mut lines = maps::read(pid)?;
    lines.retain(|l| !scratch.range().contains(&l.start));
    Ok(lines)
}

/// Classifies; mappings that are newer than the last look at their flags cost one more look.
fn classify_frozen(
    pid: i32,
    lines: &[MapLine],
    prior: &Prior,
    files: &[OpenFile],
) -> Result<Vec<Mapping>> {
    let blocked = |u| match u {
        Unclassified::Blocked(blockers) => refuse(&blockers),
        Unclassified::Stale(_) => {
            Error::Refused("mappings changed while the process was frozen; try again".into())
        }
    };
    match classify(lines, &prior.smaps, files) {
        Err(Unclassified::Stale(_)) => {
            classify(lines, &smaps::read(pid)?, files).map_err(blocked)
        }
        other => other.map_err(blocked),
    }
}

fn clear_word(pages: &mut [PageData], address: u64) {
    for page in pages {
        let Some(at) = address.checked_sub(page.address) else { continue };
        let at = at as usize;
        if at + 8 <= page.bytes.len() {
            page.bytes[at..at + 8].fill(0);
        }
    }
}
