//! The run directory: one folder a migration and side, readable by its owner only.
//!
//! `RUN/source-ID/` and `RUN/destination-ID/` hold `status.json` (rewritten whole, for `slipstream
//! status`), the gate (destination), the journal of the commit and the parked registers (source), and
//! how the process ended.

use crate::clocks;
use crate::error::{Error, Result};
use crate::events::{Role, Status};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use slipstream_core::restore::scratch::{Gate, gate};
use std::fs::{self, DirBuilder};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn prefix(side: Role) -> &'static str {
    match side {
        Role::Source => "source-",
        Role::Destination => "destination-",
    }
}

/// The folder of one side of one migration.
#[derive(Debug)]
pub struct MigrationDir {
    path: PathBuf,
    /// Locked for as long as a session works here.
    _lock: Flock<fs::File>,
}

/// A migration's name: twelve hexadecimal digits.
pub fn new_id() -> Result<String> {
    let mut raw = [0u8; 6];
    fill_random(&mut raw)?;
    Ok(raw.iter().map(|b| format!("{b:02x}")).collect())
}

/// Random bytes from the kernel.
pub fn fill_random(out: &mut [u8]) -> Result<()> {
    use std::io::Read;
    fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(out))
        .map_err(|e| Error::io("read /dev/urandom", e))
}

