//! Records: `u16` length and ciphertext, written and read in batches.
//!
//! Plaintext is put straight into the buffer that is sent and taken straight out of the buffer that was received:
//! ciphers work in place. A record is never empty, so that every record is progress.

use crate::cipher::{CipherError, Open, Seal, TAG_LEN_BYTES};
use crate::error::{Error, Result};
use crate::lane::Block;
use crate::socket::{Socket, Wait};
use std::ops::Range;

/// Longest ciphertext with its tag.
const BODY_LEN_BYTES_MAX: usize = u16::MAX as usize;
const HEAD_LEN_BYTES: usize = 2;
/// Most plaintext in a record.
pub(crate) const PLAIN_LEN_BYTES_MAX: usize = BODY_LEN_BYTES_MAX - TAG_LEN_BYTES;
/// What a record has on the wire beside its plaintext.
pub(crate) const RECORD_OVERHEAD_BYTES: usize = HEAD_LEN_BYTES + TAG_LEN_BYTES;
/// A record on the wire at its longest.
pub(crate) const RECORD_LEN_BYTES_MAX: usize = HEAD_LEN_BYTES + BODY_LEN_BYTES_MAX;

fn cipher_error(error: &CipherError, socket: &Socket) -> Error {
    match error {
        CipherError::Exhausted => Error::Exhausted { peer: socket.peer() },
        CipherError::Forged => {
            Error::Protocol { peer: socket.peer(), what: "a record is forged or out of order" }
        }
    }
}

/// Makes records and sends them, many in one call. At `sealed` begins the open record, which has `open_len` bytes of plaintext yet.
#[derive(Debug)]
pub(crate) struct RecordWriter {
    seal: Seal,
    buf: Box<[u8]>,
    sent: usize,
    sealed: usize,
    open_len: usize,
}

impl RecordWriter {
    /// A writer that holds at least `records` unsent records of any length.
    pub(crate) fn new(seal: Seal, records: usize) -> Self {
        let buf = vec![0; records * RECORD_LEN_BYTES_MAX].into_boxed_slice();
        RecordWriter { seal, buf, sent: 0, sealed: 0, open_len: 0 }
    }

    /// Makes room for that many records. Only while nothing is unsent.
    pub(crate) fn resize(&mut self, records: usize) {
        debug_assert!(!self.is_pending());
        self.buf = vec![0; records * RECORD_LEN_BYTES_MAX].into_boxed_slice();
    }

    /// Plaintext that the open record can still take.
    pub(crate) fn room(&self) -> usize {
        let free = (self.buf.len() - self.sealed).saturating_sub(RECORD_OVERHEAD_BYTES);
        free.min(PLAIN_LEN_BYTES_MAX) - self.open_len
    }

    /// True while a new record of full length fits behind the sealed ones.
    pub(crate) fn fits_record(&self) -> bool {
        self.open_len == 0 && self.room() == PLAIN_LEN_BYTES_MAX
    }

    /// The next `len` bytes of the open record's plaintext, at most `room()`, to be filled and then committed.
    pub(crate) fn space(&mut self, len: usize) -> &mut [u8] {
        let at = self.sealed + HEAD_LEN_BYTES + self.open_len;
        &mut self.buf[at..at + len]
    }

    /// Takes the next `len` bytes of the space into the open record.
    pub(crate) fn commit(&mut self, len: usize) {
        self.open_len += len;
        debug_assert!(self.open_len <= PLAIN_LEN_BYTES_MAX);
    }

    /// Copies bytes, at most `room()`, into the open record.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        self.space(bytes.len()).copy_from_slice(bytes);
        self.commit(bytes.len());
    }

    /// Closes the open record, if there is anything in it.
    pub(crate) fn seal(&mut self, socket: &Socket) -> Result<()> {
        if self.open_len == 0 {
            return Ok(());
        }
        let body_len = self.open_len + TAG_LEN_BYTES;
        let record = &mut self.buf[self.sealed..self.sealed + HEAD_LEN_BYTES + body_len];
        let (head, body) = record.split_at_mut(HEAD_LEN_BYTES);
        self.seal.seal(body).map_err(|error| cipher_error(&error, socket))?;
        head.copy_from_slice(&(body_len as u16).to_le_bytes());
        self.sealed += HEAD_LEN_BYTES + body_len;
        self.open_len = 0;
        Ok(())
    }

    /// True if anything is not sent yet.
    pub(crate) fn is_pending(&self) -> bool {
        self.sent < self.sealed || self.open_len > 0
    }

    /// Seals and sends what there is; false if the time was over before the end, which leaves the rest for the next call.
    pub(crate) fn flush(&mut self, socket: &Socket, block: Block) -> Result<bool> {
        self.seal(socket)?;
        while self.sent < self.sealed {
            match socket.send(&self.buf[self.sent..self.sealed], block)? {
                Wait::Done(len) => self.sent += len,
                Wait::NotYet => return Ok(false),
            }
        }
        self.sent = 0;
        self.sealed = 0;
        Ok(true)
    }
}

