//! Lanes over an adapter of this host that reads from itself (Soft-RoCE will do); without one they say so and test nothing.
//! Those that break the network run in the lab only, which its variable `LAB_HOST` tells.

use super::super::reader::Reader;
use super::super::source::Source;
use super::super::{PROBE_LEN, Selection, probe_content};
use super::*;
use crate::channel::{Channel, Timeouts};
use crate::handshake::Purpose;
use crate::key::Key;
use crate::lane::{Extent, PageSource};
use crate::preamble::{Route, read_preamble};
use crate::tcp::PageServer;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

const PAGE: u64 = 4096;
const LEN_PAGES: u64 = 4096;
/// What a lane may have outstanding.
const WINDOW_BYTES: u64 = 4 << 20;
/// Longer than an adapter tries to reach a peer that is gone, also in emulation.
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// One test at a time: some of them break the adapter's link. None without an adapter.
fn adapter() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    match Source::candidates(&Selection::default(), ip()) {
        Ok(_) => Some(one),
        Err(e) => {
            println!("skipped: no RDMA device: {e}");
            None
        }
    }
}

/// Host 1's address in the lab; elsewhere any address does.
fn ip() -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1))
}

/// Memory that stands in for that of a frozen process: each eight bytes are their own address.
struct Memory {
    buffer: Arc<Buffer>,
}

impl Memory {
    fn new(source: &Source) -> Self {
        let len = (LEN_PAGES * PAGE) as usize;
        let mut buffer = Buffer::new(source.domain(), len, Use::Source).unwrap();
        let start = buffer.address();
        let content: Vec<u8> =
            (0..len as u64 / 8).flat_map(|i| (start + 8 * i).to_le_bytes()).collect();
        buffer.fill(&content);
        Memory { buffer: Arc::new(buffer) }
    }

    fn address(&self, page: u64) -> u64 {
        self.buffer.address() + page * PAGE
    }
}

fn is_right(address: u64, data: &[u8]) -> bool {
    let mut words = data.chunks_exact(8).zip(0u64..);
    words.all(|(word, i)| word == (address + 8 * i).to_le_bytes())
}

/// What a page server has of it: pages whose number is a multiple of 64 are absent there, so that a reply shows which way
/// it came, and the lane gets along with replies of all sorts.
struct Served(Arc<Buffer>);

const ABSENT_EVERY: u64 = 64;

impl PageSource for Served {
    fn extent(&self, address: u64, len_bytes: u32) -> io::Result<Extent> {
        let page = (address - self.0.address()) / PAGE;
        let until = page.next_multiple_of(ABSENT_EVERY);
        Ok(if until == page {
            Extent { len_bytes: PAGE as u32, present: false }
        } else {
            Extent { len_bytes: len_bytes.min(((until - page) * PAGE) as u32), present: true }
        })
    }

    fn read(&self, address: u64, out: &mut [u8]) -> io::Result<()> {
        let offset = (address - self.0.address()) as usize;
        out.copy_from_slice(self.0.bytes(offset, out.len()));
        Ok(())
    }
}

fn channels() -> (Channel, Channel) {
    let key = Key::random().unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let timeouts = Timeouts::default();
    let far_key = key.clone();
    let accepting = thread::spawn(move || {
        read_preamble(&far, timeouts.handshake).unwrap();
        Channel::accept(far, &far_key, timeouts).unwrap()
    });
    let client = Channel::initiate(near, &key, Route::NEW, Purpose::Urgent, timeouts).unwrap();
    (client, accepting.join().unwrap())
}

/// Both hosts of a migration.
struct Hosts {
    lanes: Vec<Box<dyn PageLane>>,
    regions: Arc<Regions>,
    health: Arc<Health>,
    memory: Memory,
    source: Option<Source>,
    servers: Vec<JoinHandle<()>>,
}

/// An urgent lane and a bulk lane, connected.
fn hosts() -> Hosts {
    let (mut source, candidates) = Source::candidates(&Selection::default(), ip()).unwrap();
    let (mut reader, pick) =
        Reader::pick(&Selection::default(), &candidates, ip(), ip(), 2).unwrap();
    let endpoint = source.connect(&pick, 2).unwrap();
    reader.connect(&endpoint).unwrap();
    let memory = Memory::new(&source);
    let (regions, health) = (Arc::new(Regions::default()), reader.health());
    let mut servers = Vec::new();
    let tcp = (0..2).map(|_| {
        let (near, far) = channels();
        let served = Served(Arc::clone(&memory.buffer));
        servers.push(thread::spawn(move || PageServer::new(far).serve(&served).unwrap()));
        TcpPageLane::new(near)
    });
    let tcp = tcp.collect();
    let lanes = reader.into_lanes(tcp, &regions);
    Hosts { lanes, regions, health, memory, source: Some(source), servers }
}