/// True for what [`new_id`] makes: names from a peer become parts of paths.
pub fn is_id(id: &str) -> bool {
    id.len() == 12 && id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Makes the run directory if need be, and refuses one that others could write to or own.
pub fn ensure(path: &Path) -> Result<()> {
    let make = DirBuilder::new().recursive(true).mode(0o700).create(path);
    make.map_err(|e| Error::io(format!("create run directory {}", path.display()), e))?;
    let meta = fs::symlink_metadata(path)
        .map_err(|e| Error::io(format!("stat run directory {}", path.display()), e))?;
    let own = meta.uid() == nix::unistd::geteuid().as_raw();
    if !meta.is_dir() || !own || meta.mode() & 0o077 != 0 {
        return Err(Error::Refused {
            reason: format!("run directory {} is open to others", path.display()),
            remedy: format!("chmod 700 {0}, or name another with --run-dir", path.display()),
        });
    }
    Ok(())
}

impl MigrationDir {
    /// Makes the folder of a new migration; it must not exist.
    pub fn create(run_dir: &Path, side: Role, id: &str) -> Result<Self> {
        ensure(run_dir)?;
        let path = run_dir.join(format!("{}{id}", prefix(side)));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|e| Error::io(format!("create {}", path.display()), e))?;
        let lock = take_lock(&path.join(LOCK), true, GLANCE);
        let lock = lock.inspect_err(|_| drop(fs::remove_dir_all(&path)))?;
        let dir = Self { path, _lock: lock };
        match dir.note_session().and_then(|()| dir.note_birth()) {
            Ok(()) => Ok(dir),
            Err(e) => {
                dir.remove();
                Err(e)
            }
        }
    }

    /// Opens the folder of a migration whose session has ended; waits for that for at most `patience`.
    pub fn open(run_dir: &Path, side: Role, id: &str, patience: Duration) -> Result<Self> {
        ensure(run_dir)?;
        let path = run_dir.join(format!("{}{id}", prefix(side)));
        let lock = path.join(LOCK);
        // Not made here: the folder may just be going away.
        if !is_id(id) || !lock.is_file() {
            return Err(Error::Refused {
                reason: format!("no migration {id} on this host"),
                remedy: "`slipstream status` lists them".into(),
            });
        }
        let lock = take_lock(&lock, false, patience)?;
        Ok(Self { path, _lock: lock })
    }

    /// Notes that this process is the session at work here: whoever comes after it may have to end it.
    pub fn note_session(&self) -> Result<()> {
        self.write(SESSION, std::process::id().to_string().as_bytes())
    }

    /// Reads a file of it; `None` when there is none.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match fs::read(self.path.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format!("read {}", self.path.join(name).display()), e)),
        }
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes a file whole: a reader sees the old or the new content.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.prepare(name, bytes)?;
        self.publish(name)
    }

    /// The slow part of a write. Nobody sees it before it is published.
    pub fn prepare(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let partial = self.partial(name);
        let write = || {
            let mut f = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&partial)?;
            f.write_all(bytes)
        };
        write().map_err(|e| Error::io(format!("write {}", partial.display()), e))
    }

    /// Puts in place what was prepared.
    pub fn publish(&self, name: &str) -> Result<()> {
        let path = self.path.join(name);
        fs::rename(self.partial(name), &path)
            .map_err(|e| Error::io(format!("write {}", path.display()), e))
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.part"))
    }

    /// Rewrites the status.
    pub fn write_status(&self, status: &Status) -> Result<()> {
        let json = serde_json::to_vec(status).map_err(|e| Error::Internal(e.to_string()))?;
        self.write("status.json", &json)
    }

    /// Time since the folder was made, as long as the host has not started anew since: a clock that is
    /// set must not make it old.
    pub fn age(&self) -> Option<Duration> {
        let born = String::from_utf8(self.read(BORN).ok()??).ok()?;
        let (boot, at_ns) = born.split_once(' ')?;
        let age_ns = clocks::host_clocks().ok()?.boottime_ns - at_ns.parse::<i64>().ok()?;
        (boot == clocks::boot_id().ok()?).then(|| Duration::from_nanos(age_ns.max(0) as u64))
    }

    /// True if nothing is served here any more, and the source knows. `since_exit`: the process's, by a clock that may have
    /// been set.
    fn is_over(&self, since_exit: Duration) -> bool {
        let has = |name| self.file(name).exists();
        // Children that the process forked may still be without their pages.
        let init = self.read(INIT).ok().flatten().and_then(|name| String::from_utf8(name).ok());
        let served = !has(COMPLETED) && init.is_some_and(|name| named_process(&name).is_some());
        let told_in_vain = since_exit > TELL_MAX && self.age().is_none_or(|age| age > TELL_MAX);
        !served && (has(BYE) || told_in_vain)
    }

    fn note_birth(&self) -> Result<()> {
        let born = format!("{} {}", clocks::boot_id()?, clocks::host_clocks()?.boottime_ns);
        self.write(BORN, born.as_bytes())
    }

    /// Removes the folder: the migration left nothing to tell.
    pub fn remove(self) {
        if let Err(e) = fs::remove_dir_all(&self.path) {
            tracing::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

/// File with the boot, and the time since it, in which a folder was made.
const BORN: &str = "born";
/// File with the number of the session that works in a folder.
const SESSION: &str = "session";
/// File that the session in a folder holds a lock on: it goes with its last process.
const LOCK: &str = "lock";
/// File that says whether the copy here runs (see `core::restore::scratch::Gate`).
pub const GATE: &str = "gate";
/// File with the route by which the source finds its migration again.
pub const ROUTE: &str = "route";
/// File that names init of the moved process: its number, start time and the host's boot.
pub const INIT: &str = "init";
/// File that says why the process was ended before its last page had come.
pub const LOST: &str = "lost";
/// What that file says when nobody has seen the process end by itself.
pub const ENDED_WITH_INIT: &str = "its new host went down, or the first process of its namespace was killed, before the last page had come";
/// File that says that the source knows how it ended.
pub const BYE: &str = "bye";
/// File with the figures of a drain that is over.
pub const COMPLETED: &str = "completed";
/// For one who only looks whether a session is at work: it holds the lock for a moment.
pub const GLANCE: Duration = Duration::from_secs(1);
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

fn take_lock(path: &Path, create: bool, patience: Duration) -> Result<Flock<fs::File>> {
    let io = |e| Error::io(format!("lock {}", path.display()), e);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(io)?;
    let deadline = Instant::now() + patience;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, Errno::EAGAIN)) if Instant::now() >= deadline => {
                return Err(Error::Refused {
                    reason: "a session is at work on this migration".into(),
                    remedy: "`slipstream status` shows how far it is".into(),
                });
            }
            Err((again, Errno::EAGAIN | Errno::EINTR)) => file = again,
            Err((_, e)) => return Err(io(e.into())),
        }
        std::thread::sleep(LOCK_INTERVAL);
    }
}

/// File that a living agent holds a lock on; it says where it listens, and which key it has.
const AGENT: &str = "agent";

