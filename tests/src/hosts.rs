//! Two hosts on one machine, the agent on one of them, and the end of everything that ran there.

use std::fmt::Write as _;
use std::fs::{File, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::host::Host;
use crate::migration::Migration;
use crate::namespace::Namespace;
use crate::program::Program;
use crate::wait;
use crate::{build, cgroup};

/// Which of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where programs start.
    Source,
    /// Where they are moved to.
    Destination,
}

impl Side {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Source, Self::Destination];

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// A child process that the hosts end, and others may ask about.
pub type SharedChild = Arc<Mutex<Child>>;

/// Two hosts (or two on one network), with a folder and a key of their own.
pub struct Hosts {
    source: Host,
    destination: Option<Host>,
    directory: TempDir,
    children: Mutex<Vec<SharedChild>>,
    numbers: AtomicUsize,
}

impl Hosts {
    /// Two hosts, joined by a cable; this machine and another one, if `SLIPSTREAM_TEST_HOSTS` names where that can be asked.
    pub fn two() -> Self {
        let (source, destination) = Host::two();
        Self::new(source, Some(destination))
    }

    /// Source and destination on the same network, over loopback: how most people try it first.
    pub fn one() -> Self {
        Self::new(Namespace::alone().into(), None)
    }

    fn new(source: Host, destination: Option<Host>) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("slipstream-test-")
            .tempdir()
            .expect("a temporary folder");
        // Programs that gave up being root still have to see their flag file.
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755))
            .expect("permissions");
        let hosts = Self {
            source,
            destination,
            directory,
            children: Mutex::default(),
            numbers: AtomicUsize::new(0),
        };
        let output = Command::new(build::slipstream())
            .arg("keygen")
            .arg(hosts.key())
            .output()
            .expect("running slipstream keygen");
        assert!(
            output.status.success(),
            "slipstream keygen: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        hosts
    }

    /// Hosts with no key and no need of the binary, for runs in which nothing is moved.
    pub fn without_slipstream() -> Self {
        let directory = tempfile::Builder::new()
            .prefix("slipstream-test-")
            .tempdir()
            .expect("a temporary folder");
        std::fs::set_permissions(directory.path(), Permissions::from_mode(0o755))
            .expect("permissions");
        Self {
            source: Namespace::alone().into(),
            destination: None,
            directory,
            children: Mutex::default(),
            numbers: AtomicUsize::new(0),
        }
    }

    /// One of the two.
    pub fn host(&self, side: Side) -> &Host {
        match side {
            Side::Source => &self.source,
            Side::Destination => self.destination.as_ref().unwrap_or(&self.source),
        }
    }

    /// Where this test may put files.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The key both sides share.
    pub fn key(&self) -> PathBuf {
        self.path().join("key")
    }

    /// The run directory of a side.
    pub fn run_dir(&self, side: Side) -> PathBuf {
        self.run_dirs().join(format!("run-{side:?}"))
    }

    /// Where run directories lie: on a file system of each machine's own, if there are two.
    fn run_dirs(&self) -> PathBuf {
        if self.host(Side::Destination).far().is_none() {
            return self.path().to_path_buf();
        }
        Path::new("/run").join(self.path().file_name().expect("a folder has a name"))
    }

    /// A name nobody else in this test uses.
    pub fn unique(&self, name: &str) -> String {
        format!("{name}.{}", self.numbers.fetch_add(1, Ordering::Relaxed))
    }

    /// Spawns on a host, standard error into a log. The hosts end it when they are dropped.
    pub fn spawn(&self, command: &mut Command, log: &Path) -> SharedChild {
        let log = File::create(log).expect("a log file");
        let child =
            command.stderr(log).spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let child = Arc::new(Mutex::new(child));
        self.children.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&child));
        child
    }

    /// Starts an agent on the destination.
    pub fn agent(&self) -> Agent {
        self.agent_with(|_| {})
    }

    /// Starts an agent with more arguments or environment, and waits until it listens.
    pub fn agent_with(&self, adjust: impl FnOnce(&mut Command)) -> Agent {
        let address = self.host(Side::Destination).address;
        self.agent_on(Side::Destination, &format!("{address}:0"), adjust)
    }

    /// Starts an agent where an earlier one listened.
    pub fn agent_at(&self, address: SocketAddr) -> Agent {
        self.agent_on(Side::Destination, &address.to_string(), |_| {})
    }

    /// Starts an agent on either host: `listen` is an address and port.
    pub fn agent_on(&self, side: Side, listen: &str, adjust: impl FnOnce(&mut Command)) -> Agent {
        let host = self.host(side);
        let log = self.path().join(self.unique("agent") + ".log");
        let mut command = host.command(build::slipstream());
        command.args(["agent", "--listen", listen, "--key"]).arg(self.key());
        command.arg("--run-dir").arg(self.run_dir(side)).stdin(Stdio::null()).stdout(Stdio::null());
        adjust(&mut command);
        let child = self.spawn(&mut command, &log);
        let address = wait::until(
            "the agent to say `listening on ADDR:PORT`",
            Duration::from_secs(20),
            || {
                let ended = child
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .try_wait()
                    .expect("waiting for the agent");
                assert!(
                    ended.is_none(),
                    "the agent ended: {}",
                    std::fs::read_to_string(&log).unwrap_or_default()
                );
                listening_address(&std::fs::read_to_string(&log).unwrap_or_default())
            },
        );
        Agent { child, address, log }
    }

    /// Runs the binary on the source and returns what it printed.
    pub fn slipstream(&self, arguments: &[&str]) -> std::process::Output {
        self.slipstream_on(Side::Source, arguments)
    }

    /// Runs the binary on either host and returns what it printed.
    pub fn slipstream_on(&self, side: Side, arguments: &[&str]) -> std::process::Output {
        self.host(side)
            .command(build::slipstream())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("running slipstream")
    }

    /// What `slipstream status --json` says of a migration.
    pub fn status(&self, side: Side, id: &str) -> Value {
        let run_dir = self.run_dir(side);
        let run_dir = run_dir.to_str().expect("a path");
        let output = self.slipstream_on(side, &["status", id, "--json", "--run-dir", run_dir]);
        let line = String::from_utf8_lossy(&output.stdout).into_owned();
        serde_json::from_str(line.lines().next().unwrap_or_default())
            .unwrap_or_else(|e| panic!("status of {id}: {e}: {line}"))
    }

    /// Starts a migration of a program to the agent.
    pub fn migrate<'a>(&'a self, program: &Program<'a>, agent: &Agent) -> Migration {
        Migration::start(self, program.pid, &agent.destination(), |_| {})
    }

    /// The processes on either host.
    pub fn pids(&self) -> Vec<i32> {
        let mut pids = self.source.pids();
        pids.extend(self.destination.iter().flat_map(Host::pids));
        pids
    }

    /// All logs and outputs, and the state of all processes.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for host in std::iter::once(&self.source).chain(&self.destination) {
            text += &host.describe();
        }
        let mut folders = vec![self.path().to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                let kind = entry.file_type().ok();
                if kind.is_some_and(|kind| kind.is_dir()) {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "log")
                    || ["exit", "lost", "status.json"].iter().any(|name| path.ends_with(name))
                {
                    let content = std::fs::read(&path).unwrap_or_default();
                    let tail = &content[content.len().saturating_sub(8000)..];
                    let _ =
                        writeln!(text, "--- {}\n{}", path.display(), String::from_utf8_lossy(tail));
                }
            }
        }
        text
    }

    /// Ends every process on the hosts: they are ours, whatever has become of them.
    fn end_all(&self) {
        for host in std::iter::once(&self.source).chain(&self.destination) {
            host.end_all();
        }
        for child in self.children.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let mut child = child.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Of what the temporary folder does not hold.
    fn remove_run_dirs(&self) {
        for host in std::iter::once(&self.source).chain(&self.destination) {
            let mut remove = host.command("rm");
            remove.arg("-rf").arg(self.run_dirs());
            remove.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let _ = remove.status();
            host.end_all();
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.describe());
        }
        self.end_all();
        cgroup::sweep();
        if self.host(Side::Destination).far().is_some() {
            self.remove_run_dirs();
        }
    }
}

/// A running agent.
pub struct Agent {
    child: SharedChild,
    /// Where it listens.
    pub address: SocketAddr,
    log: PathBuf,
}

impl Agent {
    /// How `slipstream migrate` is told of it.
    pub fn destination(&self) -> String {
        format!("tcp://{}", self.address)
    }

    /// Its PID.
    pub fn pid(&self) -> i32 {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).id() as i32
    }

    /// Whether it runs.
    pub fn alive(&self) -> bool {
        matches!(self.child.lock().unwrap_or_else(PoisonError::into_inner).try_wait(), Ok(None))
    }

    /// Ends it with SIGKILL.
    pub fn kill(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.kill().expect("killing the agent");
        child.wait().expect("waiting for the agent");
    }

    /// What it has said.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

fn listening_address(log: &str) -> Option<SocketAddr> {
    let line = log.lines().find(|line| line.contains("listening on "))?;
    let (_, address) = line.split_once("listening on ")?;
    address.split_whitespace().next()?.parse().ok()
}
