//! One vhost-user connection: what the VMM has set up, and the guest's control queue behind it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use parking_lot::Mutex;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::QueueT;
use virtio_rdma::config::{Config, F_ON_DEMAND, NUM_CTRL_QUEUES};
use virtio_rdma::zerocopy::IntoBytes;
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::call::{Call, is_eventfd};
use super::vring::{Next, Vring};
use crate::control::Control;
use crate::engine::Engine;
use crate::mem::{Alarm, Map, RegionId};
use crate::nic::Nic;

/// Requests of the control queue that are executed before the VMM's messages are looked at again.
const REQUESTS_PER_TURN: usize = 64;
/// Answers for which the guest is interrupted once, if the requests were there already. Divides [`REQUESTS_PER_TURN`].
const ANSWERS_PER_SIGNAL: usize = 8;
const _: () = assert!(REQUESTS_PER_TURN.is_multiple_of(ANSWERS_PER_SIGNAL));
/// Size of the configuration space that VMMs may read; beyond ours it is zero.
const CONFIG_SPACE: usize = 256;

/// State of a connection. Lives in the virtual NIC's thread.
pub struct Session {
    nic: Arc<Nic>,
    engine: Arc<Engine>,
    control: Control,
    vrings: Vec<Arc<Mutex<Vring>>>,
    map: Arc<Map>,
    alarm: Alarm,
    features: u64,
    epoll: Arc<Epoll>,
    /// Bits of the control and event queues that are to be looked at.
    unfinished: u64,
}

impl Session {
    /// A device that nobody has set up. Kicks of the control and event queues arrive at `epoll`, with the queue's index
    /// as data. `alarm` rings when the VMM takes memory away without saying so, `helper` when a worker has left events.
    pub fn new(
        nic: Arc<Nic>,
        engine: Arc<Engine>,
        vrings: Vec<Arc<Mutex<Vring>>>,
        epoll: Arc<Epoll>,
        alarm: Alarm,
        helper: &Arc<EventFd>,
    ) -> Self {
        let control = Control::new(nic.clone(), engine.clone());
        let map = Arc::new(Map::new(alarm.clone()));
        nic.events.iter().for_each(|queue| queue.set_helper(helper.clone()));
        Self { nic, engine, control, vrings, map, alarm, features: 0, epoll, unfinished: 0 }
    }

    /// Number of protection domains, regions and CQs.
    pub fn counts(&self) -> (usize, usize, usize) {
        self.control.counts()
    }

    /// A control or event queue was kicked: [`go_on`](Self::go_on) looks at it.
    pub fn kicked(&mut self, index: usize) {
        self.unfinished |= 1 << index;
    }

    /// As if every control and event queue had been kicked.
    pub fn kicked_all(&mut self) {
        (0..=self.nic.events.len()).for_each(|index| self.kicked(index));
    }

    /// Whether there is something to [`go_on`](Self::go_on) with.
    pub fn is_unfinished(&self) -> bool {
        self.unfinished != 0
    }

    /// Does some of what is to be done for the guest, and remembers the rest: a guest that goes on asking must not keep
    /// us from its VMM's messages.
    pub fn go_on(&mut self) {
        let todo = std::mem::take(&mut self.unfinished);
        let indices = (0..=self.nic.events.len()).filter(|&index| todo & 1 << index != 0);
        for index in indices {
            if self.nic.is_running() && self.serve(index) {
                self.kicked(index);
            }
        }
    }

    /// A turn of one queue. True if there is more to do.
    fn serve(&mut self, index: usize) -> bool {
        let Some(vector) = index.checked_sub(NUM_CTRL_QUEUES) else {
            return self.run_control_queue();
        };
        let flushed = self.nic.events[vector].flush();
        self.nic.counters.events.add(flushed.sent);
        flushed.more
    }

