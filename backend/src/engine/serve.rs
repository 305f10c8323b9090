//! One visit to a QP: start or continue its work requests, complete them, or flush it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{QpState, QpType, SendFlags, WcFlags, WcOpcode, WcStatus};
use virtio_rdma::ring::Cqe;

use super::context::{Budget, Context};
use super::job::Job;
use super::{cost, local, rc, uc, ud};
use crate::nic::Nic;
use crate::qp::{Flush, Qp, SendQueue, Wait, WaitKind};
use crate::ring::rxe::parse_send;
use crate::wqe::Op;

/// Bytes of a message from which on no completion waits for it, and its own for no other: what that saves is little beside the copy.
const LONG: u64 = 1024;

/// What to do with the QP after a visit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Nothing until its doorbell rings.
    Idle,
    /// Visit it again after the others.
    Again,
    /// Visit it at this time.
    At(Instant),
}

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

/// Visits a QP of `nic`. `alone` tells whether nobody else waits for the worker.
pub fn serve(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, alone: impl Fn() -> bool) -> Next {
    ctx.charge(cost::VISIT);
    // The control queue has it: its change is looked at next time, and nobody waits here.
    let Some(send) = qp.send.try_lock() else {
        return Next::Again;
    };
    match qp.state() {
        QpState::Rts => run(ctx, nic, qp, send, alone),
        QpState::Sqd => drain(ctx, nic, qp, send),
        QpState::Err => {
            let more = flush_send(ctx, nic, qp, send);
            if flush_recv(ctx, nic, qp) || more {
                return Next::Again;
            }
            if qp.recv.lock().take_last_event() {
                ctx.announce();
                nic.raise(EventType::LastWqeReached, qp.id.qpn);
            }
            Next::Idle
        }
        QpState::Sqe => {
            if flush_send(ctx, nic, qp, send) {
                Next::Again
            } else {
                Next::Idle
            }
        }
        QpState::Reset | QpState::Init | QpState::Rtr => Next::Idle,
    }
}

fn run(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    mut send: MutexGuard<'_, SendQueue>,
    alone: impl Fn() -> bool,
) -> Next {
    if let Some(wait) = &send.wait
        && ctx.now < wait.next_look
    {
        return Next::At(wait.next_look);
    }
    let mut budget = Budget::full();
    let next = loop {
        if !budget.take_wqe() {
            if !budget.refill(&alone) {
                break Next::Again;
            }
            send.publish();
            ctx.announce();
        }
        match run_one(ctx, nic, qp, &mut send, &mut budget) {
            None => {}
            Some(Next::Again) if qp.state() == QpState::Rts && budget.refill(&alone) => ctx.announce(),
            Some(next) => break next,
        }
    };
    send.publish();
    next
}

/// Takes the present work request, or the next one, as far as it goes. `None`: it is complete.
fn run_one(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, send: &mut SendQueue, budget: &mut Budget) -> Option<Next> {
    let job = match send.job.take() {
        Some(job) => Some(job),
        None => match fetch(ctx, qp, send) {
            Ok(job) => job.inspect(|job| {
                ctx.charge_lookups(budget, job.wqe.lookups());
            }),
            Err(reason) => return Some(fatal(nic, qp, reason)),
        },
    };
    match job {
        Some(job) => advance(ctx, nic, qp, send, job, budget),
        None => Some(Next::Idle),
    }
}

/// SQD: what has started is finished, nothing new is begun.
fn drain(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, mut send: MutexGuard<'_, SendQueue>) -> Next {
    let mut budget = Budget::full();
    if let Some(job) = send.job.take() {
        let next = advance(ctx, nic, qp, &mut send, job, &mut budget);
        send.publish();
        if let Some(next) = next {
            return next;
        }
    }
    if std::mem::take(&mut send.notify_drained) {
        ctx.announce();
        nic.raise(EventType::SqDrained, qp.id.qpn);
    }
    Next::Idle
}

