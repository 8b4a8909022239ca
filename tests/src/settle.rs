//! What has to be so after something of Slipstream was killed, wherever that was.

use std::process::Stdio;
use std::time::Duration;

use crate::hosts::{Hosts, Side};
use crate::process::status_field;
use crate::program::{Program, Verdict};
use crate::{build, wait};

/// Whether a program runs: it is there, and not stopped for good.
fn runs(pid: i32) -> bool {
    status_field(pid, "State").is_some_and(|state| state.starts_with(['R', 'S', 'D']))
}

/// Whether its copy on the destination is there.
fn is_there(program: &Program) -> bool {
    let comm = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let hosts = program.hosts();
    hosts.host(Side::Destination).pids().into_iter().any(|pid| comm(pid).starts_with("anon"))
}

/// Takes up what a source session has left, or has it said to be nothing. Then exactly one copy of the program runs, and finds
/// everything in order.
pub fn assert_settles(hosts: &Hosts, program: &Program, what: &str) {
    for entry in std::fs::read_dir(hosts.run_dir(Side::Source)).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(id) = name.strip_prefix("source-") else { continue };
        let mut command = hosts.host(Side::Source).command(build::slipstream());
        command.args(["recover", id, "--run-dir"]).arg(hosts.run_dir(Side::Source));
        let output = command.stdin(Stdio::null()).output().expect("running slipstream recover");
        eprintln!("{what}: recover: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    wait::until(&format!("{what}: exactly one copy"), Duration::from_secs(20), || {
        (runs(program.pid) != is_there(program)).then_some(())
    });
    if runs(program.pid) {
        let maps = crate::process::proc_file(program.pid, "maps");
        // What a session has code of its own in.
        assert!(!maps.contains(" rwxs "), "{what}: scratch memory is left in it:\n{maps}");
    }
    program.tell();
    wait::until(&format!("{what}: a verdict"), wait::LIMIT, || {
        (program.verdict() != Verdict::None).then_some(())
    });
    program.assert_ok();
}
