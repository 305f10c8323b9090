//! How long a requester tries: the retry counters of the specification (IBA 9.7.5.2.8, 9.9.2.1.1), and when the present try ends.
//!
//! A connection loses nothing while it lives, so there is nothing to send again when a try ends: it is counted, as the hardware's would
//! be, and the request fails when there have been too many.

use virtio_rdma::ib::WcStatus;

use crate::Nanos;

/// Attributes of an RC QP that say how often it tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retries {
    /// Length of a try; `None`: for ever.
    pub timeout: Option<Nanos>,
    /// Tries after the first.
    pub lost: u8,
    /// Tries after the first where the responder has no receive; `None`: for ever.
    pub not_ready: Option<u8>,
}

/// What is used up of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    retries: Retries,
    lost: u8,
    not_ready: u8,
    /// End of the present try, while there is something to wait for.
    ends: Option<Nanos>,
    /// The peer waits for a page: the try is longer, and what it says is no progress.
    paging: bool,
}

impl Patience {
    pub(crate) fn new(retries: Retries) -> Self {
        Self { retries, lost: 0, not_ready: 0, ends: None, paging: false }
    }

    /// When the present try ends.
    pub(crate) fn ends(&self) -> Option<Nanos> {
        self.ends
    }

    /// Something is waited for from now on.
    pub(crate) fn start(&mut self, now: Nanos, shortest: Nanos) {
        self.ends = self.retries.timeout.map(|timeout| now + timeout.max(shortest));
    }

    /// Nothing is waited for.
    pub(crate) fn stop(&mut self) {
        self.ends = None;
    }

    /// The responder has come further: all counters begin again.
    pub(crate) fn progress(&mut self, now: Nanos, shortest: Nanos) {
        (self.lost, self.not_ready, self.paging) = (0, 0, false);
        self.start(now, shortest);
    }

    /// The responder has no receive, and is asked again after `wait`.
    pub(crate) fn not_ready(&mut self, now: Nanos, wait: Nanos, shortest: Nanos) -> Result<(), WcStatus> {
        if self.retries.not_ready.is_some_and(|most| self.not_ready >= most) {
            return Err(WcStatus::RnrRetryExcErr);
        }
        self.not_ready = self.not_ready.saturating_add(1);
        self.start(now + wait, shortest);
        Ok(())
    }

    /// The responder waits for a page: such a try is long.
    pub(crate) fn page(&mut self, now: Nanos, patience: Nanos) {
        if !self.paging {
            self.paging = true;
            self.start(now, patience);
        }
    }

    /// The try has ended without an answer; another begins.
    pub(crate) fn lost(&mut self, now: Nanos, shortest: Nanos) -> Result<(), WcStatus> {
        if self.lost >= self.retries.lost {
            return Err(WcStatus::RetryExcErr);
        }
        self.lost += 1;
        self.paging = false;
        self.start(now, shortest);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = Nanos::from_millis(1);

    fn patience(lost: u8, not_ready: Option<u8>) -> Patience {
        Patience::new(Retries { timeout: Some(Nanos::from_millis(4)), lost, not_ready })
    }

    #[test]
    fn a_request_is_tried_once_and_then_as_often_as_the_attributes_say() {
        let mut patience = patience(2, None);
        patience.start(Nanos::ZERO, MS);
        assert_eq!(patience.ends(), Some(Nanos::from_millis(4)));
        assert_eq!(patience.lost(Nanos::from_millis(4), MS), Ok(()));
        assert_eq!(patience.lost(Nanos::from_millis(8), MS), Ok(()));
        assert_eq!(patience.ends(), Some(Nanos::from_millis(12)));
        assert_eq!(patience.lost(Nanos::from_millis(12), MS), Err(WcStatus::RetryExcErr));
    }

    #[test]
    fn zero_rnr_retries_fail_at_the_first_and_seven_never() {
        assert_eq!(patience(0, Some(0)).not_ready(MS, MS, MS), Err(WcStatus::RnrRetryExcErr));
        let mut twice = patience(0, Some(2));
        assert_eq!(twice.not_ready(MS, MS, MS), Ok(()));
        assert_eq!(twice.not_ready(MS, MS, MS), Ok(()));
        assert_eq!(twice.not_ready(MS, MS, MS), Err(WcStatus::RnrRetryExcErr));
        let mut forever = patience(0, None);
        assert!((0..1000).all(|_| forever.not_ready(MS, MS, MS).is_ok()));
    }

    #[test]
    fn progress_begins_all_again_and_a_page_makes_one_long_try() {
        let mut patience = patience(1, Some(1));
        assert_eq!((patience.lost(MS, MS), patience.not_ready(MS, MS, MS)), (Ok(()), Ok(())));
        patience.progress(MS, MS);
        assert_eq!((patience.lost(MS, MS), patience.not_ready(MS, MS, MS)), (Ok(()), Ok(())));
        let long = Nanos::from_millis(500);
        patience.page(MS, long);
        patience.page(MS + MS, long);
        assert_eq!(patience.ends(), Some(MS + long));
        assert_eq!(patience.lost(MS, MS), Err(WcStatus::RetryExcErr));
    }

    #[test]
    fn without_a_timeout_a_try_never_ends() {
        let mut patience = Patience::new(Retries { timeout: None, lost: 0, not_ready: None });
        patience.start(Nanos::ZERO, MS);
        assert_eq!(patience.ends(), None);
    }
}
