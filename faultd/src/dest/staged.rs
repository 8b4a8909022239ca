//! What the destination takes before the freeze, until the manifest comes.

use crate::control::{hear_source, say_to_source, unexpected};
use crate::error::Result;
use crate::failpoints;
use crate::protocol::{DestinationMessage, Empty, SourceMessage};
use slipstream_core::restore::engine::Restorer;
use slipstream_transport::{Receiver, Sender};
use std::time::Duration;

/// Puts in place what comes ahead; returns the manifest, encoded. `timeout` is for each message.
pub fn receive_manifest(
    sender: &mut Sender,
    receiver: &mut Receiver,
    restorer: &mut Restorer,
    timeout: Duration,
) -> Result<Vec<u8>> {
    loop {
        match hear_source(receiver, Some(timeout))? {
            SourceMessage::Stage(stage) => restorer.stage(&stage.memfds, &stage.mappings)?,
            SourceMessage::StagedPages(pages) => {
                restorer.stage_pages(pages.object, pages.address, &pages.bytes)?;
            }
            SourceMessage::StageEnd(_) => {
                failpoints::pass("destination-staged")?;
                say_to_source(sender, DestinationMessage::Staged(Empty {}))?;
            }
            SourceMessage::Manifest(bytes) => {
                failpoints::pass("destination-staged")?;
                return Ok(bytes);
            }
            _ => return unexpected("a manifest"),
        }
    }
}
