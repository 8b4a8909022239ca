//! The manifest: all of a process but its lazily moved pages, as data.
//!
//! It travels as one protobuf message, so fields may be added; numbers are never reused. Everything
//! here is what the kernel reported on the source, in the kernel's own units, so that restore is the
//! only place that interprets it. Decoding yields well-formed Rust values and nothing more: a
//! manifest from a peer is hostile until [`crate::restore`] has checked it.

use prost::Message;

/// Largest page of a mapping, in bytes: a page is asked for, and arrives, as a whole.
pub const PAGE_SIZE_MAX: u64 = 4 << 20;

/// All of one process but its lazily moved pages.
#[derive(Clone, PartialEq, Message)]
pub struct Manifest {
    /// What the threads share.
    #[prost(message, required, tag = "1")]
    pub process: Process,
    /// The address space, ascending by address, without gaps filled in.
    #[prost(message, repeated, tag = "2")]
    pub mappings: Vec<Mapping>,
    /// Threads; the first is the thread-group leader.
    #[prost(message, repeated, tag = "3")]
    pub threads: Vec<Thread>,
    /// Open file descriptions.
    #[prost(message, repeated, tag = "4")]
    pub files: Vec<OpenFile>,
    /// Descriptor numbers and the description each refers to.
    #[prost(message, repeated, tag = "5")]
    pub descriptors: Vec<Descriptor>,
    /// Pages sent with the manifest: those certain to be touched at once.
    #[prost(message, repeated, tag = "6")]
    pub pages: Vec<PageData>,
    /// Guard regions (`MADV_GUARD_INSTALL`), ascending.
    #[prost(message, repeated, tag = "7")]
    pub guards: Vec<AddressRange>,
    /// Pages that were sent before the freeze and are the file's again, in mappings that are
    /// [`Mapping::staged`]; ascending.
    #[prost(message, repeated, tag = "8")]
    pub reverted: Vec<AddressRange>,
}

/// A range of addresses.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct AddressRange {
    /// First address.
    #[prost(uint64, tag = "1")]
    pub start: u64,
    /// Address after the last.
    #[prost(uint64, tag = "2")]
    pub end: u64,
}

