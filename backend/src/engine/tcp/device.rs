//! This host's queue pairs and memory, as the protocol asks for them.

use freeflow_tcp::Nanos;
use freeflow_tcp::frame::{Datagram, FlowId, Note, Open, Request};
use freeflow_tcp::host::{Availability, Bound, Host, Landed, Landing, Origin, QpKey, Refusal, Source, Token, Verdict};
use rustc_hash::FxHashMap;
use virtio_rdma::ib::{Access, QpType, WcStatus};

use super::answering::{self, Answering, key_of};
use super::datagram;
use super::flow::{Flow, GONE, flow_of};
use crate::engine::connected::{self, Admission, Failure, Fault, Progress};
use crate::engine::context::{Budget, Context, Remote, Side, Unreachable};
use crate::engine::{cost, rc};
use crate::mem;
use crate::overlay::Gid;
use crate::qp::Qp;
use crate::tcp::PeerId;
use crate::wqe::Op;

/// How soon a page that is missing is looked for again.
pub(super) const PAGE_LOOK: Nanos = Nanos::from_micros(100);
/// How soon a message is tried again that came over TCP while the NIC's completions of those before it were not looked at.
const NIC_LOOK: Nanos = Nanos::from_micros(10);
/// How soon a message is tried again whose receive was flushed: its queue pair has failed, and the peer will see that.
const FLUSHED_LOOK: Nanos = Nanos::from_millis(1);

/// What a link is for: the two ends of its flows that are on this host. What they are found by is this host's choice, so that nobody can pick what falls into one
/// place of a table.
#[derive(Debug)]
pub(super) struct Tables {
    pub peer: PeerId,
    pub flows: FxHashMap<FlowId, Flow>,
    pub answering: FxHashMap<QpKey, Answering>,
    /// Payloads of datagrams that wait to be sent.
    pub datagrams: FxHashMap<Token, Vec<u8>>,
    pub next_datagram: u64,
    /// The payload of a datagram that has come.
    pub arrived: Vec<u8>,
    /// Flows with messages that are finished.
    pub finished: Vec<FlowId>,
    /// Those of guests that do not run now.
    pub parked: Vec<FlowId>,
    /// Those whose answers wait for a page, which is looked for at this time.
    pub paging: Vec<FlowId>,
    pub page_look: Nanos,
    /// Of queue pairs that are connected over the hosts' NICs: what the peer has said since it was last listened to.
    pub notes: Vec<Note>,
    /// Queue pairs whose receives are in hand.
    pub in_hand: Vec<QpKey>,
}

impl Tables {
    pub fn new(peer: PeerId) -> Self {
        Self {
            peer,
            flows: FxHashMap::default(),
            answering: FxHashMap::default(),
            datagrams: FxHashMap::default(),
            next_datagram: 0,
            arrived: Vec::new(),
            finished: Vec::new(),
            parked: Vec::new(),
            paging: Vec::new(),
            page_look: Nanos::ZERO,
            notes: Vec::new(),
            in_hand: Vec::new(),
        }
    }

    /// The quantum ends: receives in hand are for others to flush.
    pub fn rest(&mut self) {
        for key in self.in_hand.drain(..) {
            if let Some(answering) = self.answering.get_mut(&key) {
                answering.rest();
            }
        }
    }
}

/// A worker at a link.
pub(super) struct Device<'a> {
    pub ctx: &'a mut Context,
    pub tables: &'a mut Tables,
}

/// Memory that payload is taken from.
pub(super) enum Bytes {
    /// Guest memory, in the context's source.
    Guest,
    /// Our own, appended to the buffer.
    Own,
}

