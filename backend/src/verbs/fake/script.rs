//! How a fake NIC behaves, and what is to be known of it afterwards.

use std::time::Duration;

use virtio_rdma::ib::AtomicCap;

use super::super::device::Limits;

/// When work requests are executed, and when that is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timing {
    /// As they are posted.
    AtOnce,
    /// Late: while it is polled, one here and one there, and completions of different queues in any order. In each queue, order holds.
    Shuffled {
        /// Other seeds, other orders.
        seed: u64,
    },
}

/// How a fake NIC behaves.
#[derive(Debug, Clone, Copy)]
pub struct Script {
    /// When work requests are executed.
    pub timing: Timing,
    /// How much it can do.
    pub limits: Limits,
    /// How long a registration takes.
    pub registration: Duration,
    /// Bytes that may be pinned.
    pub memlock: u64,
}

impl Default for Script {
    fn default() -> Self {
        let limits = Limits {
            qps: 1 << 17,
            wrs: 1 << 15,
            sges: 32,
            inline: 512,
            cqs: 1 << 16,
            cqes: 1 << 22,
            mrs: 1 << 20,
            reads: 16,
            mtu: 5,
            atomics: AtomicCap::Hca,
        };
        Self { timing: Timing::AtOnce, limits, registration: Duration::ZERO, memlock: u64::MAX }
    }
}

impl Script {
    /// Late and in any order.
    pub fn shuffled(seed: u64) -> Self {
        Self { timing: Timing::Shuffled { seed }, ..Self::default() }
    }
}

/// What a fake NIC has and what it did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Protection domains that exist.
    pub pds: usize,
    /// Memory regions that exist.
    pub mrs: usize,
    /// Completion queues that exist.
    pub cqs: usize,
    /// Queue pairs that exist.
    pub qps: usize,
    /// Registrations that were ever made.
    pub registrations: u64,
    /// Send work requests posted.
    pub posted: u64,
    /// Send work requests executed with success.
    pub sent: u64,
    /// Bytes moved for them.
    pub bytes: u64,
    /// Messages that came to a queue pair without a receive.
    pub not_ready: u64,
}
