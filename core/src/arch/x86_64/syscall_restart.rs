//! How a thread goes on that was stopped inside a syscall, or inside an rseq critical section.
//!
//! A stopped thread shows the kernel's private verdict in rax (-ERESTART*) and the syscall's number in
//! `orig_rax`. On the thread's way back the kernel turns that into a restart or into EINTR. A thread that
//! is loaded from a signal frame has no such way back, so the verdict is carried out here. Signals that
//! are pending and unblocked are delivered when `rt_sigreturn` leaves the kernel, *before* a
//! re-issued syscall runs: [`Waiting`] says whether that happens, because then the call must
//! return EINTR where the kernel would have said so.
//!
//! Re-issuing is exact for calls without a time-out, with an absolute one, or which write the time left
//! back (ppoll, pselect, select). For the others see [`Timed`].

use super::Regs;
use crate::manifest::SigAction;

const EINTR: i64 = 4;
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;
/// Length of the `syscall` instruction.
const SYSCALL_LEN: u64 = 2;
const TIMER_ABSTIME: u64 = 1;
const FUTEX_CMD_MASK: u64 = 127;
const FUTEX_WAIT: u64 = 0;

/// Reads memory of the thread's process; false when that fails.
pub type ReadMemory<'a> = &'a dyn Fn(u64, &mut [u8]) -> bool;

/// What happens to a thread as soon as its signal mask is back in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// No handler runs.
    Nothing,
    /// A handler runs; with `SA_RESTART` or without.
    Handler {
        /// `SA_RESTART` is set.
        restart: bool,
    },
}

/// How a thread goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// With these registers.
    AsIs(Regs),
    /// By finishing a wait.
    Timed(Timed),
}

/// A relative wait of which only a part is left.
///
/// Two ways to finish it. *Inside the runner*: under the thread's own signal mask run `nr` with
/// [`Timed::args_with`], store the result at [`super::sigframe::RAX_OFFSET`] of a frame that holds
/// `return_regs`. *In place*, which leaves nothing behind: resume with [`Timed::begin`], stop the
/// thread once it waits, and give it [`Timed::settle`]; the kernel's restart block then holds the
/// right end of the wait and the registers are the program's own again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timed {
    /// Syscall number.
    pub nr: u64,
    /// Its arguments; a time-out in milliseconds is filled in already.
    pub args: [u64; 6],
    /// Index of the argument that must point to a `timespec` of the time left, if it is passed so.
    pub timespec_arg: Option<usize>,
    /// Time left in nanoseconds.
    pub left_ns: i64,
    /// The registers after the call, but for rax (the call's result).
    pub return_regs: Regs,
}

impl Timed {
    /// Arguments with the time left at `timespec` (16 bytes: seconds, nanoseconds).
    pub fn args_with(&self, timespec: u64) -> [u64; 6] {
        let mut args = self.args;
        if let Some(i) = self.timespec_arg {
            args[i] = timespec;
        }
        args
    }

    /// The `timespec` of the time left.
    pub fn timespec(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&(self.left_ns / 1_000_000_000).to_le_bytes());
        out[8..].copy_from_slice(&(self.left_ns % 1_000_000_000).to_le_bytes());
        out
    }

    /// Registers that issue the call at the program's own `syscall` instruction.
    pub fn begin(&self, timespec: u64) -> Regs {
        let mut regs = with_args(&self.return_regs, self.args_with(timespec));
        regs.rax = self.nr;
        regs.rip -= SYSCALL_LEN;
        regs
    }

    /// What to set a thread to that was resumed with [`Timed::begin`] and is stopped with `now`: the
    /// program's own argument registers. `None` when it is elsewhere (in a signal handler): its
    /// registers must be left alone.
    pub fn settle(&self, now: &Regs) -> Option<Regs> {
        let here = now.rip == self.return_regs.rip && now.rsp == self.return_regs.rsp;
        let not_yet = now.rip + SYSCALL_LEN == self.return_regs.rip;
        if !here || not_yet {
            return None;
        }
        let own = with_args(now, args(&self.return_regs));
        Some(own)
    }
}

/// A relative timed wait the thread was in when it was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimedWait {
    /// The time-out it was called with.
    pub timeout: Timeout,
    /// Where the kernel has written the time left (0: nowhere).
    pub left_at: u64,
}

/// A relative time-out as passed to a syscall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timeout {
    /// Milliseconds.
    Millis(i32),
    /// Address of a `timespec`.
    Timespec(u64),
}

/// An `int` argument: the upper half of the register is not part of it.
fn int(word: u64) -> i32 {
    word as u32 as i32
}

