//! Rings in guest memory (`docs/device.md`, 6): geometry, indices and elements. What elements mean is in one module for each format.

pub mod rxe;

use std::sync::atomic::{AtomicU32, Ordering};

use virtio_rdma::ctrl::RingDesc;
use virtio_rdma::ring::{Format, RingHeader, ring_size};

use crate::handshake::Word;
use crate::mem::{Map, Pages};

/// Sizes of a ring, checked.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Layout of its elements.
    pub format: Format,
    /// Number of elements, a power of two from 2 on.
    pub entries: u32,
    /// Bytes from one element to the next, a power of two.
    pub stride: u32,
}

impl Geometry {
    /// Checks what a driver said: formats and sizes that exist, an element no smaller than `min_element` bytes.
    pub fn parse(desc: &RingDesc, max_entries: u32, min_element: usize) -> Option<Self> {
        let (entries, stride) = (desc.entries.get(), desc.stride.get());
        let fits = entries.is_power_of_two() && (2..=max_entries).contains(&entries);
        let holds = stride.is_power_of_two() && stride as usize >= min_element && stride <= 1 << 14;
        let format = Format::from_wire(desc.format)?;
        (fits && holds && desc.reserved == [0; 3]).then_some(Self { format, entries, stride })
    }

    /// Bytes of the ring.
    pub fn size(self) -> usize {
        ring_size(self.entries, self.stride)
    }

    /// The index after this one.
    #[inline]
    pub fn next(self, index: u32) -> u32 {
        (index + 1) & (self.entries - 1)
    }
}

/// The other side wrote an index outside the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("ring index {0} is outside the ring")]
pub struct BadIndex(pub u32);

/// Why a ring was not exchanged for another. Nothing has changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResizeError {
    /// What is in it does not fit into the other.
    #[error("what is in the ring does not fit")]
    TooSmall,
    /// There is none any more, or its indices make no sense.
    #[error("the ring is broken")]
    Broken,
}

/// Elements that are moved to another ring at most while workers are kept out. The others are moved before, beside them: a guest that has
/// full rings exchanged without end would hold up whoever shares a worker with it.
pub const LAST_MOVED: u32 = 64;

/// Elements on their way to the beginning of another ring.
#[derive(Debug, Clone, Copy)]
pub struct Move {
    /// Index of the first.
    start: u32,
    /// How many are there.
    moved: u32,
    /// Bytes of each that count.
    len: usize,
}

impl Move {
    /// From `start` on.
    pub fn new(start: u32, len: usize) -> Self {
        Self { start, moved: 0, len }
    }

    /// Where an index is in the other ring.
    pub fn place_of<M>(&self, ring: &Ring<M>, index: u32) -> u32 {
        index.wrapping_sub(self.start) & (ring.geometry.entries - 1)
    }

    /// Copies those before `end` that are not there yet, `most` of them. How many there are then, if that is all.
    ///
    /// # Errors
    /// When they do not fit, or fewer are left than were moved: the other side of the ring goes on all the same.
    pub fn go_on<M: RingMemory>(
        &mut self,
        from: &Ring<M>,
        to: &Ring<M>,
        end: u32,
        most: u32,
    ) -> Result<Option<u32>, ResizeError> {
        let count = self.place_of(from, end);
        if count >= to.geometry.entries {
            return Err(ResizeError::TooSmall);
        }
        let left = count.checked_sub(self.moved).ok_or(ResizeError::Broken)?;
        let now = left.min(most);
        from.copy_elements(self.start.wrapping_add(self.moved), to, self.moved, now, self.len);
        self.moved += now;
        Ok((now == left).then_some(count))
    }
}

/// What a ring lies in.
pub trait RingMemory {
    /// Words of its header.
    type Word: Word<Value = u32>;

    /// The word at an offset.
    fn word(&self, offset: usize) -> &Self::Word;
    /// Copies bytes out of it.
    fn read(&self, offset: usize, buf: &mut [u8]);
    /// Copies bytes into it.
    fn write(&self, offset: usize, bytes: &[u8]);
    /// Has the cache line at an offset fetched.
    fn prefetch(&self, offset: usize);
    /// Has the cache line at an offset fetched to be written.
    fn prefetch_to_write(&self, offset: usize);
}

impl RingMemory for Pages {
    type Word = AtomicU32;

    fn word(&self, offset: usize) -> &AtomicU32 {
        self.u32(offset)
    }

    fn read(&self, offset: usize, buf: &mut [u8]) {
        self.read(offset, buf);
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        self.write(offset, bytes);
    }

