//! Completion queues and queue pairs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_rdma::ctrl::{
    CreateCq, CreateQp, CreateQpResponse, ModifyQp, NO_OBJECT, ObjectResponse, QP_KERNEL, QpAttr, ResizeCq, RingDesc,
};
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{Access, GSI_QPN, QpMask, QpState, QpType};
use virtio_rdma::ring::RXE_CQE_STRIDE;

use super::parse::RawExtent;
use super::{Answer, Control, Refusal, answer, nothing};
use crate::cq::Cq;
use crate::nic::keys::random_qpn;
use crate::overlay::Gid;
use crate::profile::Profile;
use crate::qp::state::allowed;
use crate::qp::{Identity, Qp, RecvQueue, RecvRing, RecvSource, SendQueue};
use crate::ring::rxe::Caps;
use crate::ring::{Geometry, ResizeError, Ring};

/// How often it is looked whether a queue pair has sent everything.
const LISTENING: Duration = Duration::from_micros(50);
/// Others are not waited for so soon after one that did not come to an end.
const IMPATIENCE: Duration = Duration::from_secs(1);

impl Control {
    pub(super) fn create_cq(&mut self, args: &CreateCq, extents: &[RawExtent]) -> Answer {
        let profile = &self.nic.config.profile;
        let vector = usize::from(args.vector.get());
        if vector >= self.nic.events.len() {
            return Err(Refusal::Value("completion vector"));
        }
        if args.reserved != [0; 6] {
            return Err(Refusal::Reserved);
        }
        let arm = self.arm.clone().ok_or(Refusal::State("no area for arm words"))?;
        let cqn = self.cqs.vacant(profile.max_cq).ok_or(Refusal::Quota("completion queues"))?;
        let ring = self.completion_ring(&args.ring, extents)?;
        self.ring_bytes += ring.geometry().size() as u64;
        self.cqs.insert(Arc::new(Cq::new(cqn, vector, ring, arm)));
        Ok(answer(&ObjectResponse { number: cqn.into(), ..ObjectResponse::default() }))
    }

    fn completion_ring(&self, desc: &RingDesc, extents: &[RawExtent]) -> Result<Ring, Refusal> {
        let max_entries = (self.nic.config.profile.max_cqe + 1).next_power_of_two();
        let geometry = Geometry::parse(desc, max_entries, RXE_CQE_STRIDE as usize);
        self.new_ring(geometry.ok_or(Refusal::Value("completion ring"))?, extents, "completion ring")
    }

    pub(super) fn resize_cq(&mut self, args: &ResizeCq, extents: &[RawExtent]) -> Answer {
        let cq = self.cq(args.cqn.get())?;
        if args.reserved.get() != 0 {
            return Err(Refusal::Reserved);
        }
        let ring = self.completion_ring(&args.ring, extents)?;
        let before = cq.ring_bytes.load(Ordering::Relaxed);
        cq.resize(ring).map_err(unresized)?;
        self.ring_bytes += cq.ring_bytes.load(Ordering::Relaxed);
        self.ring_bytes -= before;
        Ok(nothing())
    }

    pub(super) fn destroy_cq(&mut self, cqn: u32) -> Answer {
        let cq = self.cq(cqn)?;
        if cq.users.load(Ordering::Relaxed) > 0 {
            return Err(Refusal::Busy("completion queue"));
        }
        cq.close();
        self.ring_bytes -= cq.ring_bytes.load(Ordering::Relaxed);
        self.cqs.remove(cqn);
        self.engine.quiesce().wait();
        Ok(nothing())
    }

    fn cq(&self, cqn: u32) -> Result<Arc<Cq>, Refusal> {
        self.cqs.get(cqn).cloned().ok_or(Refusal::NotFound("completion queue"))
    }

