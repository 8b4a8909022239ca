//! A session of Slipstream taken hold of, to be killed at one of its system calls.

use std::time::{Duration, Instant};

use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::hosts::{Hosts, Side};
use crate::process::proc_file;
use crate::wait;

/// Longer in one system call, and the session is taken for idle.
const IDLE: Duration = Duration::from_secs(20);

/// How a session came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was killed.
    Killed,
    /// It had no more calls to make, or what was waited for has come.
    Over,
}

/// The first thread of a session that stopped itself (`SLIPSTREAM_STOP_AT`). To be used by one thread.
pub struct Stepper {
    pid: Pid,
    /// System calls so far, but for those by which it only waits.
    pub calls: u64,
}

impl Stepper {
    /// Waits for a session with that name to have stopped itself, takes hold of it and lets it go on to its next call.
    pub fn take(hosts: &Hosts, side: Side, name: &str) -> Self {
        let is_stopped = |pid: &i32| {
            proc_file(*pid, "comm").trim() == name && proc_file(*pid, "stat").contains(") T ")
        };
        let found = || hosts.host(side).pids().into_iter().find(is_stopped);
        let pid = Pid::from_raw(wait::until("a session to stop itself", wait::LIMIT, found));
        ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD).expect("tracing a session");
        // It is reported as stopped, and goes on when it is told to.
        kill(pid, Signal::SIGCONT).expect("a session to go on");
        Self { pid, calls: 0 }
    }

    /// Lets it make system calls until `done`, or until it returns from the call number `kill_at`; then it is killed.
    pub fn run(&mut self, kill_at: u64, done: impl Fn() -> bool) -> End {
        let mut since = Instant::now();
        loop {
            match waitpid(self.pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
                Ok(WaitStatus::StillAlive) if done() || since.elapsed() > IDLE => return End::Over,
                Ok(WaitStatus::StillAlive) => {
                    std::thread::yield_now();
                    continue;
                }
                Ok(WaitStatus::PtraceSyscall(_)) => {
                    self.calls += u64::from(self.returns_from_work());
                    if self.calls >= kill_at {
                        kill(self.pid, Signal::SIGKILL).expect("killing a session");
                        let _ = waitpid(self.pid, Some(WaitPidFlag::__WALL));
                        return End::Killed;
                    }
                    let _ = ptrace::syscall(self.pid, None);
                }
                Ok(WaitStatus::Stopped(_, signal)) => drop(ptrace::syscall(self.pid, signal)),
                Ok(WaitStatus::PtraceEvent(..)) => drop(ptrace::syscall(self.pid, None)),
                // It has ended.
                Ok(_) | Err(_) => return End::Over,
            }
            since = Instant::now();
            if done() {
                return End::Over;
            }
        }
    }
}

impl Stepper {
    /// Whether the stop is a return, from a call that may have changed something.
    fn returns_from_work(&self) -> bool {
        const WAITS: [i64; 4] = [
            libc::SYS_wait4,
            libc::SYS_sched_yield,
            libc::SYS_clock_nanosleep,
            libc::SYS_nanosleep,
        ];
        let Ok(regs) = ptrace::getregs(self.pid) else { return false };
        let enters = regs.rax as i64 == -i64::from(libc::ENOSYS);
        !enters && !WAITS.contains(&(regs.orig_rax as i64))
    }
}

impl Drop for Stepper {
    /// Whoever runs on runs on untraced.
    fn drop(&mut self) {
        if ptrace::detach(self.pid, None).is_ok() {
            return;
        }
        // It is in a call, or at one: stopped there, it can be let go.
        if ptrace::interrupt(self.pid).is_ok() {
            let _ = waitpid(self.pid, Some(WaitPidFlag::__WALL));
            let _ = ptrace::detach(self.pid, None);
        }
    }
}
