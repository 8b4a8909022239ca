//! What can't be moved is refused before anything is touched: the thing named, the remedy with it, the right exit code.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::unistd::Pid;
use slipstream_tests::compare::Untouched;
use slipstream_tests::migration::code::{REFUSED, USAGE};
use slipstream_tests::process::proc_file;
use slipstream_tests::program::Verdict;
use slipstream_tests::{Build, Hosts, Migration, Outcome, Program, Side, skipped};

const SOON: Duration = Duration::from_secs(45);

fn migrate(hosts: &Hosts, pid: i32, destination: &str) -> Outcome {
    Migration::start(hosts, pid, destination, |_| {}).wait_at_most(SOON)
}

/// A harmless program that must be untouched afterwards, and is asked at the end.
fn refused(destination: impl FnOnce(&Hosts) -> String, exit_codes: &[i32], words: &[&str]) {
    let hosts = Hosts::two();
    let destination = destination(&hosts);
    refused_there(&hosts, &destination, exit_codes, words, |_| {});
}

fn refused_there(
    hosts: &Hosts,
    destination: &str,
    exit_codes: &[i32],
    words: &[&str],
    adjust: impl FnOnce(&mut Command),
) {
    let program = Program::start(hosts, Build::dynamic("heap"), &[]);
    let before = Untouched::remember(program.pid);
    let outcome = Migration::start(hosts, program.pid, destination, adjust).wait_at_most(SOON);
    let code = outcome.code.expect("an exit code");
    assert!(exit_codes.contains(&code), "exit code {code}: {outcome:#?}");
    outcome.assert_refused(code, words);
    assert_one_line(&outcome);
    before.assert_untouched();
    program.assert_finishes_at_home();
}

/// The message is a line, not a page: no backtrace, no chain of causes over many lines.
fn assert_one_line(outcome: &Outcome) {
    let lines = outcome.errors.lines().filter(|line| !line.trim().is_empty()).count();
    assert!((1..=6).contains(&lines), "{lines} lines of error:\n{}", outcome.errors);
}

// --- which process ---------------------------------------------------------------------------------------------------

#[test]
fn no_such_process() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let mut child = Command::new("true").spawn().expect("true");
    child.wait().expect("waiting");
    let pid = child.id() as i32;
    migrate(&hosts, pid, &agent.destination()).assert_refused(REFUSED, &[&pid.to_string()]);
}

#[test]
fn not_a_pid() {
    let hosts = Hosts::two();
    for pid in ["abc", "-1", "0", "99999999999999999999", ""] {
        let output = hosts.slipstream(&[
            "migrate",
            pid,
            "tcp://127.0.0.1:1",
            "--key",
            hosts.key().to_str().expect("a path"),
        ]);
        assert_eq!(
            output.status.code(),
            Some(USAGE),
            "PID {pid:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn kernel_thread() {
    if proc_file(2, "comm").trim() != "kthreadd" {
        return skipped("kernel_thread", "kernel threads are not seen from this PID namespace");
    }
    let hosts = Hosts::two();
    let agent = hosts.agent();
    migrate(&hosts, 2, &agent.destination()).assert_refused(REFUSED, &["2", "kernel"]);
}

#[test]
fn zombie() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let mut child = Command::new("true").spawn().expect("true");
    let pid = child.id() as i32;
    slipstream_tests::wait::until("a zombie", SOON, || {
        proc_file(pid, "stat").contains(") Z ").then_some(())
    });
    let outcome = migrate(&hosts, pid, &agent.destination());
    child.wait().expect("waiting");
    outcome.assert_refused(REFUSED, &[&pid.to_string(), "zombie"]);
}

#[test]
fn traced_already() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic("heap"), &[]);
    let pid = Pid::from_raw(program.pid);
    ptrace::seize(pid, ptrace::Options::empty()).expect("tracing the program");
    let outcome = migrate(&hosts, program.pid, &agent.destination());
    assert_ne!(
        proc_file(program.pid, "status").find(&format!("TracerPid:\t{}", nix::unistd::gettid())),
        None,
        "no longer ours"
    );
    outcome.assert_refused(REFUSED, &[&program.pid.to_string(), "traced"]);
    ptrace::interrupt(pid).expect("stopping it once");
    nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::__WALL)).expect("the stop");
    ptrace::detach(pid, None).expect("letting it go");
    program.assert_finishes_at_home();
}

