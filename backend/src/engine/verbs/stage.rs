//! One work request, translated for the NIC.

use std::time::{Duration, Instant};

use virtio_rdma::ib::{Access, AtomicCap, QpType, SendFlags};

use super::super::complete::note_limit;
use super::super::context::Context;
use super::super::job::Job;
use super::super::{cost, rc};
use super::{between, poll};
use crate::nic::Nic;
use crate::profile::Profile;
use crate::qp::{Binding, NicQueue, Posted, Qp, SendQueue, Taken};
use crate::verbs::grant::NicAddress;
use crate::verbs::pair::ELSEWHERE;
use crate::verbs::{End, PostedOp, SendList, Use};
use crate::wqe::{Op, Recv, Send, Sge};

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Staged {
    /// It is in the list.
    Posted,
    /// The NIC's queue is full.
    Full,
    /// The peer has no receive: look again, or give up after so long.
    NotReady(Duration),
    /// The peer's host is to be asked first.
    Ask(Ask),
    /// Not for the NIC: it is executed when nothing is there.
    Alone,
}

/// What the peer's host is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// What this key stands for.
    Key(u32),
    /// Receives, for this message and those that follow.
    Receives,
}

/// Where the peer is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Far<'a> {
    /// On this host.
    Here(&'a Binding),
    /// On another one.
    There,
}

/// What the NIC is told besides the payload.
#[derive(Debug, Clone, Copy)]
struct Command {
    op: PostedOp,
    remote: (u64, u32),
}

/// Appends a work request to the list for the NIC, and gives the NIC the receive that it needs.
pub(super) fn stage(
    ctx: &mut Context,
    nic: &Nic,
    qp: &Qp,
    send: &mut SendQueue,
    far: Far<'_>,
    job: &mut Job,
) -> Staged {
    send.prefetch_keys(ctx.verbs.list.is_empty());
    let op = posted_op(ctx, &job.wqe);
    let (Some(queue), Some(op)) = (&mut send.nic, op) else { return Staged::Alone };
    if job.is_under_way() {
        return Staged::Alone;
    }
    ctx.charge(cost::LOOKUP * job.wqe.lookups() as u64);
    let staged = ctx.verbs.list.len();
    if queue.end.room() <= staged {
        return Staged::Full;
    }
    let command = match command(qp, queue, (far, ctx.now), op, &job.wqe) {
        Ok(command) => command,
        Err(staged) => return staged,
    };
    let id = queue.end.send_id(staged);
    if !translate(&mut ctx.verbs.list, nic, qp, queue, &job.wqe, command, id) {
        ctx.verbs.list.truncate(staged);
        return Staged::Alone;
    }
    if op.takes_receive() {
        let taken = match (far, queue.peer.clone()) {
            (Far::Here(peer), Some(end)) => receive(ctx, peer, &end, job, queue.posted.len()),
            (Far::Here(_), None) => Staged::Alone,
            (Far::There, _) => between::take_receive(queue, ctx.now),
        };
        if taken != Staged::Posted {
            ctx.verbs.list.truncate(staged);
            return taken;
        }
    }
    let signaled = qp.id.signal_all || job.wqe.flags.contains(SendFlags::SIGNALED);
    let (wr_id, opcode, length) = (job.wqe.wr_id, op.opcode(), job.wqe.length as u32);
    let way = queue.way();
    queue.posted.push_back(Posted { wr_id, opcode, length, signaled, seen: job.seen, way });
    ctx.charge_posted(job.wqe.length);
    send.hand_over();
    Staged::Posted
}

/// Whether a work request that is not due yet takes a receive of a peer on another host; `None` if, as things are, it is not for the NIC.
pub(super) fn foresee(ctx: &mut Context, nic: &Nic, qp: &Qp, send: &mut SendQueue, wqe: &Send) -> Option<bool> {
    let op = posted_op(ctx, wqe)?;
    ctx.charge(cost::LOOKUP * wqe.lookups() as u64);
    let queue = send.nic.as_mut()?;
    let command = command(qp, queue, (Far::There, ctx.now), op, wqe).ok()?;
    let staged = ctx.verbs.list.len();
    let holds = translate(&mut ctx.verbs.list, nic, qp, queue, wqe, command, 0);
    ctx.verbs.list.truncate(staged);
    holds.then_some(op.takes_receive())
}

