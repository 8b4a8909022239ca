//! Page lanes over TCP and in memory: every page arrives once, with its own bytes, whatever the memory is like.

mod common;

use common::{Memory, PAGE, Page, channels, is_pattern};
use proptest::prelude::*;
use slipstream_transport::{
    Block, Content, Error, MockLane, MockOptions, PageLane, PageRequest, PageServer, Purpose,
    TcpPageLane,
};
use std::collections::HashMap;
use std::thread;
use std::time::{Duration, Instant};

const BASE: u64 = 0x7f00_0000_0000;

/// Runs `client` against a server of `memory`, which must end well.
fn with_server<T>(memory: &Memory, client: impl FnOnce(&mut TcpPageLane) -> T) -> T {
    let (near, far) = channels(Purpose::Bulk(0));
    let (mut lane, mut server) = (TcpPageLane::new(near), PageServer::new(far));
    thread::scope(|scope| {
        let serving = scope.spawn(move || server.serve(memory));
        let result = client(&mut lane);
        drop(lane);
        serving.join().unwrap().unwrap();
        result
    })
}

fn post_all(lane: &mut impl PageLane, requests: &[PageRequest]) {
    for request in requests {
        lane.post(*request, 0).unwrap();
    }
}

/// Takes replies until all is answered and gives what each page turned out to be.
fn take_all(lane: &mut impl PageLane, block: Block) -> HashMap<u64, Page> {
    let mut pages = HashMap::new();
    while lane.outstanding_bytes() > 0 {
        let Some(reply) = lane.next(block).unwrap() else {
            assert_eq!(block, Block::No, "replies don't come");
            continue;
        };
        let kind = match reply.content {
            Content::Data(data) => {
                assert_eq!(data.len(), reply.len_bytes as usize);
                assert!(is_pattern(reply.address, data), "wrong bytes at {:#x}", reply.address);
                Page::Present
            }
            Content::Absent => Page::Absent,
            Content::Failed(errno) => {
                assert_eq!(errno, 133);
                Page::Bad
            }
        };
        for page in 0..u64::from(reply.len_bytes) / PAGE {
            let twice = pages.insert(reply.address + page * PAGE, kind);
            assert_eq!(twice, None, "a page came twice");
        }
    }
    pages
}

fn check(memory: &Memory, requests: &[PageRequest], got: &HashMap<u64, Page>) {
    let mut count = 0;
    for request in requests {
        for page in 0..u64::from(request.len_bytes) / PAGE {
            let address = request.address + page * PAGE;
            let is = memory.pages[((address - memory.base) / PAGE) as usize];
            assert_eq!(got.get(&address), Some(&is), "{address:#x}");
            count += 1;
        }
    }
    assert_eq!(got.len(), count);
}

#[test]
fn a_page_and_four_megabytes_arrive() {
    let memory = Memory::present(BASE, 1024);
    with_server(&memory, |lane| {
        for (page, pages) in [(0, 1), (5, 1), (3, 15), (3, 16), (100, 17), (0, 1024)] {
            let address = BASE + page * PAGE;
            let request = PageRequest { address, len_bytes: pages * PAGE as u32 };
            lane.post(request, 0).unwrap();
            lane.flush().unwrap();
            check(&memory, &[request], &take_all(lane, Block::Forever));
        }
    });
}

#[test]
fn one_bad_page_does_not_take_its_neighbours_along() {
    let mut memory = Memory::present(BASE, 64);
    memory.pages[20] = Page::Bad;
    memory.pages[40] = Page::Absent;
    with_server(&memory, |lane| {
        let request = PageRequest { address: BASE, len_bytes: 64 * PAGE as u32 };
        lane.post(request, 0).unwrap();
        check(&memory, &[request], &take_all(lane, Block::Forever));
    });
}

#[test]
fn an_unmapped_address_fails_with_its_errno_and_the_lane_goes_on() {
    let memory = Memory::present(BASE, 4);
    with_server(&memory, |lane| {
        lane.post(PageRequest { address: 0x1000, len_bytes: 0x2000 }, 0).unwrap();
        let reply = lane.next(Block::Forever).unwrap().unwrap();
        assert_eq!(reply.content, Content::Failed(14));
        assert_eq!(reply.len_bytes, 0x2000);
        let request = PageRequest { address: BASE, len_bytes: 0x1000 };
        lane.post(request, 0).unwrap();
        check(&memory, &[request], &take_all(lane, Block::Forever));
    });
}