#[test]
fn slipstream_itself() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    migrate(&hosts, agent.pid(), &agent.destination())
        .assert_refused(REFUSED, &[&agent.pid().to_string(), "slipstream"]);
    assert!(agent.alive());
}

#[test]
fn without_privilege() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    // A key and a run directory of the other user's own: those are not to be the reason.
    let home = hosts.path().join("home");
    std::fs::create_dir(&home).expect("a folder");
    let key = home.join("key");
    std::fs::copy(hosts.key(), &key).expect("a copy of the key");
    for path in [&home, &key] {
        std::os::unix::fs::chown(path, Some(1234), Some(1234)).expect("chown");
    }
    let bin = home.join("slipstream");
    std::fs::copy(slipstream_tests::build::slipstream(), &bin).expect("a copy of the binary");
    let program = Program::start(&hosts, Build::dynamic("heap"), &[]);
    let before = Untouched::remember(program.pid);
    // Not Command::uid: that is applied before the namespace is entered, which takes privilege.
    let output = hosts
        .host(Side::Source)
        .command("setpriv")
        .args(["--reuid", "1234", "--regid", "1234", "--clear-groups"])
        .arg(&bin)
        .args(["migrate", &program.pid.to_string(), &agent.destination(), "--key"])
        .arg(&key)
        .arg("--run-dir")
        .arg(home.join("run"))
        .stdin(Stdio::null())
        .output()
        .expect("running setpriv (package util-linux)");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(REFUSED), "{said}");
    assert!(said.contains(&program.pid.to_string()), "{said}");
    before.assert_untouched();
    program.assert_finishes_at_home();
}

// --- which destination -----------------------------------------------------------------------------------------------

#[test]
fn destination_does_not_resolve() {
    refused(|_| "tcp://no-such-host.invalid:4000".into(), &[REFUSED], &["no-such-host.invalid"]);
}

#[test]
fn destination_refuses() {
    refused(
        |hosts| format!("tcp://{}:9", hosts.host(Side::Destination).address),
        &[REFUSED],
        &["10.77.0.2:9", "refused"],
    );
}

#[test]
fn destination_is_not_there() {
    refused(|_| "tcp://10.77.0.99:4000".into(), &[REFUSED], &["10.77.0.99:4000"]);
}

#[test]
fn destination_is_malformed() {
    for destination in ["tcp://", "tcp://host", "tcp://host:99999", "http://host:80", ""] {
        refused(|_| destination.into(), &[USAGE], &[]);
    }
}

#[test]
fn destinations_of_later() {
    refused(|_| "somebody@far-host".into(), &[REFUSED, USAGE], &["ssh"]);
    let hosts = Hosts::two();
    let agent = hosts.agent();
    refused_there(&hosts, &agent.destination(), &[REFUSED, USAGE], &["tree"], |command| {
        command.arg("--tree");
    });
    refused_there(&hosts, &agent.destination(), &[REFUSED, USAGE], &["rdma"], |command| {
        command.args(["--transport", "rdma"]);
    });
}

/// Listens on the destination and treats each connection so.
fn stranger(hosts: &Hosts, treat: fn(std::net::TcpStream)) -> SocketAddr {
    let host = hosts.host(Side::Destination);
    let listener = host.enter(|| TcpListener::bind((host.address, 0))).expect("listening");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || treat(stream));
        }
    });
    address
}

