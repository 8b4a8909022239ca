//! Records of page requests from a peer with the key.
#![no_main]

use libfuzzer_sys::fuzz_target;
use slipstream_transport::wire::{decode_request, encode_request};

fuzz_target!(|bytes: &[u8]| {
    let mut record = bytes;
    while let Ok((request, rest)) = decode_request(record) {
        assert!(request.is_valid());
        assert!(record.starts_with(&encode_request(request)), "not read as it was written");
        assert!(rest.len() < record.len(), "no progress");
        record = rest;
    }
});
