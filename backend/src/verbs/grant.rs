//! Keys of guests and those of the NIC: what the one stands for in terms of the other.
//!
//! A [`Grant`] is all that a queue pair needs to know of a key, wherever the key's owner is: who may use it how, and what to write into
//! a work request for it. It is asked for once, by [`KeyTable::grant`](crate::key_table::KeyTable::grant), kept in the queue pair's
//! [`GrantCache`], and revoked by its owner before what it stands for goes: whoever revokes waits for the quanta under way afterwards.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_queue::SegQueue;
use freeflow_tcp::frame::PairId;
use parking_lot::{Condvar, Mutex};
use virtio_rdma::ib::Access;

use super::device::MemoryRegion;
use crate::mem;

/// Who may use a key how, and for what.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// Protection domain.
    pub pdn: u32,
    /// What may be done with it.
    pub access: Access,
    /// Address of the first byte, for the guest.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
}

/// What a work request does with some bytes.
#[derive(Debug, Clone, Copy)]
pub struct Use {
    /// Protection domain that does it.
    pub pdn: u32,
    /// Access that is needed.
    pub need: Access,
    /// First byte.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

impl Terms {
    #[inline]
    fn allow(&self, Use { pdn, need, addr, len }: Use) -> bool {
        let end = addr.checked_sub(self.iova).and_then(|offset| offset.checked_add(len));
        self.pdn == pdn && self.access.contains(need) && end.is_some_and(|end| end <= self.length)
    }
}

/// What a key gives access to, and how the NIC is told.
#[derive(Debug)]
pub struct Grant {
    terms: Terms,
    /// The NIC's local key.
    lkey: u32,
    /// The NIC's remote key.
    rkey: u32,
    revoked: AtomicBool,
    /// Who was told on other hosts.
    told: Mutex<Vec<(Arc<Recalls>, PairId, u32)>>,
}

/// Revocations that hosts which were told of the keys have not heard of yet.
#[derive(Debug, Default)]
struct Unheard {
    owed: Mutex<Owed>,
    fewer: Condvar,
}

/// Answers that are to come.
#[derive(Debug, Default)]
struct Owed {
    count: usize,
    /// One did not come in time: none is waited for until all have come, or those who owe them are gone.
    late: bool,
}

/// A key that another host was told of and that stands for nothing any more. It counts as not heard of until it is dropped.
#[derive(Debug)]
pub struct Recall {
    /// Which queue pair of that host was told.
    pub pair: PairId,
    /// Of what.
    pub key: u32,
    unheard: Arc<Unheard>,
}

impl Recall {
    fn new(pair: PairId, key: u32, unheard: &Arc<Unheard>) -> Self {
        unheard.owed.lock().count += 1;
        Self { pair, key, unheard: unheard.clone() }
    }
}

impl Drop for Recall {
    fn drop(&mut self) {
        let mut owed = self.unheard.owed.lock();
        owed.count -= 1;
        owed.late &= owed.count > 0;
        self.unheard.fewer.notify_all();
    }
}

/// Those of a link, to be said by the worker that has it.
pub struct Recalls {
    keys: SegQueue<Recall>,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Recalls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recalls").field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

impl Recalls {
    /// For a link; `wake` wakes its worker.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self { keys: SegQueue::new(), wake: Box::new(wake) }
    }

    fn push(&self, recall: Recall) {
        self.keys.push(recall);
        (self.wake)();
    }

