//! What the threads share, restored by the leader.

use super::{must_prctl, queued_signal, timers};
use crate::arch::xstate::TILE_DATA;
use crate::capture::state::remote::settable;
use crate::error::{Error, Result};
use crate::manifest::{Manifest, MmFields, Process};
use crate::program::{Arg, Op, Program};

const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;
const PR_SET_THP_DISABLE: u64 = 41;
const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
const SIGSET_LEN: u64 = 8;
/// Length of `struct prctl_mm_map`, and where its last field, the executable's descriptor, lies.
const MM_MAP_LEN: usize = 104;
const MM_MAP_EXE_FD: u64 = 100;
/// Registrations of `membarrier(2)` known to this program: every `REGISTER` command is a bit.
const MEMBARRIER_REGISTER: u32 = 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8;

/// Step 1: all that needs privilege, a free descriptor, or a process of one thread. `exe_fd` is an open
/// descriptor of the executable, which no mapping of the process may use any more except those
/// of the program itself; the caller closes it.
pub fn plan_early(process: &Process, exe_fd: Option<Arg>, p: &mut Program) -> Result<()> {
    plan_session(process, p);
    plan_proc_file(p, "oom_score_adj", &process.oom_score_adj.to_string());
    plan_proc_file(p, "coredump_filter", &format!("{:#x}", process.coredump_filter));
    plan_directories(process, p)?;
    p.must("umask", libc::SYS_umask, [process.umask.into()]);
    p.must("personality", libc::SYS_personality, [process.personality.into()]);
    must_prctl(p, "PR_SET_THP_DISABLE", PR_SET_THP_DISABLE, process.thp_disable.into());
    if process.child_subreaper {
        must_prctl(p, "PR_SET_CHILD_SUBREAPER", libc::PR_SET_CHILD_SUBREAPER as u64, 1);
    }
    if process.xcomp_perm >> TILE_DATA & 1 == 1 {
        let args = [ARCH_REQ_XCOMP_PERM.into(), TILE_DATA.into()];
        p.must("permission to use tile data", libc::SYS_arch_prctl, args);
    }
    for bit in (0..32).map(|i| 1u32 << i).filter(|b| process.membarrier & b != 0) {
        if bit & MEMBARRIER_REGISTER == 0 {
            return Err(Error::Refused(format!("unknown membarrier registration {bit:#x}")));
        }
        p.must("membarrier", libc::SYS_membarrier, [bit.into(), 0.into(), 0.into()]);
    }
    plan_mm(&process.mm, &process.auxv, exe_fd, p);
    plan_actions(process, p)
}

/// A process group or session of its own is made anew; one it merely belongs to is left behind.
fn plan_session(process: &Process, p: &mut Program) {
    if process.sid == process.pid {
        p.must("setsid", libc::SYS_setsid, []);
    } else if process.pgid == process.pid {
        p.must("setpgid", libc::SYS_setpgid, [0.into(), 0.into()]);
    }
}

fn plan_proc_file(p: &mut Program, name: &str, value: &str) {
    let path = p.c_string(format!("/proc/self/{name}").as_bytes());
    let text = p.data(value.as_bytes());
    let flags = libc::O_WRONLY | libc::O_CLOEXEC;
    let open =
        p.must(format!("open /proc/self/{name}"), libc::SYS_open, [path.into(), flags.into()]);
    let args = [open.into(), text.into(), value.len().into()];
    p.must(format!("write {value} to /proc/self/{name}"), libc::SYS_write, args);
    p.must(format!("close /proc/self/{name}"), libc::SYS_close, [open.into()]);
}

