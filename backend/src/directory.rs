//! Objects by number, for workers to look up without a lock and without waiting for anybody: not for one that changes the directory,
//! and not for one that was interrupted while it did.
//!
//! A fixed number of buckets, each an immutable list; a change puts another list in the place of one. Who looks up sees the list of
//! before or that of after. What it found stays alive while it has it; that nobody *uses* any more what was removed is for the remover
//! to wait for, see [`crate::engine::quiesce`].

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwapOption;

/// Objects of a full directory that share a bucket. A change makes a new list of as many.
const SHARE: u32 = 8;
/// Bounds of the number of buckets: each costs a word, used or not.
const FEWEST: u32 = 1 << 6;
const MOST: u32 = 1 << 14;

/// The objects of one bucket. Numbers are side by side, so that a look costs a cache line or two.
#[derive(Debug)]
struct Bucket<T> {
    numbers: Box<[u32]>,
    objects: Box<[Arc<T>]>,
}

/// Objects by number.
#[derive(Debug)]
pub struct Directory<T> {
    buckets: Box<[ArcSwapOption<Bucket<T>>]>,
    len: AtomicUsize,
}

impl<T> Directory<T> {
    /// For about so many objects; more do no harm but to speed.
    pub fn new(most: u32) -> Self {
        let buckets = (most / SHARE).next_power_of_two().clamp(FEWEST, MOST);
        Self { buckets: (0..buckets).map(|_| ArcSwapOption::empty()).collect(), len: AtomicUsize::new(0) }
    }

    /// The object of this number.
    #[inline]
    pub fn get(&self, number: u32) -> Option<Arc<T>> {
        let bucket = self.bucket(number).load();
        let bucket = bucket.as_ref()?;
        bucket.position(number).map(|at| bucket.objects[at].clone())
    }

