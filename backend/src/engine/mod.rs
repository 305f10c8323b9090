//! The data-path engine: worker threads that serve the send queues of all virtual NICs.
//!
//! * [`worker`]: the loop: doorbells, run queues, timers, sleeping.
//! * [`serve`]: one visit to a QP; [`rc`], [`uc`] and [`ud`] are the transports on this host,
//!   [`connected`] what the first two share, [`mcast`] the last to many; [`local`] is for work requests that need no peer.
//! * [`verbs`]: connected transports over the host's NIC.
//! * [`tcp`]: connected transports and datagrams to other hosts.
//! * [`complete`]: what becomes of work requests; all of these use it, and it uses none of them. [`completions`] are on their way to CQs,
//!   [`failure`] is what no completion can say; [`hand`] has receives that were taken ahead.
//! * [`cost`]: what work costs, by which virtual NICs share a worker.
//! * [`sampler`] picks work requests that are timed, [`rest`] times workers.
//! * [`quiesce`]: how others wait until workers no longer use something.

mod complete;
mod completions;
mod connected;
pub mod context;
mod cost;
mod failure;
mod hand;
pub mod job;
mod local;
pub mod mcast;
pub mod quiesce;
mod rc;
mod rest;
mod sampler;
mod serve;
mod tally;
mod tcp;
mod timers;
mod uc;
mod ud;
mod verbs;
mod wake;
mod worker;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use self::quiesce::Quiesce;
pub use self::rest::Spent;
pub use self::sampler::Seen;
use self::wake::Mailbox;
pub use self::worker::SteppedWorker;
use crate::groups::Tenants;
use crate::nic::Nic;
use crate::overlay::{Gid, NicId, Overlay, Place};
use crate::qp::Qp;
use crate::tcp::PeerId;
use crate::verbs::{Device, Fabric};

/// Settings of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Worker threads, at least 1.
    pub workers: usize,
    /// How long a worker polls after the last work before it sleeps.
    pub poll: Duration,
    /// How long a datagram waits for a receive before it is dropped.
    pub datagram_patience: Duration,
    /// How long an unreliable queue pair that is destroyed may take to send what was posted before.
    pub last_words: Duration,
    /// Core that each worker is pinned to; those beyond the list are not pinned.
    pub cores: Vec<usize>,
    /// What the network is called that the host's NIC is on: hosts whose NICs are on the same reach each other's.
    pub rdma_fabric: String,
    /// There are other hosts: virtual NICs use the host's NIC to reach theirs.
    pub spans_hosts: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            workers: 1,
            poll: Duration::from_micros(50),
            datagram_patience: Duration::from_millis(2),
            last_words: Duration::from_millis(200),
            cores: Vec::new(),
            rdma_fabric: "default".to_owned(),
            spans_hosts: false,
        }
    }
}

/// In place of a version: a worker that will look at everything anew before it works.
const RESTING: u64 = u64::MAX;

/// How long the host's NIC may take to finish what it has of a guest that is stopped; then that is given up.
const NIC_PATIENCE: Duration = Duration::from_secs(1);

/// The engine, shared by workers and by the virtual NICs' own threads.
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    overlay: Arc<dyn Overlay>,
    tenants: Tenants,
    nics: ArcSwap<HashMap<NicId, Arc<Nic>>>,
    /// Changes when workers must look at the list of NICs and their areas again.
    version: AtomicU64,
    /// The version that each worker has taken over; [`RESTING`] for one that uses nothing now.
    seen: Vec<AtomicU64>,
    quiesce: Quiesce,
    mailboxes: Vec<Mailbox>,
    stop: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// The host's NIC.
    fabric: Option<Arc<Fabric>>,
}

impl Engine {
    /// Starts the workers.
    ///
    /// # Errors
    /// When the system gives no threads or descriptors.
    pub fn start(
        config: EngineConfig,
        overlay: Arc<dyn Overlay>,
        device: Option<Arc<dyn Device>>,
    ) -> io::Result<Arc<Self>> {
        let engine = Self::new(config, overlay, device)?;
        for index in 0..engine.num_workers() {
            let thread = worker::spawn(engine.clone(), index)?;
            engine.threads.lock().push(thread);
        }
        if engine.fabric.is_some() {
            let thread = verbs::spawn(engine.clone())?;
            engine.threads.lock().push(thread);
        }
        Ok(engine)
    }

    /// Without threads: its workers are handed out.
    ///
    /// # Errors
    /// When the system gives no descriptors.
    pub fn stepped(
        config: EngineConfig,
        overlay: Arc<dyn Overlay>,
        device: Option<Arc<dyn Device>>,
    ) -> io::Result<(Arc<Self>, Vec<SteppedWorker>)> {
        let engine = Self::new(config, overlay, device)?;
        let workers = (0..engine.num_workers()).map(|index| SteppedWorker::new(engine.clone(), index)).collect();
        Ok((engine, workers))
    }

    fn new(config: EngineConfig, overlay: Arc<dyn Overlay>, device: Option<Arc<dyn Device>>) -> io::Result<Arc<Self>> {
        let workers = config.workers.max(1);
        let fabric = device.map(|device| Fabric::new(device, workers, &config.rdma_fabric)).transpose()?.map(Arc::new);
        let events = |worker| fabric.as_ref().map(|fabric| fabric.side(worker).events_fd());
        let mailboxes = (0..workers).map(|worker| Mailbox::new(events(worker))).collect::<io::Result<_>>()?;
        Ok(Arc::new(Self {
            overlay,
            tenants: Tenants::default(),
            nics: ArcSwap::default(),
            version: AtomicU64::new(1),
            seen: (0..workers).map(|_| AtomicU64::new(0)).collect(),
            quiesce: Quiesce::new(workers),
            mailboxes,
            stop: AtomicBool::new(false),
            threads: Mutex::default(),
            fabric,
            config,
        }))
    }

