//! The driver's side of a split virtqueue (virtio 1.2, 2.7). Knows nothing about what travels in it.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;
use std::time::{Duration, Instant};

use vhost::VringConfigData;
use virtio_rdma::zerocopy::little_endian::{U16, U32, U64};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::mem::{Buf, GuestMemory, Placement, Word32};
use super::vhost::Pulse;
use super::{Error, Result};
use crate::sys;

/// Descriptor flag: another follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes it.
pub const WRITE: u16 = 2;
/// Descriptor flag: it describes a table of descriptors; not negotiated.
pub const INDIRECT: u16 = 4;
/// Flag in the used ring: the device wants no notification.
const NO_NOTIFY: u16 = 1;
/// Longest wait on the eventfd before the ring is looked at again, should a thread have taken another's wake-up.
const SLICE: Duration = Duration::from_millis(10);

/// A descriptor as it lies in memory.
#[derive(Debug, Clone, Copy, Default, IntoBytes, FromBytes, Immutable)]
#[repr(C)]
pub struct Desc {
    /// Guest-physical address.
    pub addr: U64,
    /// Bytes.
    pub len: U32,
    /// [`NEXT`] and [`WRITE`].
    pub flags: U16,
    /// The next descriptor of the chain.
    pub next: U16,
}

/// A piece of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device may write it.
    pub writable: bool,
}

/// One virtqueue.
#[derive(Debug)]
pub struct Virtq {
    ring: Buf,
    size: u16,
    free: Vec<u16>,
    /// Descriptors of the chain that begins with each descriptor.
    chains: Vec<Vec<u16>>,
    avail: u16,
    used: u16,
    /// Told when buffers were made available.
    pub kick: EventFd,
    /// Tells when buffers were used.
    pub call: EventFd,
}

impl Virtq {
    /// A virtqueue of `size` descriptors, a power of two.
    pub fn new(memory: &GuestMemory, size: u16) -> Result<Self> {
        assert!(size.is_power_of_two());
        let len = Self::used_at(size) + 6 + 8 * usize::from(size);
        Ok(Self {
            ring: memory.alloc(len, Placement::Contiguous)?,
            size,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail: 0,
            used: 0,
            kick: EventFd::new(libc::EFD_NONBLOCK)?,
            call: EventFd::new(libc::EFD_NONBLOCK)?,
        })
    }

    /// Takes other memory for it and starts over, as a driver that is loaded again does. The old memory is returned as
    /// it was.
    pub fn relocate(&mut self, memory: &GuestMemory) -> Result<Buf> {
        let new = memory.alloc(self.ring.len(), Placement::Contiguous)?;
        let old = std::mem::replace(&mut self.ring, new);
        self.clear();
        Ok(old)
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The memory of the virtqueue, to misbehave in.
    pub fn ring(&self) -> &Buf {
        &self.ring
    }

    /// Where the ring lies, for the vhost-user protocol.
    pub fn layout(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: self.ring.host_address(0),
            avail_ring_addr: self.ring.host_address(self.avail_at()),
            used_ring_addr: self.ring.host_address(Self::used_at(self.size)),
            log_addr: None,
        }
    }

    /// Makes a chain available, without notification, and returns its first descriptor.
    pub fn push(&mut self, parts: &[Part]) -> Result<u16> {
        if parts.is_empty() || self.free.len() < parts.len() {
            return Err(Error::Full);
        }
        let ids: Vec<u16> = self.free.split_off(self.free.len() - parts.len());
        for (i, part) in parts.iter().enumerate() {
            let next = ids.get(i + 1).copied();
            let flags = if part.writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            let desc = Desc {
                addr: part.addr.into(),
                len: part.len.into(),
                flags: flags.into(),
                next: next.unwrap_or(0).into(),
            };
            self.write_desc(ids[i], &desc);
        }
        let head = ids[0];
        self.chains[usize::from(head)] = ids;
        self.publish(head);
        Ok(head)
    }

    /// Makes a chain of descriptors available exactly as given; for descriptors that no driver would write.
    /// Links are taken as offsets from the first descriptor, which this takes from the free ones in order.
    pub fn push_raw(&mut self, descs: &[Desc]) -> Result<u16> {
        if descs.is_empty() || self.free.len() < descs.len() {
            return Err(Error::Full);
        }
        let ids: Vec<u16> = self.free.split_off(self.free.len() - descs.len());
        for (id, desc) in ids.iter().zip(descs) {
            let mut desc = *desc;
            if let Some(next) = ids.get(usize::from(desc.next.get())) {
                desc.next = (*next).into();
            }
            self.write_desc(*id, &desc);
        }
        let head = ids[0];
        self.chains[usize::from(head)] = ids;
        self.publish(head);
        Ok(head)
    }

    /// Overwrites a descriptor, for descriptors that no driver would write.
    pub fn write_raw(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let desc = Desc { addr: addr.into(), len: len.into(), flags: flags.into(), next: next.into() };
        self.write_desc(index, &desc);
    }

    /// Overwrites the length of a descriptor.
    pub fn write_len(&self, index: u16, len: u32) {
        self.ring.write(16 * usize::from(index) + 8, &len.to_le_bytes());
    }

    /// Overwrites an entry of the available ring.
    pub fn write_available(&self, slot: u16, head: u16) {
        self.ring.write(self.avail_at() + 4 + 2 * usize::from(slot), &head.to_le_bytes());
    }

