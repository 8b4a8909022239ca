//! What a reader may want to know of [`Pages`] in small: the simulator does the rest.

use super::*;

const BASE: u64 = 0x10_0000;
const PROCESS: SpaceId = SpaceId::PROCESS;

fn region(start: u64, len_bytes: u64) -> Region {
    Region { start, len_bytes, page_size: 4096, shared: false, forks: true }
}

fn pages(regions: Vec<Region>) -> Pages {
    let layout = Layout::new(regions).unwrap();
    let len = PageTable::len_bytes(&layout);
    let memory = || TableMemory::anonymous(len).unwrap();
    Pages::new(layout, memory(), memory()).unwrap()
}

fn child_memory(pages: &Pages) -> TableMemory {
    TableMemory::anonymous(PageTable::len_bytes(pages.layout())).unwrap()
}

/// Installs whatever of a range is wanted; says where.
fn land(pages: &Pages, id: SpaceId, source: u64, len: u64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    pages.begin_copy(id, source, len, &mut pieces);
    for piece in pieces.iter().filter(|piece| piece.kind == PieceKind::Install) {
        pages.end_copy(id, piece.source_address, piece.len_bytes);
    }
    pieces
}

fn drain(pages: &Pages) -> u64 {
    let mut bytes = 0;
    while let Some(run) = pages.next_run(1 << 20) {
        land(pages, run.space, run.source_address, run.len_bytes);
        pages.finish_run(&run);
        bytes += run.len_bytes;
    }
    bytes
}

#[test]
fn a_fault_on_a_page_on_its_way_is_fetched_urgently_once() {
    let pages = pages(vec![region(BASE, 64 << 12)]);
    pages.present_run(BASE, 64 << 12).unwrap();
    let run = pages.next_run(16 << 12).unwrap();
    assert_eq!((run.source_address, run.len_bytes), (BASE, 16 << 12));
    let fetch = FaultAction::Fetch {
        source_address: BASE + 0x3000,
        len_bytes: 4096,
        current_address: BASE + 0x3000,
    };
    assert_eq!(pages.fault(PROCESS, 1, BASE + 0x3123), Ok(fetch));
    assert_eq!(pages.fault(PROCESS, 2, BASE + 0x3456), Ok(FaultAction::Wait));
    assert_eq!(pages.urgent_outstanding(), [(PROCESS, BASE + 0x3000, 4096)]);
    assert_eq!(land(&pages, PROCESS, BASE + 0x3000, 4096).len(), 1);
    pages.urgent_done(PROCESS, BASE + 0x3000);
    let around = land(&pages, PROCESS, run.source_address, run.len_bytes);
    let lens: Vec<u64> = around.iter().map(|piece| piece.len_bytes >> 12).collect();
    assert_eq!(lens, [3, 12], "what the fault brought is not installed again");
}

#[test]
fn the_drain_ends_when_all_has_arrived_or_gone() {
    let mut pages = pages(vec![region(BASE, 64 << 12)]);
    pages.present_run(BASE, 32 << 12).unwrap();
    pages.absent_run(BASE + (32 << 12), 32 << 12).unwrap();
    pages.map_complete();
    let run = pages.next_run(8 << 12).unwrap();
    assert_eq!(pages.unmap(PROCESS, BASE, BASE + (4 << 12)), BASE..BASE + (4 << 12));
    pages.remove(PROCESS, BASE + (30 << 12), BASE + (32 << 12), SharedRemove::Keep);
    assert_eq!(land(&pages, PROCESS, run.source_address, 2 << 12), []);
    pages.finish_run(&run); // the lane failed: four of its pages are to do again
    assert!(!pages.complete());
    assert_eq!(drain(&pages), 26 << 12);
    assert!(pages.complete());
    let statistics = pages.statistics();
    assert_eq!((statistics.pages_total, statistics.pages_present), (32, 26));
    assert_eq!(statistics.pages_gone, 6);
    // Of what the source never had, nothing counts.
    pages.unmap(PROCESS, BASE + (40 << 12), BASE + (48 << 12));
    assert_eq!(pages.statistics().pages_gone, 6);
    let zero = |start| FaultAction::Zero { start, len_bytes: 4096 };
    for page in [0, 30, 40, 1000] {
        let at = BASE + (page << 12);
        assert_eq!(pages.fault(PROCESS, 1, at), Ok(zero(at)));
    }
}

