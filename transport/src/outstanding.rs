//! The requests of a lane that are not fully answered, in the order they were posted, which is the order a TCP lane answers in.

use crate::lane::{OUTSTANDING_REQUESTS_MAX, PageRequest};
use std::collections::VecDeque;

/// Requests not fully answered; of the first one, what is left of it.
#[derive(Debug, Default)]
pub(crate) struct Outstanding {
    requests: VecDeque<(PageRequest, u64)>,
    bytes: u64,
}

impl Outstanding {
    /// Adds a valid request with its tag; false if there are too many.
    pub(crate) fn post(&mut self, request: PageRequest, tag: u64) -> bool {
        if self.requests.len() >= OUTSTANDING_REQUESTS_MAX {
            return false;
        }
        self.requests.push_back((request, tag));
        self.bytes += u64::from(request.len_bytes);
        true
    }

    /// Strikes off what a reply answers, and returns that request's tag; the error says why it answers nothing.
    pub(crate) fn answer(&mut self, address: u64, len_bytes: u32) -> Result<u64, &'static str> {
        let Some((first, tag)) = self.requests.front_mut() else {
            return Err("a page reply that nobody asked for");
        };
        if address != first.address || len_bytes > first.len_bytes || len_bytes == 0 {
            return Err("a page reply for other pages than asked for");
        }
        first.address += u64::from(len_bytes);
        first.len_bytes -= len_bytes;
        self.bytes -= u64::from(len_bytes);
        let tag = *tag;
        if first.len_bytes == 0 {
            self.requests.pop_front();
        }
        Ok(tag)
    }

    /// Bytes not answered yet.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Requests not fully answered.
    #[cfg(feature = "rdma")]
    pub(crate) fn requests(&self) -> usize {
        self.requests.len()
    }

    /// True if all is answered.
    pub(crate) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_must_cover_requests_in_order() {
        let mut outstanding = Outstanding::default();
        assert!(outstanding.answer(0, 4096).is_err());
        assert!(outstanding.post(PageRequest { address: 0x1000, len_bytes: 0x3000 }, 7));
        assert!(outstanding.post(PageRequest { address: 0x9000, len_bytes: 0x1000 }, 8));
        assert_eq!(outstanding.bytes(), 0x4000);
        assert!(outstanding.answer(0x2000, 0x1000).is_err(), "not its beginning");
        assert!(outstanding.answer(0x9000, 0x1000).is_err(), "not the first request");
        assert!(outstanding.answer(0x1000, 0x4000).is_err(), "over its end");
        outstanding.answer(0x1000, 0x1000).unwrap();
        assert!(outstanding.answer(0x1000, 0x1000).is_err(), "twice");
        assert_eq!(outstanding.answer(0x2000, 0x2000), Ok(7));
        assert_eq!(outstanding.answer(0x9000, 0x1000), Ok(8));
        assert!(outstanding.is_empty());
        assert_eq!(outstanding.bytes(), 0);
    }

    #[test]
    fn the_queue_has_a_limit() {
        let mut outstanding = Outstanding::default();
        let request = PageRequest { address: 0, len_bytes: 4096 };
        for _ in 0..OUTSTANDING_REQUESTS_MAX {
            assert!(outstanding.post(request, 0));
        }
        assert!(!outstanding.post(request, 0));
        outstanding.answer(0, 4096).unwrap();
        assert!(outstanding.post(request, 0));
    }
}
