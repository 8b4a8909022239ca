//! Threads, channels and maps of the standard library over checked data.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 27)
}

fn block(number: u64) -> Vec<u64> {
    (0..500).map(|at| mix(number * 1000 + at)).collect()
}

fn main() {
    let flag = std::env::args().nth(1).expect("a flag file");
    let held: Arc<HashMap<u64, Vec<u64>>> = Arc::new((0..20_000).map(|number| (number, block(number))).collect());
    let (stop, failures) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut threads = Vec::new();
    for worker in 0..4u64 {
        let (held, stop, failures) = (Arc::clone(&held), Arc::clone(&stop), Arc::clone(&failures));
        // In parcels: where threads wake each other at every number, some kernels let no other session run for seconds.
        let (sender, receiver) = mpsc::sync_channel::<Vec<u64>>(8);
        threads.push(std::thread::spawn(move || {
            while let Ok(numbers) = receiver.recv() {
                for number in numbers {
                    failures.fetch_add(u64::from(held[&number].to_vec() != block(number)), Ordering::Relaxed);
                }
            }
        }));
        threads.push(std::thread::spawn(move || {
            let mut number = worker * 5000;
            while !stop.load(Ordering::Relaxed) {
                let parcel = (0..200).map(|_| {
                    number = (number * 21 + 1) % 20_000;
                    number
                });
                sender.send(parcel.collect()).expect("a receiver");
            }
        }));
    }
    println!("ready");
    while !std::path::Path::new(&flag).exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().for_each(|thread| thread.join().expect("a thread"));
    let wrong = held.iter().filter(|(number, held)| **held != block(**number)).count() as u64;
    match wrong + failures.load(Ordering::Relaxed) {
        0 => println!("OK"),
        wrong => println!("FAIL: {wrong} differences"),
    }
}
