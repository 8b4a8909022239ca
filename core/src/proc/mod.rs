//! What `/proc` tells about a process, as typed values.
//!
//! Parsers take bytes and never panic: the text comes from the kernel, but names in it come from
//! anyone who can name a file or a thread.

pub mod claim;
pub mod classify;
pub mod cpu;
pub mod fdinfo;
pub mod holders;
pub mod limits;
pub mod maps;
pub mod smaps;
pub mod status;

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{self, Read};

/// Reads a whole file below `/proc/PID`. A process that is gone is [`Error::Gone`].
///
/// The buffer starts at 64 KiB and grows: large reads matter, since each read of a file of many
/// lines makes the kernel look its place up again.
pub fn read(pid: i32, name: &str) -> Result<Vec<u8>> {
    let path = format!("/proc/{pid}/{name}");
    read_path(&path).map_err(|e| from_io(pid, &path, e))
}

fn read_path(path: &str) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut text = vec![0; 64 << 10];
    let mut len = 0;
    loop {
        if len == text.len() {
            text.resize(len * 2, 0);
        }
        match file.read(&mut text[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    text.truncate(len);
    Ok(text)
}

/// All processes of this PID namespace.
pub fn pids() -> Result<Vec<i32>> {
    numbers("/proc").map_err(|e| Error::io("read /proc", e))
}

/// Thread ids of a process, ascending.
pub fn threads(pid: i32) -> Result<Vec<i32>> {
    let path = format!("/proc/{pid}/task");
    numbers(&path).map_err(|e| from_io(pid, &path, e))
}

/// The entries of a directory whose names are numbers, ascending.
pub(crate) fn numbers(path: &str) -> io::Result<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(path)? {
        numbers.extend(entry?.file_name().to_str().and_then(|n| n.parse::<i32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Tells a process that has ended (`ENOENT` when it is reaped, `ESRCH` while it is being) from other
/// failures.
pub(crate) fn from_io(pid: i32, path: &str, e: io::Error) -> Error {
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => Error::Gone { pid },
        _ => Error::io(format!("read {path}"), e),
    }
}

/// A hexadecimal number at the start of `text`, and what follows it.
pub(crate) fn hex(text: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    let mut len = 0;
    while let Some(digit) = text.get(len).and_then(|b| (*b as char).to_digit(16)) {
        value = value.checked_mul(16)? | u64::from(digit);
        len += 1;
    }
    (len > 0).then(|| (value, &text[len..]))
}

/// A decimal number at the start of `text`, and what follows it.
pub(crate) fn decimal(text: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0u64;
    let mut len = 0;
    while let Some(b) = text.get(len).filter(|b| b.is_ascii_digit()) {
        value = value.checked_mul(10)?.checked_add(u64::from(b - b'0'))?;
        len += 1;
    }
    (len > 0).then(|| (value, &text[len..]))
}
