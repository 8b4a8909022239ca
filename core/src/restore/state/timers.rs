//! POSIX timers and interval timers.

use crate::error::{Error, Result};
use crate::manifest::{Interval, PosixTimer, Process};
use crate::program::{ENTRY_LEN, Op, Program};

const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
const RESTORE_IDS_OFF: u64 = 0;
const RESTORE_IDS_ON: u64 = 1;
const NS_PER_S: i64 = 1_000_000_000;
const SIGEVENT_LEN: usize = 64;
/// Timers made and deleted until the wanted id comes. More would make the blackout long.
const COUNTED_ID_MAX: i32 = 4096;

/// How a timer gets the id the program knows it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// The kernel takes a wish (`PR_TIMER_CREATE_RESTORE_IDS`, Linux 6.15).
    Asked,
    /// A new process counts them up from zero.
    Counted,
}

impl Ids {
    /// What this host's kernel can do.
    pub fn of_this_host() -> Self {
        if crate::sys::task::can_restore_timer_ids() { Ids::Asked } else { Ids::Counted }
    }
}

/// Why timers can't be moved, if they can't: to be asked before the freeze, for the destination's [`Ids`].
pub fn refusal(timers: &[PosixTimer], threads: usize, ids: Ids) -> Option<String> {
    let problem = timers.iter().find_map(|t| {
        let per_thread = t.clock == libc::CLOCK_THREAD_CPUTIME_ID && threads > 1;
        let reason = if per_thread {
            "runs on the CPU time of a thread that the kernel doesn't name"
        } else if t.id < 0 || (ids == Ids::Counted && t.id > COUNTED_ID_MAX) {
            "has an id too high for the destination's kernel (Linux 6.15 can do it)"
        } else {
            return None;
        };
        Some(format!("timer {} {reason}", t.id))
    });
    problem.map(|p| format!("{p}; delete the timer before moving"))
}

/// Makes the timers, disarmed. The threads they signal must exist.
pub fn plan_create(timers: &[PosixTimer], threads: usize, ids: Ids, p: &mut Program) -> Result<()> {
    if let Some(reason) = refusal(timers, threads, ids) {
        return Err(Error::Refused(reason));
    }
    if timers.is_empty() {
        return Ok(());
    }
    match ids {
        Ids::Asked => {
            let mode = |p: &mut Program, mode: u64| {
                super::must_prctl(p, "timer ids", PR_TIMER_CREATE_RESTORE_IDS, mode);
            };
            mode(p, RESTORE_IDS_ON);
            for timer in timers {
                create(timer, timer.id, p);
            }
            mode(p, RESTORE_IDS_OFF);
        }
        Ids::Counted => {
            let last = timers.iter().map(|t| t.id).max().unwrap_or(-1);
            for id in 0..=last {
                match timers.iter().find(|t| t.id == id) {
                    Some(timer) => create(timer, -1, p),
                    None => skip(p),
                }
            }
        }
    }
    Ok(())
}

fn sigevent(timer: &PosixTimer) -> Vec<u8> {
    let mut event = Vec::with_capacity(SIGEVENT_LEN);
    event.extend_from_slice(&timer.value.to_le_bytes());
    event.extend_from_slice(&timer.signal.to_le_bytes());
    event.extend_from_slice(&timer.notify.to_le_bytes());
    event.extend_from_slice(&timer.tid.to_le_bytes());
    event.resize(SIGEVENT_LEN, 0);
    event
}

/// Creates a timer and makes sure that its id came out as wanted.
fn create(timer: &PosixTimer, wish: i32, p: &mut Program) {
    let event = p.data(&sigevent(timer));
    let id = p.data(&wish.to_le_bytes());
    let args = [timer.clock.into(), event.into(), id.into()];
    p.must(format!("create timer {}", timer.id), libc::SYS_timer_create, args);
    let after_the_check = p.next_address() + 2 * ENTRY_LEN;
    p.op(Op::JumpIf, [id.into(), (timer.id as u32).into(), after_the_check.into()]);
    // Reached with another id only, and no timer has this one.
    p.must(format!("give timer {} its id", timer.id), libc::SYS_timer_delete, [(-1i32).into()]);
}

/// Uses up one id.
fn skip(p: &mut Program) {
    // A 32-bit id in a zeroed 64-bit slot, so that it can be read as an argument.
    let id = p.words(&[0]);
    let clock = libc::CLOCK_MONOTONIC;
    // No event: a signal that is never sent, as the timer is never armed.
    let create = [clock.into(), 0.into(), id.into()];
    p.must("create a timer to skip its id", libc::SYS_timer_create, create);
    p.must("delete the timer", libc::SYS_timer_delete, [crate::program::Arg::At(id)]);
}

/// Starts timers and interval timers with the time that was left, the last thing before resuming.
pub fn plan_arm(process: &Process, p: &mut Program) -> Result<()> {
    for timer in process.timers.iter().filter(|t| t.time.value_ns != 0) {
        let [period_s, period_ns, left_s, left_ns] = split(&timer.time)?;
        let at = p.words(&[period_s, period_ns, left_s, left_ns]);
        let args = [timer.id.into(), 0.into(), at.into(), 0.into()];
        p.must(format!("arm timer {}", timer.id), libc::SYS_timer_settime, args);
    }
    if process.itimers.len() > 3 {
        return Err(Error::Manifest(format!("{} interval timers", process.itimers.len())));
    }
    for (which, timer) in process.itimers.iter().enumerate().filter(|(_, t)| t.value_ns != 0) {
        let [period_s, period_ns, left_s, left_ns] = split(timer)?;
        let at = p.words(&[period_s, period_ns / 1000, left_s, left_ns / 1000]);
        let args = [which.into(), at.into(), 0.into()];
        p.must(format!("interval timer {which}"), libc::SYS_setitimer, args);
    }
    Ok(())
}

/// Period and time left, each in seconds and nanoseconds.
fn split(timer: &Interval) -> Result<[u64; 4]> {
    let parts = |ns: i64| [(ns / NS_PER_S) as u64, (ns % NS_PER_S) as u64];
    if timer.value_ns < 0 || timer.interval_ns < 0 {
        return Err(Error::Manifest(format!("timer with {} ns left", timer.value_ns)));
    }
    let [left_s, left_ns] = parts(timer.value_ns);
    let [period_s, period_ns] = parts(timer.interval_ns);
    Ok([period_s, period_ns, left_s, left_ns])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_move_is_named() {
        let timer = |id, clock| PosixTimer { id, clock, ..PosixTimer::default() };
        let own = [timer(0, libc::CLOCK_THREAD_CPUTIME_ID)];
        assert_eq!(refusal(&own, 1, Ids::Counted), None);
        assert!(refusal(&own, 2, Ids::Asked).is_some_and(|r| r.contains("timer 0")));
        let high = [timer(9999, 0)];
        assert_eq!(refusal(&high, 1, Ids::Asked), None);
        assert!(refusal(&high, 1, Ids::Counted).is_some());
        let mut p = Program::new(0, 0);
        assert!(plan_create(&high, 1, Ids::Counted, &mut p).is_err());
    }

    #[test]
    fn times_are_split() {
        let t = Interval { value_ns: 2_000_000_003, interval_ns: 1_500_000_000 };
        assert_eq!(split(&t).expect("split"), [1, 500_000_000, 2, 3]);
        assert!(split(&Interval { value_ns: -1, interval_ns: 0 }).is_err());
    }
}
