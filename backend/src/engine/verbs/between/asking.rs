//! The side of the queue pair that sends: it asks the other host for what it needs, and uses what it was told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use freeflow_tcp::Link;
use freeflow_tcp::frame::{Apart, FlowId, NicEnd, Note, PairId, Short, Wanted};
use virtio_rdma::ib::{QpState, QpType, SendFlags};

use super::super::stage::{self, Ask, Staged};
use super::{Asking, MOST_WANTED, Pairs};
use crate::engine::context::Context;
use crate::engine::rc;
use crate::engine::serve::{self, Next};
use crate::engine::tcp::{self, Tell};
use crate::nic::Nic;
use crate::overlay::Gid;
use crate::qp::{Asked, Between, NicQueue, Qp, SendQueue, WaitKind};
use crate::verbs::grant::NicAddress;
use crate::verbs::{Member, Pair, Target, Use, Wish};
use crate::wqe::{Op, Send};

/// What was not answered is asked again after this time.
const AGAIN: Duration = Duration::from_millis(20);
/// A peer's host that has not answered for so long is reached otherwise.
const PATIENCE: Duration = Duration::from_millis(500);
/// How soon it is asked again for receives when it had none, or no room for them.
const SHORT: Duration = Duration::from_micros(100);
/// How long messages do without the NIC whose receives are not for it.
const ALOOF: Duration = Duration::from_millis(50);

