//! Remote syscalls on the source: a scratch mapping in the process, and short tables run by its threads.
//!
//! A table ends by loading the registers the thread was stopped with, so a thread whose tracer dies in
//! the middle runs its table to the end and goes on. While the tracer lives, the entry before that
//! sends the thread a signal that nobody handles; traced, the thread stops there (a signal-delivery
//! stop), and the tracer puts the registers back itself, exactly. Untraced, the signal is ignored.
//!
//! The one syscall that maps the scratch memory has nothing of ours to come back by, and borrows what the
//! program has: see [`crate::one_stopped`].

use crate::arch::{self, Context};
use crate::error::{Error, Result};
use crate::freeze::{Frozen, FrozenThread};
use crate::one_stopped::OneStopped;
use crate::proc::maps::{self, MapLine};
use crate::program::{Op, Program};
use crate::sys::mem::ProcMem;
use crate::sys::ptrace::{self, Stop};
use libc::pid_t;
use nix::errno::Errno;
use std::time::{Duration, Instant};

/// Bytes of table and data for an ordinary thread, and for the leader, which also runs the
/// process-wide part.
const SLOT_LEN: u64 = 4096;
const LEADER_SLOT_LEN: u64 = 128 * 1024;
/// Code at the start of the scratch mapping; the runner is far smaller.
const CODE_LEN: u64 = 4096;
/// Threads that may start between mapping the scratch memory and the freeze.
const SPARE_THREADS: u64 = 64;
const PAGE: u64 = 4096;
/// A table of non-blocking syscalls takes microseconds; this bounds a stuck one.
const RUN_TIMEOUT: Duration = Duration::from_secs(5);

/// Memory of ours inside the source process: code and room for tables.
#[derive(Debug)]
pub struct SourceScratch {
    pid: pid_t,
    base: u64,
    len: u64,
    mem: ProcMem,
}

/// A table that has run on a thread.
#[derive(Debug)]
pub struct Ran {
    /// Number of the thread on this host.
    pub tid: pid_t,
    /// The program as it was built.
    pub program: Program,
    /// Its entries, with results.
    pub entries: Vec<u8>,
    /// Its data, with what syscalls stored there.
    pub data: Vec<u8>,
    /// The process was in group stop.
    pub group_stop: bool,
}

impl SourceScratch {
    /// Maps scratch memory into the process, which goes on meanwhile but for one thread that is
    /// stopped for some hundred microseconds.
    pub fn map(pid: pid_t, timeout: Duration) -> Result<Self> {
        let threads = crate::freeze::list_threads(pid)?.len() as u64 + SPARE_THREADS;
        let len = (CODE_LEN + LEADER_SLOT_LEN + threads * SLOT_LEN).next_multiple_of(PAGE);
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        // Shared, so that the kernel never merges it with a mapping of the program.
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let args = [0, len, prot as u64, flags as u64, u64::MAX, 0];
        let stopped = OneStopped::stop(pid, timeout)?;
        stopped.refuse_filtered()?;
        let base =
            stopped.syscall(libc::SYS_mmap, args, timeout)?.map_err(|e| no_scratch(pid, e))?;
        stopped.mem().write(base, arch::runner().code)?;
        let mem = stopped.thaw()?;
        Ok(Self { pid, base, len, mem })
    }

    /// The scratch memory that an earlier session mapped in a process, which has to be there still.
    pub fn find(pid: pid_t, range: std::ops::Range<u64>) -> Result<Self> {
        let mem = ProcMem::open(pid)?;
        if range.end < range.start + CODE_LEN + LEADER_SLOT_LEN || !holds_runner(&mem, range.start)
        {
            return Err(Error::Refused(format!(
                "process {pid} is not the copy that a migration left here"
            )));
        }
        Ok(Self { pid, base: range.start, len: range.end - range.start, mem })
    }

    /// What a session that was killed has left in a process.
    pub fn left_in(pid: pid_t) -> Result<Option<Self>> {
        let mem = ProcMem::open(pid)?;
        let all = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u32;
        let ours = |l: &MapLine| l.shared && l.prot == all && holds_runner(&mem, l.start);
        let found = maps::read(pid)?.into_iter().find(ours);
        Ok(found.map(|line| Self { pid, base: line.start, len: line.end - line.start, mem }))
    }

    /// Removes it again from a process that goes on at the source. A process that has executed another
    /// program since has none, and perhaps something of its own in that place.
    pub fn unmap(self, timeout: Duration) -> Result<()> {
        let args = [self.base, self.len, 0, 0, 0, 0];
        let stopped = OneStopped::stop(self.pid, timeout)?;
        stopped.refuse_filtered()?;
        if holds_runner(stopped.mem(), self.base) {
            stopped.syscall(libc::SYS_munmap, args, timeout)?.map_err(|e| {
                Error::sys(format!("unmap scratch memory in process {}", self.pid), e)
            })?;
        }
        stopped.thaw().map(drop)
    }

