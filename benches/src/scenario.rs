//! What is measured: programs of several sizes that are moved, one after the other.

use crate::lab::{self, Lab};
use crate::memory::Peaks;
use crate::migration::{Migration, migrate};
use crate::parts::Parts;
use crate::proof::{self, Inventory};
use crate::touch::{Mode, Seen};
use anyhow::{Context, Result};
use serde::Serialize;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

/// A program to be moved.
#[derive(Clone, Debug, Serialize)]
pub struct Scenario {
    /// For people: size, threads, what it does.
    pub name: String,
    /// Memory it has.
    pub bytes: u64,
    /// Threads that touch it.
    pub threads: usize,
    /// How they do.
    pub mode: Mode,
}

impl Scenario {
    fn new(bytes: u64, threads: usize, mode: Mode) -> Self {
        let size = if bytes >= 1 << 30 {
            format!("{} GiB", bytes >> 30)
        } else {
            format!("{} MiB", bytes >> 20)
        };
        let name = match (mode, threads) {
            (Mode::Idle, _) => format!("{size}, idle"),
            (_, 1) => format!("{size}, {} touches", mode.word()),
            _ => format!("{size}, {} touches, {threads} threads", mode.word()),
        };
        Self { name, bytes, threads, mode }
    }
}

/// All that one run moves.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The blackout of a small process.
    pub small: Scenario,
    /// Most figures.
    pub middle: Scenario,
    /// The same memory, more threads than cores.
    pub threads: Scenario,
    /// The same memory, in order.
    pub sequential: Scenario,
    /// What must not grow with memory.
    pub large: Scenario,
    /// What the machine allows.
    pub idle: Scenario,
    /// Over which a program's speed is measured, before and after.
    #[serde(skip)]
    rate_over: Duration,
}

impl Plan {
    /// The figures of the promise.
    pub fn full() -> Self {
        Self::of([64 << 20, 1 << 30, 4 << 30], Duration::from_secs(1))
    }

    /// Only to see that everything works.
    pub fn quick() -> Self {
        Self::of([16 << 20, 64 << 20, 128 << 20], Duration::from_millis(200))
    }

    fn of([small, middle, large]: [u64; 3], rate_over: Duration) -> Self {
        Self {
            small: Scenario::new(small, 1, Mode::Random),
            middle: Scenario::new(middle, 1, Mode::Random),
            threads: Scenario::new(middle, 4, Mode::Random),
            sequential: Scenario::new(middle, 1, Mode::Sequential),
            large: Scenario::new(large, 1, Mode::Random),
            idle: Scenario::new(middle, 1, Mode::Idle),
            rate_over,
        }
    }

    /// Memory of the largest program.
    pub fn bytes_largest(&self) -> u64 {
        self.large.bytes
    }
}

/// What moving one program showed.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// The longest gap the program saw up to its first steps at the destination.
    pub blackout_seen_us: Option<f64>,
    /// What the tool says.
    pub blackout_tool_us: f64,
    /// Where it went, as the tool says.
    pub blackout_parts: serde_json::Value,
    /// From resume to the last page.
    pub drain_ms: f64,
    /// Page data that arrived.
    pub bytes: u64,
    /// Touches that raised a fault, as the program counts them.
    pub faults_seen: u64,
    /// Their median.
    pub fault_seen_us_p50: f64,
    /// Their 99th percentile.
    pub fault_seen_us_p99: f64,
    /// The longest.
    pub fault_seen_us_max: f64,
    /// Faults, as the tool counts them.
    pub faults_tool: u64,
    /// Their median, as the tool says.
    pub fault_tool_us_p50: f64,
    /// Their 99th percentile, as the tool says.
    pub fault_tool_us_p99: f64,
    /// The longest gap the program saw after its first steps at the destination.
    pub drain_gap_us_max: Option<f64>,
    /// Speed after the last page over speed before the move.
    pub speed_ratio: Option<f64>,
    /// Peak memory of the Slipstream processes.
    pub memory: Peaks,
    /// Pages with wrong content, of all pages.
    pub pages_wrong: u64,
    /// What is left of Slipstream in the program.
    pub left_behind: Vec<String>,
    /// Costs of a drain's parts, measured just before; only for idle programs.
    pub parts: Option<Parts>,
}

/// What one scenario came to, or why it came to nothing.
pub type Outcome = std::result::Result<Measured, String>;

/// All figures of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// As in [`Plan`].
    pub small: Outcome,
    /// As in [`Plan`].
    pub middle: Outcome,
    /// As in [`Plan`].
    pub threads: Outcome,
    /// As in [`Plan`].
    pub sequential: Outcome,
    /// As in [`Plan`].
    pub large: Outcome,
    /// As in [`Plan`], several times: it is over soon, and on a shared machine so is a quiet moment.
    pub idle: [Outcome; 3],
}

impl Run {
    fn outcomes(&self) -> impl Iterator<Item = &Outcome> {
        [&self.small, &self.middle, &self.threads, &self.sequential, &self.large]
            .into_iter()
            .chain(&self.idle)
    }

