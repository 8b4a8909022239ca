//! The agent: the daemon of a host. It lets processes in, and looks after migrations whose sessions were killed.
//!
//! It decodes nothing from strangers but a preamble of 32 bytes. A connection for a new migration
//! becomes the control connection of a *destination session*, a process of its own that does the
//! handshake itself; a connection with a session's route is handed to that session. So whatever a
//! peer sends, the agent and the other sessions live.

use crate::carrier::{self, Carrier};
use crate::cgroup;
use crate::dest::{lost, take_over};
use crate::error::{Error, Result};
use crate::failpoints;
use crate::rundir;
use crate::source::orphans;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use slipstream_core::sys::spawn::{send_descriptors, spawn_with};
use slipstream_transport::{Key, Route, read_preamble};
use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// For the preamble; a peer that dribbles is cut off.
const PREAMBLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections whose preamble is still awaited.
const UNDECIDED_MAX: usize = 64;
/// Sessions at a time, those in their handshake included.
const SESSIONS_MAX: usize = 256;
/// Open files without which no agent is started: what init keeps, and some for the agent.
const FILES_MIN: u64 = 2048;
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
    /// What may carry the pages.
    pub carrier: Carrier,
    /// This program, to start sessions from.
    pub exe: PathBuf,
    /// How long a process here waits for a source that does not come back; for ever by default, for a
    /// network may be out for hours.
    pub source_lost: Option<Duration>,
}

/// A session's end of the socket through which it gets its lanes.
type Sessions = Arc<Mutex<HashMap<[u8; 16], Session>>>;

struct Session {
    pid: i32,
    lanes: UnixStream,
}

/// Serves until the process is told to end. `listening` is called once, when the port is open.
pub fn run(config: &AgentConfig, listening: &mut dyn FnMut(SocketAddr)) -> Result<()> {
    let key = Arc::new(Key::load(&config.key)?);
    rundir::ensure(&config.run_dir)?;
    raise_file_limit()?;
    // Inits of moved processes become ours when their launcher ends, and are reaped here.
    nix::sys::prctl::set_child_subreaper(true)
        .map_err(|e| Error::io("become a subreaper", e.into()))?;
    let listener = TcpListener::bind(&config.listen).map_err(|e| Error::Refused {
        reason: format!("cannot listen on {}: {e}", config.listen),
        remedy: "name an address of this host and a free port with --listen ADDR:PORT".into(),
    })?;
    let address = listener.local_addr().map_err(|e| Error::io("read the address", e))?;
    // Held as long as this agent lives; what is in it, `recover` needs when no agent does.
    let _alive = rundir::note_agent(&config.run_dir, &address.to_string(), &config.key)?;
    listening(address);
    let sessions = Sessions::default();
    take_over::clean_up(&config.run_dir);
    rundir::prune(&config.run_dir);
    cgroup::sweep();
    start_reaper(Arc::clone(&sessions), config.run_dir.clone());
    orphans::start_watch(config.run_dir.clone(), config.exe.clone());
    if let Some(limit) = config.source_lost {
        lost::start_watch(config.run_dir.clone(), limit);
    }
    let undecided = Arc::new(Undecided::default());
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
        let Some(ticket) = undecided.admit(&stream) else { continue };
        let (undecided, sessions) = (Arc::clone(&undecided), Arc::clone(&sessions));
        let (config, key) = (config.clone(), Arc::clone(&key));
        std::thread::spawn(move || {
            if let Err(e) = welcome(&stream, ticket, &undecided, &sessions, &config, &key) {
                // What strangers send is no news; what this host lacks is.
                if matches!(e, Error::Transport(_) | Error::Protocol(_)) {
                    tracing::debug!("connection closed: {e}");
                } else {
                    tracing::warn!("connection closed: {e}");
                }
            }
        });
    }
}

/// As many open files as this host lets us: sessions inherit that, and init of a moved process needs
/// numbers up to a fixed one.
fn raise_file_limit() -> Result<()> {
    let limits = getrlimit(Resource::RLIMIT_NOFILE);
    let (soft, hard) = limits.map_err(|e| Error::io("read the limit of open files", e.into()))?;
    let wanted = hard.max(FILES_MIN);
    if soft >= wanted {
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).map_err(|e| Error::Refused {
        reason: format!("no more than {hard} files may be open, {FILES_MIN} are needed ({e})"),
        remedy: "start the agent with a higher limit (ulimit -Hn, LimitNOFILE=)".into(),
    })
}

/// Connections whose preamble is still awaited. When there are too many, the oldest has to go: a peer
/// that means it sends its preamble at once.
#[derive(Debug, Default)]
struct Undecided {
    waiting: Mutex<(u64, VecDeque<(u64, TcpStream)>)>,
}

