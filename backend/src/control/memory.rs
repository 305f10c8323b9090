//! Memory regions: registration, in several commands where it is long; regions for fast registration; windows.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use virtio_rdma::ctrl::{
    AllocMr, AllocMw, MW_TYPE_1, MW_TYPE_2, ObjectResponse, REG_DMA, REG_ON_DEMAND, REREG_ACCESS, REREG_PD,
    REREG_TRANS, RegMr, ReregMr,
};
use virtio_rdma::ib::Access;

use super::parse::RawExtent;
use super::{Answer, Control, Refusal, answer, nothing};
use crate::key_table::{WindowKind, index};
use crate::mr::{Layout, LayoutError, Mr, check_access, check_range};
use crate::on_demand::OnDemand;

/// How long other hosts are waited for that were told of a region that goes.
const HEARD_WITHIN: Duration = Duration::from_millis(500);

/// Regions that exist, working or not, and the number of windows.
#[derive(Debug, Default)]
pub struct Regions {
    /// By the part of their keys that does not change.
    by_index: HashMap<u32, Region>,
    /// Extents of all of them.
    extents: u64,
    windows: u32,
}

impl Regions {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_index.len()
    }

    /// The region of a key. The low byte counts unless it is the consumer's.
    fn get(&self, key: u32) -> Result<&Region, Refusal> {
        let region = self.by_index.get(&index(key)).filter(|region| region.key == key || region.is_fast());
        region.ok_or(Refusal::NotFound("memory region"))
    }
}

#[derive(Debug)]
struct Region {
    /// Its first key.
    key: u32,
    pdn: u32,
    access: Access,
    iova: u64,
    length: u64,
    /// Pieces that it lies in, for the quota.
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
    /// All that the guest has.
    Guest,
    /// What work requests give it.
    Fast,
    /// What the driver gives it, page by page.
    OnDemand(Arc<OnDemand>),
}

impl Region {
    fn is_fast(&self) -> bool {
        matches!(self.memory, Memory::Fast)
    }

    /// Whether its memory is described by extents of commands.
    fn is_described(&self) -> bool {
        !matches!(self.memory, Memory::Fast | Memory::Guest | Memory::OnDemand(_))
    }
}

impl Control {
    pub(super) fn reg_mr(&mut self, args: &RegMr, extents: &[RawExtent]) -> Answer {
        let (pdn, iova, length) = (args.pdn.get(), args.iova.get(), args.length.get());
        match args.flags.get() {
            REG_ON_DEMAND if self.on_demand => return self.reg_on_demand(args, extents),
            0 | REG_DMA => {}
            _ => return Err(Refusal::Value("flags")),
        }
        self.check_pd(pdn)?;
        let access = check_access(args.access.get()).map_err(Refusal::Value)?;
        let memory = if args.flags.get() & REG_DMA != 0 {
            if iova != 0 || length != 0 || !extents.is_empty() {
                return Err(Refusal::Value("a part of all guest memory"));
            }
            Memory::Guest
        } else {
            check_range(access, iova, length).map_err(Refusal::Value)?;
            Memory::Draft(Layout::default())
        };
        self.check_room_for_region()?;
        let mut region = Region { key: 0, pdn, access, iova, length, extents: 0, memory };
        if region.is_described() {
            self.append(&mut region, extents)?;
        }
        Ok(self.add_region(region, None))
    }

    pub(super) fn check_room_for_region(&self) -> Result<(), Refusal> {
        let full = self.regions.len() >= self.nic.config.profile.max_mr as usize;
        if full { Err(Refusal::Quota("memory regions")) } else { Ok(()) }
    }

    fn add_region(&mut self, mut region: Region, fast: Option<usize>) -> Vec<u8> {
        region.key = self.nic.keys.add_region(region.pdn, fast);
        self.insert_region(region)
    }

    /// An on-demand region, whose key is in the table already.
    pub(super) fn insert_on_demand(&mut self, pages: OnDemand, pdn: u32, access: Access, iova: u64) -> Vec<u8> {
        let (key, length) = (pages.key(), pages.length());
        let memory = Memory::OnDemand(Arc::new(pages));
        self.insert_region(Region { key, pdn, access, iova, length, extents: 0, memory })
    }

    /// The pages of a region, if they come and go.
    pub(super) fn on_demand_region(&self, key: u32) -> Result<Arc<OnDemand>, Refusal> {
        match &self.regions.get(key)?.memory {
            Memory::OnDemand(pages) => Ok(pages.clone()),
            _ => Err(Refusal::State("not an on-demand region")),
        }
    }

    /// Some of the pages of a region have come or gone.
    pub(super) fn count_runs(&mut self, pages: &OnDemand) {
        if let Some(region) = self.regions.by_index.get_mut(&index(pages.key())) {
            self.regions.extents -= region.extents;
            region.extents = pages.num_runs() as u64;
            self.regions.extents += region.extents;
        }
    }

