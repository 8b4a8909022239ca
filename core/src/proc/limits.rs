//! `/proc/PID/limits`: `prlimit` on a process of another user needs a capability that reading doesn't.

use crate::error::{Error, Result};
use crate::manifest::Rlimit;

/// Names in `/proc/PID/limits`, at the index of their `RLIMIT_*` number.
pub const NAMES: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// Reads and parses `/proc/PID/limits`; index is `RLIMIT_*`.
pub fn read(pid: i32) -> Result<Vec<Rlimit>> {
    parse(&super::read(pid, "limits")?)
}

/// Parses the text of `/proc/PID/limits`.
pub fn parse(text: &[u8]) -> Result<Vec<Rlimit>> {
    let text = String::from_utf8_lossy(text);
    NAMES
        .iter()
        .map(|name| {
            text.lines()
                .find_map(|line| values(line.strip_prefix(name)?))
                .ok_or_else(|| Error::parse("/proc/PID/limits", name))
        })
        .collect()
}

fn values(rest: &str) -> Option<Rlimit> {
    let mut words = rest.split_whitespace().map(|word| match word {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    });
    Some(Rlimit { soft: words.next()??, hard: words.next()?? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn own_limits() {
        let limits = read(std::process::id() as i32).unwrap();
        let (soft, hard) =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(limits[libc::RLIMIT_NOFILE as usize], Rlimit { soft, hard });
        let (soft, hard) =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_STACK).unwrap();
        assert_eq!(limits[libc::RLIMIT_STACK as usize], Rlimit { soft, hard });
    }

    proptest! {
        #[test]
        fn any_text_does_no_harm(text in "(Max (cpu time|open files) [0-9a-z -]{0,40}\n){0,3}") {
            let _ = parse(text.as_bytes());
        }
    }
}
