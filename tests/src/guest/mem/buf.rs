//! Access to guest memory in pieces that need not be adjacent.
//!
//! The device, other threads and deliberate corruption change these bytes at any time. So there are
//! only copies in and out and atomics; torn data is possible, as it is for any DMA, and undefined behaviour is kept
//! away by never forming a reference to plain bytes.
#![expect(unsafe_code, reason = "raw access to memory shared with the device")]

use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_rdma::ctrl::Extent;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::alloc::{Allocator, Range};
use super::map::Mapping;

/// Bytes that are adjacent, both for the guest and here.
#[derive(Debug)]
struct Seg {
    /// Where they begin in the buffer.
    start: usize,
    len: usize,
    gpa: u64,
    ptr: NonNull<u8>,
    /// Keeps `ptr` valid.
    map: Arc<Mapping>,
}

/// A buffer in guest memory.
#[derive(Debug)]
pub struct Buf {
    segs: Vec<Seg>,
    len: usize,
    capacity: usize,
    owner: Option<(Arc<Mutex<Allocator>>, Vec<Range>)>,
}

// SAFETY: the pointers lead into mappings that the segments keep alive, and are used for copies and atomics only.
unsafe impl Send for Buf {}
// SAFETY: as for Send; the memory is shared with the device in any case.
unsafe impl Sync for Buf {}

impl Buf {
    pub(super) fn empty(len: usize) -> Self {
        Self { segs: Vec::new(), len, capacity: 0, owner: None }
    }

    pub(super) fn push(&mut self, gpa: u64, len: usize, map: &Arc<Mapping>, offset: u64) {
        let ptr = map.at(offset, len);
        self.segs.push(Seg { start: self.capacity, len, gpa, ptr, map: Arc::clone(map) });
        self.capacity += len;
    }

    pub(super) fn owned_by(mut self, alloc: Arc<Mutex<Allocator>>, ranges: Vec<Range>) -> Self {
        self.owner = Some((alloc, ranges));
        self
    }

    /// Bytes asked for.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that there are, in whole pages for an allocation.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The guest-physical extents of a part, merged.
    pub fn extents(&self, off: usize, len: usize) -> Vec<Extent> {
        let mut out: Vec<Extent> = Vec::new();
        self.pieces(off, len, |seg, at, n| {
            let addr = seg.gpa + at as u64;
            match out.last_mut() {
                Some(last) if last.addr.get() + last.len.get() == addr => last.len += n as u64,
                _ => out.push(Extent { addr: addr.into(), len: (n as u64).into() }),
            }
        });
        out
    }

    /// Guest-physical address of a byte.
    pub fn gpa(&self, off: usize) -> u64 {
        let seg = self.seg_of(off);
        seg.gpa + (off - seg.start) as u64
    }

    /// Address of a byte in this process, which is the VMM's address of it in the vhost-user protocol.
    pub fn host_address(&self, off: usize) -> u64 {
        let seg = self.seg_of(off);
        seg.ptr.as_ptr() as u64 + (off - seg.start) as u64
    }

    /// Copies bytes in.
    pub fn write(&self, off: usize, bytes: &[u8]) {
        let mut from = bytes.as_ptr();
        self.pieces(off, bytes.len(), |seg, at, n| {
            // SAFETY: `pieces` yields parts within the segment, and their sizes add up to that of `bytes`. Guest memory
            // does not overlap `bytes`, since no reference to guest memory exists.
            unsafe {
                std::ptr::copy_nonoverlapping(from, seg.ptr.as_ptr().add(at), n);
                from = from.add(n);
            }
        });
    }

    /// Copies bytes out.
    pub fn read(&self, off: usize, bytes: &mut [u8]) {
        let mut to = bytes.as_mut_ptr();
        self.pieces(off, bytes.len(), |seg, at, n| {
            // SAFETY: as in `write`, the other way round.
            unsafe {
                std::ptr::copy_nonoverlapping(seg.ptr.as_ptr().add(at), to, n);
                to = to.add(n);
            }
        });
    }

    /// Copies bytes out into a new vector.
    pub fn read_vec(&self, off: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(off, &mut bytes);
        bytes
    }

    /// Fills a part with one value.
    pub fn fill(&self, off: usize, len: usize, value: u8) {
        self.pieces(off, len, |seg, at, n| {
            // SAFETY: `pieces` yields parts within the segment.
            unsafe { std::ptr::write_bytes(seg.ptr.as_ptr().add(at), value, n) }
        });
    }

