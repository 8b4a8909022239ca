//! What two adapters tell each other over the control channel.
#![no_main]

use libfuzzer_sys::fuzz_target;
use slipstream_transport::rdma::{decode_candidates, decode_endpoint, decode_pick};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(candidates) = decode_candidates(bytes) {
        assert!(candidates.len() < bytes.len());
        assert!(candidates.iter().all(|c| !c.device.contains(char::is_control)));
    }
    if let Ok(pick) = decode_pick(bytes) {
        assert!(4 * pick.end.queue_pairs.len() < bytes.len());
    }
    if let Ok(endpoint) = decode_endpoint(bytes) {
        assert!(endpoint.end.queue_pairs.iter().all(|number| *number < 1 << 24));
    }
});
