//! The engine of this program: the commands wired to `slipstream-faultd`.

use crate::engine::{Control, Engine, Findings, MigrateRequest, Migration, Result, Session};
use crate::flags::{AgentArgs, CarrierArgs, CheckArgs, Destination, SourceLost, Stdio, Transport};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use slipstream_core::capture::files::StdioPolicy;
use slipstream_core::preflight::host::check_host;
use slipstream_core::restore::newborn::{InitConfig, init_main};
use slipstream_core::sys::pidfd::PidFd;
use slipstream_faultd::agent::{self, AgentConfig, SessionArgs};
use slipstream_faultd::carrier::{Carrier, Wish};
use slipstream_faultd::dest::session as destination_session;
use slipstream_faultd::dest::take_over::{self, Aborted};
use slipstream_faultd::events::{Event, Failed, HostFact, Outcome, Role, Status};
use slipstream_faultd::source::arguments;
use slipstream_faultd::source::events_out::EventsOut;
use slipstream_faultd::source::interrupt::Interrupts;
use slipstream_faultd::source::session::{self as source_session, SourceConfig};
use slipstream_faultd::{failpoints, rundir, source};
use slipstream_transport::Key;
use slipstream_transport::rdma::{Selection, describe_adapters};
use std::ffi::OsString;
use std::io::{self, BufReader};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as ProcessStdio};
use std::time::{Duration, Instant};

/// This program, also when its file has been replaced since.
const SELF: &str = "/proc/self/exe";
/// First argument of a session that takes over.
const RECOVER: &str = "recover";
/// For a source session to roll back after it was told to.
const ABORT_TIMEOUT: Duration = Duration::from_secs(30);

/// The real engine.
#[derive(Debug)]
pub struct Wired;

impl Engine for Wired {
    fn migrate(&self, request: &MigrateRequest) -> Result<Migration> {
        let config = source_config(request)?;
        let mut command = Command::new(SELF);
        command.arg("__source-session").args(arguments::to_args(&config));
        start_session(&mut command, None)
    }

    fn agent(&self, args: &AgentArgs, listening: &mut dyn FnMut(SocketAddr)) -> Result<()> {
        let config = AgentConfig {
            listen: args.listen.to_string(),
            key: absolute(&args.key)?,
            run_dir: absolute(&args.run_dir)?,
            carrier: carrier(&args.carrier),
            exe: PathBuf::from(SELF),
            source_lost: (args.source_lost == SourceLost::End).then_some(args.source_lost_after),
        };
        agent::run(&config, listening).map_err(|e| refused("agent", &e))
    }

    fn check(&self, args: &CheckArgs) -> Result<Findings> {
        let mut facts: Vec<_> = check_host()
            .into_iter()
            .map(|f| HostFact {
                name: f.name.into(),
                ok: f.ok || !f.required,
                detail: f.detail,
                read_us: None,
            })
            .collect();
        // RDMA is never needed: a host without it uses TCP.
        let adapter =
            |detail: String| HostFact { name: "RDMA".into(), ok: true, detail, read_us: None };
        facts.extend(describe_adapters().into_iter().map(adapter));
        let Some(pid) = args.pid else { return Ok(Findings { facts, preflight: None }) };
        let destination = match (&args.destination, &args.key) {
            (Some(Destination::Agent { host, port }), Some(key)) => {
                Some((host_port(host, *port), key.clone()))
            }
            _ => None,
        };
        let stdio = stdio_policy(&args.stdio);
        let carrier = carrier(&args.carrier);
        let (preflight, transport) =
            source::check::check(pid, &stdio, destination, &carrier, args.timeout);
        facts.extend(transport);
        Ok(Findings { facts, preflight: Some(preflight) })
    }

    fn status(&self, run_dir: &Path, id: Option<&str>) -> Result<Vec<Status>> {
        let all = rundir::list(run_dir).map_err(|e| refused("status", &e))?;
        match id {
            None => Ok(all),
            Some(id) => {
                let found: Vec<Status> = all.into_iter().filter(|s| s.id == id).collect();
                if found.is_empty() { Err(unknown("status", id)) } else { Ok(found) }
            }
        }
    }

    fn recover(&self, run_dir: &Path, id: &str) -> Result<Migration> {
        let found = self.status(run_dir, Some(id)).map_err(|_| unknown("recover", id))?;
        let subcommand = match found.first().map(|s| s.role) {
            Some(Role::Source) => "__source-session",
            _ => "__destination-session",
        };
        let mut command = Command::new(SELF);
        command.arg(subcommand).arg(RECOVER).arg(absolute(run_dir)?).arg(id);
        start_session(&mut command, Some(id.to_owned()))
    }

