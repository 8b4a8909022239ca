//! What can't be fetched on demand travels before the freeze: content of memfds (a read from one does
//! not fault) and written pages of private file mappings (which can't be registered for faults).
//!
//! While the process runs, *rounds* send what is new; a keyed hash of every page sent is kept. When it
//! is frozen all those pages are read and hashed once more, and what differs goes with the manifest, at
//! most [`CHANGED_BYTES_MAX`]. Comparing content is the one test that holds on every kernel: mappings
//! are written without any trace in the file's times, the accessed bits of page tables are cleared
//! without telling processors that have them cached, and write-protection by userfaultfd would have to
//! be put into the running program. What is sealed against writing needs no second look.

mod reading;
mod table;

use crate::capture::assemble::Prior;
use crate::capture::files::{CapturedFiles, FileOptions, capture_files, data_runs};
use crate::capture::page_hash::{HashKey, PAGE, PageHash};
use crate::error::{Error, Result};
use crate::manifest::{
    AddressRange, FileKind, Manifest, Mapping, MappingKind, Memfd, PageData, vm_flag,
};
use crate::proc::classify::{classify, memory_id};
use crate::proc::maps::MapLine;
use crate::proc::smaps;
use crate::sys::mem::ProcMem;
use crate::sys::pagemap::{Pagemap, Wanted};
use nix::sys::stat::fstat;
use reading::{Pages, hash_all, hash_piece, len_of, pieces};
use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use table::{Hashed, Table};

/// Content that may be sent while the process is stopped.
pub const CHANGED_BYTES_MAX: u64 = 4 << 20;
/// Written pages of private file mappings altogether: all are looked at while the process is stopped.
pub const WRITTEN_LEN_MAX: u64 = 256 << 20;
/// Memfds that are sent before the freeze; further ones travel while the process is stopped.
pub const STAGED_MEMFDS_MAX: usize = 1024;
/// Mappings that are sent before the freeze; further ones travel while the process is stopped.
pub const STAGED_MAPPINGS_MAX: usize = 4096;
/// Name of the process's own memory among the objects whose pages are sent: no inode is zero.
pub const OWN_MEMORY: u64 = 0;
/// Fewer written pages than these travel with the manifest as quickly as they are compared.
const WRITTEN_LEN_MIN: u64 = 1 << 20;
/// Seals with which content stays as it is: no writes and holes, no cutting off and growing again.
const CONSTANT: u32 = (libc::F_SEAL_WRITE | libc::F_SEAL_SHRINK) as u32;

