//! Regions with on-demand paging: their pages come and go by command.

use std::ops::Range;
use std::sync::Arc;

use virtio_rdma::ctrl::{MapPages, PAGES_WRITE, PageRange, RegMr};

use super::parse::RawExtent;
use super::{Answer, Control, Refusal, nothing};
use crate::mr::{check_access, check_range, is_paged};
use crate::on_demand::OnDemand;

impl Control {
    pub(super) fn reg_on_demand(&mut self, args: &RegMr, extents: &[RawExtent]) -> Answer {
        let (pdn, iova, length) = (args.pdn.get(), args.iova.get(), args.length.get());
        if !extents.is_empty() {
            return Err(Refusal::Value("extents of an on-demand region"));
        }
        self.check_pd(pdn)?;
        let access = check_access(args.access.get()).map_err(Refusal::Value)?;
        check_range(access, iova, length).map_err(Refusal::Value)?;
        OnDemand::pages_of(iova, length).ok_or(Refusal::Value("length of an on-demand region"))?;
        self.check_room_for_region()?;
        let key = self.nic.keys.add_region(pdn, None);
        Ok(self.insert_on_demand(OnDemand::new(key, iova, length), pdn, access, iova))
    }

    pub(super) fn map_pages(&mut self, args: MapPages, extents: &[RawExtent]) -> Answer {
        let region = self.paged_region(args.key.get())?;
        if args.flags.get() & !PAGES_WRITE != 0 {
            return Err(Refusal::Value("flags"));
        }
        if extents.is_empty() || !is_paged(extents) {
            return Err(Refusal::Value("extents: not whole pages"));
        }
        let mut found = Vec::with_capacity(extents.len());
        for &(addr, len) in extents {
            if !self.map.resolve(addr, len, &mut found) {
                return Err(Refusal::Memory("memory region"));
            }
        }
        let pages = found.iter().map(|extent| OnDemand::pages_in(extent.len())).sum();
        let pages = range(&region, args.first.get(), pages)?;
        // One more where a run is cut in the middle.
        self.check_room_for_extents(found.len() as u64 + 1)?;
        let replaced = region.map(pages.start, args.flags.get() & PAGES_WRITE != 0, found);
        self.count_runs(&region);
        if !replaced.is_empty() {
            self.engine.quiesce().wait();
        }
        Ok(nothing())
    }

    pub(super) fn unmap_pages(&mut self, args: PageRange) -> Answer {
        let region = self.paged_region(args.key.get())?;
        if args.flags.get() != 0 {
            return Err(Refusal::Value("flags"));
        }
        let pages = range(&region, args.first.get(), args.count.get().into())?;
        let room = self.check_room_for_extents(1).is_ok();
        let taken = region.unmap(pages, room);
        self.count_runs(&region);
        self.engine.quiesce().wait();
        // Freed here and not by a worker.
        drop(taken);
        Ok(nothing())
    }

    pub(super) fn deny_pages(&self, args: PageRange) -> Answer {
        let region = self.paged_region(args.key.get())?;
        if args.flags.get() & !PAGES_WRITE != 0 {
            return Err(Refusal::Value("flags"));
        }
        let pages = range(&region, args.first.get(), args.count.get().into())?;
        region.deny(pages, args.flags.get() & PAGES_WRITE != 0);
        Ok(nothing())
    }

    fn paged_region(&self, key: u32) -> Result<Arc<OnDemand>, Refusal> {
        if !self.on_demand {
            return Err(Refusal::NotOffered("on-demand paging"));
        }
        self.on_demand_region(key)
    }
}

/// Pages of a region, if it has them.
fn range(region: &OnDemand, first: u32, count: u64) -> Result<Range<u32>, Refusal> {
    let behind = u64::from(first) + count;
    match u32::try_from(behind) {
        Ok(behind) if count > 0 && behind <= region.pages() => Ok(first..behind),
        _ => Err(Refusal::Value("pages")),
    }
}
