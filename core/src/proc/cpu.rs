//! Which CPU a thread of another process runs on.

use crate::error::Result;
use crate::proc::{status, threads};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Index of `processor` (field 39 of `proc_pid_stat(5)`) behind the name in parentheses.
const PROCESSOR: usize = 36;
/// Between two readings of all threads because of one that isn't known.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The CPU that a thread runs on, or last ran on.
pub fn last_cpu(pid: i32, tid: i32) -> Result<Option<u32>> {
    Ok(parse(&super::read(pid, &format!("task/{tid}/stat"))?))
}

fn parse(stat: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(stat).ok()?;
    // The name may hold anything, parentheses too.
    let (_, fields) = text.rsplit_once(')')?;
    fields.split_whitespace().nth(PROCESSOR)?.parse().ok()
}

/// The numbers that this host has for the threads of a process in a PID namespace of its own.
#[derive(Debug)]
pub struct ThreadNumbers {
    pid: i32,
    known: HashMap<i32, i32>,
    looked: Option<Instant>,
}

impl ThreadNumbers {
    /// Of a process, as this host sees it.
    pub fn new(pid: i32) -> Self {
        Self { pid, known: HashMap::new(), looked: None }
    }

    /// This host's number of a thread that has `own_tid` in its own namespace.
    pub fn host_tid(&mut self, own_tid: i32) -> Option<i32> {
        if !self.known.contains_key(&own_tid)
            && self.looked.is_none_or(|t| t.elapsed() > LOOK_INTERVAL)
        {
            self.look();
        }
        self.known.get(&own_tid).copied()
    }

    fn look(&mut self) {
        self.looked = Some(Instant::now());
        self.known.clear();
        for tid in threads(self.pid).unwrap_or_default() {
            let own =
                status::read_thread(self.pid, tid).ok().and_then(|s| s.ns_pids.last().copied());
            if let Some(own) = own {
                self.known.insert(own, tid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses() {
        let stat = "7 (a) 1 2 (b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 \
                    32 33 34 35 1 0 0\n";
        assert_eq!(parse(stat.as_bytes()), Some(1));
        assert_eq!(parse(b"7 (a"), None);
    }

    #[test]
    fn own_thread() {
        let pid = std::process::id() as i32;
        let tid = nix::unistd::gettid().as_raw();
        assert!(last_cpu(pid, tid).expect("stat").is_some());
        assert_eq!(ThreadNumbers::new(pid).host_tid(tid), Some(tid));
    }
}
