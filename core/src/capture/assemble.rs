//! Capture proper: everything about a frozen process, put together into a manifest.
//!
//! This is the blackout: its cost is that of threads, mappings and descriptors. What is slow was read
//! just before the freeze ([`Prior`]).

use crate::arch::syscall_restart::name_restarted;
use crate::arch::xstate::XsaveLayout;
use crate::capture::files::{FileOptions, StdioPolicy, capture_files};
use crate::capture::pages::{certain_runs, collect_guards, read_runs, unstaged_runs};
use crate::capture::presend::{CHANGED_BYTES_MAX, Presend};
use crate::capture::state::outside::{Host, process_outside, thread_outside};
use crate::capture::state::remote::{ProcessProbe, ThreadProbe, time_left};
use crate::capture::state::signals::{Pending, settle_timers};
use crate::capture::state::sleep::Sleeps;
use crate::error::{Error, Result};
use crate::freeze::Frozen;
use crate::inject::SourceScratch;
use crate::manifest::{Manifest, Mapping, OpenFile, PageData, Process, Thread};
use crate::preflight::Blocker;
use crate::preflight::source::{KnownFiles, dispatched, filtered, group_stop};
use crate::proc::classify::{Unclassified, classify};
use crate::proc::holders::Holders;
use crate::proc::maps::{self, MapLine};
use crate::proc::smaps::{self, SmapsEntry, VmFlags};
use crate::sys::mem::ProcMem;
use crate::sys::pagemap::{Pagemap, Wanted};
use crate::sys::{ptrace, task};
use std::time::Instant;

/// What is read before the freeze, because it is too slow for it.
#[derive(Debug)]
pub struct Prior {
    /// The host.
    pub host: Host,
    /// Flags of the mappings.
    pub smaps: Vec<SmapsEntry>,
    /// Who else holds the process's pipes and memory.
    pub holders: Holders,
    /// The files that the destination was asked about.
    pub known_files: KnownFiles,
    /// Since when threads sleep.
    pub sleeps: Sleeps,
    /// There are guard regions: looking for them walks the page tables, so programs that have none
    /// are spared that while they are frozen.
    pub uses_guards: bool,
    /// What becomes of standard streams.
    pub stdio: StdioPolicy,
}

/// True when the process has guard regions now.
pub fn uses_guards(pid: i32) -> Result<bool> {
    let map = Pagemap::open(pid)?;
    let mut found = false;
    for line in maps::read(pid)?.iter().filter(|l| l.ino == 0 && !l.path.starts_with(b"[v")) {
        map.scan(line.start, line.end, Wanted::Guards, &mut |_| found = true)?;
    }
    Ok(found)
}

/// Captures a frozen process. Afterwards its threads are still stopped, and thaw exactly.
/// What the destination has already is left out; [`Error::Changing`] if the rest is too much.
pub fn capture(
    frozen: &Frozen,
    scratch: &SourceScratch,
    prior: &Prior,
    presend: &Presend,
) -> Result<Manifest> {
    let pid = frozen.pid();
    refuse_children(pid, frozen)?;
    if frozen.in_group_stop() {
        return Err(refuse(&[group_stop(pid)]));
    }
    let mut process = process_outside(&prior.host, pid)?;
    let (mut threads, switches) = threads_outside(frozen, prior)?;
    let asked_at = Instant::now();
    run_probes(frozen, scratch, &mut process, &mut threads)?;
    take_signals(frozen, asked_at, &mut process, &mut threads)?;
    process.future_locks = future_locks(&prior.smaps, scratch);
    process.xsave_layout = XsaveLayout::this_cpu().to_words();
    finish_registers(frozen, scratch, &prior.sleeps, &switches, &mut threads);
    let lines = own_lines(pid, scratch)?;
    let options =
        FileOptions { stdio: &prior.stdio, holders: &prior.holders, content: Some(presend) };
    let captured = capture_files(pid, &lines, &options).map_err(|b| refuse(&b))?;
    if let Some(object) = captured.unexamined.first() {
        return Err(Error::Refused(format!(
            "process {pid} opened {object:?} while it was being frozen; try again"
        )));
    }
    if let Some(what) = prior.known_files.newer(&captured.files, &lines) {
        return Err(Error::Refused(format!(
            "process {pid} {what} while it was being moved; try again"
        )));
    }
    if let Some((object, bytes)) = captured.changing {
        return Err(Error::Changing { object, bytes });
    }
    let mut mappings = classify_frozen(pid, &lines, prior, &captured.files)?;
    for v in &mut mappings {
        v.staged = presend.builds_on(v, &lines);
    }
    let mut manifest = Manifest {
        process,
        mappings,
        threads,
        files: captured.files,
        descriptors: captured.descriptors,
        pages: Vec::new(),
        guards: Vec::new(),
        reverted: Vec::new(),
    };
    let map = Pagemap::open(pid)?;
    if prior.uses_guards {
        manifest.guards = collect_guards(&manifest.mappings, &map)?;
    }
    let room = CHANGED_BYTES_MAX.saturating_sub(captured.content_bytes);
    collect_pages(pid, &mut manifest, scratch.mem(), &map, presend, room)?;
    for address in frozen.threads().iter().filter_map(|t| t.rseq_cs_at) {
        clear_word(&mut manifest.pages, address);
    }
    Ok(manifest)
}

