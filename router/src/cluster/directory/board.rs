//! Where a source of a directory puts what it knows, for all to see.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::{Health, Known};

/// The present knowledge, and how old it is.
#[derive(Debug)]
pub struct Board {
    known: ArcSwap<Known>,
    changes: watch::Sender<u64>,
    /// `None` while it is up to date, else since when it may not be.
    cut_off: Mutex<Option<Instant>>,
    refused: AtomicUsize,
}

impl Board {
    /// With what is known at first.
    pub fn new(known: Known) -> Self {
        Self {
            known: ArcSwap::from_pointee(known),
            changes: watch::Sender::new(0),
            cut_off: Mutex::new(Some(Instant::now())),
            refused: AtomicUsize::new(0),
        }
    }

    /// What is known now.
    pub fn snapshot(&self) -> Arc<Known> {
        self.known.load_full()
    }

    /// Told of each new snapshot.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// How good the knowledge is.
    pub fn health(&self) -> Health {
        let cut_off = *self.cut_off();
        Health {
            connected: cut_off.is_none(),
            age: cut_off.map_or(Duration::ZERO, |since| since.elapsed()),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }

    /// New knowledge; nobody is woken by what is no news.
    pub fn post(&self, known: Known) {
        if *self.known.load_full() != known {
            self.known.store(Arc::new(known));
            self.changes.send_modify(|generation| *generation += 1);
        }
    }

    /// Whether changes are heard of from now on.
    pub fn set_connected(&self, connected: bool) {
        let mut cut_off = self.cut_off();
        if connected != cut_off.is_none() {
            *cut_off = (!connected).then(Instant::now);
        }
    }

    /// So many virtual NICs are here whose addresses are others'.
    pub fn set_refused(&self, count: usize) {
        self.refused.store(count, Ordering::Relaxed);
    }

    fn cut_off(&self) -> MutexGuard<'_, Option<Instant>> {
        self.cut_off.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_host(name: &str) -> Known {
        let mut known = Known::default();
        known.set_host(name.parse().unwrap(), "192.0.2.1:7471".parse().unwrap());
        known
    }

    #[test]
    fn only_news_wake() {
        let board = Board::new(with_host("host1"));
        let mut changed = board.changed();
        board.post(with_host("host1"));
        assert!(!changed.has_changed().unwrap());
        board.post(with_host("host2"));
        assert!(changed.has_changed().unwrap());
        changed.mark_unchanged();
        assert_eq!(*board.snapshot(), with_host("host2"));
        assert!(!changed.has_changed().unwrap());
    }

    #[test]
    fn knowledge_ages_while_cut_off() {
        let board = Board::new(Known::default());
        assert!(!board.health().connected);
        board.set_connected(true);
        assert_eq!(board.health(), Health { connected: true, age: Duration::ZERO, refused: 0 });
        board.set_connected(false);
        std::thread::sleep(Duration::from_millis(2));
        board.set_connected(false);
        let health = board.health();
        assert!(!health.connected && health.age >= Duration::from_millis(2), "{health:?}");
    }
}