#[test]
fn thousands_of_requests_may_be_outstanding() {
    let memory = Memory::present(BASE, 4096);
    with_server(&memory, |lane| {
        let requests: Vec<_> = (0..4096)
            .map(|page| PageRequest { address: BASE + page * PAGE, len_bytes: PAGE as u32 })
            .collect();
        for request in &requests {
            lane.post(*request, 0).unwrap();
            // Each in a record of its own: the worst case for the sockets' buffers.
            lane.flush().unwrap();
        }
        let error = lane.post(requests[0], 0).unwrap_err();
        assert!(matches!(error, Error::QueueFull { .. }), "{error}");
        check(&memory, &requests, &take_all(lane, Block::Forever));
    });
}

/// Neither side may wait for the other for ever when all buffers are small and full.
#[test]
fn small_socket_buffers_do_not_lock_up() {
    let memory = Memory::present(BASE, 4096);
    let (near, far) = channels(Purpose::Bulk(0));
    let (mut lane, mut server) = (TcpPageLane::new(near), PageServer::new(far));
    lane.set_socket_buffers(1 << 15, 1 << 15).unwrap();
    server.set_socket_buffers(1 << 15, 1 << 15).unwrap();
    thread::scope(|scope| {
        let memory = &memory;
        let serving = scope.spawn(move || server.serve(memory));
        let mut posted = 0;
        let mut got = 0;
        while got < 20_000 * PAGE {
            while posted < 20_000 {
                let address = BASE + posted % 4096 * PAGE;
                match lane.post(PageRequest { address, len_bytes: PAGE as u32 }, 0) {
                    Ok(()) => posted += 1,
                    Err(Error::QueueFull { .. }) => break,
                    Err(error) => panic!("{error}"),
                }
                lane.flush().unwrap();
            }
            let until = Block::Until(Instant::now() + Duration::from_secs(20));
            let reply = lane.next(until).unwrap().expect("locked up");
            got += u64::from(reply.len_bytes);
        }
        drop(lane);
        serving.join().unwrap().unwrap();
    });
}

/// Requests that come while the server sends the last replies it has are not left lying.
#[test]
fn requests_behind_a_full_socket_are_served() {
    let memory = Memory::present(BASE, 15 * 100);
    let (near, far) = channels(Purpose::Bulk(0));
    let (mut lane, mut server) = (TcpPageLane::new(near), PageServer::new(far));
    server.set_socket_buffers(1 << 16, 1 << 16).unwrap();
    lane.set_socket_buffers(1 << 16, 1 << 16).unwrap();
    let requests = cover(&memory, 15);
    thread::scope(|scope| {
        let memory = &memory;
        let serving = scope.spawn(move || server.serve(memory));
        for request in &requests {
            lane.post(*request, 0).unwrap();
            lane.flush().unwrap();
            thread::sleep(Duration::from_millis(1));
        }
        let until = Block::Until(Instant::now() + Duration::from_secs(20));
        check(memory, &requests, &take_all(&mut lane, until));
        drop(lane);
        serving.join().unwrap().unwrap();
    });
}

#[test]
fn not_blocking_until_and_polling() {
    let memory = Memory::present(BASE, 4);
    with_server(&memory, |lane| {
        assert!(lane.raw_fd().is_some());
        assert_eq!(lane.next(Block::Forever).unwrap(), None, "nothing outstanding: no wait");
        let request = PageRequest { address: BASE, len_bytes: 0x1000 };
        lane.post(request, 0).unwrap();
        lane.flush().unwrap();
        check(&memory, &[request], &take_all(lane, Block::No));
        assert_eq!(lane.next(Block::No).unwrap(), None);
    });
    let (near, _far) = channels(Purpose::Urgent);
    let mut lane = TcpPageLane::new(near);
    lane.post(PageRequest { address: BASE, len_bytes: 0x1000 }, 0).unwrap();
    let soon = Block::Until(Instant::now() + Duration::from_millis(30));
    assert_eq!(lane.next(soon).unwrap(), None, "nobody serves");
}

