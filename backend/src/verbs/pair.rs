//! A queue pair that sends to one of another host over both hosts' NICs: what the other host has said of it.
//!
//! The link that the two hosts talk over (`docs/tcp.md`) brings the answers; the queue pair's visits ask and use them. Both are one worker's.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freeflow_tcp::frame::{Apart, NicEnd, NicKey, PairId, Short};
use parking_lot::Mutex;

use super::device::Access;
use super::grant::{Grant, GrantBudget, GrantCache, Revocations, Terms};
use crate::tcp::PeerId;

/// What is said of a queue pair's connection, on its way between the link and the queue pair.
#[derive(Debug)]
pub struct Pair {
    /// The other host.
    pub peer: PeerId,
    /// Its name.
    pub host: Arc<str>,
    /// Which link to it.
    pub link: u16,
    /// What the two hosts call it.
    pub id: PairId,
    said: Mutex<Said>,
    grants: Mutex<HashMap<u32, Arc<Grant>>>,
    /// They count there.
    budget: Arc<GrantBudget>,
    revocations: Revocations,
}

/// What the other host has said last.
#[derive(Debug, Default)]
struct Said {
    end: Option<Result<NicEnd, Apart>>,
    hold: bool,
    /// Keys that are not for the NIC, and when that was said.
    refused: HashMap<u32, Instant>,
    receives: Receives,
}

/// Receives of the peer's that are on its NIC.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Receives {
    /// So many messages find one, counted from the first.
    pub given: u64,
    /// Why it is no more than that, if more was asked for.
    pub short: Option<Short>,
    /// How often something was said of them.
    pub answers: u64,
}

/// How long a key that is not for the NIC is not asked for again.
const REFUSED_FOR: Duration = Duration::from_millis(20);
/// Most keys of which that is remembered.
const MOST_REFUSED: usize = 64;

/// Protection domain of all grants of other hosts: they have looked at theirs.
pub const ELSEWHERE: u32 = 0;

impl Pair {
    /// Of which nothing was said; keys that it is told of count in its virtual NIC's budget.
    pub fn new((peer, host): (PeerId, Arc<str>), link: u16, id: PairId, budget: &Arc<GrantBudget>) -> Self {
        let (said, grants, revocations) = Default::default();
        Self { peer, host, link, id, said, grants, budget: budget.clone(), revocations }
    }

    /// The end to be connected to, or why there is none.
    pub fn end(&self) -> Option<Result<NicEnd, Apart>> {
        self.said.lock().end
    }

    /// The other host has said which that is.
    pub fn set_end(&self, end: Result<NicEnd, Apart>) {
        let said = &mut self.said.lock();
        said.end = Some(end);
        said.hold = end == Err(Apart::NotThere);
    }

    /// Whether it waits to hear that nothing is sent to the end, which it is told now.
    pub fn take_hold(&self) -> bool {
        std::mem::take(&mut self.said.lock().hold)
    }

    /// Receives.
    pub fn receives(&self) -> Receives {
        self.said.lock().receives
    }

    /// The other host has said how many there are. They do not get fewer.
    pub fn set_given(&self, given: u64, short: Option<Short>) {
        let receives = &mut self.said.lock().receives;
        receives.given = receives.given.max(given);
        receives.short = short;
        receives.answers += 1;
    }

    /// What a key stands for.
    pub fn grant(&self, key: u32) -> Option<Arc<Grant>> {
        self.grants.lock().get(&key).cloned()
    }

    /// How often a grant was revoked.
    #[inline]
    pub fn revocations(&self) -> u64 {
        self.revocations.count()
    }

    /// Whether it was said a moment ago that this key is not for the NIC.
    pub fn is_refused(&self, key: u32, now: Instant) -> bool {
        let refused = &mut self.said.lock().refused;
        let lately = refused.get(&key).is_some_and(|said| now.saturating_duration_since(*said) < REFUSED_FOR);
        if !lately {
            refused.remove(&key);
        }
        lately
    }

    /// The other host has said what a key stands for.
    pub fn set_grant(&self, key: u32, grant: Option<NicKey>, now: Instant) {
        let Some(NicKey { key: nic_key, access, addr, length }) = grant else {
            let refused = &mut self.said.lock().refused;
            if refused.len() >= MOST_REFUSED {
                refused.clear();
            }
            refused.insert(key, now);
            return;
        };
        let access = Access::from_bits_truncate(access);
        let grant = Grant::of_peer(Terms { pdn: ELSEWHERE, access, iova: addr, length }, nic_key);
        let mut grants = self.grants.lock();
        if grants.len() >= GrantCache::CAPACITY || self.budget.is_used_up() {
            self.budget.give_back(grants.len());
            grants.drain().for_each(|(_, grant)| self.revocations.revoke(&grant));
        }
        match grants.insert(key, Arc::new(grant)) {
            Some(before) => self.revocations.revoke(&before),
            None => self.budget.take(1),
        }
    }

