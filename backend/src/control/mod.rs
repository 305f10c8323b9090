//! The control queue: objects of one virtual NIC, created, changed and freed as its guest's driver asks.
//!
//! [`parse`] turns bytes into commands, [`Control`] holds what exists and executes them. Everything here runs in the virtual NIC's own
//! thread. Where a command takes something away from the data path, it waits for the workers before it answers.

mod area;
mod mcast;
mod memory;
mod nic;
mod pages;
pub mod parse;
mod queues;
mod shared;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use virtio_rdma::ctrl::{ResponseHeader, Status};
use zerocopy::{Immutable, IntoBytes};

use self::mcast::Memberships;
use self::memory::Regions;
use self::nic::NicDomains;
use self::parse::Command;
use crate::cq::Cq;
use crate::engine::Engine;
use crate::mem::{Map, Pages};
use crate::nic::Nic;
use crate::slots::Slots;
use crate::srq::Srq;

/// Why a command was refused: what the host's log says. The guest sees [`status`](Self::status).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Request and stated lengths disagree.
    #[error("the request's length is wrong")]
    Length,
    /// The guest left no room for the response.
    #[error("no room for the response")]
    NoRoom,
    /// A reserved field is not zero.
    #[error("a reserved field is not zero")]
    Reserved,
    /// A field has a value that it cannot have.
    #[error("invalid {0}")]
    Value(&'static str),
    /// Not a command of this device.
    #[error("unknown command {0:#06x}")]
    UnknownCommand(u16),
    /// The profile does not offer it.
    #[error("{0} is not offered")]
    NotOffered(&'static str),
    /// Quota.
    #[error("quota of {0} is used up")]
    Quota(&'static str),
    /// No such object.
    #[error("no such {0}")]
    NotFound(&'static str),
    /// Still used.
    #[error("{0} is in use")]
    Busy(&'static str),
    /// The virtual NIC was not given this address.
    #[error("address is not this virtual NIC's")]
    NotItsAddress,
    /// Memory that the guest does not have.
    #[error("memory of {0} is outside the guest")]
    Memory(&'static str),
    /// Not now.
    #[error("not allowed in this state: {0}")]
    State(&'static str),
}

impl Refusal {
    /// What the guest is told.
    pub fn status(self) -> Status {
        match self {
            Self::Length | Self::NoRoom | Self::Reserved | Self::Value(_) => Status::Invalid,
            Self::UnknownCommand(_) | Self::NotOffered(_) => Status::Unsupported,
            Self::Quota(_) => Status::NoResources,
            Self::NotFound(_) => Status::NotFound,
            Self::Busy(_) => Status::Busy,
            Self::NotItsAddress => Status::NotPermitted,
            Self::Memory(_) => Status::BadAddress,
            Self::State(_) => Status::BadState,
        }
    }
}

/// Bytes of a response after its header.
type Answer = Result<Vec<u8>, Refusal>;

fn nothing() -> Vec<u8> {
    Vec::new()
}

fn answer<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

/// What one guest's driver created.
#[derive(Debug)]
pub struct Control {
    nic: Arc<Nic>,
    engine: Arc<Engine>,
    map: Arc<Map>,
    /// Protection domains, with the number of objects in each.
    pds: HashMap<u32, u32>,
    next_pd: u32,
    domains: NicDomains,
    regions: Regions,
    cqs: Slots<Arc<Cq>>,
    srqs: Slots<Arc<Srq>>,
    memberships: Memberships,
    /// Whether the driver accepted on-demand paging.
    on_demand: bool,
    arm: Option<Arc<Pages>>,
    /// Bytes of guest memory that all rings take.
    ring_bytes: u64,
    /// Last words are not waited for before this time.
    impatient_until: Option<Instant>,
    /// QPs created, for spreading them over doorbell queues.
    qps_created: usize,
}

impl Control {
    /// An empty device.
    pub fn new(nic: Arc<Nic>, engine: Arc<Engine>) -> Self {
        Self {
            nic,
            engine,
            map: Arc::default(),
            pds: HashMap::new(),
            next_pd: 1,
            domains: NicDomains::new(),
            regions: Regions::default(),
            cqs: Slots::default(),
            srqs: Slots::default(),
            memberships: Memberships::default(),
            on_demand: false,
            arm: None,
            ring_bytes: 0,
            impatient_until: None,
            qps_created: 0,
        }
    }

    /// Whether the driver has accepted on-demand paging.
    pub fn set_on_demand(&mut self, accepted: bool) {
        self.on_demand = accepted;
    }

    /// Executes one request and returns the bytes of the response, of which there is room for `room`; without room for as much
    /// as a header nothing is executed and nothing answered.
    pub fn execute(&mut self, request: &[u8], room: usize) -> Vec<u8> {
        self.nic.counters.commands.add(1);
        let Some(room) = room.checked_sub(size_of::<ResponseHeader>()) else {
            self.refused(Refusal::NoRoom);
            return nothing();
        };
        let (status, payload) = match self.parse_and_run(request, room) {
            Ok(payload) => (Status::Ok, payload),
            Err(refusal) => {
                self.refused(refusal);
                (refusal.status(), nothing())
            }
        };
        let length = (size_of::<ResponseHeader>() + payload.len()) as u32;
        let header = ResponseHeader { status: status.to_wire().into(), length: length.into() };
        [header.as_bytes(), &payload].concat()
    }

    fn parse_and_run(&mut self, request: &[u8], room: usize) -> Answer {
        let command = Command::parse(request)?;
        let size = command.response_size();
        if size > room {
            return Err(Refusal::NoRoom);
        }
        let payload = self.run(command)?;
        debug_assert_eq!(payload.len(), size);
        Ok(payload)
    }

    fn refused(&self, refusal: Refusal) {
        self.nic.counters.commands_refused.add(1);
        self.nic.warn(format_args!("command refused: {refusal}"));
    }

    fn run(&mut self, command: Command) -> Answer {
        match command {
            Command::Reset => {
                self.reset();
                Ok(nothing())
            }
            Command::QueryDevice => Ok(answer(&self.nic.config.profile.to_wire())),
            Command::SetArea(kind, index, extents) => self.set_area(kind, index, &extents),
            Command::AddGid(args) => self.add_gid(&args),
            Command::DelGid(args) => self.del_gid(args),
            Command::AllocPd => self.alloc_pd(),
            Command::DeallocPd(pdn) => self.dealloc_pd(pdn),
            Command::RegMr(args, extents) => self.reg_mr(&args, &extents),
            Command::ExtendMr(key, extents) => self.extend_mr(key, &extents),
            Command::ReregMr(args, extents) => self.rereg_mr(&args, &extents),
            Command::DeregMr(key) => self.dereg_mr(key),
            Command::MapPages(args, extents) => self.map_pages(args, &extents),
            Command::UnmapPages(args) => self.unmap_pages(args),
            Command::DenyPages(args) => self.deny_pages(args),
            Command::CreateCq(args, extents) => self.create_cq(&args, &extents),
            Command::DestroyCq(cqn) => self.destroy_cq(cqn),
            Command::CreateQp(args, sq, rq) => self.create_qp(&args, &sq, &rq),
            Command::ModifyQp(args) => self.modify_qp(&args),
            Command::QueryQp(qpn) => self.query_qp(qpn),
            Command::DestroyQp(qpn) => self.destroy_qp(qpn),
            Command::CreateSrq(args, extents) => self.create_srq(&args, &extents),
            Command::ModifySrq(args) => self.modify_srq(args),
            Command::QuerySrq(srqn) => self.query_srq(srqn),
            Command::DestroySrq(srqn) => self.destroy_srq(srqn),
            Command::AllocMr(args) => self.alloc_mr(args),
            Command::AllocMw(args) => self.alloc_mw(args),
            Command::DeallocMw(key) => self.dealloc_mw(key),
            Command::AttachMcast(args) => self.attach_mcast(&args),
            Command::DetachMcast(args) => self.detach_mcast(&args),
            Command::ResizeCq(args, extents) => self.resize_cq(&args, &extents),
            Command::ResizeSrq(args, extents) => self.resize_srq(&args, &extents),
        }
    }

    /// Frees every object. When it returns no worker touches anything that was there.
    pub fn reset(&mut self) {
        let qps = self.nic.qps.take_all();
        for queue in &self.nic.doorbells {
            // Dropped without the lock, which workers want.
            let slots = queue.slots.write().take_all();
            drop(slots);
            *queue.area.write() = None;
        }
        self.leave_groups();
        self.nic.handles.store(None);
        self.nic.clear_gids();
        self.engine.ports_changed();
        for qp in &qps {
            qp.close();
        }
        for cq in self.cqs.take_all() {
            cq.close();
        }
        for srq in self.srqs.take_all() {
            srq.close();
        }
        self.engine.quiesce().wait();
        // Not before: a peer would be told of wrong keys, whose messages are to be lost. Without QPs no worker looks for any.
        let keys = self.nic.keys.take();
        for queue in &self.nic.events {
            queue.clear();
        }
        // Workers have nothing of these any more: what takes long to free is freed here.
        drop((keys, qps));
        self.pds.clear();
        self.domains.clear();
        self.regions = Regions::default();
        self.arm = None;
        self.ring_bytes = 0;
    }

    /// Number of protection domains, regions and CQs.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.pds.len(), self.regions.len(), self.cqs.len())
    }

    /// Guest memory has changed. What lies in memory that went fails; nothing else notices. When it returns no worker touches what went.
    pub fn set_map(&mut self, map: Arc<Map>) {
        let before = std::mem::replace(&mut self.map, map);
        // From here on workers register what is in the new table; what they registered before is looked through below.
        *self.nic.map.write() = self.map.clone();
        self.drop_lost_areas();
        let lost = self.drop_lost_regions();
        self.drop_lost_queues();
        self.engine.wait_refreshed();
        // Last: unmapping and freeing take long, which workers must not be the ones to do.
        drop((lost, before));
    }
}
