//! The NIC as the engine's workers share it: for each worker completion queues, and the queue pairs that complete there.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use freeflow_tcp::frame::{NicEnd, PairId};
use parking_lot::{Mutex, RwLock};
use rand::Rng;
use rustix::event::{EventfdFlags, eventfd};
use virtio_rdma::ib::{Access, AtomicCap, QpType};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::{
    Capacity, CompletionQueue, Connection, Device, DeviceError, Endpoint, Limits, ProtectionDomain, QueuePairSpec,
    Sending, Wc,
};
use super::end::{End, Tag};
use crate::nic::Nic;
use crate::overlay::{Gid, NicId};
use crate::qp::Qp;
use crate::tcp::PeerId;

/// Entries of a completion queue; a worker gets another when one is taken.
const CQES: u32 = 1 << 16;
/// Most receives of a queue pair that are on the NIC at a time. Each is there for a message that is on its way.
const MAX_RECVS: u32 = 128;

/// A NIC and what there is on it.
#[derive(Debug)]
pub struct Fabric {
    device: Arc<dyn Device>,
    number: u64,
    /// Whether the port is up, as far as we have heard.
    up: AtomicBool,
    sides: Vec<Arc<Side>>,
    next_end: AtomicU64,
    wishes: Mutex<VecDeque<Wish>>,
    /// Written when there is another wish.
    wished: OwnedFd,
    /// Queue pairs that the NIC says have failed.
    failing: Mutex<Vec<Failing>>,
}

/// A queue pair that the NIC says has failed.
#[derive(Debug)]
pub struct Failing {
    /// Whose it is.
    pub member: Member,
    /// How often it was looked at since.
    pub looks: u32,
}

/// A queue pair wants to send to another over the NIC.
#[derive(Debug)]
pub struct Wish {
    /// Who sends.
    pub from: Member,
    /// To whom.
    pub to: Target,
    /// Set when it was seen to, whatever came of it.
    pub done: Arc<AtomicBool>,
}

/// Whom an end is to be connected to.
#[derive(Debug)]
pub enum Target {
    /// One of this host.
    Here(Member),
    /// One of another host, which was told the same. This one's queue pair sends.
    There(NicEnd),
    /// The same; that host asks, and is to be told by this link.
    Answer(NicEnd, PeerId, u16, PairId),
}

/// Why two ends are not connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The NIC does not do it.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Connected queue pairs have one peer in their life.
    #[error("a queue pair is connected to another one on the host's NIC")]
    Taken,
    /// It was destroyed.
    #[error("a queue pair is gone from the host's NIC")]
    Gone,
    /// Not yet: the NIC has sends for another peer still.
    #[error("the host's NIC is still sending to another peer")]
    Busy,
}

/// One worker's part.
#[derive(Debug)]
pub struct Side {
    queues: RwLock<Vec<Queue>>,
    members: RwLock<HashMap<u64, Member>>,
    /// Work requests that will complete here.
    expected: AtomicUsize,
    /// Readable when one of the queues has an event.
    events: Epoll,
}

#[derive(Debug)]
struct Queue {
    cq: Arc<dyn CompletionQueue>,
    /// Entries that no queue pair needs.
    free: u32,
    /// Whether its next completion makes an event, or has.
    armed: AtomicBool,
}

/// A guest's queue pair with its end on the NIC.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its virtual NIC.
    pub nic: Arc<Nic>,
    /// The queue pair.
    pub qp: Arc<Qp>,
    /// Its end.
    pub end: Arc<End>,
}

