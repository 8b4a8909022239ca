//! Events of userfaultfds: each is read and takes effect under the exclusive half of the lock.

use super::{Drain, State};
use crate::dest::journal::{Record, Unfinished};
use crate::dest::shared_memory::mapped_until;
use crate::dest::surplus;
use crate::error::{Error, Result};
use crate::failpoints;
use crate::pages::SpaceId;
use slipstream_core::sys::poll;
use slipstream_core::sys::uffd::Event;
use std::ops::Range;
use std::time::Duration;

/// What an event changed, for the thread that waits on descriptors.
#[derive(Debug)]
pub enum Happened {
    /// A thread waits for a page.
    Fault {
        /// Where.
        address: u64,
        /// Which thread.
        tid: i32,
    },
    /// A child was forked: there is one more descriptor to wait on.
    Forked(SpaceId),
    /// Something else was dealt with.
    Other,
    /// Nothing to read.
    Nothing,
}

impl Drain {
    /// Reads one event of a space and applies it, in one go under the exclusive half: no copy is
    /// decided before it and lands after it.
    pub fn read_event(&self, id: SpaceId) -> Result<Happened> {
        let happened = self.exclusive_at_once(|state| self.apply_event(state, id))?;
        if matches!(happened, Happened::Forked(_) | Happened::Other) {
            self.tell_news();
        }
        Ok(happened)
    }

    /// Whether there is an event to read; also true while nobody has noted yet that there is none.
    pub fn has_event(&self, id: SpaceId) -> Result<bool> {
        self.shared(|state| match state.uffds.get(&id) {
            Some(_) if state.unsettled.contains(&id) => Ok(true),
            Some(uffd) => poll::readable(uffd, Duration::ZERO),
            None => Ok(false),
        })
        .map_err(|e| Error::io("poll userfaultfd", e))
    }

    fn apply_event(&self, state: &mut State, id: SpaceId) -> Result<Happened> {
        let Some(uffd) = state.uffds.get(&id) else { return Ok(Happened::Nothing) };
        // Only while the event is unread does its thread wait in the call that raised it; and what is
        // raised after this look must not be what is read.
        let removing = if self.has_shared {
            if !poll::readable(uffd, Duration::ZERO)
                .map_err(|e| Error::io("poll userfaultfd", e))?
            {
                state.unsettled.remove(&id);
                return Ok(Happened::Nothing);
            }
            // Children of a process that has exited are init's.
            let root = state.held.init().pid();
            state.sleepers.being_removed(root, state.unsettled.contains(&id))
        } else {
            Vec::new()
        };
        let event = state
            .held
            .journal
            .read(uffd, id, &removing)
            .map_err(|e| Error::io("read userfaultfd", e))?;
        match event {
            None => Ok(Happened::Nothing),
            Some(Event::Fault { address, tid }) => Ok(Happened::Fault { address, tid: tid as i32 }),
            Some(event) => {
                if matches!(event, Event::Fork { .. }) {
                    failpoints::reached("destination-fork-read");
                }
                if self.has_shared {
                    state.unsettled.insert(id);
                }
                self.deal_with(state, id, event, &removing)
            }
        }
    }

    /// Notes an event in the journal, and has it take effect.
    fn deal_with(
        &self,
        state: &mut State,
        id: SpaceId,
        event: Event,
        removing: &[Range<u64>],
    ) -> Result<Happened> {
        let woken = match event {
            Event::Fork { child: Some(child) } => {
                let adopted = state.held.adopt(&mut state.pages, id, &child);
                let Ok(child_id) = adopted else {
                    // Nobody else may have it yet. It goes with this process, and then its twin has it.
                    std::mem::forget(child);
                    return adopted.map(Happened::Forked);
                };
                state.uffds.insert(child_id, child);
                return Ok(Happened::Forked(child_id));
            }
            Event::Fault { .. } | Event::Fork { child: None } => return Ok(Happened::Other),
            Event::Remove { start, end } => {
                let punch = removing.iter().any(|r| r.start <= start && end <= r.end);
                state.apply(&[Record::Remove { space: id, start, end, punch }])?
            }
            Event::Unmap { start, end } => {
                state.apply(&[Record::Unmap { space: id, start, end }])?
            }
            Event::Remap { from, to, len } => {
                let records = self.remap(id, from, to, len);
                state.apply(&records)?
            }
        };
        if let Some(uffd) = state.uffds.get(&id)
            && let Err(e) = uffd.wake(woken.start, woken.end - woken.start)
        {
            tracing::debug!("wake {woken:x?}: {e}");
        }
        Ok(Happened::Other)
    }

    /// Moved pages. Of shared memory the old mapping may still be there.
    fn remap(&self, space: SpaceId, from: u64, to: u64, len: u64) -> Vec<Record> {
        let moved = Record::Remap { space, from, to, len };
        if !self.has_shared || space != SpaceId::PROCESS {
            return vec![moved];
        }
        if len == 0 {
            let end = mapped_until(self.pid, to);
            return vec![Record::Alias { space, from, to, len: end.map_or(0, |end| end - to) }];
        }
        if mapped_until(self.pid, from).is_some() {
            return vec![moved];
        }
        vec![moved, Record::Forget { space, start: from, end: from.saturating_add(len) }]
    }

    /// Ends children that are too many. True while there are any: to be called again soon.
    pub fn end_surplus(&self) -> bool {
        let ended = self.shared(surplus::end);
        for id in &ended {
            self.space_ended(*id);
        }
        self.shared(|state| !state.held.surplus().is_empty())
    }

    /// Deals with an event that a session had read before it died.
    pub(super) fn finish_event(&self, state: &mut State, unfinished: Unfinished) -> Result<()> {
        if state.uffd(unfinished.space).is_none() {
            return Ok(());
        }
        let event = match state.held.unfinished_child(&unfinished)? {
            Some(child) => Event::Fork { child: Some(child) },
            None => unfinished.event,
        };
        if matches!(event, Event::Fork { child: None }) {
            tracing::error!(
                "process {} forked, and the session that read so was killed together with its twin: that child can't be served",
                self.pid
            );
        }
        self.deal_with(state, unfinished.space, event, &unfinished.removing).map(drop)
    }
}
