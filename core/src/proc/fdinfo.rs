//! `/proc/PID/fdinfo/N`: what the kernel tells about an open file description (proc(5)).

use super::{decimal, hex};
use crate::error::{Error, Result};
use crate::manifest::{EventFd, Interval};

/// What a file of `fdinfo` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// Offset.
    pub pos: u64,
    /// Status flags as `open` takes them; `O_CLOEXEC` is the descriptor's.
    pub flags: u32,
    /// Locks and leases taken through this description, as `/proc/locks` shows them.
    pub locks: Vec<String>,
    /// eventfd: its state.
    pub eventfd: Option<EventFd>,
    /// eventfd: its number in the kernel (since 5.2).
    pub eventfd_id: Option<u64>,
    /// eventfd: the kernel said whether it is a semaphore (since 6.5); else it counts as plain.
    pub semaphore_told: bool,
    /// timerfd: its state.
    pub timer: Option<TimerInfo>,
    /// signalfd: its mask.
    pub sigmask: Option<u64>,
    /// epoll: what it watches.
    pub watches: Vec<WatchInfo>,
}

/// State of a timerfd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimerInfo {
    /// `CLOCK_*`.
    pub clock: i32,
    /// Expirations not yet read.
    pub ticks: u64,
    /// Flags of the last `timerfd_settime`.
    pub settime_flags: u32,
    /// Time left and period.
    pub time: Interval,
}

/// One entry of an epoll set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WatchInfo {
    /// Descriptor number it was added with.
    pub fd: i32,
    /// `EPOLL*`.
    pub events: u32,
    /// User data.
    pub data: u64,
}

/// Parses the text of `/proc/PID/fdinfo/N`.
pub fn parse(text: &[u8]) -> Result<FdInfo> {
    let mut info = FdInfo::default();
    for line in text.split(|b| *b == b'\n') {
        take(&mut info, line).ok_or_else(|| {
            Error::parse("a line of /proc/PID/fdinfo", &String::from_utf8_lossy(line))
        })?;
    }
    Ok(info)
}

fn take(info: &mut FdInfo, line: &[u8]) -> Option<()> {
    let Some(colon) = line.iter().position(|b| *b == b':') else {
        return Some(());
    };
    let value = line[colon + 1..].trim_ascii();
    match &line[..colon] {
        b"pos" => info.pos = signed(value)? as u64,
        b"flags" => info.flags = octal(value)?,
        b"lock" => info.locks.push(String::from_utf8_lossy(value).into_owned()),
        b"eventfd-count" => info.eventfd.get_or_insert_default().count = hex(value)?.0,
        b"eventfd-id" => info.eventfd_id = Some(decimal(value)?.0),
        b"eventfd-semaphore" => {
            info.eventfd.get_or_insert_default().semaphore = decimal(value)?.0 != 0;
            info.semaphore_told = true;
        }
        b"clockid" => timer(info).clock = i32::try_from(decimal(value)?.0).ok()?,
        // Inotify and others have fields of these names too, but never both sorts in one file.
        b"ticks" => timer(info).ticks = decimal(value)?.0,
        b"settime flags" => timer(info).settime_flags = octal(value)?,
        b"it_value" => timer(info).time.value_ns = timespec(value)?,
        b"it_interval" => timer(info).time.interval_ns = timespec(value)?,
        b"sigmask" => info.sigmask = Some(hex(value)?.0),
        b"tfd" => info.watches.push(watch(value)?),
        _ => {}
    }
    Some(())
}

fn timer(info: &mut FdInfo) -> &mut TimerInfo {
    info.timer.get_or_insert_default()
}

fn signed(text: &[u8]) -> Option<i64> {
    match text.strip_prefix(b"-") {
        Some(rest) => 0i64.checked_sub_unsigned(decimal(rest)?.0),
        None => i64::try_from(decimal(text)?.0).ok(),
    }
}

fn octal(text: &[u8]) -> Option<u32> {
    u32::from_str_radix(std::str::from_utf8(text).ok()?, 8).ok()
}

/// `(seconds, nanoseconds)`, in nanoseconds.
fn timespec(text: &[u8]) -> Option<i64> {
    let (seconds, rest) = decimal(text.strip_prefix(b"(")?)?;
    let (nanos, _) = decimal(rest.strip_prefix(b",")?.trim_ascii_start())?;
    // Far deadlines (the maximum is common for "never") stay far ones.
    Some(i64::try_from(seconds).ok()?.saturating_mul(1_000_000_000).saturating_add_unsigned(nanos))
}

/// ` 5 events:  19 data:  7f..  pos:0 ino:61af sdev:7`; the number is decimal, the rest hexadecimal.
fn watch(text: &[u8]) -> Option<WatchInfo> {
    let (fd, rest) = decimal(text)?;
    let (events, rest) = hex(after(rest, b"events:")?)?;
    let (data, _) = hex(after(rest, b"data:")?)?;
    Some(WatchInfo { fd: i32::try_from(fd).ok()?, events: u32::try_from(events).ok()?, data })
}

fn after<'a>(text: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    Some(text.trim_ascii_start().strip_prefix(name)?.trim_ascii_start())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_sort() {
        let i = parse(b"pos:\t25346\nflags:\t02100001\nmnt_id:\t27\nlock:\t1: POSIX  ADVISORY  WRITE 8972 fe:00:1 0 EOF\n").unwrap();
        assert_eq!((i.pos, i.flags), (25346, 0o210_0001));
        assert_eq!(i.locks, ["1: POSIX  ADVISORY  WRITE 8972 fe:00:1 0 EOF"]);
        let i = parse(b"eventfd-count:               1f\neventfd-id: 1\neventfd-semaphore: 1\n")
            .unwrap();
        assert_eq!(i.eventfd, Some(EventFd { count: 31, semaphore: true }));
        assert_eq!(i.eventfd_id, Some(1));
        let i = parse(
            b"clockid: 1\nticks: 2\nsettime flags: 01\nit_value: (3, 4)\nit_interval: (1, 5)\n",
        )
        .unwrap();
        let time = Interval { value_ns: 3_000_000_004, interval_ns: 1_000_000_005 };
        assert_eq!(i.timer, Some(TimerInfo { clock: 1, ticks: 2, settime_flags: 1, time }));
        let i = parse(b"sigmask:\t0000000000000204\n").unwrap();
        assert_eq!(i.sigmask, Some(0x204));
        let i = parse(
            b"tfd:       13 events: 80000019 data:         7f0000000003  pos:0 ino:40e sdev:10\n",
        )
        .unwrap();
        let want = WatchInfo { fd: 13, events: 0x8000_0019, data: 0x7f00_0000_0003 };
        assert_eq!(i.watches, [want]);
    }

    #[test]
    fn never_is_far_away() {
        let i = parse(b"it_value: (9223372036854775807, 999999999)\n").unwrap();
        assert_eq!(i.timer.unwrap().time.value_ns, i64::MAX);
    }

    proptest! {
        #[test]
        fn any_text_does_no_harm(name in "(pos|flags|tfd|clockid|it_value|eventfd-count|sigmask|x):", value in proptest::collection::vec(any::<u8>(), 0..60)) {
            let mut text = name.into_bytes();
            text.extend(value);
            let _ = parse(&text);
        }

        #[test]
        fn near_misses_do_no_harm(text in "(tfd|it_value): ?[(]?[0-9a-f,() ]{0,30}(events:)?[0-9a-f ]{0,12}(data:)?[0-9a-f ]{0,20}") {
            let _ = parse(text.as_bytes());
        }
    }
}
