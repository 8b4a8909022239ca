//! Clocks that go on across the move: the offset the process's time namespace needs.

use crate::error::{Error, Result};
use crate::protocol::ClockReading;
use nix::time::{ClockId, clock_gettime};

/// Offsets of a time namespace against its host, nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    /// Added to `CLOCK_MONOTONIC`.
    pub monotonic_ns: i64,
    /// Added to `CLOCK_BOOTTIME`.
    pub boottime_ns: i64,
}

/// Offsets of the time namespace of a process (`self` for our own).
pub fn namespace_offsets(pid: &str) -> Result<Offsets> {
    let path = format!("/proc/{pid}/timens_offsets");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        // A kernel without time namespaces.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Offsets::default()),
        Err(e) => return Err(Error::io(format!("read {path}"), e)),
    };
    let mut offsets = Offsets::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let name = words.next();
        let mut number = || words.next().and_then(|w| w.parse::<i64>().ok()).unwrap_or(0);
        let ns = number().saturating_mul(1_000_000_000).saturating_add(number());
        match name {
            Some("monotonic") => offsets.monotonic_ns = ns,
            Some("boottime") => offsets.boottime_ns = ns,
            _ => {}
        }
    }
    Ok(offsets)
}

/// The host's clocks now (those of our own namespace, less its offsets).
pub fn host_clocks() -> Result<ClockReading> {
    let own = namespace_offsets("self")?;
    let read = |clock| {
        clock_gettime(clock)
            .map(|t| t.tv_sec() * 1_000_000_000 + t.tv_nsec())
            .map_err(|e| Error::io("read a clock", e.into()))
    };
    Ok(ClockReading {
        monotonic_ns: read(ClockId::CLOCK_MONOTONIC)? - own.monotonic_ns,
        boottime_ns: read(ClockId::CLOCK_BOOTTIME)? - own.boottime_ns,
    })
}

/// One exchange: our clock before and after, the peer's in between.
#[derive(Clone, Copy, Debug)]
pub struct Exchange {
    /// Our host's clocks when the probe left.
    pub sent: ClockReading,
    /// The peer process's clocks.
    pub theirs: ClockReading,
    /// Our host's clocks when the answer came.
    pub received: ClockReading,
}

/// The offsets that make a clock here continue the peer's, from the exchange with the shortest round
/// trip (the smallest error: half of it).
pub fn best_offsets(exchanges: &[Exchange]) -> Option<Offsets> {
    let round_trip = |e: &Exchange| e.received.monotonic_ns - e.sent.monotonic_ns;
    let best = exchanges.iter().min_by_key(|e| round_trip(e))?;
    let middle = |a: i64, b: i64| a + (b - a) / 2;
    Some(Offsets {
        monotonic_ns: best.theirs.monotonic_ns
            - middle(best.sent.monotonic_ns, best.received.monotonic_ns),
        boottime_ns: best.theirs.boottime_ns
            - middle(best.sent.boottime_ns, best.received.boottime_ns),
    })
}

/// Boot id of this host: clocks, device and inode numbers are comparable within one boot.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    std::fs::read_to_string(path)
        .map(|s| s.trim().to_owned())
        .map_err(|e| Error::io(format!("read {path}"), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ns: i64) -> ClockReading {
        ClockReading { monotonic_ns: ns, boottime_ns: ns + 5 }
    }

    /// The time of day may jump: it goes into what people read, and into nothing that is waited for.
    #[test]
    fn nothing_is_timed_by_the_time_of_day() {
        let shown_only = ["faultd/src/source/afterwards.rs", "faultd/src/dest/course.rs"];
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let mut folders: Vec<_> =
            ["cli/src", "faultd/src", "transport/src", "core/src"].map(|f| root.join(f)).into();
        let mut found = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap().map(std::result::Result::unwrap) {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "rs") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    // What is tested may set clocks.
                    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
                    if code.contains("SystemTime::now") || code.contains("CLOCK_REALTIME)") {
                        found.push(path.strip_prefix(root).unwrap().display().to_string());
                    }
                }
            }
        }
        found.sort();
        assert!(found.iter().all(|f| shown_only.contains(&f.as_str())), "{found:?}");
    }

    #[test]
    fn the_shortest_exchange_counts() {
        let exchanges = [
            Exchange { sent: at(0), theirs: at(5_000), received: at(1_000) },
            Exchange { sent: at(2_000), theirs: at(5_550), received: at(2_100) },
        ];
        assert_eq!(best_offsets(&exchanges).unwrap().monotonic_ns, 5_550 - 2_050);
        assert_eq!(best_offsets(&[]), None);
    }
}
