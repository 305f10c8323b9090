//! One virtqueue as the device sees it: the split ring, its eventfds, and the memory that it lives in.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use virtio_rdma::ctrl::MAX_REQUEST;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::mem::Map;

/// Most descriptors of a virtqueue (virtio 2.7).
pub const MAX_SIZE: u16 = 1024;

/// A virtqueue. It does nothing unless it [`is_active`](Self::is_active).
#[derive(Debug)]
pub struct Vring {
    /// Ring addresses and indices.
    pub queue: Queue,
    /// Guest memory.
    pub map: Arc<Map>,
    /// Signalled by us when buffers were used.
    pub call: Option<File>,
    /// Signalled by the guest when buffers are available.
    pub kick: Option<File>,
    /// `SET_VRING_ENABLE`.
    pub enabled: bool,
}

/// A request that the guest made on the control queue.
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

    /// Copies `bytes` into the guest's next buffer. False if it has none.
    pub fn give(&mut self, bytes: &[u8]) -> bool {
        loop {
            let map = self.map.clone();
            let Some(mut chain) = self.pop(&map) else {
                return false;
            };
            let head = chain.head_index();
            let target = chain.find(|d| d.is_write_only() && d.len() as usize >= bytes.len());
            let wrote = target.is_some_and(|d| map.memory().write_slice(bytes, d.addr()).is_ok());
            self.used(head, if wrote { bytes.len() } else { 0 });
            if wrote {
                return true;
            }
        }
    }

    /// The next request, copied out of the guest.
    pub fn next_request(&mut self) -> Option<Request> {
        let map = self.map.clone();
        let chain = self.pop(&map)?;
        let head = chain.head_index();
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
        Some(Request { bytes, head, room, writable })
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
            notify(call);
        }
    }

    /// Takes note of a kick.
    pub fn drain_kick(&self) {
        if let Some(mut kick) = self.kick.as_ref() {
            // The count does not matter, and a kick that somebody else took is no error.
            let _ = kick.read(&mut [0; 8]);
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

    fn pop<'m>(&mut self, map: &'m Map) -> Option<DescriptorChain<&'m GuestMemoryMmap>> {
        if !self.is_active() {
            return None;
        }
        // An available index that jumped is the guest's doing: nothing is taken from such a ring.
        self.queue.iter(map.memory()).ok()?.next()
    }

    fn used(&mut self, head: u16, len: usize) {
        // Fails when the used ring is outside guest memory; then nobody waits for it.
        let _ = self.queue.add_used(self.map.memory(), head, len as u32);
    }
}

impl Default for Vring {
    fn default() -> Self {
        Self::new()
    }
}

/// Wakes whoever waits on an eventfd.
pub fn notify(mut fd: &File) {
    // An eventfd write of 1 fails only when the counter is full, and then the reader is awake.
    let _ = fd.write(&1u64.to_ne_bytes());
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