    /// Number of the process.
    pub fn pid(&self) -> pid_t {
        self.pid
    }

    /// The mapping, which is not part of the program's own memory.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.base..self.base + self.len
    }

    /// Address of the loop for parked threads.
    pub fn pause_loop(&self) -> u64 {
        self.base + arch::runner().pause_offset
    }

    /// Memory of the process.
    pub fn mem(&self) -> &ProcMem {
        &self.mem
    }

    /// Runs one table on every thread at the same time and returns their results. `build` adds the
    /// entries of a thread (never `must` entries: those end the process when they fail). Afterwards
    /// the threads are stopped, and [`Frozen`] still holds what thaws them.
    pub fn run(
        &self,
        frozen: &Frozen,
        build: &mut dyn FnMut(&FrozenThread, &mut Program),
    ) -> Result<Vec<Ran>> {
        if !holds_runner(&ProcMem::open(self.pid)?, self.base) {
            return Err(Error::Refused(format!(
                "process {} executed another program while it was being frozen; try again",
                self.pid
            )));
        }
        let signal = trap_signal(frozen)?;
        let header = self.base + CODE_LEN - 64;
        let mut slot = self.base + CODE_LEN;
        let mut jobs = Vec::with_capacity(frozen.threads().len());
        for (index, thread) in frozen.threads().iter().enumerate() {
            let slot_len = if index == 0 { LEADER_SLOT_LEN } else { SLOT_LEN };
            if slot + slot_len > self.base + self.len {
                return Err(Error::Refused(format!(
                    "process {} started many threads while it was being frozen; try again",
                    self.pid
                )));
            }
            let mut program = Program::new(slot, slot + slot_len / 2);
            build(thread, &mut program);
            let trap = finish(&mut program, thread, signal);
            if program.next_address() > slot + slot_len / 2 || program.data_end() > slot + slot_len
            {
                return Err(Error::Refused("a remote table is too long".into()));
            }
            self.mem.write(program.entries_base(), program.entries())?;
            self.mem.write(program.data_base(), program.data_bytes())?;
            slot += slot_len;
            jobs.push((thread, program, trap));
        }
        for (thread, program, _) in &jobs {
            let mut regs = thread.regs;
            arch::set_start(&mut regs, self.base, program.entries_base(), header);
            // In this order: from the table a thread finds its mask again, whatever it is.
            ptrace::set_regs(thread.tid, &regs)?;
            ptrace::set_sigmask(thread.tid, !(1u64 << (signal - 1)))?;
            ptrace::cont(thread.tid, 0)?;
        }
        let deadline = Instant::now() + RUN_TIMEOUT;
        jobs.into_iter()
            .map(|(thread, program, trap)| {
                let group_stop = wait_trap(thread.tid, signal, trap, deadline)?;
                let mut entries = vec![0u8; program.entries().len()];
                self.mem.read(program.entries_base(), &mut entries)?;
                let mut data = vec![0u8; program.data_bytes().len()];
                self.mem.read(program.data_base(), &mut data)?;
                Ok(Ran { tid: thread.tid, program, entries, data, group_stop })
            })
            .collect()
    }
}

impl SourceScratch {
    /// Has the frozen process leave by `exit_group(status)` and waits until it is gone.
    pub fn exit_group(&self, mut frozen: Frozen, status: i32, timeout: Duration) -> Result<()> {
        let base = self.base + CODE_LEN;
        let mut program = Program::new(base, base + LEADER_SLOT_LEN / 2);
        program.may("exit_group", libc::SYS_exit_group, [status.into()]);
        self.mem.write(program.entries_base(), program.entries())?;
        let leader = frozen.threads()[0];
        let mut regs = leader.regs;
        arch::set_start(&mut regs, self.base, base, self.base + CODE_LEN - 64);
        ptrace::set_regs(leader.tid, &regs)?;
        frozen.forget();
        ptrace::cont(leader.tid, 0)?;
        let deadline = Instant::now() + timeout;
        for thread in frozen.threads().iter().rev() {
            while let Some(stop) = ptrace::wait_stop_until(thread.tid, deadline)? {
                if stop == Stop::Gone {
                    break;
                }
                ptrace::cont(thread.tid, 0)?;
            }
        }
        Ok(())
    }
}

fn no_scratch(pid: pid_t, errno: Errno) -> Error {
    if matches!(errno, Errno::EACCES | Errno::EPERM) {
        return Error::Refused(format!(
            "process {pid}: it may not map memory that is written and executed (PR_SET_MDWE, or a security \
             module); start the program without that"
        ));
    }
    Error::sys(format!("map scratch memory in process {pid}"), errno)
}

