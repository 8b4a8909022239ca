//! What a thread has for itself, restored by the thread.

use super::{must_prctl, queued_signal};
use crate::arch::Regs;
use crate::error::{Error, Result};
use crate::manifest::{Sched, Thread};
use crate::program::Program;
use crate::sys::task::SCHED_ATTR_LEN;

const ARCH_SET_GS: u64 = 0x1001;
const ARCH_SET_FS: u64 = 0x1002;
const IOPRIO_WHO_PROCESS: u64 = 1;
const IOPRIO_CLASS_SHIFT: u32 = 13;
/// `SCHED_FLAG_RESET_ON_FORK`, `RECLAIM`, `DL_OVERRUN`: those that describe a state.
const SCHED_FLAGS: u64 = 7;
const CPU_MASK_LEN_MAX: usize = 1024;

/// Adds what needs privilege or none. The thread must not have an rseq area registered.
pub fn plan_before_creds(thread: &Thread, p: &mut Program) -> Result<()> {
    let regs = Regs::from_bytes(&thread.regs)
        .ok_or_else(|| Error::Manifest(format!("registers of {} bytes", thread.regs.len())))?;
    let name = p.c_string(&thread.comm);
    must_prctl(p, "PR_SET_NAME", libc::PR_SET_NAME as u64, name);
    p.must("FS base", libc::SYS_arch_prctl, [ARCH_SET_FS.into(), regs.fs_base.into()]);
    p.must("GS base", libc::SYS_arch_prctl, [ARCH_SET_GS.into(), regs.gs_base.into()]);
    p.must("set_tid_address", libc::SYS_set_tid_address, [thread.clear_child_tid.into()]);
    if thread.robust_list != 0 {
        let args = [thread.robust_list.into(), thread.robust_list_len.into()];
        p.must("set_robust_list", libc::SYS_set_robust_list, args);
    }
    if thread.rseq != 0 {
        let args = [thread.rseq.into(), thread.rseq_len.into(), 0.into(), thread.rseq_sig.into()];
        p.must("rseq", libc::SYS_rseq, args);
    }
    // Real-time threads report no slack; for the others 0 would mean "the default".
    if thread.timer_slack_ns != 0 {
        let slack = thread.timer_slack_ns;
        must_prctl(p, "PR_SET_TIMERSLACK", libc::PR_SET_TIMERSLACK as u64, slack);
    }
    plan_sched(&thread.sched, p)
}

fn plan_sched(sched: &Sched, p: &mut Program) -> Result<()> {
    if sched.affinity.len() > CPU_MASK_LEN_MAX || !matches!(sched.deadline_ns.len(), 0 | 3) {
        return Err(Error::Manifest("scheduling parameters of the wrong length".into()));
    }
    if !sched.affinity.is_empty() {
        let at = p.data(&sched.affinity);
        let args = [0.into(), sched.affinity.len().into(), at.into()];
        p.must("sched_setaffinity", libc::SYS_sched_setaffinity, args);
    }
    if sched.ioprio >> IOPRIO_CLASS_SHIFT != 0 {
        let args = [IOPRIO_WHO_PROCESS.into(), 0.into(), sched.ioprio.into()];
        p.must("ioprio_set", libc::SYS_ioprio_set, args);
    }
    // Also where the policy ignores it: it counts again when the policy changes.
    let args = [libc::PRIO_PROCESS.into(), 0.into(), sched.nice.into()];
    p.must("setpriority", libc::SYS_setpriority, args);
    let mut attr = Vec::with_capacity(SCHED_ATTR_LEN);
    attr.extend_from_slice(&(SCHED_ATTR_LEN as u32).to_le_bytes());
    attr.extend_from_slice(&sched.policy.to_le_bytes());
    attr.extend_from_slice(&(sched.flags & SCHED_FLAGS).to_le_bytes());
    attr.extend_from_slice(&sched.nice.to_le_bytes());
    attr.extend_from_slice(&sched.priority.to_le_bytes());
    for i in 0..3 {
        let ns = sched.deadline_ns.get(i).copied().unwrap_or(0);
        attr.extend_from_slice(&ns.to_le_bytes());
    }
    let at = p.data(&attr);
    p.must("sched_setattr", libc::SYS_sched_setattr, [0.into(), at.into(), 0.into()]);
    Ok(())
}

/// Adds what a change of credentials would reset, and the thread's pending signals.
pub fn plan_after_creds(thread: &Thread, p: &mut Program) -> Result<()> {
    if thread.pdeathsig != 0 {
        let signal = thread.pdeathsig as u64;
        must_prctl(p, "PR_SET_PDEATHSIG", libc::PR_SET_PDEATHSIG as u64, signal);
    }
    if thread.pending.is_empty() {
        return Ok(());
    }
    let pid = p.must("getpid", libc::SYS_getpid, []);
    let tid = p.must("gettid", libc::SYS_gettid, []);
    for info in &thread.pending {
        let signal = queued_signal(info)?;
        let at = p.data(info);
        let args = [pid.into(), tid.into(), signal.into(), at.into()];
        p.must(format!("queue signal {signal} to thread"), libc::SYS_rt_tgsigqueueinfo, args);
    }
    Ok(())
}
