//! Every order of two or three threads' steps, and every view of memory that they may have of each other (loom), over the code of
//! the daemon itself: [`handshake`], [`Quiesce`], [`Ring`] and the producer's side of completion queues.
//!
//! The guest's halves are written here as `docs/device.md` has them.

use std::rc::Rc;
use std::sync::atomic::Ordering::{self, AcqRel, Acquire, Relaxed, Release, SeqCst};

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, AtomicU64, fence};
use loom::sync::{Arc, Mutex};
use loom::thread;
use virtio_rdma::area::{ARM_NEXT, ARM_NONE};
use virtio_rdma::ring::Format;

use crate::cq::Producer;
use crate::engine::quiesce::Quiesce;
use crate::handshake::{self, Word, word};
use crate::ring::{Geometry, Ring, RingMemory};

word!(AtomicU32, u32, |_| thread::yield_now());
word!(AtomicU64, u64, |_| thread::yield_now());

/// The words of a doorbell area, one of each level.
#[derive(Default)]
struct Doorbells {
    sleeping: AtomicU32,
    summary: AtomicU64,
    bitmap: AtomicU64,
    /// Whether the driver notified the queue.
    kicked: AtomicU32,
}

impl Doorbells {
    /// What a driver does when it has posted (4.1).
    fn ring(&self, bit: u64) {
        if self.bitmap.fetch_or(bit, SeqCst) & bit == 0 {
            fence(SeqCst);
            self.summary.fetch_or(1, SeqCst);
        }
        fence(SeqCst);
        if self.sleeping.load(Relaxed) != 0 {
            self.kicked.store(1, Relaxed);
        }
    }

    /// What a worker does when it looks for work.
    fn take(&self) -> u64 {
        if handshake::take(&self.summary) == 0 { 0 } else { handshake::take(&self.bitmap) }
    }
}

#[test]
fn no_doorbell_is_lost_to_a_worker_that_goes_to_sleep() {
    loom::model(|| {
        let area = Arc::new(Doorbells::default());
        let driver = {
            let area = area.clone();
            thread::spawn(move || area.ring(1))
        };
        let mut seen = area.take();
        handshake::begin_sleep(&area.sleeping);
        seen |= area.take();
        driver.join().unwrap();
        assert!(seen == 1 || area.kicked.load(Relaxed) == 1, "it sleeps, and nobody wakes it");
        // Woken or not, the bit is there for it.
        handshake::end_sleep(&area.sleeping);
        assert_eq!(seen | area.take(), 1);
    });
}

#[test]
fn doorbells_of_two_processors_are_both_seen() {
    loom::model(|| {
        let area = Arc::new(Doorbells::default());
        let drivers = [1, 2].map(|bit| {
            let area = area.clone();
            thread::spawn(move || area.ring(bit))
        });
        let seen = area.take();
        for driver in drivers {
            driver.join().unwrap();
        }
        assert_eq!(seen | area.take(), 3);
    });
}

#[test]
fn no_post_of_another_thread_is_lost() {
    loom::model(|| {
        let (asleep, posts) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let other = {
            let (asleep, posts) = (asleep.clone(), posts.clone());
            thread::spawn(move || {
                posts.store(1, Release);
                handshake::must_wake(&*asleep)
            })
        };
        handshake::begin_sleep(&*asleep);
        let seen = posts.load(Acquire) == 1;
        let woken = other.join().unwrap();
        assert!(seen || woken);
    });
}

/// `ib_req_notify_cq`, then a last look at the ring (4.2). True if the guest would sleep.
fn arm_and_look(arm: &AtomicU32, ring: &AtomicU32, seen: u32) -> bool {
    arm.swap(ARM_NEXT, AcqRel);
    fence(SeqCst);
    ring.load(Acquire) == seen
}

#[test]
fn no_completion_event_is_lost() {
    loom::model(|| {
        let (arm, ring) = (Arc::new(AtomicU32::new(ARM_NONE)), Arc::new(AtomicU32::new(0)));
        let guest = {
            let (arm, ring) = (arm.clone(), ring.clone());
            thread::spawn(move || arm_and_look(&arm, &ring, 0))
        };
        ring.store(1, Release);
        let event = handshake::fire(&*arm, false);
        let sleeps = guest.join().unwrap();
        assert!(!sleeps || event, "the guest sleeps beside a completion");
    });
}

#[test]
fn two_workers_raise_one_event_for_one_arming() {
    loom::model(|| {
        let arm = Arc::new(AtomicU32::new(ARM_NEXT));
        let other = {
            let arm = arm.clone();
            thread::spawn(move || handshake::fire(&*arm, true))
        };
        let events = u8::from(handshake::fire(&*arm, false)) + u8::from(other.join().unwrap());
        assert_eq!(events, 1);
    });
}

/// Something that a worker finds, and its owner frees. Loom fails on accesses that nothing orders.
struct Object {
    findable: AtomicU32,
    memory: UnsafeCell<u32>,
}

impl Object {
    fn new() -> Self {
        Self { findable: AtomicU32::new(1), memory: UnsafeCell::new(7) }
    }
}

/// Worker 0, which uses the object within a quantum if it finds it.
fn worker_that_looks(quiesce: &Arc<Quiesce<AtomicU64>>, object: &Arc<Object>) -> thread::JoinHandle<()> {
    let (quiesce, object) = (quiesce.clone(), object.clone());
    thread::spawn(move || {
        quiesce.enter(0);
        if object.findable.load(Relaxed) == 1 {
            // SAFETY: what the tests are about: loom reports a concurrent write.
            object.memory.with(|memory| assert_eq!(unsafe { *memory }, 7));
        }
        quiesce.leave(0);
    })
}

