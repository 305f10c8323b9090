//! Completions of queue pairs that have numbers, which a NIC uses again.
//!
//! Not every driver throws away what a queue pair that is destroyed has completed. To be rid of that, all there is is taken from the completion
//! queue, and what is others' is kept for the next who polls. Meanwhile no new queue pair gets a number: it might be the same one.

use std::collections::VecDeque;

use parking_lot::Mutex;

use super::super::device::Wc;

/// Completions that are asked for at a time.
pub const BATCH: usize = 32;

/// A completion queue of a device.
pub trait Source {
    /// Takes at most so many completions, and not more than [`BATCH`]; tells each with the number of its queue pair. How many there were.
    fn take(&self, most: usize, each: impl FnMut(u32, Wc)) -> usize;
}

/// Such a queue, and what was taken from it ahead of time.
#[derive(Debug)]
pub struct Ahead<S> {
    /// The queue.
    pub source: S,
    /// Held while the queue is polled, so that order is kept.
    taken: Mutex<VecDeque<Wc>>,
    /// Held while a number goes out of use, or comes into it.
    numbers: Mutex<()>,
}

impl<S: Source> Ahead<S> {
    /// Nothing was taken yet.
    pub fn of(source: S) -> Self {
        Self { source, taken: Mutex::default(), numbers: Mutex::default() }
    }

    /// Appends completions that there are, at most so many.
    pub fn poll(&self, most: usize, out: &mut Vec<Wc>) {
        let mut taken = self.taken.lock();
        let before = taken.len().min(most);
        out.extend(taken.drain(..before));
        let mut left = most - before;
        while left > 0 {
            let wanted = left.min(BATCH);
            let count = self.source.take(wanted, |_, wc| out.push(wc));
            if count < wanted {
                return;
            }
            left -= count;
        }
    }

    /// Makes a queue pair that completes here.
    pub fn make<T>(&self, make: impl FnOnce() -> T) -> T {
        let _numbers = self.numbers.lock();
        make()
    }

    /// Destroys the queue pair of this number. Nothing that it completed is seen after this.
    pub fn destroy(&self, number: u32, destroy: impl FnOnce()) {
        let _numbers = self.numbers.lock();
        destroy();
        let mut taken = self.taken.lock();
        let mut keep = |of, wc| {
            if of != number {
                taken.push_back(wc);
            }
        };
        while self.source.take(BATCH, &mut keep) == BATCH {}
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use virtio_rdma::ib::{WcOpcode, WcStatus};

    use super::*;

    /// What a NIC has completed: of which queue pair, and which work request.
    #[derive(Default)]
    struct Scripted(Mutex<VecDeque<(u32, u64)>>);

    impl Scripted {
        fn complete(&self, number: u32, ids: std::ops::Range<u64>) {
            self.0.lock().extend(ids.map(|id| (number, id)));
        }
    }

    impl Source for Scripted {
        fn take(&self, most: usize, mut each: impl FnMut(u32, Wc)) -> usize {
            let mut all = self.0.lock();
            let count = all.len().min(most).min(BATCH);
            for (number, id) in all.drain(..count) {
                each(number, Wc { id, status: WcStatus::Success, opcode: WcOpcode::Send, byte_len: 0, imm: None });
            }
            count
        }
    }

    fn polled(queue: &Ahead<Scripted>, most: usize) -> Vec<u64> {
        let mut out = Vec::new();
        queue.poll(most, &mut out);
        out.iter().map(|wc| wc.id).collect()
    }

    #[test]
    fn what_others_completed_is_kept_in_order() {
        let queue = Ahead::of(Scripted::default());
        queue.source.complete(1, 0..40);
        queue.source.complete(2, 40..100);
        queue.source.complete(1, 100..120);
        queue.destroy(2, || queue.source.complete(2, 120..125));
        queue.source.complete(1, 125..200);
        assert_eq!(polled(&queue, 10), (0..10).collect::<Vec<_>>());
        assert_eq!(polled(&queue, 100), (10..40).chain(100..120).chain(125..175).collect::<Vec<_>>());
        assert_eq!(polled(&queue, 100), (175..200).collect::<Vec<_>>());
    }

    /// One that is made meanwhile has the number of the one that goes, and completes something before that is forgotten.
    #[test]
    fn a_number_that_is_used_again_at_once_loses_nothing() {
        let queue = Ahead::of(Scripted::default());
        queue.source.complete(7, 0..3);
        std::thread::scope(|scope| {
            let queue = &queue;
            queue.destroy(7, || {
                scope.spawn(move || queue.make(|| queue.source.complete(7, 3..5)));
                // Time enough, if it did not have to wait.
                std::thread::sleep(Duration::from_millis(50));
            });
        });
        assert_eq!(polled(&queue, 10), [3, 4]);
    }
}