/// Notes that an agent serves here. Several may; the last is the one that `recover` would replace.
pub fn note_agent(run_dir: &Path, address: &str, key: &Path) -> Result<Flock<fs::File>> {
    let path = run_dir.join(AGENT);
    let io = |e| Error::io(format!("write {}", path.display()), e);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .map_err(io)?;
    file.write_all(format!("{address}\n{}\n", key.display()).as_bytes()).map_err(io)?;
    Flock::lock(file, FlockArg::LockSharedNonblock)
        .map_err(|(_, e)| Error::io("lock the agent's file", e.into()))
}

/// Where the last agent listened and which key it had; `None` while an agent serves here.
pub fn dead_agent(run_dir: &Path) -> Result<Option<(String, PathBuf)>> {
    let path = run_dir.join(AGENT);
    let refused = || Error::Refused {
        reason: "no agent has served here".into(),
        remedy: "start `slipstream agent` with this run directory".into(),
    };
    let file = fs::File::open(&path).map_err(|_| refused())?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Err((_, Errno::EAGAIN)) => return Ok(None),
        Err((_, e)) => return Err(Error::io("lock the agent's file", e.into())),
        // An agent that starts right now takes its own.
        Ok(lock) => drop(lock),
    }
    let text = fs::read_to_string(&path).map_err(|_| refused())?;
    let (address, key) = text.trim_end().split_once('\n').ok_or_else(refused)?;
    Ok(Some((address.to_owned(), key.into())))
}

/// A file of a migration that came here.
pub fn destination_file(run_dir: &Path, id: &str, name: &str) -> PathBuf {
    run_dir.join(format!("{}{id}", prefix(Role::Destination))).join(name)
}

/// The figures of a drain that is over.
pub fn completed(run_dir: &Path, id: &str) -> Option<Vec<u8>> {
    fs::read(destination_file(run_dir, id, COMPLETED)).ok()
}

/// Why a process that came here was ended before its last page.
pub fn lost(run_dir: &Path, id: &str) -> Option<String> {
    fs::read_to_string(destination_file(run_dir, id, LOST)).ok()
}

/// The migrations that came here.
pub fn destinations(run_dir: &Path) -> Vec<String> {
    migrations(run_dir, Role::Destination)
}

/// The migrations that leave, or have left, from here.
pub fn sources(run_dir: &Path) -> Vec<String> {
    migrations(run_dir, Role::Source)
}

fn migrations(run_dir: &Path, side: Role) -> Vec<String> {
    let Ok(dir) = fs::read_dir(run_dir) else { return Vec::new() };
    let id = |name: &str| name.strip_prefix(prefix(side)).map(str::to_owned);
    dir.flatten().filter_map(|e| id(e.file_name().to_str()?)).filter(|id| is_id(id)).collect()
}

/// The migration that came here by a route.
pub fn by_route(run_dir: &Path, route: &str) -> Option<String> {
    destinations(run_dir).into_iter().find(|id| {
        fs::read_to_string(destination_file(run_dir, id, ROUTE)).is_ok_and(|known| known == route)
    })
}

/// Kills a destination session: whoever has come to take its drain up does so by the same way as after
/// any other death.
pub fn end_destination_session(run_dir: &Path, id: &str) {
    let path = destination_file(run_dir, id, SESSION);
    if let Some(pid) = session_pid(&path, subcommand(Role::Destination))
        && pid != nix::unistd::getpid()
    {
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
}

/// Of its command line, what a session is known by.
fn subcommand(role: Role) -> &'static [u8] {
    match role {
        Role::Source => b"__source-session",
        Role::Destination => b"__destination-session",
    }
}

/// The session whose number a file has. The number may have been used again.
fn session_pid(path: &Path, subcommand: &[u8]) -> Option<nix::unistd::Pid> {
    let pid: i32 = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let ours = command.split(|b| *b == 0).any(|arg| arg == subcommand);
    (pid > 0 && ours).then(|| nix::unistd::Pid::from_raw(pid))
}

/// A process's name that no other process of any boot has: number, start time, boot.
pub fn full_name(pid: i32) -> Result<String> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).map_err(|e| Error::io(format!("read {path}"), e))?;
    // The command's name may hold anything; after it come fields, of which the 20th is the start.
    let start = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19));
    let start = start.ok_or_else(|| Error::Internal(format!("{path} is malformed")))?;
    Ok(format!("{pid} {start} {}", crate::clocks::boot_id()?))
}

