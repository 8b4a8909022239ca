use super::*;
use crate::manifest::{Interval, PosixTimer};

fn info(signal: i32, code: i32, id: i32) -> Vec<u8> {
    let mut info = vec![0; crate::sys::ptrace::SIGINFO_LEN];
    for (at, word) in [(0, signal), (8, code), (SI_TIMER_ID_AT, id)] {
        info[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    info
}

fn pending(shared: Vec<Vec<u8>>) -> Pending {
    Pending { shared, threads: vec![Vec::new()] }
}

fn time(value_ns: i64, interval_ns: i64) -> Interval {
    Interval { value_ns, interval_ns }
}

fn settled(itimers: Vec<Interval>, timers: &[Interval], signals: Vec<Vec<u8>>) -> Vec<i64> {
    let timers = timers.iter().zip(3..);
    let timers = timers.map(|(time, id)| PosixTimer { id, time: *time, ..PosixTimer::default() });
    let mut process = Process { itimers, timers: timers.collect(), ..Process::default() };
    settle_timers(&mut process, &pending(signals), 1000);
    let itimers = process.itimers.iter().map(|t| t.value_ns);
    itimers.chain(process.timers.iter().map(|t| t.time.value_ns)).collect()
}

#[test]
fn a_timer_that_rests_until_its_signal_is_taken_runs() {
    let alarm = info(libc::SIGALRM, SI_KERNEL, 0);
    assert_eq!(settled(vec![time(0, 700)], &[], vec![alarm.clone()]), [700]);
    assert_eq!(settled(vec![time(0, 700)], &[], Vec::new()), [0]);
    assert_eq!(settled(vec![time(0, 0)], &[], vec![alarm]), [0]);
}

#[test]
fn a_timer_that_expired_after_the_look_at_it_does_not_fire_twice() {
    let signals = || vec![info(libc::SIGALRM, SI_KERNEL, 0), info(40, SI_TIMER, 4)];
    let posix = [time(1000, 0), time(1000, 0)];
    assert_eq!(settled(vec![time(900, 0)], &posix, signals()), [0, 1000, 0]);
    // Periodic ones go on.
    assert_eq!(settled(vec![time(900, 5000)], &[], signals()), [5000]);
    // An older signal, of a timer that was set again since.
    assert_eq!(
        settled(vec![time(1001, 0)], &[time(1, 0), time(1001, 0)], signals()),
        [1001, 1, 1001]
    );
    // Somebody else's alarm.
    assert_eq!(settled(vec![time(900, 0)], &[], vec![info(libc::SIGALRM, 0, 0)]), [900]);
}

#[test]
fn signals_that_would_be_lost_are_found() {
    let user = || info(libc::SIGUSR1, 0, 77);
    let watch = |captured: Vec<Vec<u8>>, actions: Vec<SigAction>| {
        let process = Process { pending: captured, sigactions: actions, ..Process::default() };
        Watch::of(&Manifest { process, threads: vec![Thread::default()], ..Manifest::default() })
    };
    let plain = || vec![SigAction::default(); 64];
    assert_eq!(watch(vec![user()], plain()).lost(&pending(vec![user()])), None);
    let twice = pending(vec![user(), user()]);
    assert_eq!(watch(vec![user()], plain()).lost(&twice), Some(libc::SIGUSR1));
    let mut to_thread = pending(Vec::new());
    to_thread.threads[0].push(user());
    assert_eq!(watch(vec![user()], plain()).lost(&to_thread), Some(libc::SIGUSR1));
    let timers = vec![info(40, SI_TIMER, 0), info(libc::SIGPROF, SI_KERNEL, 0)];
    assert_eq!(watch(Vec::new(), plain()).lost(&pending(timers)), None);
    let alarm = pending(vec![info(libc::SIGALRM, 0, 0)]);
    assert_eq!(watch(Vec::new(), plain()).lost(&alarm), Some(libc::SIGALRM));
    // What is ignored anyway.
    let size = pending(vec![info(libc::SIGWINCH, 0, 0)]);
    assert_eq!(watch(Vec::new(), plain()).lost(&size), None);
    let mut handled = plain();
    handled[libc::SIGWINCH as usize - 1].handler = 0x1000;
    assert_eq!(watch(Vec::new(), handled).lost(&size), Some(libc::SIGWINCH));
}

#[test]
fn a_blocked_signal_is_not_ignored() {
    let actions = vec![SigAction { handler: SIG_IGN, ..SigAction::default() }; 64];
    let thread = Thread { sigmask: bit(libc::SIGUSR2), ..Thread::default() };
    let set = ignored(&actions, &[thread]);
    assert_eq!((set & bit(libc::SIGUSR1), set & bit(libc::SIGUSR2)), (bit(libc::SIGUSR1), 0));
}
