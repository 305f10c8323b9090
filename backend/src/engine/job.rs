//! One send work request on its way.

use std::sync::Arc;

use super::mcast::Cast;
use super::quiesce::Grace;
use crate::on_demand::Fault;
use crate::qp::{Qp, Ticket};
use crate::wqe::{Recv, Send};

/// A work request and how far it has come.
#[derive(Debug, Default)]
pub struct Job {
    /// The request.
    pub wqe: Send,
    /// The receive that its message goes into.
    pub recv: Recv,
    /// That receive is being filled.
    filling: Option<Ticket>,
    /// Whose it is, once the message takes more than one visit: most do not, and then counting that the peer is in use costs more than the
    /// message does.
    filled: Option<Arc<Qp>>,
    /// Whether checks are done and bytes may flow.
    pub started: bool,
    /// Bytes moved.
    pub done: u64,
    /// A datagram to a group, on its way.
    pub cast: Option<Box<Cast>>,
    /// The page fault that it waits for.
    pub fault: Option<Arc<Fault>>,
    /// It has taken access away and waits for those who had it.
    pub grace: Option<Grace>,
}

impl Job {
    /// Makes it ready for another request.
    pub fn clear(&mut self) {
        self.filling = None;
        self.filled = None;
        self.started = false;
        self.done = 0;
        self.cast = None;
        self.fault = None;
        self.grace = None;
    }

    /// Bytes still to move.
    pub fn left(&self) -> u64 {
        self.wqe.length - self.done
    }

    /// A receive was taken from the peer of this visit.
    pub fn begin_receive(&mut self, ticket: Ticket) {
        self.filling = Some(ticket);
    }

    /// A visit begins: false if the peer has meanwhile taken its receive back, or is another one.
    pub fn resume_receive(&self, peer: &Arc<Qp>) -> bool {
        self.between_visits().is_none_or(|(of, ticket)| Arc::ptr_eq(of, peer) && of.recv.lock().resume(ticket))
    }

    /// The visit ends before the message does.
    pub fn rest_receive(&mut self, peer: &Arc<Qp>) {
        self.keep_receive(peer);
        if let Some((peer, ticket)) = self.between_visits() {
            peer.recv.lock().rest(ticket);
        }
    }

    /// The visit ends with a receive in hand, if there is one, which others do not take yet.
    pub fn keep_receive(&mut self, peer: &Arc<Qp>) {
        if self.filling.is_some() {
            self.filled.get_or_insert_with(|| peer.clone());
        }
    }

    /// The message has arrived, or its receive completes in error: true if there is one to complete.
    pub fn finish_receive(&mut self, peer: &Qp) -> bool {
        self.filled = None;
        self.filling.take().is_some_and(|ticket| peer.recv.lock().finish(ticket))
    }

    /// The message will not be finished; its receive stays where it is, to be flushed.
    pub fn give_up_receive(&mut self) {
        if let Some((peer, ticket)) = self.filled.take().zip(self.filling.take()) {
            peer.recv.lock().rest(ticket);
        }
    }

    /// The message will not be finished, and its receive is for the next.
    pub fn put_back_receive(&mut self) {
        if let Some((peer, ticket)) = self.filled.take().zip(self.filling.take()) {
            peer.recv.lock().put_back(ticket, std::mem::take(&mut self.recv));
        }
    }

    /// The receive that a message has from an earlier visit.
    fn between_visits(&self) -> Option<(&Arc<Qp>, Ticket)> {
        self.filled.as_ref().zip(self.filling)
    }
}
