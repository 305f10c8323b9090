//! The keys of one virtual NIC: which exist, and what each gives access to now (IBA 10.6).
//!
//! The upper 24 bits of a key name a region or a window for its whole life; they are what the table is searched by. The low byte belongs to
//! the consumer for windows and for regions of fast registration, and a key works with the right one only.
//!
//! The control queue makes and removes entries. Workers look keys up, and change windows and regions of fast registration as work requests
//! say. Whoever takes access away here has still to wait for those who looked it up before, see [`crate::engine::quiesce`].

use std::sync::Arc;
use std::time::Duration;

use freeflow_tcp::frame::PairId;
use parking_lot::Mutex;
use virtio_rdma::ib::Access;

use crate::directory::Directory;
use crate::mem::Map;
use crate::mr::{KeyError, Layout, Mr, WindowPart};
use crate::nic::keys::{RandomKeyMap, RandomKeySet, random_key};
use crate::verbs::grant::Recalls;
use crate::verbs::{Grant, Revocations, Terms};

/// Kinds of memory windows (IBA 10.6.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowKind {
    /// For all queue pairs of the protection domain.
    One,
    /// For the queue pair that bound it (2B).
    Two,
}

/// Why a work request on a window or region was refused. The guest sees one status for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// No such window or region, or not one for this.
    #[error("no window or region for this has key {0:#x}")]
    NoSuchKey(u32),
    /// Not of the queue pair's protection domain, or another queue pair's.
    #[error("key {0:#x} is not of this queue pair")]
    NotIts(u32),
    /// A window is bound or free, or a region registered, that should be the opposite.
    #[error("key {0:#x} is in the wrong state")]
    State(u32),
    /// Windows are bound to the region.
    #[error("windows are bound to the region of key {0:#x}")]
    InUse(u32),
    /// The region does not allow it, or does not have these bytes.
    #[error("the region does not allow this window")]
    Region,
    /// Somebody else changes the table at this moment: try again. A worker does not wait for that, since a guest's commands can be at it
    /// for long.
    #[error("keys are being changed")]
    Busy,
}

/// Who makes a change: the queue pair of the work request, or of the peer that it is for.
#[derive(Debug, Clone, Copy)]
pub struct Actor {
    /// Its number.
    pub qpn: u32,
    /// Its protection domain.
    pub pdn: u32,
}

/// What a `BIND_MW` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bind {
    /// Present key of the window.
    pub window: u32,
    /// Its low byte is that of the new key.
    pub key: u32,
    /// Key of the region; not looked at when `length` is zero.
    pub region: u32,
    /// First byte.
    pub addr: u64,
    /// Bytes.
    pub length: u64,
    /// Access bits, as the guest wrote them.
    pub access: u32,
}

/// What a region is registered with.
#[derive(Debug)]
pub struct Registration {
    /// New key.
    pub key: u32,
    /// What may be done with it.
    pub access: Access,
    /// Address of the first byte.
    pub iova: u64,
    /// Its memory.
    pub layout: Layout,
    /// Pieces that this lies in.
    pub extents: usize,
}

/// One region or window.
#[derive(Debug)]
struct Entry {
    /// The key that is right at the moment.
    key: u32,
    pdn: u32,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// A region.
    Region(Region),
    /// A window.
    Window {
        kind: WindowKind,
        /// What it is bound to, also when that has lost its memory.
        bound: Option<Bound>,
    },
}

#[derive(Debug, Default)]
struct Region {
    /// Windows bound to it.
    windows: usize,
    /// `REG_MR` work requests give it memory, up to so many extents.
    fast: Option<usize>,
    /// For fast registration: it has been registered.
    registered: bool,
    /// The control queue is about to change it: no window may be bound.
    frozen: bool,
}

#[derive(Debug, Clone, Copy)]
struct Bound {
    /// Upper bits of the region's key.
    region: u32,
    /// The queue pair, for type 2.
    qpn: Option<u32>,
}

