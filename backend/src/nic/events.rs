//! Event queues: how the guest learns that something happened (`docs/device.md`, 5).

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, OnceLock};

use crossbeam_queue::SegQueue;
use parking_lot::Mutex;
use virtio_rdma::event::{Event, EventType};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

use crate::on_demand::Missing;
use crate::vhost::vring::{Given, Vring};

/// Something that happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Notice {
    /// What.
    pub kind: EventType,
    /// Number of the object.
    pub number: u32,
    /// Of a page fault, the pages.
    pub pages: Option<Missing>,
}

/// Notices kept for one queue while the guest has no buffer for them. A guest that gives none loses only its own.
const MAX_PENDING: usize = 1 << 18;

/// Notices given out at a time, since workers do it too.
const PER_FLUSH: u64 = 32;

/// What [`EventQueue::flush`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flushed {
    /// Notices given out.
    pub sent: u64,
    /// Whether it stopped before the notices or the buffers were used up.
    pub more: bool,
}

/// One event queue: its virtqueue, and what waits for a buffer.
#[derive(Debug)]
pub struct EventQueue {
    vring: Arc<Mutex<Vring>>,
    pending: Mutex<Pending>,
    /// What came while somebody else was giving out. Workers do not wait for that: a guest can keep its thread at it.
    late: SegQueue<Notice>,
    /// Wakes the virtual NIC's thread, which gives out what a worker left. Nobody but us has it, so writing to it does
    /// not block.
    helper: OnceLock<Arc<EventFd>>,
}

#[derive(Debug, Default)]
struct Pending {
    order: VecDeque<Notice>,
    known: HashSet<Notice>,
}

impl EventQueue {
    /// Over this virtqueue.
    pub fn new(vring: Arc<Mutex<Vring>>) -> Self {
        Self { vring, pending: Mutex::default(), late: SegQueue::new(), helper: OnceLock::new() }
    }

    /// Names whom to wake when there is more to give out than a worker has time for.
    pub fn set_helper(&self, helper: Arc<EventFd>) {
        self.helper.get_or_init(|| helper);
    }

    /// Gives a notice to the guest now, or keeps it until there is a buffer. True if any went out.
    pub fn raise(&self, notice: Notice) -> bool {
        let Some(mut pending) = self.pending.try_lock() else {
            if self.late.len() < MAX_PENDING {
                self.late.push(notice);
            }
            self.call_helper();
            return false;
        };
        self.take_late(&mut pending);
        pending.push(notice);
        let flushed = self.give_out(&mut pending);
        if flushed.more {
            self.call_helper();
        }
        flushed.sent > 0
    }

    fn call_helper(&self) {
        if let Some(helper) = self.helper.get() {
            // Fails only when the counter is full, and then the helper is being woken.
            let _ = helper.write(1);
        }
    }

    /// Gives out what waits, as far as there are buffers, but only some at a time.
    pub fn flush(&self) -> Flushed {
        let mut pending = self.pending.lock();
        self.take_late(&mut pending);
        self.give_out(&mut pending)
    }

    fn take_late(&self, pending: &mut Pending) {
        (0..PER_FLUSH).map_while(|_| self.late.pop()).for_each(|notice| pending.push(notice));
    }

    fn give_out(&self, pending: &mut Pending) -> Flushed {
        let mut vring = self.vring.lock();
        let mut flushed = Flushed { sent: 0, more: false };
        while let Some(notice) = pending.order.front().copied() {
            let given = if flushed.sent < PER_FLUSH { vring.give(wire(notice).as_bytes()) } else { Given::NotYet };
            if given != Given::Yes {
                flushed.more = given == Given::NotYet;
                break;
            }
            pending.pop();
            flushed.sent += 1;
        }
        if flushed.sent > 0 {
            vring.signal();
        }
        flushed.more |= !self.late.is_empty();
        flushed
    }

    /// Forgets what waits.
    pub fn clear(&self) {
        let mut pending = self.pending.lock();
        while self.late.pop().is_some() {}
        *pending = Pending::default();
    }
}

impl Pending {
    fn push(&mut self, notice: Notice) {
        if self.order.len() < MAX_PENDING && self.known.insert(notice) {
            self.order.push_back(notice);
        }
    }

    fn pop(&mut self) {
        if let Some(notice) = self.order.pop_front() {
            self.known.remove(&notice);
        }
    }
}

fn wire(notice: Notice) -> Event {
    let kind = notice.kind.to_wire();
    let Some(pages) = notice.pages else {
        return Event { kind: kind.into(), number: notice.number.into(), ..Event::default() };
    };
    Event {
        kind: kind.into(),
        write: u16::from(pages.write).into(),
        number: notice.number.into(),
        page: pages.page.into(),
        count: pages.count.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_who_gives_out() {
        let queue = EventQueue::new(Arc::default());
        let notice = |number| Notice { kind: EventType::QpFatal, number, pages: None };
        let busy = queue.pending.lock();
        assert!(!queue.raise(notice(1)) && !queue.raise(notice(2)));
        drop(busy);
        assert!(!queue.raise(notice(3)), "there is no buffer");
        let order: Vec<_> = queue.pending.lock().order.iter().map(|notice| notice.number).collect();
        assert_eq!(order, [1, 2, 3]);
        assert!(!queue.raise(notice(2)));
        assert_eq!(queue.pending.lock().order.len(), 3);
    }
}
