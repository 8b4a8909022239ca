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

/// Fails if the environment asks for it.
pub fn pass(point: &'static str) -> Result<()> {
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