/// Both paths are as seen from the host's root, so the directory is entered before the root changes.
fn plan_directories(process: &Process, p: &mut Program) -> Result<()> {
    for (what, path) in [("current directory", &process.cwd), ("root", &process.root)] {
        if !path.starts_with(b"/") || path.contains(&0) {
            return Err(Error::Manifest(format!("{what} {:?}", String::from_utf8_lossy(path))));
        }
    }
    let shown = |path: &[u8]| String::from_utf8_lossy(path).into_owned();
    let cwd = p.c_string(&process.cwd);
    p.must(format!("chdir {}", shown(&process.cwd)), libc::SYS_chdir, [cwd.into()]);
    if process.root != b"/" {
        let root = p.c_string(&process.root);
        p.must(format!("chroot {}", shown(&process.root)), libc::SYS_chroot, [root.into()]);
    }
    Ok(())
}

fn plan_mm(mm: &MmFields, auxv: &[u8], exe_fd: Option<Arg>, p: &mut Program) {
    let auxv_at = p.data(auxv);
    let words = [
        mm.start_code,
        mm.end_code,
        mm.start_data,
        mm.end_data,
        mm.start_brk,
        mm.brk,
        mm.start_stack,
        mm.arg_start,
        mm.arg_end,
        mm.env_start,
        mm.env_end,
        auxv_at,
    ];
    let mut map: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    map.extend_from_slice(&(auxv.len() as u32).to_le_bytes());
    let fd_base = if exe_fd.is_some() { 0 } else { u32::MAX };
    map.extend_from_slice(&fd_base.to_le_bytes());
    let at = p.data(&map);
    if let Some(fd) = exe_fd {
        p.op(Op::Add, [(at + MM_MAP_EXE_FD).into(), fd]);
    }
    let args = [PR_SET_MM.into(), PR_SET_MM_MAP.into(), at.into(), MM_MAP_LEN.into(), 0.into()];
    p.must("PR_SET_MM_MAP", libc::SYS_prctl, args);
}

fn plan_actions(process: &Process, p: &mut Program) -> Result<()> {
    if process.sigactions.len() != 64 {
        return Err(Error::Manifest(format!("{} signal actions", process.sigactions.len())));
    }
    for (signal, a) in (1usize..).zip(&process.sigactions).filter(|(s, _)| settable(*s)) {
        let at = p.words(&[a.handler, a.flags, a.restorer, a.mask]);
        let args = [signal.into(), at.into(), 0.into(), SIGSET_LEN.into()];
        p.must(format!("action of signal {signal}"), libc::SYS_rt_sigaction, args);
    }
    Ok(())
}

/// Step 3: limits, when nothing more is mapped, opened or cloned.
pub fn plan_rlimits(process: &Process, p: &mut Program) -> Result<()> {
    if process.rlimits.len() > 16 {
        return Err(Error::Manifest(format!("{} resource limits", process.rlimits.len())));
    }
    for (i, limit) in process.rlimits.iter().enumerate() {
        let at = p.words(&[limit.soft, limit.hard]);
        let args = [0.into(), i.into(), at.into(), 0.into()];
        p.must(format!("resource limit {i}"), libc::SYS_prlimit64, args);
    }
    Ok(())
}

/// Step 5: what credentials reset, what names threads, and what starts running at once, last.
pub fn plan_late(manifest: &Manifest, ids: timers::Ids, p: &mut Program) -> Result<()> {
    let process = &manifest.process;
    // 2 (readable by root only) can't be asked for; 0 differs from it only in who owns a core dump.
    let dumpable = u64::from(process.dumpable == 1);
    must_prctl(p, "PR_SET_DUMPABLE", libc::PR_SET_DUMPABLE as u64, dumpable);
    timers::plan_create(&process.timers, manifest.threads.len(), ids, p)?;
    // To oneself every siginfo may be sent, also the kernel's own: the process id must be one's own.
    let pid = p.must("getpid", libc::SYS_getpid, []);
    for info in &process.pending {
        let signal = queued_signal(info)?;
        let at = p.data(info);
        let args = [pid.into(), signal.into(), at.into()];
        p.must(format!("queue signal {signal}"), libc::SYS_rt_sigqueueinfo, args);
    }
    timers::plan_arm(process, p)
}