#[test]
fn what_moves_is_installed_where_it_is_now() {
    let mut pages = pages(vec![region(BASE, 16 << 12)]);
    pages.present_run(BASE, 16 << 12).unwrap();
    let run = pages.next_run(16 << 12).unwrap();
    pages.remap(PROCESS, BASE + (4 << 12), 0x7000_0000, 4 << 12);
    let places: Vec<u64> = land(&pages, PROCESS, run.source_address, run.len_bytes)
        .iter()
        .map(|piece| piece.current_address)
        .collect();
    assert_eq!(places, [BASE, 0x7000_0000, BASE + (8 << 12)]);
    let old = BASE + (5 << 12);
    let zero = FaultAction::Zero { start: old, len_bytes: 4096 };
    assert_eq!(pages.fault(PROCESS, 1, old), Ok(zero));
    assert_eq!(pages.space(PROCESS).unwrap().current_of(old), Some(0x7000_1000));
}

#[test]
fn a_child_gets_its_own_copy_and_shares_shared_memory() {
    let shared = Region { shared: true, ..region(0x80_0000, 8 << 12) };
    let wiped = Region { forks: false, ..region(0x90_0000, 8 << 12) };
    let mut pages = pages(vec![region(BASE, 8 << 12), shared, wiped]);
    for region in [BASE, shared.start, wiped.start] {
        pages.present_run(region, 8 << 12).unwrap();
    }
    pages.map_complete();
    let run = pages.next_run(8 << 12).unwrap();
    let child = pages.fork(PROCESS, child_memory(&pages)).unwrap();
    land(&pages, PROCESS, run.source_address, run.len_bytes);
    pages.finish_run(&run);
    assert!(matches!(pages.fault(child, 9, BASE), Ok(FaultAction::Fetch { .. })));
    assert!(matches!(pages.fault(child, 9, wiped.start), Ok(FaultAction::Zero { .. })));
    pages.remove(child, shared.start, shared.start + 4096, SharedRemove::Punch);
    assert!(matches!(pages.fault(PROCESS, 1, shared.start), Ok(FaultAction::Zero { .. })));
    land(&pages, child, BASE, 4096);
    pages.urgent_done(child, BASE);
    assert_eq!(drain(&pages), (7 + 8 + 7) << 12);
    assert!(pages.complete());
    pages.exit(child);
    assert_eq!(pages.fault(child, 9, BASE), Err(PagesError::NoSpace(child)));
}

#[test]
fn an_alias_is_woken_when_the_other_is_installed() {
    let shared = Region { shared: true, ..region(BASE, 8 << 12) };
    let mut pages = pages(vec![shared]);
    pages.track_alias(0x7000_0000, BASE + 4096, 2 << 12).unwrap();
    assert!(pages.track_alias(0x7000_0000, BASE, 9 << 12).is_err());
    let pieces = land(&pages, PROCESS, BASE, 4 << 12);
    let woken: Vec<_> = pieces.iter().filter(|piece| piece.kind == PieceKind::Wake).collect();
    assert_eq!(woken.len(), 1);
    assert_eq!((woken[0].current_address, woken[0].len_bytes), (0x7000_0000, 2 << 12));
}

#[test]
fn hints_and_the_hot_list_come_before_the_rest() {
    let pages = pages(vec![region(BASE, 1024 << 12)]);
    pages.present_run(BASE, 1024 << 12).unwrap();
    pages.hot(BASE + (900 << 12), 2 << 12).unwrap();
    pages.fault(PROCESS, 1, BASE + (512 << 12)).unwrap();
    let next = |max| pages.next_run(max).map(|run| (run.source_address - BASE) >> 12);
    assert_eq!(next(64 << 12), Some(513), "around the fault");
    assert_eq!(next(64 << 12), Some(900), "the hot list");
    assert_eq!(next(64 << 12), Some(0), "the rest");
    // A thread that walks down is followed down.
    pages.fault(PROCESS, 2, BASE + (800 << 12)).unwrap();
    pages.fault(PROCESS, 2, BASE + (799 << 12)).unwrap();
    assert_eq!(next(4 << 12), Some(795));
    assert_eq!(next(4 << 12), Some(791));
}

