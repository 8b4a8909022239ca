//! What a scenario needs around it: a folder, a key, an agent, programs; and the end of all that.

use crate::edge;
use crate::touch::{Mode, Seen};
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use slipstream_core::sys::pidfd::PidFd;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longest wait for what should happen at once.
const SOON: Duration = Duration::from_secs(20);
/// Longest wait for a program to fill or check its memory.
const FILL: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(5);

/// Everything that is started here, and what that starts, becomes a child of this process when its parent ends:
/// so it can be found and ended.
pub fn adopt_orphans() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true).context("becoming a subreaper")?;
    // A harness that is told to end takes everything with it.
    let signals: nix::sys::signal::SigSet =
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().context("blocking signals")?;
    std::thread::spawn(move || {
        let _ = signals.wait();
        end_descendants();
        std::process::exit(130);
    });
    Ok(())
}

/// Two copies of the largest program have to fit.
pub fn check_memory(bytes: u64) -> Result<()> {
    let (needed, available) = (bytes * 2 + (512 << 20), memory_available()?);
    if available < needed {
        bail!("{} MiB of memory are needed, {} are available", needed >> 20, available >> 20);
    }
    Ok(())
}

/// Bytes of memory that programs can have without swapping.
pub fn memory_available() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let field = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = field
        .and_then(|f| f.trim().trim_end_matches(" kB").parse().ok())
        .context("MemAvailable in /proc/meminfo")?;
    Ok(kib * 1024)
}

/// Writes a file that is never seen half.
pub fn publish(path: &Path, text: &str) -> Result<()> {
    let partial = path.with_extension("partial");
    std::fs::write(&partial, text).with_context(|| partial.display().to_string())?;
    std::fs::rename(&partial, path).with_context(|| path.display().to_string())
}

/// Waits until `look` finds something.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let began = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if began.elapsed() > limit {
            bail!("{what}: not within {} s", limit.as_secs());
        }
        sleep(PAUSE);
    }
}

/// A folder with a key, and an agent on a free port of loopback. Whatever runs when it is dropped is ended.
pub struct Lab {
    slipstream: PathBuf,
    address: String,
    directory: TempDir,
}

impl Lab {
    /// Makes the folder and the key, and starts the agent.
    pub fn new(slipstream: &Path) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("slipstream-bench-")
            .tempdir()
            .context("a temporary folder")?;
        let mut lab = Self { slipstream: slipstream.to_owned(), address: String::new(), directory };
        let made = lab.slipstream(&["keygen"]).arg(lab.path("key")).output();
        let made = made.with_context(|| lab.slipstream.display().to_string())?;
        if !made.status.success() {
            bail!("slipstream keygen: {}", String::from_utf8_lossy(&made.stderr).trim());
        }
        let log = lab.path("agent.log");
        let mut command = lab.slipstream(&["agent", "--listen", "127.0.0.1:0"]);
        command.arg("--key").arg(lab.path("key")).arg("--run-dir").arg(lab.path("run-agent"));
        command.stdout(Stdio::null()).stderr(File::create(&log).context("a log file")?);
        command.spawn().context("starting the agent")?;
        lab.address = wait_for("the agent to listen", SOON, || {
            let said = std::fs::read_to_string(&log).context("the agent's log")?;
            let found = said.lines().find_map(|l| l.split("listening on ").nth(1));
            Ok(found.map(|a| a.trim().to_owned()))
        })?;
        Ok(lab)
    }

    /// A file of the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn slipstream(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.slipstream);
        command.args(words).stdin(Stdio::null());
        edge::detach(&mut command);
        command
    }

    /// `slipstream migrate --json` of a process to the agent; its events on a pipe, its errors in `migrate.log`.
    pub fn migrate(&self, pid: i32) -> Result<Command> {
        let destination = format!("tcp://{}", self.address);
        let mut command = self.slipstream(&["migrate", &pid.to_string(), &destination, "--json"]);
        command.arg("--key").arg(self.path("key")).arg("--run-dir").arg(self.path("run-source"));
        let log = File::create(self.path("migrate.log")).context("a log file")?;
        command.stdout(Stdio::piped()).stderr(log);
        Ok(command)
    }

    /// The end of a log of the folder, for a message.
    pub fn log(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.path(name)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join(" / ")
    }

    /// Starts this program again as another one, in a folder of its own, and waits until it is ready.
    pub fn start_own(&self, name: &str, words: &[String]) -> Result<Program> {
        let directory = self.path(name);
        std::fs::create_dir(&directory).context("a folder for a program")?;
        let output = File::create(directory.join("out.log")).context("a log file")?;
        let mut command =
            Command::new(std::env::current_exe().context("the path of this program")?);
        command.args(words).arg(&directory).current_dir(&directory).stdin(Stdio::null());
        command.stdout(output.try_clone().context("dup of a log file")?).stderr(output);
        edge::detach(&mut command);
        let child = command.spawn().context("starting a program")?;
        let mut program =
            Program { directory, pid: child.id() as i32, reports: 0, said: String::new() };
        program.said = wait_for("a program to fill its memory", FILL, || {
            program.read_published("ready", PidFd::open(program.pid).ok().as_ref())
        })?;
        Ok(program)
    }

    /// Starts the program that touches memory.
    pub fn start_touch(&self, bytes: u64, threads: usize, mode: Mode) -> Result<Program> {
        let words = [bytes.to_string(), threads.to_string(), mode.word().to_owned()];
        let words: Vec<String> = ["__touch".to_owned()].into_iter().chain(words).collect();
        self.start_own("touch", &words)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        end_descendants();
    }
}

