//! Rings that are exchanged for others by a guest that does not stop.
//!
//! Not among the unit tests: memory that is mapped there before those of loom begin loses its signal handler to theirs.
#![allow(missing_docs, reason = "a test program")]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use freeflow_backend::cq::Cq;
use freeflow_backend::mem::{Map, Pages, RegionId};
use freeflow_backend::ring::{Geometry, Ring};
use virtio_rdma::PAGE_SIZE;
use virtio_rdma::ring::{Cqe, Format};

const ENTRIES: u32 = 1 << 17;
const WRITTEN: u32 = 100_000;

fn memory() -> Map {
    let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    let id = RegionId { gpa: 0, size: 64 << 20, vmm_addr: 0, offset: 0 };
    file.set_len(id.size).unwrap();
    Map::default().with(id, file).unwrap()
}

/// A ring for many completions, at one of two places.
fn ring(map: &Map, place: u64) -> Ring {
    let geometry = Geometry { format: Format::Rxe, entries: ENTRIES, stride: 64 };
    let size = geometry.size().next_multiple_of(PAGE_SIZE) as u64;
    Ring::new(map, geometry, &[(PAGE_SIZE as u64 + place * size, size)]).unwrap()
}

/// To copy a hundred thousand completions takes milliseconds; a worker that has one more must not wait for that.
#[test]
fn workers_do_not_wait_for_a_full_ring_that_is_exchanged_without_end() {
    let map = memory();
    let arm = Arc::new(Pages::new(&map, &[(0, PAGE_SIZE as u64)], PAGE_SIZE).unwrap());
    let cq = Cq::new(0, 0, ring(&map, 0), arm);
    let push = |n: u32| cq.push(&Cqe { wr_id: u64::from(n).into(), ..Cqe::default() }, true).unwrap();
    for n in 0..WRITTEN {
        push(n);
    }
    let stop = AtomicBool::new(false);
    let waited: Duration = std::thread::scope(|scope| {
        scope.spawn(|| {
            for place in [1, 0].into_iter().cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
                cq.resize(ring(&map, place)).unwrap();
            }
        });
        let timed = |n| {
            std::thread::sleep(Duration::from_micros(100));
            let start = Instant::now();
            push(n);
            start.elapsed()
        };
        let waited = (WRITTEN..WRITTEN + 2000).map(timed).sum();
        stop.store(true, Ordering::Relaxed);
        waited
    });
    // Some tens of milliseconds on a busy machine. With the lock held for all but moments it was more than ten seconds.
    assert!(waited < Duration::from_secs(2), "{waited:?} for 2000 completions");
}
