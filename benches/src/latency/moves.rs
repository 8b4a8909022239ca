//! Programs that are started here and moved to the agent, and what was said of it.

use super::wanderer::Walk;
use crate::edge;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// For a program to fill its memory.
const READY: Duration = Duration::from_secs(300);
/// Rounds of a copy; the fastest counts.
const COPIES: usize = 5;

/// Moves programs.
pub struct Mover {
    /// The binary.
    pub slipstream: PathBuf,
    /// `tcp://HOST:PORT`.
    pub destination: String,
    /// Its key file.
    pub key: PathBuf,
    /// For files of the programs.
    pub directory: TempDir,
}

impl Mover {
    /// What the destination says of single READs of a page: median and 99th percentile; none where pages go over TCP.
    pub fn read_us(&self, transport: &str) -> Result<Option<[f64; 2]>> {
        let program = self.start(1 << 20, Walk::None)?;
        let pid = program.0.id().to_string();
        let mut command = Command::new(&self.slipstream);
        command.args(["check", &pid, &self.destination, "--json", "--stdio", "null"]);
        command.args(["--transport", transport, "--key"]).arg(&self.key);
        let events = said(&mut command)?;
        let fact = events.iter().find(|event| event["name"] == "transport");
        let read = fact.map(|fact| &fact["read_us"]);
        Ok(read.and_then(|read| Some([read["p50"].as_f64()?, read["p99"].as_f64()?])))
    }

    /// Moves a program; the event `completed`.
    pub fn migrate(&self, bytes: u64, walk: Walk, arguments: &[&str]) -> Result<Value> {
        let mut program = self.start(bytes, walk)?;
        let mut command = Command::new(&self.slipstream);
        command.args(["migrate", &program.0.id().to_string(), &self.destination, "--json"]);
        command.args(["--stdio", "null", "--key"]).arg(&self.key).args(arguments);
        let events = said(&mut command)?;
        program.0.wait().context("waiting for the copy here")?;
        let completed = events.into_iter().find(|event| event["event"] == "completed");
        let completed = completed.context("the migration did not complete")?;
        if completed["exited"] == true {
            bail!("the program ended before its last page had come: {completed}");
        }
        Ok(completed)
    }

    fn start(&self, bytes: u64, walk: Walk) -> Result<Ended> {
        let ready = self.directory.path().join("ready");
        let _ = std::fs::remove_file(&ready);
        let own = std::env::current_exe().context("the path of this program")?;
        let mut command = Command::new(own);
        command.arg("__wander").arg(bytes.to_string()).arg(walk.word()).arg(&ready);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        edge::detach(&mut command);
        // Where it runs must exist at the destination, too.
        let program = Ended(command.current_dir("/").spawn().context("starting a program")?);
        let began = Instant::now();
        while !Path::new(&ready).exists() {
            if began.elapsed() > READY {
                bail!("the program is not ready after {} s", READY.as_secs());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(program)
    }
}

/// A child that is ended with this value.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a command wrote as JSON, a line each.
fn said(command: &mut Command) -> Result<Vec<Value>> {
    let output = command.stdin(Stdio::null()).output().context("starting slipstream")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8(output.stdout).context("what slipstream said")?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// Microseconds that a copy of so many bytes takes this host.
pub fn copy_us(bytes: u64) -> f64 {
    let from = vec![1u8; bytes as usize];
    let mut to = vec![2u8; bytes as usize];
    let copy = |_| {
        let began = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&to);
        began.elapsed().as_secs_f64() * 1e6
    };
    (0..COPIES).map(copy).fold(f64::INFINITY, f64::min)
}
