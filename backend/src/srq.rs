//! Shared receive queues (IBA 10.2.9): receives that several QPs take from.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::mem::Map;
use crate::qp::{RecvRing, Taken};
use crate::ring::rxe::Caps;
use crate::ring::{ResizeError, Ring};
use crate::wqe::Recv;

/// A shared receive queue. Its lock is taken with that of a QP's receive queue held, never the other way round.
#[derive(Debug)]
pub struct Srq {
    /// Its number.
    pub srqn: u32,
    /// Protection domain that its receives are held to.
    pub pdn: u32,
    /// QPs that use it.
    pub users: AtomicU32,
    /// Bytes of guest memory that its ring takes.
    pub ring_bytes: AtomicU64,
    queue: Mutex<Shared>,
    /// The limit was reached and nobody has told the guest yet.
    reached: AtomicBool,
}

#[derive(Debug)]
struct Shared {
    ring: RecvRing,
    limit: u32,
}

impl Srq {
    /// Over this ring.
    pub fn new(srqn: u32, pdn: u32, ring: Ring, caps: Caps) -> Self {
        let ring_bytes = AtomicU64::new(ring.geometry().size() as u64);
        let queue = Mutex::new(Shared { ring: RecvRing::new(ring, caps), limit: 0 });
        Self { srqn, pdn, users: AtomicU32::new(0), ring_bytes, queue, reached: AtomicBool::new(false) }
    }

    /// Takes the next receive into `out`. With `at_least` set, one with fewer bytes is left where it is.
    pub fn take(&self, at_least: Option<u64>, out: &mut Recv) -> Taken {
        self.take_with(|ring| ring.take(at_least, out))
    }

    /// The same, but one that is malformed is left where it is.
    pub fn take_sound(&self, out: &mut Recv) -> Taken {
        self.take_with(|ring| ring.take_sound(out))
    }

    fn take_with(&self, take: impl FnOnce(&mut RecvRing) -> Taken) -> Taken {
        let mut shared = self.queue.lock();
        let taken = take(&mut shared.ring);
        if taken == Taken::Yes && shared.ring.left() < shared.limit {
            shared.limit = 0;
            self.reached.store(true, Ordering::Relaxed);
        }
        taken
    }

    /// Bytes that the elements of its rings need.
    pub fn element(&self) -> usize {
        self.queue.lock().ring.element()
    }

    /// Takes receives from another ring from now on, to whose beginning those that are posted move. The guest does not post meanwhile.
    ///
    /// # Errors
    /// Why not; the ring of before stays in use then.
    pub fn resize(&self, ring: Ring) -> Result<(), ResizeError> {
        let bytes = ring.geometry().size() as u64;
        let entries = ring.geometry().entries;
        let (from, mut way) = self.queue.lock().ring.start()?;
        let mut ring = Some(ring);
        while let Some(to) = &ring {
            way.go_on(&from, to, from.producer().map_err(|_| ResizeError::Broken)?, u32::MAX)?;
            let mut shared = self.queue.lock();
            if shared.limit >= entries {
                return Err(ResizeError::TooSmall);
            }
            shared.ring.move_to(&mut ring, &mut way)?;
        }
        self.ring_bytes.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Whether an event is due since the limit was reached. True once for each arming.
    pub fn take_limit_event(&self) -> bool {
        self.reached.load(Ordering::Relaxed) && self.reached.swap(false, Ordering::Relaxed)
    }

    /// Arms the limit; false if the ring does not hold as many.
    pub fn set_limit(&self, limit: u32) -> bool {
        let mut shared = self.queue.lock();
        let fits = limit <= shared.ring.capacity();
        if fits {
            shared.limit = limit;
        }
        fits
    }

    /// The limit, zero when it is not armed.
    pub fn limit(&self) -> u32 {
        self.queue.lock().limit
    }

    /// Lets go of the ring.
    pub fn close(&self) {
        self.queue.lock().ring.close();
    }

    /// Lets go of the ring if its memory is no longer there; true if it did.
    pub fn close_if_gone(&self, map: &Map) -> bool {
        self.queue.lock().ring.close_if_gone(map)
    }
}