/// A program of ours, wherever it runs by now.
pub struct Program {
    directory: PathBuf,
    /// Its PID, as this host sees it.
    pub pid: i32,
    /// What it published when it was ready.
    pub said: String,
    reports: u64,
}

impl Program {
    fn read_published(&self, name: &str, process: Option<&PidFd>) -> Result<Option<String>> {
        let path = self.directory.join(name);
        let ended = process.is_none_or(PidFd::exited);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(_) if ended => {
                let said = std::fs::read_to_string(self.directory.join("out.log"));
                bail!("the program ended: {}", said.unwrap_or_default().trim())
            }
            Err(_) => Ok(None),
        }
    }

    /// What it has seen since the last time; with `check` it looks at every page first.
    pub fn seen(&mut self, check: bool) -> Result<Seen> {
        let process = PidFd::open(self.pid).context("the program has ended")?;
        process.kill(if check { libc::SIGUSR2 } else { libc::SIGUSR1 })?;
        let name = format!("seen.{}", self.reports);
        self.reports += 1;
        let text = wait_for("the program to say what it saw", FILL, || {
            self.read_published(&name, Some(&process))
        })?;
        serde_json::from_str(&text).context("what the program saw")
    }

    /// Touches a second, over the given time.
    pub fn rate(&mut self, over: Duration) -> Result<f64> {
        let from = self.seen(false)?;
        sleep(over);
        let to = self.seen(false)?;
        Ok((to.touches - from.touches) as f64 / ((to.at_ns - from.at_ns).max(1) as f64 / 1e9))
    }
}

/// Processes that descend from this one, parents first.
pub fn descendants() -> Vec<i32> {
    let mut found = Vec::new();
    let mut next = 0;
    let mut of = std::process::id() as i32;
    loop {
        let tasks = std::fs::read_dir(format!("/proc/{of}/task")).into_iter().flatten().flatten();
        for task in tasks {
            let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(text.split_whitespace().filter_map(|n| n.parse::<i32>().ok()));
        }
        let Some(pid) = found.get(next) else { return found };
        of = *pid;
        next += 1;
    }
}

/// Ends everything that was started here, and what that started.
fn end_descendants() {
    for _ in 0..1000 {
        let all = descendants();
        if all.is_empty() {
            return;
        }
        for pid in all.iter().rev() {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        for pid in all {
            // Only our own children can be waited for; the others become ours when their parents have ended.
            let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
        }
        sleep(PAUSE);
    }
    eprintln!("slipstream-bench: left behind: {:?}", descendants());
}
