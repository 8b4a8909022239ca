//! What a test does on another machine: start something there, hold on to a process, find and end all that it started.
//!
//! One connection a request, which is a line of JSON; whoever can connect is obeyed, so this is for a network that only the
//! two machines are on. Files are named by paths that both have (a shared folder), so that no output travels here.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cgroup::Cgroup;
use crate::process::Pidfd;
use crate::program;
use crate::wait;

/// The other machine, and the control group for what is started there.
#[derive(Clone, Debug)]
pub struct Far {
    server: SocketAddr,
    cgroup: Cgroup,
}

impl Far {
    /// The machine on which [`serve`] listens at `server`.
    pub fn new(server: SocketAddr, cgroup: Cgroup) -> Self {
        Self { server, cgroup }
    }

    /// Its address, and the one it sees this machine at.
    pub fn addresses(&self) -> (IpAddr, IpAddr) {
        let stream = self.ask(&json!({"pids": self.cgroup.name()}));
        let near = stream.get_ref().local_addr().expect("an address");
        (self.server.ip(), near.ip())
    }

    fn ask(&self, request: &Value) -> BufReader<TcpStream> {
        ask(self.server, request)
            .unwrap_or_else(|error| panic!("asking {} for {request}: {error}", self.server))
    }

    /// A command that runs there: it is started, waited for and killed by way of a process here.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(crate::build::profile_dir().join("slipstream-test-host"));
        command.args(["on", &self.server.to_string(), self.cgroup.name()]).arg(program);
        command
    }

    /// The processes that were started there, and theirs.
    pub fn pids(&self) -> Vec<i32> {
        let answer = answer(&mut self.ask(&json!({"pids": self.cgroup.name()})));
        let pids = answer["pids"].as_array().expect("a list of processes");
        pids.iter().map(|pid| pid.as_i64().expect("a PID") as i32).collect()
    }

    /// Their state.
    pub fn describe(&self) -> String {
        let answer = answer(&mut self.ask(&json!({"describe": self.cgroup.name()})));
        answer["text"].as_str().unwrap_or_default().to_owned()
    }

    /// Ends them.
    pub fn end(&self) {
        answer(&mut self.ask(&json!({"end": self.cgroup.name()})));
    }

    /// A hold on a process there. `None` if there is no such process.
    pub fn hold(&self, pid: i32) -> Option<Held> {
        let mut stream = self.ask(&json!({"hold": pid}));
        if answer(&mut stream)["held"] != true {
            return None;
        }
        let stream = stream.into_inner();
        stream.set_nonblocking(true).expect("a connection that doesn't block");
        Some(Held { stream })
    }
}

/// A hold on a process of another machine.
pub struct Held {
    /// Signals go there as lines; it ends with the process.
    stream: TcpStream,
}

