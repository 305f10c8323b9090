//! One visit to a queue pair whose peer is on another host: its work requests become messages.

use std::sync::Arc;
use std::time::Duration;

use freeflow_tcp::frame::{FlowId, Op as Does, Open, Remote, Transport};
use freeflow_tcp::{Nanos, PostError, Retries, Work};
use virtio_rdma::ib::{QpType, SendFlags, WcStatus};

use super::flow::Flow;
use super::line::Line;
use super::links::with_links;
use crate::engine::complete::complete_send;
use crate::engine::connected::{self, Progress};
use crate::engine::context::{Budget, Context};
use crate::engine::failure::OVERFLOW;
use crate::engine::job::Job;
use crate::engine::rc;
use crate::engine::serve::{self, Next};
use crate::mem::AtomicOp;
use crate::nic::Nic;
use crate::overlay::{Gid, Place};
use crate::qp::{Qp, RemoteFlow, SendQueue, WaitKind};
use crate::tcp::PeerId;
use crate::wqe::Op;

/// How soon a QP is looked at again that has lost its GID.
const WITHOUT_GID: Duration = Duration::from_millis(1);

/// Visits a QP in RTS. `None` if its peer is not known to be on another host: it is served as any other then.
pub(in super::super) fn run(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    alone: &dyn Fn() -> bool,
) -> Option<Next> {
    if send.remote.is_none() && !find(ctx, nic, qp, send) {
        return None;
    }
    if let Some(remote) = &mut send.remote
        && !has_gid(nic, qp, remote.source, &mut remote.gid_epoch)
    {
        // As to a peer that does not answer; what is under way ends first.
        return (send.handed_over() > 0).then_some(Next::At(ctx.now + WITHOUT_GID));
    }
    let mut budget = ctx.budget(alone);
    let next = loop {
        if !budget.take_posted() && !budget.refill() {
            break Next::Again;
        }
        let fetched = match send.job.take() {
            Some(job) => Ok(Some(job)),
            None => serve::fetch(ctx, qp, send).inspect(|job| job.iter().for_each(|_| ctx.count_op())),
        };
        let job = match fetched {
            Ok(Some(job)) => job,
            Ok(None) => break Next::Idle,
            Err(reason) => break serve::give_up(nic, qp, reason),
        };
        if let Some(next) = advance(ctx, nic, qp, send, job, &mut budget) {
            break next;
        }
    };
    send.publish();
    Some(next)
}

/// Whether the QP has this GID still; it is looked for when its virtual NIC's have changed since `epoch`, which is [`Nic::gid_epoch`] of then.
pub(in super::super) fn has_gid(nic: &Nic, qp: &Qp, source: Gid, epoch: &mut u64) -> bool {
    let now = nic.gid_epoch();
    if *epoch == now {
        return true;
    }
    let index = qp.attrs.lock().attr.av.sgid_index.get();
    let has_it = nic.gids.load().get(index.into()) == Some(source);
    if has_it {
        *epoch = now;
    }
    has_it
}

/// Takes a work request as far as it goes. `None`: it is under way, or done, and the next can start.
fn advance(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    job: Box<Job>,
    budget: &mut Budget<'_>,
) -> Option<Next> {
    let fate = match judge(ctx, nic, qp, &job) {
        Fate::Message(op) => return post(ctx, nic, qp, send, job, op, budget),
        other => other,
    };
    if send.handed_over() > 0 {
        // In its turn: a completion brings us back.
        send.job = Some(job);
        return Some(Next::Idle);
    }
    match fate {
        Fate::Failed(status) => Some(serve::fail(ctx, nic, qp, send, job, status)),
        _ => serve::advance(ctx, nic, qp, send, job, budget),
    }
}

/// What becomes of a work request.
enum Fate {
    /// It is sent.
    Message(Does),
    /// It is executed here.
    Here,
    /// It fails here.
    Failed(WcStatus),
}

