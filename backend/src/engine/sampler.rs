//! Which work requests are timed: asking a clock costs a good part of a small one, so not all are.

use std::time::{Duration, Instant};

/// How far apart those that are timed are to be, at least: where work requests come more slowly, each one is.
const APART: Duration = Duration::from_micros(20);
/// Most that one stands for.
const MOST: u32 = 1024;

/// When a worker has seen a work request that is timed.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// When.
    pub at: Instant,
    /// How many it stands for: itself, and those since the last one.
    pub of: u32,
}

/// Picks them. The distances vary, so that a pattern in the work does not meet one in the picking.
#[derive(Debug)]
pub struct Sampler {
    left: u32,
    distance: u32,
    /// Of those, in the mean.
    every: u32,
    last: Instant,
    seed: u32,
}

impl Sampler {
    /// Picks the first one.
    pub fn new(now: Instant) -> Self {
        Self { left: 1, distance: 1, every: 1, last: now, seed: 0x9e37_79b9 }
    }

    /// A work request is seen. `Some` if it is one that is timed.
    #[inline]
    pub fn see(&mut self) -> Option<Seen> {
        self.left -= 1;
        (self.left == 0).then(|| self.pick(Instant::now()))
    }

    #[cold]
    fn pick(&mut self, now: Instant) -> Seen {
        let gap = now.saturating_duration_since(self.last);
        self.every = if gap < APART { (self.every * 2).min(MOST) } else { (self.every / 2).max(1) };
        self.last = now;
        let seen = Seen { at: now, of: self.distance };
        // From 1 to 2 * every - 1 (xorshift, Marsaglia 2003).
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 17;
        self.seed ^= self.seed << 5;
        self.distance = 1 + self.seed % (2 * self.every - 1);
        self.left = self.distance;
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sees work requests that come so far apart; those that were timed, and how many they stand for.
    fn run(apart: Duration, count: u32) -> (u32, u32) {
        let start = Instant::now();
        let mut sampler = Sampler::new(start);
        let (mut timed, mut of) = (0, 0);
        for n in 1..=count {
            sampler.left -= 1;
            if sampler.left == 0 {
                timed += 1;
                of += sampler.pick(start + apart * n).of;
            }
        }
        (timed, of)
    }

    #[test]
    fn slow_ones_are_all_timed() {
        assert_eq!(run(Duration::from_micros(100), 1000), (1000, 1000));
    }

    #[test]
    fn fast_ones_are_timed_now_and_then_and_stand_for_the_others() {
        // A second of ten million each second.
        let (timed, of) = run(Duration::from_nanos(100), 10_000_000);
        let expected = 50_000;
        assert!((expected / 4..=expected).contains(&timed), "{timed} were timed");
        assert!((10_000_000 - 2 * MOST..=10_000_000).contains(&of), "they stand for {of}");
    }
}