/// Takes one job as far as it goes. `None`: it is complete and the next can start.
fn advance(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    mut job: Box<Job>,
    budget: &mut Budget,
) -> Option<Next> {
    if job.wqe.length >= LONG {
        ctx.publish();
    }
    let step = match job.wqe.op {
        Op::Invalid => Step::Failed(WcStatus::LocQpOpErr),
        Op::Datagram { .. } => ud::step(ctx, nic, qp, &mut job, budget),
        Op::Local(op) => local::step(ctx, nic, qp, &mut job, op),
        _ if qp.id.kind == QpType::Uc => uc::step(ctx, nic, qp, send, &mut job, budget),
        _ => rc::step(ctx, nic, qp, send, &mut job, budget),
    };
    match step {
        Step::Done => {
            send.bytes += job.wqe.length;
            let pushed = complete(ctx, nic, qp, send, &job, WcStatus::Success);
            ctx.recycle(job);
            (!pushed).then(|| fatal(nic, qp, "its completion queue overflowed"))
        }
        Step::Paused => {
            send.job = Some(job);
            Some(Next::Again)
        }
        Step::Wait(kind, period) => wait(ctx, nic, qp, send, job, kind, period),
        Step::Failed(status) => Some(fail(ctx, nic, qp, send, job, status)),
    }
}

/// The next work request of the ring, parsed; a malformed one fails when it is stepped.
fn fetch(ctx: &mut Context, qp: &Qp, send: &mut SendQueue) -> Result<Option<Box<Job>>, &'static str> {
    let caps = send.caps;
    let next = send.peek().map_err(|_| "producer index of the send ring is outside the ring")?;
    let Some((ring, index)) = next else {
        return Ok(None);
    };
    ctx.charge(cost::WQE);
    let mut job = ctx.new_job();
    if let Err(error) = parse_send(ring, index, caps, &mut job.wqe) {
        log::debug!("QP {:#x}: {error}", qp.id.qpn);
        job.wqe.op = Op::Invalid;
    }
    Ok(Some(job))
}

fn wait(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    job: Box<Job>,
    kind: WaitKind,
    period: Duration,
) -> Option<Next> {
    match count_wait(ctx.now, nic, qp, send, kind, period) {
        Ok(at) => {
            send.job = Some(job);
            Some(Next::At(at))
        }
        Err(None) => {
            // A datagram whose destination had no receive: dropped, which its sender never learns.
            ud::starve(ctx, nic, qp, &job);
            nic.counters.messages_dropped.add(1);
            let pushed = complete(ctx, nic, qp, send, &job, WcStatus::Success);
            ctx.recycle(job);
            (!pushed).then(|| fatal(nic, qp, "its completion queue overflowed"))
        }
        Err(Some(status)) => Some(fail(ctx, nic, qp, send, job, status)),
    }
}

/// Begins or continues a wait: when to look again, or with what status patience ends (`None`: drop it).
fn count_wait(
    now: Instant,
    nic: &Nic,
    qp: &Qp,
    send: &mut SendQueue,
    kind: WaitKind,
    period: Duration,
) -> Result<Instant, Option<WcStatus>> {
    let (limit, forever, status) = {
        let attr = &qp.attrs.lock().attr;
        match kind {
            WaitKind::Rnr => (attr.rnr_retry, attr.rnr_retry == 7, Some(WcStatus::RnrRetryExcErr)),
            WaitKind::Lost => (attr.retry_cnt, attr.timeout == 0, Some(WcStatus::RetryExcErr)),
            WaitKind::Datagram => (0, false, None),
        }
    };
    // The first RNR wait is already for a retry; the first lost message is not.
    let spent = |send: &SendQueue| if kind == WaitKind::Rnr { send.rnr_retries + 1 } else { send.retries };
    match send.wait {
        Some(wait) if wait.kind == kind => {
            if now >= wait.deadline && !forever {
                if spent(send) >= limit {
                    return Err(status);
                }
                send.count_retry(kind);
                send.wait = Some(Wait::new(kind, now, period));
            }
        }
        before => {
            // A wait of another kind was a try too, or a peer that alternates would be waited for without end.
            if let Some(wait) = before {
                send.count_retry(wait.kind);
            }
            if spent(send) > limit && !forever && status.is_some() {
                return Err(status);
            }
            let counter = if kind == WaitKind::Lost { &nic.counters.lost_waits } else { &nic.counters.rnr_waits };
            counter.add(1);
            send.wait = Some(Wait::new(kind, now, period));
            return Ok(now + Wait::SHORTEST_LOOK);
        }
    }
    let Some(wait) = &mut send.wait else {
        return Ok(now);
    };
    wait.look_later(now);
    Ok(wait.next_look)
}

