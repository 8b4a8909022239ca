//! What the two sessions say to each other on the control connection.
//!
//! ```text
//! source                                   destination
//! Hello            ->                       looks at itself
//!                  <-                       Verdict (blockers, or a route for the lanes)
//! (where both have an adapter)
//! RdmaEndpoint     ->                       reads once by RDMA
//!                  <-                       RdmaVerdict
//! (lanes connect with that route)
//!                  <-  ClockProbe ×n  ->    ClockReading
//!                  <-                       Prepared
//! Stage ×n, StagedPages ×n ->               makes and fills them
//! StageEnd         ->
//!                  <-                       Staged (again, while much changes)
//! freeze, capture (too much changed: thaw, and Stage again)
//! Manifest         ->                       restore
//!                  <-                       Ready
//! park, journal
//! Commit           ->                       gate RUN
//!                  <-                       Resumed
//! PresentMap ×n, PresentMapEnd ->           drain
//! Regions ×n       ->                       reads what is in them by RDMA
//!                  <-                       Progress ×n, RdmaLost, Completed
//! drop the copy
//! ```
//! A connection that breaks after `Commit` was sent is replaced:
//! ```text
//! Rejoin           ->                       what the gate says; if it says nothing yet, NEVER from now on
//!                  <-                       Outcome
//! (lanes connect with the same route, and the drain goes on with the present map)
//! ```
//! Before `Commit` either side may send `Abort`, or just go away: nothing has happened then.

use prost::{Message, Oneof};
use slipstream_core::manifest::{Mapping, Memfd};

/// Largest message but the manifest.
pub const MESSAGE_LEN_MAX: usize = 16 << 20;
/// Largest manifest, pages that travel with it included.
pub const MANIFEST_LEN_MAX: usize = 256 << 20;
/// Page runs in one piece of the present map.
pub const RUNS_PER_MAP: usize = 4096;

/// From the source.
#[derive(Clone, PartialEq, Message)]
pub struct FromSource {
    /// The message.
    #[prost(oneof = "SourceMessage", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14")]
    pub message: Option<SourceMessage>,
}

/// Messages of the source.
#[derive(Clone, PartialEq, Oneof)]
pub enum SourceMessage {
    /// Opens a migration.
    #[prost(message, tag = "1")]
    Hello(Hello),
    /// Answers a clock probe.
    #[prost(message, tag = "2")]
    ClockReading(ClockReading),
    /// A manifest, encoded.
    #[prost(bytes, tag = "3")]
    Manifest(Vec<u8>),
    /// The source copy never runs again unless the destination says NEVER.
    #[prost(message, tag = "4")]
    Commit(Empty),
    /// Which pages exist, in ascending order.
    #[prost(message, tag = "5")]
    PresentMap(PresentMap),
    /// The present map is complete.
    #[prost(message, tag = "6")]
    PresentMapEnd(PresentMapEnd),
    /// The source gives up before commit.
    #[prost(message, tag = "7")]
    Abort(Reason),
    /// The source copy is gone, or runs on; the end.
    #[prost(message, tag = "8")]
    Bye(Empty),
    /// What is made before the freeze.
    #[prost(message, tag = "9")]
    Stage(Stage),
    /// Content of what was made.
    #[prost(message, tag = "10")]
    StagedPages(StagedPages),
    /// All of a round is sent.
    #[prost(message, tag = "11")]
    StageEnd(Empty),
    /// The first message on a new control connection, after the old one broke or its session died. The
    /// source copy is stopped, and waits to hear whether it was left for good.
    #[prost(message, tag = "12")]
    Rejoin(Rejoin),
    /// The source's end of the queue pairs; empty when it can't make them after all.
    #[prost(bytes, tag = "13")]
    RdmaEndpoint(Vec<u8>),
    /// Memory that can be read by RDMA from now on.
    #[prost(message, tag = "14")]
    Regions(Regions),
}

/// From the destination.
#[derive(Clone, PartialEq, Message)]
pub struct FromDestination {
    /// The message.
    #[prost(oneof = "DestinationMessage", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12")]
    pub message: Option<DestinationMessage>,
}

