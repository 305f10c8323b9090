//! The receive queue of a QP.

use crate::mem::Map;
use crate::ring::Ring;
use crate::ring::rxe::{Caps, parse_recv};
use crate::wqe::Recv;

/// What taking a receive came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// A receive was taken.
    Yes,
    /// None is posted.
    Empty,
    /// The next one is shorter than asked for and stays.
    TooShort,
    /// The guest wrote nonsense into the ring, or its memory is gone: the QP must fail. The text is for the log.
    Broken(&'static str),
    /// A receive was taken but is malformed: it completes in error and the QP fails.
    Malformed,
}

/// Receive ring, our side of it.
#[derive(Debug)]
pub struct RecvQueue {
    ring: Option<Ring>,
    caps: Caps,
    consumer: u32,
    /// A receive whose message was given up half-way: the next one to be taken.
    held: Option<Box<Recv>>,
}

impl RecvQueue {
    /// Over this ring; `None` for a QP without receives.
    pub fn new(ring: Option<Ring>, caps: Caps) -> Self {
        Self { ring, caps, consumer: 0, held: None }
    }

    /// Takes the next receive into `out`. With `at_least` set, one with fewer bytes is left where it is.
    pub fn take(&mut self, at_least: Option<u64>, out: &mut Recv) -> Taken {
        if let Some(held) = self.held.take() {
            *out = *held;
            return Taken::Yes;
        }
        let Some(ring) = &self.ring else {
            return Taken::Empty;
        };
        let producer = match ring.producer() {
            Ok(index) if index == self.consumer => return Taken::Empty,
            Ok(index) => index,
            Err(_) => {
                return Taken::Broken("producer index of the receive ring is outside the ring");
            }
        };
        debug_assert_ne!(producer, self.consumer);
        let parsed = parse_recv(ring, self.consumer, self.caps, out);
        if parsed.is_ok() && at_least.is_some_and(|n| out.sges.total() < n) {
            return Taken::TooShort;
        }
        self.consumer = ring.geometry().next(self.consumer);
        ring.set_consumer(self.consumer);
        if parsed.is_ok() { Taken::Yes } else { Taken::Malformed }
    }

    /// Takes a receive in order to flush it. False when there is none.
    pub fn take_for_flush(&mut self, out: &mut Recv) -> bool {
        matches!(self.take(None, out), Taken::Yes | Taken::Malformed)
    }

    /// Takes back a receive that a sender had taken and gave up on.
    pub fn hold(&mut self, recv: Recv) {
        self.held = Some(Box::new(recv));
    }

    /// Empties the ring, as a transition to RESET does.
    pub fn reset(&mut self) {
        self.consumer = 0;
        self.held = None;
        if let Some(ring) = &self.ring {
            ring.set_consumer(0);
            ring.set_producer(0);
        }
    }

    /// Lets go of the ring.
    pub fn close(&mut self) {
        self.held = None;
        self.ring = None;
    }

    /// Lets go of the ring if its memory is no longer there; true if it did.
    pub fn close_if_gone(&mut self, map: &Map) -> bool {
        let gone = self.ring.as_ref().is_some_and(|r| !r.is_in(map));
        if gone {
            self.ring = None;
        }
        gone
    }
}
