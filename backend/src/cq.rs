//! Completion queues (IBA 11.2.8): the ring, and the handshake with a guest that waits for an event.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;
use virtio_rdma::area::ARM_STRIDE;
use virtio_rdma::ring::Cqe;
use zerocopy::IntoBytes;

use crate::handshake;
use crate::mem::{Map, Pages};
use crate::ring::{LAST_MOVED, Move, ResizeError, Ring, RingMemory};

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
    /// Bytes of guest memory that its ring takes.
    pub ring_bytes: AtomicU64,
    memory: Mutex<Producer>,
    broken: AtomicBool,
}

/// Our side of the ring.
#[derive(Debug)]
pub(crate) struct Producer<M = Pages> {
    /// `None` once the CQ is broken or destroyed: then nothing keeps the guest's memory, whoever still has the CQ.
    ring: Option<Ring<M>>,
    /// The area of arm words.
    arm: Option<Arc<Pages>>,
    index: u32,
    /// The index that the guest knows.
    published: u32,
    /// The guest's index when we last looked; looking again is only needed when the ring seems full.
    consumer: u32,
}

impl Cq {
    /// A CQ over this ring, with its arm word in `arm`.
    pub fn new(cqn: u32, vector: usize, ring: Ring, arm: Arc<Pages>) -> Self {
        let ring_bytes = AtomicU64::new(ring.geometry().size() as u64);
        let memory = Mutex::new(Producer { ring: Some(ring), arm: Some(arm), index: 0, published: 0, consumer: 0 });
        Self { cqn, vector, users: AtomicU32::new(0), ring_bytes, memory, broken: AtomicBool::new(false) }
    }

    /// Elements that are fetched ahead of single completions.
    const AHEAD: u32 = 2;

    /// Writes one completion, which the guest sees at once, or with the next [`publish`](Self::publish): telling it of several at once saves
    /// both sides the way of a cache line there and back. For how many more there is room.
    ///
    /// # Errors
    /// [`CqBroken`] when there is no room; [`first_break`](Self::first_break) tells who reports it.
    pub fn push(&self, cqe: &Cqe, show: bool) -> Result<u32, CqBroken> {
        let mut producer = self.memory.lock();
        producer.push_or_break(cqe.as_bytes())?;
        if show {
            producer.publish();
        }
        producer.prefetch(Self::AHEAD);
        Ok(producer.room())
    }

    /// Writes several, which the guest sees at once: how many, and for how many more there is room. Others may have used up what there was
    /// before.
    pub fn append<'a>(&self, cqes: impl Iterator<Item = &'a Cqe>) -> (usize, Result<u32, CqBroken>) {
        let mut producer = self.memory.lock();
        let mut written = 0;
        for cqe in cqes {
            if producer.push_or_break(cqe.as_bytes()).is_err() {
                return (written, Err(CqBroken));
            }
            written += 1;
        }
        producer.publish();
        producer.prefetch(written as u32);
        (written, Ok(producer.room()))
    }

    /// Writes into another ring from now on, to whose beginning completions that were not polled move. The guest does not poll meanwhile.
    ///
    /// # Errors
    /// Why not; the ring of before stays in use then.
    pub fn resize(&self, ring: Ring) -> Result<(), ResizeError> {
        let (from, start) = self.memory.lock().start()?;
        let bytes = ring.geometry().size() as u64;
        let (mut ring, mut way) = (Some(ring), Move::new(start, size_of::<Cqe>()));
        while let Some(to) = &ring {
            let written = self.memory.lock().index;
            way.go_on(&from, to, written, u32::MAX)?;
            self.memory.lock().move_to(&mut ring, &mut way)?;
        }
        self.ring_bytes.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Shows the guest the completions written so far.
    pub fn publish(&self) {
        self.memory.lock().publish();
    }

    /// Shows the guest the completions written so far, and says whether it waits for an event for them. The answer is yes at most
    /// once for each arming.
    pub fn take_event(&self, solicited: bool) -> bool {
        let mut producer = self.memory.lock();
        producer.publish();
        let Some(arm) = &producer.arm else {
            return false;
        };
        handshake::fire(arm.u32(self.cqn as usize * ARM_STRIDE), solicited)
    }

    /// True for the first caller after the CQ broke: that one raises the event.
    pub fn first_break(&self) -> bool {
        !self.broken.swap(true, Ordering::AcqRel)
    }

    /// Lets go of the ring; nothing is written any more.
    pub fn close(&self) {
        self.memory.lock().close();
    }

    /// Lets go of ring and arm word if the memory of either is no longer there; true if it did.
    pub fn close_if_gone(&self, map: &Map) -> bool {
        let mut producer = self.memory.lock();
        let ring_gone = producer.ring.as_ref().is_some_and(|r| !r.is_in(map));
        let arm_gone = producer.arm.as_ref().is_some_and(|a| !a.is_in(map));
        if ring_gone || arm_gone {
            producer.close();
        }
        ring_gone || arm_gone
    }
}

