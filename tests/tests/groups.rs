//! Control groups: the one that each migration has, and what a limit on the memory of another does.

use std::fs;
use std::path::{Path, PathBuf};

use slipstream_tests::cgroup::Cgroup;
use slipstream_tests::process::proc_file;
use slipstream_tests::{Build, Hosts, Migration, Moved, Program, Side, skipped, wait};

/// Where a hierarchy of control groups is mounted whose type and options are as wanted.
fn hierarchy(wanted: impl Fn(&str, &str) -> bool) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("the mounts");
    mounts.lines().find_map(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        let [_, place, kind, options, ..] = fields[..] else { return None };
        wanted(kind, options).then(|| place.into())
    })
}

fn unified_hierarchy() -> Option<PathBuf> {
    hierarchy(|kind, _| kind == "cgroup2")
}

/// A control group of the test's own; its processes end, and it is removed, on drop.
struct Group(Cgroup);

impl Group {
    fn create(hierarchy: &Path, hosts: &Hosts) -> Result<Self, String> {
        let name = format!("slipstream-test-{}-{}", std::process::id(), hosts.unique("group"));
        Cgroup::create(hierarchy, &name).map(Self).map_err(|e| format!("{name}: {e}"))
    }

    fn write(&self, file: &str, text: &str) {
        let path = self.0.path().join(file);
        fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// A control group that limits memory, and the name of the file that does.
fn memory_group(hosts: &Hosts) -> Result<(Group, &'static str), String> {
    if let Some(place) = hierarchy(|kind, options| {
        kind == "cgroup" && options.split(',').any(|option| option == "memory")
    }) {
        return Ok((Group::create(&place, hosts)?, "memory.limit_in_bytes"));
    }
    let place = unified_hierarchy().ok_or("no hierarchy of control groups is mounted")?;
    let group = Group::create(&place, hosts)?;
    if group.0.path().join("memory.max").exists() {
        return Ok((group, "memory.max"));
    }
    Err(format!("{} has no memory controller for its groups", place.display()))
}

/// What is added to what the process has already.
const LIMIT_BYTES: &str = "8388608";

/// A program of some 50 MiB, whose pages come slowly and count against a limit since it resumed.
struct Limited<'a> {
    program: Program<'a>,
    migration: Migration,
    moved: Moved,
    id: String,
}

fn move_into<'a>(hosts: &'a Hosts, program: Program<'a>, group: &Group, file: &str) -> Limited<'a> {
    let agent = hosts.agent();
    let migration = Migration::start(hosts, program.pid, &agent.destination(), |command| {
        command.args(["--prefetch-limit", "1"]);
    });
    let id = migration.wait_event("committed")["id"].as_str().expect("an id").to_owned();
    let moved = migration.wait_resumed();
    group.write(file, LIMIT_BYTES);
    group.write("cgroup.procs", &moved.pid.to_string());
    Limited { program, migration, moved, id }
}

/// Has the kernel kill nobody when the group has no memory left.
fn forbid_kill(group: &Group, program: &Program<'_>) -> Result<(), String> {
    let of_group = group.0.path().join("memory.oom_control");
    if of_group.exists() {
        return fs::write(&of_group, "1").map_err(|e| format!("{}: {e}", of_group.display()));
    }
    let of_process = format!("/proc/{}/oom_score_adj", program.pid);
    fs::write(&of_process, "-1000").map_err(|e| format!("{of_process}: {e}"))
}

/// No memory for its pages, and nobody who could be killed for it: the process waits, `status` says for what, and goes on
/// when there is some.
#[test]
fn waits_for_memory() {
    let hosts = Hosts::two();
    let (group, file) = match memory_group(&hosts) {
        Ok(group) => group,
        Err(missing) => return skipped("waits_for_memory", &missing),
    };
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    if let Err(missing) = forbid_kill(&group, &program) {
        return skipped("waits_for_memory", &missing);
    }
    let Limited { program, migration, moved, id } = move_into(&hosts, program, &group, file);
    let status = wait::until("status to say that memory is missing", wait::LIMIT, || {
        let status = hosts.status(Side::Destination, &id);
        (status["phase"] == "waiting").then_some(status)
    });
    assert!(status["detail"].as_str().is_some_and(|d| d.contains("no memory")), "{status}");
    assert!(!moved.ended() && !migration.ended());
    group.write(file, "1073741824");
    migration.wait().assert_completed();
    program.assert_source_dropped();
    program.tell();
    moved.wait_end(wait::LIMIT);
    program.assert_ok();
}

/// The kernel kills the process for want of memory: that is its end at both hosts, and nothing waits for it.
#[test]
fn killed_for_want_of_memory() {
    let hosts = Hosts::two();
    let (group, file) = match memory_group(&hosts) {
        Ok(group) => group,
        Err(missing) => return skipped("killed_for_want_of_memory", &missing),
    };
    let program = Program::start(&hosts, Build::dynamic("anon"), &[]);
    let Limited { program, migration, moved, id } = move_into(&hosts, program, &group, file);
    moved.wait_end(wait::LIMIT);
    migration.wait();
    program.assert_source_dropped();
    let status = hosts.status(Side::Destination, &id);
    assert_eq!(status["phase"], "exited", "{status}");
    assert!(status["detail"].as_str().is_some_and(|d| d.contains("killed 9")), "{status}");
}

/// All that is in the control group of the agent's service is killed, as systemd does it by default: a migration under way, and
/// the process that was moved, are in another. That one goes when nobody is in it any more.
#[test]
fn service_killed_as_a_whole() {
    let hosts = Hosts::two();
    let Some(hierarchy) = unified_hierarchy() else {
        return skipped("service_killed_as_a_whole", "no cgroup2 is mounted");
    };
    let service = match Group::create(&hierarchy, &hosts) {
        Ok(group) => group,
        Err(missing) => return skipped("service_killed_as_a_whole", &missing),
    };
    let agent = hosts.agent();
    service.write("cgroup.procs", &agent.pid().to_string());
    let program = Program::start(&hosts, Build::dynamic("drain_touch"), &[]);
    let migration = hosts.migrate(&program, &agent);
    let id = migration.wait_event("committed")["id"].as_str().expect("an id").to_owned();
    let moved = migration.wait_resumed();
    let own = hierarchy.join("slipstream").join(&id);
    assert!(own.is_dir(), "{} is missing", own.display());
    let groups = proc_file(moved.pid, "cgroup");
    assert!(groups.lines().any(|line| line == format!("0::/slipstream/{id}")), "{groups}");
    service.0.end();
    wait::until("the agent to end", wait::LIMIT, || (!agent.alive()).then_some(()));
    migration.wait().assert_completed();
    program.assert_source_dropped();
    program.tell();
    moved.wait_end(wait::LIMIT);
    program.assert_ok();
    let _again = hosts.agent();
    wait::until("the group of the migration to go", wait::LIMIT, || (!own.exists()).then_some(()));
}
