//! A manifest from a peer with the key: what passes the check can be laid out.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use slipstream_core::restore::check::check_manifest;
use slipstream_core::restore::decode::decode_manifest;
use slipstream_core::restore::memory::lazy_views;
use slipstream_faultd::dest::held::Account;
use slipstream_faultd::pages::{Layout, Region};

fuzz_target!(|bytes: &[u8]| {
    let Ok(manifest) = decode_manifest(bytes) else { return };
    if check_manifest(&manifest, &(0x1000_0000_0000..0x1001_0000_0000)).is_err() {
        return;
    }
    let regions = lazy_views(&manifest).into_iter().filter(|view| view.alias_of.is_none());
    let regions = regions.map(|view| Region {
        start: view.range.start,
        len_bytes: view.range.len_bytes,
        page_size: view.range.page_size,
        shared: view.shared,
        forks: view.forks,
    });
    let _ = Layout::new(regions.collect());
    // What a session notes of it for the next.
    let account = Account::new(&manifest, &[4096..8192], 1);
    let again = Account::decode(&*account.encode_to_vec()).expect("our own");
    assert_eq!(again, account);
});
