//! Time as the core is told it: nobody in here looks at a clock.

use std::ops::{Add, Sub};

/// Nanoseconds: a point in time, from any beginning that stays, or a length of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Nanos(pub u64);

impl Nanos {
    /// No time at all.
    pub const ZERO: Self = Self(0);

    /// So many milliseconds.
    pub const fn from_millis(ms: u32) -> Self {
        Self(ms as u64 * 1_000_000)
    }

    /// So many microseconds.
    pub const fn from_micros(us: u32) -> Self {
        Self(us as u64 * 1_000)
    }

    /// In microseconds; those that need more than 32 bits are cut to that.
    pub fn as_micros(self) -> u32 {
        u32::try_from(self.0 / 1_000).unwrap_or(u32::MAX)
    }

    /// Twice as long, but no longer than this.
    #[must_use]
    pub fn doubled(self, most: Self) -> Self {
        Self(self.0.saturating_mul(2)).min(most)
    }
}

impl Add for Nanos {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sub for Nanos {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}