    pub(super) fn create_qp(&mut self, args: &CreateQp, sq: &[RawExtent], rq: &[RawExtent]) -> Answer {
        let kind = self.check_create(args)?;
        let kernel = args.flags.get() & QP_KERNEL != 0;
        let caps = |max_sge: u16, max_inline| Caps {
            max_sge: max_sge.into(),
            max_inline,
            datagram: kind.is_datagram(),
            kernel,
        };
        let send_caps = caps(args.max_send_sge.get(), args.max_inline_data.get());
        let recv_caps = caps(args.max_recv_sge.get(), 0);
        let send_ring = self.ring(&args.sq, sq, send_caps.send_element())?;
        let source = self.recv_source(args, rq, recv_caps)?;
        let srq = source.srq().cloned();
        let ring_bytes = (send_ring.geometry().size() + source.ring_size()) as u64;
        self.check_ring_bytes(ring_bytes)?;
        let (send_cq, recv_cq) = (self.cq(args.send_cqn.get())?, self.cq(args.recv_cqn.get())?);
        let queue = self.qps_created % self.nic.doorbells.len();
        let doorbell = self.free_doorbell(queue)?;
        let qpn = self.choose_qpn(kind)?;
        send_cq.users.fetch_add(1, Ordering::Relaxed);
        recv_cq.users.fetch_add(1, Ordering::Relaxed);
        if let Some(srq) = &srq {
            srq.users.fetch_add(1, Ordering::Relaxed);
        }
        let id = Identity {
            qpn,
            kind,
            pdn: args.pdn.get(),
            srq,
            doorbell_queue: queue,
            doorbell,
            ring_bytes,
            signal_all: args.sq_sig_all == 1,
            send_cq,
            recv_cq,
        };
        let qp = Qp::new(id, SendQueue::new(send_ring, send_caps), RecvQueue::new(source));
        self.insert_qp(&Arc::new(qp));
        Ok(answer(&CreateQpResponse {
            qpn: qpn.into(),
            doorbell_queue: (queue as u16).into(),
            doorbell: doorbell.into(),
            ..CreateQpResponse::default()
        }))
    }

    /// Numbers are random, but for the one that management datagrams go to.
    fn choose_qpn(&self, kind: QpType) -> Result<u32, Refusal> {
        let taken = |qpn| self.nic.qp(qpn).is_some();
        match kind {
            QpType::Gsi if taken(GSI_QPN) => Err(Refusal::Busy("the general service interface")),
            QpType::Gsi => Ok(GSI_QPN),
            _ => Ok(random_qpn(taken)),
        }
    }

    /// Where the receives of a new QP come from.
    fn recv_source(&self, args: &CreateQp, rq: &[RawExtent], caps: Caps) -> Result<RecvSource, Refusal> {
        if args.srqn.get() == NO_OBJECT {
            let ring = self.ring(&args.rq, rq, caps.recv_element())?;
            return Ok(RecvSource::Own(RecvRing::new(ring, caps)));
        }
        let srq = self.srq(args.srqn.get())?;
        if args.rq.entries.get() != 0 || !rq.is_empty() {
            return Err(Refusal::Value("a receive ring beside a shared receive queue"));
        }
        Ok(RecvSource::Shared(srq))
    }

    fn check_create(&self, args: &CreateQp) -> Result<QpType, Refusal> {
        let profile = &self.nic.config.profile;
        let kind = QpType::from_wire(args.qp_type).ok_or(Refusal::Value("QP type"))?;
        if !Profile::QP_TYPES.contains(&kind) {
            return Err(Refusal::NotOffered("this QP type"));
        }
        if args.sq_sig_all > 1 || args.flags.get() & !QP_KERNEL != 0 || args.reserved.iter().any(|r| r.get() != 0) {
            return Err(Refusal::Reserved);
        }
        self.check_pd(args.pdn.get())?;
        let sges = args.max_send_sge.get().max(args.max_recv_sge.get());
        if u32::from(sges) > profile.max_sge || args.max_inline_data.get() > profile.max_inline_data {
            return Err(Refusal::Value("SGEs or inline data"));
        }
        if self.nic.qps.len() >= profile.max_qp as usize {
            return Err(Refusal::Quota("queue pairs"));
        }
        Ok(kind)
    }