/// Completes the request at the head of the ring. False if the completion could not be written.
fn complete(ctx: &mut Context, nic: &Arc<Nic>, qp: &Qp, send: &mut SendQueue, job: &Job, status: WcStatus) -> bool {
    send.advance();
    // Nobody's completion waits for a request that may take long, or that has yet to be posted.
    let hold = status == WcStatus::Success && job.wqe.length < LONG && send.knows_more();
    let wanted = qp.id.signal_all || job.wqe.flags.contains(SendFlags::SIGNALED) || status != WcStatus::Success;
    if !wanted {
        if !hold {
            ctx.publish();
        }
        count_sent(ctx, nic, job, status);
        return true;
    }
    // Before the completion: who sees that may post the next request at once.
    send.publish();
    let cqe = Cqe {
        wr_id: job.wqe.wr_id.into(),
        status: status.to_wire().into(),
        opcode: job.wqe.completion_opcode().to_wire().into(),
        byte_len: if status == WcStatus::Success { job.wqe.length as u32 } else { 0 }.into(),
        qp_num: qp.id.qpn.into(),
        port_num: 1,
        ..Cqe::default()
    };
    let pushed = ctx.push_cqe(nic, &qp.id.send_cq, &cqe, status != WcStatus::Success, hold).is_ok();
    count_sent(ctx, nic, job, status);
    pushed
}

fn count_sent(ctx: &mut Context, nic: &Arc<Nic>, job: &Job, status: WcStatus) {
    if status == WcStatus::Success {
        ctx.count_sent(nic, job.wqe.length);
    } else {
        nic.counters.send_wqes.add(1);
        count_error(nic, status);
    }
}

fn count_error(nic: &Nic, status: WcStatus) {
    let counter = if status == WcStatus::WrFlushErr { &nic.counters.flushed } else { &nic.counters.errors };
    counter.add(1);
}

/// The request completes in error and takes its QP with it: to ERR, or SQE where nothing is reliable (IBA 10.3.1).
fn fail(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    mut job: Box<Job>,
    status: WcStatus,
) -> Next {
    nic.warn(format_args!("QP {:#x}: work request failed: {status:?}", qp.id.qpn));
    ctx.charge(cost::FAILURE);
    job.give_up_receive();
    let pushed = complete(ctx, nic, qp, send, &job, status);
    ctx.recycle(job);
    if !pushed {
        return fatal(nic, qp, "its completion queue overflowed");
    }
    if qp.id.kind == QpType::Rc {
        qp.fail();
    } else {
        qp.change_state(QpState::Rts, QpState::Sqe);
    }
    Next::Again
}

/// Something that no completion can say moves the QP to ERR.
pub(super) fn fatal(nic: &Nic, qp: &Qp, reason: &str) -> Next {
    if qp.fail() {
        nic.warn(format_args!("QP {:#x} failed: {reason}", qp.id.qpn));
        nic.raise(EventType::QpFatal, qp.id.qpn);
    }
    Next::Again
}

/// Flushes posted sends, some of them. True if there may be more.
fn flush_send(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, mut send: MutexGuard<'_, SendQueue>) -> bool {
    if let Some(job) = send.abandon_job() {
        ctx.recycle(job);
    }
    for _ in 0..super::context::QUANTUM_WQES {
        let Ok(Some(job)) = fetch(ctx, qp, &mut send) else {
            return false;
        };
        let pushed = complete(ctx, nic, qp, &mut send, &job, WcStatus::WrFlushErr);
        ctx.recycle(job);
        if !pushed {
            return false;
        }
    }
    true
}

/// Flushes posted receives, some of them. True if there may be more.
fn flush_recv(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>) -> bool {
    let mut job = ctx.new_job();
    let mut more = true;
    for _ in 0..super::context::QUANTUM_WQES {
        if qp.state() != QpState::Err {
            break;
        }
        ctx.charge(cost::WQE);
        let taken = qp.recv.lock().take_for_flush(&mut job.recv);
        if taken == Flush::Busy {
            break;
        }
        more =
            taken == Flush::Yes && complete_recv(ctx, nic, qp, &RecvDone::error(job.recv.wr_id, WcStatus::WrFlushErr));
        if !more {
            break;
        }
    }
    ctx.recycle(job);
    more
}

/// A receive was taken, maybe from a shared queue that runs low now.
pub(super) fn note_limit(nic: &Nic, qp: &Qp) {
    if let Some(srq) = &qp.id.srq
        && srq.take_limit_event()
    {
        nic.raise(EventType::SrqLimit, srq.srqn);
    }
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
    let pushed = ctx.push_cqe(nic, &qp.id.recv_cq, &cqe, done.solicited, hold).is_ok();
    if done.status == WcStatus::Success {
        ctx.count_received(nic, done.byte_len.into());
    } else {
        nic.counters.recv_wqes.add(1);
        count_error(nic, done.status);
    }
    if !pushed {
        fatal(nic, qp, "its completion queue overflowed");
        ctx.engine.clone().attend(nic, qp);
    }
    pushed
}