/// Process-wide state.
#[derive(Clone, PartialEq, Message)]
pub struct Process {
    /// Thread-group id in the innermost PID namespace of the source process.
    #[prost(int32, tag = "1")]
    pub pid: i32,
    /// Process group id in the same namespace; 0 when the group lives outside it.
    #[prost(int32, tag = "2")]
    pub pgid: i32,
    /// Session id in the same namespace; 0 when the session lives outside it.
    #[prost(int32, tag = "3")]
    pub sid: i32,
    /// Path of the executable, as `/proc/PID/exe` shows it.
    #[prost(bytes = "vec", tag = "4")]
    pub exe: Vec<u8>,
    /// Current directory.
    #[prost(bytes = "vec", tag = "5")]
    pub cwd: Vec<u8>,
    /// Root directory.
    #[prost(bytes = "vec", tag = "6")]
    pub root: Vec<u8>,
    /// File mode creation mask.
    #[prost(uint32, tag = "7")]
    pub umask: u32,
    /// `personality(2)` bits.
    #[prost(uint32, tag = "8")]
    pub personality: u32,
    /// `/proc/PID/oom_score_adj`.
    #[prost(int32, tag = "9")]
    pub oom_score_adj: i32,
    /// `prctl(PR_GET_DUMPABLE)`: 0, 1 or 2.
    #[prost(uint32, tag = "10")]
    pub dumpable: u32,
    /// `prctl(PR_GET_THP_DISABLE)`.
    #[prost(bool, tag = "11")]
    pub thp_disable: bool,
    /// `prctl(PR_GET_CHILD_SUBREAPER)`.
    #[prost(bool, tag = "12")]
    pub child_subreaper: bool,
    /// `/proc/PID/coredump_filter`.
    #[prost(uint32, tag = "13")]
    pub coredump_filter: u32,
    /// State components granted by `arch_prctl(ARCH_REQ_XCOMP_PERM)` (AMX).
    #[prost(uint64, tag = "14")]
    pub xcomp_perm: u64,
    /// Kernel `sigaction` structures of signals 1..=64 in order (handler, flags, restorer, mask).
    #[prost(message, repeated, tag = "15")]
    pub sigactions: Vec<SigAction>,
    /// Process-directed pending signals: raw `siginfo_t` of 128 bytes each, in queue order.
    #[prost(bytes = "vec", repeated, tag = "16")]
    pub pending: Vec<Vec<u8>>,
    /// `ITIMER_REAL`, `ITIMER_VIRTUAL`, `ITIMER_PROF` in order.
    #[prost(message, repeated, tag = "17")]
    pub itimers: Vec<Interval>,
    /// POSIX timers, ascending by id.
    #[prost(message, repeated, tag = "18")]
    pub timers: Vec<PosixTimer>,
    /// Resource limits, index = `RLIMIT_*`.
    #[prost(message, repeated, tag = "19")]
    pub rlimits: Vec<Rlimit>,
    /// The memory-descriptor fields of `prctl(PR_SET_MM_MAP)`.
    #[prost(message, required, tag = "20")]
    pub mm: MmFields,
    /// Raw auxiliary vector.
    #[prost(bytes = "vec", tag = "21")]
    pub auxv: Vec<u8>,
    /// `CLOCK_MONOTONIC` of the process at the freeze, in nanoseconds.
    #[prost(int64, tag = "22")]
    pub monotonic_ns: i64,
    /// Command name of the leader.
    #[prost(bytes = "vec", tag = "23")]
    pub comm: Vec<u8>,
    /// Commands registered with `membarrier(2)`, as a mask (0 when not known).
    #[prost(uint32, tag = "24")]
    pub membarrier: u32,
    /// Layout of the XSAVE areas ([`crate::arch::xstate::XsaveLayout::to_words`]).
    #[prost(uint64, repeated, tag = "26")]
    pub xsave_layout: Vec<u64>,
    /// What `mlockall(2)` says of mappings to come: `MCL_FUTURE`, perhaps with `MCL_ONFAULT`; or 0.
    #[prost(uint32, tag = "27")]
    pub future_locks: u32,
}

/// A kernel `struct sigaction` (64-bit layout).
#[derive(Clone, PartialEq, Message)]
pub struct SigAction {
    /// Handler address, or `SIG_DFL`/`SIG_IGN`.
    #[prost(uint64, tag = "1")]
    pub handler: u64,
    /// `SA_*` flags.
    #[prost(uint64, tag = "2")]
    pub flags: u64,
    /// Restorer address.
    #[prost(uint64, tag = "3")]
    pub restorer: u64,
    /// Signals blocked in the handler.
    #[prost(uint64, tag = "4")]
    pub mask: u64,
}

/// Time left and period, both in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Interval {
    /// Time left; 0 when disarmed.
    #[prost(int64, tag = "1")]
    pub value_ns: i64,
    /// Period; 0 for one shot.
    #[prost(int64, tag = "2")]
    pub interval_ns: i64,
}

/// A timer made by `timer_create(2)`.
#[derive(Clone, PartialEq, Message)]
pub struct PosixTimer {
    /// Id, which the program may hold.
    #[prost(int32, tag = "1")]
    pub id: i32,
    /// `CLOCK_*`.
    #[prost(int32, tag = "2")]
    pub clock: i32,
    /// `SIGEV_*`.
    #[prost(int32, tag = "3")]
    pub notify: i32,
    /// Signal number.
    #[prost(int32, tag = "4")]
    pub signal: i32,
    /// `sigev_value`.
    #[prost(uint64, tag = "5")]
    pub value: u64,
    /// Thread that `SIGEV_THREAD_ID` names (0 otherwise).
    #[prost(int32, tag = "6")]
    pub tid: i32,
    /// Time left and period.
    #[prost(message, required, tag = "7")]
    pub time: Interval,
    /// Overruns so far.
    #[prost(int32, tag = "8")]
    pub overrun: i32,
}

/// A soft and a hard limit; `u64::MAX` is no limit.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Rlimit {
    /// Soft limit.
    #[prost(uint64, tag = "1")]
    pub soft: u64,
    /// Hard limit.
    #[prost(uint64, tag = "2")]
    pub hard: u64,
}

