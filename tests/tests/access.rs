//! Who may do what: an agent without root can't be made to act for others, and nobody gets more than he had.

use std::os::unix::fs::{PermissionsExt, chown};
use std::process::Stdio;
use std::time::Duration;

use slipstream_tests::migration::code;
use slipstream_tests::process::status_field;
use slipstream_tests::{Build, Hosts, Migration, Program, Side, build, wait};

const USER: &str = "1234";
const LIMIT: Duration = Duration::from_secs(30);

/// An agent that an ordinary user has started with a key of its own: a process of root is not taken there, and goes on.
#[test]
fn agent_of_an_ordinary_user_takes_no_process_of_root() {
    let hosts = Hosts::two();
    let home = hosts.path().join("home");
    std::fs::create_dir(&home).expect("a folder");
    let (key, bin) = (home.join("key"), home.join("slipstream"));
    std::fs::copy(hosts.key(), &key).expect("a copy of the key");
    std::fs::copy(build::slipstream(), &bin).expect("a copy of the binary");
    for path in [&home, &key] {
        chown(path, Some(1234), Some(1234)).expect("chown");
    }
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).expect("chmod");
    let mut command = hosts.host(Side::Destination).command("setpriv");
    command.args(["--reuid", USER, "--regid", USER, "--clear-groups"]).arg(&bin);
    command.args(["agent", "--listen", "10.77.0.2:0", "--key"]).arg(&key);
    command.arg("--run-dir").arg(home.join("run"));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let log = home.join("agent.log");
    let agent = hosts.spawn(&mut command, &log);
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    wait::until("the agent to begin or not", LIMIT, || {
        let ended = agent.lock().expect("nobody panics with it").try_wait().expect("waiting");
        (ended.is_some() || said().contains("listening on ")).then_some(())
    });
    let said = said();
    let address =
        said.split("listening on ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let address = address.unwrap_or_else(|| panic!("it did not begin: {said}"));
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let outcome = Migration::start(&hosts, program.pid, &format!("tcp://{address}"), |_| {}).wait();
    assert_eq!(outcome.code, Some(code::REFUSED), "{outcome:#?}");
    assert!(outcome.event("frozen").is_none(), "{outcome:#?}");
    // Nobody of that user's has become anything else.
    for pid in hosts.host(Side::Destination).pids() {
        let uids = status_field(pid, "Uid").unwrap_or_default();
        assert!(uids.split_whitespace().all(|uid| uid == USER), "process {pid} has {uids}");
    }
    program.assert_finishes_at_home();
}

/// The run directory, and all in it, is for its owner only.
#[test]
fn run_directory_is_private() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let moved = hosts.migrate(&program, &agent).wait().assert_completed();
    for side in Side::BOTH {
        let mut folders = vec![hosts.run_dir(side)];
        while let Some(folder) = folders.pop() {
            let mode = folder.metadata().expect("metadata").permissions().mode();
            assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", folder.display());
            let entries = std::fs::read_dir(folder).expect("a folder").flatten();
            folders.extend(entries.map(|e| e.path()).filter(|path| path.is_dir()));
        }
    }
    program.tell();
    moved.wait_end(LIMIT);
    program.assert_ok();
}
