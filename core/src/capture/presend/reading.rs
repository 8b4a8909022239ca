//! Reading and hashing many pages: in pieces, and on several threads while the process is stopped.

use super::table::Hashed;
use crate::capture::page_hash::{HashKey, PAGE};
use crate::error::Result;
use crate::sys::mem::{ProcMem, RUNS_PER_READ, read_process_runs};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes read at once: what stays in a core's own cache until it is hashed.
const PIECE_LEN: u64 = 256 * 1024;
/// Less than this is not worth a second thread.
const PARALLEL_LEN: u64 = 1 << 20;
const THREADS_MAX: usize = 4;

/// Runs of pages that are read in one go.
pub(super) type Piece = Vec<Range<u64>>;

/// Where pages are read.
pub(super) enum Pages<'a> {
    /// A memory object, by offset. What lies behind its end reads as zeros.
    Object(&'a File),
    /// A process, by address.
    Process(i32, &'a ProcMem),
}

impl Pages<'_> {
    /// Fills `out` with the runs of a piece, one behind the other.
    pub(super) fn read(&self, piece: &[Range<u64>], out: &mut [u8]) -> Result<()> {
        if let Pages::Process(pid, _) = self
            && read_process_runs(*pid, piece, out) == Ok(out.len())
        {
            return Ok(());
        }
        let mut rest = out;
        for run in piece {
            let (part, after) = rest.split_at_mut((run.end - run.start) as usize);
            match self {
                Pages::Object(file) => read_padded(file, run.start, part)?,
                // Not readable by its own protections.
                Pages::Process(_, mem) => mem.read(run.start, part)?,
            }
            rest = after;
        }
        Ok(())
    }
}

fn read_padded(file: &File, mut at: u64, mut out: &mut [u8]) -> Result<()> {
    while !out.is_empty() {
        let got = match file.read_at(out, at) {
            Ok(0) => {
                out.fill(0);
                break;
            }
            Ok(got) => got,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(crate::Error::io("read a memfd", e)),
        };
        at += got as u64;
        out = &mut out[got..];
    }
    Ok(())
}

/// Cuts runs of pages into pieces.
pub(super) fn pieces(runs: &[Range<u64>]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut room = 0;
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            if room == 0 || pieces.last().is_none_or(|p| p.len() >= RUNS_PER_READ) {
                pieces.push(Vec::new());
                room = PIECE_LEN;
            }
            let end = run.end.min(at + room);
            room -= end - at;
            if let Some(last) = pieces.last_mut() {
                last.push(at..end);
            }
            at = end;
        }
    }
    pieces
}

/// Bytes of runs.
pub(super) fn len_of(runs: &[Range<u64>]) -> u64 {
    runs.iter().map(|r| r.end - r.start).sum()
}

/// Hashes the pages of a piece that was read into `bytes`.
pub(super) fn hash_piece(key: &HashKey, piece: &[Range<u64>], bytes: &[u8], out: &mut Vec<Hashed>) {
    let addresses = piece.iter().flat_map(|r| r.clone().step_by(PAGE));
    for (address, page) in addresses.zip(bytes.as_chunks::<PAGE>().0) {
        out.push(Hashed { address, hash: key.hash(page) });
    }
}

/// Reads and hashes all pages of `runs`, on several threads if there are many.
pub(super) fn hash_all(
    key: &HashKey,
    pages: &Pages<'_>,
    runs: &[Range<u64>],
) -> Result<Vec<Hashed>> {
    let pieces = pieces(runs);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if len_of(runs) < PARALLEL_LEN { 1 } else { processors.min(THREADS_MAX) };
    let part = pieces.len().div_ceil(threads).max(1);
    let work = |pieces: &[Piece]| -> Result<Vec<Hashed>> {
        let mut buffer = vec![0u8; PIECE_LEN as usize];
        let mut found = Vec::new();
        for piece in pieces {
            let out = &mut buffer[..len_of(piece) as usize];
            pages.read(piece, out)?;
            hash_piece(key, piece, out, &mut found);
        }
        Ok(found)
    };
    if threads == 1 {
        return work(&pieces);
    }
    std::thread::scope(|scope| {
        let parts: Vec<_> =
            pieces.chunks(part).map(|part| scope.spawn(move || work(part))).collect();
        let mut all = Vec::with_capacity((len_of(runs) / PAGE as u64) as usize);
        for part in parts {
            match part.join() {
                Ok(found) => all.extend(found?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(all)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_are_the_runs_in_order(lens in proptest::collection::vec(1u64..200, 0..300)) {
            let mut at = 0;
            let runs: Vec<Range<u64>> = lens.iter().map(|len| {
                let start = at + 4096;
                at = start + len * 4096;
                start..at
            }).collect();
            let pieces = pieces(&runs);
            for piece in &pieces {
                prop_assert!(piece.len() <= RUNS_PER_READ && len_of(piece) <= PIECE_LEN);
            }
            let pages = |runs: &[Range<u64>]| -> Vec<u64> {
                runs.iter().flat_map(|r| r.clone().step_by(PAGE)).collect()
            };
            let cut: Vec<Range<u64>> = pieces.into_iter().flatten().collect();
            prop_assert_eq!(pages(&cut), pages(&runs));
        }
    }

    #[test]
    fn many_threads_find_what_one_finds() {
        let bytes: Vec<u8> = (0..3u32 << 20).map(|i| (i >> 10) as u8).collect();
        let mem = ProcMem::open(std::process::id() as i32).unwrap();
        let start = (bytes.as_ptr() as u64).next_multiple_of(4096);
        let runs = [start..start + (1 << 20), start + (1 << 20) + 4096..start + (2 << 20) + 8192];
        let key = HashKey::random().unwrap();
        let pages = Pages::Process(std::process::id() as i32, &mem);
        let all = hash_all(&key, &pages, &runs).unwrap();
        let mut one = Vec::new();
        for piece in pieces(&runs) {
            let mut out = vec![0; len_of(&piece) as usize];
            pages.read(&piece, &mut out).unwrap();
            hash_piece(&key, &piece, &out, &mut one);
        }
        assert_eq!(all, one);
    }
}
