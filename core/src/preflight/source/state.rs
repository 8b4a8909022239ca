//! What sort of process it is, and what state it is in.

use super::SourceOptions;
use crate::error::Error;
use crate::preflight::Blocker;
use crate::proc::status::{self, Status};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

fn blocker(pid: i32, reason: impl AsRef<str>, remedy: &str) -> Blocker {
    Blocker::new(format!("process {pid}"), reason, remedy)
}

/// Status of a process that can be looked into at all.
pub(super) fn look(pid: i32, options: &SourceOptions) -> Result<Status, Blocker> {
    let no = |reason: &str, remedy: &str| Err(blocker(pid, reason, remedy));
    if pid <= 0 {
        return no("is no process id", "give the id of a process (see ps)");
    }
    let status = match status::read(pid) {
        Ok(status) => status,
        Err(Error::Gone { .. }) => return no("does not exist", "check the id (see ps)"),
        Err(e) => return Err(Blocker::unknown(format!("process {pid}"), &e)),
    };
    if status.tgid != pid {
        let remedy = format!("give the id of the process, {}", status.tgid);
        return no("is a thread", &remedy);
    }
    if matches!(status.state, 'Z' | 'X') {
        if status.threads > 1 {
            return no("has lost its main thread", "let it end; it can't be moved");
        }
        return no("is a zombie", "nothing is left to move; its parent should wait for it");
    }
    if status.kernel_thread || !status.has_memory {
        return no("is a kernel thread", "only programs can be moved");
    }
    if pid == std::process::id() as i32 {
        return no("is slipstream itself", "give the id of another process");
    }
    if !options.allow_own_executable && runs_this_executable(pid) {
        return no("is a part of slipstream", "give the id of another process");
    }
    // Needs the same right as ptrace does.
    if fs::read_link(format!("/proc/{pid}/exe")).and(readable_memory(pid)).is_err() {
        return if nix::unistd::geteuid().is_root() {
            no("has capabilities that slipstream lacks", "run slipstream with all of them")
        } else {
            no(&format!("belongs to user {}", status.uids[0]), "run slipstream as root")
        };
    }
    if crate::inject::is_parked(pid).is_ok_and(|parked| parked) {
        return no(
            "is the stopped copy of a process that was moved",
            "see slipstream status; if its migration waits, slipstream recover goes on with it",
        );
    }
    Ok(status)
}

fn readable_memory(pid: i32) -> std::io::Result<()> {
    File::open(format!("/proc/{pid}/mem")).map(drop)
}

fn runs_this_executable(pid: i32) -> bool {
    let identity = |path: String| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    let theirs = identity(format!("/proc/{pid}/exe"));
    theirs.is_some() && theirs == identity("/proc/self/exe".into())
}

/// Ids of the threads, and what they may not be.
pub(super) fn threads(pid: i32, blockers: &mut Vec<Blocker>) -> Vec<i32> {
    let tids = match crate::proc::threads(pid) {
        Ok(tids) => tids,
        Err(e) => {
            blockers.push(Blocker::unknown(format!("process {pid}"), &e));
            return vec![pid];
        }
    };
    for tid in &tids {
        // A thread that ends now is no obstacle.
        if let Ok(status) = status::read_thread(pid, *tid) {
            thread(*tid, &status, blockers);
        }
    }
    tids
}

fn thread(tid: i32, status: &Status, blockers: &mut Vec<Blocker>) {
    let mut no = |reason: &str, remedy: &str| {
        blockers.push(Blocker::new(format!("thread {tid}"), reason, remedy));
    };
    if status.tracer_pid != 0 {
        no(
            &format!("is traced by process {}", status.tracer_pid),
            "end the debugger or tracer first",
        );
    }
    if status.thread_features.iter().any(|f| f == "shstk") {
        no("uses a shadow stack", "start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off");
    }
    blockers.extend(filtered(tid, status.seccomp));
}

