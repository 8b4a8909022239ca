//! The agent: the daemon of a destination host.
//!
//! It decodes nothing from strangers but a preamble of 32 bytes. A connection for a new migration
//! becomes the control connection of a *destination session*, a process of its own that does the
//! handshake itself; a connection with a session's route is handed to that session. So whatever a
//! peer sends, the agent and the other sessions live.

use crate::error::{Error, Result};
use crate::rundir;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use slipstream_core::sys::spawn::{send_descriptors, spawn_with};
use slipstream_transport::{Key, Route, read_preamble};
use std::collections::HashMap;
use std::ffi::OsString;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// For the preamble; a peer that dribbles is cut off.
const PREAMBLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections whose preamble is still awaited.
const UNDECIDED_MAX: usize = 64;
/// Sessions at a time, those in their handshake included.
const SESSIONS_MAX: usize = 256;
const REAP_INTERVAL: Duration = Duration::from_millis(200);

/// How an agent is run.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// `ADDR:PORT`; port 0 takes a free one.
    pub listen: String,
    /// Key file.
    pub key: PathBuf,
    /// Run directory.
    pub run_dir: PathBuf,
    /// This program, to start sessions from.
    pub exe: PathBuf,
}

/// A session's end of the socket through which it gets its lanes.
type Sessions = Arc<Mutex<HashMap<[u8; 16], Session>>>;

struct Session {
    pid: i32,
    lanes: UnixStream,
}

/// Serves until the process is told to end. `listening` is called once, when the port is open.
pub fn run(config: &AgentConfig, listening: &mut dyn FnMut(SocketAddr)) -> Result<()> {
    // Sessions load it themselves; a bad key should stop the agent, not each migration.
    Key::load(&config.key)?;
    rundir::ensure(&config.run_dir)?;
    // Inits of moved processes become ours when their launcher ends, and are reaped here.
    nix::sys::prctl::set_child_subreaper(true)
        .map_err(|e| Error::io("become a subreaper", e.into()))?;
    let listener = TcpListener::bind(&config.listen).map_err(|e| Error::Refused {
        reason: format!("cannot listen on {}: {e}", config.listen),
        remedy: "name an address of this host and a free port with --listen ADDR:PORT".into(),
    })?;
    let address = listener.local_addr().map_err(|e| Error::io("read the address", e))?;
    listening(address);
    let sessions = Sessions::default();
    start_reaper(Arc::clone(&sessions));
    let undecided = Arc::new(());
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of descriptors, or the peer is gone already: neither ends the agent.
                tracing::warn!("accept: {e}");
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if Arc::strong_count(&undecided) > UNDECIDED_MAX {
            tracing::warn!("too many connections without a preamble; one more was closed");
            continue;
        }
        let (token, sessions, config) =
            (Arc::clone(&undecided), Arc::clone(&sessions), config.clone());
        std::thread::spawn(move || {
            if let Err(e) = welcome(&stream, &sessions, &config) {
                tracing::debug!("connection closed: {e}");
            }
            drop(token);
        });
    }
}

/// Reads the preamble and sends the connection where it belongs.
fn welcome(stream: &TcpStream, sessions: &Sessions, config: &AgentConfig) -> Result<()> {
    let route = read_preamble(stream, PREAMBLE_TIMEOUT)?;
    if route.is_new() {
        return start_session(stream, sessions, config);
    }
    let sessions = sessions.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(session) = sessions.get(route.bytes()) else {
        return Err(Error::Protocol("a lane for no session".into()));
    };
    send_descriptors(&session.lanes, b"l", &[stream.as_fd()])
        .map_err(|e| Error::io("hand a lane to its session", e.into()))
}

fn start_session(stream: &TcpStream, sessions: &Sessions, config: &AgentConfig) -> Result<()> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| Error::io("socketpair", e))?;
    ours.set_nonblocking(true).map_err(|e| Error::io("set a socket non-blocking", e))?;
    let route = Route::random()?;
    let mut sessions = sessions.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if sessions.len() >= SESSIONS_MAX {
        return Err(Error::Refused {
            reason: format!("{SESSIONS_MAX} migrations are under way"),
            remedy: "try again later".into(),
        });
    }
    let args = SessionArgs { route, run_dir: config.run_dir.clone(), key: config.key.clone() };
    let mut command = Command::new(&config.exe);
    command.arg("__destination-session").args(args.to_args());
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let child = spawn_with(&mut command, &[stream.as_fd(), theirs.as_fd()])
        .map_err(|e| Error::io("start a destination session", e))?;
    let session = Session { pid: child.id() as i32, lanes: ours };
    sessions.insert(*route.bytes(), session);
    Ok(())
}

/// Arguments of the hidden subcommand that runs a destination session.
#[derive(Debug)]
pub struct SessionArgs {
    /// Route of its lanes.
    pub route: Route,
    /// Run directory.
    pub run_dir: PathBuf,
    /// Key file.
    pub key: PathBuf,
}

impl SessionArgs {
    fn to_args(&self) -> Vec<OsString> {
        let hex: String = self.route.bytes().iter().map(|b| format!("{b:02x}")).collect();
        vec![hex.into(), self.run_dir.clone().into(), self.key.clone().into()]
    }

    /// From the arguments; `None` when they are malformed.
    pub fn from_args(args: &[OsString]) -> Option<Self> {
        let [route, run_dir, key] = args else { return None };
        let hex = route.to_str().filter(|h| h.len() == 32 && h.is_ascii())?;
        let mut bytes = [0u8; 16];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(Self {
            route: Route::from_bytes(bytes),
            run_dir: Path::new(run_dir).into(),
            key: Path::new(key).into(),
        })
    }
}

/// Reaps sessions and inits of moved processes, and forgets the routes of sessions that ended.
fn start_reaper(sessions: Sessions) {
    std::thread::spawn(move || {
        loop {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..)) => {
                    let mut all =
                        sessions.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    all.retain(|_, s| s.pid != pid.as_raw());
                }
                _ => std::thread::sleep(REAP_INTERVAL),
            }
        }
    });
}
