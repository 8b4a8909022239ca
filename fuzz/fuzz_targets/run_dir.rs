//! Files of the run directory, and lines that sessions write: cut short, or of another version.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use slipstream_faultd::agent::SessionArgs;
use slipstream_faultd::commit_protocol::Journal;
use slipstream_faultd::events::Event;
use slipstream_faultd::protocol::Completed;
use slipstream_faultd::rundir;
use slipstream_faultd::source::{commit, record};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

fuzz_target!(|bytes: &[u8]| {
    let _ = Completed::decode(bytes);
    if let Ok(record) = record::Record::decode(bytes) {
        let _ = (record.route(), record.timeout(), record.manifest());
    }
    // Whatever stands there was written after something was given away.
    assert_ne!(Journal::parse(Some(bytes)), Journal::Before);
    if let Some(registers) = commit::parse_registers(bytes) {
        assert!(registers.len() <= bytes.len() / 16);
    }
    let args: Vec<_> =
        bytes.split(|b| *b == 0).map(|arg| OsString::from_vec(arg.to_vec())).collect();
    let _ = SessionArgs::from_args(&args);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = Event::parse(text);
        assert!(!rundir::is_id(text) || !text.contains('/'));
    }
});
