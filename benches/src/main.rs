//! Measures what Slipstream promises: blackout, drain, first touches, memory, and that nothing is left behind.
//!
//! One run moves a program eight times (small, middle, large, four threads, sequential, idle three times) and measures the parts the
//! idle drain's limit is made of. All figures of a table come from the same runs.

mod edge;
mod filler;
mod lab;
mod latency;
mod memory;
mod migration;
mod parts;
mod proof;
mod report;
mod scenario;
mod touch;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use scenario::Plan;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Measures blackout, drain and first-touch times of `slipstream migrate` on this machine.
///
/// Needs root, and memory for two copies of 4 GiB. The `slipstream` binary is taken from `SLIPSTREAM_BIN`, or
/// from beside this program (`cargo build --release -p slipstream`).
#[derive(Debug, Parser)]
#[command(name = "slipstream-bench", args_conflicts_with_subcommands = true)]
struct Flags {
    #[command(subcommand)]
    command: Option<Command>,
    /// Runs; each row is the median of them
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Where the JSON goes
    #[arg(long, default_value = "slipstream-bench.json")]
    json: PathBuf,
    /// One small run, to see that the harness works; its figures mean nothing
    #[arg(long)]
    quick: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measures fault latency, split into its parts, and drain rate between this host and an agent's
    ///
    /// On the other host only an agent runs, and this program lies at the same path there, because programs are moved with their
    /// files. Programs that it has moved end by themselves.
    Latency(latency::Flags),
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments.iter().skip(1).map(String::as_str).collect();
    // The programs that are moved and written to are this one, started with a hidden first word.
    let result = match words.as_slice() {
        ["__touch", rest @ ..] => touch::main(rest),
        ["__filler", rest @ ..] => filler::main(rest),
        ["__wander", rest @ ..] => latency::wanderer::main(rest),
        _ => run(&Flags::parse()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("slipstream-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: &Flags) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("moving processes needs root");
    }
    let slipstream = slipstream_binary()?;
    if let Some(Command::Latency(flags)) = &flags.command {
        return latency::run(flags, &slipstream);
    }
    let plan = if flags.quick { Plan::quick() } else { Plan::full() };
    let runs = if flags.quick { 1 } else { flags.runs };
    lab::check_memory(plan.bytes_largest())?;
    lab::adopt_orphans()?;
    let machine = report::Machine::here();
    let mut results = Vec::new();
    for number in 1..=runs {
        results.push(scenario::run(&plan, &slipstream, number, runs)?);
    }
    let rows = report::rows(&plan, &results);
    print!("{}", report::table(&machine, &rows, results.len(), flags.quick));
    report::write_json(&flags.json, &machine, &plan, &rows, &results, flags.quick)?;
    println!("\n{}", flags.json.display());
    match results.iter().flat_map(scenario::Run::failures).count() {
        0 => Ok(()),
        failed => bail!("{failed} of the migrations failed; the JSON file says how"),
    }
}

/// The binary to measure; an unoptimised one would say nothing.
fn slipstream_binary() -> Result<PathBuf> {
    let path = if let Some(path) = std::env::var_os("SLIPSTREAM_BIN") {
        PathBuf::from(path)
    } else {
        let own = std::env::current_exe().context("the path of this program")?;
        own.parent().unwrap_or(Path::new("/")).join("slipstream")
    };
    path.canonicalize().with_context(|| {
        format!(
            "{} is missing: cargo build --release -p slipstream, or set SLIPSTREAM_BIN",
            path.display()
        )
    })
}