/// The keys of one virtual NIC.
#[derive(Debug)]
pub struct KeyTable {
    /// What keys give access to now, by their upper bits: all that looking one up needs.
    live: Arc<Directory<Mr>>,
    /// Of what they stand for on the host's NIC.
    revocations: Arc<Revocations>,
    /// For those who change something.
    entries: Mutex<Entries>,
    /// Upper bits of all keys, for the control queue to go through without keeping workers from the table.
    known: Mutex<RandomKeySet>,
}

#[derive(Debug)]
struct Entries {
    by_index: RandomKeyMap<Entry>,
    /// What their keys give access to.
    live: Arc<Directory<Mr>>,
    revocations: Arc<Revocations>,
    /// Type 2 windows that are bound, by queue pair.
    by_qpn: RandomKeyMap<RandomKeySet>,
}

/// The part of a key that names its region or window.
pub fn index(key: u32) -> u32 {
    key >> 8
}

impl KeyTable {
    /// For about so many keys.
    pub fn new(most: u32) -> Self {
        let live = Arc::new(Directory::new(most));
        let revocations = Arc::new(Revocations::default());
        let (by_index, by_qpn) = Default::default();
        let entries = Entries { by_index, live: live.clone(), revocations: revocations.clone(), by_qpn };
        Self { live, revocations, entries: Mutex::new(entries), known: Mutex::default() }
    }

    /// What this key gives access to.
    ///
    /// # Errors
    /// When that is nothing.
    pub fn get(&self, key: u32) -> Result<Arc<Mr>, KeyError> {
        self.live.get(index(key)).filter(|mr| mr.key == key).ok_or(KeyError::NoSuchKey(key))
    }

    /// What this key stands for on the host's NIC.
    pub fn grant(&self, key: u32) -> Option<Arc<Grant>> {
        self.live.get(index(key)).filter(|mr| mr.key == key)?.grant().cloned()
    }

    /// What a peer on another host is told of the grant of a key; `None` if it is not to be.
    pub fn tell(&self, grant: &Grant, to: &Arc<Recalls>, pair: PairId, key: u32) -> Option<(Terms, u32)> {
        grant.tell(to, pair, key, &self.revocations)
    }

    /// How often a grant of one of these keys was revoked.
    #[inline]
    pub fn revocations(&self) -> u64 {
        self.revocations.count()
    }

    /// A new region without memory; with `fast`, one that `REG_MR` work requests give up to so many extents.
    pub fn add_region(&self, pdn: u32, fast: Option<usize>) -> u32 {
        self.add(pdn, Kind::Region(Region { fast, ..Region::default() }))
    }

    /// A new window that nobody can use.
    pub fn add_window(&self, pdn: u32, kind: WindowKind) -> u32 {
        self.add(pdn, Kind::Window { kind, bound: None })
    }

    fn add(&self, pdn: u32, kind: Kind) -> u32 {
        let mut entries = self.entries.lock();
        let key = random_key(|index| entries.by_index.contains_key(&index));
        entries.by_index.insert(index(key), Entry { key, pdn, kind });
        drop(entries);
        self.known.lock().insert(index(key));
        key
    }

    /// Makes a region's key give access to this, or to nothing.
    pub fn publish(&self, key: u32, pdn: u32, mr: Option<&Arc<Mr>>) {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.by_index.get_mut(&index(key)) {
            entry.pdn = pdn;
            entries.give(index(key), mr);
        }
    }

    /// Before a region is changed or removed: no window may be bound to it from now on.
    ///
    /// # Errors
    /// When there are some.
    pub fn freeze(&self, key: u32) -> Result<(), ChangeError> {
        match self.entries.lock().region(key) {
            Some(region) if region.windows > 0 => Err(ChangeError::InUse(key)),
            Some(region) => {
                region.frozen = true;
                Ok(())
            }
            None => Err(ChangeError::NoSuchKey(key)),
        }
    }

    /// The change is done: windows may be bound again.
    pub fn thaw(&self, key: u32) {
        if let Some(region) = self.entries.lock().region(key) {
            region.frozen = false;
        }
    }

    /// Removes a region. What it gave access to is for the caller to free, once no worker uses it.
    pub fn remove(&self, key: u32) -> Option<Arc<Mr>> {
        self.known.lock().remove(&index(key));
        let mut entries = self.entries.lock();
        entries.by_index.remove(&index(key))?;
        entries.give(index(key), None)
    }