    pub(super) fn ring(&self, desc: &RingDesc, extents: &[RawExtent], element: usize) -> Result<Ring, Refusal> {
        let max_entries = (self.nic.config.profile.max_qp_wr + 1).next_power_of_two();
        let geometry = Geometry::parse(desc, max_entries, element).ok_or(Refusal::Value("work ring"))?;
        self.new_ring(geometry, extents, "work ring")
    }

    /// Rings that lie in different memory are together no larger than guest memory. More than that is the same memory many
    /// times, and would cost the host without bound.
    fn check_ring_bytes(&self, more: u64) -> Result<(), Refusal> {
        if self.ring_bytes + more > self.map.size() { Err(Refusal::Quota("memory of rings")) } else { Ok(()) }
    }

    fn new_ring(&self, geometry: Geometry, extents: &[RawExtent], what: &'static str) -> Result<Ring, Refusal> {
        self.check_ring_bytes(geometry.size() as u64)?;
        Ring::new(&self.map, geometry, extents).ok_or(Refusal::Memory(what))
    }

    fn free_doorbell(&self, queue: usize) -> Result<u32, Refusal> {
        let queue = &self.nic.doorbells[queue];
        if queue.area.read().is_none() {
            return Err(Refusal::State("no doorbell area"));
        }
        let slot = queue.slots.read().vacant(self.nic.config.profile.doorbells());
        slot.ok_or(Refusal::Quota("doorbells"))
    }

    fn insert_qp(&mut self, qp: &Arc<Qp>) {
        self.enter_pd(qp.id.pdn);
        self.qps_created += 1;
        self.ring_bytes += qp.id.ring_bytes;
        self.nic.doorbells[qp.id.doorbell_queue].slots.write().insert(qp.clone());
        self.nic.qps.set(qp.id.qpn, Some(qp));
    }

    pub(super) fn qp(&self, qpn: u32) -> Result<Arc<Qp>, Refusal> {
        self.nic.qp(qpn).ok_or(Refusal::NotFound("queue pair"))
    }

