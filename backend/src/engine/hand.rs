//! Receives that a worker has taken ahead for messages that follow each other, so that the lock of the receive queue and its consumer
//! index are paid once for several.
//!
//! Only the worker that would flush them takes receives ahead, and it gives back what is left before its quantum ends: nobody else
//! misses them. Those of a shared queue are for all its QPs and are not taken ahead.

use std::sync::Arc;

use crate::qp::{Qp, RecvQueue, Ticket};
use crate::wqe::Recv;

/// Receives that are taken ahead at most.
const MOST: usize = 7;

/// What a worker has taken ahead, all of one QP.
#[derive(Debug, Default)]
pub(super) struct Hand {
    of: Option<(Arc<Qp>, Ticket)>,
    /// In the order of the queue; only `next..end` count.
    #[expect(clippy::vec_box, reason = "receives change places with those of jobs, and are large")]
    recvs: Vec<Box<Recv>>,
    next: usize,
    end: usize,
}

impl Hand {
    /// Puts the next receive of this QP into `out`, if there is one here.
    #[inline]
    pub fn next(&mut self, qp: &Arc<Qp>, out: &mut Box<Recv>) -> bool {
        let there = self.next < self.end && self.of.as_ref().is_some_and(|(of, _)| Arc::ptr_eq(of, qp));
        if there {
            std::mem::swap(out, &mut self.recvs[self.next]);
            self.next += 1;
        }
        there
    }

    /// Takes up to so many receives of a QP ahead. There are none here.
    pub fn fill(&mut self, qp: &Arc<Qp>, queue: &mut RecvQueue, most: usize) {
        if self.recvs.is_empty() {
            self.recvs.resize_with(MOST, Box::default);
        }
        let (count, ticket) = queue.lend(&mut self.recvs[..most.min(MOST)]);
        (self.next, self.end) = (0, count);
        self.of = (count > 0).then(|| (qp.clone(), ticket));
    }

    /// Gives back what is left.
    #[inline]
    pub fn give_back(&mut self) {
        if let Some((qp, ticket)) = self.of.take()
            && self.next < self.end
        {
            let mut queue = qp.recv.lock();
            for recv in &mut self.recvs[self.next..self.end] {
                queue.give_back(ticket, std::mem::take(recv));
            }
            self.end = 0;
        }
    }
}
