//! The far end of tests between two machines, and what they need before: see tests/README.md.
//!
//! `serve ADDR:PORT` does what tests ask for; `on ADDR:PORT CGROUP PROGRAM ARG...` runs a program there; `compile` compiles
//! the test programs (linked the usual way), for machines that can't write where they lie.

use slipstream_tests::{Build, build, far};

const USAGE: &str = "serve ADDR:PORT | on ADDR:PORT CGROUP PROGRAM ARG... | compile";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let address = |text: &str| text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
    match arguments.as_slice() {
        ["serve", listen] => far::serve(address(listen)),
        ["on", server, cgroup, argv @ ..] if !argv.is_empty() => {
            let argv: Vec<_> = argv.iter().map(ToString::to_string).collect();
            std::process::exit(far::run_there(address(server), cgroup, &argv));
        }
        ["compile"] => compile(),
        _ => {
            eprintln!("usage: slipstream-test-host {USAGE}");
            std::process::exit(2);
        }
    }
}

fn compile() {
    for name in build::all() {
        Build::dynamic(name.leak()).executable();
    }
}
