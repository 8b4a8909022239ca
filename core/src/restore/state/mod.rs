//! Process and thread state, rebuilt by the process itself: tables of syscalls from a manifest.
//!
//! Everything here runs inside the new process with all signals blocked, after its mappings and
//! descriptors are in place. The order that works:
//!
//! 1. leader, alone: [`process::plan_early`] (needs privilege and free descriptors);
//! 2. threads are made;
//! 3. leader: [`process::plan_rlimits`];
//! 4. every thread: [`thread::plan_before_creds`], [`creds::plan`], [`thread::plan_after_creds`];
//! 5. leader, when all threads are done with 4: [`process::plan_late`] (dumpable, signals, timers);
//! 6. every thread leaves by `rt_sigreturn`, which sets the mask that lets pending signals in.
//!
//! Entries that change what the program can observe must succeed, or the restore fails and the source
//! goes on. What a destination can't grant is found before the freeze by [`check`].

pub mod check;
pub mod creds;
pub mod process;
pub mod thread;
pub mod timers;

use crate::error::{Error, Result};
use crate::program::{Arg, Program};
use crate::sys::ptrace::SIGINFO_LEN;

/// A parameter that `prctl` and others leave unused.
const NONE: Arg = Arg::Val(0);

/// The signal number in a raw `siginfo_t` from a manifest, if it can be queued again.
fn queued_signal(info: &[u8]) -> Result<u64> {
    if info.len() != SIGINFO_LEN {
        return Err(Error::Manifest(format!("siginfo of {} bytes", info.len())));
    }
    let signal = i32::from_le_bytes([info[0], info[1], info[2], info[3]]);
    match signal {
        libc::SIGKILL | libc::SIGSTOP => Err(Error::Refused(format!(
            "signal {signal} is pending: let it take effect, then try again"
        ))),
        1..=64 => Ok(signal as u64),
        _ => Err(Error::Manifest(format!("pending signal {signal}"))),
    }
}

/// Adds `prctl(option, value)`, which must succeed.
fn must_prctl(p: &mut Program, what: &str, option: u64, value: u64) {
    p.must(what, libc::SYS_prctl, [option.into(), value.into(), NONE, NONE, NONE]);
}

#[cfg(test)]
pub(crate) mod harness;
#[cfg(test)]
mod tests;
