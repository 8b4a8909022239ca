//! ptrace requests on one thread. All must come from the thread that seized it.

use crate::arch::Regs;
use crate::error::{Error, Result};
use libc::{c_long, c_uint, c_void, pid_t};
use nix::errno::Errno;
use std::time::{Duration, Instant};

const NT_X86_XSTATE: usize = 0x202;
const PTRACE_GETSIGMASK: c_uint = 0x420a;
const PTRACE_SETSIGMASK: c_uint = 0x420b;
const PTRACE_PEEKSIGINFO: c_uint = 0x4209;
const PTRACE_PEEKSIGINFO_SHARED: u32 = 1;
const PTRACE_GET_RSEQ_CONFIGURATION: c_uint = 0x420f;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: c_uint = 0x4211;
/// Size of a raw `siginfo_t`.
pub const SIGINFO_LEN: usize = 128;
/// The largest XSAVE area known (AMX tiles included) is below this.
const XSTATE_LEN_MAX: usize = 64 * 1024;

fn request(req: c_uint, tid: pid_t, addr: usize, data: *mut c_void) -> nix::Result<c_long> {
    // SAFETY: callers pass either an integer as `data` or a pointer to a live buffer of the size the
    // request writes; ptrace touches no other memory of ours.
    let ret = unsafe { libc::ptrace(req, tid, addr, data) };
    Errno::result(ret)
}

fn fail(tid: pid_t, what: &str, errno: Errno) -> Error {
    if errno == Errno::ESRCH {
        Error::Gone { pid: tid }
    } else {
        Error::sys(format!("ptrace {what} of thread {tid}"), errno)
    }
}

/// Becomes the tracer of a thread without stopping it. With `PTRACE_O_TRACESYSGOOD`: a thread whose tracer
/// dies at a syscall stop is sent the signal of that stop (`ptrace_report_syscall` in the kernel), which is
/// SIGTRAP without it, and no signal at all with it.
pub fn seize(tid: pid_t) -> Result<()> {
    let options = libc::PTRACE_O_TRACESYSGOOD as usize as *mut c_void;
    match request(libc::PTRACE_SEIZE, tid, 0, options) {
        Ok(_) => Ok(()),
        // A thread that has exited and is not reaped yet.
        Err(Errno::EPERM) if is_dead(tid) => Err(Error::Gone { pid: tid }),
        Err(e) => Err(fail(tid, "seize", e)),
    }
}

fn is_dead(tid: pid_t) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{tid}/stat")).unwrap_or_default();
    let state = text.rsplit(") ").next().and_then(|rest| rest.chars().next());
    matches!(state, None | Some('Z' | 'X'))
}

/// Asks a seized thread to stop; [`wait_stop_until`] reports when it has.
pub fn interrupt(tid: pid_t) -> Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, std::ptr::null_mut())
        .map(drop)
        .map_err(|e| fail(tid, "interrupt", e))
}

/// Continues a stopped thread, delivering `signal` (0: none).
pub fn cont(tid: pid_t, signal: i32) -> Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize as *mut c_void)
        .map(drop)
        .map_err(|e| fail(tid, "continue", e))
}

/// Continues a stopped thread up to the next entry to or exit from a syscall.
pub fn cont_to_syscall(tid: pid_t) -> Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, std::ptr::null_mut())
        .map(drop)
        .map_err(|e| fail(tid, "continue to syscall", e))
}

/// Lets a stopped thread go, delivering `signal` (0: none).
pub fn detach(tid: pid_t, signal: i32) -> Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize as *mut c_void)
        .map(drop)
        .map_err(|e| fail(tid, "detach", e))
}

/// Integer registers of a stopped thread.
pub fn get_regs(tid: pid_t) -> Result<Regs> {
    let mut regs = Regs::default();
    request(libc::PTRACE_GETREGS, tid, 0, regs.as_mut_ptr())
        .map_err(|e| fail(tid, "read registers", e))?;
    Ok(regs)
}

/// Sets the integer registers of a stopped thread.
pub fn set_regs(tid: pid_t, regs: &Regs) -> Result<()> {
    let mut copy = *regs;
    request(libc::PTRACE_SETREGS, tid, 0, copy.as_mut_ptr())
        .map(drop)
        .map_err(|e| fail(tid, "set registers", e))
}

/// The XSAVE area of a stopped thread in the standard format.
pub fn get_xstate(tid: pid_t) -> Result<Vec<u8>> {
    let mut buf = vec![0u8; XSTATE_LEN_MAX];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, (&raw mut iov).cast())
        .map_err(|e| fail(tid, "read XSAVE area", e))?;
    buf.truncate(iov.iov_len);
    Ok(buf)
}

/// Blocked signals of a stopped thread.
pub fn get_sigmask(tid: pid_t) -> Result<u64> {
    let mut mask = 0u64;
    request(PTRACE_GETSIGMASK, tid, 8, (&raw mut mask).cast())
        .map_err(|e| fail(tid, "read signal mask", e))?;
    Ok(mask)
}

/// Sets the blocked signals of a stopped thread.
pub fn set_sigmask(tid: pid_t, mask: u64) -> Result<()> {
    let mut mask = mask;
    request(PTRACE_SETSIGMASK, tid, 8, (&raw mut mask).cast())
        .map(drop)
        .map_err(|e| fail(tid, "set signal mask", e))
}

