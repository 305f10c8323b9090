#![expect(unsafe_code, reason = "calls libibverbs")]
//! A queue pair.

use std::cell::RefCell;
use std::ffi::c_int;
use std::io;
use std::mem::MaybeUninit;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use rdma_sys::{
    atomic_t, bind_mw_tso_union_t, ibv_ah_attr, ibv_create_qp, ibv_destroy_qp, ibv_gid, ibv_global_route,
    ibv_modify_qp, ibv_post_recv, ibv_post_send, ibv_qp, ibv_qp_attr, ibv_qp_attr_mask as mask, ibv_qp_init_attr,
    ibv_qp_state, ibv_qp_type, ibv_recv_wr, ibv_send_wr, ibv_sge, ibv_wr_opcode, imm_data_invalidated_rkey_union_t,
    qp_type_t, rdma_t, tso_t, wr_t,
};
use virtio_rdma::ib::QpType;

use super::super::device::{
    Access, Capacity, Connection, DeviceError, PostError, PostedOp, QueuePair, RecvRequest, SendList, SendRequest,
    Sending,
};
use super::completions::Completions;
use super::context::{errno, last_error};
use super::region::Domain;
use crate::mem::AtomicOp;
use crate::wqe::Sge;

/// Routers that a packet may pass.
const HOP_LIMIT: u8 = 64;
/// RNR retries without end: there is a receive before there is a message, so that one is not found only if it is late.
const RNR_FOR_EVER: u8 = 7;
/// Code of 0.01 ms.
const RNR_TIMER: u8 = 1;

/// Access flags that a queue pair has.
const ON_QUEUE_PAIR: Access = Access::REMOTE_WRITE.union(Access::REMOTE_READ).union(Access::REMOTE_ATOMIC);

/// A queue pair of the device.
#[derive(Debug)]
pub struct Pair {
    qp: NonNull<ibv_qp>,
    kind: QpType,
    domain: Arc<Domain>,
    cq: Arc<Completions>,
}

// SAFETY: libibverbs may be called for one queue pair from many threads at a time.
unsafe impl Send for Pair {}
// SAFETY: as above.
unsafe impl Sync for Pair {}

impl Pair {
    /// One in INIT.
    pub fn create(domain: &Arc<Domain>, cq: &Arc<Completions>, kind: QpType, capacity: Capacity) -> io::Result<Self> {
        let qp_type = match kind {
            QpType::Rc => ibv_qp_type::IBV_QPT_RC,
            QpType::Uc => ibv_qp_type::IBV_QPT_UC,
            QpType::Ud | QpType::Gsi => return Err(io::ErrorKind::Unsupported.into()),
        };
        let mut init = ibv_qp_init_attr {
            qp_context: null_mut(),
            send_cq: cq.as_ptr(),
            recv_cq: cq.as_ptr(),
            srq: null_mut(),
            cap: rdma_sys::ibv_qp_cap {
                max_send_wr: capacity.sends,
                max_recv_wr: capacity.recvs,
                max_send_sge: capacity.sges,
                max_recv_sge: capacity.sges,
                max_inline_data: capacity.inline,
            },
            qp_type,
            sq_sig_all: 0,
        };
        let made = cq.make(|| {
            // SAFETY: domain and completion queue are there, and kept as long as the queue pair.
            unsafe { ibv_create_qp(domain.as_ptr(), &raw mut init) }
        });
        let qp = NonNull::new(made).ok_or_else(last_error)?;
        let pair = Self { qp, kind, domain: domain.clone(), cq: cq.clone() };
        let mut attr = attributes(ibv_qp_state::IBV_QPS_INIT);
        attr.port_num = domain.shared.port;
        pair.modify(attr, mask::IBV_QP_PKEY_INDEX | mask::IBV_QP_PORT | mask::IBV_QP_ACCESS_FLAGS)?;
        Ok(pair)
    }

    fn modify(&self, mut attr: ibv_qp_attr, what: mask) -> io::Result<()> {
        // SAFETY: the queue pair is there, and the attributes are a structure of their own.
        errno(unsafe { ibv_modify_qp(self.qp.as_ptr(), &raw mut attr, (what | mask::IBV_QP_STATE).0 as c_int) })
    }

    fn to_rtr(&self, to: &Connection) -> io::Result<()> {
        let shared = &self.domain.shared;
        let mut attr = attributes(ibv_qp_state::IBV_QPS_RTR);
        attr.path_mtu = u32::from(to.mtu.min(shared.context.port(shared.port)?.mtu));
        attr.dest_qp_num = to.peer.qpn;
        attr.rq_psn = to.peer.psn;
        attr.qp_access_flags = (to.access & ON_QUEUE_PAIR).bits();
        attr.max_dest_rd_atomic = to.answers;
        attr.min_rnr_timer = RNR_TIMER;
        attr.ah_attr = ibv_ah_attr {
            grh: ibv_global_route {
                dgid: ibv_gid { raw: to.peer.gid.0 },
                flow_label: 0,
                sgid_index: shared.gid().0,
                hop_limit: HOP_LIMIT,
                traffic_class: 0,
            },
            is_global: 1,
            port_num: shared.port,
            ..attr.ah_attr
        };
        let all = mask::IBV_QP_AV | mask::IBV_QP_PATH_MTU | mask::IBV_QP_DEST_QPN | mask::IBV_QP_RQ_PSN;
        let reliable = mask::IBV_QP_MAX_DEST_RD_ATOMIC | mask::IBV_QP_MIN_RNR_TIMER;
        self.modify(attr, if self.is_reliable() { all | reliable } else { all } | mask::IBV_QP_ACCESS_FLAGS)
    }

