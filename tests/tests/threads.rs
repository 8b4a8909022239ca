//! Threads come along: ids, registers, signals, scheduling, and the system call each was in.

use slipstream_tests::moves::moves;
use slipstream_tests::{Build, Linkage};

macro_rules! moved_programs {
    ($($name:ident),* $(,)?) => {
        $(#[test] fn $name() { moves(Build::dynamic(stringify!($name)), &[]); })*
    };
}

moved_programs! {
    tids,
    thread_names,
    signal_masks,
    pending_signals,
    alternate_stacks,
    robust_mutex,
    joins,
    mutexes,
    rseq,
    scheduling,
    segment_bases,
    registers,
    waits_timed,
    waits_endless,
    sleeping_leader,
}

#[test]
fn tids_musl_static() {
    moves(Build { name: "tids", linkage: Linkage::MuslStatic }, &[]);
}

#[test]
fn tids_static() {
    moves(Build { name: "tids", linkage: Linkage::Static }, &[]);
}

#[test]
fn mutexes_musl() {
    moves(Build { name: "mutexes", linkage: Linkage::Musl }, &[]);
}