    fn run_control_queue(&mut self) -> bool {
        let vring = self.vrings[0].clone();
        let mut unsaid = 0;
        for _ in 0..REQUESTS_PER_TURN {
            let next = vring.lock().next_request();
            match next {
                Next::Nothing => {
                    if unsaid > 0 {
                        vring.lock().signal();
                    }
                    return false;
                }
                Next::Broken => {}
                Next::Request(request) => {
                    let answer = self.control.execute(&request.bytes, request.room());
                    vring.lock().answer(&request, &answer);
                }
            }
            unsaid += 1;
            // A guest with several commands under way need not be interrupted for each, but not wait for all either.
            if unsaid == ANSWERS_PER_SIGNAL {
                vring.lock().signal();
                unsaid = 0;
            }
        }
        true
    }

    /// Ends everything: when it returns nothing touches the guest's memory.
    pub fn stop(&mut self) {
        self.nic.set_running(false);
        self.engine.quiesce().wait();
        for index in 0..self.vrings.len() {
            self.stop_vring(index);
        }
        self.control.reset();
        self.set_map(Map::new(self.alarm.clone()));
        for vring in &self.vrings {
            let old = std::mem::take(&mut *vring.lock());
            // Only now: closing a VMM's descriptor can block, and workers want the lock.
            drop(old);
        }
        self.features = 0;
        self.control.set_on_demand(false);
    }

    fn stop_vring(&mut self, index: usize) -> u16 {
        // Without a new descriptor this cannot fail.
        let _ = self.set_kick(index, None);
        let base = self.vrings[index].lock().stop();
        self.update_running();
        base
    }

    /// Workers serve the NIC while all of its virtqueues are active.
    fn update_running(&mut self) {
        let all = self.vrings.iter().all(|v| v.lock().is_active());
        if all == self.nic.is_running() {
            return;
        }
        self.nic.set_running(all);
        self.engine.ports_changed();
        self.engine.quiesce().wait();
        if !all {
            self.engine.wait_nic_quiet(self.nic.id);
        }
        self.kicked_all();
    }

    fn set_map(&mut self, map: Map) {
        self.map = Arc::new(map);
        for vring in &self.vrings {
            vring.lock().map = self.map.clone();
        }
        self.control.set_map(self.map.clone());
    }

    fn set_kick(&mut self, index: usize, kick: Option<File>) -> std::io::Result<()> {
        let doorbells = NUM_CTRL_QUEUES + self.nic.events.len();
        match index.checked_sub(doorbells) {
            Some(queue) => {
                let kick = kick.as_ref().map(File::try_clone).transpose()?;
                self.engine.set_kick(&self.nic, queue, kick)?;
            }
            None => self.watch(index, kick.as_ref())?,
        }
        self.vrings[index].lock().kick = kick;
        Ok(())
    }

    fn watch(&self, index: usize, kick: Option<&File>) -> std::io::Result<()> {
        if let Some(old) = self.vrings[index].lock().kick.take() {
            self.epoll.ctl(ControlOperation::Delete, old.as_raw_fd(), EpollEvent::default())?;
        }
        let Some(kick) = kick else {
            return Ok(());
        };
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, index as u64);
        self.epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), event)
    }

    fn vring(&self, index: u32) -> Result<&Arc<Mutex<Vring>>> {
        self.vrings.get(index as usize).ok_or(invalid("vring index"))
    }

    fn negotiated(&self, feature: VhostUserVirtioFeatures) -> bool {
        self.features & feature.bits() != 0
    }

    fn refuse(&self, what: &str, error: &crate::mem::MapError) -> Error {
        self.nic.warn(format_args!("{what}: {error}"));
        Error::ReqHandlerError(std::io::Error::other(error.to_string()))
    }
}

/// A message that makes no sense; the connection goes on.
fn invalid(what: &'static str) -> Error {
    Error::ReqHandlerError(std::io::Error::new(std::io::ErrorKind::InvalidInput, what))
}

/// What the guest's addresses in refused work requests are to be compared with.
fn log_region(region: &VhostUserMemoryRegion) {
    let (start, size) = (region.guest_phys_addr, region.memory_size);
    log::debug!("the VMM shares {size:#x} bytes at {start:#x}");
}