fn args(r: &Regs) -> [u64; 6] {
    [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9]
}

fn with_args(regs: &Regs, args: [u64; 6]) -> Regs {
    let [rdi, rsi, rdx, r10, r8, r9] = args;
    Regs { r10, r9, r8, rdx, rsi, rdi, ..*regs }
}

/// The verdict in rax, as a positive number, if the thread is on its way out of a syscall.
fn verdict(regs: &Regs) -> Option<i64> {
    let value = -(regs.rax as i64);
    (int(regs.orig_rax) >= 0 && (1..=4095).contains(&value)).then_some(value)
}

fn reissue(regs: &Regs) -> Regs {
    Regs { rax: regs.orig_rax, rip: regs.rip - SYSCALL_LEN, ..*regs }
}

/// Finds the relative timed wait that `regs` were stopped in, if the kernel would continue it with
/// the time left.
pub fn timed_wait(regs: &Regs) -> Option<TimedWait> {
    if verdict(regs) != Some(ERESTART_RESTARTBLOCK) {
        return None;
    }
    let spec = Timeout::Timespec;
    match regs.orig_rax as i64 {
        libc::SYS_nanosleep => Some(TimedWait { timeout: spec(regs.rdi), left_at: regs.rsi }),
        libc::SYS_clock_nanosleep if regs.rsi & TIMER_ABSTIME == 0 => {
            Some(TimedWait { timeout: spec(regs.rdx), left_at: regs.r10 })
        }
        libc::SYS_poll if int(regs.rdx) >= 0 => {
            Some(TimedWait { timeout: Timeout::Millis(int(regs.rdx)), left_at: 0 })
        }
        libc::SYS_futex if regs.rsi & FUTEX_CMD_MASK == FUTEX_WAIT && regs.r10 != 0 => {
            Some(TimedWait { timeout: spec(regs.r10), left_at: 0 })
        }
        _ => None,
    }
}

/// A wait that was stopped once before goes on as `restart_syscall`, and its own number is lost. Looks
/// for it in the instructions before the `syscall`; returns registers with `orig_rax` put right,
/// or unchanged when there is nothing to do or to be found. To be applied to captured registers.
pub fn name_restarted(regs: &Regs, read: ReadMemory) -> Regs {
    const BEFORE: usize = 24;
    const MOV_EAX: u8 = 0xb8;
    let restarted = regs.orig_rax as i64 == libc::SYS_restart_syscall;
    let mut code = [0; BEFORE];
    if !restarted || !read(regs.rip.wrapping_sub(SYSCALL_LEN + BEFORE as u64), &mut code) {
        return *regs;
    }
    let number = |w: &[u8]| w[1..].iter().rev().fold(0, |nr, b| nr << 8 | i64::from(*b));
    let mut numbers = code.windows(5).rev().filter(|w| w[0] == MOV_EAX).map(number);
    let waits = [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_poll, libc::SYS_futex];
    let found = numbers.find(|nr| waits.contains(nr));
    found.map_or(*regs, |nr| Regs { orig_rax: nr as u64, ..*regs })
}

/// How a thread captured with `regs` goes on at the destination. `left_ns` is the time left of the wait
/// it was in ([`timed_wait`]); -1 when that isn't known: then it waits in full once more, for a wait
/// may end late but never early.
pub fn resume(regs: &Regs, waiting: Waiting, left_ns: i64) -> Resume {
    let handler = waiting != Waiting::Nothing;
    let interrupted = Resume::AsIs(Regs { rax: -EINTR as u64, ..*regs });
    match verdict(regs) {
        Some(ERESTARTSYS) if waiting == (Waiting::Handler { restart: false }) => interrupted,
        Some(ERESTARTNOHAND | ERESTART_RESTARTBLOCK) if handler => interrupted,
        Some(ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND) => Resume::AsIs(reissue(regs)),
        // There is no restart block to continue at the destination, and no number to start over.
        Some(ERESTART_RESTARTBLOCK) if regs.orig_rax as i64 == libc::SYS_restart_syscall => {
            interrupted
        }
        Some(ERESTART_RESTARTBLOCK) => match timed_wait(regs) {
            Some(wait) if left_ns >= 0 => Resume::Timed(rest_of(&wait, regs, left_ns)),
            _ => Resume::AsIs(reissue(regs)),
        },
        Some(EINTR) if !handler && waits_forever(regs) => Resume::AsIs(reissue(regs)),
        _ => Resume::AsIs(*regs),
    }
}