/// Messages of the destination.
#[derive(Clone, PartialEq, Oneof)]
pub enum DestinationMessage {
    /// What the destination thinks of the migration.
    #[prost(message, tag = "1")]
    Verdict(Verdict),
    /// Asks for the source's clocks.
    #[prost(message, tag = "2")]
    ClockProbe(Empty),
    /// The empty process waits.
    #[prost(message, tag = "3")]
    Prepared(Empty),
    /// All threads are at the gate.
    #[prost(message, tag = "4")]
    Ready(Ready),
    /// The gate is open.
    #[prost(message, tag = "5")]
    Resumed(Resumed),
    /// How the drain goes.
    #[prost(message, tag = "6")]
    Progress(Figures),
    /// Nothing is missing any more.
    #[prost(message, tag = "7")]
    Completed(Completed),
    /// The destination gives up; before `Resumed` it means NEVER.
    #[prost(message, tag = "8")]
    Failed(Reason),
    /// All of a round is in place.
    #[prost(message, tag = "9")]
    Staged(Empty),
    /// Answers `Rejoin`: what was decided.
    #[prost(message, tag = "10")]
    Outcome(Outcome),
    /// Whether reading by RDMA works: if not, why.
    #[prost(message, tag = "11")]
    RdmaVerdict(RdmaVerdict),
    /// Nothing is read by RDMA any more, and why; the rest of the drain goes over TCP.
    #[prost(message, tag = "12")]
    RdmaLost(Reason),
}

/// The source has come back.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Rejoin {
    /// The migration's name.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Bulk lanes it will open.
    #[prost(uint32, tag = "2")]
    pub bulk_lanes: u32,
    /// The source copy has been destroyed: no page will come any more.
    #[prost(bool, tag = "3")]
    pub gone: bool,
}

/// What was decided about a migration.
#[derive(Clone, PartialEq, Message)]
pub struct Outcome {
    /// The process runs here, or has run here. If not, it never will.
    #[prost(bool, tag = "1")]
    pub run: bool,
    /// The process's number as the destination host sees it.
    #[prost(int32, tag = "2")]
    pub host_pid: i32,
    /// Nothing is missing any more: no lanes are wanted.
    #[prost(message, optional, tag = "3")]
    pub completed: Option<Completed>,
    /// Why the process was ended here before its last page; empty when it was not.
    #[prost(string, tag = "4")]
    pub lost: String,
}

/// Nothing to say.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Empty {}

/// A reason for giving up.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Reason {
    /// One line, naming the object.
    #[prost(string, tag = "1")]
    pub reason: String,
    /// What to do about it.
    #[prost(string, tag = "2")]
    pub remedy: String,
}

/// Opens a migration.
#[derive(Clone, PartialEq, Message)]
pub struct Hello {
    /// The migration's name, hexadecimal.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Encoded `core::preflight::Requirements`.
    #[prost(bytes = "vec", tag = "2")]
    pub requirements: Vec<u8>,
    /// Mapped ranges now, as (start, end) pairs, ascending: where restore must keep out of the way.
    #[prost(uint64, repeated, tag = "3")]
    pub ranges: Vec<u64>,
    /// Threads now.
    #[prost(uint32, tag = "4")]
    pub threads: u32,
    /// Process number in its innermost namespace.
    #[prost(int32, tag = "5")]
    pub pid: i32,
    /// Boot id of the source host.
    #[prost(string, tag = "6")]
    pub boot_id: String,
    /// Clock offsets of the process's time namespace against its host, nanoseconds.
    #[prost(sint64, tag = "7")]
    pub monotonic_offset_ns: i64,
    /// The same for `CLOCK_BOOTTIME`.
    #[prost(sint64, tag = "8")]
    pub boottime_offset_ns: i64,
    /// Image of the process's vdso, to compare.
    #[prost(bytes = "vec", tag = "9")]
    pub vdso: Vec<u8>,
    /// Bulk lanes wanted.
    #[prost(uint32, tag = "10")]
    pub bulk_lanes: u32,
    /// Mapped files carry digests.
    #[prost(bool, tag = "11")]
    pub has_digests: bool,
    /// The source's adapters, for `slipstream_transport::rdma`; empty for TCP.
    #[prost(bytes = "vec", tag = "12")]
    pub rdma_candidates: Vec<u8>,
    /// READs of a page that shall be timed, one after the other: by a check, not by a move.
    #[prost(uint32, tag = "13")]
    pub timed_reads: u32,
    /// Most that prefetch may take, in bytes a second; zero for no limit.
    #[prost(uint64, tag = "14")]
    pub prefetch_limit: u64,
}

/// Whether reading by RDMA works.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RdmaVerdict {
    /// Why not; empty if it does.
    #[prost(string, tag = "1")]
    pub reason: String,
    /// Median of the timed READs, nanoseconds.
    #[prost(uint64, tag = "3")]
    pub read_ns_p50: u64,
    /// Their 99th percentile, nanoseconds.
    #[prost(uint64, tag = "4")]
    pub read_ns_p99: u64,
}

/// The process's clocks at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct ClockReading {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    #[prost(int64, tag = "1")]
    pub monotonic_ns: i64,
    /// `CLOCK_BOOTTIME`, nanoseconds.
    #[prost(int64, tag = "2")]
    pub boottime_ns: i64,
}

