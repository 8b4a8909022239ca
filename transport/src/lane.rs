//! Page lanes: the destination asks for pages by source address, the source answers. One trait for every way pages travel.
//!
//! A request is answered by one or more replies that cover it in order, from its first page to its last; which
//! request's reply comes next is up to the lane, and requests may overlap: a reply says which one it answers by the tag that
//! was given to `post`. What does not fit a request of ours is the peer's error and ends the lane.

use crate::error::Result;
use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

/// Unit of requests and replies. Larger pages are asked for as runs of these.
pub const PAGE_LEN_BYTES: u32 = 4096;

/// Longest request.
pub const REQUEST_LEN_BYTES_MAX: u32 = 4 << 20;

/// Most data in one reply: as many pages as fit one record, so that nothing has to be put together again.
pub const REPLY_DATA_LEN_BYTES_MAX: u32 = 15 * PAGE_LEN_BYTES;

/// Requests a lane holds before `post` says `QueueFull`.
pub const OUTSTANDING_REQUESTS_MAX: usize = 4096;

/// How long to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// Not at all.
    No,
    /// Until that moment.
    Until(Instant),
    /// As long as it takes.
    Forever,
}

/// Asks for pages of the source process. Address and length are multiples of `PAGE_LEN_BYTES`, the length not
/// zero and at most `REQUEST_LEN_BYTES_MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRequest {
    /// First address, in the source process.
    pub address: u64,
    /// Length.
    pub len_bytes: u32,
}

/// What is at the addresses of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// The bytes, as many as the reply is long, at most `REPLY_DATA_LEN_BYTES_MAX`; at no particular alignment.
    Data(&'a [u8]),
    /// No page was ever there: they read as zeros (or as the mapped file).
    Absent,
    /// The source could not read them: its errno.
    Failed(i32),
}

/// One answer, for a part of a request or all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageReply<'a> {
    /// The tag of the request that it answers.
    pub tag: u64,
    /// First address.
    pub address: u64,
    /// Length.
    pub len_bytes: u32,
    /// What is there.
    pub content: Content<'a>,
}

/// Bounds, in bytes, on what a bulk lane should have outstanding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowLimits {
    /// Less than this leaves the network idle.
    pub min: u64,
    /// More than this never helps.
    pub max: u64,
    /// The most while faults come.
    pub hurried: u64,
}

impl WindowLimits {
    /// Of TCP. Smaller windows only make for more system calls; sockets share the link with the urgent lane's without waiting for
    /// each other's buffers. At most: ten milliseconds of 12 Gbit/s.
    pub const TCP: Self = Self { min: 512 << 10, max: 16 << 20, hurried: u64::MAX };

    /// Of RDMA. What the adapters have been asked for they send before a fault's page: while faults come that is to be little
    /// more than two lanes' share of what a link holds (100 Gbit/s for 3 us; over Soft-RoCE less would cost more of the rate than it
    /// saves of the delay).
    pub const RDMA: Self = Self { min: 256 << 10, max: 4 << 20, hurried: 32 << 10 };
}

/// The destination's end of a lane. For one thread.
pub trait PageLane: Send {
    /// Asks for pages. May only queue the request until `flush`, or until `next` has to wait. Tags are for the caller only.
    fn post(&mut self, request: PageRequest, tag: u64) -> Result<()>;

    /// Gets all posted requests on their way. Never waits for the peer.
    fn flush(&mut self) -> Result<()>;

    /// The next reply; None if there is none in time. With nothing outstanding it does not wait, and only finds out
    /// whether the lane still stands.
    fn next(&mut self, block: Block) -> Result<Option<PageReply<'_>>>;

    /// Bytes asked for and not answered yet.
    fn outstanding_bytes(&self) -> u64;

    /// Readable when `next(Block::No)` may give something. Call that until it gives None, then poll again.
    fn raw_fd(&self) -> Option<RawFd>;

    /// How much a bulk lane should have outstanding.
    fn window_limits(&self) -> WindowLimits {
        WindowLimits::TCP
    }

    /// True while the descriptor would not tell of the next answer, because it is expected so soon that sleeping would take
    /// longer: call `next` again at once.
    fn busy_poll(&self) -> bool {
        false
    }
}

/// The leading run of a range that is all present or all absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length of the run: a multiple of `PAGE_LEN_BYTES`, not zero, at most what was asked for.
    pub len_bytes: u32,
    /// Whether there are pages.
    pub present: bool,
}

/// The source's memory, as a page server sees it. Any errno it fails with travels to the destination.
pub trait PageSource {
    /// What begins at `address`.
    fn extent(&self, address: u64, len_bytes: u32) -> io::Result<Extent>;

    /// Reads present pages; all of `out` or an error.
    fn read(&self, address: u64, out: &mut [u8]) -> io::Result<()>;
}

impl PageRequest {
    /// True if it is whole pages, not too many, and does not run over the end of the address space.
    pub fn is_valid(&self) -> bool {
        self.len_bytes <= REQUEST_LEN_BYTES_MAX && is_page_range(self.address, self.len_bytes)
    }
}

/// True for whole pages, at least one, that don't run over the end of the address space.
pub(crate) fn is_page_range(address: u64, len_bytes: u32) -> bool {
    len_bytes != 0
        && address.is_multiple_of(u64::from(PAGE_LEN_BYTES))
        && len_bytes.is_multiple_of(PAGE_LEN_BYTES)
        && address.checked_add(u64::from(len_bytes)).is_some()
}

/// Asks the source and keeps it to its contract: the errno to answer with where it breaks it.
pub(crate) fn checked_extent(
    source: &impl PageSource,
    address: u64,
    len_bytes: u32,
) -> std::result::Result<Extent, i32> {
    let extent = source.extent(address, len_bytes).map_err(|error| errno_of(&error))?;
    if !is_page_range(address, extent.len_bytes) {
        return Err(nix::libc::EINVAL);
    }
    Ok(Extent { len_bytes: extent.len_bytes.min(len_bytes), ..extent })
}

/// The errno that travels for an error of the source.
pub(crate) fn errno_of(error: &io::Error) -> i32 {
    match error.raw_os_error() {
        Some(errno @ 1..=crate::wire::ERRNO_MAX) => errno,
        _ => nix::libc::EIO,
    }
}
