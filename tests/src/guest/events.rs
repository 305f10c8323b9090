//! The event queues.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use virtio_rdma::event::{Event, EventType};
use zerocopy::FromBytes;

use super::mem::{Buf, GuestMemory, Placement};
use super::virtq::{Part, Virtq};
use super::{Error, Result};
use crate::sys;

/// Buffers of each event queue.
const BUFFERS: u16 = 64;
/// Distance of the buffers in memory.
const STRIDE: usize = 16;
/// Longest sleep before the queues are looked at again, should another thread have taken the wake-up.
const SLICE: Duration = Duration::from_millis(10);

/// One event queue and its buffers.
#[derive(Debug)]
pub struct EventQueue {
    /// The virtqueue.
    pub virtq: Virtq,
    buffers: Buf,
    /// The buffer that each chain, by its first descriptor, is made of.
    buffer_of: Vec<usize>,
}

impl EventQueue {
    /// A queue without buffers.
    pub fn new(memory: &GuestMemory) -> Result<Self> {
        Ok(Self {
            virtq: Virtq::new(memory, BUFFERS)?,
            buffers: memory.alloc(usize::from(BUFFERS) * STRIDE, Placement::Contiguous)?,
            buffer_of: vec![0; usize::from(BUFFERS)],
        })
    }

    /// Gives the device all buffers; the ring must be empty.
    pub fn fill(&mut self) -> Result<()> {
        for buffer in 0..usize::from(BUFFERS) {
            self.give(buffer)?;
        }
        self.virtq.notify();
        Ok(())
    }

    fn give(&mut self, buffer: usize) -> Result<()> {
        let addr = self.buffers.gpa(buffer * STRIDE);
        let head = self.virtq.push(&[Part { addr, len: STRIDE as u32, writable: true }])?;
        self.buffer_of[usize::from(head)] = buffer;
        Ok(())
    }

    /// What the buffer that lies last in the available ring holds; for queues that were never taken from.
    pub fn last_event(&self) -> Event {
        let head = self.virtq.available(self.virtq.size() - 1);
        let buffer = self.buffer_of[usize::from(head)];
        let bytes = self.buffers.read_vec(buffer * STRIDE, STRIDE);
        Event::read_from_bytes(&bytes).expect("a buffer is as large as an event")
    }

    fn take(&mut self) -> Result<Option<Event>> {
        let Some((head, len)) = self.virtq.pop() else { return Ok(None) };
        if len as usize != STRIDE {
            return Err(Error::BadResponse("size of an event"));
        }
        let buffer = self.buffer_of[usize::from(head)];
        let bytes = self.buffers.read_vec(buffer * STRIDE, STRIDE);
        self.give(buffer)?;
        self.virtq.notify();
        Event::read_from_bytes(&bytes).map(Some).map_err(|_| Error::BadResponse("size of an event"))
    }
}

/// All event queues, and the events that nobody has asked for yet.
#[derive(Debug)]
pub struct Events {
    queues: Vec<Mutex<EventQueue>>,
    calls: Vec<vmm_sys_util::eventfd::EventFd>,
    pending: Mutex<Vec<(usize, Event)>>,
}

impl Events {
    /// This many queues, without buffers.
    pub fn new(memory: &GuestMemory, count: usize) -> Result<Self> {
        let queues: Vec<EventQueue> = (0..count).map(|_| EventQueue::new(memory)).collect::<Result<_>>()?;
        let calls = queues.iter().map(|q| q.virtq.call.try_clone()).collect::<std::io::Result<_>>()?;
        Ok(Self { queues: queues.into_iter().map(Mutex::new).collect(), calls, pending: Mutex::default() })
    }

    /// Number of queues.
    pub fn count(&self) -> usize {
        self.queues.len()
    }

    /// One queue.
    pub fn queue(&self, index: usize) -> MutexGuard<'_, EventQueue> {
        self.queues[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets events that nobody took.
    pub fn forget(&self) {
        let _ = self.collect();
        self.pending().clear();
    }

    /// Takes an event of this kind about this object, if one has come.
    pub fn take(&self, kind: EventType, number: u32) -> Result<Option<Event>> {
        Ok(self.take_from(kind, number)?.map(|(_, event)| event))
    }

    /// Takes such an event, and says on which queue it came.
    pub fn take_from(&self, kind: EventType, number: u32) -> Result<Option<(usize, Event)>> {
        self.collect()?;
        let mut pending = self.pending();
        let wanted = |e: &Event| e.kind.get() == kind.to_wire() && e.number.get() == number;
        let at = pending.iter().position(|(_, e)| wanted(e));
        Ok(at.map(|at| pending.remove(at)))
    }

    /// Waits for an event of this kind about this object.
    pub fn wait(&self, kind: EventType, number: u32, timeout: Duration) -> Result<Event> {
        self.wait_from(0, kind, number, timeout).map(|(_, event)| event)
    }

    /// As [`wait`](Self::wait), sleeping on the interrupt of one queue.
    pub fn wait_from(&self, queue: usize, kind: EventType, number: u32, timeout: Duration) -> Result<(usize, Event)> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(found) = self.take_from(kind, number)? {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout("an event"));
            }
            sys::wait_event(&self.calls[queue], left.min(SLICE))?;
        }
    }

    /// All events that came and were not taken.
    pub fn drain(&self) -> Result<Vec<Event>> {
        self.collect()?;
        Ok(self.pending().drain(..).map(|(_, e)| e).collect())
    }

    fn collect(&self) -> Result<()> {
        for index in 0..self.queues.len() {
            while let Some(event) = self.queue(index).take()? {
                self.pending().push((index, event));
            }
        }
        Ok(())
    }

    fn pending(&self) -> MutexGuard<'_, Vec<(usize, Event)>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
