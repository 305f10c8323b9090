//! Queue pairs: creation, states, posting.

use virtio_rdma::ctrl::{
    CreateQp, CreateQpResponse, Mcast, ModifyQp, NO_OBJECT, ObjectRequest, Opcode, QP_KERNEL, QpAttr,
};
use virtio_rdma::ib::{QpMask, QpState, QpType};
use virtio_rdma::ring::{RecvWqe, SendWqe};

use super::wr::{self, SendWr, Sge};
use super::{Cq, Pd, Ring, Srq};
use crate::guest::ctrl::{Request, Response};
use crate::guest::doorbell::{Doorbell, DoorbellArea};
use crate::guest::mem::Placement;
use crate::guest::{Error, Gid, Guest, Result};

/// What a QP is created with.
#[derive(Debug, Clone)]
pub struct QpSpec {
    /// Transport.
    pub kind: QpType,
    /// Work requests that the send queue holds at least.
    pub send_depth: u32,
    /// Work requests that the receive queue holds at least.
    pub recv_depth: u32,
    /// Most SGEs of a send.
    pub send_sges: u16,
    /// Most SGEs of a receive.
    pub recv_sges: u16,
    /// Most inline bytes.
    pub inline: u32,
    /// Whether every send makes a completion.
    pub signal_all: bool,
    /// Whether it is the kernel's alone.
    pub kernel: bool,
    /// Where the rings lie; the guest's way if not given.
    pub placement: Option<Placement>,
}

impl QpSpec {
    /// An RC QP with room for most tests.
    pub fn rc() -> Self {
        Self {
            kind: QpType::Rc,
            send_depth: 127,
            recv_depth: 127,
            send_sges: 4,
            recv_sges: 4,
            inline: 128,
            signal_all: false,
            kernel: false,
            placement: None,
        }
    }

    /// An RC QP of the kernel's.
    pub fn kernel() -> Self {
        Self { kernel: true, ..Self::rc() }
    }

    /// A UC QP with room for most tests.
    pub fn uc() -> Self {
        Self { kind: QpType::Uc, ..Self::rc() }
    }

    /// A UD QP with room for most tests.
    pub fn ud() -> Self {
        Self { kind: QpType::Ud, ..Self::rc() }
    }

    /// The QP of the general service interface.
    pub fn gsi() -> Self {
        Self { kind: QpType::Gsi, ..Self::rc() }
    }

    /// With queues of this depth.
    #[must_use]
    pub fn depth(self, depth: u32) -> Self {
        Self { send_depth: depth, recv_depth: depth, ..self }
    }

    /// With this many SGEs on both sides.
    #[must_use]
    pub fn sges(self, sges: u16) -> Self {
        Self { send_sges: sges, recv_sges: sges, ..self }
    }

    fn send_stride(&self) -> u32 {
        let data = (u32::from(self.send_sges) * size_of::<virtio_rdma::ring::Sge>() as u32).max(self.inline);
        (size_of::<SendWqe>() as u32 + data).next_power_of_two()
    }

    fn recv_stride(&self) -> u32 {
        let data = u32::from(self.recv_sges) * size_of::<virtio_rdma::ring::Sge>() as u32;
        (size_of::<RecvWqe>() as u32 + data).next_power_of_two()
    }
}

/// A queue pair. Posting is for one thread at a time.
#[derive(Debug)]
pub struct Qp {
    guest: Guest,
    generation: u64,
    number: u32,
    spec: QpSpec,
    sq: Ring,
    /// None with an SRQ.
    rq: Option<Ring>,
    doorbell: Doorbell,
    alive: bool,
    // Dropped after the QP itself, in this order.
    send_cq: Cq,
    recv_cq: Cq,
    _srq: Option<Srq>,
    pd: Pd,
}

impl Pd {
    /// A QP whose two queues complete into one CQ.
    pub fn create_qp(&self, spec: QpSpec, cq: &Cq) -> Result<Qp> {
        self.create_qp_on(spec, cq, cq)
    }

    /// A QP.
    pub fn create_qp_on(&self, spec: QpSpec, send_cq: &Cq, recv_cq: &Cq) -> Result<Qp> {
        self.create_qp_from(spec, send_cq, recv_cq, None)
    }

    /// A QP that takes its receives from an SRQ.
    pub fn create_qp_srq(&self, spec: QpSpec, cq: &Cq, srq: &Srq) -> Result<Qp> {
        self.create_qp_from(spec, cq, cq, Some(srq))
    }

