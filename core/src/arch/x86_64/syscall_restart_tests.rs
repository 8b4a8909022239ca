use super::*;

fn stopped(nr: i64, verdict: i64) -> Regs {
    Regs {
        orig_rax: nr as u64,
        rax: -verdict as u64,
        rip: 0x40_1002,
        rsp: 0x7ff0,
        ..Regs::default()
    }
}

const QUIET: Waiting = Waiting::Nothing;
const HANDLER: Waiting = Waiting::Handler { restart: false };

fn as_is(regs: &Regs, waiting: Waiting) -> (i64, u64) {
    match resume(regs, waiting, -1) {
        Resume::AsIs(r) => (r.rax as i64, r.rip),
        Resume::Timed(t) => panic!("{t:?}"),
    }
}

#[test]
fn plain_restarts() {
    for verdict in [512, 513, 514] {
        let regs = stopped(libc::SYS_read, verdict);
        assert_eq!(as_is(&regs, QUIET), (libc::SYS_read, 0x40_1000), "{verdict}");
    }
    // Not in a syscall: rax may hold anything.
    let regs = Regs { orig_rax: u64::MAX, ..stopped(0, 512) };
    assert_eq!(as_is(&regs, QUIET), (-512, 0x40_1002));
    let regs = Regs { rax: 5, ..stopped(libc::SYS_read, 0) };
    assert_eq!(as_is(&regs, QUIET), (5, 0x40_1002));
}

#[test]
fn a_handler_turns_restarts_into_eintr() {
    let eintr = (-4, 0x40_1002);
    assert_eq!(as_is(&stopped(libc::SYS_pause, 514), HANDLER), eintr);
    assert_eq!(as_is(&stopped(libc::SYS_read, 512), HANDLER), eintr);
    assert_eq!(as_is(&stopped(libc::SYS_poll, 516), HANDLER), eintr);
    let restart = Waiting::Handler { restart: true };
    assert_eq!(as_is(&stopped(libc::SYS_read, 512), restart).0, libc::SYS_read);
    assert_eq!(as_is(&stopped(libc::SYS_pause, 514), restart), eintr);
    assert_eq!(as_is(&stopped(libc::SYS_futex, 513), HANDLER).0, libc::SYS_futex);
}

#[test]
fn timed_waits_keep_the_time_left() {
    let sleep = Regs { rdi: 0x1000, rsi: 0x2000, ..stopped(libc::SYS_nanosleep, 516) };
    let wait = timed_wait(&sleep).expect("timed");
    assert_eq!(wait, TimedWait { timeout: Timeout::Timespec(0x1000), left_at: 0x2000 });
    let Resume::Timed(t) = resume(&sleep, QUIET, 1_500_000_000) else { panic!("not timed") };
    assert_eq!(t.args_with(0x9000)[..2], [0x9000, 0x2000]);
    assert_eq!(t.timespec()[0], 1);
    assert_eq!(t.timespec()[8..12], 500_000_000u32.to_le_bytes());
    let begun = t.begin(0x9000);
    assert_eq!((begun.rax as i64, begun.rip, begun.rdi), (libc::SYS_nanosleep, 0x40_1000, 0x9000));
    let asleep = Regs { rdi: 0x9000, ..sleep };
    assert_eq!(t.settle(&asleep), Some(sleep));
    assert_eq!(t.settle(&Regs { rip: 0x77, ..asleep }), None);

    let poll = Regs { rdx: 100, ..stopped(libc::SYS_poll, 516) };
    let Resume::Timed(t) = resume(&poll, QUIET, 1) else { panic!("not timed") };
    assert_eq!((t.args[2], t.timespec_arg), (1, None));
    let Resume::Timed(t) = resume(&poll, QUIET, i64::MAX) else { panic!("not timed") };
    assert_eq!(t.args[2], 100, "never longer than asked");

    let futex = Regs { rsi: 128, r10: 0x3000, ..stopped(libc::SYS_futex, 516) };
    let Resume::Timed(t) = resume(&futex, QUIET, 0) else { panic!("not timed") };
    assert_eq!(t.timespec_arg, Some(3));
    // Unknown: once more in full.
    assert_eq!(as_is(&futex, QUIET).0, libc::SYS_futex);
}

