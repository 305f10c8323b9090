//! How much of the host's NIC one virtual NIC may have. What a NIC has room for is shared by all guests, and none may use it up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::device::DeviceError;

/// The most that a virtual NIC has on the host's NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct NicQuota {
    /// Bytes of memory that are pinned, those in several regions counted for each.
    pub max_bytes: u64,
    /// Memory regions.
    pub max_mr: u32,
    /// Mappings of the router's process that regions in several pieces need: one for each piece, and one more. All virtual NICs together have half
    /// of `vm.max_map_count`.
    pub max_map: u32,
    /// Protection domains.
    pub max_pd: u32,
    /// Queue pairs.
    pub max_qp: u32,
    /// Entries of completion queues: one for each work request that its queue pairs can have there at a time.
    pub max_cqe: u32,
}

impl Default for NicQuota {
    fn default() -> Self {
        Self { max_bytes: 1 << 38, max_mr: 131_072, max_map: 8192, max_pd: 4096, max_qp: 16_384, max_cqe: 1 << 23 }
    }
}

/// What a virtual NIC has there now.
#[derive(Debug, Default)]
pub struct NicUsage {
    bytes: Arc<AtomicU64>,
    regions: Arc<AtomicU64>,
    mappings: Arc<AtomicU64>,
    domains: Arc<AtomicU64>,
    qps: Arc<AtomicU64>,
    cqes: Arc<AtomicU64>,
}

/// Part of it; given back when dropped.
#[derive(Debug)]
pub struct Share {
    of: Arc<AtomicU64>,
    amount: u64,
}

impl NicUsage {
    /// A region of so many bytes, in so many pieces.
    ///
    /// # Errors
    /// When that is more than it may have.
    pub fn take_region(&self, quota: &NicQuota, bytes: u64, pieces: usize) -> Result<[Share; 3], DeviceError> {
        let mappings = if pieces > 1 { pieces as u64 + 1 } else { 0 };
        let region = Share::take(&self.regions, 1, quota.max_mr.into()).ok_or(DeviceError::Quota("memory regions"))?;
        let bytes = Share::take(&self.bytes, bytes, quota.max_bytes).ok_or(DeviceError::Quota("pinned memory"))?;
        let mappings = Share::take(&self.mappings, mappings, quota.max_map.into());
        Ok([region, bytes, mappings.ok_or(DeviceError::Quota("mappings of memory in pieces"))?])
    }

    /// A protection domain.
    ///
    /// # Errors
    /// When that is more than it may have.
    pub fn take_domain(&self, quota: &NicQuota) -> Result<Share, DeviceError> {
        Share::take(&self.domains, 1, quota.max_pd.into()).ok_or(DeviceError::Quota("protection domains"))
    }

    /// A queue pair with so many work requests.
    ///
    /// # Errors
    /// When that is more than it may have.
    pub fn take_qp(&self, quota: &NicQuota, wrs: u32) -> Result<[Share; 2], DeviceError> {
        let qp = Share::take(&self.qps, 1, quota.max_qp.into()).ok_or(DeviceError::Quota("queue pairs"))?;
        let cqes = Share::take(&self.cqes, wrs.into(), quota.max_cqe.into());
        Ok([qp, cqes.ok_or(DeviceError::Quota("completions"))?])
    }
}

impl Share {
    fn take(of: &Arc<AtomicU64>, amount: u64, most: u64) -> Option<Self> {
        let more = |now: u64| now.checked_add(amount).filter(|sum| *sum <= most);
        of.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self { of: of.clone(), amount })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.fetch_sub(self.amount, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_can_be_had_again() {
        let quota = NicQuota { max_bytes: 10, max_mr: 2, max_map: 7, max_pd: 1, max_qp: 2, max_cqe: 5 };
        let usage = NicUsage::default();
        let some = usage.take_region(&quota, 8, 1).unwrap();
        assert!(usage.take_region(&quota, 3, 1).is_err() && usage.take_region(&quota, u64::MAX, 1).is_err());
        let more = usage.take_region(&quota, 1, 6).unwrap();
        assert!(usage.take_region(&quota, 1, 1).is_err(), "a third region");
        drop(some);
        assert!(usage.take_region(&quota, 1, 2).is_err(), "more mappings");
        drop(more);
        let all = usage.take_region(&quota, 10, 2).unwrap();
        let domain = usage.take_domain(&quota).unwrap();
        assert!(usage.take_domain(&quota).is_err());
        let first = usage.take_qp(&quota, 3).unwrap();
        // The queue pair that was not made has none, either.
        assert!(usage.take_qp(&quota, 3).is_err());
        let second = usage.take_qp(&quota, 2).unwrap();
        assert!(usage.take_qp(&quota, 0).is_err());
        drop((all, domain, first, second));
        let NicUsage { bytes, regions, mappings, domains, qps, cqes } = usage;
        assert_eq!([bytes, regions, mappings, domains, qps, cqes].map(|n| n.load(Ordering::Relaxed)), [0; 6]);
    }
}
