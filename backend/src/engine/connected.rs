//! Messages between connected QPs of the same host: both ends are checked, bytes are copied once, and the responder's side
//! completes. No packets: a message that was copied has arrived. What follows from a failure depends on the transport
//! ([`rc`](super::rc), [`uc`](super::uc)).

use std::sync::Arc;

use virtio_rdma::event::EventType;
use virtio_rdma::ib::{Access, QpType, SendFlags, WcFlags, WcOpcode, WcStatus};

use super::complete::{RecvDone, Word, complete_recv, note_limit};
use super::context::{Budget, Context, Gather, Remote, Side, Unreachable};
use super::cost;
use super::failure::fatal;
use super::job::Job;
use crate::key_table::{Actor, ChangeError};
use crate::mem::{self, AtomicOp, Source};
use crate::nic::Nic;
use crate::overlay::Gid;
use crate::profile::Profile;
use crate::qp::{Binding, Qp, Requester, SendQueue, Taken, Ticket};
use crate::wqe::{Flush, Op, Sge};

/// How far a message came.
pub(super) enum Progress {
    /// All of it has arrived and the responder's side is complete.
    Done,
    /// The budget is used up.
    Paused,
    /// No peer accepts our messages now.
    NotThere,
    /// The peer has no receive posted; with its RNR timer code.
    NotReady(u8),
    /// Memory of this side is missing a page.
    Paging(Whose),
    /// The requester's own fault.
    Local(WcStatus),
    /// The responder does not take it.
    Refused(Binding, Fault),
}

/// One of the two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    Own,
    Peers,
}

/// Takes a work request one piece further.
pub(super) fn step(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    send: &mut SendQueue,
    job: &mut Job,
    budget: &mut Budget<'_>,
) -> Progress {
    if send.wait.is_some() {
        // The first time it was charged when it was fetched.
        ctx.charge_lookups(budget, job.wqe.lookups());
    }
    if let Err(failure) = check_local(ctx, nic, qp, job, budget) {
        return failure.into();
    }
    let Some(peer) = bind(ctx, nic, qp, send) else {
        return Progress::NotThere;
    };
    if !job.resume_receive(&peer.qp) {
        return Progress::NotThere;
    }
    let progress = match exchange(ctx, nic, qp, &peer, job, budget, send.followers()) {
        Ok(progress) => progress,
        Err(Failure::Own(failure)) => failure.into(),
        Err(Failure::Paging) => Progress::Paging(Whose::Peers),
        Err(Failure::Remote(fault)) => {
            job.keep_receive(&peer.qp);
            return Progress::Refused(peer, fault);
        }
    };
    job.rest_receive(&peer.qp);
    send.binding = Some(peer);
    progress
}

/// Why a message does not get further.
pub(super) enum Failure {
    Own(OwnFailure),
    Remote(Fault),
    /// A page of the peer's is missing.
    Paging,
}

/// The same where it is on this side.
pub(super) enum OwnFailure {
    Refused(WcStatus),
    Paging,
}

impl From<OwnFailure> for Progress {
    fn from(failure: OwnFailure) -> Self {
        match failure {
            OwnFailure::Refused(status) => Self::Local(status),
            OwnFailure::Paging => Self::Paging(Whose::Own),
        }
    }
}

/// Goes on with a peer that is there.
fn exchange(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    peer: &Binding,
    job: &mut Job,
    budget: &mut Budget<'_>,
    followers: usize,
) -> Result<Progress, Failure> {
    if !job.started {
        match admit(ctx, peer, job, budget, followers)? {
            Admission::Accepted => {
                job.started = true;
                job.short |= !budget.fits(job.wqe.length) && is_on_demand(ctx, peer, job);
            }
            Admission::NotReady => return Ok(Progress::NotReady(peer.qp.attrs.lock().attr.min_rnr_timer)),
        }
    }
    if let Op::Atomic { remote_addr, rkey, action } = job.wqe.op {
        return fetch_atomic(ctx, nic, qp, peer, job, (remote_addr, rkey, action));
    }
    move_piece(ctx, nic, qp, peer, job, budget)
}

