//! Work requests that are finished: the guest is told.

use std::sync::Arc;

use virtio_rdma::ib::{QpState, QpType, SendFlags, WcStatus};

use super::flow::{Flow, reach_own};
use super::links::with_links;
use crate::engine::complete::complete_handed_over;
use crate::engine::context::{Context, Side, Unreachable};
use crate::engine::failure::{OVERFLOW, fatal, tell_fatal};
use crate::engine::job::Job;
use crate::mem;
use crate::nic::Nic;
use crate::qp::{Posted, Qp, RemoteFlow, SendQueue};

/// What to do after completing a flow's messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reaped {
    /// Nothing.
    Done,
    /// Visit the queue pair; what was done so far cost this much.
    Visit(u64),
    /// Look again: somebody else has the queue pair.
    Later,
    /// Look again in a while: the page for an answer is missing.
    Paging,
    /// Its guest does not run now.
    Parked,
}

/// Completes what is finished of a flow, in order.
pub(super) fn reap(ctx: &mut Context, flow: &mut Flow, is_it: impl Fn(&RemoteFlow) -> bool) -> Reaped {
    let (nic, qp) = (flow.nic.clone(), flow.qp.clone());
    let Some(mut send) = qp.send.try_lock() else { return Reaped::Later };
    let present = send.remote.as_deref().is_some_and(is_it) && qp.state() != QpState::Reset;
    if !present {
        // Of a life that is over.
        flow.finished.clear();
        flow.jobs.clear();
        return Reaped::Done;
    }
    if !nic.is_running() {
        return Reaped::Parked;
    }
    let before = ctx.take_spent();
    let mut later = false;
    let mut failed = false;
    while let Some(status) = flow.finished.front().copied() {
        let status = match flow.jobs.front_mut().map_or(Answer::There, |job| store_answer(ctx, &nic, &qp, job)) {
            Answer::Refused if status == WcStatus::Success => WcStatus::LocProtErr,
            Answer::There | Answer::Refused => status,
            Answer::Paging => {
                later = true;
                break;
            }
        };
        let Some((job, _)) = flow.take_finished() else { break };
        failed |= status != WcStatus::Success;
        finish(ctx, (&nic, &qp), &mut send, &job, status, !flow.finished.is_empty());
        ctx.recycle(job);
    }
    send.publish();
    let spent = ctx.take_spent();
    ctx.charge(before);
    match () {
        () if later => Reaped::Paging,
        () if failed || send.job.is_some() || qp.state() != QpState::Rts => Reaped::Visit(spent),
        () => Reaped::Done,
    }
}

enum Answer {
    There,
    Paging,
    Refused,
}

/// Puts what an atomic has found where it belongs.
fn store_answer(ctx: &mut Context, nic: &Nic, qp: &Qp, job: &mut Job) -> Answer {
    let Some(value) = job.found else { return Answer::There };
    ctx.dst.clear();
    match reach_own(ctx, (nic, qp), job, Side::Destination, 0..8) {
        Ok(()) => {
            let value = value.to_ne_bytes();
            mem::copy_ordered(mem::Source { own: &[&value], guest: &[] }, &ctx.dst);
            Answer::There
        }
        Err(Unreachable::Paging) => Answer::Paging,
        Err(Unreachable::Refused(_)) => Answer::Refused,
    }
}

/// One work request is complete. The first that fails takes its queue pair with it.
fn finish(
    ctx: &mut Context,
    (nic, qp): (&Arc<Nic>, &Arc<Qp>),
    send: &mut SendQueue,
    job: &Job,
    status: WcStatus,
    more: bool,
) {
    // Before the completion: who sees that may ask for the state at once.
    let moved = match status {
        WcStatus::Success => false,
        _ if qp.id.kind == QpType::Rc => qp.fail(),
        _ => qp.change_state(QpState::Rts, QpState::Sqe),
    };
    if moved {
        nic.warn(format_args!("QP {:#x}: work request failed at another host: {status:?}", qp.id.qpn));
    }
    if let Some(remote) = &mut send.remote {
        remote.bytes = remote.bytes.saturating_sub(job.wqe.length);
        remote.used |= status == WcStatus::Success;
    }
    let posted = Posted {
        wr_id: job.wqe.wr_id,
        opcode: job.wqe.completion_opcode(),
        length: job.wqe.length as u32,
        signaled: qp.id.signal_all || job.wqe.flags.contains(SendFlags::SIGNALED),
        seen: job.seen,
        way: send.way(),
    };
    if !complete_handed_over(ctx, nic, qp, send, posted, status, more) {
        if moved {
            tell_fatal(nic, qp, OVERFLOW);
        } else {
            fatal(nic, qp, OVERFLOW);
        }
    }
}

/// Whether nothing of this queue pair is on its way to another host any more; in ERR nothing is waited for. If not, a completion will bring us
/// back.
pub(in super::super) fn settled(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    in_error: bool,
) -> bool {
    let Some(remote) = send.remote.as_deref() else { return true };
    if !in_error {
        return send.handed_over() == 0;
    }
    let mut flow = None;
    with_links(ctx, |links, _, _| {
        let Some(line) = links.of(remote) else { return };
        line.link.close(remote.flow);
        flow = line.tables.flows.remove(&remote.flow);
    });
    if let Some(mut flow) = flow {
        let mut lost = false;
        while let Some(mut job) = flow.jobs.pop_front() {
            lost |= !matches!(store_answer(ctx, nic, qp, &mut job), Answer::There);
            let ended = flow.finished.pop_front().filter(|_| !lost);
            let status = ended.unwrap_or(WcStatus::WrFlushErr);
            finish(ctx, (nic, qp), send, &job, status, false);
            ctx.recycle(job);
        }
        send.publish();
    }
    true
}