#[test]
fn absolute_and_endless_waits_are_issued_again() {
    let bitset = Regs { rsi: 9 | 128, r10: 0x3000, ..stopped(libc::SYS_futex, 516) };
    assert_eq!(timed_wait(&bitset), None);
    let endless = Regs { rdx: -1i32 as u32 as u64, ..stopped(libc::SYS_poll, 516) };
    for regs in [bitset, endless] {
        let Resume::AsIs(r) = resume(&regs, QUIET, 5) else { panic!("timed") };
        assert_eq!(r.rip, 0x40_1000);
    }
}

#[test]
fn eintr_caused_by_the_stop_alone() {
    let forever = Regs { r10: u64::from(u32::MAX), ..stopped(libc::SYS_epoll_wait, 4) };
    assert_eq!(as_is(&forever, QUIET), (libc::SYS_epoll_wait, 0x40_1000));
    assert_eq!(as_is(&forever, HANDLER), (-4, 0x40_1002));
    let timed = Regs { r10: 50, ..forever };
    assert_eq!(as_is(&timed, QUIET), (-4, 0x40_1002));
    assert_eq!(as_is(&stopped(libc::SYS_connect, 4), QUIET), (-4, 0x40_1002));
}

#[test]
fn restarted_waits_are_named_from_their_code() {
    let mut code = [0x90u8; 24];
    code[10..15].copy_from_slice(&[0xb8, 202, 0, 0, 0]);
    let read = |at: u64, out: &mut [u8]| {
        assert_eq!(at, 0x40_1000 - 24);
        out.copy_from_slice(&code);
        true
    };
    let regs = stopped(libc::SYS_restart_syscall, 516);
    assert_eq!(name_restarted(&regs, &read).orig_rax as i64, libc::SYS_futex);
    assert_eq!(name_restarted(&regs, &|_, _| false), regs);
    assert_eq!(as_is(&regs, QUIET), (-4, 0x40_1002));
    assert_eq!(heal_regs(&regs).rax as i64, libc::SYS_restart_syscall);
}

#[test]
fn healing_keeps_the_restart_block() {
    let healed = heal_regs(&stopped(libc::SYS_poll, 516));
    assert_eq!((healed.rax as i64, healed.rip), (libc::SYS_restart_syscall, 0x40_1000));
    assert_eq!(heal_regs(&stopped(libc::SYS_read, 512)).rax as i64, libc::SYS_read);
    assert_eq!(heal_regs(&stopped(libc::SYS_epoll_wait, 4)).rip, 0x40_1002);
}

#[test]
fn the_first_handler_decides() {
    let mut actions = vec![SigAction::default(); 64];
    actions[libc::SIGUSR1 as usize - 1] = SigAction { handler: 9, flags: 0, ..Default::default() };
    actions[libc::SIGTERM as usize - 1] =
        SigAction { handler: 9, flags: 0x1000_0000, ..Default::default() };
    let (usr1, term) = (libc::SIGUSR1, libc::SIGTERM);
    assert_eq!(waiting(&[term], &[usr1], 0, &actions), Waiting::Handler { restart: true });
    assert_eq!(waiting(&[], &[term, usr1], 0, &actions), HANDLER);
    assert_eq!(waiting(&[], &[usr1], 1 << (usr1 - 1), &actions), QUIET);
    assert_eq!(waiting(&[libc::SIGCHLD], &[77], 0, &actions), QUIET);
}

#[test]
fn critical_sections_abort() {
    let descriptor = [0u64, 0x5000, 0x20, 0x6000];
    let signature = 0x5305_3053u32;
    let read = |at: u64, out: &mut [u8]| {
        let word = match at {
            0x108 => 0x2000u64,
            0x2008..0x2020 => descriptor[(at as usize - 0x2000) / 8],
            0x5ffc => u64::from(signature),
            _ => return false,
        };
        out.copy_from_slice(&word.to_le_bytes()[..out.len()]);
        true
    };
    let at = |rip| Regs { rip, ..Regs::default() };
    let fix = rseq_fixup(&at(0x501f), 0x100, signature, &read).expect("inside");
    assert_eq!((fix.regs.rip, fix.clear_at), (0x6000, 0x108));
    assert_eq!(rseq_fixup(&at(0x5020), 0x100, signature, &read), None);
    assert_eq!(rseq_fixup(&at(0x4fff), 0x100, signature, &read), None);
    assert_eq!(rseq_fixup(&at(0x5000), 0x100, 1, &read), None);
    assert_eq!(rseq_fixup(&at(0x5000), 0, signature, &read), None);
}
