#![expect(unsafe_code, reason = "turns checked offsets into host addresses")]
//! Pieces of guest memory as host addresses.

use std::sync::Arc;

use super::Region;

/// A piece of guest memory inside one mapped region, which it keeps alive.
#[derive(Debug, Clone)]
pub struct Extent {
    seg: Seg,
    region: Arc<Region>,
}

impl Extent {
    /// `len` bytes at `offset` of `region`; the caller has checked that they are inside.
    pub(super) fn new(region: &Arc<Region>, offset: u64, len: u64) -> Self {
        let id = region.id();
        assert!(offset < id.size && len <= id.size - offset, "extent outside its region");
        // SAFETY: `offset` is below the size of the mapping (asserted), so the result is inside the same allocation.
        let ptr = unsafe { region.host_address().add(offset as usize) };
        Self { seg: Seg { ptr, len: len as usize }, region: region.clone() }
    }

    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "an extent is never empty")]
    pub fn len(&self) -> u64 {
        self.seg.len as u64
    }

    /// The region it lies in.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Where its first byte is mapped, for the host's NIC; valid while the extent lives.
    #[cfg(feature = "rdma")]
    pub(crate) fn address(&self) -> *mut std::ffi::c_void {
        self.seg.ptr.cast()
    }

    /// The file that it is part of.
    #[cfg(feature = "rdma")]
    pub(crate) fn file(&self) -> Option<&std::fs::File> {
        self.region.file()
    }

    /// Where in its file it starts.
    #[cfg(feature = "rdma")]
    pub(crate) fn file_offset(&self) -> u64 {
        self.region.id().offset + (self.seg.ptr.addr() - self.region.host_address().addr()) as u64
    }

    /// `len` bytes from `offset` on; clipped to the extent's end.
    pub fn slice(&self, offset: u64, len: u64) -> Seg {
        self.seg.slice(offset as usize, usize::try_from(len).unwrap_or(usize::MAX))
    }

    /// Keeps the first `len` bytes, fewer than all and not none, and returns the others.
    #[must_use]
    pub(crate) fn split_off(&mut self, len: u64) -> Self {
        assert!(len > 0 && len < self.len(), "an extent is never empty");
        let rest = Self { seg: self.slice(len, u64::MAX), region: self.region.clone() };
        self.seg = self.slice(0, len);
        rest
    }

    /// Whether `next` starts where this one ends, so that the two can be one.
    pub fn touches(&self, next: &Self) -> bool {
        Arc::ptr_eq(&self.region, &next.region) && self.seg.ptr.wrapping_add(self.seg.len) == next.seg.ptr
    }

    /// Adds `next`, which [`touches`](Self::touches) this one.
    pub fn join(&mut self, next: &Self) {
        debug_assert!(self.touches(next));
        self.seg.len += next.seg.len;
    }
}

/// Host addresses of a piece of guest memory, valid while the [`Extent`] that it came from lives.
///
/// Only the engine's copy functions read or write through it; a `Seg` is not kept beyond the piece of work for which it was made.
#[derive(Debug, Clone, Copy)]
pub struct Seg {
    pub(super) ptr: *mut u8,
    pub(super) len: usize,
}

// SAFETY: a `Seg` is an address and a length in memory that other threads and the guest may access at any time
// anyway; sending it to another thread adds nothing, its validity is bound to the extent's mapping.
unsafe impl Send for Seg {}
// SAFETY: as above; all accesses go through functions that treat the memory as shared and changing.
unsafe impl Sync for Seg {}

impl Seg {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it is one aligned word of 8 bytes, which is stored as one.
    pub fn is_word(&self) -> bool {
        self.len == size_of::<u64>() && self.ptr.addr().is_multiple_of(size_of::<u64>())
    }

    /// Bytes from the start of `first` to that of this one.
    #[cfg(test)]
    pub fn distance(&self, first: &Self) -> u64 {
        (self.ptr.addr() - first.ptr.addr()) as u64
    }

    /// `len` bytes from `offset` on; both clipped.
    #[must_use]
    #[inline]
    pub fn slice(&self, offset: usize, len: usize) -> Self {
        let offset = offset.min(self.len);
        Self { ptr: self.ptr.wrapping_add(offset), len: len.min(self.len - offset) }
    }
}
