//! The receive queue of a QP.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::mem::Map;
use crate::ring::rxe::{Caps, parse_recv};
use crate::ring::{LAST_MOVED, Move, ResizeError, Ring};
use crate::srq::Srq;
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

/// Receives in a ring, our side of it.
#[derive(Debug)]
pub struct RecvRing {
    /// `None` once its memory is gone or nobody may touch it.
    ring: Option<Ring>,
    caps: Caps,
    consumer: u32,
    /// The guest's producer index when we last looked.
    posted: u32,
}

impl RecvRing {
    /// Over this ring.
    pub fn new(ring: Ring, caps: Caps) -> Self {
        Self { ring: Some(ring), caps, consumer: 0, posted: 0 }
    }

    /// Takes the next receive into `out`. With `at_least` set, one with fewer bytes is left where it is.
    pub fn take(&mut self, at_least: Option<u64>, out: &mut Recv) -> Taken {
        let is_short = |recv: &Recv| at_least.is_some_and(|n| recv.sges.total() < n);
        self.take_unless(out, |recv| recv.is_some_and(is_short).then_some(Taken::TooShort))
    }

    /// The same, but one that is malformed is left where it is.
    pub fn take_sound(&mut self, out: &mut Recv) -> Taken {
        self.take_unless(out, |recv| recv.is_none().then_some(Taken::Malformed))
    }

    /// Takes the next receive into `out`, unless it is to be left where it is: `leave` is asked, without one if it is malformed.
    fn take_unless(&mut self, out: &mut Recv, leave: impl Fn(Option<&Recv>) -> Option<Taken>) -> Taken {
        let Some(ring) = &self.ring else {
            return Taken::Empty;
        };
        if self.posted == self.consumer {
            match ring.producer() {
                Ok(index) if index == self.consumer => return Taken::Empty,
                Ok(index) => self.posted = index,
                Err(_) => return Taken::Broken("producer index of the receive ring is outside the ring"),
            }
            (1..Self::AHEAD).for_each(|n| self.prefetch(ring, n));
        }
        self.prefetch(ring, Self::AHEAD);
        let parsed = parse_recv(ring, self.consumer, self.caps, out);
        if let Some(why) = leave(parsed.is_ok().then_some(&*out)) {
            return why;
        }
        self.consumer = ring.geometry().next(self.consumer);
        ring.set_consumer(self.consumer);
        if parsed.is_ok() { Taken::Yes } else { Taken::Malformed }
    }

    /// Takes the next receives, as many as there is place for, of those that are known to be posted. One that is malformed stays. How many.
    fn take_several(&mut self, out: &mut [Box<Recv>]) -> usize {
        let Some(ring) = &self.ring else {
            return 0;
        };
        let known = ring.between(self.consumer, self.posted) as usize;
        let mut next = self.consumer;
        let mut count = 0;
        for recv in out.iter_mut().take(known) {
            if parse_recv(ring, next, self.caps, recv).is_err() {
                break;
            }
            next = ring.geometry().next(next);
            count += 1;
        }
        ring.set_consumer(next);
        self.consumer = next;
        // The next as many, which are needed when these are used up.
        (0..=count as u32).for_each(|n| self.prefetch(ring, n));
        count
    }

    /// The ring, and the way of what is posted to the beginning of another, for [`move_to`](Self::move_to).
    ///
    /// # Errors
    /// When there is none any more.
    pub fn start(&self) -> Result<(Ring, Move), ResizeError> {
        let ring = self.ring.clone().ok_or(ResizeError::Broken)?;
        Ok((ring, Move::new(self.consumer, self.caps.recv_element())))
    }

    /// Copies the last receives; with all of them there the other ring takes the place of this one. The guest does not post meanwhile;
    /// others may take receives.
    ///
    /// # Errors
    /// Why not; the ring of before stays in use then.
    pub fn move_to(&mut self, other: &mut Option<Ring>, way: &mut Move) -> Result<(), ResizeError> {
        let ring = self.ring.as_ref().ok_or(ResizeError::Broken)?;
        let Some(to) = other else { return Ok(()) };
        let posted = ring.producer().map_err(|_| ResizeError::Broken)?;
        let taken = way.place_of(ring, self.consumer);
        if taken > way.place_of(ring, posted) {
            return Err(ResizeError::Broken);
        }
        if let Some(count) = way.go_on(ring, to, posted, LAST_MOVED)? {
            to.set_consumer(taken);
            to.set_producer(count);
            (self.ring, self.consumer, self.posted) = (other.take(), taken, taken);
        }
        Ok(())
    }

