//! One virtqueue as the device sees it: the split ring, its eventfds, and the memory that it lives in.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use virtio_rdma::ctrl::MAX_REQUEST;
use vm_memory::{Bytes, GuestAddress};

use super::call::Call;
use crate::mem::Map;

/// Most descriptors of a virtqueue (virtio 2.7).
pub const MAX_SIZE: u16 = 1024;
/// Most descriptors of a request. Our driver uses a handful; the limit bounds what reading a request costs.
const MAX_CHAIN: usize = 128;
/// Chains that [`Vring::give`] looks at: a driver offers good ones only, and workers have no time for others.
const CHAINS_PER_EVENT: usize = 8;

/// A virtqueue. It does nothing unless it [`is_active`](Self::is_active).
#[derive(Debug)]
pub struct Vring {
    /// Ring addresses and indices.
    pub queue: Queue,
    /// Guest memory.
    pub map: Arc<Map>,
    /// Signalled by us when buffers were used.
    pub call: Option<Call>,
    /// Signalled by the guest when buffers are available. It is only waited for (edge-triggered) and never read: the
    /// VMM could make that block.
    pub kick: Option<File>,
    /// `SET_VRING_ENABLE`.
    pub enabled: bool,
}

/// Whether the guest had a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given {
    /// The bytes are in it.
    Yes,
    /// There is none.
    No,
    /// There were only unusable ones so far; there may be more.
    NotYet,
}

/// What is next on the control queue.
#[derive(Debug)]
pub enum Next {
    /// Nothing.
    Nothing,
    /// A chain that is no request; it was given back.
    Broken,
    /// A request.
    Request(Request),
}

/// A request that the guest made on the control queue.
#[derive(Debug)]
pub struct Request {
    /// Its readable bytes.
    pub bytes: Vec<u8>,
    head: u16,
    room: usize,
    /// Address and length of each writable piece.
    writable: Vec<(GuestAddress, usize)>,
}

impl Request {
    /// Bytes that the answer may have.
    pub fn room(&self) -> usize {
        self.room
    }
}

impl Vring {
    /// A virtqueue that is not set up.
    ///
    /// # Panics
    /// Never: the size is a constant that the library takes.
    pub fn new() -> Self {
        let queue = Queue::new(MAX_SIZE).expect("MAX_SIZE is a valid size");
        Self { queue, map: Arc::default(), call: None, kick: None, enabled: false }
    }

    /// Whether the VMM has started and enabled it.
    pub fn is_active(&self) -> bool {
        self.enabled && self.queue.ready()
    }

    /// Copies `bytes` into the guest's next buffer, which is the first descriptor of a chain.
    pub fn give(&mut self, bytes: &[u8]) -> Given {
        let map = self.map.clone();
        for _ in 0..CHAINS_PER_EVENT {
            let Some(head) = self.pop(&map) else {
                return Given::No;
            };
            let target = self.descriptor(&map, head).filter(|d| d.is_write_only() && d.len() as usize >= bytes.len());
            let wrote = target.is_some_and(|d| map.memory().write_slice(bytes, d.addr()).is_ok());
            self.used(head, if wrote { bytes.len() } else { 0 });
            if wrote {
                return Given::Yes;
            }
        }
        Given::NotYet
    }

    /// The next request, copied out of the guest.
    pub fn next_request(&mut self) -> Next {
        let map = self.map.clone();
        let Some(head) = self.pop(&map) else {
            return Next::Nothing;
        };
        let Some(chain) = self.chain(&map, head) else {
            self.used(head, 0);
            return Next::Broken;
        };
        let (mut bytes, mut writable) = (Vec::new(), Vec::new());
        for descriptor in chain {
            let len = descriptor.len() as usize;
            if descriptor.is_write_only() {
                writable.push((descriptor.addr(), len));
            } else {
                append(&map, descriptor.addr(), len, &mut bytes);
            }
        }
        let room = writable.iter().map(|w| w.1).sum();
        Next::Request(Request { bytes, head, room, writable })
    }

