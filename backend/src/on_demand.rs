//! Regions with on-demand paging: which of their pages are there, and the faults that wait for those that are not.
//!
//! The control queue gives pages and takes them away; whoever takes some has still to wait for workers that found them before
//! ([`crate::engine::quiesce`]). A worker that misses a page makes a [`Fault`], of which the guest's driver is told, and looks again later.
//! What becomes of the request meanwhile is the engine's matter.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use virtio_rdma::PAGE_SIZE;
use virtio_rdma::ctrl::MAX_ON_DEMAND_PAGES;

use crate::mem::{Extent, Map, Seg};

const PAGE: u64 = PAGE_SIZE as u64;

/// Runs that are changed at a time: workers do not find pages that long, and look again.
const RUNS_AT_A_TIME: usize = 256;

/// A driver that has not answered is told again of a fault after this time: it may have had no memory to note it.
const TOLD_AGAIN: Duration = Duration::from_millis(250);

/// Pages that are there, side by side in guest memory.
#[derive(Debug)]
pub struct Run {
    extent: Extent,
    writable: bool,
}

impl Run {
    fn pages(&self) -> u32 {
        (self.extent.len() / PAGE) as u32
    }

    /// Keeps the first `pages` and returns the others.
    fn split_off(&mut self, pages: u32) -> Self {
        Self { extent: self.extent.split_off(u64::from(pages) * PAGE), writable: self.writable }
    }

    fn allows(&self, write: bool) -> bool {
        self.writable || !write
    }
}

/// Pages that an access needs and that are not there, or not to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Missing {
    /// The first.
    pub page: u32,
    /// How many, as far as the access goes.
    pub count: u32,
    /// They are to be written.
    pub write: bool,
}

/// Why bytes are not to be had now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    /// Pages are missing.
    Missing(Missing),
    /// Pages come or go at this moment. A worker does not wait for that: others would wait with it, and a guest can do it without end.
    Changing,
}

/// The guest's driver said that a page cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Denied;

/// A page fault: the driver is to give a page, or to deny it. Requests that wait for it share it.
#[derive(Debug)]
pub struct Fault {
    region: u64,
    missing: Missing,
    since: Instant,
    told: AtomicU32,
    outcome: AtomicU8,
}

const WAITING: u8 = 0;
const GIVEN: u8 = 1;
const DENIED: u8 = 2;

