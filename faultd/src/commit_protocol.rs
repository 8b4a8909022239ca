//! Which copy runs: the decisions of both sides around the commit, without any I/O.
//!
//! Two words are durable. The destination's *gate* is undecided, or for ever RUN, or for ever NEVER: the
//! first decision wins, by compare-and-swap in a file. The source's *journal* says whether its copy may
//! have been given away. A message is lost, late or doubled, either side dies at any step, and a user
//! gives up or recovers: in none of these do two copies run, or none without the source waiting for the
//! answer. The sessions ask this module what to do; the test below looks at every state there is.

/// How far the source's commit is, as its journal says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Journal {
    /// Nothing has been given away.
    Before,
    /// The commit may have left. The copy is stopped for good, unless the session died before it did that.
    Committing,
    /// The destination has said that its copy runs.
    Committed,
}

impl Journal {
    /// From the journal's file, if there is one.
    pub fn parse(content: Option<&[u8]>) -> Self {
        match content {
            None => Self::Before,
            Some(b"committed\n") => Self::Committed,
            // A file that was cut short was written all the same.
            Some(_) => Self::Committing,
        }
    }

    /// As it is written.
    pub fn content(self) -> &'static [u8] {
        match self {
            Self::Before => b"",
            Self::Committing => b"committing\n",
            Self::Committed => b"committed\n",
        }
    }
}

/// What the source hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The answer to a commit.
    Resumed,
    /// The answer to a source that has come back.
    Outcome {
        /// The gate says RUN; otherwise it says NEVER.
        run: bool,
    },
    /// Nothing that could be understood: the connection broke, or time is up.
    Nothing,
}

/// What the source does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The process runs at the destination: journal that, serve pages.
    Serve,
    /// The copy goes on here; it never runs there.
    BringBack,
    /// The copy stays as it is; ask (again) what was decided.
    Ask,
}

/// The source's next step. Only NEVER brings a copy back, and only one that was not known to run elsewhere.
pub fn source(journal: Journal, heard: Heard) -> Next {
    match (journal, heard) {
        (Journal::Before, _) | (Journal::Committing, Heard::Outcome { run: false }) => {
            Next::BringBack
        }
        (_, Heard::Resumed | Heard::Outcome { run: true }) => Next::Serve,
        // A destination that takes RUN back has lost its memory: neither side may act on that.
        (Journal::Committed, Heard::Outcome { run: false }) | (_, Heard::Nothing) => Next::Ask,
    }
}

/// What happens at the destination that calls for a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The source commits.
    Commit,
    /// The source has come back: its commit, if it left, has not arrived in time.
    Rejoin,
    /// The session gives up, has died, or a user wants it.
    GiveUp,
}

