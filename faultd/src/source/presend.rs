//! What the source sends before the freeze, and the freeze itself: it is tried again when more has
//! changed meanwhile than may be sent while the process is stopped.

use crate::control::{hear_destination, say_to_destination, unexpected};
use crate::error::{Error, Result};
use crate::events::BlackoutParts;
use crate::failpoints;
use crate::protocol::{DestinationMessage, Empty, SourceMessage, Stage, StagedPages};
use crate::source::interrupt::Interrupts;
use crate::source::local::{self, Local};
use slipstream_core::capture::assemble;
use slipstream_core::capture::flush::flush_files;
use slipstream_core::capture::presend::{Piece, Presend};
use slipstream_core::freeze::Frozen;
use slipstream_core::inject::SourceScratch;
use slipstream_core::manifest::{Manifest, Mapping};
use slipstream_core::sys::task::Haste;
use slipstream_transport::{Receiver, Sender};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Rounds before a freeze: each is shorter than the one before, or it is no use to go on.
const ROUNDS_MAX: usize = 6;
/// So little is left for the freeze that another round would not pay.
const LEFT_MAX: u64 = 256 << 10;
/// For the reason of a destination that hears no more.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(1);
/// Freezes until the process is refused because it changes too much.
const FREEZES_MAX: usize = 5;

/// Sending ahead, for one migration.
#[derive(Debug)]
pub struct Presender<'a> {
    pid: i32,
    interrupts: &'a Interrupts,
    timeout: Duration,
    presend: Presend,
}

/// A frozen process and all of it that is sent now.
#[derive(Debug)]
pub struct Captured {
    /// The process.
    pub frozen: Frozen,
    /// Its manifest.
    pub manifest: Manifest,
    /// When the freeze began.
    pub frozen_at: Instant,
    /// Freeze and capture, measured.
    pub parts: BlackoutParts,
    /// Up to the end of the blackout.
    pub haste: Haste,
}

impl<'a> Presender<'a> {
    /// Nothing has been sent.
    pub fn new(pid: i32, interrupts: &'a Interrupts, timeout: Duration) -> Result<Self> {
        Ok(Self { pid, interrupts, timeout, presend: Presend::new()? })
    }

    /// Sends what can't be fetched on demand, until little is left; the destination has it when this
    /// returns. The process runs.
    pub fn ahead(
        &mut self,
        sender: &mut Sender,
        receiver: &mut Receiver,
        local: &Local,
        again: bool,
    ) -> Result<()> {
        if local.elsewhere {
            // Most of it now, so that little is left for the freeze.
            let files = &local.report.files;
            flush_files(self.pid, &files.files, &files.descriptors, &local.report.mappings)?;
        }
        let mut before = u64::MAX;
        for _ in 0..ROUNDS_MAX {
            let round = self.round(sender, local, again);
            let Some(sent) = round.map_err(|e| last_word(e, receiver))? else { break };
            say_to_destination(sender, SourceMessage::StageEnd(Empty {}))?;
            match hear_destination(receiver, Some(self.timeout))? {
                DestinationMessage::Staged(_) => {}
                _ => return unexpected("that all is there"),
            }
            if sent <= LEFT_MAX || sent > before / 4 * 3 {
                break;
            }
            before = sent;
        }
        failpoints::pass("source-staged")
    }

