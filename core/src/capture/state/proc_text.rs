//! The texts of `/proc` that carry process state, parsed.

use crate::error::{Error, Result};
use crate::manifest::{MmFields, PosixTimer, Rlimit};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::str::FromStr;

/// No text of `/proc` read here is longer (65,536 groups of eleven characters fit).
const TEXT_LEN_MAX: u64 = 1 << 20;

/// Reads a file of `/proc/PID`, without the fstat that `std::fs::read` adds.
pub fn read(pid: i32, path: &str) -> Result<Vec<u8>> {
    let mut text = Vec::with_capacity(4096);
    File::open(path)
        .and_then(|f| f.take(TEXT_LEN_MAX).read_to_end(&mut text))
        .map_err(|e| gone_or(pid, path, e))?;
    Ok(text)
}

/// "No such process" as [`Error::Gone`], all else as it is.
pub(super) fn gone_or(pid: i32, path: &str, e: std::io::Error) -> Error {
    let gone = e.raw_os_error() == Some(libc::ESRCH) || e.kind() == ErrorKind::NotFound;
    if gone { Error::Gone { pid } } else { Error::io(path, e) }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn number<T: FromStr>(what: &'static str, word: Option<&str>) -> Result<T> {
    let word = word.unwrap_or("").trim();
    word.parse().map_err(|_| Error::parse(what, word))
}

fn hex(what: &'static str, word: &str) -> Result<u64> {
    let word = word.trim();
    u64::from_str_radix(word, 16).map_err(|_| Error::parse(what, word))
}

/// A file that holds one decimal number.
pub fn decimal(what: &'static str, bytes: &[u8]) -> Result<i64> {
    number(what, Some(&text(bytes)))
}

/// A file that holds one hexadecimal number.
pub fn hexadecimal(what: &'static str, bytes: &[u8]) -> Result<u64> {
    hex(what, &text(bytes))
}

/// `/proc/PID/task/TID/status`, as far as it is state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Command name.
    pub comm: Vec<u8>,
    /// File mode creation mask.
    pub umask: u32,
    /// The thread's id in every PID namespace it is in, outermost first.
    pub ns_tids: Vec<i32>,
    /// Process group in the innermost namespace; 0 when not visible there.
    pub pgid: i32,
    /// Session in the innermost namespace; 0 when not visible there.
    pub sid: i32,
    /// Real, effective, saved, file-system uid.
    pub uids: Vec<u32>,
    /// Real, effective, saved, file-system gid.
    pub gids: Vec<u32>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Pending signals of the thread, and of the process.
    pub pending: [u64; 2],
    /// Inheritable, permitted, effective, bounding, ambient capabilities.
    pub caps: Vec<u64>,
    /// `no_new_privs`.
    pub no_new_privs: bool,
    /// Seccomp mode; 0 is none.
    pub seccomp: u32,
    /// Times the thread gave up its CPU by itself.
    pub voluntary_switches: u64,
}

