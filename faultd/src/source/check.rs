//! `slipstream check`: what would stop a process from moving, without moving it.

use crate::carrier::Carrier;
use crate::control::say_to_destination;
use crate::error::Result;
use crate::events::{Blocker, Preflight};
use crate::protocol::{Reason, SourceMessage};
use crate::rundir;
use crate::source::local::{self, Local};
use crate::source::rdma::Offer;
use slipstream_core::capture::files::StdioPolicy;
use slipstream_transport::{Channel, Key, Purpose, Route, Timeouts, resolve};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Looks at a process, and if given asks a destination (`HOST:PORT` and key file); then it also tells what would
/// carry the pages, and why.
pub fn check(
    pid: i32,
    stdio: &StdioPolicy,
    destination: Option<(String, PathBuf)>,
    carrier: &Carrier,
    timeout: Duration,
) -> (Preflight, Option<String>) {
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
) -> Result<(Vec<Blocker>, Option<String>)> {
    let key = Key::load(key)?;
    let addresses = resolve(address)?;
    let timeouts = Timeouts { connect: timeout, handshake: timeout };
    let channel = Channel::connect(&addresses, &key, Route::NEW, Purpose::Control, timeouts)?;
    let offer = Offer::new(carrier, channel.local_ip());
    let (mut sender, mut receiver) = channel.split();
    let id = rundir::new_id()?;
    let candidates = &offer.candidates;
    let verdict = local::agree(&mut sender, &mut receiver, &id, pid, local, candidates, timeout)?;
    let mut transport = None;
    if verdict.blockers.is_empty() {
        let agreed = offer.connect(&verdict, &mut sender, &mut receiver, timeout)?;
        transport = Some(match agreed.source {
            Some(_) => "rdma: a page was read from here".to_owned(),
            None => format!("tcp: {}", agreed.why_tcp),
        });
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
