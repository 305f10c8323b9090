//! Keys of guests and those of the NIC: what the one stands for in terms of the other.
//!
//! A [`Grant`] is all that a queue pair needs to know of a key, wherever the key's owner is: who may use it how, and what to write into
//! a work request for it. It is asked for once, by [`KeyTable::grant`](crate::key_table::KeyTable::grant), kept in the queue pair's
//! [`GrantCache`], and revoked by its owner before what it stands for goes: whoever revokes waits for the quanta under way afterwards.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use virtio_rdma::ib::Access;

use super::device::MemoryRegion;
use crate::nic::keys::RandomKeyMap;

/// What a key gives access to, and how the NIC is told.
#[derive(Debug)]
pub struct Grant {
    /// The guest's key.
    pub key: u32,
    /// Protection domain.
    pub pdn: u32,
    /// What may be done with it.
    pub access: Access,
    /// Address of the first byte, for the guest.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// The NIC's local key.
    pub lkey: u32,
    /// The NIC's remote key.
    pub rkey: u32,
    revoked: AtomicBool,
}

/// Address and key as they stand in a work request for the NIC.
pub type NicAddress = (u64, u32);

impl Grant {
    /// For a region, with its own addresses, as NICs do.
    pub fn region((key, pdn): (u32, u32), access: Access, (iova, length): (u64, u64), mr: &dyn MemoryRegion) -> Self {
        let (lkey, rkey) = (mr.lkey(), mr.rkey());
        Self { key, pdn, access, iova, length, lkey, rkey, revoked: AtomicBool::new(false) }
    }

    /// It gives access to nothing any more. Whoever has found it valid before may still be using it, until their quantum ends.
    pub fn revoke(&self) {
        self.revoked.store(true, Ordering::Release);
    }

    fn is_valid(&self) -> bool {
        !self.revoked.load(Ordering::Acquire)
    }

    /// How the NIC is told of bytes of this side, if a work request of protection domain `pdn` may use them so.
    pub fn local(&self, pdn: u32, need: Access, addr: u64, len: u64) -> Option<NicAddress> {
        self.allows(pdn, need, addr, len).then_some((addr, self.lkey))
    }

    /// How the NIC is told of bytes of the peer's side, if peers of protection domain `pdn` may use them so.
    pub fn remote(&self, pdn: u32, need: Access, addr: u64, len: u64) -> Option<NicAddress> {
        self.allows(pdn, need, addr, len).then_some((addr, self.rkey))
    }

    fn allows(&self, pdn: u32, need: Access, addr: u64, len: u64) -> bool {
        let end = addr.checked_sub(self.iova).and_then(|offset| offset.checked_add(len));
        self.pdn == pdn && self.access.contains(need) && end.is_some_and(|end| end <= self.length)
    }
}

/// Grants that all queue pairs of a virtual NIC remember together.
#[derive(Debug, Default)]
pub struct GrantBudget(AtomicUsize);

impl GrantBudget {
    /// Most of them; those of keys that are no more count too, as long as they are remembered.
    pub const MOST: usize = 1 << 18;

    fn is_used_up(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= Self::MOST
    }
}

/// Grants that a queue pair has asked for. Bounded for each and for all of a virtual NIC, so that it does not matter how many keys a guest
/// uses.
#[derive(Debug)]
pub struct GrantCache {
    by_key: RandomKeyMap<Arc<Grant>>,
    budget: Arc<GrantBudget>,
}

impl GrantCache {
    /// Keys that it holds.
    pub const CAPACITY: usize = 16_384;

    /// An empty one.
    pub fn new(budget: &Arc<GrantBudget>) -> Self {
        Self { by_key: RandomKeyMap::default(), budget: budget.clone() }
    }

    /// What `tell` makes of the grant of a key; `ask` is for one that is not known, or no longer valid.
    #[inline]
    pub fn get(
        &mut self,
        key: u32,
        ask: impl FnOnce() -> Option<Arc<Grant>>,
        tell: impl FnOnce(&Grant) -> Option<NicAddress>,
    ) -> Option<NicAddress> {
        if let Some(grant) = self.by_key.get(&key)
            && grant.is_valid()
        {
            return tell(grant);
        }
        self.fill(key, ask)?;
        tell(self.by_key.get(&key)?)
    }

