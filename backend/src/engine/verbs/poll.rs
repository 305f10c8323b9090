//! Completions as they come from the NIC: receives are completed here, of sends it is noted that their QP is to be visited.

use std::sync::Arc;

use virtio_rdma::ib::{WcFlags, WcStatus};

use super::super::Engine;
use super::super::complete::{RecvDone, Word, complete_recv};
use super::super::context::Context;
use super::super::failure::{OVERFLOW, fatal, tell_fatal};
use crate::nic::Nic;
use crate::qp::Qp;
use crate::verbs::{End, Member, Tag, Wc};

/// Completions that one round takes from each queue.
const COMPLETIONS_PER_ROUND: usize = 64;

/// Why a QP fails without a fault of its own.
pub(super) const BROKEN: &str = "its queue pair on the host's NIC has failed";

/// Takes completions of this worker's QPs. `tell` is told whose they are, what that cost, and whether the QP is to be visited. True if
/// there were any.
pub(in super::super) fn poll(ctx: &mut Context, tell: &mut impl FnMut(&Member, u64, bool)) -> bool {
    let Some(fabric) = ctx.engine.fabric().cloned() else { return false };
    let side = fabric.side(ctx.worker);
    if !side.is_busy() && ctx.verbs.wcs.is_empty() {
        return false;
    }
    // They came first.
    let parked = if ctx.verbs.parked.is_empty() { Vec::new() } else { unpark(ctx) };
    let mut wcs = std::mem::take(&mut ctx.verbs.wcs);
    side.poll(COMPLETIONS_PER_ROUND, &mut wcs);
    let any = !wcs.is_empty() || !parked.is_empty();
    for wc in parked {
        if let Some(member) = side.member(Tag::end(wc.id)) {
            receive(ctx, &member, wc, tell);
        }
    }
    for wc in wcs.drain(..) {
        if let Some(member) = side.member(Tag::end(wc.id)) {
            complete(ctx, &member, wc, tell);
        }
    }
    ctx.verbs.wcs = wcs;
    any
}

/// This worker is about to sleep, and is woken by what the NIC completes from here on. False if something is there already.
pub(in super::super) fn arm(ctx: &mut Context) -> bool {
    let Some(fabric) = ctx.engine.fabric().cloned() else { return true };
    let side = fabric.side(ctx.worker);
    let armed = side.arm();
    if side.is_busy() {
        // What completed just before makes no event.
        side.poll(COMPLETIONS_PER_ROUND, &mut ctx.verbs.wcs);
    }
    armed && ctx.verbs.wcs.is_empty()
}

fn complete(ctx: &mut Context, member: &Member, wc: Wc, tell: &mut impl FnMut(&Member, u64, bool)) {
    if !Tag::is_recv(wc.id) {
        member.end.note_send(wc.id, wc.status);
        return tell(member, 0, true);
    }
    if !member.nic.is_running() || is_parked(ctx, &member.nic) {
        // Its memory is not to be touched now, or what came before is not there yet.
        return park(ctx, member, wc);
    }
    receive(ctx, member, wc, tell);
}

fn receive(ctx: &mut Context, member: &Member, wc: Wc, tell: &mut impl FnMut(&Member, u64, bool)) {
    let Some(recv) = member.end.take_recv() else { return };
    let before = ctx.take_spent();
    let success = wc.status == WcStatus::Success;
    let done = if success {
        RecvDone {
            wr_id: recv.wr_id,
            status: wc.status,
            opcode: wc.opcode,
            byte_len: wc.byte_len,
            word: wc.imm.map_or(Word::None, Word::Imm),
            src_qp: 0,
            flags: WcFlags::empty(),
            sl: 0,
            solicited: recv.solicited,
        }
    } else {
        RecvDone::error(recv.wr_id, wc.status)
    };
    // Before the completion: who sees that may ask for the state at once.
    let moved = !success && wc.status != WcStatus::WrFlushErr && member.qp.fail();
    let written = complete_recv(ctx, &member.nic, &member.qp, &done);
    if wc.status == WcStatus::WrFlushErr {
        // Unless the guest had it flushed.
        fatal(&member.nic, &member.qp, BROKEN);
    } else if moved && !written {
        tell_fatal(&member.nic, &member.qp, OVERFLOW);
    }
    let spent = ctx.take_spent();
    ctx.charge(before);
    tell(member, spent, !success);
}

/// Keeps a completion until its guest runs. By virtual NIC: there may be very many of one that is stopped, and every round asks.
fn park(ctx: &mut Context, member: &Member, wc: Wc) {
    let parked = &mut ctx.verbs.parked;
    match parked.iter_mut().find(|(nic, _)| Arc::ptr_eq(nic, &member.nic)) {
        Some((_, wcs)) => wcs.push_back(wc),
        None => parked.push((member.nic.clone(), [wc].into())),
    }
}

fn is_parked(ctx: &Context, nic: &Arc<Nic>) -> bool {
    ctx.verbs.parked.iter().any(|(parked, _)| Arc::ptr_eq(parked, nic))
}

/// Some completions of guests that run again. Those of virtual NICs that are gone are nobody's.
fn unpark(ctx: &mut Context) -> Vec<Wc> {
    let mut due = Vec::new();
    let engine = &ctx.engine;
    ctx.verbs.parked.retain_mut(|(nic, wcs)| {
        if nic.is_running() {
            due.extend(wcs.drain(..wcs.len().min(COMPLETIONS_PER_ROUND)));
        }
        !wcs.is_empty() && engine.nic(nic.id).is_some()
    });
    due
}

/// A queue pair on the NIC is of no use any more: its QP fails, and is flushed by its worker.
pub(super) fn give_up(engine: &Engine, nic: &Arc<Nic>, qp: &Arc<Qp>, end: &End) {
    end.destroy();
    fatal(nic, qp, BROKEN);
    engine.attend(nic, qp);
}