    /// What was measured.
    pub fn measured(&self) -> impl Iterator<Item = &Measured> {
        self.outcomes().filter_map(|o| o.as_ref().ok())
    }

    /// What went wrong.
    pub fn failures(&self) -> impl Iterator<Item = &String> {
        self.outcomes().filter_map(|o| o.as_ref().err())
    }
}

/// Runs all scenarios once. A migration that fails is noted, and the rest go on.
pub fn run(plan: &Plan, slipstream: &Path, number: u32, of: u32) -> Result<Run> {
    let one = |scenario: &Scenario| -> Result<Outcome> {
        eprintln!("run {number} of {of}: {}", scenario.name);
        lab::check_memory(scenario.bytes)?;
        let outcome = measure(scenario, plan, slipstream).map_err(|e| {
            let failure = format!("{}: {e:#}", scenario.name);
            eprintln!("  FAILED: {failure}");
            failure
        });
        Ok(outcome)
    };
    Ok(Run {
        small: one(&plan.small)?,
        middle: one(&plan.middle)?,
        threads: one(&plan.threads)?,
        sequential: one(&plan.sequential)?,
        large: one(&plan.large)?,
        idle: [one(&plan.idle)?, one(&plan.idle)?, one(&plan.idle)?],
    })
}

fn measure(scenario: &Scenario, plan: &Plan, slipstream: &Path) -> Result<Measured> {
    /// For the kernel to free the source's copy, which costs processor time.
    const SETTLE: Duration = Duration::from_millis(700);
    let touches = scenario.mode != Mode::Idle;
    let lab = Lab::new(slipstream)?;
    let mut program = lab.start_touch(scenario.bytes, scenario.threads, scenario.mode)?;
    let parts = (!touches).then(|| Parts::measure(&lab, &program, scenario.bytes)).transpose()?;
    sleep(SETTLE);
    let before = Inventory::of(program.pid)?;
    let rate_before = if touches { program.rate(plan.rate_over)? } else { 0.0 };
    warm(scenario.bytes)?;
    // What warming did to the program is none of the migration's doing.
    program.seen(false)?;
    let migration = migrate(&lab, &mut program)?;
    let seen = program.seen(false)?;
    sleep(SETTLE);
    let rate_after = if touches { program.rate(plan.rate_over)? } else { 0.0 };
    let left_behind = proof::left_behind(program.pid, &before)?;
    let checked = program.seen(true)?;
    Ok(Measured {
        speed_ratio: touches.then(|| rate_after / rate_before),
        pages_wrong: seen.wrong + checked.wrong,
        left_behind,
        parts,
        ..combine(&migration, &seen)?
    })
}

/// Has the machine own the memory that the copy is about to fill. A virtual machine gives free memory back to its
/// host, and then waits for the host at every first use: many times what installing a page costs, and none of our
/// doing. More than is needed, because the kernel does not hand out again just what was freed last (measured: with as
/// much as needed, every third drain spent three times the system time in `UFFDIO_COPY`).
fn warm(bytes: u64) -> Result<()> {
    const TIMES: u64 = 3;
    let bytes = (TIMES * bytes).min(lab::memory_available()? / 2);
    drop(std::hint::black_box(vec![1u8; bytes as usize]));
    Ok(())
}

/// The program's figures beside the tool's.
fn combine(migration: &Migration, seen: &Seen) -> Result<Measured> {
    let (resumed, completed) = (&migration.resumed, &migration.completed);
    let tool = |event: &serde_json::Value, field: &str| {
        event[field].as_f64().with_context(|| format!("{field} in {event}"))
    };
    // Gaps that began before the harness heard of the resume, and those after.
    let gap_us_max = |early: bool| {
        let these = seen.gaps.iter().filter(|g| (g.0 < migration.resumed_at_ns) == early);
        these.map(|gap| gap.1 as f64 / 1e3).reduce(f64::max)
    };
    Ok(Measured {
        blackout_seen_us: gap_us_max(true),
        blackout_tool_us: tool(resumed, "blackout_us")?,
        blackout_parts: resumed["blackout_parts"].clone(),
        drain_ms: tool(completed, "drain_us")? / 1e3,
        bytes: tool(completed, "bytes")? as u64,
        faults_seen: seen.faults,
        fault_seen_us_p50: seen.fault_ns_p50 as f64 / 1e3,
        fault_seen_us_p99: seen.fault_ns_p99 as f64 / 1e3,
        fault_seen_us_max: seen.fault_ns_max as f64 / 1e3,
        faults_tool: tool(completed, "faults")? as u64,
        fault_tool_us_p50: tool(completed, "fault_us_p50")?,
        fault_tool_us_p99: tool(completed, "fault_us_p99")?,
        drain_gap_us_max: gap_us_max(false),
        speed_ratio: None,
        memory: migration.peaks.clone(),
        pages_wrong: 0,
        left_behind: Vec::new(),
        parts: None,
    })
}