    /// The next one.
    pub fn pop(&self) -> Option<Recall> {
        if self.keys.is_empty() { None } else { self.keys.pop() }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

/// Address and key as they stand in a work request for the NIC.
pub type NicAddress = (u64, u32);

impl Grant {
    /// For a region, with its own addresses, as NICs do.
    pub fn region(terms: Terms, mr: &dyn MemoryRegion) -> Self {
        Self { terms, lkey: mr.lkey(), rkey: mr.rkey(), revoked: AtomicBool::new(false), told: Mutex::default() }
    }

    /// For memory of another host.
    pub fn of_peer(terms: Terms, rkey: u32) -> Self {
        Self { terms, lkey: 0, rkey, revoked: AtomicBool::new(false), told: Mutex::default() }
    }

    /// What a peer on another host is told of it, which is told, too, when it is revoked, by these; `None` if it is already, or too many
    /// know it, or the other keys of its virtual NIC.
    pub fn tell(&self, to: &Arc<Recalls>, pair: PairId, key: u32, revocations: &Revocations) -> Option<(Terms, u32)> {
        let mut told = self.told.lock();
        if !self.is_valid() {
            return None;
        }
        if !told.iter().any(|(recalls, known, _)| *known == pair && Arc::ptr_eq(recalls, to)) {
            if told.len() >= Self::MOST_TOLD || revocations.told.load(Ordering::Relaxed) >= Revocations::MOST_TOLD {
                return None;
            }
            revocations.told.fetch_add(1, Ordering::Relaxed);
            told.push((to.clone(), pair, key));
        }
        Some((self.terms, self.rkey))
    }

    /// Queue pairs of other hosts that may know it; for more the router copies.
    pub const MOST_TOLD: usize = 4096;

    fn is_valid(&self) -> bool {
        !self.revoked.load(Ordering::Acquire)
    }

    /// How the NIC is told of bytes of this side, if they may be used so.
    pub fn local(&self, wanted: Use) -> Option<NicAddress> {
        self.terms.allow(wanted).then_some((wanted.addr, self.lkey))
    }
}

/// Grants that all queue pairs of a virtual NIC remember together.
#[derive(Debug, Default)]
pub struct GrantBudget(AtomicUsize);

impl GrantBudget {
    /// Most of them; those of keys that are no more count too, as long as they are remembered.
    pub const MOST: usize = 1 << 18;

    pub(super) fn is_used_up(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= Self::MOST
    }

    /// So many more are remembered.
    pub(super) fn take(&self, count: usize) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// So many are forgotten.
    pub(super) fn give_back(&self, count: usize) {
        self.0.fetch_sub(count, Ordering::Relaxed);
    }
}

/// How often access was taken away from a virtual NIC's keys that the host's NIC has too. As long as that has not happened again, who
/// remembers a grant need not look at it.
#[derive(Debug, Default)]
pub struct Revocations {
    count: AtomicU64,
    unheard: Arc<Unheard>,
    /// How many queue pairs of other hosts know one of the keys, counted for each key.
    told: AtomicUsize,
}

impl Revocations {
    /// Most of those for all keys of a virtual NIC: each is remembered.
    pub const MOST_TOLD: usize = 1 << 18;

    /// How many there have been. Asked for before what is remembered is used.
    #[inline]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// This grant gives access to nothing any more. Whoever has found it valid before may still be using it, until their quantum ends.
    pub fn revoke(&self, grant: &Grant) {
        grant.revoked.store(true, Ordering::Release);
        // After that: who sees the new count sees the mark.
        self.count.fetch_add(1, Ordering::Release);
        let told = std::mem::take(&mut *grant.told.lock());
        self.told.fetch_sub(told.len(), Ordering::Relaxed);
        for (recalls, pair, key) in told {
            recalls.push(Recall::new(pair, key, &self.unheard));
        }
    }

    /// Waits until all hosts that were told of what was revoked have heard that, or for so long. One that has not answered in time once is not
    /// waited for again: it is gone, most likely, and a guest that ends has many regions. False the first time.
    pub fn wait_heard(&self, limit: Duration) -> bool {
        let mut owed = self.unheard.owed.lock();
        let heard = |owed: &mut Owed| owed.count == 0 || owed.late;
        let waited = self.unheard.fewer.wait_while_for(&mut owed, |owed| !heard(owed), limit);
        owed.late |= waited.timed_out();
        !waited.timed_out()
    }
}

/// Which of a NIC's two keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeySide {
    /// For a queue pair's own memory.
    Local,
    /// For its peer's.
    Remote,
}

/// All of a grant that its use needs, on one cache line: with thousands of keys in use each look-up waits for memory.
#[derive(Debug, Clone)]
#[repr(align(64))]
struct Known {
    key: u32,
    nic_key: u32,
    terms: Terms,
    /// It was valid after so many revocations.
    as_of: u64,
    grant: Arc<Grant>,
}

impl Known {
    #[inline]
    fn is_valid(&mut self, now: u64) -> bool {
        self.as_of == now || self.look_again(now)
    }