/// Something for the destination, before the freeze.
#[derive(Debug)]
pub enum Piece<'a> {
    /// A memfd to be made.
    Memfd(&'a Memfd),
    /// A private file mapping to be made.
    Mapping(&'a Mapping),
    /// Pages of a memfd, or of the process ([`OWN_MEMORY`]).
    Pages {
        /// The memfd's id, or [`OWN_MEMORY`].
        object: u64,
        /// Offset or address of the first.
        address: u64,
        /// Their content.
        bytes: &'a [u8],
    },
}

/// What the destination has of the process before the freeze.
#[derive(Debug)]
pub struct Presend {
    key: HashKey,
    zero: PageHash,
    memfds: Vec<StagedMemfd>,
    mappings: Vec<StagedMapping>,
    private: Table,
}

#[derive(Debug)]
struct StagedMemfd {
    id: u64,
    /// Ours; keeps the inode number from being given to another one.
    file: File,
    table: Table,
    /// Was sealed before it was read as a whole.
    constant: bool,
}

#[derive(Debug)]
struct StagedMapping {
    mapping: Mapping,
    dev: u64,
    ino: u64,
}

/// What has changed in a memfd since it was sent.
#[derive(Debug, Default)]
pub struct MemfdChanges {
    /// Changed data.
    pub extents: Vec<PageData>,
    /// What reads as zeros now.
    pub zeros: Vec<AddressRange>,
    /// Bytes of both.
    pub bytes: u64,
}

/// What has changed in staged mappings.
#[derive(Debug, Default)]
pub struct PrivateChanges {
    /// Changed pages.
    pub pages: Vec<PageData>,
    /// Pages that are the file's again.
    pub reverted: Vec<AddressRange>,
}

/// The process as a round finds it.
struct Seen {
    lines: Vec<MapLine>,
    files: CapturedFiles,
    mappings: Vec<Mapping>,
}

impl Presend {
    /// Nothing has been sent.
    pub fn new() -> Result<Self> {
        let key = HashKey::random()?;
        let zero = key.hash(&[0; PAGE]);
        Ok(Self { key, zero, memfds: Vec::new(), mappings: Vec::new(), private: Table::default() })
    }

    /// Pages that will be compared while the process is stopped.
    pub fn pages(&self) -> u64 {
        let memfds = self.memfds.iter().filter(|m| !m.constant).map(|m| m.table.len());
        memfds.sum::<usize>() as u64 + self.private.len() as u64
    }

    /// Hands everything that is new since the last round to `out`; returns how many bytes of pages.
    /// `again` is for a process whose changes were too many in the freeze: then even few pages of
    /// private mappings are sent ahead.
    pub fn round<E: From<Error>>(
        &mut self,
        pid: i32,
        prior: &Prior,
        again: bool,
        out: &mut dyn FnMut(Piece<'_>) -> std::result::Result<(), E>,
    ) -> std::result::Result<u64, E> {
        // What can't be moved now is refused in the freeze, by name.
        let Some(seen) = look(pid, prior)? else { return Ok(0) };
        let (mut sent, mut known) = (0, HashSet::new());
        for file in &seen.files.files {
            if let Some(FileKind::Memfd(memfd)) = &file.kind
                && known.insert(memfd.inode)
            {
                sent += self.memfd_round(memfd, &seen.files, out)?;
            }
        }
        sent += self.private_round(pid, &seen, again, out)?;
        Ok(sent)
    }

    fn memfd_round<E: From<Error>>(
        &mut self,
        memfd: &Memfd,
        files: &CapturedFiles,
        out: &mut dyn FnMut(Piece<'_>) -> std::result::Result<(), E>,
    ) -> std::result::Result<u64, E> {
        let at = match self.memfds.iter().position(|m| m.id == memfd.inode) {
            Some(at) => at,
            None if self.memfds.len() >= STAGED_MEMFDS_MAX => return Ok(0),
            None => {
                let Some(file) = open_memfd(memfd, files) else { return Ok(0) };
                out(Piece::Memfd(memfd))?;
                let table = Table::default();
                self.memfds.push(StagedMemfd { id: memfd.inode, file, table, constant: false });
                self.memfds.len() - 1
            }
        };
        let Presend { memfds, key, zero, .. } = self;
        let staged = &mut memfds[at];
        if staged.constant {
            return Ok(0);
        }
        let runs = data_runs(&staged.file, memfd)?;
        let round = Round { key, object: staged.id, absent: Some(*zero) };
        let sent = round.send(&Pages::Object(&staged.file), &runs, &mut staged.table, out)?;
        staged.constant = memfd.seals & CONSTANT == CONSTANT;
        Ok(sent)
    }

    fn private_round<E: From<Error>>(
        &mut self,
        pid: i32,
        seen: &Seen,
        again: bool,
        out: &mut dyn FnMut(Piece<'_>) -> std::result::Result<(), E>,
    ) -> std::result::Result<u64, E> {
        let map = Pagemap::open(pid)?;
        let mut written = Vec::new();
        for v in seen.mappings.iter().filter(|v| v.kind == MappingKind::FilePrivate as i32) {
            let runs = written_runs(v, &map)?;
            if !runs.is_empty() {
                written.push((v, runs));
            }
        }
        let total: u64 = written.iter().map(|(_, runs)| len_of(runs)).sum();
        if total > WRITTEN_LEN_MAX {
            return Err(Error::Refused(too_much_written(total)).into());
        }
        if total < WRITTEN_LEN_MIN && !again && self.mappings.is_empty() {
            return Ok(0);
        }
        for (v, _) in &written {
            if let Some(staged) = self.new_mapping(v, &seen.lines) {
                out(Piece::Mapping(&staged.mapping))?;
                self.mappings.push(staged);
            }
        }
        let mem = ProcMem::open(pid)?;
        let staged = |v: &Mapping| self.builds_on(v, &seen.lines);
        let runs: Vec<Range<u64>> =
            written.into_iter().filter(|(v, _)| staged(v)).flat_map(|(_, runs)| runs).collect();
        let round = Round { key: &self.key, object: OWN_MEMORY, absent: None };
        round.send(&Pages::Process(pid, &mem), &runs, &mut self.private, out)
    }

    /// A mapping that may be sent: where none was sent before.
    fn new_mapping(&self, v: &Mapping, lines: &[MapLine]) -> Option<StagedMapping> {
        let free = |s: &StagedMapping| s.mapping.end <= v.start || v.end <= s.mapping.start;
        let room = self.mappings.len() < STAGED_MAPPINGS_MAX && self.mappings.iter().all(free);
        let line = line_of(v, lines)?;
        room.then(|| StagedMapping { mapping: v.clone(), dev: line.dev, ino: line.ino })
    }

    /// True if `v` shows the same part of the same file as a mapping that was sent.
    pub fn builds_on(&self, v: &Mapping, lines: &[MapLine]) -> bool {
        let Some(line) = line_of(v, lines) else { return false };
        self.mappings
            .iter()
            .any(|s| (s.dev, s.ino) == (line.dev, line.ino) && continues(&s.mapping, v))
    }

    /// What changed in a memfd of a frozen process; `None` if it was not sent. Fails if it is more than
    /// `bytes_max`.
    pub fn memfd_changes(&self, memfd: &Memfd, bytes_max: u64) -> Result<Option<MemfdChanges>> {
        let Some(staged) = self.memfds.iter().find(|m| m.id == memfd.inode) else {
            return Ok(None);
        };
        if staged.constant {
            return Ok(Some(MemfdChanges::default()));
        }
        let pages = Pages::Object(&staged.file);
        let now = hash_all(&self.key, &pages, &data_runs(&staged.file, memfd)?)?;
        let difference = staged.table.compare(&now, Some(self.zero));
        let bytes = difference.bytes();
        if bytes > bytes_max {
            let object = format!("memfd {}", String::from_utf8_lossy(&memfd.name));
            return Err(Error::Changing { object, bytes });
        }
        let mut extents = read_pages(&pages, &difference.changed)?;
        for extent in &mut extents {
            let len = memfd.size.saturating_sub(extent.address);
            extent.bytes.truncate(len.try_into().unwrap_or(usize::MAX));
        }
        // What was cut off needs no zeros.
        let inside = |r: &Range<u64>| AddressRange { start: r.start, end: r.end.min(memfd.size) };
        let zeros = difference.gone.iter().map(inside).filter(|r| r.start < r.end).collect();
        Ok(Some(MemfdChanges { extents, zeros, bytes }))
    }

    /// What changed in the mappings of a frozen process that are marked as staged. Fails if it is more
    /// than `bytes_max`.
    pub fn private_changes(
        &self,
        pid: i32,
        m: &Manifest,
        mem: &ProcMem,
        map: &Pagemap,
        bytes_max: u64,
    ) -> Result<PrivateChanges> {
        let staged: Vec<&Mapping> = m.mappings.iter().filter(|v| v.staged).collect();
        if staged.is_empty() {
            return Ok(PrivateChanges::default());
        }
        let mut runs = Vec::new();
        for v in &staged {
            runs.extend(written_runs(v, map)?);
        }
        let pages = Pages::Process(pid, mem);
        let now = hash_all(&self.key, &pages, &runs)?;
        let mut difference = self.private.compare(&now, None);
        // Pages of mappings that are no more go with what the destination made for them.
        difference.gone = staged
            .iter()
            .flat_map(|v| difference.gone.iter().map(|r| r.start.max(v.start)..r.end.min(v.end)))
            .filter(|r| r.start < r.end)
            .collect();
        let bytes = difference.bytes();
        if bytes > bytes_max {
            let object = "private file mappings".to_owned();
            return Err(Error::Changing { object, bytes });
        }
        let range = |r: &Range<u64>| AddressRange { start: r.start, end: r.end };
        Ok(PrivateChanges {
            pages: read_pages(&pages, &difference.changed)?,
            reverted: difference.gone.iter().map(range).collect(),
        })
    }
}

/// One object in one round.
struct Round<'a> {
    key: &'a HashKey,
    object: u64,
    /// Hash of pages that need not be sent if the destination has none there.
    absent: Option<PageHash>,
}

impl Round<'_> {
    /// Sends the pages of `runs` that differ from what the destination has.
    fn send<E: From<Error>>(
        &self,
        pages: &Pages<'_>,
        runs: &[Range<u64>],
        table: &mut Table,
        out: &mut dyn FnMut(Piece<'_>) -> std::result::Result<(), E>,
    ) -> std::result::Result<u64, E> {
        let (mut sent, mut bytes) = (Vec::new(), Vec::new());
        let mut hashed = Vec::new();
        for piece in pieces(runs) {
            bytes.resize(len_of(&piece) as usize, 0);
            if pages.read(&piece, &mut bytes).is_err() {
                // Unmapped meanwhile: the next look tells.
                continue;
            }
            hashed.clear();
            hash_piece(self.key, &piece, &bytes, &mut hashed);
            let differs = |h: &Hashed| table.get(h.address).or(self.absent) != Some(h.hash);
            let mut at = 0;
            while at < hashed.len() {
                let first = at;
                while at < hashed.len()
                    && differs(&hashed[at])
                    && hashed[at].address == hashed[first].address + ((at - first) * PAGE) as u64
                {
                    at += 1;
                }
                if at == first {
                    at += 1;
                    continue;
                }
                let bytes = &bytes[first * PAGE..at * PAGE];
                out(Piece::Pages { object: self.object, address: hashed[first].address, bytes })?;
                sent.extend_from_slice(&hashed[first..at]);
            }
        }
        table.update(&sent);
        Ok((sent.len() * PAGE) as u64)
    }
}

/// True if `v` shows what `staged` shows there. Both hosts decide by this.
pub fn continues(staged: &Mapping, v: &Mapping) -> bool {
    let private = MappingKind::FilePrivate as i32;
    let part = |m: &Mapping| m.offset.wrapping_sub(m.start);
    let reserve = |m: &Mapping| m.flags & vm_flag::NORESERVE;
    staged.kind == private
        && v.kind == private
        && staged.start <= v.start
        && v.end <= staged.end
        && part(staged) == part(v)
        && staged.path == v.path
        && reserve(staged) == reserve(v)
}

/// Why so many written pages can't be moved.
pub fn too_much_written(bytes: u64) -> String {
    format!(
        "{} MiB of private file mappings were written, and at most {} MiB can be moved; map the files \
         shared, or read them into memory",
        bytes >> 20,
        WRITTEN_LEN_MAX >> 20
    )
}

/// Runs of written pages of a private file mapping.
pub fn written_runs(v: &Mapping, map: &Pagemap) -> Result<Vec<Range<u64>>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    map.scan(v.start, v.end, Wanted::Written, &mut |r| match runs.last_mut() {
        Some(last) if last.end == r.start => last.end = r.end,
        _ => runs.push(r.start..r.end),
    })?;
    Ok(runs)
}

fn read_pages(pages: &Pages<'_>, runs: &[Range<u64>]) -> Result<Vec<PageData>> {
    let read = |run: &Range<u64>| {
        let mut bytes = vec![0u8; (run.end - run.start) as usize];
        pages.read(std::slice::from_ref(run), &mut bytes)?;
        Ok(PageData { address: run.start, bytes })
    };
    runs.iter().map(read).collect()
}

fn line_of<'a>(v: &Mapping, lines: &'a [MapLine]) -> Option<&'a MapLine> {
    let at = lines.binary_search_by_key(&v.start, |l| l.start).ok()?;
    Some(&lines[at])
}

fn look(pid: i32, prior: &Prior) -> Result<Option<Seen>> {
    let entries = smaps::read(pid)?;
    let lines: Vec<MapLine> = entries.iter().map(|e| e.line.clone()).collect();
    let options = FileOptions { stdio: &prior.stdio, holders: &prior.holders, content: None };
    let Ok(files) = capture_files(pid, &lines, &options) else { return Ok(None) };
    let Ok(mappings) = classify(&lines, &entries, &files.files) else { return Ok(None) };
    Ok(Some(Seen { lines, files, mappings }))
}

/// Opens a memfd by where it was found. `None` if something else is there by now.
fn open_memfd(memfd: &Memfd, files: &CapturedFiles) -> Option<File> {
    let file = File::open(files.memfd_paths.get(&memfd.inode)?).ok()?;
    let stat = fstat(&file).ok()?;
    (memory_id(stat.st_dev, stat.st_ino) == memfd.inode).then_some(file)
}