impl Device<'_> {
    /// Finds the bytes of a source: large ones where they are, small ones, and those of pages that may go at any time, are appended to `own`.
    /// `None` if they are not to be had.
    pub fn take(&mut self, source: &Source, own: &mut Vec<u8>) -> Option<Bytes> {
        self.ctx.src.clear();
        let (from, len) = (u64::from(source.offset), u64::from(source.len));
        if let Origin::Datagram(token) = source.origin {
            own.extend_from_slice(&self.tables.datagrams.remove(&token)?);
            return Some(Bytes::Own);
        }
        if let Some(inline) = self.inline(source.origin) {
            own.extend_from_slice(inline.get(from as usize..(from + len) as usize)?);
            return Some(Bytes::Own);
        }
        let lasting = len > SMALL && !self.is_complete_when_sent(source.origin) && !self.is_paged(source.origin);
        self.find(source.origin, from, len).ok()?;
        if lasting {
            return Some(Bytes::Guest);
        }
        let start = own.len();
        own.resize(start + len as usize, 0);
        mem::read_all(&self.ctx.src, &mut own[start..]);
        self.ctx.charge(cost::bytes(len));
        Some(Bytes::Own)
    }

    fn inline(&self, origin: Origin) -> Option<&[u8]> {
        let Origin::Message(token) = origin else { return None };
        let job = self.tables.flows.get(&flow_of(token))?.job(token)?;
        job.wqe.is_inline().then_some(&job.wqe.inline)
    }

    /// Finds where the bytes of a source are, from `skip` on, for the context's source.
    pub fn find_rest(&mut self, source: &Source, skip: u32) -> bool {
        self.ctx.src.clear();
        self.find(source.origin, (source.offset + skip).into(), (source.len - skip).into()).is_ok()
    }

    /// Whether its work request is complete as soon as its last frame is made: its memory is the application's again before all is sent.
    fn is_complete_when_sent(&self, origin: Origin) -> bool {
        let Origin::Message(token) = origin else { return false };
        self.tables.flows.get(&flow_of(token)).is_some_and(|flow| flow.qp.id.kind == QpType::Uc)
    }

    /// Whether some of it is in a region whose pages come and go.
    fn is_paged(&mut self, origin: Origin) -> bool {
        match origin {
            Origin::Message(token) => {
                let Some(flow) = self.tables.flows.get(&flow_of(token)) else { return false };
                let mut keys = flow.job(token).into_iter().flat_map(|job| job.wqe.sges.as_slice());
                keys.any(|sge| self.ctx.key(&flow.nic, sge.lkey).is_ok_and(|mr| mr.is_on_demand()))
            }
            Origin::Read(key, at) => {
                let Some(answering) = self.tables.answering.get(&key) else { return false };
                self.ctx.key(&answering.to.nic, at.rkey).is_ok_and(|mr| mr.is_on_demand())
            }
            Origin::Datagram(_) => false,
        }
    }

    /// Appends where bytes are that are to be sent.
    fn find(&mut self, origin: Origin, from: u64, len: u64) -> Result<(), Unreachable> {
        match origin {
            Origin::Message(token) => {
                let flow = self.tables.flows.get_mut(&flow_of(token)).ok_or(GONE)?;
                flow.reach(self.ctx, token, Side::Source, from..from + len)
            }
            Origin::Read(key, at) => {
                // One that is not ready has failed, or its guest is stopped for a while: its peer waits, and sees which.
                let there = self.tables.answering.get_mut(&key).filter(|answering| answering.is_there());
                let answering = there.ok_or(Unreachable::Paging)?;
                if !answering.is_ready() {
                    return Err(Unreachable::Paging);
                }
                // Asked again when it is read again, which is not a new message (IBA 9.4.4).
                if !answering.to.qp.access().contains(Access::REMOTE_READ) {
                    return Err(GONE);
                }
                let at = Remote { need: Access::REMOTE_READ, addr: at.addr.wrapping_add(from), rkey: at.rkey };
                self.ctx.paging.fault = answering.fault.take();
                let found = self.ctx.reach(Side::Source, &answering.to.nic, &answering.to.qp.id, at, len);
                answering.fault = self.ctx.paging.fault.take();
                found
            }
            Origin::Datagram(_) => Err(GONE),
        }
    }

    /// Finds where bytes from `at` on of a payload go, into the context's destination.
    pub fn place(&mut self, landing: &Landing, at: u64, len: u64) -> Result<(), Landed> {
        self.ctx.dst.clear();
        self.ctx.charge(cost::LOOKUP + cost::bytes(len));
        match *landing {
            Landing::Message { qp, request, offset } => {
                self.place_message((qp, request.flow), u64::from(offset) + at, len)
            }
            Landing::Answer { token, offset } => self.place_answer(token, u64::from(offset) + at, len),
            Landing::Nothing | Landing::Discard | Landing::Datagram(_) => Ok(()),
        }
    }

    fn place_message(&mut self, (key, flow): (QpKey, FlowId), from: u64, len: u64) -> Result<(), Landed> {
        let Some(answering) = self.tables.answering.get_mut(&key).filter(|answering| answering.flow == flow) else {
            return Err(Landed::Later(FLUSHED_LOOK));
        };
        if !answering.is_ready() || !hold(answering, key, &mut self.tables.in_hand) {
            return Err(Landed::Later(FLUSHED_LOOK));
        }
        let Answering { to, job, .. } = answering;
        job.done = from;
        self.ctx.paging.fault = job.fault.take();
        let found = connected::map_to_peer(self.ctx, to, job, len);
        job.fault = self.ctx.paging.fault.take();
        match found {
            Ok(()) => Ok(()),
            Err(Failure::Remote(fault)) => Err(Landed::Refused(self.refuse(key, &fault))),
            Err(_) => Err(Landed::Later(PAGE_LOOK)),
        }
    }

    fn place_answer(&mut self, token: Token, from: u64, len: u64) -> Result<(), Landed> {
        let Some(flow) = self.tables.flows.get_mut(&flow_of(token)) else {
            return Err(Landed::Refused(Refusal::Access));
        };
        if !flow.nic.is_running() {
            return Err(Landed::Later(FLUSHED_LOOK));
        }
        let found = flow.reach(self.ctx, token, Side::Destination, from..from + len);
        found.map_err(|reason| match reason {
            Unreachable::Paging => Landed::Later(PAGE_LOOK),
            Unreachable::Refused(_) => Landed::Refused(Refusal::Access),
        })
    }

    /// Memory that a READ names may not be reached: its responder fails.
    fn fail_read(&mut self, key: QpKey) {
        if let Some(answering) = self.tables.answering.get_mut(&key) {
            // The message that is coming is another one.
            let mut job = self.ctx.new_job();
            rc::fail_responder(self.ctx, &answering.to, &mut job, &Fault::ACCESS);
            self.ctx.recycle(job);
        }
    }

    /// The responder refuses the present message, for good.
    fn refuse(&mut self, key: QpKey, fault: &Fault) -> Refusal {
        let Some(answering) = self.tables.answering.get_mut(&key) else { return Refusal::Operation };
        let Answering { to, job, in_hand, .. } = answering;
        *in_hand = false;
        job.keep_receive(&to.qp);
        if to.qp.id.kind == QpType::Rc || fault.own {
            return answering::refusal(rc::fail_responder(self.ctx, to, job, fault));
        }
        job.put_back_receive();
        to.nic.counters.messages_dropped.add(1);
        answering::refusal(fault.requester)
    }
}

