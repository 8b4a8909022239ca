//! Credentials. The raw syscalls change one thread only, so every thread runs these.

use super::{NONE, must_prctl};
use crate::error::{Error, Result};
use crate::manifest::{Creds, Thread};
use crate::program::{Arg, Program};

const PR_CAPBSET_DROP: u64 = 24;
const PR_SET_SECUREBITS: u64 = 28;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;
/// Changing user ids leaves capabilities alone.
const NO_SETUID_FIXUP: u64 = 1 << 2;
const CAP_VERSION_3: u32 = 0x2008_0522;
const CAP_SETGID: u64 = 1 << 6;
const CAP_SETUID: u64 = 1 << 7;
const CAP_SETPCAP: u64 = 1 << 8;
/// Newest capability that every supported kernel knows (`CAP_CHECKPOINT_RESTORE`, Linux 5.9).
const CAP_COMMON_LAST: u32 = 40;
const GROUPS_MAX: usize = 65536;

/// Adds what gives the thread its credentials. It starts with those of the process that restores, and
/// needs `CAP_SETPCAP`, `CAP_SETUID` and `CAP_SETGID` there besides all it is to have.
pub fn plan(thread: &Thread, p: &mut Program) -> Result<()> {
    let c = &thread.creds;
    let sound = c.uids.len() == 4 && c.gids.len() == 4 && c.caps.len() == 5;
    if !sound || c.groups.len() > GROUPS_MAX {
        return Err(Error::Manifest("credentials of the wrong length".into()));
    }
    let [inheritable, permitted, effective] = [c.caps[0], c.caps[1], c.caps[2]];
    must_prctl(p, "PR_SET_SECUREBITS", PR_SET_SECUREBITS, NO_SETUID_FIXUP);
    ambient(p, "clear ambient capabilities", PR_CAP_AMBIENT_CLEAR_ALL, 0);
    // Inheritable ones first: they can't be added once they are outside the bounding set.
    let working = permitted | CAP_SETPCAP | CAP_SETUID | CAP_SETGID;
    capset(p, inheritable, working, working);
    drop_bounding(c.caps[3], p);
    plan_ids(c, p);
    for cap in (0..64).filter(|i| c.caps[4] >> i & 1 == 1) {
        ambient(p, "raise ambient capability", PR_CAP_AMBIENT_RAISE, cap);
    }
    must_prctl(p, "PR_SET_SECUREBITS", PR_SET_SECUREBITS, c.securebits.into());
    capset(p, inheritable, permitted, effective);
    if c.no_new_privs {
        must_prctl(p, "PR_SET_NO_NEW_PRIVS", libc::PR_SET_NO_NEW_PRIVS as u64, 1);
    }
    Ok(())
}

fn plan_ids(c: &Creds, p: &mut Program) {
    let bytes: Vec<u8> = c.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
    let at = p.data(&bytes);
    p.must("setgroups", libc::SYS_setgroups, [c.groups.len().into(), at.into()]);
    let three = |ids: &[u32]| [Arg::from(ids[0]), ids[1].into(), ids[2].into()];
    p.must("setresgid", libc::SYS_setresgid, three(&c.gids));
    // These two answer the old id and never fail with the capabilities held here.
    p.may("setfsgid", libc::SYS_setfsgid, [c.gids[3].into()]);
    p.must("setresuid", libc::SYS_setresuid, three(&c.uids));
    p.may("setfsuid", libc::SYS_setfsuid, [c.uids[3].into()]);
}

fn drop_bounding(keep: u64, p: &mut Program) {
    for cap in (0..64u32).filter(|i| keep >> i & 1 == 0) {
        let args = [PR_CAPBSET_DROP.into(), cap.into(), NONE, NONE, NONE];
        let what = format!("drop capability {cap} from the bounding set");
        if cap <= CAP_COMMON_LAST {
            p.must(what, libc::SYS_prctl, args);
        } else {
            // Fails only where this kernel doesn't have the capability, so that nobody holds it.
            p.may(what, libc::SYS_prctl, args);
        }
    }
}

fn ambient(p: &mut Program, what: &str, action: u64, cap: u64) {
    let args = [PR_CAP_AMBIENT.into(), action.into(), cap.into(), NONE, NONE];
    p.must(what, libc::SYS_prctl, args);
}

fn capset(p: &mut Program, inheritable: u64, permitted: u64, effective: u64) {
    // Two halves of (effective, permitted, inheritable), low words first.
    let half = |shift: u32| [effective, permitted, inheritable].map(|c| (c >> shift) as u32);
    let sets: Vec<u8> = [half(0), half(32)].concat().iter().flat_map(|w| w.to_le_bytes()).collect();
    let header = p.words(&[u64::from(CAP_VERSION_3)]);
    let data = p.data(&sets);
    p.must("capset", libc::SYS_capset, [header.into(), data.into()]);
}