fn region_id(region: &VhostUserMemoryRegion) -> RegionId {
    RegionId {
        gpa: region.guest_phys_addr,
        size: region.memory_size,
        vmm_addr: region.user_addr,
        offset: region.mmap_offset,
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.nic.set_running(false);
        self.engine.quiesce().wait();
        for index in 0..self.vrings.len() {
            self.stop_vring(index);
            self.vrings[index].lock().enabled = false;
        }
        self.control.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(1 << VIRTIO_F_VERSION_1 | 1 << F_ON_DEMAND | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(invalid("features that were not offered"));
        }
        self.features = features;
        self.control.set_on_demand(features & 1 << F_ON_DEMAND != 0);
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        regions.iter().for_each(log_region);
        let table = regions.iter().map(region_id).zip(files).collect();
        let map = self.map.replaced(table).map_err(|e| self.refuse("memory table refused", &e))?;
        self.set_map(map);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let mut vring = self.vring(index)?.lock();
        let size = u16::try_from(num).map_err(|_| invalid("vring size"))?;
        vring.queue.try_set_size(size).map_err(|_| invalid("vring size"))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let gpa = |addr| self.map.gpa_of_vmm_addr(addr).map(GuestAddress).ok_or(invalid("vring address"));
        let (descriptor, used, available) = (gpa(descriptor)?, gpa(used)?, gpa(available)?);
        let mut vring = self.vring(index)?.lock();
        let bad = |_| invalid("vring address");
        vring.queue.try_set_desc_table_address(descriptor).map_err(bad)?;
        vring.queue.try_set_avail_ring_address(available).map_err(bad)?;
        vring.queue.try_set_used_ring_address(used).map_err(bad)?;
        vring.find_used_index();
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let mut vring = self.vring(index)?.lock();
        vring.queue.set_next_avail(base as u16);
        vring.find_used_index();
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        let base = self.stop_vring(index as usize);
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(index.into())?;
        let fd = fd.ok_or(invalid("a virtqueue without a kick descriptor"))?;
        // Workers wait for it, and waiting for a file of a file system that the VMM serves can block.
        if !is_eventfd(&fd) {
            return Err(invalid("a kick descriptor that is no eventfd"));
        }
        // A VMM that wants no acknowledgement would not learn that nobody hears the guest: its connection ends.
        self.set_kick(index.into(), Some(fd)).map_err(Error::SocketBroken)?;
        let enable = !self.negotiated(VhostUserVirtioFeatures::PROTOCOL_FEATURES);
        let mut vring = self.vrings[usize::from(index)].lock();
        vring.queue.set_ready(true);
        vring.enabled |= enable;
        drop(vring);
        self.update_running();
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let vring = self.vring(index.into())?;
        let call = fd.map(Call::new).transpose();
        let old = std::mem::replace(&mut vring.lock().call, call.map_err(Error::ReqHandlerError)?);
        // Only now: closing a VMM's descriptor can block, and workers want the lock.
        drop(old);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.vring(index.into()).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.lock().enabled = enable;
        self.update_running();
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut space = [0; CONFIG_SPACE];
        let config = self.nic.config_space();
        space[..size_of::<Config>()].copy_from_slice(config.as_bytes());
        let end = offset.checked_add(size).ok_or(invalid("configuration offset"))?;
        space.get(offset as usize..end as usize).map(<[u8]>::to_vec).ok_or(invalid("configuration offset"))
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("the configuration space is read-only"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(Map::MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        log_region(region);
        let map = self.map.with(region_id(region), fd).map_err(|e| self.refuse("memory region refused", &e))?;
        self.set_map(map);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let RegionId { gpa, size, vmm_addr, .. } = region_id(region);
        let map = self.map.without(gpa, size, vmm_addr).map_err(|e| self.refuse("memory region not removed", &e))?;
        self.set_map(map);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("not a GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("no inflight buffers"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("no inflight buffers"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("no migration"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("no migration"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory regions"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("no migration"))
    }
}
