//! Start, reset and stop of the device (docs/device.md, 2).

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

use freeflow_backend::mem::{Map, RegionId};
use freeflow_backend::stepped::{QueueAddresses, SteppedNic};
use virtio_rdma::area::{AH_STRIDE, ARM_STRIDE, AreaKind};
use virtio_rdma::config::Config;
use virtio_rdma::ctrl::{AddGid, DelGid, DeviceAttr, Opcode, SetArea};

use super::ctrl::{Ctrl, Link, Request};
use super::doorbell::DoorbellArea;
use super::events::Events;
use super::mem::{Buf, GuestMemory, PAGE, Region};
use super::verbs::AhTable;
use super::vhost::Connection;
use super::virtq::Virtq;
use super::{Gid, Guest, GuestConfig, Inner, Result};

/// Descriptors of a doorbell queue, which carries no buffers.
const DOORBELL_QUEUE_SIZE: u16 = 8;

/// What a device is made of before it is reset for the first time.
struct Parts {
    memory: Arc<GuestMemory>,
    space: Config,
    ctrl: Ctrl,
    events: Events,
    doorbell_queues: Vec<Virtq>,
}

impl Parts {
    fn new(memory: Arc<GuestMemory>, space: Config, link: Link) -> Result<Self> {
        let ctrl = Ctrl::new(&memory, link)?;
        let events = Events::new(&memory, space.num_event_queues.get().into())?;
        let doorbell_queues = (0..space.num_doorbell_queues.get())
            .map(|_| Virtq::new(&memory, DOORBELL_QUEUE_SIZE))
            .collect::<Result<_>>()?;
        Ok(Self { memory, space, ctrl, events, doorbell_queues })
    }

    /// Resets the device and asks for its limits.
    fn begin(mut self, connection: Option<Connection>, config: GuestConfig) -> Result<Inner> {
        let (memory, rings) = (self.memory, config.rings);
        let attr = reset_and_query(&mut self.ctrl)?;
        for index in 0..self.events.count() {
            self.events.queue(index).fill()?;
        }
        let area = |q: &Virtq| DoorbellArea::new(&memory, attr.max_doorbells.get(), q.kick.try_clone()?, rings);
        let doorbells = self.doorbell_queues.iter().map(|q| Ok(Arc::new(area(q)?))).collect::<Result<_>>()?;
        let arm = memory.alloc(attr.max_cq.get() as usize * ARM_STRIDE, rings)?;
        let ahs = AhTable::new(memory.alloc(attr.max_ah.get() as usize * AH_STRIDE, rings)?, attr.max_ah.get());
        let mut gids = vec![link_local(self.space.mac)];
        gids.extend(config.gids);
        Ok(Inner {
            connection: Mutex::new(connection),
            connected: AtomicBool::new(true),
            generation: AtomicU64::new(0),
            memory,
            placement: rings,
            config: self.space,
            attr,
            ctrl: Mutex::new(self.ctrl),
            events: self.events,
            doorbells,
            doorbell_queues: self.doorbell_queues,
            arm,
            ahs,
            gids,
        })
    }
}

fn memory_of(config: &GuestConfig) -> Result<Arc<GuestMemory>> {
    config.memory.clone().map_or_else(|| GuestMemory::new(config.memory_size), Ok)
}

/// Connects, starts the virtqueues, resets the device and asks for its limits.
pub(super) fn connect(socket: &Path, config: GuestConfig) -> Result<Inner> {
    let memory = memory_of(&config)?;
    let mut connection = Connection::open(socket, config.declined)?;
    let space = connection.config()?;
    check(&space, connection.num_queues()?)?;
    connection.set_memory(&memory.regions())?;
    let parts = Parts::new(memory, space, Link::Queue(connection.pulse()))?;
    start_queues(&mut connection, &parts.ctrl, &parts.events, &parts.doorbell_queues)?;
    parts.begin(Some(connection), config)
}

