//! Numbers that a guest cannot guess: keys of memory regions and QP numbers.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use rand::Rng;

/// A map from numbers that are random already; hashing them again would be waste.
pub type RandomKeyMap<T> = HashMap<u32, T, BuildHasherDefault<TakeAsIs>>;

/// A set of such numbers.
pub type RandomKeySet = HashSet<u32, BuildHasherDefault<TakeAsIs>>;

/// Hasher for keys made by this module.
#[derive(Debug, Default, Clone, Copy)]
pub struct TakeAsIs(u64);

impl Hasher for TakeAsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u32(&mut self, value: u32) {
        // The map takes its buckets from low bits and its tags from high ones.
        self.0 = u64::from(value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// QP numbers below this are special (IBA 3.5.11); so is the last one, which means multicast.
const FIRST_QPN: u32 = 16;
const LAST_QPN: u32 = 0xff_fffe;

/// A random QP number for which `taken` is false.
pub fn random_qpn(taken: impl Fn(u32) -> bool) -> u32 {
    random(|| rand::rng().random_range(FIRST_QPN..=LAST_QPN), taken)
}

/// A random memory key for whose upper 24 bits `taken` is false; they are never zero, which applications take for "none".
pub fn random_key(taken: impl Fn(u32) -> bool) -> u32 {
    let index = random(|| rand::rng().random_range(1..=0xff_ffff), taken);
    index << 8 | u32::from(rand::rng().random::<u8>())
}

fn random(draw: impl Fn() -> u32, taken: impl Fn(u32) -> bool) -> u32 {
    loop {
        let number = draw();
        if !taken(number) {
            return number;
        }
    }
}
