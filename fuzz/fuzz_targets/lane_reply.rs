//! Records of page replies from a peer with the key.
#![no_main]

use libfuzzer_sys::fuzz_target;
use slipstream_transport::Content;
use slipstream_transport::wire::{decode_reply, encode_reply_head};

fuzz_target!(|bytes: &[u8]| {
    let mut record = bytes;
    while let Ok((reply, rest)) = decode_reply(record) {
        let head = encode_reply_head(reply.address, reply.len_bytes, &reply.content);
        assert!(record.starts_with(&head), "not read as it was written");
        if let Content::Data(data) = reply.content {
            assert_eq!(data.len(), reply.len_bytes as usize);
        }
        assert!(rest.len() < record.len(), "no progress");
        record = rest;
    }
});
