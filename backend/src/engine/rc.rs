//! Reliable connected QPs: what becomes of a message that did not arrive (IBA 9.7, 9.9).

use std::sync::Arc;
use std::time::Duration;

use virtio_rdma::ib::WcStatus;

use super::complete::{RecvDone, Step, complete_recv};
use super::connected::{self, Fault, Progress, Whose};
use super::context::{Budget, Context};
use super::job::Job;
use crate::nic::Nic;
use crate::qp::{Binding, Qp, SendQueue, WaitKind};

/// How long each try of a message waits at least for pages of the peer's memory, which may have to come from a disk.
pub(super) const PAGE_PATIENCE: Duration = Duration::from_millis(500);

/// Takes a work request one piece further.
pub(super) fn step(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    job: &mut Job,
    budget: &mut Budget<'_>,
) -> Step {
    let step = match connected::step(ctx, nic, qp, send, job, budget) {
        Progress::NotThere => return Step::Wait(WaitKind::Lost, ack_timeout(qp.attrs.lock().attr.timeout)),
        Progress::NotReady(code) => return Step::Wait(WaitKind::Rnr, rnr_timer(code)),
        Progress::Paging(Whose::Own) => return Step::Wait(WaitKind::Page, PAGE_PATIENCE),
        Progress::Paging(Whose::Peers) => {
            let timeout = ack_timeout(qp.attrs.lock().attr.timeout);
            return Step::Wait(WaitKind::PeerPage, timeout.max(PAGE_PATIENCE));
        }
        Progress::Done => Step::Done,
        Progress::Paused => Step::Paused,
        Progress::Local(status) => Step::Failed(status),
        Progress::Refused(peer, fault) => Step::Failed(fail_responder(ctx, &peer, job, &fault)),
    };
    send.wait = None;
    step
}

/// The responder fails: its receive completes in error or it gets an event, and its QP goes to ERR. Returns what the requester is told.
pub(super) fn fail_responder(ctx: &mut Context, peer: &Binding, job: &mut Job, fault: &Fault) -> WcStatus {
    peer.nic.warn(format_args!("QP {:#x} refused a message: {:?}", peer.qp.id.qpn, fault.requester));
    if job.finish_receive(&peer.qp) {
        complete_recv(ctx, &peer.nic, &peer.qp, &RecvDone::error(job.recv.wr_id, fault.responder));
    } else if peer.qp.responds() {
        peer.nic.raise(fault.event, peer.qp.id.qpn);
    }
    if peer.qp.fail() {
        ctx.engine.attend(&peer.nic, &peer.qp);
    }
    fault.requester
}

/// Local ACK timeout: 4.096 us * 2^code (IBA 9.7.6.1.3), no less than 1 ms; code 0 is for ever, and then this is just how often to
/// note it.
pub(super) fn ack_timeout(code: u8) -> Duration {
    if code == 0 {
        return Duration::from_secs(1);
    }
    Duration::from_nanos(4096 << code.min(31)).max(Duration::from_millis(1))
}

/// RNR NAK timer (IBA table 45).
pub(super) fn rnr_timer(code: u8) -> Duration {
    const UNITS_OF_10_US: [u32; 32] = [
        65_536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1_024, 1_536, 2_048, 3_072,
        4_096, 6_144, 8_192, 12_288, 16_384, 24_576, 32_768, 49_152,
    ];
    Duration::from_micros(u64::from(UNITS_OF_10_US[usize::from(code & 31)]) * 10)
}
