//! The `verbs` path: work requests of connected QPs go to the host's NIC, which moves the bytes between the memories of the two guests.
//!
//! Nothing here touches payload. A work request whose keys and bounds hold at both ends, on memory that the NIC has too, is translated
//! ([`stage`]), posted together with others, and completed when the NIC has done it ([`reap`], [`poll`]). All else, and that is whatever may
//! fail, and what a NIC does not offer, waits until nothing of its QP is on the NIC any more, and is then executed and judged
//! as between guests of one host ([`super::connected`]): what goes wrong is said in one place.

mod background;
mod between;
mod poll;
mod reap;
mod stage;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use virtio_rdma::ib::{QpState, QpType};

use super::connected;
use super::context::Context;
use super::failure::fatal;
use super::serve::{self, Next};
use crate::nic::{Nic, PathChoice};
use crate::qp::{Binding, Qp, SendQueue, WaitKind};
use crate::verbs::{Member, SendList, Target, Wc, Wish};
use crate::wqe::Sge;

pub(super) use background::{see_to, spawn};
pub use between::Pairs;
use between::Reach;
pub(super) use poll::{arm, poll};
pub(super) use reap::{reap, settled};
use stage::{Far, Staged};

/// How often a QP is looked at that is being connected. It is visited when it has been: until then there is nothing to do.
const CONNECTING: Duration = Duration::from_millis(10);

/// What a worker uses again and again.
#[derive(Debug, Default)]
pub struct Scratch {
    list: SendList,
    /// Of a receive.
    sges: Vec<Sge>,
    /// Completions to be seen to.
    wcs: Vec<Wc>,
    /// Completions for guests that do not run now.
    parked: Vec<(Arc<Nic>, VecDeque<Wc>)>,
}

/// Visits a QP that has an end on the NIC and is in RTS. `None` if its present peer has none: then the NIC has nothing of it, and it is
/// served as any other.
pub(super) fn run(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    alone: &dyn Fn() -> bool,
) -> Option<Next> {
    if let Some(next) = reap(ctx, nic, qp, send) {
        return Some(next);
    }
    between::say_held(ctx, send);
    if let Some(wait) = &send.wait
        && ctx.now < wait.next_look
    {
        return Some(Next::At(wait.next_look));
    }
    if send.job.is_none() && matches!(send.peek(), Ok(None)) {
        return Some(Next::Idle);
    }
    if between::is_elsewhere(ctx, nic, qp, send) {
        return run_between(ctx, nic, qp, send, alone);
    }
    let Some(peer) = connected::bind(ctx, nic, qp, send) else {
        // It will be said of the next request that there is no peer, when those before it have ended.
        return unless_busy(send);
    };
    let pairing = pair(ctx, nic, qp, send, &peer);
    send.binding = Some(peer.clone());
    match pairing {
        Pairing::Connected => note_apart(send, None),
        Pairing::UnderWay => return Some(Next::At(ctx.now + CONNECTING)),
        Pairing::Apart(why) => {
            note_apart(send, Some(why));
            return unless_busy(send);
        }
    }
    let next = post(ctx, nic, qp, send, Far::Here(&peer), alone);
    send.publish();
    next
}

/// The same for one whose peer is on another host. `None` also if the present work request is not for the NIC.
fn run_between(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    alone: &dyn Fn() -> bool,
) -> Option<Next> {
    match between::pairing(ctx, nic, qp, send) {
        Reach::Connected => note_apart(send, None),
        Reach::UnderWay => return Some(Next::At(ctx.now + CONNECTING)),
        Reach::Apart(why) => {
            note_apart(send, Some(why));
            let awaited = send.nic.as_ref().is_some_and(|queue| queue.awaits_messages());
            return if awaited { Some(between::stall(ctx, nic, qp, send)) } else { unless_busy(send) };
        }
    }
    let on_nic = send.nic.as_ref().map_or(0, |queue| queue.posted.len());
    if send.handed_over() as usize > on_nic {
        // Messages that are on their way otherwise come first. What is in hand has the last of them bring us back.
        return Some(between::take_in_hand(ctx, nic, qp, send).err().unwrap_or(Next::Idle));
    }
    let next = post(ctx, nic, qp, send, Far::There, alone);
    send.publish();
    next
}

/// On with the local path, but not while the NIC has something: a completion will bring us back.
fn unless_busy(send: &SendQueue) -> Option<Next> {
    send.nic.as_ref().is_some_and(|queue| !queue.posted.is_empty()).then_some(Next::Idle)
}

fn note_apart(send: &mut SendQueue, why: Option<&'static str>) {
    if let Some(queue) = &mut send.nic {
        queue.apart = why;
    }
}