    #[cold]
    fn fill(&mut self, key: u32, ask: impl FnOnce() -> Option<Arc<Grant>>) -> Option<()> {
        let before = self.by_key.remove(&key);
        self.budget.0.fetch_sub(before.iter().len(), Ordering::Relaxed);
        if self.by_key.len() >= Self::CAPACITY || self.budget.is_used_up() {
            self.forget();
        }
        self.by_key.insert(key, ask()?);
        self.budget.0.fetch_add(1, Ordering::Relaxed);
        Some(())
    }

    /// Forgets all.
    pub fn forget(&mut self) {
        let all = std::mem::take(&mut self.by_key);
        self.budget.0.fetch_sub(all.len(), Ordering::Relaxed);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }
}

impl Drop for GrantCache {
    fn drop(&mut self) {
        self.forget();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Keys;

    impl MemoryRegion for Keys {
        fn lkey(&self) -> u32 {
            11
        }

        fn rkey(&self) -> u32 {
            12
        }
    }

    const RIGHTS: Access = Access::LOCAL_WRITE.union(Access::REMOTE_READ);

    fn region(key: u32) -> Grant {
        Grant::region((key, 7), RIGHTS, (0x1000, 0x100), &Keys)
    }

    #[test]
    fn bounds_rights_and_domain_are_checked() {
        let grant = region(1);
        assert_eq!(grant.local(7, Access::LOCAL_WRITE, 0x1010, 0xf0), Some((0x1010, 11)));
        assert_eq!(grant.remote(7, Access::REMOTE_READ, 0x1000, 1), Some((0x1000, 12)));
        for (pdn, need, addr, len) in [
            (7, Access::LOCAL_WRITE, 0x1010, 0xf1),
            (7, Access::LOCAL_WRITE, 0xfff, 1),
            (7, Access::LOCAL_WRITE, u64::MAX, 2),
            (7, Access::LOCAL_WRITE, 0x1001, u64::MAX),
            (8, Access::LOCAL_WRITE, 0x1000, 1),
            (7, Access::REMOTE_WRITE, 0x1000, 1),
        ] {
            assert_eq!(grant.local(pdn, need, addr, len), None, "{need:?} {addr:#x}+{len:#x}");
        }
    }

    fn knows(cache: &mut GrantCache, key: u32, ask: impl FnOnce() -> Option<Arc<Grant>>) -> bool {
        cache.get(key, ask, |grant| grant.local(7, RIGHTS, 0x1000, 1)).is_some()
    }

    #[test]
    fn what_was_revoked_is_asked_for_again() {
        let mut cache = GrantCache::new(&Arc::default());
        let first = Arc::new(region(1));
        assert!(knows(&mut cache, 1, || Some(first.clone())));
        assert!(knows(&mut cache, 1, || panic!("it is known")));
        first.revoke();
        assert!(!knows(&mut cache, 1, || None));
        assert!(cache.is_empty(), "what does not exist is not remembered");
    }

    #[test]
    fn it_never_holds_more_than_its_capacity() {
        let mut cache = GrantCache::new(&Arc::default());
        for key in 0..2 * GrantCache::CAPACITY as u32 + 5 {
            assert!(knows(&mut cache, key, || Some(Arc::new(region(key)))));
            assert!(cache.len() <= GrantCache::CAPACITY);
        }
    }

    #[test]
    fn all_together_hold_no_more_than_their_budget_and_one_each() {
        let budget = Arc::new(GrantBudget::default());
        let mut caches: Vec<_> = (0..20).map(|_| GrantCache::new(&budget)).collect();
        for cache in &mut caches {
            for key in 0..GrantCache::CAPACITY as u32 {
                assert!(knows(cache, key, || Some(Arc::new(region(key)))));
            }
        }
        let held = caches.iter().map(GrantCache::len).sum::<usize>();
        assert!((GrantBudget::MOST..=GrantBudget::MOST + caches.len()).contains(&held), "{held}");
        assert_eq!(budget.0.load(Ordering::Relaxed), held);
        caches.clear();
        assert_eq!(budget.0.load(Ordering::Relaxed), 0);
    }
}
