//! One virtual NIC: what its guest created on it, as the data path sees it.
//!
//! The control queue's own tables (protection domains, drafts of regions, ...) are in [`crate::control`].

pub mod areas;
pub mod events;
pub mod gids;
pub mod keys;
pub mod log;
mod mac;
pub mod meters;
pub mod stats;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::{ArcSwap, ArcSwapOption};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use virtio_rdma::ABI_VERSION;
use virtio_rdma::config::{Config, MAGIC, STATUS_LINK_UP};
use virtio_rdma::event::EventType;

use self::areas::{AhArea, DoorbellArea};
use self::events::{EventQueue, Notice};
use self::gids::GidTable;
use self::log::LimitedLog;
use self::meters::Meters;
use self::stats::Counters;
use crate::directory::Directory;
use crate::groups::Groups;
use crate::key_table::KeyTable;
use crate::mem::Map;
use crate::on_demand::Missing;
use crate::overlay::{Gid, NicId, eui64};
use crate::profile::Profile;
use crate::qp::Qp;
use crate::rate::{Pacer, Rates};
use crate::slots::Slots;
use crate::verbs::{GrantBudget, NicQuota, NicUsage};
use crate::vhost::vring::Vring;

pub use mac::Mac;

/// What a virtual NIC is created with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicConfig {
    /// Name, for people.
    pub name: String,
    /// Tenant: NICs of different tenants do not see each other.
    pub tenant: String,
    /// Addresses that it may use.
    pub addresses: Vec<IpAddr>,
    /// MAC of the guest's ordinary interface that it rides beside.
    pub mac: Mac,
    /// Number of completion vectors, each with an event virtqueue.
    pub num_vectors: u16,
    /// Number of data-path workers that it uses, each with a doorbell virtqueue.
    pub num_workers: u16,
    /// Limits.
    pub profile: Profile,
    /// How bytes get to peers.
    #[serde(default)]
    pub path: PathChoice,
    /// How much of the host's NIC it may have.
    #[serde(default)]
    pub quota: NicQuota,
    /// How fast it may be, to begin with.
    #[serde(default)]
    pub rates: Rates,
}

/// How bytes get to peers that could be reached in several ways.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathChoice {
    /// As is best: on one host straight from memory to memory.
    #[default]
    Auto,
    /// Through the host's NIC, if the peer does so too.
    Nic,
}

impl FromStr for PathChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "nic" => Ok(Self::Nic),
            _ => Err(format!("path {text:?}: use auto, or nic for the host's RDMA NIC")),
        }
    }
}

impl fmt::Display for PathChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Nic => "nic",
        })
    }
}

impl NicConfig {
    /// Whether the guest may use this GID.
    pub fn owns(&self, gid: Gid) -> bool {
        gid == Gid::link_local(self.mac.0) || self.addresses.iter().any(|&a| Gid::of(a) == gid)
    }
}

/// The QPs that one worker owns, by doorbell, and where their doorbells are.
#[derive(Debug)]
pub struct DoorbellQueue {
    /// The worker, by its number on this host.
    pub worker: usize,
    /// QP of each doorbell.
    pub slots: RwLock<Slots<Arc<Qp>>>,
    /// Where the driver rings; `None` until it says.
    pub area: RwLock<Option<Arc<DoorbellArea>>>,
}

/// A virtual NIC.
#[derive(Debug)]
pub struct Nic {
    /// Its number.
    pub id: NicId,
    /// What it was created with.
    pub config: NicConfig,
    /// Memory regions and windows.
    pub keys: KeyTable,
    /// Guest memory, for workers that register some: they hold the lock until that is in [`keys`](Self::keys).
    pub map: RwLock<Arc<Map>>,
    /// QPs by number.
    pub qps: Directory<Qp>,
    /// Doorbell queues.
    pub doorbells: Vec<DoorbellQueue>,
    /// The multicast groups of its tenant.
    pub groups: Arc<Groups>,
    /// Address handles; `None` until the driver gives the area.
    pub handles: ArcSwapOption<AhArea>,
    /// The GID table, as of now.
    pub gids: ArcSwap<GidTable>,
    /// Event queues, one for each completion vector.
    pub events: Vec<EventQueue>,
    /// Keys that its queue pairs remember for the host's NIC.
    pub grants: Arc<GrantBudget>,
    /// What it has on the host's NIC.
    pub usage: NicUsage,
    /// Counters.
    pub counters: Arc<Counters>,
    /// The same for sends, by transport, path and other host.
    pub meters: Meters,
    log: LimitedLog,
    /// Changes with every change of the GID table.
    gid_epoch: AtomicU64,
    running: AtomicBool,
    link_up: AtomicBool,
    /// How fast it and its QPs may be.
    pub pacer: Pacer,
}

