//! Queue pairs of this host that take messages of other hosts.

use std::sync::Arc;

use freeflow_tcp::frame::{FlowId, Op as Does, Open, Request, Transport};
use freeflow_tcp::host::{QpKey, Refusal};
use virtio_rdma::ib::{QpType, SendFlags, WcStatus};

use crate::engine::job::Job;
use crate::mem::AtomicOp;
use crate::nic::Nic;
use crate::on_demand::Fault;
use crate::overlay::{Gid, NicId};
use crate::qp::{Binding, Qp, Requester};
use crate::tcp::PeerId;
use crate::wqe::{Flush, Op};

/// Bytes at the end of a message that become visible last, together.
pub(super) const HELD: usize = 64;

/// One queue pair, and the message that it is receiving.
#[derive(Debug)]
pub(super) struct Answering {
    /// The flow whose messages it takes. What is still on its way of another one is not for it.
    pub flow: FlowId,
    /// The queue pair, as a responder.
    pub to: Binding,
    /// Its GID that the peer sends to.
    gid: Gid,
    /// The present message: what it does, and its receive.
    pub job: Box<Job>,
    /// The last bytes of it.
    pub held: [u8; HELD],
    pub num_held: usize,
    /// The receive is in this worker's hand since this quantum.
    pub in_hand: bool,
    /// Page that a READ waits for.
    pub fault: Option<Arc<Fault>>,
}

/// How the protocol names a queue pair: all its lives are one to it.
pub(in super::super) fn key_of(nic: NicId, qpn: u32) -> QpKey {
    QpKey(u64::from(nic.0) << 32 | u64::from(qpn))
}

impl Answering {
    pub fn new(flow: FlowId, nic: Arc<Nic>, qp: Arc<Qp>, gid: Gid) -> Self {
        let (epoch, incarnation) = (nic.gid_epoch(), qp.incarnation());
        Self {
            flow,
            to: Binding { nic, qp, incarnation, gid_epochs: (0, epoch) },
            gid,
            job: Box::default(),
            held: [0; HELD],
            num_held: 0,
            in_hand: false,
            fault: None,
        }
    }

    /// Whether it is this life of the queue pair still.
    pub fn is_there(&self) -> bool {
        let Binding { nic, qp, incarnation, .. } = &self.to;
        let known = nic.qp(qp.id.qpn).is_some_and(|now| Arc::ptr_eq(&now, qp));
        known && qp.incarnation() == *incarnation
    }

    /// Whether it takes messages now, and its guest's memory may be touched.
    pub fn is_ready(&mut self) -> bool {
        let Binding { nic, qp, incarnation, gid_epochs } = &mut self.to;
        if !nic.is_running() || !qp.responds() || qp.incarnation() != *incarnation {
            return false;
        }
        let epoch = nic.gid_epoch();
        if gid_epochs.1 != epoch {
            if !nic.gids.load().iter().any(|(_, gid)| gid == self.gid) {
                return false;
            }
            gid_epochs.1 = epoch;
        }
        true
    }

    /// The receive that the message has is for others to flush until more of it comes.
    pub fn rest(&mut self) {
        if std::mem::take(&mut self.in_hand) {
            self.job.rest_receive(&self.to.qp);
        }
    }

    /// No more of its messages will come: a receive that one has is for others to flush; where messages get lost, for the next.
    pub fn end(&mut self) {
        self.rest();
        if self.to.qp.id.kind == QpType::Uc {
            self.job.put_back_receive();
        }
    }

    /// More of the message comes. False if its receive was flushed meanwhile.
    pub fn resume(&mut self) -> bool {
        self.in_hand = self.in_hand || self.job.resume_receive(&self.to.qp);
        self.in_hand
    }
}

/// Has a queue pair take this flow, if it is the peer that it names (IBA 9.6.1.1, as between two of one host).
pub(in super::super) fn accept(qp: &Qp, open: &Open, from: PeerId) -> bool {
    let reliable = open.transport == Transport::Rc;
    let kind = if reliable { QpType::Rc } else { QpType::Uc };
    if qp.id.kind != kind || !qp.responds() {
        return false;
    }
    let mut ours = qp.attrs.lock();
    let them = Requester { host: Some(from), incarnation: open.incarnation };
    let names_them = ours.attr.dest_qpn.get() == open.source_qpn && ours.attr.av.dgid == open.source;
    // A UC responder takes any PSN at the start of a message (IBA 9.8.2.2).
    let in_step = !reliable || ours.attr.rq_psn.get() == open.psn;
    let accepts_them = !reliable || ours.accepts.is_none_or(|only| only == them);
    let taken = names_them && in_step && accepts_them;
    if taken {
        ours.accepts = Some(them);
    }
    taken
}

/// The message as a work request of a peer on this host would be.
pub(super) fn describe(request: &Request, job: &mut Job) {
    job.clear();
    let wqe = &mut job.wqe;
    wqe.sges.clear();
    wqe.inline.clear();
    wqe.flags = if request.solicited { SendFlags::SOLICITED } else { SendFlags::empty() };
    wqe.length = request.length.into();
    wqe.imm = 0;
    wqe.op = match request.op {
        Does::Send(imm) => {
            wqe.imm = imm.unwrap_or(0);
            Op::Send { imm: imm.is_some() }
        }
        Does::SendInvalidate(rkey) => Op::SendInvalidate { rkey },
        Does::Write { at, imm } => {
            wqe.imm = imm.unwrap_or(0);
            Op::Write { imm: imm.is_some(), remote_addr: at.addr, rkey: at.rkey }
        }
        Does::Read { at, .. } => Op::Read { remote_addr: at.addr, rkey: at.rkey },
        Does::CompareSwap { at, compare, swap } => {
            Op::Atomic { remote_addr: at.addr, rkey: at.rkey, action: AtomicOp::CompareSwap { compare, swap } }
        }
        Does::FetchAdd { at, add } => {
            Op::Atomic { remote_addr: at.addr, rkey: at.rkey, action: AtomicOp::FetchAdd(add) }
        }
        Does::AtomicWrite { at, value } => {
            wqe.inline.extend_from_slice(&value.to_le_bytes());
            Op::AtomicWrite { remote_addr: at.addr, rkey: at.rkey }
        }
        Does::Flush { at, whole, persistent } => {
            // It has no payload; that is what it covers.
            wqe.length = 0;
            let length = request.length;
            Op::Flush(Flush { remote_addr: at.addr, length, rkey: at.rkey, persistent, whole })
        }
    };
}

/// What a responder tells a requester that is to fail so.
pub(super) fn refusal(status: WcStatus) -> Refusal {
    match status {
        WcStatus::RemAccessErr => Refusal::Access,
        WcStatus::RemOpErr => Refusal::Operation,
        _ => Refusal::Invalid,
    }
}
