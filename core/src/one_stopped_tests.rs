//! A tracer is killed at each of its calls that change anything, and the program that it works on never
//! notices.

use super::*;
use crate::inject::SourceScratch;
use crate::sys::mapped::{Shared, memfd_executable};
use crate::sys::ptrace::stopped;
use crate::testing::Child;
use std::arch::asm;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

const TIMEOUT: Duration = Duration::from_secs(10);

/// What a source session does to a process before the commit, and its rollback.
fn trace(pid: pid_t) {
    let scratch = SourceScratch::map(pid, TIMEOUT).unwrap();
    let frozen = Frozen::freeze(pid, TIMEOUT).unwrap();
    let mut ask = |_: &FrozenThread, program: &mut crate::program::Program| {
        program.may("getuid", libc::SYS_getuid, []);
    };
    scratch.run(&frozen, &mut ask).unwrap();
    frozen.thaw().unwrap();
    scratch.unmap(TIMEOUT).unwrap();
}

/// True if all registers are what they were after some time in user mode.
fn spin() -> bool {
    let (mut general, mut vector) =
        ([3u64, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41], [1.5f64, 2.5]);
    let before = (general, vector);
    // SAFETY: counts a register down to zero; no memory is touched.
    unsafe {
        asm!(
            "2: dec rcx",
            "jnz 2b",
            inout("rcx") 20_000u64 => _,
            inout("rax") general[0], inout("rdx") general[1], inout("rsi") general[2], inout("rdi") general[3],
            inout("r8") general[4], inout("r9") general[5], inout("r10") general[6], inout("r11") general[7],
            inout("r12") general[8], inout("r13") general[9], inout("r14") general[10], inout("r15") general[11],
            inout("xmm3") vector[0], inout("xmm11") vector[1],
            options(nostack)
        );
    }
    (general, vector) == before
}

/// True if a call that nothing ends is not ended, and one with a limit is not too late.
fn sleep() -> bool {
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    let mut poll = libc::pollfd { fd: pipe[0], events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that lives through the call.
    let got = unsafe { libc::poll(&raw mut poll, 1, 20) };
    // SAFETY: descriptors made above.
    unsafe { (libc::close(pipe[0]), libc::close(pipe[1])) };
    // A timed wait may come back as interrupted.
    got == 0 || Errno::last() == Errno::EINTR
}

fn mask() -> u64 {
    let mut mask = 0u64;
    // SAFETY: the kernel writes eight bytes.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, 0, 0, &raw mut mask, 8) };
    mask
}

/// Calls that change something in the program, or let it go on.
fn matters(nr: u64) -> bool {
    [libc::SYS_ptrace, libc::SYS_pwrite64, libc::SYS_kill].contains(&(nr as i64))
}

/// Lets the tracer make so many calls that matter, then kills it. False if it had no more to do.
fn kill_after(tracer: &Child, go: &AtomicU32, calls: u32) -> bool {
    let tid = tracer.pid;
    ptrace::seize(tid).unwrap();
    ptrace::interrupt(tid).unwrap();
    assert_eq!(stopped(tid), Stop::Event);
    go.store(1, Ordering::SeqCst);
    let mut left = calls;
    while left > 0 {
        ptrace::cont_to_syscall(tid).unwrap();
        match stopped(tid) {
            Stop::Syscall => {
                let regs = ptrace::get_regs(tid).unwrap();
                if regs.orig_rax == libc::SYS_pause as u64 {
                    return false;
                }
                let enters = regs.rax as i64 == -i64::from(libc::ENOSYS);
                left -= u32::from(!enters && matters(regs.orig_rax));
            }
            Stop::Gone => panic!("the tracer failed"),
            Stop::Event | Stop::Group | Stop::Signal(_) => {}
        }
    }
    true
}

/// What a target counts, seen by both.
struct Counts(Shared);

impl Counts {
    fn create() -> (Self, File) {
        let file = memfd_executable(c"counts", 4096).unwrap();
        (Self(Shared::map(&file, 4096).unwrap()), file)
    }

    fn rounds(&self) -> &AtomicU32 {
        self.0.word32(0)
    }

    fn faults(&self) -> &AtomicU32 {
        self.0.word32(4)
    }
}

/// A program of its own, on the stack that the kernel gave it: this one again.
struct Target {
    process: std::process::Child,
    counts: Counts,
}

const WORK: &str = "SLIPSTREAM_TEST_WORK";
const COUNTS: &str = "SLIPSTREAM_TEST_COUNTS";

/// Becomes the target when it is asked to. With one thread, tests run on the first.
#[test]
fn target() {
    let (Ok(work), Ok(counts)) = (std::env::var(WORK), std::env::var(COUNTS)) else { return };
    let file = File::options().read(true).write(true).open(counts).unwrap();
    let counts = Counts(Shared::map(&file, 4096).unwrap());
    let work = if work == "spin" { spin } else { sleep };
    let before = mask();
    loop {
        let fine = work() && mask() == before;
        counts.faults().fetch_add(u32::from(!fine), Ordering::SeqCst);
        counts.rounds().fetch_add(1, Ordering::SeqCst);
    }
}

impl Target {
    fn start(work: &str) -> Self {
        let (counts, file) = Counts::create();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "one_stopped::tests::target", "--test-threads=1", "--nocapture"])
            .env(WORK, work)
            .env(COUNTS, format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let target = Self { process, counts };
        target.assert_works("at first");
        target
    }

    fn assert_works(&self, when: &str) {
        let seen = self.counts.rounds().load(Ordering::SeqCst);
        let deadline = Instant::now() + TIMEOUT;
        while self.counts.rounds().load(Ordering::SeqCst) < seen + 2 {
            assert!(Instant::now() < deadline, "it stands still {when}");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.counts.faults().load(Ordering::SeqCst), 0, "{when}");
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Kills tracers of one program, each a call later than the one before; returns how many.
fn kill_all(work: &str) -> u32 {
    let target = Target::start(work);
    let pid = target.process.id() as pid_t;
    for calls in 1.. {
        let (go, _) = Counts::create();
        let tracer = Child::start(|| {
            while go.rounds().load(Ordering::SeqCst) == 0 {
                std::hint::spin_loop();
            }
            trace(pid);
        });
        let killed = kill_after(&tracer, go.rounds(), calls);
        drop(tracer);
        target.assert_works(&format!("killed after {calls} calls"));
        if !killed {
            return calls;
        }
    }
    unreachable!("some call is the last");
}

#[test]
fn a_tracer_killed_at_any_call_leaves_a_program_in_user_mode_as_it_was() {
    assert!(kill_all("spin") > 20);
}

#[test]
fn a_tracer_killed_at_any_call_leaves_a_program_in_a_call_as_it_was() {
    assert!(kill_all("sleep") > 20);
}
