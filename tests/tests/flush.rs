//! Before another host opens a file, what was written to it has reached the file system.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use slipstream_tests::moves::skipped;
use slipstream_tests::{Build, Hosts, Program};

/// Pages of a file that are not written back yet (`cachestat(2)`, Linux 6.5); `None` on older kernels.
fn dirty_pages(path: &Path) -> Option<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    let file = File::open(path).expect("a file of the program");
    let range = [0u64, 0];
    let mut counts = [0u64; 5];
    // SAFETY: the kernel reads two words and writes five, both live arrays of that size.
    let got = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0)
    };
    (got == 0).then_some(counts[1] + counts[2])
}

#[test]
fn written_data_is_flushed_when_the_hosts_differ() {
    let hosts = Hosts::two();
    let agent = hosts.agent_with(|command| {
        command.env("SLIPSTREAM_FOREIGN_BOOT", "1");
    });
    let program = Program::start(&hosts, Build::dynamic("dirty_files"), &[]);
    let files = ["written", "mapped"].map(|name| program.directory().join(name));
    if files.iter().any(|file| dirty_pages(file).is_none_or(|dirty| dirty == 0)) {
        return skipped("flush", "cachestat(2), or a file system that keeps written pages a while");
    }
    let moved = hosts.migrate(&program, &agent).wait().assert_completed();
    for file in &files {
        assert_eq!(dirty_pages(file), Some(0), "{}", file.display());
    }
    program.tell();
    moved.wait_end(std::time::Duration::from_secs(30));
    program.assert_ok();
}