    fn insert_region(&mut self, mut region: Region) -> Vec<u8> {
        let key = region.key;
        self.publish(&mut region);
        self.enter_pd(region.pdn);
        self.regions.by_index.insert(index(key), region);
        answer(&ObjectResponse { number: key.into(), ..ObjectResponse::default() })
    }

    pub(super) fn alloc_mr(&mut self, args: AllocMr) -> Answer {
        let (pdn, extents) = (args.pdn.get(), args.max_extents.get());
        let profile = &self.nic.config.profile;
        self.check_pd(pdn)?;
        if !(1..=profile.max_fast_reg_extents).contains(&extents) {
            return Err(Refusal::Value("number of extents"));
        }
        self.check_room_for_region()?;
        self.check_room_for_extents(extents.into())?;
        self.regions.extents += u64::from(extents);
        let (access, memory) = (Access::empty(), Memory::Fast);
        let region = Region { key: 0, pdn, access, iova: 0, length: 0, extents: extents.into(), memory };
        Ok(self.add_region(region, Some(extents as usize)))
    }

    pub(super) fn alloc_mw(&mut self, args: AllocMw) -> Answer {
        let kind = match args.kind {
            MW_TYPE_1 => WindowKind::One,
            MW_TYPE_2 => WindowKind::Two,
            _ => return Err(Refusal::Value("window type")),
        };
        if args.reserved != [0; 3] {
            return Err(Refusal::Reserved);
        }
        self.check_pd(args.pdn.get())?;
        if self.regions.windows >= self.nic.config.profile.max_mw {
            return Err(Refusal::Quota("memory windows"));
        }
        let key = self.nic.keys.add_window(args.pdn.get(), kind);
        self.regions.windows += 1;
        self.enter_pd(args.pdn.get());
        Ok(answer(&ObjectResponse { number: key.into(), ..ObjectResponse::default() }))
    }

    pub(super) fn dealloc_mw(&mut self, key: u32) -> Answer {
        let (pdn, live) = self.nic.keys.remove_window(key).ok_or(Refusal::NotFound("memory window"))?;
        self.regions.windows -= 1;
        self.leave_pd(pdn);
        self.engine.quiesce().wait();
        drop(live);
        Ok(nothing())
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
        let (flags, key, new_pd) = (args.flags.get(), args.key.get(), args.pdn.get());
        let translate = flags & REREG_TRANS != 0;
        if flags & !(REREG_TRANS | REREG_PD | REREG_ACCESS) != 0 || (!translate && !extents.is_empty()) {
            return Err(Refusal::Value("flags"));
        }
        if args.reserved.get() != 0 {
            return Err(Refusal::Reserved);
        }
        let region = self.regions.get(key)?;
        let stays = matches!(region.memory, Memory::OnDemand(_)) && !translate;
        if !region.is_described() && !stays {
            return Err(Refusal::State("not a region that can be changed"));
        }
        let old_pd = region.pdn;
        if flags & REREG_PD != 0 {
            self.check_pd(new_pd)?;
        }
        let before = self.layout(key);
        self.freeze(key)?;
        let changed = self.change(key, |control, region| control.reregister(region, args, extents));
        self.nic.keys.thaw(key);
        changed?;
        if flags & REREG_PD != 0 {
            self.leave_pd(old_pd);
            self.enter_pd(new_pd);
        }
        self.wait_unused();
        // Freed here and not by a worker, which may have been the last to use it.
        drop(before);
        Ok(nothing())
    }

    /// Replaces what the flags name, all or nothing.
    fn reregister(&mut self, region: &mut Region, args: &ReregMr, extents: &[RawExtent]) -> Result<(), Refusal> {
        let has = |flag| args.flags.get() & flag != 0;
        let access =
            if has(REREG_ACCESS) { check_access(args.access.get()).map_err(Refusal::Value)? } else { region.access };
        let translate = has(REREG_TRANS);
        let (iova, length) =
            if translate { (args.iova.get(), args.length.get()) } else { (region.iova, region.length) };
        check_range(access, iova, length).map_err(Refusal::Value)?;
        let pdn = if has(REREG_PD) { args.pdn.get() } else { region.pdn };
        let mut changed = Region { key: region.key, pdn, access, iova, length, extents: 0, memory: Memory::Lost };
        if translate {
            changed.memory = Memory::Draft(Layout::default());
            self.append(&mut changed, extents)?;
            self.regions.extents -= region.extents;
        } else {
            changed.extents = region.extents;
            changed.memory = std::mem::replace(&mut region.memory, Memory::Lost);
        }
        *region = changed;
        Ok(())
    }

    fn layout(&self, key: u32) -> Option<Arc<Layout>> {
        match &self.regions.get(key).ok()?.memory {
            Memory::Live(layout) => Some(layout.clone()),
            _ => None,
        }
    }

