//! Page lanes over a channel, one connection each.
//!
//! The source reads pages into the very buffer that is encrypted in place and sent, the destination decrypts in the very buffer it
//! received into: no copy and no allocation per page on either side. Replies come in the order of the requests.

use crate::channel::{Channel, Closer};
use crate::error::{Error, Result};
use crate::lane::{
    Block, Content, OUTSTANDING_REQUESTS_MAX, PAGE_LEN_BYTES, PageLane, PageReply, PageRequest,
    PageSource, REPLY_DATA_LEN_BYTES_MAX, checked_extent, errno_of,
};
use crate::outstanding::Outstanding;
use crate::pace::Pace;
use crate::record::{
    Fill, RECORD_LEN_BYTES_MAX, RECORD_OVERHEAD_BYTES, RecordReader, RecordWriter,
};
use crate::socket::Socket;
use crate::wire::{
    REPLY_HEAD_LEN_BYTES, REQUEST_LEN_BYTES, decode_reply, decode_request, encode_reply_head,
    encode_request,
};
use nix::poll::PollFlags;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

/// Records of pages that are sent by one call and received by one call, if there are so many: about 256 KiB.
const PAGE_RECORDS: usize = 5;
/// Pages that a bulk lane reads, sends, receives and has installed at a time while it shares CPUs with urgent work.
const CRAMPED_LEN_BYTES: u32 = 16 << 10;
/// Most that a bulk lane receives at a time meanwhile: such a record and what goes with it.
const CRAMPED_RECV_BYTES: usize = CRAMPED_LEN_BYTES as usize + 1024;
/// Records of requests at full length: room for all that may be outstanding, even if each request comes in a record of
/// its own, and for one more record that fills while others wait for room in the socket.
const REQUEST_RECORDS: usize = 3;
const _: () = assert!(
    OUTSTANDING_REQUESTS_MAX * (REQUEST_LEN_BYTES + RECORD_OVERHEAD_BYTES)
        <= 2 * RECORD_LEN_BYTES_MAX
);

/// The destination's end of a lane over TCP.
#[derive(Debug)]
pub struct TcpPageLane {
    socket: Arc<Socket>,
    writer: RecordWriter,
    reader: RecordReader,
    outstanding: Outstanding,
    /// What is left of the record that is being taken apart.
    record: Range<usize>,
    pace: Arc<Pace>,
}

impl TcpPageLane {
    /// Makes a lane of a channel on which nothing has been sent yet.
    pub fn new(channel: Channel) -> Self {
        let (socket, mut writer, mut reader) = channel.into_parts();
        writer.resize(REQUEST_RECORDS);
        reader.resize(PAGE_RECORDS);
        let outstanding = Outstanding::default();
        TcpPageLane { socket, writer, reader, outstanding, record: 0..0, pace: Arc::default() }
    }

    /// Makes it a bulk lane that makes room for urgent ones.
    #[must_use]
    pub fn with_pace(mut self, pace: Arc<Pace>) -> Self {
        self.pace = pace;
        self
    }

    /// Sizes of the kernel's socket buffers; without this the kernel sizes them itself.
    pub fn set_socket_buffers(&self, send_bytes: usize, recv_bytes: usize) -> Result<()> {
        self.socket.set_buffers(send_bytes, recv_bytes)
    }

    /// A handle to end the lane by, from another thread.
    pub fn closer(&self) -> Closer {
        Closer::new(&self.socket)
    }

    /// True when `next` gives a reply without waiting.
    #[cfg(feature = "rdma")]
    pub(crate) fn has_reply(&mut self) -> Result<bool> {
        self.have_record(Block::No)
    }

    /// Requests not fully answered.
    #[cfg(feature = "rdma")]
    pub(crate) fn outstanding_requests(&self) -> usize {
        self.outstanding.requests()
    }

    fn protocol(&self, what: &'static str) -> Error {
        Error::Protocol { peer: self.socket.peer(), what }
    }

