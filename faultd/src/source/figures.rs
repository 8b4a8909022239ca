//! Figures of a drain, as whoever watches is told them.

use crate::events::{self, SourceCost, per_second};
use crate::protocol::{Completed, FaultPart, Figures};
use std::time::Instant;

/// Buckets of a histogram, from a peer, that are passed on.
const BUCKETS_MAX: usize = 256;

/// Figures as they are told, with rates since `before`.
pub fn figures(now: &Figures, before: &Figures, elapsed_us: u64) -> events::Figures {
    let bytes = now.bytes.saturating_sub(before.bytes);
    let faults = now.faults.saturating_sub(before.faults);
    events::Figures {
        pages_present: now.pages_present,
        pages_total: now.pages_total,
        bytes: now.bytes,
        faults: now.faults,
        fault_us_p50: now.fault_us_p50,
        fault_us_p99: now.fault_us_p99,
        mb_per_s: per_second(bytes as f64 / 1e6, elapsed_us),
        faults_per_s: per_second(faults as f64, elapsed_us),
    }
}

/// A report of the drain, with the time that is left.
pub fn progress(now: &Figures, since: Instant, before: &Figures) -> events::Progress {
    let elapsed_us = since.elapsed().as_micros() as u64;
    let figures = figures(now, before, elapsed_us);
    let left = now.pages_total.saturating_sub(now.pages_present) as f64;
    let came = now.pages_present.saturating_sub(before.pages_present) as f64;
    let eta_s = (came > 0.0).then(|| left / came * elapsed_us as f64 / 1e6);
    events::Progress { phase: "drain".into(), figures, eta_s }
}

/// The end of a migration, as it is told. `why_tcp` is empty when nothing stood against RDMA.
pub fn completed(
    done: &Completed,
    total_us: u64,
    why_tcp: String,
    source: SourceCost,
) -> events::Completed {
    let parts = done.fault_parts.clone().unwrap_or_default();
    events::Completed {
        figures: figures(&done.figures, &Figures::default(), done.drain_us),
        total_us,
        drain_us: done.drain_us,
        transport: if done.rdma_bytes > 0 { "rdma" } else { "tcp" }.into(),
        why_tcp,
        rdma_bytes: done.rdma_bytes,
        fault_parts: events::FaultParts {
            whole: part(&parts.whole),
            ask: part(&parts.ask),
            network: part(&parts.network),
            install: part(&parts.install),
        },
        source,
        exited: done.exited,
    }
}

fn part(part: &FaultPart) -> events::FaultPart {
    let us = |ns: u64| ns as f64 / 1e3;
    let buckets = part.histogram.as_chunks::<2>().0.iter().take(BUCKETS_MAX);
    events::FaultPart {
        us_p50: us(part.ns_p50),
        us_p99: us(part.ns_p99),
        histogram_us: buckets.map(|[end, count]| (us(*end), *count)).collect(),
    }
}
