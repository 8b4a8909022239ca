//! SIGINT, SIGTERM and SIGHUP to a source session: before commit they end the migration, after it
//! they are ignored.

use crate::error::{Error, Result};
use nix::sys::signal::{SigSet, Signal};
use slipstream_transport::Closer;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

const OPEN: u8 = 0;
const INTERRUPTED: u8 = 1;
const COMMITTED: u8 = 2;

/// Whether the migration may still be interrupted, and what ends its waits.
#[derive(Debug, Default)]
pub struct Interrupts {
    state: AtomicU8,
    closers: Mutex<Vec<Closer>>,
}

impl Interrupts {
    /// Takes over the signals for the whole process. Call before any other thread is started.
    pub fn install() -> Result<&'static Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block().map_err(|e| Error::io("block signals", e.into()))?;
        let interrupts: &'static Self = Box::leak(Box::default());
        std::thread::spawn(move || {
            while set.wait().is_ok() {
                interrupts.interrupt();
            }
        });
        Ok(interrupts)
    }

    fn interrupt(&self) {
        let won =
            self.state.compare_exchange(OPEN, INTERRUPTED, Ordering::SeqCst, Ordering::SeqCst);
        if won.is_ok() {
            for closer in self.lock().iter() {
                closer.close();
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Closer>> {
        self.closers.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Has an interrupt end whatever waits on this connection.
    pub fn close_on_interrupt(&self, closer: Closer) {
        if self.interrupted() {
            closer.close();
        }
        self.lock().push(closer);
    }

    /// Fails if there was an interrupt.
    pub fn check(&self) -> Result<()> {
        if self.interrupted() { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// True if there was an interrupt in time.
    pub fn interrupted(&self) -> bool {
        self.state.load(Ordering::SeqCst) == INTERRUPTED
    }

    /// From here on interrupts do nothing. Fails if there was one before.
    pub fn commit(&self) -> Result<()> {
        self.state
            .compare_exchange(OPEN, COMMITTED, Ordering::SeqCst, Ordering::SeqCst)
            .map(drop)
            .map_err(|_| Error::Interrupted)
    }
}
