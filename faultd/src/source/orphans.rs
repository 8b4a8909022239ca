//! Migrations from this host whose source session was killed: the host's agent starts another session for
//! each, as `slipstream recover` does, so that nobody has to notice.

use crate::events::Role;
use crate::failpoints;
use crate::rundir::{self, MigrationDir};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Between two looks at the run directory.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Before a session that ended without success is replaced again: the first time, and at most.
const PAUSE_MIN: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// Attempts to replace the session of one migration.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    last: Instant,
    pause: Duration,
}

/// Watches the run directory for as long as this process lives. `exe` is this program.
pub fn start_watch(run_dir: PathBuf, exe: PathBuf) {
    std::thread::spawn(move || {
        let mut attempts = HashMap::<String, Attempt>::new();
        loop {
            let ids = rundir::sources(&run_dir);
            attempts.retain(|id, _| ids.contains(id));
            for id in ids {
                let now = Instant::now();
                let due = attempts.get(&id).is_none_or(|a| now.duration_since(a.last) >= a.pause);
                if due && is_orphan(&run_dir, &id) {
                    replace(&run_dir, &exe, &id);
                    attempts.insert(id.clone(), next_attempt(attempts.get(&id), now));
                }
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    });
}

fn next_attempt(before: Option<&Attempt>, now: Instant) -> Attempt {
    let pause = before.map_or(PAUSE_MIN, |a| (a.pause * 2).min(PAUSE_MAX));
    Attempt { last: now, pause }
}

/// No session is at work, and there is something left to do.
fn is_orphan(run_dir: &Path, id: &str) -> bool {
    let lost = || {
        let all = rundir::list(run_dir).unwrap_or_default();
        all.iter().any(|s| s.id == id && s.role == Role::Source && s.phase == "lost")
    };
    // The lock is let go at once: the new session takes it.
    MigrationDir::open(run_dir, Role::Source, id, Duration::ZERO).is_ok() && !lost()
}

fn replace(run_dir: &Path, exe: &Path, id: &str) {
    tracing::info!("the source session of migration {id} was killed: another takes its place");
    let mut command = Command::new(exe);
    command.args(["__source-session", "recover"]).arg(run_dir).arg(id);
    for variable in failpoints::ASKED_AT {
        command.env_remove(variable);
    }
    // The agent reaps it.
    match command.stdin(Stdio::null()).stdout(Stdio::null()).spawn() {
        Ok(session) => drop(session),
        Err(e) => tracing::warn!("cannot start a source session for migration {id}: {e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_at_work_is_no_orphan() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let id = "aaaaaaaaaaaa";
        let made = MigrationDir::create(&run_dir, Role::Source, id).unwrap();
        assert!(!is_orphan(&run_dir, id));
        drop(made);
        assert_eq!(rundir::sources(&run_dir), [id]);
        assert!(is_orphan(&run_dir, id));
    }

    #[test]
    fn pauses_grow_up_to_a_limit() {
        let now = Instant::now();
        let mut attempt = next_attempt(None, now);
        assert_eq!(attempt.pause, PAUSE_MIN);
        for _ in 0..20 {
            attempt = next_attempt(Some(&attempt), now);
        }
        assert_eq!(attempt.pause, PAUSE_MAX);
    }
}
