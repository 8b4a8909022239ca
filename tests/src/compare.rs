//! That a process was left alone.

use crate::process::{Inventory, Pidfd, proc_file, status_field};
use crate::wait;
use std::time::Duration;

/// What must not change about a process that stays where it is.
pub struct Untouched {
    pid: i32,
    process: Pidfd,
    inventory: Inventory,
    mask: Option<String>,
    start_time: String,
}

fn start_time(pid: i32) -> String {
    let stat = proc_file(pid, "stat");
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_whitespace().nth(19).unwrap_or_default().to_owned()
}

impl Untouched {
    /// Remembers a running process.
    pub fn remember(pid: i32) -> Self {
        let process = Pidfd::open(pid).expect("a process to remember");
        Self {
            pid,
            process,
            inventory: Inventory::of(pid),
            mask: status_field(pid, "SigBlk"),
            start_time: start_time(pid),
        }
    }

    /// Panics unless it runs (or sleeps) as before: not stopped, not traced, with the same threads, descriptors and mappings.
    pub fn assert_untouched(&self) {
        assert!(!self.process.ended(), "the process ended");
        // A tracer that was just let go may need a moment to be gone.
        wait::until("the process to be neither stopped nor traced", Duration::from_secs(5), || {
            let state = status_field(self.pid, "State")?;
            let running =
                state.starts_with('R') || state.starts_with('S') || state.starts_with('D');
            (running && status_field(self.pid, "TracerPid")? == "0").then_some(())
        });
        assert_eq!(start_time(self.pid), self.start_time, "another process has its PID");
        assert_eq!(status_field(self.pid, "SigBlk"), self.mask, "its signal mask changed");
        let now = Inventory::of(self.pid);
        assert_eq!(now, self.inventory, "its threads, descriptors or mappings changed");
    }
}
