//! The command line: the one source of `--help`, the manual pages and the completions.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Where migrations of a host keep their state unless told otherwise.
const RUN_DIR: &str = "/run/slipstream";

/// Longest `--timeout`: a day.
const TIMEOUT_S_MAX: f64 = 86_400.0;

const EXIT_CODES: &str = "\
Exit codes:
  0  completed
  1  internal error
  2  wrong usage
  3  refused; the process was not touched
  4  rolled back; the process runs on here
  5  committed; the drain goes on without this command, or waits for `slipstream recover ID`
  6  the process is lost";

const EXAMPLES: &str = "\
Examples:
  once, on either host; then copy the file to the other one
    slipstream keygen /etc/slipstream.key
  on the destination
    slipstream agent --listen 10.0.0.2:7070 --key /etc/slipstream.key
  on the source
    slipstream check 4711
    slipstream migrate 4711 tcp://10.0.0.2:7070 --key /etc/slipstream.key";

const MIGRATE_EXAMPLES: &str = "\
Examples:
  slipstream migrate 4711 tcp://10.0.0.2:7070 --key /etc/slipstream.key
  slipstream migrate $(pidof -s xz) tcp://[fd00::2]:7070 --key k --stdio /var/log/xz.log
  slipstream migrate 4711 tcp://b:7070 --key k --json | jq -r 'select(.event==\"resumed\").blackout_us'

Ctrl-C before the commit rolls back: the process runs on here. Afterwards it ends this display only.";

/// Moves a running Linux process to another host. The process goes ahead; its memory follows.
///
/// The process stops for a few milliseconds, runs on at the destination, and fetches each page it
/// touches from here while the rest is sent in the background. When the last page has arrived nothing
/// of Slipstream is left in it.
#[derive(Debug, Parser)]
#[command(name = "slipstream", version, after_help = EXIT_CODES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
#[command(propagate_version = true, max_term_width = 100)]
pub struct Cli {
    /// Log more to stderr: -v what is done, -vv how, -vvv everything (`RUST_LOG` overrides it)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve as a destination: wait for processes that hold the same key
    Agent(AgentArgs),
    /// Move a process to another host
    Migrate(MigrateArgs),
    /// Say what this host can do, and what would stop a process from moving
    Check(CheckArgs),
    /// List the migrations and the moved processes of this host
    Status(StatusArgs),
    /// Go on with a committed migration that waits
    Recover(RecoverArgs),
    /// Give up a migration before its commit; at the destination also a process that waits for its source
    Abort(AbortArgs),
    /// Write a new key to a file that only its owner can read
    Keygen(KeygenArgs),
    /// Write completions for a shell to stdout
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    #[command(hide = true)]
    Man {
        /// Directory to write one page a command to; without it the main page goes to stdout
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// List the points at which a test can make a migration fail, one a line
    #[command(hide = true)]
    FailPoints,
    /// The source's side of one migration, started by `migrate`
    #[command(name = "__source-session", hide = true)]
    SourceSession(Passed),
    /// The destination's side of one migration, started by the agent
    #[command(name = "__destination-session", hide = true)]
    DestinationSession(Passed),
    /// PID 1 of a moved process's namespace
    #[command(name = "__init", hide = true)]
    Init(Passed),
}

/// Arguments handed on as they are.
#[derive(Args, Debug)]
#[command(disable_help_flag = true, disable_version_flag = true)]
pub struct Passed {
    /// Handed on
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<OsString>,
}

/// Arguments of `agent`.
#[derive(Args, Debug)]
#[command(after_help = "With port 0 the kernel chooses one; \
    the agent writes `listening on ADDR:PORT` to stderr once it can be reached.")]
pub struct AgentArgs {
    /// Address and port to listen on.
    #[arg(long, value_name = "ADDR:PORT")]
    #[arg(help = "Address and port to listen on, as in 10.0.0.2:7070 or [::]:7070")]
    pub listen: SocketAddr,
    /// Key file (see keygen); only peers that hold the same key are obeyed
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// Where migrations keep their state
    #[arg(long, value_name = "DIR", default_value = RUN_DIR)]
    pub run_dir: PathBuf,
    /// What carries the pages
    #[command(flatten)]
    pub carrier: CarrierArgs,
    /// What becomes of processes here whose source does not come back: they wait, or end after a time
    #[arg(long, value_name = "wait|end", value_enum, default_value_t = SourceLost::Wait)]
    pub source_lost: SourceLost,
    /// With --source-lost end: seconds without the source after which a process is ended
    #[arg(long, value_name = "SECS", default_value = "3600", value_parser = seconds)]
    pub source_lost_after: Duration,
}

/// What becomes of a process whose source does not come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SourceLost {
    /// It waits: a network may be out for hours
    Wait,
    /// It is ended, with a note that says why
    End,
}