    /// Makes `self.record` a record with replies in it; false if none came in time.
    fn have_record(&mut self, block: Block) -> Result<bool> {
        while self.record.is_empty() {
            if let Some(range) = self.reader.next(&self.socket)? {
                self.record = range;
                return Ok(true);
            }
            let cramped = self.pace.is_cramped();
            self.reader.limit(if cramped { CRAMPED_RECV_BYTES } else { usize::MAX });
            let block = if self.outstanding.is_empty() { Block::No } else { block };
            let fill = if block == Block::No || self.writer.flush(&self.socket, Block::No)? {
                self.reader.fill(&self.socket, block)?
            } else {
                // The socket takes no more requests, perhaps because the peer can't read on until we take its
                // replies: both directions have to be watched.
                if !self.socket.wait(PollFlags::POLLIN | PollFlags::POLLOUT, block)? {
                    return Ok(false);
                }
                match self.reader.fill(&self.socket, Block::No)? {
                    Fill::NotYet => continue,
                    fill => fill,
                }
            };
            match fill {
                Fill::More => {}
                Fill::NotYet => return Ok(false),
                Fill::End => return Err(Error::Closed { peer: self.socket.peer() }),
            }
        }
        Ok(true)
    }
}

impl PageLane for TcpPageLane {
    fn post(&mut self, request: PageRequest, tag: u64) -> Result<()> {
        if !request.is_valid() {
            let PageRequest { address, len_bytes } = request;
            return Err(Error::BadRequest { address, len_bytes });
        }
        if self.writer.room() < REQUEST_LEN_BYTES {
            self.writer.seal(&self.socket)?;
            if !self.writer.fits_record() && !self.writer.flush(&self.socket, Block::No)? {
                return Err(Error::QueueFull { peer: self.socket.peer() });
            }
        }
        if !self.outstanding.post(request, tag) {
            return Err(Error::QueueFull { peer: self.socket.peer() });
        }
        self.writer.append(&encode_request(request));
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        // What the socket does not take now goes out when `next` is called.
        self.writer.flush(&self.socket, Block::No).map(drop)
    }

    fn next(&mut self, block: Block) -> Result<Option<PageReply<'_>>> {
        if !self.have_record(block)? {
            return Ok(None);
        }
        let record = self.reader.plain(self.record.clone());
        let (mut reply, rest) = decode_reply(record).map_err(|what| self.protocol(what))?;
        reply.tag = self
            .outstanding
            .answer(reply.address, reply.len_bytes)
            .map_err(|what| Error::Protocol { peer: self.socket.peer(), what })?;
        self.record.start = self.record.end - rest.len();
        Ok(Some(reply))
    }

    fn outstanding_bytes(&self) -> u64 {
        self.outstanding.bytes()
    }

    fn raw_fd(&self) -> Option<RawFd> {
        Some(self.socket.as_raw_fd())
    }
}

/// The source's end of a lane over TCP.
#[derive(Debug)]
pub struct PageServer {
    socket: Arc<Socket>,
    reader: RecordReader,
    writer: RecordWriter,
    /// The peer's last byte has come.
    ended: bool,
    pace: Arc<Pace>,
}

impl PageServer {
    /// Makes a server of a channel on which nothing has been sent yet.
    pub fn new(channel: Channel) -> Self {
        let (socket, mut writer, mut reader) = channel.into_parts();
        reader.resize(REQUEST_RECORDS);
        writer.resize(PAGE_RECORDS);
        PageServer { socket, reader, writer, ended: false, pace: Arc::default() }
    }

    /// Makes it the server of a bulk lane that makes room for urgent ones.
    #[must_use]
    pub fn with_pace(mut self, pace: Arc<Pace>) -> Self {
        self.pace = pace;
        self
    }

    /// Sizes of the kernel's socket buffers; without this the kernel sizes them itself.
    pub fn set_socket_buffers(&self, send_bytes: usize, recv_bytes: usize) -> Result<()> {
        self.socket.set_buffers(send_bytes, recv_bytes)
    }

    /// A handle to end the lane by, from another thread: `serve` returns.
    pub fn closer(&self) -> Closer {
        Closer::new(&self.socket)
    }

    /// Answers requests until the peer closes the connection between two of them.
    ///
    /// What a peer can queue is bounded by one buffer here and the socket's: when they are full nothing more is read before
    /// replies have left.
    pub fn serve(&mut self, source: &impl PageSource) -> Result<()> {
        // At most what one record holds, and kept from record to record.
        let mut requests = Vec::new();
        loop {
            while let Some(range) = self.reader.next(&self.socket)? {
                decode_requests(self.reader.plain(range), &mut requests)
                    .map_err(|what| Error::Protocol { peer: self.socket.peer(), what })?;
                for request in requests.drain(..) {
                    self.answer(request, source)?;
                }
            }
            // No more requests are here: whoever waits for these replies must not wait any longer.
            self.flush()?;
            if self.reader.has_record() {
                continue; // It came while the replies left.
            }
            if self.reader.fill(&self.socket, Block::Forever)? == Fill::End {
                return Ok(());
            }
        }
    }

