//! How long a worker has slept, for whoever looks from another thread at any moment.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The worker sleeps since the time in the other bits, from which earlier sleep is taken off already.
const ASLEEP: u64 = 1 << 63;

/// One worker's. It is one word, so that no look ever shows less than one before.
#[derive(Debug)]
pub struct Rest {
    start: Instant,
    word: AtomicU64,
}

/// What a worker did with its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spent {
    /// It worked, or looked for work.
    pub awake: Duration,
    /// It slept.
    pub asleep: Duration,
}

impl Rest {
    /// Awake from now on.
    pub fn new(now: Instant) -> Self {
        Self { start: now, word: AtomicU64::new(0) }
    }

    fn nanos(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_nanos() as u64 & !ASLEEP
    }

    /// The worker falls asleep. Only itself calls this.
    pub fn begin(&self, now: Instant) {
        let slept = self.word.load(Ordering::Relaxed);
        self.word.store(ASLEEP | self.nanos(now).saturating_sub(slept), Ordering::Relaxed);
    }

    /// It wakes up. Only itself calls this.
    pub fn end(&self, now: Instant) {
        let since = self.word.load(Ordering::Relaxed) & !ASLEEP;
        self.word.store(self.nanos(now).saturating_sub(since), Ordering::Relaxed);
    }

    /// Up to now.
    pub fn spent(&self, now: impl FnOnce() -> Instant) -> Spent {
        let word = self.word.load(Ordering::Relaxed);
        let all = self.nanos(now());
        let asleep = if word & ASLEEP == 0 { word } else { all.saturating_sub(word & !ASLEEP) };
        Spent { awake: Duration::from_nanos(all.saturating_sub(asleep)), asleep: Duration::from_nanos(asleep) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_is_added_up_also_while_it_lasts() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let rest = Rest::new(start);
        let spent = |seconds| {
            let spent = rest.spent(|| at(seconds));
            (spent.awake.as_secs(), spent.asleep.as_secs())
        };
        assert_eq!(spent(5), (5, 0));
        rest.begin(at(10));
        assert_eq!((spent(10), spent(13)), ((10, 0), (10, 3)));
        rest.end(at(14));
        assert_eq!((spent(14), spent(20)), ((10, 4), (16, 4)));
        rest.begin(at(20));
        rest.end(at(21));
        assert_eq!(spent(30), (25, 5));
    }
}
