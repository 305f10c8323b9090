//! What a worker has completed and not yet added to a virtual NIC's counters: they are shared by all workers, so it is done once for many.

use std::sync::Arc;

use crate::nic::Nic;
use crate::nic::stats::Counter;

/// Work requests and bytes of one virtual NIC, in one direction.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Tally {
    nic: Option<Arc<Nic>>,
    wqes: u64,
    bytes: u64,
}

impl Tally {
    /// Counts one work request that succeeded; `settle` says where figures of another virtual NIC go first.
    #[inline]
    pub fn add(&mut self, nic: &Arc<Nic>, bytes: u64, settle: impl FnOnce(&Nic) -> (&Counter, &Counter)) {
        if !self.nic.as_ref().is_some_and(|known| Arc::ptr_eq(known, nic)) {
            self.settle(settle);
            self.nic = Some(nic.clone());
        }
        self.wqes += 1;
        self.bytes += bytes;
    }

    /// Adds what was counted to the counters of work requests and bytes that `counters` names.
    pub fn settle(&mut self, counters: impl FnOnce(&Nic) -> (&Counter, &Counter)) {
        if let Some(nic) = self.nic.take() {
            let (wqes, bytes) = counters(&nic);
            wqes.add(std::mem::take(&mut self.wqes));
            bytes.add(std::mem::take(&mut self.bytes));
        }
    }
}
