//! The program that is moved: it holds memory, touches it once it has been moved, and ends when all of it has come.

use anyhow::{Context, Result, bail};
use slipstream_core::sys::pagemap::{Pagemap, Wanted};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

/// It ends after so many seconds at the latest.
const LIFE_S: u32 = 900;
const PAGE: usize = 4096;
/// Between looks whether it has been moved, or all has come.
const LOOK: Duration = Duration::from_millis(2);
/// For the last page's wake-up to be over.
const LINGER: Duration = Duration::from_secs(2);

/// How it goes through its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// Not at all.
    None,
    /// Each page once, in no order.
    Random,
}

impl Walk {
    /// As a word of the command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Random => "random",
        }
    }
}

/// `BYTES WALK READY`: writes the file READY when its memory is filled.
pub fn main(words: &[&str]) -> Result<()> {
    let [bytes, walk, ready] = words else { bail!("__wander BYTES WALK READY") };
    nix::unistd::alarm::set(LIFE_S);
    let memory = vec![0x5au8; bytes.parse::<usize>().context("BYTES")? + PAGE];
    // Whole pages only.
    let memory = &memory[memory.as_ptr().align_offset(PAGE)..][..memory.len() - PAGE];
    let home = namespace()?;
    std::fs::write(Path::new(ready), "").with_context(|| (*ready).to_owned())?;
    while namespace()? == home {
        sleep(LOOK);
    }
    if *walk == Walk::Random.word() {
        touch_each(memory)?;
    }
    let start = memory.as_ptr() as u64;
    while !is_present(&(start..start + memory.len() as u64))? {
        sleep(LOOK * 50);
    }
    sleep(LINGER);
    Ok(())
}

/// A process is restored in a namespace of its own: a new name says that it has been moved.
fn namespace() -> Result<PathBuf> {
    std::fs::read_link("/proc/self/ns/pid").context("reading a link in /proc")
}

fn touch_each(memory: &[u8]) -> Result<()> {
    let pages = memory.len() / PAGE;
    // A full cycle: an odd increment, and a modulus that is a power of two (Hull and Dobell, 1962).
    let modulus = pages.next_power_of_two();
    let mut page = 0;
    for _ in 0..modulus {
        page = (page * 1_664_525 + 1_013_904_223) % modulus;
        if page < pages && std::hint::black_box(memory[page * PAGE]) != 0x5a {
            bail!("page {page} is wrong");
        }
    }
    Ok(())
}

fn is_present(range: &Range<u64>) -> Result<bool> {
    let mut bytes = 0;
    Pagemap::open(std::process::id() as i32)?.scan(
        range.start,
        range.end,
        Wanted::Existing,
        &mut |run| bytes += run.end - run.start,
    )?;
    Ok(bytes == range.end - range.start)
}
