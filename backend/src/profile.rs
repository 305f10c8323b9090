//! What a virtual NIC offers: limits that are fixed when it is created and are quotas at the same time.

use serde::{Deserialize, Serialize};
use virtio_rdma::ctrl::DeviceAttr;
use virtio_rdma::ib::{Access, AtomicCap, QpType};
use virtio_rdma::ring::Format;

use crate::wqe::SgeList;

/// Limits of one virtual NIC. The guest sees them in `QUERY_DEVICE`; the device enforces each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Profile {
    /// Most queue pairs.
    pub max_qp: u32,
    /// Most work requests in one queue.
    pub max_qp_wr: u32,
    /// Most SGEs of a work request, at most 32.
    pub max_sge: u32,
    /// Most bytes of inline data.
    pub max_inline_data: u32,
    /// Most completion queues.
    pub max_cq: u32,
    /// Most entries of a completion queue.
    pub max_cqe: u32,
    /// Most memory regions.
    pub max_mr: u32,
    /// Most extents in all memory regions together, those that reach over several regions of the VMM counted for each: 24 bytes of router
    /// memory each.
    pub max_extents: u32,
    /// Most extents of one fast registration; a worker looks all of them up at once.
    pub max_fast_reg_extents: u32,
    /// Most memory windows.
    pub max_mw: u32,
    /// Most shared receive queues.
    pub max_srq: u32,
    /// Most multicast groups that QPs of this virtual NIC are in.
    pub max_mcast_grp: u32,
    /// Most QPs of this virtual NIC in one multicast group.
    pub max_mcast_qp_attach: u32,
    /// Most protection domains.
    pub max_pd: u32,
    /// Most address handles.
    pub max_ah: u32,
    /// Entries of the GID table.
    pub max_gids: u32,
    /// Most READs outstanding for a QP.
    pub max_rd_atomic: u32,
    /// Speed shown to the guest, in Mbit/s.
    pub speed_mbps: u32,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            max_qp: 16_384,
            max_qp_wr: 16_384,
            max_sge: SgeList::CAPACITY as u32,
            max_inline_data: 512,
            max_cq: 16_384,
            max_cqe: (1 << 17) - 1,
            max_mr: 131_072,
            max_extents: 4 << 20,
            max_fast_reg_extents: Self::FAST_REG_EXTENTS,
            max_mw: 65_536,
            max_srq: 4_096,
            max_mcast_grp: 1_024,
            max_mcast_qp_attach: 64,
            max_pd: 4_096,
            max_ah: 4_096,
            max_gids: 256,
            max_rd_atomic: 128,
            speed_mbps: 100_000,
        }
    }
}

/// A limit that the device could not keep.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name} must be between {min} and {max}, not {value}")]
pub struct BadLimit {
    name: &'static str,
    min: u32,
    max: u32,
    value: u32,
}

impl Profile {
    /// Transports that are offered.
    pub const QP_TYPES: [QpType; 4] = [QpType::Gsi, QpType::Rc, QpType::Uc, QpType::Ud];
    /// Most extents of one fast registration that any profile allows.
    pub const FAST_REG_EXTENTS: u32 = 512;
    /// Largest message (IBA 9.7.7: 2^31 bytes).
    pub const MAX_MESSAGE: u32 = 1 << 31;
    /// Vendor id: that of software devices without one, as rxe has it.
    pub const VENDOR_ID: u32 = 0xff_ffff;
    /// Largest memory region.
    pub const MAX_MR_SIZE: u64 = 1 << 46;

    /// Checks each limit against what the device can do.
    ///
    /// # Errors
    /// The first limit that is out of range.
    pub fn check(&self) -> Result<(), BadLimit> {
        let limits = [
            ("max_qp", 1, 1 << 18, self.max_qp),
            ("max_qp_wr", 1, 1 << 16, self.max_qp_wr),
            ("max_sge", 1, SgeList::CAPACITY as u32, self.max_sge),
            ("max_inline_data", 0, 4_096, self.max_inline_data),
            ("max_cq", 1, 1 << 18, self.max_cq),
            ("max_cqe", 1, 1 << 22, self.max_cqe),
            ("max_mr", 1, 1 << 22, self.max_mr),
            ("max_extents", 1, 1 << 28, self.max_extents),
            ("max_fast_reg_extents", 0, Self::FAST_REG_EXTENTS, self.max_fast_reg_extents),
            ("max_mw", 0, 1 << 20, self.max_mw),
            ("max_srq", 0, 1 << 16, self.max_srq),
            ("max_mcast_grp", 0, 1 << 14, self.max_mcast_grp),
            ("max_mcast_qp_attach", 1, 1 << 12, self.max_mcast_qp_attach),
            ("max_pd", 1, 1 << 16, self.max_pd),
            ("max_ah", 2, 1 << 18, self.max_ah),
            ("max_gids", 2, 1_024, self.max_gids),
            ("max_rd_atomic", 1, 255, self.max_rd_atomic),
            ("speed_mbps", 1, u32::MAX, self.speed_mbps),
        ];
        let bad = limits.into_iter().find(|&(_, min, max, value)| !(min..=max).contains(&value));
        bad.map_or(Ok(()), |(name, min, max, value)| Err(BadLimit { name, min, max, value }))
    }

    /// Number of doorbells in each area: every QP can have one in any of them.
    pub fn doorbells(&self) -> u32 {
        self.max_qp.next_multiple_of(64)
    }

    /// Access flags that regions may have.
    pub fn access() -> Access {
        Access::LOCAL_WRITE
            | Access::REMOTE_WRITE
            | Access::REMOTE_READ
            | Access::REMOTE_ATOMIC
            | Access::MW_BIND
            | Access::ZERO_BASED
            | Access::HUGETLB
            | Access::FLUSH_GLOBAL
            | Access::RELAXED_ORDERING
    }

    /// The answer to `QUERY_DEVICE`.
    pub fn to_wire(&self) -> DeviceAttr {
        DeviceAttr {
            max_mr_size: Self::MAX_MR_SIZE.into(),
            access_flags: Self::access().bits().into(),
            max_qp: self.max_qp.into(),
            max_qp_wr: self.max_qp_wr.into(),
            max_sge: self.max_sge.into(),
            max_inline_data: self.max_inline_data.into(),
            max_cq: self.max_cq.into(),
            max_cqe: self.max_cqe.into(),
            max_mr: self.max_mr.into(),
            max_fast_reg_extents: self.max_fast_reg_extents.into(),
            max_mw: self.max_mw.into(),
            max_srq: self.max_srq.into(),
            max_mcast_grp: self.max_mcast_grp.into(),
            max_mcast_qp_attach: self.max_mcast_qp_attach.into(),
            max_pd: self.max_pd.into(),
            max_ah: self.max_ah.into(),
            max_doorbells: self.doorbells().into(),
            max_gids: self.max_gids.into(),
            max_rd_atomic: self.max_rd_atomic.into(),
            qp_types: Self::QP_TYPES.iter().fold(0u32, |set, kind| set | 1 << kind.to_wire()).into(),
            ring_formats: (1 << Format::Rxe.to_wire()).into(),
            max_msg_size: Self::MAX_MESSAGE.into(),
            // They are the processor's own, on memory that every guest and worker shares, so `Glob` would be true. But NICs and rxe
            // say this, and programs (UCX 1.13) take nothing else for atomics.
            atomic_cap: AtomicCap::Hca.to_wire().into(),
            vendor_id: Self::VENDOR_ID.into(),
            ..DeviceAttr::default()
        }
    }
}
