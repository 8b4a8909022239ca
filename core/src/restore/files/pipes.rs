//! Pipes with what is in them.

use super::{O_CLOEXEC, O_LARGEFILE, Planner, Result, bad};
use crate::manifest::{FileKind, OpenFile, PipeEnd};
use crate::program::Arg;

const F_SETPIPE_SZ: i32 = 1031;
const ACCESS: u32 = libc::O_ACCMODE as u32;
const O_DIRECT: u32 = libc::O_DIRECT as u32;
/// The largest pipe a peer may ask for (the kernel's own limit is 1 MiB unless root raised it).
const CAPACITY_MAX: u32 = 256 << 20;
const PAGE_SIZE: usize = 4096;

/// The ends of a pipe that has been made.
pub(super) struct Ends {
    read: i32,
    write: i32,
    read_taken: bool,
    write_taken: bool,
}

impl Planner<'_> {
    /// One end. The two descriptions that `pipe2` makes serve those that look like its own; any other
    /// was opened through `/proc`, and is again.
    pub(super) fn pipe_end(&mut self, end: &PipeEnd, file: &OpenFile, at: i32) -> Result<()> {
        if !self.pipes.contains_key(&end.pipe) {
            self.make_pipe(end)?;
        }
        let Some(ends) = self.pipes.get_mut(&end.pipe) else {
            return Err(bad("a pipe that was not made"));
        };
        let write = file.flags & ACCESS != libc::O_RDONLY as u32;
        let own = file.flags & ACCESS != libc::O_RDWR as u32 && file.flags & O_LARGEFILE == 0;
        let (from, taken) = if write {
            (ends.write, &mut ends.write_taken)
        } else {
            (ends.read, &mut ends.read_taken)
        };
        if own && !*taken {
            *taken = true;
            let args = [from.into(), at.into(), O_CLOEXEC.into()];
            self.program.must("take a pipe's end", libc::SYS_dup3, args);
            return Ok(());
        }
        self.open(format!("/proc/self/fd/{from}").as_bytes(), file, at)
    }

    fn make_pipe(&mut self, end: &PipeEnd) -> Result<()> {
        let content = self.content_of(end.pipe);
        check_content(content, end.capacity_bytes)?;
        // In packet mode each write is read as it was written.
        let packets = content.len() > 1 || self.is_packet_pipe(end.pipe);
        let direct = if packets { libc::O_DIRECT } else { 0 };
        // Two ints, read as 64-bit words below: the kernel takes the low half for a descriptor.
        let pair = self.program.words(&[0, 0]);
        let flags = O_CLOEXEC | libc::O_NONBLOCK | direct;
        self.program.must("make a pipe", libc::SYS_pipe2, [pair.into(), flags.into()]);
        let (read, write) = (self.temporary(), self.temporary());
        self.shift(Arg::At(pair), read);
        self.shift(Arg::At(pair + 4), write);
        let args = [write.into(), F_SETPIPE_SZ.into(), end.capacity_bytes.into()];
        self.program.must("set a pipe's capacity", libc::SYS_fcntl, args);
        for piece in content {
            let at = self.program.data(piece);
            let args = [write.into(), at.into(), piece.len().into()];
            self.program.must("fill a pipe", libc::SYS_write, args);
        }
        let ends = Ends { read, write, read_taken: false, write_taken: false };
        self.pipes.insert(end.pipe, ends);
        Ok(())
    }

    fn ends(&self, pipe: u64) -> impl Iterator<Item = (&'_ OpenFile, &'_ PipeEnd)> {
        self.manifest.files.iter().filter_map(move |file| match &file.kind {
            Some(FileKind::Pipe(end)) if end.pipe == pipe => Some((file, end)),
            _ => None,
        })
    }

    fn is_packet_pipe(&self, pipe: u64) -> bool {
        self.ends(pipe).any(|(file, _)| {
            file.flags & O_DIRECT != 0 && file.flags & ACCESS != libc::O_RDONLY as u32
        })
    }
}

impl<'a> Planner<'a> {
    /// What is in a pipe: the content of the end that carries it.
    fn content_of(&self, pipe: u64) -> &'a [Vec<u8>] {
        let manifest = self.manifest;
        let ends = manifest.files.iter().filter_map(|file| match &file.kind {
            Some(FileKind::Pipe(end)) if end.pipe == pipe => Some(end.content.as_slice()),
            _ => None,
        });
        ends.max_by_key(|content| content.len()).unwrap_or_default()
    }
}

/// Content fits, so that no write is cut short.
fn check_content(content: &[Vec<u8>], capacity: u32) -> Result<()> {
    let slots = capacity as usize / PAGE_SIZE;
    let bytes: usize = content.iter().map(Vec::len).sum();
    let packets = content.len() > 1;
    let fits = bytes <= capacity as usize
        && content.len() <= slots.max(1)
        && (!packets || content.iter().all(|p| p.len() <= PAGE_SIZE))
        && content.iter().all(|p| !p.is_empty());
    if capacity < PAGE_SIZE as u32 || capacity > CAPACITY_MAX || !fits {
        return Err(bad(format!("a pipe of {capacity} bytes with {bytes} in it")));
    }
    Ok(())
}