    /// A part for repeated access, if it is adjacent in memory.
    pub fn slot(&self, off: usize, len: usize) -> Option<Slot<'_>> {
        let seg = self.seg_of(off);
        let at = off - seg.start;
        // SAFETY: `at` is below the length of the segment.
        let ptr = unsafe { seg.ptr.add(at) };
        (len <= seg.len - at).then_some(Slot { ptr, len, buf: PhantomData })
    }

    /// A 32-bit word for atomic access; panics when it is not aligned.
    pub fn word32(&self, off: usize) -> Word32 {
        let (ptr, map) = self.word(off, align_of::<AtomicU32>());
        Word32 { ptr: ptr.cast(), _map: map }
    }

    /// A 64-bit word for atomic access; panics when it is not aligned.
    pub fn word64(&self, off: usize) -> Word64 {
        let (ptr, map) = self.word(off, align_of::<AtomicU64>());
        Word64 { ptr: ptr.cast(), _map: map }
    }

    fn word(&self, off: usize, size: usize) -> (NonNull<u8>, Arc<Mapping>) {
        let seg = self.seg_of(off);
        let slot = self.slot(off, size).expect("an aligned word is within one page");
        assert!(slot.ptr.addr().get().is_multiple_of(size), "the word is aligned");
        (slot.ptr, Arc::clone(&seg.map))
    }

    fn seg_of(&self, off: usize) -> &Seg {
        assert!(off < self.capacity, "offset {off} in a buffer of {} bytes", self.capacity);
        match &self.segs[..] {
            [only] => only,
            segs => &segs[segs.partition_point(|s| s.start <= off) - 1],
        }
    }

    /// Calls `f(segment, offset in it, bytes)` for each adjacent piece of a part.
    fn pieces(&self, off: usize, len: usize, mut f: impl FnMut(&Seg, usize, usize)) {
        assert!(off.checked_add(len).is_some_and(|end| end <= self.capacity), "part of the buffer");
        let (mut off, mut left) = (off, len);
        while left > 0 {
            let seg = self.seg_of(off);
            let at = off - seg.start;
            let n = left.min(seg.len - at);
            f(seg, at, n);
            off += n;
            left -= n;
        }
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        if let Some((alloc, ranges)) = self.owner.take() {
            let mut alloc = alloc.lock().unwrap_or_else(PoisonError::into_inner);
            for range in ranges {
                alloc.give(range);
            }
        }
    }
}

/// Plain memcpy from one guest buffer to another, both adjacent: the yardstick of the benchmark.
pub fn copy_between(from: &Buf, to: &Buf, len: usize) {
    let (from, to) = (from.slot(0, len).expect("adjacent"), to.slot(0, len).expect("adjacent"));
    // SAFETY: both slots have `len` bytes. The buffers are different allocations, or the same at the same place; so copy()
    // rather than copy_nonoverlapping(), which is memmove and costs nothing for buffers apart.
    unsafe { std::ptr::copy(from.ptr.as_ptr(), to.ptr.as_ptr(), len) };
}

/// Adjacent bytes of a buffer.
#[derive(Debug, Clone, Copy)]
pub struct Slot<'a> {
    ptr: NonNull<u8>,
    len: usize,
    buf: PhantomData<&'a Buf>,
}

impl<'a> Slot<'a> {
    /// Ordinary bytes, to be copied into guest memory as a whole later.
    pub fn over(bytes: &'a mut [u8]) -> Self {
        // The pointer comes from the exclusive reference, which nobody can use while the slot lives.
        Self { len: bytes.len(), ptr: NonNull::from(bytes).cast(), buf: PhantomData }
    }

    /// Copies a value in at an offset.
    #[inline]
    pub fn put<T: IntoBytes + Immutable>(&self, off: usize, value: &T) {
        assert!(off + size_of::<T>() <= self.len, "inside of the slot");
        let bytes: *const u8 = std::ptr::from_ref(value).cast();
        // SAFETY: the bytes are within the slot, which the borrowed buffer keeps alive; IntoBytes says that all bytes of the
        // value are initialised; a local value does not overlap guest memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes, self.ptr.as_ptr().add(off), size_of::<T>()) };
    }

    /// Copies a value out at an offset.
    #[inline]
    pub fn get<T: FromBytes>(&self, off: usize) -> T {
        assert!(off + size_of::<T>() <= self.len, "inside of the slot");
        let mut value = T::new_zeroed();
        let to: *mut u8 = std::ptr::from_mut(&mut value).cast();
        // SAFETY: the bytes are within the slot; FromBytes says that any bytes make a value.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr.as_ptr().add(off), to, size_of::<T>()) };
        value
    }

    /// Copies bytes in at an offset.
    pub fn put_bytes(&self, off: usize, bytes: &[u8]) {
        assert!(off + bytes.len() <= self.len, "inside of the slot");
        // SAFETY: as in `put`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ptr.as_ptr().add(off), bytes.len()) };
    }
}

macro_rules! word {
    ($(#[$meta:meta])* $name:ident, $atomic:ty) => {
        $(#[$meta])*
        #[derive(Debug)]
        pub struct $name {
            ptr: NonNull<$atomic>,
            /// Keeps `ptr` valid.
            _map: Arc<Mapping>,
        }

        // SAFETY: the word is used atomically only, and its mapping is kept alive.
        unsafe impl Send for $name {}
        // SAFETY: as for Send.
        unsafe impl Sync for $name {}

        impl Deref for $name {
            type Target = $atomic;

            #[inline]
            fn deref(&self) -> &$atomic {
                // SAFETY: `Buf::word` checked bounds and alignment, and `_map` keeps the memory mapped. Nothing in this
                // process accesses the word except by copies into plain memory, which on shared memory the device races with as well.
                unsafe { self.ptr.as_ref() }
            }
        }
    };
}

word! {
    /// A 32-bit word in guest memory.
    Word32, AtomicU32
}
word! {
    /// A 64-bit word in guest memory.
    Word64, AtomicU64
}