/// The same without VMM and connection.
pub(super) fn direct(nic: &Arc<Mutex<SteppedNic>>, config: GuestConfig) -> Result<Inner> {
    let memory = memory_of(&config)?;
    let space = nic.lock().unwrap_or_else(PoisonError::into_inner).nic().config_space();
    let parts = Parts::new(memory, space, Link::Direct(Arc::clone(nic)))?;
    let mut nic = nic.lock().unwrap_or_else(PoisonError::into_inner);
    nic.set_map(map_of(&parts.memory)?);
    for index in 0..parts.events.count() {
        nic.start_queue(1 + index, addresses(&parts.events.queue(index).virtq));
    }
    nic.set_running(true);
    drop(nic);
    parts.begin(None, config)
}

/// What a VMM would tell about this memory.
fn map_of(memory: &GuestMemory) -> Result<Map> {
    let region = |region: Region| {
        let info = region.info();
        let id =
            RegionId { gpa: region.gpa, size: region.len, vmm_addr: info.userspace_addr, offset: info.mmap_offset };
        Ok((id, region.file().try_clone()?))
    };
    let table = memory.regions().into_iter().map(region).collect::<std::io::Result<_>>()?;
    Map::default().replaced(table).map_err(|e| std::io::Error::other(e).into())
}

fn addresses(queue: &Virtq) -> QueueAddresses {
    let (layout, start) = (queue.layout(), queue.ring().gpa(0));
    let gpa = |address: u64| start + (address - layout.desc_table_addr);
    QueueAddresses {
        size: queue.size(),
        descriptors: start,
        available: gpa(layout.avail_ring_addr),
        used: gpa(layout.used_ring_addr),
    }
}

fn check(config: &Config, queues: u64) -> Result<()> {
    use super::Error::NotOurs;
    if !config.is_ours() {
        return Err(NotOurs("magic or version"));
    }
    if config.num_event_queues.get() == 0 || config.num_doorbell_queues.get() == 0 {
        return Err(NotOurs("no event or no doorbell queue"));
    }
    if queues < config.num_queues() as u64 {
        return Err(NotOurs("fewer virtqueues than the configuration says"));
    }
    Ok(())
}

fn start_queues(connection: &mut Connection, ctrl: &Ctrl, events: &Events, doorbells: &[Virtq]) -> Result<()> {
    connection.start_queue(0, &ctrl.virtq, ctrl.virtq.avail_index())?;
    for index in 0..events.count() {
        let queue = events.queue(index);
        connection.start_queue(1 + index, &queue.virtq, queue.virtq.avail_index())?;
    }
    for (index, queue) in doorbells.iter().enumerate() {
        connection.start_queue(1 + events.count() + index, queue, queue.avail_index())?;
    }
    Ok(())
}

fn reset_and_query(ctrl: &mut Ctrl) -> Result<DeviceAttr> {
    let reset = Request::new(Opcode::Reset, &[0u8; 0], &[], 0);
    ctrl.send(&reset)?.body::<[u8; 0]>()?;
    let query = Request::typed::<[u8; 0], DeviceAttr>(Opcode::QueryDevice, &[], &[]);
    ctrl.send(&query)?.body()
}

/// The link-local address that belongs to a MAC (RFC 4291, appendix A).
pub fn link_local(mac: [u8; 6]) -> Gid {
    let mut gid = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, 0, 0, 0];
    gid[13..].copy_from_slice(&mac[3..]);
    gid
}

impl Guest {
    /// Sends `RESET` alone.
    pub fn reset(&self) -> Result<()> {
        self.0.generation.fetch_add(1, SeqCst);
        self.command_ok(Opcode::Reset, &[0u8; 0], &[])
    }

    /// Reloads the driver: `RESET`, then areas and GIDs again. Objects of before are gone.
    pub fn reload(&self) -> Result<()> {
        self.reset()?;
        self.events().forget();
        self.give_areas_and_gids()
    }

    /// Gives the device its areas and the GIDs.
    pub fn give_areas_and_gids(&self) -> Result<()> {
        for (index, area) in self.doorbells().iter().enumerate() {
            self.set_area(AreaKind::Doorbell, index as u16, area.buf())?;
        }
        self.set_area(AreaKind::CqArm, 0, self.arm_words())?;
        self.ahs().clear();
        self.set_area(AreaKind::AddressHandle, 0, self.ahs().buf())?;
        for (index, gid) in self.gids().iter().enumerate() {
            self.add_gid(index as u16, *gid)?;
        }
        Ok(())
    }

