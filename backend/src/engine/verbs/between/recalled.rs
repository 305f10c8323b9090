//! Keys that stand for nothing any more, of which the peer was told that: whoever takes one away waits for the answer.

use freeflow_tcp::frame::{Note, PairId};
use freeflow_tcp::{Link, Nanos};
use rustc_hash::FxHashMap;

use crate::verbs::grant::Recall;

/// What was not answered is said again after this time: it is lost with a connection.
const AGAIN: Nanos = Nanos::from_millis(20);
/// Most that are kept. A peer that answers none of so many is not waited for.
const MOST: usize = 1 << 16;

/// Those of a link.
#[derive(Debug, Default)]
pub(super) struct Recalled {
    unanswered: FxHashMap<(PairId, u32), Recall>,
    next: Nanos,
}

impl Recalled {
    /// Tells the peer.
    pub fn say(&mut self, recall: Recall, now: Nanos, link: &mut Link) {
        if self.unanswered.is_empty() {
            self.next = now + AGAIN;
        }
        if self.unanswered.len() >= MOST {
            self.unanswered.clear();
        }
        let (pair, key) = (recall.pair, recall.key);
        link.say(Note::Revoke { pair, key });
        self.unanswered.insert((pair, key), recall);
    }

    /// Tells it again what it has not answered.
    pub fn say_again(&mut self, now: Nanos, link: &mut Link) {
        if self.timer().is_some_and(|at| at <= now) {
            self.next = now + AGAIN;
            for &(pair, key) in self.unanswered.keys() {
                link.say(Note::Revoke { pair, key });
            }
        }
    }

    /// The peer uses it no more.
    pub fn answered(&mut self, pair: PairId, key: u32) {
        self.unanswered.remove(&(pair, key));
    }

    /// When something is to be said again.
    pub fn timer(&self) -> Option<Nanos> {
        (!self.unanswered.is_empty()).then_some(self.next)
    }
}
