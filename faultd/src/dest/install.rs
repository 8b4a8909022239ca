//! Putting what has arrived into the process, and what becomes of a page that the kernel has no place for.

use crate::error::{Error, Result};
use crate::pages::{Pages, Piece, PieceKind, SpaceId};
use slipstream_core::sys::uffd::{Installed, Uffd};
use std::time::{Duration, Instant};

/// What arrived.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// The pages.
    Bytes(&'a [u8]),
    /// The source has no such pages; so many bytes.
    Zeros(u64),
}

/// How much of what arrived went in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// All that is still wanted.
    All,
    /// An event must be read first.
    Blocked,
    /// There is no memory for more of it.
    NoMemory,
    /// The kernel has no mapping for this page, and perhaps an event that says so.
    NotMapped(Piece),
}

/// A page with no mapping and no event that says why is given up after this.
const NOT_MAPPED_MAX: Duration = Duration::from_secs(2);

/// For how long the kernel has had no mapping for a page, with nothing in between that could be the reason.
#[derive(Clone, Copy, Debug, Default)]
pub struct NotMapped {
    since: Option<Instant>,
}

impl NotMapped {
    /// Takes how a delivery ended; yields the page to be given up, if it is time for that.
    pub fn after(&mut self, delivered: Delivered, now: Instant) -> Option<Piece> {
        let Delivered::NotMapped(piece) = delivered else {
            self.since = None;
            return None;
        };
        let since = *self.since.get_or_insert(now);
        let over = now.saturating_duration_since(since) > NOT_MAPPED_MAX;
        over.then(|| {
            self.since = None;
            piece
        })
    }
}

/// Installs pieces; returns how it went, and whether the address space is gone. Under the shared half of the drain's lock.
pub fn install(
    pages: &Pages,
    uffd: &Uffd,
    id: SpaceId,
    source: u64,
    data: Data<'_>,
    pieces: &[Piece],
) -> Result<(Delivered, bool)> {
    for piece in pieces {
        let len = piece.len_bytes;
        if piece.kind != PieceKind::Install {
            let _ = uffd.wake(piece.current_address, len);
            continue;
        }
        let (mut done, mut part) = (0, len);
        while done < len {
            let at = piece.current_address + done;
            let want = part.min(len - done);
            let result = match data {
                Data::Bytes(bytes) => {
                    let from = (piece.source_address - source + done) as usize;
                    uffd.copy(at, &bytes[from..from + want as usize])
                }
                Data::Zeros(_) => uffd.zero(at, want),
            };
            let page = pages.space(id).and_then(|s| s.locate(at)).map_or(4096, |l| l.page_size);
            let mut landed = |count: u64| {
                pages.end_copy(id, piece.source_address + done, count);
                done += count;
            };
            match result.map_err(|e| Error::io(format!("install a page at {at:#x}"), e))? {
                Installed::All => landed(want),
                Installed::Exists(count) => {
                    landed(count + page);
                    let _ = uffd.wake(at + count, page);
                }
                Installed::Partly(count) => {
                    landed(count);
                    return Ok((Delivered::Blocked, false));
                }
                Installed::NoMemory(count) => {
                    landed(count);
                    return Ok((Delivered::NoMemory, false));
                }
                // A copy never spans two mappings (one `mprotect` makes two): go on page by page.
                Installed::NotMapped(0) if part > page => part = page,
                Installed::NotMapped(0) => return Ok((Delivered::NotMapped(*piece), false)),
                Installed::NotMapped(count) => landed(count),
                Installed::Gone => return Ok((Delivered::All, true)),
            }
        }
    }
    Ok((Delivered::All, false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_given_up_when_nothing_else_was_said_for_long_enough() {
        let piece = Piece {
            source_address: 0x1000,
            current_address: 0x2000,
            len_bytes: 4096,
            kind: PieceKind::Install,
            doubtful: false,
        };
        let begin = Instant::now();
        let at = |seconds: f64| begin + Duration::from_secs_f64(seconds);
        let mut clock = NotMapped::default();
        // What it waited for before is no reason.
        assert_eq!(clock.after(Delivered::Blocked, at(0.0)), None);
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(10.0)), None);
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(11.9)), None);
        assert_eq!(clock.after(Delivered::Blocked, at(11.95)), None);
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(12.5)), None);
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(14.4)), None);
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(14.6)), Some(piece));
        assert_eq!(clock.after(Delivered::NotMapped(piece), at(14.7)), None);
    }
}
