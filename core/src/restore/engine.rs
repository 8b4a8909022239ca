//! Restore, stage by stage: the destination session drives it, the new process does the work.

use crate::arch::Regs;
use crate::arch::sigframe::Frame;
use crate::arch::syscall_restart::{self, Resume, Timed};
use crate::arch::vdso;
use crate::arch::xstate::{XsaveLayout, uses_tile_data};
use crate::error::{Error, Result};
use crate::manifest::{Manifest, Mapping, MappingKind, Memfd, PageData, Thread};
use crate::program::{Arg, Op, Program};
use crate::restore::check::check_manifest;
use crate::restore::files::{place_files, plan_files};
use crate::restore::memory::{
    LazyRange, RING_LEN, VdsoParts, lazy_ranges, plan_faults, plan_mappings,
};
use crate::restore::newborn::{InitConfig, Newborn, end_stage, launch, own_vdso, plan_empty};
use crate::restore::scratch::{Gate, Scratch, VDSO_LEN, gate};
use crate::restore::staged::Staged;
use crate::restore::state::{creds, process, thread, timers};
use crate::sys::clone::{CLONE_ARGS_LEN, CloneArgs};
use crate::sys::mem::ProcMem;
use crate::sys::uffd::{Installed, Uffd};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Address space set aside for tables, strings and signal frames. It costs memory only where used.
const MEMFD_LEN: u64 = 1 << 30;
const STAGE_TIMEOUT: Duration = Duration::from_secs(60);
/// Flags of a thread: what `pthread_create` gives, but for TLS and ids, which the thread sets itself.
const THREAD_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;
const FRAME_ALIGN: usize = 64;

/// What is known before the freeze.
#[derive(Clone, Debug)]
pub struct PrepareConfig {
    /// This program, and the hidden subcommand that becomes init.
    pub exe: PathBuf,
    /// Name of that subcommand.
    pub init_subcommand: String,
    /// Number of the process in its namespace.
    pub pid: i32,
    /// Mapped ranges of the process now, ascending.
    pub ranges: Vec<(u64, u64)>,
    /// Clock offsets of the new time namespace.
    pub monotonic_offset_ns: i64,
    /// The same for `CLOCK_BOOTTIME`.
    pub boottime_offset_ns: i64,
    /// Where init notes how the process ended.
    pub exit_file: PathBuf,
    /// The process's vdso image, if this kernel's is another.
    pub foreign_vdso: Option<Vec<u8>>,
}

/// A restore in progress.
#[derive(Debug)]
pub struct Restorer {
    scratch: Scratch,
    newborn: Newborn,
    vdso: VdsoParts,
    /// Stages that are done.
    stages: u32,
    /// What came before the freeze.
    staged: Staged,
}

/// The address space is built; its pages are missing.
#[derive(Debug)]
pub struct Mapped {
    /// The process's userfaultfd.
    pub uffd: Uffd,
    /// The ring that holds it, to hold those of forked children too.
    pub ring: OwnedFd,
    /// Where the ring is mapped.
    pub ring_range: Range<u64>,
    /// What is registered.
    pub lazy: Vec<LazyRange>,
    /// Numbers of the two inside the new process, which stage 2 closes.
    own_fds: [i32; 2],
}

/// What the process does on its way to the gate.
#[derive(Debug)]
pub struct LastStage {
    program: Program,
    timed: Vec<TimedThread>,
}

/// A thread that was in a relative timed wait, with how to give it back its own registers.
#[derive(Clone, Copy, Debug)]
pub struct TimedThread {
    /// Its number inside the namespace.
    pub tid: i32,
    /// The wait.
    pub timed: Timed,
}

impl Restorer {
    /// Makes the empty new process, waiting for its first stage.
    pub fn prepare(config: &PrepareConfig, gate: &Gate) -> Result<Self> {
        let len = Scratch::range_len(MEMFD_LEN);
        let base = crate::restore::scratch::find_hole(&config.ranges, len).ok_or_else(|| {
            Error::Refused("the address space has no hole for restore's scratch memory".into())
        })?;
        let mut scratch = Scratch::create(base, MEMFD_LEN)?;
        let empty = plan_empty(&scratch);
        scratch.place(&empty)?;
        let init = InitConfig {
            pid: config.pid,
            base,
            memfd_len: MEMFD_LEN,
            entries: empty.entries_base(),
            monotonic_offset_ns: config.monotonic_offset_ns,
            boottime_offset_ns: config.boottime_offset_ns,
            exit_file: config.exit_file.clone(),
        };
        let vdso = VdsoParts { own: own_vdso(), foreign: config.foreign_vdso.clone() };
        let newborn = launch(&config.exe, &config.init_subcommand, &init, &scratch, gate)?;
        let staged = Staged::default();
        let restorer = Self { scratch, newborn, vdso, stages: 1, staged };
        match restorer.wait(1, &[&empty]) {
            Ok(()) => Ok(restorer),
            Err(e) => {
                restorer.newborn.kill();
                Err(e)
            }
        }
    }

