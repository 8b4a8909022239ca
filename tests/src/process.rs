//! What `/proc` says of a process, and holding on to processes that are not our children.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::far::{Far, Held};
use crate::wait;

/// A file of `/proc/PID`, lossily; empty if the process is gone or the file can't be read.
pub fn proc_file(pid: i32, name: &str) -> String {
    std::fs::read(format!("/proc/{pid}/{name}"))
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

/// The value of a line of `/proc/PID/status`, e.g. `State`.
pub fn status_field(pid: i32, field: &str) -> Option<String> {
    let status = proc_file(pid, "status");
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().to_owned())
}

/// Everything that helps to see why a process hangs.
pub fn describe(pid: i32) -> String {
    let mut text = String::new();
    let command = proc_file(pid, "cmdline").replace('\0', " ");
    let _ = writeln!(text, "--- process {pid}: {command}");
    for line in proc_file(pid, "status").lines() {
        let name = line.split(':').next().unwrap_or_default();
        if ["State", "PPid", "NSpid", "TracerPid", "Threads", "VmRSS", "SigPnd", "ShdPnd", "SigBlk"]
            .contains(&name)
        {
            let _ = writeln!(text, "    {line}");
        }
    }
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for task in tasks.take(12) {
        let tid = task.file_name().to_string_lossy().into_owned();
        let read =
            |name: &str| proc_file(pid, &format!("task/{tid}/{name}")).trim().replace('\n', " < ");
        let state = status_field_of(&proc_file(pid, &format!("task/{tid}/status")), "State");
        let _ = writeln!(
            text,
            "    thread {tid} {state}: ran and waited ns, times {} syscall {} wchan {} stack {}",
            read("schedstat"),
            read("syscall"),
            read("wchan"),
            read("stack")
        );
    }
    text
}

fn status_field_of(status: &str, field: &str) -> String {
    status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .unwrap_or("gone")
        .trim()
        .to_owned()
}

/// A hold on a process, child or not: the number can't come to mean another one.
pub struct Pidfd {
    fd: OwnedFd,
    /// The process, as this host sees it.
    pub pid: i32,
}

impl Pidfd {
    /// `None` if there is no such process.
    pub fn open(pid: i32) -> Option<Self> {
        // SAFETY: a plain system call with integer arguments.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        // SAFETY: a non-negative result is a new descriptor that nobody else owns.
        (fd >= 0).then(|| Self { fd: unsafe { OwnedFd::from_raw_fd(fd as i32) }, pid })
    }

    /// Sends a signal; a process that is gone is no error.
    pub fn signal(&self, signal: i32) {
        // SAFETY: a plain system call; the descriptor is open, a null siginfo is allowed.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.as_raw_fd(),
                signal,
                std::ptr::null::<u8>(),
                0,
            )
        };
    }

    /// Whether it has ended (it may still be a zombie).
    pub fn ended(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd that lives through the call.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
    }
}

enum Hold {
    Here(Pidfd),
    Far(Held),
}

/// A process at its new place.
pub struct Moved {
    process: Option<Hold>,
    /// Its PID as the host sees it.
    pub pid: i32,
}

impl Moved {
    /// A process known by the `dest_pid` of the `resumed` event. It may have ended already.
    pub fn new(pid: i32, far: Option<&Far>) -> Self {
        let process = match far {
            Some(far) => far.hold(pid).map(Hold::Far),
            None => Pidfd::open(pid).map(Hold::Here),
        };
        Self { process, pid }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        match &self.process {
            Some(Hold::Here(process)) => process.signal(signal),
            Some(Hold::Far(process)) => process.signal(signal),
            None => {}
        }
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        match &self.process {
            Some(Hold::Here(process)) => process.ended(),
            Some(Hold::Far(process)) => process.ended(),
            None => true,
        }
    }

    /// Waits until it has ended.
    pub fn wait_end(&self, limit: Duration) {
        wait::until(&format!("the moved process {} to end", self.pid), limit, || {
            self.ended().then_some(())
        });
    }
}

/// What a process consists of: to compare before and after.
#[derive(Debug, PartialEq, Eq)]
pub struct Inventory {
    /// Number of threads.
    pub threads: usize,
    /// Link of each descriptor; numbers of pipes and the like are left out, for they differ. So are files of `/proc`: programs
    /// open them for a moment to look at themselves.
    pub descriptors: BTreeMap<i32, String>,
    /// Address, protection and path of each mapping, neighbours that only differ by address merged.
    pub mappings: Vec<(u64, u64, String, String)>,
}

impl Inventory {
    /// Of a running process.
    pub fn of(pid: i32) -> Self {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        let mut descriptors = BTreeMap::new();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let link =
                std::fs::read_link(entry.path()).unwrap_or_default().to_string_lossy().into_owned();
            let link = link.split(":[").next().unwrap_or_default().to_owned();
            if link.starts_with("/proc/") {
                continue;
            }
            descriptors.insert(entry.file_name().to_string_lossy().parse().unwrap_or(-1), link);
        }
        Self { threads, descriptors, mappings: mappings(&proc_file(pid, "maps")) }
    }
}

/// The kernel's own (`[vvar]`, `[vdso]`) may differ between two kernels and are left out.
fn mappings(maps: &str) -> Vec<(u64, u64, String, String)> {
    let mut merged: Vec<(u64, u64, String, String)> = Vec::new();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some(protection)) = (fields.next(), fields.next()) else { continue };
        let path = fields.skip(3).collect::<Vec<_>>().join(" ");
        if path.starts_with("[v") {
            continue;
        }
        let Some((start, end)) = range.split_once('-') else { continue };
        let parse = |text| u64::from_str_radix(text, 16).expect("an address in maps");
        let (start, end) = (parse(start), parse(end));
        match merged.last_mut() {
            Some(last) if last.1 == start && last.2 == protection && last.3 == path => last.1 = end,
            _ => merged.push((start, end, protection.to_owned(), path)),
        }
    }
    merged
}
