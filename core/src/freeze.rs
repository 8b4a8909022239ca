//! Stopping all threads of a process so that nobody can tell, and letting them go again.
//!
//! A frozen process is only ptrace-stopped: no SIGSTOP, nothing its parent or its handlers could see.
//! If the tracer dies, the kernel lets every thread go on by itself.

use crate::arch::syscall_restart::rseq_fixup;
use crate::arch::{self, Regs};
use crate::error::{Error, Result};
use crate::sys::mem::ProcMem;
use crate::sys::ptrace::{self, Stop};
use libc::pid_t;
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

/// One stopped thread, with what is needed to let it go as if nothing had happened.
#[derive(Clone, Copy, Debug)]
pub struct FrozenThread {
    /// Number as this host sees it.
    pub tid: pid_t,
    /// Integer registers at the stop.
    pub regs: Regs,
    /// Blocked signals at the stop.
    pub sigmask: u64,
    /// The registers above are those of an rseq abort: address of the `rseq_cs` word that a copy of
    /// the thread must not find set.
    pub rseq_cs_at: Option<u64>,
    /// Its process was in group stop.
    pub group_stop: bool,
}

/// A frozen process. Dropping it lets the process go on, unless [`Frozen::abandon`] was called.
#[derive(Debug)]
pub struct Frozen {
    pid: pid_t,
    threads: Vec<FrozenThread>,
    held: bool,
}

/// Rounds of listing threads before giving up on a process that makes them faster than they stop.
const ROUNDS_MAX: usize = 100;