/// How a QP and its peer are to each other on the NIC.
enum Pairing {
    /// Work requests can be posted.
    Connected,
    /// They are being connected: the QP is visited when they are.
    UnderWay,
    /// They cannot be connected, and why.
    Apart(&'static str),
}

/// Whether both ends are on the NIC, connected to each other; if not yet, that is asked for.
fn pair(ctx: &Context, nic: &Arc<Nic>, qp: &Arc<Qp>, send: &mut SendQueue, peer: &Binding) -> Pairing {
    let Some(queue) = &mut send.nic else { return Pairing::Apart("no queue pair on the host's NIC") };
    if nic.config.path == PathChoice::Auto {
        return Pairing::Apart("on the same host");
    }
    if let Some(known) = &queue.peer
        && queue.end.sends_to(known)
        && known.incarnation == peer.incarnation
    {
        return Pairing::Connected;
    }
    if let Some(now) = qp.end() {
        queue.change_end(now);
    }
    let Some(theirs) = peer.qp.end().filter(|end| end.incarnation == peer.incarnation) else {
        return Pairing::Apart("the peer has no queue pair on the host's NIC");
    };
    // Before that is looked at, or what is done between the two looks would not count.
    let answered = queue.is_answered();
    if queue.end.sends_to(&theirs) {
        queue.set_peer(theirs);
        return Pairing::Connected;
    }
    let Some(done) = queue.ask(&theirs) else {
        return if answered { Pairing::Apart("the host's NIC did not connect them") } else { Pairing::UnderWay };
    };
    let from = Member { nic: nic.clone(), qp: qp.clone(), end: queue.end.clone() };
    let to = Member { nic: peer.nic.clone(), qp: peer.qp.clone(), end: theirs };
    if let Some(fabric) = ctx.engine.fabric() {
        fabric.wish(Wish { from, to: Target::Here(to), done });
    }
    Pairing::UnderWay
}

/// Translates and posts what the ring has, as far as the visit goes.
fn post(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    far: Far<'_>,
    alone: &dyn Fn() -> bool,
) -> Option<Next> {
    let mut budget = ctx.budget(alone);
    loop {
        if !budget.take_posted() {
            if !give(ctx, nic, qp, send) || !budget.refill() {
                return Some(Next::Again);
            }
            ctx.announce();
        }
        let fetched = match send.job.take() {
            Some(job) => Ok(Some(job)),
            None => serve::fetch(ctx, qp, send).inspect(|job| job.iter().for_each(|_| ctx.count_op())),
        };
        let mut job = match fetched {
            Ok(Some(job)) => job,
            Ok(None) => return Some(given(give(ctx, nic, qp, send), Next::Idle)),
            Err(reason) => {
                give(ctx, nic, qp, send);
                return Some(serve::give_up(nic, qp, reason));
            }
        };
        let mut staged = stage::stage(ctx, nic, qp, send, far, &mut job);
        if staged == Staged::Posted {
            ctx.count_bytes(job.wqe.length);
            budget.bytes = budget.bytes.saturating_sub(job.wqe.length);
            ctx.recycle(job);
            continue;
        }
        let works = give(ctx, nic, qp, send);
        if let Staged::Ask(what) = staged
            && works
        {
            send.job = Some(job);
            match between::ask(ctx, nic, qp, send, what) {
                Some(next) => return Some(next),
                None => staged = Staged::Alone,
            }
            let Some(kept) = send.job.take() else { return Some(Next::Again) };
            job = kept;
        }
        if !works || unless_busy(send).is_some() {
            send.job = Some(job);
            return Some(given(qp.state() == QpState::Rts, Next::Idle));
        }
        if matches!(far, Far::There) && staged == Staged::Alone {
            note_alone(send);
            let orphaned = job.wqe.op.takes_receive() && send.nic.as_ref().is_some_and(|queue| queue.awaits_messages());
            send.job = Some(job);
            return if orphaned { Some(serve::give_up(nic, qp, ORPHANED)) } else { None };
        }
        let next = match staged {
            Staged::NotReady(period) => serve::wait(ctx, nic, qp, send, job, WaitKind::Rnr, period),
            // Its completions must not overtake those of receives that the NIC has filled.
            Staged::Alone if qp.id.kind != QpType::Rc || !has_receives(send) => {
                note_alone(send);
                serve::advance(ctx, nic, qp, send, job, &mut budget)
            }
            _ => {
                send.job = Some(job);
                Some(Next::Again)
            }
        };
        if next.is_some() {
            return next;
        }
    }
}

/// Receives that it has asked for are on the peer's NIC, and no message will come for them.
const ORPHANED: &str = "a work request was changed after it was posted, or its memory taken away";

fn note_alone(send: &mut SendQueue) {
    if let Some(queue) = &mut send.nic {
        queue.alone += 1;
    }
}

fn has_receives(send: &SendQueue) -> bool {
    send.nic.as_ref().and_then(|queue| queue.peer.as_ref()).is_some_and(|peer| peer.num_recvs() > 0)
}

/// A QP that has failed is to be flushed.
fn given(works: bool, next: Next) -> Next {
    if works { next } else { Next::Again }
}

/// Gives the NIC what was translated. False if it does not take it: the QP has failed.
fn give(ctx: &mut Context, nic: &Nic, qp: &Qp, send: &SendQueue) -> bool {
    let Some(queue) = send.nic.as_ref().filter(|_| !ctx.verbs.list.is_empty()) else { return true };
    ctx.verbs.list.signal_last();
    let result = queue.end.post_send(&ctx.verbs.list);
    ctx.verbs.list.clear();
    if let Err(error) = result {
        // Nothing of it completes any more, which is the same as flushed.
        queue.end.destroy();
        log::warn!("the host's NIC: {error}");
        fatal(nic, qp, "the host's NIC refused a work request");
    }
    result.is_ok()
}
