//! What a worker has completed and not yet added to figures that others look at: it is done once for many.

use std::sync::Arc;

use crate::nic::Nic;
use crate::nic::meters::Meter;

/// Where figures go.
pub trait Total {
    /// So many work requests or receives have succeeded, with so many bytes.
    fn add(&self, wqes: u64, bytes: u64);
}

/// Sends.
impl Total for Meter {
    fn add(&self, wqes: u64, bytes: u64) {
        self.count(wqes, bytes);
    }
}

/// Receives.
impl Total for Nic {
    fn add(&self, wqes: u64, bytes: u64) {
        self.counters.recv_wqes.add(wqes);
        self.counters.recv_bytes.add(bytes);
    }
}

/// Work requests and bytes that go to one total, until they go to another.
#[derive(Debug)]
#[repr(align(64))]
pub struct Tally<T> {
    total: Option<Arc<T>>,
    wqes: u64,
    bytes: u64,
}

impl<T> Default for Tally<T> {
    fn default() -> Self {
        Self { total: None, wqes: 0, bytes: 0 }
    }
}

impl<T: Total> Tally<T> {
    /// Counts one that succeeded.
    #[inline]
    pub fn add(&mut self, total: &Arc<T>, bytes: u64) {
        if !self.total.as_ref().is_some_and(|known| Arc::ptr_eq(known, total)) {
            self.settle();
            self.total = Some(total.clone());
        }
        self.wqes += 1;
        self.bytes += bytes;
    }

    /// Adds what was counted to its total.
    pub fn settle(&mut self) {
        if let Some(total) = self.total.take() {
            total.add(std::mem::take(&mut self.wqes), std::mem::take(&mut self.bytes));
        }
    }
}
