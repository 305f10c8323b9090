//! Unreliable connected QPs: a message arrives or nobody hears of it (IBA 9.8.2). The sender completes it all the same.

use std::sync::Arc;

use virtio_rdma::ib::WcStatus;

use super::complete::Step;
use super::connected::{self, Progress, Whose};
use super::context::{Budget, Context};
use super::job::Job;
use super::rc::{PAGE_PATIENCE, fail_responder};
use crate::nic::Nic;
use crate::qp::{Qp, SendQueue, WaitKind};

/// Takes a work request one piece further.
pub(super) fn step(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    job: &mut Job,
    budget: &mut Budget<'_>,
) -> Step {
    if !job.wqe.op.is_for_uc() {
        return Step::Failed(WcStatus::LocQpOpErr);
    }
    match connected::step(ctx, nic, qp, send, job, budget) {
        Progress::Done => Step::Done,
        Progress::Paused => Step::Paused,
        Progress::Local(status) => Step::Failed(status),
        Progress::Paging(Whose::Own) => Step::Wait(WaitKind::Page, PAGE_PATIENCE),
        Progress::Paging(Whose::Peers) => Step::Wait(WaitKind::PeerPage, PAGE_PATIENCE),
        Progress::NotThere | Progress::NotReady(_) => drop_it(ctx, nic, job),
        Progress::Refused(peer, fault) => {
            if fault.own {
                fail_responder(ctx, &peer, job, &fault);
            }
            drop_it(ctx, nic, job)
        }
    }
}

/// The receive, if one was taken, is for the next message (as on rxe).
fn drop_it(ctx: &mut Context, nic: &Nic, job: &mut Job) -> Step {
    job.put_back_receive();
    // Those that come after it must not be taken before it.
    ctx.hand.give_back();
    nic.counters.messages_dropped.add(1);
    Step::Done
}