impl Fault {
    /// Whether the driver is to be told of it, for the first time or again. True for one of those who ask.
    fn is_to_be_told(&self, now: Instant) -> bool {
        let told = self.told.load(Ordering::Relaxed);
        now.saturating_duration_since(self.since) >= TOLD_AGAIN * told
            && self.told.compare_exchange(told, told + 1, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

/// Faults that the driver has not answered, by their first page and whether that is to be written.
#[derive(Debug, Default)]
struct Faults {
    waiting: BTreeMap<(u32, bool), Arc<Fault>>,
    /// With so many, those that nobody waits for any more are forgotten.
    enough: usize,
}

impl Faults {
    const FEW: usize = 4;

    fn insert(&mut self, fault: &Arc<Fault>) {
        if self.waiting.len() >= self.enough.max(Self::FEW) {
            self.waiting.retain(|_, fault| Arc::strong_count(fault) > 1);
            // So that looking through them costs little for each.
            self.enough = 2 * self.waiting.len();
        }
        self.waiting.insert((fault.missing.page, fault.missing.write), fault.clone());
    }
}

/// The pages of one region.
#[derive(Debug)]
pub struct OnDemand {
    /// Not that of any other region, before or after.
    id: u64,
    /// The region's key.
    key: u32,
    /// Where the region begins in its first page.
    head: u64,
    length: u64,
    runs: RwLock<BTreeMap<u32, Run>>,
    faults: Mutex<Faults>,
}

impl OnDemand {
    /// Without pages. An address and its memory begin at the same place in their pages.
    pub fn new(key: u32, iova: u64, length: u64) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            key,
            head: iova % PAGE,
            length,
            runs: RwLock::default(),
            faults: Mutex::default(),
        }
    }

    /// The region's key, by which the driver knows it.
    pub fn key(&self) -> u32 {
        self.key
    }

    /// Bytes of the region.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Pages of a region, whether they are there or not; `None` for more than there may be.
    pub fn pages_of(iova: u64, length: u64) -> Option<u32> {
        let pages = u32::try_from((iova % PAGE).checked_add(length)?.div_ceil(PAGE)).ok()?;
        (pages <= MAX_ON_DEMAND_PAGES).then_some(pages)
    }

    /// Pages in so many bytes.
    pub fn pages_in(len: u64) -> u64 {
        len / PAGE
    }

    /// Its own pages.
    pub fn pages(&self) -> u32 {
        Self::pages_of(self.head, self.length).unwrap_or_default()
    }

    /// In how many pieces those pages lie that are there.
    pub fn num_runs(&self) -> usize {
        self.runs.read().len()
    }

    /// Appends the segments of `len` bytes from `offset` on, which the caller has checked to be inside.
    ///
    /// # Errors
    /// The first pages that are missing, or that it cannot be told; nothing was appended then.
    pub fn segments(&self, offset: u64, len: u64, write: bool, out: &mut Vec<Seg>) -> Result<(), Absent> {
        let before = out.len();
        let (mut at, end) = (self.head + offset, self.head + offset + len);
        let runs = self.runs.try_read().ok_or(Absent::Changing)?;
        while at < end {
            let page = (at / PAGE) as u32;
            let Some((first, run)) = run_at(&runs, page).filter(|(_, run)| run.allows(write)) else {
                out.truncate(before);
                let behind = end.div_ceil(PAGE) as u32;
                let next = runs.range(page + 1..behind).find(|(_, run)| run.allows(write));
                let count = next.map_or(behind, |(&next, _)| next) - page;
                return Err(Absent::Missing(Missing { page, count, write }));
            };
            let seg = run.extent.slice(at - u64::from(first) * PAGE, end - at);
            at += seg.len() as u64;
            out.push(seg);
        }
        Ok(())
    }

    /// Puts pages in their places, one extent after another, and ends the faults that waited for them. Returns what was there
    /// before, for the caller to free once no worker uses it.
    pub fn map(&self, first: u32, writable: bool, extents: Vec<Extent>) -> Vec<Run> {
        let mut replaced = Vec::new();
        let mut page = first;
        let mut extents = extents.into_iter().peekable();
        while extents.peek().is_some() {
            let mut runs = self.runs.write();
            for extent in extents.by_ref().take(RUNS_AT_A_TIME) {
                let run = Run { extent, writable };
                let behind = page + run.pages();
                while cut(&mut runs, page..behind, true, &mut replaced) {}
                runs.insert(page, run);
                page = behind;
            }
        }
        self.answer(first..page, GIVEN, |fault| writable || !fault.missing.write);
        replaced
    }

    /// Takes pages away, for the caller to free once no worker uses them. With no room for one more run, pages behind them may go
    /// as well: whoever needs those asks for them again.
    pub fn unmap(&self, pages: Range<u32>, room: bool) -> Vec<Run> {
        let mut taken = Vec::new();
        while cut(&mut self.runs.write(), pages.clone(), room, &mut taken) {}
        taken
    }

    /// Pages cannot be had, or with `only_to_write` only to be read: the requests that wait for them now fail.
    pub fn deny(&self, pages: Range<u32>, only_to_write: bool) {
        self.answer(pages, DENIED, |fault| fault.missing.write || !only_to_write);
    }

    fn answer(&self, pages: Range<u32>, outcome: u8, concerns: impl Fn(&Fault) -> bool) {
        let mut faults = self.faults.lock();
        let waiting = faults.waiting.range((pages.start, false)..(pages.end, false));
        let answered: Vec<_> = waiting.filter(|(_, fault)| concerns(fault)).map(|(&at, _)| at).collect();
        for at in answered {
            if let Some(fault) = faults.waiting.remove(&at) {
                fault.outcome.store(outcome, Ordering::Release);
            }
        }
    }

    /// Takes away the pages whose memory is no longer the guest's.
    pub fn drop_lost(&self, map: &Map) -> Vec<Run> {
        let is_lost = |run: &Run| !map.contains(run.extent.region());
        let lost: Vec<u32> = self.runs.read().iter().filter(|(_, run)| is_lost(run)).map(|(&page, _)| page).collect();
        let mut taken = Vec::new();
        for some in lost.chunks(RUNS_AT_A_TIME) {
            let mut runs = self.runs.write();
            taken.extend(some.iter().filter_map(|page| runs.remove(page)));
        }
        taken
    }

    /// The fault to wait for, and whether the driver is to be told of it now. `known` is what the same request waited for so far.
    ///
    /// # Errors
    /// When that was denied.
    pub fn fault(
        &self,
        known: Option<Arc<Fault>>,
        missing: Missing,
        now: Instant,
    ) -> Result<(Arc<Fault>, bool), Denied> {
        let same = |fault: &Arc<Fault>| {
            (fault.region, fault.missing.page, fault.missing.write) == (self.id, missing.page, missing.write)
        };
        let known = known.filter(same).map(|fault| (fault.outcome.load(Ordering::Acquire), fault));
        let fault = match known {
            Some((DENIED, _)) => return Err(Denied),
            Some((WAITING, fault)) => fault,
            _ => self.find_or_add(missing, now),
        };
        let tell = fault.is_to_be_told(now);
        Ok((fault, tell))
    }

    fn find_or_add(&self, missing: Missing, now: Instant) -> Arc<Fault> {
        let mut faults = self.faults.lock();
        if let Some(fault) = faults.waiting.get(&(missing.page, missing.write)) {
            return fault.clone();
        }
        let (told, outcome) = (AtomicU32::new(0), AtomicU8::new(WAITING));
        let fault = Arc::new(Fault { region: self.id, missing, since: now, told, outcome });
        faults.insert(&fault);
        fault
    }
}

/// The run that a page is in.
fn run_at(runs: &BTreeMap<u32, Run>, page: u32) -> Option<(u32, &Run)> {
    let (&first, run) = runs.range(..=page).next_back()?;
    (page - first < run.pages()).then_some((first, run))
}

/// Takes some of these pages out; true if there may be more. A run that reaches beyond them loses its end, too, where there is
/// no `room` for that as another.
fn cut(runs: &mut BTreeMap<u32, Run>, pages: Range<u32>, room: bool, out: &mut Vec<Run>) -> bool {
    if let Some((&first, run)) = runs.range_mut(..pages.start).next_back()
        && first + run.pages() > pages.start
    {
        let rest = run.split_off(pages.start - first);
        runs.insert(pages.start, rest);
    }
    for _ in 0..RUNS_AT_A_TIME {
        let Some((&first, _)) = runs.range(pages.clone()).next() else {
            return false;
        };
        let Some(mut run) = runs.remove(&first) else {
            return false;
        };
        if first + run.pages() > pages.end {
            let rest = run.split_off(pages.end - first);
            if room {
                runs.insert(pages.end, rest);
            } else {
                out.push(rest);
            }
        }
        out.push(run);
    }
    true
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use proptest::prelude::*;

    use super::*;
    use crate::mem::RegionId;

    const GUEST_PAGES: u64 = 64;

    fn memory() -> Map {
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(GUEST_PAGES * PAGE).unwrap();
        let id = RegionId { gpa: 0, size: GUEST_PAGES * PAGE, vmm_addr: 0, offset: 0 };
        Map::default().with(id, file).unwrap()
    }

    fn extents(map: &Map, page: u64, count: u64) -> Vec<Extent> {
        let mut found = Vec::new();
        assert!(map.resolve(page * PAGE, count * PAGE, &mut found));
        found
    }

    fn region() -> OnDemand {
        OnDemand::new(7 << 8, 0x7000_0100, 32 * PAGE)
    }

    fn missing(page: u32, count: u32, write: bool) -> Result<(), Absent> {
        Err(Absent::Missing(Missing { page, count, write }))
    }

    #[test]
    fn nobody_waits_for_pages_that_come_or_go() {
        let (map, region) = (memory(), region());
        region.map(0, true, extents(&map, 0, 4));
        let out = &mut Vec::new();
        let change = region.runs.write();
        assert_eq!(region.segments(0, PAGE, true, out), Err(Absent::Changing));
        assert!(out.is_empty());
        drop(change);
        assert_eq!(region.segments(0, PAGE, true, out), Ok(()));
    }

    #[test]
    fn a_region_that_begins_in_the_middle_of_a_page_has_one_more() {
        assert_eq!(region().pages(), 33);
        assert_eq!(OnDemand::pages_of(0, u64::from(MAX_ON_DEMAND_PAGES) * PAGE), Some(MAX_ON_DEMAND_PAGES));
        assert_eq!(OnDemand::pages_of(1, u64::from(MAX_ON_DEMAND_PAGES) * PAGE), None);
        assert_eq!(OnDemand::pages_of(PAGE - 1, u64::MAX), None);
    }

    #[test]
    fn what_is_missing_is_named_up_to_what_is_there() {
        let (map, region) = (memory(), region());
        let mut out = Vec::new();
        let whole = |write, out: &mut Vec<Seg>| region.segments(0, 32 * PAGE, write, out);
        assert_eq!(whole(false, &mut out), missing(0, 33, false));
        region.map(3, false, extents(&map, 10, 2));
        assert_eq!(whole(false, &mut out), missing(0, 3, false));
        assert_eq!(whole(true, &mut out), missing(0, 33, true));
        region.map(0, true, extents(&map, 20, 3));
        assert_eq!(whole(false, &mut out), missing(5, 28, false));
        assert_eq!(whole(true, &mut out), missing(3, 30, true));
        assert!(out.is_empty());
        // Bytes to 0x1ff of page 5 would be needed by one more.
        assert_eq!(region.segments(0x80, 5 * PAGE - 0x180, false, &mut out), Ok(()));
        assert_eq!(out.iter().map(Seg::len).collect::<Vec<_>>(), [3 * PAGE as usize - 0x180, 2 * PAGE as usize]);
        assert_eq!(region.segments(0x80, 5 * PAGE - 0x17f, false, &mut out), missing(5, 1, false));
    }

    #[test]
    fn without_room_a_run_loses_its_end_rather_than_become_two() {
        let (map, region) = (memory(), region());
        region.map(0, true, extents(&map, 0, 10));
        assert_eq!(region.unmap(4..5, true).len(), 1);
        assert_eq!(region.num_runs(), 2);
        assert_eq!(region.unmap(7..8, false).len(), 2);
        assert_eq!(region.num_runs(), 2);
        let (out, end) = (&mut Vec::new(), 32 * PAGE);
        assert_eq!(region.segments(0, end, true, out), missing(4, 1, true));
        assert_eq!(region.segments(5 * PAGE, end - 5 * PAGE, true, out), missing(7, 26, true));
    }

    #[test]
    fn a_fault_is_shared_told_once_and_again_after_a_while() {
        let (region, start) = (region(), Instant::now());
        let wanted = Missing { page: 4, count: 2, write: true };
        let (first, tell) = region.fault(None, wanted, start).unwrap();
        assert!(tell);
        let (second, tell) = region.fault(None, Missing { count: 1, ..wanted }, start).unwrap();
        assert!(!tell && Arc::ptr_eq(&first, &second));
        let (read, tell) = region.fault(None, Missing { write: false, ..wanted }, start).unwrap();
        assert!(tell && !Arc::ptr_eq(&first, &read));
        assert!(!region.fault(Some(first.clone()), wanted, start + TOLD_AGAIN / 2).unwrap().1);
        assert!(region.fault(Some(first.clone()), wanted, start + TOLD_AGAIN).unwrap().1);
        assert!(!region.fault(Some(second), wanted, start + TOLD_AGAIN).unwrap().1);
        assert!(region.fault(Some(first), wanted, start + 2 * TOLD_AGAIN).unwrap().1);
    }

    #[test]
    fn a_denial_is_for_those_who_wait_and_not_for_later() {
        let (region, now) = (region(), Instant::now());
        let fault = |known, page, write| region.fault(known, Missing { page, count: 1, write }, now);
        let read = fault(None, 4, false).unwrap().0;
        let write = fault(None, 4, true).unwrap().0;
        let other = fault(None, 5, true).unwrap().0;
        region.deny(4..5, true);
        assert_eq!(fault(Some(write.clone()), 4, true).unwrap_err(), Denied);
        assert!(Arc::ptr_eq(&fault(Some(read.clone()), 4, false).unwrap().0, &read));
        region.deny(4..5, false);
        assert_eq!(fault(Some(read), 4, false).unwrap_err(), Denied);
        assert!(Arc::ptr_eq(&fault(Some(other.clone()), 5, true).unwrap().0, &other));
        let (again, tell) = fault(None, 4, true).unwrap();
        assert!(tell && !Arc::ptr_eq(&again, &write), "asked anew");
        let another = OnDemand::new(8 << 8, 0, 32 * PAGE);
        assert!(another.fault(Some(write), Missing { page: 4, count: 1, write: true }, now).is_ok());
    }

    #[test]
    fn pages_to_be_read_do_not_end_a_fault_that_would_write() {
        let (map, region, now) = (memory(), region(), Instant::now());
        let wanted = Missing { page: 4, count: 1, write: true };
        let fault = region.fault(None, wanted, now).unwrap().0;
        region.map(4, false, extents(&map, 1, 1));
        assert_eq!(fault.outcome.load(Ordering::Relaxed), WAITING);
        assert_eq!(region.map(0, true, extents(&map, 1, 8)).len(), 1);
        assert_eq!(fault.outcome.load(Ordering::Relaxed), GIVEN);
    }

    #[test]
    fn faults_that_nobody_waits_for_are_forgotten() {
        let (region, now) = (region(), Instant::now());
        let fault = |page| region.fault(None, Missing { page, count: 1, write: true }, now).unwrap().0;
        for page in 0..10_000 {
            drop(fault(page));
        }
        assert!(region.faults.lock().waiting.len() <= Faults::FEW);
        let kept: Vec<_> = (0..1000).map(fault).collect();
        (1000..10_000).for_each(|page| drop(fault(page)));
        assert!((1000..=2000).contains(&region.faults.lock().waiting.len()));
        drop(kept);
    }

    #[test]
    fn pages_of_memory_that_goes_go_too() {
        let (old, now) = (memory(), memory());
        let region = region();
        region.map(0, true, extents(&old, 0, 4));
        region.map(4, true, extents(&now, 0, 4));
        assert_eq!(region.drop_lost(&now).len(), 1);
        let out = &mut Vec::new();
        assert_eq!(region.segments(0, 32 * PAGE, true, out), missing(0, 4, true));
        assert_eq!(region.segments(4 * PAGE, 3 * PAGE, true, out), Ok(()));
    }

    proptest! {
        /// Against a table of single pages: which guest page, and whether it may be written.
        #[test]
        fn it_agrees_with_a_table_of_single_pages(
            steps in proptest::collection::vec((0u32..32, 1u32..16, 0u64..48, 0u8..4), 1..60),
        ) {
            let (map, region) = (memory(), OnDemand::new(1 << 8, 0, 32 * PAGE));
            let base = extents(&map, 0, 1)[0].slice(0, 1);
            let mut model = [None; 32];
            for (first, count, guest, kind) in steps {
                let pages = first..(first + count).min(32);
                let writable = kind == 1;
                if kind < 2 {
                    region.map(first, writable, extents(&map, guest, pages.len() as u64));
                } else {
                    region.unmap(pages.clone(), true);
                }
                for (n, page) in pages.enumerate() {
                    model[page as usize] = (kind < 2).then_some((guest + n as u64, writable));
                }
                for (page, expected) in model.iter().enumerate() {
                    for write in [false, true] {
                        let mut out = Vec::new();
                        let found = region.segments(page as u64 * PAGE, PAGE, write, &mut out);
                        let place = out.first().map(|seg| seg.distance(&base) / PAGE);
                        let expected = expected.filter(|&(_, writable)| writable || !write).map(|(guest, _)| guest);
                        prop_assert_eq!((found.is_ok(), place), (expected.is_some(), expected));
                    }
                }
            }
        }
    }
}