/// A thread under seccomp, whose mode in its status is `mode`: a filter may end the program at any system call
/// that we make in its name.
pub(crate) fn filtered(tid: i32, mode: u32) -> Option<Blocker> {
    let reason = "is under seccomp, whose filters can't be moved yet";
    (mode != 0).then(|| Blocker::new(format!("thread {tid}"), reason, "start it without a sandbox"))
}

/// A thread, stopped by us, whose system calls go to a handler of the program (Syscall User Dispatch): ours would,
/// too. Only its tracer is told.
pub(crate) fn dispatched(tid: i32) -> Result<Option<Blocker>, Error> {
    let reason = "has its system calls sent to a handler (PR_SET_SYSCALL_USER_DISPATCH)";
    let remedy = "let the program switch that off, or start it without";
    let is = crate::sys::ptrace::dispatches_syscalls(tid)?;
    Ok(is.then(|| Blocker::new(format!("thread {tid}"), reason, remedy)))
}

/// A process in group stop: its copy would run.
pub fn stopped(pid: i32, status: &Status) -> Option<Blocker> {
    (status.state == 'T').then(|| group_stop(pid))
}

/// That a process is in group stop.
pub fn group_stop(pid: i32) -> Blocker {
    let reason = "is stopped by SIGSTOP or job control, which does not come along yet";
    blocker(pid, reason, "let it go on first (kill -CONT)")
}

/// The rest of the process's own state.
pub(super) fn check(pid: i32, status: &Status, blockers: &mut Vec<Blocker>) {
    if status.ns_pids.last() == Some(&1) {
        blockers.push(blocker(
            pid,
            "is the first process of its PID namespace",
            "start the container with an init (docker run --init), and move its child",
        ));
    }
    blockers.extend(stopped(pid, status));
    blockers.extend(foreign_label(pid));
    if !is_64_bit(pid) {
        blockers.push(blocker(pid, "is a 32-bit program", "only 64-bit programs can be moved"));
    }
    match controlled_terminal(pid) {
        Ok(true) => blockers.push(blocker(
            pid,
            "leads a session that has a terminal",
            "start the program with setsid or nohup, not as the terminal's first process",
        )),
        Ok(false) => {}
        Err(e) => blockers.push(Blocker::unknown(format!("process {pid}"), &e)),
    }
}

/// A security label other than our own, which is the one that the copy would have.
fn foreign_label(pid: i32) -> Option<Blocker> {
    // Fails where no security module has labels.
    let label = |pid: &str| fs::read(format!("/proc/{pid}/attr/current")).ok();
    let (theirs, ours) = (label(&pid.to_string())?, label("self")?);
    let shown = String::from_utf8_lossy(&theirs);
    let shown = shown.trim_end_matches(['\n', '\0']);
    (theirs != ours).then(|| {
        let reason = format!("has the security label {shown}, which does not come along yet");
        blocker(pid, reason, "run it, or slipstream, without one of its own")
    })
}

/// Reads the class of its executable; x32 programs are of the 32-bit class too.
fn is_64_bit(pid: i32) -> bool {
    let mut header = [0; 5];
    File::open(format!("/proc/{pid}/exe"))
        .and_then(|exe| exe.read_exact_at(&mut header, 0))
        .is_ok_and(|()| header == *b"\x7fELF\x02")
}

/// True for a session leader with a controlling terminal.
fn controlled_terminal(pid: i32) -> crate::Result<bool> {
    let text = crate::proc::read(pid, "stat")?;
    parse_stat(&String::from_utf8_lossy(&text))
        .map(|(session, terminal)| session == pid && terminal != 0)
        .ok_or_else(|| Error::parse("/proc/PID/stat", &String::from_utf8_lossy(&text)))
}

/// Session and terminal number; the name before them may hold any character.
fn parse_stat(text: &str) -> Option<(i32, i32)> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut words = rest.split_whitespace().skip(3);
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_may_look_like_fields() {
        let text = "812 (a) R 1 2 (3)) S 1 812 810 34816 9 0\n";
        assert_eq!(super::parse_stat(text), Some((810, 34816)));
        assert_eq!(super::parse_stat("812"), None);
    }
}