/// Checks what is the requester's own, and finds where the next piece of its payload comes from: what is wrong with that must not
/// cost the peer a receive.
fn check_local(ctx: &mut Context, nic: &Nic, qp: &Qp, job: &mut Job, budget: &Budget<'_>) -> Result<(), OwnFailure> {
    if !job.started {
        check_request(ctx, nic, qp, job, budget)?;
        job.short = !budget.fits(job.wqe.length) && ctx.any_on_demand(nic, lkeys(job.wqe.sges.as_slice()));
    }
    ctx.src.clear();
    if !job.wqe.op.sends_payload() || job.wqe.is_inline() {
        return Ok(());
    }
    let (from, len) = (job.done, next_piece(job, budget));
    let own = Gather { nic, pdn: qp.id.pdn, need: Access::empty(), sges: job.wqe.sges.as_slice(), from, len };
    ctx.gather(Side::Source, &own).map_err(|reason| not_ours(qp, reason))
}

fn lkeys(sges: &[Sge]) -> impl Iterator<Item = u32> {
    sges.iter().filter(|sge| sge.length > 0).map(|sge| sge.lkey)
}

/// Whether pages of what a message reaches at the peer may be missing.
fn is_on_demand(ctx: &mut Context, peer: &Binding, job: &Job) -> bool {
    match job.wqe.op {
        Op::Write { rkey, .. } | Op::Read { rkey, .. } => ctx.any_on_demand(&peer.nic, [rkey].into_iter()),
        _ => ctx.any_on_demand(&peer.nic, lkeys(job.recv.sges.as_slice())),
    }
}

/// Checks what is the requester's own.
///
/// # Errors
/// What does not hold.
pub(super) fn check_request(
    ctx: &mut Context,
    nic: &Nic,
    qp: &Qp,
    job: &Job,
    budget: &Budget<'_>,
) -> Result<(), OwnFailure> {
    let fetches = job.wqe.op.fetches();
    if job.wqe.length > u64::from(Profile::MAX_MESSAGE) {
        return Err(OwnFailure::Refused(WcStatus::LocLenErr));
    }
    if fetches && job.wqe.sges.total() < job.wqe.length {
        // An atomic without room for its answer; the status is rxe's.
        return Err(OwnFailure::Refused(WcStatus::LocProtErr));
    }
    if job.wqe.op.takes_resource() && !qp.has_resources() {
        return Err(OwnFailure::Refused(WcStatus::LocQpOpErr));
    }
    // A payload that goes in one piece is checked when that is found.
    if fetches || !budget.fits(job.wqe.length) {
        let need = if fetches { Access::LOCAL_WRITE } else { Access::empty() };
        let checked = ctx.check_sges(nic, qp.id.pdn, need, job.wqe.sges.as_slice());
        checked.map_err(|error| not_ours(qp, error.into()))?;
    }
    Ok(())
}

/// Memory of the requester's is not to be had.
#[cold]
fn not_ours(qp: &Qp, reason: Unreachable) -> OwnFailure {
    match reason {
        Unreachable::Refused(error) => {
            log::debug!("QP {:#x}: {error}", qp.id.qpn);
            OwnFailure::Refused(WcStatus::LocProtErr)
        }
        Unreachable::Paging => OwnFailure::Paging,
    }
}