#[test]
fn destination_hangs() {
    let hosts = Hosts::two();
    let address = stranger(&hosts, |mut stream| {
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let begin = Instant::now();
    refused_there(
        &hosts,
        &format!("tcp://{address}"),
        &[REFUSED],
        &[&address.to_string()],
        |command| {
            command.args(["--timeout", "2"]);
        },
    );
    assert!(begin.elapsed() < Duration::from_secs(20), "took {:?}", begin.elapsed());
}

#[test]
fn destination_speaks_something_else() {
    let hosts = Hosts::two();
    let address = stranger(&hosts, |mut stream| {
        let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\nHTTP/1.1 400 Bad Request\r\n\r\n");
        let _ = stream.read(&mut [0; 1024]);
    });
    refused_there(&hosts, &format!("tcp://{address}"), &[REFUSED], &[&address.to_string()], |_| {});
}

#[test]
fn destination_closes_at_once() {
    let hosts = Hosts::two();
    let address = stranger(&hosts, drop);
    refused_there(&hosts, &format!("tcp://{address}"), &[REFUSED], &[&address.to_string()], |_| {});
}

#[test]
fn destination_holds_another_key() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let other = hosts.path().join("other-key");
    let output = hosts.slipstream(&["keygen", other.to_str().expect("a path")]);
    assert!(output.status.success(), "keygen");
    refused_there(&hosts, &agent.destination(), &[REFUSED], &["key"], |_| {
        // The agent has read its key by now; an option given twice would be a usage error.
        std::fs::copy(&other, hosts.key()).expect("exchanging the key");
    });
    assert!(agent.alive());
}

#[test]
fn key_that_others_can_read() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    std::fs::set_permissions(hosts.key(), std::fs::Permissions::from_mode(0o644)).expect("chmod");
    refused_there(&hosts, &agent.destination(), &[REFUSED, USAGE], &["chmod 600"], |_| {});
}

#[test]
fn key_that_is_missing() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    std::fs::remove_file(hosts.key()).expect("removing the key");
    refused_there(&hosts, &agent.destination(), &[REFUSED, USAGE], &["keygen"], |_| {});
}

// --- what the destination lacks --------------------------------------------------------------------------------------

/// An agent that sees `over` in place of the file `path` (or, for a folder, an empty one).
fn agent_that_sees(hosts: &Hosts, path: &Path, over: Option<&Path>) -> slipstream_tests::Agent {
    let text =
        |path: &Path| std::ffi::CString::new(path.to_str().expect("a path")).expect("no NUL");
    let (target, source) = (text(path), over.map(text));
    hosts.agent_with(move |command| {
        let mount = move || {
            let private = libc::MS_REC | libc::MS_PRIVATE;
            let null = std::ptr::null();
            // SAFETY: plain system calls between fork and exec; all strings were made before.
            let failed = unsafe {
                libc::unshare(libc::CLONE_NEWNS) != 0
                    || libc::mount(null, c"/".as_ptr(), null, private, null.cast()) != 0
                    || match &source {
                        Some(file) => libc::mount(
                            file.as_ptr(),
                            target.as_ptr(),
                            null,
                            libc::MS_BIND,
                            null.cast(),
                        ),
                        None => libc::mount(
                            c"none".as_ptr(),
                            target.as_ptr(),
                            c"tmpfs".as_ptr(),
                            0,
                            null.cast(),
                        ),
                    } != 0
            };
            if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        };
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(mount) };
    })
}

#[test]
fn destination_lacks_a_file() {
    let hosts = Hosts::two();
    let program = Program::start(&hosts, Build::dynamic("files"), &[]);
    let before = Untouched::remember(program.pid);
    let agent = agent_that_sees(&hosts, program.directory(), None);
    let log = program.directory().join("log");
    migrate(&hosts, program.pid, &agent.destination())
        .assert_refused(REFUSED, &[log.to_str().expect("a path")]);
    before.assert_untouched();
    program.assert_finishes_at_home();
}

