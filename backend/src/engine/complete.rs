//! What becomes of work requests: completions of both queues.

use std::sync::Arc;
use std::time::Duration;

use virtio_rdma::event::EventType;
use virtio_rdma::ib::{SendFlags, WcFlags, WcOpcode, WcStatus};
use virtio_rdma::ring::Cqe;

use super::completions::How;
use super::context::Context;
use super::failure::{OVERFLOW, fatal};
use super::job::Job;
use super::sampler::Seen;
use crate::nic::Nic;
use crate::nic::meters::{Class, Meter, Name, OTHERS, Way};
use crate::qp::{Posted, Qp, SendQueue, WaitKind};

/// Bytes of a message from which on no completion waits for it, and its own for no other: what that saves is little beside the copy.
pub(super) const LONG: u64 = 1024;

/// How far a work request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Complete.
    Done,
    /// The budget is used up.
    Paused,
    /// It waits for the peer; try again at the latest after this time.
    Wait(WaitKind, Duration),
    /// It failed.
    Failed(WcStatus),
}

/// Completes the request at the head of the ring. False if the completion could not be written.
pub(super) fn complete_send(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Qp,
    send: &mut SendQueue,
    job: &Job,
    status: WcStatus,
) -> bool {
    send.advance();
    // Nobody's completion waits for a request that may take long, or that has yet to be posted.
    let hold = status == WcStatus::Success && job.wqe.length < LONG && send.knows_more();
    let wanted = qp.id.signal_all || job.wqe.flags.contains(SendFlags::SIGNALED) || status != WcStatus::Success;
    if !wanted {
        if !hold {
            ctx.publish();
        }
        count_sent(ctx, nic, qp, send, &Sent::of(qp, send, job, status));
        return true;
    }
    // Before the completion: who sees that may post the next request at once.
    send.publish();
    let cqe = send_cqe(qp, job.wqe.wr_id, job.wqe.completion_opcode(), job.wqe.length as u32, status);
    let how = How { solicited: status != WcStatus::Success, hold, alone: true };
    let pushed = ctx.push_cqe(nic, &qp.id.send_cq, &cqe, how).is_ok();
    count_sent(ctx, nic, qp, send, &Sent::of(qp, send, job, status));
    pushed
}

/// Completes the oldest work request that somebody else had to do: the NIC, or another host. `more` are complete, too. False if the
/// completion could not be written.
pub(super) fn complete_handed_over(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    Posted { wr_id, opcode, length, signaled, seen, way }: Posted,
    status: WcStatus,
    more: bool,
) -> bool {
    let success = status == WcStatus::Success;
    let hold = success && more && u64::from(length) < LONG;
    send.retire();
    send.bytes += if success { length.into() } else { 0 };
    let mut written = true;
    if signaled || !success {
        // Before the completion: who sees that may post the next request at once.
        send.publish();
        let cqe = send_cqe(qp, wr_id, opcode, length, status);
        written = ctx.push_cqe(nic, &qp.id.send_cq, &cqe, How { solicited: !success, hold, alone: true }).is_ok();
    } else if !hold {
        ctx.publish();
    }
    count_sent(ctx, nic, qp, send, &Sent { way, length: length.into(), status, seen });
    written
}

/// The completion of a send work request.
pub(super) fn send_cqe(qp: &Qp, wr_id: u64, opcode: WcOpcode, length: u32, status: WcStatus) -> Cqe {
    Cqe {
        wr_id: wr_id.into(),
        status: status.to_wire().into(),
        opcode: opcode.to_wire().into(),
        byte_len: if status == WcStatus::Success { length } else { 0 }.into(),
        qp_num: qp.id.qpn.into(),
        port_num: 1,
        ..Cqe::default()
    }
}

/// A work request that has ended, as figures see it.
struct Sent {
    way: Way,
    length: u64,
    status: WcStatus,
    seen: Option<Seen>,
}

impl Sent {
    #[inline]
    fn of(qp: &Qp, send: &SendQueue, job: &Job, status: WcStatus) -> Self {
        let way = if qp.id.kind.is_datagram() { job.way } else { send.way() };
        Self { way, length: job.wqe.length, status, seen: job.seen }
    }
}

#[inline]
fn count_sent(ctx: &mut Context, nic: &Nic, qp: &Qp, send: &mut SendQueue, sent: &Sent) {
    if !send.meter.as_ref().is_some_and(|(way, _)| *way == sent.way) {
        send.meter = Some((sent.way, meter_of(ctx, nic, qp, send, sent.way)));
    }
    let Some((_, meter)) = &send.meter else { return };
    if sent.status != WcStatus::Success {
        return meter.count_failure(sent.status);
    }
    ctx.count_sent(meter, sent.length);
    if let Some(seen) = sent.seen {
        meter.time(seen.at.elapsed(), seen.of);
    }
}

