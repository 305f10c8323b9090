//! Multicast datagrams (IBA 10.5.2): one request, a copy for each QP in the group.
//!
//! A group may be large, so that its members are gone through in pieces like a long message. Who was a member when the message started
//! gets it, if it still is one and can. Nobody waits for a member: one without a receive misses the message.

use std::sync::Arc;

use virtio_rdma::ring::GRH_SIZE;

use super::complete::Step;
use super::context::{Budget, Context};
use super::cost;
use super::job::Job;
use super::ud::{self, Datagram, Offered};
use crate::groups::{Member, Members};
use crate::nic::Nic;
use crate::qp::Qp;

/// A message on its way to a group.
#[derive(Debug)]
pub struct Cast {
    members: Members,
    next: usize,
    /// As it was when the message started.
    header: [u8; GRH_SIZE],
}

impl Cast {
    /// To these members.
    pub fn new(members: Members, header: [u8; GRH_SIZE]) -> Self {
        Self { members, next: 0, header }
    }

    fn remaining(&self) -> &[Member] {
        &self.members[self.next..]
    }
}

/// Takes a message on to some more members.
pub(super) fn step(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    job: &mut Job,
    mut cast: Box<Cast>,
    datagram: Datagram,
    budget: &mut Budget<'_>,
) -> Step {
    let members = cast.members.clone();
    let share = share(budget, cast.remaining().len(), GRH_SIZE as u64 + job.wqe.length);
    for member in &members[cast.next..][..share] {
        if member.has_left() || !member.nic.is_running() || !ud::accepts(&member.qp, datagram.qkey) {
            ctx.charge(cost::VISIT);
            continue;
        }
        let offered = ud::offer(ctx, qp.id.qpn, (&member.nic, &member.qp), job, &cast.header, datagram.imm);
        if offered != Offered::Delivered {
            nic.counters.messages_dropped.add(1);
        }
    }
    cast.next += share;
    if cast.remaining().is_empty() {
        return Step::Done;
    }
    job.cast = Some(cast);
    Step::Paused
}

/// How many of the remaining members a visit serves; at least one, so that it gets on.
fn share(budget: &mut Budget<'_>, remaining: usize, bytes: u64) -> usize {
    let mut count = 0;
    while count < remaining && (count == 0 || budget.take_wqe()) {
        budget.bytes = budget.bytes.saturating_sub(bytes);
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::super::context::{QUANTUM_BYTES, QUANTUM_WQES};
    use super::*;

    #[test]
    fn a_visit_serves_no_more_of_a_large_group_than_it_would_of_single_messages() {
        let served = |bytes| share(&mut Budget::full(&|| true), 100_000, bytes);
        assert_eq!(served(100), QUANTUM_WQES as usize + 1);
        assert_eq!(served(4136), QUANTUM_BYTES.div_ceil(4136) as usize);
    }

    #[test]
    fn what_is_left_of_a_small_group_is_served_at_once_and_a_spent_budget_still_serves_one() {
        assert_eq!(share(&mut Budget::full(&|| true), 3, 100), 3);
        let mut spent = Budget::full(&|| true);
        spent.bytes = 0;
        assert_eq!(share(&mut spent, 3, 100), 1);
        assert_eq!(share(&mut spent, 0, 100), 0);
    }
}
