//! Which adapter of one host can reach which of the other: a guess, that a READ confirms.

use super::Selection;
use super::sys::{self, Context, Gid, GidKind, Port};
use super::wire::{Candidate, Link};
use crate::error::{Error, Result};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// Most GIDs of a port that are looked at.
const GIDS_MAX: u32 = 64;
/// READs asked for or answered at a time on one queue pair.
pub(super) const READS_MAX: u8 = 16;

/// A port of this host with an address, and the device it belongs to.
#[derive(Clone, Debug)]
pub(super) struct Local {
    pub(super) context: Arc<Context>,
    pub(super) candidate: Candidate,
}

/// All ports of this host that are up and selected, each once for every address it has. The error says why there is none.
pub(super) fn local_candidates(selection: &Selection) -> Result<Vec<Local>> {
    let contexts = sys::open_devices()?;
    if contexts.is_empty() {
        return Err(Error::Rdma { what: "this host has no RDMA adapter".into() });
    }
    let named = |c: &&Arc<Context>| selection.device.as_ref().is_none_or(|name| c.name() == name);
    let mut all = Vec::new();
    for context in contexts.iter().filter(named) {
        for port in ports(context).filter(|p| p.active) {
            let gids = gids(context, &port);
            let chosen = gids.filter(|g| selection.gid_index.is_none_or(|i| i == g.index));
            all.extend(chosen.filter_map(|gid| local(context, &port, gid)));
        }
    }
    if all.is_empty() {
        let device = selection.device.as_ref().map(|d| format!(" {d}")).unwrap_or_default();
        let gid = selection.gid_index.map(|i| format!(" with GID index {i}")).unwrap_or_default();
        let what = format!("no adapter{device} of this host has an active port{gid}");
        return Err(Error::Rdma { what });
    }
    Ok(all)
}

fn ports(context: &Context) -> impl Iterator<Item = Port> + '_ {
    (1..=context.ports()).filter_map(|number| context.port(number).ok())
}

fn gids(context: &Arc<Context>, port: &Port) -> impl Iterator<Item = Gid> {
    let (context, number) = (Arc::clone(context), port.number);
    (0..port.gids.min(GIDS_MAX)).filter_map(move |index| context.gid(number, index))
}

fn local(context: &Arc<Context>, port: &Port, gid: Gid) -> Option<Local> {
    let link = match (port.ethernet, gid.kind) {
        (true, GidKind::RoceV2) => Link::Ethernet,
        (false, GidKind::InfiniBand) => Link::InfiniBand,
        _ => return None,
    };
    let candidate = Candidate {
        device: context.name().to_owned(),
        port: port.number,
        link,
        lid: port.lid,
        mtu: port.mtu,
        reads_answered: context.reads_answered().min(READS_MAX),
        gid_index: gid.index,
        gid: gid.bytes,
    };
    Some(Local { context: Arc::clone(context), candidate })
}

/// The IP address that a `RoCEv2` GID is made of.
fn ip_of(gid: [u8; 16]) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(gid)).to_canonical()
}

fn is_link_local(gid: [u8; 16]) -> bool {
    gid[0] == 0xfe && gid[1] & 0xc0 == 0x80
}

/// How well two candidates fit: more is better, none can't work. `ends` are the addresses of the control connection.
fn fit(ours: &Candidate, theirs: &Candidate, ends: (IpAddr, IpAddr)) -> Option<u32> {
    match (ours.link, theirs.link) {
        // One subnet, by its prefix: routed InfiniBand is not for us.
        (Link::InfiniBand, Link::InfiniBand) => (ours.gid[..8] == theirs.gid[..8]).then_some(8),
        (Link::Ethernet, Link::Ethernet) => {
            let (ours, theirs) = (ours.gid, theirs.gid);
            let (here, there) = (ip_of(ours), ip_of(theirs));
            if here.is_ipv4() != there.is_ipv4() || is_link_local(ours) != is_link_local(theirs) {
                None
            } else if (here, there) == ends {
                Some(7)
            } else if is_link_local(ours) {
                Some(1)
            } else {
                Some(if here == ends.0 || there == ends.1 { 4 } else { 3 })
            }
        }
        _ => None,
    }
}