impl Frozen {
    /// Stops all threads of `pid`. On failure those already stopped go on.
    pub fn freeze(pid: pid_t, timeout: Duration) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        let mut frozen = Self { pid, threads: Vec::new(), held: true };
        for _ in 0..ROUNDS_MAX {
            let fresh = frozen.seize_new()?;
            if fresh.is_empty() {
                if frozen.threads.is_empty() {
                    return Err(Error::Gone { pid });
                }
                frozen.threads.sort_by_key(|t| (t.tid != pid, t.tid));
                frozen.abort_rseq()?;
                return Ok(frozen);
            }
            frozen.stop_all(&fresh, deadline)?;
        }
        Err(Error::Refused(format!(
            "process {pid} starts threads faster than they can be stopped; try again"
        )))
    }

    /// Stops one thread only, the first if it is there: for short work that the whole process may go on during.
    pub fn freeze_one(pid: pid_t, timeout: Duration) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        let mut frozen = Self { pid, threads: Vec::new(), held: true };
        let mut tids = list_threads(pid)?;
        tids.sort_by_key(|tid| *tid != pid);
        for tid in tids {
            match ptrace::seize(tid).and_then(|()| ptrace::interrupt(tid)) {
                Ok(()) => {}
                Err(Error::Gone { .. }) => continue,
                Err(e) => return Err(e),
            }
            frozen.stop_all(&[tid], deadline)?;
            if !frozen.threads.is_empty() {
                frozen.abort_rseq()?;
                return Ok(frozen);
            }
        }
        Err(Error::Gone { pid })
    }

    /// Waits for threads that were seized and interrupted. If one fails, all that are in no list yet are let go.
    fn stop_all(&mut self, fresh: &[pid_t], deadline: Instant) -> Result<()> {
        for (at, tid) in fresh.iter().enumerate() {
            match stop(self.pid, *tid, deadline) {
                Ok(thread) => self.threads.extend(thread),
                Err(e) => {
                    // The one that failed last: it may well need all of the time.
                    let_unlisted_go(self.pid, fresh[at + 1..].iter().chain([tid]));
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    fn abort_rseq(&mut self) -> Result<()> {
        let mem = ProcMem::open(self.pid)?;
        self.threads.iter_mut().try_for_each(|t| abort_rseq(&mem, t))
    }

    fn seize_new(&self) -> Result<Vec<pid_t>> {
        let mut fresh = Vec::new();
        for tid in list_threads(self.pid)? {
            if self.threads.iter().any(|t| t.tid == tid) {
                continue;
            }
            match ptrace::seize(tid).and_then(|()| ptrace::interrupt(tid)) {
                Ok(()) => fresh.push(tid),
                Err(Error::Gone { .. }) => {}
                Err(e) => {
                    let_unlisted_go(self.pid, &fresh);
                    return Err(e);
                }
            }
        }
        Ok(fresh)
    }

    /// Number of the process.
    pub fn pid(&self) -> pid_t {
        self.pid
    }

    /// The stopped threads, the leader first.
    pub fn threads(&self) -> &[FrozenThread] {
        &self.threads
    }

    /// True when a thread executes in `range`.
    pub fn any_inside(&self, range: &Range<u64>) -> bool {
        self.threads.iter().any(|t| range.contains(&t.regs.rip))
    }

    /// True when somebody has stopped the process by a signal, and it stays stopped when it is let go.
    pub fn in_group_stop(&self) -> bool {
        self.threads.iter().any(|t| t.group_stop)
    }

    /// Lets the process go on exactly where it was.
    pub fn thaw(mut self) -> Result<()> {
        self.release()
    }

    fn release(&mut self) -> Result<()> {
        self.held = false;
        let mut first = Ok(());
        for t in &self.threads {
            match let_go(self.pid, t) {
                Ok(()) | Err(Error::Gone { .. }) => {}
                Err(e) => first = first.and(Err(e)),
            }
        }
        first
    }

    /// Gives every thread registers that can only pause, with all signals blocked. The threads stay
    /// traced: [`Frozen::thaw`] still undoes it, [`Frozen::abandon`] makes it last.
    pub fn park(&mut self, pause_loop: u64) -> Result<()> {
        for t in &self.threads {
            let mut regs = t.regs;
            arch::set_start(&mut regs, pause_loop, 0, 0);
            // In this order: `bring_back` looks after threads that are in the loop, and no others.
            ptrace::set_regs(t.tid, &regs)?;
            ptrace::set_sigmask(t.tid, u64::MAX)?;
        }
        Ok(())
    }

    /// Gives parked threads, those in `parked`, the registers they had. [`Frozen::thaw`] lets them go
    /// with those. `known` has for each thread its number, mask and registers.
    pub fn bring_back(&mut self, parked: &Range<u64>, known: &[(pid_t, u64, Regs)]) -> Result<()> {
        for t in self.threads.iter_mut().filter(|t| parked.contains(&t.regs.rip)) {
            let saved = known.iter().find(|(tid, ..)| *tid == t.tid).ok_or_else(|| {
                Error::Refused(format!("the registers of thread {} are not known", t.tid))
            })?;
            (t.sigmask, t.regs) = (saved.1, saved.2);
        }
        Ok(())
    }

    /// Makes dropping do nothing: the threads' registers are no longer those to go back to.
    pub fn forget(&mut self) {
        self.held = false;
    }

    /// Ends tracing without restoring anything: a parked process stays as it is.
    pub fn abandon(mut self) {
        self.forget();
        for t in &self.threads {
            let _ = ptrace::detach(t.tid, 0);
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if self.held {
            let _ = self.release();
        }
    }
}

/// Gives a thread its registers back and ends its tracing. The mask comes first: if the tracer dies before
/// the registers, what the thread is in ends with them.
fn let_go(pid: pid_t, t: &FrozenThread) -> Result<()> {
    let set =
        || ptrace::set_sigmask(t.tid, t.sigmask).and_then(|()| ptrace::set_regs(t.tid, &t.regs));
    let set = match set() {
        // Gone, or still in a remote table that did not end in time.
        Err(Error::Gone { .. }) => {
            ptrace::interrupt(t.tid)?;
            match stop(pid, t.tid, Instant::now() + LET_GO)? {
                Some(_) => set(),
                None => return Ok(()),
            }
        }
        other => other,
    };
    set.and_then(|()| ptrace::detach(t.tid, 0))
}

/// Lets threads go that were seized and interrupted and are in no list: by hand.
fn let_unlisted_go<'a>(pid: pid_t, tids: impl IntoIterator<Item = &'a pid_t>) {
    for tid in tids {
        if let Ok(Some(_)) = stop(pid, *tid, Instant::now() + LET_GO) {
            let _ = ptrace::detach(*tid, 0);
        }
    }
}

/// How long a failed freeze waits for a thread it already interrupted.
const LET_GO: Duration = Duration::from_millis(500);

/// Thread numbers of a process, ascending.
pub fn list_threads(pid: pid_t) -> Result<Vec<pid_t>> {
    let path = format!("/proc/{pid}/task");
    let dir = match std::fs::read_dir(&path) {
        Ok(dir) => dir,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(Error::Gone { pid }),
        Err(e) => return Err(Error::io(format!("list {path}"), e)),
    };
    let mut tids = Vec::new();
    for entry in dir {
        let entry = match entry {
            Ok(entry) => entry,
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Err(Error::Gone { pid }),
            Err(e) => return Err(Error::io(format!("list {path}"), e)),
        };
        if let Some(tid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) {
            tids.push(tid);
        }
    }
    tids.sort_unstable();
    Ok(tids)
}

/// Waits for the stop of a thread that was seized and interrupted; `None` when it is gone.
fn stop(pid: pid_t, tid: pid_t, deadline: Instant) -> Result<Option<FrozenThread>> {
    let group_stop = loop {
        match ptrace::wait_stop_until(tid, deadline)? {
            None => {
                return Err(Error::Refused(format!(
                    "thread {tid} of process {pid} does not stop (it waits uninterruptibly in the kernel, \
                     as on a dead network file system); try again when it has come back"
                )));
            }
            Some(Stop::Gone) => return Ok(None),
            // A signal was on its way first: let it be delivered, the stop follows.
            Some(Stop::Signal(signal)) => ptrace::cont(tid, signal)?,
            Some(Stop::Event | Stop::Syscall) => break false,
            Some(Stop::Group) => break true,
        }
    };
    let regs = match ptrace::get_regs(tid) {
        Ok(regs) => regs,
        Err(Error::Gone { .. }) => return Ok(None),
        Err(e) => return Err(e),
    };
    let sigmask = ptrace::get_sigmask(tid)?;
    Ok(Some(FrozenThread { tid, regs, sigmask, rseq_cs_at: None, group_stop }))
}

/// Aborts rseq critical sections, as the kernel does for a thread that is preempted in one. It would
/// forget them itself as soon as the thread runs a remote syscall, and let the thread go on in the
/// middle of the section afterwards.
fn abort_rseq(mem: &ProcMem, thread: &mut FrozenThread) -> Result<()> {
    let rseq = match ptrace::rseq_config(thread.tid) {
        Ok(rseq) => rseq,
        // Kernels without the request.
        Err(Error::Sys { .. }) => return Ok(()),
        Err(e) => return Err(e),
    };
    let read = |address: u64, out: &mut [u8]| mem.read(address, out).is_ok();
    if let Some(fix) = rseq_fixup(&thread.regs, rseq.address, rseq.signature, &read) {
        thread.regs = fix.regs;
        thread.rseq_cs_at = Some(fix.clear_at);
    }
    Ok(())
}

/// Thread numbers in the innermost PID namespace, by number on this host. Threads that end meanwhile
/// are left out.
pub fn inner_tids(pid: pid_t, tids: &[pid_t]) -> Result<BTreeMap<pid_t, pid_t>> {
    let mut map = BTreeMap::new();
    for &tid in tids {
        let path = format!("/proc/{pid}/task/{tid}/status");
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let inner = text
            .lines()
            .find_map(|l| l.strip_prefix("NSpid:"))
            .and_then(|l| l.split_whitespace().next_back())
            .and_then(|n| n.parse().ok())
            .ok_or_else(|| Error::parse("NSpid of a thread", &text))?;
        map.insert(tid, inner);
    }
    Ok(map)
}

#[cfg(test)]
#[path = "freeze_tests.rs"]
pub(crate) mod tests;
