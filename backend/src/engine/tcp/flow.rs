//! Messages of this host's queue pairs that are under way.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use freeflow_tcp::frame::FlowId;
use freeflow_tcp::host::Token;
use virtio_rdma::ib::{Access, QpState, WcStatus};

use crate::engine::context::{Context, Gather, Side, Unreachable};
use crate::engine::job::Job;
use crate::mr::KeyError;
use crate::nic::Nic;
use crate::qp::Qp;

/// Bits of a token that count a flow's messages. There are never so many of them under way.
const MESSAGE_BITS: u32 = 20;

/// What is to be done with the memory of a flow's messages.
enum Standing {
    /// It may be touched.
    Works,
    /// Its guest is stopped, or its queue pair has failed and its messages are about to be flushed: it is not for their memory to fail them.
    Waits,
    /// Of a life of the queue pair that is over.
    Over,
}

/// What one life of a queue pair has posted.
#[derive(Debug)]
pub(super) struct Flow {
    pub nic: Arc<Nic>,
    pub qp: Arc<Qp>,
    incarnation: u64,
    id: FlowId,
    /// How many messages were before the oldest of `jobs`.
    first: u64,
    /// Those that are under way, oldest first.
    pub jobs: VecDeque<Box<Job>>,
    /// What became of the oldest ones; their completions are still to be written.
    pub finished: VecDeque<WcStatus>,
}

impl Flow {
    pub fn new(id: FlowId, nic: Arc<Nic>, qp: Arc<Qp>) -> Self {
        let incarnation = qp.incarnation();
        Self { nic, qp, incarnation, id, first: 0, jobs: VecDeque::new(), finished: VecDeque::new() }
    }

    /// What is to be done with its messages' memory now.
    fn standing(&self) -> Standing {
        let present = self.qp.incarnation() == self.incarnation;
        match self.qp.state() {
            _ if !self.nic.is_running() => Standing::Waits,
            QpState::Rts | QpState::Sqd if present => Standing::Works,
            QpState::Err if present => Standing::Waits,
            _ => Standing::Over,
        }
    }

    /// Names the next message.
    pub fn next_token(&self) -> Token {
        let number = (self.first + self.jobs.len() as u64) & ((1 << MESSAGE_BITS) - 1);
        Token(self.id.0 << MESSAGE_BITS | number)
    }

    fn index(&self, token: Token) -> usize {
        (token.0.wrapping_sub(self.first) & ((1 << MESSAGE_BITS) - 1)) as usize
    }

    /// The message that a token of this flow names.
    pub fn job(&self, token: Token) -> Option<&Job> {
        self.jobs.get(self.index(token)).map(Box::as_ref)
    }

    /// The same, to be changed.
    pub fn job_mut(&mut self, token: Token) -> Option<&mut Job> {
        let index = self.index(token);
        self.jobs.get_mut(index).map(Box::as_mut)
    }

    /// Appends where bytes of a message's own buffers are.
    pub fn reach(&mut self, ctx: &mut Context, token: Token, side: Side, bytes: Range<u64>) -> Result<(), Unreachable> {
        match self.standing() {
            Standing::Works => {}
            Standing::Waits => return Err(Unreachable::Paging),
            Standing::Over => return Err(GONE),
        }
        let index = self.index(token);
        let job = self.jobs.get_mut(index).ok_or(GONE)?;
        reach_own(ctx, (&self.nic, &self.qp), job, side, bytes)
    }

    /// The oldest message, which is finished.
    pub fn take_finished(&mut self) -> Option<(Box<Job>, WcStatus)> {
        let status = self.finished.pop_front()?;
        self.first += 1;
        Some((self.jobs.pop_front()?, status))
    }
}

/// Memory of a message that is no more.
pub(super) const GONE: Unreachable = Unreachable::Refused(KeyError::NoSuchKey(0));

/// Appends where bytes of a work request's own buffers are; the page that it waits for, if it does, is remembered with it.
pub(super) fn reach_own(
    ctx: &mut Context,
    (nic, qp): (&Nic, &Qp),
    job: &mut Job,
    side: Side,
    bytes: Range<u64>,
) -> Result<(), Unreachable> {
    let need = match side {
        Side::Source => Access::empty(),
        Side::Destination => Access::LOCAL_WRITE,
    };
    ctx.paging.fault = job.fault.take();
    let sges = job.wqe.sges.as_slice();
    let list = Gather { nic, pdn: qp.id.pdn, need, sges, from: bytes.start, len: bytes.end - bytes.start };
    let found = ctx.gather(side, &list);
    job.fault = ctx.paging.fault.take();
    found
}

/// Whose message a token names.
pub(super) fn flow_of(token: Token) -> FlowId {
    FlowId(token.0 >> MESSAGE_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_its_flow() {
        assert_eq!(flow_of(Token(77 << MESSAGE_BITS | 5)), FlowId(77));
    }
}