/// Addresses in `struct prctl_mm_map`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
#[allow(missing_docs)] // named as in prctl(2)
pub struct MmFields {
    #[prost(uint64, tag = "1")]
    pub start_code: u64,
    #[prost(uint64, tag = "2")]
    pub end_code: u64,
    #[prost(uint64, tag = "3")]
    pub start_data: u64,
    #[prost(uint64, tag = "4")]
    pub end_data: u64,
    #[prost(uint64, tag = "5")]
    pub start_brk: u64,
    #[prost(uint64, tag = "6")]
    pub brk: u64,
    #[prost(uint64, tag = "7")]
    pub start_stack: u64,
    #[prost(uint64, tag = "8")]
    pub arg_start: u64,
    #[prost(uint64, tag = "9")]
    pub arg_end: u64,
    #[prost(uint64, tag = "10")]
    pub env_start: u64,
    #[prost(uint64, tag = "11")]
    pub env_end: u64,
}

/// What stands behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum MappingKind {
    /// Private anonymous memory (heap, stacks, arenas, reservations). Lazy.
    Anon = 0,
    /// Private mapping of a regular file; written pages travel with the manifest.
    FilePrivate = 1,
    /// Shared mapping of a regular file.
    FileShared = 2,
    /// Anonymous shared memory (`MAP_SHARED | MAP_ANONYMOUS`); `object` names it. Lazy.
    ShmemAnon = 3,
    /// Shared or private mapping of a memfd; `object` is the index in `Manifest::files`.
    Memfd = 4,
    /// Private anonymous huge pages (`MAP_HUGETLB`). Lazy, `page_size` is the huge page.
    HugetlbAnon = 5,
    /// The kernel's `[vdso]`.
    Vdso = 6,
    /// `[vvar]` and its kin, moved together with the vdso.
    Vvar = 7,
}

/// One mapping of the address space.
#[derive(Clone, PartialEq, Message)]
pub struct Mapping {
    /// First address.
    #[prost(uint64, tag = "1")]
    pub start: u64,
    /// Address after the last.
    #[prost(uint64, tag = "2")]
    pub end: u64,
    /// `PROT_*`.
    #[prost(uint32, tag = "3")]
    pub prot: u32,
    /// What stands behind it.
    #[prost(enumeration = "MappingKind", tag = "4")]
    pub kind: i32,
    /// Flags that matter, see [`vm_flag`].
    #[prost(uint32, tag = "5")]
    pub flags: u32,
    /// Offset in the file or object, in bytes.
    #[prost(uint64, tag = "6")]
    pub offset: u64,
    /// Path of the mapped file (empty when there is none).
    #[prost(bytes = "vec", tag = "7")]
    pub path: Vec<u8>,
    /// For [`MappingKind::ShmemAnon`] an id of the object within this manifest; for
    /// [`MappingKind::Memfd`] the index in [`Manifest::files`].
    #[prost(uint32, tag = "8")]
    pub object: u32,
    /// Page size in bytes: 4096 or a huge page.
    #[prost(uint32, tag = "9")]
    pub page_size: u32,
    /// Name given by `prctl(PR_SET_VMA_ANON_NAME)` (empty when there is none).
    #[prost(bytes = "vec", tag = "10")]
    pub name: Vec<u8>,
    /// The destination has it already, as (part of) a mapping that was sent before the freeze, with
    /// all written pages but those in [`Manifest::pages`] and [`Manifest::reverted`].
    #[prost(bool, tag = "11")]
    pub staged: bool,
}

