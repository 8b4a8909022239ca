//! A page lane in memory, for simulators: everything it does follows from its seed.

use crate::error::{Error, Result};
use crate::lane::{
    Block, Content, OUTSTANDING_REQUESTS_MAX, PAGE_LEN_BYTES, PageLane, PageReply, PageRequest,
    PageSource, REPLY_DATA_LEN_BYTES_MAX, checked_extent, errno_of,
};
use std::os::fd::RawFd;

/// How a mock lane behaves.
#[derive(Debug, Clone, Copy)]
pub struct MockOptions {
    /// Everything random follows from it.
    pub seed: u64,
    /// How often, in per cent, a call of `next` that may not wait finds nothing although something is outstanding.
    pub delay_percent: u8,
    /// How often, in per cent, a reply is cut shorter than it could be.
    pub split_percent: u8,
    /// Replies after which every call fails as if the connection was lost.
    pub replies_until_failure: Option<u64>,
}

impl Default for MockOptions {
    fn default() -> Self {
        MockOptions { seed: 1, delay_percent: 30, split_percent: 30, replies_until_failure: None }
    }
}

/// A lane that answers from a source in memory, delays replies and mixes those of different requests.
#[derive(Debug)]
pub struct MockLane<S> {
    source: S,
    options: MockOptions,
    random: u64,
    /// What is left of each request; those not flushed yet are the last ones.
    requests: Vec<(PageRequest, u64)>,
    flushed: usize,
    replies: u64,
    failed: bool,
    data: Box<[u8]>,
}

impl<S: PageSource> MockLane<S> {
    /// A lane to `source`.
    pub fn new(source: S, options: MockOptions) -> Self {
        MockLane {
            source,
            options,
            random: options.seed,
            requests: Vec::new(),
            flushed: 0,
            replies: 0,
            failed: false,
            data: vec![0; REPLY_DATA_LEN_BYTES_MAX as usize].into_boxed_slice(),
        }
    }

    /// Loses the connection: every call fails from now on.
    pub fn fail(&mut self) {
        self.failed = true;
    }

    /// The memory behind the lane.
    pub fn source(&self) -> &S {
        &self.source
    }

    /// The memory behind the lane, to be changed.
    pub fn source_mut(&mut self) -> &mut S {
        &mut self.source
    }

    /// A number below `limit` (`SplitMix64`, whose quality is plenty here).
    fn random_below(&mut self, limit: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit.max(1)
    }

    fn by_chance(&mut self, percent: u8) -> bool {
        self.random_below(100) < u64::from(percent)
    }

    fn check_alive(&mut self) -> Result<()> {
        if self.options.replies_until_failure.is_some_and(|limit| self.replies >= limit) {
            self.failed = true;
        }
        if self.failed { Err(Error::Closed { peer: "mock".into() }) } else { Ok(()) }
    }

    /// A length to answer, up to `len_bytes`, sometimes shorter.
    fn cut(&mut self, len_bytes: u32) -> u32 {
        if !self.by_chance(self.options.split_percent) {
            return len_bytes;
        }
        let pages = u64::from(len_bytes / PAGE_LEN_BYTES);
        (self.random_below(pages) as u32 + 1) * PAGE_LEN_BYTES
    }

    /// Answers the beginning of a request: how much of it, and with what. Data is left in `self.data`.
    fn produce(&mut self, request: PageRequest) -> (u32, std::result::Result<bool, i32>) {
        let PageRequest { address, len_bytes } = request;
        let extent = match checked_extent(&self.source, address, len_bytes) {
            Ok(extent) => extent,
            Err(errno) => return (len_bytes, Err(errno)),
        };
        if !extent.present {
            return (self.cut(extent.len_bytes), Ok(false));
        }
        let len = self.cut(extent.len_bytes.min(REPLY_DATA_LEN_BYTES_MAX));
        match self.source.read(address, &mut self.data[..len as usize]) {
            Ok(()) => (len, Ok(true)),
            Err(_) if len > PAGE_LEN_BYTES => {
                self.produce(PageRequest { address, len_bytes: PAGE_LEN_BYTES })
            }
            Err(error) => (len, Err(errno_of(&error))),
        }
    }
}

impl<S: PageSource + Send> PageLane for MockLane<S> {
    fn post(&mut self, request: PageRequest, tag: u64) -> Result<()> {
        self.check_alive()?;
        if !request.is_valid() {
            let PageRequest { address, len_bytes } = request;
            return Err(Error::BadRequest { address, len_bytes });
        }
        if self.requests.len() >= OUTSTANDING_REQUESTS_MAX {
            return Err(Error::QueueFull { peer: "mock".into() });
        }
        self.requests.push((request, tag));
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.check_alive()?;
        self.flushed = self.requests.len();
        Ok(())
    }

    fn next(&mut self, block: Block) -> Result<Option<PageReply<'_>>> {
        self.check_alive()?;
        if block != Block::No {
            self.flushed = self.requests.len();
        }
        let delayed = block == Block::No && self.by_chance(self.options.delay_percent);
        if self.flushed == 0 || delayed {
            return Ok(None);
        }
        let which = self.random_below(self.flushed as u64) as usize;
        let (request, tag) = self.requests[which];
        let (len_bytes, outcome) = self.produce(request);
        let left = request.len_bytes - len_bytes;
        if left == 0 {
            self.requests.remove(which);
            self.flushed -= 1;
        } else {
            let address = request.address + u64::from(len_bytes);
            self.requests[which] = (PageRequest { address, len_bytes: left }, tag);
        }
        self.replies += 1;
        let content = match outcome {
            Ok(true) => Content::Data(&self.data[..len_bytes as usize]),
            Ok(false) => Content::Absent,
            Err(errno) => Content::Failed(errno),
        };
        Ok(Some(PageReply { tag, address: request.address, len_bytes, content }))
    }

    fn outstanding_bytes(&self) -> u64 {
        self.requests.iter().map(|(request, _)| u64::from(request.len_bytes)).sum()
    }

    fn raw_fd(&self) -> Option<RawFd> {
        None
    }
}
