//! Reliable connected QPs on the same host: both ends are checked, bytes are copied once, both sides complete
//! (IBA 9.7, 9.9). No packets, so no acknowledgements: a message that was copied has arrived.

use std::sync::Arc;
use std::time::Duration;

use virtio_rdma::event::EventType;
use virtio_rdma::ib::{Access, QpType, SendFlags, WcFlags, WcOpcode, WcStatus};

use super::context::{Budget, Context, Gather, Side};
use super::job::Job;
use super::serve::{RecvDone, Step, complete_recv, fatal};
use crate::mem::{self, Seg};
use crate::mr::KeyError;
use crate::nic::Nic;
use crate::overlay::Gid;
use crate::profile::Profile;
use crate::qp::{Binding, Qp, SendQueue, Taken, WaitKind};
use crate::wqe::{Op, Sge};

/// Takes a work request one piece further.
pub(super) fn step(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    job: &mut Job,
    budget: &mut Budget,
) -> Step {
    if !job.started
        && let Err(status) = check_local(ctx, nic, qp, job)
    {
        return Step::Failed(status);
    }
    let Some(peer) = bind(ctx, nic, qp, send) else {
        return Step::Wait(WaitKind::Lost, ack_timeout(qp.attrs.lock().attr.timeout));
    };
    let step = exchange(ctx, nic, qp, &peer, job, budget);
    send.binding = Some(peer);
    if !matches!(step, Step::Wait(..)) {
        send.wait = None;
    }
    step
}

/// Goes on with a peer that is there.
fn exchange(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    peer: &Binding,
    job: &mut Job,
    budget: &mut Budget,
) -> Step {
    if !job.started {
        match admit(ctx, peer, job) {
            Admission::Accepted => job.started = true,
            Admission::NotReady => {
                let code = peer.qp.attrs.lock().attr.min_rnr_timer;
                return Step::Wait(WaitKind::Rnr, rnr_timer(code));
            }
            Admission::Refused(fault) => return Step::Failed(fail_responder(ctx, peer, job, &fault)),
        }
    }
    move_piece(ctx, nic, qp, peer, job, budget)
}

/// Checks what is the requester's own.
fn check_local(ctx: &mut Context, nic: &Nic, qp: &Qp, job: &Job) -> Result<(), WcStatus> {
    if job.wqe.length > u64::from(Profile::MAX_MESSAGE) {
        return Err(WcStatus::LocLenErr);
    }
    let need = if matches!(job.wqe.op, Op::Read { .. }) { Access::LOCAL_WRITE } else { Access::empty() };
    ctx.check_sges(nic, qp.id.pdn, need, job.wqe.sges.as_slice()).map_err(|error| {
        log::debug!("QP {:#x}: {error}", qp.id.qpn);
        WcStatus::LocProtErr
    })
}

/// The peer, if there is one that accepts our messages now. It is taken out of the queue, for the caller to put back.
fn bind(ctx: &Context, nic: &Nic, qp: &Qp, send: &mut SendQueue) -> Option<Binding> {
    if let Some(known) = send.binding.take() {
        if known.qp.incarnation() != known.incarnation {
            return None;
        }
        let same_gids = known.gid_epochs == (nic.gid_epoch(), known.nic.gid_epoch());
        if same_gids && known.nic.is_running() && known.qp.responds() {
            return Some(known);
        }
        if same_gids {
            send.binding = Some(known);
            return None;
        }
    }
    let found = find_peer(ctx, nic, qp)?;
    if send.bound_to.is_some_and(|only| only != found.incarnation) {
        return None;
    }
    send.bound_to = Some(found.incarnation);
    Some(found)
}

fn find_peer(ctx: &Context, nic: &Nic, qp: &Qp) -> Option<Binding> {
    let attr = qp.attrs.lock().attr;
    let own_epoch = nic.gid_epoch();
    let source = nic.gids.read().get(attr.av.sgid_index.get().into())?;
    let destination = Gid(attr.av.dgid);
    let peer_nic = ctx.engine.find(nic.id, destination)?;
    let gid_epochs = (own_epoch, peer_nic.gid_epoch());
    if !peer_nic.is_running() || !peer_nic.gids.read().iter().any(|(_, gid)| gid == destination) {
        return None;
    }
    let peer = peer_nic.qp(attr.dest_qpn.get())?;
    if peer.id.kind != QpType::Rc || !peer.responds() {
        return None;
    }
    let incarnation = peer.incarnation();
    let mut theirs = peer.attrs.lock();
    let names_us = theirs.attr.dest_qpn.get() == qp.id.qpn && Gid(theirs.attr.av.dgid) == source;
    let in_step = theirs.attr.rq_psn == attr.sq_psn;
    let accepts_us = theirs.accepts.is_none_or(|only| only == qp.incarnation());
    if !(names_us && in_step && accepts_us) {
        return None;
    }
    theirs.accepts = Some(qp.incarnation());
    drop(theirs);
    Some(Binding { nic: peer_nic, qp: peer, incarnation, gid_epochs })
}