/// The peer, if there is one that accepts our messages now. It is taken out of the queue, for the caller to put back.
pub(super) fn bind(ctx: &Context, nic: &Nic, qp: &Qp, send: &mut SendQueue) -> Option<Binding> {
    let reliable = qp.id.kind == QpType::Rc;
    if let Some(known) = &send.binding {
        let reborn = known.qp.incarnation() != known.incarnation;
        let same_gids = known.gid_epochs == (nic.gid_epoch(), known.nic.gid_epoch());
        if same_gids && !reborn {
            // Moved once only: this is done for every message.
            let ready = known.nic.is_running() && known.qp.responds();
            return if ready { send.binding.take() } else { None };
        }
        send.binding = None;
        if reborn && reliable {
            return None;
        }
    }
    let found = find_peer(ctx, nic, qp)?;
    if !reliable {
        return Some(found);
    }
    if send.bound_to.is_some_and(|only| only != found.incarnation) {
        return None;
    }
    send.bound_to = Some(found.incarnation);
    Some(found)
}

fn find_peer(ctx: &Context, nic: &Nic, qp: &Qp) -> Option<Binding> {
    let attr = qp.attrs.lock().attr;
    let own_epoch = nic.gid_epoch();
    let source = nic.gids.load().get(attr.av.sgid_index.get().into())?;
    let destination = Gid(attr.av.dgid);
    let peer_nic = ctx.engine.find(nic.id, destination)?;
    let gid_epochs = (own_epoch, peer_nic.gid_epoch());
    if !peer_nic.is_running() || !peer_nic.gids.load().iter().any(|(_, gid)| gid == destination) {
        return None;
    }
    let peer = peer_nic.qp(attr.dest_qpn.get())?;
    if peer.id.kind != qp.id.kind || !peer.responds() {
        return None;
    }
    let mut theirs = peer.attrs.lock();
    let incarnation = peer.incarnation();
    let names_us = theirs.attr.dest_qpn.get() == qp.id.qpn && Gid(theirs.attr.av.dgid) == source;
    // A UC responder takes any PSN at the start of a message (IBA 9.8.2.2).
    let reliable = qp.id.kind == QpType::Rc;
    let in_step = !reliable || theirs.attr.rq_psn == attr.sq_psn;
    let us = Requester { host: None, incarnation: qp.incarnation() };
    let accepts_us = !reliable || theirs.accepts.is_none_or(|only| only == us);
    if !(names_us && in_step && accepts_us) {
        return None;
    }
    theirs.accepts = Some(us);
    drop(theirs);
    Some(Binding { nic: peer_nic, qp: peer, incarnation, gid_epochs })
}

/// What the responder says to a new message.
pub(super) enum Admission {
    Accepted,
    /// RNR NAK.
    NotReady,
}

/// Why the responder refuses: what the requester is told, and what happens at the responder (IBA 9.9.3).
pub(super) struct Fault {
    pub(super) requester: WcStatus,
    /// Status of the responder's receive, if one was taken; else it gets an event.
    pub(super) responder: WcStatus,
    pub(super) event: EventType,
    /// It is the responder's own receive that is wrong, not the message.
    pub(super) own: bool,
}

impl Fault {
    pub(super) const INVALID: Self = Self {
        requester: WcStatus::RemInvReqErr,
        responder: WcStatus::RemInvReqErr,
        event: EventType::QpRequestError,
        own: false,
    };
    /// IBA 9.9.3, class J. There the requester hears nothing; here it does.
    const INVALIDATION: Self = Self { event: EventType::QpFatal, ..Self::INVALID };
    const TOO_LONG: Self = Self { responder: WcStatus::LocLenErr, ..Self::INVALID };
    pub(super) const ACCESS: Self = Self {
        requester: WcStatus::RemAccessErr,
        responder: WcStatus::LocProtErr,
        event: EventType::QpAccessError,
        own: false,
    };
    const OPERATION: Self =
        Self { requester: WcStatus::RemOpErr, responder: WcStatus::LocProtErr, event: EventType::QpFatal, own: true };
    const MALFORMED: Self = Self { responder: WcStatus::LocQpOpErr, ..Self::OPERATION };
}