#[test]
fn destination_has_another_executable() {
    let hosts = Hosts::two();
    let program = Program::start(&hosts, Build::dynamic("heap"), &[]);
    let executable = Build::dynamic("heap").executable();
    let agent = agent_that_sees(&hosts, &executable, Some(Path::new("/bin/true")));
    let words = [executable.to_str().expect("a path")];
    migrate(&hosts, program.pid, &agent.destination()).assert_refused(REFUSED, &words);
    program.assert_finishes_at_home();
}

#[test]
fn destination_lacks_memory() {
    let hosts = Hosts::two();
    let fake = hosts.path().join("meminfo");
    let real = std::fs::read_to_string("/proc/meminfo").expect("/proc/meminfo");
    let poor: String = real
        .lines()
        .map(|line| {
            if line.starts_with("MemAvailable:") {
                "MemAvailable:   4096 kB\n".into()
            } else {
                format!("{line}\n")
            }
        })
        .collect();
    std::fs::write(&fake, poor).expect("a file");
    let agent = agent_that_sees(&hosts, Path::new("/proc/meminfo"), Some(&fake));
    refused_there(&hosts, &agent.destination(), &[REFUSED], &["memory"], |_| {});
}

#[test]
fn destination_lacks_a_cpu_feature() {
    let hosts = Hosts::two();
    let fake = hosts.path().join("cpuinfo");
    let real = std::fs::read_to_string("/proc/cpuinfo").expect("/proc/cpuinfo");
    if !real.contains(" avx2 ") {
        return skipped("destination_lacks_a_cpu_feature", "this CPU has no avx2 to take away");
    }
    std::fs::write(&fake, real.replace(" avx2 ", " ")).expect("a file");
    let agent = agent_that_sees(&hosts, Path::new("/proc/cpuinfo"), Some(&fake));
    refused_there(&hosts, &agent.destination(), &[REFUSED], &["avx2"], |_| {});
}

// --- what the process holds ------------------------------------------------------------------------------------------

/// All blockers in one report, each by its name.
fn all_named(name: &'static str) {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let program = Program::start(&hosts, Build::dynamic(name), &[]);
    assert_eq!(program.verdict(), Verdict::None, "{}", program.output());
    let before = Untouched::remember(program.pid);
    let outcome = migrate(&hosts, program.pid, &agent.destination());
    let output = program.output();
    let words: Vec<_> = output.lines().filter_map(|line| line.strip_prefix("blocker: ")).collect();
    assert!(!words.is_empty(), "the program holds no blocker: {output}");
    outcome.assert_refused(REFUSED, &words);
    let preflight = outcome.event("preflight").expect("the event preflight");
    let blockers = preflight["blockers"].as_array().expect("blockers");
    assert!(blockers.len() >= words.len(), "{} blockers for {words:?}", blockers.len());
    for blocker in blockers {
        for part in ["object", "reason", "remedy"] {
            assert!(
                blocker[part].as_str().is_some_and(|text| !text.is_empty()),
                "no {part}: {blocker}"
            );
        }
    }
    before.assert_untouched();
    program.assert_finishes_at_home();
}

#[test]
fn everything_immovable_in_one_report() {
    all_named("blockers");
}

#[test]
fn seccomp_filter() {
    all_named("filtered");
}

/// `slipstream check PID DEST` says the same without moving anything.
#[test]
fn check_agrees() {
    let hosts = Hosts::two();
    let agent = hosts.agent();
    let bad = Program::start(&hosts, Build::dynamic("filtered"), &[]);
    let good = Program::start(&hosts, Build::dynamic("heap"), &[]);
    let key = hosts.key();
    let check = |pid: i32| {
        hosts.slipstream(&[
            "check",
            &pid.to_string(),
            &agent.destination(),
            "--key",
            key.to_str().expect("a path"),
        ])
    };
    let refused = check(bad.pid);
    assert_eq!(refused.status.code(), Some(REFUSED), "{refused:?}");
    let accepted = check(good.pid);
    assert_eq!(accepted.status.code(), Some(0), "{accepted:?}");
    bad.assert_finishes_at_home();
    good.assert_finishes_at_home();
}
