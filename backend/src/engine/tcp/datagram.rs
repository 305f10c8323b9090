//! Unreliable datagrams to and from other hosts. They are copied: what waits for a connection must not hold up a queue pair.

use std::sync::Arc;

use freeflow_tcp::frame::Datagram as Carried;
use freeflow_tcp::host::Token;
use virtio_rdma::ib::{MULTICAST_QPN, SendFlags};
use virtio_rdma::ring::GRH_SIZE;

use super::links::with_links;
use crate::engine::context::Context;
use crate::engine::job::Job;
use crate::engine::ud::{self, Offered, Route};
use crate::nic::Nic;
use crate::overlay::Gid;
use crate::qp::Qp;
use crate::tcp::PeerId;
use crate::wqe::Op;

/// Sends a datagram to a host, or drops it.
pub(in super::super) fn send(ctx: &mut Context, nic: &Nic, peer: PeerId, carried: Carried, payload: Vec<u8>) {
    let mut taken = false;
    with_links(ctx, |links, now, ctx| {
        let Some(line) = links.to(peer) else { return };
        let (token, len) = (Token(line.tables.next_datagram), payload.len() as u32);
        line.tables.next_datagram += 1;
        line.tables.datagrams.insert(token, payload);
        let (link, mut device) = line.parts(ctx);
        link.send_datagram(now, carried, len, token, &mut device);
        taken = line.tables.datagrams.contains_key(&token);
        if line.tables.datagrams.len() >= MANY {
            // A queue pair may have posted more than may wait.
            links.flush_to(peer, now, ctx);
        }
    });
    if !taken {
        nic.counters.messages_dropped.add(1);
    }
}

/// Whether a datagram would be dropped now, since too many wait for its connection, and could be sent soon.
pub(in super::super) fn is_congested(ctx: &Context, peer: PeerId, qpn: u32) -> bool {
    ctx.tcp.as_ref().and_then(|links| links.link_to(peer)).is_some_and(|link| link.is_congested(qpn))
}

/// Nobody waits for this connection any more, until one more datagram has gone.
pub(in super::super) fn give_up_on(ctx: &mut Context, peer: PeerId, qpn: u32) {
    with_links(ctx, |links, _, _| {
        if let Some(line) = links.to(peer) {
            line.link.give_up_on(qpn);
        }
    });
}

/// Datagrams that wait before they are sent without waiting for the end of the round.
const MANY: usize = 32;

/// Queue pairs that a datagram is for.
enum Target {
    One(Arc<Nic>, Arc<Qp>),
    Group(crate::groups::Members),
}

fn target(ctx: &Context, from: PeerId, carried: &Carried) -> Option<Target> {
    let (overlay, destination) = (ctx.engine.overlay(), Gid(carried.destination));
    let tenant = overlay.tenant_of(from, carried.tenant, Gid(carried.source))?;
    if carried.destination_qpn == MULTICAST_QPN && destination.is_multicast() {
        let groups = ctx.engine.tenants().known(&tenant)?;
        return groups.members(destination).map(Target::Group);
    }
    let nic = ctx.engine.nic(overlay.find(&tenant, destination)?).filter(|nic| nic.is_running())?;
    let qp = nic.qp(carried.destination_qpn).filter(|qp| ud::accepts(qp, carried.qkey));
    if qp.is_none() {
        nic.counters.messages_dropped.add(1);
    }
    Some(Target::One(nic, qp?))
}

/// Whether anybody takes it.
pub(super) fn is_wanted(ctx: &Context, from: PeerId, carried: &Carried) -> bool {
    target(ctx, from, carried).is_some()
}

/// Offers it to a queue pair, which may have no receive for it.
fn offer(ctx: &mut Context, sender: u32, (nic, qp): (&Arc<Nic>, &Arc<Qp>), job: &mut Job, header: &[u8; GRH_SIZE]) {
    let Op::Datagram { imm, .. } = job.wqe.op else { return };
    if ud::offer(ctx, sender, (nic, qp), job, header, imm) != Offered::Delivered {
        nic.counters.messages_dropped.add(1);
    }
}

/// Gives it to those it is for, if they can take it at once. The payload's memory comes back.
pub(super) fn deliver(ctx: &mut Context, from: PeerId, carried: &Carried, payload: Vec<u8>) -> Vec<u8> {
    let Some(target) = target(ctx, from, carried) else { return payload };
    let imm = carried.imm.is_some();
    let header = Route::of(carried).header(payload.len() as u16, imm);
    let mut job = ctx.new_job();
    job.wqe.op = Op::Datagram { imm, qpn: 0, qkey: carried.qkey, ah: 0 };
    job.wqe.flags = if carried.solicited { SendFlags::SOLICITED } else { SendFlags::empty() };
    (job.wqe.length, job.wqe.imm) = (payload.len() as u64, carried.imm.unwrap_or(0));
    job.wqe.sges.clear();
    let kept = std::mem::replace(&mut job.wqe.inline, payload);
    ctx.src.clear();
    match target {
        Target::One(nic, qp) => {
            offer(ctx, carried.source_qpn, (&nic, &qp), &mut job, &header);
        }
        Target::Group(members) => {
            for member in members.iter() {
                if !member.has_left() && member.nic.is_running() && ud::accepts(&member.qp, carried.qkey) {
                    offer(ctx, carried.source_qpn, (&member.nic, &member.qp), &mut job, &header);
                }
            }
        }
    }
    let payload = std::mem::replace(&mut job.wqe.inline, kept);
    ctx.recycle(job);
    payload
}