    fn prefetch(&self, offset: usize) {
        self.prefetch(offset);
    }

    fn prefetch_to_write(&self, offset: usize) {
        self.prefetch_to_write(offset);
    }
}

/// A ring: the guest is on one side of it, we on the other. A copy is of the same memory.
#[derive(Debug, Clone)]
pub struct Ring<M = Pages> {
    geometry: Geometry,
    pages: M,
}

impl Ring {
    /// The ring in these extents; `None` when they are not whole guest pages or too few.
    pub fn new(map: &Map, geometry: Geometry, extents: &[(u64, u64)]) -> Option<Self> {
        Pages::new(map, extents, geometry.size()).map(|pages| Self { geometry, pages })
    }

    /// Whether its memory is still there.
    pub fn is_in(&self, map: &Map) -> bool {
        self.pages.is_in(map)
    }
}

impl<M: RingMemory> Ring<M> {
    /// The ring in this memory, which is large enough.
    #[cfg(test)]
    pub fn over(geometry: Geometry, pages: M) -> Self {
        Self { geometry, pages }
    }

    /// Its sizes.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The guest's producer index; what it published with it is visible.
    ///
    /// # Errors
    /// When it is outside the ring.
    pub fn producer(&self) -> Result<u32, BadIndex> {
        self.checked(self.word(std::mem::offset_of!(RingHeader, producer_index)))
    }

    /// The guest's consumer index.
    ///
    /// # Errors
    /// When it is outside the ring.
    pub fn consumer(&self) -> Result<u32, BadIndex> {
        self.checked(self.word(std::mem::offset_of!(RingHeader, consumer_index)))
    }

    /// Publishes our producer index, and with it all elements written so far.
    pub fn set_producer(&self, index: u32) {
        self.word(std::mem::offset_of!(RingHeader, producer_index)).store(index, Ordering::Release);
    }

    /// Publishes our consumer index.
    pub fn set_consumer(&self, index: u32) {
        self.word(std::mem::offset_of!(RingHeader, consumer_index)).store(index, Ordering::Release);
    }

    /// Copies `buf.len()` bytes of an element, from `offset` in it on.
    #[inline]
    pub fn read(&self, index: u32, offset: usize, buf: &mut [u8]) {
        self.pages.read(self.at(index, offset, buf.len()), buf);
    }

    /// Writes the start of an element.
    #[inline]
    pub fn write(&self, index: u32, bytes: &[u8]) {
        self.pages.write(self.at(index, 0, bytes.len()), bytes);
    }

    /// Copies the start of `count` elements, from `from` on, to where `to` is the first of another ring.
    pub fn copy_elements(&self, from: u32, other: &Self, to: u32, count: u32, len: usize) {
        let mut element = vec![0; len];
        for i in 0..count {
            self.read(from.wrapping_add(i) & (self.geometry.entries - 1), 0, &mut element);
            other.write(to + i, &element);
        }
    }

    /// Has the cache line at an offset of an element fetched.
    #[inline]
    pub fn prefetch(&self, index: u32, offset: usize) {
        self.pages.prefetch(self.at(index, offset, 1));
    }

    /// Has the first cache line of an element fetched to be written.
    #[inline]
    pub fn prefetch_to_write(&self, index: u32) {
        self.pages.prefetch_to_write(self.at(index, 0, 1));
    }

    /// The index `n` after this one.
    #[inline]
    pub fn after(&self, index: u32, n: u32) -> u32 {
        (index + n) & (self.geometry.entries - 1)
    }

    /// The index `n` before this one.
    pub fn before(&self, index: u32, n: u32) -> u32 {
        index.wrapping_sub(n) & (self.geometry.entries - 1)
    }

    /// Elements from `from` on before `to`.
    #[inline]
    pub fn between(&self, from: u32, to: u32) -> u32 {
        to.wrapping_sub(from) & (self.geometry.entries - 1)
    }

    fn word(&self, offset: usize) -> &M::Word {
        self.pages.word(offset)
    }

    fn checked(&self, word: &M::Word) -> Result<u32, BadIndex> {
        let index = word.load(Ordering::Acquire);
        if index < self.geometry.entries { Ok(index) } else { Err(BadIndex(index)) }
    }

    #[inline]
    fn at(&self, index: u32, offset: usize, len: usize) -> usize {
        let Geometry { entries, stride, .. } = self.geometry;
        assert!(index < entries && offset + len <= stride as usize, "access outside a ring element");
        size_of::<RingHeader>() + index as usize * stride as usize + offset
    }
}