/// What the responder says to a new message.
enum Admission {
    Accepted,
    /// RNR NAK.
    NotReady,
    Refused(Fault),
}

/// Why the responder refuses: what the requester is told, and what happens at the responder (IBA 9.9.3).
struct Fault {
    requester: WcStatus,
    /// Status of the responder's receive, if one was taken; else it gets an event.
    responder: WcStatus,
    event: EventType,
}

impl Fault {
    const INVALID: Self =
        Self { requester: WcStatus::RemInvReqErr, responder: WcStatus::RemInvReqErr, event: EventType::QpRequestError };
    const TOO_LONG: Self = Self { responder: WcStatus::LocLenErr, ..Self::INVALID };
    const ACCESS: Self =
        Self { requester: WcStatus::RemAccessErr, responder: WcStatus::LocProtErr, event: EventType::QpAccessError };
    const OPERATION: Self =
        Self { requester: WcStatus::RemOpErr, responder: WcStatus::LocProtErr, event: EventType::QpFatal };
    const MALFORMED: Self = Self { responder: WcStatus::LocQpOpErr, ..Self::OPERATION };
}

fn admit(ctx: &mut Context, peer: &Binding, job: &mut Job) -> Admission {
    match check_remote(ctx, peer, job) {
        Ok(()) if job.wqe.op.takes_receive() => take_receive(ctx, peer, job),
        Ok(()) => Admission::Accepted,
        Err(fault) => Admission::Refused(fault),
    }
}

/// Checks what a WRITE or READ reaches at the peer.
fn check_remote(ctx: &mut Context, peer: &Binding, job: &Job) -> Result<(), Fault> {
    let (need, remote_addr, rkey) = match job.wqe.op {
        Op::Write { remote_addr, rkey, .. } => (Access::REMOTE_WRITE, remote_addr, rkey),
        Op::Read { remote_addr, rkey } => (Access::REMOTE_READ, remote_addr, rkey),
        _ => return Ok(()),
    };
    if !peer.qp.access().contains(need) {
        return Err(Fault::INVALID);
    }
    if job.wqe.length == 0 {
        return Ok(());
    }
    let mr = ctx.key(&peer.nic, rkey).map_err(|_| Fault::ACCESS)?;
    mr.check(peer.qp.id.pdn, need, remote_addr, job.wqe.length).map_err(|_| Fault::ACCESS)
}

fn take_receive(ctx: &mut Context, peer: &Binding, job: &mut Job) -> Admission {
    let taken = peer.qp.recv.lock().take(None, &mut job.recv);
    match taken {
        Taken::Empty | Taken::TooShort => return Admission::NotReady,
        Taken::Broken(reason) => {
            fatal(&peer.nic, &peer.qp, reason);
            ctx.engine.attend(&peer.nic, &peer.qp);
            return Admission::Refused(Fault::OPERATION);
        }
        Taken::Malformed => {
            job.recv_of = Some(peer.qp.clone());
            return Admission::Refused(Fault::MALFORMED);
        }
        Taken::Yes => job.recv_of = Some(peer.qp.clone()),
    }
    if matches!(job.wqe.op, Op::Write { .. }) {
        return Admission::Accepted;
    }
    if job.wqe.length > job.recv.sges.total() {
        return Admission::Refused(Fault::TOO_LONG);
    }
    match ctx.check_sges(&peer.nic, peer.qp.id.pdn, Access::LOCAL_WRITE, job.recv.sges.as_slice()) {
        Ok(()) => Admission::Accepted,
        Err(_) => Admission::Refused(Fault::OPERATION),
    }
}

/// The responder fails: its receive completes in error or it gets an event, and its QP goes to ERR. Returns what the requester is told.
fn fail_responder(ctx: &mut Context, peer: &Binding, job: &mut Job, fault: &Fault) -> WcStatus {
    peer.nic.warn(format_args!("QP {:#x} refused a message: {:?}", peer.qp.id.qpn, fault.requester));
    if job.recv_of.take().is_some() {
        complete_recv(ctx, &peer.nic, &peer.qp, &RecvDone::error(job.recv.wr_id, fault.responder));
    } else if peer.qp.responds() {
        peer.nic.raise(fault.event, peer.qp.id.qpn);
    }
    if peer.qp.fail() {
        ctx.engine.attend(&peer.nic, &peer.qp);
    }
    fault.requester
}

