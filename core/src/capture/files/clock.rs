//! The clocks of a process, which may be in a time namespace of its own.

use crate::error::{Error, Result};
use nix::time::{ClockId, clock_gettime};

/// Nanoseconds that the clock `clock` shows process `pid` now.
pub(super) fn now_ns(pid: i32, clock: i32) -> Result<i64> {
    let ours = clock_gettime(ClockId::from_raw(clock))
        .map_err(|e| Error::sys(format!("read clock {clock}"), e))?;
    let ours = nanoseconds(ours.tv_sec(), ours.tv_nsec());
    let name = match clock {
        libc::CLOCK_MONOTONIC => "monotonic",
        libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => "boottime",
        _ => return Ok(ours),
    };
    let own = std::process::id() as i32;
    Ok(ours.saturating_sub(offset(own, name)?).saturating_add(offset(pid, name)?))
}

fn nanoseconds(seconds: i64, nanoseconds: i64) -> i64 {
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

/// Offset of a clock of `pid` against the host's: 0 on a kernel without time namespaces.
fn offset(pid: i32, clock: &str) -> Result<i64> {
    match crate::proc::read(pid, "timens_offsets") {
        Ok(text) => parse_offset(&String::from_utf8_lossy(&text), clock).ok_or_else(|| {
            Error::parse("/proc/PID/timens_offsets", &String::from_utf8_lossy(&text))
        }),
        // The process itself was there a moment ago; if it has ended, the next look at it says so.
        Err(Error::Gone { .. }) => Ok(0),
        Err(e) => Err(e),
    }
}

fn parse_offset(text: &str, clock: &str) -> Option<i64> {
    let line = text.lines().find(|l| l.starts_with(clock))?;
    let mut words = line.split_whitespace().skip(1);
    Some(nanoseconds(words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets() {
        let text = "monotonic       12         5\nboottime         -3         7\n";
        assert_eq!(parse_offset(text, "monotonic"), Some(12_000_000_005));
        assert_eq!(parse_offset(text, "boottime"), Some(-2_999_999_993));
        assert_eq!(parse_offset("x", "monotonic"), None);
    }

    #[test]
    fn own_clock() {
        let own = std::process::id() as i32;
        let before = now_ns(own, libc::CLOCK_MONOTONIC).unwrap();
        assert!(now_ns(own, libc::CLOCK_MONOTONIC).unwrap() >= before);
        assert!(now_ns(own, 77).is_err());
    }
}