/// A message begins: checks it at its responder, and takes a receive if it needs one.
///
/// # Errors
/// Why it is refused.
pub(super) fn admit(
    ctx: &mut Context,
    peer: &Binding,
    job: &mut Job,
    budget: &mut Budget<'_>,
    followers: usize,
) -> Result<Admission, Failure> {
    check_remote(ctx, peer, job, budget).map_err(Failure::Remote)?;
    if job.wqe.op.takes_receive() {
        return take_receive(ctx, peer, job, budget, followers).map_err(Failure::Remote);
    }
    Ok(Admission::Accepted)
}

/// Checks what a WRITE, READ, atomic or FLUSH reaches at the peer.
fn check_remote(ctx: &mut Context, peer: &Binding, job: &Job, budget: &Budget<'_>) -> Result<(), Fault> {
    let (need, addr, rkey) = match job.wqe.op {
        Op::Write { remote_addr, rkey, .. } | Op::AtomicWrite { remote_addr, rkey } => {
            (Access::REMOTE_WRITE, remote_addr, rkey)
        }
        Op::Read { remote_addr, rkey } => (Access::REMOTE_READ, remote_addr, rkey),
        Op::Atomic { remote_addr, rkey, .. } => (Access::REMOTE_ATOMIC, remote_addr, rkey),
        Op::Flush(flush) => return check_flush(ctx, peer, flush),
        _ => return Ok(()),
    };
    if !peer.qp.access().contains(need) || (job.wqe.op.takes_resource() && !peer.qp.lends_resources()) {
        return Err(Fault::INVALID);
    }
    if job.wqe.length == 0 {
        return Ok(());
    }
    let is_word = matches!(job.wqe.op, Op::Atomic { .. } | Op::AtomicWrite { .. });
    if is_word && !addr.is_multiple_of(job.wqe.length) {
        return Err(Fault::INVALID);
    }
    if !job.wqe.op.takes_receive() && budget.fits(job.wqe.length) {
        // It is found, and checked, next.
        return Ok(());
    }
    check_key(ctx, peer, Remote { need, addr, rkey }, job.wqe.length)
}

fn check_key(ctx: &mut Context, peer: &Binding, at: Remote, len: u64) -> Result<(), Fault> {
    let mr = ctx.key(&peer.nic, at.rkey).map_err(|_| Fault::ACCESS)?;
    let who = (peer.qp.id.pdn, peer.qp.id.qpn);
    mr.check_remote(who, at.need, at.addr, len).map_err(|_| Fault::ACCESS)
}

/// What WRITEs have written is visible when they are complete: there is nothing to do but to check.
fn check_flush(ctx: &mut Context, peer: &Binding, flush: Flush) -> Result<(), Fault> {
    if flush.persistent {
        return Err(Fault::ACCESS);
    }
    if !peer.qp.access().contains(Access::FLUSH_GLOBAL) {
        return Err(Fault::INVALID);
    }
    let mr = ctx.key(&peer.nic, flush.rkey).map_err(|_| Fault::ACCESS)?;
    let (addr, len) = if flush.whole { (mr.iova, 0) } else { (flush.remote_addr, flush.length.into()) };
    check_key(ctx, peer, Remote { need: Access::FLUSH_GLOBAL, addr, rkey: flush.rkey }, len)
}

/// Takes the peer's next receive. Only its own worker takes it back from us: where that is this one, nobody has to be told, and those
/// for the requests that follow are taken with it.
fn begin_receive(ctx: &mut Context, peer: &Binding, job: &mut Job, followers: usize) -> (Taken, Option<Ticket>) {
    if peer.nic.worker_of(&peer.qp) != ctx.worker {
        let (taken, ticket) = peer.qp.recv.lock().begin(&mut job.recv);
        return (taken, Some(ticket));
    }
    if ctx.hand.next(&peer.qp, &mut job.recv) {
        return (Taken::Yes, None);
    }
    ctx.hand.give_back();
    let mut queue = peer.qp.recv.lock();
    let taken = queue.begin_quietly(&mut job.recv);
    if taken == Taken::Yes && followers > 0 {
        ctx.hand.fill(&peer.qp, &mut queue, followers);
    }
    (taken, None)
}

