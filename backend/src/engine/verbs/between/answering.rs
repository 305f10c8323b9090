//! The side of the queue pair that messages come to: it gives its end, its keys and its receives to the NIC of the other host.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use freeflow_tcp::frame::{Apart, NicEnd, NicKey, Note, Open, PairId, Short, Transport, Wanted};
use freeflow_tcp::host::QpKey;
use freeflow_tcp::{Link, Nanos};
use virtio_rdma::ib::Access;

use super::super::{poll, stage};
use super::{MOST_WANTED, Pairs};
use crate::engine::complete::note_limit;
use crate::engine::context::Context;
use crate::engine::{Engine, cost, rc, tcp};
use crate::overlay::{Gid, NicId};
use crate::qp::Taken;
use crate::verbs::{Member, Target, Wish};
use crate::wqe::Sge;

/// A queue pair of this host that the peer's sends to.
#[derive(Debug)]
pub(super) struct Answering {
    member: Member,
    /// The peer's end.
    theirs: NicEnd,
    /// Set when its own was connected to that, or could not be.
    done: Arc<AtomicBool>,
    /// Messages for which a receive is, or was, on the NIC, or that go without it.
    given: u64,
    /// The last question that was answered so that the messages it was for go without the NIC, and the answer.
    declined: Option<(u64, Note)>,
}

impl Answering {
    /// Whether it is this life of the queue pair still.
    pub fn is_there(&self) -> bool {
        let Member { nic, qp, end } = &self.member;
        let known = nic.qp(qp.id.qpn).is_some_and(|now| Arc::ptr_eq(&now, qp));
        known && qp.incarnation() == end.incarnation
    }

    fn is_ready(&self) -> bool {
        self.member.nic.is_running() && self.is_there() && self.member.qp.responds()
    }

    /// Whether its end was connected to the peer's, or could not be.
    fn is_seen_to(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    fn is_connected(&self) -> bool {
        let end = &self.member.end;
        self.is_seen_to() && end.elsewhere() == Some(&self.theirs) && !end.is_destroyed()
    }

    /// The peer is gone.
    pub fn give_up(self, engine: &Engine) {
        let Member { nic, qp, end } = &self.member;
        if self.is_there() && end.elsewhere() == Some(&self.theirs) {
            poll::give_up(engine, nic, qp, end);
        }
    }
}

impl Pairs {
    /// The peer wants a queue pair connected to one of this host.
    pub(super) fn on_pair(&mut self, open: &Open, theirs: NicEnd, fabric: u64, link: &mut Link, ctx: &mut Context) {
        let pair = PairId::from(open.flow);
        if self.answering.get(&pair).is_some_and(|known| known.theirs == theirs) {
            return self.paired(pair, link, ctx);
        }
        match self.accept(open, theirs, fabric, ctx) {
            Ok((key, answering)) => {
                if let Some(before) = self.by_qp.insert(key, pair) {
                    self.answering.remove(&before);
                }
                self.answering.insert(pair, answering);
            }
            Err(apart) => drop(link.say(Note::Paired { pair, end: Err(apart) })),
        }
    }

    /// Finds the queue pair, and has its end connected.
    fn accept(&self, open: &Open, theirs: NicEnd, number: u64, ctx: &Context) -> Result<(QpKey, Answering), Apart> {
        let engine = &ctx.engine;
        let fabric = engine.fabric().filter(|fabric| fabric.number() == number && fabric.is_up());
        let fabric = fabric.ok_or(Apart::NoNic)?;
        if open.transport != Transport::Rc {
            return Err(Apart::NoNic);
        }
        let (source, destination) = (Gid(open.source), Gid(open.destination));
        let overlay = engine.overlay();
        let tenant = overlay.tenant_of(self.peer, open.tenant, source).ok_or(Apart::NotThere)?;
        let nic = overlay.find(&tenant, destination).and_then(|id| engine.nic(id)).ok_or(Apart::NotThere)?;
        if !nic.is_running() || !nic.gids.load().iter().any(|(_, gid)| gid == destination) {
            return Err(Apart::NotThere);
        }
        let qp = nic.qp(open.destination_qpn).ok_or(Apart::NotThere)?;
        if !tcp::accept(&qp, open, self.peer) {
            return Err(Apart::NotThere);
        }
        let end = qp.end().filter(|end| end.incarnation == qp.incarnation()).ok_or(Apart::NoNic)?;
        let key = tcp::key_of(nic.id, qp.id.qpn);
        if self.by_qp.get(&key).is_some_and(|before| self.answering.get(before).is_some_and(|it| !it.is_seen_to())) {
            return Err(Apart::NotThere);
        }
        let member = Member { nic, qp, end };
        let done = Arc::new(AtomicBool::new(false));
        let to = Target::Answer(theirs, self.peer, self.link, open.flow.into());
        fabric.wish(Wish { from: member.clone(), to, done: done.clone() });
        Ok((key, Answering { member, theirs, done, given: 0, declined: None }))
    }

    /// Says what came of it, when that is known.
    pub fn paired(&mut self, pair: PairId, link: &mut Link, ctx: &Context) {
        let (Some(answering), Some(fabric)) = (self.answering.get(&pair), ctx.engine.fabric()) else { return };
        if !answering.is_seen_to() {
            return;
        }
        let end = &answering.member.end;
        let end = match (answering.is_connected(), answering.is_ready()) {
            (false, _) => Err(Apart::NoNic),
            (true, false) => Err(Apart::NotThere),
            (true, true) => {
                end.set_held(false);
                Ok(fabric.told(end))
            }
        };
        link.say(Note::Paired { pair, end });
    }

