//! A wire between source and agent that remembers what it carried, and can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::hosts::{Hosts, Side};

#[derive(Default)]
struct Shared {
    /// What the source sent, connection by connection.
    recordings: Mutex<Vec<Vec<u8>>>,
    streams: Mutex<Vec<TcpStream>>,
    cut: AtomicBool,
    carried_bytes: AtomicU64,
    /// Every piece waits so long.
    delay_ms: AtomicU64,
    /// Cut by itself once so many bytes went by, both ways together.
    bytes_max: AtomicU64,
}

/// Listens on the source's loopback and passes everything on to an agent.
pub struct Proxy {
    shared: Arc<Shared>,
    /// Where the source has to connect.
    pub address: SocketAddr,
}

impl Proxy {
    /// A proxy for `target`.
    pub fn start(hosts: &Hosts, target: SocketAddr) -> Self {
        Self::start_on(hosts, Side::Source, target)
    }

    /// A proxy on either host.
    pub fn start_on(hosts: &Hosts, side: Side, target: SocketAddr) -> Self {
        let host = hosts.host(side);
        let listener =
            host.enter(|| TcpListener::bind("127.0.0.1:0")).expect("listening on loopback");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared { bytes_max: AtomicU64::new(u64::MAX), ..Shared::default() });
        let accepting = Arc::clone(&shared);
        host.thread(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                carry(&accepting, stream, target);
            }
        });
        Self { shared, address }
    }

    /// As `slipstream migrate` wants it.
    pub fn destination(&self) -> String {
        format!("tcp://{}", self.address)
    }

    /// Ends every connection and takes no more, as a pulled cable would (but seen at once).
    pub fn cut(&self) {
        cut(&self.shared);
    }

    /// Takes connections again.
    pub fn mend(&self) {
        self.shared.bytes_max.store(u64::MAX, Ordering::SeqCst);
        self.shared.cut.store(false, Ordering::SeqCst);
    }

    /// Carries every piece (64 KiB at most) that much later.
    pub fn set_delay(&self, delay: Duration) {
        self.shared.delay_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// Cuts once `bytes` went by, counted over all connections and both directions.
    pub fn cut_after(&self, bytes: u64) {
        self.shared.bytes_max.store(bytes, Ordering::SeqCst);
    }

    /// How much went by.
    pub fn carried_bytes(&self) -> u64 {
        self.shared.carried_bytes.load(Ordering::SeqCst)
    }

    /// What the source sent on each connection (of each, the first 256 KiB).
    pub fn recordings(&self) -> Vec<Vec<u8>> {
        self.shared.recordings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn cut(shared: &Shared) {
    shared.cut.store(true, Ordering::SeqCst);
    for stream in shared.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

fn carry(shared: &Arc<Shared>, near: TcpStream, target: SocketAddr) {
    if shared.cut.load(Ordering::SeqCst) {
        return;
    }
    let Ok(far) = TcpStream::connect(target) else { return };
    let _ = near.set_nodelay(true);
    let _ = far.set_nodelay(true);
    let number = {
        let mut recordings = shared.recordings.lock().unwrap_or_else(PoisonError::into_inner);
        recordings.push(Vec::new());
        recordings.len() - 1
    };
    let (Ok(near_copy), Ok(far_copy)) = (near.try_clone(), far.try_clone()) else { return };
    let mut streams = shared.streams.lock().unwrap_or_else(PoisonError::into_inner);
    streams.extend([&near, &far].iter().filter_map(|stream| stream.try_clone().ok()));
    drop(streams);
    let there = Arc::clone(shared);
    std::thread::spawn(move || pump(&there, near, far, Some(number)));
    let back = Arc::clone(shared);
    std::thread::spawn(move || pump(&back, far_copy, near_copy, None));
}

const RECORDED_BYTES_MAX: usize = 256 * 1024;

fn pump(shared: &Shared, mut from: TcpStream, mut to: TcpStream, record_as: Option<usize>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(len) = from.read(&mut buffer) {
        let carried = shared.carried_bytes.fetch_add(len as u64, Ordering::SeqCst) + len as u64;
        if carried > shared.bytes_max.load(Ordering::SeqCst) {
            cut(shared);
        }
        std::thread::sleep(Duration::from_millis(shared.delay_ms.load(Ordering::SeqCst)));
        if len == 0 || shared.cut.load(Ordering::SeqCst) {
            break;
        }
        if let Some(number) = record_as {
            let mut recordings = shared.recordings.lock().unwrap_or_else(PoisonError::into_inner);
            let recording = &mut recordings[number];
            let room = RECORDED_BYTES_MAX.saturating_sub(recording.len()).min(len);
            recording.extend_from_slice(&buffer[..room]);
        }
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
