//! The new process before it is anybody: made inside new PID, mount and time namespaces, with the
//! wanted number, emptied, and waiting for its first table.
//!
//! Three processes take part: the *launcher* enters the namespaces and ends; *init* is number 1 of the
//! new PID namespace, reaps, and notes how the process ended; its child becomes the process.

use crate::error::{Error, Result};
use crate::program::{Arg, Op, Program};
use crate::restore::keeper::{Held, Keeper};
use crate::restore::scratch::{Gate, MEMFD_OFFSET, Scratch, VDSO_LEN};
use crate::sys::clone;
use crate::sys::pidfd::PidFd;
use crate::sys::spawn::{
    FIRST_HANDED, recv_descriptors, send_descriptors, spawn_with, take_handed,
};
use libc::pid_t;
use nix::errno::Errno;
use nix::mount::MsFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const FD_SCRATCH: RawFd = FIRST_HANDED;
const FD_GATE: RawFd = FIRST_HANDED + 1;
const HANDED_SOCKET: usize = 2;
const FD_SOCKET: RawFd = FIRST_HANDED + HANDED_SOCKET as RawFd;
const TASK_SIZE: u64 = 0x7fff_ffff_f000;
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(10);

/// What the launcher needs to know; it travels as arguments of the hidden subcommand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitConfig {
    /// Wanted process number.
    pub pid: pid_t,
    /// Start of the scratch range.
    pub base: u64,
    /// Length of the scratch memfd.
    pub memfd_len: u64,
    /// Address of the first table.
    pub entries: u64,
    /// Offset added to `CLOCK_MONOTONIC`, nanoseconds.
    pub monotonic_offset_ns: i64,
    /// Offset added to `CLOCK_BOOTTIME`, nanoseconds.
    pub boottime_offset_ns: i64,
    /// File that init writes the exit status to.
    pub exit_file: PathBuf,
}

impl InitConfig {
    /// As arguments.
    pub fn to_args(&self) -> Vec<String> {
        vec![
            self.pid.to_string(),
            self.base.to_string(),
            self.memfd_len.to_string(),
            self.entries.to_string(),
            self.monotonic_offset_ns.to_string(),
            self.boottime_offset_ns.to_string(),
            self.exit_file.to_string_lossy().into_owned(),
        ]
    }

    /// From arguments; `None` when they are malformed.
    pub fn from_args(args: &[String]) -> Option<Self> {
        let [pid, base, memfd_len, entries, monotonic, boottime, exit_file] = args else {
            return None;
        };
        Some(Self {
            pid: pid.parse().ok()?,
            base: base.parse().ok()?,
            memfd_len: memfd_len.parse().ok()?,
            entries: entries.parse().ok()?,
            monotonic_offset_ns: monotonic.parse().ok()?,
            boottime_offset_ns: boottime.parse().ok()?,
            exit_file: PathBuf::from(exit_file),
        })
    }
}

/// The empty new process.
#[derive(Debug)]
pub struct Newborn {
    /// Init of its namespace, which keeps what has to outlive a session.
    pub keeper: Arc<Keeper>,
    /// The process itself, by the number this host sees.
    pub process: PidFd,
}

impl Newborn {
    /// Ends the whole namespace. For a restore that failed.
    pub fn kill(&self) {
        let _ = self.keeper.init().kill(libc::SIGKILL);
        let _ = self.process.kill(libc::SIGKILL);
    }
}

/// The table that empties the new process: it closes every descriptor, moves the vdso aside, unmaps
/// everything but the scratch range, and waits for the first stage.
pub fn plan_empty(scratch: &Scratch) -> Program {
    let mut p = scratch.program(64);
    let range = scratch.range();
    p.may("close all descriptors", libc::SYS_close_range, [0.into(), u32::MAX.into(), 0.into()]);
    p.must("unmap below the scratch range", libc::SYS_munmap, [0.into(), range.start.into()]);
    p.must(
        "unmap above the scratch range",
        libc::SYS_munmap,
        [range.end.into(), (TASK_SIZE - range.end).into()],
    );
    end_stage(scratch, &mut p, 1);
    p
}

/// Adds the end of a stage: tells the session, then waits until it may go on with `next`.
pub fn end_stage(scratch: &Scratch, p: &mut Program, next: u32) {
    p.op(Op::Add, [scratch.events().into(), 1.into()]);
    p.may(
        "tell the session",
        libc::SYS_futex,
        [scratch.events().into(), libc::FUTEX_WAKE.into(), i32::MAX.into()],
    );
    p.op(Op::Wait, [scratch.go().into(), (next - 1).into()]);
    p.op(Op::JumpIf, [scratch.go().into(), next.into(), Arg::At(scratch.next())]);
}

