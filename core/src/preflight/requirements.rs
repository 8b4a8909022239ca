//! What a process needs at its destination, as a message to it.

use crate::manifest::{FileId, Rlimit};
use prost::Message;

/// What a process needs. Decoded from a peer, so [`Requirements::check`] it first.
#[derive(Clone, PartialEq, Message)]
pub struct Requirements {
    /// Process id in its own namespace.
    #[prost(int32, tag = "1")]
    pub pid: i32,
    /// Thread ids in the same namespace.
    #[prost(int32, repeated, tag = "2")]
    pub tids: Vec<i32>,
    /// `/proc/sys/kernel/random/boot_id` of the source host.
    #[prost(string, tag = "3")]
    pub boot_id: String,
    /// Files that must be there.
    #[prost(message, repeated, tag = "4")]
    pub files: Vec<RequiredFile>,
    /// User-visible CPU features, as `/proc/cpuinfo` names them, sorted.
    #[prost(string, repeated, tag = "5")]
    pub cpu_flags: Vec<String>,
    /// Resource limits, index = `RLIMIT_*`.
    #[prost(message, repeated, tag = "6")]
    pub rlimits: Vec<Rlimit>,
    /// Bytes of memory that will be resident at the latest when all pages have arrived.
    #[prost(uint64, tag = "7")]
    pub memory_bytes: u64,
    /// Huge pages.
    #[prost(message, repeated, tag = "8")]
    pub huge_pages: Vec<HugePages>,
    /// Number of mappings.
    #[prost(uint32, tag = "9")]
    pub mappings: u32,
    /// Allowed CPUs as a bit mask, little endian; empty when all of the source's are allowed.
    #[prost(bytes = "vec", tag = "10")]
    pub affinity: Vec<u8>,
    /// Union over the threads: inheritable, permitted, effective, bounding, ambient capabilities.
    #[prost(uint64, repeated, tag = "11")]
    pub caps: Vec<u64>,
    /// Descriptors needed while restoring: above the highest number.
    #[prost(uint32, tag = "12")]
    pub descriptors: u32,
    /// Capacity of the largest pipe in bytes.
    #[prost(uint32, tag = "13")]
    pub pipe_bytes: u32,
    /// Bytes of locked memory.
    #[prost(uint64, tag = "14")]
    pub locked_bytes: u64,
    /// It maps anonymous shared memory.
    #[prost(bool, tag = "15")]
    pub shared_memory: bool,
}

/// Huge pages of one size.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct HugePages {
    /// Size of one in bytes.
    #[prost(uint64, tag = "1")]
    pub size: u64,
    /// How many.
    #[prost(uint64, tag = "2")]
    pub count: u64,
}

/// What a file is needed for, which decides how it is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum FileRole {
    /// Mapped: the content must be the same.
    Mapped = 0,
    /// Open: size and modification time must be the same on another host.
    Open = 1,
    /// A directory, device or file made by the kernel: it must be there and of the same type.
    Present = 2,
}

/// A file that must be there.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RequiredFile {
    /// Absolute path.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// Identity on the source.
    #[prost(message, required, tag = "2")]
    pub id: FileId,
    /// What it is needed for.
    #[prost(enumeration = "FileRole", tag = "3")]
    pub role: i32,
    /// It is written to.
    #[prost(bool, tag = "4")]
    pub writable: bool,
    /// The object that needs it, for messages: `fd 7`, `mapping 7f..`, `current directory`.
    #[prost(string, tag = "5")]
    pub object: String,
}

const FILES_MAX: usize = 1 << 20;
const THREADS_MAX: usize = 1 << 20;

impl Requirements {
    /// Refuses what no source sends.
    pub fn check(&self) -> crate::Result<()> {
        let text = |s: &String| s.len() <= 256;
        let path = |p: &[u8]| {
            p.first() == Some(&b'/') && !p.contains(&0) && p.len() < libc::PATH_MAX as usize
        };
        let good = self.pid > 0
            && !self.tids.is_empty()
            && self.tids.len() <= THREADS_MAX
            && self.tids.iter().all(|tid| *tid > 0)
            && text(&self.boot_id)
            && self.files.len() <= FILES_MAX
            && self
                .files
                .iter()
                .all(|f| path(&f.path) && text(&f.object) && f.id.digest.len() <= 64)
            && self.cpu_flags.len() <= 1024
            && self.cpu_flags.iter().all(text)
            && self.rlimits.len() <= 64
            && self.huge_pages.len() <= 16
            && self.huge_pages.iter().all(|h| h.size.is_power_of_two() && h.size >= 1024)
            && self.affinity.len() <= 8192
            && self.caps.len() == 5;
        if good { Ok(()) } else { Err(crate::Error::Manifest("requirements".into())) }
    }
}