/// What stands in the way.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Blocker {
    /// The thing.
    #[prost(string, tag = "1")]
    pub object: String,
    /// Why.
    #[prost(string, tag = "2")]
    pub reason: String,
    /// What to do about it.
    #[prost(string, tag = "3")]
    pub remedy: String,
}

/// The destination's answer to `Hello`.
#[derive(Clone, PartialEq, Message)]
pub struct Verdict {
    /// Empty when nothing stands in the way.
    #[prost(message, repeated, tag = "1")]
    pub blockers: Vec<Blocker>,
    /// Route of the lanes, 16 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub route: Vec<u8>,
    /// Boot id of the destination host.
    #[prost(string, tag = "3")]
    pub boot_id: String,
    /// Bulk lanes to open.
    #[prost(uint32, tag = "4")]
    pub bulk_lanes: u32,
    /// Files can't be told by device and inode: say hello again with digests of mapped files.
    #[prost(bool, tag = "5")]
    pub wants_digests: bool,
    /// The destination's kernel has another vdso: no thread may be inside the old one.
    #[prost(bool, tag = "6")]
    pub foreign_vdso: bool,
    /// Which of the source's adapters the destination would read from, and its own; empty for TCP.
    #[prost(bytes = "vec", tag = "7")]
    pub rdma_pick: Vec<u8>,
    /// Why none.
    #[prost(string, tag = "8")]
    pub why_tcp: String,
}

/// What the new process gets before the freeze.
#[derive(Clone, PartialEq, Message)]
pub struct Stage {
    /// Memfds, without content.
    #[prost(message, repeated, tag = "1")]
    pub memfds: Vec<Memfd>,
    /// Private file mappings.
    #[prost(message, repeated, tag = "2")]
    pub mappings: Vec<Mapping>,
}

/// Pages of something made before the freeze.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct StagedPages {
    /// The memfd's id, or `slipstream_core::capture::presend::OWN_MEMORY`.
    #[prost(uint64, tag = "1")]
    pub object: u64,
    /// Offset or address of the first.
    #[prost(uint64, tag = "2")]
    pub address: u64,
    /// Their content.
    #[prost(bytes = "vec", tag = "3")]
    pub bytes: Vec<u8>,
}

/// All threads are at the gate.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Ready {
    /// From the last byte of the manifest to the last thread's arrival, microseconds.
    #[prost(uint64, tag = "1")]
    pub restore_us: u64,
}

/// The gate is open.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Resumed {
    /// The process's number as the destination host sees it.
    #[prost(int32, tag = "1")]
    pub host_pid: i32,
}

/// Which pages exist: runs as little-endian records of 16 bytes: start address (64 bits), length in
/// pages of 4 KiB (32 bits), flags (32 bits, bit 0: mapped by a huge page).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PresentMap {
    /// The records.
    #[prost(bytes = "vec", tag = "1")]
    pub runs: Vec<u8>,
}

/// The end of the present map.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct PresentMapEnd {
    /// Bytes of existing pages.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
}

/// Figures of a drain.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Figures {
    /// Pages there.
    #[prost(uint64, tag = "1")]
    pub pages_present: u64,
    /// Pages in all.
    #[prost(uint64, tag = "2")]
    pub pages_total: u64,
    /// Bytes received.
    #[prost(uint64, tag = "3")]
    pub bytes: u64,
    /// Faults.
    #[prost(uint64, tag = "4")]
    pub faults: u64,
    /// Median from event to wake-up, microseconds.
    #[prost(uint64, tag = "5")]
    pub fault_us_p50: u64,
    /// 99th percentile, microseconds.
    #[prost(uint64, tag = "6")]
    pub fault_us_p99: u64,
}

/// The end of the drain.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Completed {
    /// The figures.
    #[prost(message, required, tag = "1")]
    pub figures: Figures,
    /// From the gate's opening to the last page, microseconds.
    #[prost(uint64, tag = "2")]
    pub drain_us: u64,
    /// The process ended before.
    #[prost(bool, tag = "3")]
    pub exited: bool,
    /// Bytes that were read by RDMA.
    #[prost(uint64, tag = "4")]
    pub rdma_bytes: u64,
    /// Where the time of faults went.
    #[prost(message, optional, tag = "5")]
    pub fault_parts: Option<FaultParts>,
}

/// Where the time of faults went.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct FaultParts {
    /// From reading the event to the waking of the thread.
    #[prost(message, required, tag = "1")]
    pub whole: FaultPart,
    /// From reading the event to asking for the page.
    #[prost(message, required, tag = "2")]
    pub ask: FaultPart,
    /// From there to the page's arrival.
    #[prost(message, required, tag = "3")]
    pub network: FaultPart,
    /// From there to the waking of the thread.
    #[prost(message, required, tag = "4")]
    pub install: FaultPart,
}