/// The number in a [`full_name`], if that process is still there.
pub fn named_process(name: &str) -> Option<i32> {
    let pid = name.split(' ').next()?.parse().ok()?;
    (full_name(pid).ok()? == name).then_some(pid)
}

/// Sends SIGINT to the source session of a migration.
pub fn interrupt_session(run_dir: &Path, id: &str) -> Result<()> {
    let path = run_dir.join(format!("{}{id}", prefix(Role::Source))).join(SESSION);
    let gone = || Error::Refused {
        reason: format!("the session of migration {id} is gone"),
        remedy: String::new(),
    };
    let pid = session_pid(&path, subcommand(Role::Source)).ok_or_else(gone)?;
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT)
        .map_err(|e| Error::io("interrupt the session", e.into()))
}

/// File in which init notes how the process ended.
pub const EXIT: &str = "exit";

fn read_status(dir: &Path) -> Option<Status> {
    let said = || serde_json::from_slice(&fs::read(dir.join("status.json")).ok()?).ok();
    let mut status: Status = said().or_else(|| not_yet_said(dir))?;
    if let Ok(how) = fs::read_to_string(dir.join(EXIT)) {
        status.phase = "exited".into();
        status.pid = None;
        how.trim().clone_into(&mut status.detail);
    }
    if let Ok(why) = fs::read_to_string(dir.join(LOST)) {
        status.phase = "lost".into();
        status.pid = None;
        why.trim().clone_into(&mut status.detail);
    }
    if matches!(&*status.phase, "prepare" | "drain" | "waiting") && is_unattended(dir, status.role)
    {
        let again = format!(
            "nobody is at work on it: `slipstream recover {}`, or start an agent",
            status.id
        );
        if status.phase == "drain" {
            status.phase = "waiting".into();
        }
        let said = std::mem::take(&mut status.detail);
        status.detail = if said.is_empty() { again } else { format!("{said}; {again}") };
    }
    Some(status)
}

/// Whether the session that worked in a folder is no more. Its lock is not tried: whoever does so keeps others from it.
fn is_unattended(dir: &Path, role: Role) -> bool {
    session_pid(&dir.join(SESSION), subcommand(role)).is_none()
}

/// The status of a process that runs here although its session, killed, never said so: whoever looks for it must find it.
fn not_yet_said(dir: &Path) -> Option<Status> {
    let id = dir.file_name()?.to_str()?.strip_prefix(prefix(Role::Destination))?;
    let runs = Gate::open(&dir.join(GATE)).is_ok_and(|gate| gate.value() == gate::RUN);
    (runs && is_id(id)).then(|| Status {
        id: id.to_owned(),
        role: Role::Destination,
        phase: "drain".into(),
        pid: None,
        peer: String::new(),
        figures: None,
        detail: "its session has not said more yet".into(),
    })
}

/// Exit notes that are kept.
const EXITS_MAX: usize = 100;

/// For a source to hear how its migration ended.
const TELL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Removes the folders of moved processes that have ended, but for the newest: nobody else would.
pub fn prune(run_dir: &Path) {
    let mut ended: Vec<_> = destinations(run_dir)
        .into_iter()
        .filter_map(|id| {
            let exit = fs::metadata(destination_file(run_dir, &id, EXIT)).ok()?;
            Some((exit.modified().ok()?, id))
        })
        .collect();
    ended.sort_unstable();
    let old = ended.len().saturating_sub(EXITS_MAX);
    for (exited, id) in &ended[..old] {
        // A session at work has it locked.
        let dir = MigrationDir::open(run_dir, Role::Destination, id, Duration::ZERO);
        if let Ok(dir) = dir
            && dir.is_over(exited.elapsed().unwrap_or_default())
        {
            dir.remove();
        }
    }
}

