//! How reading goes, for all lanes of a migration: the first failure ends it for every one of them.

use super::sys::{Context, Here};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Shared by the lanes and the session.
#[derive(Debug)]
pub struct Health {
    context: Arc<Context>,
    here: Here,
    failed: AtomicBool,
    why: Mutex<Option<String>>,
    bytes: AtomicU64,
}

impl Health {
    pub(super) fn new(context: Arc<Context>, here: Here) -> Self {
        let (failed, why, bytes) = Default::default();
        Self { context, here, failed, why, bytes }
    }

    /// Why nothing is read any more, if so. Looks at what the adapter has to say, too.
    pub fn failure(&self) -> Option<String> {
        if let Some(fatal) = self.context.failure(self.here) {
            self.fail(format!("{}: {fatal}", self.context.name()));
        }
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Ends reading; the first reason is kept.
    pub(super) fn fail(&self, why: String) {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.failed.store(true, Ordering::Release);
    }
}