    fn abort(&self, run_dir: &Path, id: &str) -> Result<String> {
        let find = || {
            let all = rundir::list(run_dir).unwrap_or_default();
            all.into_iter().find(|s| s.id == id && s.role == Role::Source)
        };
        let Some(status) = find() else {
            if !rundir::is_id(id) || !rundir::destinations(run_dir).iter().any(|d| d == id) {
                return Err(unknown("abort", id));
            }
            return match take_over::abort(run_dir, id).map_err(|e| refused("abort", &e))? {
                Aborted::BeforeCommit => {
                    Ok(format!("migration {id} was given up: its process never runs here"))
                }
                Aborted::Ended => Ok(format!(
                    "the process of migration {id} waited for its source here, and was ended"
                )),
                Aborted::TooLate => Err(too_late_here(id)),
            };
        };
        if status.phase != "prepare" {
            return Err(past_commit(&status));
        }
        rundir::interrupt_session(run_dir, id).map_err(|e| refused("abort", &e))?;
        let deadline = Instant::now() + ABORT_TIMEOUT;
        while Instant::now() < deadline {
            match find() {
                None if status.pid.is_some_and(is_alive) => {
                    return Ok(format!("migration {id} was given up; the process runs on here"));
                }
                None => {
                    let reason = format!("the process of migration {id} is not here any more");
                    let remedy = "it has moved, and is moved back from there; or it has ended";
                    return Err(Failed { reason, remedy: remedy.into(), ..too_late(id) });
                }
                Some(s) if s.phase != "prepare" => return Err(past_commit(&s)),
                Some(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        Err(internal("abort", format!("the session of migration {id} does not answer")))
    }

    fn keygen(&self, file: &Path) -> Result<()> {
        Key::generate_file(file).map_err(|e| refused("keygen", &e.into()))
    }

    fn session(&self, session: Session, args: &[OsString]) -> Result<u8> {
        // Started by `/proc/self/exe`, all would be called `exe`.
        let name = match session {
            Session::Source => c"slipstream-src",
            Session::Destination => c"slipstream-dst",
            Session::Init => c"slipstream-init",
        };
        let _ = nix::sys::prctl::set_name(name);
        match session {
            Session::Source => run_source(args),
            Session::Destination if args.first().is_some_and(|a| a == RECOVER) => {
                run_recovery(args, recover_at_destination)
            }
            Session::Destination => {
                let args = SessionArgs::from_args(args).ok_or_else(malformed)?;
                Ok(match destination_session::run(&args) {
                    Ok(()) => 0,
                    Err(e) => {
                        tracing::warn!("migration ended: {e}");
                        1
                    }
                })
            }
            Session::Init => {
                let args: Vec<String> =
                    args.iter().filter_map(|a| a.to_str().map(str::to_owned)).collect();
                let config = InitConfig::from_args(&args).ok_or_else(malformed)?;
                Ok(init_main(&config) as u8)
            }
        }
    }

    fn fail_points(&self) -> Vec<&'static str> {
        failpoints::ALL.to_vec()
    }
}

/// The source session: a process and session of its own, so that a closed terminal ends only the
/// display.
fn run_source(args: &[OsString]) -> Result<u8> {
    if args.first().is_some_and(|a| a == RECOVER) {
        return run_recovery(args, source::afterwards::recover);
    }
    let config = arguments::from_args(args).ok_or_else(malformed)?;
    let _ = nix::unistd::setsid();
    let interrupts = Interrupts::install().map_err(|e| refused("start", &e))?;
    let out = EventsOut::start(io::stdout());
    source_session::run(&config, interrupts, &mut |event| out.send(&event));
    out.finish();
    Ok(0)
}

/// Starts a session that says on its output what happens.
fn start_session(command: &mut Command, committed: Option<String>) -> Result<Migration> {
    let mut child = command
        .stdin(ProcessStdio::null())
        .stdout(ProcessStdio::piped())
        .spawn()
        .map_err(|e| internal("start", format!("cannot start the session: {e}")))?;
    let Some(events) = child.stdout.take() else {
        return Err(internal("start", "the session has no output".into()));
    };
    Ok(Migration {
        committed,
        events: Box::new(BufReader::new(events)),
        control: Box::new(SourceControl { child }),
    })
}

/// Takes a migration of a run directory up, and says what happens.
type Recover = fn(&Path, &str, &mut dyn FnMut(Event)) -> slipstream_faultd::Result<()>;

/// A session that goes on with a migration that has committed: from then on nothing interrupts it.
fn run_recovery(args: &[OsString], recover: Recover) -> Result<u8> {
    let [_, run_dir, id] = args else { return Err(malformed()) };
    let id = id.to_str().filter(|id| rundir::is_id(id)).ok_or_else(malformed)?;
    let _ = nix::unistd::setsid();
    let interrupts = Interrupts::install().map_err(|e| refused("start", &e))?;
    interrupts.commit().map_err(|e| refused("start", &e))?;
    let out = EventsOut::start(io::stdout());
    match recover(Path::new(run_dir), id, &mut |event| out.send(&event)) {
        // It has been told already.
        Ok(()) | Err(slipstream_faultd::Error::Lost) => {}
        Err(e) => {
            out.send(&Event::Failed(Failed {
                outcome: Outcome::Waiting,
                ..refused("recover", &e)
            }));
        }
    }
    out.finish();
    Ok(0)
}

fn recover_at_destination(
    run_dir: &Path,
    id: &str,
    sink: &mut dyn FnMut(Event),
) -> slipstream_faultd::Result<()> {
    slipstream_faultd::dest::recover::recover(run_dir, id, PathBuf::from(SELF), sink)
}

/// Tells the session by SIGINT, as Ctrl-C would.
struct SourceControl {
    child: Child,
}

impl Control for SourceControl {
    fn request_rollback(&mut self) -> io::Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT).map_err(io::Error::from)
    }
}

