//! The memory a restore works with inside the new process, and its layout.
//!
//! ```text
//! base        gate page       a file of the run directory: the word that decides RUN or NEVER
//! +64 KiB     vdso parking    the new process's own vdso, until it is moved to its final place
//! +128 KiB    scratch memfd:  header page, code page, tables and data
//! ```
//! All of it is one range, placed in a hole of the program's address space, and goes at completion.

use crate::arch;
use crate::error::{Error, Result};
use crate::program::Program;
use crate::sys::mapped::{Shared, futex_wait, futex_wake_all, memfd_executable};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// Offset of the place where the vdso waits.
pub const VDSO_OFFSET: u64 = 64 * 1024;
/// Room for the vdso and its data pages.
pub const VDSO_LEN: u64 = 64 * 1024;
/// Offset of the scratch memfd.
pub const MEMFD_OFFSET: u64 = 128 * 1024;
const CODE: u64 = PAGE;
const TABLES: u64 = 2 * PAGE;

const HEADER_FAILED: usize = 0;
const HEADER_EVENTS: usize = 8;
const HEADER_GO: usize = 12;
const HEADER_ARRIVED: usize = 16;
const HEADER_NEXT: usize = 24;

/// Values of the gate word. The first decision wins and is never changed.
pub mod gate {
    /// Not decided.
    pub const PENDING: u32 = 0;
    /// The copy on this host runs.
    pub const RUN: u32 = 1;
    /// The copy on this host never runs.
    pub const NEVER: u32 = 2;
}

/// The file whose first word is the gate.
#[derive(Debug)]
pub struct Gate {
    file: File,
    shared: Shared,
}

impl Gate {
    /// Creates the gate of a migration, undecided.
    pub fn create(path: &Path) -> Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|e| Error::io(format!("create {}", path.display()), e))?;
        // Its block is there from now on: a store into a hole of a full disk is SIGBUS.
        nix::fcntl::posix_fallocate(&file, 0, PAGE as libc::off_t)
            .map_err(|e| Error::io(format!("size {}", path.display()), e.into()))?;
        let shared = Shared::map(&file, PAGE as usize).map_err(|_| {
            let folder = path.parent().unwrap_or(path).display();
            Error::Refused(format!("{folder} is on a file system without shared memory: set --run-dir to a local one, as /run is"))
        })?;
        Ok(Self { file, shared })
    }

    /// Opens the gate of a migration that exists.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|e| Error::io(format!("open {}", path.display()), e))?;
        let len = file.metadata().map_err(|e| Error::io("stat the gate", e))?.len();
        if len < PAGE {
            return Err(Error::Refused(format!("{} is not a gate", path.display())));
        }
        Ok(Self { shared: Shared::map(&file, PAGE as usize)?, file })
    }

    /// Decides, unless it is decided already; returns what holds.
    pub fn decide(&self, value: u32) -> u32 {
        let word = self.word();
        let holds = word
            .compare_exchange(gate::PENDING, value, Ordering::SeqCst, Ordering::SeqCst)
            .map_or_else(|earlier| earlier, |_| value);
        futex_wake_all(word);
        holds
    }

    /// Has what holds outlive a failure of the power.
    pub fn flush(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io("flush the gate", e))
    }

    /// What holds now.
    pub fn value(&self) -> u32 {
        self.word().load(Ordering::SeqCst)
    }

    fn word(&self) -> &AtomicU32 {
        self.shared.word32(0)
    }

    /// The file, to be mapped into the new process.
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// The scratch memfd, seen from outside and at its address inside the new process.
#[derive(Debug)]
pub struct Scratch {
    base: u64,
    memfd_len: u64,
    file: File,
    shared: Shared,
    tables_end: u64,
}

impl Scratch {
    /// Makes scratch memory of `memfd_len` bytes for a process in which the whole range will start at
    /// `base`. The code of the runner is in place afterwards.
    pub fn create(base: u64, memfd_len: u64) -> Result<Self> {
        let memfd_len = memfd_len.next_multiple_of(PAGE);
        let file = memfd_executable(c"slipstream-scratch", memfd_len)?;
        let shared = Shared::map(&file, memfd_len as usize)?;
        shared.write(CODE as usize, arch::runner().code);
        Ok(Self { base, memfd_len, file, shared, tables_end: TABLES })
    }

    /// Length of the whole range for a memfd of `memfd_len` bytes.
    pub fn range_len(memfd_len: u64) -> u64 {
        MEMFD_OFFSET + memfd_len.next_multiple_of(PAGE)
    }

    /// The whole range inside the new process.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.base..self.base + Self::range_len(self.memfd_len)
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Address of the gate word inside the process.
    pub fn gate(&self) -> u64 {
        self.base
    }

    /// Where the vdso waits inside the process.
    pub fn vdso_parking(&self) -> u64 {
        self.base + VDSO_OFFSET
    }

    fn memfd(&self) -> u64 {
        self.base + MEMFD_OFFSET
    }

    /// Address of the header inside the process.
    pub fn header(&self) -> u64 {
        self.memfd()
    }

    /// Address of the code inside the process.
    pub fn code(&self) -> u64 {
        self.memfd() + CODE
    }

    /// Address of the event counter: one more for every stage done, thread arrived, or failure.
    pub fn events(&self) -> u64 {
        self.header() + HEADER_EVENTS as u64
    }

    /// Address of the word the process waits on between stages.
    pub fn go(&self) -> u64 {
        self.header() + HEADER_GO as u64
    }

