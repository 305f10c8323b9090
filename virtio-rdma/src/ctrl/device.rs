//! Commands on the device itself: limits, shared areas, the GID table.

use zerocopy::little_endian::{U16, U32, U64};

use crate::wire::wire;

wire! {
    /// Response of `QUERY_DEVICE`: the profile of this virtual NIC, fixed while it exists.
    DeviceAttr = "virtio_rdma_device_attr", 128 {
        /// Most bytes in one memory region.
        max_mr_size: U64,
        /// Bits of [`crate::ib::Access`] that regions may have.
        access_flags: U32,
        /// Most queue pairs.
        max_qp: U32,
        /// Most work requests outstanding in one send or receive queue.
        max_qp_wr: U32,
        /// Most SGEs of a send or receive work request.
        max_sge: U32,
        /// Most bytes of inline data.
        max_inline_data: U32,
        /// Most completion queues; CQ numbers are below it.
        max_cq: U32,
        /// Most entries of a completion queue.
        max_cqe: U32,
        /// Most memory regions.
        max_mr: U32,
        /// Most protection domains.
        max_pd: U32,
        /// Number of address handle records; handles are below it.
        max_ah: U32,
        /// Number of doorbells in each doorbell area, a multiple of 64.
        max_doorbells: U32,
        /// Entries of the GID table.
        max_gids: U32,
        /// Most READs and atomics outstanding for a QP as initiator or responder.
        max_rd_atomic: U32,
        /// Bit set of [`crate::ib::QpType`] numbers that can be created.
        qp_types: U32,
        /// Bit set of [`crate::ring::Format`] numbers accepted for rings.
        ring_formats: U32,
        /// Most shared receive queues; zero while they are not offered.
        max_srq: U32,
        /// Most memory windows; zero while they are not offered.
        max_mw: U32,
        /// Most multicast groups; zero while they are not offered.
        max_mcast_grp: U32,
        /// Bytes in the largest message.
        max_msg_size: U32,
        /// What atomics are atomic with, an [`AtomicCap`](crate::ib::AtomicCap).
        atomic_cap: U32,
        /// Most extents of one fast registration; zero while it is not offered.
        max_fast_reg_extents: U32,
        /// Most QPs of this virtual NIC in one multicast group.
        max_mcast_qp_attach: U32,
        /// Zero.
        reserved: [U32; 7],
        /// Vendor id for display.
        vendor_id: U32,
    }
}

wire! {
    /// `SET_AREA`: shares an area with the device, until RESET. Followed by `num_extents` [`Extent`](super::Extent)s of whole pages.
    SetArea = "virtio_rdma_set_area", 8 {
        /// An [`AreaKind`](crate::area::AreaKind).
        kind: U16,
        /// Which one, where there are several of a kind.
        index: U16,
        /// Number of extents that follow.
        num_extents: U32,
    }
}

wire! {
    /// `ADD_GID`: fills one entry of the GID table.
    AddGid = "virtio_rdma_add_gid", 24 {
        /// Entry.
        index: U16,
        /// RoCE version: 1 or 2.
        roce_version: u8,
        /// Zero.
        reserved: [u8; 5],
        /// The GID: an IPv6 address, or an IPv4 address mapped into one.
        gid: [u8; 16],
    }
}

wire! {
    /// `DEL_GID`: clears one entry of the GID table.
    DelGid = "virtio_rdma_del_gid", 8 {
        /// Entry.
        index: U16,
        /// Zero.
        reserved: [u8; 6],
    }
}