fn take_receive(
    ctx: &mut Context,
    peer: &Binding,
    job: &mut Job,
    budget: &mut Budget<'_>,
    followers: usize,
) -> Result<Admission, Fault> {
    if job.has_receive() {
        // It was taken for the host's NIC, which it is too malformed for.
        return Err(Fault::MALFORMED);
    }
    let (taken, ticket) = begin_receive(ctx, peer, job, followers);
    note_limit(&peer.nic, &peer.qp);
    match taken {
        Taken::Empty | Taken::TooShort => return Ok(Admission::NotReady),
        Taken::Broken(reason) => {
            fatal(&peer.nic, &peer.qp, reason);
            ctx.engine.attend(&peer.nic, &peer.qp);
            return Err(Fault::OPERATION);
        }
        Taken::Malformed => {
            job.begin_receive(ticket);
            return Err(Fault::MALFORMED);
        }
        Taken::Yes => job.begin_receive(ticket),
    }
    ctx.charge_lookups(budget, job.recv.sges.as_slice().len());
    if matches!(job.wqe.op, Op::Write { .. }) {
        return Ok(Admission::Accepted);
    }
    if job.wqe.length > job.recv.sges.total() {
        return Err(Fault::TOO_LONG);
    }
    if job.wqe.length == job.recv.sges.total() && budget.fits(job.wqe.length) {
        // All of it is found, and checked, next.
        return Ok(Admission::Accepted);
    }
    // All of it, also what this message does not reach.
    ctx.check_sges(&peer.nic, peer.qp.id.recv_pdn(), Access::LOCAL_WRITE, job.recv.sges.as_slice())
        .map_err(|_| Fault::OPERATION)?;
    Ok(Admission::Accepted)
}

/// Bytes of the next piece. A longer one is copied in strides, after each of which others have their turn if they wait.
fn next_piece(job: &Job, budget: &Budget<'_>) -> u64 {
    job.left().min(if job.short { budget.bytes } else { budget.stretch() })
}

/// Copies one piece; with the last one the responder's side completes.
fn move_piece(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    peer: &Binding,
    job: &mut Job,
    budget: &mut Budget<'_>,
) -> Result<Progress, Failure> {
    let is_word = matches!(job.wqe.op, Op::AtomicWrite { .. });
    let len = if is_word { job.left() } else { next_piece(job, budget) };
    let last = len == job.left();
    let mut moved = 0;
    if len > 0 {
        map_piece(ctx, nic, qp, peer, job, len)?;
        if is_word && !matches!(ctx.dst[..], [word] if word.is_word()) {
            return Err(Failure::Remote(Fault::INVALID));
        }
        let from = Source { own: &[inline_piece(job, len)], guest: &ctx.src };
        if last && budget.fits(len) {
            mem::copy_ordered(from, &ctx.dst);
            moved = len;
            budget.bytes -= len;
        } else {
            moved = copy_long(from, &ctx.dst, last, budget);
        }
        job.done += moved;
        ctx.charge(cost::bytes(moved));
        ctx.count_bytes(moved);
    }
    if last && moved == len { arrive(ctx, peer, job) } else { Ok(Progress::Paused) }
}

/// Copies what the visit has left and then, as long as nobody else waits, a quantum each time. Returns how many bytes that were.
fn copy_long(from: Source<'_>, to: &[mem::Seg], last: bool, budget: &mut Budget<'_>) -> u64 {
    let first = budget.bytes;
    let mut allowed = first;
    let next = || {
        if !budget.refill() {
            return 0;
        }
        allowed += budget.bytes;
        budget.bytes as usize
    };
    let moved = mem::copy_in_strides(from, to, last, first as usize, next) as u64;
    // A word that ends the message is not kept for another visit.
    budget.bytes = allowed.saturating_sub(moved);
    moved
}

