//! What the `verbs` path costs by itself: on a NIC that has done everything as soon as it is asked, and moves nothing.

use std::any::Any;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Result, ensure};
use freeflow_backend::Gid;
use freeflow_backend::mr::Layout;
use freeflow_backend::verbs::fake::Script;
use freeflow_backend::verbs::{
    Access, CompletionQueue, Connection, Device, DeviceError, Limits, MemoryRegion, PostError, ProtectionDomain,
    QueuePair, QueuePairSpec, RecvRequest, SendList, Sending, Trouble, Wc,
};
use virtio_rdma::ib::{SendFlags, WcStatus};

use super::path::{Cores, engine};
use super::table::Row;
use super::traffic::{LIST, Traffic, WINDOW, complete, per_microsecond};
use super::{RUNS, median};
use crate::bed::Bed;
use crate::guest::mem::Placement;
use crate::guest::verbs::{Mr, MrSpec, Op, Pd, SendWr};
use crate::guest::{Guest, GuestConfig};
use crate::router::RouterSpec;
use crate::sys::pin_thread;

/// Keys in use at each end.
const KEYS: usize = 10_000;
/// Lists of a run.
const LISTS: usize = 20_000;

/// Every row of this module.
///
/// # Errors
/// When a work request fails.
pub fn rows(cores: Option<Cores>) -> Result<Vec<Row>> {
    let Some(cores) = cores else {
        return Ok(vec![Row::not_measurable("verbs path: translation", "poster and worker need a core each")]);
    };
    pin_thread(0, cores.poster)?;
    let spec = RouterSpec { vectors: 1, engine: engine(cores), ..RouterSpec::of(2) }.over(Arc::new(InstantNic::new()?));
    let config = GuestConfig { rings: Placement::Contiguous, memory_size: 256 << 20, ..GuestConfig::default() };
    let bed = Bed::guests(&spec, &config);
    let (a, b) = bed.two();
    let traffic = Traffic::between(a, b, 4096)?;
    let (own, theirs) = (regions(&traffic.a.pd, a)?, regions(&traffic.b.pd, b)?);
    let run = |keys| (0..RUNS).map(|_| rate(&traffic, &own[..keys], &theirs[..keys], 8)).collect::<Result<Vec<_>>>();
    let (one, many) = (median(run(1)?), median(run(KEYS)?));
    let on_nic: u64 = bed.router.router().nics().iter().map(|nic| nic.counters.nic_wqes).sum();
    let growth = growth(&bed)?;
    let copied: u64 = bed.router.router().nics().iter().map(|nic| nic.counters.copied_bytes).sum();
    ensure!(copied == 0, "{copied} bytes were copied");
    ensure!(on_nic >= (2 * RUNS * LISTS * LIST) as u64, "only {on_nic} work requests went over the NIC");
    Ok(vec![
        Row::at_least("verbs path, NIC that does nothing: 8 B WRITE, lists of 32, 1 key", one, "M/s", 8.0),
        Row::at_least("verbs path, NIC that does nothing: the same, 10,000 keys", many, "M/s", 8.0),
        Row::at_most("verbs path: translation of a work request, 10,000 keys", 1e3 / many, "ns", 125.0),
        Row::at_most("verbs path: worker's time for a WRITE of 1 MiB, beside one of 4 KiB", growth, "x", 1.2),
    ])
}

/// How much more of the worker's time a work request of 1 MiB takes than one of 4 KiB. The worker is what limits both, since the NIC takes no
/// time; so it is told from how many get through.
fn growth(bed: &Bed) -> Result<f64> {
    let (a, b) = bed.two();
    let traffic = Traffic::between(a, b, 1 << 20)?;
    let whole =
        |pd: &Pd, guest: &Guest| -> Result<[Mr; 1]> { Ok([pd.reg_spec(MrSpec::whole(&guest.alloc(1 << 20)?))?]) };
    let (own, theirs) = (whole(&traffic.a.pd, a)?, whole(&traffic.b.pd, b)?);
    let of = |len| rate(&traffic, &own, &theirs, len);
    Ok(median((0..RUNS).map(|_| Ok(of(4096)? / of(1 << 20)?)).collect::<Result<Vec<_>>>()?))
}

/// The same memory under many keys.
fn regions(pd: &Pd, guest: &Guest) -> Result<Vec<Mr>> {
    let memory = guest.alloc(4096)?;
    (0..KEYS).map(|_| Ok(pd.reg_spec(MrSpec::whole(&memory))?)).collect()
}