fn source_config(request: &MigrateRequest) -> Result<SourceConfig> {
    Ok(SourceConfig {
        pid: request.args.pid,
        destination: host_port(request.host, request.port),
        key: absolute(request.key)?,
        run_dir: absolute(&request.args.run_dir)?,
        stdio: stdio_policy(&request.args.stdio),
        carrier: carrier(&request.args.carrier),
        prefetch_limit: (request.args.prefetch_limit.unwrap_or_default() * 1e6) as u64,
        timeout: request.args.timeout,
    })
}

fn carrier(args: &CarrierArgs) -> Carrier {
    let wish = match args.transport {
        Transport::Auto => Wish::Auto,
        Transport::Rdma => Wish::Rdma,
        Transport::Tcp => Wish::Tcp,
    };
    let selection = Selection { device: args.rdma_device.clone(), gid_index: args.gid_index };
    Carrier { wish, selection }
}

fn host_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn stdio_policy(stdio: &Stdio) -> StdioPolicy {
    match stdio {
        Stdio::Keep => StdioPolicy::Keep,
        Stdio::Null => StdioPolicy::Null,
        Stdio::File(path) => StdioPolicy::File(path.as_os_str().as_bytes().to_vec()),
    }
}

/// Sessions may have another current directory.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|e| internal("start", format!("current directory of {}: {e}", path.display())))
}

fn refused(phase: &str, e: &slipstream_faultd::Error) -> Failed {
    Failed {
        phase: phase.into(),
        reason: e.to_string(),
        remedy: e.remedy().into(),
        outcome: Outcome::Refused,
    }
}

fn internal(phase: &str, reason: String) -> Failed {
    Failed { phase: phase.into(), reason, remedy: String::new(), outcome: Outcome::Internal }
}

fn malformed() -> Failed {
    internal("start", "malformed arguments of a hidden subcommand".into())
}

fn unknown(phase: &str, id: &str) -> Failed {
    Failed {
        phase: phase.into(),
        reason: format!("no migration {id} on this host"),
        remedy: "`slipstream status` lists them; name another run directory with --run-dir".into(),
        outcome: Outcome::Refused,
    }
}

fn too_late_here(id: &str) -> Failed {
    Failed {
        reason: format!("migration {id} has committed: its process runs here"),
        remedy: "move it back, or end it like any other process".into(),
        ..too_late(id)
    }
}

/// Whether it runs there is unknown here while the destination can't be asked.
fn past_commit(status: &Status) -> Failed {
    let id = &status.id;
    if status.phase != "waiting" {
        return too_late(id);
    }
    Failed {
        reason: format!("migration {id} is past its commit, and its destination does not answer"),
        remedy:
            "`slipstream abort` at the destination gives it up, unless its process has run there"
                .into(),
        ..too_late(id)
    }
}

/// False also for one that has exited, whoever has not taken note of that yet.
fn is_alive(pid: i32) -> bool {
    PidFd::open(pid).is_ok_and(|process| !process.exited())
}

fn too_late(id: &str) -> Failed {
    Failed {
        phase: "abort".into(),
        reason: format!("migration {id} has committed: its process runs at the destination"),
        remedy: "move it back from there".into(),
        outcome: Outcome::Refused,
    }
}