fn judge(ctx: &mut Context, nic: &Nic, qp: &Qp, job: &Job) -> Fate {
    if qp.id.kind == QpType::Uc && !job.wqe.op.is_for_uc() && !matches!(job.wqe.op, Op::Local(_)) {
        return Fate::Failed(WcStatus::LocQpOpErr);
    }
    let Some(op) = translate(job) else { return Fate::Here };
    // Without a budget all keys are looked at: its bytes go later.
    match connected::check_request(ctx, nic, qp, job, &Budget::empty()).map_err(Progress::from) {
        Ok(()) => Fate::Message(op),
        Err(Progress::Local(status)) => Fate::Failed(status),
        Err(_) => Fate::Failed(WcStatus::LocProtErr),
    }
}

/// What a work request is to the protocol, if it is a message.
fn translate(job: &Job) -> Option<Does> {
    let imm = |there: bool| there.then_some(job.wqe.imm);
    let at = |addr, rkey| Remote { addr, rkey };
    Some(match job.wqe.op {
        Op::Send { imm: there } => Does::Send(imm(there)),
        Op::SendInvalidate { rkey } => Does::SendInvalidate(rkey),
        Op::Write { imm: there, remote_addr, rkey } => Does::Write { at: at(remote_addr, rkey), imm: imm(there) },
        Op::Read { remote_addr, rkey } => Does::Read { at: at(remote_addr, rkey), again_from: None },
        Op::Atomic { remote_addr, rkey, action } => match action {
            AtomicOp::CompareSwap { compare, swap } => Does::CompareSwap { at: at(remote_addr, rkey), compare, swap },
            AtomicOp::FetchAdd(add) => Does::FetchAdd { at: at(remote_addr, rkey), add },
        },
        Op::AtomicWrite { remote_addr, rkey } => {
            let value = u64::from_le_bytes(*job.wqe.inline.first_chunk()?);
            Does::AtomicWrite { at: at(remote_addr, rkey), value }
        }
        Op::Flush(flush) => {
            let (whole, persistent) = (flush.whole, flush.persistent);
            Does::Flush { at: at(flush.remote_addr, flush.rkey), whole, persistent }
        }
        Op::Invalid | Op::Datagram { .. } | Op::Local(_) => return None,
    })
}

fn post(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    job: Box<Job>,
    op: Does,
    budget: &mut Budget<'_>,
) -> Option<Next> {
    let Some((peer, index, id)) = send.remote.as_ref().map(|remote| (remote.peer, remote.link, remote.flow)) else {
        send.job = Some(job);
        return Some(Next::Again);
    };
    if !send.remote.as_ref().is_some_and(|remote| remote.has_room(send.handed_over())) {
        send.job = Some(job);
        return Some(Next::Idle);
    }
    let bytes = job.wqe.length;
    let length = if let Op::Flush(flush) = job.wqe.op { flush.length } else { bytes as u32 };
    let mut left = Some(job);
    let mut posted = Err(PostError::Dead);
    with_links(ctx, |links, now, ctx| {
        let Some(line) = links.line(peer, index) else { return };
        posted = give(line, id, now, ctx, &mut left, (op, length));
    });
    match posted {
        Ok(()) => {
            if let Some(remote) = &mut send.remote {
                remote.bytes += bytes;
            }
            ctx.count_bytes(bytes);
            ctx.charge_posted(bytes);
            budget.bytes = budget.bytes.saturating_sub(bytes);
            send.hand_over();
            None
        }
        Err(PostError::Full) => {
            send.job = left;
            Some(Next::Idle)
        }
        Err(error) => unposted(ctx, nic, qp, send, left, error),
    }
}

/// Has the link take a message, and keeps what it needs of it.
fn give(
    line: &mut Line,
    id: FlowId,
    now: Nanos,
    ctx: &mut Context,
    job: &mut Option<Box<Job>>,
    (op, length): (Does, u32),
) -> Result<(), PostError> {
    let flow = line.tables.flows.get_mut(&id).ok_or(PostError::Dead)?;
    let Some(message) = job.take() else { return Err(PostError::Invalid) };
    let flags = message.wqe.flags;
    let (token, fence) = (flow.next_token(), flags.contains(SendFlags::FENCE));
    // Before it is posted: its completion may come at once.
    flow.jobs.push_back(message);
    let work = Work { token, op, length, fence, solicited: flags.contains(SendFlags::SOLICITED) };
    let (link, mut device) = line.parts(ctx);
    let posted = link.post(now, id, work, &mut device);
    if posted.is_err()
        && let Some(flow) = line.tables.flows.get_mut(&id)
    {
        *job = flow.jobs.pop_back();
    }
    posted
}