/// How a queue pair reaches its peer on another host.
pub(in super::super) enum Reach {
    /// From NIC to NIC.
    Connected,
    /// That is being seen to; the queue pair is visited then.
    UnderWay,
    /// Not over NICs, and why.
    Apart(&'static str),
}

/// Whether the peer is on another host, and one for the NIC.
pub(in super::super) fn is_elsewhere(ctx: &Context, nic: &Nic, qp: &Qp, send: &SendQueue) -> bool {
    if qp.id.kind != QpType::Rc || send.binding.is_some() || send.bound_to.is_some() {
        return false;
    }
    let known = send.remote.is_some() || send.nic.as_ref().is_some_and(|queue| queue.between.is_some());
    known || (ctx.tcp.is_some() && tcp::open_of(ctx, nic, qp).is_some())
}

/// How it reaches its peer; asks for what is to be known for that.
pub(in super::super) fn pairing(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, send: &mut SendQueue) -> Reach {
    let Some(queue) = &mut send.nic else { return Reach::Apart("no queue pair on the host's NIC") };
    if let Some(now) = qp.end() {
        queue.change_end(now);
    }
    if queue.between.is_none() {
        if send.remote.is_some() || !ctx.engine.fabric().is_some_and(|fabric| fabric.is_up()) {
            return Reach::Apart("the host's NIC had no link when it sent first");
        }
        queue.between = begin(ctx, nic, qp, queue);
    }
    let Some(between) = &mut queue.between else { return Reach::Apart("no link to the peer's host") };
    if !tcp::has_gid(nic, qp, Gid(between.open.source), &mut between.gid_epoch) {
        return Reach::Apart("it has lost its GID");
    }
    match between.pair.end() {
        Some(Ok(theirs)) => connect(ctx, nic, qp, queue, theirs),
        Some(Err(Apart::NoNic)) => Reach::Apart("the peer has no queue pair on a NIC of the same fabric"),
        Some(Err(Apart::NotThere)) => {
            ask_for_end(ctx, queue);
            Reach::Apart("the peer is not ready")
        }
        None if ctx.now - between.asked.0 > PATIENCE => {
            ask_for_end(ctx, queue);
            Reach::Apart("the peer's host does not answer")
        }
        None => {
            ask_for_end(ctx, queue);
            Reach::UnderWay
        }
    }
}

/// Gives it a pair on a link to its peer's host, and asks that host for the peer's end.
fn begin(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, queue: &NicQueue) -> Option<Box<Between>> {
    let (peer, mut open, gid_epoch) = tcp::open_of(ctx, nic, qp)?;
    let fabric = ctx.engine.fabric()?.clone();
    let mut begun = None;
    tcp::with_links(ctx, |links, _, ctx| {
        let Some((pairs, link)) = links.pairs_to(peer) else { return };
        let pair = pairs.add(nic, qp);
        open.flow = FlowId(pair.id.0);
        link.say(Note::Pair { open, end: fabric.told(&queue.end), fabric: fabric.number() });
        let (done, key, aloof, receives) = Default::default();
        let asked = (ctx.now, ctx.now);
        begun = Some(Box::new(Between { pair, open, gid_epoch, asked, done, key, receives, aloof }));
    });
    begun
}

/// Asks once more, if it was not asked just now.
fn ask_for_end(ctx: &mut Context, queue: &mut NicQueue) {
    let (Some(between), Some(fabric)) = (&mut queue.between, ctx.engine.fabric()) else { return };
    if ctx.now - between.asked.1 >= AGAIN {
        between.asked.1 = ctx.now;
        let note = Note::Pair { open: between.open, end: fabric.told(&queue.end), fabric: fabric.number() };
        say(ctx, &between.pair, note);
    }
}

fn connect(ctx: &Context, nic: &Arc<Nic>, qp: &Arc<Qp>, queue: &mut NicQueue, theirs: NicEnd) -> Reach {
    if queue.end.sends_elsewhere(&theirs) {
        return Reach::Connected;
    }
    let (Some(between), Some(fabric)) = (&mut queue.between, ctx.engine.fabric()) else {
        return Reach::Apart("no queue pair on the host's NIC");
    };
    match &between.done {
        Some(done) if done.load(Ordering::Acquire) => Reach::Apart("the host's NIC did not connect them"),
        Some(_) => Reach::UnderWay,
        None => {
            let done = Arc::new(AtomicBool::new(false));
            between.done = Some(done.clone());
            let from = Member { nic: nic.clone(), qp: qp.clone(), end: queue.end.clone() };
            fabric.wish(Wish { from, to: Target::There(theirs), done });
            Reach::UnderWay
        }
    }
}

fn say(ctx: &mut Context, pair: &Pair, note: Note) {
    // What is not heard is said again.
    tcp::with_links(ctx, |links, _, _| {
        links.say(pair, note);
    });
}

/// Says that nothing is under way to the peer over the NIC, if its host waits for that.
pub(in super::super) fn say_held(ctx: &mut Context, send: &SendQueue) {
    if let Some(queue) = &send.nic
        && let Some(between) = &queue.between
        && queue.posted.is_empty()
        && between.pair.take_hold()
    {
        say(ctx, &between.pair, Note::Held { pair: between.pair.id });
    }
}

/// What bytes of the peer's are to its NIC.
///
/// # Errors
/// If that is nothing, or not known yet.
#[inline]
pub(in super::super) fn remote(
    queue: &mut NicQueue,
    now: Instant,
    key: u32,
    wanted: Use,
) -> Result<NicAddress, Staged> {
    let Some(between) = &mut queue.between else { return Err(Staged::Alone) };
    if wanted.len == 0 {
        // No key is looked at then, but the peer's access flags are, which its host knows.
        return Err(Staged::Alone);
    }
    let pair = &between.pair;
    if let Some(found) = queue.theirs.get(key, pair.revocations(), wanted, || pair.grant(key)) {
        return Ok(found);
    }
    let answered = pair.grant(key).is_some() || pair.is_refused(key, now);
    Err(if answered { Staged::Alone } else { Staged::Ask(Ask::Key(key)) })
}

/// Has a message take a receive that is on the peer's NIC.
pub(in super::super) fn take_receive(queue: &mut NicQueue, now: Instant) -> Staged {
    let Some(between) = &mut queue.between else { return Staged::Alone };
    if between.aloof.is_some_and(|until| now < until) {
        return Staged::Alone;
    }
    if between.receives.used >= between.pair.receives().given {
        return Staged::Ask(Ask::Receives);
    }
    between.receives.used += 1;
    Staged::Posted
}

/// Asks the peer's host. `None`: its answer was that the present work request is not for the NIC.
pub(in super::super) fn ask(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    what: Ask,
) -> Option<Next> {
    match what {
        Ask::Key(key) => ask_for_key(ctx, send, key),
        Ask::Receives => ask_for_receives(ctx, nic, qp, send),
    }
}

fn ask_for_key(ctx: &mut Context, send: &mut SendQueue, key: u32) -> Option<Next> {
    let between = send.nic.as_mut()?.between.as_mut()?;
    let now = ctx.now;
    let since = match between.key {
        Some((asked, since, _)) if asked == key && now - since > PATIENCE => {
            between.key = None;
            return None;
        }
        Some((asked, _, last)) if asked == key && now - last < AGAIN => return Some(Next::At(last + AGAIN)),
        Some((asked, since, _)) if asked == key => since,
        _ => now,
    };
    between.key = Some((key, since, now));
    let (pair, id) = (between.pair.clone(), between.pair.id);
    say(ctx, &pair, Note::Key { pair: id, key });
    Some(Next::At(now + AGAIN))
}

fn ask_for_receives(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, send: &mut SendQueue) -> Option<Next> {
    let now = ctx.now;
    let queue = send.nic.as_mut()?;
    let is_busy = !queue.posted.is_empty();
    let between = queue.between.as_mut()?;
    let (said, asked) = (between.pair.receives(), &mut between.receives);
    if said.answers != asked.answers {
        (asked.answers, asked.open) = (said.answers, None);
        match said.short {
            Some(Short::NotForNic) => {
                // It counts those that it was asked for as gone.
                asked.used = asked.wanted;
                between.aloof = Some(now + ALOOF);
                return None;
            }
            Some(Short::NotReady(period)) if !is_busy => {
                return wait(ctx, nic, qp, send, WaitKind::Rnr, Duration::from_nanos(period.0));
            }
            Some(Short::NotReady(_)) | None => return Some(Next::At(now + SHORT)),
        }
    }
    let since = match asked.open {
        Some((since, _)) if now - since > PATIENCE && !is_busy => {
            asked.open = Some((now, now));
            let timeout = rc::ack_timeout(qp.attrs.lock().attr.timeout).max(PATIENCE);
            return wait(ctx, nic, qp, send, WaitKind::Lost, timeout);
        }
        Some((_, last)) if now - last < AGAIN => return Some(Next::At(last + AGAIN)),
        Some((since, _)) => since,
        None => {
            let count = look_ahead(ctx, nic, qp, send);
            let asked = &mut send.nic.as_mut()?.between.as_mut()?.receives;
            asked.wanted = asked.wanted.max(asked.used + count);
            now
        }
    };
    let between = send.nic.as_mut()?.between.as_mut()?;
    between.receives.open = Some((since, now));
    let Asked { wanted: total, masks: (solicited, bare), .. } = between.receives;
    let pair = between.pair.clone();
    say(ctx, &pair, Note::Wanted(Wanted { pair: pair.id, total, solicited, bare }));
    Some(Next::At(now + AGAIN))
}

/// Has the next work request in hand: the completion of those before it, or time, brings its queue pair back then.
///
/// # Errors
/// What to do if the ring makes no sense.
pub(in super::super) fn take_in_hand(ctx: &mut Context, nic: &Nic, qp: &Qp, send: &mut SendQueue) -> Result<(), Next> {
    if send.job.is_none() {
        let fetched = serve::fetch(ctx, qp, send).map_err(|reason| serve::give_up(nic, qp, reason))?;
        send.job = fetched.inspect(|_| ctx.count_op());
    }
    Ok(())
}

/// The peer's NIC has receives for messages that cannot go there now, nor otherwise: as if the peer did not answer.
pub(in super::super) fn stall(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, send: &mut SendQueue) -> Next {
    if let Err(next) = take_in_hand(ctx, nic, qp, send) {
        return next;
    }
    if send.handed_over() > 0 {
        return Next::At(ctx.now + AGAIN);
    }
    let timeout = rc::ack_timeout(qp.attrs.lock().attr.timeout).max(PATIENCE);
    wait(ctx, nic, qp, send, WaitKind::Lost, timeout).unwrap_or(Next::Again)
}

fn wait(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    kind: WaitKind,
    period: Duration,
) -> Option<Next> {
    let Some(job) = send.job.take() else { return Some(Next::Again) };
    serve::wait(ctx, nic, qp, send, job, kind, period).or(Some(Next::Again))
}

/// How many messages from the present one on take a receive, as far as all work requests on the way are for the NIC; notes what the peer is to know of
/// each. What the ring says then is looked at again when it is their turn.
fn look_ahead(ctx: &mut Context, nic: &Arc<Nic>, qp: &Arc<Qp>, send: &mut SendQueue) -> u64 {
    let first = send.nic.as_ref().and_then(|queue| queue.between.as_ref()).map_or(0, |between| between.receives.used);
    let mut masks = (0, 0);
    let mut note = |number: u64, wqe: &Send| {
        let bit = |is: bool| u64::from(is) << (number % MOST_WANTED);
        masks.0 |= bit(wqe.flags.contains(SendFlags::SOLICITED));
        masks.1 |= bit(matches!(wqe.op, Op::Write { .. }));
    };
    if let Some(job) = &send.job {
        note(first, &job.wqe);
    }
    let mut count = 1;
    let mut job = ctx.new_job();
    for ahead in 1..send.known() {
        if count >= MOST_WANTED || !send.parse_ahead(ahead, &mut job.wqe) {
            break;
        }
        match stage::foresee(ctx, nic, qp, send, &job.wqe) {
            None => break,
            Some(false) => {}
            Some(true) => {
                note(first + count, &job.wqe);
                count += 1;
            }
        }
    }
    ctx.recycle(job);
    if let Some(between) = send.nic.as_mut().and_then(|queue| queue.between.as_mut()) {
        between.receives.masks = masks;
    }
    count
}

/// Whether something of the queue pair is on its way, or may be before it is visited again: when that is over, it says so itself.
fn may_send(nic: &Nic, qp: &Qp) -> bool {
    let works = matches!(qp.state(), QpState::Rts | QpState::Sqd | QpState::Sqe);
    let is_quiet = qp.end().is_none_or(|end| end.is_quiet());
    works && (nic.is_running() || !is_quiet)
}

impl Pairs {
    /// Another one, for a queue pair of this host that sends to one of the peer's.
    fn add(&mut self, nic: &Arc<Nic>, qp: &Arc<Qp>) -> Arc<Pair> {
        let id = PairId(self.next);
        self.next += 1;
        let pair = Arc::new(Pair::new((self.peer, self.host.clone()), self.link, id, &nic.grants));
        let asking = Asking { pair: Arc::downgrade(&pair), nic: Arc::downgrade(nic), qp: Arc::downgrade(qp) };
        self.asking.insert(id, asking);
        pair
    }

    /// The peer has answered a question, or takes an answer back.
    pub(super) fn on_answer(&mut self, note: Note, now: Instant, link: &mut Link, tell: &mut Tell<'_>) {
        let known = self.asking.get(&note.pair());
        let there =
            known.and_then(|asking| Some((asking.pair.upgrade()?, asking.nic.upgrade()?, asking.qp.upgrade()?)));
        let sends = there.as_ref().is_some_and(|(_, nic, qp)| may_send(nic, qp));
        if let Note::Paired { pair, end: Err(Apart::NotThere) } = note
            && !sends
        {
            link.say(Note::Held { pair });
        }
        if let Note::Revoke { pair, key } = note {
            link.say(Note::Revoked { pair, key });
        }
        let Some((pair, nic, qp)) = there else { return };
        match note {
            Note::Paired { end, .. } => pair.set_end(end),
            Note::Grant { key, grant, .. } => pair.set_grant(key, grant, now),
            Note::Given { given, short, .. } => pair.set_given(given, short),
            Note::Revoke { key, .. } => return pair.revoke(key),
            _ => return,
        }
        tell(&nic, &qp, 0);
    }
}