/// Bits of [`Mapping::flags`].
pub mod vm_flag {
    /// `MAP_GROWSDOWN`.
    pub const GROWSDOWN: u32 = 1;
    /// `MAP_NORESERVE`.
    pub const NORESERVE: u32 = 1 << 1;
    /// `mlock(2)`.
    pub const LOCKED: u32 = 1 << 2;
    /// `MLOCK_ONFAULT`; together with [`LOCKED`].
    pub const LOCKONFAULT: u32 = 1 << 3;
    /// `MADV_DONTFORK`.
    pub const DONTFORK: u32 = 1 << 4;
    /// `MADV_WIPEONFORK`.
    pub const WIPEONFORK: u32 = 1 << 5;
    /// `MADV_DONTDUMP`.
    pub const DONTDUMP: u32 = 1 << 6;
    /// `MADV_HUGEPAGE`.
    pub const HUGEPAGE: u32 = 1 << 7;
    /// `MADV_NOHUGEPAGE`.
    pub const NOHUGEPAGE: u32 = 1 << 8;
    /// `MADV_MERGEABLE`.
    pub const MERGEABLE: u32 = 1 << 9;
    /// `MADV_SEQUENTIAL`.
    pub const SEQUENTIAL: u32 = 1 << 10;
    /// `MADV_RANDOM`.
    pub const RANDOM: u32 = 1 << 11;
    /// The mapping is shared (`MAP_SHARED`).
    pub const SHARED: u32 = 1 << 12;
    /// The file behind a shared mapping was open for writing, so that `mprotect` may add `PROT_WRITE`.
    pub const MAYWRITE: u32 = 1 << 13;
}

/// One thread.
#[derive(Clone, PartialEq, Message)]
pub struct Thread {
    /// Thread id in the innermost PID namespace.
    #[prost(int32, tag = "1")]
    pub tid: i32,
    /// Command name.
    #[prost(bytes = "vec", tag = "2")]
    pub comm: Vec<u8>,
    /// Raw `user_regs_struct`, as at the freeze (`orig_rax` tells the interrupted syscall).
    #[prost(bytes = "vec", tag = "3")]
    pub regs: Vec<u8>,
    /// Raw XSAVE area in the standard format (`NT_X86_XSTATE`).
    #[prost(bytes = "vec", tag = "4")]
    pub xstate: Vec<u8>,
    /// Blocked signals.
    #[prost(fixed64, tag = "5")]
    pub sigmask: u64,
    /// Thread-directed pending signals: raw `siginfo_t`, 128 bytes each.
    #[prost(bytes = "vec", repeated, tag = "6")]
    pub pending: Vec<Vec<u8>>,
    /// Alternate signal stack.
    #[prost(message, required, tag = "7")]
    pub altstack: AltStack,
    /// Head of the robust futex list and its length; 0 when none.
    #[prost(uint64, tag = "8")]
    pub robust_list: u64,
    /// Length given to `set_robust_list(2)`.
    #[prost(uint64, tag = "9")]
    pub robust_list_len: u64,
    /// `clear_child_tid` address; 0 when none.
    #[prost(uint64, tag = "10")]
    pub clear_child_tid: u64,
    /// rseq area; 0 when not registered.
    #[prost(uint64, tag = "11")]
    pub rseq: u64,
    /// Length of the rseq area.
    #[prost(uint32, tag = "12")]
    pub rseq_len: u32,
    /// Signature of abort handlers.
    #[prost(uint32, tag = "13")]
    pub rseq_sig: u32,
    /// Credentials.
    #[prost(message, required, tag = "14")]
    pub creds: Creds,
    /// Scheduling.
    #[prost(message, required, tag = "15")]
    pub sched: Sched,
    /// `prctl(PR_GET_TIMERSLACK)` in nanoseconds.
    #[prost(uint64, tag = "16")]
    pub timer_slack_ns: u64,
    /// `prctl(PR_GET_PDEATHSIG)`.
    #[prost(int32, tag = "17")]
    pub pdeathsig: i32,
    /// Time left of the relative timed wait the thread was in, nanoseconds; -1 when not in one or not known.
    #[prost(sint64, tag = "18")]
    pub time_left_ns: i64,
}

/// `stack_t`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct AltStack {
    /// Lowest address.
    #[prost(uint64, tag = "1")]
    pub sp: u64,
    /// `SS_*`.
    #[prost(uint32, tag = "2")]
    pub flags: u32,
    /// Size in bytes.
    #[prost(uint64, tag = "3")]
    pub size: u64,
}

