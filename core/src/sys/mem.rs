//! Reading and writing the memory of another process.

use crate::error::{Error, Result};
use libc::pid_t;
use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Reads `out.len()` bytes at `address`; short when the range ends in unreadable memory.
///
/// `process_vm_readv` is the fastest way but respects page protections; what it refuses
/// (`PROT_NONE`) [`ProcMem`] still reads.
pub fn read_process(pid: pid_t, address: u64, out: &mut [u8]) -> nix::Result<usize> {
    let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: out.len() };
    // SAFETY: `local` describes the live buffer `out`; `remote` is an address in the other process.
    let got = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    Errno::result(got).map(|n| n as usize)
}

/// Ranges that one call of [`read_process_runs`] can read (the kernel takes up to 1024).
pub const RUNS_PER_READ: usize = 64;

/// Reads several ranges, one behind the other, into `out`, which must have the length of them all;
/// short when one of them can't be read. At most [`RUNS_PER_READ`] ranges.
pub fn read_process_runs(pid: pid_t, runs: &[Range<u64>], out: &mut [u8]) -> nix::Result<usize> {
    let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
    let mut remote = [none; RUNS_PER_READ];
    let Some(used) = remote.get_mut(..runs.len()) else { return Err(Errno::EINVAL) };
    for (one, run) in used.iter_mut().zip(runs) {
        one.iov_base = run.start as *mut libc::c_void;
        one.iov_len = (run.end - run.start) as usize;
    }
    let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
    // SAFETY: `local` describes the live buffer `out`, beyond which the kernel does not write; `remote`
    // holds `runs.len()` addresses in the other process.
    let got = unsafe {
        libc::process_vm_readv(
            pid,
            &raw const local,
            1,
            remote.as_ptr(),
            runs.len() as libc::c_ulong,
            0,
        )
    };
    Errno::result(got).map(|n| n as usize)
}

/// `/proc/PID/mem`: reads and writes whatever the page protections say.
#[derive(Debug)]
pub struct ProcMem {
    pid: pid_t,
    file: File,
}

impl ProcMem {
    /// Opens the memory of a process; the handle keeps working while its address space lives.
    pub fn open(pid: pid_t) -> Result<Self> {
        let path = format!("/proc/{pid}/mem");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|e| Error::io(format!("open {path}"), e))?;
        Ok(Self { pid, file })
    }

    /// Fills `out` from `address`.
    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(out, address).map_err(|e| {
            Error::io(
                format!("read {} bytes at {address:#x} of process {}", out.len(), self.pid),
                e,
            )
        })
    }

    /// Reads what can be read at `address` in one go; returns how many bytes that is.
    pub fn read_some(&self, address: u64, out: &mut [u8]) -> usize {
        self.file.read_at(out, address).unwrap_or(0)
    }

    /// Writes `bytes` at `address`, also to read-only private mappings (they are copied first).
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, address).map_err(|e| {
            Error::io(
                format!("write {} bytes at {address:#x} of process {}", bytes.len(), self.pid),
                e,
            )
        })
    }
}
