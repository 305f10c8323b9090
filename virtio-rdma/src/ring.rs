//! Rings of work requests and completions in guest memory.
//!
//! A ring starts with a [`RingHeader`], elements follow it at once. Both indices always lie in
//! `0..entries`; the ring is empty when they are equal and full when the producer is one behind the consumer. Elements
//! may straddle page boundaries. Format 0 is the one of Linux's `rdma_user_rxe.h`, so that its stock user-space provider can be used.

use zerocopy::little_endian::{U16, U32, U64};

use crate::ib::wire_enum;
use crate::wire::wire;

wire_enum! {
    /// Layout of a ring's elements.
    Format: u8 {
        /// `rxe_send_wqe`, `rxe_recv_wqe` and `ib_uverbs_wc`.
        Rxe = 0,
    }
}

wire! {
    /// Start of every ring (`struct rxe_queue_buf`).
    RingHeader = "rxe_queue_buf", 384 {
        /// For user space; the device does not read it.
        log2_elem_size: U32,
        /// For user space; the device does not read it.
        index_mask: U32,
        /// Unused.
        pad_1: [U32; 30],
        /// Written by the producer.
        producer_index: U32,
        /// Unused.
        pad_2: [U32; 31],
        /// Written by the consumer.
        consumer_index: U32,
        /// Unused.
        pad_3: [U32; 31],
    }
}

wire! {
    /// One scatter/gather element (`struct rxe_sge`).
    Sge = "rxe_sge", 16 {
        /// Address in the region's own addresses.
        addr: U64,
        /// Bytes.
        length: U32,
        /// Key of the region.
        lkey: U32,
    }
}

wire! {
    /// Payload description in a WQE (`struct rxe_dma_info`); SGEs or inline bytes follow it.
    DmaInfo = "rxe_dma_info", 24 {
        /// Bytes of the message. The device trusts it for inline data only, within the ring element.
        length: U32,
        /// For the kernel's software transport.
        resid: U32,
        /// For the kernel's software transport.
        cur_sge: U32,
        /// Number of SGEs.
        num_sge: U32,
        /// For the kernel's software transport.
        sge_offset: U32,
        /// Unused.
        reserved: U32,
    }
}

wire! {
    /// A send work request (`struct rxe_send_wqe`); [`Sge`]s or inline bytes follow it.
    SendWqe = "rxe_send_wqe", 208 {
        /// Returned in the completion.
        wr_id: U64,
        /// Unused.
        reserved: U32,
        /// A [`WrOpcode`](crate::ib::WrOpcode).
        opcode: U32,
        /// [`SendFlags`](crate::ib::SendFlags) bits.
        send_flags: U32,
        /// Immediate data, big-endian, carried unchanged; or the rkey to invalidate.
        imm_data: U32,
        /// By opcode: [`RdmaPart`], [`AtomicPart`], [`UdPart`], [`BindMwPart`], [`FlushPart`] or [`RegMrPart`] at its start.
        wr: [u8; 120],
        /// Unused by this device.
        status: U32,
        /// Unused by this device.
        state: U32,
        /// Unused by this device.
        iova: U64,
        /// Unused by this device.
        transport: [U32; 6],
        /// The payload.
        dma: DmaInfo,
    }
}

wire! {
    /// RDMA READ and WRITE: what is reached at the peer.
    RdmaPart = "", 16 {
        /// First byte, in the region's own addresses.
        remote_addr: U64,
        /// Key of the peer's region.
        rkey: U32,
        /// Unused.
        reserved: U32,
    }
}

wire! {
    /// Atomics.
    AtomicPart = "", 32 {
        /// The 8-byte aligned word.
        remote_addr: U64,
        /// Compared, or added.
        compare_add: U64,
        /// Stored on a match.
        swap: U64,
        /// Key of the peer's region.
        rkey: U32,
        /// Unused.
        reserved: U32,
    }
}

wire! {
    /// UD SEND: where to.
    UdPart = "", 16 {
        /// The peer's QP number.
        remote_qpn: U32,
        /// `Q_Key`; with the top bit set the QP's own is used instead (IBA 10.2.5).
        remote_qkey: U32,
        /// `P_Key` table index.
        pkey_index: U16,
        /// Unused.
        reserved: U16,
        /// Address handle, an index into the area of [`crate::area::AddressHandle`]s.
        ah_num: U32,
    }
}

