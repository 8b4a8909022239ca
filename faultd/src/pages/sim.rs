//! A seeded simulator: a program with threads and children, the kernel's userfaultfd as far as it
//! matters here, lanes that delay, reorder and fail, and an edge that does what the module asks of
//! it. Every touch is checked, and that everything ends.
//!
//! What the kernel is modelled to do: a call that raises events waits for each to be read before it
//! raises the next; until the last is read, copies answer `EAGAIN`, but `ENOENT` comes first;
//! `REMOVE` is raised before the pages are zapped, `UNMAP`, `REMAP` and `FORK` after the fact.
//!
//! `SLIPSTREAM_SIM_SEED=n` replays one seed.

mod edge;
mod kernel;

use super::SpaceId;
use edge::Edge;
use kernel::{Kernel, Process, Slot, ThreadState, Touch};
use std::collections::BTreeMap;
use std::ops::Range;

const SEEDS: u64 = 8000;
const STEPS_MAX: u32 = 400_000;
const HUGE: u64 = 2 << 20;
/// Where the program maps and moves things: small, so that they often collide.
const ARENA: u64 = 0x1000_0000;
const ARENA_HUGE: u64 = 0x8000_0000;

/// A small generator (`SplitMix64`).
pub struct Rng(u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub fn chance(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// What every byte should be, kept by the program for itself.
struct Program {
    ops_left: u32,
    stamp: u64,
}

impl Program {
    /// One thread does one thing.
    fn step(&mut self, kernel: &mut Kernel, rng: &mut Rng) {
        let process = rng.below(kernel.processes.len() as u64) as usize;
        let thread = rng.below(3) as usize;
        if !kernel.processes[process].runs() {
            return;
        }
        match kernel.processes[process].threads[thread] {
            ThreadState::Idle if self.ops_left > 0 => {
                self.ops_left -= 1;
                self.start(kernel, rng, process, thread);
            }
            ThreadState::Retry(touch) => kernel.touch(process, thread, touch),
            ThreadState::Changed => kernel.queue(process, thread),
            ThreadState::Zap { start, end, punch } => {
                kernel.zap(process, thread, start, end, punch);
            }
            _ => {}
        }
    }

    fn start(&mut self, kernel: &mut Kernel, rng: &mut Rng, process: usize, thread: usize) {
        // Two changes of the same place at once would be a race of the program with itself, whose outcome it
        // could not know either. What is touched or moved meanwhile is elsewhere, or where something was before.
        let alone = !kernel.processes[process].in_a_call();
        if alone && rng.chance(30) && kernel.processes.len() < 5 {
            return kernel.fork(process, thread);
        }
        if alone && rng.chance(60) && process > 0 {
            return kernel.exit(process);
        }
        if alone && rng.chance(25) {
            let len = 1 + rng.below(6);
            let start = ARENA + rng.below(56) * 4096;
            return kernel.mmap(process, start, len);
        }
        let Some((start, pages)) = pick_run(&kernel.processes[process], rng) else { return };
        let slot = kernel.processes[process].map[&start];
        let end = start + pages * slot.size;
        let op = rng.below(20);
        kernel.processes[process].busy[thread] = std::iter::once(start..end).collect();
        kernel.processes[process].subject[thread] = start..end;
        if !alone && slot.size != HUGE && slot.shared.is_none() && rng.chance(3) {
            return move_meanwhile(kernel, rng, (process, thread), start..end);
        }
        match if alone { op } else { op.max(5) } {
            0 => kernel.madvise(process, thread, start, end, false),
            1 => kernel.madvise(process, thread, start, end, slot.shared.is_some()),
            2 => kernel.munmap(process, thread, start, end),
            3 | 4 => {
                let to = if slot.size == HUGE {
                    ARENA_HUGE + rng.below(6) * HUGE
                } else {
                    ARENA + rng.below(56) * 4096
                };
                let how = rng.below(3);
                let places = &mut kernel.processes[process].busy[thread];
                places.push(to..to + (end - start));
                if how == 2 && slot.shared.is_none() {
                    // The old place is free for others as soon as it is left.
                    places.remove(0);
                }
                if how == 0 && slot.shared.is_some() {
                    kernel.alias(process, thread, start, end, to);
                } else {
                    kernel.mremap(process, thread, start, end, to, how == 1 && slot.size == 4096);
                }
            }
            op => {
                let write = (op % 3 == 0).then(|| {
                    self.stamp += 1;
                    self.stamp << 32
                });
                let sequential = op > 14;
                let address = if sequential { start } else { start + rng.below(pages) * slot.size };
                kernel.touch(process, thread, Touch { address, write });
            }
        }
    }
}

/// Moves private memory to a place that nobody uses any more, while other threads are in their calls.
fn move_meanwhile(kernel: &mut Kernel, rng: &mut Rng, who: (usize, usize), from: Range<u64>) {
    let (process, thread) = who;
    let this = &mut kernel.processes[process];
    let to = if rng.chance(2) {
        this.subject[rng.below(3) as usize].start
    } else {
        ARENA + rng.below(56) * 4096
    };
    let to = to..to + (from.end - from.start);
    let unused = this.map.range(to.clone()).next().is_none();
    this.busy[thread].clear();
    if unused && this.is_free(&from) && this.is_free(&to) {
        this.busy[thread].push(to.clone());
        kernel.mremap(process, thread, from.start, from.end, to.start, false);
    }
}

/// A run of pages of one kind, as one mapping would be.
fn pick_run(process: &Process, rng: &mut Rng) -> Option<(u64, u64)> {
    let index = rng.below(process.map.len() as u64) as usize;
    let (start, slot) = process.map.iter().nth(index).map(|(start, slot)| (*start, *slot))?;
    let wanted = 1 + rng.below(8);
    let alike = |at: &u64| {
        process.map.get(at).is_some_and(|other: &Slot| {
            other.size == slot.size
                && other.registered == slot.registered
                && other.shared.is_some() == slot.shared.is_some()
        })
    };
    let pages = (0..wanted).take_while(|page| alike(&(start + page * slot.size))).count();
    Some((start, pages as u64))
}

fn run(seed: u64) {
    let mut rng = Rng(mix(seed));
    let source = random_source(&mut rng);
    let mut kernel = Kernel::new(&source);
    let mut edge = Edge::new(source, &mut rng);
    let mut program = Program { ops_left: 60 + rng.below(120) as u32, stamp: 1 };
    let eager = 1 + rng.below(6);
    for _ in 0..STEPS_MAX {
        if rng.below(8) < eager {
            program.step(&mut kernel, &mut rng);
        } else {
            edge.step(&mut kernel, &mut rng);
        }
        if program.ops_left == 0 && kernel.quiet() && edge.done() {
            kernel.check_all();
            return;
        }
    }
    panic!("does not end: {:?}\n{:?}", kernel.processes, edge);
}

/// Content of each source page; zero is a page the source doesn't have.
fn random_source(rng: &mut Rng) -> BTreeMap<u64, (u64, u64)> {
    let mut source = BTreeMap::new();
    let mut present = true;
    for region in edge::regions() {
        let size = u64::from(region.page_size);
        for start in (region.start..region.end()).step_by(size as usize) {
            if rng.chance(4) {
                present = !present;
            }
            let content = if present { mix(start) | 1 } else { 0 };
            source.insert(start, (content, size));
        }
    }
    source
}

#[test]
fn no_wrong_byte_in_thousands_of_schedules() {
    if let Ok(seed) = std::env::var("SLIPSTREAM_SIM_SEED") {
        return run(seed.parse().expect("SLIPSTREAM_SIM_SEED is a number"));
    }
    for seed in 0..SEEDS {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("replay with SLIPSTREAM_SIM_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// The simulator must notice what it is for: an edge that reads events between deciding a copy and
/// doing it brings discarded pages back.
#[test]
fn the_simulator_notices_a_careless_edge() {
    edge::CARELESS.set(true);
    let caught = (0..SEEDS).any(|seed| {
        std::panic::catch_unwind(|| run(seed)).is_err_and(|panic| {
            panic.downcast_ref::<String>().is_some_and(|text| text.starts_with("wrong bytes"))
        })
    });
    edge::CARELESS.set(false);
    assert!(caught);
}

/// Kept here so that both halves of the model agree on the first address space.
const FIRST: SpaceId = SpaceId::PROCESS;