    /// The new process.
    pub fn newborn(&self) -> &Newborn {
        &self.newborn
    }

    /// What is to be unmapped when the process needs nothing of us any more, the runner's range first.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let all = self.scratch.range();
        if self.vdso.foreign.is_none() {
            return vec![all];
        }
        // This kernel's vdso stays where it is parked.
        let parked = self.scratch.vdso_parking();
        vec![parked + VDSO_LEN..all.end, all.start..parked]
    }

    fn wait(&self, events: u32, programs: &[&Program]) -> Result<()> {
        let deadline = Instant::now() + STAGE_TIMEOUT;
        self.scratch.wait_events(events, deadline, programs, &|| !self.newborn.process.exited())
    }

    /// Has the process work through a program, at whose end it waits for the next one.
    fn run_stage(&mut self, mut p: Program) -> Result<(Program, Vec<u8>)> {
        end_stage(&self.scratch, &mut p, self.stages + 1);
        self.scratch.place(&p)?;
        self.scratch.go_on(self.stages, p.entries_base());
        self.stages += 1;
        self.wait(self.stages, &[&p])?;
        let ran = self.scratch.ran(&p);
        Ok((p, ran))
    }

    /// Before the freeze: makes memfds, without content, and private file mappings.
    pub fn stage(&mut self, memfds: &[Memfd], mappings: &[Mapping]) -> Result<()> {
        self.staged.check_new(memfds, mappings, &self.scratch.range())?;
        let mut p = self.scratch.program(64 + 8 * memfds.len() + 4 * mappings.len());
        let made = self.staged.plan(memfds, mappings, &mut p);
        let (_, ran) = self.run_stage(p)?;
        self.staged.made(memfds, mappings, &made, &ran, &self.newborn.process)
    }

    /// Before the freeze: pages of a memfd, or of the process's private file mappings.
    pub fn stage_pages(&mut self, object: u64, address: u64, bytes: &[u8]) -> Result<()> {
        self.staged.write(object, address, bytes)
    }

    /// After the freeze: descriptors, mappings, userfaultfd.
    pub fn map(&mut self, m: &Manifest) -> Result<Mapped> {
        check_manifest(m, &self.scratch.range())?;
        let staged = std::mem::take(&mut self.staged);
        staged.finish_memfds(m)?;
        let room = entries_of_map(m) + staged.entries();
        let mut p = self.scratch.program(room);
        let files = plan_files(m, &mut p, &[], &staged.memfd_numbers())?;
        plan_mappings(m, &self.scratch, &self.vdso, &files, staged.mappings(), &mut p)?;
        place_files(m, &files, &mut p);
        let plan = plan_faults(m, &mut p);
        let (_, ran) = self.run_stage(p)?;
        let number = |r| {
            Program::result(&ran, r)
                .map(|fd| fd as i32)
                .map_err(|e| Error::sys("descriptor of the new process", e))
        };
        let ring_at = Program::result(&ran, plan.ring_mapping)
            .map_err(|e| Error::sys("address of the ring", e))?;
        let own_fds = [number(plan.uffd)?, number(plan.ring)?];
        let take = |fd| self.newborn.process.get_fd(fd);
        let (uffd, ring) = (Uffd::from_fd(take(own_fds[0])?), take(own_fds[1])?);
        let ring_range = ring_at..ring_at + RING_LEN;
        Ok(Mapped { uffd, ring, ring_range, lazy: plan.lazy, own_fds })
    }

    /// Installs the pages that came with the manifest.
    pub fn install(&self, m: &Manifest, uffd: &Uffd) -> Result<()> {
        let mem = ProcMem::open(self.newborn.process.pid())?;
        self.install_vdso(m, &mem)?;
        let lazy = lazy_ranges(m);
        for page in &m.pages {
            install_page(page, &lazy, &mem, uffd)?;
        }
        Ok(())
    }

    /// Writes the image that the program knows, redirected to this kernel's functions.
    fn install_vdso(&self, m: &Manifest, mem: &ProcMem) -> Result<()> {
        let at = m.mappings.iter().find(|v| v.kind == MappingKind::Vdso as i32);
        let (Some(old), Some(v)) = (&self.vdso.foreign, at) else { return Ok(()) };
        let (Some(first), Some(own)) = (self.vdso.own.first(), self.vdso.own.last()) else {
            return Err(Error::Refused("this kernel has no vdso".into()));
        };
        let mut new = vec![0u8; (own.1 - own.0) as usize];
        ProcMem::open(std::process::id() as i32)?.read(own.0, &mut new)?;
        let base = self.scratch.vdso_parking() + (own.0 - first.0);
        let image = vdso::redirect(old, &new, base).map_err(Error::Refused)?;
        if image.len() as u64 != v.end - v.start {
            return Err(Error::Manifest("the size of the vdso".into()));
        }
        mem.write(v.start, &image)
    }

    /// Begins the last stage: process state, threads, everything up to the gate. The process works through it while
    /// the caller does other things.
    pub fn begin_last(&mut self, m: &Manifest, mapped: &Mapped) -> Result<LastStage> {
        let here = XsaveLayout::this_cpu();
        let there = XsaveLayout::from_words(&m.process.xsave_layout)
            .ok_or_else(|| Error::Manifest("XSAVE layout".into()))?;
        let mut p = self.scratch.program(entries_of_state(m));
        let mut timed = Vec::new();
        let mut frames = Vec::with_capacity(m.threads.len());
        for t in &m.threads {
            let regs = resume_regs(m, t, &mut p, &mut timed)?;
            let frame = Frame {
                regs: &regs,
                sigmask: t.sigmask,
                altstack: Some(t.altstack),
                xstate: &t.xstate,
                saved_under: &there,
            };
            frames.push(frame.place(&mut p, &here)?);
        }
        let never = plan_never(&mut p);
        let followers: Vec<u64> = m
            .threads
            .iter()
            .zip(&frames)
            .skip(1)
            .map(|(t, frame)| self.plan_follower(t, *frame, never, &mut p))
            .collect::<Result<_>>()?;
        let leader = p.next_address();
        self.plan_leader(m, frames[0], never, &followers, mapped.own_fds, &mut p)?;
        self.scratch.place(&p)?;
        self.scratch.go_on(self.stages, leader);
        Ok(LastStage { program: p, timed })
    }

    /// Waits for the end of the last stage. Returns threads that wait with a time-out.
    pub fn end_last(&self, last: LastStage) -> Result<Vec<TimedThread>> {
        self.wait(self.stages + 1, &[&last.program])?;
        Ok(last.timed)
    }

    fn plan_exit(&self, frame: u64, never: u64, p: &mut Program) {
        p.op(Op::Wait, [self.scratch.gate().into(), gate::PENDING.into()]);
        p.op(Op::JumpIf, [self.scratch.gate().into(), gate::NEVER.into(), never.into()]);
        p.op(Op::Sigreturn, [frame.into()]);
    }

    fn plan_follower(&self, t: &Thread, frame: u64, never: u64, p: &mut Program) -> Result<u64> {
        let start = p.next_address();
        plan_own_state(t, p)?;
        p.op(Op::Add, [self.scratch.arrived().into(), 1.into()]);
        let wake = [self.scratch.arrived().into(), libc::FUTEX_WAKE.into(), i32::MAX.into()];
        p.may("tell the leader", libc::SYS_futex, wake);
        self.plan_exit(frame, never, p);
        Ok(start)
    }

    fn plan_leader(
        &self,
        m: &Manifest,
        frame: u64,
        never: u64,
        followers: &[u64],
        own_fds: [i32; 2],
        p: &mut Program,
    ) -> Result<()> {
        for fd in own_fds {
            p.must("close our descriptor", libc::SYS_close, [fd.into()]);
        }
        let exe = if m.process.exe.is_empty() { None } else { Some(p.c_string(&m.process.exe)) };
        let exe_fd = exe.map(|path| {
            let flags = libc::O_RDONLY | libc::O_CLOEXEC;
            p.must("open the executable", libc::SYS_open, [path.into(), flags.into()])
        });
        process::plan_early(&m.process, exe_fd.map(Arg::Ret), p)?;
        if let Some(fd) = exe_fd {
            p.must("close the executable", libc::SYS_close, [fd.into()]);
        }
        for (t, start) in m.threads.iter().skip(1).zip(followers) {
            let set_tid = p.data(&t.tid.to_le_bytes());
            let args = CloneArgs {
                flags: THREAD_FLAGS as u64,
                // The thread's table is where its stack pointer points: no stack is used in the loop.
                stack: start - 16,
                stack_size: 16,
                set_tid,
                set_tid_size: 1,
                ..CloneArgs::default()
            };
            let at = p.data(&args.to_bytes());
            p.clone_thread(format!("make thread {}", t.tid), at, CLONE_ARGS_LEN as u64);
        }
        process::plan_rlimits(&m.process, p)?;
        plan_own_state(&m.threads[0], p)?;
        for arrived in 0..followers.len() {
            p.op(Op::Wait, [self.scratch.arrived().into(), arrived.into()]);
        }
        process::plan_late(m, timers::Ids::of_this_host(), p)?;
        p.op(Op::Add, [self.scratch.events().into(), 1.into()]);
        let wake = [self.scratch.events().into(), libc::FUTEX_WAKE.into(), i32::MAX.into()];
        p.may("tell the session", libc::SYS_futex, wake);
        self.plan_exit(frame, never, p);
        Ok(())
    }
}

