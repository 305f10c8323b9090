//! Mappings of this process that regions use: a process may have so many, and whatever else needs memory needs some, too.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The kernel's own default for how many mappings a process may have.
const USUAL: usize = 65_530;

/// How many regions use.
#[derive(Debug)]
pub struct Mappings {
    used: AtomicUsize,
    most: usize,
}

/// Some of them; given back when dropped.
#[derive(Debug)]
pub struct Taken {
    of: Arc<Mappings>,
    count: usize,
}

impl Mappings {
    /// Half of what the kernel allows.
    pub fn of_process() -> Arc<Self> {
        let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
        Self::at_most(text.trim().parse().unwrap_or(USUAL) / 2)
    }

    fn at_most(most: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), most })
    }

    /// So many more; `None` if those would be too many.
    pub fn take(self: &Arc<Self>, count: usize) -> Option<Taken> {
        let add = |used: usize| used.checked_add(count).filter(|sum| *sum <= self.most);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).ok()?;
        Some(Taken { of: self.clone(), count })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.of.used.fetch_sub(self.count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_so_many_and_what_is_given_back_can_be_had_again() {
        let all = Mappings::at_most(10);
        let (some, more) = (all.take(6).unwrap(), all.take(3).unwrap());
        assert!(all.take(2).is_none() && all.take(usize::MAX).is_none());
        let last = all.take(1).unwrap();
        assert!(all.take(1).is_none());
        drop(some);
        assert!(all.take(7).is_none());
        drop((more, last));
        assert_eq!(all.take(10).unwrap().count, 10);
    }
}