    /// Removes a window: its protection domain, and what is for the caller to free. `None` if there is none.
    pub fn remove_window(&self, key: u32) -> Option<(u32, Option<Arc<Mr>>)> {
        let mut entries = self.entries.lock();
        entries.window(key)?;
        let live = entries.unbind(index(key));
        let entry = entries.by_index.remove(&index(key))?;
        drop(entries);
        self.known.lock().remove(&index(key));
        Some((entry.pdn, live))
    }

    /// Binds a window, or unbinds one of type 1. What it gave access to before is returned: others may be using it still.
    ///
    /// # Errors
    /// Why not; then nothing has changed.
    pub fn bind(&self, actor: Actor, bind: &Bind) -> Result<Option<Arc<Mr>>, ChangeError> {
        let mut entries = self.entries.try_lock().ok_or(ChangeError::Busy)?;
        let (entry, kind, bound) = entries.window(bind.window).ok_or(ChangeError::NoSuchKey(bind.window))?;
        if entry.key != bind.window {
            return Err(ChangeError::NoSuchKey(bind.window));
        }
        if entry.pdn != actor.pdn {
            return Err(ChangeError::NotIts(bind.window));
        }
        if kind == WindowKind::Two && (bound.is_some() || bind.length == 0) {
            return Err(ChangeError::State(bind.window));
        }
        let key = bind.window & !0xff | bind.key & 0xff;
        let part = WindowPart {
            addr: bind.addr,
            length: bind.length,
            access: window_access(bind.access, kind).ok_or(ChangeError::Region)?,
            qpn: (kind == WindowKind::Two).then_some(actor.qpn),
        };
        if bind.length == 0 {
            return Ok(entries.rebind(key, None, None));
        }
        let live = entries.window_over(actor, bind.region, key, &part)?;
        Ok(entries.rebind(key, Some(Bound { region: index(bind.region), qpn: part.qpn }), Some(&live)))
    }

    /// Gives a region memory.
    ///
    /// # Errors
    /// Why not; then nothing has changed.
    pub fn register(&self, actor: Actor, registration: Registration) -> Result<(), ChangeError> {
        let Registration { key, access, iova, layout, extents } = registration;
        let mut entries = self.entries.try_lock().ok_or(ChangeError::Busy)?;
        let entry = entries.by_index.get_mut(&index(key)).ok_or(ChangeError::NoSuchKey(key))?;
        if entry.pdn != actor.pdn {
            return Err(ChangeError::NotIts(key));
        }
        let Kind::Region(region) = &mut entry.kind else {
            return Err(ChangeError::NoSuchKey(key));
        };
        if region.registered || region.frozen || region.fast.is_none_or(|most| extents > most) {
            return Err(ChangeError::State(key));
        }
        region.registered = true;
        entry.key = key;
        let mr = Mr::new(key, actor.pdn, access, iova, Arc::new(layout));
        entries.give(index(key), Some(&Arc::new(mr)));
        Ok(())
    }

    /// Makes a region of fast registration, or a type 2 window, free. What it gave access to is returned: others may be using it still.
    ///
    /// # Errors
    /// Why not; then nothing has changed.
    pub fn invalidate(&self, actor: Actor, key: u32) -> Result<Option<Arc<Mr>>, ChangeError> {
        let mut entries = self.entries.try_lock().ok_or(ChangeError::Busy)?;
        let entry = entries.by_index.get_mut(&index(key)).filter(|entry| entry.key == key);
        let entry = entry.ok_or(ChangeError::NoSuchKey(key))?;
        if entry.pdn != actor.pdn {
            return Err(ChangeError::NotIts(key));
        }
        match &mut entry.kind {
            Kind::Region(region) if region.fast.is_none() => Err(ChangeError::NoSuchKey(key)),
            Kind::Region(region) if region.windows > 0 => Err(ChangeError::InUse(key)),
            Kind::Region(region) => {
                region.registered = false;
                Ok(entries.give(index(key), None))
            }
            Kind::Window { kind: WindowKind::One, .. } => Err(ChangeError::NoSuchKey(key)),
            Kind::Window { bound: None, .. } => Err(ChangeError::State(key)),
            Kind::Window { bound: Some(bound), .. } if bound.qpn != Some(actor.qpn) => Err(ChangeError::NotIts(key)),
            Kind::Window { .. } => Ok(entries.unbind(index(key))),
        }
    }

