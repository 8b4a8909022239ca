//! The journal of a drain, as a session that was killed at any moment has left it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use slipstream_core::sys::mapped::memfd;
use slipstream_faultd::dest::journal::Journal;
use std::io::Write;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut file) = memfd(c"fuzz", 0) else { return };
    // A header of zeros but for its first words: so that short inputs have records.
    let (head, records) = bytes.split_at(bytes.len().min(128));
    let mut image = vec![0u8; 4096];
    image[..head.len()].copy_from_slice(head);
    image.extend_from_slice(records);
    if file.write_all(&image).is_err() {
        return;
    }
    let Ok(journal) = Journal::open(file) else { return };
    if let Ok(records) = journal.records() {
        assert_eq!(records.len(), journal.len());
    }
    let _ = journal.unfinished();
});
