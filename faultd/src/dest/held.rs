//! What of a drain outlives its session, and where: slots of the keeper (see `core::restore::keeper`).

use crate::dest::journal::{Journal, Record, Unfinished, needed_descriptor};
use crate::error::{Error, Result};
use crate::pages::{PageTable, Pages, SpaceId, TableMemory};
use prost::Message;
use slipstream_core::manifest::{Manifest, Mapping};
use slipstream_core::restore::keeper::{Keeper, SLOTS_MAX};
use slipstream_core::restore::memory::RING_SLOTS;
use slipstream_core::sys::mapped::memfd;
use slipstream_core::sys::pidfd::PidFd;
use slipstream_core::sys::ring;
use slipstream_core::sys::twin::Twin;
use slipstream_core::sys::uffd::{Event, Uffd};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const PROCESS: u32 = 0;
const UFFD: u32 = 1;
const RING: u32 = 2;
const ACCOUNT: u32 = 3;
const JOURNAL: u32 = 4;
const PRIVATE: u32 = 5;
const SHARED: u32 = 6;
/// A process: the session's twin.
const TWIN: u32 = 7;
/// Two for each child: its userfaultfd and page table. The process counts as the first.
const CHILDREN: u32 = 8;
/// Children that are kept beside the process.
pub const CHILDREN_MAX: usize = 500;
/// Room for children that are too many, until they have been ended. They are kept, too: no moment may be without a
/// keeper.
const SURPLUS_MAX: usize = 64;
const SPACES_MAX: usize = 1 + CHILDREN_MAX + SURPLUS_MAX;
const _: () = assert!(CHILDREN as usize + 2 * SPACES_MAX <= SLOTS_MAX as usize);
const ACCOUNT_LEN_MAX: u64 = 256 << 20;

/// What a session has to know to finish what another began.
#[derive(Clone, PartialEq, Message)]
pub struct Account {
    /// The address space as it was restored.
    #[prost(message, repeated, tag = "1")]
    pub mappings: Vec<Mapping>,
    /// What restore left mapped, as (start, end) pairs.
    #[prost(uint64, repeated, tag = "2")]
    pub ours: Vec<u64>,
    /// `mlockall` for mappings to come, as in the manifest.
    #[prost(uint32, tag = "3")]
    pub future_locks: u32,
    /// Most that prefetch may take, in bytes a second; zero for no limit.
    #[prost(uint64, tag = "4")]
    pub prefetch_limit: u64,
}

impl Account {
    /// What has to be known about a restored process.
    pub fn new(m: &Manifest, ours: &[Range<u64>], prefetch_limit: u64) -> Self {
        let ours = ours.iter().flat_map(|r| [r.start, r.end]).collect();
        let (mappings, future_locks) = (m.mappings.clone(), m.process.future_locks);
        Self { mappings, ours, future_locks, prefetch_limit }
    }

    /// What restore left mapped.
    pub fn ours(&self) -> Vec<Range<u64>> {
        self.ours.chunks_exact(2).map(|r| r[0]..r[1]).collect()
    }

    /// As much of the manifest as the rest of a drain needs.
    pub fn manifest(&self) -> Manifest {
        let mut manifest = Manifest { mappings: self.mappings.clone(), ..Manifest::default() };
        manifest.process.future_locks = self.future_locks;
        manifest
    }
}

/// What of a drain's holdings can be made, and given to the keeper, before the process is frozen.
#[derive(Debug)]
pub struct Ahead {
    keeper: Arc<Keeper>,
    journal: Journal,
    private: File,
    shared: File,
    twin: Twin,
}

impl Ahead {
    /// Those of a new drain.
    pub fn make(keeper: Arc<Keeper>) -> Result<Self> {
        let (private, shared) = (table_file(0)?, table_file(0)?);
        let journal = Journal::create()?;
        keeper.hold(PRIVATE, private.as_fd())?;
        keeper.hold(SHARED, shared.as_fd())?;
        keeper.hold(JOURNAL, journal.file().as_fd())?;
        let twin = make_twin(&keeper, &journal)?;
        Ok(Self { keeper, journal, private, shared, twin })
    }
}

fn make_twin(keeper: &Keeper, journal: &Journal) -> Result<Twin> {
    let mut twin = Twin::start(keeper.init(), needed_descriptor)?;
    twin.watch(journal.memory());
    keeper.hold(TWIN, twin.as_fd())?;
    Ok(twin)
}

