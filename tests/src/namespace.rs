//! A host's network: an unnamed network namespace, gone with the last process and descriptor that uses it.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};

use crate::process::Pidfd;
use crate::program::close_descriptors;

/// A network namespace with one address others reach it at.
pub struct Namespace {
    fd: OwnedFd,
    inode: u64,
    /// Where this host is reached.
    pub address: Ipv4Addr,
}

impl Namespace {
    fn new(address: Ipv4Addr) -> Self {
        // A namespace belongs to a thread: a thread of its own makes it, and the descriptor keeps it.
        let file = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (are you root?)");
            File::open("/proc/thread-self/ns/net").expect("the namespace's descriptor")
        })
        .join()
        .expect("the thread that makes a namespace");
        let inode = file.metadata().expect("the namespace's inode").ino();
        let namespace = Self { fd: file.into(), inode, address };
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    /// A single host, reached over its loopback.
    pub fn alone() -> Self {
        Self::new(Ipv4Addr::LOCALHOST)
    }

    /// Two hosts joined by a virtual cable.
    pub fn joined() -> (Self, Self) {
        let left = Self::new(Ipv4Addr::new(10, 77, 0, 1));
        let right = Self::new(Ipv4Addr::new(10, 77, 0, 2));
        // The path goes through this process, for `ip` itself does not inherit the descriptor.
        let far = format!("/proc/{}/fd/{}", std::process::id(), right.fd.as_raw_fd());
        left.ip(&["link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", &far]);
        for host in [&left, &right] {
            host.ip(&["address", "add", &format!("{}/24", host.address), "dev", "veth0"]);
            host.ip(&["link", "set", "veth0", "up"]);
        }
        (left, right)
    }

    /// A command that will run on this host.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let fd = self.fd.as_raw_fd();
        // SAFETY: setns and close_range are plain system calls, safe between fork and exec; the descriptor outlives the spawn, for
        // the command is spawned while `self` is borrowed by the hosts that own it.
        unsafe {
            command.pre_exec(move || {
                let fd = std::os::fd::BorrowedFd::borrow_raw(fd);
                setns(fd, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
                close_descriptors()
            });
        }
        command
    }

    /// Runs `work` on a thread that is on this host's network.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.fd, CloneFlags::CLONE_NEWNET).expect("entering a namespace");
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread that lives on this host's network.
    pub fn thread(&self, work: impl FnOnce() + Send + 'static) -> std::thread::JoinHandle<()> {
        let fd = self.fd.try_clone().expect("another descriptor of a namespace");
        std::thread::spawn(move || {
            setns(fd, CloneFlags::CLONE_NEWNET).expect("entering a namespace");
            work();
        })
    }

    /// The processes on this host.
    pub fn pids(&self) -> Vec<i32> {
        let entries = std::fs::read_dir("/proc").expect("/proc");
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                std::fs::metadata(format!("/proc/{pid}/ns/net"))
                    .is_ok_and(|ns| ns.ino() == self.inode)
            })
            .collect()
    }

    /// Ends every process on this host: nobody else's is in the namespace.
    pub fn end_all(&self) {
        for _ in 0..1000 {
            let processes: Vec<_> = self.pids().into_iter().filter_map(Pidfd::open).collect();
            // Asked again now that each is held: a number may have passed to a stranger in between.
            let ours = self.pids();
            let alive =
                processes.iter().filter(|process| ours.contains(&process.pid) && !process.ended());
            if alive.map(|process| process.signal(libc::SIGKILL)).count() == 0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Pulls the cable to the other host, or plugs it in again.
    pub fn set_link(&self, up: bool) {
        self.ip(&["link", "set", "veth0", if up { "up" } else { "down" }]);
    }

    fn ip(&self, arguments: &[&str]) {
        let output =
            self.command("ip").args(arguments).output().expect("running ip (package iproute2)");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ip {}: {error}", arguments.join(" "));
    }
}