/// The status files of a run directory. Unreadable ones are left out: they may just be going away.
pub fn list(run_dir: &Path) -> Result<Vec<Status>> {
    let dir = match fs::read_dir(run_dir) {
        Ok(dir) => dir,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(format!("list {}", run_dir.display()), e)),
    };
    let mut all: Vec<Status> = dir.filter_map(|entry| read_status(&entry.ok()?.path())).collect();
    all.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names() {
        assert!(is_id(&new_id().unwrap()));
        assert!(!is_id("../../../etc"));
    }

    #[test]
    fn what_runs_is_found_whatever_its_session_has_said() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let found = || list(&run).unwrap().into_iter().map(|s| (s.id, s.role)).collect::<Vec<_>>();
        let made = MigrationDir::create(&run, Role::Destination, "aaaaaaaaaaaa").unwrap();
        assert_eq!(found(), [], "nothing has been restored");
        let gate = Gate::create(&made.file(GATE)).unwrap();
        assert_eq!(found(), [], "it waits at the gate");
        gate.decide(gate::RUN);
        assert_eq!(found(), [("aaaaaaaaaaaa".to_owned(), Role::Destination)]);
        let made = MigrationDir::create(&run, Role::Destination, "bbbbbbbbbbbb").unwrap();
        Gate::create(&made.file(GATE)).unwrap().decide(gate::NEVER);
        assert_eq!(found().len(), 1, "it never ran here");
    }

    #[test]
    fn a_folder_ages_by_the_time_since_boot() {
        let dir = tempfile::tempdir().unwrap();
        let made = MigrationDir::create(&dir.path().join("run"), Role::Source, "aaaaaaaaaaaa");
        let made = made.unwrap();
        assert!(made.age().unwrap() < Duration::from_secs(60));
        // Whatever the file's date says after somebody has set the clock:
        let born = fs::File::options().write(true).open(made.file(BORN)).unwrap();
        born.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert!(made.age().unwrap() < Duration::from_secs(60));
        made.write(BORN, b"another-boot 17").unwrap();
        assert_eq!(made.age(), None);
    }

    /// A process that has ended so many seconds after others.
    fn ended(run_dir: &Path, second: u64, told: bool) -> MigrationDir {
        let id = format!("{second:012x}");
        let dir = MigrationDir::create(run_dir, Role::Destination, &id).unwrap();
        dir.write(EXIT, b"exit status 0").unwrap();
        if told {
            dir.write(BYE, b"").unwrap();
        }
        let exit = fs::File::options().write(true).open(dir.file(EXIT)).unwrap();
        let start = std::time::SystemTime::now() - Duration::from_secs(3600);
        exit.set_modified(start + Duration::from_secs(second)).unwrap();
        dir
    }

    #[test]
    fn the_newest_exit_notes_stay() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let running = MigrationDir::create(&run_dir, Role::Destination, "aaaaaaaaaaaa").unwrap();
        let source = MigrationDir::create(&run_dir, Role::Source, "bbbbbbbbbbbb").unwrap();
        source.write(EXIT, b"exit status 0").unwrap();
        let ended: Vec<PathBuf> =
            (0..EXITS_MAX as u64 + 3).map(|i| ended(&run_dir, i, true).path.clone()).collect();
        prune(&run_dir);
        assert!(running.path.exists() && source.path.exists());
        let left: Vec<bool> = ended.iter().map(|path| path.exists()).collect();
        assert_eq!(left[..3], [false; 3]);
        assert!(left[3..].iter().all(|exists| *exists));
    }

    #[test]
    fn what_is_not_over_stays() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let at_work = ended(&run_dir, 0, true);
        let untold = ended(&run_dir, 1, false).path.clone();
        let init = full_name(std::process::id() as i32).unwrap();
        let with_init = |second, file: Option<&str>| {
            let dir = ended(&run_dir, second, true);
            dir.write(INIT, init.as_bytes()).unwrap();
            if let Some(file) = file {
                dir.write(file, b"").unwrap();
            }
            dir.path.clone()
        };
        let (with_children, completed) = (with_init(2, None), with_init(3, Some(COMPLETED)));
        for second in 10..10 + EXITS_MAX as u64 {
            drop(ended(&run_dir, second, true));
        }
        prune(&run_dir);
        assert!(at_work.path.exists() && untold.exists() && with_children.exists());
        assert!(!completed.exists());
        assert!(at_work.is_over(Duration::ZERO));
        // Nobody has asked for a day.
        let untold =
            MigrationDir::open(&run_dir, Role::Destination, &format!("{:012x}", 1), Duration::ZERO);
        let untold = untold.unwrap();
        untold.write(BORN, b"another-boot 17").unwrap();
        assert!(!untold.is_over(TELL_MAX / 2) && untold.is_over(TELL_MAX * 2));
    }

    #[test]
    fn a_run_directory_open_to_others_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(ensure(dir.path()).is_err());
        assert!(ensure(&dir.path().join("fresh")).is_ok());
    }
}