    /// One round; returns the bytes of pages sent, `None` if there was nothing to say at all.
    fn round(&mut self, sender: &mut Sender, local: &Local, again: bool) -> Result<Option<u64>> {
        let interrupts = self.interrupts;
        let mut said = false;
        let mut mappings: Vec<Mapping> = Vec::new();
        let declare = |sender: &mut Sender, mappings: &mut Vec<Mapping>| {
            if mappings.is_empty() {
                return Ok(());
            }
            let stage = Stage { memfds: Vec::new(), mappings: std::mem::take(mappings) };
            say_to_destination(sender, SourceMessage::Stage(stage))
        };
        let sent = self.presend.round(self.pid, &local.prior, again, &mut |piece| {
            interrupts.check()?;
            said = true;
            match piece {
                Piece::Memfd(memfd) => {
                    let stage = Stage { memfds: vec![memfd.clone()], mappings: Vec::new() };
                    say_to_destination(sender, SourceMessage::Stage(stage))
                }
                Piece::Mapping(mapping) => {
                    mappings.push(mapping.clone());
                    Ok(())
                }
                Piece::Pages { object, address, bytes } => {
                    declare(sender, &mut mappings)?;
                    let pages = StagedPages { object, address, bytes: bytes.to_vec() };
                    say_to_destination(sender, SourceMessage::StagedPages(pages))
                }
            }
        })?;
        declare(sender, &mut mappings)?;
        Ok(said.then_some(sent))
    }

    /// Freezes and captures. When too much has changed the process goes on, that is sent, and it is
    /// tried again.
    pub fn freeze(
        &mut self,
        sender: &mut Sender,
        receiver: &mut Receiver,
        scratch: &SourceScratch,
        local: &mut Local,
    ) -> Result<Captured> {
        for attempt in 1.. {
            let haste = Haste::begin();
            let frozen_at = Instant::now();
            let frozen = freeze_outside(self.pid, local.avoid.as_ref(), self.timeout)?;
            let freeze_us = frozen_at.elapsed().as_micros() as u64;
            failpoints::pass("source-frozen")?;
            let captured_at = Instant::now();
            match assemble::capture(&frozen, scratch, &local.prior, &self.presend) {
                Ok(manifest) => {
                    if local.elsewhere {
                        let (files, descriptors) = (&manifest.files, &manifest.descriptors);
                        flush_files(self.pid, files, descriptors, &manifest.mappings)?;
                    }
                    let capture_us = captured_at.elapsed().as_micros() as u64;
                    let parts = BlackoutParts { freeze_us, capture_us, ..Default::default() };
                    return Ok(Captured { frozen, manifest, frozen_at, parts, haste });
                }
                Err(e @ slipstream_core::Error::Changing { .. }) if attempt >= FREEZES_MAX => {
                    return Err(Error::Refused {
                        reason: format!("{e}, {attempt} times"),
                        remedy: "try again when the program writes less to it, or let it use \
                                 anonymous memory, shared or not, in its place"
                            .into(),
                    });
                }
                Err(e @ slipstream_core::Error::Changing { .. }) => {
                    tracing::info!("{e}: it runs on, and is stopped again later");
                    frozen.thaw()?;
                }
                Err(e) => return Err(e.into()),
            }
            drop(haste);
            self.interrupts.check()?;
            self.ahead(sender, receiver, local, true)?;
            local::refresh(self.pid, local)?;
        }
        Err(Error::Internal("no freeze".into()))
    }
}

/// A destination that gives up while we talk says why, and then hears no more.
fn last_word(error: Error, receiver: &mut Receiver) -> Error {
    match error {
        Error::Transport(_) => match hear_destination(receiver, Some(LAST_WORD_TIMEOUT)) {
            Err(said @ Error::Peer { .. }) => said,
            _ => error,
        },
        other => other,
    }
}

/// Freezes the process while no thread is inside `avoid`; a thread that is there leaves it at once.
pub fn freeze_outside(pid: i32, avoid: Option<&Range<u64>>, timeout: Duration) -> Result<Frozen> {
    let deadline = Instant::now() + timeout;
    loop {
        let frozen = Frozen::freeze(pid, timeout)?;
        let inside = |range: &Range<u64>| frozen.any_inside(range);
        if !avoid.is_some_and(inside) {
            return Ok(frozen);
        }
        frozen.thaw()?;
        if Instant::now() >= deadline {
            return Err(Error::Refused {
                reason: "its threads are in the vdso all the time, and the destination has another"
                    .into(),
                remedy: "try again, or move to a host with the same kernel".into(),
            });
        }
    }
}
