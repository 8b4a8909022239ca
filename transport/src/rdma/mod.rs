//! Page lanes that read by RDMA: the destination's adapter fetches pages from the memory of the frozen process itself, and no
//! processor of the source takes part.
//!
//! A lane always has a TCP connection too. What no [`Regions`] cover is asked for there, and when RDMA fails, in whatever way,
//! everything is, from the page on that was not answered yet. Nothing here is encrypted: the adapters of both hosts and the network
//! between them see the pages.
//!
//! # How two hosts connect
//! Three opaque messages travel on the control channel: the source's *candidates* (ports that are up, with their addresses), the
//! destination's *pick* (one of them, and its own end), and the source's *endpoint* (its end, and a probe). Then the destination
//! reads the probe over every queue pair. What it reads decides, not what was told.

mod choice;
mod health;
mod lane;
mod reader;
mod reads;
mod regions;
mod source;
mod sys;
mod wire;

pub use choice::describe_adapters;
pub use health::Health;
pub use reader::Reader;
pub use regions::Regions;
pub use source::Source;
pub use wire::{decode_candidates, decode_endpoint, decode_pick};

/// Which adapter to use, where it is not to be chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Name of the device.
    pub device: Option<String>,
    /// Index of the GID of its port.
    pub gid_index: Option<u8>,
}

/// Bytes of the probe: more than any packet.
const PROBE_LEN: usize = 16 << 10;

/// Content of a probe, the same on both hosts.
fn probe_content(seed: u64) -> Vec<u8> {
    let mut word = seed | 1;
    let mut next = || {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word.to_le_bytes()
    };
    (0..PROBE_LEN / 8).flat_map(|_| next()).collect()
}