impl<M: RingMemory> Producer<M> {
    #[cfg(test)]
    pub fn over(ring: Ring<M>) -> Self {
        Self { ring: Some(ring), arm: None, index: 0, published: 0, consumer: 0 }
    }

    fn close(&mut self) {
        self.ring = None;
        self.arm = None;
    }

    /// The ring, and the first completion that was not polled.
    fn start(&self) -> Result<(Ring<M>, u32), ResizeError>
    where
        M: Clone,
    {
        let ring = self.ring.as_ref().ok_or(ResizeError::Broken)?;
        let start = ring.consumer().map_err(|_| ResizeError::Broken)?;
        Ok((ring.clone(), start))
    }

    /// Copies the last completions; with all of them there the other ring takes the place of this one.
    fn move_to(&mut self, other: &mut Option<Ring<M>>, way: &mut Move) -> Result<(), ResizeError> {
        let ring = self.ring.as_ref().ok_or(ResizeError::Broken)?;
        let Some(to) = other else { return Ok(()) };
        if let Some(count) = way.go_on(ring, to, self.index, LAST_MOVED)? {
            to.set_consumer(0);
            to.set_producer(count);
            (self.ring, self.index, self.published, self.consumer) = (other.take(), count, count, 0);
        }
        Ok(())
    }

    /// Writes an element. Where there is no room the guest gets what was written, and no more.
    fn push_or_break(&mut self, cqe: &[u8]) -> Result<(), CqBroken> {
        self.push_bytes(cqe).inspect_err(|_| {
            self.publish();
            self.close();
        })
    }

    /// Has the elements fetched that come next: the guest's core has them from the last time round, and by the time they are needed they are
    /// here.
    fn prefetch(&self, count: u32) {
        if let Some(ring) = &self.ring {
            (0..count).for_each(|n| ring.prefetch_to_write(ring.after(self.index, n)));
        }
    }

    /// For how many elements there is room, as far as we know.
    fn room(&self) -> u32 {
        self.ring
            .as_ref()
            .map_or(0, |ring| (ring.geometry().entries - 1).saturating_sub(ring.between(self.consumer, self.index)))
    }

    /// Writes an element.
    pub fn push_bytes(&mut self, cqe: &[u8]) -> Result<(), CqBroken> {
        let ring = self.ring.as_ref().ok_or(CqBroken)?;
        let next = ring.geometry().next(self.index);
        if next == self.consumer {
            self.consumer = ring.consumer().map_err(|_| CqBroken)?;
            if next == self.consumer {
                return Err(CqBroken);
            }
        }
        ring.write(self.index, cqe);
        self.index = next;
        Ok(())
    }

    /// Lets the guest see what was written.
    pub fn publish(&mut self) {
        if let Some(ring) = &self.ring
            && self.index != self.published
        {
            ring.set_producer(self.index);
            self.published = self.index;
        }
    }
}
