//! Commands on memory regions (IBA 10.6).

use zerocopy::little_endian::{U32, U64};

use crate::wire::wire;

wire! {
    /// `REG_MR`: registers memory. Followed by `num_extents` byte-granular [`Extent`](super::Extent)s in the order of their addresses.
    ///
    /// The key works from the moment when the extents given so far add up to `length`;
    /// what is missing follows in `EXTEND_MR`. The response is an [`ObjectResponse`](super::ObjectResponse) with the key, which is both lkey and rkey.
    RegMr = "virtio_rdma_reg_mr", 32 {
        /// Protection domain.
        pdn: U32,
        /// [`Access`](crate::ib::Access) bits.
        access: U32,
        /// Address that work requests use for the first byte; 0 for zero-based regions.
        iova: U64,
        /// Bytes.
        length: U64,
        /// Number of extents that follow.
        num_extents: U32,
        /// Zero.
        reserved: U32,
    }
}

wire! {
    /// `EXTEND_MR`: further extents of a region that is not complete.
    ExtendMr = "virtio_rdma_extend_mr", 8 {
        /// Key of the region.
        key: U32,
        /// Number of extents that follow.
        num_extents: U32,
    }
}

/// Bit of [`ReregMr::flags`]: replace the memory (`IB_MR_REREG_TRANS`).
pub const REREG_TRANS: u32 = 1;
/// Bit of [`ReregMr::flags`]: replace the protection domain (`IB_MR_REREG_PD`).
pub const REREG_PD: u32 = 2;
/// Bit of [`ReregMr::flags`]: replace the access flags (`IB_MR_REREG_ACCESS`).
pub const REREG_ACCESS: u32 = 4;

wire! {
    /// `REREG_MR`: changes a region in place; the key stays. With [`REREG_TRANS`] followed by extents as in `REG_MR`.
    ReregMr = "virtio_rdma_rereg_mr", 40 {
        /// Key of the region.
        key: U32,
        /// Which of the following to replace.
        flags: U32,
        /// Protection domain.
        pdn: U32,
        /// Access bits.
        access: U32,
        /// Address of the first byte.
        iova: U64,
        /// Bytes.
        length: U64,
        /// Number of extents that follow.
        num_extents: U32,
        /// Zero.
        reserved: U32,
    }
}
