//! Completion queues (IBA 11.2.8): the ring, and the handshake with a guest that waits for an event.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

use parking_lot::Mutex;
use virtio_rdma::area::{ARM_NEXT, ARM_NONE, ARM_SOLICITED, ARM_STRIDE};
use virtio_rdma::ring::Cqe;
use zerocopy::IntoBytes;

use crate::mem::{Map, Pages};
use crate::ring::Ring;

/// The guest did not take its completions, wrote nonsense, or took the ring's memory away. The CQ does nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("completion queue overflowed or its memory is gone")]
pub struct CqBroken;

/// A completion queue. Several workers may produce into it.
#[derive(Debug)]
pub struct Cq {
    /// Number of the CQ, also of its arm word.
    pub cqn: u32,
    /// Event queue for its events.
    pub vector: usize,
    /// QPs that use it, counted once for each of their two queues.
    pub users: AtomicU32,
    arm: Arc<Pages>,
    ring: Mutex<Producer>,
    broken: AtomicBool,
}

#[derive(Debug)]
struct Producer {
    /// `None` once the CQ is broken or destroyed.
    ring: Option<Ring>,
    index: u32,
    /// The guest's index when we last looked; looking again is only needed when the ring seems full.
    consumer: u32,
}

impl Cq {
    /// A CQ over this ring, with its arm word in `arm`.
    pub fn new(cqn: u32, vector: usize, ring: Ring, arm: Arc<Pages>) -> Self {
        let ring = Mutex::new(Producer { ring: Some(ring), index: 0, consumer: 0 });
        Self { cqn, vector, users: AtomicU32::new(0), arm, ring, broken: AtomicBool::new(false) }
    }

    /// Writes one completion.
    ///
    /// # Errors
    /// [`CqBroken`] when there is no room; [`first_break`](Self::first_break) tells who reports it.
    pub fn push(&self, cqe: &Cqe) -> Result<(), CqBroken> {
        let mut producer = self.ring.lock();
        producer.push(cqe).inspect_err(|_| producer.ring = None)
    }

    /// After completions were pushed: whether the guest waits for an event for them. The answer is yes at most once for each arming.
    pub fn take_event(&self, solicited: bool) -> bool {
        let arm = self.arm.u32(self.cqn as usize * ARM_STRIDE);
        // Pairs with the guest's barrier between arming and looking at the ring.
        fence(Ordering::SeqCst);
        match arm.load(Ordering::Relaxed) {
            ARM_NEXT => arm.swap(ARM_NONE, Ordering::AcqRel) != ARM_NONE,
            ARM_SOLICITED if solicited => arm.swap(ARM_NONE, Ordering::AcqRel) != ARM_NONE,
            _ => false,
        }
    }

    /// True for the first caller after the CQ broke: that one raises the event.
    pub fn first_break(&self) -> bool {
        !self.broken.swap(true, Ordering::AcqRel)
    }

    /// Lets go of the ring; nothing is written any more.
    pub fn close(&self) {
        self.ring.lock().ring = None;
    }

    /// Lets go of the ring if its memory is no longer there; true if it did.
    pub fn close_if_gone(&self, map: &Map) -> bool {
        let mut producer = self.ring.lock();
        let gone = producer.ring.as_ref().is_some_and(|r| !r.is_in(map));
        if gone {
            producer.ring = None;
        }
        gone
    }
}

impl Producer {
    fn push(&mut self, cqe: &Cqe) -> Result<(), CqBroken> {
        let ring = self.ring.as_ref().ok_or(CqBroken)?;
        let next = ring.geometry().next(self.index);
        if next == self.consumer {
            self.consumer = ring.consumer().map_err(|_| CqBroken)?;
            if next == self.consumer {
                return Err(CqBroken);
            }
        }
        ring.write(self.index, cqe.as_bytes());
        ring.set_producer(next);
        self.index = next;
        Ok(())
    }
}
