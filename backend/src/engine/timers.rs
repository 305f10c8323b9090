//! QPs of one virtual NIC that want to be visited at a time. Each QP remembers its earliest entry, so that a guest that rings its doorbell
//! without end does not fill the heap.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use crate::qp::Qp;

/// Timers of one virtual NIC at one worker. A visit too many does no harm.
#[derive(Debug)]
pub struct Timers {
    heap: BinaryHeap<Reverse<Entry>>,
    start: Instant,
}

#[derive(Debug)]
struct Entry {
    at: Instant,
    qp: Arc<Qp>,
}

impl Timers {
    /// No timers yet; all will be later than `now`.
    pub fn new(now: Instant) -> Self {
        Self { heap: BinaryHeap::new(), start: now }
    }

    /// Visits the QP at this time, unless it is visited earlier anyway.
    pub fn push(&mut self, at: Instant, qp: Arc<Qp>) {
        let nanos = at.saturating_duration_since(self.start).as_nanos() as u64;
        if nanos < qp.next_timer.fetch_min(nanos, Relaxed) {
            self.heap.push(Reverse(Entry { at, qp }));
        }
    }

    /// The next QP whose time has come.
    pub fn pop_due(&mut self, now: Instant) -> Option<Arc<Qp>> {
        if self.next()? > now {
            return None;
        }
        let Reverse(entry) = self.heap.pop()?;
        entry.qp.next_timer.store(u64::MAX, Relaxed);
        Some(entry.qp)
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse(entry)| entry.at)
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at.cmp(&other.at)
    }
}
