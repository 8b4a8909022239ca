//! A child is given an odd state by programs, is then captured, and must show that state.

use super::harness::Child;
use super::{check, creds, process, thread, timers};
use crate::arch::Regs;
use crate::arch::xstate::{TILE_DATA, XsaveLayout};
use crate::capture::state::outside::{self, Host};
use crate::capture::state::remote::{ProcessProbe, ThreadProbe};
use crate::manifest::{
    AltStack, Creds, Interval, Manifest, PosixTimer, Process, Rlimit, Sched, SigAction, Thread,
};
use crate::program::Program;
use crate::sys::ptrace;
use std::os::unix::ffi::OsStrExt;

const S: i64 = 1_000_000_000;

fn siginfo(signal: i32, code: i32, rest: &[u32]) -> Vec<u8> {
    let mut info: Vec<u8> = Vec::new();
    for word in [signal as u32, 0, code as u32, 0].iter().chain(rest) {
        info.extend_from_slice(&word.to_le_bytes());
    }
    info.resize(ptrace::SIGINFO_LEN, 0);
    info
}

fn odd_timers(tid: i32) -> Vec<PosixTimer> {
    let time = |left: i64, period: i64| Interval { value_ns: left, interval_ns: period };
    let timer = PosixTimer {
        id: 3,
        clock: libc::CLOCK_MONOTONIC,
        notify: libc::SIGEV_SIGNAL,
        signal: 35,
        value: 0x1234_5678_9abc,
        tid: 0,
        time: time(500 * S, 20 * S),
        overrun: 0,
    };
    vec![
        timer.clone(),
        PosixTimer {
            id: 5,
            clock: libc::CLOCK_REALTIME,
            notify: libc::SIGEV_THREAD_ID,
            tid,
            time: time(700 * S, 0),
            ..timer.clone()
        },
        PosixTimer { id: 9, notify: libc::SIGEV_NONE, time: time(0, 0), ..timer },
    ]
}

fn odd_process(pid: i32, own: &Process, root: &std::path::Path) -> Process {
    let mut p = Process {
        pid,
        pgid: pid,
        sid: pid,
        umask: 0o31,
        root: root.as_os_str().as_bytes().to_vec(),
        cwd: root.join("inner").as_os_str().as_bytes().to_vec(),
        personality: libc::ADDR_NO_RANDOMIZE as u32,
        oom_score_adj: own.oom_score_adj + 21,
        coredump_filter: 0x11,
        dumpable: 1,
        thp_disable: true,
        child_subreaper: true,
        membarrier: 1 << 4 | 1 << 6,
        sigactions: vec![SigAction::default(); 64],
        pending: vec![
            siginfo(40, -1, &[7, 8, 0x55, 0x66]),
            siginfo(40, -2, &[3, 0, 9, 0]),
            siginfo(libc::SIGCHLD, 1, &[77, 88, 3]),
        ],
        timers: odd_timers(pid),
        itimers: [(100, 50), (30, 0), (0, 0)]
            .map(|(left, period)| Interval { value_ns: left * S, interval_ns: period * S })
            .to_vec(),
        mm: own.mm,
        auxv: own.auxv.clone(),
        rlimits: own.rlimits.clone(),
        ..Process::default()
    };
    p.sigactions[libc::SIGUSR1 as usize - 1] =
        SigAction { handler: 0x1234, flags: 0x1400_0000, restorer: 0x5678, mask: 0xe00 };
    p.sigactions[libc::SIGPIPE as usize - 1].handler = 1;
    p.mm.arg_end = p.mm.arg_start + 1;
    // SAFETY: asks only.
    p.mm.brk = unsafe { libc::sbrk(0) } as u64;
    for (i, soft, hard) in [(libc::RLIMIT_NOFILE, 77, 99), (libc::RLIMIT_CORE, 0, 0)] {
        (p.rlimits[i as usize].soft, p.rlimits[i as usize].hard) = (soft, hard);
    }
    if XsaveLayout::this_cpu().features() >> TILE_DATA & 1 == 1 {
        p.xcomp_perm = 1 << TILE_DATA;
    }
    p
}

