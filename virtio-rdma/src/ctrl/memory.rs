//! Commands on memory regions and windows (IBA 10.6).

use zerocopy::little_endian::{U32, U64};

use crate::wire::wire;

/// Bit of [`RegMr::flags`]: all guest memory, also what comes later, at its guest-physical addresses. For protection domains of
/// the guest's kernel alone.
pub const REG_DMA: u32 = 1;
/// Bit of [`RegMr::flags`]: a region whose pages come and go. It has none at first.
pub const REG_ON_DEMAND: u32 = 2;
/// Most pages of an on-demand region, those that are cut at its ends included.
pub const MAX_ON_DEMAND_PAGES: u32 = 1 << 31;

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
        /// [`REG_DMA`]: `iova`, `length` and `num_extents` are zero with it. [`REG_ON_DEMAND`]: `num_extents` is zero with it.
        flags: U32,
    }
}

/// Bit of [`MapPages::flags`] and [`PageRange::flags`]: to be written.
pub const PAGES_WRITE: u32 = 1;

wire! {
    /// `MAP_PAGES`: gives an on-demand region pages. Followed by `num_extents` extents of whole pages.
    MapPages = "virtio_rdma_map_pages", 16 {
        /// Key of the region.
        key: U32,
        /// Bits: [`PAGES_WRITE`], without which the pages may only be read.
        flags: U32,
        /// First page; page 0 is that of the region's first byte.
        first: U32,
        /// Number of extents that follow.
        num_extents: U32,
    }
}

wire! {
    /// `UNMAP_PAGES`, `DENY_PAGES`: pages of an on-demand region.
    PageRange = "virtio_rdma_page_range", 16 {
        /// Key of the region.
        key: U32,
        /// Bits, with `DENY_PAGES`: [`PAGES_WRITE`], with which they can be had to be read.
        flags: U32,
        /// First page.
        first: U32,
        /// Number of pages, not zero.
        count: U32,
    }
}

wire! {
    /// `ALLOC_MR`: a region that `REG_MR` work requests give memory to. The response is an [`ObjectResponse`](super::ObjectResponse) with its first key.
    AllocMr = "virtio_rdma_alloc_mr", 8 {
        /// Protection domain.
        pdn: U32,
        /// Most extents that it will have at a time; at least 1, at most the device's `max_fast_reg_extents`.
        max_extents: U32,
    }
}

/// Value of [`AllocMw::kind`]: bound within the protection domain.
pub const MW_TYPE_1: u8 = 1;
/// Value of [`AllocMw::kind`]: bound to a QP, and invalidated by work requests (type 2B).
pub const MW_TYPE_2: u8 = 2;

wire! {
    /// `ALLOC_MW`: a memory window. The response is an [`ObjectResponse`](super::ObjectResponse) with its first key.
    AllocMw = "virtio_rdma_alloc_mw", 8 {
        /// Protection domain.
        pdn: U32,
        /// [`MW_TYPE_1`] or [`MW_TYPE_2`].
        kind: u8,
        /// Zero.
        reserved: [u8; 3],
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
