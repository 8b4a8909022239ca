//! What a destination lacks for a process: all of it, in one pass.

use super::requirements::{FileRole, RequiredFile, Requirements};
use super::{Blocker, cpu, digest, host};
use crate::manifest::FileId;
use crate::proc::limits;
use nix::sys::stat::FileStat;
use std::fs;
use std::os::unix::ffi::OsStrExt;

/// Room for mappings that restore makes beside those of the process.
const MAPPINGS_ROOM: u64 = 64;

/// Everything that keeps this host from taking a process with these requirements.
pub fn check_destination(needs: &Requirements) -> Vec<Blocker> {
    if let Err(e) = needs.check() {
        return vec![Blocker::unknown("requirements", &e)];
    }
    let mut blockers = Vec::new();
    kernel(&mut blockers);
    cpus(needs, &mut blockers);
    ids(needs, &mut blockers);
    memory(needs, &mut blockers);
    let own = std::process::id() as i32;
    match limits::read(own) {
        Ok(ours) => rlimits(needs, &ours, host::may_raise_limits(), &mut blockers),
        Err(e) => blockers.push(Blocker::unknown("resource limits", &e)),
    }
    capabilities(needs, host::own_caps(), &mut blockers);
    let same_boot = boot_id().is_some_and(|id| id == needs.boot_id);
    blockers.extend(needs.files.iter().filter_map(|f| file(f, same_boot).err()));
    blockers
}

/// Identity of the running kernel of this host.
pub fn boot_id() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned())
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn kernel(blockers: &mut Vec<Blocker>) {
    if let Some((problem, remedy)) = host::userfaultfd_problem() {
        blockers.push(Blocker::new("destination's userfaultfd", problem, remedy));
    }
    if let Some((problem, remedy)) = host::namespace_problem() {
        blockers.push(Blocker::new("destination's namespaces", problem, remedy));
    }
}

fn cpus(needs: &Requirements, blockers: &mut Vec<Blocker>) {
    let ours = cpu::flags();
    let missing: Vec<&str> = needs
        .cpu_flags
        .iter()
        .filter(|flag| cpu::is_visible(flag) && !ours.contains(flag.as_str()))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        blockers.push(Blocker::new(
            "destination's CPU",
            format!("lacks {}", missing.join(", ")),
            "use a destination with a CPU at least as new, or start the program with fewer \
             features (GLIBC_TUNABLES)",
        ));
    }
    let there = number_of_cpus();
    let highest = needs
        .affinity
        .iter()
        .rposition(|b| *b != 0)
        .map(|at| at as u64 * 8 + u64::from(needs.affinity[at].ilog2()));
    if let Some(cpu) = highest.filter(|cpu| *cpu >= there) {
        blockers.push(Blocker::new(
            "destination's CPU",
            format!("the process is bound to CPU {cpu}, and there are {there}"),
            "bind it to others first (taskset)",
        ));
    }
}

fn number_of_cpus() -> u64 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u64).max(
        fs::read_to_string("/sys/devices/system/cpu/present")
            .ok()
            .and_then(|text| text.trim().rsplit(['-', ',']).next()?.parse::<u64>().ok())
            .map_or(1, |last| last.saturating_add(1)),
    )
}

fn ids(needs: &Requirements, blockers: &mut Vec<Blocker>) {
    let highest = needs.tids.iter().copied().max().unwrap_or(0).max(needs.pid) as u64;
    if let Some(max) = number("/proc/sys/kernel/pid_max").filter(|max| highest >= *max) {
        blockers.push(Blocker::new(
            "destination's kernel.pid_max",
            format!("is {max}, and the process uses id {highest}"),
            format!("set it to {} or more there (sysctl)", highest + 1),
        ));
    }
    let mappings = u64::from(needs.mappings) + MAPPINGS_ROOM;
    if let Some(max) = number("/proc/sys/vm/max_map_count").filter(|max| mappings > *max) {
        blockers.push(Blocker::new(
            "destination's vm.max_map_count",
            format!("is {max}, and the process needs {mappings} mappings"),
            format!("set it to {mappings} or more there (sysctl)"),
        ));
    }
    let pipe = u64::from(needs.pipe_bytes);
    let max = number("/proc/sys/fs/pipe-max-size").filter(|max| pipe > *max);
    if let Some(max) = max.filter(|_| !host::may_raise_limits()) {
        blockers.push(Blocker::new(
            "destination's fs.pipe-max-size",
            format!("is {max}, and the process has a pipe of {pipe} bytes"),
            format!("set it to {pipe} there (sysctl)"),
        ));
    }
}

fn memory(needs: &Requirements, blockers: &mut Vec<Blocker>) {
    let available = host::memory_bytes("MemAvailable");
    if let Some(available) = available.filter(|bytes| *bytes < needs.memory_bytes) {
        blockers.push(Blocker::new(
            "destination's memory",
            format!("{} MiB available, {} needed", available >> 20, needs.memory_bytes >> 20),
            "free some there, or use another destination",
        ));
    }
    if needs.shared_memory && host::shared_memory_is_collapsed() {
        blockers.push(Blocker::new(
            "destination's shared memory",
            "is made of huge pages, which its kernel (before 6.4) adds unasked",
            "echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled there",
        ));
    }
    for pages in &needs.huge_pages {
        let dir = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", pages.size / 1024);
        let read = |name: &str| number(&format!("{dir}/{name}")).unwrap_or(0);
        let surplus = read("nr_overcommit_hugepages").saturating_sub(read("surplus_hugepages"));
        let free = read("free_hugepages").saturating_sub(read("resv_hugepages")) + surplus;
        if free < pages.count {
            blockers.push(Blocker::new(
                "destination's huge pages",
                format!("{free} of {} kB free, {} needed", pages.size / 1024, pages.count),
                format!("add some there (echo N > {dir}/nr_hugepages)"),
            ));
        }
    }
}