    /// A queue pair's life has ended: the windows that it bound are free. What they gave access to is for the caller to free, once no
    /// worker uses it.
    pub fn release(&self, qpn: u32) -> Vec<Arc<Mr>> {
        let mut freed = Vec::new();
        // One at a time: workers must not wait for all.
        while let Some(window) = { self.entries.lock().window_of(qpn) } {
            freed.extend(self.entries.lock().unbind(window));
        }
        freed
    }

    /// Guest memory has changed: keys of memory that is gone give access to nothing, and those of all guest memory to that of now. What
    /// they gave access to before is for the caller to free, once no worker uses it.
    pub fn set_map(&self, map: &Arc<Map>) -> Vec<Arc<Mr>> {
        let known: Vec<_> = self.known.lock().iter().copied().collect();
        // One at a time: workers must not wait for all.
        let mut freed: Vec<_> = known.iter().filter_map(|&index| self.adapt(index, map, |_| true)).collect();
        // Windows again: one may have been bound to a region whose turn had not come.
        freed.extend(known.iter().filter_map(|&index| self.adapt(index, map, Mr::is_window)));
        freed
    }

    /// Makes what a key gives access to lie in the memory of now. Returns what it did before, if that is something else.
    fn adapt(&self, index: u32, map: &Arc<Map>, concerns: impl FnOnce(&Mr) -> bool) -> Option<Arc<Mr>> {
        let before = self.live.get(index)?;
        if !concerns(&before) || before.is_of(map) {
            return None;
        }
        let now = before.with_map(map).map(Arc::new);
        let mut entries = self.entries.lock();
        if self.live.get(index).is_some_and(|live| Arc::ptr_eq(&live, &before)) {
            entries.give(index, now.as_ref());
        }
        Some(before)
    }

    /// Waits until all hosts that were told of keys have heard which give no access any more ([`Revocations::wait_heard`]).
    pub fn wait_heard(&self, limit: Duration) -> bool {
        self.revocations.wait_heard(limit)
    }

    /// Removes all, for the caller to free once no worker uses them.
    pub fn take(&self) -> impl Sized + use<> {
        let mut entries = self.entries.lock();
        let live = self.live.take_all();
        for mr in &live {
            revoke(&self.revocations, mr);
        }
        let forgotten = (std::mem::take(&mut entries.by_index), std::mem::take(&mut entries.by_qpn));
        drop(entries);
        (live, forgotten, std::mem::take(&mut *self.known.lock()))
    }
}

/// A key does not give access to this any more: who remembers what it stands for on the NIC is told.
fn revoke(revocations: &Revocations, mr: &Mr) {
    if let Some(grant) = mr.grant() {
        revocations.revoke(grant);
    }
}

/// What a window may allow: what rxe lets it have, and where the window is of type 2 addresses from 0 on (IBA o10-36.2.2).
fn window_access(bits: u32, kind: WindowKind) -> Option<Access> {
    let mut possible = Access::LOCAL_WRITE
        | Access::REMOTE_READ
        | Access::REMOTE_WRITE
        | Access::REMOTE_ATOMIC
        | Access::MW_BIND
        | Access::FLUSH_GLOBAL;
    if kind == WindowKind::Two {
        possible |= Access::ZERO_BASED;
    }
    Access::from_bits(bits).filter(|access| possible.contains(*access))
}

impl Entries {
    /// Makes a key give access to this, or to nothing. Returns what it did before.
    fn give(&mut self, index: u32, mr: Option<&Arc<Mr>>) -> Option<Arc<Mr>> {
        self.live.set(index, mr).inspect(|mr| revoke(&self.revocations, mr))
    }

    fn region(&mut self, key: u32) -> Option<&mut Region> {
        match &mut self.by_index.get_mut(&index(key))?.kind {
            Kind::Region(region) => Some(region),
            Kind::Window { .. } => None,
        }
    }

