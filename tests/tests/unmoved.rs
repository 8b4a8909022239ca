//! The test of the tests: every program passes when nothing is moved, so that a failure elsewhere means something.

use std::time::Duration;

use slipstream_tests::build::all;
use slipstream_tests::huge_pages;
use slipstream_tests::moves::stays;
use slipstream_tests::{Build, Hosts, Linkage, Program};

/// A few at a time: some of them use a quarter of a gigabyte.
const AT_ONCE: usize = 4;

fn pass_unmoved(builds: &[Build]) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let run = || {
        while let Some(build) = builds.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
        {
            let arguments: &[&str] = if build.name == "oracle" { &["1"] } else { &["an-argument"] };
            stays(*build, arguments, Duration::from_millis(200));
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(run);
        }
    });
}

#[test]
fn programs_pass_unmoved() {
    let builds: Vec<_> = all().into_iter().map(|name| Build::dynamic(name.leak())).collect();
    assert!(builds.len() > 50, "only {} test programs found", builds.len());
    let _pages = huge_pages::Reserved::new(16);
    pass_unmoved(&builds);
}

#[test]
fn other_linkages_pass_unmoved() {
    let linkages =
        [Linkage::Static, Linkage::StaticPie, Linkage::NoPie, Linkage::Musl, Linkage::MuslStatic];
    let builds: Vec<_> = linkages
        .iter()
        .flat_map(|&linkage| ["anon", "tids", "heap", "oracle"].map(|name| Build { name, linkage }))
        .collect();
    pass_unmoved(&builds);
}

/// Each program has to be named in one of the files beside this one, or it is never moved.
#[test]
fn every_program_is_moved_somewhere() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let entries = std::fs::read_dir(folder).expect("the folder of tests");
    let is_test = |path: &std::path::Path| path.is_file() && !path.ends_with("unmoved.rs");
    let paths = entries.map(|entry| entry.expect("an entry").path()).filter(|path| is_test(path));
    let text: String = paths.map(|path| std::fs::read_to_string(path).expect("a test")).collect();
    let words: std::collections::HashSet<&str> =
        text.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    for name in all() {
        assert!(words.contains(name.as_str()), "programs/{name}.c is in no test");
    }
}

#[test]
fn python_passes_unmoved() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/programs/languages/check.py");
    let hosts = Hosts::without_slipstream();
    let program = Program::run(&hosts, "python", "python3", |command, flag| {
        command.arg(script).arg(flag);
    });
    program.wait_for_line("ready");
    program.assert_finishes_at_home();
}