    /// Ends the workers and waits for them.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wake_all();
        if let Some(fabric) = &self.fabric {
            fabric.wake();
        }
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            if thread.join().is_err() {
                log::error!("a thread of the data path has panicked");
            }
        }
    }

    /// Settings.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Number of workers.
    pub fn num_workers(&self) -> usize {
        self.mailboxes.len()
    }

    /// The host's NIC, if it is used.
    pub fn fabric(&self) -> Option<&Arc<Fabric>> {
        self.fabric.as_ref()
    }

    /// Returns when the host's NIC touches no memory of a virtual NIC's guest, which workers do not serve any more.
    pub fn wait_nic_quiet(&self, id: NicId) {
        if let Some(fabric) = &self.fabric {
            self.hold(id);
            fabric.wait_quiet(id, NIC_PATIENCE);
        }
    }

    /// A worker looks everywhere once more, if it sleeps.
    pub fn wake(&self, worker: usize) {
        self.mailboxes[worker].wake();
    }

    /// How to wait for the workers.
    pub fn quiesce(&self) -> &Quiesce {
        &self.quiesce
    }

    /// Serves a virtual NIC from now on.
    pub fn add_nic(&self, nic: &Arc<Nic>) {
        self.change_nics(|nics| drop(nics.insert(nic.id, nic.clone())));
        self.ports_changed();
    }

    /// Serves it no longer. When this returns no worker knows it.
    pub fn remove_nic(&self, id: NicId) {
        self.change_nics(|nics| drop(nics.remove(&id)));
        self.wait_refreshed();
    }

    fn change_nics(&self, change: impl Fn(&mut HashMap<NicId, Arc<Nic>>)) {
        self.nics.rcu(|nics| {
            let mut nics = HashMap::clone(nics);
            change(&mut nics);
            nics
        });
    }

    /// All virtual NICs, in the order of their numbers.
    pub fn nics(&self) -> Vec<Arc<Nic>> {
        let mut nics: Vec<_> = self.nics.load().values().cloned().collect();
        nics.sort_by_key(|n| n.id);
        nics
    }

    /// The virtual NIC of this number.
    pub fn nic(&self, id: NicId) -> Option<Arc<Nic>> {
        self.nics.load().get(&id).cloned()
    }

    /// The overlay network.
    pub fn overlay(&self) -> &Arc<dyn Overlay> {
        &self.overlay
    }

    /// Multicast groups of all tenants.
    pub fn tenants(&self) -> &Tenants {
        &self.tenants
    }

    fn mailbox(&self, worker: usize) -> &Mailbox {
        &self.mailboxes[worker]
    }

    /// The host that has `gid`, as seen from `from`, if that is another one.
    pub fn find_host(&self, from: NicId, gid: Gid) -> Option<PeerId> {
        match self.overlay.locate(from, gid)? {
            Place::Local(_) => None,
            Place::Remote(peer) => Some(peer),
        }
    }

    /// The virtual NIC that has `gid`, as seen from `from`.
    pub fn find(&self, from: NicId, gid: Gid) -> Option<Arc<Nic>> {
        match self.overlay.locate(from, gid)? {
            Place::Local(id) => self.nics.load().get(&id).cloned(),
            Place::Remote(_) => None,
        }
    }

    /// Workers look at NICs and areas again, sleeping ones too.
    pub fn ports_changed(&self) {
        self.version.fetch_add(1, Ordering::SeqCst);
        self.wake_all();
    }

    /// Has workers look again and returns when all have done so and none uses what was there before.
    pub fn wait_refreshed(&self) {
        self.ports_changed();
        let version = self.version.load(Ordering::SeqCst);
        while !self.stop.load(Ordering::SeqCst) && self.seen.iter().any(|seen| seen.load(Ordering::Acquire) < version) {
            std::thread::sleep(Duration::from_micros(20));
        }
        self.quiesce.wait();
    }

    /// The QP's worker visits it soon, without a doorbell.
    pub fn attend(&self, nic: &Arc<Nic>, qp: &Arc<Qp>) {
        self.mailboxes[nic.worker_of(qp)].post(nic.clone(), qp.clone());
    }

    /// The eventfd by which the guest wakes the worker of a doorbell queue; `None` when there is none any more.
    ///
    /// # Errors
    /// When the descriptor cannot be waited for.
    pub fn set_kick(&self, nic: &Nic, queue: usize, kick: Option<File>) -> io::Result<()> {
        self.mailboxes[nic.doorbells[queue].worker].set_kick(nic.id, queue, kick)
    }

    /// How many times each worker has slept.
    pub fn sleeps(&self) -> Vec<u64> {
        self.mailboxes.iter().map(Mailbox::sleeps).collect()
    }

    /// What each worker did with its time.
    pub fn spent(&self) -> Vec<Spent> {
        self.mailboxes.iter().map(Mailbox::spent).collect()
    }

    fn wake_all(&self) {
        self.mailboxes.iter().for_each(Mailbox::wake);
    }
}
