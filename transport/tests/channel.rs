//! Channels over loopback: what works, and every way of not getting in.

mod common;

use common::{accept_one, channels, hasty, listen, patient, sockets};
use slipstream_transport::{Channel, Error, Key, Purpose, Route, VERSION, read_preamble};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

const PREAMBLE: usize = 32;
const MESSAGE: usize = 50;
const GREETING_RECORD: usize = 50;

fn connect(address: std::net::SocketAddr, key: &Key) -> Result<Channel, Error> {
    Channel::connect(&[address], key, Route::NEW, Purpose::Control, patient())
}

#[test]
fn purpose_route_and_messages_arrive() {
    for purpose in [Purpose::Control, Purpose::Urgent, Purpose::Bulk(7)] {
        let (mut client, mut server) = channels(purpose);
        assert_eq!(server.purpose(), purpose);
        assert_eq!(server.route(), client.route());
        assert_eq!(server.minor(), VERSION.minor);
        for len in [0, 1, 65_514, 65_515, 65_516, 65_519, 65_520, 200_000] {
            let message = vec![len as u8; len];
            client.send(&message).unwrap();
            assert!(server.recv(len).unwrap() == message, "{len}");
            server.send(&message).unwrap();
            assert!(client.recv(len).unwrap() == message, "{len}");
        }
        drop(client);
        assert!(matches!(server.recv(10), Err(Error::Closed { .. })));
    }
}

#[test]
fn a_hundred_megabytes_there_and_back_at_once() {
    let (client, server) = channels(Purpose::Control);
    let message: Vec<u8> = (0..25_000_000u32).flat_map(u32::to_le_bytes).collect();
    let (mut sender, mut receiver) = client.split();
    thread::scope(|scope| {
        let echo = scope.spawn(move || {
            let mut server = server;
            let message = server.recv(1 << 30).unwrap();
            server.send(&message).unwrap();
        });
        let sending = scope.spawn(|| sender.send(&message).unwrap());
        assert!(receiver.recv(message.len()).unwrap() == message);
        sending.join().unwrap();
        echo.join().unwrap();
    });
}

#[test]
fn both_directions_work_at_once_from_two_threads() {
    let (client, server) = channels(Purpose::Control);
    let run = |channel: Channel| {
        let (mut sender, mut receiver) = channel.split();
        let sending = thread::spawn(move || {
            (0..2000u32).for_each(|i| sender.send(&vec![i as u8; (i * 37) as usize]).unwrap());
            sender.finish();
        });
        let receiving = thread::spawn(move || {
            for i in 0..2000u32 {
                let message = receiver.recv(100_000).unwrap();
                assert_eq!(message.len(), (i * 37) as usize);
                assert!(message.iter().all(|&byte| byte == i as u8));
            }
            assert!(matches!(receiver.recv(1), Err(Error::Closed { .. })));
        });
        (sending, receiving)
    };
    for (sending, receiving) in [run(client), run(server)] {
        sending.join().unwrap();
        receiving.join().unwrap();
    }
}