/// Arguments of `migrate`.
#[derive(Args, Debug)]
#[command(after_help = MIGRATE_EXAMPLES)]
pub struct MigrateArgs {
    /// The process to move
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: i32,
    /// Where to.
    #[arg(
        value_name = "DEST",
        help = "Where to: tcp://HOST:PORT of an agent, or [user@]host \
        to be reached by ssh (not in this version)"
    )]
    pub destination: Destination,
    /// Key file (see keygen); needed for a tcp:// destination
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// What carries the pages
    #[command(flatten)]
    pub carrier: CarrierArgs,
    /// Megabytes a second that prefetch may take of the network at most; pages that the process waits for come at once all
    /// the same
    #[arg(long, value_name = "MB", value_parser = megabytes)]
    pub prefetch_limit: Option<f64>,
    /// Move the process with all its descendants (not in this version)
    #[arg(long)]
    pub tree: bool,
    /// Standard streams at the destination: keep (files are opened there by name), null, or an
    /// absolute path there
    #[arg(long, value_name = "keep|null|FILE", default_value = "keep")]
    pub stdio: Stdio,
    /// Seconds after which connecting, agreeing or the freeze is given up and rolled back
    #[arg(long, value_name = "SECS", default_value = "10", value_parser = seconds)]
    pub timeout: Duration,
    /// Write one JSON object a line to stdout
    #[arg(long)]
    pub json: bool,
    /// Where migrations keep their state
    #[arg(long, value_name = "DIR", default_value = RUN_DIR)]
    pub run_dir: PathBuf,
}

/// Arguments of `check`.
#[derive(Args, Debug)]
#[command(after_help = "Nothing is changed, neither here nor at the destination. \
    Exit code 3 when something stands in the way.")]
pub struct CheckArgs {
    /// The process; without it only this host is looked at
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// Where it would go, as for migrate
    #[arg(value_name = "DEST")]
    pub destination: Option<Destination>,
    /// Key file; needed for a tcp:// destination
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// What would carry the pages
    #[command(flatten)]
    pub carrier: CarrierArgs,
    /// Standard streams at the destination, as for migrate
    #[arg(long, value_name = "keep|null|FILE", default_value = "keep")]
    pub stdio: Stdio,
    /// Seconds after which connecting is given up
    #[arg(long, value_name = "SECS", default_value = "10", value_parser = seconds)]
    pub timeout: Duration,
    /// Write one JSON object a line to stdout
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Only this migration
    pub id: Option<MigrationId>,
    /// Write one JSON object a line to stdout
    #[arg(long)]
    pub json: bool,
    /// Where migrations keep their state
    #[arg(long, value_name = "DIR", default_value = RUN_DIR)]
    pub run_dir: PathBuf,
}

/// Arguments of `recover`.
#[derive(Args, Debug)]
pub struct RecoverArgs {
    /// The migration, as `migrate` and `status` name it
    pub id: MigrationId,
    /// Write one JSON object a line to stdout
    #[arg(long)]
    pub json: bool,
    /// Where migrations keep their state
    #[arg(long, value_name = "DIR", default_value = RUN_DIR)]
    pub run_dir: PathBuf,
}

/// Arguments of `abort`.
#[derive(Args, Debug)]
pub struct AbortArgs {
    /// The migration, as `status` names it
    pub id: MigrationId,
    /// Where migrations keep their state
    #[arg(long, value_name = "DIR", default_value = RUN_DIR)]
    pub run_dir: PathBuf,
}

/// Arguments of `keygen`.
#[derive(Args, Debug)]
pub struct KeygenArgs {
    /// The file; it must not exist yet
    pub file: PathBuf,
}

/// What carries the pages, and which adapter if it is RDMA.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct CarrierArgs {
    /// What carries the pages
    #[arg(long, value_name = "KIND", value_enum, default_value_t = Transport::Auto)]
    pub transport: Transport,
    /// RDMA device of this host, as in `mlx5_0`; without it the one that fits best
    #[arg(long, value_name = "NAME")]
    pub rdma_device: Option<String>,
    /// Index of the GID of its port; without it the `RoCEv2` GID of the address that the hosts use for TCP
    #[arg(long, value_name = "N")]
    pub gid_index: Option<u8>,
}

/// What carries the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// RDMA where both hosts can reach each other by it, else TCP
    Auto,
    /// RDMA, or the move is refused
    Rdma,
    /// TCP
    Tcp,
}

/// Where a process goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// An agent that listens there.
    Agent {
        /// Name or address, an IPv6 address without its brackets.
        host: String,
        /// TCP port.
        port: u16,
    },
    /// A host to be reached by ssh, as given.
    Ssh(String),
}

impl FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((scheme, rest)) = text.split_once("://") else {
            let host = text.rsplit_once('@').map_or(text, |(_, host)| host);
            let plain = |c: char| !c.is_whitespace() && !c.is_control() && !"/:".contains(c);
            if host.is_empty() || text.starts_with('-') || !text.chars().all(plain) {
                return Err("give tcp://HOST:PORT or [user@]host".into());
            }
            return Ok(Self::Ssh(text.into()));
        };
        if scheme != "tcp" {
            return Err(format!("unknown scheme {scheme}://; give tcp://HOST:PORT or [user@]host"));
        }
        let (host, port) = rest.rsplit_once(':').ok_or("the port is missing: tcp://HOST:PORT")?;
        let port = port.parse().ok().filter(|p| *p != 0).ok_or("the port must be 1 to 65535")?;
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        if bare.is_none() && host.contains(':') {
            return Err("put an IPv6 address in brackets: tcp://[ADDR]:PORT".into());
        }
        let host = bare.unwrap_or(host);
        if host.is_empty() || host.contains(['/', '@', '[', ']']) {
            return Err("give tcp://HOST:PORT".into());
        }
        Ok(Self::Agent { host: host.into(), port })
    }
}

