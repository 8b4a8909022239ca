//! A quick look at the speed of a lane: `cargo test --release -p slipstream-transport --test throughput -- --ignored
//! --nocapture --test-threads 1`.

mod common;

use common::channels;
use nix::sys::resource::{UsageWho, getrusage};
use slipstream_transport::{
    Block, Extent, PageLane, PageRequest, PageServer, PageSource, Purpose, TcpPageLane,
};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// A source whose reading costs one copy, like that of a real one at its best.
struct Copies(Vec<u8>);

impl PageSource for Copies {
    fn extent(&self, _: u64, len_bytes: u32) -> io::Result<Extent> {
        Ok(Extent { len_bytes, present: true })
    }

    fn read(&self, address: u64, out: &mut [u8]) -> io::Result<()> {
        let at = (address as usize) % (self.0.len() - out.len() + 1);
        out.copy_from_slice(&self.0[at..at + out.len()]);
        Ok(())
    }
}

fn memory() -> Copies {
    Copies(vec![1; 64 << 20])
}

/// CPU time this process has used, user and system.
fn cpu_time() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let time = |value: nix::sys::time::TimeVal| {
        Duration::from_micros(value.tv_sec() as u64 * 1_000_000 + value.tv_usec() as u64)
    };
    time(usage.user_time()) + time(usage.system_time())
}

fn bulk(lanes: u16, total: u64, request_len: u32) {
    let memory = memory();
    let pairs: Vec<_> = (0..lanes)
        .map(|i| {
            let (near, far) = channels(Purpose::Bulk(i));
            (TcpPageLane::new(near), PageServer::new(far))
        })
        .collect();
    let (started, cpu) = (Instant::now(), cpu_time());
    thread::scope(|scope| {
        for (mut lane, mut server) in pairs {
            let memory = &memory;
            scope.spawn(move || server.serve(memory).unwrap());
            scope.spawn(move || {
                let share = total / u64::from(lanes);
                let (mut posted, mut got) = (0, 0);
                while got < share {
                    while posted < share && lane.outstanding_bytes() < 8 << 20 {
                        lane.post(PageRequest { address: posted, len_bytes: request_len }, 0)
                            .unwrap();
                        posted += u64::from(request_len);
                    }
                    lane.flush().unwrap();
                    got += u64::from(lane.next(Block::Forever).unwrap().unwrap().len_bytes);
                }
            });
        }
    });
    let (took, cpu) = (started.elapsed(), cpu_time().checked_sub(cpu).unwrap());
    println!(
        "{lanes} lane(s), requests of {} KiB: {:.2} GB/s, {:.2} core-seconds a GB",
        request_len >> 10,
        total as f64 / 1e9 / took.as_secs_f64(),
        cpu.as_secs_f64() / (total as f64 / 1e9),
    );
}

#[test]
#[ignore = "a measurement, for release builds"]
fn bulk_lanes() {
    for lanes in [1, 2] {
        for request_len in [4 << 20, 256 << 10, 64 << 10, 4 << 10] {
            bulk(lanes, 4 << 30, request_len);
        }
    }
}

#[test]
#[ignore = "a measurement, for release builds"]
fn urgent_lane() {
    const COUNT: u32 = 50_000;
    let memory = memory();
    for len_bytes in [4096, 65_536] {
        let (near, far) = channels(Purpose::Urgent);
        let (mut lane, mut server) = (TcpPageLane::new(near), PageServer::new(far));
        thread::scope(|scope| {
            let memory = &memory;
            scope.spawn(move || server.serve(memory).unwrap());
            let mut times = Vec::with_capacity(COUNT as usize);
            let cpu = cpu_time();
            for i in 0..u64::from(COUNT) {
                let started = Instant::now();
                lane.post(PageRequest { address: i * 4096, len_bytes }, 0).unwrap();
                lane.flush().unwrap();
                while lane.outstanding_bytes() > 0 {
                    lane.next(Block::Forever).unwrap();
                }
                times.push(started.elapsed());
            }
            let cpu = cpu_time().checked_sub(cpu).unwrap() / COUNT;
            let mean = times.iter().sum::<Duration>() / COUNT;
            times.sort_unstable();
            println!(
                "round trip of {} KiB: mean {mean:?}, p50 {:?}, p99 {:?}, CPU of both ends {cpu:?}",
                len_bytes >> 10,
                times[times.len() / 2],
                times[times.len() * 99 / 100],
            );
            drop(lane);
        });
    }
}
