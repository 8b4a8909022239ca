//! How much memory each Slipstream process had at its peak.

use crate::lab;
use std::collections::BTreeMap;

/// Role of a process to its peak resident memory, in bytes.
pub type Peaks = BTreeMap<&'static str, u64>;

const ROLES: [(&str, &str); 5] = [
    ("agent", "agent"),
    ("migrate", "display"),
    ("__source-session", "source session"),
    ("__destination-session", "destination session"),
    ("__init", "init"),
];

/// Looks at every Slipstream process there is now. The kernel keeps the peak, so rare looks are enough.
pub fn look(peaks: &mut Peaks) {
    for pid in lab::descendants() {
        let Some((role, peak)) = peak(pid) else { continue };
        let known = peaks.entry(role).or_default();
        *known = peak.max(*known);
    }
}

fn peak(pid: i32) -> Option<(&'static str, u64)> {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let word = String::from_utf8_lossy(command.split(|b| *b == 0).nth(1)?).into_owned();
    let role = ROLES.iter().find(|(argument, _)| *argument == word)?.1;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    // Until it is somebody, the new process looks like its init, whose child it is.
    let numbers: Vec<&str> = field("NSpid:")?.split_whitespace().collect();
    if role == "init" && numbers.len() > 1 && numbers.last() != Some(&"1") {
        return None;
    }
    let kib: u64 = field("VmHWM:")?.trim_end_matches(" kB").parse().ok()?;
    Some((role, kib * 1024))
}
