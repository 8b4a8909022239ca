//! What userfaultfd events leave open about anonymous shared memory, found out in `/proc`.
//!
//! `MADV_DONTNEED` keeps the pages of the object and `MADV_REMOVE` discards them, but the event is the
//! same. Before an event is read, the thread that raised it still waits in its system call, which
//! tells. It is asleep there from the moment the event can be read, with one exception: reading
//! *another* event wakes all who wait (`userfaultfd_event_complete` in `fs/userfaultfd.c`), and until
//! each has looked and gone back to sleep, `/proc` calls it running. And an `mremap` may have left the old mapping where it was (`MREMAP_DONTUNMAP`, or an old
//! length of zero, which makes a second mapping): the maps tell.

use slipstream_core::proc::maps;
use slipstream_core::sys::task;
use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What `/proc/PID/task/TID/syscall` says of a thread that doesn't sleep.
const RUNNING: &str = "running";
const MADV_REMOVE: u64 = 9;
/// Part of the name of what a thread is in, in the kernel, while it waits for an event to be read.
const WAITING_FOR_READER: &str = "userfaultfd";
/// For all threads that were woken to look and go back to sleep; they may have to wait for a processor. Nobody is served meanwhile.
const SETTLE_MAX: Duration = Duration::from_secs(10);
/// Times that a thread must be seen on a processor to be taken for one that computes, before and again after every
/// processor has got ahead ([`task::every_processor_got_ahead`]). Each look takes several microseconds; going back to sleep
/// takes one, but a virtual processor may be off its own meanwhile.
const ON_PROCESSOR_SEEN: u32 = 8;
/// For a thread that waits for a processor.
const SETTLE_PAUSE: Duration = Duration::from_micros(20);
/// Processes looked at: the process and what it has forked since.
const PROCESSES_MAX: usize = 4096;

/// The threads of a process and its descendants, each with the system call it was last seen asleep in.
#[derive(Debug, Default)]
pub struct Sleepers {
    seen: HashMap<PathBuf, Sleeper>,
}

#[derive(Debug)]
struct Sleeper {
    /// How often it had got a processor by then: while that stays, it has done nothing since.
    runs: u64,
    removing: Option<Range<u64>>,
}

impl Sleepers {
    /// Ranges that threads of the process or of its descendants are removing right now. `settle` when
    /// an event was read since the descriptor last had nothing to read: threads that wait may just be
    /// awake.
    pub fn being_removed(&mut self, pid: i32, settle: bool) -> Vec<Range<u64>> {
        let settled_by = settle.then(|| Instant::now() + SETTLE_MAX);
        let mut pids = vec![pid];
        let mut now = HashMap::new();
        let mut next = 0;
        while let Some(&pid) = pids.get(next) {
            next += 1;
            let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
            for task in tasks.flatten().map(|t| t.path()) {
                let children = fs::read_to_string(task.join("children")).unwrap_or_default();
                let room = PROCESSES_MAX.saturating_sub(pids.len());
                pids.extend(
                    children.split_whitespace().filter_map(|c| c.parse::<i32>().ok()).take(room),
                );
                if let Some(sleeper) = look(&task, self.seen.get(&task), settled_by) {
                    now.insert(task, sleeper);
                }
            }
        }
        self.seen = now;
        self.seen.values().filter_map(|s| s.removing.clone()).collect()
    }
}

/// What a thread sleeps in; `None` for one that is gone or runs.
fn look(task: &Path, before: Option<&Sleeper>, settled_by: Option<Instant>) -> Option<Sleeper> {
    let mut on_processor_seen = 0;
    let mut got_ahead = false;
    loop {
        // Read first: if it runs in between, the next look sees that it did.
        let runs = runs(task);
        if runs > 0
            && let Some(before) = before
            && before.runs == runs
        {
            return Some(Sleeper { runs, removing: before.removing.clone() });
        }
        let line = fs::read_to_string(task.join("syscall")).ok()?;
        if line.trim_end() != RUNNING {
            return Some(Sleeper { runs, removing: removed_by(&line) });
        }
        if settled_by.is_none_or(|deadline| Instant::now() > deadline) {
            return None;
        }
        // The kernel walks the stack of a thread that waits for a processor, not of one that has it.
        match fs::read_to_string(task.join("stack")).ok()? {
            stack if stack.contains(WAITING_FOR_READER) => std::thread::sleep(SETTLE_PAUSE),
            stack if stack.is_empty() && on_processor_seen < ON_PROCESSOR_SEEN => {
                on_processor_seen += 1;
            }
            stack if stack.is_empty() && !got_ahead => {
                task::every_processor_got_ahead();
                (got_ahead, on_processor_seen) = (true, 0);
            }
            _ => return None,
        }
    }
}

/// How often a thread has got a processor; zero where the kernel doesn't count.
fn runs(task: &Path) -> u64 {
    let text = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
    text.split_whitespace().nth(2).and_then(|w| w.parse().ok()).unwrap_or(0)
}

/// The range of `madvise(start, len, MADV_REMOVE)` in a line of `/proc/PID/syscall`.
fn removed_by(text: &str) -> Option<Range<u64>> {
    let mut words = text.split_whitespace();
    if words.next()?.parse() != Ok(libc::SYS_madvise) {
        return None;
    }
    let mut hex = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let (start, len, advice) = (hex()?, hex()?, hex()?);
    (advice == MADV_REMOVE).then(|| start..start.saturating_add(len))
}

/// Of the mappings of a process: whether `address` is mapped, and how far from there.
pub fn mapped_until(pid: i32, address: u64) -> Option<u64> {
    let lines = maps::read(pid).ok()?;
    lines.iter().find(|l| (l.start..l.end).contains(&address)).map(|l| l.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_remove_counts() {
        let remove = "28 0x7f0000001000 0x2000 0x9 0x0 0x0 0x0 0x7ffc 0x7f12\n";
        assert_eq!(removed_by(remove), Some(0x7f00_0000_1000..0x7f00_0000_3000));
        assert_eq!(removed_by("28 0x1000 0x2000 0x4 0x0 0x0 0x0 0x1 0x2\n"), None);
        assert_eq!(removed_by("running\n"), None);
    }
}