/// Raw `siginfo_t` of every pending signal, thread-directed or (`shared`) process-directed, in order.
pub fn pending_signals(tid: pid_t, shared: bool) -> Result<Vec<Vec<u8>>> {
    #[repr(C)]
    struct Args {
        offset: u64,
        flags: u32,
        count: i32,
    }
    const BATCH: usize = 16;
    let mut all: Vec<Vec<u8>> = Vec::new();
    loop {
        let mut args = Args {
            offset: all.len() as u64,
            flags: if shared { PTRACE_PEEKSIGINFO_SHARED } else { 0 },
            count: BATCH as i32,
        };
        let mut buf = [0u8; SIGINFO_LEN * BATCH];
        // The address argument carries the query, the data argument the buffer.
        let got =
            request(PTRACE_PEEKSIGINFO, tid, (&raw mut args) as usize, buf.as_mut_ptr().cast())
                .map_err(|e| fail(tid, "read pending signals", e))? as usize;
        all.extend(buf.chunks_exact(SIGINFO_LEN).take(got).map(<[u8]>::to_vec));
        if got < BATCH {
            return Ok(all);
        }
    }
}

/// The registered rseq area of a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RseqConfig {
    /// Address; 0 when none is registered.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// Signature before abort handlers.
    pub signature: u32,
}

/// Reads the rseq registration of a stopped thread.
pub fn rseq_config(tid: pid_t) -> Result<RseqConfig> {
    #[repr(C)]
    #[derive(Default)]
    struct Raw {
        pointer: u64,
        size: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    const _: () = assert!(size_of::<Raw>() == 24);
    let mut raw = Raw::default();
    request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size_of::<Raw>(), (&raw mut raw).cast())
        .map_err(|e| fail(tid, "read rseq configuration", e))?;
    Ok(RseqConfig { address: raw.pointer, len: raw.size, signature: raw.signature })
}

/// True if Syscall User Dispatch is on in a stopped thread. Kernels before 6.4 don't tell.
pub fn dispatches_syscalls(tid: pid_t) -> Result<bool> {
    #[repr(C)]
    #[derive(Default)]
    struct Config {
        mode: u64,
        selector: u64,
        offset: u64,
        len: u64,
    }
    const _: () = assert!(size_of::<Config>() == 32);
    let mut config = Config::default();
    let len = size_of::<Config>();
    match request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, len, (&raw mut config).cast()) {
        Ok(_) => Ok(config.mode != 0),
        Err(Errno::EIO | Errno::EINVAL) => Ok(false),
        Err(e) => Err(fail(tid, "read syscall dispatch", e)),
    }
}

/// Why a thread reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Stopped by [`interrupt`], or as a new traced thread.
    Event,
    /// The same in a process that is in group stop, or is entering it.
    Group,
    /// A signal is about to be delivered.
    Signal(i32),
    /// At the entry to or exit from a syscall.
    Syscall,
    /// The thread is gone.
    Gone,
}

/// Polls of the wait before it starts to sleep between them: stops take microseconds.
const POLLS_BUSY: u32 = 2000;

/// Sleeps between polls that a thread is given even past the deadline. A host that stood still, or a session
/// that was stopped, comes back to a deadline long past while the thread had no chance to run.
const SLEEPS_MIN: u32 = 2000;

/// Waits until a seized thread reports, or `None` at the deadline (and 0.2 seconds of polls at least).
pub fn wait_stop_until(tid: pid_t, deadline: Instant) -> Result<Option<Stop>> {
    let mut polls = 0u32;
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        let got = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
        match Errno::result(got) {
            Ok(0) => {
                polls += 1;
                if polls <= POLLS_BUSY {
                    std::thread::yield_now();
                } else if polls > POLLS_BUSY + SLEEPS_MIN && Instant::now() >= deadline {
                    return Ok(None);
                } else {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
            Ok(_) => return Ok(Some(decode(status))),
            Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => return Ok(Some(Stop::Gone)),
            Err(e) => return Err(fail(tid, "wait", e)),
        }
    }
}

fn decode(status: i32) -> Stop {
    const EVENT_STOP: i32 = 128;
    if !libc::WIFSTOPPED(status) {
        Stop::Gone
    } else if status >> 16 == EVENT_STOP {
        // The kernel tells the signal of the group stop (`do_jobctl_trap`), SIGTRAP if there is none.
        if libc::WSTOPSIG(status) == libc::SIGTRAP { Stop::Event } else { Stop::Group }
    } else if libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80 {
        Stop::Syscall
    } else {
        Stop::Signal(libc::WSTOPSIG(status))
    }
}

/// For tests: the stop of a thread that must stop soon.
#[cfg(test)]
pub(crate) fn stopped(tid: pid_t) -> Stop {
    let deadline = Instant::now() + Duration::from_secs(10);
    wait_stop_until(tid, deadline).expect("wait").expect("a stop in time")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As after a host, or only the tracer, that stood still for as long as the wait may take.
    #[test]
    fn a_deadline_that_passed_in_a_standstill_leaves_the_thread_a_moment() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as pid_t;
        seize(pid).unwrap();
        let late = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(60));
            crate::sys::pidfd::PidFd::open(pid).unwrap().kill(libc::SIGWINCH).unwrap();
        });
        let stop = wait_stop_until(pid, Instant::now()).unwrap();
        late.join().unwrap();
        assert_eq!(stop, Some(Stop::Signal(libc::SIGWINCH)));
        child.kill().unwrap();
        while wait_stop_until(pid, Instant::now()).unwrap() != Some(Stop::Gone) {}
        // Reaped already.
        let _ = child.wait();
    }
}