/// Where work requests are counted that go this way.
#[cold]
fn meter_of(ctx: &Context, nic: &Nic, qp: &Qp, send: &SendQueue, way: Way) -> Arc<Meter> {
    let host = way.peer.map(|peer| {
        let own = send.remote.as_ref().filter(|remote| remote.peer == peer).map(|remote| remote.host.clone());
        own.or_else(|| ctx.host_name(peer)).unwrap_or_else(|| OTHERS.into())
    });
    let name = Name { class: Class::of(qp.id.kind), path: way.path, host };
    nic.meters.of(ctx.worker, name, &nic.counters)
}

/// What a message carries besides its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    None,
    /// Immediate data.
    Imm(u32),
    /// The key that it made free.
    Invalidated(u32),
}

impl Word {
    /// Immediate data where there are some.
    pub(super) fn imm(there: bool, data: u32) -> Self {
        if there { Self::Imm(data) } else { Self::None }
    }

    #[inline]
    fn wire(self) -> (WcFlags, u32) {
        match self {
            Self::None => (WcFlags::empty(), 0),
            Self::Imm(data) => (WcFlags::WITH_IMM, data),
            Self::Invalidated(key) => (WcFlags::WITH_INV, key),
        }
    }
}

/// What a receive's completion says.
#[derive(Debug, Clone, Copy)]
pub(super) struct RecvDone {
    pub(super) wr_id: u64,
    pub(super) status: WcStatus,
    pub(super) opcode: WcOpcode,
    pub(super) byte_len: u32,
    pub(super) word: Word,
    pub(super) src_qp: u32,
    pub(super) flags: WcFlags,
    /// For datagrams, which header is in front.
    pub(super) sl: u8,
    pub(super) solicited: bool,
}

impl RecvDone {
    /// A receive that ends in error.
    pub(super) fn error(wr_id: u64, status: WcStatus) -> Self {
        Self {
            wr_id,
            status,
            opcode: WcOpcode::Recv,
            byte_len: 0,
            word: Word::None,
            src_qp: 0,
            flags: WcFlags::empty(),
            sl: 0,
            solicited: true,
        }
    }
}

/// Writes a receive's completion to the QP's CQ. False if that is broken: the QP has failed then.
#[inline]
pub(super) fn complete_recv(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, done: &RecvDone) -> bool {
    let (word_flag, word) = done.word.wire();
    let cqe = Cqe {
        wr_id: done.wr_id.into(),
        status: done.status.to_wire().into(),
        opcode: done.opcode.to_wire().into(),
        byte_len: done.byte_len.into(),
        imm_data: word.into(),
        qp_num: qp.id.qpn.into(),
        src_qp: done.src_qp.into(),
        wc_flags: (done.flags | word_flag).bits().into(),
        sl: done.sl,
        port_num: 1,
        ..Cqe::default()
    };
    // That of the message's sender follows in a moment.
    let hold = done.status == WcStatus::Success;
    let how = How { solicited: done.solicited, hold, alone: receives_alone(ctx, nic, qp) };
    let pushed = ctx.push_cqe(nic, &qp.id.recv_cq, &cqe, how).is_ok();
    if done.status == WcStatus::Success {
        ctx.count_received(nic, done.byte_len.into());
    } else {
        nic.counters.recv_wqes.add(1);
        nic.counters.count_failure(done.status);
        nic.meters.count_failed_receive(Class::of(qp.id.kind), done.status);
    }
    if !pushed {
        overflowed(ctx, nic, qp);
    }
    pushed
}

#[cold]
fn overflowed(ctx: &Context, nic: &Arc<Nic>, qp: &Arc<Qp>) {
    fatal(nic, qp, OVERFLOW);
    ctx.engine.attend(nic, qp);
}

/// Whether no other worker completes receives of this QP, whose order must stay: its owner flushes them, and many may send to it if they
/// are datagrams.
fn receives_alone(ctx: &Context, nic: &Nic, qp: &Qp) -> bool {
    (nic.worker_of(qp) == ctx.worker && !qp.id.kind.is_datagram()) || ctx.engine.num_workers() == 1
}

/// A receive was taken, maybe from a shared queue that runs low now.
pub(super) fn note_limit(nic: &Nic, qp: &Qp) {
    if let Some(srq) = &qp.id.srq
        && srq.take_limit_event()
    {
        nic.raise(EventType::SrqLimit, srq.srqn);
    }
}
