//! What userfaultfd events leave open about anonymous shared memory, found out in `/proc`.
//!
//! `MADV_DONTNEED` keeps the pages of the object and `MADV_REMOVE` discards them, but the event is the
//! same. Before an event is read, the thread that raised it still waits in its system call, which
//! tells. And an `mremap` may have left the old mapping where it was (`MREMAP_DONTUNMAP`, or an old
//! length of zero, which makes a second mapping): the maps tell.

use slipstream_core::proc::maps;
use std::ops::Range;

const MADV_REMOVE: u64 = 9;
/// Processes looked at: the process and what it has forked since.
const PROCESSES_MAX: usize = 4096;

/// Ranges that threads of the process or of its descendants are discarding right now.
pub fn being_removed(pid: i32) -> Vec<Range<u64>> {
    let mut pids = vec![pid];
    let mut ranges = Vec::new();
    let mut next = 0;
    while let Some(&pid) = pids.get(next) {
        next += 1;
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for task in tasks.flatten().map(|t| t.path()) {
            if let Ok(text) = std::fs::read_to_string(task.join("syscall")) {
                ranges.extend(removed_by(&text));
            }
            let children = std::fs::read_to_string(task.join("children")).unwrap_or_default();
            let room = PROCESSES_MAX.saturating_sub(pids.len());
            pids.extend(
                children.split_whitespace().filter_map(|c| c.parse::<i32>().ok()).take(room),
            );
        }
    }
    ranges
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
