//! Registers memory of the frozen copy by remote syscalls of one of its threads.
//!
//! To be used by one thread of ours, after the commit: the copy never runs again, so its registers and its
//! descriptor table are ours to use. The thread that works is traced meanwhile; when its tracer dies, it ends
//! its table and stops as the others do.

use super::abi::{self, Region};
use crate::error::{Error, Result};
use crate::freeze::Frozen;
use crate::inject::{Ran, SourceScratch};
use crate::program::{Arg, Program};
use crate::sys::pidfd::PidFd;
use crate::sys::spawn::send_descriptors;
use crate::sys::task;
use nix::errno::Errno;
use std::fs;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// For a thread of a stopped process to stop for us.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a message header for one descriptor: `CMSG_SPACE(sizeof(int))`.
const CONTROL_LEN: usize = 24;
const _: () = assert!(size_of::<libc::msghdr>() == 56 && size_of::<libc::cmsghdr>() == 16);

/// Where regions belong.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Kernel's number of the protection domain.
    pub pd_handle: u32,
    /// Kernel's number of the adapter's driver (`enum rdma_driver_id`).
    pub driver_id: u32,
}

/// A thread of the frozen copy that holds the adapter's device open.
#[derive(Debug)]
pub struct Registrar<'a> {
    scratch: &'a SourceScratch,
    frozen: Frozen,
    target: Target,
    device: u64,
}

impl<'a> Registrar<'a> {
    /// Hands `device`, the open file that the protection domain belongs to, to the frozen process.
    pub fn open(
        scratch: &'a SourceScratch,
        device: BorrowedFd<'_>,
        target: Target,
    ) -> Result<Self> {
        let frozen = Frozen::freeze_one(scratch.pid(), STOP_TIMEOUT)?;
        allow_pinning(scratch.pid());
        let left = left_open(scratch.pid());
        let (ran, (pair, at)) = run(scratch, &frozen, |p| {
            // A session that was killed left it open, and so what it registered pinned.
            for fd in &left {
                p.may("close a device", libc::SYS_close, [(*fd).into()]);
            }
            let at = p.words(&[0]);
            let kind = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC).into();
            let args = [libc::AF_UNIX.into(), kind, 0.into(), at.into()];
            (p.may("socketpair", libc::SYS_socketpair, args), at)
        })?;
        Program::result(&ran.entries, pair)
            .map_err(|e| Error::sys("make a socket in the frozen process", e))?;
        let ends = word(&ran, at);
        let (theirs, ours) = (ends & 0xffff_ffff, ends >> 32);
        let handed = PidFd::open(scratch.pid())
            .and_then(|process| process.get_fd(ours as i32))
            .and_then(|socket| {
                send_descriptors(&UnixStream::from(socket), b"d", &[device])
                    .map_err(|e| Error::sys("hand a device to the frozen process", e))
            });
        let device = receive(scratch, &frozen, theirs, ours);
        handed?;
        Ok(Self { device: device?, scratch, frozen, target })
    }

    /// Registers ranges, each whole or not at all. What can't be registered yields why.
    pub fn register(
        &self,
        ranges: &[Range<u64>],
    ) -> Result<Vec<std::result::Result<Region, Errno>>> {
        let (ran, calls) = run(self.scratch, &self.frozen, |p| {
            let call = |range| {
                let at = p.data_end().next_multiple_of(8);
                let Target { pd_handle, driver_id } = self.target;
                let at = p.data(&abi::request(at, range, pd_handle, driver_id));
                let args: [Arg; 3] = [self.device.into(), abi::RDMA_VERBS_IOCTL.into(), at.into()];
                (p.may("register memory", libc::SYS_ioctl, args), at)
            };
            ranges.iter().map(call).collect::<Vec<_>>()
        })?;
        let base = ran.program.data_base();
        Ok(calls
            .iter()
            .zip(ranges)
            .map(|((call, at), range)| {
                Program::result(&ran.entries, *call)?;
                Ok(abi::response(&ran.data[(at - base) as usize..], range))
            })
            .collect())
    }

    /// Closes the device there. Regions stay until ours is closed.
    pub fn close(self) -> Result<()> {
        run(self.scratch, &self.frozen, |p| {
            p.may("close the device", libc::SYS_close, [self.device.into()])
        })?;
        self.frozen.thaw()
    }
}

/// Receives the device at one end of a pair of sockets, and closes both.
fn receive(scratch: &SourceScratch, frozen: &Frozen, theirs: u64, ours: u64) -> Result<u64> {
    let (ran, (call, control)) = run(scratch, frozen, |p| {
        let byte = p.words(&[0]);
        let vector = p.words(&[byte, 1]);
        let control = p.data(&[0; CONTROL_LEN]);
        let header = p.words(&[0, 0, vector, 1, control, CONTROL_LEN as u64, 0]);
        let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
        let args: [Arg; 3] = [theirs.into(), header.into(), flags.into()];
        let call = p.may("receive the device", libc::SYS_recvmsg, args);
        p.may("close a socket", libc::SYS_close, [theirs.into()]);
        p.may("close a socket", libc::SYS_close, [ours.into()]);
        (call, control)
    })?;
    Program::result(&ran.entries, call)
        .map_err(|e| Error::sys("receive a device in the frozen process", e))?;
    // A message without a descriptor has no control data: the kernel had no room for it in the table.
    if word(&ran, control) < 20 {
        return Err(Error::sys("receive a device in the frozen process", Errno::EMFILE));
    }
    Ok(word(&ran, control + 16) & 0xffff_ffff)
}

/// Runs a table on the one thread; yields what `build` did beside it.
fn run<T>(
    scratch: &SourceScratch,
    frozen: &Frozen,
    build: impl FnOnce(&mut Program) -> T,
) -> Result<(Ran, T)> {
    let (mut build, mut built) = (Some(build), None);
    let mut ran = scratch.run(frozen, &mut |_, program| {
        built = build.take().map(|build| build(program));
    })?;
    ran.pop().zip(built).ok_or(Error::Gone { pid: frozen.pid() })
}

fn word(ran: &Ran, address: u64) -> u64 {
    let at = (address - ran.program.data_base()) as usize;
    u64::from_le_bytes(ran.data[at..at + 8].try_into().expect("eight bytes"))
}

/// Pinned pages count against the frozen process's limit on locked memory. Where it may not be raised, what
/// goes beyond it is not registered.
fn allow_pinning(pid: i32) {
    let all = libc::RLIM_INFINITY;
    if let Err(e) = task::set_memlock_limit(pid, all, all) {
        tracing::debug!("the limit on locked memory of process {pid} stays: {e}");
    }
}

/// Adapter devices in the process's table. The program had none: preflight refuses them.
fn left_open(pid: i32) -> Vec<u64> {
    let Ok(dir) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    dir.filter_map(|entry| {
        let entry = entry.ok()?;
        let target = fs::read_link(entry.path()).ok()?;
        let device = target.to_str()?.starts_with("/dev/infiniband/uverbs");
        device.then(|| entry.file_name().to_str()?.parse().ok()).flatten()
    })
    .collect()
}
