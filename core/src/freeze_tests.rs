use super::*;
use crate::proc::status;
use crate::testing::Child;

const TIMEOUT: Duration = Duration::from_secs(10);

/// Does not stop for a tracer: it waits for a child as after vfork, but with memory of its own.
pub(crate) fn wait_unstoppably() {
    let flags = libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: without CLONE_VM the child has a copy of everything, as after fork, and only sleeps.
    unsafe {
        if libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            loop {
                libc::pause();
            }
        }
    }
}

/// Waits until a thread is in a state, as its status names it: `D` can't be stopped.
pub(crate) fn assert_comes_to(pid: pid_t, tid: pid_t, state: char) {
    let end = Instant::now() + TIMEOUT;
    while status::read_thread(pid, tid).unwrap().state != state {
        assert!(Instant::now() < end, "thread {tid} does not come to state {state}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn tracer(pid: pid_t, tid: pid_t) -> pid_t {
    status::read_thread(pid, tid).unwrap().tracer_pid
}

#[test]
fn a_thread_that_does_not_stop_holds_no_other() {
    // The first thread stops later than the second fails, or earlier; both are let go.
    let child = Child::new(|| {
        for _ in 0..2 {
            std::thread::spawn(|| std::thread::sleep(Duration::from_secs(600)));
        }
        std::thread::spawn(wait_unstoppably);
        for _ in 0..2 {
            std::thread::spawn(|| std::thread::sleep(Duration::from_secs(600)));
        }
    });
    let tids = list_threads(child.pid).unwrap();
    assert_eq!(tids.len(), 6);
    let stuck = tids[3];
    assert_comes_to(child.pid, stuck, 'D');
    // A thread of its own: while the stuck thread has a tracer that doesn't wait for it, its process can't be reaped.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let error = Frozen::freeze(child.pid, Duration::from_millis(1)).unwrap_err();
            assert!(error.to_string().contains(&stuck.to_string()), "{error}");
            for tid in tids.iter().filter(|tid| **tid != stuck) {
                assert_eq!(tracer(child.pid, *tid), 0, "thread {tid} is held");
            }
        });
    });
}

#[test]
fn a_group_stop_is_told_from_a_freeze() {
    let child = Child::new(|| {});
    let frozen = Frozen::freeze(child.pid, TIMEOUT).unwrap();
    assert!(!frozen.in_group_stop());
    frozen.thaw().unwrap();
    let itself = crate::sys::pidfd::PidFd::open(child.pid).unwrap();
    itself.kill(libc::SIGSTOP).unwrap();
    assert_comes_to(child.pid, child.pid, 'T');
    let frozen = Frozen::freeze(child.pid, TIMEOUT).unwrap();
    assert!(frozen.in_group_stop());
    frozen.thaw().unwrap();
    assert_comes_to(child.pid, child.pid, 'T');
}
