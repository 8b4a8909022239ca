//! The modelled kernel, and the truth about memory that the program's touches are held against.

use super::super::SpaceId;
use super::FIRST;
use super::edge::regions;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// One mapped page.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    pub size: u64,
    /// Page of the shared object, or private memory.
    pub shared: Option<u64>,
    pub registered: bool,
    pub forks: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Touch {
    pub address: u64,
    pub write: Option<u64>,
}

#[derive(Clone, Debug)]
pub enum Event {
    Remove { start: u64, end: u64, punch: bool },
    Unmap { start: u64, end: u64 },
    Remap { from: u64, to: u64, len: u64 },
    Alias { from: u64, to: u64, len: u64 },
    Fork { child: usize },
}

#[derive(Clone, Copy, Debug)]
pub enum ThreadState {
    Idle,
    /// Blocked in a fault.
    Faulting(Touch),
    /// Woken from a fault.
    Retry(Touch),
    /// Has changed the address space; its event isn't queued yet.
    Changed,
    /// Blocked until its events are read.
    Raising,
    /// The `REMOVE` was read; the pages are still there.
    Zap {
        start: u64,
        end: u64,
        punch: bool,
    },
}

impl ThreadState {
    fn in_a_call(&self) -> bool {
        matches!(self, Self::Changed | Self::Raising | Self::Zap { .. })
    }
}

#[derive(Clone, Debug)]
pub struct Process {
    /// As the edge names it; none before the edge has read the `FORK`.
    pub id: Option<SpaceId>,
    pub alive: bool,
    pub map: BTreeMap<u64, Slot>,
    /// Private pages that are present.
    pub pages: BTreeMap<u64, u64>,
    /// What private pages should hold.
    truth: BTreeMap<u64, u64>,
    /// Unread faults: thread and page.
    pub faults: VecDeque<(usize, u64)>,
    /// Raised events not yet read, with the thread.
    pub events: VecDeque<(usize, Event)>,
    /// Events the thread will raise after the present one is read.
    later: Vec<VecDeque<Event>>,
    pub threads: Vec<ThreadState>,
    /// For each thread what it may still be working on in its call: nobody else's business.
    pub busy: Vec<Vec<Range<u64>>>,
    /// For each thread what its last call was about.
    pub subject: Vec<Range<u64>>,
}

impl Process {
    pub fn runs(&self) -> bool {
        self.alive && self.id.is_some()
    }

    /// A thread is changing the address space.
    pub fn in_a_call(&self) -> bool {
        self.threads.iter().any(ThreadState::in_a_call)
    }

    /// True if no thread in a call works on a range.
    pub fn is_free(&self, range: &Range<u64>) -> bool {
        let calls = self.threads.iter().zip(&self.busy).filter(|(thread, _)| thread.in_a_call());
        calls.flat_map(|(_, busy)| busy).all(|b| b.end <= range.start || range.end <= b.start)
    }

    /// Copies are refused.
    pub fn changing(&self) -> bool {
        !self.events.is_empty() || self.later.iter().any(|later| !later.is_empty())
    }

    fn page_of(&self, address: u64) -> Option<u64> {
        let (start, slot) = self.map.range(..=address).next_back()?;
        (address < start + slot.size).then_some(*start)
    }

