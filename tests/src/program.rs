//! A test program on the source host.

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::PoisonError;
use std::time::Duration;

use nix::errno::Errno;

use crate::build::Build;
use crate::hosts::{Hosts, SharedChild, Side};
use crate::wait::{self, LIMIT};

/// How a test program ended by its own account.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything was as it should be.
    Ok,
    /// Not here: what is missing.
    Skip(String),
    /// Something was wrong.
    Fail(String),
    /// It has not said yet.
    None,
}

/// For a child between fork and exec: whoever runs the tests may have left descriptors open; a pipe to the outside is refused.
pub(crate) fn close_descriptors() -> io::Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
    // SAFETY: a plain system call with integer arguments; descriptors are only marked, none is closed before the exec.
    Errno::result(unsafe { libc::close_range(3, u32::MAX, flags) }).map(drop).map_err(Into::into)
}

/// Lets a command enter the control group of an [entrance](crate::cgroup::Cgroup::entrance) before it runs.
pub fn enter(command: &mut Command, entrance: File) {
    // SAFETY: write and close_range are plain system calls, safe between fork and exec; the closure owns the open file.
    unsafe {
        command.pre_exec(move || {
            (&entrance).write_all(b"0")?;
            close_descriptors()
        });
    }
}

/// A program started on the source, its output on a file.
pub struct Program<'a> {
    hosts: &'a Hosts,
    child: SharedChild,
    directory: PathBuf,
    name: String,
    /// Its PID on the source.
    pub pid: i32,
}

impl<'a> Program<'a> {
    /// Compiles and starts a test program, and waits until it holds its state (or has nothing to say).
    pub fn start(hosts: &'a Hosts, build: Build, arguments: &[&str]) -> Self {
        let program = Self::run(hosts, build.name, build.executable(), |command, flag| {
            command.arg(flag).args(arguments);
        });
        program.wait_for_line("ready");
        program
    }

    /// Starts any program: standard output on a file, errors in a log, input from /dev/null, in a folder of its own.
    /// `adjust` is given the command and the flag file's path.
    pub fn run(
        hosts: &'a Hosts,
        name: &str,
        executable: impl AsRef<OsStr>,
        adjust: impl FnOnce(&mut Command, &Path),
    ) -> Self {
        let directory = hosts.path().join(hosts.unique(name));
        std::fs::create_dir(&directory).expect("a folder for the program");
        std::fs::set_permissions(&directory, Permissions::from_mode(0o755)).expect("permissions");
        let output = File::create(directory.join("out.log")).expect("an output file");
        let mut command = hosts.host(Side::Source).command(executable);
        command.current_dir(&directory).stdin(Stdio::null()).stdout(output);
        adjust(&mut command, &directory.join("flag"));
        let child = hosts.spawn(&mut command, &directory.join("errors.log"));
        let pid = child.lock().unwrap_or_else(PoisonError::into_inner).id() as i32;
        Self { hosts, child, directory, name: name.to_owned(), pid }
    }

    /// The hosts it was started on.
    pub fn hosts(&self) -> &'a Hosts {
        self.hosts
    }

    /// Its own folder.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// All it has printed.
    pub fn output(&self) -> String {
        std::fs::read(self.directory.join("out.log"))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Waits until a line of its output begins so. Returns early if it has given its verdict, or has ended on the source.
    pub fn wait_for_line(&self, prefix: &str) {
        wait::until(&format!("{} to say {prefix:?}", self.name), LIMIT, || {
            let seen = self.output().lines().any(|line| line.starts_with(prefix));
            (seen || self.verdict() != Verdict::None || self.source_status().is_some())
                .then_some(())
        });
    }

    /// Tells it to check what it holds.
    pub fn tell(&self) {
        File::create(self.directory.join("flag")).expect("the flag file");
    }

    /// What it said last, if that was a verdict.
    pub fn verdict(&self) -> Verdict {
        let output = self.output();
        if let Some(line) = output.lines().find(|line| line.starts_with("FAIL")) {
            return Verdict::Fail(line.to_owned());
        }
        match output.lines().last() {
            Some("OK") => Verdict::Ok,
            Some(line) => line
                .strip_prefix("SKIP: ")
                .map_or(Verdict::None, |what| Verdict::Skip(what.to_owned())),
            None => Verdict::None,
        }
    }

    /// Panics unless it said OK.
    pub fn assert_ok(&self) {
        assert_eq!(self.verdict(), Verdict::Ok, "{} printed:\n{}", self.name, self.output());
    }

    /// How the process on the source ended, if it has.
    pub fn source_status(&self) -> Option<ExitStatus> {
        self.child
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .try_wait()
            .expect("waiting for a program")
    }

    /// Waits for the end of the process on the source.
    pub fn wait_source_end(&self) -> ExitStatus {
        wait::until(&format!("{} to end on the source", self.name), LIMIT, || self.source_status())
    }

    /// The copy left on the source has to end by itself, as its parent sees it: an exit, not a signal.
    pub fn assert_source_dropped(&self) {
        let status = self.wait_source_end();
        assert_eq!(status.signal(), None, "the source copy of {} died of a signal", self.name);
    }

    /// It was never moved, and goes on here: tell it, and it has to say OK and exit with 0.
    pub fn assert_finishes_at_home(&self) {
        self.tell();
        let status = wait::until(
            &format!("{} to finish at home", self.name),
            Duration::from_secs(90),
            || self.source_status(),
        );
        self.assert_ok();
        assert!(status.success(), "{} ended with {status}", self.name);
    }
}