/// The descriptors of a drain, all of which the keeper has too (once [`Holdings::keep`] was called).
#[derive(Debug)]
pub struct Holdings {
    keeper: Arc<Keeper>,
    ring: OwnedFd,
    /// The journal.
    pub journal: Journal,
    private: File,
    shared: File,
    /// Which child a slot belongs to; slot 0 is the process's. The first are slots of the ring, too.
    slots: [Option<SpaceId>; SPACES_MAX],
    /// Has a child's userfaultfd from the moment on in which its event is read.
    twin: Option<Twin>,
    /// The twin of the session before.
    left_twin: Option<PidFd>,
}

/// What taking a drain up found beside its [`Holdings`].
#[derive(Debug)]
pub struct Found {
    /// The process's userfaultfd.
    pub uffd: Uffd,
    /// The process, held so that its number stays its own.
    pub process: OwnedFd,
    /// What the session before noted.
    pub account: Account,
}

fn table_file(len: u64) -> Result<File> {
    Ok(memfd(c"slipstream-pages", table_file_len(len))?)
}

/// With room for the rounding of `TableMemory`.
fn table_file_len(len: u64) -> u64 {
    len.max(1).next_multiple_of(4096)
}

fn table(file: &File, len: u64) -> Result<TableMemory> {
    TableMemory::file(file.as_fd(), len).map_err(|e| Error::io("map a page table", e))
}

/// A table for a space that has ended, of which only the spans matter.
fn spare_table(pages: &Pages) -> Result<TableMemory> {
    TableMemory::anonymous(PageTable::len_bytes(pages.layout()))
        .map_err(|e| Error::io("reserve a page table", e))
}

impl Holdings {
    /// Those of a new drain, with page tables of `table_len` bytes.
    pub fn create(ahead: Ahead, ring: OwnedFd, table_len: u64) -> Result<Self> {
        let Ahead { keeper, journal, private, shared, twin } = ahead;
        for file in [&private, &shared] {
            file.set_len(table_file_len(table_len))
                .map_err(|e| Error::io("reserve a page table", e))?;
        }
        let (slots, twin, left_twin) = ([None; SPACES_MAX], Some(twin), None);
        Ok(Self { keeper, ring, journal, private, shared, slots, twin, left_twin })
    }

    /// The two tables, for private and for shared regions.
    pub fn tables(&self, len: u64) -> Result<[TableMemory; 2]> {
        Ok([table(&self.private, len)?, table(&self.shared, len)?])
    }

    /// Has the keeper keep everything. From then on another session can take the drain up.
    pub fn keep(&mut self, uffd: &Uffd, account: &Account) -> Result<()> {
        let mut file = memfd(c"slipstream-account", 0)?;
        file.write_all(&account.encode_to_vec()).map_err(|e| Error::io("write the account", e))?;
        let keep = |slot, fd| self.keeper.hold(slot, fd);
        keep(UFFD, uffd.as_fd())?;
        self.keeper.hold_fetched(RING, self.ring.as_fd())?;
        keep(ACCOUNT, file.as_fd())?;
        Ok(self.keeper.sync()?)
    }

    /// Makes this session's twin, and ends that of the session before: what it had is kept elsewhere by now.
    pub fn start_twin(&mut self) -> Result<()> {
        self.twin = Some(make_twin(&self.keeper, &self.journal)?);
        if let Some(left) = self.left_twin.take()
            && let Err(e) = left.kill(libc::SIGKILL)
        {
            tracing::debug!("{e}");
        }
        Ok(())
    }

    /// Takes what an earlier session left.
    pub fn find(keeper: Arc<Keeper>) -> Result<(Self, Found)> {
        let take = |slot: u32| {
            keeper.take(slot)?.ok_or_else(|| Error::Internal(format!("slot {slot} is empty")))
        };
        let mut encoded = Vec::new();
        let account = File::from(take(ACCOUNT)?);
        let len = account.metadata().map_err(|e| Error::io("stat the account", e))?.len();
        if len > ACCOUNT_LEN_MAX {
            return Err(Error::Internal("the account of the drain is damaged".into()));
        }
        encoded.resize(len as usize, 0);
        account.read_exact_at(&mut encoded, 0).map_err(|e| Error::io("read the account", e))?;
        let account = Account::decode(&*encoded).map_err(|e| Error::Internal(e.to_string()))?;
        let found = Found { uffd: Uffd::from_fd(take(UFFD)?), process: take(PROCESS)?, account };
        let holdings = Self {
            ring: take(RING)?,
            journal: Journal::open(File::from(take(JOURNAL)?))?,
            private: File::from(take(PRIVATE)?),
            shared: File::from(take(SHARED)?),
            slots: [None; SPACES_MAX],
            twin: None,
            // One that has ended names no process any more.
            left_twin: keeper.take(TWIN)?.and_then(|fd| PidFd::adopt(fd).ok()),
            keeper,
        };
        Ok((holdings, found))
    }