fn odd_thread(tid: i32, regs: &Regs, scratch: u64, bounding: u64) -> Thread {
    Thread {
        tid,
        comm: b"odd\n\\name".to_vec(),
        regs: regs.to_bytes(),
        pending: vec![siginfo(41, -6, &[11, 12])],
        robust_list: scratch + 0x100,
        robust_list_len: 24,
        clear_child_tid: scratch + 0x200,
        rseq: scratch + 0x400,
        rseq_len: 32,
        rseq_sig: 0x5305_3053,
        creds: Creds {
            uids: vec![1001, 1002, 1003, 1004],
            gids: vec![2001, 2002, 2003, 2004],
            groups: vec![7, 8, 70000],
            // CAP_CHOWN, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN; CAP_CHOWN is inheritable but unbounded.
            caps: vec![1 | 1 << 10, 1 << 10 | 1 << 12, 1 << 12, bounding & !0b111, 1 << 10],
            securebits: 0b10_0001,
            no_new_privs: true,
        },
        sched: Sched {
            policy: libc::SCHED_BATCH as u32,
            nice: 5,
            affinity: vec![1],
            ioprio: 2 << 13 | 6,
            ..Sched::default()
        },
        timer_slack_ns: 777_777,
        pdeathsig: libc::SIGUSR2,
        time_left_ns: -1,
        ..Thread::default()
    }
}

/// Lets the child answer the remote questions and reads the rest from outside.
fn capture(child: &mut Child, host: &Host, timers: &[PosixTimer]) -> (Process, Thread) {
    let mut p = child.program();
    let thread_probe = ThreadProbe::plan(&mut p);
    let process_probe = ProcessProbe::plan(&mut p, timers);
    let (p, entries, data) = child.run(p);
    child.freeze();
    let started = std::time::Instant::now();
    let mut process = outside::process_outside(host, child.pid).expect("process");
    let (process_took, started) = (started.elapsed(), std::time::Instant::now());
    let mut thread = outside::thread_outside(host, child.pid, child.pid).expect("thread").thread;
    println!("outside: process {process_took:?}, thread {:?}", started.elapsed());
    process_probe.collect(&p, &entries, &data, &mut process).expect("collect process");
    thread_probe.collect(&p, &entries, &data, &mut thread).expect("collect thread");
    child.release();
    (process, thread)
}

fn unregister_rseq(p: &mut Program, rseq: ptrace::RseqConfig) {
    const UNREGISTER: u64 = 1;
    if rseq.address != 0 {
        let args = [rseq.address.into(), rseq.len.into(), UNREGISTER.into(), rseq.signature.into()];
        p.must("unregister rseq", libc::SYS_rseq, args);
    }
}

fn is_root() -> bool {
    // SAFETY: asks only.
    let root = unsafe { libc::geteuid() } == 0;
    if !root {
        println!("not tested: needs root");
    }
    root
}

/// Timers have moved on a little; the rest must be equal to the last bit.
fn same_timers(want: &[PosixTimer], got: &[PosixTimer]) {
    assert_eq!(want.len(), got.len());
    for (w, g) in want.iter().zip(got) {
        same_time(w.time, g.time);
        assert_eq!(*w, PosixTimer { time: w.time, ..g.clone() });
    }
}

fn same_time(want: Interval, got: Interval) {
    assert_eq!(want.interval_ns, got.interval_ns);
    let passed = want.value_ns - got.value_ns;
    // The kernel adds a tick to timers on CPU time.
    assert!((-S / 100..30 * S).contains(&passed), "want {want:?}, got {got:?}");
}

fn own_altstack() -> AltStack {
    // SAFETY: asks only; the structure is plain data and outlives the call.
    let stack = unsafe {
        let mut old: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &raw mut old);
        old
    };
    AltStack { sp: stack.ss_sp as u64, flags: stack.ss_flags as u32, size: stack.ss_size as u64 }
}

