//! Which READ belongs to which request, and what of it has been answered: the bookkeeping of a lane, without an adapter.
//!
//! A request becomes one READ a part, each into a buffer slot of its own. A queue pair completes READs in the order in which they
//! were posted, so only the last of a request is signalled.

use super::regions::Part;
use crate::lane::{PageRequest, REPLY_DATA_LEN_BYTES_MAX};
use std::collections::VecDeque;

/// One READ: from the source's memory into a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) part: Part,
    pub(super) slot: u16,
    /// The number to be signalled with, of the last READ of a request.
    pub(super) signalled: Option<u64>,
}

/// A request whose READs have been posted.
#[derive(Debug)]
struct Posted {
    number: u64,
    request: PageRequest,
    tag: u64,
    /// Slots with the bytes in each, in order.
    slots: Vec<(u16, u32)>,
}

/// A request that has arrived and is being handed out.
#[derive(Debug)]
struct Arrived {
    tag: u64,
    address: u64,
    slots: VecDeque<(u16, u32)>,
    /// What of the first slot has been handed out.
    offset: u32,
}

/// A piece of what has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Of the request.
    pub(super) tag: u64,
    pub(super) address: u64,
    pub(super) slot: u16,
    pub(super) offset: u32,
    pub(super) len_bytes: u32,
}

/// The requests of a lane that go by RDMA.
#[derive(Debug)]
pub(super) struct Reads {
    waiting: VecDeque<(PageRequest, u64, Vec<Part>)>,
    posted: VecDeque<Posted>,
    arrived: Option<Arrived>,
    free: Vec<u16>,
    next_number: u64,
    outstanding_bytes: u64,
}

impl Reads {
    pub(super) fn new(slots: u16) -> Self {
        Self {
            waiting: VecDeque::new(),
            posted: VecDeque::new(),
            arrived: None,
            free: (0..slots).collect(),
            next_number: 0,
            outstanding_bytes: 0,
        }
    }

    /// Takes a request on, with its tag. The lane bounds how many.
    pub(super) fn add(&mut self, request: PageRequest, tag: u64, parts: &[Part]) {
        self.outstanding_bytes += u64::from(request.len_bytes);
        self.waiting.push_back((request, tag, parts.to_vec()));
    }

    /// Requests that have not arrived.
    pub(super) fn requests(&self) -> usize {
        self.waiting.len() + self.posted.len()
    }

    /// Appends the READs of the requests that there are slots for.
    pub(super) fn start(&mut self, reads: &mut Vec<Read>) {
        while let Some((_, _, parts)) = self.waiting.front()
            && parts.len() <= self.free.len()
            && let Some((request, tag, parts)) = self.waiting.pop_front()
        {
            let number = self.next_number;
            self.next_number += 1;
            let last = parts.len() - 1;
            let slots = self.free.split_off(self.free.len() - parts.len());
            reads.extend(parts.iter().zip(&slots).enumerate().map(|(i, (part, slot))| {
                let signalled = (i == last).then_some(number);
                Read { part: *part, slot: *slot, signalled }
            }));
            let slots = slots.into_iter().zip(parts.iter().map(|p| p.len_bytes)).collect();
            self.posted.push_back(Posted { number, request, tag, slots });
        }
    }

    /// A signalled READ has completed: the oldest request has arrived. False if it is another one, which can't be, or if
    /// one is being handed out still.
    pub(super) fn complete(&mut self, number: u64) -> bool {
        if self.arrived.is_some() || self.posted.front().is_none_or(|p| p.number != number) {
            return false;
        }
        if let Some(p) = self.posted.pop_front() {
            let slots = p.slots.into_iter().collect();
            self.arrived =
                Some(Arrived { tag: p.tag, address: p.request.address, slots, offset: 0 });
        }
        true
    }

    /// The next piece of what has arrived. The slot of the one before may be used again from now on.
    pub(super) fn piece(&mut self) -> Option<Piece> {
        let arrived = self.arrived.as_mut()?;
        while let Some((slot, len)) = arrived.slots.front().copied() {
            if arrived.offset < len {
                let len_bytes = (len - arrived.offset).min(REPLY_DATA_LEN_BYTES_MAX);
                let (tag, address) = (arrived.tag, arrived.address);
                let piece = Piece { tag, address, slot, offset: arrived.offset, len_bytes };
                arrived.address += u64::from(len_bytes);
                arrived.offset += len_bytes;
                self.outstanding_bytes -= u64::from(len_bytes);
                return Some(piece);
            }
            arrived.slots.pop_front();
            arrived.offset = 0;
            self.free.push(slot);
        }
        self.arrived = None;
        None
    }

    /// Gives up what has not arrived, for it to be asked for in another way. What has arrived is handed out still.
    pub(super) fn give_up(&mut self) -> Vec<(PageRequest, u64)> {
        let posted = self.posted.drain(..).map(|p| (p.request, p.tag));
        let rest: Vec<_> =
            posted.chain(self.waiting.drain(..).map(|(request, tag, _)| (request, tag))).collect();
        self.outstanding_bytes -= rest.iter().map(|(r, _)| u64::from(r.len_bytes)).sum::<u64>();
        rest
    }