    #[cold]
    fn look_again(&mut self, now: u64) -> bool {
        let valid = self.grant.is_valid();
        if valid {
            self.as_of = now;
        }
        valid
    }

    #[inline]
    fn tell(&self, wanted: Use) -> Option<NicAddress> {
        self.terms.allow(wanted).then_some((wanted.addr, self.nic_key))
    }
}

/// Grants that a queue pair has asked for. Bounded for each and for all of a virtual NIC, so that it does not matter how many keys a guest
/// uses.
#[derive(Debug)]
pub struct GrantCache {
    side: KeySide,
    /// Twice as many as there are grants, or more. A key is in the slot that it hashes to or in one of the few that follow: a guest that
    /// picks keys for that does not make look-ups longer.
    slots: Box<[Option<Known>]>,
    len: usize,
    budget: Arc<GrantBudget>,
}

impl GrantCache {
    /// Keys that it holds.
    pub const CAPACITY: usize = 16_384;
    /// Slots that a key may be in.
    const WINDOW: usize = 8;

    /// An empty one.
    pub fn new(side: KeySide, budget: &Arc<GrantBudget>) -> Self {
        Self { side, slots: Box::default(), len: 0, budget: budget.clone() }
    }

    /// What a key stands for on the NIC, for this use. `now` is how many [`Revocations`] its owner has; `ask` is for one that is not known,
    /// or no longer valid.
    #[inline]
    pub fn get(
        &mut self,
        key: u32,
        now: u64,
        wanted: Use,
        ask: impl FnOnce() -> Option<Arc<Grant>>,
    ) -> Option<NicAddress> {
        if let Some(at) = self.position(key)
            && let Some(known) = &mut self.slots[at]
            && known.is_valid(now)
        {
            return known.tell(wanted);
        }
        self.fill(key, now, ask)?.tell(wanted)
    }

    /// Has what [`get`](Self::get) will need of this key fetched.
    #[inline]
    pub fn prefetch(&self, key: u32) {
        if let Some(slot) = self.window(key).next().and_then(|at| self.slots.get(at)) {
            mem::prefetch_own(slot);
        }
    }

