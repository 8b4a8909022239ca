//! One thread of a running process, stopped for a remote syscall or two; the others run on.
//!
//! The tracer may be killed at any moment, and the program must not notice. So the thread makes the
//! syscall by instructions of the program that lead back to where it was ([`arch::WayBack`]), on a piece of
//! stack where the kernel would put the frame of a signal. That is safe on the stack that the kernel gave
//! the first thread, and only there: below the stack pointer of others may be anything. Where the first
//! thread has left its stack (a goroutine), or the program has no such instructions, the call is made
//! without a way back, and a tracer that is killed in those some hundred microseconds takes the program
//! with it.
//!
//! The syscall goes by `PTRACE_SYSCALL`, never by single-stepping: a single-stepped thread dies with its
//! tracer.

use crate::arch::sigframe::Frame;
use crate::arch::xstate::XsaveLayout;
use crate::arch::{self, Landing, Regs, WayBack};
use crate::capture::state::proc_text::mm_fields;
use crate::error::{Error, Result};
use crate::freeze::{Frozen, FrozenThread};
use crate::preflight::source::{dispatched, filtered};
use crate::proc::maps::{self, MapLine};
use crate::proc::status;
use crate::sys::mem::ProcMem;
use crate::sys::ptrace::{self, Stop};
use libc::pid_t;
use nix::errno::Errno;
use std::cell::Cell;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Bytes of executable memory that are searched for a way back: a C library is found in far less.
const SEARCH_LEN_MAX: usize = 64 << 20;
/// Bytes read at once.
const CHUNK_LEN: usize = 256 << 10;
/// Bytes by which pieces overlap, so that no instruction is cut.
const OVERLAP: usize = 16;
/// Looks for the first thread to be on its own stack, and the pause between them.
const ATTEMPTS: u32 = 4;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(1);

/// One stopped thread; dropping it lets it go on. What was learnt about the memory of the process before the
/// stop may be that of a program which is no more: only what is looked up now, while the thread can't call
/// exec, holds.
#[derive(Debug)]
pub struct OneStopped {
    frozen: Frozen,
    mem: ProcMem,
    /// Address of a `syscall` instruction.
    insn: u64,
    /// Stack pointer for the syscall, if there is a way back from it.
    landing: Option<u64>,
    /// Somebody else's SIGSTOP, to be sent again.
    stopped: Cell<bool>,
}

/// What is found in a process that runs.
#[derive(Debug, Default)]
struct Found {
    /// Any `syscall` instruction.
    insn: Option<u64>,
    way_back: WayBack,
    /// The stack of the first thread.
    stack: Range<u64>,
}

impl OneStopped {
    /// Stops a thread: the first, if it is there.
    pub fn stop(pid: pid_t, timeout: Duration) -> Result<Self> {
        // The search is slow in a process of many mappings, so the thread runs on meanwhile.
        let before =
            ProcMem::open(pid).and_then(|mem| Found::search(pid, &mem)).unwrap_or_default();
        for attempt in 1.. {
            let frozen = Frozen::freeze_one(pid, timeout)?;
            if let Some(b) = dispatched(frozen.threads()[0].tid)? {
                return Err(Error::Refused(b.to_string()));
            }
            let mem = ProcMem::open(pid)?;
            let read = |address: u64, out: &mut [u8]| mem.read(address, out).is_ok();
            let back = before.way_back.syscall(read);
            let landing = match back {
                Some(_) => before.land(&frozen.threads()[0], &mem)?,
                None => None,
            };
            if back.is_some() && landing.is_none() && attempt < ATTEMPTS {
                frozen.thaw()?;
                std::thread::sleep(ATTEMPT_PAUSE);
                continue;
            }
            let insn = match (landing, back, before.insn) {
                (Some(_), Some(insn), _) => insn,
                (_, _, Some(insn)) if holds_syscall(&mem, insn) => insn,
                _ => Found::search(pid, &mem)?.insn.ok_or_else(|| no_instruction(pid))?,
            };
            return Ok(Self { frozen, mem, insn, landing, stopped: Cell::new(false) });
        }
        Err(Error::Gone { pid })
    }

    /// Fails if a seccomp filter sees what the thread does: to be asked at the source. The copy's own filters are
    /// as the program wants them, and let through what restore has left to do, or not.
    pub fn refuse_filtered(&self) -> Result<()> {
        let tid = self.frozen.threads()[0].tid;
        let status = status::read_thread(self.frozen.pid(), tid)?;
        match filtered(tid, status.seccomp) {
            Some(b) => Err(Error::Refused(b.to_string())),
            None => Ok(()),
        }
    }

    /// Memory of the process.
    pub fn mem(&self) -> &ProcMem {
        &self.mem
    }

    /// Has the thread execute a syscall.
    pub fn syscall(
        &self,
        nr: i64,
        args: [u64; 6],
        timeout: Duration,
    ) -> Result<std::result::Result<u64, Errno>> {
        let thread = &self.frozen.threads()[0];
        let mut regs: Regs = thread.regs;
        arch::set_syscall(&mut regs, self.insn, nr, args);
        if let Some(stack) = self.landing {
            regs.rsp = stack;
        }
        // In this order: with the way back comes the mask, too.
        ptrace::set_regs(thread.tid, &regs)?;
        ptrace::set_sigmask(thread.tid, u64::MAX)?;
        let deadline = Instant::now() + timeout;
        for _ in ["entry", "exit"] {
            self.to_syscall_stop(thread.tid, nr, deadline)?;
        }
        let raw = arch::return_value(&ptrace::get_regs(thread.tid)?);
        Ok(arch::syscall_result(raw))
    }