impl Fabric {
    /// For this many workers; `name` is what the network is called that the NIC is on.
    ///
    /// # Errors
    /// When the system gives no descriptors.
    pub fn new(device: Arc<dyn Device>, workers: usize, name: &str) -> io::Result<Self> {
        let sides = (0..workers).map(|_| Side::new().map(Arc::new)).collect::<io::Result<_>>()?;
        let wished = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self {
            device,
            number: number_of(name),
            up: AtomicBool::new(true),
            sides,
            next_end: AtomicU64::new(1),
            wishes: Mutex::default(),
            wished,
            failing: Mutex::default(),
        })
    }

    /// The NIC.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// A worker's part.
    pub fn side(&self, worker: usize) -> &Side {
        &self.sides[worker]
    }

    /// All workers' parts.
    pub fn sides(&self) -> impl Iterator<Item = &Side> {
        self.sides.iter().map(Arc::as_ref)
    }

    /// Gives a guest's queue pair an end on the NIC, for its present life.
    ///
    /// # Errors
    /// When the NIC has no room for it.
    pub fn add(
        &self,
        nic: &Arc<Nic>,
        qp: &Arc<Qp>,
        pd: &Arc<dyn ProtectionDomain>,
        sends: u32,
    ) -> Result<Arc<End>, DeviceError> {
        let limits = self.device.limits();
        let profile = &nic.config.profile;
        let capacity = Capacity {
            sends: sends.min(limits.wrs),
            recvs: MAX_RECVS.min(limits.wrs),
            sges: profile.max_sge.min(limits.sges),
            inline: profile.max_inline_data.min(limits.inline),
        };
        let shares = nic.usage.take_qp(&nic.config.quota, capacity.sends + capacity.recvs)?;
        let worker = nic.doorbells[qp.id.doorbell_queue].worker;
        let side = self.sides[worker].clone();
        let (index, cq) = side.reserve(&*self.device, capacity)?;
        let made = pd.create_qp(&QueuePairSpec { kind: qp.id.kind, cq: &cq, capacity });
        let pair = made.inspect_err(|_| side.release(index, capacity))?;
        let id = self.next_end.fetch_add(1, Ordering::Relaxed);
        let psn = rand::rng().random_range(0..1 << 24);
        let endpoint = Endpoint { qpn: pair.number(), gid: self.device.gid(), psn };
        let end = Arc::new(End::new(
            (Tag::new(id), qp.incarnation()),
            worker,
            (side.clone(), index),
            endpoint,
            capacity,
            (pd, qp.id.kind == QpType::Uc, shares),
            pair,
        ));
        side.members.write().insert(id, Member { nic: nic.clone(), qp: qp.clone(), end: end.clone() });
        Ok(end)
    }

    /// Has two ends connected soon, and their queue pair visited then.
    pub fn wish(&self, wish: Wish) {
        self.wishes.lock().push_back(wish);
        self.wake();
    }

    /// It could not be fulfilled yet.
    pub fn wish_later(&self, wish: Wish) {
        self.wishes.lock().push_back(wish);
    }

    /// The wishes so far.
    pub fn take_wishes(&self) -> VecDeque<Wish> {
        std::mem::take(&mut *self.wishes.lock())
    }

    /// A queue pair has failed, as the NIC says.
    pub fn note_failing(&self, member: Member) {
        self.failing.lock().push(Failing { member, looks: 0 });
    }

    /// Looks at those that have failed; it stays with those for which this is true.
    pub fn look_at_failing(&self, stays: impl FnMut(&mut Failing) -> bool) {
        self.failing.lock().retain_mut(stays);
    }

    /// Whether there is something to look at again.
    pub fn is_unsettled(&self) -> bool {
        !self.wishes.lock().is_empty() || !self.failing.lock().is_empty()
    }

    /// Has whoever sees to wishes look again.
    pub fn wake(&self) {
        // Fails only when the counter is full, and then that is being done.
        let _ = rustix::io::write(&self.wished, &1u64.to_ne_bytes());
    }

    /// Readable when there may be wishes.
    pub fn wished_fd(&self) -> BorrowedFd<'_> {
        self.wished.as_fd()
    }

    /// Connects two ends, if they are not yet, and lets the first one send. Only one thread does so, since it may take the NIC some time.
    ///
    /// # Errors
    /// When one of them is another's, or the NIC does not do it.
    pub fn connect(&self, from: &Member, to: &Member) -> Result<(), ConnectError> {
        let (from, to) = (&self.free(from, &to.end)?, &self.free(to, &from.end)?);
        let (own, theirs) = (&from.end, &to.end);
        if !own.is_connected_to(theirs) {
            if !own.is_free() || !theirs.is_free() {
                return Err(ConnectError::Taken);
            }
            let limits = self.device.limits();
            own.connect(theirs, &connection(from, theirs.endpoint(), limits))?;
            if !Arc::ptr_eq(own, theirs) {
                theirs.connect(own, &connection(to, own.endpoint(), limits))?;
            }
        }
        Ok(own.start_sending(sending(from, self.device.limits()))?)
    }

    /// Connects an end to one of another host, if it is not yet; with `sends` it may send. Only the thread that also [connects](Self::connect) does so.
    ///
    /// # Errors
    /// When it is another's, or the NIC does not do it.
    pub fn connect_elsewhere(&self, own: &Member, peer: NicEnd, sends: bool) -> Result<(), ConnectError> {
        let limits = self.device.limits();
        if own.end.elsewhere() != Some(&peer) {
            if !own.end.is_free() {
                return Err(ConnectError::Taken);
            }
            let theirs = Endpoint { qpn: peer.qpn, gid: Gid(peer.gid), psn: peer.psn };
            own.end.connect_elsewhere(
                peer,
                &connection(own, theirs, Limits { mtu: limits.mtu.min(peer.mtu), ..limits }),
            )?;
        }
        if sends {
            own.end.start_sending(sending(own, limits))?;
        }
        Ok(())
    }

    /// An end as other hosts are told of it.
    pub fn told(&self, end: &End) -> NicEnd {
        let Endpoint { qpn, gid, psn } = end.endpoint();
        NicEnd { qpn, psn, mtu: self.device.limits().mtu, gid: gid.0 }
    }

    /// Whether queue pairs can be connected to those of other hosts.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// The port has come up, or is gone.
    pub fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::Release);
    }

    /// Which fabric the NIC is on, as hosts tell each other.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// An unreliable queue pair outlives its peers: with another end, if this one is connected to another than it is to be.
    fn free(&self, member: &Member, peer: &End) -> Result<Member, ConnectError> {
        let end = &member.end;
        if member.qp.id.kind != QpType::Uc || end.is_free() || end.is_connected_to(peer) {
            return Ok(member.clone());
        }
        if !end.is_quiet() {
            return Err(ConnectError::Busy);
        }
        let new = self.add(&member.nic, &member.qp, end.pd(), end.capacity().sends)?;
        if !member.qp.replace_end(end, &new) {
            return Err(ConnectError::Gone);
        }
        let lost = end.retire();
        let mut queue = member.qp.recv.lock();
        // In a new life the guest has forgotten them.
        if member.qp.incarnation() == end.incarnation {
            for recv in lost {
                queue.put_back(Box::new(recv));
            }
        }
        drop(queue);
        Ok(Member { end: new, ..member.clone() })
    }

    /// Returns when nothing is under way from or to a virtual NIC. What has not ended by then is given up: its queue pairs fail.
    /// Other hosts have been [asked](crate::engine::Engine::wait_nic_quiet) to send it nothing.
    pub fn wait_quiet(&self, nic: NicId, patience: Duration) {
        let deadline = Instant::now() + patience;
        let all: HashMap<u64, Member> =
            self.sides().flat_map(Side::members).map(|member| (member.end.id(), member)).collect();
        for member in all.values().filter(|member| member.nic.id == nic) {
            let peer = all.get(&member.end.peer_id());
            let is_quiet =
                || member.end.is_quiet() && member.end.is_held() && peer.is_none_or(|peer| peer.end.is_quiet());
            while !is_quiet() {
                if Instant::now() >= deadline {
                    member.end.destroy();
                    member.qp.fail();
                    break;
                }
                std::thread::sleep(Duration::from_micros(20));
            }
        }
    }
}