    #[inline]
    fn hash(key: u32) -> usize {
        (u64::from(key).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize
    }

    #[inline]
    fn window(&self, key: u32) -> impl Iterator<Item = usize> + Clone + use<> {
        let count = self.slots.len();
        let home = Self::hash(key);
        (home..home + Self::WINDOW.min(count)).map(move |at| at & (count - 1))
    }

    #[inline]
    fn position(&self, key: u32) -> Option<usize> {
        self.window(key).find(|&at| self.slots[at].as_ref().is_some_and(|known| known.key == key))
    }

    #[cold]
    fn fill(&mut self, key: u32, as_of: u64, ask: impl FnOnce() -> Option<Arc<Grant>>) -> Option<&Known> {
        if let Some(at) = self.position(key) {
            self.set(at, None);
        }
        let grant = ask()?;
        if self.len >= Self::CAPACITY || self.budget.is_used_up() {
            self.forget();
        }
        if self.slots.len() < 2 * (self.len + 1) {
            self.grow();
        }
        let nic_key = if self.side == KeySide::Local { grant.lkey } else { grant.rkey };
        let at = self.put(Known { key, nic_key, terms: grant.terms, as_of, grant });
        self.slots[at].as_ref()
    }

    /// Puts a grant into a free slot for its key, or in place of another.
    fn put(&mut self, known: Known) -> usize {
        let mut window = self.window(known.key);
        let home = window.clone().next().unwrap_or(0);
        let at = window.find(|&at| self.slots[at].is_none()).unwrap_or(home);
        self.set(at, Some(known));
        at
    }

    fn set(&mut self, at: usize, known: Option<Known>) {
        let more = known.iter().len();
        let less = std::mem::replace(&mut self.slots[at], known).iter().len();
        self.len = self.len + more - less;
        self.budget.take(more);
        self.budget.give_back(less);
    }

    fn grow(&mut self) {
        let count = (self.slots.len() * 2).max(2);
        let before = self.take();
        self.slots = vec![None; count].into();
        for known in before.into_iter().flatten() {
            self.put(known);
        }
    }

    /// Forgets all.
    pub fn forget(&mut self) {
        self.take();
    }

    fn take(&mut self) -> Box<[Option<Known>]> {
        self.budget.give_back(std::mem::take(&mut self.len));
        std::mem::take(&mut self.slots)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
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
    const ALL: Use = Use { pdn: 7, need: RIGHTS, addr: 0x1000, len: 0x100 };

    fn region() -> Arc<Grant> {
        Arc::new(Grant::region(Terms { pdn: 7, access: RIGHTS, iova: 0x1000, length: 0x100 }, &Keys))
    }

    fn cache(side: KeySide) -> GrantCache {
        GrantCache::new(side, &Arc::default())
    }

    #[test]
    fn bounds_rights_and_domain_are_checked() {
        let (mut own, mut theirs) = (cache(KeySide::Local), cache(KeySide::Remote));
        let mut both = |wanted| [&mut own, &mut theirs].map(|cache| cache.get(1, 0, wanted, || Some(region())));
        assert_eq!(both(Use { addr: 0x1010, len: 0xf0, ..ALL }), [Some((0x1010, 11)), Some((0x1010, 12))]);
        assert_eq!(region().local(ALL), Some((0x1000, 11)));
        for (pdn, need, addr, len) in [
            (7, Access::LOCAL_WRITE, 0x1010, 0xf1),
            (7, Access::LOCAL_WRITE, 0xfff, 1),
            (7, Access::LOCAL_WRITE, u64::MAX, 2),
            (7, Access::LOCAL_WRITE, 0x1001, u64::MAX),
            (8, Access::LOCAL_WRITE, 0x1000, 1),
            (7, Access::REMOTE_WRITE, 0x1000, 1),
        ] {
            let wanted = Use { pdn, need, addr, len };
            assert_eq!(both(wanted), [None, None], "{wanted:?}");
            assert_eq!(region().local(wanted), None, "{wanted:?}");
        }
    }

    fn knows(cache: &mut GrantCache, key: u32, now: u64, ask: impl FnOnce() -> Option<Arc<Grant>>) -> bool {
        cache.get(key, now, ALL, ask).is_some()
    }

    #[test]
    fn what_was_revoked_is_asked_for_again() {
        let (mut cache, revocations) = (cache(KeySide::Local), Revocations::default());
        let (first, second) = (region(), region());
        for (key, grant) in [(1, &first), (2, &second)] {
            assert!(knows(&mut cache, key, revocations.count(), || Some(grant.clone())));
        }
        assert!(knows(&mut cache, 1, revocations.count(), || panic!("it is known")));
        revocations.revoke(&first);
        for _ in 0..2 {
            assert!(!knows(&mut cache, 1, revocations.count(), || None));
            assert!(knows(&mut cache, 2, revocations.count(), || panic!("it is known")));
        }
        assert_eq!(cache.len(), 1, "what does not exist is not remembered");
        revocations.revoke(&second);
        assert!(knows(&mut cache, 2, revocations.count(), || Some(region())));
        assert!(knows(&mut cache, 2, revocations.count(), || panic!("it is known again")));
    }

    /// Whatever a cache knows is what it was told last, though keys share slots and push each other out.
    #[test]
    fn every_key_has_its_own_grant() {
        let mut cache = cache(KeySide::Local);
        let terms = |key: u32| Terms { pdn: 7, access: RIGHTS, iova: u64::from(key), length: 1 };
        let same = |key: u32| Use { addr: key.into(), len: 1, ..ALL };
        // Of a hundred thousand keys those with homes close to each other.
        let close = (0..100_000).filter(|&key| GrantCache::hash(key).is_multiple_of(128));
        let keys: Vec<_> = close.chain(200_000..201_000).collect();
        for _ in 0..2 {
            for &key in &keys {
                let found = cache.get(key, 0, same(key), || Some(Arc::new(Grant::region(terms(key), &Keys))));
                assert_eq!(found, Some((key.into(), 11)));
                assert_eq!(cache.get(key, 0, same(key), || panic!("it is known")), Some((key.into(), 11)));
            }
        }
        assert_eq!(cache.len(), cache.slots.iter().flatten().count());
        assert!(cache.len() < keys.len(), "some were pushed out");
    }

    #[test]
    fn who_was_told_on_other_hosts_hears_of_the_end() {
        let (revocations, grant) = (Revocations::default(), region());
        let woken = Arc::new(AtomicUsize::new(0));
        let count = woken.clone();
        let recalls = Arc::new(Recalls::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        for pair in [1, 2, 1] {
            let (terms, key) = grant.tell(&recalls, PairId(pair), 5, &revocations).unwrap();
            assert_eq!((terms.length, key), (0x100, 12));
        }
        assert!(recalls.is_empty());
        revocations.revoke(&grant);
        let told: Vec<_> = std::iter::from_fn(|| recalls.pop()).collect();
        let whom: Vec<_> = told.iter().map(|recall| (recall.pair, recall.key)).collect();
        assert_eq!((whom, woken.load(Ordering::Relaxed)), (vec![(PairId(1), 5), (PairId(2), 5)], 2), "each once");
        assert!(grant.tell(&recalls, PairId(3), 5, &revocations).is_none(), "it is revoked");
    }

    #[test]
    fn who_has_not_heard_is_waited_for_but_not_for_ever() {
        let (revocations, grant, recalls) = (Revocations::default(), region(), Arc::new(Recalls::new(|| ())));
        assert!(revocations.wait_heard(Duration::ZERO), "nobody was told");
        grant.tell(&recalls, PairId(1), 5, &revocations).unwrap();
        grant.tell(&recalls, PairId(2), 5, &revocations).unwrap();
        revocations.revoke(&grant);
        let first = recalls.pop();
        drop(recalls.pop());
        assert!(!revocations.wait_heard(Duration::from_millis(1)));
        assert!(revocations.wait_heard(Duration::MAX), "nobody waits for the same twice");
        drop(first);
        let another = region();
        another.tell(&recalls, PairId(1), 5, &revocations).unwrap();
        revocations.revoke(&another);
        let first = recalls.pop();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| revocations.wait_heard(Duration::from_secs(10)));
            std::thread::sleep(Duration::from_millis(5));
            assert!(!waiting.is_finished());
            drop(first);
            assert!(waiting.join().unwrap());
        });
    }

