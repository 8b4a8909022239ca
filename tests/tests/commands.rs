//! The commands around a migration.

use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use serde_json::Value;
use slipstream_tests::{Build, Hosts, Program, Side};

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// All lines of `--json` output, each an object with a version.
fn objects(output: &Output) -> Vec<Value> {
    let parse =
        |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let objects: Vec<Value> = text(output).lines().map(parse).collect();
    for object in &objects {
        assert!(object["v"] == 1 && object["event"].is_string(), "not an event: {object}");
    }
    objects
}

#[test]
fn keygen_makes_a_private_key_and_overwrites_none() {
    let hosts = Hosts::two();
    let key = hosts.key();
    let mode = std::fs::metadata(&key).expect("the key").permissions().mode() & 0o7777;
    assert_eq!(mode, 0o600, "mode {mode:o}");
    let before = std::fs::read(&key).expect("the key");
    let again = hosts.slipstream(&["keygen", key.to_str().expect("a path")]);
    assert!(!again.status.success(), "an existing key was overwritten");
    assert_eq!(std::fs::read(&key).expect("the key"), before);
    let other = hosts.path().join("other");
    assert!(hosts.slipstream(&["keygen", other.to_str().expect("a path")]).status.success());
    assert_ne!(std::fs::read(&other).expect("the key"), before, "two keys are the same");
}

#[test]
fn usage_errors() {
    let hosts = Hosts::two();
    for arguments in [
        &[][..],
        &["migrate"],
        &["migrate", "1"],
        &["no-such-command"],
        &["status", "--no-such-option"],
    ] {
        let output = hosts.slipstream(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}: nothing said");
    }
    for arguments in [&["--help"][..], &["--version"], &["migrate", "--help"]] {
        let output = hosts.slipstream(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
        assert!(!output.stdout.is_empty(), "{arguments:?}: nothing said");
    }
}

#[test]
fn check_of_this_host() {
    let hosts = Hosts::two();
    let output = hosts.slipstream(&["check", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!objects(&output).is_empty(), "nothing said");
}

/// Both sides know of a moved process.
#[test]
fn status_knows_the_migration() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("heap"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let id = migration.wait_event("committed")["id"].as_str().expect("an id").to_owned();
    let moved = migration.wait().assert_completed();
    let run_dir = hosts.run_dir(Side::Destination);
    let arguments = ["status", "--json", "--run-dir", run_dir.to_str().expect("a path")];
    let output = hosts
        .host(Side::Destination)
        .command(slipstream_tests::build::slipstream())
        .args(arguments)
        .output();
    let output = output.expect("running slipstream");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(
        text(&output).contains(&id) || text(&output).contains(&moved.pid.to_string()),
        "{}",
        text(&output)
    );
    objects(&output);
    program.tell();
    moved.wait_end(std::time::Duration::from_secs(30));
    program.assert_ok();
}

#[test]
fn unknown_ids() {
    let hosts = Hosts::two();
    let run_dir = hosts.run_dir(Side::Source);
    for command in ["recover", "abort"] {
        let output = hosts.slipstream(&[
            command,
            "no-such-id",
            "--run-dir",
            run_dir.to_str().expect("a path"),
        ]);
        assert!(!output.status.success(), "{command}: {output:?}");
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("no-such-id"),
            "{command}: {output:?}"
        );
    }
}