/// The rest of a message from another host, and with that all of it, is here: makes its last bytes visible, and completes the receive.
///
/// # Errors
/// Why it cannot be.
pub(super) fn finish_at_peer(
    ctx: &mut Context,
    peer: &Binding,
    job: &mut Job,
    last_bytes: &[u8],
) -> Result<Progress, Failure> {
    let is_word = matches!(job.wqe.op, Op::AtomicWrite { .. });
    let word = std::mem::take(&mut job.wqe.inline);
    let bytes = if is_word { &word[..] } else { last_bytes };
    job.done = job.wqe.length.saturating_sub(bytes.len() as u64);
    let placed = place_last(ctx, peer, job, bytes, is_word);
    job.wqe.inline = word;
    placed?;
    arrive(ctx, peer, job)
}

fn place_last(ctx: &mut Context, peer: &Binding, job: &Job, bytes: &[u8], is_word: bool) -> Result<(), Failure> {
    if bytes.is_empty() {
        return Ok(());
    }
    ctx.dst.clear();
    map_to_peer(ctx, peer, job, bytes.len() as u64)?;
    if is_word && !matches!(ctx.dst[..], [word] if word.is_word()) {
        return Err(Failure::Remote(Fault::INVALID));
    }
    mem::copy_ordered(Source { own: &[bytes], guest: &[] }, &ctx.dst);
    Ok(())
}

/// All bytes of the message are in place.
fn arrive(ctx: &mut Context, peer: &Binding, job: &mut Job) -> Result<Progress, Failure> {
    if !invalidate(ctx, peer, job)? {
        return Ok(Progress::Paused);
    }
    if job.finish_receive(&peer.qp) && !complete_recv(ctx, &peer.nic, &peer.qp, &received(job)) {
        return Err(Failure::Remote(Fault::OPERATION));
    }
    Ok(Progress::Done)
}

/// The message has arrived: makes a key of the responder's free if it says so. False while others may still be using that, or are changing
/// keys.
fn invalidate(ctx: &mut Context, peer: &Binding, job: &mut Job) -> Result<bool, Failure> {
    let Op::SendInvalidate { rkey } = job.wqe.op else {
        return Ok(true);
    };
    if job.grace.is_none() {
        let actor = Actor { qpn: peer.qp.id.qpn, pdn: peer.qp.id.pdn };
        match peer.nic.keys.invalidate(actor, rkey) {
            Err(ChangeError::Busy) => return Ok(false),
            result => drop(result.map_err(|_| Failure::Remote(Fault::INVALIDATION))?),
        }
        job.grace = Some(ctx.forget_key(&peer.nic, rkey));
    }
    Ok(job.grace.as_ref().is_none_or(|grace| ctx.engine.quiesce().is_over(grace)))
}

/// Executes an atomic; it is too short to take more than one visit.
fn fetch_atomic(
    ctx: &mut Context,
    nic: &Arc<Nic>,
    qp: &Arc<Qp>,
    peer: &Binding,
    job: &Job,
    (remote_addr, rkey, action): (u64, u32, AtomicOp),
) -> Result<Progress, Failure> {
    ctx.src.clear();
    ctx.dst.clear();
    let (from, len) = (0, job.wqe.length);
    reach(ctx, peer, Side::Source, Remote { need: Access::REMOTE_ATOMIC, addr: remote_addr, rkey }, len)?;
    let answer = Gather { nic, pdn: qp.id.pdn, need: Access::LOCAL_WRITE, sges: job.wqe.sges.as_slice(), from, len };
    ctx.gather(Side::Destination, &answer).map_err(|reason| Failure::Own(not_ours(qp, reason)))?;
    // Addresses of a region need not be aligned as its memory is.
    let old = match ctx.src[..] {
        [word] => mem::atomic(word, action),
        _ => None,
    };
    let old = old.ok_or(Failure::Remote(Fault::INVALID))?.to_ne_bytes();
    mem::copy_ordered(Source { own: &[&old], guest: &[] }, &ctx.dst);
    Ok(Progress::Done)
}