    /// Many like that at once, with the commands in a pipeline.
    pub fn create_qps(&self, spec: &QpSpec, cq: &Cq, count: usize) -> Result<Vec<Qp>> {
        let draft = |_| QpDraft::new(self, spec.clone(), cq, cq, None);
        let drafts = (0..count).map(draft).collect::<Result<Vec<_>>>()?;
        let requests: Vec<_> = drafts.iter().map(|draft| draft.request.clone()).collect();
        let made = self.guest().pipeline(&requests)?;
        drafts.into_iter().zip(made).map(|(draft, made)| draft.finish(&made)).collect()
    }

    fn create_qp_from(&self, spec: QpSpec, send_cq: &Cq, recv_cq: &Cq, srq: Option<&Srq>) -> Result<Qp> {
        let draft = QpDraft::new(self, spec, send_cq, recv_cq, srq)?;
        let made = self.guest().send(&draft.request)?;
        draft.finish(&made)
    }
}

/// A QP that the device has still to make.
struct QpDraft {
    request: Request,
    generation: u64,
    spec: QpSpec,
    sq: Ring,
    rq: Option<Ring>,
    send_cq: Cq,
    recv_cq: Cq,
    srq: Option<Srq>,
    pd: Pd,
}

impl QpDraft {
    fn new(pd: &Pd, spec: QpSpec, send_cq: &Cq, recv_cq: &Cq, srq: Option<&Srq>) -> Result<Self> {
        let guest = pd.guest();
        let placement = spec.placement.unwrap_or(guest.placement());
        let ring =
            |depth: u32, stride| Ring::new(guest.memory(), (depth + 1).next_power_of_two().max(2), stride, placement);
        let sq = ring(spec.send_depth, spec.send_stride())?;
        let rq = srq.is_none().then(|| ring(spec.recv_depth, spec.recv_stride())).transpose()?;
        let (sq_desc, mut extents) = sq.desc();
        let (rq_desc, rq_extents) = rq.as_ref().map(Ring::desc).unwrap_or_default();
        extents.extend(rq_extents);
        let body = CreateQp {
            pdn: pd.number().into(),
            qp_type: spec.kind.to_wire(),
            sq_sig_all: spec.signal_all.into(),
            flags: if spec.kernel { QP_KERNEL } else { 0 }.into(),
            send_cqn: send_cq.number().into(),
            recv_cqn: recv_cq.number().into(),
            srqn: srq.map_or(NO_OBJECT, Srq::number).into(),
            max_send_sge: spec.send_sges.into(),
            max_recv_sge: spec.recv_sges.into(),
            max_inline_data: spec.inline.into(),
            sq: sq_desc,
            rq: rq_desc,
            ..CreateQp::default()
        };
        let request = Request::typed::<CreateQp, CreateQpResponse>(Opcode::CreateQp, &body, &extents);
        let generation = guest.generation();
        let (send_cq, recv_cq, pd) = (send_cq.clone(), recv_cq.clone(), pd.clone());
        Ok(Self { request, generation, spec, sq, rq, send_cq, recv_cq, srq: srq.cloned(), pd })
    }

    fn finish(self, made: &Response) -> Result<Qp> {
        let guest = self.pd.guest().clone();
        let made: CreateQpResponse = made.body()?;
        let doorbell = doorbell(&guest, &made)?;
        Ok(Qp {
            number: made.qpn.get(),
            guest,
            generation: self.generation,
            spec: self.spec,
            sq: self.sq,
            rq: self.rq,
            doorbell,
            alive: true,
            send_cq: self.send_cq,
            recv_cq: self.recv_cq,
            _srq: self.srq,
            pd: self.pd,
        })
    }
}

fn doorbell(guest: &Guest, made: &CreateQpResponse) -> Result<Doorbell> {
    let area = guest.doorbells().get(usize::from(made.doorbell_queue.get()));
    let area = area.ok_or(Error::BadResponse("doorbell queue that there is not"))?;
    if made.doorbell.get() >= guest.attr().max_doorbells.get() {
        return Err(Error::BadResponse("doorbell beyond the area"));
    }
    Ok(DoorbellArea::doorbell(area, made.doorbell.get()))
}

impl Qp {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// What it was created with.
    pub fn spec(&self) -> &QpSpec {
        &self.spec
    }

    /// Its protection domain.
    pub fn pd(&self) -> &Pd {
        &self.pd
    }

    /// CQ of its send queue.
    pub fn send_cq(&self) -> &Cq {
        &self.send_cq
    }

    /// CQ of its receive queue.
    pub fn recv_cq(&self) -> &Cq {
        &self.recv_cq
    }

    /// The guest that it belongs to.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Its send ring, also as raw memory.
    pub fn sq(&self) -> &Ring {
        &self.sq
    }

