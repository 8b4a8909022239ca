//! What an open file is, decided by its link and type; what can't be moved is named here.

use super::{Capture, Open, clock, eventfd, pipes};
use crate::error::Error;
use crate::manifest::{Epoll, EpollWatch, FileKind, TimerFd};
use crate::preflight::Blocker;
use crate::proc::fdinfo;
use crate::proc::holders::Object;
use crate::sys::files as sys;
use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

const TFD_TIMER_ABSTIME: u32 = 1;

/// Devices that are the same everywhere: null, zero, full, random, urandom.
const HARMLESS: [u64; 5] = [
    libc::makedev(1, 3),
    libc::makedev(1, 5),
    libc::makedev(1, 7),
    libc::makedev(1, 8),
    libc::makedev(1, 9),
];

/// True for the device numbers of terminals: virtual consoles, serial lines, `/dev/tty`, pty pairs.
pub(super) fn is_terminal(rdev: u64) -> bool {
    matches!(libc::major(rdev), 2..=5 | 128..=143 | 204 | 229)
}

/// What the kernel calls its anonymous inodes, and we them.
const ANONYMOUS: [(&str, &str); 11] = [
    ("inotify", "an inotify instance"),
    ("[fanotify]", "a fanotify group"),
    ("[pidfd]", "a pidfd"),
    ("[userfaultfd]", "a userfaultfd"),
    ("[io_uring]", "an io_uring"),
    ("[perf_event]", "a perf event"),
    ("bpf-map", "a BPF map"),
    ("bpf-prog", "a BPF program"),
    ("bpf_link", "a BPF link"),
    ("[landlock-ruleset]", "a Landlock ruleset"),
    ("seccomp notify", "a seccomp listener"),
];

const CLOSE: &str = "let the program close it; it can't be moved";

/// Timers that are due have expired after this, unless a CPU is kept from it for long.
const DUE_MAX: Duration = Duration::from_millis(5);
const DUE_PAUSE: Duration = Duration::from_micros(50);

/// Time left of a periodic timer. None is left of one that is due, whose interrupt has yet to come, and of one that is disarmed:
/// the first goes on a moment later, by `until`.
fn time_left_ns(timer: BorrowedFd<'_>, until: Instant) -> nix::Result<i64> {
    let mut left = sys::timer_left(timer)?;
    let mut last = false;
    // Once more even when time is up: it may be due only since then.
    while left == 0 && !last {
        last = Instant::now() >= until;
        std::thread::sleep(DUE_PAUSE);
        left = sys::timer_left(timer)?;
    }
    Ok(left)
}