/// Credentials of one thread.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Creds {
    /// Real, effective, saved, file-system uid.
    #[prost(uint32, repeated, tag = "1")]
    pub uids: Vec<u32>,
    /// Real, effective, saved, file-system gid.
    #[prost(uint32, repeated, tag = "2")]
    pub gids: Vec<u32>,
    /// Supplementary groups.
    #[prost(uint32, repeated, tag = "3")]
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding, ambient capabilities.
    #[prost(uint64, repeated, tag = "4")]
    pub caps: Vec<u64>,
    /// `PR_GET_SECUREBITS`.
    #[prost(uint32, tag = "5")]
    pub securebits: u32,
    /// `PR_GET_NO_NEW_PRIVS`.
    #[prost(bool, tag = "6")]
    pub no_new_privs: bool,
}

/// Scheduling of one thread.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Sched {
    /// `SCHED_*`.
    #[prost(uint32, tag = "1")]
    pub policy: u32,
    /// `sched_attr` flags.
    #[prost(uint64, tag = "2")]
    pub flags: u64,
    /// Nice value.
    #[prost(sint32, tag = "3")]
    pub nice: i32,
    /// Real-time priority.
    #[prost(uint32, tag = "4")]
    pub priority: u32,
    /// Deadline parameters: runtime, deadline, period, in nanoseconds.
    #[prost(uint64, repeated, tag = "5")]
    pub deadline_ns: Vec<u64>,
    /// Allowed CPUs as a bit mask, little endian; empty when all of the source's CPUs were allowed.
    #[prost(bytes = "vec", tag = "6")]
    pub affinity: Vec<u8>,
    /// `ioprio_get(2)`.
    #[prost(uint32, tag = "7")]
    pub ioprio: u32,
}

/// An open file description.
#[derive(Clone, PartialEq, Message)]
pub struct OpenFile {
    /// Status flags as `F_GETFL` reports them.
    #[prost(uint32, tag = "1")]
    pub flags: u32,
    /// Offset (regular files and directories).
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    /// What it is.
    #[prost(oneof = "FileKind", tags = "10, 11, 12, 13, 14, 15, 16, 17, 18")]
    pub kind: Option<FileKind>,
    /// `F_GETOWN`: owner of `SIGIO`, with type; 0 when none.
    #[prost(int32, tag = "3")]
    pub owner: i32,
    /// `F_GETSIG`.
    #[prost(int32, tag = "4")]
    pub owner_signal: i32,
}

/// What an open file description refers to.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum FileKind {
    /// A regular file, by path.
    #[prost(message, tag = "10")]
    Regular(PathFile),
    /// A directory, by path.
    #[prost(message, tag = "11")]
    Directory(PathFile),
    /// A harmless character device, by path (`/dev/null`, `zero`, `full`, `random`, `urandom`).
    #[prost(message, tag = "12")]
    Device(PathFile),
    /// One end of a pipe inside the process; `flags` tells which.
    #[prost(message, tag = "13")]
    Pipe(PipeEnd),
    /// eventfd.
    #[prost(message, tag = "14")]
    EventFd(EventFd),
    /// timerfd.
    #[prost(message, tag = "15")]
    TimerFd(TimerFd),
    /// signalfd: the mask.
    #[prost(fixed64, tag = "16")]
    SignalFd(u64),
    /// epoll set.
    #[prost(message, tag = "17")]
    Epoll(Epoll),
    /// memfd.
    #[prost(message, tag = "18")]
    Memfd(Memfd),
}

/// A file found by path, with what identifies it.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PathFile {
    /// Absolute path.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// Identity on the source.
    #[prost(message, required, tag = "2")]
    pub id: FileId,
}

/// What tells that a path names the same file on both hosts.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct FileId {
    /// Device number (comparable only on one boot of one host).
    #[prost(uint64, tag = "1")]
    pub dev: u64,
    /// Inode number.
    #[prost(uint64, tag = "2")]
    pub ino: u64,
    /// `st_mode`.
    #[prost(uint32, tag = "3")]
    pub mode: u32,
    /// `st_rdev` of devices.
    #[prost(uint64, tag = "4")]
    pub rdev: u64,
    /// Size in bytes.
    #[prost(uint64, tag = "5")]
    pub size: u64,
    /// Modification time in nanoseconds since 1970.
    #[prost(int64, tag = "6")]
    pub mtime_ns: i64,
    /// ELF build-id, or a SHA-256 of the content, taken before the freeze; empty when not needed.
    #[prost(bytes = "vec", tag = "7")]
    pub digest: Vec<u8>,
}