/// What runs if the gate says NEVER. Returns its address.
fn plan_never(p: &mut Program) -> u64 {
    let never = p.next_address();
    p.may("leave: NEVER", libc::SYS_exit_group, [0.into()]);
    never
}

fn plan_own_state(t: &Thread, p: &mut Program) -> Result<()> {
    if uses_tile_data(&t.xstate) {
        // Palette 1, one tile of one row of 64 bytes.
        let mut config = [0u8; 64];
        (config[0], config[16], config[48]) = (1, 64, 1);
        let at = p.data_aligned(&config, 64);
        p.op(Op::TouchTiles, [at.into()]);
    }
    thread::plan_before_creds(t, p)?;
    creds::plan(t, p)?;
    thread::plan_after_creds(t, p)
}

/// Registers a thread resumes with.
fn resume_regs(
    m: &Manifest,
    t: &Thread,
    p: &mut Program,
    timed: &mut Vec<TimedThread>,
) -> Result<Regs> {
    let regs = Regs::from_bytes(&t.regs).ok_or_else(|| Error::Manifest("registers".into()))?;
    let numbers = |pending: &[Vec<u8>]| -> Vec<i32> {
        pending
            .iter()
            .filter_map(|raw| Some(i32::from_le_bytes(raw.get(..4)?.try_into().ok()?)))
            .collect()
    };
    let waiting = syscall_restart::waiting(
        &numbers(&t.pending),
        &numbers(&m.process.pending),
        t.sigmask,
        &m.process.sigactions,
    );
    Ok(match syscall_restart::resume(&regs, waiting, t.time_left_ns) {
        Resume::AsIs(regs) => regs,
        Resume::Timed(wait) => {
            let timespec = p.data_aligned(&wait.timespec(), FRAME_ALIGN);
            timed.push(TimedThread { tid: t.tid, timed: wait });
            wait.begin(timespec)
        }
    })
}