/// The best pair, as indexes into both lists.
pub(super) fn best_pair(
    ours: &[Candidate],
    theirs: &[Candidate],
    ends: (IpAddr, IpAddr),
) -> Option<(usize, usize)> {
    let pairs = (0..ours.len()).flat_map(|o| (0..theirs.len()).map(move |t| (o, t)));
    let rated = pairs.filter_map(|(o, t)| {
        let (ours, theirs) = (&ours[o], &theirs[t]);
        let rank = (fit(ours, theirs, ends)?, ours.mtu.min(theirs.mtu));
        Some((rank, (o, t)))
    });
    // The first of equals.
    rated.rev().max_by_key(|(rank, _)| *rank).map(|(_, pair)| pair)
}

/// This host's adapters in words, a line each; one line that says so where there are none.
pub fn describe_adapters() -> Vec<String> {
    let contexts = match sys::open_devices() {
        Ok(contexts) => contexts,
        Err(e) => return vec![e.to_string()],
    };
    let mut lines: Vec<String> = contexts
        .iter()
        .flat_map(|c| ports(c).map(|port| describe(c, &port)).collect::<Vec<_>>())
        .collect();
    if lines.is_empty() {
        lines.push("no adapter".into());
    }
    lines
}

fn describe(context: &Arc<Context>, port: &Port) -> String {
    let link = if port.ethernet { "Ethernet" } else { "InfiniBand" };
    let state = if port.active { "active" } else { "not active" };
    let mtu = 128u32 << port.mtu;
    let mut parts =
        vec![format!("{} port {}: {link}, {state}, MTU {mtu}", context.name(), port.number)];
    if !port.ethernet {
        parts.push(format!("LID {}", port.lid));
    }
    parts.extend(gids(context, port).map(|gid| {
        let kind = match gid.kind {
            GidKind::InfiniBand => "IB",
            GidKind::RoceV1 => "RoCEv1",
            GidKind::RoceV2 => "RoCEv2",
        };
        format!("GID {} {kind} {}", gid.index, ip_of(gid.bytes))
    }));
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(link: Link, gid: IpAddr, mtu: u8) -> Candidate {
        let gid = match gid {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let (device, reads_answered) = (String::from("d"), 16);
        Candidate { device, port: 1, link, lid: 1, mtu, reads_answered, gid_index: 0, gid }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn roce(text: &str) -> Candidate {
        candidate(Link::Ethernet, ip(text), 3)
    }

    #[test]
    fn the_addresses_of_the_control_connection_come_first() {
        let ours = [roce("fe80::1"), roce("10.1.0.1"), roce("10.2.0.1")];
        let theirs = [roce("fe80::2"), roce("10.1.0.2"), roce("10.2.0.2"), roce("2001:db8::2")];
        let ends = (ip("10.2.0.1"), ip("10.2.0.2"));
        assert_eq!(best_pair(&ours, &theirs, ends), Some((2, 2)));
        let elsewhere = (ip("192.0.2.1"), ip("192.0.2.2"));
        assert_eq!(best_pair(&ours, &theirs, elsewhere), Some((1, 1)));
        assert_eq!(best_pair(&ours[..1], &theirs, elsewhere), Some((0, 0)));
        assert_eq!(best_pair(&ours[..1], &theirs[1..], elsewhere), None);
    }

    #[test]
    fn links_and_subnets_do_not_mix() {
        let ends = (ip("10.2.0.1"), ip("10.2.0.2"));
        let ib = |prefix: &str| candidate(Link::InfiniBand, ip(prefix), 5);
        let roce = roce("10.2.0.2");
        assert_eq!(best_pair(&[ib("fe80::1")], std::slice::from_ref(&roce), ends), None);
        assert_eq!(
            best_pair(&[ib("fe80::1")], &[roce, ib("fec0::1"), ib("fe80::2")], ends),
            Some((0, 2))
        );
    }
}
