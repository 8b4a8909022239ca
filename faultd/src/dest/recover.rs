//! `slipstream recover` at the destination: the source comes back by itself, so all that may be missing
//! is an agent that lets it in.

use crate::agent::{self, AgentConfig};
use crate::carrier::Carrier;
use crate::dest::lost;
use crate::error::{Error, Result};
use crate::events::{self, Event, Progress, Role};
use crate::protocol::Completed;
use crate::rundir;
use prost::Message;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Follows a drain to its end; serves as the agent where none does.
pub fn recover(run_dir: &Path, id: &str, exe: PathBuf, sink: &mut dyn FnMut(Event)) -> Result<()> {
    let started = Instant::now();
    let (mut agent, mut noted) = (None, false);
    if let Some((listen, key)) = rundir::dead_agent(run_dir)? {
        let (run_dir, carrier) = (run_dir.to_owned(), Carrier::default());
        let config = AgentConfig { listen, key, run_dir, carrier, exe, source_lost: None };
        agent = Some(std::thread::spawn(move || agent::run(&config, &mut |_| {})));
    }
    sink(Event::Progress(Progress {
        phase: "waiting".into(),
        figures: events::Figures::default(),
        eta_s: None,
    }));
    loop {
        if let Some(thread) = agent.take_if(|thread| thread.is_finished()) {
            return match thread.join() {
                Ok(Err(e)) => Err(e),
                _ => Err(Error::Internal("the agent ended".into())),
            };
        }
        let status =
            rundir::list(run_dir)?.into_iter().find(|s| s.id == id && s.role == Role::Destination);
        let Some(status) = status else {
            return Err(Error::Refused {
                reason: format!("migration {id} has left nothing here"),
                remedy: "look at its source: `slipstream status`".into(),
            });
        };
        if let Some(reason) = rundir::lost(run_dir, id) {
            sink(Event::Failed(events::Failed {
                phase: "drain".into(),
                reason,
                remedy: String::new(),
                outcome: events::Outcome::Lost,
            }));
            return Err(Error::Lost);
        }
        let over = rundir::completed(run_dir, id);
        let ended = over.is_some() || status.phase == "exited" && !lost::has_init(run_dir, id);
        // Where no other agent lets the source in, it has to hear so from this one: its copy waits for that.
        let told = agent.is_none() || rundir::destination_file(run_dir, id, rundir::BYE).exists();
        if ended && !told && !std::mem::replace(&mut noted, true) {
            let text = "nothing is missing here; waiting for the source to come and hear so".into();
            sink(Event::Note(events::Note { text }));
        }
        if ended && told {
            let exited = status.phase == "exited";
            let done = over.and_then(|bytes| Completed::decode(&*bytes).ok()).unwrap_or_default();
            let total_us = started.elapsed().as_micros() as u64;
            let told = crate::source::figures::completed(
                &done,
                total_us,
                String::new(),
                events::SourceCost::default(),
            );
            sink(Event::Completed(events::Completed { exited, ..told }));
            return Ok(());
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
}