impl Status {
    /// Parses the text of the file.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        const WHAT: &str = "/proc/PID/status";
        let mut s = Status { caps: vec![0; 5], ..Status::default() };
        for line in bytes.split(|b| *b == b'\n') {
            let Some(colon) = line.iter().position(|b| *b == b':') else { continue };
            let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii_start());
            if name == b"Name" {
                s.comm = unescape(value);
                continue;
            }
            let v = std::str::from_utf8(value).map_err(|_| Error::parse(WHAT, &text(line)))?;
            match name {
                b"Umask" => {
                    s.umask = u32::from_str_radix(v, 8).map_err(|_| Error::parse(WHAT, v))?;
                }
                b"NSpid" => s.ns_tids = numbers(WHAT, v)?,
                b"NSpgid" => s.pgid = number(WHAT, v.split_whitespace().last())?,
                b"NSsid" => s.sid = number(WHAT, v.split_whitespace().last())?,
                b"Uid" => s.uids = numbers(WHAT, v)?,
                b"Gid" => s.gids = numbers(WHAT, v)?,
                b"Groups" => s.groups = numbers(WHAT, v)?,
                b"SigPnd" => s.pending[0] = hex(WHAT, v)?,
                b"ShdPnd" => s.pending[1] = hex(WHAT, v)?,
                b"CapInh" => s.caps[0] = hex(WHAT, v)?,
                b"CapPrm" => s.caps[1] = hex(WHAT, v)?,
                b"CapEff" => s.caps[2] = hex(WHAT, v)?,
                b"CapBnd" => s.caps[3] = hex(WHAT, v)?,
                b"CapAmb" => s.caps[4] = hex(WHAT, v)?,
                b"NoNewPrivs" => s.no_new_privs = v == "1",
                b"Seccomp" => s.seccomp = number(WHAT, Some(v))?,
                b"voluntary_ctxt_switches" => s.voluntary_switches = number(WHAT, Some(v))?,
                _ => {}
            }
        }
        let complete = !s.ns_tids.is_empty() && s.uids.len() == 4 && s.gids.len() == 4;
        complete.then_some(s).ok_or_else(|| Error::parse(WHAT, &text(bytes)))
    }

    /// The thread's id in its innermost PID namespace.
    pub fn inner_tid(&self) -> i32 {
        self.ns_tids.last().copied().unwrap_or(0)
    }
}

fn numbers<T: FromStr>(what: &'static str, v: &str) -> Result<Vec<T>> {
    v.split_whitespace().map(|w| number(what, Some(w))).collect()
}

/// Undoes the kernel's escapes in names: `\n` and `\\` only (`proc_task_name`).
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name.iter();
    while let Some(&b) = rest.next() {
        match (b, rest.as_slice().first()) {
            (b'\\', Some(b'n')) => out.push(b'\n'),
            (b'\\', Some(b'\\')) => out.push(b'\\'),
            _ => {
                out.push(b);
                continue;
            }
        }
        rest.next();
    }
    out
}

/// The addresses in `/proc/PID/stat`; the break is not among them.
pub fn mm_fields(stat: &[u8]) -> Result<MmFields> {
    const WHAT: &str = "/proc/PID/stat";
    let stat = text(stat);
    // The command name, second, may hold anything; the third field follows the last parenthesis.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let field = |nr: usize| number(WHAT, fields.get(nr - 3).copied());
    Ok(MmFields {
        start_code: field(26)?,
        end_code: field(27)?,
        start_stack: field(28)?,
        start_data: field(45)?,
        end_data: field(46)?,
        start_brk: field(47)?,
        brk: 0,
        arg_start: field(48)?,
        arg_end: field(49)?,
        env_start: field(50)?,
        env_end: field(51)?,
    })
}

/// `/proc/PID/limits`: readable also where prlimit(2) asks for `CAP_SYS_RESOURCE`.
pub fn limits(bytes: &[u8]) -> Result<Vec<Rlimit>> {
    const WHAT: &str = "/proc/PID/limits";
    const NAME_LEN: usize = 26;
    let one = |word: Option<&str>| match word {
        Some("unlimited") => Ok(u64::MAX),
        other => number(WHAT, other),
    };
    let line = |l: &str| {
        let mut words = l.get(NAME_LEN..).unwrap_or("").split_whitespace();
        Ok(Rlimit { soft: one(words.next())?, hard: one(words.next())? })
    };
    text(bytes).lines().skip(1).map(line).collect()
}

