//! Memory regions: registration, in several commands where it is long.

use std::collections::HashMap;
use std::sync::Arc;

use virtio_rdma::PAGE_SIZE;
use virtio_rdma::ctrl::{ObjectResponse, REREG_ACCESS, REREG_PD, REREG_TRANS, RegMr, ReregMr};
use virtio_rdma::ib::Access;

use super::parse::RawExtent;
use super::{Answer, Control, Refusal, answer, nothing};
use crate::mem::{Extent, Map};
use crate::mr::{Layout, Mr};
use crate::nic::keys::random_key;
use crate::profile::Profile;

/// Regions that exist, working or not.
#[derive(Debug, Default)]
pub struct Regions {
    by_key: HashMap<u32, Region>,
    /// Extents of all of them.
    extents: u64,
}

impl Regions {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_key.len()
    }
}

#[derive(Debug)]
struct Region {
    pdn: u32,
    access: Access,
    iova: u64,
    length: u64,
    /// Extents it was described with, for the quota.
    extents: u64,
    memory: Memory,
}

#[derive(Debug)]
pub(super) enum Memory {
    /// Extents are still to come.
    Draft(Layout),
    /// Complete and working.
    Live(Arc<Layout>),
    /// Its memory went away.
    Lost,
}

impl Control {
    pub(super) fn reg_mr(&mut self, args: &RegMr, extents: &[RawExtent]) -> Answer {
        let (pdn, iova, length) = (args.pdn.get(), args.iova.get(), args.length.get());
        if args.flags.get() != 0 {
            return Err(Refusal::Reserved);
        }
        self.check_pd(pdn)?;
        let access = check_access(args.access.get())?;
        check_range(access, iova, length)?;
        if self.regions.len() >= self.nic.config.profile.max_mr as usize {
            return Err(Refusal::Quota("memory regions"));
        }
        let memory = Memory::Draft(Layout::default());
        let mut region = Region { pdn, access, iova, length, extents: 0, memory };
        self.append(&mut region, extents)?;
        let key = random_key(|key| self.regions.by_key.contains_key(&key));
        self.publish(key, &mut region);
        self.enter_pd(pdn);
        self.regions.by_key.insert(key, region);
        Ok(answer(&ObjectResponse { number: key.into(), ..ObjectResponse::default() }))
    }

    pub(super) fn extend_mr(&mut self, key: u32, extents: &[RawExtent]) -> Answer {
        self.change(key, |control, region| {
            if !matches!(region.memory, Memory::Draft(_)) {
                return Err(Refusal::State("the region is complete"));
            }
            control.append(region, extents)
        })
    }

    pub(super) fn rereg_mr(&mut self, args: &ReregMr, extents: &[RawExtent]) -> Answer {
        let flags = args.flags.get();
        let translate = flags & REREG_TRANS != 0;
        if flags & !(REREG_TRANS | REREG_PD | REREG_ACCESS) != 0 || (!translate && !extents.is_empty()) {
            return Err(Refusal::Value("flags"));
        }
        if args.reserved.get() != 0 {
            return Err(Refusal::Reserved);
        }
        let (new_pd, old_pd) = (args.pdn.get(), self.regions.by_key.get(&args.key.get()).map(|r| r.pdn));
        if flags & REREG_PD != 0 {
            self.check_pd(new_pd)?;
        }
        let before = self.layout(args.key.get());
        self.change(args.key.get(), |control, region| {
            let access = if flags & REREG_ACCESS != 0 { check_access(args.access.get())? } else { region.access };
            let (iova, length) =
                if translate { (args.iova.get(), args.length.get()) } else { (region.iova, region.length) };
            check_range(access, iova, length)?;
            let mut changed = Region { pdn: region.pdn, access, iova, length, extents: 0, memory: Memory::Lost };
            if flags & REREG_PD != 0 {
                changed.pdn = new_pd;
            }
            if translate {
                changed.memory = Memory::Draft(Layout::default());
                control.append(&mut changed, extents)?;
                control.regions.extents -= region.extents;
            } else {
                changed.extents = region.extents;
                changed.memory = std::mem::replace(&mut region.memory, Memory::Lost);
            }
            *region = changed;
            Ok(())
        })?;
        if let (Some(old), true) = (old_pd, flags & REREG_PD != 0) {
            self.leave_pd(old);
            self.enter_pd(new_pd);
        }
        self.engine.quiesce().wait();
        // Freed here and not by a worker, which may have been the last to use it.
        drop(before);
        Ok(nothing())
    }

    fn layout(&self, key: u32) -> Option<Arc<Layout>> {
        match &self.regions.by_key.get(&key)?.memory {
            Memory::Live(layout) => Some(layout.clone()),
            _ => None,
        }
    }