fn rlimits(
    needs: &Requirements,
    ours: &[crate::manifest::Rlimit],
    may_raise: bool,
    blockers: &mut Vec<Blocker>,
) {
    let lower = |blockers: &mut Vec<Blocker>, name: &str, theirs: u64, hard: u64| {
        let show = |v: u64| if v == u64::MAX { "unlimited".to_owned() } else { v.to_string() };
        blockers.push(Blocker::new(
            format!("destination's limit \"{name}\""),
            format!("is {}, the process has {}", show(hard), show(theirs)),
            "start the agent with a higher hard limit or CAP_SYS_RESOURCE, or lower the process's \
             (prlimit)",
        ));
    };
    for (index, (theirs, ours)) in needs.rlimits.iter().zip(ours).enumerate() {
        if theirs.hard > ours.hard && !may_raise {
            lower(blockers, limits::NAMES[index], theirs.hard, ours.hard);
        }
    }
    let memlock = libc::RLIMIT_MEMLOCK as usize;
    if let Some(limit) = ours.get(memlock)
        && needs.locked_bytes > limit.hard
        && !host::may_lock_memory()
    {
        lower(blockers, limits::NAMES[memlock], needs.locked_bytes, limit.hard);
    }
    let nofile = libc::RLIMIT_NOFILE as usize;
    if let Some(limit) = ours.get(nofile)
        && u64::from(needs.descriptors) > limit.hard
    {
        lower(blockers, limits::NAMES[nofile], u64::from(needs.descriptors), limit.hard);
    }
}

fn capabilities(needs: &Requirements, ours: [u64; 5], blockers: &mut Vec<Blocker>) {
    const NAMES: [&str; 5] = ["inheritable", "permitted", "effective", "bounding", "ambient"];
    // Permitted bounds effective and ambient; the bounding set can only shrink.
    let bounds = [ours[1], ours[1], ours[1], ours[3], ours[1]];
    let bits = |mask: u64| -> Vec<String> {
        (0..64).filter(|bit| mask & 1 << bit != 0).map(|bit| bit.to_string()).collect()
    };
    for ((theirs, bound), name) in needs.caps.iter().zip(bounds).zip(NAMES) {
        let missing = theirs & !bound;
        if missing != 0 {
            blockers.push(Blocker::new(
                "destination's capabilities",
                format!("the agent lacks number {} ({name})", bits(missing).join(", ")),
                "give the agent all capabilities that the process has (see capabilities(7))",
            ));
        }
    }
}

/// Compares one file with what the source has.
fn file(needed: &RequiredFile, same_boot: bool) -> Result<(), Blocker> {
    let shown = String::from_utf8_lossy(&needed.path);
    let no = |reason: String, remedy: &str| Err(Blocker::new(&needed.object, reason, remedy));
    let path = std::ffi::OsStr::from_bytes(&needed.path);
    let link = needed.id.mode & libc::S_IFMT == libc::S_IFLNK;
    let found = if link { nix::sys::stat::lstat(path) } else { nix::sys::stat::stat(path) };
    let found = match found {
        Ok(found) => found,
        Err(e) => {
            return no(
                format!("{shown} can't be found at the destination: {e}"),
                "copy the file there, or mount the same file system",
            );
        }
    };
    if (needed.id.mode ^ found.st_mode) & libc::S_IFMT != 0 || needed.id.rdev != found.st_rdev {
        return no(format!("{shown} is of another type at the destination"), "make it the same");
    }
    if needed.role() == FileRole::Present || same_boot && same_inode(&needed.id, &found) {
        return Ok(());
    }
    let size = found.st_size as u64;
    if needed.writable && found.st_ino == needed.id.ino && size >= needed.id.size {
        // A shared file system: inode numbers are the server's, and the file may grow meanwhile.
        return Ok(());
    }
    if size != needed.id.size {
        return no(
            format!("{shown} has {size} bytes at the destination and {} here", needed.id.size),
            "copy the file there, or mount the same file system",
        );
    }
    if needed.role() == FileRole::Mapped {
        return content(needed, &shown);
    }
    if crate::capture::files::file_id(&found).mtime_ns == needed.id.mtime_ns {
        return Ok(());
    }
    no(
        format!("{shown} was changed at another time at the destination"),
        "copy the file there with its times (cp -p, rsync -t), or mount the same file system",
    )
}

fn same_inode(id: &FileId, found: &FileStat) -> bool {
    (id.dev, id.ino) == (found.st_dev, found.st_ino)
}

fn content(needed: &RequiredFile, shown: &str) -> Result<(), Blocker> {
    let remedy = "install the same version there, or mount the same file system";
    let no = |reason: String| Err(Blocker::new(&needed.object, reason, remedy));
    match digest::of_file(&needed.path) {
        Ok(digest) if !needed.id.digest.is_empty() && digest == needed.id.digest => Ok(()),
        Ok(_) => no(format!("{shown} is another version at the destination")),
        Err(e) => no(format!("{shown} can't be read at the destination: {e}")),
    }
}

#[cfg(test)]
#[path = "destination_tests.rs"]
mod tests;