/// Million WRITEs a second, each with the next key of both ends.
fn rate(traffic: &Traffic, own: &[Mr], theirs: &[Mr], len: usize) -> Result<f64> {
    let sges: Vec<_> = own.iter().map(|mr| [mr.sge(0, len)]).collect();
    let request = |n: usize| {
        let n = n % own.len();
        let flags = SendFlags::empty();
        SendWr::new(1, Op::Write(theirs[n].remote(0)), &sges[n]).flags(flags)
    };
    let lists: Vec<Vec<_>> = (0..own.len().div_ceil(LIST))
        .map(|list| {
            let mut all: Vec<_> = (list * LIST..(list + 1) * LIST).map(request).collect();
            all[LIST - 1] = all[LIST - 1].flags(SendFlags::SIGNALED);
            all
        })
        .collect();
    let start = Instant::now();
    for turn in 0..LISTS + WINDOW {
        if turn >= WINDOW {
            complete(&traffic.a.cq)?;
        }
        if turn < LISTS {
            traffic.a.qp.post_send(&lists[turn % lists.len()])?;
        }
    }
    Ok(per_microsecond(LISTS * LIST, start))
}

/// A NIC that completes as it is posted to.
#[derive(Debug)]
struct InstantNic {
    numbers: Arc<AtomicU32>,
    /// Nobody writes to it.
    quiet: OwnedFd,
}

impl InstantNic {
    fn new() -> Result<Self> {
        Ok(Self { numbers: Arc::default(), quiet: event()? })
    }
}

fn event() -> std::io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK)?)
}

impl Device for InstantNic {
    #[expect(clippy::unnecessary_literal_bound, reason = "the trait's")]
    fn name(&self) -> &str {
        "instant0"
    }

    fn limits(&self) -> Limits {
        Script::default().limits
    }

    fn gid(&self) -> Gid {
        Gid([0; 16])
    }

    fn alloc_pd(&self) -> Result<Arc<dyn ProtectionDomain>, DeviceError> {
        Ok(Arc::new(InstantPd { numbers: self.numbers.clone() }))
    }

    fn create_cq(&self, _: u32) -> Result<Arc<dyn CompletionQueue>, DeviceError> {
        let event = event().map_err(|source| DeviceError::System { what: "a completion channel", source })?;
        Ok(Arc::new(InstantCq { entries: Mutex::default(), armed: AtomicBool::new(false), event }))
    }

    fn take_trouble(&self, _: &mut Vec<Trouble>) {}

    fn trouble_fd(&self) -> BorrowedFd<'_> {
        self.quiet.as_fd()
    }
}

#[derive(Debug)]
struct InstantPd {
    numbers: Arc<AtomicU32>,
}

impl ProtectionDomain for InstantPd {
    fn register(&self, _: &Arc<Layout>, _: u64, _: Access) -> Result<Arc<dyn MemoryRegion>, DeviceError> {
        Ok(Arc::new(InstantMr(self.numbers.fetch_add(1, Relaxed))))
    }

    fn create_qp(&self, spec: &QueuePairSpec<'_>) -> Result<Box<dyn QueuePair>, DeviceError> {
        let cq: Arc<dyn Any + Send + Sync> = spec.cq.clone();
        let cq = cq.downcast().map_err(|_| DeviceError::Invalid("the completion queue"))?;
        Ok(Box::new(InstantQp { number: self.numbers.fetch_add(1, Relaxed), cq }))
    }
}

#[derive(Debug)]
struct InstantMr(u32);

impl MemoryRegion for InstantMr {
    fn lkey(&self) -> u32 {
        self.0
    }

    fn rkey(&self) -> u32 {
        self.0
    }
}

#[derive(Debug)]
struct InstantCq {
    entries: Mutex<VecDeque<Wc>>,
    armed: AtomicBool,
    event: OwnedFd,
}

impl CompletionQueue for InstantCq {
    fn poll(&self, most: usize, out: &mut Vec<Wc>) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let count = most.min(entries.len());
        out.extend(entries.drain(..count));
    }

    fn arm(&self) -> Result<(), DeviceError> {
        self.armed.store(true, SeqCst);
        Ok(())
    }

    fn take_events(&self) {
        // Fails when there are none.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    fn events_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[derive(Debug)]
struct InstantQp {
    number: u32,
    cq: Arc<InstantCq>,
}

impl QueuePair for InstantQp {
    fn number(&self) -> u32 {
        self.number
    }

    fn connect(&self, _: &Connection) -> Result<(), DeviceError> {
        Ok(())
    }

    fn start_sending(&self, _: Sending) -> Result<(), DeviceError> {
        Ok(())
    }

    fn fail(&self) {}

    fn post_send(&self, list: &SendList) -> Result<(), PostError> {
        let mut entries = self.cq.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let signaled = list.requests().iter().filter(|request| request.flags.contains(SendFlags::SIGNALED));
        entries.extend(signaled.map(|request| Wc {
            id: request.id,
            status: WcStatus::Success,
            opcode: request.op.opcode(),
            byte_len: 0,
            imm: None,
        }));
        drop(entries);
        if self.cq.armed.swap(false, SeqCst) {
            // Fails only when it has been written to beyond counting.
            let _ = rustix::io::write(&self.cq.event, &1u64.to_ne_bytes());
        }
        Ok(())
    }

    fn post_recv(&self, _: &RecvRequest<'_>) -> Result<(), PostError> {
        Ok(())
    }
}
