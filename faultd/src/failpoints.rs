//! Points at which a test can make a migration fail, by `SLIPSTREAM_FAIL_AT=NAME` in the environment of
//! the side meant: the agent's for names that begin with `destination`, else `slipstream migrate`'s.

use crate::error::{Error, Result};

/// Every point, in the order they are passed. All are before commit: failing there must leave the
/// process running at the source as if nothing had happened.
pub const ALL: [&str; 16] = [
    "source-connected",
    "source-lanes",
    "source-staged",
    "source-scratch",
    "source-frozen",
    "source-captured",
    "source-sent",
    "source-ready",
    "source-parked",
    "destination-hello",
    "destination-lanes",
    "destination-prepared",
    "destination-staged",
    "destination-mapped",
    "destination-pages",
    "destination-restored",
];

/// Further points, past the destination's "ready", where a test can kill the session by
/// `SLIPSTREAM_KILL_AT=NAME` (as it can at those above). Nothing may be lost there, and no second copy run.
pub const KILL: [&str; 15] = [
    "destination-ready",
    "destination-kept",
    "source-journalled",
    "source-stopped",
    "source-commit-sent",
    "destination-commit",
    "destination-run",
    "destination-fork-read",
    "source-resumed",
    "source-map-sent",
    "destination-drained",
    "destination-finished",
    "destination-noted",
    "source-completed",
    "source-dropped",
];

/// Kills this process if the environment asks for it, as SIGKILL from outside would. With
/// `SLIPSTREAM_STOP_AT=NAME` it stops at that point, as by SIGSTOP from outside, until a test has done something
/// there and sends SIGCONT.
pub fn reached(point: &'static str) {
    debug_assert!(ALL.contains(&point) || KILL.contains(&point), "{point} is not in a list");
    if std::env::var_os("SLIPSTREAM_STOP_AT").is_some_and(|asked| asked == point) {
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGSTOP);
    }
    if std::env::var_os("SLIPSTREAM_KILL_AT").is_some_and(|asked| asked == point) {
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    }
}

/// Fails if the environment asks for it.
pub fn pass(point: &'static str) -> Result<()> {
    reached(point);
    debug_assert!(ALL.contains(&point), "{point} is not in the list");
    match std::env::var_os("SLIPSTREAM_FAIL_AT") {
        Some(asked) if asked == point => Err(Error::FailPoint(point)),
        _ => Ok(()),
    }
}

/// For tests on one machine: the destination takes the source's vdso for that of another kernel when
/// `SLIPSTREAM_FOREIGN_VDSO` is set in the agent's environment.
pub fn pretends_foreign_vdso() -> bool {
    std::env::var_os("SLIPSTREAM_FOREIGN_VDSO").is_some()
}

/// For tests on one machine: the source takes the destination for another host when
/// `SLIPSTREAM_FOREIGN_BOOT` is set in the agent's environment.
pub fn told_boot_id(own: String) -> String {
    if std::env::var_os("SLIPSTREAM_FOREIGN_BOOT").is_some() { String::new() } else { own }
}
