//! A host without threads, sockets and a clock of its own: whoever has it says when a worker works, and what time it is then.
//!
//! The device is the real one: control commands, engine, rings. What is left out is what feeds it: the vhost-user session in front and
//! the threads behind. For simulation, fuzzing, and tests that must not depend on time.

use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use virtio_queue::QueueT;
use virtio_rdma::config::NUM_CTRL_QUEUES;
use vm_memory::GuestAddress;

use crate::control::Control;
use crate::engine::{Engine, EngineConfig, SteppedWorker};
use crate::mem::Map;
use crate::nic::{Nic, NicConfig};
use crate::overlay::{NicId, Overlay};
use crate::tcp::{Conn, PeerId, Peering};
use crate::verbs::Device;
use crate::vhost::vring::Vring;

/// An engine whose workers work when they are told to.
#[derive(Debug)]
pub struct SteppedHost {
    engine: Arc<Engine>,
    workers: Vec<SteppedWorker>,
}

impl SteppedHost {
    /// Without virtual NICs; with the host's NIC, if there is one.
    ///
    /// # Errors
    /// When the system gives no descriptors.
    pub fn new(config: EngineConfig, overlay: Arc<dyn Overlay>, device: Option<Arc<dyn Device>>) -> io::Result<Self> {
        let (engine, workers) = Engine::stepped(config, overlay, device)?;
        Ok(Self { engine, workers })
    }

    /// Adds a virtual NIC, served by the first workers, whose driver accepts all features.
    pub fn add_nic(&mut self, id: NicId, config: NicConfig) -> SteppedNic {
        let count = NUM_CTRL_QUEUES + usize::from(config.num_vectors) + usize::from(config.num_workers);
        let vrings: Vec<_> = (0..count).map(|_| Arc::new(Mutex::new(Vring::new()))).collect();
        let events = vrings[NUM_CTRL_QUEUES..][..config.num_vectors.into()].to_vec();
        let workers: Vec<_> = (0..config.num_workers.into()).collect();
        let groups = self.engine.tenants().groups(&config.tenant);
        let nic = Arc::new(Nic::new(id, config, groups, &workers, events));
        self.engine.add_nic(&nic);
        let mut control = Control::new(nic.clone(), self.engine.clone());
        control.set_on_demand(true);
        SteppedNic { control, nic, vrings, map: Arc::default() }
    }

    /// Another host can be reached from now on.
    pub fn join(&self, peering: Peering) {
        self.engine.join(peering);
    }

    /// A connection that was asked for is there.
    pub fn dialed(&self, peer: PeerId, link: u16, conn: Conn, made: io::Result<TcpStream>) {
        self.engine.dialed(peer, link, conn, made);
    }

    /// A peer has made a connection for this link, and these are its first bytes.
    pub fn accepted(&self, peer: PeerId, link: u16, stream: TcpStream, first: Vec<u8>) {
        self.engine.accepted(peer, link, stream, first);
    }

    /// A worker looks everywhere once, at this time. True if there was something to do; with how long that takes on a nominal
    /// machine.
    pub fn step(&mut self, worker: usize, now: Instant) -> (bool, Duration) {
        self.workers[worker].step(now)
    }
}

/// A virtual NIC of a [`SteppedHost`].
#[derive(Debug)]
pub struct SteppedNic {
    nic: Arc<Nic>,
    control: Control,
    vrings: Vec<Arc<Mutex<Vring>>>,
    map: Arc<Map>,
}

impl Drop for SteppedNic {
    /// As at the end of a session: objects hold each other (QPs their peers, groups their members) until they are taken away.
    fn drop(&mut self) {
        self.nic.set_running(false);
        self.control.reset();
    }
}

/// Where a virtqueue lies: guest-physical addresses.
#[derive(Debug, Clone, Copy)]
pub struct QueueAddresses {
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

impl SteppedNic {
    /// The virtual NIC as the data path sees it.
    pub fn nic(&self) -> &Arc<Nic> {
        &self.nic
    }

    /// Replaces guest memory.
    pub fn set_map(&mut self, map: Map) {
        self.map = Arc::new(map);
        for vring in &self.vrings {
            vring.lock().map = self.map.clone();
        }
        self.control.set_map(self.map.clone());
    }

    /// Sets a virtqueue up; false if it cannot lie there.
    pub fn start_queue(&mut self, index: usize, at: QueueAddresses) -> bool {
        let Some(vring) = self.vrings.get(index) else {
            return false;
        };
        let mut vring = vring.lock();
        let queue = &mut vring.queue;
        let set = queue.try_set_size(at.size).is_ok()
            && queue.try_set_desc_table_address(GuestAddress(at.descriptors)).is_ok()
            && queue.try_set_avail_ring_address(GuestAddress(at.available)).is_ok()
            && queue.try_set_used_ring_address(GuestAddress(at.used)).is_ok();
        queue.set_ready(set);
        vring.enabled = set;
        set
    }

    /// Lets workers serve it, or no longer.
    pub fn set_running(&self, running: bool) {
        self.nic.set_running(running);
    }

    /// Executes the bytes of a control command and returns the answer, of at most `room` bytes.
    pub fn execute(&mut self, request: &[u8], room: usize) -> Vec<u8> {
        self.control.execute(request, room)
    }

    /// Gives out events that are left from before the guest had buffers.
    pub fn flush_events(&self) {
        for queue in &self.nic.events {
            queue.flush();
        }
    }

    /// What the device has of this guest: protection domains, memory regions, CQs, QPs.
    pub fn counts(&self) -> [usize; 4] {
        let (pds, mrs, cqs) = self.control.counts();
        [pds, mrs, cqs, self.nic.qps.len()]
    }
}
