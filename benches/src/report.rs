//! Rows: medians over all runs, as a table and as JSON.

use crate::scenario::{Measured, Outcome, Plan, Run};
use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;
use std::fmt::Write as _;
use std::path::Path;

const MIB: f64 = 1024.0 * 1024.0;
/// Page table of the destination: two bits a page.
const PAGES_PER_TABLE_BYTE: u64 = 4;

/// Where it was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    kernel: String,
    processor: String,
    cores: usize,
    huge_pages: String,
    load_before: String,
}

impl Machine {
    /// This one, before anything is measured.
    pub fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|l| l.strip_prefix("model name"));
        let huge = read("/sys/kernel/mm/transparent_hugepage/enabled");
        let chosen = huge.split(['[', ']']).nth(1).unwrap_or("unknown");
        let first = |text: &str| text.split_whitespace().next().unwrap_or_default().to_owned();
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            processor: model.unwrap_or_default().trim_start_matches([' ', '\t', ':']).to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            huge_pages: chosen.to_owned(),
            load_before: first(&read("/proc/loadavg")),
        }
    }
}

/// What a figure has to be.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    figure: String,
    unit: &'static str,
    /// Of all runs; none when no run yielded it.
    median: Option<f64>,
    /// One or more a run that yielded it, in order.
    values: Vec<f64>,
    target: Option<Target>,
    met: Option<bool>,
}

impl Row {
    fn new(
        figure: impl Into<String>,
        unit: &'static str,
        target: Option<Target>,
        values: Vec<f64>,
    ) -> Self {
        let median = median(&values);
        let met = target.map(|target| match (target, median) {
            (_, None) => false,
            (Target::AtMost(most), Some(value)) => value <= most,
            (Target::AtLeast(least), Some(value)) => value >= least,
        });
        Self { figure: figure.into(), unit, median, values, target, met }
    }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n.is_multiple_of(2) => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
        _ => Some(sorted[middle]),
    }
}

/// Picks one figure of one scenario out of every run that has it.
fn pick(
    runs: &[Run],
    which: impl Fn(&Run) -> &Outcome,
    figure: impl Fn(&Measured) -> Option<f64>,
) -> Vec<f64> {
    runs.iter().filter_map(|run| which(run).as_ref().ok().and_then(&figure)).collect()
}

/// All rows.
pub fn rows(plan: &Plan, runs: &[Run]) -> Vec<Row> {
    let mut rows = blackouts(plan, runs);
    rows.extend(drains(plan, runs));
    rows.extend(first_touches(plan, runs));
    rows.extend(memory(plan, runs));
    rows.extend(afterwards(plan, runs));
    rows
}

fn blackouts(plan: &Plan, runs: &[Run]) -> Vec<Row> {
    let most = Some(Target::AtMost(5.0));
    let seen = |m: &Measured| m.blackout_seen_us.map(|us| us / 1e3);
    let tool = |m: &Measured| Some(m.blackout_tool_us / 1e3);
    let mut rows = Vec::new();
    let small = pick(runs, |r| &r.small, seen);
    let large = pick(runs, |r| &r.large, seen);
    let ratio = median(&large).zip(median(&small)).map(|(large, small)| large / small);
    for (name, target, seen, tool) in [
        (&plan.small.name, None, small, pick(runs, |r| &r.small, tool)),
        (&plan.middle.name, most, pick(runs, |r| &r.middle, seen), pick(runs, |r| &r.middle, tool)),
        (&plan.large.name, None, large, pick(runs, |r| &r.large, tool)),
    ] {
        rows.push(Row::new(format!("blackout, program's longest gap: {name}"), "ms", target, seen));
        rows.push(Row::new("  as the tool says", "ms", None, tool));
    }
    rows.push(Row::new(
        "blackout, ratio of the medians, large to small",
        "",
        Some(Target::AtMost(1.2)),
        ratio.into_iter().collect(),
    ));
    rows
}

fn drains(plan: &Plan, runs: &[Run]) -> Vec<Row> {
    let drain = |m: &Measured| Some(m.drain_ms / 1e3);
    let row = |name: &str, target, values| Row::new(format!("drain: {name}"), "s", target, values);
    let most = Some(Target::AtMost(1.5));
    let speed = |m: &Measured| m.bytes as f64 / (m.drain_ms / 1e3);
    let limit = |m: &Measured| m.parts.map(|p| p.limit_bytes_per_s());
    let idle = |figure: &dyn Fn(&Measured) -> Option<f64>| -> Vec<f64> {
        let measured = runs.iter().flat_map(|r| &r.idle).filter_map(|o| o.as_ref().ok());
        measured.filter_map(figure).collect()
    };
    let part = |figure: &dyn Fn(crate::parts::Parts) -> f64| idle(&|m| m.parts.map(figure));
    vec![
        row(&plan.middle.name, most, pick(runs, |r| &r.middle, drain)),
        row(&plan.threads.name, most, pick(runs, |r| &r.threads, drain)),
        row(&plan.sequential.name, None, pick(runs, |r| &r.sequential, drain)),
        row(&plan.large.name, None, pick(runs, |r| &r.large, drain)),
        row(&plan.idle.name, None, idle(&drain)),
        Row::new("  speed", "MB/s", None, idle(&|m| Some(speed(m) / 1e6))),
        Row::new("  limit of two cores", "MB/s", None, idle(&|m| limit(m).map(|l| l / 1e6))),
        Row::new(
            "  speed / limit",
            "%",
            Some(Target::AtLeast(80.0)),
            idle(&|m| limit(m).map(|l| speed(m) / l * 100.0)),
        ),
        Row::new("  part: process_vm_readv", "core-ns/B", None, part(&|p| p.read)),
        Row::new("  part: TCP, both ends", "core-ns/B", None, part(&|p| p.tcp)),
        Row::new("  part: encryption, both ends", "core-ns/B", None, part(&|p| p.cipher)),
        Row::new("  part: UFFDIO_COPY", "core-ns/B", None, part(&|p| p.copy)),
    ]
}

