//! What the tests of this crate share: channels over loopback and a memory to serve pages of.
#![allow(dead_code)] // Each test binary uses its own part of this.

use slipstream_transport::{
    Channel, Error, Extent, Key, PageSource, Purpose, Route, Timeouts, read_preamble,
};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

pub const PAGE: u64 = 4096;

/// Time-outs for tests that expect success, or a failure that does not come from time.
pub fn patient() -> Timeouts {
    Timeouts { connect: Duration::from_secs(20), handshake: Duration::from_secs(20) }
}

/// Time-outs for tests that expect to run into them.
pub fn hasty() -> Timeouts {
    Timeouts { connect: Duration::from_millis(200), handshake: Duration::from_millis(200) }
}

/// A listener on a port of the system's choice.
pub fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// The server's part of one connection, preamble and all.
pub fn accept_one(listener: &TcpListener, key: &Key) -> Result<Channel, Error> {
    let (stream, _) = listener.accept().unwrap();
    let route = read_preamble(&stream, patient().handshake)?;
    let channel = Channel::accept(stream, key, patient())?;
    assert_eq!(channel.route(), route);
    Ok(channel)
}

/// Two plain connected sockets.
pub fn sockets() -> (TcpStream, TcpStream) {
    let (listener, address) = listen();
    let client = TcpStream::connect(address).unwrap();
    (client, listener.accept().unwrap().0)
}

/// A client's and a server's end of a good channel.
pub fn channels(purpose: Purpose) -> (Channel, Channel) {
    let key = Key::random().unwrap();
    let (listener, address) = listen();
    let server_key = key.clone();
    let server = thread::spawn(move || accept_one(&listener, &server_key).unwrap());
    let route = Route::random().unwrap();
    let client = Channel::connect(&[address], &key, route, purpose, patient()).unwrap();
    (client, server.join().unwrap())
}

/// What is at a page of the test memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    Present,
    Absent,
    /// There, but can't be read.
    Bad,
}

/// A memory whose pages hold a pattern of their address.
#[derive(Debug, Clone)]
pub struct Memory {
    pub base: u64,
    pub pages: Vec<Page>,
}

impl Memory {
    pub fn present(base: u64, len_pages: usize) -> Self {
        Memory { base, pages: vec![Page::Present; len_pages] }
    }

    fn at(&self, address: u64) -> io::Result<&[Page]> {
        let index = address.checked_sub(self.base).map(|offset| (offset / PAGE) as usize);
        match index.and_then(|index| self.pages.get(index..)) {
            Some(pages @ [_, ..]) => Ok(pages),
            _ => Err(io::Error::from_raw_os_error(14)), // EFAULT
        }
    }
}

/// The pattern: each eight bytes are their own address.
pub fn fill(address: u64, out: &mut [u8]) {
    for (i, word) in out.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(address + 8 * i as u64).to_le_bytes());
    }
}

pub fn is_pattern(address: u64, data: &[u8]) -> bool {
    let words = data.chunks_exact(8).enumerate();
    words.into_iter().all(|(i, word)| word == (address + 8 * i as u64).to_le_bytes())
}

impl PageSource for Memory {
    fn extent(&self, address: u64, len_bytes: u32) -> io::Result<Extent> {
        let pages = self.at(address)?;
        let present = pages[0] != Page::Absent;
        let same = pages.iter().take_while(|&&page| (page != Page::Absent) == present).count();
        let len_bytes = len_bytes.min((same as u64 * PAGE).try_into().unwrap_or(u32::MAX));
        Ok(Extent { len_bytes, present })
    }

    fn read(&self, address: u64, out: &mut [u8]) -> io::Result<()> {
        let pages = self.at(address)?;
        let wanted = &pages[..(out.len() as u64 / PAGE) as usize];
        if wanted.contains(&Page::Bad) {
            return Err(io::Error::from_raw_os_error(133)); // EHWPOISON
        }
        assert!(!wanted.contains(&Page::Absent), "an absent page was read");
        fill(address, out);
        Ok(())
    }
}