#[test]
fn an_oversized_message_is_refused_unread() {
    let (mut client, mut server) = channels(Purpose::Control);
    client.send(&[1; 1000]).unwrap();
    match server.recv(999) {
        Err(Error::TooLong { len_bytes: 1000, len_bytes_max: 999, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(server.recv(2000), Err(Error::Broken { .. })), "no way back into step");
}

#[test]
fn a_late_message_is_a_timeout_and_can_still_be_taken() {
    let (client, server) = channels(Purpose::Control);
    let (mut sender, _keep) = client.split();
    let (_, mut receiver) = server.split();
    assert_eq!(receiver.try_recv(10).unwrap(), None);
    let soon = Instant::now() + Duration::from_millis(50);
    assert!(matches!(receiver.recv_by(10, soon), Err(Error::Timeout { .. })));
    sender.send(b"one").unwrap();
    sender.send(b"two").unwrap();
    let later = Instant::now() + Duration::from_secs(20);
    assert_eq!(receiver.recv_by(10, later).unwrap(), b"one");
    assert_eq!(receiver.recv_by(10, later).unwrap(), b"two");
    assert!(!receiver.has_buffered());
}

#[test]
fn a_peer_that_does_not_read_is_a_timeout() {
    let (mut client, _server) = channels(Purpose::Control);
    let soon = Instant::now() + Duration::from_millis(100);
    let error = client.send_by(&vec![0; 100 << 20], soon).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(matches!(client.send(b"more"), Err(Error::Broken { .. })));
}

#[test]
fn closing_wakes_who_waits() {
    let (client, mut server) = channels(Purpose::Control);
    let closer = client.closer();
    let waiting = thread::spawn(move || {
        let mut client = client;
        client.recv(10)
    });
    thread::sleep(Duration::from_millis(20));
    closer.close();
    assert!(waiting.join().unwrap().unwrap_err().is_disconnect());
    assert!(server.recv(10).unwrap_err().is_disconnect());
}

#[test]
fn nobody_listening_is_refused_by_name() {
    let (listener, address) = listen();
    drop(listener);
    let error = connect(address, &Key::random().unwrap()).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[test]
fn the_second_address_is_tried() {
    let key = Key::random().unwrap();
    let (dead, dead_address) = listen();
    drop(dead);
    let (listener, address) = listen();
    let server_key = key.clone();
    let server = thread::spawn(move || accept_one(&listener, &server_key).map(drop));
    let addresses = [dead_address, address];
    Channel::connect(&addresses, &key, Route::NEW, Purpose::Control, patient()).unwrap();
    server.join().unwrap().unwrap();
}

#[test]
fn another_key_gets_no_byte_and_both_sides_say_so() {
    let (listener, address) = listen();
    let server = thread::spawn(move || {
        let error = accept_one(&listener, &Key::random().unwrap()).unwrap_err();
        assert!(matches!(error, Error::WrongKey { .. }), "{error}");
    });
    let error = connect(address, &Key::random().unwrap()).unwrap_err();
    assert!(matches!(error, Error::WrongKey { .. }), "{error}");
    server.join().unwrap();
}

#[test]
fn strangers_are_told_apart_on_both_sides() {
    let key = Key::random().unwrap();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\0", &[0xff; 500]] {
        let (mut client, server) = sockets();
        client.write_all(garbage).unwrap();
        let error = Channel::accept(server, &key, patient()).unwrap_err();
        assert!(matches!(error, Error::NotSlipstream { .. }), "{error}");
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        assert!(answer.is_empty(), "a stranger got {answer:?}");
    }
    let (listener, address) = listen();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
        stream
    });
    let error = connect(address, &key).unwrap_err();
    assert!(matches!(error, Error::NotSlipstream { .. }), "{error}");
    server.join().unwrap();
}

#[test]
fn a_silent_or_dribbling_peer_is_a_timeout() {
    let key = Key::random().unwrap();
    let (_client, server) = sockets();
    let error = Channel::accept(server, &key, hasty()).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");

    let (client, server) = sockets();
    let error = Channel::initiate(client, &key, Route::NEW, Purpose::Control, hasty()).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    drop(server);

    let (mut client, server) = sockets();
    let dribble = thread::spawn(move || {
        let bytes = [&[48, 0][..], &[1; 48]].concat();
        bytes.iter().all(|&byte| {
            thread::sleep(Duration::from_millis(20));
            client.write_all(&[byte]).is_ok()
        })
    });
    let started = Instant::now();
    let error = Channel::accept(server, &key, hasty()).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_millis(900), "every byte started the time anew");
    dribble.join().unwrap();
}