/// What it is to the NIC, if anything. Atomics are executed here, by the processor, unless the NIC's are so with those.
#[inline]
fn posted_op(ctx: &Context, wqe: &Send) -> Option<PostedOp> {
    Some(match wqe.op {
        Op::Send { imm: false } => PostedOp::Send,
        Op::Send { imm: true } => PostedOp::SendImm(wqe.imm),
        Op::Write { imm: false, .. } => PostedOp::Write,
        Op::Write { imm: true, .. } => PostedOp::WriteImm(wqe.imm),
        Op::Read { .. } => PostedOp::Read,
        Op::Atomic { action, .. } if ctx.engine.fabric()?.device().limits().atomics == AtomicCap::Glob => {
            PostedOp::Atomic(action)
        }
        _ => return None,
    })
}

/// Checks all but the local keys.
///
/// # Errors
/// If something does not hold, or is not for the NIC, or is not known yet.
#[inline]
fn command(
    qp: &Qp,
    queue: &mut NicQueue,
    (far, now): (Far<'_>, Instant),
    op: PostedOp,
    wqe: &Send,
) -> Result<Command, Staged> {
    if wqe.length > u64::from(Profile::MAX_MESSAGE) || !fits(queue, wqe) {
        return Err(Staged::Alone);
    }
    if op.fetches() && (qp.id.kind != QpType::Rc || !qp.has_resources()) {
        return Err(Staged::Alone);
    }
    let Some((need, addr, key)) = reaches(wqe)? else {
        return Ok(Command { op, remote: (0, 0) });
    };
    let remote = match far {
        Far::Here(peer) => remote(queue, peer, op, wqe.length, (need, addr, key)).ok_or(Staged::Alone)?,
        Far::There => between::remote(queue, now, key, Use { pdn: ELSEWHERE, need, addr, len: wqe.length })?,
    };
    Ok(Command { op, remote })
}

/// Memory of the peer's, by key, and what is done there.
type Reaches = (Access, u64, u32);

/// What memory of the peer's it reaches, if any.
///
/// # Errors
/// If that may not be.
#[inline]
fn reaches(wqe: &Send) -> Result<Option<Reaches>, Staged> {
    Ok(match wqe.op {
        Op::Write { remote_addr, rkey, .. } => Some((Access::REMOTE_WRITE, remote_addr, rkey)),
        Op::Read { remote_addr, rkey } => Some((Access::REMOTE_READ, remote_addr, rkey)),
        Op::Atomic { remote_addr, rkey, .. } => {
            let answer = wqe.sges.as_slice();
            let is_word = remote_addr.is_multiple_of(8) && matches!(answer, [sge] if sge.length == 8);
            Some((is_word.then_some(Access::REMOTE_ATOMIC).ok_or(Staged::Alone)?, remote_addr, rkey))
        }
        _ => None,
    })
}

/// The same for the NIC, if the peer, which is on this host, allows it.
#[inline]
fn remote(
    queue: &mut NicQueue,
    peer: &Binding,
    op: PostedOp,
    len: u64,
    (need, addr, key): Reaches,
) -> Option<NicAddress> {
    if !peer.qp.access().contains(need) || (op.fetches() && !peer.qp.lends_resources()) {
        return None;
    }
    if len == 0 {
        // No key is looked at then (IBA 9.7.3.1.2, C9-88).
        return Some((0, 0));
    }
    let keys = &peer.nic.keys;
    let wanted = Use { pdn: peer.qp.id.pdn, need, addr, len };
    queue.theirs.get(key, keys.revocations(), wanted, || keys.grant(key))
}

fn fits(queue: &NicQueue, wqe: &Send) -> bool {
    let capacity = queue.end.capacity();
    wqe.sges.as_slice().len() <= capacity.sges as usize
        && (!wqe.is_inline() || wqe.inline.len() <= capacity.inline as usize)
}

/// Appends it with the NIC's addresses and keys. False if a local key does not hold.
#[inline]
fn translate(
    list: &mut SendList,
    nic: &Nic,
    qp: &Qp,
    queue: &mut NicQueue,
    wqe: &Send,
    Command { op, remote }: Command,
    id: u64,
) -> bool {
    list.push(id, op, wqe.flags & (SendFlags::FENCE | SendFlags::SOLICITED | SendFlags::SIGNALED), remote);
    if wqe.is_inline() {
        list.set_inline(&wqe.inline);
        return true;
    }
    let need = if op.fetches() { Access::LOCAL_WRITE } else { Access::empty() };
    wqe.sges.as_slice().iter().filter(|sge| sge.length > 0).all(|sge| {
        let wanted = Use { pdn: qp.id.pdn, need, addr: sge.addr, len: sge.length.into() };
        let found = queue.own.get(sge.lkey, nic.keys.revocations(), wanted, || nic.keys.grant(sge.lkey));
        let Some((addr, lkey)) = found else { return false };
        list.push_sge(Sge { addr, lkey, length: sge.length });
        true
    })
}

/// Takes a receive of the peer's and gives it to the NIC, so that it is there before the message.
fn receive(ctx: &mut Context, peer: &Binding, end: &End, job: &mut Job, unanswered: usize) -> Staged {
    let mut sges = std::mem::take(&mut ctx.verbs.sges);
    let staged = take_and_post(ctx, peer, end, job, unanswered, &mut sges);
    ctx.verbs.sges = sges;
    note_limit(&peer.nic, &peer.qp);
    staged
}

fn take_and_post(
    ctx: &mut Context,
    peer: &Binding,
    end: &End,
    job: &mut Job,
    unanswered: usize,
    sges: &mut Vec<Sge>,
) -> Staged {
    let on_nic = end.recvs();
    if !on_nic.has_room() {
        // Those of unreliable messages that got lost are for the next.
        let lost = peer.qp.id.kind == QpType::Uc && unanswered == 0;
        return if lost { Staged::Posted } else { Staged::Full };
    }
    if !peer.qp.responds() {
        // It is being flushed, or will be when we are done here.
        return Staged::Alone;
    }
    let taken = peer.qp.recv.lock().begin_quietly(&mut job.recv);
    match taken {
        Taken::Yes => {}
        Taken::Empty | Taken::TooShort if peer.qp.id.kind == QpType::Rc => {
            return Staged::NotReady(rc::rnr_timer(peer.qp.attrs.lock().attr.min_rnr_timer));
        }
        Taken::Empty | Taken::TooShort | Taken::Broken(_) => return Staged::Alone,
        Taken::Malformed => {
            job.begin_receive(None);
            job.rest_receive(&peer.qp);
            return Staged::Alone;
        }
    }
    if !their_sges(ctx, peer, end, job, sges) {
        peer.qp.recv.lock().put_back(std::mem::take(&mut job.recv));
        return Staged::Alone;
    }
    let solicited = job.wqe.flags.contains(SendFlags::SOLICITED);
    if on_nic.post(&job.recv, solicited, sges).is_ok() {
        return Staged::Posted;
    }
    poll::give_up(&ctx.engine, &peer.nic, &peer.qp, end);
    Staged::Alone
}

/// Where the receive puts the message, for the NIC. False if a key does not hold, the message is too long, or the list is too long for
/// the NIC.
fn their_sges(ctx: &mut Context, peer: &Binding, end: &End, job: &Job, out: &mut Vec<Sge>) -> bool {
    out.clear();
    if matches!(job.wqe.op, Op::Write { .. }) {
        return true;
    }
    job.wqe.length <= job.recv.sges.total() && recv_sges(ctx, (&peer.nic, &peer.qp, end), &job.recv, out)
}

/// The list of a receive, for the NIC. False if a key does not hold, or it is too long.
pub(super) fn recv_sges(ctx: &mut Context, (nic, qp, end): (&Nic, &Qp, &End), recv: &Recv, out: &mut Vec<Sge>) -> bool {
    let list = recv.sges.as_slice();
    ctx.charge(cost::LOOKUP * list.len() as u64);
    if list.len() > end.capacity().sges as usize || qp.id.recv_pdn() != qp.id.pdn {
        return false;
    }
    list.iter().filter(|sge| sge.length > 0).all(|sge| {
        let mr = ctx.key(nic, sge.lkey).ok();
        let (need, addr, len) = (Access::LOCAL_WRITE, sge.addr, sge.length.into());
        let found = mr.and_then(|mr| mr.grant()?.local(Use { pdn: qp.id.pdn, need, addr, len }));
        out.extend(found.map(|(addr, lkey)| Sge { addr, lkey, length: sge.length }));
        found.is_some()
    })
}