/// Whether new mappings are locked, which no file tells: our own is one.
fn future_locks(smaps: &[SmapsEntry], scratch: &SourceScratch) -> u32 {
    let ours = |e: &&SmapsEntry| e.line.start == scratch.range().start;
    match smaps.iter().find(ours).map(|e| e.flags) {
        Some(flags) if flags.has(VmFlags::LOCKED | VmFlags::LOCK_ON_FAULT) => {
            (libc::MCL_FUTURE | libc::MCL_ONFAULT) as u32
        }
        Some(flags) if flags.has(VmFlags::LOCKED) => libc::MCL_FUTURE as u32,
        _ => 0,
    }
}

/// Adds the pages that travel with the manifest, of private file mappings at most `room` bytes.
fn collect_pages(
    pid: i32,
    m: &mut Manifest,
    mem: &ProcMem,
    map: &Pagemap,
    presend: &Presend,
    room: u64,
) -> Result<()> {
    let unstaged = unstaged_runs(m, map)?;
    let bytes: u64 = unstaged.iter().map(|r| r.end - r.start).sum();
    let Some(room) = room.checked_sub(bytes) else {
        return Err(Error::Changing { object: "private file mappings".into(), bytes });
    };
    let changes = presend.private_changes(pid, m, mem, map, room)?;
    m.pages = changes.pages;
    m.reverted = changes.reverted;
    m.pages.extend(read_runs(pid, mem, &unstaged)?);
    m.pages.extend(read_runs(pid, mem, &certain_runs(m, mem, map)?)?);
    Ok(())
}

/// A child that was forked since preflight: its parent must not leave it.
fn refuse_children(pid: i32, frozen: &Frozen) -> Result<()> {
    for t in frozen.threads() {
        let path = format!("/proc/{pid}/task/{}/children", t.tid);
        let text =
            std::fs::read_to_string(&path).map_err(|e| Error::io(format!("read {path}"), e))?;
        if let Some(child) = text.split_whitespace().next() {
            return Err(Error::Refused(format!(
                "process {pid} has a child, process {child}: process trees can't be moved yet; try \
                 again when it has ended"
            )));
        }
    }
    Ok(())
}

/// One line for several blockers: they were all found in the freeze, when preflight had passed.
fn refuse(blockers: &[Blocker]) -> Error {
    let all: Vec<String> = blockers.iter().map(ToString::to_string).collect();
    Error::Refused(all.join("; "))
}

/// The threads, and how often each has given up its CPU by itself.
fn threads_outside(frozen: &Frozen, prior: &Prior) -> Result<(Vec<Thread>, Vec<u64>)> {
    let mut threads = Vec::with_capacity(frozen.threads().len());
    let mut switches = Vec::with_capacity(frozen.threads().len());
    for t in frozen.threads() {
        let mut outside = thread_outside(&prior.host, frozen.pid(), t.tid)?;
        // Preflight was some time ago, and the thread is about to run system calls of ours.
        if let Some(b) = filtered(t.tid, outside.seccomp).or(dispatched(t.tid)?) {
            return Err(refuse(&[b]));
        }
        outside.thread.sigmask = t.sigmask;
        outside.thread.xstate = ptrace::get_xstate(t.tid)?;
        threads.push(outside.thread);
        switches.push(outside.voluntary_switches);
    }
    Ok((threads, switches))
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
    if ran.iter().any(|ran| ran.group_stop) {
        return Err(refuse(&[group_stop(frozen.pid())]));
    }
    for ((probe, ran), thread) in probes.iter().zip(&ran).zip(threads) {
        probe.collect(&ran.program, &ran.entries, &ran.data, thread)?;
    }
    let (Some(probe), Some(leader)) = (process_probe, ran.first()) else {
        return Err(Error::Gone { pid: frozen.pid() });
    };
    probe.collect(&leader.program, &leader.entries, &leader.data, process)
}

/// Pending signals as they are when timers have been read: one that expired in between has its signal here.
fn take_signals(
    frozen: &Frozen,
    asked_at: Instant,
    process: &mut Process,
    threads: &mut [Thread],
) -> Result<()> {
    let pending = Pending::of(process, threads).again(frozen)?;
    // It can't be blocked: it has come just now, and would stop the copy in the middle of restore.
    if pending.holds(libc::SIGSTOP) {
        return Err(refuse(&[group_stop(frozen.pid())]));
    }
    settle_timers(process, &pending, asked_at.elapsed().as_nanos() as i64);
    pending.put(process, threads);
    Ok(())
}

/// Registers as the destination shall interpret them, with the time left of timed waits.
fn finish_registers(
    frozen: &Frozen,
    scratch: &SourceScratch,
    sleeps: &Sleeps,
    switches: &[u64],
    threads: &mut [Thread],
) {
    let read = |address: u64, out: &mut [u8]| scratch.mem().read(address, out).is_ok();
    let now_ns = task::monotonic_ns();
    for ((thread, stopped), switches) in threads.iter_mut().zip(frozen.threads()).zip(switches) {
        let regs = name_restarted(&stopped.regs, &read);
        thread.time_left_ns = time_left(&regs, &read);
        if thread.time_left_ns < 0 {
            thread.time_left_ns = sleeps.time_left(stopped.tid, &regs, *switches, now_ns, &read);
        }
        thread.regs = regs.to_bytes();
    }
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
        Err(Unclassified::Stale(_)) => classify(lines, &smaps::read(pid)?, files).map_err(blocked),
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
