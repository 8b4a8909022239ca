//! What the parts of a drain cost by themselves: core-seconds a byte of reading the source's memory, TCP over
//! loopback, encryption and installing pages. Two cores can't move a page faster than two over their sum.

use crate::edge::thread_cpu_ns;
use crate::lab::{Lab, Program};
use crate::touch::Seen;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use serde::Serialize;
use slipstream_core::sys::mem::read_process;
use slipstream_core::sys::pidfd::PidFd;
use slipstream_core::sys::uffd::{Installed, Uffd};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

const READ_BYTES: usize = 256 << 10;
const RECORD_BYTES: usize = 60 << 10;
const COPY_BYTES: usize = 64 << 10;
const TAG_BYTES: usize = 16;
/// Records a batch; a batch is protected, then opened, so that neither end finds its record in the nearest cache.
const BATCH: usize = 8;
/// Both ends are here and work all the time; a longer pause means that one is gone.
const TCP_TIMEOUT: Duration = Duration::from_secs(20);
const CORES: f64 = 2.0;

/// Core-nanoseconds a byte.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Parts {
    /// `process_vm_readv`, 256 KiB at a time.
    pub read: f64,
    /// TCP over loopback, both ends.
    pub tcp: f64,
    /// AES-256-GCM, both ends.
    pub cipher: f64,
    /// `UFFDIO_COPY` into another process, 64 KiB at a time.
    pub copy: f64,
}

impl Parts {
    /// Measures them, reading the memory of `program`.
    pub fn measure(lab: &Lab, program: &Program, bytes: u64) -> Result<Self> {
        Ok(Self {
            read: read(program, bytes).context("reading memory")?,
            tcp: tcp(bytes).context("TCP over loopback")?,
            cipher: cipher(bytes)?,
            copy: copy(lab, bytes).context("UFFDIO_COPY")?,
        })
    }

    /// Bytes a second that two cores could move if the parts were all there is to do.
    pub fn limit_bytes_per_s(&self) -> f64 {
        CORES / ((self.read + self.tcp + self.cipher + self.copy) / 1e9)
    }
}

fn per_byte(cpu_ns: u64, bytes: u64) -> f64 {
    cpu_ns as f64 / bytes as f64
}

fn read(program: &Program, bytes: u64) -> Result<f64> {
    let seen: Seen = serde_json::from_str(&program.said).context("what the program said")?;
    let mut buffer = vec![1u8; READ_BYTES];
    // Its memory begins a little before its first whole page, so the last page isn't read.
    let chunks = (bytes - 4096) / READ_BYTES as u64;
    let began = thread_cpu_ns();
    for chunk in 0..chunks {
        let got = read_process(program.pid, seen.address + chunk * READ_BYTES as u64, &mut buffer)
            .context("process_vm_readv")?;
        ensure!(got == READ_BYTES, "only {got} bytes were read");
    }
    Ok(per_byte(thread_cpu_ns() - began, chunks * READ_BYTES as u64))
}

fn tcp(bytes: u64) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listening")?;
    let mut out = TcpStream::connect(listener.local_addr()?).context("connecting")?;
    let (mut into, _) = listener.accept().context("accepting")?;
    out.set_write_timeout(Some(TCP_TIMEOUT))?;
    into.set_read_timeout(Some(TCP_TIMEOUT))?;
    let records = bytes / RECORD_BYTES as u64;
    let receiver = std::thread::spawn(move || -> std::io::Result<u64> {
        let mut record = vec![0u8; RECORD_BYTES];
        let began = thread_cpu_ns();
        for _ in 0..records {
            into.read_exact(&mut record)?;
        }
        Ok(thread_cpu_ns() - began)
    });
    let record = vec![7u8; RECORD_BYTES];
    let began = thread_cpu_ns();
    for _ in 0..records {
        out.write_all(&record).context("sending")?;
    }
    let sent = thread_cpu_ns() - began;
    let Ok(received) = receiver.join() else { bail!("the receiving thread panicked") };
    Ok(per_byte(sent + received.context("receiving")?, records * RECORD_BYTES as u64))
}

fn cipher(bytes: u64) -> Result<f64> {
    let Ok(key) = UnboundKey::new(&AES_256_GCM, &[9; 32]) else { bail!("no AES-256-GCM") };
    let key = LessSafeKey::new(key);
    let nonce = |number: u64| {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&number.to_be_bytes());
        Nonce::assume_unique_for_key(nonce)
    };
    let mut batch = vec![vec![7u8; RECORD_BYTES + TAG_BYTES]; BATCH];
    let rounds = (bytes / (RECORD_BYTES * BATCH) as u64).max(1);
    let began = thread_cpu_ns();
    for round in 0..rounds {
        let number = |i: usize| round * BATCH as u64 + i as u64;
        for (i, record) in batch.iter_mut().enumerate() {
            let (plain, tag_place) = record.split_at_mut(RECORD_BYTES);
            match key.seal_in_place_separate_tag(nonce(number(i)), Aad::empty(), plain) {
                Ok(tag) => tag_place.copy_from_slice(tag.as_ref()),
                Err(_) => bail!("encrypting failed"),
            }
        }
        for (i, record) in batch.iter_mut().enumerate() {
            if key.open_in_place(nonce(number(i)), Aad::empty(), record).is_err() {
                bail!("decrypting failed");
            }
        }
    }
    Ok(per_byte(thread_cpu_ns() - began, rounds * (RECORD_BYTES * BATCH) as u64))
}

fn copy(lab: &Lab, bytes: u64) -> Result<f64> {
    let filler = lab.start_own("filler", &["__filler".to_owned(), bytes.to_string()])?;
    let mut numbers = filler.said.split_whitespace();
    let mut number =
        || numbers.next().and_then(|n| n.parse::<u64>().ok()).context("what the filler said");
    let (fd, address) = (number()? as i32, number()?);
    let uffd = Uffd::from_fd(PidFd::open(filler.pid)?.get_fd(fd)?);
    let data = vec![7u8; COPY_BYTES];
    let chunks = bytes / COPY_BYTES as u64;
    let began = thread_cpu_ns();
    for chunk in 0..chunks {
        let done = uffd.copy(address + chunk * COPY_BYTES as u64, &data)?;
        ensure!(done == Installed::All, "{done:?}");
    }
    let spent = thread_cpu_ns() - began;
    kill(Pid::from_raw(filler.pid), Signal::SIGKILL).context("ending the filler")?;
    Ok(per_byte(spent, chunks * COPY_BYTES as u64))
}