/// Stands between a client and a server, keeps what the client says and passes on the first bytes of the server.
fn relay(listener: &TcpListener, server: TcpStream, server_bytes_max: usize) -> Vec<u8> {
    let (client, _) = listener.accept().unwrap();
    let (mut from_client, mut to_client) = (client.try_clone().unwrap(), client);
    let (mut to_server, from_server) = (server.try_clone().unwrap(), server);
    let forth = thread::spawn(move || {
        let (mut all, mut buf) = (Vec::new(), [0; 4096]);
        while let Ok(len @ 1..) = from_client.read(&mut buf) {
            all.extend_from_slice(&buf[..len]);
            let _ = to_server.write_all(&buf[..len]);
        }
        let _ = to_server.shutdown(Shutdown::Both);
        all
    });
    let _ = std::io::copy(&mut from_server.take(server_bytes_max as u64), &mut to_client);
    let _ = to_client.shutdown(Shutdown::Write);
    forth.join().unwrap()
}

/// What a client sends of preamble, handshake and greeting.
fn recorded(key: &Key) -> Vec<u8> {
    let (listener, address) = listen();
    let (near, far) = sockets();
    let server_key = key.clone();
    let server = thread::spawn(move || {
        read_preamble(&far, patient().handshake).unwrap();
        let _ = Channel::accept(far, &server_key, patient());
    });
    // The server's handshake message is passed on, so that the client goes on to its greeting, and no more.
    let relaying = thread::spawn(move || relay(&listener, near, MESSAGE));
    let error = connect(address, key).unwrap_err();
    assert!(matches!(error, Error::Truncated { .. }), "{error}");
    server.join().unwrap();
    let bytes = relaying.join().unwrap();
    assert_eq!(bytes.len(), PREAMBLE + MESSAGE + GREETING_RECORD);
    bytes
}

#[test]
fn a_recorded_client_played_again_gets_nowhere() {
    let key = Key::random().unwrap();
    let bytes = recorded(&key);
    let (mut client, server) = sockets();
    client.write_all(&bytes[PREAMBLE..]).unwrap();
    let error = Channel::accept(server, &key, patient()).unwrap_err();
    assert!(matches!(error, Error::WrongKey { .. }), "{error}");
    let mut answer = Vec::new();
    let _ = client.read_to_end(&mut answer);
    assert!(answer.len() <= MESSAGE, "it got more than a handshake message");
}

#[test]
fn a_client_cut_off_at_any_byte_is_an_error() {
    let key = Key::random().unwrap();
    let bytes = &recorded(&key)[PREAMBLE..];
    for len in 0..bytes.len() {
        let (mut client, server) = sockets();
        client.write_all(&bytes[..len]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        match Channel::accept(server, &key, patient()).unwrap_err() {
            Error::Closed { .. } if len == 0 => {}
            Error::Truncated { .. } if len > 0 => {}
            other => panic!("{len} bytes: {other}"),
        }
    }
}

#[test]
fn a_server_cut_off_at_any_byte_is_an_error() {
    let key = Key::random().unwrap();
    for len in 0..MESSAGE + GREETING_RECORD {
        let (listener, address) = listen();
        let (near, far) = sockets();
        let server_key = key.clone();
        let server = thread::spawn(move || {
            read_preamble(&far, patient().handshake).unwrap();
            let _ = Channel::accept(far, &server_key, patient());
        });
        let relaying = thread::spawn(move || relay(&listener, near, len));
        match connect(address, &key).unwrap_err() {
            Error::WrongKey { .. } if len == 0 => {}
            Error::Truncated { .. } if len > 0 => {}
            other => panic!("{len} bytes: {other}"),
        }
        relaying.join().unwrap();
        server.join().unwrap();
    }
}

#[test]
fn a_mirror_is_not_a_peer() {
    let (listener, address) = listen();
    let mirror = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut bytes = [0; PREAMBLE + MESSAGE];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes[PREAMBLE..]).unwrap();
        let _ = stream.read(&mut bytes);
    });
    let error = connect(address, &Key::random().unwrap()).unwrap_err();
    assert!(matches!(error, Error::WrongKey { .. }), "{error}");
    mirror.join().unwrap();
}
