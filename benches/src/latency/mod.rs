//! Measures what a page fault over the network costs between two hosts, and what a drain costs the source.
//!
//! It runs on the source; on the other host an agent is all that is needed, and this program at the same path, because programs are
//! moved with their files.

mod chart;
mod moves;
mod report;
pub mod wanderer;

use anyhow::{Context, Result};
use clap::Args;
use moves::Mover;
use std::path::{Path, PathBuf};
use wanderer::Walk;

/// Arguments of `latency`.
#[derive(Debug, Args)]
pub struct Flags {
    /// The agent: tcp://HOST:PORT
    destination: String,
    /// Key file of the agent
    #[arg(long)]
    key: PathBuf,
    /// What carries the pages: auto, rdma or tcp
    #[arg(long, default_value = "auto")]
    transport: String,
    /// Megabytes that the programs hold whose drains are measured
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(8..=65536))]
    mb: u64,
    /// Pages of the program that waits for each of them, with nothing else on the network
    #[arg(long, default_value_t = 4000, value_parser = clap::value_parser!(u64).range(100..=1_000_000))]
    pages: u64,
    /// Where the JSON goes: all rows, and what each move said
    #[arg(long, default_value = "slipstream-latency.json")]
    json: PathBuf,
    /// Where the histogram goes
    #[arg(long, default_value = "slipstream-latency.svg")]
    svg: PathBuf,
}

/// Measures and reports.
pub fn run(flags: &Flags, slipstream: &Path) -> Result<()> {
    let mover = Mover {
        slipstream: slipstream.to_owned(),
        destination: flags.destination.clone(),
        key: flags.key.clone(),
        directory: tempfile::tempdir().context("a temporary folder")?,
    };
    let (bytes, transport) = (flags.mb << 20, flags.transport.as_str());
    eprintln!("single READs");
    let read_us = mover.read_us(transport)?;
    eprintln!("faults, nothing else on the network");
    let alone = mover.migrate(
        flags.pages * 4096,
        Walk::Random,
        &["--transport", transport, "--prefetch-limit", "0.1"],
    )?;
    eprintln!("faults, prefetch at full rate");
    let beside = mover.migrate(bytes, Walk::Random, &["--transport", transport])?;
    eprintln!("a drain, the program idle");
    let idle = mover.migrate(bytes, Walk::None, &["--transport", transport])?;
    eprintln!("the same over TCP");
    let tcp = mover.migrate(bytes, Walk::None, &["--transport", "tcp"])?;
    let copy_us = moves::copy_us(bytes);
    let measured = report::Measured { read_us, alone, beside, idle, tcp, copy_us };
    let rows = report::rows(&measured);
    print!("{}", report::table(&rows));
    report::write_json(&flags.json, &rows, &measured)?;
    let svg = chart::histogram(&measured);
    std::fs::write(&flags.svg, svg).with_context(|| flags.svg.display().to_string())?;
    println!("\n{} {}", flags.json.display(), flags.svg.display());
    Ok(())
}