    /// Bytes that the elements of its rings need.
    pub fn element(&self) -> usize {
        self.caps.recv_element()
    }

    /// Elements that are fetched before they are parsed.
    const AHEAD: u32 = 4;

    fn prefetch(&self, ring: &Ring, n: u32) {
        if n < ring.between(self.consumer, self.posted) {
            ring.prefetch(ring.after(self.consumer, n), 0);
        }
    }

    /// Receives that are posted. Of a ring with an index that makes no sense: none.
    pub fn left(&self) -> u32 {
        let Some(ring) = &self.ring else {
            return 0;
        };
        ring.producer().map_or(0, |index| index.wrapping_sub(self.consumer) & self.capacity())
    }

    /// Those of them that were seen when the guest's index was last looked at.
    fn seen(&self) -> u32 {
        self.ring.as_ref().map_or(0, |ring| ring.between(self.consumer, self.posted))
    }

    /// Receives that it can hold.
    pub fn capacity(&self) -> u32 {
        self.ring.as_ref().map_or(0, |ring| ring.geometry().entries - 1)
    }

    fn reset(&mut self) {
        (self.consumer, self.posted) = (0, 0);
        if let Some(ring) = &self.ring {
            ring.set_consumer(0);
            ring.set_producer(0);
        }
    }