/// What came of an attempt to receive.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// More bytes are there.
    More,
    /// Nothing came in time.
    NotYet,
    /// The peer ended the connection.
    End,
}

/// Receives many records at a time and opens one after another. `start..end` is received and not yet opened.
#[derive(Debug)]
pub(crate) struct RecordReader {
    open: Open,
    buf: Box<[u8]>,
    start: usize,
    end: usize,
    /// The last receive call emptied the socket.
    drained: bool,
    /// Most that a call receives.
    limit_bytes: usize,
}

impl RecordReader {
    /// A reader that takes up to `records` records of full length at a time.
    pub(crate) fn new(open: Open, records: usize) -> Self {
        let buf = vec![0; records * RECORD_LEN_BYTES_MAX].into_boxed_slice();
        RecordReader { open, buf, start: 0, end: 0, drained: false, limit_bytes: usize::MAX }
    }

    /// Changes the size of the buffer and keeps what is in it, which must fit.
    pub(crate) fn resize(&mut self, records: usize) {
        let received = &self.buf[self.start..self.end];
        let mut buf = vec![0; (records * RECORD_LEN_BYTES_MAX).max(received.len())];
        buf[..received.len()].copy_from_slice(received);
        self.end = received.len();
        self.start = 0;
        self.buf = buf.into_boxed_slice();
    }

    /// The length of the next record's body, once its head is here.
    fn body_len(&self) -> Option<usize> {
        match self.buf[self.start..self.end] {
            [low, high, ..] => Some(u16::from_le_bytes([low, high]) as usize),
            _ => None,
        }
    }

    /// True if a whole record is waiting to be opened.
    pub(crate) fn has_record(&self) -> bool {
        self.body_len().is_some_and(|len| self.end - self.start >= HEAD_LEN_BYTES + len)
    }

    /// Opens the next record if all of it is here. The range of its plaintext stays good until the next call of `next`
    /// or `fill`.
    pub(crate) fn next(&mut self, socket: &Socket) -> Result<Option<Range<usize>>> {
        let Some(body_len) = self.body_len() else { return Ok(None) };
        if body_len <= TAG_LEN_BYTES {
            return Err(Error::Protocol { peer: socket.peer(), what: "a record is empty" });
        }
        let body_at = self.start + HEAD_LEN_BYTES;
        if self.end - body_at < body_len {
            return Ok(None);
        }
        let plain_len = self
            .open
            .open(&mut self.buf[body_at..body_at + body_len])
            .map_err(|error| cipher_error(&error, socket))?;
        self.start = body_at + body_len;
        Ok(Some(body_at..body_at + plain_len))
    }

    /// The plaintext at a range that `next` gave.
    pub(crate) fn plain(&self, range: Range<usize>) -> &[u8] {
        &self.buf[range]
    }

    /// Receives as much as there is and fits. To be called when `next` finds no whole record.
    ///
    /// After a call that emptied the socket the first call with `Block::No` says `NotYet` without asking the kernel: the
    /// common loop "take replies until there is none, then poll" pays no extra call.
    pub(crate) fn fill(&mut self, socket: &Socket, block: Block) -> Result<Fill> {
        if std::mem::take(&mut self.drained) && block == Block::No {
            return Ok(Fill::NotYet);
        }
        if self.start == self.end || self.buf.len() - self.start < RECORD_LEN_BYTES_MAX {
            self.compact();
        }
        match self.receive(socket, block)? {
            Fill::End if self.start < self.end => Err(Error::Truncated { peer: socket.peer() }),
            fill => Ok(fill),
        }
    }

    /// Receives what is there and fits although there are whole records to open yet; `NotYet` also when nothing more fits.
    pub(crate) fn read_ahead(&mut self, socket: &Socket) -> Result<Fill> {
        if self.start > 0 {
            self.compact();
        }
        if self.has_room() { self.receive(socket, Block::No) } else { Ok(Fill::NotYet) }
    }

    /// True if `read_ahead` could take more.
    pub(crate) fn has_room(&self) -> bool {
        self.end - self.start < self.buf.len()
    }

