//! Every kind of memory comes along: content, protection, sharing, and what was advised about it.

use std::time::Duration;

use slipstream_tests::huge_pages;
use slipstream_tests::moves::{moves, moves_between};
use slipstream_tests::{Build, Hosts, Linkage, Program};

macro_rules! moved_programs {
    ($($(#[$about:meta])* $name:ident),* $(,)?) => {
        $($(#[$about])* #[test] fn $name() { moves(Build::dynamic(stringify!($name)), &[]); })*
    };
}

moved_programs! {
    heap,
    anon,
    stack_grows,
    thp,
    private_file,
    shared_file,
    shared_anon,
    memfd_mapped,
    prot_none,
    locked,
    locked_future,
    fork_flags,
    vdso_clock,
    sparse,
    many_mappings,
    madvise_flags,
    guard_pages,
    generated_code,
}

#[test]
fn hugetlb() {
    let _pages = huge_pages::Reserved::new(16);
    moves(Build::dynamic("hugetlb"), &[]);
}

/// Source and destination in the same network, as on one machine without any set-up.
#[test]
fn anon_on_one_host() {
    moves_between(&Hosts::one(), Build::dynamic("anon"), &[]);
}

macro_rules! linked {
    ($($test:ident: $name:literal $linkage:ident),* $(,)?) => {
        $(#[test] fn $test() { moves(Build { name: $name, linkage: Linkage::$linkage }, &[]); })*
    };
}

linked! {
    anon_static: "anon" Static,
    anon_static_pie: "anon" StaticPie,
    anon_no_pie: "anon" NoPie,
    anon_musl: "anon" Musl,
    anon_musl_static: "anon" MuslStatic,
    heap_static: "heap" Static,
    heap_static_pie: "heap" StaticPie,
    heap_no_pie: "heap" NoPie,
    heap_musl: "heap" Musl,
    heap_musl_static: "heap" MuslStatic,
    vdso_clock_static: "vdso_clock" Static,
}

/// The destination has another kernel's vdso: the program goes on calling the functions it knows.
#[test]
fn foreign_vdso() {
    let hosts = Hosts::two();
    let agent = hosts.agent_with(|command| {
        command.env("SLIPSTREAM_FOREIGN_VDSO", "1");
    });
    let program = Program::start(&hosts, Build::dynamic("vdso_clock"), &[]);
    let moved = hosts.migrate(&program, &agent).wait().assert_completed();
    program.tell();
    moved.wait_end(Duration::from_secs(30));
    program.assert_ok();
}