/// Adds the trap and the way back; returns the address of the trap's entry.
fn finish(program: &mut Program, thread: &FrozenThread, signal: i32) -> u64 {
    let pid = program.may("getpid", libc::SYS_getpid, []);
    let tid = program.may("gettid", libc::SYS_gettid, []);
    let trap = program.next_address();
    program.may("stop", libc::SYS_tgkill, [pid.into(), tid.into(), signal.into()]);
    let mask = program.words(&[thread.sigmask]);
    program.may(
        "restore the signal mask",
        libc::SYS_rt_sigprocmask,
        [libc::SIG_SETMASK.into(), mask.into(), 0.into(), 8.into()],
    );
    let context = program.words(&Context(arch::syscall_restart::heal_regs(&thread.regs)).words());
    program.op(Op::Leave, [context.into()]);
    trap
}

/// Waits until the thread stops at its trap. Signals from elsewhere are delivered on the way; true if one of
/// them has stopped the process.
fn wait_trap(tid: pid_t, signal: i32, trap: u64, deadline: Instant) -> Result<bool> {
    let mut group_stop = false;
    loop {
        match ptrace::wait_stop_until(tid, deadline)? {
            None => {
                return Err(Error::sys(format!("remote table on thread {tid}"), Errno::ETIMEDOUT));
            }
            Some(Stop::Gone) => return Err(Error::Gone { pid: tid }),
            Some(Stop::Signal(s))
                if s == signal && arch::current_entry(&ptrace::get_regs(tid)?) == trap =>
            {
                return Ok(group_stop);
            }
            Some(Stop::Signal(s)) => ptrace::cont(tid, s)?,
            Some(Stop::Group) => {
                group_stop = true;
                ptrace::cont(tid, 0)?;
            }
            Some(Stop::Event | Stop::Syscall) => ptrace::cont(tid, 0)?,
        }
    }
}

/// A signal whose default is to be ignored: best one that the program neither handles nor has pending.
fn trap_signal(frozen: &Frozen) -> Result<i32> {
    const CANDIDATES: [i32; 3] = [libc::SIGWINCH, libc::SIGURG, libc::SIGCHLD];
    let path = format!("/proc/{}/status", frozen.pid());
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(format!("read {path}"), e))?;
    let mask = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name))
            .and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
            .unwrap_or(0)
    };
    let bit = |s: &i32| 1u64 << (s - 1);
    let caught = mask("SigCgt:");
    let mut pending = mask("ShdPnd:");
    for thread in frozen.threads() {
        for raw in ptrace::pending_signals(thread.tid, false)? {
            let number = i32::from_le_bytes(raw[..4].try_into().expect("a siginfo"));
            if (1..=64).contains(&number) {
                pending |= bit(&number);
            }
        }
    }
    let free = CANDIDATES.iter().filter(|s| pending & bit(s) == 0);
    // Go handles every signal; its handlers of these do nothing harmful, and only run if the tracer
    // dies in just that instant.
    free.clone().find(|s| caught & bit(s) == 0).or_else(|| free.clone().next()).copied().ok_or_else(
        || Error::Refused("SIGWINCH, SIGURG and SIGCHLD are all pending; try again".into()),
    )
}

/// True if a thread of a process that is not ours to trace is in our loop: parked for good, as the copy
/// that a migration left here is.
pub fn is_parked(pid: pid_t) -> Result<bool> {
    let text = crate::proc::read(pid, "syscall")?;
    let text = String::from_utf8_lossy(&text);
    // "running", or the registers with the instruction pointer last.
    let Some(ip) = text.trim().rsplit_once(" 0x").map(|(_, ip)| u64::from_str_radix(ip, 16)) else {
        return Ok(false);
    };
    let ip = ip.map_err(|_| Error::parse("syscall", &text))?;
    let mem = ProcMem::open(pid)?;
    let lines = crate::proc::maps::read(pid)?;
    let at = lines.iter().find(|l| (l.start..l.end).contains(&ip) && l.shared);
    Ok(at.is_some_and(|line| holds_runner(&mem, line.start)))
}

fn holds_runner(mem: &ProcMem, base: u64) -> bool {
    let code = arch::runner().code;
    let mut found = vec![0u8; code.len()];
    mem.read(base, &mut found).is_ok() && found == code
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between any two looks at it the program may have been replaced.
    #[test]
    fn a_program_that_executes_itself_without_end_lives() {
        let script = "exec sh -c \"$0\" \"$0\"";
        let mut child =
            std::process::Command::new("sh").args(["-c", script, script]).spawn().unwrap();
        let timeout = Duration::from_secs(5);
        let mut mapped = 0;
        for _ in 0..300 {
            // What was mapped goes with the program that it was mapped into.
            if let Ok(scratch) = SourceScratch::map(child.id() as pid_t, timeout) {
                mapped += 1;
                let _ = scratch.unmap(timeout);
            }
        }
        std::thread::sleep(Duration::from_millis(50));
        assert!(child.try_wait().unwrap().is_none(), "it was killed");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(mapped > 0);
    }
}