impl Undecided {
    /// Notes a connection; returns its ticket.
    fn admit(&self, stream: &TcpStream) -> Option<u64> {
        let copy = stream.try_clone().ok()?;
        let mut waiting = lock(&self.waiting);
        waiting.0 += 1;
        let ticket = waiting.0;
        waiting.1.push_back((ticket, copy));
        if waiting.1.len() > UNDECIDED_MAX
            && let Some((_, oldest)) = waiting.1.pop_front()
        {
            let _ = oldest.shutdown(Shutdown::Both);
        }
        Some(ticket)
    }

    fn decided(&self, ticket: u64) {
        lock(&self.waiting).1.retain(|(t, _)| *t != ticket);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the preamble and sends the connection where it belongs.
fn welcome(
    stream: &TcpStream,
    ticket: u64,
    undecided: &Undecided,
    sessions: &Sessions,
    config: &AgentConfig,
    key: &Key,
) -> Result<()> {
    let route = read_preamble(stream, PREAMBLE_TIMEOUT);
    undecided.decided(ticket);
    let route = route?;
    if route.is_new() {
        return start_session(stream, sessions, config, key, Route::random()?, None);
    }
    if let Some(session) = lock(sessions).get(route.bytes()) {
        return send_descriptors(&session.lanes, b"l", &[stream.as_fd()])
            .map_err(|e| Error::io("hand a lane to its session", e.into()));
    }
    // A migration whose session has ended: its source has come back for it.
    match rundir::by_route(&config.run_dir, &text_of(&route)) {
        Some(id) => start_session(stream, sessions, config, key, route, Some(id)),
        None => Err(Error::Protocol("a lane for no session".into())),
    }
}

fn text_of(route: &Route) -> String {
    route.bytes().iter().map(|b| format!("{b:02x}")).collect()
}

fn start_session(
    stream: &TcpStream,
    sessions: &Sessions,
    config: &AgentConfig,
    key: &Key,
    route: Route,
    id: Option<String>,
) -> Result<()> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| Error::io("socketpair", e))?;
    ours.set_nonblocking(true).map_err(|e| Error::io("set a socket non-blocking", e))?;
    let mut sessions = lock(sessions);
    if sessions.contains_key(route.bytes()) {
        return Err(Error::Protocol("its session has just been started".into()));
    }
    if sessions.len() >= SESSIONS_MAX {
        return Err(Error::Refused {
            reason: format!("{SESSIONS_MAX} migrations are under way"),
            remedy: "try again later".into(),
        });
    }
    let (run_dir, carrier) = (config.run_dir.clone(), config.carrier.clone());
    let args = SessionArgs { route, run_dir, carrier, id };
    // The key waits in the socket; the file may be exchanged meanwhile.
    key.hand_over(&ours).map_err(|e| Error::io("hand the key to a session", e))?;
    let mut command = Command::new(&config.exe);
    command.arg("__destination-session").args(args.to_args());
    if args.id.is_some() {
        // A test that kills the first session wants the second to live.
        for variable in failpoints::ASKED_AT {
            command.env_remove(variable);
        }
    }
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
    /// What may carry the pages.
    pub carrier: Carrier,
    /// The migration to take over, if it is one that has begun.
    pub id: Option<String>,
}

impl SessionArgs {
    fn to_args(&self) -> Vec<OsString> {
        let mut args = vec![self.route_text().into(), self.run_dir.clone().into()];
        args.extend(self.carrier.to_args());
        args.extend(self.id.iter().map(OsString::from));
        args
    }

    /// The route in hexadecimal.
    pub fn route_text(&self) -> String {
        text_of(&self.route)
    }

    /// From the arguments; `None` when they are malformed.
    pub fn from_args(args: &[OsString]) -> Option<Self> {
        let [route, run_dir, rest @ ..] = args else { return None };
        let (carrier, id) = rest.split_at_checked(carrier::ARGS)?;
        let id = match id {
            [] => None,
            [id] => Some(id.to_str().filter(|id| rundir::is_id(id))?.to_owned()),
            _ => return None,
        };
        let hex = route.to_str().filter(|h| h.len() == 32 && h.is_ascii())?;
        let mut bytes = [0u8; 16];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(Self {
            route: Route::from_bytes(bytes),
            run_dir: Path::new(run_dir).into(),
            carrier: Carrier::from_args(carrier)?,
            id,
        })
    }
}

/// Reaps sessions and inits of moved processes, and forgets the routes of sessions that ended.
fn start_reaper(sessions: Sessions, run_dir: PathBuf) {
    std::thread::spawn(move || {
        loop {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, _)) => {
                    lock(&sessions).retain(|_, s| s.pid != pid.as_raw());
                    // A session, or the init of a process that has ended.
                    take_over::clean_up(&run_dir);
                    rundir::prune(&run_dir);
                    cgroup::sweep();
                }
                Ok(WaitStatus::Signaled(pid, ..)) => {
                    lock(&sessions).retain(|_, s| s.pid != pid.as_raw());
                    take_over::clean_up(&run_dir);
                }
                _ => std::thread::sleep(REAP_INTERVAL),
            }
        }
    });
}
