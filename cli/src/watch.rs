//! Follows a migration to its end, or to the point where the one who watches has had enough.

use crate::display::Screen;
use crate::engine::{Control, Migration};
use crate::events::{Input, pump, watch_signals};
use crate::report::{End, Story};
use nix::sys::signal::SigSet;
use slipstream_faultd::events::Event;
use std::io::Write;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

/// Events that may wait while the terminal is slow; then the session's pipe holds them.
const INPUTS_MAX: usize = 1024;

/// Signals that come this close together are one wish: a closing terminal sends SIGHUP twice, and
/// `timeout` signals the process and then its group.
const SAME_WISH: Duration = Duration::from_secs(1);

/// Follows `migration`. `signals` are blocked already. With `json` its lines go there as they come.
pub fn watch(
    migration: Migration,
    signals: SigSet,
    screen: &mut Screen,
    json: Option<&mut dyn Write>,
) -> Story {
    let (to, inputs) = sync_channel(INPUTS_MAX);
    watch_signals(signals, to.clone());
    pump(migration.events, to);
    let story = Story { committed: migration.committed, ..Story::default() };
    follow(story, migration.control, &inputs, screen, json)
}

/// Takes inputs until there is an end.
fn follow(
    story: Story,
    control: Box<dyn Control>,
    inputs: &Receiver<Input>,
    screen: &mut Screen,
    json: Option<&mut dyn Write>,
) -> Story {
    let mut watcher = Watcher { story, screen, json, control, asked: None };
    watcher.run(inputs);
    watcher.screen.finish();
    watcher.story
}

struct Watcher<'s, 'j> {
    story: Story,
    screen: &'s mut Screen,
    json: Option<&'j mut dyn Write>,
    control: Box<dyn Control>,
    /// When a rollback was asked for.
    asked: Option<Instant>,
}

impl Watcher<'_, '_> {
    fn run(&mut self, inputs: &Receiver<Input>) {
        let start = Instant::now();
        while let Ok(input) = inputs.recv() {
            match input {
                Input::Line(line) => self.line(&line, start),
                Input::Interrupt(now) => self.interrupt(now),
                Input::End => break,
            }
            if self.story.end.is_some() {
                return;
            }
        }
        self.story.close();
        self.pass_on_own_end();
    }

    fn line(&mut self, line: &str, start: Instant) {
        self.pass_on(line);
        match Event::parse(line) {
            Ok(event) => {
                if self.asked.is_some() && matches!(event, Event::Committed(_)) {
                    self.screen.say("slipstream: too late to roll back: it was committed");
                }
                self.story.see(event.clone());
                self.screen.show(&self.story, &event, start.elapsed());
            }
            // A newer session may say more than this display knows; its end it will say as before.
            Err(error) => tracing::warn!("the session's line {line:.200?}: {error}"),
        }
    }

    /// Before the commit the first Ctrl-C asks for a rollback and the outcome is waited for; after it,
    /// or the second time, only the display ends.
    fn interrupt(&mut self, now: Instant) {
        if self.asked.is_some_and(|asked| now.duration_since(asked) < SAME_WISH) {
            return;
        }
        if self.story.committed.is_some() || self.asked.is_some() {
            self.story.end = Some(End::Left);
            return;
        }
        self.asked = Some(now);
        match self.control.request_rollback() {
            Ok(()) => self.screen.say("slipstream: rolling back"),
            // The session is gone, and the end of its events is about to say so.
            Err(error) => tracing::warn!("asking the session for a rollback: {error}"),
        }
    }

    /// A session that ended without a word leaves it to the display to say how it ended.
    fn pass_on_own_end(&mut self) {
        if let Some(End::Failed(failed)) = &self.story.end {
            let line = Event::Failed(failed.clone()).to_line();
            self.pass_on(&line);
        }
    }

    fn pass_on(&mut self, line: &str) {
        let Some(out) = &mut self.json else { return };
        if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush()) {
            // Who reads the events has gone; the exit code still matters.
            tracing::warn!("writing events to stdout: {error}");
            self.json = None;
        }
    }
}

#[cfg(test)]
mod tests;