    fn window(&self, key: u32) -> Option<(&Entry, WindowKind, Option<Bound>)> {
        let entry = self.by_index.get(&index(key))?;
        match entry.kind {
            Kind::Window { kind, bound } => Some((entry, kind, bound)),
            Kind::Region(_) => None,
        }
    }

    /// What a window with this key over part of a region gives access to.
    fn window_over(&self, actor: Actor, region: u32, key: u32, part: &WindowPart) -> Result<Arc<Mr>, ChangeError> {
        let entry = self.by_index.get(&index(region)).ok_or(ChangeError::NoSuchKey(region))?;
        let live = self.live.get(index(region)).filter(|mr| mr.key == region);
        let live = live.ok_or(ChangeError::NoSuchKey(region))?;
        if entry.pdn != actor.pdn {
            return Err(ChangeError::NotIts(region));
        }
        if matches!(entry.kind, Kind::Region(Region { frozen: true, .. })) {
            return Err(ChangeError::State(region));
        }
        live.window(key, part).map(Arc::new).ok_or(ChangeError::Region)
    }

    /// Binds a window anew, or to nothing. Returns what it gave access to before.
    fn rebind(&mut self, key: u32, bound: Option<Bound>, live: Option<&Arc<Mr>>) -> Option<Arc<Mr>> {
        let before = self.unbind(index(key));
        if let Some(region) = bound.and_then(|to| self.region(to.region << 8)) {
            region.windows += 1;
        }
        if let Some(qpn) = bound.and_then(|to| to.qpn) {
            self.by_qpn.entry(qpn).or_default().insert(index(key));
        }
        if let Some(entry) = self.by_index.get_mut(&index(key))
            && let Kind::Window { bound: now, .. } = &mut entry.kind
        {
            (entry.key, *now) = (key, bound);
            self.give(index(key), live);
        }
        before
    }

    /// Unbinds a window. Returns what it gave access to.
    fn unbind(&mut self, window: u32) -> Option<Arc<Mr>> {
        let entry = self.by_index.get_mut(&window)?;
        let Kind::Window { bound, .. } = &mut entry.kind else {
            return None;
        };
        let bound = bound.take();
        let live = self.give(window, None);
        if let Some(region) = bound.and_then(|from| self.region(from.region << 8)) {
            region.windows -= 1;
        }
        if let Some(qpn) = bound.and_then(|from| from.qpn)
            && let Some(windows) = self.by_qpn.get_mut(&qpn)
        {
            windows.remove(&window);
            if windows.is_empty() {
                self.by_qpn.remove(&qpn);
            }
        }
        live
    }

