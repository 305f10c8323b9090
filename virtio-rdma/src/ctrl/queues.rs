//! Commands on completion queues, queue pairs and shared receive queues (IBA 10.2).

use zerocopy::little_endian::{U16, U32};

use crate::wire::wire;

/// "No object" where an object number is optional.
pub const NO_OBJECT: u32 = u32::MAX;

wire! {
    /// One ring in guest memory, see [`crate::ring`].
    RingDesc = "virtio_rdma_ring_desc", 16 {
        /// A [`Format`](crate::ring::Format).
        format: u8,
        /// Zero.
        reserved: [u8; 3],
        /// Number of elements, a power of two; one of them always stays empty. Zero: no ring.
        entries: U32,
        /// Bytes from one element to the next, a power of two.
        stride: U32,
        /// Number of page-aligned extents that describe it.
        num_extents: U32,
    }
}

wire! {
    /// `CREATE_CQ`. Followed by the extents of its ring.
    CreateCq = "virtio_rdma_create_cq", 24 {
        /// Completion vector: the event queue that its events go to.
        vector: U16,
        /// Zero.
        reserved: [u8; 6],
        /// The ring.
        ring: RingDesc,
    }
}

wire! {
    /// `RESIZE_CQ`: another ring in place of the present one. Followed by its extents.
    ResizeCq = "virtio_rdma_resize_cq", 24 {
        /// CQ number.
        cqn: U32,
        /// Zero.
        reserved: U32,
        /// The new ring.
        ring: RingDesc,
    }
}

/// Bit of [`CreateQp::flags`]: only the guest's kernel writes the rings, so that they may hold `REG_MR` work requests.
pub const QP_KERNEL: u16 = 1;

wire! {
    /// `CREATE_QP`. Followed by the extents of the send ring, then those of the receive ring.
    CreateQp = "virtio_rdma_create_qp", 72 {
        /// Protection domain.
        pdn: U32,
        /// A [`QpType`](crate::ib::QpType).
        qp_type: u8,
        /// 1: every send work request makes a completion.
        sq_sig_all: u8,
        /// Bits, [`QP_KERNEL`].
        flags: U16,
        /// CQ of the send queue.
        send_cqn: U32,
        /// CQ of the receive queue.
        recv_cqn: U32,
        /// Shared receive queue; [`NO_OBJECT`] for none.
        srqn: U32,
        /// Most SGEs of a send work request.
        max_send_sge: U16,
        /// Most SGEs of a receive work request.
        max_recv_sge: U16,
        /// Most bytes of inline data.
        max_inline_data: U32,
        /// Zero.
        reserved: [U32; 3],
        /// The send ring.
        sq: RingDesc,
        /// The receive ring; no entries with an SRQ.
        rq: RingDesc,
    }
}

wire! {
    /// Response of `CREATE_QP`.
    CreateQpResponse = "virtio_rdma_create_qp_resp", 16 {
        /// QP number, 24 bits, unpredictable.
        qpn: U32,
        /// Doorbell queue (counted from 0) and area of the worker that owns the QP.
        doorbell_queue: U16,
        /// Zero.
        reserved0: U16,
        /// The QP's bit in that doorbell area.
        doorbell: U32,
        /// Zero.
        reserved1: U32,
    }
}

wire! {
    /// Where a connected QP or a GRH goes (IBA 11.2.4.2, address vector).
    AddressVector = "virtio_rdma_av", 32 {
        /// Destination GID.
        dgid: [u8; 16],
        /// Flow label of the GRH.
        flow_label: U32,
        /// Index of the source GID.
        sgid_index: U16,
        /// Hop limit of the GRH.
        hop_limit: u8,
        /// Traffic class of the GRH.
        traffic_class: u8,
        /// Service level.
        sl: u8,
        /// Zero.
        reserved: [u8; 7],
    }
}

