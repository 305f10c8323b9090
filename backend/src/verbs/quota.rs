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
    /// Queue pairs.
    pub max_qp: u32,
    /// Entries of completion queues: one for each work request that its queue pairs can have there at a time.
    pub max_cqe: u32,
}

impl Default for NicQuota {
    fn default() -> Self {
        Self { max_bytes: 1 << 38, max_qp: 16_384, max_cqe: 1 << 23 }
    }
}

/// What a virtual NIC has there now.
#[derive(Debug, Default)]
pub struct NicUsage {
    bytes: Arc<AtomicU64>,
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
    /// Memory that is to be pinned.
    ///
    /// # Errors
    /// When that is more than it may have.
    pub fn take_bytes(&self, quota: &NicQuota, bytes: u64) -> Result<Share, DeviceError> {
        Share::take(&self.bytes, bytes, quota.max_bytes).ok_or(DeviceError::Quota("pinned memory"))
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
        let (usage, quota) = (NicUsage::default(), NicQuota { max_bytes: 10, max_qp: 2, max_cqe: 5 });
        let some = usage.take_bytes(&quota, 8).unwrap();
        assert!(usage.take_bytes(&quota, 3).is_err() && usage.take_bytes(&quota, u64::MAX).is_err());
        drop(some);
        let all = usage.take_bytes(&quota, 10).unwrap();
        let first = usage.take_qp(&quota, 3).unwrap();
        // The queue pair that was not made has none, either.
        assert!(usage.take_qp(&quota, 3).is_err());
        let second = usage.take_qp(&quota, 2).unwrap();
        assert!(usage.take_qp(&quota, 0).is_err());
        drop((all, first, second));
        assert_eq!([&usage.bytes, &usage.qps, &usage.cqes].map(|n| n.load(Ordering::Relaxed)), [0; 3]);
    }
}
