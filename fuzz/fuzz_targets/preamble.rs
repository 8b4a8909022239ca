//! A stranger's first bytes. What is taken for a preamble must be the one we would send.
#![no_main]

use libfuzzer_sys::fuzz_target;
use slipstream_transport::preamble::{Decoded, decode, encode};

fuzz_target!(|bytes: &[u8]| {
    if let Decoded::Route(route) = decode(bytes) {
        assert_eq!(encode(route)[..], *bytes);
    }
});