/// Starts the new process. `exe` is this program, which runs [`init_main`] when called with the hidden
/// subcommand `subcommand`. The first table must be in place.
pub fn launch(
    exe: &Path,
    subcommand: &str,
    config: &InitConfig,
    scratch: &Scratch,
    gate: &Gate,
) -> Result<Newborn> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| Error::io("socketpair", e))?;
    ours.set_read_timeout(Some(LAUNCH_TIMEOUT)).map_err(|e| Error::io("set a time-out", e))?;
    let mut command = Command::new(exe);
    command.arg(subcommand).args(config.to_args());
    // A registered rseq area would be written by the kernel after it has been unmapped.
    command.env_clear().env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let fds = [scratch.file().as_fd(), gate.file().as_fd(), theirs.as_fd()];
    let mut launcher =
        spawn_with(&mut command, &fds).map_err(|e| Error::io("start the new process's init", e))?;
    drop(theirs);
    let result = receive_newborn(&ours);
    let _ = launcher.wait();
    result
}

/// Reads the answer of init: `k` with two process descriptors and the keeper's socket, or `e` and a
/// message.
fn receive_newborn(socket: &UnixStream) -> Result<Newborn> {
    let mut text = [0u8; 512];
    let (len, fds) = recv_descriptors(socket, &mut text)
        .map_err(|e| Error::sys("hear from the new process's init", e))?;
    match (text[..len].split_first(), <[OwnedFd; 3]>::try_from(fds)) {
        (Some((b'k', _)), Ok([init, process, port])) => {
            let keeper = Arc::new(Keeper::new(PidFd::adopt(init)?, port));
            Ok(Newborn { keeper, process: PidFd::adopt(process)? })
        }
        (Some((b'e', message)), _) => {
            Err(Error::Refused(String::from_utf8_lossy(message).into_owned()))
        }
        _ => Err(Error::Refused("the new process's init ended without a word".into())),
    }
}

/// Body of the hidden subcommand: launcher, then init. Never returns in init.
pub fn init_main(config: &InitConfig) -> i32 {
    let Ok(socket) = take_handed(HANDED_SOCKET) else { return 2 };
    let mut socket = UnixStream::from(socket);
    match enter_namespaces(config) {
        // SAFETY: this process has one thread.
        Ok(()) => match unsafe { nix::unistd::fork() } {
            Ok(ForkResult::Parent { .. }) => 0,
            Ok(ForkResult::Child) => match become_init(config, &socket) {
                Ok((main, held)) => reap(main, &config.exit_file, &held),
                Err(e) => {
                    let _ = socket.write_all(format!("e{e}").as_bytes());
                    1
                }
            },
            Err(e) => {
                let _ = socket.write_all(format!("efork: {e}").as_bytes());
                1
            }
        },
        Err(e) => {
            let _ = socket.write_all(format!("e{e}").as_bytes());
            1
        }
    }
}

fn enter_namespaces(config: &InitConfig) -> Result<()> {
    const CLONE_NEWTIME: i32 = 0x80;
    let flags = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
    nix::sched::unshare(flags)
        .map_err(|e| Error::sys("make new PID and mount namespaces (needs CAP_SYS_ADMIN)", e))?;
    // SAFETY: integers only.
    Errno::result(unsafe { libc::unshare(CLONE_NEWTIME) })
        .map_err(|e| Error::sys("make a new time namespace", e))?;
    let line = |name: &str, ns: i64| {
        format!("{name} {} {}\n", ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000))
    };
    let offsets = line("monotonic", config.monotonic_offset_ns)
        + &line("boottime", config.boottime_offset_ns);
    std::fs::write("/proc/self/timens_offsets", offsets)
        .map_err(|e| Error::io("set the clock offsets of the time namespace", e))
}

/// Sets up the namespace and starts the process; returns its number inside, and what is kept.
fn become_init(config: &InitConfig, socket: &UnixStream) -> Result<(pid_t, Held)> {
    let _ = nix::unistd::setsid();
    let none: Option<&str> = None;
    nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|e| Error::sys("make the mounts private", e))?;
    let proc_flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("proc"), "/proc", Some("proc"), proc_flags, none)
        .map_err(|e| Error::sys("mount /proc of the new PID namespace", e))?;
    raise_pid_max(config.pid);
    let all = SigSet::all();
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), None)
        .map_err(|e| Error::sys("block signals", e))?;
    let Some(process) = clone::fork_with_pid(config.pid)? else {
        become_newborn(config);
    };
    let own = PidFd::open(1)?;
    let (held, port) = Held::start(process.as_fd())?;
    send_descriptors(socket, b"k", &[own.as_fd(), process.as_fd(), port.as_fd()])
        .map_err(|e| Error::sys("report to the session", e))?;
    // Nothing that belongs to the session stays open here.
    for fd in [FD_SCRATCH, FD_GATE, FD_SOCKET] {
        // SAFETY: integers only; these descriptors are not used by any Rust value from here on but
        // `socket`, whose owner never closes it again because init ends by `exit`.
        unsafe { libc::close(fd) };
    }
    Ok((config.pid, held))
}

