//! What the commands need from the engine below them, as one trait, so that everything above it is
//! tested without a process being moved.

use crate::flags::{AgentArgs, CheckArgs, Destination, MigrateArgs};
use slipstream_faultd::events::{Failed, HostFact, Preflight, Status};
use std::ffi::OsString;
use std::io::{self, BufRead};
use std::net::SocketAddr;
use std::path::Path;

/// Result of a command; the failure says what is left, and so decides the exit code.
pub type Result<T> = std::result::Result<T, Failed>;

/// The engine.
pub trait Engine {
    /// Starts a source session in the background and returns at once: everything it does or refuses
    /// comes as events.
    ///
    /// SIGINT, SIGTERM and SIGHUP are blocked in the caller. A child started with
    /// `std::process::Command` does not inherit that.
    fn migrate(&self, request: &MigrateRequest) -> Result<Migration>;
    /// Serves as a destination until it is told to end. `listening` is called once, with the address,
    /// when the port is open.
    fn agent(&self, args: &AgentArgs, listening: &mut dyn FnMut(SocketAddr)) -> Result<()>;
    /// Looks at this host and, if given, a process and a destination; changes nothing.
    fn check(&self, args: &CheckArgs) -> Result<Findings>;
    /// The migrations and moved processes of this host; with `id` that one, or a failure.
    fn status(&self, run_dir: &Path, id: Option<&str>) -> Result<Vec<Status>>;
    /// Goes on with a committed migration that waits; its events are those of [`Engine::migrate`]
    /// from the drain on.
    fn recover(&self, run_dir: &Path, id: &str) -> Result<Migration>;
    /// Gives up a migration before its commit, and says in one line what is so now.
    fn abort(&self, run_dir: &Path, id: &str) -> Result<String>;
    /// Writes a new key to a file that does not exist yet, mode 0600.
    fn keygen(&self, file: &Path) -> Result<()>;
    /// Becomes one of the processes of a migration; returns its exit code.
    fn session(&self, session: Session, args: &[OsString]) -> Result<u8>;
    /// Names of the points at which a test can make a migration fail.
    fn fail_points(&self) -> Vec<&'static str>;
}

/// A migration to be started: what was asked for, minus what this version refuses.
#[derive(Debug)]
pub struct MigrateRequest<'a> {
    /// The command line.
    pub args: &'a MigrateArgs,
    /// Name or address of the agent.
    pub host: &'a str,
    /// Its port.
    pub port: u16,
    /// The key file.
    pub key: &'a Path,
}

impl<'a> MigrateRequest<'a> {
    /// The request for an agent; none when the destination isn't one or there is no key.
    pub fn new(args: &'a MigrateArgs) -> Option<Self> {
        let Destination::Agent { host, port } = &args.destination else { return None };
        Some(Self { args, host, port: *port, key: args.key.as_deref()? })
    }
}

/// A migration under way, to be watched.
pub struct Migration {
    /// The migration's name, when it is known to be committed already.
    pub committed: Option<String>,
    /// The session's events, one JSON object a line, until the session has nothing more to say.
    pub events: Box<dyn BufRead + Send>,
    /// The way to tell the session something.
    pub control: Box<dyn Control>,
}

/// The way to tell a source session something.
pub trait Control {
    /// Asks for the process to run on at the source. The session answers with events: `failed` with
    /// outcome `rolled_back`, or `committed` if it was too late.
    fn request_rollback(&mut self) -> io::Result<()>;
}

/// What `check` found.
#[derive(Debug)]
pub struct Findings {
    /// About this host.
    pub facts: Vec<HostFact>,
    /// About the process, when one was given.
    pub preflight: Option<Preflight>,
}

/// The processes a migration consists of besides the display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// The source's side.
    Source,
    /// The destination's side.
    Destination,
    /// PID 1 of the moved process's namespace.
    Init,
}