    /// Makes this the object of a number, or nothing. Returns what it was before.
    pub fn set(&self, number: u32, object: Option<&Arc<T>>) -> Option<Arc<T>> {
        let with = |bucket: &Option<Arc<Bucket<T>>>| Bucket::with(bucket.as_deref(), number, object);
        let before = self.bucket(number).rcu(with);
        let before = before.and_then(|bucket| bucket.position(number).map(|at| bucket.objects[at].clone()));
        match (before.is_some(), object.is_some()) {
            (false, true) => drop(self.len.fetch_add(1, Ordering::Relaxed)),
            (true, false) => drop(self.len.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
        before
    }

    /// All objects. Those that come or go meanwhile may be among them.
    pub fn all(&self) -> Vec<Arc<T>> {
        let lists = self.buckets.iter().filter_map(ArcSwapOption::load_full);
        lists.flat_map(|bucket| bucket.objects.to_vec()).collect()
    }

    /// Removes all objects and returns them.
    pub fn take_all(&self) -> Vec<Arc<T>> {
        // A swap costs ten times a look, and most buckets are empty.
        let used = self.buckets.iter().filter(|bucket| bucket.load().is_some());
        let lists = used.filter_map(|bucket| bucket.swap(None));
        let objects: Vec<_> = lists.flat_map(|bucket| bucket.objects.to_vec()).collect();
        self.len.fetch_sub(objects.len(), Ordering::Relaxed);
        objects
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[inline]
    fn bucket(&self, number: u32) -> &ArcSwapOption<Bucket<T>> {
        // Numbers are random; small ones that are not fill the buckets in turn.
        &self.buckets[number as usize & (self.buckets.len() - 1)]
    }
}

impl<T> Bucket<T> {
    #[inline]
    fn position(&self, number: u32) -> Option<usize> {
        self.numbers.iter().position(|&known| known == number)
    }

    /// The list that has this object for the number, or none.
    fn with(before: Option<&Self>, number: u32, object: Option<&Arc<T>>) -> Option<Arc<Self>> {
        let others = before.into_iter().flat_map(|bucket| bucket.numbers.iter().copied().zip(&bucket.objects));
        let now = others.filter(|&(known, _)| known != number).chain(object.map(|object| (number, object)));
        let (numbers, objects): (Vec<_>, Vec<_>) = now.map(|(number, object)| (number, object.clone())).unzip();
        (!numbers.is_empty()).then(|| Arc::new(Self { numbers: numbers.into(), objects: objects.into() }))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Weak;
    use std::sync::atomic::AtomicBool;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Change {
        Set(u32, u64),
        Remove(u32),
        TakeAll,
    }

    fn change() -> impl Strategy<Value = Change> {
        // Numbers that often share a bucket, of the few that there are for a small directory.
        let number = (0u32..6, 0u32..4).prop_map(|(low, high)| low | (high << 20));
        prop_oneof![
            10 => (number.clone(), any::<u64>()).prop_map(|(n, value)| Change::Set(n, value)),
            5 => number.prop_map(Change::Remove),
            1 => Just(Change::TakeAll),
        ]
    }

    proptest! {
        #[test]
        fn it_has_what_a_map_has(changes in proptest::collection::vec(change(), 1..200)) {
            let (directory, mut map) = (Directory::new(1), HashMap::new());
            for change in changes {
                match change {
                    Change::Set(n, value) => {
                        prop_assert_eq!(directory.set(n, Some(&Arc::new(value))).map(|v| *v), map.insert(n, value));
                    }
                    Change::Remove(n) => prop_assert_eq!(directory.set(n, None).map(|v| *v), map.remove(&n)),
                    Change::TakeAll => {
                        let mut taken: Vec<_> = directory.take_all().iter().map(|v| **v).collect();
                        let mut known: Vec<_> = map.drain().map(|(_, value)| value).collect();
                        taken.sort_unstable();
                        known.sort_unstable();
                        prop_assert_eq!(taken, known);
                    }
                }
                prop_assert_eq!(directory.len(), map.len());
                for n in (0..6).flat_map(|low| (0..4).map(move |high| low | (high << 20))) {
                    prop_assert_eq!(directory.get(n).map(|v| *v), map.get(&n).copied());
                }
                prop_assert_eq!(directory.all().len(), map.len());
            }
        }
    }

    #[test]
    fn what_was_removed_is_freed_at_once_when_nobody_has_it() {
        let directory = Directory::new(1000);
        let weak: Vec<Weak<u32>> = (0..1000)
            .map(|n| {
                let object = Arc::new(n);
                directory.set(n, Some(&object));
                Arc::downgrade(&object)
            })
            .collect();
        for n in 0..1000 {
            drop(directory.set(n, None));
            assert!(weak[n as usize].upgrade().is_none() && (n == 999 || weak[999].upgrade().is_some()));
        }
        assert!(directory.is_empty());
    }

    /// Two threads change what shares buckets with what a third looks up all the time: that is always there, and what comes and goes is
    /// never another's.
    #[test]
    fn changes_disturb_nobody_and_none_is_lost() {
        const ROUNDS: u32 = 20_000;
        let directory = Directory::new(1);
        let number = |who: u32, n: u32| (who << 24) | (n % 256);
        directory.set(number(3, 0), Some(&Arc::new(number(3, 0))));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writers = [1, 2].map(|who| {
                let directory = &directory;
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let n = number(who, round);
                        assert!(directory.set(n, Some(&Arc::new(n))).is_none());
                        assert_eq!(directory.set(n, None).map(|found| *found), Some(n));
                    }
                })
            });
            let reader = scope.spawn(|| {
                let mut looks = 0u32;
                while !done.load(Ordering::Relaxed) || looks < ROUNDS {
                    assert_eq!(*directory.get(number(3, 0)).expect("it is always there"), number(3, 0));
                    for n in [number(1, looks), number(2, looks)] {
                        assert!(directory.get(n).is_none_or(|found| *found == n));
                    }
                    looks += 1;
                }
            });
            for writer in writers {
                writer.join().unwrap();
            }
            done.store(true, Ordering::Relaxed);
            reader.join().unwrap();
        });
        assert_eq!(directory.len(), 1);
    }
}
