//! Messages of any length over records: `u32` length and the bytes, cut into as many records as it takes. The first
//! record of a message holds the length; a record never holds parts of two messages.

use crate::error::{Error, Result};
use crate::lane::Block;
use crate::record::{Fill, RecordReader, RecordWriter};
use crate::socket::Socket;
use nix::sys::socket::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

const HEAD_LEN_BYTES: usize = 4;

/// The sending half of a channel.
#[derive(Debug)]
pub struct Sender {
    pub(crate) socket: Arc<Socket>,
    pub(crate) writer: RecordWriter,
    broken: bool,
}

impl Sender {
    pub(crate) fn new(socket: Arc<Socket>, writer: RecordWriter) -> Self {
        Sender { socket, writer, broken: false }
    }

    /// Sends a message, however long the peer takes to read it (a dead one is noticed by the kernel within a minute).
    pub fn send(&mut self, message: &[u8]) -> Result<()> {
        self.send_within(message, Block::Forever)
    }

    /// Sends a message until `deadline`. A message sent in part can't be taken back: after a time-out every further call fails.
    pub fn send_by(&mut self, message: &[u8], deadline: Instant) -> Result<()> {
        self.send_within(message, Block::Until(deadline))
    }

    fn send_within(&mut self, message: &[u8], block: Block) -> Result<()> {
        let Ok(len) = u32::try_from(message.len()) else {
            return Err(Error::TooLong {
                peer: self.socket.peer(),
                len_bytes: message.len() as u64,
                len_bytes_max: u64::from(u32::MAX),
            });
        };
        if self.broken {
            return Err(Error::Broken { peer: self.socket.peer() });
        }
        // Set back only when all is out: whatever fails on the way leaves half a message behind.
        self.broken = true;
        self.writer.append(&len.to_le_bytes());
        let mut rest = message;
        loop {
            let (now, later) = rest.split_at(rest.len().min(self.writer.room()));
            self.writer.append(now);
            self.writer.seal(&self.socket)?;
            rest = later;
            if (rest.is_empty() || !self.writer.fits_record()) && !self.flush(block)? {
                return Err(Error::Timeout { peer: self.socket.peer(), what: "sending a message" });
            }
            if rest.is_empty() {
                break;
            }
        }
        self.broken = false;
        Ok(())
    }

    fn flush(&mut self, block: Block) -> Result<bool> {
        self.writer.flush(&self.socket, block)
    }

    /// Tells the peer that no more will come; it still can send.
    pub fn finish(&mut self) {
        self.broken = true;
        self.socket.shutdown(Shutdown::Write);
    }
}

/// The receiving half of a channel.
#[derive(Debug)]
pub struct Receiver {
    pub(crate) socket: Arc<Socket>,
    pub(crate) reader: RecordReader,
    partial: Option<Partial>,
    broken: bool,
}

/// A message of which some records have come.
#[derive(Debug)]
struct Partial {
    len: usize,
    bytes: Vec<u8>,
}

impl Receiver {
    pub(crate) fn new(socket: Arc<Socket>, reader: RecordReader) -> Self {
        Receiver { socket, reader, partial: None, broken: false }
    }

    /// Waits for a message of at most `len_bytes_max`, however long it takes.
    pub fn recv(&mut self, len_bytes_max: usize) -> Result<Vec<u8>> {
        self.recv_within(len_bytes_max, Block::Forever)?.ok_or_else(|| self.late())
    }

    /// Waits for a message until `deadline`. After a time-out the next call goes on where this one stopped.
    pub fn recv_by(&mut self, len_bytes_max: usize, deadline: Instant) -> Result<Vec<u8>> {
        self.recv_within(len_bytes_max, Block::Until(deadline))?.ok_or_else(|| self.late())
    }

    /// Takes a message if all of it has come.
    pub fn try_recv(&mut self, len_bytes_max: usize) -> Result<Option<Vec<u8>>> {
        self.recv_within(len_bytes_max, Block::No)
    }

    /// True if bytes that have been received already may hold a message: take it before polling.
    pub fn has_buffered(&self) -> bool {
        self.reader.has_record()
    }

    fn late(&self) -> Error {
        Error::Timeout { peer: self.socket.peer(), what: "waiting for a message" }
    }

    fn recv_within(&mut self, len_bytes_max: usize, block: Block) -> Result<Option<Vec<u8>>> {
        if self.broken {
            return Err(Error::Broken { peer: self.socket.peer() });
        }
        let result = self.assemble(len_bytes_max, block);
        self.broken = result.is_err();
        result
    }

    fn assemble(&mut self, len_bytes_max: usize, block: Block) -> Result<Option<Vec<u8>>> {
        loop {
            while let Some(range) = self.reader.next(&self.socket)? {
                let plain = self.reader.plain(range);
                let partial = take_record(self.partial.take(), plain, len_bytes_max, &self.socket)?;
                if partial.bytes.len() == partial.len {
                    return Ok(Some(partial.bytes));
                }
                self.partial = Some(partial);
            }
            match self.reader.fill(&self.socket, block)? {
                Fill::More => {}
                Fill::NotYet => return Ok(None),
                Fill::End if self.partial.is_some() => {
                    return Err(Error::Truncated { peer: self.socket.peer() });
                }
                Fill::End => return Err(Error::Closed { peer: self.socket.peer() }),
            }
        }
    }
}

/// Adds a record to the message it belongs to. Memory grows with what has come, not with what was announced.
fn take_record(
    partial: Option<Partial>,
    plain: &[u8],
    len_bytes_max: usize,
    socket: &Socket,
) -> Result<Partial> {
    let (mut partial, bytes) = match partial {
        Some(partial) => (partial, plain),
        None => begin(plain, len_bytes_max, socket)?,
    };
    if bytes.len() > partial.len - partial.bytes.len() {
        let what = "a message is longer than announced";
        return Err(Error::Protocol { peer: socket.peer(), what });
    }
    partial.bytes.extend_from_slice(bytes);
    Ok(partial)
}

fn begin<'a>(
    plain: &'a [u8],
    len_bytes_max: usize,
    socket: &Socket,
) -> Result<(Partial, &'a [u8])> {
    let Some((head, bytes)) = plain.split_first_chunk::<HEAD_LEN_BYTES>() else {
        let what = "a message without its length";
        return Err(Error::Protocol { peer: socket.peer(), what });
    };
    let len = u32::from_le_bytes(*head) as usize;
    if len > len_bytes_max {
        return Err(Error::TooLong {
            peer: socket.peer(),
            len_bytes: len as u64,
            len_bytes_max: len_bytes_max as u64,
        });
    }
    Ok((Partial { len, bytes: Vec::new() }, bytes))
}

impl AsFd for Receiver {
    /// Readable when `recv` may give something (look at `has_buffered` first).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