    fn keys(&self, start: u64, end: u64) -> Vec<u64> {
        self.map.range(start..end).map(|(page, _)| *page).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyError {
    Again,
    NotRegistered,
    Exists,
    NoProcess,
}

pub struct Kernel {
    pub processes: Vec<Process>,
    /// Pages of the shared object that are present, and what they should hold.
    object: BTreeMap<u64, u64>,
    object_truth: BTreeMap<u64, u64>,
}

impl Kernel {
    pub fn new(source: &BTreeMap<u64, (u64, u64)>) -> Self {
        let mut process = Process {
            id: Some(FIRST),
            alive: true,
            map: BTreeMap::new(),
            pages: BTreeMap::new(),
            truth: BTreeMap::new(),
            faults: VecDeque::new(),
            events: VecDeque::new(),
            later: vec![VecDeque::new(); 3],
            busy: vec![Vec::new(); 3],
            subject: vec![0..0; 3],
            threads: vec![ThreadState::Idle; 3],
        };
        let mut object_truth = BTreeMap::new();
        for region in regions() {
            for (start, (content, size)) in source.range(region.start..region.end()) {
                let shared = region.shared.then_some(*start);
                let slot = Slot { size: *size, shared, registered: true, forks: region.forks };
                process.map.insert(*start, slot);
                let truth = if region.shared { &mut object_truth } else { &mut process.truth };
                truth.insert(*start, *content);
            }
        }
        Self { processes: vec![process], object: BTreeMap::new(), object_truth }
    }

    /// Nobody is in the middle of anything.
    pub fn quiet(&self) -> bool {
        self.processes.iter().filter(|process| process.alive).all(|process| {
            !process.changing()
                && process.threads.iter().all(|thread| matches!(thread, ThreadState::Idle))
        })
    }

    /// True while events of changes are yet to be read or raised.
    pub fn is_changing(&self) -> bool {
        self.processes.iter().any(|process| process.alive && process.changing())
    }

    /// With userfaultfd gone, missing pages read as zeros: that must be what they are.
    pub fn check_all(&self) {
        for process in self.processes.iter().filter(|process| process.alive) {
            for (page, slot) in &process.map {
                let (content, truth) = match slot.shared {
                    Some(object) => (self.object.get(&object), self.object_truth.get(&object)),
                    None => (process.pages.get(page), process.truth.get(page)),
                };
                let (content, truth) = (content.unwrap_or(&0), truth.unwrap_or(&0));
                assert!(
                    content == truth,
                    "wrong bytes at the end: page {page:#x} of {:?} holds {content}, not {truth}",
                    process.id
                );
            }
        }
    }

    // ---- System calls and touches ----

    pub fn touch(&mut self, process: usize, thread: usize, touch: Touch) {
        let this = &mut self.processes[process];
        this.threads[thread] = ThreadState::Idle;
        // Not mapped any more: the program gets its SIGSEGV, as it deserves.
        let Some(page) = this.page_of(touch.address) else { return };
        let slot = this.map[&page];
        let zapping = this.threads.iter().any(|state| {
            matches!(state, ThreadState::Zap { start, end, .. } if (*start..*end).contains(&page))
        });
        let punching = slot.shared.is_some()
            && self
                .processes
                .iter()
                .flat_map(|other| other.threads.iter())
                .any(|state| matches!(state, ThreadState::Zap { punch: true, .. }));
        let this = &mut self.processes[process];
        let (content, truth, key) = match slot.shared {
            Some(object) => (&mut self.object, &mut self.object_truth, object),
            None => (&mut this.pages, &mut this.truth, page),
        };
        if !content.contains_key(&key) && slot.registered {
            this.faults.push_back((thread, page));
            this.threads[thread] = ThreadState::Faulting(touch);
            return;
        }
        let found = *content.entry(key).or_insert(0);
        if let Some(write) = touch.write {
            content.insert(key, write);
            truth.insert(key, write);
        } else if !(found == 0 && (zapping || punching)) {
            let truth = truth.get(&key).copied().unwrap_or(0);
            assert!(
                found == truth,
                "wrong bytes: page {page:#x} of {:?} holds {found}, not {truth}",
                this.id
            );
        }
    }

    pub fn mmap(&mut self, process: usize, start: u64, pages: u64) {
        let this = &mut self.processes[process];
        let free = this.map.range(start..start + pages * 4096).next().is_none();
        for page in (start..start + pages * 4096).step_by(4096).filter(|_| free) {
            let slot = Slot { size: 4096, shared: None, registered: false, forks: true };
            this.map.insert(page, slot);
            this.pages.remove(&page);
            this.truth.insert(page, 0);
        }
    }

    pub fn madvise(&mut self, process: usize, thread: usize, start: u64, end: u64, punch: bool) {
        let registered = self.processes[process].map[&start].registered;
        if registered {
            self.raise(process, thread, [Event::Remove { start, end, punch }]);
        } else {
            self.zap(process, thread, start, end, punch);
        }
    }

    pub fn zap(&mut self, process: usize, thread: usize, start: u64, end: u64, punch: bool) {
        let this = &mut self.processes[process];
        this.threads[thread] = ThreadState::Idle;
        for page in this.keys(start, end) {
            match this.map[&page].shared {
                Some(object) if punch => {
                    self.object.remove(&object);
                    self.object_truth.insert(object, 0);
                }
                Some(_) => {}
                None => {
                    this.pages.remove(&page);
                    this.truth.insert(page, 0);
                }
            }
        }
    }

    pub fn munmap(&mut self, process: usize, thread: usize, start: u64, end: u64) {
        if self.clear(process, start, end) {
            self.raise(process, thread, [Event::Unmap { start, end }]);
        }
    }

    pub fn mremap(
        &mut self,
        process: usize,
        thread: usize,
        start: u64,
        end: u64,
        to: u64,
        keep: bool,
    ) {
        let len = end - start;
        if start < to + len && to < end {
            return;
        }
        let mut events = Vec::new();
        if self.clear(process, to, to + len) {
            events.push(Event::Unmap { start: to, end: to + len });
        }
        let this = &mut self.processes[process];
        let registered = this.map[&start].registered;
        for page in this.keys(start, end) {
            let target = to + (page - start);
            let slot = this.map[&page];
            this.map.insert(target, slot);
            if let Some(content) = this.pages.remove(&page) {
                this.pages.insert(target, content);
            }
            let truth = this.truth.remove(&page).unwrap_or(0);
            this.truth.insert(target, truth);
            if !keep {
                this.map.remove(&page);
            }
        }
        if registered {
            events.push(Event::Remap { from: start, to, len });
            if !keep {
                events.push(Event::Unmap { start, end });
            }
        }
        self.raise(process, thread, events);
    }

    pub fn alias(&mut self, process: usize, thread: usize, start: u64, end: u64, to: u64) {
        let len = end - start;
        if start < to + len && to < end {
            return;
        }
        let mut events = Vec::new();
        if self.clear(process, to, to + len) {
            events.push(Event::Unmap { start: to, end: to + len });
        }
        let this = &mut self.processes[process];
        for page in this.keys(start, end) {
            let slot = this.map[&page];
            this.map.insert(to + (page - start), slot);
        }
        if this.map[&start].registered {
            events.push(Event::Alias { from: start, to, len });
        }
        self.raise(process, thread, events);
    }

    pub fn fork(&mut self, process: usize, thread: usize) {
        let child = self.processes.len();
        let this = &self.processes[process];
        let mut copy = Process {
            id: None,
            faults: VecDeque::new(),
            events: VecDeque::new(),
            later: vec![VecDeque::new(); 3],
            busy: vec![Vec::new(); 3],
            subject: vec![0..0; 3],
            threads: vec![ThreadState::Idle; 3],
            ..this.clone()
        };
        copy.map.retain(|_, slot| slot.forks);
        copy.pages.retain(|page, _| copy.map.contains_key(page));
        copy.truth.retain(|page, _| copy.map.contains_key(page));
        self.processes.push(copy);
        self.raise(process, thread, [Event::Fork { child }]);
        // At once: were another thread's move read before the fork, nothing would say which of both came first.
        self.queue(process, thread);
    }

    /// Only when no event is unread, so that no child is left half-made.
    pub fn exit(&mut self, process: usize) {
        let this = &mut self.processes[process];
        if !this.changing() {
            this.alive = false;
            this.faults.clear();
        }
    }

    /// Unmaps; true when some of it was registered.
    fn clear(&mut self, process: usize, start: u64, end: u64) -> bool {
        let this = &mut self.processes[process];
        let mut registered = false;
        for page in this.keys(start, end) {
            registered |= this.map[&page].registered;
            this.map.remove(&page);
            this.pages.remove(&page);
            this.truth.remove(&page);
        }
        registered
    }

    fn raise(&mut self, process: usize, thread: usize, events: impl IntoIterator<Item = Event>) {
        let this = &mut self.processes[process];
        this.later[thread].extend(events);
        if !this.later[thread].is_empty() {
            this.threads[thread] = ThreadState::Changed;
        }
    }

    /// Queues the next event of a thread: the address space was changed some time before.
    pub fn queue(&mut self, process: usize, thread: usize) {
        let this = &mut self.processes[process];
        if let Some(first) = this.later[thread].pop_front() {
            this.events.push_back((thread, first));
            this.threads[thread] = ThreadState::Raising;
        }
    }

    // ---- What the edge can do ----

    /// Reads an event: its thread goes on.
    pub fn read_event(&mut self, process: usize) -> Option<Event> {
        let this = &mut self.processes[process];
        let (thread, event) = this.events.pop_front()?;
        this.threads[thread] = match event {
            Event::Remove { start, end, punch } => ThreadState::Zap { start, end, punch },
            _ => ThreadState::Idle,
        };
        self.raise(process, thread, []);
        Some(event)
    }

    pub fn wake(&mut self, process: usize, start: u64, end: u64) {
        let this = &mut self.processes[process];
        for (thread, state) in this.threads.iter_mut().enumerate() {
            if let ThreadState::Faulting(touch) = *state
                && (start..end).contains(&touch.address)
            {
                *state = ThreadState::Retry(touch);
                this.faults.retain(|(faulting, _)| *faulting != thread);
            }
        }
    }

    /// `UFFDIO_COPY` or `UFFDIO_ZEROPAGE` of one page.
    pub fn copy(&mut self, process: usize, page: u64, content: u64) -> Result<(), CopyError> {
        let this = &mut self.processes[process];
        if !this.alive {
            return Err(CopyError::NoProcess);
        }
        let changing = this.changing();
        let slot = this.map.get(&page).filter(|slot| slot.registered).copied();
        let slot = slot.ok_or(CopyError::NotRegistered)?;
        if changing {
            return Err(CopyError::Again);
        }
        let (pages, key) = match slot.shared {
            Some(object) => (&mut self.object, object),
            None => (&mut this.pages, page),
        };
        if pages.contains_key(&key) {
            return Err(CopyError::Exists);
        }
        pages.insert(key, content);
        self.wake(process, page, page + slot.size);
        Ok(())
    }

    pub fn size_at(&self, process: usize, page: u64) -> u64 {
        self.processes[process].map.get(&page).map_or(4096, |slot| slot.size)
    }

    pub fn unregister(&mut self, process: usize, start: u64, end: u64) {
        for (_, slot) in self.processes[process].map.range_mut(start..end) {
            slot.registered = false;
        }
        self.wake(process, start, end);
    }
}
