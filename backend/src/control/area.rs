//! Areas, GIDs and protection domains.

use std::sync::Arc;

use virtio_rdma::area::{ARM_STRIDE, AreaKind};
use virtio_rdma::ctrl::{AddGid, DelGid, ObjectResponse};

use super::parse::RawExtent;
use super::{Answer, Control, Refusal, answer, nothing};
use crate::mem::Pages;
use crate::nic::areas::{AhArea, DoorbellArea};
use crate::overlay::Gid;

impl Control {
    pub(super) fn set_area(&mut self, kind: AreaKind, index: usize, extents: &[RawExtent]) -> Answer {
        let profile = &self.nic.config.profile;
        let outside = Refusal::Memory("area");
        match kind {
            AreaKind::Doorbell => {
                let queue = self.nic.doorbells.get(index).ok_or(Refusal::Value("doorbell queue"))?;
                let area = DoorbellArea::new(&self.map, profile.doorbells(), extents).ok_or(outside)?;
                set_once(&mut queue.area.write(), area)?;
                self.engine.ports_changed();
            }
            AreaKind::CqArm if index == 0 => {
                let pages = Pages::new(&self.map, extents, profile.max_cq as usize * ARM_STRIDE).ok_or(outside)?;
                set_once(&mut self.arm, pages)?;
            }
            AreaKind::AddressHandle if index == 0 => {
                let area = AhArea::new(&self.map, profile.max_ah, extents).ok_or(outside)?;
                let mut handles = self.nic.handles.load_full();
                set_once(&mut handles, area)?;
                self.nic.handles.store(handles);
            }
            _ => return Err(Refusal::Value("area index")),
        }
        Ok(nothing())
    }

    pub(super) fn add_gid(&mut self, args: &AddGid) -> Answer {
        if !matches!(args.roce_version, 1 | 2) {
            return Err(Refusal::Value("RoCE version"));
        }
        if args.reserved != [0; 5] {
            return Err(Refusal::Reserved);
        }
        let gid = Gid(args.gid);
        if !self.nic.config.owns(gid) {
            return Err(Refusal::NotItsAddress);
        }
        self.set_gid(args.index.get(), Some(gid))
    }

    pub(super) fn del_gid(&mut self, args: DelGid) -> Answer {
        if args.reserved == [0; 6] { self.set_gid(args.index.get(), None) } else { Err(Refusal::Reserved) }
    }

    fn set_gid(&mut self, index: u16, gid: Option<Gid>) -> Answer {
        if self.nic.set_gid(index.into(), gid) { Ok(nothing()) } else { Err(Refusal::Value("GID index")) }
    }

    pub(super) fn alloc_pd(&mut self) -> Answer {
        if self.pds.len() >= self.nic.config.profile.max_pd as usize {
            return Err(Refusal::Quota("protection domains"));
        }
        while self.pds.contains_key(&self.next_pd) || self.next_pd == 0 {
            self.next_pd = self.next_pd.wrapping_add(1);
        }
        let number = self.next_pd;
        self.add_nic_domain(number)?;
        self.pds.insert(number, 0);
        self.next_pd = number.wrapping_add(1);
        Ok(answer(&ObjectResponse { number: number.into(), ..ObjectResponse::default() }))
    }

    pub(super) fn dealloc_pd(&mut self, pdn: u32) -> Answer {
        match self.pds.get(&pdn) {
            None => Err(Refusal::NotFound("protection domain")),
            Some(0) => {
                self.pds.remove(&pdn);
                self.domains.remove(&pdn);
                Ok(nothing())
            }
            Some(_) => Err(Refusal::Busy("protection domain")),
        }
    }

    /// Counts an object into a protection domain.
    pub(super) fn enter_pd(&mut self, pdn: u32) {
        *self.pds.entry(pdn).or_default() += 1;
    }

    /// Counts an object out of a protection domain.
    pub(super) fn leave_pd(&mut self, pdn: u32) {
        if let Some(users) = self.pds.get_mut(&pdn) {
            *users = users.saturating_sub(1);
        }
    }

    pub(super) fn check_pd(&self, pdn: u32) -> Result<(), Refusal> {
        if self.pds.contains_key(&pdn) { Ok(()) } else { Err(Refusal::NotFound("protection domain")) }
    }

    /// Forgets areas whose memory is gone. The driver is broken then, and its doorbells are heard no more.
    pub(super) fn drop_lost_areas(&mut self) {
        for queue in &self.nic.doorbells {
            queue.area.write().take_if(|a| !a.is_in(&self.map));
        }
        if self.nic.handles.load().as_ref().is_some_and(|a| !a.is_in(&self.map)) {
            self.nic.handles.store(None);
        }
        self.arm.take_if(|p| !p.is_in(&self.map));
    }
}

fn set_once<T>(slot: &mut Option<Arc<T>>, value: T) -> Result<(), Refusal> {
    if slot.is_some() {
        return Err(Refusal::State("the area is set already"));
    }
    *slot = Some(Arc::new(value));
    Ok(())
}
