//! Events on their way to whoever watches: written by a thread of their own, so that a terminal that
//! was stopped never stops a migration.

use crate::events::Event;
use std::io::Write;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Lines waiting to be written. A watcher that is this far behind misses progress.
const QUEUE: usize = 1024;
/// For a line that isn't progress, to find room in the queue.
const ROOM_TIMEOUT: Duration = Duration::from_secs(1);

/// The way out.
#[derive(Debug)]
pub struct EventsOut {
    queue: SyncSender<String>,
    writer: JoinHandle<()>,
}

impl EventsOut {
    /// Starts writing to `out`. When nobody reads it any more, lines are dropped.
    pub fn start(mut out: impl Write + Send + 'static) -> Self {
        let (queue, lines) = sync_channel::<String>(QUEUE);
        let writer = std::thread::spawn(move || {
            let mut open = true;
            for line in lines {
                open = open && out.write_all(line.as_bytes()).and_then(|()| out.flush()).is_ok();
            }
        });
        Self { queue, writer }
    }

    /// Queues an event.
    pub fn send(&self, event: &Event) {
        let mut line = event.to_line() + "\n";
        let began = Instant::now();
        while let Err(TrySendError::Full(back)) = self.queue.try_send(line) {
            if matches!(event, Event::Progress(_)) || began.elapsed() > ROOM_TIMEOUT {
                return;
            }
            line = back;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until everything is written.
    pub fn finish(self) {
        drop(self.queue);
        let _ = self.writer.join();
    }
}