#[test]
fn a_hole_of_a_tebibyte_costs_nothing_and_is_unregistered() {
    let mut pages = pages(vec![region(1 << 40, 1 << 40)]);
    let report = pages.absent_run(1 << 40, (1 << 40) - 4096).unwrap();
    let range = 1 << 40..(2 << 40) - 4096;
    assert_eq!(report, [Unregister { space: PROCESS, range }]);
    pages.present_run((2 << 40) - 4096, 4096).unwrap();
    pages.map_complete();
    pages.remove(PROCESS, 1 << 40, 3 << 39, SharedRemove::Keep);
    assert_eq!(drain(&pages), 4096);
    assert!(pages.complete());
    assert!(pages.present_run(1 << 39, 4096).is_err(), "outside every region");
    assert!(pages.present_run((1 << 40) + 1, 4096).is_err(), "not whole pages");
    assert!(pages.absent_run(u64::MAX - 4095, 8192).is_err(), "wraps");
}

#[test]
fn lanes_and_faults_race_without_loss() {
    const LEN: u64 = 4096 << 12;
    let mut pages = pages(vec![region(BASE, LEN)]);
    pages.present_run(BASE, LEN).unwrap();
    pages.map_complete();
    let pages_ref = &pages;
    std::thread::scope(|scope| {
        for lane in 0..3_u64 {
            scope.spawn(move || {
                let mut failures = lane;
                while let Some(run) = pages_ref.next_run(64 << 10) {
                    failures += 1;
                    if failures % 5 != 0 {
                        land(pages_ref, PROCESS, run.source_address, run.len_bytes);
                    }
                    pages_ref.finish_run(&run);
                }
            });
        }
        scope.spawn(move || {
            for step in 0..4000_u64 {
                let at = BASE + ((step * 2_654_435_761 % 4096) << 12);
                if let Ok(FaultAction::Fetch { source_address, len_bytes, .. }) =
                    pages_ref.fault(PROCESS, 1, at)
                {
                    land(pages_ref, PROCESS, source_address, len_bytes);
                    pages_ref.urgent_done(PROCESS, source_address);
                }
            }
        });
    });
    drain(&pages);
    assert!(pages.complete());
    assert_eq!(pages.statistics().pages_present, 4096);
    pages.exit(PROCESS);
    assert!(pages.complete());
}

/// Run with `--ignored --nocapture`: nanoseconds of the operations on the hot path.
#[test]
#[ignore = "prints times"]
fn times_of_the_hot_path() {
    const PAGES: u64 = 1 << 18;
    let regions = (0..2000).map(|i| region(0x4000_0000_0000 + (i << 24), 1 << 20));
    let pages = pages(regions.chain([region(1 << 32, PAGES << 12)]).collect());
    pages.present_run(1 << 32, PAGES << 12).unwrap();
    let started = std::time::Instant::now();
    for step in 0..PAGES / 4 {
        let at = (1 << 32) + ((step * 2_654_435_761 % PAGES) << 12);
        pages.fault(PROCESS, 1, at).unwrap();
    }
    println!("fault: {:?}", started.elapsed() / (PAGES / 4) as u32);
    let mut pieces = Vec::new();
    let started = std::time::Instant::now();
    let mut copies = 0;
    for at in ((1 << 32)..(1 << 32) + (PAGES << 12)).step_by(15 << 12) {
        pages.begin_copy(PROCESS, at, 15 << 12, &mut pieces);
        pages.end_copy(PROCESS, at, 15 << 12);
        copies += 1;
    }
    println!("begin_copy and end_copy of 15 pages: {:?}", started.elapsed() / copies);
}
