//! A process whose pages will never come is ended, with a cause that can be read afterwards.
//!
//! Nobody can tell a source that is lost from one that is away, so the default is to wait. An
//! administrator says otherwise: for one process by `slipstream abort`, for all by `agent --source-lost`.
//! The source itself knows when its copy was destroyed, and says so.

use crate::events::Role;
use crate::rundir::{self, MigrationDir};
use slipstream_core::restore::keeper::Keeper;
use slipstream_core::restore::scratch::{Gate, gate};
use slipstream_core::sys::pidfd::PidFd;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Between two looks at what waits.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// For a process to end that was killed: threads that wait for pages can be killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The folder of a migration whose process runs here, lacks pages, and is served by nobody. The folder
/// is locked: no session takes it up meanwhile.
pub fn waiting(run_dir: &Path, id: &str) -> Option<MigrationDir> {
    let dir = MigrationDir::open(run_dir, Role::Destination, id, Duration::ZERO).ok()?;
    // A process that has exited may have left children that lack pages: init lives for as long.
    let over = [rundir::COMPLETED, rundir::LOST];
    let runs = Gate::open(&dir.file("gate")).is_ok_and(|gate| gate.value() == gate::RUN);
    (runs && init_of(&dir).is_some() && !over.iter().any(|f| dir.file(f).exists())).then_some(dir)
}

/// Whether something of the moved process is there: itself, or what it has forked.
pub fn has_init(run_dir: &Path, id: &str) -> bool {
    let name = std::fs::read_to_string(rundir::destination_file(run_dir, id, rundir::INIT));
    name.is_ok_and(|name| init_named(&name).is_some())
}

fn init_of(dir: &MigrationDir) -> Option<PidFd> {
    init_named(&String::from_utf8(dir.read(rundir::INIT).ok()??).ok()?)
}

fn init_named(name: &str) -> Option<PidFd> {
    let init = PidFd::open(rundir::named_process(name)?).ok()?;
    // The number may have passed to another process between the two.
    (rundir::full_name(init.pid()).ok()? == name).then_some(init)
}

/// Ends a process, and what it has forked, and notes why.
pub fn end(dir: &MigrationDir, why: &str) {
    // First, so that who sees it end can see why, and whoever comes next can finish it. A full disk must not keep it hanging.
    if let Err(e) = dir.write(rundir::LOST, why.as_bytes()) {
        tracing::warn!("{e}");
    }
    let Some(init) = init_of(dir) else { return };
    tracing::warn!("the process under init {} is ended: {why}", init.pid());
    let pid = init.pid();
    // The process itself first: then init notes how it ended. Its children end with init.
    let process = Keeper::find(init).and_then(|keeper| keeper.take(0));
    if let Ok(Some(process)) = process
        && let Ok(process) = PidFd::adopt(process)
        && process.kill(libc::SIGKILL).is_ok()
    {
        process.wait_exit(END_TIMEOUT);
        let noted = Instant::now();
        while !dir.file(rundir::EXIT).exists() && noted.elapsed() < END_TIMEOUT {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    if let Some(init) = init_of(dir) {
        debug_assert_eq!(init.pid(), pid);
        let _ = init.kill(libc::SIGKILL);
    }
}

/// Goes on where somebody was killed who had noted that the process is lost, but had not ended it yet.
pub fn finish_end(dir: &MigrationDir) {
    if let Ok(Some(why)) = dir.read(rundir::LOST)
        && init_of(dir).is_some()
    {
        end(dir, &String::from_utf8_lossy(&why));
    }
}

/// Ends processes whose source has not come back for `limit`. The time counts from when this agent first
/// sees one unserved, by the monotonic clock.
pub fn start_watch(run_dir: PathBuf, limit: Duration) {
    std::thread::spawn(move || {
        let mut since = HashMap::<String, Instant>::new();
        loop {
            let ids = rundir::destinations(&run_dir);
            since.retain(|id, _| ids.contains(id));
            for id in ids {
                let Some(dir) = waiting(&run_dir, &id) else {
                    since.remove(&id);
                    continue;
                };
                let began = *since.entry(id).or_insert_with(Instant::now);
                if began.elapsed() >= limit {
                    end(&dir, &format!("its source had been lost for {limit:?} (--source-lost)"));
                }
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    });
}
