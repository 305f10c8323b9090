//! Rings of work requests and completions in guest memory (docs/device.md, 6).

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use virtio_rdma::PAGE_SIZE;
use virtio_rdma::ctrl::{Extent, RingDesc};
use virtio_rdma::ring::{Format, RingHeader, ring_size};
use zerocopy::{FromBytes, IntoBytes};

use crate::guest::Result;
use crate::guest::mem::{Buf, GuestMemory, Placement, Slot, Word32};

/// Largest element.
pub(super) const MAX_STRIDE: usize = 4096;

/// A ring, seen from the guest's side, which is its only producer or its only consumer.
#[derive(Debug)]
pub struct Ring {
    buf: Buf,
    entries: u32,
    stride: u32,
    adjacent: bool,
    /// Our index.
    own: AtomicU32,
    /// The other side's index as last seen.
    seen: AtomicU32,
    producer: Word32,
    consumer: Word32,
}

impl Ring {
    /// An empty ring. As user space would, it leaves rubbish in the elements.
    pub fn new(memory: &GuestMemory, entries: u32, stride: u32, placement: Placement) -> Result<Self> {
        assert!(stride as usize <= MAX_STRIDE);
        let size = ring_size(entries, stride);
        let buf = memory.alloc(size, placement)?;
        buf.fill(size_of::<RingHeader>(), size - size_of::<RingHeader>(), 0x5a);
        let header = RingHeader {
            log2_elem_size: stride.trailing_zeros().into(),
            index_mask: (entries - 1).into(),
            ..RingHeader::default()
        };
        buf.slot(0, size_of::<RingHeader>()).expect("within the first page").put(0, &header);
        Ok(Self {
            entries,
            stride,
            adjacent: buf.extents(0, size).len() == 1,
            own: AtomicU32::new(0),
            seen: AtomicU32::new(0),
            producer: buf.word32(std::mem::offset_of!(RingHeader, producer_index)),
            consumer: buf.word32(std::mem::offset_of!(RingHeader, consumer_index)),
            buf,
        })
    }

    /// How the device is told about it.
    pub fn desc(&self) -> (RingDesc, Vec<Extent>) {
        let extents = self.buf.extents(0, self.buf.len().next_multiple_of(PAGE_SIZE));
        let desc = RingDesc {
            format: Format::Rxe.to_wire(),
            reserved: [0; 3],
            entries: self.entries.into(),
            stride: self.stride.into(),
            num_extents: (extents.len() as u32).into(),
        };
        (desc, extents)
    }

    /// Elements.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Bytes of an element.
    pub fn stride(&self) -> u32 {
        self.stride
    }

    /// The memory.
    pub fn buf(&self) -> &Buf {
        &self.buf
    }

    /// Where an element begins in the memory.
    pub fn offset_of(&self, index: u32) -> usize {
        size_of::<RingHeader>() + index as usize * self.stride as usize
    }

    /// The producer index as it lies in memory, to misbehave with.
    pub fn producer(&self) -> &Word32 {
        &self.producer
    }

    /// The consumer index as it lies in memory, to misbehave with.
    pub fn consumer(&self) -> &Word32 {
        &self.consumer
    }

    /// Index of the element that comes next on our side.
    #[inline]
    pub fn index(&self) -> u32 {
        self.own.load(Relaxed)
    }

    /// The index after another.
    #[inline]
    pub fn after(&self, index: u32) -> u32 {
        (index + 1) & (self.entries - 1)
    }

    /// As the producer: whether an element can be written at `index`.
    #[inline]
    pub fn has_room(&self, index: u32) -> bool {
        let next = self.after(index);
        if next != self.seen.load(Relaxed) {
            return true;
        }
        let consumer = self.consumer.load(Acquire);
        self.seen.store(consumer, Relaxed);
        next != consumer
    }

    /// As the producer: elements written and not yet consumed.
    pub fn used(&self) -> u32 {
        self.index().wrapping_sub(self.consumer.load(Acquire)) & (self.entries - 1)
    }

    /// As the producer: publishes everything before `index`.
    #[inline]
    pub fn publish(&self, index: u32) {
        self.own.store(index, Relaxed);
        self.producer.store(index, Release);
    }

    /// As the consumer: whether an element is there.
    #[inline]
    pub fn has_element(&self) -> bool {
        let index = self.own.load(Relaxed);
        if index != self.seen.load(Relaxed) {
            return true;
        }
        let producer = self.producer.load(Acquire);
        self.seen.store(producer, Relaxed);
        index != producer
    }

    /// As the consumer: gives the element back.
    #[inline]
    pub fn advance(&self) {
        let next = self.after(self.own.load(Relaxed));
        self.own.store(next, Relaxed);
        self.consumer.store(next, Release);
    }

    /// Writes an element with `f`, which is given a place of one stride.
    #[inline]
    pub fn write_element<R>(&self, index: u32, f: impl FnOnce(Slot<'_>) -> R) -> R {
        let (off, stride) = (self.offset_of(index), self.stride as usize);
        if self.adjacent {
            return f(self.buf.slot(off, stride).expect("an adjacent ring has whole elements"));
        }
        // An element may straddle pages: make it aside, over rubbish that the device must not look at.
        let mut aside = [0xa5; MAX_STRIDE];
        let result = f(Slot::over(&mut aside[..stride]));
        self.buf.write(off, &aside[..stride]);
        result
    }

    /// Reads the start of an element.
    #[inline]
    pub fn read_element<T: FromBytes + IntoBytes>(&self, index: u32) -> T {
        let off = self.offset_of(index);
        if let Some(slot) = self.buf.slot(off, size_of::<T>()) {
            return slot.get(0);
        }
        let mut value = T::new_zeroed();
        self.buf.read(off, value.as_mut_bytes());
        value
    }

    /// As the producer: goes on where the device's indices say.
    pub fn take_over(&self) {
        self.own.store(self.producer.load(Acquire), Relaxed);
        self.seen.store(self.consumer.load(Acquire), Relaxed);
    }

    /// Sets both our views to zero, after the device did with the indices in memory.
    pub fn restart(&self) {
        self.own.store(0, Relaxed);
        self.seen.store(0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(placement: Placement) -> Ring {
        Ring::new(&GuestMemory::flat(4 << 20).unwrap(), 16, 512, placement).unwrap()
    }

    #[test]
    fn producer_sees_full() {
        let ring = ring(Placement::Contiguous);
        for i in 0..15 {
            assert!(ring.has_room(i));
            ring.publish(i + 1);
        }
        assert_eq!(ring.used(), 15);
        assert!(!ring.has_room(15));
        ring.consumer.store(1, Relaxed);
        assert!(ring.has_room(15));
    }

    #[test]
    fn consumer_sees_empty() {
        let ring = ring(Placement::Contiguous);
        assert!(!ring.has_element());
        ring.producer.store(2, Relaxed);
        assert!(ring.has_element());
        ring.advance();
        assert!(ring.has_element());
        ring.advance();
        assert!(!ring.has_element());
        assert_eq!(ring.consumer.load(Relaxed), 2);
    }

    #[test]
    fn elements_straddle_pages() {
        let ring = ring(Placement::Fragmented);
        // Element 7 begins 128 bytes before the end of the first page.
        assert_eq!(ring.offset_of(7), 3968);
        ring.write_element(7, |slot| slot.put(120, &[0x1122_3344_5566_7788_u64, 9]));
        let back: [u8; 136] = ring.read_element(7);
        assert_eq!(back[120..128], 0x1122_3344_5566_7788_u64.to_le_bytes());
        assert_eq!(back[128..136], 9u64.to_le_bytes());
    }
}