fn install_page(page: &PageData, lazy: &[LazyRange], mem: &ProcMem, uffd: &Uffd) -> Result<()> {
    let after = lazy.partition_point(|r| r.start <= page.address);
    let end = page.address + page.bytes.len() as u64;
    let inside = lazy[..after].last().is_some_and(|r| end <= r.start + r.len_bytes);
    if !inside {
        // A written page of a private file mapping, or a manifest that says so; either way the
        // process's own mappings bound what can be written.
        return mem.write(page.address, &page.bytes);
    }
    match uffd.copy(page.address, &page.bytes) {
        Ok(Installed::All | Installed::Exists(_)) => Ok(()),
        Ok(Installed::NoMemory(_)) => {
            let none = std::io::Error::from_raw_os_error(libc::ENOMEM);
            Err(Error::io(format!("install page {:#x}", page.address), none))
        }
        Ok(other) => Err(Error::Manifest(format!("page {:#x}: {other:?}", page.address))),
        Err(e) => Err(Error::io(format!("install page {:#x}", page.address), e)),
    }
}

/// Bound on the entries of stage 1.
fn entries_of_map(m: &Manifest) -> usize {
    let watches: usize = m
        .files
        .iter()
        .map(|f| match &f.kind {
            Some(crate::manifest::FileKind::Epoll(e)) => e.watches.len(),
            Some(crate::manifest::FileKind::Memfd(f)) => f.extents.len(),
            Some(crate::manifest::FileKind::Pipe(f)) => f.content.len(),
            _ => 0,
        })
        .sum();
    512 + m.guards.len()
        + m.reverted.len()
        + 12 * m.mappings.len()
        + 32 * m.files.len()
        + 4 * m.descriptors.len()
        + 4 * watches
}

/// Bound on the entries of stage 2.
fn entries_of_state(m: &Manifest) -> usize {
    let pending: usize = m.threads.iter().map(|t| t.pending.len()).sum();
    let timers: usize = m.process.timers.iter().map(|t| t.id as usize * 2 + 16).sum();
    2048 + 160 * m.threads.len() + pending + m.process.pending.len() + timers.min(1 << 20)
}