/// Whether receives of messages that came before over the NIC are still to be completed: their sender heard of their end before we did.
fn is_filled_by_nic(qp: &Qp) -> bool {
    qp.end().is_some_and(|end| end.num_recvs() > 0)
}

/// Has the receive of a message in hand, if it has one. False if that was flushed.
fn hold(answering: &mut Answering, key: QpKey, in_hand: &mut Vec<QpKey>) -> bool {
    let before = answering.in_hand;
    let holds = answering.resume();
    if holds && !before {
        in_hand.push(key);
    }
    holds
}

/// Payloads up to this length are copied, which costs less than to have the system look for them.
const SMALL: u64 = 4096;

impl Host for Device<'_> {
    fn note(&mut self, note: &Note) {
        self.tables.notes.push(*note);
    }

    fn bind(&mut self, open: &Open) -> Option<Bound> {
        let overlay = self.ctx.engine.overlay();
        let (source, destination) = (Gid(open.source), Gid(open.destination));
        let tenant = overlay.tenant_of(self.tables.peer, open.tenant, source)?;
        let nic = self.ctx.engine.nic(overlay.find(&tenant, destination)?)?;
        if !nic.is_running() || !nic.gids.load().iter().any(|(_, gid)| gid == destination) {
            return None;
        }
        let qp = nic.qp(open.destination_qpn)?;
        if !answering::accept(&qp, open, self.tables.peer) {
            return None;
        }
        let key = key_of(nic.id, qp.id.qpn);
        let depth = qp.attrs.lock().attr.max_dest_rd_atomic;
        let answering = Answering::new(open.flow, nic, qp, destination);
        let bound = Bound { qp: key, incarnation: answering.to.incarnation, depth };
        if let Some(mut before) = self.tables.answering.insert(key, answering) {
            before.end();
        }
        Some(bound)
    }

    fn unbound(&mut self, qp: QpKey) {
        if let Some(mut answering) = self.tables.answering.remove(&qp) {
            answering.end();
        }
    }

    fn admit(&mut self, qp: QpKey, request: &Request) -> Verdict {
        let Some(answering) = self.tables.answering.get_mut(&qp) else { return Verdict::NotThere };
        if !answering.is_ready() {
            return Verdict::NotThere;
        }
        self.ctx.charge(cost::WQE);
        let Answering { to, job, .. } = answering;
        answering::describe(request, job);
        if job.wqe.op.takes_receive() && is_filled_by_nic(&to.qp) {
            return Verdict::Later(NIC_LOOK);
        }
        // Without a budget all is checked now: its bytes may come much later.
        match connected::admit(self.ctx, to, job, &mut Budget::empty(), 0) {
            Ok(Admission::Accepted) => {
                job.started = true;
                (answering.in_hand, answering.num_held) = (true, 0);
                self.tables.in_hand.push(qp);
                Verdict::Yes
            }
            Ok(Admission::NotReady) => {
                if to.qp.id.kind == QpType::Uc {
                    to.nic.counters.messages_dropped.add(1);
                }
                let code = to.qp.attrs.lock().attr.min_rnr_timer;
                Verdict::NotReady(Nanos(rc::rnr_timer(code).as_nanos() as u64))
            }
            Err(Failure::Remote(fault)) => Verdict::Refused(self.refuse(qp, &fault)),
            Err(_) => Verdict::Later(PAGE_LOOK),
        }
    }

    fn finish(&mut self, qp: QpKey, _request: &Request) -> Verdict {
        let Some(answering) = self.tables.answering.get_mut(&qp) else { return Verdict::NotThere };
        if !answering.is_ready() || !hold(answering, qp, &mut self.tables.in_hand) {
            return Verdict::NotThere;
        }
        let Answering { to, job, held, num_held, .. } = answering;
        self.ctx.paging.fault = job.fault.take();
        let done = connected::finish_at_peer(self.ctx, to, job, &held[..*num_held]);
        job.fault = self.ctx.paging.fault.take();
        match done {
            Ok(Progress::Done) => {
                (answering.in_hand, answering.num_held) = (false, 0);
                Verdict::Yes
            }
            Err(Failure::Remote(fault)) => Verdict::Refused(self.refuse(qp, &fault)),
            Ok(_) | Err(_) => Verdict::Later(PAGE_LOOK),
        }
    }

    fn atomic(&mut self, qp: QpKey, request: &Request) -> Result<u64, Verdict> {
        let Some(answering) = self.tables.answering.get_mut(&qp) else { return Err(Verdict::NotThere) };
        let Answering { to, job, .. } = answering;
        let Op::Atomic { remote_addr, rkey, action } = job.wqe.op else {
            return Err(Verdict::Refused(Refusal::Operation));
        };
        self.ctx.src.clear();
        self.ctx.paging.fault = job.fault.take();
        let at = Remote { need: Access::REMOTE_ATOMIC, addr: remote_addr, rkey };
        let found = self.ctx.reach(Side::Source, &to.nic, &to.qp.id, at, request.length.into());
        job.fault = self.ctx.paging.fault.take();
        let fault = match found {
            Ok(()) => match self.ctx.src[..] {
                // Addresses of a region need not be aligned as its memory is.
                [word] => match mem::atomic(word, action) {
                    Some(before) => return Ok(before),
                    None => Fault::INVALID,
                },
                _ => Fault::INVALID,
            },
            Err(Unreachable::Paging) => return Err(Verdict::Later(PAGE_LOOK)),
            Err(Unreachable::Refused(_)) => Fault::ACCESS,
        };
        Err(Verdict::Refused(self.refuse(qp, &fault)))
    }

    fn abandon(&mut self, qp: QpKey) {
        if let Some(answering) = self.tables.answering.get_mut(&qp) {
            answering.to.nic.counters.messages_dropped.add(1);
            answering.rest();
            answering.job.put_back_receive();
        }
    }

    fn posted(&mut self, qp: QpKey) -> Option<u32> {
        let answering = self.tables.answering.get_mut(&qp)?;
        answering.is_ready().then(|| answering.to.qp.recv.lock().own_posted())?
    }

    fn available(&mut self, source: &Source) -> Availability {
        if matches!(source.origin, Origin::Datagram(_)) || self.inline(source.origin).is_some() {
            return Availability::Now;
        }
        self.ctx.src.clear();
        match self.find(source.origin, source.offset.into(), source.len.into()) {
            Ok(()) => Availability::Now,
            Err(Unreachable::Paging) => Availability::Later(PAGE_LOOK),
            Err(Unreachable::Refused(_)) => {
                if let Origin::Read(qp, _) = source.origin {
                    self.fail_read(qp);
                }
                Availability::Refused
            }
        }
    }

    fn datagram(&mut self, datagram: &Datagram) -> bool {
        self.tables.arrived.clear();
        datagram::is_wanted(self.ctx, self.tables.peer, datagram)
    }

    fn datagram_landed(&mut self, datagram: &Datagram) {
        let payload = std::mem::take(&mut self.tables.arrived);
        self.tables.arrived = datagram::deliver(self.ctx, self.tables.peer, datagram, payload);
    }

    fn datagram_sent(&mut self, token: Token, sent: bool) {
        // What has a payload is needed until that is taken.
        if !sent || self.tables.datagrams.get(&token).is_some_and(Vec::is_empty) {
            self.tables.datagrams.remove(&token);
        }
    }

    fn answered(&mut self, token: Token, value: u64) {
        // Where it goes may be a page that is missing now.
        if let Some(job) = self.tables.flows.get_mut(&flow_of(token)).and_then(|flow| flow.job_mut(token)) {
            job.found = Some(value);
        }
    }

    fn completed(&mut self, token: Token, status: WcStatus) {
        let id = flow_of(token);
        if let Some(flow) = self.tables.flows.get_mut(&id) {
            if flow.finished.is_empty() {
                self.tables.finished.push(id);
            }
            flow.finished.push_back(status);
        }
    }
}
