//! The rings of a queue that can be given another: the last one counts. Looking at it costs no lock, as pollers do it all the time.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Ring;
use crate::guest::{Error, Result};

/// Most rings that one queue has in its life.
const MOST: usize = 16;

/// Rings of one queue. Those of before stay allocated, so that a device that still used one would be seen.
#[derive(Debug)]
pub struct Rings {
    rings: [OnceLock<Ring>; MOST],
    current: AtomicUsize,
}

impl Rings {
    /// With the first.
    pub fn new(first: Ring) -> Self {
        let rings = Self { rings: [const { OnceLock::new() }; MOST], current: AtomicUsize::new(0) };
        rings.rings[0].get_or_init(|| first);
        rings
    }

    /// The one in use.
    #[inline]
    pub fn current(&self) -> &Ring {
        self.rings[self.current.load(Ordering::Acquire)].get().expect("a ring that was put there")
    }

    /// Uses another.
    pub fn replace(&self, ring: Ring) -> Result<()> {
        let next = self.current.load(Ordering::Acquire) + 1;
        self.rings.get(next).ok_or(Error::Full)?.get_or_init(|| ring);
        self.current.store(next, Ordering::Release);
        Ok(())
    }
}