fn rest_of(wait: &TimedWait, regs: &Regs, left_ns: i64) -> Timed {
    let mut args = args(regs);
    let timespec_arg = match (wait.timeout, regs.orig_rax as i64) {
        (Timeout::Millis(asked), _) => {
            let left_ms = (left_ns as u64).div_ceil(1_000_000);
            args[2] = left_ms.min(asked as u64);
            None
        }
        (Timeout::Timespec(_), libc::SYS_nanosleep) => Some(0),
        (Timeout::Timespec(_), libc::SYS_clock_nanosleep) => Some(2),
        (Timeout::Timespec(_), _) => Some(3),
    };
    Timed { nr: regs.orig_rax, args, timespec_arg, left_ns, return_regs: *regs }
}

/// Calls that answer EINTR even to a mere stop (signal(7)), when they have no time-out: as no handler
/// ran, calling again is what the program would have to do.
fn waits_forever(regs: &Regs) -> bool {
    match regs.orig_rax as i64 {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => int(regs.r10) < 0,
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => regs.r10 == 0,
        libc::SYS_semop => true,
        libc::SYS_rt_sigtimedwait => regs.rdx == 0,
        _ => false,
    }
}

/// The registers with which a thread goes on at the *source* when nobody is left to hand it back to the
/// kernel as it was (its tracer died): as [`resume`], but the restart block is still there.
pub fn heal_regs(regs: &Regs) -> Regs {
    match verdict(regs) {
        Some(ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND) => reissue(regs),
        Some(ERESTART_RESTARTBLOCK) => {
            Regs { rax: libc::SYS_restart_syscall as u64, ..reissue(regs) }
        }
        _ => *regs,
    }
}

/// Tells which handler, if any, runs once `blocked` is in force. `thread` and `shared` are the
/// signal numbers pending for the thread and for the process.
pub fn waiting(thread: &[i32], shared: &[i32], blocked: u64, actions: &[SigAction]) -> Waiting {
    const SA_RESTART: u64 = 0x1000_0000;
    const SIG_IGN: u64 = 1;
    // The kernel takes the thread's own signals first, faults before the rest, then by number.
    let order = |pending: &[i32]| {
        let unblocked = |s: &i32| (1..=64).contains(s) && blocked >> (s - 1) & 1 == 0;
        let mut sorted: Vec<i32> = pending.iter().copied().filter(unblocked).collect();
        sorted.sort_by_key(|s| (!is_fault(*s), *s));
        sorted
    };
    let action = |s: i32| actions.get(s as usize - 1);
    let mut due = order(thread).into_iter().chain(order(shared)).filter_map(action);
    due.find(|a| a.handler > SIG_IGN)
        .map_or(Waiting::Nothing, |a| Waiting::Handler { restart: a.flags & SA_RESTART != 0 })
}

fn is_fault(signal: i32) -> bool {
    use libc::{SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};
    [SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGSYS].contains(&signal)
}

/// A thread that was inside an rseq critical section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RseqFix {
    /// Registers at the abort handler.
    pub regs: Regs,
    /// Address of the 64-bit word to be cleared (`rseq_cs`).
    pub clear_at: u64,
}

/// Does what the kernel does to a preempted thread whose rseq area is at `area` (0: none): inside a
/// critical section it must go on at the abort handler. `None` when it is not inside one, or the
/// handler doesn't carry `signature` (the kernel would kill the program; it is left to do so).
pub fn rseq_fixup(regs: &Regs, area: u64, signature: u32, read: ReadMemory) -> Option<RseqFix> {
    const CS_OFFSET: u64 = 8;
    let word = |at: u64| {
        let mut bytes = [0; 8];
        read(at, &mut bytes).then(|| u64::from_le_bytes(bytes))
    };
    if area == 0 {
        return None;
    }
    let clear_at = area.checked_add(CS_OFFSET)?;
    let descriptor = word(clear_at).filter(|d| *d != 0)?;
    // struct rseq_cs: version, flags (32 bits each), start_ip, post_commit_offset, abort_ip.
    let field = |i: u64| word(descriptor.checked_add(i * 8)?);
    let (start, len, abort) = (field(1)?, field(2)?, field(3)?);
    if regs.rip.wrapping_sub(start) >= len {
        return None;
    }
    let mut found = [0; 4];
    let signed = read(abort.checked_sub(4)?, &mut found) && u32::from_le_bytes(found) == signature;
    signed.then_some(RseqFix { regs: Regs { rip: abort, ..*regs }, clear_at })
}

#[cfg(test)]
#[path = "syscall_restart_tests.rs"]
mod tests;
