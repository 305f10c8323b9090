//! Event queues: how the guest learns that something happened (`docs/device.md`, 5).

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use virtio_rdma::event::{Event, EventType};
use zerocopy::IntoBytes;

use crate::vhost::vring::Vring;

/// Something that happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Notice {
    /// What.
    pub kind: EventType,
    /// Number of the object.
    pub number: u32,
}

/// Notices kept for one queue while the guest has no buffer for them. A guest that gives none loses only its own.
const MAX_PENDING: usize = 1 << 17;

/// One event queue: its virtqueue, and what waits for a buffer.
#[derive(Debug)]
pub struct EventQueue {
    vring: Arc<Mutex<Vring>>,
    pending: Mutex<Pending>,
}

#[derive(Debug, Default)]
struct Pending {
    order: VecDeque<Notice>,
    known: HashSet<Notice>,
}

impl EventQueue {
    /// Over this virtqueue.
    pub fn new(vring: Arc<Mutex<Vring>>) -> Self {
        Self { vring, pending: Mutex::default() }
    }

    /// Gives a notice to the guest now, or keeps it until there is a buffer. True if it went out.
    pub fn raise(&self, notice: Notice) -> bool {
        self.pending.lock().push(notice);
        self.flush() > 0
    }

    /// Gives out what waits, as far as there are buffers. Returns how many.
    pub fn flush(&self) -> u64 {
        let mut sent = 0;
        let mut pending = self.pending.lock();
        let mut vring = self.vring.lock();
        while let Some(notice) = pending.order.front().copied() {
            if !vring.give(wire(notice).as_bytes()) {
                break;
            }
            pending.order.pop_front();
            pending.known.remove(&notice);
            sent += 1;
        }
        if sent > 0 {
            vring.signal();
        }
        sent
    }

    /// Forgets what waits.
    pub fn clear(&self) {
        *self.pending.lock() = Pending::default();
    }
}

impl Pending {
    fn push(&mut self, notice: Notice) {
        if self.order.len() < MAX_PENDING && self.known.insert(notice) {
            self.order.push_back(notice);
        }
    }
}

fn wire(notice: Notice) -> Event {
    Event { kind: notice.kind.to_wire().into(), number: notice.number.into(), ..Event::default() }
}