    /// Address of the count of threads that are at the gate.
    pub fn arrived(&self) -> u64 {
        self.header() + HEADER_ARRIVED as u64
    }

    /// A new program behind those already placed, with room for `entries_max` entries.
    pub fn program(&self, entries_max: usize) -> Program {
        let entries = self.memfd() + self.tables_end;
        let data = entries + entries_max as u64 * crate::program::ENTRY_LEN;
        Program::new(entries, data.next_multiple_of(64))
    }

    /// Puts a finished program in place.
    pub fn place(&mut self, program: &Program) -> Result<()> {
        let end = program.data_end();
        if program.next_address() > program.data_base() || end > self.memfd() + self.memfd_len {
            return Err(Error::Refused(format!(
                "the restore needs more scratch memory than the {} KiB set aside; try again",
                self.memfd_len / 1024
            )));
        }
        let offset = |address: u64| (address - self.memfd()) as usize;
        self.shared.write(offset(program.entries_base()), program.entries());
        self.shared.write(offset(program.data_base()), program.data_bytes());
        self.tables_end = (end - self.memfd()).next_multiple_of(64);
        Ok(())
    }

    /// The entries of a program with their results so far.
    pub fn ran(&self, program: &Program) -> Vec<u8> {
        let mut out = vec![0u8; program.entries().len()];
        self.shared.read((program.entries_base() - self.memfd()) as usize, &mut out);
        out
    }

    /// Address of the word that holds where the next stage begins.
    pub fn next(&self) -> u64 {
        self.header() + HEADER_NEXT as u64
    }

    /// Lets the process go on to `stage`, which begins at the entry at `start`.
    pub fn go_on(&self, stage: u32, start: u64) {
        self.shared.word64(HEADER_NEXT).store(start, Ordering::SeqCst);
        let word = self.shared.word32(HEADER_GO);
        word.store(stage, Ordering::SeqCst);
        futex_wake_all(word);
    }

    /// Number of threads at the gate.
    pub fn threads_arrived(&self) -> u32 {
        self.shared.word32(HEADER_ARRIVED).load(Ordering::SeqCst)
    }

    /// Waits until the event counter has reached `events` and no entry has failed. `alive` is asked now
    /// and then whether the process still exists.
    pub fn wait_events(
        &self,
        events: u32,
        deadline: Instant,
        programs: &[&Program],
        alive: &dyn Fn() -> bool,
    ) -> Result<()> {
        let word = self.shared.word32(HEADER_EVENTS);
        loop {
            let now = word.load(Ordering::SeqCst);
            let failed = self.shared.word64(HEADER_FAILED).load(Ordering::SeqCst);
            if failed != 0 {
                return Err(self.failure(failed, programs));
            }
            if now >= events {
                return Ok(());
            }
            if !alive() {
                return Err(Error::Refused(
                    "the new process died while it was being restored".into(),
                ));
            }
            if Instant::now() >= deadline {
                return Err(Error::Refused(format!(
                    "the restore did not end in time ({now} of {events} steps done)"
                )));
            }
            futex_wait(word, now, Duration::from_millis(20));
        }
    }

    fn failure(&self, entry: u64, programs: &[&Program]) -> Error {
        for program in programs {
            let Some(offset) = entry.checked_sub(program.entries_base()) else { continue };
            if offset < program.entries().len() as u64 {
                let at = (entry + crate::program::RESULT_OFFSET - self.memfd()) as usize;
                let raw = self.shared.word64(at).load(Ordering::SeqCst);
                let what = program.name_at(entry).unwrap_or("unnamed step").to_owned();
                let errno = arch::syscall_result(raw).err();
                return Error::sys(what, errno.unwrap_or(nix::errno::Errno::UnknownErrno));
            }
        }
        Error::Refused(format!("a step at {entry:#x} that is not in the restore's tables failed"))
    }
}

/// A place for a range of `len` bytes in an address space: the middle of the widest hole below the
/// stack, so that neither the heap nor mmap's top-down growth comes near it soon.
pub fn find_hole(mappings: &[(u64, u64)], len: u64) -> Option<u64> {
    const LOWEST: u64 = 0x1_0000_0000;
    const HIGHEST: u64 = 0x7fff_0000_0000;
    let mut at = LOWEST;
    let mut best: Option<(u64, u64)> = None;
    let end = std::iter::once((HIGHEST, HIGHEST));
    for (start, end) in mappings.iter().copied().chain(end) {
        let hole = start.min(HIGHEST).saturating_sub(at);
        if hole > best.map_or(0, |(_, l)| l) {
            best = Some((at, hole));
        }
        at = at.max(end);
    }
    let (start, hole) = best?;
    (hole >= len.saturating_mul(4))
        .then(|| (start + (hole - len) / 2).next_multiple_of(2 * 1024 * 1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hole_is_free_and_far_from_others() {
        let maps = [(0x40_0000, 0x50_0000), (0x7f00_0000_0000, 0x7f00_1000_0000)];
        let at = find_hole(&maps, 0x10_0000).unwrap();
        assert!(at > 0x1_0000_0000 && at + 0x10_0000 < 0x7f00_0000_0000);
        assert_eq!(find_hole(&[(0, u64::MAX / 2)], 4096), None);
    }

    #[test]
    fn the_first_decision_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gate");
        let gate = Gate::create(&path).unwrap();
        assert_eq!(gate.decide(gate::NEVER), gate::NEVER);
        assert_eq!(Gate::open(&path).unwrap().decide(gate::RUN), gate::NEVER);
    }
}