    /// A virtual NIC's guest is stopped: peers are to send nothing to it over the NIC.
    pub fn hold(&self, nic: NicId, link: &mut Link) {
        for (pair, _) in self.answering.iter().filter(|(_, answering)| answering.member.nic.id == nic) {
            link.say(Note::Paired { pair: *pair, end: Err(Apart::NotThere) });
        }
    }

    /// The peer sends nothing over the NIC.
    pub(super) fn on_held(&self, pair: PairId) {
        if let Some(answering) = self.answering.get(&pair).filter(|answering| !answering.member.nic.is_running()) {
            answering.member.end.set_held(true);
        }
    }

    /// The peer asks what a key stands for.
    pub(super) fn on_key(&self, pair: PairId, key: u32, link: &mut Link) {
        let grant = self.answering.get(&pair).and_then(|answering| self.grant(answering, pair, key));
        link.say(Note::Grant { pair, key, grant });
    }

    fn grant(&self, answering: &Answering, pair: PairId, key: u32) -> Option<NicKey> {
        let Member { nic, qp, .. } = &answering.member;
        if !answering.is_ready() || !answering.is_connected() {
            return None;
        }
        let grant = nic.keys.grant(key)?;
        let (terms, nic_key) = nic.keys.tell(&grant, &self.recalls, pair, key)?;
        let mut access = terms.access & qp.access() & REMOTE;
        if !qp.lends_resources() {
            access -= Access::REMOTE_READ | Access::REMOTE_ATOMIC;
        }
        let same_domain = terms.pdn == qp.id.pdn;
        same_domain.then_some(NicKey { key: nic_key, access: access.bits(), addr: terms.iova, length: terms.length })
    }

    /// The peer asks for receives.
    pub(super) fn on_wanted(&mut self, wanted: &Wanted, link: &mut Link, ctx: &mut Context) {
        let pair = wanted.pair;
        let Some(answering) = self.answering.get_mut(&pair) else { return };
        if let Some((total, answer)) = answering.declined
            && total == wanted.total
        {
            link.say(answer);
            return;
        }
        let mut short = None;
        while answering.given < wanted.total && wanted.total - answering.given <= MOST_WANTED {
            let bit = 1 << (answering.given % MOST_WANTED);
            match give(ctx, answering, wanted.bare & bit != 0, wanted.solicited & bit != 0) {
                Ok(()) => answering.given += 1,
                Err(why) => {
                    short = why;
                    break;
                }
            }
        }
        note_limit(&answering.member.nic, &answering.member.qp);
        let answer = Note::Given { pair, given: answering.given, short };
        if short == Some(Short::NotForNic) {
            // The peer sends these messages otherwise, whether it asks once more or not.
            answering.given = wanted.total;
            answering.declined = Some((wanted.total, answer));
        }
        link.say(answer);
    }
}

/// What a peer's NIC may be told that it may do.
const REMOTE: Access = Access::REMOTE_READ.union(Access::REMOTE_WRITE).union(Access::REMOTE_ATOMIC);

/// Gives the NIC the next receive, for a message that puts nothing there if it is `bare`.
///
/// # Errors
/// Why not; `None` if it has as many as it takes, or the queue pair is about to be flushed: the peer asks again.
fn give(ctx: &mut Context, answering: &Answering, bare: bool, solicited: bool) -> Result<(), Option<Short>> {
    let Member { nic, qp, end } = &answering.member;
    // As long as it is held nobody finds that there is none.
    let on_nic = end.recvs();
    if !on_nic.has_room() || !answering.is_ready() || !answering.is_connected() {
        return Err(None);
    }
    ctx.charge(cost::WQE);
    let mut job = ctx.new_job();
    let taken = qp.recv.lock().take_ahead(&mut job.recv);
    let result = match taken {
        Taken::Yes => {
            let mut sges = std::mem::take(&mut ctx.verbs.sges);
            sges.clear();
            let for_nic = bare || stage::recv_sges(ctx, (nic, qp, end), &job.recv, &mut sges);
            let given = if for_nic {
                post(ctx, answering, on_nic, &job.recv, solicited, &sges)
            } else {
                Err(Some(Short::NotForNic))
            };
            if !for_nic {
                qp.recv.lock().put_back(std::mem::take(&mut job.recv));
            }
            ctx.verbs.sges = sges;
            given
        }
        Taken::Empty | Taken::TooShort => {
            let wait = rc::rnr_timer(qp.attrs.lock().attr.min_rnr_timer);
            Err(Some(Short::NotReady(Nanos(wait.as_nanos() as u64))))
        }
        // The message that it is for is told.
        Taken::Malformed | Taken::Broken(_) => Err(Some(Short::NotForNic)),
    };
    ctx.recycle(job);
    result
}

fn post(
    ctx: &Context,
    answering: &Answering,
    on_nic: crate::verbs::end::Recvs<'_>,
    recv: &crate::wqe::Recv,
    solicited: bool,
    sges: &[Sge],
) -> Result<(), Option<Short>> {
    let Member { nic, qp, end } = &answering.member;
    on_nic.post(recv, solicited, sges).map_err(|_| {
        poll::give_up(&ctx.engine, nic, qp, end);
        None
    })
}