    fn to_rts(&self, to: Sending) -> io::Result<()> {
        let mut attr = attributes(ibv_qp_state::IBV_QPS_RTS);
        (attr.sq_psn, attr.timeout, attr.retry_cnt, attr.rnr_retry) = (to.psn, to.timeout, to.retry_cnt, RNR_FOR_EVER);
        attr.max_rd_atomic = to.reads;
        let reliable =
            mask::IBV_QP_TIMEOUT | mask::IBV_QP_RETRY_CNT | mask::IBV_QP_RNR_RETRY | mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(attr, if self.is_reliable() { mask::IBV_QP_SQ_PSN | reliable } else { mask::IBV_QP_SQ_PSN })
    }

    fn is_reliable(&self) -> bool {
        self.kind == QpType::Rc
    }
}

fn attributes(state: ibv_qp_state::Type) -> ibv_qp_attr {
    // SAFETY: all zeroes is a value of this structure of numbers.
    let mut attr: ibv_qp_attr = unsafe { MaybeUninit::zeroed().assume_init() };
    attr.qp_state = state;
    attr
}

impl QueuePair for Pair {
    fn number(&self) -> u32 {
        // SAFETY: the queue pair is there.
        unsafe { self.qp.as_ref() }.qp_num
    }

    fn connect(&self, connection: &Connection) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::System { what: "the queue pair cannot be connected", source };
        self.to_rtr(connection).map_err(failed)
    }

    fn start_sending(&self, sending: Sending) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::System { what: "the queue pair cannot be made to send", source };
        self.to_rts(sending).map_err(failed)
    }

    fn fail(&self) {
        if let Err(error) = self.modify(attributes(ibv_qp_state::IBV_QPS_ERR), mask::IBV_QP_STATE) {
            log::warn!("a queue pair of the host's NIC cannot be moved to ERR: {error}");
        }
    }

    fn post_send(&self, list: &SendList) -> Result<(), PostError> {
        CHAIN.with_borrow_mut(|chain| {
            let first = chain.link(list);
            let mut bad: *mut ibv_send_wr = null_mut();
            // SAFETY: the queue pair is there. The chain ends, and its work requests, SGEs and inline bytes are where it says until the call
            // returns; what they name is checked by the device against keys.
            let result = unsafe { ibv_post_send(self.qp.as_ptr(), first, &raw mut bad) };
            if result == 0 { Ok(()) } else { Err(PostError { posted: chain.position(bad) }) }
        })
    }

    fn post_recv(&self, request: &RecvRequest<'_>) -> Result<(), PostError> {
        CHAIN.with_borrow_mut(|chain| {
            let (sg_list, num_sge) = chain.sges_of(request.sges);
            let mut wr = ibv_recv_wr { wr_id: request.id, next: null_mut(), sg_list, num_sge };
            let mut bad: *mut ibv_recv_wr = null_mut();
            // SAFETY: as for sends.
            let result = unsafe { ibv_post_recv(self.qp.as_ptr(), &raw mut wr, &raw mut bad) };
            if result == 0 { Ok(()) } else { Err(PostError { posted: 0 }) }
        })
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let number = self.number();
        self.cq.destroy(number, || {
            // SAFETY: nobody uses the queue pair after this.
            if let Err(error) = errno(unsafe { ibv_destroy_qp(self.qp.as_ptr()) }) {
                log::error!("the host's NIC keeps queue pair {number:#x}: {error}");
            }
        });
    }
}

thread_local! {
    static CHAIN: RefCell<Chain> = RefCell::default();
}

/// Work requests as the library wants them. Used again and again.
#[derive(Default)]
struct Chain {
    wrs: Vec<ibv_send_wr>,
    sges: Vec<ibv_sge>,
}

impl Chain {
    /// Of a list; null for an empty one.
    fn link(&mut self, list: &SendList) -> *mut ibv_send_wr {
        self.wrs.clear();
        self.sges.clear();
        for request in list.requests() {
            let inline = list.inline(request);
            if inline.is_empty() {
                self.sges.extend(list.sges(request).iter().map(sge));
            } else {
                self.sges.push(ibv_sge { addr: inline.as_ptr() as u64, length: inline.len() as u32, lkey: 0 });
            }
            self.wrs.push(work_request(request, list));
        }
        self.point();
        self.wrs.first_mut().map_or(null_mut(), |first| first)
    }