/// How long a part of the faults took, in nanoseconds.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct FaultPart {
    /// Median.
    #[prost(uint64, tag = "1")]
    pub ns_p50: u64,
    /// 99th percentile.
    #[prost(uint64, tag = "2")]
    pub ns_p99: u64,
    /// Pairs: the upper end of a bucket, and how many are in it; ascending, empty buckets left out.
    #[prost(uint64, repeated, tag = "3")]
    pub histogram: Vec<u64>,
}

/// Regions of the source's memory: little-endian records of 20 bytes: start address (64 bits), length in bytes (64
/// bits), remote key (32 bits).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Regions {
    /// The records.
    #[prost(bytes = "vec", tag = "1")]
    pub records: Vec<u8>,
}

/// A region that can be read by RDMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionKey {
    /// First address, also the one that the source's adapter knows it by.
    pub start: u64,
    /// Length.
    pub len_bytes: u64,
    /// What to show to that adapter.
    pub rkey: u32,
}

impl Regions {
    /// Packs regions.
    pub fn pack(regions: impl Iterator<Item = RegionKey>) -> Self {
        let mut records = Vec::new();
        for r in regions {
            records.extend_from_slice(&r.start.to_le_bytes());
            records.extend_from_slice(&r.len_bytes.to_le_bytes());
            records.extend_from_slice(&r.rkey.to_le_bytes());
        }
        Self { records }
    }

    /// Unpacks regions; `None` when the blob is malformed. What they say is not checked.
    pub fn unpack(&self) -> Option<impl Iterator<Item = RegionKey> + '_> {
        let (records, rest) = self.records.as_chunks::<20>();
        let number = |raw: &[u8]| raw.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
        let key = move |raw: &[u8; 20]| RegionKey {
            start: number(&raw[..8]),
            len_bytes: number(&raw[8..16]),
            rkey: number(&raw[16..]) as u32,
        };
        rest.is_empty().then(|| records.iter().map(key))
    }
}

/// A run of the present map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PresentRun {
    /// Source address.
    pub start: u64,
    /// Length in bytes, a multiple of 4096.
    pub len_bytes: u64,
    /// Mapped by a huge page.
    pub huge: bool,
}

impl PresentMap {
    /// Packs runs; those longer than 2^32 pages don't exist.
    pub fn pack(runs: &[PresentRun]) -> Self {
        let mut bytes = Vec::with_capacity(runs.len() * 16);
        for r in runs {
            bytes.extend_from_slice(&r.start.to_le_bytes());
            bytes.extend_from_slice(&((r.len_bytes / 4096) as u32).to_le_bytes());
            bytes.extend_from_slice(&u32::from(r.huge).to_le_bytes());
        }
        Self { runs: bytes }
    }

    /// Unpacks runs; `None` when the blob is malformed (length, alignment, order).
    pub fn unpack(&self) -> Option<Vec<PresentRun>> {
        if !self.runs.len().is_multiple_of(16) || self.runs.len() / 16 > RUNS_PER_MAP {
            return None;
        }
        let mut last = 0;
        self.runs
            .chunks_exact(16)
            .map(|raw| {
                let start = u64::from_le_bytes(raw[..8].try_into().ok()?);
                let pages = u32::from_le_bytes(raw[8..12].try_into().ok()?);
                let flags = u32::from_le_bytes(raw[12..].try_into().ok()?);
                let len_bytes = u64::from(pages) * 4096;
                let sound = start.is_multiple_of(4096) && start >= last && pages > 0;
                last = start.checked_add(len_bytes)?;
                sound.then_some(PresentRun { start, len_bytes, huge: flags & 1 != 0 })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn present_map_round_trip() {
        let runs = vec![
            PresentRun { start: 4096, len_bytes: 8192, huge: false },
            PresentRun { start: 2 << 20, len_bytes: 2 << 20, huge: true },
        ];
        assert_eq!(PresentMap::pack(&runs).unpack(), Some(runs));
    }

    #[test]
    fn regions_round_trip() {
        let regions = [
            RegionKey { start: 4096, len_bytes: 1 << 20, rkey: 7 },
            RegionKey { start: 1 << 40, len_bytes: 8192, rkey: u32::MAX },
        ];
        let packed = Regions::pack(regions.into_iter());
        assert_eq!(packed.unpack().unwrap().collect::<Vec<_>>(), regions);
        assert!(Regions { records: vec![0; 19] }.unpack().is_none());
    }

    proptest! {
        #[test]
        fn unpacking_any_bytes_yields_ordered_runs(bytes: Vec<u8>) {
            if let Some(runs) = (PresentMap { runs: bytes }).unpack() {
                for pair in runs.windows(2) {
                    prop_assert!(pair[0].start + pair[0].len_bytes <= pair[1].start);
                }
            }
        }
    }
}