wire! {
    /// Attributes of a QP, with the meaning and units of `struct ib_qp_attr`.
    QpAttr = "virtio_rdma_qp_attr", 72 {
        /// A [`QpState`](crate::ib::QpState).
        qp_state: u8,
        /// The state the caller believes the QP to be in.
        cur_qp_state: u8,
        /// An `enum ib_mtu`.
        path_mtu: u8,
        /// 1 while the send queue drains.
        sq_draining: u8,
        /// `Q_Key` of a UD QP.
        qkey: U32,
        /// PSN expected first by the receive queue, 24 bits.
        rq_psn: U32,
        /// PSN of the send queue's first packet, 24 bits.
        sq_psn: U32,
        /// The peer's QP number, 24 bits.
        dest_qpn: U32,
        /// Remote access allowed by the QP, [`Access`](crate::ib::Access) bits.
        access_flags: U32,
        /// `P_Key` table index, 0.
        pkey_index: U16,
        /// Port, 1.
        port_num: u8,
        /// READs and atomics outstanding as initiator.
        max_rd_atomic: u8,
        /// READs and atomics outstanding as responder.
        max_dest_rd_atomic: u8,
        /// RNR NAK timer code, 0 to 31 (IBA table 45).
        min_rnr_timer: u8,
        /// Local ACK timeout: 4.096 us * 2^timeout; 0 for ever.
        timeout: u8,
        /// Retries of a lost message, 0 to 7.
        retry_cnt: u8,
        /// Retries after RNR NAK, 0 to 6; 7 for ever.
        rnr_retry: u8,
        /// 1: raise an event when drained.
        en_sqd_async_notify: u8,
        /// Zero.
        reserved: [u8; 6],
        /// Where to.
        av: AddressVector,
    }
}

wire! {
    /// `MODIFY_QP` (IBA 11.2.5.2).
    ModifyQp = "virtio_rdma_modify_qp", 80 {
        /// QP number.
        qpn: U32,
        /// [`QpMask`](crate::ib::QpMask) bits: which attributes count.
        attr_mask: U32,
        /// The attributes.
        attr: QpAttr,
    }
}

wire! {
    /// `CREATE_SRQ` (IBA 11.2.4). Followed by the extents of its ring.
    CreateSrq = "virtio_rdma_create_srq", 32 {
        /// Protection domain; receives are held to it, whatever that of the QP is.
        pdn: U32,
        /// Most SGEs of a receive work request.
        max_sge: U16,
        /// Zero.
        reserved: U16,
        /// Limit, see [`ModifySrq`].
        limit: U32,
        /// Zero.
        reserved1: U32,
        /// The ring.
        ring: RingDesc,
    }
}

wire! {
    /// `MODIFY_SRQ`: arms the limit (IBA 10.2.9.2).
    ModifySrq = "virtio_rdma_modify_srq", 8 {
        /// SRQ number.
        srqn: U32,
        /// When fewer receives than this are left an event is raised, once. Zero: none. At most what the ring holds.
        limit: U32,
    }
}

wire! {
    /// `RESIZE_SRQ`: another ring in place of the present one. Followed by its extents.
    ResizeSrq = "virtio_rdma_resize_srq", 24 {
        /// SRQ number.
        srqn: U32,
        /// Zero.
        reserved: U32,
        /// The new ring.
        ring: RingDesc,
    }
}

wire! {
    /// Response of `QUERY_SRQ`.
    SrqAttr = "virtio_rdma_srq_attr", 8 {
        /// The limit; zero once its event was raised.
        limit: U32,
        /// Zero.
        reserved: U32,
    }
}

wire! {
    /// `ATTACH_MCAST`, `DETACH_MCAST` (IBA 11.2.7).
    Mcast = "virtio_rdma_mcast", 24 {
        /// Number of a UD QP.
        qpn: U32,
        /// Zero.
        reserved: U32,
        /// The group: a multicast IPv6 address, or an IPv4 one mapped into one.
        mgid: [u8; 16],
    }
}
