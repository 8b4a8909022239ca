//! Whole runtimes: garbage collectors, interpreters and thread pools are moved while they work.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use slipstream_tests::build::{on_path, profile_dir};
use slipstream_tests::compare::Untouched;
use slipstream_tests::migration::code::REFUSED;
use slipstream_tests::process::Inventory;
use slipstream_tests::{Hosts, Program, Side, skipped, wait};

fn source(file: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/programs/languages")).join(file)
}

/// A folder for what a compiler makes; one per language, and one test per language.
fn made(name: &str) -> PathBuf {
    let folder = profile_dir().join("test-programs").join(name);
    std::fs::create_dir_all(&folder).expect("a folder for compiled programs");
    folder
}

fn compile(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The real executable: version managers put scripts of their own in its place, which would be moved instead.
fn real(program: &str, arguments: &[&str]) -> PathBuf {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
}

fn moves_while_working(name: &str, executable: &Path, arguments: &[&str]) {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::run(&hosts, name, executable, |command, flag| {
        command.args(arguments).arg(flag);
    });
    program.wait_for_line("ready");
    assert!(program.source_status().is_none(), "{name} ended: {}", hosts.describe());
    let moved = hosts.migrate(&program, &agent).wait().assert_completed();
    program.assert_source_dropped();
    std::thread::sleep(Duration::from_millis(500));
    program.tell();
    moved.wait_end(Duration::from_secs(90));
    program.assert_ok();
}

#[test]
fn python() {
    if !on_path("python3") {
        return skipped("python", "no python3");
    }
    let python = real("python3", &["-c", "import os; print(os.path.realpath('/proc/self/exe'))"]);
    moves_while_working("python", &python, &[source("check.py").to_str().expect("a path")]);
}

#[test]
fn go() {
    if !on_path("go") {
        return skipped("go", "no go (package golang-go)");
    }
    let program = made("go").join("check");
    compile(
        Command::new("go")
            .env("GO111MODULE", "off")
            .args(["build", "-o"])
            .arg(&program)
            .arg(source("check.go")),
    );
    moves_while_working("go", &program, &[]);
}

#[test]
fn rust() {
    if !on_path("rustc") {
        return skipped("rust", "no rustc");
    }
    let program = made("rust").join("check");
    compile(
        Command::new("rustc")
            .args(["--edition", "2021", "-O", "-o"])
            .arg(&program)
            .arg(source("check.rs")),
    );
    moves_while_working("rust", &program, &[]);
}

#[test]
fn java() {
    if !on_path("java") || !on_path("javac") {
        return skipped("java", "no java and javac (package default-jdk-headless)");
    }
    let classes = made("java");
    compile(Command::new("javac").arg("-d").arg(&classes).arg(source("Check.java")));
    let java = real("sh", &["-c", "readlink -f \"$(command -v java)\""]);
    moves_while_working(
        "java",
        &java,
        &["-Xmx512m", "-cp", classes.to_str().expect("a path"), "Check"],
    );
}

/// Sockets come with a later issue: until then a server is refused by the name of its descriptor, and goes on serving.
#[test]
fn redis_is_refused_and_serves_on() {
    if !on_path("redis-server") || !on_path("redis-cli") {
        return skipped(
            "redis",
            "no redis-server and redis-cli (packages redis-server, redis-tools)",
        );
    }
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::run(&hosts, "redis", "redis-server", |command, _| {
        command.args(["--port", "6379", "--save", "", "--appendonly", "no"]);
    });
    let ask = |arguments: &[&str]| {
        let output = hosts
            .host(Side::Source)
            .command("redis-cli")
            .args(arguments)
            .output()
            .expect("redis-cli");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    };
    wait::until("redis to answer", Duration::from_secs(20), || {
        (ask(&["ping"]) == "PONG").then_some(())
    });
    assert_eq!(ask(&["set", "key", "value"]), "OK");
    // It listens on two, and closes that of a client some time after the client has ended.
    wait::until("redis to have no client", Duration::from_secs(20), || {
        let sockets = Inventory::of(program.pid).descriptors.into_values();
        (sockets.filter(|name| name == "socket").count() == 2).then_some(())
    });
    let before = Untouched::remember(program.pid);
    hosts.migrate(&program, &agent).wait().assert_refused(REFUSED, &["fd ", "socket"]);
    before.assert_untouched();
    assert_eq!(ask(&["get", "key"]), "value");
}