    #[test]
    fn no_more_are_told_than_are_remembered() {
        let (revocations, recalls) = (Revocations::default(), Arc::new(Recalls::new(|| ())));
        let mut all = Vec::new();
        for _ in 0..Revocations::MOST_TOLD / Grant::MOST_TOLD {
            let grant = region();
            let tell = |&pair: &u64| grant.tell(&recalls, PairId(pair), 5, &revocations).is_some();
            assert_eq!((0..Grant::MOST_TOLD as u64 + 5).filter(tell).count(), Grant::MOST_TOLD);
            all.push(grant);
        }
        let one_more = region();
        let tell = |grant: &Grant, pair| grant.tell(&recalls, PairId(pair), 5, &revocations).is_some();
        assert!(!tell(&one_more, 1), "all together are bounded, too");
        assert!(tell(&all[0], 1), "who knows it may ask again");
        revocations.revoke(&all[0]);
        assert!(tell(&one_more, 1));
    }

    #[test]
    fn it_never_holds_more_than_its_capacity() {
        let mut cache = cache(KeySide::Local);
        for key in 0..2 * GrantCache::CAPACITY as u32 + 5 {
            assert!(knows(&mut cache, key, 0, || Some(region())));
            assert!(cache.len() <= GrantCache::CAPACITY);
        }
    }

    #[test]
    fn all_together_hold_no_more_than_their_budget_and_one_each() {
        let budget = Arc::new(GrantBudget::default());
        let mut caches: Vec<_> = (0..20).map(|_| GrantCache::new(KeySide::Remote, &budget)).collect();
        for cache in &mut caches {
            for key in 0..GrantCache::CAPACITY as u32 {
                assert!(knows(cache, key, 0, || Some(region())));
            }
        }
        let held = caches.iter().map(GrantCache::len).sum::<usize>();
        assert!((GrantBudget::MOST..=GrantBudget::MOST + caches.len()).contains(&held), "{held}");
        assert_eq!(budget.0.load(Ordering::Relaxed), held);
        caches.clear();
        assert_eq!(budget.0.load(Ordering::Relaxed), 0);
    }
}
