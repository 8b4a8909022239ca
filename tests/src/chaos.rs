//! A program that is moved between two hosts again and again while a monkey breaks things.
//!
//! What the monkey does follows from a seed; the moments at which it hits are the machine's, so a seed that failed
//! fails again often, not always.

use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use crate::build::Build;
use crate::hosts::{Agent, Hosts, Side};
use crate::migration::{Migration, Outcome, code};
use crate::process::{Pidfd, proc_file, status_field};
use crate::program::{Program, Verdict};
use crate::proxy::Proxy;
use crate::wait;

/// For everything to come to rest once nothing is broken any more.
const SETTLE: Duration = wait::LIMIT;
/// A whole `recover`.
const RECOVER: Duration = wait::LIMIT;
/// Bytes of one beat of the lease (`programs/chaos.c`).
const BEAT_LEN: u64 = 24;

/// Numbers that follow from a seed (splitmix64).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// A sort of Slipstream process. (Init of a moved process is part of that process.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The daemon.
    Agent,
    /// `slipstream migrate` or `recover` itself.
    Display,
    /// The source session, on whichever host it is.
    Source,
    /// The destination session, likewise.
    Destination,
    /// All of these.
    All,
}

const VICTIMS: [Victim; 5] =
    [Victim::Agent, Victim::Display, Victim::Source, Victim::Destination, Victim::All];

/// Something the monkey does, or undoes.
#[derive(Clone, Copy, Debug)]
pub enum Act {
    /// SIGKILL.
    Kill(Side, Victim),
    /// SIGSTOP.
    Stop(Side, Victim),
    /// SIGCONT.
    Continue(Side, Victim),
    /// The cable is pulled: nothing comes through, and nobody is told.
    Unplug,
    /// It is plugged in again.
    Plug,
    /// All connections are reset, and new ones are too.
    Cut,
    /// New connections are let through.
    Mend,
    /// Everything takes that many milliseconds longer.
    Delay(u64),
}

/// What happens in one move: when (milliseconds), and what.
#[derive(Debug)]
pub struct Plan {
    /// The clock starts when the process has resumed, rather than with the migration.
    pub after_resume: bool,
    /// In order of time.
    pub acts: Vec<(u64, Act)>,
}

impl Plan {
    /// The next plan that follows from a seed.
    pub fn draw(random: &mut Random) -> Self {
        let after_resume = random.below(2) == 0;
        let mut acts = Vec::new();
        for _ in 0..random.below(4).max(random.below(3)) {
            let at = random.below(if after_resume { 500 } else { 900 });
            let side = random.one_of(&Side::BOTH);
            let victim = random.one_of(&VICTIMS);
            // Mostly short; sometimes as long as the time-outs.
            let length = if random.below(12) == 0 { 11_000 } else { 20 + random.below(1200) };
            let (act, undo) = match random.below(8) {
                0..4 => (Act::Kill(side, victim), None),
                4 => (Act::Stop(side, victim), Some(Act::Continue(side, victim))),
                5 => (Act::Unplug, Some(Act::Plug)),
                6 => (Act::Cut, Some(Act::Mend)),
                _ => (Act::Delay(1 + random.below(40)), Some(Act::Delay(0))),
            };
            acts.push((at, act));
            acts.extend(undo.map(|undo| (at + length, undo)));
        }
        acts.sort_by_key(|(at, _)| *at);
        Self { after_resume, acts }
    }
}

/// The two hosts, their agents, and the program.
pub struct Arena<'a> {
    hosts: &'a Hosts,
    program: Program<'a>,
    agents: [Agent; 2],
    addresses: [SocketAddr; 2],
    proxies: [Proxy; 2],
    at: Side,
    pid: i32,
}

fn index(side: Side) -> usize {
    side as usize
}

impl<'a> Arena<'a> {
    /// Starts everything.
    pub fn new(hosts: &'a Hosts, seed: u64) -> Self {
        let agents = Side::BOTH.map(|side| {
            let address = hosts.host(side).address;
            hosts.agent_on(side, &format!("{address}:0"), |_| {})
        });
        let addresses = [agents[0].address, agents[1].address];
        // Each host reaches the other one's agent through a wire of its own.
        let proxies =
            Side::BOTH.map(|side| Proxy::start_on(hosts, side, addresses[index(side.other())]));
        let program = Program::start(hosts, Build::dynamic("chaos"), &[&seed.to_string()]);
        let pid = program.pid;
        Self { hosts, program, agents, addresses, proxies, at: Side::Source, pid }
    }

