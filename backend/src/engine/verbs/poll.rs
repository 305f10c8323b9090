//! Completions as they come from the NIC: receives are completed here, of sends it is noted that their QP is to be visited.

use std::sync::Arc;

use virtio_rdma::ib::{WcFlags, WcStatus};

use super::super::complete::{RecvDone, Word, complete_recv, fatal};
use super::super::context::Context;
use crate::nic::Nic;
use crate::qp::Qp;
use crate::verbs::fabric::Side;
use crate::verbs::{End, Fabric, Member, Tag, Trouble, Wc};

/// Completions that one round takes from each queue.
const COMPLETIONS_PER_ROUND: usize = 64;
/// Rounds between two looks for trouble.
const ROUNDS_PER_LOOK: u32 = 256;

/// Why a QP fails without a fault of its own.
pub(super) const BROKEN: &str = "its queue pair on the host's NIC has failed";

/// Takes completions of this worker's QPs. `tell` is told whose they are, what that cost, and whether the QP is to be visited. True if
/// there were any, or some are to come.
pub(in super::super) fn poll(ctx: &mut Context, tell: &mut impl FnMut(&Member, u64, bool)) -> bool {
    let Some(fabric) = ctx.engine.fabric().cloned() else { return false };
    look_for_trouble(ctx, &fabric);
    let side = fabric.side(ctx.worker);
    if !side.is_busy() {
        return false;
    }
    let mut wcs = std::mem::take(&mut ctx.verbs.wcs);
    wcs.append(&mut ctx.verbs.parked);
    side.poll(COMPLETIONS_PER_ROUND, &mut wcs);
    for wc in wcs.drain(..) {
        if let Some(member) = side.member(Tag::end(wc.id)) {
            complete(ctx, &member, wc, tell);
        }
    }
    ctx.verbs.wcs = wcs;
    true
}

fn complete(ctx: &mut Context, member: &Member, wc: Wc, tell: &mut impl FnMut(&Member, u64, bool)) {
    if !Tag::is_recv(wc.id) {
        member.end.note_send(wc.id, wc.status);
        return tell(member, 0, true);
    }
    if !member.nic.is_running() {
        // Its memory is not to be touched now.
        ctx.verbs.parked.push(wc);
        return;
    }
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
    complete_recv(ctx, &member.nic, &member.qp, &done);
    match wc.status {
        WcStatus::Success => {}
        // Unless the guest had it flushed.
        WcStatus::WrFlushErr => fatal(&member.nic, &member.qp, BROKEN),
        _ => {
            member.qp.fail();
        }
    }
    let spent = ctx.take_spent();
    ctx.charge(before);
    tell(member, spent, !success);
}

/// What no completion says. Whatever of a QP is on the NIC then is flushed by us, since the NIC may not.
fn look_for_trouble(ctx: &mut Context, fabric: &Arc<Fabric>) {
    ctx.verbs.rounds = ctx.verbs.rounds.wrapping_add(1);
    if !ctx.verbs.rounds.is_multiple_of(ROUNDS_PER_LOOK) {
        return;
    }
    let mut trouble = Vec::new();
    fabric.device().take_trouble(&mut trouble);
    for what in trouble {
        log::warn!("the host's NIC {}: {what:?}", fabric.device().name());
        match what {
            Trouble::QueuePair(number) => {
                fabric
                    .sides()
                    .filter_map(|side| side.member_of_qp(number))
                    .for_each(|it| give_up(ctx, &it.nic, &it.qp, &it.end));
            }
            Trouble::Removed => {
                fabric.sides().flat_map(Side::members).for_each(|it| give_up(ctx, &it.nic, &it.qp, &it.end));
            }
            Trouble::CompletionQueue | Trouble::Port { .. } => {}
        }
    }
}

/// A queue pair on the NIC is of no use any more: its QP fails, and is flushed by its worker.
pub(super) fn give_up(ctx: &Context, nic: &Arc<Nic>, qp: &Arc<Qp>, end: &End) {
    end.destroy();
    fatal(nic, qp, BROKEN);
    ctx.engine.attend(nic, qp);
}
