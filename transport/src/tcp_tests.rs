//! Peers that hold the key and still don't keep to the protocol.

use super::*;
use crate::channel::Timeouts;
use crate::handshake::Purpose;
use crate::key::Key;
use crate::lane::Extent;
use crate::preamble::{Route, read_preamble};
use std::io;
use std::os::unix::net::UnixStream;
use std::thread;

const PAGE: u32 = PAGE_LEN_BYTES;

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

/// A peer that sends records of its choice.
struct Peer {
    socket: Arc<Socket>,
    writer: RecordWriter,
}

impl Peer {
    fn new(channel: Channel) -> Self {
        let (socket, writer, _) = channel.into_parts();
        Peer { socket, writer }
    }

    fn send(&mut self, plain: &[u8]) {
        self.writer.append(plain);
        assert!(self.writer.flush(&self.socket, Block::Forever).unwrap());
    }
}

/// Memory that must not be asked for anything.
struct Untouchable;

impl PageSource for Untouchable {
    fn extent(&self, address: u64, _: u32) -> io::Result<Extent> {
        panic!("a bad request for {address:#x} got through")
    }

    fn read(&self, address: u64, _: &mut [u8]) -> io::Result<()> {
        panic!("a bad request for {address:#x} got through")
    }
}

/// What a lane that asked for the pages 0x10000..0x14000 makes of a record.
fn lane_given(record: &[u8]) -> Result<()> {
    let (near, far) = channels();
    let mut lane = TcpPageLane::new(near);
    lane.post(PageRequest { address: 0x10000, len_bytes: 4 * PAGE }, 0)?;
    lane.flush()?;
    Peer::new(far).send(record);
    while lane.next(Block::Forever)?.is_some() {}
    Ok(())
}

fn absent(address: u64, len_bytes: u32) -> Vec<u8> {
    encode_reply_head(address, len_bytes, &Content::Absent).to_vec()
}

#[test]
fn replies_that_answer_nothing_end_the_lane() {
    lane_given(&absent(0x10000, 4 * PAGE)).unwrap();
    lane_given(&[absent(0x10000, PAGE), absent(0x11000, 3 * PAGE)].concat()).unwrap();
    let bad = [
        absent(0x11000, PAGE),
        absent(0x10000, 5 * PAGE),
        absent(0x10001, PAGE),
        absent(0x10000, 0),
        [absent(0x10000, PAGE), absent(0x10000, PAGE)].concat(),
        [absent(0x10000, 2 * PAGE), absent(0x11000, 3 * PAGE)].concat(),
        [absent(0x10000, 4 * PAGE), absent(0x14000, PAGE)].concat(),
        absent(0x10000, PAGE)[..7].to_vec(),
        encode_reply_head(0x10000, PAGE, &Content::Data(&[])).to_vec(),
    ];
    for record in bad {
        let error = lane_given(&record).unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error}: {record:x?}");
    }
}

#[test]
fn replies_nobody_waits_for_end_the_lane() {
    let (near, far) = channels();
    let mut lane = TcpPageLane::new(near);
    Peer::new(far).send(&absent(0x10000, PAGE));
    let error = loop {
        match lane.next(Block::No) {
            Ok(None) => {}
            Ok(Some(reply)) => panic!("{reply:?}"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
}

#[test]
fn bad_requests_end_the_server_before_they_reach_the_memory() {
    let request = |address, len_bytes| encode_request(PageRequest { address, len_bytes });
    let bad: [&[u8]; 6] = [
        &request(0x10000, 0),
        &request(0x10001, PAGE),
        &request(0x10000, PAGE - 1),
        &request(0x10000, (4 << 20) + PAGE),
        &request(!0xfff, PAGE),
        &request(0x10000, PAGE)[..11],
    ];
    for record in bad {
        let (near, far) = channels();
        let mut peer = Peer::new(near);
        peer.send(record);
        let error = PageServer::new(far).serve(&Untouchable).unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error}: {record:x?}");
    }
}

#[test]
fn a_forged_record_ends_either_side() {
    let (near, far) = channels();
    let peer = Peer::new(near);
    let forged = [&[100, 0][..], &[7; 100]].concat();
    peer.socket.send_all(&forged, Block::Forever, "").unwrap();
    let error = PageServer::new(far).serve(&Untouchable).unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error}");

    let (near, far) = channels();
    let peer = Peer::new(far);
    peer.socket.send_all(&forged[..50], Block::Forever, "").unwrap();
    drop(peer);
    let mut lane = TcpPageLane::new(near);
    lane.post(PageRequest { address: 0, len_bytes: PAGE }, 0).unwrap();
    assert!(lane.next(Block::Forever).unwrap_err().is_disconnect(), "cut in a record");
}