fn first_touches(plan: &Plan, runs: &[Run]) -> Vec<Row> {
    let most = |us| Some(Target::AtMost(us));
    let mut rows = Vec::new();
    let mut scenario = |name: &str, which: fn(&Run) -> &Outcome, p50, p99| {
        let seen = |m: &Measured| m.faults_seen > 0;
        let mut row = |label: String, unit, target, figure: &dyn Fn(&Measured) -> f64| {
            let values = pick(runs, which, |m| seen(m).then(|| figure(m)));
            rows.push(Row::new(label, unit, target, values));
        };
        row(format!("first touch, p50: {name}"), "us", p50, &|m| m.fault_seen_us_p50);
        row("  p99".into(), "us", p99, &|m| m.fault_seen_us_p99);
        row("  p50 as the tool says".into(), "us", None, &|m| m.fault_tool_us_p50);
        row("  p99 as the tool says".into(), "us", None, &|m| m.fault_tool_us_p99);
        row("  touches that raised a fault".into(), "", None, &|m| m.faults_seen as f64);
        row("  longest gap of a thread in the drain".into(), "ms", None, &|m| {
            m.drain_gap_us_max.unwrap_or(0.0) / 1e3
        });
    };
    scenario(&plan.middle.name, |r| &r.middle, most(60.0), most(300.0));
    scenario(&plan.threads.name, |r| &r.threads, most(120.0), most(1000.0));
    scenario(&plan.large.name, |r| &r.large, None, None);
    rows
}

fn memory(plan: &Plan, runs: &[Run]) -> Vec<Row> {
    let roles = ["agent", "source session", "destination session", "init", "display"];
    let large = plan.large.bytes;
    roles
        .iter()
        .map(|role| {
            let table = if *role == "destination session" {
                large / 4096 / PAGES_PER_TABLE_BYTE
            } else {
                0
            };
            let net = |m: &Measured| {
                m.memory.get(role).map(|peak| peak.saturating_sub(table) as f64 / MIB)
            };
            let less = if table > 0 { " less page table" } else { "" };
            Row::new(
                format!("peak memory, {role}{less}: {}", plan.large.name),
                "MiB",
                Some(Target::AtMost(32.0)),
                pick(runs, |r| &r.large, net),
            )
        })
        .collect()
}

fn afterwards(plan: &Plan, runs: &[Run]) -> Vec<Row> {
    // Of each run the worst of all its programs.
    let worst = |figure: &dyn Fn(&Measured) -> f64| {
        runs.iter().filter_map(|r| r.measured().map(figure).reduce(f64::max)).collect()
    };
    let none = Some(Target::AtMost(0.0));
    let least = Some(Target::AtLeast(0.98));
    let speed = |m: &Measured| m.speed_ratio;
    vec![
        Row::new(
            format!("speed after / before: {}", plan.middle.name),
            "",
            least,
            pick(runs, |r| &r.middle, speed),
        ),
        Row::new(
            format!("speed after / before: {}", plan.threads.name),
            "",
            least,
            pick(runs, |r| &r.threads, speed),
        ),
        Row::new("left in the program, all", "", none, worst(&|m| m.left_behind.len() as f64)),
        Row::new("pages with wrong content, all", "", none, worst(&|m| m.pages_wrong as f64)),
    ]
}

fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// One table, for people.
pub fn table(machine: &Machine, rows: &[Row], runs: usize, quick: bool) -> String {
    let mut text = String::new();
    // Writing into a string can't fail.
    let _ = writeln!(
        text,
        "{} cores, {}, Linux {}, huge pages {}, load {} before; medians of {runs} runs{}\n",
        machine.cores,
        machine.processor,
        machine.kernel,
        machine.huge_pages,
        machine.load_before,
        if quick { " (--quick: the figures mean nothing)" } else { "" },
    );
    let _ = writeln!(
        text,
        "{:<64} {:>9} {:>17} {:>9} {:<9} met",
        "figure", "median", "range", "target", "unit"
    );
    for row in rows {
        let low = row.values.iter().copied().reduce(f64::min);
        let high = row.values.iter().copied().reduce(f64::max);
        let range = low.zip(high).filter(|_| row.values.len() > 1);
        let range = range.map(|(l, h)| format!("{} - {}", number(l), number(h)));
        let target = row.target.map(|target| match target {
            Target::AtMost(value) => format!("<= {}", number(value)),
            Target::AtLeast(value) => format!(">= {}", number(value)),
        });
        let met = row.met.map_or("", |met| if met { "yes" } else { "NO" });
        let line = format!(
            "{:<64} {:>9} {:>17} {:>9} {:<9} {met}",
            row.figure,
            row.median.map_or("none".into(), number),
            range.unwrap_or_default(),
            target.unwrap_or_default(),
            row.unit,
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// The rows, and all they were made of.
pub fn write_json(
    path: &Path,
    machine: &Machine,
    plan: &Plan,
    rows: &[Row],
    runs: &[Run],
    quick: bool,
) -> Result<()> {
    let all = json!({"v": 1, "quick": quick, "machine": machine, "plan": plan, "rows": rows, "runs": runs});
    let text = serde_json::to_string_pretty(&all).context("writing JSON")?;
    std::fs::write(path, text + "\n").with_context(|| path.display().to_string())
}