    /// One of the windows that a queue pair has bound.
    fn window_of(&self, qpn: u32) -> Option<u32> {
        self.by_qpn.get(&qpn)?.iter().next().copied()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::mem::RegionId;

    const PD: u32 = 7;
    const ME: Actor = Actor { qpn: 100, pdn: PD };
    const OTHER: Actor = Actor { qpn: 101, ..ME };
    const RIGHTS: Access = Access::LOCAL_WRITE.union(Access::MW_BIND);

    fn table_with_region(access: Access) -> (KeyTable, u32) {
        let table = KeyTable::new(1000);
        let region = table.add_region(PD, None);
        let mr = Mr::new(region, PD, access, 0x1000, Arc::new(Layout::of_length(0x1000)));
        table.publish(region, PD, Some(&Arc::new(mr)));
        (table, region)
    }

    fn bind(window: u32, region: u32) -> Bind {
        Bind { window, key: window.wrapping_add(1), region, addr: 0x1000, length: 0x1000, access: 2 }
    }

    /// The key that a window has after [`bind`].
    fn next(key: u32) -> u32 {
        key & !0xff | key.wrapping_add(1) & 0xff
    }

    #[test]
    fn a_bind_changes_the_low_byte_and_nothing_else_of_a_key() {
        let (table, region) = table_with_region(RIGHTS);
        let window = table.add_window(PD, WindowKind::Two);
        assert!(table.get(window).is_err());
        assert!(table.bind(ME, &bind(window, region)).unwrap().is_none());
        assert!(table.get(window).is_err());
        let mr = table.get(next(window)).unwrap();
        assert_eq!((mr.iova, mr.length, mr.access), (0x1000, 0x1000, Access::REMOTE_WRITE));
        assert_eq!(table.bind(ME, &bind(next(window), region)).unwrap_err(), ChangeError::State(next(window)));
    }

    #[test]
    fn work_requests_do_not_wait_for_commands_that_change_keys() {
        let (table, region) = table_with_region(RIGHTS);
        let (window, fast) = (table.add_window(PD, WindowKind::Two), table.add_region(PD, Some(1)));
        let registration = || {
            let layout = Layout::of_length(0x1000);
            Registration { key: fast, access: RIGHTS, iova: 0, layout, extents: 1 }
        };
        let command = table.entries.lock();
        assert_eq!(table.bind(ME, &bind(window, region)).unwrap_err(), ChangeError::Busy);
        assert_eq!(table.invalidate(ME, window).unwrap_err(), ChangeError::Busy);
        assert_eq!(table.register(ME, registration()).unwrap_err(), ChangeError::Busy);
        drop(command);
        table.bind(ME, &bind(window, region)).unwrap();
        table.register(ME, registration()).unwrap();
    }

    #[test]
    fn a_type_1_window_is_bound_again_and_unbound_by_length_zero() {
        let (table, region) = table_with_region(RIGHTS);
        let first = table.add_window(PD, WindowKind::One);
        table.bind(ME, &bind(first, region)).unwrap();
        let second = next(first);
        assert!(table.bind(OTHER, &bind(second, region)).unwrap().is_some(), "there was something before");
        assert!(table.get(second).is_err() && table.get(next(second)).is_ok());
        assert_eq!(table.freeze(region), Err(ChangeError::InUse(region)));
        let nothing = Bind { length: 0, region: 0, ..bind(next(second), 0) };
        assert!(table.bind(ME, &nothing).unwrap().is_some());
        assert_eq!(table.freeze(region), Ok(()), "bound once, however often");
        assert_eq!(table.invalidate(ME, next(next(second))).unwrap_err(), ChangeError::NoSuchKey(next(next(second))));
    }

    #[test]
    fn a_type_2_window_is_its_queue_pairs_until_that_ends() {
        let (table, region) = table_with_region(RIGHTS);
        let window = table.add_window(PD, WindowKind::Two);
        table.bind(ME, &bind(window, region)).unwrap();
        let key = next(window);
        assert_eq!(table.invalidate(OTHER, key).unwrap_err(), ChangeError::NotIts(key));
        assert_eq!(table.invalidate(Actor { pdn: 8, ..ME }, key).unwrap_err(), ChangeError::NotIts(key));
        assert_eq!(table.release(OTHER.qpn).len(), 0);
        assert_eq!(table.release(ME.qpn).len(), 1);
        assert_eq!(table.invalidate(ME, key).unwrap_err(), ChangeError::State(key));
        assert_eq!(table.freeze(region), Ok(()));
        assert_eq!(table.bind(ME, &bind(key, region)).unwrap_err(), ChangeError::State(region), "it is being changed");
        table.thaw(region);
        table.bind(OTHER, &bind(key, region)).unwrap();
        assert!(table.invalidate(OTHER, next(key)).unwrap().is_some());
    }

    #[test]
    fn what_a_window_may_not_have_is_refused_and_changes_nothing() {
        let window_on = |access| {
            let (table, region) = table_with_region(access);
            let window = table.add_window(PD, WindowKind::One);
            (table, bind(window, region))
        };
        for access in [Access::LOCAL_WRITE, Access::MW_BIND, RIGHTS | Access::ZERO_BASED] {
            let (table, bind) = window_on(access);
            assert_eq!(table.bind(ME, &bind).unwrap_err(), ChangeError::Region, "{access:?}");
        }
        let (table, good) = window_on(RIGHTS);
        let wrong = [
            (ChangeError::Region, Bind { addr: 0xfff, ..good }),
            (ChangeError::Region, Bind { length: 0x1001, ..good }),
            (ChangeError::Region, Bind { length: u64::MAX, ..good }),
            (ChangeError::Region, Bind { access: 1 << 5, ..good }),
            (ChangeError::Region, Bind { access: 1 << 30, ..good }),
            (ChangeError::NoSuchKey(good.region ^ 1), Bind { region: good.region ^ 1, ..good }),
            (ChangeError::NoSuchKey(good.window ^ 1), Bind { window: good.window ^ 1, ..good }),
            (ChangeError::NoSuchKey(good.region), Bind { window: good.region, ..good }),
        ];
        for (error, bind) in wrong {
            assert_eq!(table.bind(ME, &bind).unwrap_err(), error, "{bind:?}");
        }
        assert_eq!(table.bind(Actor { pdn: 8, ..ME }, &good).unwrap_err(), ChangeError::NotIts(good.window));
        assert_eq!(table.freeze(good.region), Ok(()), "nothing was bound");
    }

    #[test]
    fn fast_registration_alternates_with_invalidation() {
        let table = KeyTable::new(1000);
        let first = table.add_region(PD, Some(2));
        let register = |key, extents| {
            let layout = Layout::of_length(64);
            table.register(ME, Registration { key, access: RIGHTS, iova: 0, layout, extents })
        };
        assert!(table.get(first).is_err());
        assert_eq!(register(first, 3), Err(ChangeError::State(first)), "more extents than it was made for");
        assert_eq!(register(next(first), 2), Ok(()));
        assert_eq!(register(first, 2), Err(ChangeError::State(first)), "it is registered");
        assert!(table.get(first).is_err() && table.get(next(first)).is_ok());
        assert_eq!(table.invalidate(ME, first).unwrap_err(), ChangeError::NoSuchKey(first));
        assert!(table.invalidate(ME, next(first)).unwrap().is_some());
        assert!(table.invalidate(ME, next(first)).unwrap().is_none(), "free already");
        let ordinary = table.add_region(PD, None);
        assert_eq!(register(ordinary, 1), Err(ChangeError::State(ordinary)));
        assert_eq!(table.invalidate(ME, ordinary).unwrap_err(), ChangeError::NoSuchKey(ordinary));
    }

    /// One that is interrupted in the middle of a change, say, on a machine with too few processors.
    #[test]
    fn who_looks_a_key_up_waits_for_nobody_who_changes_some() {
        let (table, region) = table_with_region(RIGHTS);
        let (entries, known) = (table.entries.lock(), table.known.lock());
        assert_eq!(table.get(region).unwrap().key, region);
        assert!(table.get(region ^ 1).is_err() && table.grant(region).is_none());
        drop((entries, known));
    }

    #[test]
    fn memory_that_went_is_not_kept_by_a_window_that_is_bound_meanwhile() {
        const REGIONS: usize = 5000;
        let id = RegionId { gpa: 0, size: 4096, vmm_addr: 0, offset: 0 };
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(4096).unwrap();
        let (old, now) = (Map::default().with(id, file).unwrap(), Arc::new(Map::default()));
        let mut layout = Layout::default();
        assert_eq!(layout.append(&old, &[(0, 4096)], 4096, 1), Ok(1));
        let layout = Arc::new(layout);
        for round in 0..60 {
            let table = KeyTable::new(1000);
            let add = |_| {
                let key = table.add_region(PD, None);
                table.publish(key, PD, Some(&Arc::new(Mr::new(key, PD, RIGHTS, 0x1000, layout.clone()))));
                key
            };
            let regions: Vec<_> = (0..REGIONS).map(add).collect();
            let first = bind(table.add_window(PD, WindowKind::One), regions[round]);
            table.bind(ME, &first).unwrap();
            let started = AtomicBool::new(false);
            let last = std::thread::scope(|scope| {
                let binder = scope.spawn(|| {
                    let mut key = next(first.window);
                    started.store(true, Ordering::Release);
                    while table.bind(ME, &Bind { window: key, key: next(key), ..first }).is_ok() {
                        key = next(key);
                    }
                    key
                });
                while !started.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                assert!(table.set_map(&now).len() >= REGIONS);
                binder.join().unwrap()
            });
            assert!(table.get(last).is_err(), "round {round}: the window has what its region has lost");
        }
    }
}