    /// Its receive ring, also as raw memory; panics when it uses an SRQ.
    pub fn rq(&self) -> &Ring {
        self.rq.as_ref().expect("a receive ring of its own")
    }

    /// Its doorbell.
    pub fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    /// Writes a list of work requests and rings the doorbell once. Writes none when there is no room for all.
    #[inline]
    pub fn post_send(&self, wrs: &[SendWr<'_>]) -> Result<()> {
        let mut index = self.sq.index();
        for wr in wrs {
            if !self.sq.has_room(index) {
                return Err(Error::Full);
            }
            self.sq.write_element(index, |slot| wr::write_send(slot, wr));
            index = self.sq.after(index);
        }
        self.sq.publish(index);
        self.doorbell.ring();
        Ok(())
    }

    /// Writes one work request and rings the doorbell.
    #[inline]
    pub fn post(&self, wr: SendWr<'_>) -> Result<()> {
        self.post_send(std::slice::from_ref(&wr))
    }

    /// Posts one receive.
    pub fn post_recv(&self, wr_id: u64, sges: &[Sge]) -> Result<()> {
        let rq = self.rq();
        let index = rq.index();
        if !rq.has_room(index) {
            return Err(Error::Full);
        }
        rq.write_element(index, |slot| wr::write_recv(slot, wr_id, sges));
        rq.publish(rq.after(index));
        Ok(())
    }

    /// Posts the same receive `count` times, in one list. Posts none when there is no room for all.
    pub fn post_recvs(&self, wr_id: u64, sges: &[Sge], count: usize) -> Result<()> {
        let rq = self.rq();
        let mut index = rq.index();
        for _ in 0..count {
            if !rq.has_room(index) {
                return Err(Error::Full);
            }
            rq.write_element(index, |slot| wr::write_recv(slot, wr_id, sges));
            index = rq.after(index);
        }
        rq.publish(index);
        Ok(())
    }

    /// The command that changes attributes.
    pub fn modify_request(&self, mask: QpMask, attr: QpAttr) -> Request {
        let body = ModifyQp { qpn: self.number.into(), attr_mask: mask.bits().into(), attr };
        Request::new(Opcode::ModifyQp, &body, &[], 0)
    }

    /// Changes attributes.
    pub fn modify(&self, mask: QpMask, attr: QpAttr) -> Result<()> {
        self.guest.send(&self.modify_request(mask, attr))?.ok()?;
        if mask.contains(QpMask::STATE) && attr.qp_state == QpState::Reset.to_wire() {
            self.sq.restart();
            if let Some(rq) = &self.rq {
                rq.restart();
            }
        }
        Ok(())
    }

    /// Changes the state alone.
    pub fn modify_state(&self, state: QpState) -> Result<()> {
        self.modify(QpMask::STATE, QpAttr { qp_state: state.to_wire(), ..QpAttr::default() })
    }

    /// Asks for the attributes.
    pub fn query(&self) -> Result<QpAttr> {
        let body = ObjectRequest { number: self.number.into(), reserved: 0.into() };
        self.guest.command(Opcode::QueryQp, &body, &[])
    }

    /// Asks for the state.
    pub fn state(&self) -> Result<QpState> {
        QpState::from_wire(self.query()?.qp_state).ok_or(Error::BadResponse("QP state"))
    }

    /// Joins a multicast group.
    pub fn attach(&self, mgid: Gid) -> Result<()> {
        self.mcast(Opcode::AttachMcast, mgid)
    }

    /// Leaves a multicast group.
    pub fn detach(&self, mgid: Gid) -> Result<()> {
        self.mcast(Opcode::DetachMcast, mgid)
    }

    fn mcast(&self, opcode: Opcode, mgid: Gid) -> Result<()> {
        self.guest.command_ok(opcode, &Mcast { qpn: self.number.into(), mgid, ..Mcast::default() }, &[])
    }

    /// Destroys it, and says how that went.
    pub fn destroy(mut self) -> Result<()> {
        self.alive = false;
        let body = ObjectRequest { number: self.number.into(), reserved: 0.into() };
        self.guest.command_ok(Opcode::DestroyQp, &body, &[])
    }
}

impl Drop for Qp {
    fn drop(&mut self) {
        if self.alive {
            self.guest.destroy(self.generation, Opcode::DestroyQp, self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_have_room() {
        let spec = QpSpec { send_sges: 1, inline: 0, recv_sges: 1, ..QpSpec::rc() };
        assert_eq!((spec.send_stride(), spec.recv_stride()), (256, 64));
        let spec = QpSpec { send_sges: 32, inline: 0, recv_sges: 32, ..QpSpec::rc() };
        assert_eq!((spec.send_stride(), spec.recv_stride()), (1024, 1024));
    }
}