#[test]
fn invalid_requests_are_the_callers_error() {
    let (near, _far) = channels(Purpose::Urgent);
    let mut lane = TcpPageLane::new(near);
    for (address, len_bytes) in [(1, 4096), (0, 0), (0, 5), (0, 8 << 20), (!0xfff, 4096)] {
        let error = lane.post(PageRequest { address, len_bytes }, 0).unwrap_err();
        assert!(matches!(error, Error::BadRequest { .. }), "{error}");
    }
    assert_eq!(lane.outstanding_bytes(), 0);
}

#[test]
fn a_lost_peer_is_noticed_on_both_sides() {
    let (near, far) = channels(Purpose::Bulk(0));
    let mut lane = TcpPageLane::new(near);
    drop(far);
    lane.post(PageRequest { address: BASE, len_bytes: 0x1000 }, 0).unwrap();
    assert!(lane.next(Block::Forever).unwrap_err().is_disconnect());

    let (near, far) = channels(Purpose::Bulk(0));
    let mut server = PageServer::new(far);
    let closer = server.closer();
    let memory = Memory::present(BASE, 1);
    let serving = thread::spawn(move || server.serve(&memory));
    thread::sleep(Duration::from_millis(20));
    closer.close();
    serving.join().unwrap().unwrap();
    let mut idle = TcpPageLane::new(near);
    while idle.next(Block::No).is_ok() {}
}

fn kinds() -> impl Strategy<Value = Vec<Page>> {
    let run = (
        prop_oneof![4 => Just(Page::Present), 3 => Just(Page::Absent), 1 => Just(Page::Bad)],
        1..40usize,
    );
    prop::collection::vec(run, 1..30).prop_map(|runs| {
        runs.into_iter().flat_map(|(kind, len)| std::iter::repeat_n(kind, len)).collect()
    })
}

/// Cuts the whole memory into requests.
fn cover(memory: &Memory, len_pages: usize) -> Vec<PageRequest> {
    (0..memory.pages.len())
        .step_by(len_pages)
        .map(|page| PageRequest {
            address: memory.base + page as u64 * PAGE,
            len_bytes: (memory.pages.len() - page).min(len_pages) as u32 * PAGE as u32,
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_memory_arrives_over_tcp(pages in kinds(), len_pages in 1..200usize) {
        let memory = Memory { base: BASE, pages };
        let requests = cover(&memory, len_pages);
        let got = with_server(&memory, |lane| {
            post_all(lane, &requests);
            take_all(lane, Block::Forever)
        });
        check(&memory, &requests, &got);
    }

    #[test]
    fn any_memory_arrives_over_the_mock(pages in kinds(), len_pages in 1..200usize, seed: u64) {
        let memory = Memory { base: BASE, pages };
        let requests = cover(&memory, len_pages);
        let options = MockOptions { seed, ..MockOptions::default() };
        let mut lane = MockLane::new(memory.clone(), options);
        post_all(&mut lane, &requests);
        prop_assert!(lane.next(Block::No).unwrap().is_none(), "not flushed yet");
        lane.flush().unwrap();
        check(&memory, &requests, &take_all(&mut lane, Block::No));
    }
}

#[test]
fn the_mock_mixes_requests_and_fails_when_told() {
    let order = |seed| {
        let options = MockOptions { seed, ..MockOptions::default() };
        let mut lane = MockLane::new(Memory::present(BASE, 100), options);
        let requests = cover(lane.source(), 10);
        post_all(&mut lane, &requests);
        let mut order = Vec::new();
        while let Some(reply) = lane.next(Block::Forever).unwrap() {
            order.push(reply.address);
        }
        order
    };
    assert_eq!(order(1), order(1), "a seed is a schedule");
    assert_ne!(order(1), order(2));
    assert!(!order(1).is_sorted());

    let options = MockOptions { replies_until_failure: Some(2), ..MockOptions::default() };
    let mut lane = MockLane::new(Memory::present(BASE, 100), options);
    lane.post(PageRequest { address: BASE, len_bytes: 100 * PAGE as u32 }, 0).unwrap();
    assert!(lane.next(Block::Forever).unwrap().is_some());
    assert!(lane.next(Block::Forever).unwrap().is_some());
    assert!(lane.next(Block::Forever).unwrap_err().is_disconnect());
    assert!(lane.flush().unwrap_err().is_disconnect());
    let mut lane = MockLane::new(Memory::present(BASE, 1), MockOptions::default());
    lane.fail();
    assert!(lane.post(PageRequest { address: BASE, len_bytes: 4096 }, 0).is_err());
}