    pub(super) fn destroy_qp(&mut self, qpn: u32) -> Answer {
        let qp = self.qp(qpn)?;
        if qp.groups.load(Ordering::Relaxed) > 0 {
            return Err(Refusal::Busy("queue pair in a multicast group"));
        }
        self.hear_last_words(&qp);
        self.nic.qps.set(qpn, None);
        self.nic.doorbells[qp.id.doorbell_queue].slots.write().remove(qp.id.doorbell);
        qp.close();
        let windows = self.nic.keys.release(qpn);
        self.engine.quiesce().wait();
        drop(windows);
        self.leave_pd(qp.id.pdn);
        self.ring_bytes -= qp.id.ring_bytes;
        qp.id.send_cq.users.fetch_sub(1, Ordering::Relaxed);
        qp.id.recv_cq.users.fetch_sub(1, Ordering::Relaxed);
        if let Some(srq) = &qp.id.srq {
            srq.users.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(nothing())
    }

    /// What was posted to an unreliable queue pair before it is destroyed is sent: a NIC would have done so meanwhile, and who sends datagrams and
    /// ends (`mckey`) waits for no completion. Who cannot be heard to the end is not waited for again in the next second, nor are others: one
    /// process with many queue pairs must not hold up the commands of all.
    fn hear_last_words(&mut self, qp: &Qp) {
        let (started, limit) = (Instant::now(), self.engine.config().last_words);
        let speaks = qp.id.kind != QpType::Rc && qp.state() == QpState::Rts;
        if !speaks || self.impatient_until.is_some_and(|at| started < at) {
            return;
        }
        while qp.send.lock().has_more() {
            if started.elapsed() >= limit {
                self.impatient_until = Some(Instant::now() + IMPATIENCE);
                return;
            }
            std::thread::sleep(LISTENING);
        }
    }

    pub(super) fn query_qp(&mut self, qpn: u32) -> Answer {
        let qp = self.qp(qpn)?;
        let mut attr = qp.attrs.lock().attr;
        attr.qp_state = qp.state().to_wire();
        attr.cur_qp_state = attr.qp_state;
        attr.sq_draining = u8::from(qp.state() == QpState::Sqd && qp.send.lock().is_busy());
        Ok(answer(&attr))
    }

    pub(super) fn modify_qp(&mut self, args: &ModifyQp) -> Answer {
        let qp = self.qp(args.qpn.get())?;
        let mask = QpMask::from_bits(args.attr_mask.get()).ok_or(Refusal::Value("attribute mask"))?;
        let attr = &args.attr;
        if attr.reserved != [0; 6] || attr.av.reserved != [0; 7] {
            return Err(Refusal::Reserved);
        }
        check_attributes(mask, attr, self.nic.config.profile.max_rd_atomic, self.nic.config.profile.max_gids)?;
        // The worker must not see a state with another state's attributes: it is kept out meanwhile.
        let mut send = qp.send.lock();
        let now = qp.state();
        let named = QpState::from_wire(attr.cur_qp_state).filter(|_| mask.contains(QpMask::CUR_STATE));
        let from = named.unwrap_or(now);
        if named.is_some_and(|n| n != now) {
            return Err(Refusal::State("the QP is not in the state named"));
        }
        let to = if mask.contains(QpMask::STATE) {
            QpState::from_wire(attr.qp_state).ok_or(Refusal::Value("state"))?
        } else {
            from
        };
        if !allowed(qp.id.kind, from, to, mask, named) {
            return Err(Refusal::State("this transition"));
        }
        if matches!(to, QpState::Reset | QpState::Err) {
            drop(send);
            self.end_life(&qp, to);
            return Ok(nothing());
        }
        if to == QpState::Rtr && send.nic.is_none() {
            self.add_end(&qp, &mut send, Gid(attr.av.dgid))?;
        }
        qp.change_attrs(|old| apply(mask, attr, old));
        let notify = mask.contains(QpMask::EN_SQD_ASYNC_NOTIFY) && attr.en_sqd_async_notify != 0;
        send.notify_drained = to == QpState::Sqd && (notify || (now == QpState::Sqd && send.notify_drained));
        if mask.contains(QpMask::AV) {
            send.binding = None;
        }
        if !qp.change_state(now, to) {
            return Err(Refusal::State("the QP has failed meanwhile"));
        }
        drop(send);
        self.engine.attend(&self.nic, &qp);
        Ok(nothing())
    }

    /// Takes a QP to RESET or ERR. When this returns no message of before is still moving.
    fn end_life(&self, qp: &Arc<Qp>, to: QpState) {
        qp.set_state(to);
        self.engine.quiesce().wait();
        if to == QpState::Reset {
            // No worker uses them any more: only work requests of this QP's peer could.
            drop(self.nic.keys.release(qp.id.qpn));
            if qp.end().is_some() {
                // Not made to fail first: the NIC would complete what nobody is to hear of. What a worker has of it already is seen to.
                qp.leave_nic();
                self.engine.quiesce().wait();
            }
            let mut send = qp.send.lock();
            qp.start_over();
            send.reset();
            qp.recv.lock().reset();
        } else if let Some(end) = qp.end() {
            end.fail();
        }
        self.engine.attend(&self.nic, qp);
    }

    /// Queues whose memory is gone fail.
    pub(super) fn drop_lost_queues(&mut self) {
        for cq in self.cqs.iter() {
            if cq.close_if_gone(&self.map) && cq.first_break() {
                self.nic.raise(EventType::CqError, cq.cqn);
            }
        }
        self.drop_lost_srqs();
        for qp in self.nic.qps.all() {
            let send_gone = qp.send.lock().close_if_gone(&self.map);
            let recv_gone = qp.recv.lock().close_if_gone(&self.map);
            if send_gone || recv_gone {
                qp.set_state(QpState::Err);
                self.nic.raise(EventType::QpFatal, qp.id.qpn);
            }
        }
    }
}

/// Copies the attributes that `mask` names.
fn apply(mask: QpMask, new: &QpAttr, old: &mut QpAttr) {
    macro_rules! take {
        ($($flag:ident: $field:ident;)*) => {
            $(if mask.contains(QpMask::$flag) { old.$field = new.$field; })*
        };
    }
    take! {
        ACCESS_FLAGS: access_flags;
        PKEY_INDEX: pkey_index;
        PORT: port_num;
        QKEY: qkey;
        AV: av;
        PATH_MTU: path_mtu;
        TIMEOUT: timeout;
        RETRY_CNT: retry_cnt;
        RNR_RETRY: rnr_retry;
        RQ_PSN: rq_psn;
        MAX_QP_RD_ATOMIC: max_rd_atomic;
        MIN_RNR_TIMER: min_rnr_timer;
        SQ_PSN: sq_psn;
        MAX_DEST_RD_ATOMIC: max_dest_rd_atomic;
        DEST_QPN: dest_qpn;
        EN_SQD_ASYNC_NOTIFY: en_sqd_async_notify;
    }
}

fn check_attributes(mask: QpMask, attr: &QpAttr, max_rd_atomic: u32, max_gids: u32) -> Result<(), Refusal> {
    let wrong = |flag, bad: bool| mask.contains(flag) && bad;
    let refused = QpMask::ALT_PATH | QpMask::PATH_MIG_STATE | QpMask::CAP;
    if mask.intersects(refused) {
        return Err(Refusal::NotOffered("this attribute"));
    }
    let field = match () {
        () if wrong(QpMask::PORT, attr.port_num != 1) => "port",
        () if wrong(QpMask::PKEY_INDEX, attr.pkey_index.get() != 0) => "P_Key index",
        () if wrong(QpMask::PATH_MTU, !(1..=5).contains(&attr.path_mtu)) => "path MTU",
        () if wrong(QpMask::TIMEOUT, attr.timeout > 31) => "timeout",
        () if wrong(QpMask::RETRY_CNT, attr.retry_cnt > 7) => "retry count",
        () if wrong(QpMask::RNR_RETRY, attr.rnr_retry > 7) => "RNR retry count",
        () if wrong(QpMask::MIN_RNR_TIMER, attr.min_rnr_timer > 31) => "RNR timer",
        () if wrong(QpMask::MAX_QP_RD_ATOMIC, u32::from(attr.max_rd_atomic) > max_rd_atomic) => "max_rd_atomic",
        () if wrong(QpMask::MAX_DEST_RD_ATOMIC, u32::from(attr.max_dest_rd_atomic) > max_rd_atomic) => {
            "max_dest_rd_atomic"
        }
        () if wrong(QpMask::DEST_QPN, attr.dest_qpn.get() >> 24 != 0) => "destination QP number",
        () if wrong(QpMask::RQ_PSN, attr.rq_psn.get() >> 24 != 0) => "receive PSN",
        () if wrong(QpMask::SQ_PSN, attr.sq_psn.get() >> 24 != 0) => "send PSN",
        () if wrong(QpMask::AV, u32::from(attr.av.sgid_index.get()) >= max_gids) => "source GID index",
        () if wrong(QpMask::ACCESS_FLAGS, Access::from_bits(attr.access_flags.get()).is_none()) => "access flags",
        () => return Ok(()),
    };
    Err(Refusal::Value(field))
}

/// Why a ring was not exchanged.
pub(super) fn unresized(error: ResizeError) -> Refusal {
    match error {
        ResizeError::TooSmall => Refusal::Value("size: what is in the ring does not fit"),
        ResizeError::Broken => Refusal::State("the ring is broken"),
    }
}