#[test]
fn nothing_is_freed_under_a_quantum() {
    loom::model(|| {
        let quiesce = Arc::new(Quiesce::<AtomicU64>::new(2));
        let object = Arc::new(Object::new());
        let worker = worker_that_looks(&quiesce, &object);
        object.findable.store(0, Relaxed);
        quiesce.wait();
        // SAFETY: as above.
        object.memory.with_mut(|memory| unsafe { *memory = 0 });
        worker.join().unwrap();
    });
}

#[test]
fn a_worker_that_waits_for_another_frees_nothing_under_it() {
    loom::model(|| {
        let quiesce = Arc::new(Quiesce::<AtomicU64>::new(2));
        let object = Arc::new(Object::new());
        let worker = worker_that_looks(&quiesce, &object);
        quiesce.enter(1);
        object.findable.store(0, Relaxed);
        let grace = quiesce.begin(1);
        quiesce.leave(1);
        if quiesce.is_over(&grace) {
            // SAFETY: as above.
            object.memory.with_mut(|memory| unsafe { *memory = 0 });
        }
        worker.join().unwrap();
    });
}

/// Memory of a ring in which loom sees each access: header words, and elements of one byte that matters.
struct Memory {
    words: [AtomicU32; 2],
    elements: [UnsafeCell<u8>; ENTRIES as usize],
}

const ENTRIES: u32 = 2;
const STRIDE: u32 = 64;

impl Memory {
    fn element(offset: usize) -> usize {
        (offset - size_of::<virtio_rdma::ring::RingHeader>()) / STRIDE as usize
    }
}

impl RingMemory for Arc<Memory> {
    type Word = AtomicU32;

    fn word(&self, offset: usize) -> &AtomicU32 {
        &self.words[usize::from(offset != std::mem::offset_of!(virtio_rdma::ring::RingHeader, producer_index))]
    }

    fn read(&self, offset: usize, buf: &mut [u8]) {
        // SAFETY: what these tests are about: loom reports a concurrent write.
        buf[0] = self.elements[Memory::element(offset)].with(|byte| unsafe { *byte });
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        // SAFETY: as above.
        self.elements[Memory::element(offset)].with_mut(|byte| unsafe { *byte = bytes[0] });
    }

    fn prefetch(&self, _offset: usize) {}

    fn prefetch_to_write(&self, _offset: usize) {}
}

fn ring() -> (Arc<Memory>, Ring<Arc<Memory>>) {
    let memory = Arc::new(Memory {
        words: [AtomicU32::new(0), AtomicU32::new(0)],
        elements: [UnsafeCell::new(0), UnsafeCell::new(0)],
    });
    let geometry = Geometry { format: Format::Rxe, entries: ENTRIES, stride: STRIDE };
    (memory.clone(), Ring::over(geometry, memory))
}

/// A guest posts two requests through a ring that holds one; a worker takes them.
#[test]
fn elements_of_a_work_ring_arrive_whole_and_in_order() {
    loom::model(|| {
        let (memory, ring) = ring();
        let guest = thread::spawn(move || {
            for (index, request) in [(0usize, 11), (1, 12)] {
                let next = (index as u32 + 1) % ENTRIES;
                while memory.words[1].load(Acquire) == next {
                    thread::yield_now();
                }
                // SAFETY: as above.
                memory.elements[index].with_mut(|byte| unsafe { *byte = request });
                memory.words[0].store(next, Release);
            }
        });
        let mut consumer = 0;
        for request in [11, 12] {
            while ring.producer().unwrap() == consumer {
                thread::yield_now();
            }
            let mut element = [0];
            ring.read(consumer, 0, &mut element);
            assert_eq!(element, [request]);
            consumer = ring.geometry().next(consumer);
            ring.set_consumer(consumer);
        }
        guest.join().unwrap();
    });
}

/// Two workers complete into one CQ, whose guest polls: each completion arrives once and whole.
#[test]
fn completions_of_two_workers_arrive_whole() {
    loom::model(|| {
        let (memory, ring) = ring();
        let producer = Rc::new(Mutex::new(Producer::over(ring)));
        let worker = |value: u8| {
            let producer = producer.clone();
            thread::spawn(move || {
                let written = producer.lock().unwrap().push_bytes(&[value; 48]).is_ok();
                producer.lock().unwrap().publish();
                written
            })
        };
        let workers = [worker(1), worker(2)];
        let (mut consumer, mut sum) = (0u32, 0);
        let mut poll = || {
            if memory.words[0].load(Acquire) != consumer {
                // SAFETY: as above.
                sum += memory.elements[consumer as usize].with(|byte| unsafe { *byte });
                consumer = (consumer + 1) % ENTRIES;
                memory.words[1].store(consumer, Release);
            }
        };
        poll();
        let written = workers.map(|worker| worker.join().unwrap());
        poll();
        poll();
        // The ring holds one: the second worker may have found it full, and then breaks the CQ.
        assert!(written[0] || written[1]);
        let expected: u8 = (1..=2).zip(written).map(|(value, written)| if written { value } else { 0 }).sum();
        assert_eq!(sum, expected);
    });
}