#[test]
fn an_odd_state_is_restored_and_captured() {
    if !is_root() {
        return;
    }
    let host = Host::read().expect("host");
    let grants = check::Grants::own().expect("grants");
    let own = outside::process_outside(&host, std::process::id() as i32).expect("own state");
    let root = tempfile::tempdir().expect("tempdir");
    let root = root.path().canonicalize().expect("path");
    std::fs::create_dir(root.join("inner")).expect("mkdir");

    let mut child = Child::start();
    child.freeze();
    let regs = ptrace::get_regs(child.pid).expect("registers");
    let rseq = ptrace::rseq_config(child.pid).expect("rseq");
    child.release();
    let want = odd_process(child.pid, &own, &root);
    let want_thread = odd_thread(child.pid, &regs, child.scratch(), grants.bounding);
    assert_eq!(grants.process_blockers(&want), [""; 0]);
    assert_eq!(grants.creds_blockers(&want_thread.creds), ["inheritable set"; 0]);

    let manifest = Manifest {
        process: want.clone(),
        threads: vec![want_thread.clone()],
        ..Manifest::default()
    };
    let mut p = child.program();
    unregister_rseq(&mut p, rseq);
    process::plan_early(&want, None, &mut p).expect("early");
    process::plan_rlimits(&want, &mut p).expect("rlimits");
    thread::plan_before_creds(&want_thread, &mut p).expect("before");
    creds::plan(&want_thread, &mut p).expect("creds");
    thread::plan_after_creds(&want_thread, &mut p).expect("after");
    process::plan_late(&manifest, timers::Ids::of_this_host(), &mut p).expect("late");
    child.run(p);

    let (got, got_thread) = capture(&mut child, &host, &want.timers);
    same_timers(&want.timers, &got.timers);
    for (w, g) in want.itimers.iter().zip(&got.itimers) {
        same_time(*w, *g);
    }
    assert_eq!(got.xcomp_perm & 1 << TILE_DATA, want.xcomp_perm);
    let drift = crate::sys::task::monotonic_ns() - got.monotonic_ns;
    assert!((0..5 * S).contains(&drift));
    let expected = Process {
        exe: own.exe.clone(),
        comm: want_thread.comm.clone(),
        monotonic_ns: got.monotonic_ns,
        timers: got.timers.clone(),
        itimers: got.itimers.clone(),
        xcomp_perm: got.xcomp_perm,
        ..want
    };
    assert_eq!(expected, got);
    let expected = Thread { regs: Vec::new(), sigmask: got_thread.sigmask, ..want_thread };
    // Not part of these programs: the child still has this thread's.
    assert_eq!(Thread { altstack: own_altstack(), ..expected }, got_thread);
}

#[test]
fn timer_ids_are_counted_up_to() {
    let host = Host::read().expect("host");
    let mut child = Child::start();
    let want = Process { timers: odd_timers(child.pid), ..Process::default() };
    let mut p = child.program();
    timers::plan_create(&want.timers, 1, timers::Ids::Counted, &mut p).expect("create");
    timers::plan_arm(&want, &mut p).expect("arm");
    child.run(p);
    let (got, _) = capture(&mut child, &host, &want.timers);
    same_timers(&want.timers, &got.timers);
}

#[test]
fn a_wrong_timer_id_is_noticed() {
    let mut child = Child::start();
    let one = [PosixTimer { id: 0, signal: 34, ..PosixTimer::default() }];
    let mut p = child.program();
    timers::plan_create(&one, 1, timers::Ids::Counted, &mut p).expect("create");
    // The same once more: the next id is 1 by now.
    timers::plan_create(&one, 1, timers::Ids::Counted, &mut p).expect("create");
    let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| child.run(p)));
    let text = failed.expect_err("must fail").downcast::<String>().expect("text");
    assert_eq!(*text, "child failed to give timer 0 its id");
}

#[test]
fn hostile_manifests_are_refused() {
    let mut p = Program::new(0, 0);
    let thread = Thread::default();
    assert!(thread::plan_before_creds(&thread, &mut p).is_err());
    assert!(creds::plan(&thread, &mut p).is_err());
    for pending in [vec![1, 2], siginfo(0, 0, &[]), siginfo(65, 0, &[]), siginfo(9, 0, &[])] {
        let thread = Thread { pending: vec![pending], ..Thread::default() };
        assert!(thread::plan_after_creds(&thread, &mut p).is_err());
    }
    let relative = Process { cwd: b"x".to_vec(), root: b"/".to_vec(), ..Process::default() };
    assert!(process::plan_early(&relative, None, &mut p).is_err());
    let many = Process { rlimits: vec![Rlimit::default(); 17], ..Process::default() };
    assert!(process::plan_rlimits(&many, &mut p).is_err());
}