    /// Answers a request from its first page to its last.
    fn answer(&mut self, request: PageRequest, source: &impl PageSource) -> Result<()> {
        let PageRequest { mut address, len_bytes: mut left } = request;
        while left > 0 {
            let len = match checked_extent(source, address, left) {
                Ok(extent) if extent.present => {
                    self.data(address, extent.len_bytes, source)?;
                    extent.len_bytes
                }
                Ok(extent) => {
                    self.no_data(address, extent.len_bytes, &Content::Absent)?;
                    extent.len_bytes
                }
                Err(errno) => {
                    self.no_data(address, left, &Content::Failed(errno))?;
                    left
                }
            };
            address += u64::from(len);
            left -= len;
        }
        Ok(())
    }

    /// Answers with present pages. Where many can't be read at once they are read one by one, so that one bad page
    /// does not take its neighbours along.
    fn data(&mut self, mut address: u64, mut left: u32, source: &impl PageSource) -> Result<()> {
        let mut single_until = address;
        while left > 0 {
            self.make_room(REPLY_HEAD_LEN_BYTES + PAGE_LEN_BYTES as usize)?;
            let room = (self.writer.room() - REPLY_HEAD_LEN_BYTES) as u32;
            let single = address < single_until;
            let cramped = self.pace.is_cramped();
            let len_max = match (single, cramped) {
                (true, _) => PAGE_LEN_BYTES,
                (false, true) => CRAMPED_LEN_BYTES,
                (false, false) => REPLY_DATA_LEN_BYTES_MAX,
            };
            let len = left.min(len_max).min(room - room % PAGE_LEN_BYTES);
            let space = self.writer.space(REPLY_HEAD_LEN_BYTES + len as usize);
            let (head, data) = space.split_at_mut(REPLY_HEAD_LEN_BYTES);
            match source.read(address, data) {
                Ok(()) => {
                    head.copy_from_slice(&encode_reply_head(address, len, &Content::Data(&[])));
                    self.writer.commit(REPLY_HEAD_LEN_BYTES + len as usize);
                }
                Err(_) if len > PAGE_LEN_BYTES => {
                    single_until = address + u64::from(len);
                    continue;
                }
                Err(error) => self.no_data(address, len, &Content::Failed(errno_of(&error)))?,
            }
            if cramped {
                self.flush()?;
            }
            address += u64::from(len);
            left -= len;
        }
        Ok(())
    }

    /// Answers that there is nothing, or that it can't be read.
    fn no_data(&mut self, address: u64, len_bytes: u32, content: &Content<'_>) -> Result<()> {
        self.make_room(REPLY_HEAD_LEN_BYTES)?;
        self.writer.append(&encode_reply_head(address, len_bytes, content));
        Ok(())
    }

    /// Room for that much in the open record, at most a page and a head: by starting a new one, and by sending first
    /// if the buffer is full.
    fn make_room(&mut self, len: usize) -> Result<()> {
        if self.writer.room() < len {
            self.writer.seal(&self.socket)?;
            if !self.writer.fits_record() {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Sends all there is.
    ///
    /// While the socket takes no more, requests are read ahead: left in the socket, many small ones can fill it to the point where the
    /// kernel drops segments with the very acknowledgements that our replies wait for (seen on 6.18), and neither side gets
    /// any further. All that a lane of ours keeps outstanding fits the reader's buffer.
    fn flush(&mut self) -> Result<()> {
        while !self.writer.flush(&self.socket, Block::No)? {
            let reads = self.reader.has_room() && !self.ended;
            let interest = if reads { PollFlags::POLLIN } else { PollFlags::empty() };
            let ready = self.socket.wait_which(interest | PollFlags::POLLOUT, Block::Forever)?;
            if ready.is_some_and(|ready| ready.contains(PollFlags::POLLIN)) && reads {
                self.ended = self.reader.read_ahead(&self.socket)? == Fill::End;
            }
        }
        Ok(())
    }
}

/// Takes a record of requests apart.
fn decode_requests(
    mut record: &[u8],
    requests: &mut Vec<PageRequest>,
) -> std::result::Result<(), &'static str> {
    while !record.is_empty() {
        let (request, rest) = decode_request(record)?;
        requests.push(request);
        record = rest;
    }
    Ok(())
}

#[cfg(test)]
#[path = "tcp_tests.rs"]
mod tests;