impl Capture<'_> {
    /// What `one` refers to, or why it can't be moved.
    pub(super) fn kind(&mut self, one: &Open) -> Result<FileKind, Blocker> {
        if let Some(name) = one.link.strip_prefix(b"anon_inode:") {
            return self.anonymous(one, name);
        }
        if one.is_path_only() && one.link.first() == Some(&b'/') {
            let file = self.by_path(one)?;
            return Ok(match one.type_bits() {
                libc::S_IFDIR => FileKind::Directory(file),
                _ => FileKind::Regular(file),
            });
        }
        match one.type_bits() {
            libc::S_IFREG if super::memfd::is_memfd(&one.link) => {
                self.memfd(one).map(FileKind::Memfd)
            }
            _ if one.link.starts_with(b"pidfd:") => Err(one.blocker("a pidfd", CLOSE)),
            libc::S_IFREG if one.link == b"/secretmem (deleted)" => {
                Err(one.blocker("secret memory (memfd_secret)", CLOSE))
            }
            libc::S_IFREG if one.link.first() != Some(&b'/') => {
                Err(one.blocker(format!("a kernel object ({})", one.link_text()), CLOSE))
            }
            libc::S_IFREG => self.by_path(one).map(FileKind::Regular),
            libc::S_IFDIR => self.by_path(one).map(FileKind::Directory),
            libc::S_IFCHR if HARMLESS.contains(&one.stat.st_rdev) => {
                self.by_path(one).map(FileKind::Device)
            }
            libc::S_IFIFO if pipes::is_pipe(one) => self.pipe(one).map(FileKind::Pipe),
            _ => Err(refuse(one)),
        }
    }

    fn anonymous(&mut self, one: &Open, name: &[u8]) -> Result<FileKind, Blocker> {
        let info = &one.info;
        let silent = || one.blocker("the kernel does not tell its state", "use a newer kernel");
        match name {
            b"[eventfd]" => self.event(one),
            b"[timerfd]" => self.timer(one),
            b"[signalfd]" => info.sigmask.map(FileKind::SignalFd).ok_or_else(silent),
            b"[eventpoll]" => self.epoll(one).map(FileKind::Epoll),
            _ => {
                let name = String::from_utf8_lossy(name);
                let what = ANONYMOUS.iter().find(|(link, _)| *link == name);
                let other = format!("a kernel object ({name})");
                Err(one.blocker(what.map_or(other.as_str(), |(_, what)| *what), CLOSE))
            }
        }
    }

    fn event(&mut self, one: &Open) -> Result<FileKind, Blocker> {
        let silent = || one.blocker("the kernel does not tell its state", "use a newer kernel");
        let mut event = one.info.eventfd.clone().ok_or_else(silent)?;
        if let Some(id) = one.info.eventfd_id
            && let Some(other) = self.held_elsewhere(Object::Event { id })
        {
            let remedy = "let one of the two close it";
            return Err(one.blocker(format!("an eventfd shared with process {other}"), remedy));
        }
        // Asking changes it for a moment: not while the process runs.
        if !one.info.semaphore_told && self.options.content.is_some() {
            let dup = self.duplicate(one)?;
            event.semaphore = eventfd::is_semaphore(dup.as_fd(), event.count).map_err(|e| {
                Blocker::unknown(one.name(), &Error::sys("ask whether it is a semaphore", e))
            })?;
        }
        Ok(FileKind::EventFd(event))
    }

    fn timer(&mut self, one: &Open) -> Result<FileKind, Blocker> {
        let unknown = |e| Blocker::unknown(one.name(), &e);
        let silent = || one.blocker("the kernel does not tell its state", "use a newer kernel");
        let mut info = one.info.timer.ok_or_else(silent)?;
        if info.time.value_ns == 0 && info.time.interval_ns != 0 {
            // A periodic timer rests between its expiration and the next look at it. Asking for the
            // time left sets it going again, as the read that is to come would, and counts the ticks.
            let dup = self.duplicate(one)?;
            let until = *self.due_until.get_or_insert_with(|| Instant::now() + DUE_MAX);
            let left = time_left_ns(dup.as_fd(), until)
                .map_err(|e| unknown(Error::sys("ask for the time left", e)))?;
            let path = format!("fdinfo/{}", one.fd);
            let again = crate::proc::read(self.pid, &path).and_then(|text| fdinfo::parse(&text));
            info = again.map_err(unknown)?.timer.ok_or_else(silent)?;
            info.time.value_ns = left;
        }
        let absolute = info.settime_flags & TFD_TIMER_ABSTIME != 0 && info.time.value_ns != 0;
        let deadline_ns = if absolute {
            let now = clock::now_ns(self.pid, info.clock).map_err(unknown)?;
            now.saturating_add(info.time.value_ns)
        } else {
            0
        };
        Ok(FileKind::TimerFd(TimerFd {
            clock: info.clock,
            ticks: info.ticks,
            settime_flags: info.settime_flags,
            time: info.time,
            deadline_ns,
        }))
    }

    /// An epoll set whose entries all refer to what their descriptors refer to now. Any other entry
    /// could not be added again.
    fn epoll(&self, one: &Open) -> Result<Epoll, Blocker> {
        let mut seen = HashSet::new();
        let mut watches = Vec::with_capacity(one.info.watches.len());
        for watch in &one.info.watches {
            let current = sys::watches_current(self.pid, one.fd, watch.fd);
            if !seen.insert(watch.fd) || !matches!(current, Ok(true)) {
                return Err(one.blocker(
                    format!("an epoll set that watches a file by fd {}, since closed", watch.fd),
                    "let the program remove descriptors from epoll sets before it closes them",
                ));
            }
            watches.push(EpollWatch { fd: watch.fd, events: watch.events, data: watch.data });
        }
        // The kernel lists entries in the order of its own addresses.
        watches.sort_unstable_by_key(|w| w.fd);
        Ok(Epoll { watches })
    }
}

fn refuse(one: &Open) -> Blocker {
    let stdio = (0..=2).contains(&one.fd);
    let remedy = |other: &'static str| {
        if stdio { "redirect it with --stdio null or --stdio FILE" } else { other }
    };
    let link = one.link_text();
    match one.type_bits() {
        libc::S_IFSOCK => {
            one.blocker(format!("a socket ({link})"), remedy("let the program close it"))
        }
        libc::S_IFIFO => {
            one.blocker(format!("{link} is a FIFO"), remedy("use a pipe inside the program"))
        }
        libc::S_IFCHR if is_terminal(one.stat.st_rdev) => one.blocker(
            format!("{link} is a terminal"),
            remedy("start the program without a terminal, or with --stdio"),
        ),
        libc::S_IFCHR | libc::S_IFBLK => one.blocker(format!("{link} is a device"), CLOSE),
        _ => one.blocker(format!("a file of an unknown sort ({link})"), CLOSE),
    }
}
