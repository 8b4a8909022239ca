//! `slipstream check`: what would stop a process from moving, without moving it.

use crate::carrier::Carrier;
use crate::control::say_to_destination;
use crate::error::Result;
use crate::events::{Blocker, HostFact, Preflight, ReadTimes};
use crate::protocol::{Reason, SourceMessage};
use crate::rundir;
use crate::source::local::{self, Local, Wants};
use crate::source::rdma::{Agreed, Offer};
use slipstream_core::capture::files::StdioPolicy;
use slipstream_transport::{Channel, Key, Purpose, Route, Timeouts, resolve};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// READs of a page that the destination makes, one after the other.
const TIMED_READS: u32 = 1000;

/// Looks at a process, and if given asks a destination (`HOST:PORT` and key file); then it also tells what would
/// carry the pages, and why.
pub fn check(
    pid: i32,
    stdio: &StdioPolicy,
    destination: Option<(String, PathBuf)>,
    carrier: &Carrier,
    timeout: Duration,
) -> (Preflight, Option<HostFact>) {
    let (local, mut blockers) = match local::look(pid, stdio) {
        Ok(local) => (Some(local), Vec::new()),
        Err(found) => (
            None,
            found
                .into_iter()
                .map(|b| Blocker { object: b.object, reason: b.reason, remedy: b.remedy })
                .collect(),
        ),
    };
    let mut transport = None;
    if let (Some(mut local), Some((address, key))) = (local, destination) {
        match ask(pid, &mut local, (&address, &key), carrier, timeout) {
            Ok((found, chosen)) => {
                blockers.extend(found);
                transport = chosen;
            }
            Err(e) => blockers.push(Blocker {
                object: format!("destination {address}"),
                reason: e.to_string(),
                remedy: e.remedy().to_owned(),
            }),
        }
    }
    (Preflight { blockers }, transport)
}

fn ask(
    pid: i32,
    local: &mut Local,
    (address, key): (&str, &Path),
    carrier: &Carrier,
    timeout: Duration,
) -> Result<(Vec<Blocker>, Option<HostFact>)> {
    let key = Key::load(key)?;
    let addresses = resolve(address)?;
    let timeouts = Timeouts { connect: timeout, handshake: timeout };
    let channel = Channel::connect(&addresses, &key, Route::NEW, Purpose::Control, timeouts)?;
    let offer = Offer::new(carrier, channel.local_ip());
    let (mut sender, mut receiver) = channel.split();
    let id = rundir::new_id()?;
    let rdma_candidates = &offer.candidates;
    let wants = Wants { rdma_candidates, timed_reads: TIMED_READS, ..Wants::default() };
    let verdict = local::agree(&mut sender, &mut receiver, &id, pid, local, &wants, timeout)?;
    let mut transport = None;
    if verdict.blockers.is_empty() {
        let agreed = offer.connect(&verdict, &mut sender, &mut receiver, timeout)?;
        transport = Some(fact(&agreed));
    }
    let reason = Reason { reason: "this was only a check".into(), remedy: String::new() };
    let _ = say_to_destination(&mut sender, SourceMessage::Abort(reason));
    let blockers = verdict
        .blockers
        .into_iter()
        .map(|b| Blocker { object: b.object, reason: b.reason, remedy: b.remedy })
        .collect();
    Ok((blockers, transport))
}

fn fact(agreed: &Agreed) -> HostFact {
    let us = |ns: u64| ns as f64 / 1e3;
    let (p50, p99) = (us(agreed.read_ns_p50), us(agreed.read_ns_p99));
    let (detail, read_us) = match agreed.source {
        Some(_) => (
            format!("rdma: a page is read in {p50:.1} us (median; 99th percentile {p99:.1} us)"),
            Some(ReadTimes { p50, p99 }),
        ),
        None => (format!("tcp: {}", agreed.why_tcp), None),
    };
    HostFact { name: "transport".into(), ok: true, detail, read_us }
}
