#![expect(unsafe_code, reason = "atomics on memory that guests share")]
//! Atomic operations on guest memory (IBA 9.4.5), done by this processor, so that they are atomic with those of
//! every guest's processors and of other workers.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Seg;

/// What to do with a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtomicOp {
    /// Stores `swap` if the word is `compare`.
    CompareSwap {
        /// Expected value.
        compare: u64,
        /// New value.
        swap: u64,
    },
    /// Adds, modulo 2^64.
    FetchAdd(u64),
}

/// Does it; the value from before. `None` unless `seg` is one aligned word of 8 bytes.
pub fn atomic(seg: Seg, op: AtomicOp) -> Option<u64> {
    if seg.len != size_of::<u64>() || !seg.ptr.addr().is_multiple_of(size_of::<u64>()) {
        return None;
    }
    // SAFETY: 8 aligned bytes inside a live mapping (the segment's invariant); atomics are the access for memory that others
    // change at the same time.
    let word = unsafe { AtomicU64::from_ptr(seg.ptr.cast()) };
    Some(match op {
        AtomicOp::CompareSwap { compare, swap } => {
            match word.compare_exchange(compare, swap, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(old) | Err(old) => old,
            }
        }
        AtomicOp::FetchAdd(add) => word.fetch_add(add, Ordering::SeqCst),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seg(words: &mut [u64], offset: usize, len: usize) -> Seg {
        Seg { ptr: words.as_mut_ptr().cast(), len: words.len() * 8 }.slice(offset, len)
    }

    #[test]
    fn swaps_on_a_match_only_and_adds_modulo() {
        let mut words = [5, u64::MAX];
        let swap = |compare| AtomicOp::CompareSwap { compare, swap: 9 };
        assert_eq!(atomic(seg(&mut words, 0, 8), swap(4)), Some(5));
        assert_eq!(words[0], 5);
        assert_eq!(atomic(seg(&mut words, 0, 8), swap(5)), Some(5));
        assert_eq!(words[0], 9);
        assert_eq!(atomic(seg(&mut words, 8, 8), AtomicOp::FetchAdd(3)), Some(u64::MAX));
        assert_eq!(words[1], 2);
    }

    #[test]
    fn only_one_aligned_word() {
        let mut words = [0, 0, 0];
        for (offset, len) in [(4, 8), (1, 8), (0, 4), (0, 16), (0, 0)] {
            assert_eq!(atomic(seg(&mut words, offset, len), AtomicOp::FetchAdd(1)), None);
        }
        assert_eq!(words, [0; 3]);
    }
}