    fn compact(&mut self) {
        self.buf.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }

    /// Has a call receive at most so many bytes.
    pub(crate) fn limit(&mut self, bytes: usize) {
        self.limit_bytes = bytes;
    }

    fn receive(&mut self, socket: &Socket, block: Block) -> Result<Fill> {
        let room = (self.buf.len() - self.end).min(self.limit_bytes);
        let end = self.end + room;
        match socket.recv(&mut self.buf[self.end..end], block)? {
            Wait::NotYet => Ok(Fill::NotYet),
            Wait::Done(0) => Ok(Fill::End),
            Wait::Done(len) => {
                self.end += len;
                self.drained = len < room;
                Ok(Fill::More)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use zeroize::Zeroizing;

    fn pair(records: usize) -> (RecordWriter, RecordReader, Socket, Socket) {
        let secret = Zeroizing::new([1; 32]);
        let (a, b) = UnixStream::pair().unwrap();
        (
            RecordWriter::new(Seal::new(&secret).unwrap(), records),
            RecordReader::new(Open::new(&secret).unwrap(), records),
            Socket::new(a.into()),
            Socket::new(b.into()),
        )
    }

    fn read(reader: &mut RecordReader, socket: &Socket) -> Result<Vec<u8>> {
        loop {
            if let Some(range) = reader.next(socket)? {
                return Ok(reader.plain(range).to_vec());
            }
            match reader.fill(socket, Block::Forever)? {
                Fill::More => {}
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn records_of_many_lengths_come_out_as_they_went_in() {
        let (mut writer, mut reader, near, far) = pair(2);
        let lengths = [1, 2, 100, 4096, 61_456, PLAIN_LEN_BYTES_MAX, 7, PLAIN_LEN_BYTES_MAX - 1];
        let sending = std::thread::spawn(move || {
            for (i, len) in lengths.into_iter().enumerate() {
                if writer.room() < len {
                    assert!(writer.flush(&near, Block::Forever).unwrap());
                }
                writer.append(&vec![i as u8; len]);
                writer.seal(&near).unwrap();
            }
            assert!(writer.flush(&near, Block::Forever).unwrap());
            assert!(!writer.is_pending());
        });
        for (i, len) in lengths.into_iter().enumerate() {
            let record = read(&mut reader, &far).unwrap();
            assert_eq!(record.len(), len);
            assert!(record.iter().all(|&byte| byte == i as u8));
        }
        sending.join().unwrap();
        assert_eq!(reader.fill(&far, Block::Forever).unwrap(), Fill::End);
    }

    #[test]
    fn a_full_socket_keeps_the_rest_for_later() {
        let (mut writer, mut reader, near, far) = pair(16);
        let mut records = 0;
        while writer.fits_record() {
            writer.append(&vec![records; PLAIN_LEN_BYTES_MAX]);
            writer.seal(&near).unwrap();
            records += 1;
        }
        assert_eq!(records, 16);
        assert!(!writer.flush(&near, Block::No).unwrap(), "a megabyte does not fit a socket");
        for i in 0..records {
            assert_eq!(
                read_with(&mut writer, &near, &mut reader, &far),
                vec![i; PLAIN_LEN_BYTES_MAX]
            );
        }
        assert!(!writer.is_pending());
    }

    fn read_with(
        writer: &mut RecordWriter,
        near: &Socket,
        reader: &mut RecordReader,
        far: &Socket,
    ) -> Vec<u8> {
        loop {
            if let Some(range) = reader.next(far).unwrap() {
                return reader.plain(range).to_vec();
            }
            reader.fill(far, Block::No).unwrap();
            writer.flush(near, Block::No).unwrap();
        }
    }

    #[test]
    fn empty_records_and_cut_records_are_errors() {
        for len in 0..=TAG_LEN_BYTES as u16 {
            let (_, mut reader, near, far) = pair(1);
            near.send_all(&len.to_le_bytes(), Block::Forever, "").unwrap();
            assert!(matches!(read(&mut reader, &far), Err(Error::Protocol { .. })));
        }
        let secret = Zeroizing::new([1; 32]);
        for cut in 1..=5 {
            let (a, b) = UnixStream::pair().unwrap();
            (&a).write_all(&[28, 0, 0, 0, 0][..cut]).unwrap();
            drop(a);
            let mut reader = RecordReader::new(Open::new(&secret).unwrap(), 1);
            let far = Socket::new(b.into());
            assert!(matches!(read(&mut reader, &far), Err(Error::Truncated { .. })));
        }
    }
}
