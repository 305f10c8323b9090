#![expect(clippy::cast_possible_wrap, clippy::cast_sign_loss, reason = "C counts in signed numbers")]
//! A NIC of this host, by way of libibverbs (`rdma-sys`).
//!
//! All `unsafe` of that is here, in modules of one object of the library each: [`context`], [`region`], [`completions`], [`pair`]. What
//! leaves them keeps alive what it needs, so that objects may be dropped in any order. [`choose`] says which device, port and GID are
//! used; [`events`] hears of what goes wrong; [`ahead`] keeps completions apart;
//! [`mappings`] counts what regions map.
//!
//! Only RoCE v2: on InfiniBand peers are reached by LIDs, which nothing here knows.

mod ahead;
mod choose;
mod completions;
mod context;
mod events;
mod mappings;
mod pair;
mod region;

use std::any::Any;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::process::{Resource, getrlimit};
use virtio_rdma::ib::QpType;

use super::choice::DeviceChoice;
use super::device::{
    Access, Capacity, CompletionQueue, Device, DeviceError, Limits, MemoryRegion, ProtectionDomain, QueuePair,
    QueuePairSpec, Trouble,
};
use crate::mr::Layout;
use crate::overlay::Gid;

pub use self::choose::NoNic;

use self::choose::Chosen;
use self::completions::Completions;
use self::context::Context;
use self::events::Events;
use self::mappings::Mappings;
use self::pair::Pair;
use self::region::{Domain, Region};

/// What is asked for first, of inline data of a queue pair: no device says beforehand what it takes.
const MOST_INLINE: u32 = 1024;
/// Less is not worth asking for.
const LEAST_INLINE: u32 = 16;

/// A NIC, opened.
#[derive(Debug)]
pub struct HostNic {
    name: String,
    limits: Limits,
    events: Events,
    shared: Arc<Shared>,
}

/// What its objects share.
#[derive(Debug)]
struct Shared {
    context: Context,
    port: u8,
    /// Index and value of the GID that the port has now.
    gid: Mutex<(u8, Gid)>,
    mappings: Arc<Mappings>,
    /// Bytes that this process may pin, if that is limited. Asked for once: the daemon's system-call filter lets nobody ask later.
    memlock: Option<u64>,
}

impl HostNic {
    /// Opens the device that is asked for, or the first that can be used.
    ///
    /// # Errors
    /// When there is none, and what there is instead.
    pub fn open(wanted: &DeviceChoice) -> Result<Self, NoNic> {
        let Chosen { name, context, port, gid } = choose::find(wanted)?;
        let (gid, mappings) = (Mutex::new(gid), Mappings::of_process());
        let shared = Shared { context, port, gid, mappings, memlock: getrlimit(Resource::Memlock).current };
        Self::start(name.clone(), Arc::new(shared)).map_err(|source| NoNic::Open { name, source })
    }

    fn start(name: String, shared: Arc<Shared>) -> io::Result<Self> {
        let limits = limits(&shared)?;
        Ok(Self { name, limits, events: Events::of(&shared)?, shared })
    }

    /// Its port.
    pub fn port(&self) -> u8 {
        self.shared.port
    }
}

impl Shared {
    fn gid(&self) -> (u8, Gid) {
        *self.gid.lock()
    }
}

/// What the device says, and what it shows only when tried.
fn limits(shared: &Arc<Shared>) -> io::Result<Limits> {
    let limits = shared.context.limits()?;
    let domain = Domain::alloc(shared)?;
    let cq = Arc::new(Completions::create(shared, 16)?);
    let takes = |inline: &u32| {
        let capacity = Capacity { sends: 1, recvs: 1, sges: 1, inline: *inline };
        Pair::create(&domain, &cq, QpType::Rc, capacity).is_ok()
    };
    let halves = std::iter::successors(Some(MOST_INLINE), |inline| (*inline > LEAST_INLINE).then_some(inline / 2));
    let mtu = shared.context.port(shared.port)?.mtu;
    Ok(Limits { inline: halves.into_iter().find(takes).unwrap_or(0), mtu, ..limits })
}

impl Device for HostNic {
    fn name(&self) -> &str {
        &self.name
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn gid(&self) -> Gid {
        self.shared.gid().1
    }

    fn alloc_pd(&self) -> Result<Arc<dyn ProtectionDomain>, DeviceError> {
        Ok(Arc::new(HostDomain(Domain::alloc(&self.shared).map_err(refused("a protection domain"))?)))
    }

    fn create_cq(&self, entries: u32) -> Result<Arc<dyn CompletionQueue>, DeviceError> {
        Ok(Arc::new(Completions::create(&self.shared, entries).map_err(refused("a completion queue"))?))
    }

    fn take_trouble(&self, out: &mut Vec<Trouble>) {
        self.events.take(out);
    }

    fn trouble_fd(&self) -> BorrowedFd<'_> {
        self.events.fd()
    }
}

#[derive(Debug)]
struct HostDomain(Arc<Domain>);

impl ProtectionDomain for HostDomain {
    fn register(&self, memory: &Arc<Layout>, iova: u64, access: Access) -> Result<Arc<dyn MemoryRegion>, DeviceError> {
        Ok(Arc::new(Region::register(&self.0, memory, iova, access)?))
    }

    fn create_qp(&self, spec: &QueuePairSpec<'_>) -> Result<Box<dyn QueuePair>, DeviceError> {
        let cq: Arc<dyn Any + Send + Sync> = spec.cq.clone();
        let cq: Arc<Completions> = cq.downcast().map_err(|_| DeviceError::Invalid("the completion queue"))?;
        Ok(Box::new(Pair::create(&self.0, &cq, spec.kind, spec.capacity).map_err(refused("a queue pair"))?))
    }
}

/// What it means that the device refuses something.
fn refused(what: &'static str) -> impl Fn(io::Error) -> DeviceError {
    move |source| match source.raw_os_error() {
        // Some drivers say the one, some the other, when there are no more.
        Some(libc::ENOMEM | libc::ENOSPC) => DeviceError::Limit(what),
        _ => DeviceError::System { what, source },
    }
}
