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
    /// The peer whose receive that is, while it is being filled.
    pub recv_of: Option<(Arc<Qp>, Ticket)>,
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
        self.recv_of = None;
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

    /// A visit begins: false if the peer has meanwhile taken its receive back.
    pub fn resume_receive(&self) -> bool {
        self.recv_of.as_ref().is_none_or(|(peer, ticket)| peer.recv.lock().resume(*ticket))
    }

    /// The visit ends before the message does.
    pub fn rest_receive(&self) {
        if let Some((peer, ticket)) = &self.recv_of {
            peer.recv.lock().rest(*ticket);
        }
    }

    /// The message has arrived, or its receive completes in error: true if there is one to complete.
    pub fn finish_receive(&mut self) -> bool {
        self.recv_of.take().is_some_and(|(peer, ticket)| peer.recv.lock().finish(ticket))
    }

    /// The message will not be finished; its receive stays where it is, to be flushed.
    pub fn give_up_receive(&mut self) {
        self.rest_receive();
        self.recv_of = None;
    }

    /// The message will not be finished, and its receive is for the next.
    pub fn put_back_receive(&mut self) {
        if let Some((peer, ticket)) = self.recv_of.take() {
            peer.recv.lock().put_back(ticket, std::mem::take(&mut self.recv));
        }
    }
}
