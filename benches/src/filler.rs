//! The program whose memory `UFFDIO_COPY` is measured on: an empty range, a userfaultfd, and patience.

use crate::edge;
use crate::lab;
use anyhow::{Context, Result};
use std::os::fd::AsRawFd;
use std::path::Path;

/// How long it waits to be ended.
const LIFE_S: u32 = 300;

/// `BYTES DIR`: says `FD ADDRESS` in `DIR/ready`, then waits.
pub fn main(words: &[&str]) -> Result<()> {
    let [bytes, directory] = words else { anyhow::bail!("__filler BYTES DIR") };
    nix::unistd::alarm::set(LIFE_S);
    let (fd, address) = edge::range_to_fill(bytes.parse().context("BYTES")?)?;
    lab::publish(&Path::new(directory).join("ready"), &format!("{} {address}", fd.as_raw_fd()))?;
    loop {
        nix::unistd::pause();
    }
}
