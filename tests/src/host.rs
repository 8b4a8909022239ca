//! A host of a test: a network namespace of this machine, this machine as it is, or another one.

use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cgroup::Cgroup;
use crate::far::Far;
use crate::namespace::Namespace;
use crate::process::describe;
use crate::program;

enum Kind {
    Namespace(Namespace),
    /// What is started here is known by its control group.
    Near(Cgroup),
    Far(Far),
}

/// One host.
pub struct Host {
    kind: Kind,
    /// Where this host is reached.
    pub address: Ipv4Addr,
}

impl From<Namespace> for Host {
    fn from(namespace: Namespace) -> Self {
        Self { address: namespace.address, kind: Kind::Namespace(namespace) }
    }
}

/// Of pairs of hosts that this process made.
static NUMBERS: AtomicUsize = AtomicUsize::new(0);

/// Where another machine obeys tests, if they are to run between this one and that.
fn other_machine() -> Option<SocketAddr> {
    let text = std::env::var("SLIPSTREAM_TEST_HOSTS").ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("SLIPSTREAM_TEST_HOSTS={text}: {error}")))
}

impl Host {
    /// Source and destination.
    pub fn two() -> (Self, Self) {
        let Some(server) = other_machine() else {
            let (source, destination) = Namespace::joined();
            return (source.into(), destination.into());
        };
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let name = format!("slipstream-test-{}-{number}", std::process::id());
        let cgroup = Cgroup::named(&name).expect("a sound name");
        let far = Far::new(server, cgroup.clone());
        let v4 = |address| match address {
            IpAddr::V4(address) => address,
            IpAddr::V6(address) => panic!("{address}: tests use IPv4"),
        };
        let (there, here) = far.addresses();
        (
            Self { kind: Kind::Near(cgroup), address: v4(here) },
            Self { kind: Kind::Far(far), address: v4(there) },
        )
    }

    /// A command that will run on this host.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        match &self.kind {
            Kind::Namespace(namespace) => namespace.command(program),
            Kind::Near(cgroup) => {
                let mut command = Command::new(program);
                program::enter(&mut command, cgroup.entrance().expect("a control group"));
                command
            }
            Kind::Far(far) => far.command(program),
        }
    }

    /// The other machine, if this host is one.
    pub fn far(&self) -> Option<&Far> {
        match &self.kind {
            Kind::Far(far) => Some(far),
            _ => None,
        }
    }

    /// The processes on this host that belong to the test.
    pub fn pids(&self) -> Vec<i32> {
        match &self.kind {
            Kind::Namespace(namespace) => namespace.pids(),
            Kind::Near(cgroup) => cgroup.pids(),
            Kind::Far(far) => far.pids(),
        }
    }

    /// Their state.
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Far(far) => far.describe(),
            _ => self.pids().into_iter().map(describe).collect(),
        }
    }

    /// Ends all of them.
    pub fn end_all(&self) {
        match &self.kind {
            Kind::Namespace(namespace) => namespace.end_all(),
            Kind::Near(cgroup) => cgroup.end(),
            Kind::Far(far) => far.end(),
        }
    }

    /// What only a host with a network of its own can do.
    fn namespace(&self) -> &Namespace {
        match &self.kind {
            Kind::Namespace(namespace) => namespace,
            _ => panic!("this test needs network namespaces: run it without SLIPSTREAM_TEST_HOSTS"),
        }
    }

    /// Runs `work` on a thread that is on this host's network.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.namespace().enter(work)
    }

    /// Starts a thread that lives on this host's network.
    pub fn thread(&self, work: impl FnOnce() + Send + 'static) -> std::thread::JoinHandle<()> {
        self.namespace().thread(work)
    }

    /// Pulls the cable to the other host, or plugs it in again.
    pub fn set_link(&self, up: bool) {
        self.namespace().set_link(up);
    }
}
