//! One send work request on its way.

use std::sync::Arc;

use super::mcast::Cast;
use super::quiesce::Grace;
use super::sampler::Seen;
use crate::nic::meters::Way;
use crate::on_demand::Fault;
use crate::qp::{Qp, Ticket};
use crate::wqe::{Recv, Send};

/// A work request and how far it has come.
#[derive(Debug, Default)]
pub struct Job {
    /// The request.
    pub wqe: Send,
    /// The receive that its message goes into.
    pub recv: Box<Recv>,
    grip: Grip,
    /// Whether checks are done and bytes may flow.
    pub started: bool,
    /// Bytes moved.
    pub done: u64,
    /// It is long, and pages of its memory may be missing: it goes in short pieces, or all pages of a longer one might never be there at once.
    pub short: bool,
    /// A datagram to a group, on its way.
    pub cast: Option<Box<Cast>>,
    /// The page fault that it waits for.
    pub fault: Option<Arc<Fault>>,
    /// It has taken access away and waits for those who had it.
    pub grace: Option<Grace>,
    /// An atomic of another host's memory: what was there.
    pub found: Option<u64>,
    /// A datagram: which way it went.
    pub way: Way,
    /// When it was seen, if it is timed.
    pub seen: Option<Seen>,
}

/// The receive that a message has of its peer.
#[derive(Debug, Default)]
enum Grip {
    /// None, or none any more.
    #[default]
    Nothing,
    /// Since this visit, and the queue does not know: most messages take no other, and the only worker that could flush the receive is
    /// busy with this one.
    Quietly,
    /// Since this visit.
    Openly(Ticket),
    /// Since an earlier visit; whose it is.
    Before(Arc<Qp>, Ticket),
}

impl Job {
    /// Makes it ready for another request.
    pub fn clear(&mut self) {
        self.grip = Grip::Nothing;
        self.started = false;
        self.done = 0;
        self.short = false;
        self.cast = None;
        self.fault = None;
        self.grace = None;
        self.found = None;
        self.way = Way::default();
        self.seen = None;
    }

    /// Whether it has begun between the two memories, and must go on there.
    pub fn is_under_way(&self) -> bool {
        self.started || self.has_receive() || self.fault.is_some()
    }

    /// Whether it has a receive of its peer.
    pub fn has_receive(&self) -> bool {
        !matches!(self.grip, Grip::Nothing)
    }

    /// Bytes still to move.
    pub fn left(&self) -> u64 {
        self.wqe.length - self.done
    }

    /// A receive was taken from the peer of this visit: with a ticket, or by the only worker that could take it from us.
    pub fn begin_receive(&mut self, ticket: Option<Ticket>) {
        self.grip = ticket.map_or(Grip::Quietly, Grip::Openly);
    }

    /// A visit begins: false if the peer has meanwhile taken its receive back, or is another one.
    pub fn resume_receive(&self, peer: &Arc<Qp>) -> bool {
        match &self.grip {
            Grip::Before(of, ticket) => Arc::ptr_eq(of, peer) && of.recv.lock().resume(*ticket),
            Grip::Nothing | Grip::Quietly | Grip::Openly(_) => true,
        }
    }

    /// The visit ends before the message does.
    pub fn rest_receive(&mut self, peer: &Arc<Qp>) {
        self.keep_receive(peer);
        if let Grip::Before(peer, ticket) = &self.grip {
            peer.recv.lock().rest(*ticket);
        }
    }

    /// The visit ends with a receive in hand, if there is one, which others do not take yet.
    pub fn keep_receive(&mut self, peer: &Arc<Qp>) {
        let ticket = match self.grip {
            Grip::Nothing | Grip::Before(..) => return,
            Grip::Quietly => peer.recv.lock().hold(self.recv.wr_id),
            Grip::Openly(ticket) => ticket,
        };
        self.grip = Grip::Before(peer.clone(), ticket);
    }

    /// The message has arrived, or its receive completes in error: true if there is one to complete.
    pub fn finish_receive(&mut self, peer: &Qp) -> bool {
        match std::mem::take(&mut self.grip) {
            Grip::Nothing => false,
            Grip::Quietly => true,
            Grip::Openly(ticket) | Grip::Before(_, ticket) => peer.recv.lock().finish(ticket),
        }
    }

    /// The message will not be finished; its receive stays where it is, to be flushed.
    pub fn give_up_receive(&mut self) {
        if let Grip::Before(peer, ticket) = std::mem::take(&mut self.grip) {
            peer.recv.lock().rest(ticket);
        }
    }

    /// The message will not be finished, and its receive is for the next.
    pub fn put_back_receive(&mut self) {
        if let Grip::Before(peer, ticket) = std::mem::take(&mut self.grip) {
            peer.recv.lock().drop_message(ticket, std::mem::take(&mut self.recv));
        }
    }
}