    /// Writes what happens before it does; when the journal is full, first a shorter one that leads to
    /// `pages`.
    pub fn note(&mut self, pages: &Pages, records: &[Record]) -> Result<()> {
        if self.journal.is_full() {
            let slot_of = |id| self.slot_of(id).map(|slot| slot as u64);
            let journal = Journal::written_anew(pages, &slot_of)?;
            // The event being dealt with is not in the new journal: its record has to be there first.
            journal.append(records);
            self.keeper.hold(JOURNAL, journal.file().as_fd())?;
            if let Some(twin) = &mut self.twin {
                twin.watch(journal.memory());
            }
            self.journal = journal;
        } else {
            self.journal.append(records);
        }
        Ok(())
    }

    fn slot_of(&self, id: SpaceId) -> Option<usize> {
        self.slots.iter().position(|s| *s == Some(id))
    }

    /// Takes a forked child in. The keeper has its userfaultfd before anything else is done: if this process dies, the
    /// child's threads wait. On failure this session has to end: its twin keeps the child.
    pub fn adopt(&mut self, pages: &mut Pages, parent: SpaceId, child: &Uffd) -> Result<SpaceId> {
        let len = PageTable::len_bytes(pages.layout());
        let free = (1..SPACES_MAX).find(|slot| self.slots[*slot].is_none());
        let slot = free.ok_or_else(|| Error::Refused {
            reason: format!("the process has more than {CHILDREN_MAX} living children"),
            remedy: "those that are too many are ended".into(),
        })?;
        self.journal.note_fork(slot as u64);
        self.keep_child(slot, child)?;
        let file = table_file(len)?;
        self.hold(CHILDREN + 2 * slot as u32 + 1, file.as_fd())?;
        // The table is whole before the record says that it is.
        let id = pages.fork(parent, table(&file, len)?)?;
        self.slots[slot] = Some(id);
        self.note(pages, &[Record::Fork { parent, child: id, slot: slot as u64 }])?;
        Ok(id)
    }

    /// Children that are too many, and have to be ended.
    pub fn surplus(&self) -> Vec<SpaceId> {
        self.slots[1 + CHILDREN_MAX..].iter().copied().flatten().collect()
    }

    fn keep_child(&self, slot: usize, child: &Uffd) -> Result<()> {
        if slot < RING_SLOTS
            && let Err(e) = ring::hold(self.ring.as_fd(), slot as u32, child.as_fd())
        {
            tracing::warn!("{e}");
        }
        self.hold(CHILDREN + 2 * slot as u32, child.as_fd())
    }