wire! {
    /// Memory window bind.
    BindMwPart = "", 32 {
        /// First byte of the window.
        addr: U64,
        /// Bytes of the window.
        length: U64,
        /// Key of the region beneath.
        mr_lkey: U32,
        /// Present key of the window.
        mw_rkey: U32,
        /// New key of the window.
        rkey: U32,
        /// Access bits.
        access: U32,
    }
}

wire! {
    /// FLUSH.
    FlushPart = "", 24 {
        /// First byte at the peer.
        remote_addr: U64,
        /// Bytes.
        length: U32,
        /// Key of the peer's region.
        rkey: U32,
        /// Bits: 1 for global visibility, 2 for persistence.
        placement: u8,
        /// 0: the bytes named; 1: the whole region.
        selectivity: u8,
        /// Unused.
        reserved: [u8; 6],
    }
}

wire! {
    /// Fast registration (`struct virtio_rdma_reg_wr`). Not part of the user ABI: the device takes it from kernel QPs only.
    RegMrPart = "virtio_rdma_reg_wr", 40 {
        /// Guest-physical address of an array of [`Extent`](crate::ctrl::Extent)s, in memory of the driver.
        extents: U64,
        /// Address that work requests use for the first byte.
        iova: U64,
        /// Bytes.
        length: U64,
        /// New key: that of the region but for the low byte.
        key: U32,
        /// [`Access`](crate::ib::Access) bits.
        access: U32,
        /// Number of extents.
        num_extents: U32,
        /// Zero.
        reserved: U32,
    }
}

/// Bytes that an ATOMIC WRITE stores; they stand where SGEs and inline bytes begin.
pub const ATOMIC_WRITE_SIZE: usize = 8;

wire! {
    /// A receive work request (`struct rxe_recv_wqe`); [`Sge`]s follow it.
    RecvWqe = "rxe_recv_wqe", 40 {
        /// Returned in the completion.
        wr_id: U64,
        /// Unused.
        reserved: U32,
        /// Unused.
        padding: U32,
        /// The buffers.
        dma: DmaInfo,
    }
}

/// [`Cqe::sl`]: the GRH is an IPv6 header. RoCE has no service levels; Mellanox NICs use the field for this, and UCX looks there.
pub const SL_ROCE_V2_IPV6: u8 = 1;
/// [`Cqe::sl`]: the GRH ends with an IPv4 header.
pub const SL_ROCE_V2_IPV4: u8 = 2;

wire! {
    /// A completion (`struct ib_uverbs_wc`).
    Cqe = "ib_uverbs_wc", 48 {
        /// Of the work request.
        wr_id: U64,
        /// A [`WcStatus`](crate::ib::WcStatus).
        status: U32,
        /// A [`WcOpcode`](crate::ib::WcOpcode).
        opcode: U32,
        /// Zero.
        vendor_err: U32,
        /// Bytes of the message, for every opcode; nothing is meant by it in an error.
        byte_len: U32,
        /// Immediate data, big-endian.
        imm_data: U32,
        /// The QP that this completion belongs to.
        qp_num: U32,
        /// UD receive: the sender's QP number.
        src_qp: U32,
        /// [`WcFlags`](crate::ib::WcFlags) bits.
        wc_flags: U32,
        /// `P_Key` table index.
        pkey_index: U16,
        /// Zero.
        slid: U16,
        /// UD receive: what the header in front of the datagram is, [`SL_ROCE_V2_IPV6`] or [`SL_ROCE_V2_IPV4`].
        sl: u8,
        /// Zero.
        dlid_path_bits: u8,
        /// Port, 1.
        port_num: u8,
        /// Zero.
        reserved: u8,
    }
}

/// Bytes of a GRH at the start of a UD receive buffer (IBA 8.3). For IPv4 its last 20 bytes hold the IPv4 header.
pub const GRH_SIZE: usize = 40;
/// Bytes of a CQ element in format 0.
pub const RXE_CQE_STRIDE: u32 = 64;

/// Bytes of a ring: header and elements.
pub const fn ring_size(entries: u32, stride: u32) -> usize {
    size_of::<RingHeader>() + entries as usize * stride as usize
}
