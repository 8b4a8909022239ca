//! Messages of the control connection, from a peer with the key, and what is packed inside them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use slipstream_core::preflight::requirements::Requirements;
use slipstream_faultd::protocol::{FromDestination, FromSource, SourceMessage};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(envelope) = FromDestination::decode(bytes) {
        let again = FromDestination::decode(&*envelope.encode_to_vec());
        assert_eq!(again.as_ref(), Ok(&envelope), "not read as it was written");
    }
    let Ok(envelope) = FromSource::decode(bytes) else { return };
    let again = FromSource::decode(&*envelope.encode_to_vec());
    assert_eq!(again.as_ref(), Ok(&envelope), "not read as it was written");
    match envelope.message {
        Some(SourceMessage::Hello(hello)) => drop(Requirements::decode(&*hello.requirements)),
        Some(SourceMessage::PresentMap(map)) => {
            let runs = map.unpack().unwrap_or_default();
            for pair in runs.windows(2) {
                assert!(pair[0].start + pair[0].len_bytes <= pair[1].start, "out of order");
            }
        }
        _ => {}
    }
});
