//! A forked child that works through programs in the real loop, in stages, for tests.

use crate::arch::runner;
use crate::program::{Op, Program};
use crate::sys::ptrace;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const LEN: usize = 0x20_0000;
/// Words that a stage waits for (`GO`) and sets when it is done (`DONE`).
const GO: u64 = 0x100;
const DONE: u64 = 0x200;
const STAGES: u64 = 0x1_0000;
const STAGE_LEN: u64 = 0x8_0000;
const STAGE_DATA: u64 = 0x5_0000;

/// Memory shared with the child at one address.
#[derive(Debug)]
pub struct Child {
    base: u64,
    pub pid: i32,
    stage: u64,
}

impl Child {
    /// Forks; the child waits for stage 1 with all signals blocked.
    pub fn start() -> Self {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), LEN, prot, flags, -1, 0)
        } as u64;
        assert_ne!(base, u64::MAX);
        let mut child = Self { base, pid: 0, stage: 0 };
        let p = child.program();
        child.finish_and_write(p);
        let (entry, code) = (base + STAGES, runner().code.as_ptr());
        // SAFETY: the child makes one syscall and jumps into the loop, whose table is complete.
        child.pid = unsafe { libc::fork() };
        assert!(child.pid >= 0);
        if child.pid == 0 {
            let all = u64::MAX;
            // SAFETY: the mask outlives the call; the loop never returns.
            unsafe {
                libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const all, 0, 8);
                std::arch::asm!("mov rbx, {entry}", "mov r15, {header}", "jmp {code}",
                    entry = in(reg) entry, header = in(reg) base, code = in(reg) code,
                    options(noreturn));
            }
        }
        child.wait_done(0);
        child
    }

    /// Free memory for the child's own use: one page.
    pub fn scratch(&self) -> u64 {
        self.base + 0x2000
    }

    /// The program of the next stage, empty.
    pub fn program(&self) -> Program {
        let at = self.base + STAGES + self.stage * STAGE_LEN;
        Program::new(at, at + STAGE_DATA)
    }

    fn word(&self, at: u64) -> &AtomicU32 {
        assert!(at < STAGES);
        // SAFETY: inside the mapping, which lives as long as `self`; only ever used atomically.
        unsafe { AtomicU32::from_ptr((self.base + at) as *mut u32) }
    }

    fn finish_and_write(&mut self, mut p: Program) -> Program {
        let next = self.stage + 1;
        let go = self.base + GO + next * 8;
        p.op(Op::Store, [(self.base + DONE + self.stage * 8).into(), 1.into()]);
        p.op(Op::Wait, [go.into(), 0.into()]);
        let entry = self.base + STAGES + next * STAGE_LEN;
        p.op(Op::JumpIf, [go.into(), 1.into(), entry.into()]);
        assert!(p.entries().len() as u64 <= STAGE_DATA);
        assert!(p.data_bytes().len() as u64 <= STAGE_LEN - STAGE_DATA);
        for (at, bytes) in [(p.entries_base(), p.entries()), (p.data_base(), p.data_bytes())] {
            // SAFETY: the lengths were checked against the room inside the mapping.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
        }
        self.stage = next;
        p
    }

    /// Lets the child run a program; returns it with its table and data as they are afterwards.
    pub fn run(&mut self, p: Program) -> (Program, Vec<u8>, Vec<u8>) {
        let stage = self.stage;
        let p = self.finish_and_write(p);
        self.word(GO + stage * 8).store(1, Ordering::SeqCst);
        let address = self.base + GO + stage * 8;
        // SAFETY: wakes waiters on a word of the shared mapping.
        unsafe { libc::syscall(libc::SYS_futex, address, libc::FUTEX_WAKE, i32::MAX) };
        if let Some(failed) = self.wait_done(stage) {
            panic!("child failed to {}", p.name_at(failed).unwrap_or("run"));
        }
        let copy = |at: u64, len: usize| {
            // SAFETY: inside the mapping; the child is waiting and changes nothing.
            unsafe { std::slice::from_raw_parts(at as *const u8, len) }.to_vec()
        };
        let entries = copy(p.entries_base(), p.entries().len());
        let data = copy(p.data_base(), p.data_bytes().len());
        (p, entries, data)
    }

    /// Waits for a stage to be done; the address of the entry that failed, if one did.
    fn wait_done(&self, stage: u64) -> Option<u64> {
        let started = Instant::now();
        while self.word(DONE + stage * 8).load(Ordering::SeqCst) == 0 {
            if self.word(8).load(Ordering::SeqCst) != 0 {
                // SAFETY: the header word is inside the mapping.
                return Some(unsafe { (self.base as *const u64).read_volatile() });
            }
            assert!(
                started.elapsed() < Duration::from_secs(20),
                "child does not finish stage {stage}"
            );
            std::thread::sleep(Duration::from_micros(200));
        }
        None
    }

    /// Stops the child by ptrace; must be let go by [`Child::release`] before it can run a stage.
    pub fn freeze(&self) {
        ptrace::seize(self.pid).expect("seize");
        ptrace::interrupt(self.pid).expect("interrupt");
        assert_eq!(ptrace::stopped(self.pid), ptrace::Stop::Event);
    }

    /// Undoes [`Child::freeze`].
    pub fn release(&self) {
        ptrace::detach(self.pid, 0).expect("detach");
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: the child is ours and not yet waited for; the mapping is not used any more.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL);
            libc::munmap(self.base as *mut libc::c_void, LEN);
        }
    }
}
