//! The page server: answers the destination's requests from the frozen copy's memory, a thread a lane.

use crate::at_end::AtEnd;
use crate::error::{Error, Result};
use crate::placement::Placement;
use crate::protocol::{PresentRun, RUNS_PER_MAP};
use slipstream_core::capture::frozen_memory::FrozenMemory;
use slipstream_core::sys::pagemap::PageRun;
use slipstream_core::sys::task;
use slipstream_transport::{Channel, Closer, Extent, Pace, PageServer, PageSource, Purpose};
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Urgent requests between two looks at the CPU that they arrive on.
const FOLLOW_INTERVAL: u32 = 8;

/// How often the destination, which waits for the present map, hears something while it is made.
const SIGN_OF_LIFE_INTERVAL: Duration = Duration::from_secs(3);

/// The frozen copy as a page source, for one lane's thread.
#[derive(Debug)]
struct Source {
    memory: Arc<FrozenMemory>,
    pace: Arc<Pace>,
    placement: RefCell<Placement>,
    /// Of an urgent lane: its connection, and requests since the last look.
    urgent: Option<(Closer, Cell<u32>)>,
    hot: Arc<AtomicU64>,
}

impl Source {
    /// Called for every request: urgent work says so and stays near the network, other work makes room.
    fn place(&self) {
        let mut placement = self.placement.borrow_mut();
        let Some((connection, since)) = &self.urgent else {
            placement.make_room(&self.pace);
            return;
        };
        self.pace.hurry();
        if since.get() % FOLLOW_INTERVAL == 0
            && let Some(cpu) = task::incoming_cpu(connection.as_fd())
            && placement.follow(cpu)
        {
            self.pace.settle_on(cpu);
        }
        since.set(since.get().wrapping_add(1));
    }
}

fn io_error(e: slipstream_core::Error) -> io::Error {
    match e {
        slipstream_core::Error::Sys { errno, .. } => errno.into(),
        slipstream_core::Error::Io { source, .. } => source,
        other => io::Error::other(other.to_string()),
    }
}

impl PageSource for Source {
    fn extent(&self, address: u64, len_bytes: u32) -> io::Result<Extent> {
        self.place();
        if self.urgent.is_some() {
            self.hot.store(address, Ordering::Relaxed);
        }
        match self.memory.extent(address, u64::from(len_bytes)).map_err(io_error)? {
            Some(e) => Ok(Extent { len_bytes: e.len_bytes as u32, present: e.present }),
            None => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        }
    }

    fn read(&self, address: u64, out: &mut [u8]) -> io::Result<()> {
        self.memory.read(address, out).map_err(io_error)
    }
}

/// The lanes' threads.
#[derive(Debug)]
pub struct PageServers {
    threads: Vec<JoinHandle<()>>,
    closers: Vec<Closer>,
    hot: Arc<AtomicU64>,
}

impl PageServers {
    /// Starts a thread a lane.
    pub fn start(lanes: Vec<Channel>, memory: &Arc<FrozenMemory>) -> Self {
        let closers = lanes.iter().map(Channel::closer).collect();
        let pace = Arc::new(Pace::default());
        let hot = Arc::new(AtomicU64::new(0));
        let threads = lanes
            .into_iter()
            .map(|channel| {
                let (memory, pace) = (Arc::clone(memory), Arc::clone(&pace));
                let hot = Arc::clone(&hot);
                std::thread::spawn(move || serve(channel, memory, pace, hot))
            })
            .collect();
        Self { threads, closers, hot }
    }

    /// The address that a thread at the destination waited for last; 0 before the first.
    pub fn hot(&self) -> &Arc<AtomicU64> {
        &self.hot
    }
}

/// Ends the lanes and waits for their threads.
impl Drop for PageServers {
    fn drop(&mut self) {
        for closer in &self.closers {
            closer.close();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(channel: Channel, memory: Arc<FrozenMemory>, pace: Arc<Pace>, hot: Arc<AtomicU64>) {
    let purpose = channel.purpose();
    let connection = channel.closer();
    // Others hold it, too: the destination has to see that nobody answers any more.
    let _closing = AtEnd::new({
        let connection = connection.clone();
        move || connection.close()
    });
    let mut server = PageServer::new(channel);
    let placement = RefCell::new(Placement::of_this_thread());
    let mut source = Source { memory, pace: Arc::clone(&pace), placement, urgent: None, hot };
    if purpose == Purpose::Urgent {
        task::prefer_this_thread();
        source.urgent = Some((connection, Cell::new(0)));
    } else {
        task::give_way();
        server = server.with_pace(pace);
    }
    if let Err(e) = server.serve(&source) {
        tracing::info!("lane {purpose:?} ended: {e}");
    }
}

/// Sends the present map in pieces through `send`; returns the bytes of all existing pages.
pub fn send_present_map(
    memory: &FrozenMemory,
    send: &mut dyn FnMut(&[PresentRun]) -> Result<()>,
) -> Result<u64> {
    let mut pieces: Vec<PresentRun> = Vec::new();
    let mut bytes = 0;
    let mut last_sign = Instant::now();
    let mut note = |run: PageRun| {
        bytes += run.end - run.start;
        match pieces.last_mut() {
            // Runs are cut where a scan's buffer ended; the destination need not see that.
            Some(last) if last.start + last.len_bytes == run.start && last.huge == run.huge => {
                last.len_bytes += run.end - run.start;
            }
            _ => pieces.push(PresentRun {
                start: run.start,
                len_bytes: run.end - run.start,
                huge: run.huge,
            }),
        }
    };
    memory.scan::<Error>(&mut note, &mut || {
        if last_sign.elapsed() >= SIGN_OF_LIFE_INTERVAL {
            last_sign = Instant::now();
            send(&[])?;
        }
        Ok(())
    })?;
    for piece in pieces.chunks(RUNS_PER_MAP) {
        send(piece)?;
    }
    Ok(bytes)
}