/// True when the destination wishes to decide RUN, false for NEVER. What holds is what was decided first.
pub fn wishes_run(call: Call) -> bool {
    call == Call::Commit
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// What the session at the source has done or waits for, while it lives.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Session {
        Dead,
        /// The destination is ready.
        Ready,
        Journalled,
        Stopped,
        CommitSent,
        Asking,
        /// The registers are back, the program is not yet let go.
        Restored,
        Over,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Gate {
        Pending,
        Run,
        Never,
    }

    /// Messages under way: each may arrive any number of times, at any time, or never.
    const COMMIT: u8 = 1;
    const RESUMED: u8 = 2;
    const REJOIN: u8 = 4;
    const OUTCOME_RUN: u8 = 8;
    const OUTCOME_NEVER: u8 = 16;

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct World {
        session: Session,
        journal: Journal,
        /// The source copy can run.
        source_runs: bool,
        /// The destination has a session that waits for the commit.
        waits: bool,
        gate: Gate,
        /// The source's folder is there.
        folder: bool,
        wire: u8,
    }

    const START: World = World {
        session: Session::Ready,
        // Frozen by ptrace: whoever dies lets it go on, so it counts as running.
        source_runs: true,
        journal: Journal::Before,
        waits: true,
        gate: Gate::Pending,
        folder: true,
        wire: 0,
    };

    impl World {
        fn decide(&mut self, call: Call) {
            if self.gate == Gate::Pending {
                self.gate = if wishes_run(call) { Gate::Run } else { Gate::Never };
            }
        }

        /// What the source makes of what it hears.
        fn heard(mut self, heard: Heard) -> Self {
            match source(self.journal, heard) {
                Next::Serve => {
                    self.journal = Journal::Committed;
                    self.session = Session::Over;
                }
                Next::BringBack => self.session = Session::Restored,
                Next::Ask => self.session = Session::Asking,
            }
            self
        }

        fn steps(self) -> Vec<Self> {
            let mut next = Vec::new();
            // The source's session goes on, or a user interrupts it while that is possible.
            match self.session {
                Session::Ready => {
                    next.push(Self {
                        session: Session::Journalled,
                        journal: Journal::Committing,
                        ..self
                    });
                    next.push(Self { session: Session::Dead, folder: false, ..self });
                }
                Session::Journalled => {
                    next.push(Self { session: Session::Stopped, source_runs: false, ..self });
                }
                Session::Stopped => {
                    next.push(Self {
                        session: Session::CommitSent,
                        wire: self.wire | COMMIT,
                        ..self
                    });
                }
                Session::CommitSent => next.push(self.heard(Heard::Nothing)),
                Session::Asking => {
                    next.push(Self { wire: self.wire | REJOIN, ..self });
                    next.push(self.heard(Heard::Nothing));
                }
                Session::Restored => {
                    next.push(Self {
                        session: Session::Over,
                        source_runs: true,
                        folder: false,
                        ..self
                    });
                }
                Session::Over | Session::Dead => {}
            }
            // It is killed; a new one is started by `recover`.
            if !matches!(self.session, Session::Dead | Session::Over) {
                next.push(Self { session: Session::Dead, ..self });
            }
            if self.session == Session::Dead && self.folder {
                next.push(match self.journal {
                    Journal::Before => Self { folder: false, ..self },
                    _ => Self { session: Session::Asking, ..self },
                });
            }
            // The destination's session gives up or is killed and cleaned up after; a user aborts.
            let mut given_up = self;
            given_up.decide(Call::GiveUp);
            next.push(Self { waits: false, ..given_up });
            // It is killed, and nobody has cleaned up yet.
            next.push(Self { waits: false, ..self });
            next.extend(self.arrivals().into_iter().flatten());
            // Any message is lost.
            next.extend((0..5).map(|bit| Self { wire: self.wire & !(1 << bit), ..self }));
            next
        }

        fn arrivals(self) -> [Option<Self>; 5] {
            let under_way = |message: u8| self.wire & message != 0;
            let commit = (under_way(COMMIT) && self.waits).then(|| {
                let mut world = Self { waits: false, ..self };
                world.decide(Call::Commit);
                if world.gate == Gate::Run {
                    world.wire |= RESUMED;
                }
                world
            });
            let rejoin = under_way(REJOIN).then(|| {
                // Also while an old session still waits for a commit: both decide by the same word.
                let mut world = self;
                world.decide(Call::Rejoin);
                let answer = if world.gate == Gate::Run { OUTCOME_RUN } else { OUTCOME_NEVER };
                world.wire |= answer;
                world
            });
            let waiting = self.session == Session::CommitSent;
            let asking = self.session == Session::Asking;
            let heard = |message, if_it: bool, what| {
                (under_way(message) && if_it).then(|| self.heard(what))
            };
            [
                commit,
                rejoin,
                heard(RESUMED, waiting || asking, Heard::Resumed),
                heard(OUTCOME_RUN, asking, Heard::Outcome { run: true }),
                heard(OUTCOME_NEVER, asking, Heard::Outcome { run: false }),
            ]
        }

        /// Both sides come back and talk, and nothing breaks.
        fn settle(mut self) -> Self {
            if self.session == Session::Dead && !self.folder {
                return self;
            }
            if matches!(self.session, Session::Ready | Session::Dead)
                && self.journal == Journal::Before
            {
                return Self { session: Session::Dead, folder: false, ..self };
            }
            if matches!(self.session, Session::Over) {
                return self;
            }
            self.session = Session::Asking;
            self.wire = REJOIN;
            self = self.arrivals()[1].expect("a question is under way");
            let run = self.gate == Gate::Run;
            self = self.heard(Heard::Outcome { run });
            if self.session == Session::Restored {
                self = Self { session: Session::Over, source_runs: true, folder: false, ..self };
            }
            self
        }

        fn check(self) {
            let runs_there = self.gate == Gate::Run;
            assert!(!(self.source_runs && runs_there), "two copies run: {self:?}");
            if !self.source_runs && !runs_there {
                // Somebody knows: a session at work, or a journal that `recover` finds.
                assert!(self.folder && self.journal != Journal::Before, "none runs: {self:?}");
            }
            let settled = self.settle();
            let runs = u8::from(settled.source_runs) + u8::from(settled.gate == Gate::Run);
            assert_eq!(runs, 1, "not settled: {self:?} -> {settled:?}");
        }
    }

    /// All there is: every order of steps, losses, delays, repetitions, deaths and wishes.
    #[test]
    fn never_two_never_none_unknowingly() {
        let mut seen = BTreeSet::from([START]);
        let mut todo = vec![START];
        while let Some(world) = todo.pop() {
            world.check();
            for next in world.steps() {
                if seen.insert(next) {
                    todo.push(next);
                }
            }
        }
        let count = |f: fn(&World) -> bool| seen.iter().filter(|w| f(w)).count();
        assert!(seen.len() > 150, "only {} states", seen.len());
        assert!(count(|w| w.gate == Gate::Run && w.session == Session::Over) > 0);
        assert!(count(|w| w.gate == Gate::Never && w.source_runs && !w.folder) > 0);
        assert!(count(|w| !w.source_runs && w.gate == Gate::Pending) > 0);
    }

    #[test]
    fn a_known_commit_is_never_taken_back() {
        assert_eq!(source(Journal::Committed, Heard::Outcome { run: false }), Next::Ask);
        assert_eq!(source(Journal::Committing, Heard::Nothing), Next::Ask);
    }

    #[test]
    fn journals_round_trip() {
        for journal in [Journal::Committing, Journal::Committed] {
            assert_eq!(Journal::parse(Some(journal.content())), journal);
        }
        assert_eq!(Journal::parse(None), Journal::Before);
        assert_eq!(Journal::parse(Some(b"")), Journal::Committing);
    }
}