/// One end of a pipe whose both ends are inside the process.
#[derive(Clone, PartialEq, Message)]
pub struct PipeEnd {
    /// Id of the pipe within the manifest (its inode).
    #[prost(uint64, tag = "1")]
    pub pipe: u64,
    /// Capacity in bytes.
    #[prost(uint32, tag = "2")]
    pub capacity_bytes: u32,
    /// What is in it; carried by the first end only. One element per packet in packet mode.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub content: Vec<Vec<u8>>,
    /// True for the write end.
    #[prost(bool, tag = "4")]
    pub write_end: bool,
}

/// State of an eventfd.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct EventFd {
    /// Counter.
    #[prost(uint64, tag = "1")]
    pub count: u64,
    /// `EFD_SEMAPHORE`.
    #[prost(bool, tag = "2")]
    pub semaphore: bool,
}

/// State of a timerfd.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct TimerFd {
    /// `CLOCK_*`.
    #[prost(int32, tag = "1")]
    pub clock: i32,
    /// Expirations not yet read.
    #[prost(uint64, tag = "2")]
    pub ticks: u64,
    /// `TFD_TIMER_*` flags of the last `timerfd_settime`.
    #[prost(uint32, tag = "3")]
    pub settime_flags: u32,
    /// Time left and period.
    #[prost(message, required, tag = "4")]
    pub time: Interval,
    /// Deadline on the process's clock, in nanoseconds, of a timer set with `TFD_TIMER_ABSTIME`; else 0.
    #[prost(int64, tag = "5")]
    pub deadline_ns: i64,
}

/// An epoll set.
#[derive(Clone, PartialEq, Message)]
pub struct Epoll {
    /// What it watches.
    #[prost(message, repeated, tag = "1")]
    pub watches: Vec<EpollWatch>,
}

/// One entry of an epoll set.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct EpollWatch {
    /// Descriptor number it was added with.
    #[prost(int32, tag = "1")]
    pub fd: i32,
    /// `EPOLL*` bits.
    #[prost(uint32, tag = "2")]
    pub events: u32,
    /// User data.
    #[prost(fixed64, tag = "3")]
    pub data: u64,
}

/// A memfd. Most of its content is sent before the freeze ([`crate::capture::presend`]).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Memfd {
    /// Id within the manifest (its inode).
    #[prost(uint64, tag = "1")]
    pub inode: u64,
    /// Name given at creation.
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    /// Size in bytes.
    #[prost(uint64, tag = "3")]
    pub size: u64,
    /// `F_GET_SEALS`.
    #[prost(uint32, tag = "4")]
    pub seals: u32,
    /// Huge page size in bytes; 0 for ordinary pages.
    #[prost(uint64, tag = "5")]
    pub huge_page_size: u64,
    /// Mode bits.
    #[prost(uint32, tag = "6")]
    pub mode: u32,
    /// Content: data extents. Of one that was sent before the freeze: what has changed.
    #[prost(message, repeated, tag = "7")]
    pub extents: Vec<PageData>,
    /// The destination has it already, with the content of before the freeze.
    #[prost(bool, tag = "8")]
    pub staged: bool,
    /// What was sent before the freeze and reads as zeros now.
    #[prost(message, repeated, tag = "9")]
    pub zeros: Vec<AddressRange>,
}

/// A descriptor number.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Descriptor {
    /// The number.
    #[prost(int32, tag = "1")]
    pub fd: i32,
    /// Index in [`Manifest::files`].
    #[prost(uint32, tag = "2")]
    pub file: u32,
    /// `FD_CLOEXEC`.
    #[prost(bool, tag = "3")]
    pub cloexec: bool,
}

/// Bytes that belong at an address (or, for a memfd, at an offset).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PageData {
    /// Address or offset, in bytes.
    #[prost(uint64, tag = "1")]
    pub address: u64,
    /// The bytes; a whole number of pages for memory.
    #[prost(bytes = "vec", tag = "2")]
    pub bytes: Vec<u8>,
}