/// A number for the name of a network, the same on every host (FNV-1a).
fn number_of(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// How one end is connected to the other. What the guests' queue pairs allow is checked before work requests get here, and receives are
/// there before messages are: so this is the same for all.
fn connection(own: &Member, peer: Endpoint, limits: Limits) -> Connection {
    let answers = if own.qp.id.kind == QpType::Rc { limits.reads } else { 0 };
    let access = Access::REMOTE_WRITE | Access::REMOTE_READ | remote_atomic(limits.atomics);
    Connection { peer, access, mtu: limits.mtu, answers }
}

/// The access flag of atomics, if the NIC is given any.
pub fn remote_atomic(atomics: AtomicCap) -> Access {
    if atomics == AtomicCap::Glob { Access::REMOTE_ATOMIC } else { Access::empty() }
}

/// How an end sends: as its guest's queue pair does.
fn sending(own: &Member, limits: Limits) -> Sending {
    let attr = own.qp.attrs.lock().attr;
    let reads = if own.qp.id.kind == QpType::Rc { attr.max_rd_atomic.min(limits.reads) } else { 0 };
    Sending { psn: own.end.endpoint().psn, timeout: attr.timeout, retry_cnt: attr.retry_cnt, reads }
}

impl Queue {
    fn arm(&self) -> bool {
        match self.cq.arm() {
            Ok(()) => self.armed.store(true, Ordering::Relaxed),
            Err(error) => log::error!("the host's NIC tells nothing of its completions: {error}"),
        }
        self.armed.load(Ordering::Relaxed)
    }
}

impl Side {
    pub(super) fn new() -> io::Result<Self> {
        let (queues, members, expected) = (RwLock::default(), RwLock::default(), AtomicUsize::new(0));
        Ok(Self { queues, members, expected, events: Epoll::new()? })
    }

    /// Readable when one of the queues has an event.
    pub fn events_fd(&self) -> RawFd {
        self.events.as_raw_fd()
    }

    /// Asks all queues for an event; false if that is not to be had. Completions that came before make none: look for them after this.
    pub fn arm(&self) -> bool {
        let queues = self.queues.read();
        self.take_events(&queues);
        queues.iter().all(|queue| queue.armed.load(Ordering::Relaxed) || queue.arm())
    }

    /// Those that have come.
    fn take_events(&self, queues: &[Queue]) {
        let mut events = [EpollEvent::default(); 64];
        let count = self.events.wait(0, &mut events).unwrap_or(0);
        let fired = events[..count].iter().filter_map(|event| queues.get(event.data() as usize));
        fired.for_each(|queue| {
            queue.cq.take_events();
            queue.armed.store(false, Ordering::Relaxed);
        });
    }

    /// A completion queue with room for all work requests of a queue pair.
    pub(super) fn reserve(
        &self,
        device: &dyn Device,
        capacity: Capacity,
    ) -> Result<(usize, Arc<dyn CompletionQueue>), DeviceError> {
        let need = capacity.sends + capacity.recvs;
        let mut queues = self.queues.write();
        if let Some(index) = queues.iter().position(|queue| queue.free >= need) {
            queues[index].free -= need;
            return Ok((index, queues[index].cq.clone()));
        }
        let entries = CQES.min(device.limits().cqes);
        let free = entries.checked_sub(need).ok_or(DeviceError::Limit("completions"))?;
        let cq = device.create_cq(entries)?;
        let index = queues.len();
        let event = EpollEvent::new(EventSet::IN, index as u64);
        let watched = self.events.ctl(ControlOperation::Add, cq.events_fd().as_raw_fd(), event);
        watched.map_err(|source| DeviceError::System { what: "cannot wait for completions", source })?;
        queues.push(Queue { cq: cq.clone(), free, armed: AtomicBool::new(false) });
        Ok((index, cq))
    }

    /// A queue pair is gone.
    fn release(&self, index: usize, capacity: Capacity) {
        self.queues.write()[index].free += capacity.sends + capacity.recvs;
    }

    /// An end is gone; so many of its work requests will not complete.
    pub(super) fn remove(&self, id: u64, index: usize, capacity: Capacity, unfinished: usize) {
        self.members.write().remove(&id);
        self.release(index, capacity);
        self.finished(unfinished);
    }

    /// More work requests will complete here.
    pub fn expect(&self, count: usize) {
        self.expected.fetch_add(count, Ordering::SeqCst);
    }

    /// So many have.
    pub fn finished(&self, count: usize) {
        self.expected.fetch_sub(count, Ordering::SeqCst);
    }

    /// Whether some will complete.
    pub fn is_busy(&self) -> bool {
        self.expected.load(Ordering::SeqCst) > 0
    }

    /// Appends completions that there are, at most so many for each queue.
    pub fn poll(&self, most: usize, out: &mut Vec<Wc>) {
        for queue in self.queues.read().iter() {
            queue.cq.poll(most, out);
        }
    }

    /// Whose completion this is; `None` if that is no more.
    pub fn member(&self, id: u64) -> Option<Member> {
        self.members.read().get(&id).cloned()
    }

    /// The member with the queue pair of this number on the NIC.
    pub fn member_of_qp(&self, number: u32) -> Option<Member> {
        self.members.read().values().find(|member| member.end.endpoint().qpn == number).cloned()
    }

    /// All there are.
    pub fn members(&self) -> Vec<Member> {
        self.members.read().values().cloned().collect()
    }
}