impl Hosts {
    /// Makes pages readable, with the right key or a wrong one.
    fn register(&self, pages: std::ops::Range<u64>, right: bool) {
        let rkey = self.memory.buffer.rkey() ^ u32::from(!right);
        let len_bytes = (pages.end - pages.start) * PAGE;
        self.regions.add(self.memory.address(pages.start), len_bytes, rkey).unwrap();
    }

    /// Ends everything, in the order in which it may end.
    fn end(mut self) {
        self.lanes.clear();
        for server in self.servers.drain(..) {
            server.join().unwrap();
        }
    }
}

/// How a lane is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// In `next`.
    InNext,
    /// On the descriptor, as the fault thread does.
    OnDescriptor,
}

fn readable(lane: &dyn PageLane, timeout_ms: u16) -> bool {
    // SAFETY: the lane is borrowed for longer than the descriptor.
    let fd = unsafe { BorrowedFd::borrow_raw(lane.raw_fd().unwrap()) };
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(timeout_ms)).unwrap() > 0
}

/// What came of requests.
#[derive(Debug, Default)]
struct Fetched {
    data_bytes: u64,
    absent_bytes: u64,
    took: Duration,
}

/// Asks for every page of `requests`, within the window, and takes all replies: each page comes once, with its own bytes, in
/// order within its request. `tick` is called before each wait with the bytes that have come.
fn fetch(
    lane: &mut dyn PageLane,
    requests: &[PageRequest],
    waiting: Waiting,
    mut tick: impl FnMut(u64),
) -> Fetched {
    let (began, mut fetched) = (Instant::now(), Fetched::default());
    let (mut todo, mut open) = (requests.iter(), VecDeque::<PageRequest>::new());
    let mut next = todo.next();
    while next.is_some() || !open.is_empty() {
        assert!(began.elapsed() < TEST_TIMEOUT, "not answered: {open:x?}");
        while let Some(request) = next
            && lane.outstanding_bytes() < WINDOW_BYTES
        {
            lane.post(*request, 0).unwrap();
            open.push_back(*request);
            next = todo.next();
        }
        lane.flush().unwrap();
        tick(fetched.data_bytes + fetched.absent_bytes);
        let block = match waiting {
            Waiting::InNext => Block::Until(Instant::now() + Duration::from_millis(5)),
            Waiting::OnDescriptor => {
                let _ = lane.busy_poll() || readable(lane, 10);
                Block::No
            }
        };
        while let Some(reply) = lane.next(block).unwrap() {
            let len = u64::from(reply.len_bytes);
            match reply.content {
                Content::Data(data) => {
                    assert_eq!(data.len() as u64, len);
                    assert!(is_right(reply.address, data), "wrong bytes at {:#x}", reply.address);
                    fetched.data_bytes += len;
                }
                Content::Absent => fetched.absent_bytes += len,
                Content::Failed(errno) => panic!("{:#x}: errno {errno}", reply.address),
            }
            // Addresses are asked for once: so none is answered twice.
            let index =
                open.iter().position(|r| r.address == reply.address).expect("not asked for");
            let request = &mut open[index];
            request.address += len;
            request.len_bytes = request.len_bytes.checked_sub(reply.len_bytes).expect("too much");
            if request.len_bytes == 0 {
                open.remove(index);
            }
            if waiting == Waiting::InNext {
                break;
            }
        }
    }
    fetched.took = began.elapsed();
    assert_eq!(lane.outstanding_bytes(), 0);
    // A notice may come a little later than the completion that it tells of, but not again and again.
    for _ in 0..3 {
        assert!(lane.next(Block::No).unwrap().is_none());
        thread::sleep(Duration::from_millis(2));
    }
    assert!(!lane.busy_poll());
    assert!(!readable(lane, 0), "readable, although nothing can come");
    fetched
}

