//! Shared receive queues.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_rdma::ctrl::{CreateSrq, ModifySrq, ObjectResponse, ResizeSrq, SrqAttr};
use virtio_rdma::event::EventType;

use super::parse::RawExtent;
use super::queues::unresized;
use super::{Answer, Control, Refusal, answer, nothing};
use crate::ring::rxe::Caps;
use crate::srq::Srq;

impl Control {
    pub(super) fn create_srq(&mut self, args: &CreateSrq, extents: &[RawExtent]) -> Answer {
        let profile = &self.nic.config.profile;
        if args.reserved.get() != 0 || args.reserved1.get() != 0 {
            return Err(Refusal::Reserved);
        }
        self.check_pd(args.pdn.get())?;
        if u32::from(args.max_sge.get()) > profile.max_sge {
            return Err(Refusal::Value("SGEs"));
        }
        let srqn = self.srqs.vacant(profile.max_srq).ok_or(Refusal::Quota("shared receive queues"))?;
        let caps = Caps { max_sge: args.max_sge.get().into(), max_inline: 0, datagram: false, kernel: false };
        let ring = self.ring(&args.ring, extents, caps.recv_element())?;
        let srq = Srq::new(srqn, args.pdn.get(), ring, caps);
        if !srq.set_limit(args.limit.get()) {
            return Err(Refusal::Value("limit"));
        }
        self.enter_pd(srq.pdn);
        self.ring_bytes += srq.ring_bytes.load(Ordering::Relaxed);
        self.srqs.insert(Arc::new(srq));
        Ok(answer(&ObjectResponse { number: srqn.into(), ..ObjectResponse::default() }))
    }

    pub(super) fn modify_srq(&mut self, args: ModifySrq) -> Answer {
        let srq = self.srq(args.srqn.get())?;
        if srq.set_limit(args.limit.get()) { Ok(nothing()) } else { Err(Refusal::Value("limit")) }
    }

    pub(super) fn resize_srq(&mut self, args: &ResizeSrq, extents: &[RawExtent]) -> Answer {
        let srq = self.srq(args.srqn.get())?;
        if args.reserved.get() != 0 {
            return Err(Refusal::Reserved);
        }
        let ring = self.ring(&args.ring, extents, srq.element())?;
        let before = srq.ring_bytes.load(Ordering::Relaxed);
        srq.resize(ring).map_err(unresized)?;
        self.ring_bytes += srq.ring_bytes.load(Ordering::Relaxed);
        self.ring_bytes -= before;
        Ok(nothing())
    }

    pub(super) fn query_srq(&mut self, srqn: u32) -> Answer {
        Ok(answer(&SrqAttr { limit: self.srq(srqn)?.limit().into(), ..SrqAttr::default() }))
    }

    pub(super) fn destroy_srq(&mut self, srqn: u32) -> Answer {
        let srq = self.srq(srqn)?;
        if srq.users.load(Ordering::Relaxed) > 0 {
            return Err(Refusal::Busy("shared receive queue"));
        }
        srq.close();
        self.srqs.remove(srqn);
        self.ring_bytes -= srq.ring_bytes.load(Ordering::Relaxed);
        self.leave_pd(srq.pdn);
        self.engine.quiesce().wait();
        Ok(nothing())
    }

    pub(super) fn srq(&self, srqn: u32) -> Result<Arc<Srq>, Refusal> {
        self.srqs.get(srqn).cloned().ok_or(Refusal::NotFound("shared receive queue"))
    }

    /// Shared receive queues whose memory is gone fail.
    pub(super) fn drop_lost_srqs(&mut self) {
        for srq in self.srqs.iter() {
            if srq.close_if_gone(&self.map) {
                self.nic.raise(EventType::SrqError, srq.srqn);
            }
        }
    }
}
