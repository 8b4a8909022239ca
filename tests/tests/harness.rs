//! The harness itself, without the binary: hosts reach each other, and nothing outlives them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use slipstream_tests::process::Pidfd;
use slipstream_tests::wait;
use slipstream_tests::{Build, Hosts, Program};

#[test]
fn two_hosts_reach_each_other() {
    let (left, right) = slipstream_tests::namespace::Namespace::joined();
    let listener = right.enter(|| TcpListener::bind((right.address, 0))).expect("listening");
    let address = listener.local_addr().expect("an address");
    let mut near = left.enter(|| TcpStream::connect(address)).expect("connecting");
    let (mut far, from) = listener.accept().expect("a connection");
    assert_eq!(from.ip(), left.address);
    near.write_all(b"hello").expect("sending");
    let mut buffer = [0; 5];
    far.read_exact(&mut buffer).expect("receiving");
    assert_eq!(&buffer, b"hello");
    assert!(
        TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_err(),
        "reachable from outside"
    );
}

#[test]
fn nothing_outlives_its_hosts() {
    let hosts = Hosts::without_slipstream();
    let path = hosts.path().to_path_buf();
    let program = Program::start(&hosts, Build::dynamic("heap"), &[]);
    let process = Pidfd::open(program.pid).expect("a running program");
    assert!(hosts.pids().contains(&program.pid));
    assert!(hosts.describe().contains("ready"), "{}", hosts.describe());
    drop(program);
    // A panic in between must make no difference: unwinding drops the hosts just so.
    drop(hosts);
    wait::until("the program to be gone", Duration::from_secs(10), || {
        process.ended().then_some(())
    });
    assert!(!path.exists(), "{} is left", path.display());
}
