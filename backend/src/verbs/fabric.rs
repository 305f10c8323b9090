//! The NIC as the engine's workers share it: for each worker completion queues, and the queue pairs that complete there.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use rand::Rng;
use virtio_rdma::ib::{Access, QpType};

use super::device::{
    Capacity, CompletionQueue, Connection, Device, DeviceError, Endpoint, ProtectionDomain, QueuePairSpec, Wc,
};
use super::end::{End, Tag};
use crate::nic::Nic;
use crate::overlay::NicId;
use crate::qp::Qp;

/// Entries of a completion queue; a worker gets another when one is taken.
const CQES: u32 = 1 << 16;
/// Most receives of a queue pair that are on the NIC at a time. Each is there for a message that is on its way.
const MAX_RECVS: u32 = 128;

/// A NIC and what there is on it.
#[derive(Debug)]
pub struct Fabric {
    device: Arc<dyn Device>,
    sides: Vec<Arc<Side>>,
    next_end: AtomicU64,
    /// Held while two ends are connected, by whichever of their workers comes first.
    connecting: Mutex<()>,
}

/// One worker's part.
#[derive(Debug, Default)]
pub struct Side {
    queues: RwLock<Vec<Queue>>,
    members: RwLock<HashMap<u64, Member>>,
    /// Work requests that will complete here.
    expected: AtomicUsize,
}

#[derive(Debug)]
struct Queue {
    cq: Arc<dyn CompletionQueue>,
    /// Entries that no queue pair needs.
    free: u32,
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
    /// For this many workers.
    pub fn new(device: Arc<dyn Device>, workers: usize) -> Self {
        let sides = (0..workers).map(|_| Arc::default()).collect();
        Self { device, sides, next_end: AtomicU64::new(1), connecting: Mutex::new(()) }
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
        pd: &dyn ProtectionDomain,
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
            pair,
        ));
        side.members.write().insert(id, Member { nic: nic.clone(), qp: qp.clone(), end: end.clone() });
        Ok(end)
    }

    /// Connects two ends, if they are not yet. False if one of them is another's.
    pub fn connect(&self, kind: QpType, one: &Arc<End>, other: &Arc<End>) -> bool {
        if one.is_connected_to(other) {
            return true;
        }
        let _connecting = self.connecting.lock();
        if one.is_connected_to(other) {
            return true;
        }
        if !one.is_free() || !other.is_free() {
            return false;
        }
        let reads = if kind == QpType::Rc { self.device.limits().reads } else { 0 };
        let first = one.connect(other, &connection(one, other, reads));
        first && (Arc::ptr_eq(one, other) || other.connect(one, &connection(other, one, reads)))
    }

    /// Returns when nothing is under way from or to a virtual NIC. What has not ended by then is given up: its queue pairs fail.
    pub fn wait_quiet(&self, nic: NicId, patience: Duration) {
        let deadline = Instant::now() + patience;
        let all: HashMap<u64, Member> =
            self.sides().flat_map(Side::members).map(|member| (member.end.id(), member)).collect();
        for member in all.values().filter(|member| member.nic.id == nic) {
            let peer = all.get(&member.end.peer_id());
            let is_quiet = || member.end.is_quiet() && peer.is_none_or(|peer| peer.end.is_quiet());
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

/// How one end is connected to the other. What the guests' queue pairs allow is checked before work requests get here, and receives are
/// there before messages are: so this is the same for all.
fn connection(own: &End, peer: &End, reads: u8) -> Connection {
    Connection {
        peer: peer.endpoint(),
        psn: own.endpoint().psn,
        access: Access::REMOTE_WRITE | Access::REMOTE_READ,
        mtu: 5,
        timeout: 14,
        retry_cnt: 7,
        reads,
        answers: reads,
    }
}

impl Side {
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
        queues.push(Queue { cq: cq.clone(), free });
        Ok((queues.len() - 1, cq))
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