/// All pages of a range of pages, in requests of random lengths.
fn requests(memory: &Memory, pages: std::ops::Range<u64>, pages_max: u64) -> Vec<PageRequest> {
    let mut random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let (mut at, mut all) = (pages.start, Vec::new());
    while at < pages.end {
        let len = (random.next_u64() % pages_max + 1).min(pages.end - at);
        all.push(PageRequest { address: memory.address(at), len_bytes: (len * PAGE) as u32 });
        at += len;
    }
    for i in (1..all.len()).rev() {
        all.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
    }
    all
}

#[test]
fn pages_are_read_and_the_rest_comes_over_tcp() {
    let Some(_one) = adapter() else { return };
    let mut hosts = hosts();
    // Adjacent pieces, a hole, a lone page.
    for pages in [0..1, 1..700, 700..1024, 1024..1031, 2048..3000, 3500..3501] {
        hosts.register(pages, true);
    }
    for (index, waiting) in [(0, Waiting::OnDescriptor), (1, Waiting::InNext)] {
        let before = hosts.health.bytes();
        let all = requests(&hosts.memory, 0..LEN_PAGES, 100);
        let fetched = fetch(&mut *hosts.lanes[index], &all, waiting, |_| ());
        assert_eq!(hosts.health.failure(), None);
        assert_eq!(fetched.data_bytes + fetched.absent_bytes, LEN_PAGES * PAGE);
        let read = hosts.health.bytes() - before;
        println!("{waiting:?}: {read} bytes read of {} in {:?}", LEN_PAGES * PAGE, fetched.took);
        assert!((1500 * PAGE..2000 * PAGE).contains(&read), "{read}");
        assert!(fetched.absent_bytes > 0);
    }
    hosts.end();
}

/// Prints what compares with `ib_read_lat -s 4096`: from the request to the bytes.
#[test]
fn single_pages_one_at_a_time() {
    let Some(_one) = adapter() else { return };
    let mut hosts = hosts();
    hosts.register(0..LEN_PAGES, true);
    let lane = &mut *hosts.lanes[0];
    let mut took: Vec<Duration> = (0..1000)
        .map(|page| {
            let request = PageRequest { address: hosts.memory.address(page), len_bytes: 4096 };
            let began = Instant::now();
            lane.post(request, 0).unwrap();
            lane.flush().unwrap();
            loop {
                let _ = lane.busy_poll() || readable(lane, 10);
                let Some(reply) = lane.next(Block::No).unwrap() else { continue };
                let took = began.elapsed();
                assert_eq!((reply.address, reply.len_bytes), (request.address, 4096));
                let Content::Data(data) = reply.content else { panic!("{reply:?}") };
                assert!(is_right(reply.address, data));
                break took;
            }
        })
        .collect();
    took.sort();
    println!("one page: p50 {:?}, p99 {:?}", took[500], took[990]);
    assert_eq!(hosts.health.bytes(), 1000 * PAGE);
    hosts.end();
}

#[test]
fn whole_huge_pages_are_cut() {
    let Some(_one) = adapter() else { return };
    let mut hosts = hosts();
    hosts.register(0..LEN_PAGES, true);
    let all: Vec<_> = (0..LEN_PAGES / 512)
        .map(|huge| PageRequest { address: hosts.memory.address(huge * 512), len_bytes: 2 << 20 })
        .collect();
    for index in 0..2 {
        let fetched = fetch(&mut *hosts.lanes[index], &all, Waiting::OnDescriptor, |_| ());
        assert_eq!(fetched.absent_bytes, 0);
    }
    assert_eq!(hosts.health.bytes(), 2 * LEN_PAGES * PAGE);
    hosts.end();
}

#[test]
fn a_region_that_can_not_be_read_moves_both_lanes_to_tcp() {
    let Some(_one) = adapter() else { return };
    let mut hosts = hosts();
    hosts.register(0..3000, true);
    hosts.register(3000..LEN_PAGES, false);
    for (index, waiting) in [(1, Waiting::InNext), (0, Waiting::OnDescriptor)] {
        let all = requests(&hosts.memory, 0..LEN_PAGES, 64);
        let fetched = fetch(&mut *hosts.lanes[index], &all, waiting, |_| ());
        assert_eq!(fetched.data_bytes + fetched.absent_bytes, LEN_PAGES * PAGE);
        assert!(fetched.absent_bytes > 0, "nothing came over TCP");
        let why = hosts.health.failure().unwrap();
        assert!(why.contains("READ failed") || why.contains("queue pair"), "{why}");
    }
    hosts.end();
}