    /// An entry of the available ring.
    pub fn available(&self, slot: u16) -> u16 {
        let bytes = self.ring.read_vec(self.avail_at() + 4 + 2 * usize::from(slot), 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Flags and, in the upper half, index of the available ring.
    pub fn avail_word(&self) -> Word32 {
        self.ring.word32(self.avail_at())
    }

    /// Flags and, in the upper half, index of the used ring.
    pub fn used_word(&self) -> Word32 {
        self.ring.word32(Self::used_at(self.size))
    }

    /// Index of the next chain that the device will return.
    pub fn used_index(&self) -> u16 {
        (self.used_word().load(Acquire) >> 16) as u16
    }

    /// Bytes written as the used ring has it.
    pub fn used_len(&self, slot: u16) -> u32 {
        self.ring.word32(Self::used_at(self.size) + 4 + 8 * usize::from(slot) + 4).load(Relaxed)
    }

    fn write_desc(&self, id: u16, desc: &Desc) {
        self.ring.write(16 * usize::from(id), desc.as_bytes());
    }

    fn publish(&mut self, head: u16) {
        let slot = 4 + 2 * usize::from(self.avail % self.size);
        self.ring.write(self.avail_at() + slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        // Flags (zero) and index share a 32-bit word.
        self.ring.word32(self.avail_at()).store(u32::from(self.avail) << 16, Release);
    }

    /// Notifies the device, unless it wants no notification.
    pub fn notify(&self) {
        fence(SeqCst);
        let word = self.ring.word32(Self::used_at(self.size)).load(Relaxed);
        if word as u16 & NO_NOTIFY == 0 {
            self.notify_always();
        }
    }

    /// Notifies the device in any case.
    pub fn notify_always(&self) {
        // Only a counter that is full makes this fail, and then the device is notified already.
        let _ = self.kick.write(1);
    }

    /// Takes a used chain: its first descriptor and the bytes written.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        let used = Self::used_at(self.size);
        let index = (self.ring.word32(used).load(Acquire) >> 16) as u16;
        if index == self.used {
            return None;
        }
        let slot = used + 4 + 8 * usize::from(self.used % self.size);
        let id = self.ring.word32(slot).load(Relaxed) as u16;
        let len = self.ring.word32(slot + 4).load(Relaxed);
        self.used = self.used.wrapping_add(1);
        assert!(id < self.size, "the device used descriptor {id} of {}", self.size);
        let chain = std::mem::take(&mut self.chains[usize::from(id)]);
        assert!(!chain.is_empty(), "the device used descriptor {id}, which was not available");
        self.free.extend(chain);
        Some((id, len))
    }

    /// As [`pop`](Self::pop), and waits for it.
    pub fn pop_wait(&mut self, deadline: Instant, pulse: &Pulse) -> Result<Option<(u16, u32)>> {
        loop {
            if let Some(used) = self.pop() {
                return Ok(Some(used));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            if !sys::wait_event(&self.call, left.min(SLICE))? && !pulse.beats() {
                return Err(Error::Disconnected);
            }
        }
    }

    /// Index of the next chain that will be made available.
    pub fn avail_index(&self) -> u16 {
        self.avail
    }

    /// Descriptors that are in no chain.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Starts over with an empty ring, after the device was stopped.
    pub fn clear(&mut self) {
        self.ring.fill(0, self.ring.capacity(), 0);
        self.free = (0..self.size).rev().collect();
        self.chains.iter_mut().for_each(Vec::clear);
        (self.avail, self.used) = (0, 0);
        let _ = (self.call.read(), self.kick.read());
    }

    fn avail_at(&self) -> usize {
        16 * usize::from(self.size)
    }

    fn used_at(size: u16) -> usize {
        (16 * usize::from(size) + 6 + 2 * usize::from(size)).next_multiple_of(64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Does what a device does with the next available chain.
    fn serve(q: &Virtq, seen: u16, written: u32) -> u16 {
        let slot = q.avail_at() + 4 + 2 * usize::from(seen % q.size);
        let head = u16::from_le_bytes(q.ring.read_vec(slot, 2).try_into().unwrap());
        let used = Virtq::used_at(q.size);
        let at = used + 4 + 8 * usize::from(seen % q.size);
        q.ring.word32(at).store(u32::from(head), Relaxed);
        q.ring.word32(at + 4).store(written, Relaxed);
        q.ring.word32(used).store(u32::from(seen.wrapping_add(1)) << 16, Release);
        head
    }

    #[test]
    fn chains_go_round() {
        let memory = GuestMemory::flat(4 << 20).unwrap();
        let mut q = Virtq::new(&memory, 4).unwrap();
        let part = |writable| Part { addr: 0x5000, len: 16, writable };
        for round in 0..10 {
            let head = q.push(&[part(false), part(true)]).unwrap();
            assert_eq!(serve(&q, round, 7), head);
            assert_eq!(q.pop(), Some((head, 7)));
            assert_eq!(q.pop(), None);
        }
        q.push(&[part(true); 4]).unwrap();
        assert!(matches!(q.push(&[part(true)]), Err(Error::Full)));
    }

    #[test]
    fn device_can_refuse_notifications() {
        let memory = GuestMemory::flat(4 << 20).unwrap();
        let q = Virtq::new(&memory, 4).unwrap();
        q.ring.word32(Virtq::used_at(4)).store(1, Relaxed);
        q.notify();
        assert!(q.kick.read().is_err());
        q.ring.word32(Virtq::used_at(4)).store(0, Relaxed);
        q.notify();
        assert_eq!(q.kick.read().unwrap(), 1);
    }
}