    /// A key stands for nothing any more.
    pub fn revoke(&self, key: u32) {
        if let Some(grant) = self.grants.lock().remove(&key) {
            self.budget.give_back(1);
            self.revocations.revoke(&grant);
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.budget.give_back(self.grants.get_mut().len());
    }
}

#[cfg(test)]
mod tests {
    use freeflow_tcp::Nanos;

    use super::super::grant::{GrantBudget, KeySide, Use};
    use super::*;

    const WHOLE: NicKey = NicKey { key: 77, access: Access::REMOTE_READ.bits(), addr: 0x1000, length: 16 };

    fn pair() -> Pair {
        pair_of(&Arc::default())
    }

    fn pair_of(budget: &Arc<GrantBudget>) -> Pair {
        Pair::new((PeerId(1), "two".into()), 0, PairId(5), budget)
    }

    #[test]
    fn a_grant_is_used_until_it_is_revoked_and_within_its_bounds() {
        let (pair, now) = (pair(), Instant::now());
        let mut cache = GrantCache::new(KeySide::Remote, &Arc::<GrantBudget>::default());
        let mut look = |key, addr, need| {
            let wanted = Use { pdn: ELSEWHERE, need, addr, len: 8 };
            cache.get(key, pair.revocations(), wanted, || pair.grant(key))
        };
        assert_eq!(look(3, 0x1000, Access::REMOTE_READ), None);
        pair.set_grant(3, Some(WHOLE), now);
        assert_eq!(look(3, 0x1008, Access::REMOTE_READ), Some((0x1008, 77)));
        assert_eq!(look(3, 0x1009, Access::REMOTE_READ), None);
        assert_eq!(look(3, 0x1000, Access::REMOTE_WRITE), None);
        pair.set_grant(3, Some(NicKey { key: 78, ..WHOLE }), now);
        assert_eq!(look(3, 0x1000, Access::REMOTE_READ), Some((0x1000, 78)), "the newer one");
        pair.revoke(3);
        assert_eq!(look(3, 0x1000, Access::REMOTE_READ), None);
    }

    #[test]
    fn a_peer_that_grants_without_end_is_not_remembered_without_end() {
        let (pair, now) = (pair(), Instant::now());
        for key in 0..3 * GrantCache::CAPACITY as u32 {
            pair.set_grant(key, Some(WHOLE), now);
            assert!(pair.grants.lock().len() <= GrantCache::CAPACITY);
        }
    }

    /// A guest may have thousands of queue pairs, each with a peer that has thousands of keys.
    #[test]
    fn all_pairs_of_a_virtual_nic_together_are_not_told_without_end() {
        let (budget, now) = (Arc::new(GrantBudget::default()), Instant::now());
        let pairs: Vec<_> = (0..20).map(|_| pair_of(&budget)).collect();
        for pair in &pairs {
            for key in 0..GrantCache::CAPACITY as u32 {
                pair.set_grant(key, Some(WHOLE), now);
                assert!(pair.grant(key).is_some());
            }
        }
        let held = |pairs: &[Pair]| pairs.iter().map(|pair| pair.grants.lock().len()).sum::<usize>();
        assert!((GrantBudget::MOST..=GrantBudget::MOST + pairs.len()).contains(&held(&pairs)), "{}", held(&pairs));
        drop(pairs);
        let again = pair_of(&budget);
        (0..100).for_each(|key| again.set_grant(key, Some(WHOLE), now));
        (0..50).for_each(|key| again.revoke(key));
        assert_eq!(held(&[again]), 50, "those that are gone do not count");
    }

    #[test]
    fn a_refusal_is_for_one_key_and_a_while() {
        let (pair, now) = (pair(), Instant::now());
        pair.set_grant(3, None, now);
        assert!(!pair.is_refused(4, now) && pair.is_refused(3, now) && pair.is_refused(3, now));
        assert!(!pair.is_refused(3, now + REFUSED_FOR));
        (0..1000).for_each(|key| pair.set_grant(key, None, now));
        assert!(pair.said.lock().refused.len() <= MOST_REFUSED);
    }

    #[test]
    fn receives_are_not_taken_back() {
        let pair = pair();
        pair.set_given(4, None);
        let short = Some(Short::NotReady(Nanos::from_micros(10)));
        pair.set_given(2, short);
        assert_eq!(pair.receives(), Receives { given: 4, short, answers: 2 });
    }
}