    /// No window may be bound to a region while it changes (IBA 10.6.7.2.6).
    fn freeze(&self, key: u32) -> Result<(), Refusal> {
        self.nic.keys.freeze(key).map_err(|_| Refusal::Busy("memory region"))
    }

    pub(super) fn dereg_mr(&mut self, key: u32) -> Answer {
        self.regions.get(key)?;
        self.freeze(key)?;
        let region = self.regions.by_index.remove(&index(key));
        let live = self.nic.keys.remove(key);
        if let Some(region) = &region {
            self.regions.extents -= region.extents;
            self.leave_pd(region.pdn);
        }
        self.wait_unused();
        drop((region, live));
        Ok(nothing())
    }

    /// Returns when nobody uses what a region's key stood for. Without an answer of another host this is the NIC's to see to: it refuses
    /// its key.
    fn wait_unused(&self) {
        self.engine.quiesce().wait();
        if !self.nic.keys.wait_heard(HEARD_WITHIN) {
            self.nic.warn(format_args!("a host has not answered that a region is gone"));
        }
    }

    /// Changes a region; if that succeeds, what the data path sees follows.
    fn change(&mut self, key: u32, change: impl FnOnce(&mut Self, &mut Region) -> Result<(), Refusal>) -> Answer {
        self.regions.get(key)?;
        let removed = self.regions.by_index.remove(&index(key));
        let mut region = removed.ok_or(Refusal::NotFound("memory region"))?;
        let result = change(self, &mut region);
        if result.is_ok() {
            self.publish(&mut region);
        }
        self.regions.by_index.insert(index(key), region);
        result.map(|()| nothing())
    }

    pub(super) fn check_room_for_extents(&self, count: u64) -> Result<(), Refusal> {
        let max = u64::from(self.nic.config.profile.max_extents);
        if self.regions.extents + count > max { Err(Refusal::Quota("extents")) } else { Ok(()) }
    }

    /// Appends memory to a draft, all or nothing.
    fn append(&mut self, region: &mut Region, extents: &[RawExtent]) -> Result<(), Refusal> {
        let Memory::Draft(layout) = &mut region.memory else {
            return Err(Refusal::State("the region is complete"));
        };
        self.check_room_for_extents(extents.len() as u64)?;
        let room = u64::from(self.nic.config.profile.max_extents) - self.regions.extents;
        let pieces = layout.append(&self.map, extents, region.length, room as usize).map_err(|error| match error {
            LayoutError::CutPage => Refusal::Value("extents: pages in the middle must be whole"),
            LayoutError::NotThere(..) => Refusal::Memory("memory region"),
            LayoutError::TooMany => Refusal::Quota("extents"),
            LayoutError::TooLong => Refusal::Value("extents: more than the region's length"),
        })? as u64;
        region.extents += pieces;
        self.regions.extents += pieces;
        Ok(())
    }

    /// Makes the data path see a region as it is now: a complete one works, another does not.
    fn publish(&self, region: &mut Region) {
        if let Memory::Draft(layout) = &mut region.memory
            && layout.length() == region.length
        {
            region.memory = Memory::Live(Arc::new(std::mem::take(layout)));
        }
        let Region { key, pdn, access, iova, .. } = *region;
        let live = match &region.memory {
            Memory::Live(layout) => Some(self.with_nic(Mr::new(key, pdn, access, iova, layout.clone()), layout)),
            Memory::Guest => Some(Mr::of_guest(key, pdn, access, self.map.clone())),
            Memory::OnDemand(pages) => Some(Mr::on_demand(pdn, access, iova, pages.clone())),
            Memory::Draft(_) | Memory::Lost => None,
            Memory::Fast => return,
        };
        self.nic.keys.publish(key, pdn, live.map(Arc::new).as_ref());
    }

    /// Regions whose memory is gone work no longer. Returns what is to be freed when no worker uses it any more.
    pub(super) fn drop_lost_regions(&mut self) -> impl Sized + use<> {
        let (mut freed, mut freed_pages) = (Vec::new(), Vec::new());
        for region in self.regions.by_index.values_mut() {
            let lost = match &region.memory {
                Memory::Draft(layout) => !layout.is_in(&self.map),
                Memory::Live(layout) => !layout.is_in(&self.map),
                Memory::OnDemand(pages) => {
                    freed_pages.extend(pages.drop_lost(&self.map));
                    self.regions.extents -= region.extents;
                    region.extents = pages.num_runs() as u64;
                    self.regions.extents += region.extents;
                    false
                }
                Memory::Lost | Memory::Guest | Memory::Fast => false,
            };
            if lost {
                freed.push(std::mem::replace(&mut region.memory, Memory::Lost));
            }
        }
        (freed, freed_pages, self.nic.keys.set_map(&self.map))
    }
}
