//! `slipstream check`: what would stop a process from moving, without moving it.

use crate::control::say_to_destination;
use crate::error::Result;
use crate::events::{Blocker, Preflight};
use crate::protocol::{Reason, SourceMessage};
use crate::rundir;
use crate::source::local::{self, Local};
use slipstream_core::capture::files::StdioPolicy;
use slipstream_transport::{Channel, Key, Purpose, Route, Timeouts, resolve};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Looks at a process, and if given asks a destination (`HOST:PORT` and key file).
pub fn check(
    pid: i32,
    stdio: &StdioPolicy,
    destination: Option<(String, PathBuf)>,
    timeout: Duration,
) -> Preflight {
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
    if let (Some(mut local), Some((address, key))) = (local, destination) {
        match ask(pid, &mut local, &address, &key, timeout) {
            Ok(found) => blockers.extend(found),
            Err(e) => blockers.push(Blocker {
                object: format!("destination {address}"),
                reason: e.to_string(),
                remedy: e.remedy().to_owned(),
            }),
        }
    }
    Preflight { blockers }
}

fn ask(
    pid: i32,
    local: &mut Local,
    address: &str,
    key: &Path,
    timeout: Duration,
) -> Result<Vec<Blocker>> {
    let key = Key::load(key)?;
    let addresses = resolve(address)?;
    let timeouts = Timeouts { connect: timeout, handshake: timeout };
    let channel = Channel::connect(&addresses, &key, Route::NEW, Purpose::Control, timeouts)?;
    let (mut sender, mut receiver) = channel.split();
    let id = rundir::new_id()?;
    let verdict = local::agree(&mut sender, &mut receiver, &id, pid, local, timeout)?;
    let reason = Reason { reason: "this was only a check".into(), remedy: String::new() };
    let _ = say_to_destination(&mut sender, SourceMessage::Abort(reason));
    Ok(verdict
        .blockers
        .into_iter()
        .map(|b| Blocker { object: b.object, reason: b.reason, remedy: b.remedy })
        .collect())
}