    /// Clears an area and gives it to the device.
    pub fn set_area(&self, kind: AreaKind, index: u16, buf: &Buf) -> Result<()> {
        buf.fill(0, buf.capacity(), 0);
        std::sync::atomic::fence(SeqCst);
        let extents = buf.extents(0, buf.len().next_multiple_of(PAGE as usize));
        let body =
            SetArea { kind: kind.to_wire().into(), index: index.into(), num_extents: (extents.len() as u32).into() };
        self.command_ok(Opcode::SetArea, &body, &extents)
    }

    /// Fills an entry of the GID table.
    pub fn add_gid(&self, index: u16, gid: Gid) -> Result<()> {
        let body = AddGid { index: index.into(), roce_version: 2, reserved: [0; 5], gid };
        self.command_ok(Opcode::AddGid, &body, &[])
    }

    /// Clears an entry of the GID table.
    pub fn del_gid(&self, index: u16) -> Result<()> {
        self.command_ok(Opcode::DelGid, &DelGid { index: index.into(), reserved: [0; 6] }, &[])
    }

    /// Stops all virtqueues, as a VMM that pauses does, and returns where each would go on.
    pub fn stop_queues(&self) -> Result<Vec<u16>> {
        let count = 1 + self.events().count() + self.0.doorbell_queues.len();
        self.with_connection(|c| (0..count).map(|index| c.stop_queue(index)).collect())
    }

    /// Starts all virtqueues again where they were stopped.
    pub fn start_queues_at(&self, bases: &[u16]) -> Result<()> {
        let events = self.events().count();
        self.with_connection(|c| {
            c.start_queue(0, &self.ctrl().virtq, bases[0])?;
            for index in 0..events {
                c.start_queue(1 + index, &self.events().queue(index).virtq, bases[1 + index])?;
            }
            Ok(())
        })?;
        self.start_doorbell_queues_at(bases)
    }

    /// The last part of [`start_queues_at`](Self::start_queues_at).
    pub fn start_doorbell_queues_at(&self, bases: &[u16]) -> Result<()> {
        let first = 1 + self.events().count();
        self.with_connection(|c| {
            let mut queues = self.0.doorbell_queues.iter().enumerate();
            queues.try_for_each(|(index, queue)| c.start_queue(first + index, queue, bases[first + index]))
        })
    }

    /// Reloads the driver without a reset of the virtio device: stopped virtqueues start anew, in other memory.
    pub fn reload_elsewhere(&self) -> Result<()> {
        self.0.generation.fetch_add(1, SeqCst);
        let mut bases = self.stop_queues()?;
        // Kept as they are until the device has heard of the new ones: it may still look at them.
        let mut old = vec![self.ctrl().virtq.relocate(self.memory())?];
        for index in 0..self.events().count() {
            old.push(self.events().queue(index).virtq.relocate(self.memory())?);
        }
        bases[..old.len()].fill(0);
        self.start_queues_at(&bases)?;
        drop(old);
        self.begin()
    }

    /// Resets the virtio device by the VMM, without a word of the driver.
    pub fn reset_virtio(&self) -> Result<()> {
        self.0.generation.fetch_add(1, SeqCst);
        self.with_connection(Connection::reset)
    }

    /// Sets everything up again after [`reset_virtio`](Self::reset_virtio).
    pub fn restart(&self) -> Result<()> {
        self.ctrl().virtq.clear();
        for index in 0..self.events().count() {
            self.events().queue(index).virtq.clear();
        }
        self.with_connection(|c| {
            c.set_features_again()?;
            c.set_memory(&self.memory().regions())
        })?;
        self.start_queues_at(&vec![0; 1 + self.events().count() + self.0.doorbell_queues.len()])?;
        self.begin()
    }

    /// What a driver does on fresh virtqueues.
    fn begin(&self) -> Result<()> {
        self.reset()?;
        for index in 0..self.events().count() {
            self.events().queue(index).fill()?;
        }
        self.events().forget();
        self.give_areas_and_gids()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn link_local_is_an_eui_64() {
        let gid = super::link_local([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert_eq!(gid, [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x50, 0x54, 0, 0xff, 0xfe, 0x12, 0x34, 0x56]);
    }
}
