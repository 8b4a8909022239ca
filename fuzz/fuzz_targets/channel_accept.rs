//! A stranger's bytes after the preamble: nobody gets in without the key, and the server neither hangs nor panics.
//! Also the greeting's decoder, which only a peer with the key reaches.
#![no_main]

use libfuzzer_sys::fuzz_target;
use slipstream_transport::handshake::Greeting;
use slipstream_transport::{Channel, Key, Timeouts};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

fuzz_target!(|bytes: &[u8]| {
    if let Some(greeting) = Greeting::decode(bytes) {
        assert_eq!(Greeting::decode(&greeting.encode()), Some(greeting));
    }
    let Ok((mut client, server)) = UnixStream::pair() else { return };
    // Few enough to fit the socket.
    let len = bytes.len().min(4096);
    if client.write_all(&bytes[..len]).is_err() || client.shutdown(Shutdown::Write).is_err() {
        return;
    }
    let key = Key::from_bytes([42; 32]);
    assert!(Channel::accept(server, &key, Timeouts::default()).is_err());
});