impl Nic {
    /// A virtual NIC with the groups of its tenant, whose doorbell queues are served by these workers and whose events go to these virtqueues.
    pub fn new(
        id: NicId,
        config: NicConfig,
        groups: Arc<Groups>,
        workers: &[usize],
        event_vrings: Vec<Arc<Mutex<Vring>>>,
    ) -> Self {
        let queue = |&worker| DoorbellQueue { worker, slots: RwLock::default(), area: RwLock::default() };
        Self {
            id,
            keys: KeyTable::new(config.profile.max_mr.saturating_add(config.profile.max_mw)),
            map: RwLock::default(),
            qps: Directory::new(config.profile.max_qp),
            doorbells: workers.iter().map(queue).collect(),
            groups,
            handles: ArcSwapOption::empty(),
            gids: ArcSwap::from_pointee(GidTable::new(config.profile.max_gids)),
            events: event_vrings.into_iter().map(EventQueue::new).collect(),
            grants: Arc::default(),
            usage: NicUsage::default(),
            counters: Arc::default(),
            meters: Meters::default(),
            log: LimitedLog::new(&config.name),
            gid_epoch: AtomicU64::new(0),
            running: AtomicBool::new(false),
            link_up: AtomicBool::new(true),
            pacer: Pacer::new(config.rates.clone()),
            config,
        }
    }

    /// The configuration space, as the guest's driver reads it.
    pub fn config_space(&self) -> Config {
        let config = &self.config;
        Config {
            magic: MAGIC.into(),
            version: ABI_VERSION.into(),
            status: if self.link_up() { STATUS_LINK_UP } else { 0 }.into(),
            num_event_queues: (self.events.len() as u16).into(),
            num_doorbell_queues: (self.doorbells.len() as u16).into(),
            mac: config.mac.0,
            max_mtu: 5,
            active_mtu: 5,
            node_guid: eui64(config.mac.0),
            speed_mbps: config.profile.speed_mbps.into(),
            ..Config::default()
        }
    }

    /// Whether workers may touch the guest's memory.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// Allows or forbids it. Forbidding is complete only after [`Quiesce::wait`](crate::engine::quiesce::Quiesce::wait).
    pub fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::SeqCst);
    }

    /// Fills or clears an entry of the GID table; false if there is no such entry.
    pub fn set_gid(&self, index: usize, gid: Option<Gid>) -> bool {
        let mut there = false;
        self.gids.rcu(|gids| {
            let mut gids = GidTable::clone(gids);
            there = gids.set(index, gid);
            gids
        });
        self.gid_epoch.fetch_add(1, Ordering::AcqRel);
        there
    }

    /// Clears the GID table.
    pub fn clear_gids(&self) {
        self.gids.store(Arc::new(GidTable::new(self.config.profile.max_gids)));
    }

    /// A number that changes when the GID table does: peers that were found by GID are looked for again.
    pub fn gid_epoch(&self) -> u64 {
        self.gid_epoch.load(Ordering::Acquire)
    }

    /// Whether the port is up.
    pub fn link_up(&self) -> bool {
        self.link_up.load(Ordering::Relaxed)
    }

    /// The worker that serves this queue pair of it.
    pub fn worker_of(&self, qp: &Qp) -> usize {
        self.doorbells[qp.id.doorbell_queue].worker
    }

    /// The QP of this number.
    pub fn qp(&self, qpn: u32) -> Option<Arc<Qp>> {
        self.qps.get(qpn)
    }

    /// Tells the guest that something happened to one of its objects.
    pub fn raise(&self, kind: EventType, number: u32) {
        self.raise_on(0, kind, number);
    }

    /// Tells it on the event queue of a completion vector.
    pub fn raise_on(&self, vector: usize, kind: EventType, number: u32) {
        self.give(vector, Notice { kind, number, pages: None });
    }

    /// Asks for pages of an on-demand region.
    pub fn raise_fault(&self, key: u32, pages: Missing) {
        self.counters.page_faults.add(1);
        self.give(0, Notice { kind: EventType::PageFault, number: key, pages: Some(pages) });
    }

    fn give(&self, vector: usize, notice: Notice) {
        if self.events[vector].raise(notice) {
            self.counters.events.add(1);
        }
    }

    /// A warning for the host's log, limited.
    pub fn warn(&self, line: std::fmt::Arguments<'_>) {
        self.log.write(::log::Level::Warn, &self.counters.log_suppressed, line);
    }

    /// A line for the host's log, limited together with the warnings.
    pub fn info(&self, line: std::fmt::Arguments<'_>) {
        self.log.write(::log::Level::Info, &self.counters.log_suppressed, line);
    }
}