    /// Answers a request and gives its descriptors back.
    pub fn answer(&mut self, request: &Request, mut answer: &[u8]) {
        let total = answer.len();
        for &(addr, len) in &request.writable {
            let (now, later) = answer.split_at(len.min(answer.len()));
            if self.map.memory().write_slice(now, addr).is_err() {
                break;
            }
            answer = later;
        }
        self.used(request.head, total - answer.len());
    }

    /// Interrupts the guest, if it wants that.
    pub fn signal(&mut self) {
        let wanted = self.queue.needs_notification(self.map.memory()).unwrap_or(true);
        if let (true, Some(call)) = (wanted, &self.call) {
            call.ring();
        }
    }

    /// Goes on where the used ring stands. VMMs tell base and addresses in either order, so this is done after both.
    pub fn find_used_index(&mut self) {
        let index = self.queue.used_idx(self.map.memory(), Ordering::Relaxed);
        self.queue.set_next_used(index.map_or(self.queue.next_avail(), |i| i.0));
    }

    /// Stops it and tells where it stood.
    pub fn stop(&mut self) -> u16 {
        self.queue.set_ready(false);
        self.kick = None;
        self.queue.next_avail()
    }

    /// Takes the first descriptor of the next available chain. It may be any number.
    fn pop(&mut self, map: &Map) -> Option<u16> {
        if !self.is_active() {
            return None;
        }
        let memory = map.memory();
        let next = self.queue.next_avail();
        let available = self.queue.avail_idx(memory, Ordering::Acquire).ok()?.0.wrapping_sub(next);
        // An available index that jumped is the guest's doing: nothing is taken from such a ring.
        if available == 0 || available > self.queue.size() {
            return None;
        }
        let slot = 4 + 2 * u64::from(next % self.queue.size());
        let head = memory.read_obj(GuestAddress(self.queue.avail_ring().checked_add(slot)?)).ok()?;
        self.queue.set_next_avail(next.wrapping_add(1));
        Some(u16::from_le(head))
    }

    /// A descriptor; `None` if it lies outside the table, or is a kind that was not negotiated.
    fn descriptor(&self, map: &Map, index: u16) -> Option<Descriptor> {
        if index >= self.queue.size() {
            return None;
        }
        let at = self.queue.desc_table().checked_add(16 * u64::from(index))?;
        let descriptor: Descriptor = map.memory().read_obj(GuestAddress(at)).ok()?;
        (!descriptor.refers_to_indirect_table()).then_some(descriptor)
    }

    /// All descriptors of a chain; `None` if one is wrong or there are too many.
    fn chain(&self, map: &Map, head: u16) -> Option<Vec<Descriptor>> {
        let mut chain = vec![self.descriptor(map, head)?];
        while let Some(last) = chain.last().filter(|d| d.has_next()) {
            if chain.len() == MAX_CHAIN {
                return None;
            }
            chain.push(self.descriptor(map, last.next())?);
        }
        Some(chain)
    }

    fn used(&mut self, head: u16, len: usize) {
        // The library logs an error for a descriptor that cannot be, and the guest could fill the disk with that.
        if head < self.queue.size() {
            // Fails when the used ring is outside guest memory; then nobody waits for it.
            let _ = self.queue.add_used(self.map.memory(), head, len as u32);
        }
    }
}

impl Default for Vring {
    fn default() -> Self {
        Self::new()
    }
}

/// Appends readable bytes, but no more than makes clear that the request is too long.
fn append(map: &Map, addr: GuestAddress, len: usize, bytes: &mut Vec<u8>) {
    let len = len.min((MAX_REQUEST + 1).saturating_sub(bytes.len()));
    let start = bytes.len();
    bytes.resize(start + len, 0);
    if map.memory().read_slice(&mut bytes[start..], addr).is_err() {
        bytes.truncate(start);
    }
}
