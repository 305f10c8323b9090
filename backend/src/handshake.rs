//! Protocols between two sides that share nothing but words in memory: who sleeps and who wakes, who arms and who fires.
//!
//! Written over any kind of word: the processor's in the daemon, and in tests those of loom, which tries every order in which the
//! two sides can see each other's writes (`interleavings.rs`). The guest's halves are in `docs/device.md`, 4.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use virtio_rdma::area::{ARM_NEXT, ARM_NONE, ARM_SOLICITED};

/// A word that several threads, or a guest, read and write.
pub trait Word {
    /// What it holds.
    type Value: Copy + PartialEq + From<u8>;

    /// A word of zero.
    fn zero() -> Self;
    /// Reads it.
    fn load(&self, order: Ordering) -> Self::Value;
    /// Writes it.
    fn store(&self, value: Self::Value, order: Ordering);
    /// Exchanges it.
    fn swap(&self, value: Self::Value, order: Ordering) -> Self::Value;
    /// Orders accesses to all words of this kind.
    fn fence(order: Ordering);
    /// Somebody waits for another thread and has looked this many times.
    fn pause(looks: u32);
}

/// Makes a kind of atomic a [`Word`]; `fence` and `Ordering` are those of the place that says so.
macro_rules! word {
    ($atomic:ty, $value:ty, $pause:expr) => {
        impl Word for $atomic {
            type Value = $value;

            fn zero() -> Self {
                Self::new(0)
            }

            fn load(&self, order: Ordering) -> $value {
                self.load(order)
            }

            fn store(&self, value: $value, order: Ordering) {
                self.store(value, order);
            }

            fn swap(&self, value: $value, order: Ordering) -> $value {
                self.swap(value, order)
            }

            fn fence(order: Ordering) {
                fence(order);
            }

            fn pause(looks: u32) {
                $pause(looks);
            }
        }
    };
}

#[cfg(test)]
pub(crate) use word;

word!(AtomicU32, u32, pause);
word!(AtomicU64, u64, pause);

fn pause(looks: u32) {
    if looks < 64 {
        std::hint::spin_loop();
    } else {
        std::thread::sleep(Duration::from_micros(20));
    }
}

/// From here on the others wake us. Look once more for work after this, and then sleep.
pub fn begin_sleep<W: Word>(asleep: &W) {
    asleep.store(1.into(), Ordering::Release);
    // Pairs with the barrier between giving us work and looking whether we sleep.
    W::fence(Ordering::SeqCst);
}

/// We look for work by ourselves again.
pub fn end_sleep<W: Word>(asleep: &W) {
    asleep.store(0.into(), Ordering::Release);
}

/// After giving work to somebody: whether it must be woken.
pub fn must_wake<W: Word>(asleep: &W) -> bool {
    // Pairs with the barrier in `begin_sleep`.
    W::fence(Ordering::SeqCst);
    asleep.load(Ordering::Relaxed) != 0.into()
}

/// Takes all bits of a word; looks first, because an idle word then stays in every core's cache.
pub fn take<W: Word>(word: &W) -> W::Value {
    let none = 0.into();
    if word.load(Ordering::Relaxed) == none { none } else { word.swap(none, Ordering::AcqRel) }
}

/// After a completion was written: whether the guest is to be told. Yes at most once for each arming.
pub fn fire<W: Word<Value = u32>>(arm: &W, solicited: bool) -> bool {
    // Pairs with the guest's barrier between arming and looking at the ring.
    W::fence(Ordering::SeqCst);
    match arm.load(Ordering::Relaxed) {
        ARM_NEXT => arm.swap(ARM_NONE, Ordering::AcqRel) != ARM_NONE,
        ARM_SOLICITED if solicited => arm.swap(ARM_NONE, Ordering::AcqRel) != ARM_NONE,
        _ => false,
    }
}
