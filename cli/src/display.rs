//! What is seen while a migration goes on: one live line on a terminal, a plain line now and then
//! elsewhere. All of it goes to stderr.

use crate::report::{Story, duration, fault_figures, grouped, one_line, rate};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use slipstream_faultd::events::{Event, Frozen, Progress};
use std::io::Write;
use std::time::Duration;

/// Without a terminal a line of progress appears this often.
const PLAIN_EVERY: Duration = Duration::from_secs(5);
/// The live line is redrawn this often at most.
const DRAW_HZ: u8 = 20;

/// Where progress is shown.
pub enum Screen {
    /// One line that changes.
    Live(ProgressBar),
    /// Lines that stay.
    Plain {
        /// Where they go.
        out: Box<dyn Write>,
        /// When the last line of progress was written, since the start.
        last: Option<Duration>,
    },
    /// Nothing.
    Quiet,
}

impl Screen {
    /// One line that changes, on the terminal behind stderr.
    pub fn live() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(DRAW_HZ));
        bar.set_style(
            // The line is cut at the terminal's width: what matters most comes first in it.
            ProgressStyle::with_template("{spinner} {wide_msg}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner()),
        );
        // A time without events still shows that something lives.
        bar.enable_steady_tick(Duration::from_millis(150));
        Self::Live(bar)
    }

    /// Lines that stay.
    pub fn plain(out: Box<dyn Write>) -> Self {
        Self::Plain { out, last: None }
    }

    /// Shows an event that the story has just taken in; `now` counts from the start of the display.
    pub fn show(&mut self, story: &Story, event: &Event, now: Duration) {
        if let Event::Note(note) = event {
            self.say(&one_line(&note.text));
            return;
        }
        match self {
            Self::Live(bar) => bar.set_message(live_line(story)),
            Self::Plain { out, last } => {
                let Some(line) = plain_line(story, event) else { return };
                if matches!(event, Event::Progress(_)) {
                    if last.is_some_and(|last| now < last + PLAIN_EVERY) {
                        return;
                    }
                    *last = Some(now);
                }
                write_line(out, &line);
            }
            Self::Quiet => {}
        }
    }

    /// A line that stays.
    pub fn say(&mut self, text: &str) {
        match self {
            Self::Live(bar) => bar.println(text),
            Self::Plain { out, .. } => write_line(out, text),
            Self::Quiet => {}
        }
    }

    /// Takes the live line away.
    pub fn finish(&mut self) {
        if let Self::Live(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// A terminal that is gone doesn't stop the migration from being followed to its end.
fn write_line(out: &mut dyn Write, text: &str) {
    if let Err(error) = writeln!(out, "{text}").and_then(|()| out.flush()) {
        tracing::debug!("writing progress: {error}");
    }
}

/// The one line that changes. What matters most comes first.
pub fn live_line(story: &Story) -> String {
    match &story.progress {
        Some(progress) if progress.figures.pages_total > 0 => figures_line(progress),
        _ => match &story.frozen {
            Some(f) => format!("{:<9}  {}", story.phase(), counts(f)),
            None => one_line(story.phase()),
        },
    }
}

fn counts(f: &Frozen) -> String {
    format!("{} threads, {} mappings, {} descriptors", f.threads, f.mappings, f.descriptors)
}

fn figures_line(progress: &Progress) -> String {
    let f = &progress.figures;
    let mut parts = vec![format!("{} {:>3} %", one_line(&progress.phase), percent(progress))];
    if let Some(left) = progress.eta_s.filter(|s| s.is_finite() && *s >= 0.0) {
        parts.push(format!("{} left", duration((left * 1e6) as u64)));
    }
    parts.push(rate(f.mb_per_s));
    let faults = fault_figures(f);
    if !faults.is_empty() {
        parts.push(faults);
    }
    parts.push(format!("{}/{} pages", grouped(f.pages_present), grouped(f.pages_total)));
    parts.join("  ")
}

/// Whole percent of pages; 100 only when none is missing.
fn percent(progress: &Progress) -> u64 {
    let (present, total) = (progress.figures.pages_present, progress.figures.pages_total);
    let share = u128::from(present.min(total)) * 100 / u128::from(total.max(1));
    share as u64
}

/// The line that stays for an event; the last ones are the report's.
fn plain_line(story: &Story, event: &Event) -> Option<String> {
    match event {
        Event::Frozen(f) => Some(format!("slipstream: frozen: {}", counts(f))),
        Event::Progress(_) => Some(format!("slipstream: {}", live_line(story))),
        Event::Committed(c) => {
            Some(format!("slipstream: committed, migration {}", one_line(&c.id)))
        }
        Event::Resumed(r) => Some(format!(
            "slipstream: runs at the destination, PID {} there, after a blackout of {}",
            r.dest_pid,
            duration(r.blackout_us)
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipstream_faultd::events::Figures;

    fn progress(present: u64, eta_s: Option<f64>) -> Event {
        Event::Progress(Progress {
            phase: "drain".into(),
            figures: Figures {
                pages_present: present,
                pages_total: 262_144,
                bytes: present * 4096,
                faults: 890,
                fault_us_p50: 41,
                fault_us_p99: 180,
                mb_per_s: 1104.4,
                faults_per_s: 8900.2,
            },
            eta_s,
        })
    }

    fn line(event: Event) -> String {
        let mut story = Story::default();
        story.see(event);
        live_line(&story)
    }

    #[test]
    fn the_live_line() {
        assert_eq!(
            line(progress(163_840, Some(0.4))),
            "drain  62 %  400 ms left  1104 MB/s  8900 faults/s  p50 41 us  p99 180 us  \
             163,840/262,144 pages"
        );
        assert_eq!(
            line(Event::Note(slipstream_faultd::events::Note { text: "x".into() })),
            "preflight"
        );
    }

    #[test]
    fn it_is_not_full_before_it_is() {
        assert!(line(progress(262_143, None)).starts_with("drain  99 %"));
        assert!(line(progress(262_144, Some(f64::NAN))).starts_with("drain 100 %  1104"));
    }

    #[test]
    fn no_terminal_gets_a_line_every_five_seconds() {
        let (mut from, to) = std::io::pipe().expect("a pipe");
        let mut screen = Screen::plain(Box::new(to));
        let mut story = Story::default();
        for second in 0..12 {
            let event = progress(second * 1000, None);
            story.see(event.clone());
            screen.show(&story, &event, Duration::from_secs(second));
        }
        drop(screen);
        let mut text = String::new();
        std::io::Read::read_to_string(&mut from, &mut text).expect("text");
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.lines().nth(1).expect("a second").contains(" 5,000/262,144 pages"), "{text}");
    }
}
