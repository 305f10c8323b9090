//! Completions of sends: the guest is told what the NIC has done.

use std::sync::Arc;

use virtio_rdma::ib::WcStatus;

use super::super::complete::{RecvDone, complete_handed_over, complete_recv};
use super::super::context::Context;
use super::super::failure::{OVERFLOW, fatal, tell_fatal};
use super::super::serve::{self, Next};
use super::poll::BROKEN;
use crate::nic::Nic;
use crate::qp::{Qp, SendQueue};

/// Completes work requests that the NIC is done with. What to do next, if the QP has failed.
pub(in super::super) fn reap(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, send: &mut SendQueue) -> Option<Next> {
    let queue = send.nic.as_mut()?;
    if queue.end.num_ended() == queue.seen {
        return None;
    }
    let ended = queue.end.take_ended();
    queue.seen = queue.seen.wrapping_add(ended.done).wrapping_add(ended.failed.len() as u32);
    let mut broken = None;
    let bytes = send.bytes;
    for left in (0..ended.done).rev() {
        if !finish_next(ctx, nic, qp, send, WcStatus::Success, left > 0) {
            broken = Some(OVERFLOW);
        }
    }
    nic.counters.nic_wqes.add(ended.done.into());
    nic.counters.nic_bytes.add(send.bytes - bytes);
    for status in ended.failed {
        let moved = status != WcStatus::WrFlushErr && failed(nic, qp, status);
        if status == WcStatus::WrFlushErr {
            broken = broken.or(Some(BROKEN));
        }
        if !finish_next(ctx, nic, qp, send, status, false) {
            broken = Some(OVERFLOW);
            if moved {
                // The completion would have said so.
                tell_fatal(nic, qp, OVERFLOW);
            }
        }
    }
    send.publish();
    broken.map(|reason| serve::give_up(nic, qp, reason))
}

/// The first failure takes the QP with it: true then.
fn failed(nic: &Nic, qp: &Qp, status: WcStatus) -> bool {
    let moved = qp.fail();
    if moved {
        nic.warn(format_args!("QP {:#x}: work request failed on the host's NIC: {status:?}", qp.id.qpn));
    }
    moved
}

fn finish_next(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    status: WcStatus,
    more: bool,
) -> bool {
    let next = send.nic.as_mut().and_then(|queue| queue.posted.pop_front());
    next.is_none_or(|posted| complete_handed_over(ctx, nic, qp, send, posted, status, more))
}

/// Whether the NIC has no sends of this QP any more; in ERR, where it is made to flush them, no receives either. If not,
/// a completion will bring us back.
pub(in super::super) fn settled(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    in_error: bool,
) -> bool {
    if let (Some(queue), Some(now)) = (&mut send.nic, qp.end()) {
        queue.change_end(now);
    }
    let Some(end) = send.nic.as_ref().map(|queue| queue.end.clone()) else { return true };
    if in_error {
        end.fail();
    }
    reap(ctx, nic, qp, send);
    if end.is_destroyed() {
        flush(ctx, nic, qp, send);
    }
    let sends = send.nic.as_ref().map_or(0, |queue| queue.posted.len());
    sends == 0 && (!in_error || end.num_recvs() == 0)
}

/// The NIC will complete nothing any more: it is done in its place.
fn flush(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, send: &mut SendQueue) {
    let Some(queue) = &send.nic else { return };
    let (end, count) = (queue.end.clone(), queue.posted.len());
    let mut written = true;
    for _ in 0..count {
        written &= finish_next(ctx, nic, qp, send, WcStatus::WrFlushErr, false);
    }
    send.publish();
    if !written {
        fatal(nic, qp, OVERFLOW);
    }
    while let Some(recv) = end.take_recv() {
        complete_recv(ctx, nic, qp, &RecvDone::error(recv.wr_id, WcStatus::WrFlushErr));
    }
}
