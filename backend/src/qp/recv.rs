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

/// What looking for a receive to flush came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    /// One was taken.
    Yes,
    /// There is none.
    Empty,
    /// A sender is filling one at this moment: look again.
    Busy,
}

/// Names one filling of one receive; a later life of the QP gives out others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

/// The receive that a message on its way goes into. It stays the queue's: whoever flushes or resets the queue takes it from the sender.
#[derive(Debug)]
struct Filling {
    ticket: Ticket,
    wr_id: u64,
    /// The sender's worker is at it.
    busy: bool,
}

/// Receive ring, our side of it.
#[derive(Debug)]
pub struct RecvQueue {
    ring: Option<Ring>,
    caps: Caps,
    consumer: u32,
    tickets: u64,
    filling: Option<Filling>,
    /// A receive whose message was dropped: the next one to be taken.
    held: Option<Box<Recv>>,
    /// A datagram was dropped after waiting for a receive, and none was posted since.
    pub starved: bool,
}

impl RecvQueue {
    /// Over this ring; `None` for a QP without receives.
    pub fn new(ring: Option<Ring>, caps: Caps) -> Self {
        Self { ring, caps, consumer: 0, tickets: 0, filling: None, held: None, starved: false }
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
        match ring.producer() {
            Ok(index) if index == self.consumer => return Taken::Empty,
            Ok(_) => {}
            Err(_) => return Taken::Broken("producer index of the receive ring is outside the ring"),
        }
        self.starved = false;
        let parsed = parse_recv(ring, self.consumer, self.caps, out);
        if parsed.is_ok() && at_least.is_some_and(|n| out.sges.total() < n) {
            return Taken::TooShort;
        }
        self.consumer = ring.geometry().next(self.consumer);
        ring.set_consumer(self.consumer);
        if parsed.is_ok() { Taken::Yes } else { Taken::Malformed }
    }

    /// Takes the next receive for a message that may need several visits, beginning with this one. Until [`finish`](Self::finish) it
    /// is flushed like those that are still in the ring.
    pub fn begin(&mut self, out: &mut Recv) -> (Taken, Ticket) {
        let ticket = Ticket(self.tickets);
        if self.filling.is_some() {
            // Left behind by a sender that went away; a connected QP has one sender in its life.
            return (Taken::Empty, ticket);
        }
        let taken = self.take(None, out);
        if matches!(taken, Taken::Yes | Taken::Malformed) {
            self.tickets += 1;
            self.filling = Some(Filling { ticket, wr_id: out.wr_id, busy: true });
        }
        (taken, ticket)
    }

    /// The sender goes on. False if the receive was taken from it: the message has nowhere to go.
    pub fn resume(&mut self, ticket: Ticket) -> bool {
        self.filled_by(ticket).map(|filling| filling.busy = true).is_some()
    }

    /// The sender pauses, or gives up.
    pub fn rest(&mut self, ticket: Ticket) {
        if let Some(filling) = self.filled_by(ticket) {
            filling.busy = false;
        }
    }

    /// The receive is the sender's to complete. False if it was taken from it.
    pub fn finish(&mut self, ticket: Ticket) -> bool {
        let valid = self.filled_by(ticket).is_some();
        if valid {
            self.filling = None;
        }
        valid
    }

    /// The message was dropped: its receive is for the next one.
    pub fn put_back(&mut self, ticket: Ticket, recv: Recv) {
        if self.finish(ticket) {
            self.held = Some(Box::new(recv));
        }
    }

    fn filled_by(&mut self, ticket: Ticket) -> Option<&mut Filling> {
        self.filling.as_mut().filter(|filling| filling.ticket == ticket)
    }

    /// Takes a receive in order to flush it: the one being filled first.
    pub fn take_for_flush(&mut self, out: &mut Recv) -> Flush {
        match &self.filling {
            Some(Filling { busy: true, .. }) => return Flush::Busy,
            Some(Filling { wr_id, .. }) => {
                out.wr_id = *wr_id;
                self.filling = None;
                return Flush::Yes;
            }
            None => {}
        }
        match self.take(None, out) {
            Taken::Yes | Taken::Malformed => Flush::Yes,
            _ => Flush::Empty,
        }
    }

    /// Empties the ring, as a transition to RESET does.
    pub fn reset(&mut self) {
        self.consumer = 0;
        self.forget();
        if let Some(ring) = &self.ring {
            ring.set_consumer(0);
            ring.set_producer(0);
        }
    }

    /// Lets go of the ring.
    pub fn close(&mut self) {
        self.forget();
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

    fn forget(&mut self) {
        self.filling = None;
        self.held = None;
        self.starved = false;
    }
}