impl Held {
    /// Sends a signal; a process that is gone is no error.
    pub fn signal(&self, signal: i32) {
        let _ = (&self.stream).write_all(format!("{signal}\n").as_bytes());
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        !matches!((&self.stream).read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

fn ask(server: SocketAddr, request: &Value) -> io::Result<BufReader<TcpStream>> {
    let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(10))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    Ok(BufReader::new(stream))
}

fn answer(stream: &mut BufReader<TcpStream>) -> Value {
    let mut line = String::new();
    stream.read_line(&mut line).expect("an answer from the other machine");
    let answer: Value = serde_json::from_str(&line)
        .unwrap_or_else(|error| panic!("the other machine answered {line:?}: {error}"));
    assert!(answer["error"].is_null(), "the other machine: {}", answer["error"]);
    answer
}

/// Runs a program on the machine of `server`, with the arguments, environment, folder, output and errors of this process (both
/// are files, or `/dev/null`), and ends as it ended. Killing this process kills it.
pub fn run_there(server: SocketAddr, cgroup: &str, argv: &[String]) -> i32 {
    let output = |fd| {
        let path = std::fs::read_link(format!("/proc/self/fd/{fd}")).expect("an open stream");
        assert!(path.is_file() || path == Path::new("/dev/null"), "{} is no file", path.display());
        path
    };
    let environment: Vec<_> = std::env::vars().collect();
    let directory = std::env::current_dir().expect("a working directory");
    let request = json!({"run": argv, "cgroup": cgroup, "environment": environment,
        "directory": directory, "output": output(1), "errors": output(2)});
    let mut stream = ask(server, &request).expect("reaching the other machine");
    let status = answer(&mut stream)["status"].as_i64().expect("a status");
    let status = std::process::ExitStatus::from_raw(status as i32);
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

/// Does what connections ask for. Never returns.
pub fn serve(listen: SocketAddr) -> ! {
    let listener =
        TcpListener::bind(listen).unwrap_or_else(|error| panic!("listening on {listen}: {error}"));
    loop {
        let Ok((stream, _)) = listener.accept() else { continue };
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = String::new();
            let done = stream.read_line(&mut line).and_then(|_| {
                let request: Value = serde_json::from_str(&line)?;
                obey(&request, &mut stream)
            });
            if let Err(error) = done {
                let _ = say(&stream, &json!({"error": error.to_string()}));
            }
        });
    }
}

fn say(stream: &BufReader<TcpStream>, answer: &Value) -> io::Result<()> {
    stream.get_ref().write_all(format!("{answer}\n").as_bytes())
}

fn obey(request: &Value, stream: &mut BufReader<TcpStream>) -> io::Result<()> {
    let cgroup = |key: &str| {
        let name = request[key].as_str().unwrap_or_default();
        Cgroup::named(name).ok_or_else(|| io::Error::other(format!("{name:?} is no control group")))
    };
    if request["run"].is_array() {
        let child = spawn(request, &cgroup("cgroup")?)?;
        say(stream, &json!({"status": wait_or_kill(child, stream)?}))
    } else if let Some(pid) = request["hold"].as_i64() {
        hold(pid as i32, stream)
    } else if request["pids"].is_string() {
        say(stream, &json!({"pids": cgroup("pids")?.pids()}))
    } else if request["describe"].is_string() {
        say(stream, &json!({"text": cgroup("describe")?.describe()}))
    } else {
        cgroup("end")?.end();
        say(stream, &json!({}))
    }
}

fn spawn(request: &Value, cgroup: &Cgroup) -> io::Result<Child> {
    let texts = |value: &Value| -> Vec<String> {
        let items = value.as_array().into_iter().flatten();
        items.filter_map(|item| Some(item.as_str()?.to_owned())).collect()
    };
    let file = |key: &str| -> io::Result<File> {
        OpenOptions::new().append(true).open(request[key].as_str().unwrap_or_default())
    };
    let argv = texts(&request["run"]);
    let (program, arguments) =
        argv.split_first().ok_or_else(|| io::Error::other("no program to run"))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .current_dir(request["directory"].as_str().unwrap_or("/"))
        .stdin(Stdio::null())
        .stdout(file("output")?)
        .stderr(file("errors")?);
    for pair in request["environment"].as_array().into_iter().flatten() {
        if let [name, value] = texts(pair).as_slice() {
            command.env(name, value);
        }
    }
    program::enter(&mut command, cgroup.entrance()?);
    command.spawn()
}

/// The raw status of a child, which is killed when nobody waits for it any more.
fn wait_or_kill(mut child: Child, stream: &BufReader<TcpStream>) -> io::Result<i32> {
    let process = Pidfd::open(child.id() as i32).map(Arc::new);
    let watched = process.clone();
    let mut connection = stream.get_ref().try_clone()?;
    std::thread::spawn(move || {
        // Nothing more is said on it: whatever this returns, it has ended.
        let _ = connection.read(&mut [0]);
        if let Some(process) = watched {
            process.signal(libc::SIGKILL);
        }
    });
    Ok(child.wait()?.into_raw())
}

fn hold(pid: i32, stream: &mut BufReader<TcpStream>) -> io::Result<()> {
    let process = Pidfd::open(pid).map(Arc::new);
    say(stream, &json!({"held": process.is_some()}))?;
    let Some(process) = process else { return Ok(()) };
    let watched = Arc::clone(&process);
    let connection = stream.get_ref().try_clone()?;
    std::thread::spawn(move || {
        while !watched.ended() {
            std::thread::sleep(wait::PAUSE);
        }
        let _ = connection.shutdown(std::net::Shutdown::Both);
    });
    for line in stream.lines() {
        if let Ok(signal) = line?.parse() {
            process.signal(signal);
        }
    }
    Ok(())
}