    /// Moves the program to the other host while a plan is carried out. Returns how `migrate` ended.
    pub fn round(&mut self, plan: &Plan) -> Option<i32> {
        let from = self.at;
        let destination = self.proxies[index(from)].destination();
        let migration = Migration::start_on(self.hosts, from, self.pid, &destination, |_| {});
        if plan.after_resume {
            let begin = Instant::now();
            while migration.find("resumed").is_none()
                && !migration.ended()
                && begin.elapsed() < SETTLE
            {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let begin = Instant::now();
        for (at, act) in &plan.acts {
            std::thread::sleep(Duration::from_millis(*at).saturating_sub(begin.elapsed()));
            self.carry_out(*act);
        }
        self.mend_everything();
        let outcome = migration.wait_at_most(SETTLE);
        let recovered = self.settle(from);
        self.judge(from, &outcome, &recovered);
        outcome.code
    }

    fn carry_out(&self, act: Act) {
        match act {
            Act::Kill(side, victim) => self.signal(side, victim, libc::SIGKILL),
            Act::Stop(side, victim) => self.signal(side, victim, libc::SIGSTOP),
            Act::Continue(side, victim) => self.signal(side, victim, libc::SIGCONT),
            Act::Unplug => self.hosts.host(Side::Source).set_link(false),
            Act::Plug => self.hosts.host(Side::Source).set_link(true),
            Act::Cut => self.proxies.iter().for_each(Proxy::cut),
            Act::Mend => self.proxies.iter().for_each(Proxy::mend),
            Act::Delay(ms) => {
                self.proxies.iter().for_each(|p| p.set_delay(Duration::from_millis(ms)));
            }
        }
    }

    fn signal(&self, side: Side, victim: Victim, signal: i32) {
        for process in self.victims(side, victim) {
            process.signal(signal);
        }
    }

    fn victims(&self, side: Side, victim: Victim) -> Vec<Pidfd> {
        let wanted = |pid: &i32| {
            let comm = proc_file(*pid, "comm");
            let sort = match comm.trim() {
                "slipstream-src" => Victim::Source,
                "slipstream-dst" => Victim::Destination,
                "slipstream" if proc_file(*pid, "cmdline").contains("\0agent\0") => Victim::Agent,
                "slipstream" => Victim::Display,
                _ => return false,
            };
            victim == Victim::All || victim == sort
        };
        // Sessions are hit wherever they are; what is on both hosts, on the one that was drawn.
        let pids = match victim {
            Victim::Source | Victim::Destination => self.hosts.pids(),
            _ => self.hosts.host(side).pids(),
        };
        pids.into_iter().filter(wanted).filter_map(Pidfd::open).collect()
    }

    /// What an administrator does, or time.
    fn mend_everything(&mut self) {
        for side in Side::BOTH {
            self.signal(side, Victim::All, libc::SIGCONT);
        }
        for act in [Act::Plug, Act::Mend, Act::Delay(0)] {
            self.carry_out(act);
        }
        self.start_agents();
    }

    fn start_agents(&mut self) {
        for side in Side::BOTH {
            if !self.agents[index(side)].alive() {
                let address = self.addresses[index(side)].to_string();
                self.agents[index(side)] = self.hosts.agent_on(side, &address, |_| {});
            }
        }
    }

    /// Migrations that a source session has left here without an end.
    fn left_behind(&self, side: Side) -> Vec<String> {
        let entries = std::fs::read_dir(self.hosts.run_dir(side)).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter_map(|name| name.strip_prefix("source-").map(str::to_owned)).collect()
    }

    /// Waits until exactly one copy is there, running, and nothing is under way. What has died on the source is taken
    /// up. Returns the exit codes of `recover`.
    fn settle(&mut self, from: Side) -> Vec<i32> {
        let mut recovered = Vec::new();
        let begin = Instant::now();
        loop {
            self.assert_well();
            for id in self.left_behind(from) {
                if self.victims(from, Victim::Source).is_empty() {
                    recovered.extend(self.recover(from, &id));
                }
            }
            let busy = Side::BOTH.iter().any(|side| {
                !self.left_behind(*side).is_empty()
                    || !self.victims(*side, Victim::Source).is_empty()
                    || !self.victims(*side, Victim::Destination).is_empty()
            });
            let copies: Vec<_> =
                Side::BOTH.iter().flat_map(|s| self.copies(*s).map(|pid| (*s, pid))).collect();
            if let ([(at, pid)], false) = (&copies[..], busy)
                && self.beats(*pid)
            {
                (self.at, self.pid) = (*at, *pid);
                return recovered;
            }
            assert!(
                begin.elapsed() < SETTLE,
                "not at rest after {SETTLE:?}: copies {copies:?}, sessions at work: {busy}, \
                 recovered: {recovered:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The program, wherever it is: its children have other numbers, its copies have the same one in there.
    fn copies(&self, side: Side) -> impl Iterator<Item = i32> + '_ {
        let own = self.program.pid.to_string();
        self.hosts.host(side).pids().into_iter().filter(move |pid| {
            proc_file(*pid, "comm").starts_with("chaos-")
                && status_field(*pid, "NSpid").is_some_and(|n| n.ends_with(&own))
        })
    }

    /// Whether this copy is the one that holds the lease, and is alive.
    fn beats(&self, pid: i32) -> bool {
        let Ok(namespace) = std::fs::metadata(format!("/proc/{pid}/ns/pid")) else { return false };
        let lease = std::fs::File::open(self.program.directory().join("lease")).expect("the lease");
        let beats = || lease.metadata().expect("the lease's length").len() / BEAT_LEN;
        let before = beats();
        let begin = Instant::now();
        while beats() < before + 3 {
            if begin.elapsed() > Duration::from_secs(2) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut holder = [0; 8];
        lease.read_exact_at(&mut holder, (beats() - 1) * BEAT_LEN + 8).expect("a beat");
        u64::from_le_bytes(holder) == namespace.ino()
    }

    /// No wrong byte, and no second copy so far: the program would have said so.
    pub fn assert_well(&self) {
        let verdict = self.program.verdict();
        assert_eq!(verdict, Verdict::None, "{}", self.program.output());
    }

    /// Runs `recover`; returns its exit code, unless there was nothing to recover any more.
    fn recover(&self, side: Side, id: &str) -> Option<i32> {
        let log = self.hosts.path().join(self.hosts.unique("recover") + ".log");
        let mut command = self.hosts.host(side).command(crate::build::slipstream());
        command.args(["recover", id, "--run-dir"]).arg(self.hosts.run_dir(side));
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        let child = self.hosts.spawn(&mut command, &log);
        let status = wait::until("`slipstream recover` to end", RECOVER, || {
            child.lock().expect("nobody panics with it").try_wait().expect("waiting for recover")
        });
        // An agent was faster, and has even ended it.
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        status.code().filter(|_| !said.contains("no migration"))
    }

    /// What was said must be what is.
    fn judge(&self, from: Side, outcome: &Outcome, recovered: &[i32]) {
        let moved = self.at != from;
        let told = || format!("moved: {moved}, recover: {recovered:?}, {outcome:#?}");
        match outcome.code {
            Some(code::COMPLETED | code::WAITING) => assert!(moved, "{}", told()),
            Some(code::REFUSED | code::ROLLED_BACK) => assert!(!moved, "{}", told()),
            // The source session died without a word, or the display did.
            Some(1) | None => {}
            other => panic!("exit code {other:?}: {}", told()),
        }
        for code in recovered {
            match *code {
                code::COMPLETED => assert!(moved, "{}", told()),
                code::REFUSED | code::ROLLED_BACK => assert!(!moved, "{}", told()),
                // The agent was faster: another session is at work.
                code::WAITING => {}
                other => panic!("recover ended with {other}: {}", told()),
            }
        }
        if moved {
            let maps = proc_file(self.pid, "maps");
            let ours = |line: &&str| line.contains("slipstream-") || line.contains("[io_uring]");
            assert_eq!(maps.lines().find(ours), None, "something of Slipstream is left in it");
        }
    }

    /// Where it is.
    pub fn at(&self) -> Side {
        self.at
    }

    /// Tells the program to check everything once more.
    pub fn finish(self) {
        self.program.tell();
        wait::until("the program's verdict", SETTLE, || {
            (self.program.verdict() != Verdict::None).then_some(())
        });
        self.program.assert_ok();
    }
}
