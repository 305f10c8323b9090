//! One send work request on its way.

use std::sync::Arc;

use crate::qp::Qp;
use crate::wqe::{Recv, Send};

/// A work request and how far it has come.
#[derive(Debug, Default)]
pub struct Job {
    /// The request.
    pub wqe: Send,
    /// The receive that its message goes into.
    pub recv: Recv,
    /// The peer whose receive that is, while it is taken.
    pub recv_of: Option<Arc<Qp>>,
    /// Whether checks are done and bytes may flow.
    pub started: bool,
    /// Bytes moved.
    pub done: u64,
}

impl Job {
    /// Makes it ready for another request.
    pub fn clear(&mut self) {
        self.recv_of = None;
        self.started = false;
        self.done = 0;
    }

    /// Bytes still to move.
    pub fn left(&self) -> u64 {
        self.wqe.length - self.done
    }

    /// The message will not be finished: its receive goes back to the peer, to be flushed there.
    pub fn give_up_receive(&mut self) {
        if let Some(peer) = self.recv_of.take() {
            peer.recv.lock().hold(std::mem::take(&mut self.recv));
        }
    }
}