/// The PID namespace may have a limit of its own (Linux 6.14) that inherits the host's default.
fn raise_pid_max(pid: pid_t) {
    let path = "/proc/sys/kernel/pid_max";
    let current: i64 =
        std::fs::read_to_string(path).ok().and_then(|s| s.trim().parse().ok()).unwrap_or(i64::MAX);
    if i64::from(pid) >= current {
        let _ = std::fs::write(path, (pid + 1).to_string());
    }
}

/// The child: maps the scratch range and leaves Rust.
fn become_newborn(config: &InitConfig) -> ! {
    let vdso = own_vdso();
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let memfd = config.base + MEMFD_OFFSET;
    // SAFETY: NOREPLACE mappings at addresses nothing uses; a failure ends this process, which exists
    // for nothing else.
    let mapped = unsafe {
        clone::map_fixed(FD_GATE, config.base, 4096, 0, rw).and_then(|()| {
            clone::map_fixed(FD_SCRATCH, memfd, config.memfd_len, 0, rw | libc::PROT_EXEC)
        })
    };
    if mapped.is_err() || !move_vdso(&vdso, config.base + crate::restore::scratch::VDSO_OFFSET) {
        // SAFETY: ends the process without running anything of Rust's.
        unsafe { libc::_exit(71) };
    }
    // SAFETY: the range is mapped; the session put code and table there before it started us.
    unsafe { clone::enter_runner(memfd + 4096, config.entries, memfd) }
}

/// `[vvar]` and its kin and `[vdso]` of this process, in address order.
pub fn own_vdso() -> Vec<(u64, u64)> {
    let mut text = String::new();
    let read = File::open("/proc/self/maps").and_then(|mut f| f.read_to_string(&mut text));
    if read.is_err() {
        return Vec::new();
    }
    text.lines()
        .filter(|l| l.ends_with("[vdso]") || l.contains("[vvar"))
        .filter_map(|l| {
            let (start, end) = l.split(' ').next()?.split_once('-')?;
            Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
        })
        .collect()
}

fn move_vdso(parts: &[(u64, u64)], to: u64) -> bool {
    let Some(first) = parts.first().map(|p| p.0) else { return true };
    if parts.last().is_some_and(|p| p.1 - first > VDSO_LEN) {
        return false;
    }
    parts.iter().all(|(start, end)| {
        let len = (end - start) as usize;
        // SAFETY: moves a mapping of the kernel's to a free place; nothing of ours calls the vdso
        // afterwards but through pointers in libc that this process never uses again.
        let got = unsafe {
            libc::mremap(
                *start as *mut libc::c_void,
                len,
                len,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                (to + start - first) as *mut libc::c_void,
            )
        };
        got != libc::MAP_FAILED
    })
}

/// Reaps until no child is left, notes how the process ended, and keeps what sessions hand over.
fn reap(main: pid_t, exit_file: &Path, held: &Held) -> i32 {
    let mut code = 0;
    // All signals are blocked: this one is read instead. Without it, children are looked for often.
    let mut ended = SigSet::empty();
    ended.add(Signal::SIGCHLD);
    let signals = SignalFd::with_flags(&ended, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).ok();
    let interval = PollTimeout::from(if signals.is_some() { 10_000u16 } else { 50 });
    loop {
        match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, status)) if pid.as_raw() == main => {
                code = status;
                note_exit(exit_file, &format!("exited {status}\n"));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid.as_raw() == main => {
                code = 128 + signal as i32;
                note_exit(exit_file, &format!("killed {}\n", signal as i32));
            }
            Ok(WaitStatus::StillAlive) => {
                let mut fds = vec![PollFd::new(held.socket().as_fd(), PollFlags::POLLIN)];
                fds.extend(signals.iter().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)));
                let _ = poll(&mut fds, interval);
                while signals.as_ref().is_some_and(|s| matches!(s.read_signal(), Ok(Some(_)))) {}
                held.serve();
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return code,
        }
    }
}

/// Written whole or not at all: a reader never sees half a status.
fn note_exit(path: &Path, text: &str) {
    let partial = path.with_extension("part");
    if std::fs::write(&partial, text).is_ok() {
        let _ = std::fs::rename(&partial, path);
    }
}