    /// Lets go of the ring.
    pub fn close(&mut self) {
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

/// Where a QP's receives are posted.
#[derive(Debug)]
pub enum RecvSource {
    /// In a ring of its own.
    Own(RecvRing),
    /// In a shared receive queue.
    Shared(Arc<Srq>),
}

impl RecvSource {
    /// The shared receive queue, if it is one.
    pub fn srq(&self) -> Option<&Arc<Srq>> {
        match self {
            Self::Own(_) => None,
            Self::Shared(srq) => Some(srq),
        }
    }

    /// Bytes of the QP's own ring.
    pub fn ring_size(&self) -> usize {
        match self {
            Self::Own(own) => own.ring.as_ref().map_or(0, |ring| ring.geometry().size()),
            Self::Shared(_) => 0,
        }
    }
}

/// The receive queue of a QP.
#[derive(Debug)]
pub struct RecvQueue {
    source: RecvSource,
    tickets: u64,
    filling: Option<Filling>,
    /// Receives that were given back: the next ones to be taken. No more than one for each worker, and those of one [`lend`](Self::lend).
    held: VecDeque<Box<Recv>>,
    /// How often all of this was forgotten.
    life: u64,
    /// A datagram was dropped after waiting for a receive, and none was posted since.
    pub starved: bool,
    /// ERR, with an SRQ: the guest was told that no more of its receives will complete here.
    last_told: bool,
}

impl RecvQueue {
    /// With receives from there.
    pub fn new(source: RecvSource) -> Self {
        Self { source, tickets: 0, filling: None, held: VecDeque::new(), life: 0, starved: false, last_told: false }
    }

    /// Receives that are posted, if they are this queue's alone.
    pub fn own_posted(&self) -> Option<u32> {
        match &self.source {
            RecvSource::Own(ring) => Some(ring.left() + self.held.len() as u32),
            RecvSource::Shared(_) => None,
        }
    }

    /// Receives of this queue alone that were seen and are not used.
    pub fn depth(&self) -> u32 {
        let seen = match &self.source {
            RecvSource::Own(ring) => ring.seen(),
            RecvSource::Shared(_) => 0,
        };
        seen + self.held.len() as u32
    }

    /// Takes the next receive into `out`. With `at_least` set, one with fewer bytes is left where it is.
    pub fn take(&mut self, at_least: Option<u64>, out: &mut Box<Recv>) -> Taken {
        if let Some(held) = self.held.pop_front() {
            *out = held;
            return Taken::Yes;
        }
        let taken = match &mut self.source {
            RecvSource::Own(ring) => ring.take(at_least, out),
            RecvSource::Shared(srq) => srq.take(at_least, out),
        };
        self.starved &= taken == Taken::Empty;
        taken
    }

    /// Takes the next receive for a message that may need several visits, beginning with this one. Until [`finish`](Self::finish) it
    /// is flushed like those that are still in the ring.
    pub fn begin(&mut self, out: &mut Box<Recv>) -> (Taken, Ticket) {
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

    /// As [`begin`](Self::begin), for the worker that flushes this queue itself: it says with [`hold`](Self::hold) if the message takes
    /// more than its present visit.
    pub fn begin_quietly(&mut self, out: &mut Box<Recv>) -> Taken {
        if self.filling.is_some() { Taken::Empty } else { self.take(None, out) }
    }

    /// Takes the next receive for a message of which its owner knows nothing yet. One that is malformed stays, to fail the message that it is for.
    pub fn take_ahead(&mut self, out: &mut Box<Recv>) -> Taken {
        if self.filling.is_some() {
            return Taken::Empty;
        }
        if let Some(held) = self.held.pop_front() {
            *out = held;
            return Taken::Yes;
        }
        match &mut self.source {
            RecvSource::Own(ring) => ring.take_sound(out),
            RecvSource::Shared(srq) => srq.take_sound(out),
        }
    }

    /// After [`begin_quietly`](Self::begin_quietly): the receives that follow, as many as there is place for, to be taken in this order. How
    /// many, and what names them to [`give_back`](Self::give_back). Those of a shared queue stay there.
    pub fn lend(&mut self, out: &mut [Box<Recv>]) -> (usize, Ticket) {
        let count = match &mut self.source {
            RecvSource::Own(ring) if self.held.is_empty() && self.filling.is_none() => ring.take_several(out),
            _ => 0,
        };
        (count, Ticket(self.life))
    }

    /// The receive that was taken quietly, whose `wr_id` this is, is still being filled when the visit ends.
    pub fn hold(&mut self, wr_id: u64) -> Ticket {
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        self.filling = Some(Filling { ticket, wr_id, busy: true });
        ticket
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
    pub fn drop_message(&mut self, ticket: Ticket, recv: Box<Recv>) {
        if self.finish(ticket) {
            self.put_back(recv);
        }
    }

    /// A receive that was taken quietly is for the next message after all.
    pub fn put_back(&mut self, recv: Box<Recv>) {
        self.held.push_back(recv);
    }

    /// Takes the next receive for a datagram; with what names it to [`give_back`](Self::give_back).
    pub fn take_datagram(&mut self, at_least: u64, out: &mut Box<Recv>) -> (Taken, Ticket) {
        (self.take(Some(at_least), out), Ticket(self.life))
    }

    /// A receive that was lent is not needed, or a datagram cannot get into it now: it is for the next message.
    pub fn give_back(&mut self, ticket: Ticket, recv: Box<Recv>) {
        if ticket == Ticket(self.life) {
            self.held.push_back(recv);
        }
    }

    fn filled_by(&mut self, ticket: Ticket) -> Option<&mut Filling> {
        self.filling.as_mut().filter(|filling| filling.ticket == ticket)
    }

    /// Takes a receive in order to flush it: the one being filled first. With a shared queue that is all.
    pub fn take_for_flush(&mut self, out: &mut Box<Recv>) -> Flush {
        match &self.filling {
            Some(Filling { busy: true, .. }) => return Flush::Busy,
            Some(Filling { wr_id, .. }) => {
                out.wr_id = *wr_id;
                self.filling = None;
                return Flush::Yes;
            }
            None => {}
        }
        if let Some(held) = self.held.pop_front() {
            *out = held;
            return Flush::Yes;
        }
        // What is in a shared queue is for its other QPs.
        let RecvSource::Own(ring) = &mut self.source else {
            return Flush::Empty;
        };
        match ring.take(None, out) {
            Taken::Yes | Taken::Malformed => Flush::Yes,
            _ => Flush::Empty,
        }
    }

    /// After the flush: whether the guest is to be told that this QP has taken its last receive from the shared queue. True once.
    pub fn take_last_event(&mut self) -> bool {
        self.source.srq().is_some() && !std::mem::replace(&mut self.last_told, true)
    }

    /// Empties the ring, as a transition to RESET does.
    pub fn reset(&mut self) {
        self.forget();
        if let RecvSource::Own(ring) = &mut self.source {
            ring.reset();
        }
    }

    /// Lets go of the ring.
    pub fn close(&mut self) {
        self.forget();
        if let RecvSource::Own(ring) = &mut self.source {
            ring.close();
        }
    }

    /// Lets go of the ring if its memory is no longer there; true if it did.
    pub fn close_if_gone(&mut self, map: &Map) -> bool {
        match &mut self.source {
            RecvSource::Own(ring) => ring.close_if_gone(map),
            RecvSource::Shared(_) => false,
        }
    }

    fn forget(&mut self) {
        self.filling = None;
        self.held.clear();
        self.life += 1;
        self.starved = false;
        self.last_told = false;
    }
}
