//! That nothing of Slipstream is left in a process, seen from outside.

use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};

/// What a process consists of.
#[derive(Debug, PartialEq, Eq)]
pub struct Inventory {
    threads: usize,
    descriptors: BTreeMap<String, String>,
    files: BTreeSet<String>,
}

impl Inventory {
    /// Of a running process.
    pub fn of(pid: i32) -> Result<Self> {
        let list = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            std::fs::read_dir(&path).context(path)
        };
        let descriptors = list("fd")?.flatten().map(|entry| {
            let link = std::fs::read_link(entry.path()).unwrap_or_default();
            let number = entry.file_name().to_string_lossy().into_owned();
            (number, link.to_string_lossy().into_owned())
        });
        let maps = read(pid, "maps")?;
        let files = maps.lines().filter_map(|l| l.split_whitespace().nth(5));
        Ok(Self {
            threads: list("task")?.count(),
            descriptors: descriptors.collect(),
            files: files.map(str::to_owned).collect(),
        })
    }
}

fn read(pid: i32, name: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{name}");
    std::fs::read_to_string(&path).context(path)
}

/// What is left of Slipstream in a process, or different from `before`; empty when nothing is.
pub fn left_behind(pid: i32, before: &Inventory) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let smaps = read(pid, "smaps")?;
    let registered = smaps
        .lines()
        .filter_map(|line| line.strip_prefix("VmFlags:"))
        .filter(|flags| flags.split_whitespace().any(|flag| flag == "um"))
        .count();
    if registered > 0 {
        left.push(format!("{registered} mappings with a userfaultfd"));
    }
    let status = read(pid, "status")?;
    let tracer = status.lines().find_map(|l| l.strip_prefix("TracerPid:")).map_or("?", str::trim);
    if tracer != "0" {
        left.push(format!("traced by {tracer}"));
    }
    let now = Inventory::of(pid)?;
    if now.threads != before.threads {
        left.push(format!("{} threads, {} before", now.threads, before.threads));
    }
    if now.descriptors != before.descriptors {
        left.push(format!("descriptors {:?}, before {:?}", now.descriptors, before.descriptors));
    }
    if now.files != before.files {
        left.push(format!("mapped {:?}, before {:?}", now.files, before.files));
    }
    Ok(left)
}