    fn to_syscall_stop(&self, tid: pid_t, nr: i64, deadline: Instant) -> Result<()> {
        let what = || format!("remote syscall {nr} on thread {tid}");
        loop {
            ptrace::cont_to_syscall(tid)?;
            match ptrace::wait_stop_until(tid, deadline)? {
                Some(Stop::Syscall) => return Ok(()),
                Some(Stop::Event | Stop::Group) if Instant::now() < deadline => {}
                // The only one that can't be blocked; it stops the process when the thread has been let go.
                Some(Stop::Signal(libc::SIGSTOP)) if Instant::now() < deadline => {
                    self.stopped.set(true);
                }
                Some(Stop::Signal(signal)) if signal != libc::SIGSTOP => {
                    return Err(Error::Refused(format!("{}: it got signal {signal}", what())));
                }
                Some(Stop::Gone) => return Err(Error::Gone { pid: tid }),
                Some(_) | None => return Err(Error::sys(what(), Errno::ETIMEDOUT)),
            }
        }
    }

    /// Lets the thread go on.
    pub fn thaw(self) -> Result<ProcMem> {
        if self.stopped.get() {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(self.frozen.pid()),
                nix::sys::signal::Signal::SIGSTOP,
            )
            .map_err(|e| Error::sys(format!("stop process {}", self.frozen.pid()), e))?;
        }
        self.frozen.thaw()?;
        Ok(self.mem)
    }
}

impl Found {
    /// Looks through the executable memory of a process.
    fn search(pid: pid_t, mem: &ProcMem) -> Result<Self> {
        let mut found = Self::default();
        let mut lines = maps::read(pid)?;
        if let Some(stack) = lines.iter().find(|l| l.path == b"[stack]") {
            found.stack = stack.start..stack.end;
        }
        // Code of files first: what a program has generated may be large. Reading holes of shared memory would
        // fill them, and what is ours is shared.
        lines.retain(|l| l.prot & libc::PROT_EXEC as u32 != 0 && !l.shared);
        lines.sort_by_key(|l| l.ino == 0);
        let mut left = SEARCH_LEN_MAX;
        for line in &lines {
            left = found.look_through(line, mem, left);
        }
        Ok(found)
    }

    /// Returns how much may still be read.
    fn look_through(&mut self, line: &MapLine, mem: &ProcMem, mut left: usize) -> usize {
        let mut chunk = vec![0u8; CHUNK_LEN];
        let mut at = line.start;
        while at < line.end && left > 0 && !self.is_complete() {
            let len = chunk.len().min((line.end - at) as usize);
            let got = mem.read_some(at, &mut chunk[..len]);
            if got <= OVERLAP {
                break;
            }
            self.look(at, &chunk[..got]);
            left = left.saturating_sub(got);
            at += (got - OVERLAP) as u64;
        }
        left
    }

    fn is_complete(&self) -> bool {
        self.insn.is_some() && self.way_back.is_complete()
    }

    fn look(&mut self, address: u64, code: &[u8]) {
        self.way_back.look(address, code);
        let insn = || code.windows(arch::SYSCALL_INSN.len()).position(|w| w == arch::SYSCALL_INSN);
        self.insn = self.insn.or_else(|| insn().map(|at| address + at as u64));
    }

    /// Puts the way back on the stack of a stopped thread; returns where its stack pointer has to be for
    /// the syscall. `None` if it is not on the stack that the kernel gave it, or there is no room.
    fn land(&self, thread: &FrozenThread, mem: &ProcMem) -> Result<Option<u64>> {
        let given = mm_fields(&crate::proc::read(thread.tid, "stat")?)?.start_stack;
        if !self.stack.contains(&thread.regs.rsp) || !self.stack.contains(&given) {
            return Ok(None);
        }
        let xstate = ptrace::get_xstate(thread.tid)?;
        let here = XsaveLayout::this_cpu();
        // A timed wait whose end only the kernel knows comes back as interrupted: a signal frame makes the
        // kernel forget it.
        let regs = arch::syscall_restart::heal_regs(&thread.regs);
        let frame = Frame {
            regs: &regs,
            sigmask: thread.sigmask,
            altstack: None,
            xstate: &xstate,
            saved_under: &here,
        };
        let Landing { stack, bytes } = self.way_back.landing(&frame, &here)?;
        let fits = stack > self.stack.start && mem.write(stack, &bytes).is_ok();
        Ok(fits.then_some(stack))
    }
}

fn holds_syscall(mem: &ProcMem, insn: u64) -> bool {
    let mut there = [0u8; arch::SYSCALL_INSN.len()];
    mem.read(insn, &mut there).is_ok() && there == arch::SYSCALL_INSN
}

fn no_instruction(pid: pid_t) -> Error {
    Error::Refused(format!("process {pid} has no syscall instruction in any mapping"))
}

#[cfg(test)]
#[path = "one_stopped_tests.rs"]
mod tests;
