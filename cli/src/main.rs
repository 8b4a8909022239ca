//! `slipstream`: moves a running process to another host.

mod commands;
mod display;
mod engine;
mod events;
mod flags;
mod report;
mod tables;
mod watch;
mod wiring;

use clap::Parser;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = flags::Cli::parse();
    log_to_stderr(&cli);
    ExitCode::from(commands::run(&wiring::Wired, &cli.command))
}

/// Logs go to stderr: warnings, or what `-v` and `RUST_LOG` ask for. An agent tells what it does.
fn log_to_stderr(cli: &flags::Cli) {
    let agent = u8::from(matches!(cli.command, flags::Command::Agent(_)));
    let level = match cli.verbose + agent {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
}