    /// Sets the pointers, now that nothing moves any more.
    fn point(&mut self) {
        let mut sges = self.sges.as_mut_ptr();
        let (first, count) = (self.wrs.as_mut_ptr(), self.wrs.len());
        for (index, wr) in self.wrs.iter_mut().enumerate() {
            wr.sg_list = sges;
            sges = sges.wrapping_add(wr.num_sge as usize);
            wr.next = if index + 1 < count { first.wrapping_add(index + 1) } else { null_mut() };
        }
    }

    /// How many come before one.
    fn position(&self, wr: *const ibv_send_wr) -> usize {
        let bytes = wr.addr().saturating_sub(self.wrs.as_ptr().addr());
        (bytes / size_of::<ibv_send_wr>()).min(self.wrs.len())
    }

    fn sges_of(&mut self, list: &[Sge]) -> (*mut ibv_sge, c_int) {
        self.sges.clear();
        self.sges.extend(list.iter().map(sge));
        (self.sges.as_mut_ptr(), self.sges.len() as c_int)
    }
}

fn sge(sge: &Sge) -> ibv_sge {
    ibv_sge { addr: sge.addr, length: sge.length, lkey: sge.lkey }
}

fn work_request(request: &SendRequest, list: &SendList) -> ibv_send_wr {
    let (opcode, imm) = match request.op {
        PostedOp::Send => (ibv_wr_opcode::IBV_WR_SEND, 0),
        PostedOp::SendImm(imm) => (ibv_wr_opcode::IBV_WR_SEND_WITH_IMM, imm),
        PostedOp::Write => (ibv_wr_opcode::IBV_WR_RDMA_WRITE, 0),
        PostedOp::WriteImm(imm) => (ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM, imm),
        PostedOp::Read => (ibv_wr_opcode::IBV_WR_RDMA_READ, 0),
        PostedOp::Atomic(AtomicOp::CompareSwap { .. }) => (ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP, 0),
        PostedOp::Atomic(AtomicOp::FetchAdd(_)) => (ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD, 0),
    };
    let num_sge = if list.inline(request).is_empty() { list.sges(request).len() } else { 1 };
    ibv_send_wr {
        wr_id: request.id,
        next: null_mut(),
        sg_list: null_mut(),
        num_sge: num_sge as c_int,
        opcode,
        // The flags of the specification have one encoding, the kernel's.
        send_flags: request.flags.bits(),
        imm_data_invalidated_rkey_union: imm_data_invalidated_rkey_union_t { imm_data: imm },
        wr: remote(request),
        qp_type: qp_type_t { xrc: rdma_sys::xrc_t { remote_srqn: 0 } },
        bind_mw_tso_union: bind_mw_tso_union_t { tso: tso_t { hdr: null_mut(), hdr_sz: 0, mss: 0 } },
    }
}

/// What the peer's memory is named with, and for an atomic what is done with it.
fn remote(request: &SendRequest) -> wr_t {
    let (remote_addr, rkey) = (request.remote_addr, request.rkey);
    let (compare_add, swap) = match request.op {
        PostedOp::Atomic(AtomicOp::CompareSwap { compare, swap }) => (compare, swap),
        PostedOp::Atomic(AtomicOp::FetchAdd(add)) => (add, 0),
        _ => return wr_t { rdma: rdma_t { remote_addr, rkey } },
    };
    wr_t { atomic: atomic_t { remote_addr, compare_add, swap, rkey } }
}

#[cfg(test)]
mod tests {
    use virtio_rdma::ib::SendFlags;

    use super::*;

    #[test]
    fn a_list_becomes_a_chain() {
        let mut list = SendList::default();
        let sge = |addr| Sge { addr, length: 1, lkey: 2 };
        list.push(1, PostedOp::SendImm(9), SendFlags::SOLICITED, (0, 0));
        list.push_sge(sge(10));
        list.push_sge(sge(11));
        list.push(2, PostedOp::Write, SendFlags::empty(), (5, 6));
        list.set_inline(b"abc");
        list.push(3, PostedOp::Read, SendFlags::SIGNALED, (7, 8));
        let mut chain = Chain::default();
        let first = chain.link(&list);
        let [one, two, three] = &chain.wrs[..] else { panic!("three work requests") };
        assert_eq!(first.cast_const(), &raw const *one);
        assert_eq!((one.next.cast_const(), two.next.cast_const()), (&raw const *two, &raw const *three));
        assert!(three.next.is_null());
        assert_eq!([one.num_sge, two.num_sge, three.num_sge], [2, 1, 0]);
        assert_eq!(one.sg_list.cast_const(), chain.sges.as_ptr());
        assert_eq!(two.sg_list.cast_const(), chain.sges.as_ptr().wrapping_add(2));
        assert_eq!(chain.sges.iter().map(|sge| sge.length).collect::<Vec<_>>(), [1, 1, 3]);
        assert_eq!((one.send_flags, two.send_flags, three.send_flags), (4, 8, 2));
        assert_eq!([two, three].map(|wr| chain.position(wr)), [1, 2]);
        assert!(Chain::default().link(&SendList::default()).is_null());
    }
}