    pub(super) fn dereg_mr(&mut self, key: u32) -> Answer {
        let region = self.regions.by_key.remove(&key).ok_or(Refusal::NotFound("memory region"))?;
        self.nic.keys.remove(key);
        self.regions.extents -= region.extents;
        self.leave_pd(region.pdn);
        self.engine.quiesce().wait();
        drop(region);
        Ok(nothing())
    }

    /// Changes a region; if that succeeds, what the data path sees follows.
    fn change(&mut self, key: u32, change: impl FnOnce(&mut Self, &mut Region) -> Result<(), Refusal>) -> Answer {
        let mut region = self.regions.by_key.remove(&key).ok_or(Refusal::NotFound("memory region"))?;
        let result = change(self, &mut region);
        if result.is_ok() {
            self.publish(key, &mut region);
        }
        self.regions.by_key.insert(key, region);
        result.map(|()| nothing())
    }

    /// Appends memory to a draft, all or nothing.
    fn append(&mut self, region: &mut Region, extents: &[RawExtent]) -> Result<(), Refusal> {
        let Memory::Draft(layout) = &mut region.memory else {
            return Err(Refusal::State("the region is complete"));
        };
        let max = u64::from(self.nic.config.profile.max_extents);
        let count = extents.len() as u64;
        if self.regions.extents + count > max {
            return Err(Refusal::Quota("extents"));
        }
        if !is_paged(extents, layout.length(), region.length) {
            return Err(Refusal::Value("extents: pages in the middle must be whole"));
        }
        let found = resolve(&self.map, extents)?;
        let added: u64 = found.iter().map(Extent::len).sum();
        if layout.length().saturating_add(added) > region.length {
            return Err(Refusal::Value("extents: more than the region's length"));
        }
        for extent in found {
            layout.push(extent);
        }
        region.extents += count;
        self.regions.extents += count;
        Ok(())
    }

    /// Makes the data path see a region as it is now: a complete one works, another does not.
    fn publish(&self, key: u32, region: &mut Region) {
        if let Memory::Draft(layout) = &mut region.memory
            && layout.length() == region.length
        {
            region.memory = Memory::Live(Arc::new(std::mem::take(layout)));
        }
        match &region.memory {
            Memory::Live(layout) => {
                let mr = Mr::new(key, region.pdn, region.access, region.iova, layout.clone());
                self.nic.keys.insert(Arc::new(mr));
            }
            _ => self.nic.keys.remove(key),
        }
    }

    /// Regions whose memory is gone work no longer. Returns what is to be freed when no worker uses it any more.
    pub(super) fn drop_lost_regions(&mut self) -> Vec<Memory> {
        let map = &self.map;
        let mut freed = Vec::new();
        for (&key, region) in &mut self.regions.by_key {
            let lost = match &region.memory {
                Memory::Draft(layout) => !layout.is_in(map),
                Memory::Live(layout) => !layout.is_in(map),
                Memory::Lost => false,
            };
            if lost {
                freed.push(std::mem::replace(&mut region.memory, Memory::Lost));
                self.nic.keys.remove(key);
            }
        }
        freed
    }
}

fn check_access(bits: u32) -> Result<Access, Refusal> {
    let access = Access::from_bits(bits).filter(|a| Profile::access().contains(*a));
    let access = access.ok_or(Refusal::Value("access flags"))?;
    let remote_change = access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC);
    if remote_change && !access.contains(Access::LOCAL_WRITE) {
        return Err(Refusal::Value("access flags: remote write needs local write"));
    }
    Ok(access)
}

fn check_range(access: Access, iova: u64, length: u64) -> Result<(), Refusal> {
    if length == 0 || length > Profile::MAX_MR_SIZE || iova.checked_add(length).is_none() {
        return Err(Refusal::Value("address or length"));
    }
    if access.contains(Access::ZERO_BASED) && iova != 0 {
        return Err(Refusal::Value("address of a zero-based region"));
    }
    Ok(())
}

/// Whether only the first and the last page of a region of `length` bytes are cut, so that no amount of bytes lies in more pieces than pages;
/// `before` bytes were described before.
fn is_paged(extents: &[RawExtent], before: u64, length: u64) -> bool {
    let mut offset = before;
    extents.iter().all(|&(addr, len)| {
        let first = offset == 0;
        offset = offset.saturating_add(len);
        let last = offset == length;
        let whole = |at: u64| at.is_multiple_of(PAGE_SIZE as u64);
        (first || whole(addr)) && (last || whole(addr.wrapping_add(len)))
    })
}

fn resolve(map: &Map, extents: &[RawExtent]) -> Result<Vec<Extent>, Refusal> {
    let mut found = Vec::with_capacity(extents.len());
    let all = extents.iter().all(|&(addr, len)| map.resolve(addr, len, &mut found));
    if all { Ok(found) } else { Err(Refusal::Memory("memory region")) }
}
