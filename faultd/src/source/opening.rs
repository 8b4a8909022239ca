//! The first part of a migration: the source and the destination agree, while the process runs.

use crate::carrier::Wish;
use crate::clocks;
use crate::control::{hear_destination, say_to_destination, unexpected};
use crate::error::{Error, Result};
use crate::events;
use crate::failpoints;
use crate::protocol::{ClockReading, DestinationMessage, SourceMessage, Verdict};
use crate::source::interrupt::Interrupts;
use crate::source::local::{self, Local, Wants};
use crate::source::rdma::{Agreed, Offer};
use crate::source::session::SourceConfig;
use slipstream_core::preflight::Blocker;
use slipstream_transport::{Channel, Key, Purpose, Receiver, Route, Sender, Timeouts, resolve};
use std::net::SocketAddr;

/// Bulk lanes that are opened at most, whatever the destination says.
const BULK_LANES_MAX: u32 = 64;

/// The connections to the destination.
pub struct Connections {
    addresses: Vec<SocketAddr>,
    /// Both hosts'.
    pub key: Key,
    /// Of the control connection.
    pub sender: Sender,
    /// Of the control connection.
    pub receiver: Receiver,
    /// Until the page servers have them.
    pub lanes: Vec<Channel>,
    /// Whether pages go by RDMA.
    pub rdma: Agreed,
}

/// Why there is no agreement.
pub enum Hindrance {
    /// Things in the way, all of them.
    Blockers(Vec<events::Blocker>),
    /// Something failed.
    Error(Error),
}

impl<E: Into<Error>> From<E> for Hindrance {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// Connects, and hears what the destination says of the process.
pub fn negotiate(
    config: &SourceConfig,
    interrupts: &Interrupts,
    local: &mut Local,
    id: &str,
) -> std::result::Result<(Connections, Verdict), Hindrance> {
    let key = Key::load(&config.key)?;
    let addresses = resolve(&config.destination)?;
    let channel =
        Channel::connect(&addresses, &key, Route::NEW, Purpose::Control, timeouts(config))?;
    interrupts.close_on_interrupt(channel.closer());
    let offer = Offer::new(&config.carrier, channel.local_ip());
    let (mut sender, mut receiver) = channel.split();
    let (pid, timeout, prefetch_limit) = (config.pid, config.timeout, config.prefetch_limit);
    let wants = Wants { rdma_candidates: &offer.candidates, prefetch_limit, timed_reads: 0 };
    let verdict = local::agree(&mut sender, &mut receiver, id, pid, local, &wants, timeout)?;
    let mut blockers: Vec<_> = verdict
        .blockers
        .iter()
        .map(|b| event_blocker(&Blocker::new(&b.object, &b.reason, &b.remedy)))
        .collect();
    blockers.extend(offer.hindrance(&verdict).and_then(|why| no_tcp(config, why)));
    if !blockers.is_empty() {
        return Err(Hindrance::Blockers(blockers));
    }
    let rdma = offer.connect(&verdict, &mut sender, &mut receiver, timeout)?;
    if rdma.source.is_none()
        && let Some(blocker) = no_tcp(config, rdma.why_tcp.clone())
    {
        return Err(Hindrance::Blockers(vec![blocker]));
    }
    Ok((Connections { addresses, key, sender, receiver, lanes: Vec::new(), rdma }, verdict))
}

/// The blocker that it is to those who want RDMA or nothing.
fn no_tcp(config: &SourceConfig, reason: String) -> Option<events::Blocker> {
    let remedy = "`slipstream check` lists adapters; or use --transport auto".into();
    let object = "--transport rdma".into();
    (config.carrier.wish == Wish::Rdma).then_some(events::Blocker { object, reason, remedy })
}

fn timeouts(config: &SourceConfig) -> Timeouts {
    Timeouts { connect: config.timeout, handshake: config.timeout }
}

impl Connections {
    /// Connects the lanes of the route that the destination named.
    pub fn open_lanes(
        &mut self,
        config: &SourceConfig,
        interrupts: &Interrupts,
        verdict: &Verdict,
    ) -> Result<()> {
        let route: [u8; 16] = verdict
            .route
            .as_slice()
            .try_into()
            .map_err(|_| Error::Protocol("a malformed route".into()))?;
        let route = Route::from_bytes(route);
        let bulk = u16::try_from(verdict.bulk_lanes.clamp(1, BULK_LANES_MAX)).unwrap_or(1);
        for purpose in std::iter::once(Purpose::Urgent).chain((0..bulk).map(Purpose::Bulk)) {
            let lane =
                Channel::connect(&self.addresses, &self.key, route, purpose, timeouts(config))?;
            interrupts.close_on_interrupt(lane.closer());
            self.lanes.push(lane);
        }
        failpoints::pass("source-lanes")
    }

    /// Answers clock probes until the destination is prepared.
    pub fn await_prepared(&mut self, config: &SourceConfig) -> Result<()> {
        let offsets = clocks::namespace_offsets(&config.pid.to_string())?;
        loop {
            match hear_destination(&mut self.receiver, Some(config.timeout))? {
                DestinationMessage::ClockProbe(_) => {
                    let host = clocks::host_clocks()?;
                    let reading = ClockReading {
                        monotonic_ns: host.monotonic_ns + offsets.monotonic_ns,
                        boottime_ns: host.boottime_ns + offsets.boottime_ns,
                    };
                    say_to_destination(&mut self.sender, SourceMessage::ClockReading(reading))?;
                }
                DestinationMessage::Prepared(_) => return Ok(()),
                _ => return unexpected("a clock probe"),
            }
        }
    }
}

/// A blocker as it is reported.
pub fn event_blocker(b: &Blocker) -> events::Blocker {
    events::Blocker { object: b.object.clone(), reason: b.reason.clone(), remedy: b.remedy.clone() }
}

/// An error about the destination, as one of several blockers.
pub fn destination_blocker(e: &Error) -> events::Blocker {
    events::Blocker {
        object: "destination".into(),
        reason: e.to_string(),
        remedy: e.remedy().to_owned(),
    }
}
