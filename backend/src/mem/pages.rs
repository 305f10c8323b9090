#![expect(unsafe_code, reason = "atomic accesses to rings and areas that the guest shares")]
//! Rings and areas: guest pages that the device uses as one stretch of bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use virtio_rdma::PAGE_SIZE;

use super::copy::{prefetch, prefetch_to_write};
use super::{Extent, Map, Region, Seg, read, write};

/// Guest pages laid end to end, each wherever it is. Keeps the mappings alive. A copy is of the same pages.
#[derive(Debug, Clone)]
pub struct Pages {
    /// Address of each page.
    pages: Arc<[Seg]>,
    /// The regions that they lie in, each once.
    regions: Arc<[Arc<Region>]>,
}

impl Pages {
    /// The pages that these extents name. `None` unless each extent is whole pages inside guest memory
    /// and all are at least `size` bytes.
    pub fn new(map: &Map, extents: &[(u64, u64)], size: usize) -> Option<Self> {
        let mut found: Vec<Extent> = Vec::new();
        for &(gpa, len) in extents {
            let aligned = gpa.is_multiple_of(PAGE_SIZE as u64) && len.is_multiple_of(PAGE_SIZE as u64);
            if !aligned || !map.resolve(gpa, len, &mut found) {
                return None;
            }
        }
        let mut pages = Vec::with_capacity(size.div_ceil(PAGE_SIZE));
        let mut regions: Vec<Arc<Region>> = Vec::new();
        for extent in &found {
            if !extent.len().is_multiple_of(PAGE_SIZE as u64) {
                return None;
            }
            if !regions.iter().any(|r| Arc::ptr_eq(r, extent.region())) {
                regions.push(extent.region().clone());
            }
            let wanted = size.div_ceil(PAGE_SIZE) - pages.len();
            let offsets = (0..extent.len()).step_by(PAGE_SIZE).take(wanted);
            pages.extend(offsets.map(|o| extent.slice(o, PAGE_SIZE as u64)));
        }
        (pages.len() * PAGE_SIZE >= size).then(|| Self { pages: pages.into(), regions: regions.into() })
    }

    /// Whether all of it is still guest memory.
    pub fn is_in(&self, map: &Map) -> bool {
        self.regions.iter().all(|r| map.contains(r))
    }

    /// Copies bytes at `offset` out of the guest.
    #[inline]
    pub fn read(&self, offset: usize, buf: &mut [u8]) {
        // Nearly always of a length that the compiler knows, and in one page.
        match self.within_page(offset, buf.len()) {
            Some(seg) => read(seg, buf),
            None => self.read_pieces(offset, buf),
        }
    }

    #[inline(never)]
    fn read_pieces(&self, offset: usize, mut buf: &mut [u8]) {
        let mut at = offset;
        while !buf.is_empty() {
            let seg = self.at(at, buf.len());
            let (now, later) = std::mem::take(&mut buf).split_at_mut(seg.len());
            read(seg, now);
            at += now.len();
            buf = later;
        }
    }

    /// Copies bytes into the guest at `offset`.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        match self.within_page(offset, bytes.len()) {
            Some(seg) => write(bytes, seg),
            None => self.write_pieces(offset, bytes),
        }
    }

    #[inline(never)]
    fn write_pieces(&self, offset: usize, mut bytes: &[u8]) {
        let mut at = offset;
        while !bytes.is_empty() {
            let seg = self.at(at, bytes.len());
            let (now, later) = bytes.split_at(seg.len());
            write(now, seg);
            at += now.len();
            bytes = later;
        }
    }

    /// Has the cache line at `offset` fetched.
    #[inline]
    pub fn prefetch(&self, offset: usize) {
        prefetch(self.at(offset, 1));
    }

    /// Has the cache line at `offset` fetched to be written.
    #[inline]
    pub fn prefetch_to_write(&self, offset: usize) {
        prefetch_to_write(self.at(offset, 1));
    }

    /// The 32-bit word at `offset`.
    ///
    /// # Panics
    /// When `offset` is not a multiple of 4, or outside.
    #[inline]
    pub fn u32(&self, offset: usize) -> &AtomicU32 {
        let seg = self.at(offset, 4);
        assert!(offset.is_multiple_of(4) && seg.len() == 4, "misplaced word");
        // SAFETY: 4 aligned bytes inside one page of a mapping that `self` keeps alive; atomics are the access for
        // memory that the guest changes at the same time.
        unsafe { AtomicU32::from_ptr(seg.ptr.cast()) }
    }

    /// The 64-bit word at `offset`.
    ///
    /// # Panics
    /// When `offset` is not a multiple of 8, or outside.
    #[inline]
    pub fn u64(&self, offset: usize) -> &AtomicU64 {
        let seg = self.at(offset, 8);
        assert!(offset.is_multiple_of(8) && seg.len() == 8, "misplaced word");
        // SAFETY: as in `u32`.
        unsafe { AtomicU64::from_ptr(seg.ptr.cast()) }
    }

    /// Whether any of `count` 64-bit words from `offset` on is not zero. Finds the page once, not for each word.
    ///
    /// # Panics
    /// When `offset` is not a multiple of 8, or a word is outside.
    pub fn any(&self, offset: usize, count: usize) -> bool {
        assert!(offset.is_multiple_of(8), "misplaced words");
        let (mut at, end) = (offset, offset + count * 8);
        while at < end {
            let seg = self.at(at, end - at);
            // SAFETY: `seg` is aligned words inside one page of a mapping that `self` keeps alive; atomics as in `u64`.
            let word = |n| unsafe { AtomicU64::from_ptr(seg.ptr.wrapping_add(n * 8).cast()) };
            if (0..seg.len() / 8).any(|n| word(n).load(Ordering::Relaxed) != 0) {
                return true;
            }
            at += seg.len();
        }
        false
    }

    /// The `len` bytes at `offset` if there are some and they lie in one page.
    #[inline]
    fn within_page(&self, offset: usize, len: usize) -> Option<Seg> {
        let seg = (len > 0).then(|| self.at(offset, len))?;
        (seg.len() == len).then_some(seg)
    }

    /// Up to `len` bytes at `offset` that lie in one page.
    #[inline]
    fn at(&self, offset: usize, len: usize) -> Seg {
        // Shorter than `Seg::slice`: pages are all of one size.
        let within = offset % PAGE_SIZE;
        Seg { ptr: self.pages[offset / PAGE_SIZE].ptr.wrapping_add(within), len: len.min(PAGE_SIZE - within) }
    }
}
