//! Waiting until no worker can still be using what was just taken away.
//!
//! Workers look things up (keys, QPs, areas, "is this NIC running?") and use what they found within
//! one *quantum* of work, at most 64 KiB of copying. Whoever removes something first makes it impossible to find and then calls
//! [`Quiesce::wait`]: when that returns, every quantum that may have found it is over. A worker, which is in a quantum itself, waits
//! for the others without blocking ([`Quiesce::begin`]), and goes on with other work meanwhile: two that waited for each other would wait for ever.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::handshake::Word;

/// On a cache line of its own, so that workers do not disturb each other.
#[derive(Debug)]
#[repr(align(128))]
struct Ticks<W>(W);

/// For each worker a count that is odd within a quantum.
#[derive(Debug)]
pub struct Quiesce<W = AtomicU64> {
    workers: Box<[Ticks<W>]>,
}

/// Quanta that were under way at some time: workers with their counts.
#[derive(Debug)]
pub struct Grace(Vec<(usize, u64)>);

impl<W: Word<Value = u64>> Quiesce<W> {
    /// For this many workers.
    pub fn new(workers: usize) -> Self {
        Self { workers: (0..workers).map(|_| Ticks(W::zero())).collect() }
    }

    /// A worker starts a quantum. What it looks up from here on is safe until [`leave`](Self::leave).
    pub fn enter(&self, worker: usize) {
        let ticks = &self.workers[worker].0;
        ticks.store(ticks.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        // Pairs with the fence in `wait`: either the waiter sees this quantum, or we see what it removed.
        W::fence(Ordering::SeqCst);
    }

    /// The quantum is over.
    pub fn leave(&self, worker: usize) {
        let ticks = &self.workers[worker].0;
        ticks.store(ticks.load(Ordering::Relaxed) + 1, Ordering::Release);
    }

    /// What a worker has to wait for, without blocking, after it took something away itself: quanta of the others.
    pub fn begin(&self, worker: usize) -> Grace {
        W::fence(Ordering::SeqCst);
        let others = self.workers.iter().enumerate().filter(|&(index, _)| index != worker);
        let under_way = others.map(|(index, ticks)| (index, ticks.0.load(Ordering::Acquire)));
        Grace(under_way.filter(|(_, ticks)| !ticks.is_multiple_of(2)).collect())
    }

    /// Whether all those quanta are over.
    pub fn is_over(&self, grace: &Grace) -> bool {
        let over = grace.0.iter().all(|&(worker, ticks)| self.workers[worker].0.load(Ordering::Acquire) != ticks);
        if over {
            W::fence(Ordering::SeqCst);
        }
        over
    }

    /// Returns when every quantum that was under way at the call is over. Not for workers.
    pub fn wait(&self) {
        W::fence(Ordering::SeqCst);
        for ticks in &self.workers {
            let seen = ticks.0.load(Ordering::Acquire);
            if seen.is_multiple_of(2) {
                continue;
            }
            let mut spins = 0u32;
            while ticks.0.load(Ordering::Acquire) == seen {
                W::pause(spins);
                spins = spins.saturating_add(1);
            }
        }
        W::fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grace_is_for_quanta_under_way_but_for_ones_own() {
        let quiesce = Quiesce::<AtomicU64>::new(3);
        quiesce.enter(0);
        assert!(quiesce.is_over(&quiesce.begin(0)), "nobody else is at work");
        quiesce.enter(1);
        let grace = quiesce.begin(0);
        quiesce.enter(2);
        assert!(!quiesce.is_over(&grace));
        let theirs = quiesce.begin(1);
        quiesce.leave(1);
        quiesce.enter(1);
        assert!(quiesce.is_over(&grace), "a later quantum does not count");
        assert!(!quiesce.is_over(&theirs));
        quiesce.leave(0);
        quiesce.leave(2);
        assert!(quiesce.is_over(&theirs));
    }
}
