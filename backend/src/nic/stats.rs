//! Counters of a virtual NIC.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use virtio_rdma::ib::WcStatus;

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// Counters that workers and the control queue add to.
        /// On cache lines of their own: what lies beside them is read by every worker.
        #[derive(Debug, Default)]
        #[repr(align(128))]
        pub struct Counters { $($(#[doc = $doc])* pub $name: Counter,)* }

        /// Values of [`Counters`] at one moment.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct CounterValues { $($(#[doc = $doc])* pub $name: u64,)* }

        impl CounterValues {
            /// Names of all, in the order of [`named`](Self::named), and what they count.
            pub const DESCRIPTIONS: &[(&str, &str)] = &[$((stringify!($name), concat!($($doc),*)),)*];

            /// All values with their names.
            pub fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }

        impl Counters {
            /// All values now.
            pub fn values(&self) -> CounterValues {
                CounterValues { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Work requests completed, of all kinds and statuses.
    send_wqes,
    /// Bytes moved by work requests of this NIC.
    send_bytes,
    /// Work requests that the host's NIC has done.
    nic_wqes,
    /// Bytes that it has moved for them.
    nic_bytes,
    /// Payload of connected queue pairs that we have moved though the virtual NIC is to use the host's; inline data, which are part of a
    /// work request, do not count.
    copied_bytes,
    /// The same for datagrams, management and multicast among them.
    copied_datagram_bytes,
    /// Receives completed.
    recv_wqes,
    /// Bytes received by SENDs and datagrams.
    recv_bytes,
    /// Completions with an error status, flushes not counted.
    errors,
    /// Completions flushed from QPs in error.
    flushed,
    /// Waits for a receive of the peer.
    rnr_waits,
    /// Waits for a peer that did not answer.
    lost_waits,
    /// Times that it or one of its QPs was held to its rate.
    rate_waits,
    /// Pages of on-demand regions that the guest was asked for.
    page_faults,
    /// Datagrams and unreliable messages dropped: no such destination, `Q_Key`, or receive. Counted by the sender on one host, by the receiver where that is on
    /// another one and known there.
    messages_dropped,
    /// Events given to the guest.
    events,
    /// Control commands executed.
    commands,
    /// Control commands refused.
    commands_refused,
    /// Log lines that were not written because there were too many.
    log_suppressed,
}

impl Counters {
    /// A work request or a receive has failed.
    pub fn count_failure(&self, status: WcStatus) {
        let counter = if status == WcStatus::WrFlushErr { &self.flushed } else { &self.errors };
        counter.add(1);
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