/// The next `len` bytes of inline data, if that is where they are.
fn inline_piece(job: &Job, len: u64) -> &[u8] {
    if !job.wqe.is_inline() {
        return &[];
    }
    &job.wqe.inline[job.done as usize..][..len as usize]
}

fn remote(reason: Unreachable, fault: Fault) -> Failure {
    match reason {
        Unreachable::Refused(_) => Failure::Remote(fault),
        Unreachable::Paging => Failure::Paging,
    }
}

/// Finds where the next `len` bytes come from and go to; what the requester sends was found before.
fn map_piece(ctx: &mut Context, nic: &Nic, qp: &Qp, peer: &Binding, job: &Job, len: u64) -> Result<(), Failure> {
    ctx.dst.clear();
    match job.wqe.op {
        Op::Read { remote_addr, rkey } => {
            let at = Remote { need: Access::REMOTE_READ, addr: remote_addr.wrapping_add(job.done), rkey };
            reach(ctx, peer, Side::Source, at, len)?;
            let (pdn, sges) = (qp.id.pdn, job.wqe.sges.as_slice());
            let target = Gather { nic, pdn, need: Access::LOCAL_WRITE, sges, from: job.done, len };
            ctx.gather(Side::Destination, &target).map_err(|reason| Failure::Own(not_ours(qp, reason)))
        }
        _ => map_to_peer(ctx, peer, job, len),
    }
}

/// Finds where the next `len` bytes of what the requester sends go.
///
/// # Errors
/// Why they cannot.
pub(super) fn map_to_peer(ctx: &mut Context, peer: &Binding, job: &Job, len: u64) -> Result<(), Failure> {
    match job.wqe.op {
        Op::Write { remote_addr, rkey, .. } | Op::AtomicWrite { remote_addr, rkey } => {
            let at = Remote { need: Access::REMOTE_WRITE, addr: remote_addr.wrapping_add(job.done), rkey };
            reach(ctx, peer, Side::Destination, at, len)
        }
        _ => {
            let (pdn, sges) = (peer.qp.id.recv_pdn(), job.recv.sges.as_slice());
            let target = Gather { nic: &peer.nic, pdn, need: Access::LOCAL_WRITE, sges, from: job.done, len };
            ctx.gather(Side::Destination, &target).map_err(|reason| remote(reason, Fault::OPERATION))
        }
    }
}

/// Appends memory of the peer that a key gives access to.
fn reach(ctx: &mut Context, peer: &Binding, side: Side, at: Remote, len: u64) -> Result<(), Failure> {
    ctx.reach(side, &peer.nic, &peer.qp.id, at, len).map_err(|reason| remote(reason, Fault::ACCESS))
}

#[inline]
fn received(job: &Job) -> RecvDone {
    let (opcode, word) = match job.wqe.op {
        Op::Write { imm, .. } => (WcOpcode::RecvRdmaWithImm, Word::imm(imm, job.wqe.imm)),
        Op::Send { imm } => (WcOpcode::Recv, Word::imm(imm, job.wqe.imm)),
        Op::SendInvalidate { rkey } => (WcOpcode::Recv, Word::Invalidated(rkey)),
        _ => (WcOpcode::Recv, Word::None),
    };
    RecvDone {
        wr_id: job.recv.wr_id,
        status: WcStatus::Success,
        opcode,
        byte_len: job.wqe.length as u32,
        word,
        src_qp: 0,
        flags: WcFlags::empty(),
        sl: 0,
        solicited: job.wqe.flags.contains(SendFlags::SOLICITED),
    }
}