/// Copies one piece; with the last one the responder's side completes.
fn move_piece(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    peer: &Binding,
    job: &mut Job,
    budget: &mut Budget,
) -> Step {
    let len = job.left().min(budget.bytes);
    let last = len == job.left();
    if len > 0 {
        match map_piece(ctx, nic, qp, peer, job, len) {
            Ok(()) => {}
            Err(PieceError::Local) => return Step::Failed(WcStatus::LocProtErr),
            Err(PieceError::Remote(fault)) => {
                return Step::Failed(fail_responder(ctx, peer, job, &fault));
            }
        }
        if last {
            mem::copy_ordered(&ctx.src, &ctx.dst);
        } else {
            mem::copy(&ctx.src, &ctx.dst);
        }
        job.done += len;
        budget.bytes -= len;
    }
    if !last {
        return Step::Paused;
    }
    if job.recv_of.take().is_some() && !complete_recv(ctx, &peer.nic, &peer.qp, &received(job)) {
        return Step::Failed(WcStatus::RemOpErr);
    }
    Step::Done
}

enum PieceError {
    Local,
    Remote(Fault),
}

/// Finds where the next `len` bytes come from and go to.
fn map_piece(ctx: &mut Context, nic: &Nic, qp: &Qp, peer: &Binding, job: &Job, len: u64) -> Result<(), PieceError> {
    ctx.src.clear();
    ctx.dst.clear();
    let local = |need| Gather { nic, pdn: qp.id.pdn, need, sges: job.wqe.sges.as_slice(), from: job.done, len };
    let remote = |need, sges| Gather { nic: &peer.nic, pdn: peer.qp.id.pdn, need, sges, from: job.done, len };
    match job.wqe.op {
        Op::Read { remote_addr, rkey } => {
            reach(ctx, peer, Side::Source, (Access::REMOTE_READ, remote_addr, rkey), job.done, len)?;
            ctx.gather(Side::Destination, &local(Access::LOCAL_WRITE)).map_err(|_: KeyError| PieceError::Local)?;
        }
        Op::Write { remote_addr, rkey, .. } => {
            source(ctx, job, len, &local(Access::empty()))?;
            reach(ctx, peer, Side::Destination, (Access::REMOTE_WRITE, remote_addr, rkey), job.done, len)?;
        }
        _ => {
            source(ctx, job, len, &local(Access::empty()))?;
            let target = remote(Access::LOCAL_WRITE, job.recv.sges.as_slice());
            let gone = |_: KeyError| PieceError::Remote(Fault::OPERATION);
            ctx.gather(Side::Destination, &target).map_err(gone)?;
        }
    }
    Ok(())
}

fn source(ctx: &mut Context, job: &Job, len: u64, sges: &Gather<'_>) -> Result<(), PieceError> {
    if job.wqe.flags.contains(SendFlags::INLINE) {
        ctx.src.push(Seg::from_own(&job.wqe.inline).slice(job.done as usize, len as usize));
        return Ok(());
    }
    ctx.gather(Side::Source, sges).map_err(|_| PieceError::Local)
}

/// Appends memory of the peer that a key gives access to.
fn reach(
    ctx: &mut Context,
    peer: &Binding,
    side: Side,
    (need, addr, rkey): (Access, u64, u32),
    from: u64,
    len: u64,
) -> Result<(), PieceError> {
    let length = len as u32;
    let sges = [Sge { addr: addr.wrapping_add(from), length, lkey: rkey }];
    let gather = Gather { nic: &peer.nic, pdn: peer.qp.id.pdn, need, sges: &sges, from: 0, len };
    ctx.gather(side, &gather).map_err(|_| PieceError::Remote(Fault::ACCESS))
}

fn received(job: &Job) -> RecvDone {
    let (opcode, imm) = match job.wqe.op {
        Op::Write { imm, .. } => (WcOpcode::RecvRdmaWithImm, imm),
        Op::Send { imm } => (WcOpcode::Recv, imm),
        _ => (WcOpcode::Recv, false),
    };
    RecvDone {
        wr_id: job.recv.wr_id,
        status: WcStatus::Success,
        opcode,
        byte_len: job.wqe.length as u32,
        imm: imm.then_some(job.wqe.imm),
        src_qp: 0,
        flags: WcFlags::empty(),
        solicited: job.wqe.flags.contains(SendFlags::SOLICITED),
    }
}

/// Local ACK timeout: 4.096 us * 2^code (IBA 9.7.6.1.3), no less than 1 ms; code 0 is for ever, and then this is just how often to
/// note it.
fn ack_timeout(code: u8) -> Duration {
    if code == 0 {
        return Duration::from_secs(1);
    }
    Duration::from_nanos(4096 << code.min(31)).max(Duration::from_millis(1))
}

/// RNR NAK timer (IBA table 45).
fn rnr_timer(code: u8) -> Duration {
    const UNITS_OF_10_US: [u32; 32] = [
        65_536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1_024, 1_536, 2_048, 3_072,
        4_096, 6_144, 8_192, 12_288, 16_384, 24_576, 32_768, 49_152,
    ];
    Duration::from_micros(u64::from(UNITS_OF_10_US[usize::from(code & 31)]) * 10)
}