#[test]
fn a_peer_that_is_gone_moves_the_rest_to_tcp() {
    let Some(_one) = adapter() else { return };
    for (index, waiting) in [(0, Waiting::OnDescriptor), (1, Waiting::InNext)] {
        let mut hosts = hosts();
        hosts.register(0..LEN_PAGES, true);
        let all = requests(&hosts.memory, 0..LEN_PAGES, 64);
        let mut source = hosts.source.take();
        let mut gone = None;
        let fetched = fetch(&mut *hosts.lanes[index], &all, waiting, |bytes| {
            if bytes > LEN_PAGES * PAGE / 3 && source.take().is_some() {
                gone = Some(Instant::now());
            }
        });
        assert_eq!(fetched.data_bytes + fetched.absent_bytes, LEN_PAGES * PAGE);
        println!("{waiting:?}: {:?} after the peer was gone", gone.unwrap().elapsed());
        println!("{}", hosts.health.failure().unwrap());
        hosts.end();
    }
}

fn ip_command(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn in_lab() -> bool {
    let lab = std::env::var_os("LAB_HOST").is_some_and(|host| host == "1");
    if !lab {
        println!("skipped: not on host 1 of the lab");
    }
    lab
}

/// Takes all pages over the bulk lane while `break_link` happens to the network, a third of the way.
fn broken(break_link: impl FnOnce()) -> (Fetched, Option<String>) {
    let mut hosts = hosts();
    hosts.register(0..LEN_PAGES, true);
    let all = requests(&hosts.memory, 0..LEN_PAGES, 64);
    let (mut break_link, health) = (Some(break_link), Arc::clone(&hosts.health));
    let fetched = fetch(&mut *hosts.lanes[1], &all, Waiting::InNext, |bytes| {
        if bytes > LEN_PAGES * PAGE / 3
            && let Some(break_link) = break_link.take()
        {
            break_link();
        }
        // As a session does now and then.
        let _ = health.failure();
    });
    let why = hosts.health.failure();
    hosts.end();
    (fetched, why)
}

#[test]
fn a_port_that_goes_down_moves_the_rest_to_tcp() {
    let Some(_one) = adapter() else { return };
    if !in_lab() {
        return;
    }
    let (fetched, why) = broken(|| ip_command("link set eth0 down"));
    ip_command("link set eth0 up");
    assert!(fetched.absent_bytes > 0, "nothing came over TCP");
    println!("{}", why.unwrap());
}

#[test]
fn other_addresses_may_come_and_go_but_not_ours() {
    let Some(_one) = adapter() else { return };
    if !in_lab() {
        return;
    }
    let (fetched, why) = broken(|| {
        ip_command("addr add 10.78.0.1/24 dev eth0");
        thread::sleep(Duration::from_millis(300));
        ip_command("addr del 10.78.0.1/24 dev eth0");
        thread::sleep(Duration::from_millis(300));
    });
    assert_eq!((fetched.absent_bytes, why), (0, None));
    let (_, why) = broken(|| {
        ip_command("addr del 10.77.0.1/24 dev eth0");
        thread::sleep(Duration::from_millis(300));
    });
    ip_command("addr add 10.77.0.1/24 dev eth0");
    println!("{}", why.unwrap());
}

#[test]
fn an_endpoint_that_is_not_what_it_says_is_found_out() {
    let Some(_one) = adapter() else { return };
    let attempt = |change: &dyn Fn(&mut Vec<u8>)| {
        let (mut source, candidates) = Source::candidates(&Selection::default(), ip()).unwrap();
        let (mut reader, pick) =
            Reader::pick(&Selection::default(), &candidates, ip(), ip(), 2).unwrap();
        let mut endpoint = source.connect(&pick, 2).unwrap();
        change(&mut endpoint);
        let outcome = reader.connect(&endpoint).map_err(|e| e.to_string());
        drop(source);
        outcome
    };
    assert_eq!(attempt(&|_| ()), Ok(()));
    // It ends with address, key and seed of the probe.
    for (from_end, expected) in [(1, "other bytes"), (12, "READ failed"), (14, "READ failed")] {
        let why = attempt(&|endpoint| {
            let at = endpoint.len() - from_end;
            endpoint[at] ^= 2;
        });
        let why = why.unwrap_err();
        assert!(why.contains(expected), "{from_end}: {why}");
    }
    assert!(attempt(&|endpoint| endpoint.clear()).unwrap_err().contains("malformed"));
    assert_eq!(probe_content(7).len(), PROBE_LEN);
}