    /// READs are under way.
    pub(super) fn is_posted(&self) -> bool {
        !self.posted.is_empty()
    }

    pub(super) fn outstanding_bytes(&self) -> u64 {
        self.outstanding_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const SLOTS: u16 = 8;
    const PAGE: u64 = 4096;

    /// One thing that happens to a lane.
    #[derive(Clone, Debug)]
    enum Step {
        Add { pages: u32, part_pages: u32 },
        Start,
        Complete,
        Take,
        GiveUp,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (1u32..64, 1u32..32).prop_map(|(pages, part)| Step::Add { pages, part_pages: part.max(pages.div_ceil(8)) }),
            3 => Just(Step::Start),
            3 => Just(Step::Complete),
            6 => Just(Step::Take),
            1 => Just(Step::GiveUp),
        ]
    }

    fn cut(request: PageRequest, part_pages: u32) -> Vec<Part> {
        let mut parts = Vec::new();
        let (mut at, mut left) = (request.address, request.len_bytes);
        while left > 0 {
            let len_bytes = left.min(part_pages * 4096);
            parts.push(Part { address: at, len_bytes, rkey: 1 });
            at += u64::from(len_bytes);
            left -= len_bytes;
        }
        parts
    }

    proptest! {
        /// Whatever happens in whatever order: every page is handed out once or given up once, in order within its
        /// request, from the slot that it was read into, and no slot is in use twice.
        #[test]
        fn nothing_is_lost_or_answered_twice(steps in prop::collection::vec(step(), 1..300)) {
            let mut reads = Reads::new(SLOTS);
            let mut next_address = 0u64;
            let mut open: BTreeMap<u64, u64> = BTreeMap::new(); // pages not answered: address -> end of request
            let mut end_of: BTreeMap<u64, u64> = BTreeMap::new(); // by tag, which is where a request begins
            let mut flying: Vec<Read> = Vec::new();
            let mut slot_of: BTreeMap<u16, Part> = BTreeMap::new();
            let mut lent: Option<Piece> = None;
            for step in steps {
                match step {
                    Step::Add { pages, part_pages } => {
                        let request = PageRequest { address: next_address, len_bytes: pages * 4096 };
                        reads.add(request, next_address, &cut(request, part_pages));
                        let end = next_address + u64::from(pages) * PAGE;
                        end_of.insert(next_address, end);
                        while next_address < end {
                            open.insert(next_address, end);
                            next_address += PAGE;
                        }
                    }
                    Step::Start => {
                        let mut started = Vec::new();
                        reads.start(&mut started);
                        for read in &started {
                            let busy = flying.iter().any(|f| f.slot == read.slot)
                                || lent.is_some_and(|l| l.slot == read.slot);
                            prop_assert!(!busy, "slot {} is in use", read.slot);
                            slot_of.insert(read.slot, read.part);
                        }
                        flying.extend(started);
                    }
                    Step::Complete => {
                        let Some(last) = flying.iter().position(|r| r.signalled.is_some()) else { continue };
                        let number = flying[last].signalled.unwrap();
                        if reads.complete(number) {
                            flying.drain(..=last);
                        }
                        prop_assert!(!reads.complete(number));
                    }
                    Step::Take => {
                        lent = reads.piece();
                        let Some(piece) = lent else { continue };
                        prop_assert_eq!(end_of.get(&piece.tag), open.get(&piece.address), "of another request");
                        let part = slot_of[&piece.slot];
                        prop_assert_eq!(part.address + u64::from(piece.offset), piece.address);
                        prop_assert!(piece.offset + piece.len_bytes <= part.len_bytes);
                        for page in 0..u64::from(piece.len_bytes) / PAGE {
                            prop_assert!(open.remove(&(piece.address + page * PAGE)).is_some());
                        }
                    }
                    Step::GiveUp => {
                        for (request, tag) in reads.give_up() {
                        prop_assert_eq!(tag, request.address);
                            for page in 0..u64::from(request.len_bytes) / PAGE {
                                prop_assert!(open.remove(&(request.address + page * PAGE)).is_some());
                            }
                        }
                        // The adapter is not used again after this.
                        break;
                    }
                }
                prop_assert_eq!(reads.outstanding_bytes(), open.len() as u64 * PAGE);
            }
            while let Some(piece) = reads.piece() {
                for page in 0..u64::from(piece.len_bytes) / PAGE {
                    prop_assert!(open.remove(&(piece.address + page * PAGE)).is_some());
                }
            }
            for (request, tag) in reads.give_up() {
                        prop_assert_eq!(tag, request.address);
                for page in 0..u64::from(request.len_bytes) / PAGE {
                    prop_assert!(open.remove(&(request.address + page * PAGE)).is_some());
                }
            }
            prop_assert!(open.is_empty(), "never answered: {:?}", open);
            prop_assert_eq!(reads.outstanding_bytes(), 0);
        }
    }
}