/// The flow takes nothing any more, or never did.
fn unposted(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    job: Option<Box<Job>>,
    error: PostError,
) -> Option<Next> {
    let job = job?;
    if send.handed_over() > 0 {
        // Those before it fail first, and the queue pair with them.
        send.job = Some(job);
        return Some(Next::Idle);
    }
    if error == PostError::Invalid {
        return Some(serve::fail(ctx, nic, qp, send, job, WcStatus::LocQpOpErr));
    }
    // The link is gone with its host. Who has had an answer from there goes nowhere else.
    if !send.remote.as_ref().is_some_and(|remote| remote.used) {
        send.remote = None;
    }
    if qp.id.kind == QpType::Uc {
        send.remote = None;
        nic.counters.messages_dropped.add(1);
        let pushed = complete_send(ctx, nic, qp, send, &job, WcStatus::Success);
        ctx.recycle(job);
        return (!pushed).then(|| serve::give_up(nic, qp, OVERFLOW));
    }
    let timeout = rc::ack_timeout(qp.attrs.lock().attr.timeout);
    serve::wait(ctx, nic, qp, send, job, WaitKind::Lost, timeout)
}

/// Looks for the peer of a QP on other hosts, and opens a flow to there. False if it is not on one.
fn find(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, send: &mut SendQueue) -> bool {
    // One that has found its peer here has it here; one that has begun a message goes on where it began.
    let elsewhere = send.binding.is_some() || send.bound_to.is_some();
    if elsewhere || send.job.as_ref().is_some_and(|job| job.is_under_way()) {
        return false;
    }
    if send.job.is_none() && matches!(send.peek(), Ok(None)) {
        return false;
    }
    let Some((peer, open, epoch)) = open_of(ctx, nic, qp) else { return false };
    let attr = qp.attrs.lock().attr;
    let retries = Retries {
        timeout: (attr.timeout > 0).then(|| Nanos(rc::ack_timeout(attr.timeout).as_nanos() as u64)),
        lost: attr.retry_cnt,
        not_ready: (attr.rnr_retry < 7).then_some(attr.rnr_retry),
    };
    with_links(ctx, |links, _, _| {
        let Some(line) = links.to(peer) else { return };
        let id = line.link.open(open, retries);
        line.tables.flows.insert(id, Flow::new(id, nic.clone(), qp.clone()));
        let source = (Gid(open.source), epoch);
        send.remote = Some(Box::new(RemoteFlow::new(&line.peering, line.index, id, source, line.closed.clone())));
    });
    if send.remote.is_some() {
        send.wait = None;
    }
    send.remote.is_some()
}

/// The host of a QP's peer, if that is another one, what it is told of the two, and [`Nic::gid_epoch`] as of now.
pub(in super::super) fn open_of(ctx: &Context, nic: &Nic, qp: &Qp) -> Option<(PeerId, Open, u64)> {
    let attr = qp.attrs.lock().attr;
    let overlay = ctx.engine.overlay();
    let Place::Remote(peer) = overlay.locate(nic.id, Gid(attr.av.dgid))? else { return None };
    let epoch = nic.gid_epoch();
    let source = nic.gids.load().get(attr.av.sgid_index.get().into())?;
    let reliable = qp.id.kind == QpType::Rc;
    let open = Open {
        flow: FlowId(0),
        tenant: overlay.tenant(nic.id)?,
        transport: if reliable { Transport::Rc } else { Transport::Uc },
        depth: attr.max_rd_atomic.max(1),
        incarnation: qp.incarnation(),
        source: source.0,
        destination: attr.av.dgid,
        source_qpn: qp.id.qpn,
        destination_qpn: attr.dest_qpn.get(),
        psn: attr.sq_psn.get(),
    };
    Some((peer, open, epoch))
}