/// What becomes of the standard streams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stdio {
    /// They must be files or `/dev/null`, and are opened by name at the destination.
    Keep,
    /// All three become `/dev/null`.
    Null,
    /// Input becomes `/dev/null`; output and errors are appended to this file at the destination.
    File(PathBuf),
}

impl FromStr for Stdio {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "keep" => Ok(Self::Keep),
            "null" => Ok(Self::Null),
            path if path.starts_with('/') => Ok(Self::File(path.into())),
            _ => Err("give keep, null, or an absolute path at the destination".into()),
        }
    }
}

/// A migration's name: short, and fit for a file name, because it is one in the run directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationId(pub String);

impl FromStr for MigrationId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if text.is_empty() || text.len() > 64 || text.starts_with('-') || !text.chars().all(fits) {
            return Err("no migration has such a name; `slipstream status` lists them".into());
        }
        Ok(Self(text.into()))
    }
}

/// Megabytes a second, fractions allowed.
fn megabytes(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(mb) if (0.01..=1e6).contains(&mb) => Ok(mb),
        _ => Err("give megabytes a second, at least 0.01 and at most 1000000".into()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(s) if s > 0.0 && s <= TIMEOUT_S_MAX => Ok(Duration::from_secs_f64(s)),
        _ => Err(format!("give seconds, more than 0 and at most {TIMEOUT_S_MAX}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn migrate(args: &[&str]) -> Result<MigrateArgs, clap::Error> {
        let all = ["slipstream", "migrate"].into_iter().chain(args.iter().copied());
        match Cli::try_parse_from(all)?.command {
            Command::Migrate(args) => Ok(args),
            other => panic!("parsed as {other:?}"),
        }
    }

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn destinations() {
        let agent = |host: &str, port| Ok(Destination::Agent { host: host.into(), port });
        assert_eq!("tcp://b:7070".parse(), agent("b", 7070));
        assert_eq!("tcp://[fd00::2]:1".parse(), agent("fd00::2", 1));
        assert_eq!("me@b".parse(), Ok(Destination::Ssh("me@b".into())));
        for bad in [
            "",
            "tcp://b",
            "tcp://b:0",
            "tcp://b:70000",
            "tcp://:1",
            "tcp://fd00::2:1",
            "udp://b:1",
            "b:1",
            "-oProxyCommand=x",
            "me@",
            "a b",
            "tcp://u@b:1",
            "tcp://b:1/x",
        ] {
            assert!(bad.parse::<Destination>().is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn migrate_takes_its_documented_options() {
        let args =
            migrate(&["7", "tcp://b:1", "--key", "k", "--json", "--timeout", "0.5"]).expect("ok");
        assert_eq!((args.pid, args.json, args.stdio), (7, true, Stdio::Keep));
        assert_eq!(args.timeout, Duration::from_millis(500));
        let args = migrate(&["7", "b", "--prefetch-limit", "0.5"]);
        assert_eq!(args.expect("ok").prefetch_limit, Some(0.5));
        let args = migrate(&["7", "b", "--stdio", "/tmp/out", "--tree", "--transport", "rdma"]);
        assert_eq!(args.expect("ok").stdio, Stdio::File("/tmp/out".into()));
    }

    #[test]
    fn wrong_usage_is_exit_code_2() {
        for bad in [
            &["0", "b"][..],
            &["-1", "b"],
            &["x", "b"],
            &["99999999999", "b"],
            &["7"],
            &["7", "b", "--timeout", "0"],
            &["7", "b", "--timeout", "nan"],
            &["7", "b", "--timeout", "1e9"],
            &["7", "b", "--prefetch-limit", "0"],
            &["7", "b", "--prefetch-limit", "nan"],
            &["7", "b", "--stdio", "relative"],
            &["7", "b", "--transport", "pigeon"],
        ] {
            assert_eq!(migrate(bad).expect_err("refused").exit_code(), 2, "{bad:?}");
        }
    }

    #[test]
    fn names_of_migrations_cannot_leave_the_run_directory() {
        assert!("a1-b_2".parse::<MigrationId>().is_ok());
        for bad in ["", "..", "a/b", "-x", "a b"] {
            assert!(bad.parse::<MigrationId>().is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn sessions_get_their_arguments_as_they_are() {
        let cli = Cli::try_parse_from(["slipstream", "__init", "--fd", "3", "-v", "--help"]);
        let Command::Init(passed) = cli.expect("ok").command else { panic!("not init") };
        assert_eq!(passed.args, ["--fd", "3", "-v", "--help"]);
    }
}
