//! One visit to a QP: start or continue its work requests, complete them, or flush it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{QpState, QpType, WcStatus};

use super::complete::{LONG, RecvDone, Step, complete_recv, complete_send};
use super::context::{Budget, Context};
use super::failure::{OVERFLOW, fatal, tell_fatal};
use super::job::Job;
use super::{cost, local, rc, tcp, uc, ud, verbs};
use crate::nic::{Nic, PathChoice};
use crate::qp::{Flush, Qp, SendQueue, Wait, WaitKind};
use crate::ring::rxe::parse_send;
use crate::wqe::Op;

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

/// Visits a QP of `nic`. `alone` tells whether nobody else waits for the worker.
pub fn serve(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, alone: &dyn Fn() -> bool) -> Next {
    ctx.charge(cost::VISIT);
    // The control queue has it: its change is looked at next time, and nobody waits here.
    let Some(mut send) = qp.send.try_lock() else {
        return Next::Again;
    };
    match qp.state() {
        QpState::Rts if nic.pacer.is_limited() => {
            paced(ctx, nic, &mut send, |ctx, send| run(ctx, nic, qp, send, &|| false))
        }
        QpState::Rts => run(ctx, nic, qp, &mut send, alone),
        QpState::Err if !verbs::settled(ctx, nic, qp, &mut send, true) => Next::Idle,
        QpState::Sqd | QpState::Sqe if !verbs::settled(ctx, nic, qp, &mut send, false) => Next::Idle,
        QpState::Err if !tcp::settled(ctx, nic, qp, &mut send, true) => Next::Idle,
        QpState::Sqd | QpState::Sqe if !tcp::settled(ctx, nic, qp, &mut send, false) => Next::Idle,
        QpState::Sqd if send.job.is_some() => paced(ctx, nic, &mut send, |ctx, send| drain(ctx, nic, qp, send)),
        QpState::Sqd => drain(ctx, nic, qp, &mut send),
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

/// A visit to a QP of a virtual NIC that may have limits.
fn paced(
    ctx: &mut Context,
    nic: &Nic,
    send: &mut SendQueue,
    visit: impl FnOnce(&mut Context, &mut SendQueue) -> Next,
) -> Next {
    match nic.pacer.room(ctx.now, &send.pace) {
        Ok(room) => ctx.limit_visits(Some(room)),
        Err(at) => {
            nic.counters.rate_waits.add(1);
            return Next::At(at);
        }
    }
    let before = ctx.work();
    let next = visit(ctx, send);
    ctx.limit_visits(None);
    nic.pacer.count_qp(ctx.now, &send.pace, ctx.work() - before);
    next
}

fn run(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, send: &mut SendQueue, alone: &dyn Fn() -> bool) -> Next {
    if send.nic.is_some()
        && let Some(next) = verbs::run(ctx, nic, qp, send, alone)
    {
        return next;
    }
    if let Some(wait) = &send.wait
        && ctx.now < wait.next_look
    {
        return Next::At(wait.next_look);
    }
    if ctx.tcp.is_some()
        && !qp.id.kind.is_datagram()
        && let Some(next) = tcp::run(ctx, nic, qp, send, alone)
    {
        return next;
    }
    let mut budget = ctx.budget(alone);
    let next = loop {
        if !budget.take_wqe() {
            if !budget.refill() {
                break Next::Again;
            }
            send.publish();
            ctx.announce();
        }
        match run_one(ctx, nic, qp, send, &mut budget) {
            None => {}
            Some(Next::Again) if qp.state() == QpState::Rts && budget.refill() => ctx.announce(),
            Some(next) => break next,
        }
    };
    send.publish();
    next
}

/// Takes the present work request, or the next one, as far as it goes. `None`: it is complete.
fn run_one(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    budget: &mut Budget<'_>,
) -> Option<Next> {
    let job = match send.job.take() {
        Some(job) => Some(job),
        None => match fetch(ctx, qp, send) {
            Ok(job) => job.inspect(|job| {
                ctx.charge_lookups(budget, job.wqe.lookups());
                ctx.count_op();
            }),
            Err(reason) => return Some(give_up(nic, qp, reason)),
        },
    };
    match job {
        Some(job) => advance(ctx, nic, qp, send, job, budget),
        None => Some(Next::Idle),
    }
}

/// SQD: what has started is finished, nothing new is begun.
fn drain(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, send: &mut SendQueue) -> Next {
    let mut budget = ctx.budget(&|| false);
    // One for another host that was not posted has not started.
    let is_elsewhere = send.remote.is_some() || send.nic.as_ref().is_some_and(|queue| queue.between.is_some());
    let waits = is_elsewhere && send.job.as_ref().is_some_and(|job| !job.is_under_way());
    if !waits && let Some(job) = send.job.take() {
        let next = advance(ctx, nic, qp, send, job, &mut budget);
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
pub(super) fn advance(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    mut job: Box<Job>,
    budget: &mut Budget<'_>,
) -> Option<Next> {
    if job.wqe.length >= LONG {
        ctx.publish();
    }
    ctx.paging.fault = job.fault.take();
    let step = match job.wqe.op {
        Op::Invalid => Step::Failed(WcStatus::LocQpOpErr),
        Op::Datagram { .. } => ud::step(ctx, nic, qp, &mut job, budget),
        Op::Local(op) => local::step(ctx, nic, qp, &mut job, op),
        _ if qp.id.kind == QpType::Uc => uc::step(ctx, nic, qp, send, &mut job, budget),
        _ => rc::step(ctx, nic, qp, send, &mut job, budget),
    };
    let fault = ctx.paging.fault.take();
    match step {
        Step::Done => {
            send.bytes += job.wqe.length;
            if nic.config.path == PathChoice::Nic {
                count_copied(nic, qp, &job);
            }
            let pushed = complete_send(ctx, nic, qp, send, &job, WcStatus::Success);
            ctx.recycle(job);
            (!pushed).then(|| give_up(nic, qp, OVERFLOW))
        }
        Step::Paused => {
            send.wait = None;
            send.job = Some(job);
            Some(Next::Again)
        }
        Step::Wait(kind, period) => {
            job.fault = fault;
            wait(ctx, nic, qp, send, job, kind, period)
        }
        Step::Failed(status) => Some(fail(ctx, nic, qp, send, job, status)),
    }
}

/// The host's NIC was to move these bytes, and we did.
fn count_copied(nic: &Nic, qp: &Qp, job: &Job) {
    let counters = &nic.counters;
    let counter = if qp.id.kind.is_datagram() { &counters.copied_datagram_bytes } else { &counters.copied_bytes };
    if !job.wqe.is_inline() {
        counter.add(job.wqe.length);
    }
}

/// The next work request of the ring, parsed; a malformed one fails when it is stepped.
pub(super) fn fetch(ctx: &mut Context, qp: &Qp, send: &mut SendQueue) -> Result<Option<Box<Job>>, &'static str> {
    let caps = send.caps;
    let next = send.peek().map_err(|_| "producer index of the send ring is outside the ring")?;
    let Some((ring, index)) = next else {
        return Ok(None);
    };
    ctx.charge(cost::WQE);
    let mut job = ctx.new_job();
    job.seen = ctx.sampler.see();
    if let Err(error) = parse_send(ring, index, caps, &mut job.wqe) {
        log::debug!("QP {:#x}: {error}", qp.id.qpn);
        job.wqe.op = Op::Invalid;
    }
    Ok(Some(job))
}

pub(super) fn wait(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    mut job: Box<Job>,
    kind: WaitKind,
    period: Duration,
) -> Option<Next> {
    match count_wait(ctx.now, nic, qp, send, kind, period) {
        Ok(at) => {
            send.job = Some(job);
            Some(Next::At(at))
        }
        Err(None) => {
            // An unreliable message whose destination had no receive, or no memory for it, or that there was no room for: dropped, which its sender never learns.
            ud::starve(ctx, nic, qp, &job);
            job.put_back_receive();
            ctx.hand.give_back();
            nic.counters.messages_dropped.add(1);
            let pushed = complete_send(ctx, nic, qp, send, &job, WcStatus::Success);
            ctx.recycle(job);
            (!pushed).then(|| give_up(nic, qp, OVERFLOW))
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
            WaitKind::PeerPage if qp.id.kind != QpType::Rc => (0, false, None),
            WaitKind::Lost | WaitKind::PeerPage => (attr.retry_cnt, attr.timeout == 0, Some(WcStatus::RetryExcErr)),
            // Its own guest's matter alone: until that answers, or takes the QP back.
            WaitKind::Page => (0, true, None),
            WaitKind::Datagram | WaitKind::Room => (0, false, None),
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
            if let Some(wait) = before
                && wait.kind != WaitKind::Page
                && kind != WaitKind::Page
            {
                send.count_retry(wait.kind);
            }
            if spent(send) > limit && !forever && status.is_some() {
                return Err(status);
            }
            match kind {
                WaitKind::Lost => nic.counters.lost_waits.add(1),
                WaitKind::Rnr | WaitKind::Datagram => nic.counters.rnr_waits.add(1),
                WaitKind::Page | WaitKind::PeerPage | WaitKind::Room => {}
            }
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

/// The request completes in error and takes its QP with it: to ERR, or SQE where nothing is reliable (IBA 10.3.1).
pub(super) fn fail(
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
    // Before the completion: who sees that may ask for the state at once.
    let moved = if qp.id.kind == QpType::Rc { qp.fail() } else { qp.change_state(QpState::Rts, QpState::Sqe) };
    let pushed = complete_send(ctx, nic, qp, send, &job, status);
    ctx.recycle(job);
    if !pushed && (qp.fail() || moved) {
        tell_fatal(nic, qp, OVERFLOW);
    }
    Next::Again
}

/// The QP fails, and is to be flushed.
pub(super) fn give_up(nic: &Nic, qp: &Qp, reason: &str) -> Next {
    fatal(nic, qp, reason);
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
        let pushed = complete_send(ctx, nic, qp, &mut send, &job, WcStatus::WrFlushErr);
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
