//! What a destination can't grant, found before the freeze.

use crate::capture::state::proc_text::{self, Status};
use crate::error::Result;
use crate::manifest::{Creds, Process, Rlimit};

const CAP_SETGID: u32 = 6;
const CAP_SETUID: u32 = 7;
const CAP_SETPCAP: u32 = 8;
const CAP_SYS_RESOURCE: u32 = 24;
/// Names of `RLIMIT_*` as `ulimit` and limits.conf(5) know them.
const LIMITS: [&str; 16] = [
    "cpu",
    "fsize",
    "data",
    "stack",
    "core",
    "rss",
    "nproc",
    "nofile",
    "memlock",
    "as",
    "locks",
    "sigpending",
    "msgqueue",
    "nice",
    "rtprio",
    "rttime",
];

/// What the restoring process of this host holds and can pass on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grants {
    /// Permitted capabilities.
    pub permitted: u64,
    /// Bounding set.
    pub bounding: u64,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// `oom_score_adj`, below which one can't go without `CAP_SYS_RESOURCE`.
    pub oom_score_adj: i32,
}

impl Grants {
    /// Those of the calling process.
    pub fn own() -> Result<Self> {
        let read = |name: &str| proc_text::read(0, &format!("/proc/self/{name}"));
        let status = Status::parse(&read("status")?)?;
        Ok(Self {
            permitted: status.caps[1],
            bounding: status.caps[3],
            rlimits: proc_text::limits(&read("limits")?)?,
            oom_score_adj: proc_text::decimal("oom_score_adj", &read("oom_score_adj")?)? as i32,
        })
    }

    fn has(&self, cap: u32) -> bool {
        self.permitted >> cap & 1 == 1
    }

    /// Every reason why a process with these limits can't be restored here.
    pub fn process_blockers(&self, process: &Process) -> Vec<String> {
        let mut out = Vec::new();
        if self.has(CAP_SYS_RESOURCE) {
            return out;
        }
        for ((name, want), have) in LIMITS.iter().zip(&process.rlimits).zip(&self.rlimits) {
            if want.hard > have.hard {
                out.push(format!(
                    "hard limit {name} of {} is above the destination's {} and CAP_SYS_RESOURCE is \
                     missing there; raise the agent's limit or give it the capability",
                    shown(want.hard),
                    shown(have.hard)
                ));
            }
        }
        if process.oom_score_adj < self.oom_score_adj {
            out.push(format!(
                "oom_score_adj {} is below the destination agent's {} and CAP_SYS_RESOURCE is missing \
                 there; lower the agent's",
                process.oom_score_adj, self.oom_score_adj
            ));
        }
        out
    }

    /// Every reason why a thread with these credentials can't be restored here.
    pub fn creds_blockers(&self, creds: &Creds) -> Vec<String> {
        let working = 1 << CAP_SETGID | 1 << CAP_SETUID | 1 << CAP_SETPCAP;
        let cap = |i: usize| creds.caps.get(i).copied().unwrap_or(0);
        let missing = (cap(1) | working) & !self.permitted;
        let unbounded = cap(3) & !self.bounding;
        let uninheritable = cap(0) & !self.bounding;
        [(missing, "capabilities"), (unbounded, "bounding set"), (uninheritable, "inheritable set")]
            .iter()
            .filter(|(caps, _)| *caps != 0)
            .map(|(caps, what)| {
                format!(
                    "{what}: the destination's agent lacks {}; give them to it, or drop them from the process",
                    numbers(*caps)
                )
            })
            .collect()
    }
}

fn shown(limit: u64) -> String {
    if limit == u64::MAX { "unlimited".into() } else { limit.to_string() }
}

fn numbers(caps: u64) -> String {
    let list: Vec<String> =
        (0..64).filter(|i| caps >> i & 1 == 1).map(|i| format!("capability {i}")).collect();
    list.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blockers_name_what_is_missing() {
        let few = Rlimit { soft: 10, hard: 10 };
        let grants =
            Grants { permitted: 0x1c0, bounding: 0x1ff, rlimits: vec![few; 16], oom_score_adj: 0 };
        let mut process = Process { rlimits: vec![few; 16], ..Process::default() };
        assert!(grants.process_blockers(&process).is_empty());
        process.rlimits[7].hard = u64::MAX;
        process.oom_score_adj = -5;
        let blockers = grants.process_blockers(&process);
        assert!(blockers.len() == 2 && blockers[0].contains("nofile of unlimited"), "{blockers:?}");
        let all = Grants { permitted: u64::MAX, ..grants.clone() };
        assert!(all.process_blockers(&process).is_empty());
        let creds = Creds { caps: vec![0, 0x40, 0x40, 0x1ff, 0], ..Creds::default() };
        assert!(grants.creds_blockers(&creds).is_empty());
        let creds = Creds { caps: vec![0, 1 << 21, 0, 0x200, 0], ..creds };
        let blockers = grants.creds_blockers(&creds);
        assert!(blockers[0].contains("capability 21") && blockers[1].contains("capability 9"));
    }
}