/// `/proc/PID/timers`. Thread ids are those of the reader's `/proc`; times are left at zero.
pub fn timers(bytes: &[u8]) -> Result<Vec<PosixTimer>> {
    const WHAT: &str = "/proc/PID/timers";
    let mut all: Vec<PosixTimer> = Vec::new();
    for line in text(bytes).lines() {
        let (name, value) = line.split_once(": ").ok_or_else(|| Error::parse(WHAT, line))?;
        if name == "ID" {
            all.push(PosixTimer { id: number(WHAT, Some(value))?, ..PosixTimer::default() });
            continue;
        }
        let timer = all.last_mut().ok_or_else(|| Error::parse(WHAT, line))?;
        let bad = || Error::parse(WHAT, line);
        match name {
            "signal" => {
                let (signal, data) = value.split_once('/').ok_or_else(bad)?;
                timer.signal = number(WHAT, Some(signal))?;
                timer.value = hex(WHAT, data.trim_start_matches("0x"))?;
            }
            "notify" => {
                let (kind, target) = value.split_once('/').ok_or_else(bad)?;
                let (what, id) = target.split_once('.').ok_or_else(bad)?;
                timer.notify = match kind {
                    "signal" => libc::SIGEV_SIGNAL,
                    "none" => libc::SIGEV_NONE,
                    "thread" => libc::SIGEV_THREAD,
                    _ => return Err(bad()),
                };
                if what == "tid" {
                    timer.notify |= libc::SIGEV_THREAD_ID;
                    timer.tid = number(WHAT, Some(id))?;
                }
            }
            "ClockID" => timer.clock = number(WHAT, Some(value))?,
            _ => {}
        }
    }
    all.sort_by_key(|t| t.id);
    Ok(all)
}

/// Offset of `CLOCK_MONOTONIC` in `/proc/PID/timens_offsets`, in nanoseconds.
pub fn monotonic_offset_ns(bytes: &[u8]) -> Result<i64> {
    const WHAT: &str = "/proc/PID/timens_offsets";
    let text = text(bytes);
    let line = text.lines().find(|l| l.starts_with("monotonic"));
    let mut words = line.unwrap_or("").split_whitespace().skip(1);
    let secs: i64 = number(WHAT, words.next())?;
    let nanos: i64 = number(WHAT, words.next())?;
    let total = secs.checked_mul(1_000_000_000).and_then(|s| s.checked_add(nanos));
    total.ok_or_else(|| Error::parse(WHAT, &text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_parsed() {
        let s = Status::parse(
            b"Name:\ta\\n:\\\\b\nUmask:\t0027\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \n\
              NSpid:\t100\t7\nNSpgid:\t100\t0\nNSsid:\t90\t0\nSigPnd:\t0000000000000200\n\
              CapBnd:\t1\nNoNewPrivs:\t1\nvoluntary_ctxt_switches:\t33\n",
        )
        .expect("parse");
        assert_eq!((s.comm.as_slice(), s.umask, s.inner_tid()), (&b"a\n:\\b"[..], 0o27, 7));
        assert_eq!((s.uids, s.gids, s.groups), (vec![1, 2, 3, 4], vec![5, 6, 7, 8], vec![9, 10]));
        assert_eq!((s.pending, s.pgid, s.caps[3]), ([0x200, 0], 0, 1));
        assert!(s.no_new_privs && s.voluntary_switches == 33);
        assert!(Status::parse(b"Name:\tx\n").is_err());
        assert!(Status::parse(b"Uid:\t1\t2\t3\tx\n").is_err());
    }

    #[test]
    fn own_texts_are_parsed() {
        let read = |name: &str| read(0, &format!("/proc/self/{name}")).expect("read");
        let mm = mm_fields(&read("stat")).expect("stat");
        assert!(mm.start_code < mm.end_code && mm.arg_start < mm.arg_end);
        assert_eq!(limits(&read("limits")).expect("limits").len(), 16);
        assert!(monotonic_offset_ns(&read("timens_offsets")).is_ok());
        assert!(hexadecimal("personality", &read("personality")).is_ok());
    }

    #[test]
    fn timers_are_parsed() {
        let timers = timers(
            b"ID: 3\nsignal: 14/0000000000000000\nnotify: none/pid.55\nClockID: -6\n\
              ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/tid.2634\nClockID: 0\n",
        )
        .expect("parse");
        assert_eq!((timers[0].id, timers[0].notify, timers[0].tid), (1, 4, 2634));
        assert_eq!((timers[0].signal, timers[0].value), (60, 0x7fff_86e4_52a8));
        assert_eq!((timers[1].clock, timers[1].notify, timers[1].tid), (-6, libc::SIGEV_NONE, 0));
        assert!(super::timers(b"signal: 1/2\n").is_err());
    }
}