    /// Has the keeper keep something, unless all has ended with it.
    fn hold(&self, slot: u32, fd: BorrowedFd<'_>) -> Result<()> {
        match self.keeper.hold(slot, fd) {
            Err(e) if !self.keeper.init().exited() => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// The process that keeps everything, the first of the moved process's namespace.
    pub fn init(&self) -> &PidFd {
        self.keeper.init()
    }

    /// A space has ended: its slot is free.
    pub fn let_go(&mut self, id: SpaceId) {
        let Some(slot) = self.slot_of(id) else { return };
        self.slots[slot] = None;
        for which in [0, 1] {
            if let Err(e) = self.keeper.drop_slot(CHILDREN + 2 * slot as u32 + which) {
                tracing::debug!("{e}");
            }
        }
    }

    /// Replays the journal. Returns the userfaultfds of children, and the event that was read last if
    /// nothing came of it.
    pub fn replay(
        &mut self,
        pages: &mut Pages,
    ) -> Result<(BTreeMap<SpaceId, Uffd>, Option<Unfinished>)> {
        let mut uffds = BTreeMap::new();
        let records = self.journal.records()?;
        // A slot is used again: what is in it now belongs to the last child that got it.
        let mut living = BTreeSet::new();
        for record in &records {
            match *record {
                Record::Fork { child: id, .. } | Record::Space { space: id, slot: 1.. } => {
                    living.insert(id);
                }
                Record::Exit { space } => {
                    living.remove(&space);
                }
                _ => {}
            }
        }
        for record in records {
            match record {
                Record::Space { space, slot: 0 } => {
                    pages.restore_space(space, None)?;
                }
                Record::Space { space, .. } if !living.contains(&space) => {
                    pages.restore_space(space, Some(spare_table(pages)?))?;
                }
                Record::Space { space, slot } => {
                    if let Some((uffd, memory)) = self.child(slot - 1, space, pages)? {
                        pages.restore_space(space, Some(memory))?;
                        uffds.insert(space, uffd);
                    }
                }
                Record::Span { space, span } => {
                    if pages.space(space).is_some() {
                        pages.restore_span(space, span)?;
                    }
                }
                Record::Left { space, start, end } => {
                    if pages.space(space).is_some() {
                        pages.restore_left(space, start..end)?;
                    }
                }
                Record::Overtaken { space, span } => {
                    if pages.space(space).is_some() {
                        pages.restore_overtaken(space, span)?;
                    }
                }
                Record::Fork { parent, .. } if pages.space(parent).is_none() => {}
                Record::Fork { parent, child, .. } if !living.contains(&child) => {
                    // It has ended since, but may have children that have not.
                    pages.fork_again(parent, child, spare_table(pages)?)?;
                }
                Record::Fork { parent, child, slot } => {
                    if let Some((uffd, memory)) = self.child(slot, child, pages)? {
                        pages.fork_again(parent, child, memory)?;
                        uffds.insert(child, uffd);
                    }
                }
                Record::Exit { space } => {
                    record.apply(pages);
                    uffds.remove(&space);
                    self.slots.iter_mut().filter(|s| **s == Some(space)).for_each(|s| *s = None);
                }
                other => drop(other.apply(pages)),
            }
        }
        let unfinished = self.journal.unfinished()?;
        let fork_slot = unfinished.as_ref().and_then(|u| u.fork_slot);
        // A session may have died before it emptied the slots of a child that had ended.
        for slot in (1..SPACES_MAX).filter(|s| self.slots[*s].is_none()) {
            if fork_slot != Some(slot as u64) {
                self.keeper.drop_slot(CHILDREN + 2 * slot as u32)?;
                self.keeper.drop_slot(CHILDREN + 2 * slot as u32 + 1)?;
            }
        }
        Ok((uffds, unfinished))
    }

    /// What is kept of a child. A slot that was used again later has another's: it is taken by the last.
    fn child(
        &mut self,
        slot: u64,
        id: SpaceId,
        pages: &Pages,
    ) -> Result<Option<(Uffd, TableMemory)>> {
        let index = slot as usize;
        if !(1..SPACES_MAX).contains(&index) {
            return Err(Error::Internal("the journal of the drain is damaged".into()));
        }
        let number = CHILDREN + 2 * index as u32;
        let (Some(uffd), Some(file)) = (self.keeper.take(number)?, self.keeper.take(number + 1)?)
        else {
            return Ok(None);
        };
        self.slots[index] = Some(id);
        let memory = table(&File::from(file), PageTable::len_bytes(pages.layout()))?;
        Ok(Some((Uffd::from_fd(uffd), memory)))
    }

    /// The userfaultfd of a child whose fork was read but not dealt with.
    pub fn unfinished_child(&self, unfinished: &Unfinished) -> Result<Option<Uffd>> {
        let Event::Fork { .. } = unfinished.event else { return Ok(None) };
        if let (Some(twin), Some(number)) = (&self.left_twin, unfinished.child)
            && let Ok(fd) = twin.get_fd(number)
        {
            return Ok(Some(Uffd::from_fd(fd)));
        }
        let Some(slot) = unfinished.fork_slot.filter(|s| (1..SPACES_MAX as u64).contains(s)) else {
            return Ok(None);
        };
        Ok(self.keeper.take(CHILDREN + 2 * slot as u32)?.map(Uffd::from_fd))
    }

    /// Nothing of the drain is needed any more.
    pub fn release(&self) {
        let children =
            (1..SPACES_MAX as u32).flat_map(|s| [CHILDREN + 2 * s, CHILDREN + 2 * s + 1]);
        for slot in
            [UFFD, RING, ACCOUNT, JOURNAL, PRIVATE, SHARED, TWIN].into_iter().chain(children)
        {
            if self.keeper.drop_slot(slot).is_err() {
                return; // Init has gone, and all with it.
            }
        }
    }
}
