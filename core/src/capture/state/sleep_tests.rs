//! `sleep(1)` passes a second argument to `clock_nanosleep`, so that the kernel's own word on the time left
//! can be held against the estimate.

use super::*;
use crate::arch::syscall_restart::{Resume, Timed, Waiting, name_restarted, resume};
use crate::capture::state::outside::{Host, thread_outside};
use crate::capture::state::remote;
use crate::sys::ptrace;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

struct Sleeper(Child);

impl Sleeper {
    fn start(seconds: &str) -> Self {
        let child = Self(Command::new("sleep").arg(seconds).spawn().expect("sleep"));
        let deadline = Instant::now() + Duration::from_secs(20);
        let asleep = |nr: &str| nr.starts_with(&format!("{} ", libc::SYS_clock_nanosleep));
        let path = format!("/proc/{}/syscall", child.pid());
        while !std::fs::read_to_string(&path).is_ok_and(|s| asleep(&s)) {
            assert!(Instant::now() < deadline, "sleep does not sleep");
            std::thread::sleep(Duration::from_millis(1));
        }
        child
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    fn memory(&self) -> std::fs::File {
        let path = format!("/proc/{}/mem", self.pid());
        std::fs::File::options().read(true).write(true).open(path).expect("memory")
    }

    fn freeze(&self) -> Regs {
        ptrace::seize(self.pid()).expect("seize");
        self.stop()
    }

    fn stop(&self) -> Regs {
        ptrace::interrupt(self.pid()).expect("interrupt");
        assert_eq!(ptrace::stopped(self.pid()), ptrace::Stop::Event);
        ptrace::get_regs(self.pid()).expect("registers")
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_estimate_agrees_with_the_kernel() {
    let host = Host::read().expect("host");
    let sleeper = Sleeper::start("60");
    std::thread::sleep(Duration::from_millis(300));
    let pid = sleeper.pid();
    let mut clock = SleepClock::new();
    let Some(sample) = SleepSample::take(&mut clock, pid, pid) else {
        println!("not tested: this kernel has no /proc/PID/sched");
        return;
    };
    std::thread::sleep(Duration::from_millis(50));
    let regs = sleeper.freeze();
    let now = task::monotonic_ns();
    let switches = thread_outside(&host, pid, pid).expect("thread").voluntary_switches;
    let memory = sleeper.memory();
    let read = |at: u64, out: &mut [u8]| memory.read_exact_at(out, at).is_ok();
    let exact = remote::time_left(&regs, &read);
    assert!(exact > 0, "the kernel says {exact}");
    assert!(sample.slept_on(&regs, switches), "{sample:x?} {switches} {regs:x?}");
    let estimate = sample.left_of(60_000_000_000, now);
    println!("time left: kernel {exact} ns, estimate off by {} ns", estimate - exact);
    // A busy machine may have had a tick stolen; the sample is good to about a millisecond otherwise.
    assert!((estimate - exact).abs() < 30_000_000);
    // Having run in between spoils the sample.
    assert_eq!(sample.time_left(&regs, switches + 1, now, &read), -1);
}

#[test]
fn an_interrupted_sleep_is_finished_in_place() {
    let started = Instant::now();
    let mut sleeper = Sleeper::start("60");
    let pid = sleeper.pid();
    let regs = sleeper.freeze();
    let Resume::Timed(timed) = resume(&regs, Waiting::Nothing, 400_000_000) else {
        panic!("not a timed wait: {regs:x?}");
    };
    let spec = regs.rsp - 4096;
    sleeper.memory().write_all_at(&Timed::timespec(&timed), spec).expect("write timespec");
    ptrace::set_regs(pid, &timed.begin(spec)).expect("set");
    ptrace::cont(pid, 0).expect("continue");
    std::thread::sleep(Duration::from_millis(100));
    let now = sleeper.stop();
    let own = timed.settle(&now).expect("still in the wait");
    assert_eq!((own.rax as i64, own.rdi, own.rdx), (-516, regs.rdi, regs.rdx));
    ptrace::set_regs(pid, &own).expect("set");
    ptrace::detach(pid, 0).expect("detach");
    assert!(sleeper.0.wait().expect("wait").success());
    let took = started.elapsed();
    assert!(took > Duration::from_millis(400) && took < Duration::from_secs(30), "{took:?}");
}

#[test]
fn a_sleep_stopped_twice_is_recognised() {
    let sleeper = Sleeper::start("60");
    let first = sleeper.freeze();
    ptrace::cont(sleeper.pid(), 0).expect("continue");
    std::thread::sleep(Duration::from_millis(50));
    let regs = sleeper.stop();
    assert_eq!(regs.orig_rax as i64, libc::SYS_restart_syscall);
    let memory = sleeper.memory();
    let read = |at: u64, out: &mut [u8]| memory.read_exact_at(out, at).is_ok();
    let named = name_restarted(&regs, &read);
    assert_eq!((named.orig_rax, named.rip), (first.orig_rax, first.rip));
    assert!((1..60_000_000_000).contains(&remote::time_left(&named, &read)));
}

#[test]
fn the_syscall_file_is_parsed() {
    let text = "7 0x1 0x2 0x3 0x4 0x5 0x6 0x7ffe 0x401000\n";
    assert_eq!(blocked_in(text), Some((7, [1, 2, 3, 4, 5, 6], 0x7ffe)));
    assert_eq!(blocked_in("running\n"), None);
    assert_eq!(blocked_in("-1 0x7ffe 0x401000\n"), None);
}
