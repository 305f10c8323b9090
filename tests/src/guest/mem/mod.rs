//! Guest-physical memory: memfd regions as a VMM lays them out, a page allocator, and access to the bytes.
//!
//! Everything the device may change under our hands is reached through [`Buf`], whose accessors copy or are atomic;
//! no reference to such bytes ever exists.

mod alloc;
mod buf;
mod map;

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use vhost::VhostUserMemoryRegionInfo;
use virtio_rdma::PAGE_SIZE;

pub use alloc::Placement;
use alloc::{Allocator, Range};
pub use buf::{Buf, Slot, Word32, Word64, copy_between};
pub use map::Mapping;

use super::{Error, Result};

/// Bytes of a page.
pub const PAGE: u64 = PAGE_SIZE as u64;
/// Start and end of the hole that PC machines have for VGA memory.
const VGA_HOLE: std::ops::Range<u64> = 0xa_0000..0xc_0000;
/// Where the memory above the hole for PCI begins.
const HIGH: u64 = 1 << 32;

/// A region of guest-physical memory that the device is told about.
#[derive(Debug, Clone)]
pub struct Region {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Where in the memfd it begins.
    pub offset: u64,
    map: Arc<Mapping>,
}

impl Region {
    /// Its description for the vhost-user protocol. Addresses "in the VMM" are those of our mapping.
    pub fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.gpa,
            memory_size: self.len,
            userspace_addr: self.map.address() + self.offset,
            mmap_offset: self.offset,
            mmap_handle: self.map.file().as_raw_fd(),
        }
    }

    /// Takes the memory away behind the device's back. Whoever touches it from now on gets SIGBUS.
    pub fn truncate(&self) -> Result<()> {
        Ok(self.map.file().set_len(0)?)
    }

    /// The memfd.
    pub fn file(&self) -> &std::fs::File {
        self.map.file()
    }

    fn contains(&self, gpa: u64) -> bool {
        gpa >= self.gpa && gpa - self.gpa < self.len
    }
}

/// The memory of one guest. It outlives connections, so that a guest can come back with the same memory.
#[derive(Debug)]
pub struct GuestMemory {
    regions: RwLock<Vec<Region>>,
    alloc: Arc<Mutex<Allocator>>,
}

impl GuestMemory {
    /// Memory of this many bytes laid out as QEMU does: one memfd with a hole for VGA; half of it above 4 GiB.
    pub fn new(size: u64) -> Result<Arc<Self>> {
        assert!(size >= 4 << 20 && size.is_multiple_of(2 * PAGE), "at least 4 MiB, in pages");
        let map = Mapping::new(size)?;
        let low = (size / 2).min(3 << 30);
        let region = |gpa, offset, len| Region { gpa, len, offset, map: Arc::clone(&map) };
        let memory = Self::empty();
        memory.insert(region(0, 0, VGA_HOLE.start));
        memory.insert(region(VGA_HOLE.end, VGA_HOLE.end, low - VGA_HOLE.end));
        memory.insert(region(HIGH, low, size - low));
        Ok(Arc::new(memory))
    }

    /// Memory of one region from address 0 on, where adjacent pages matter more than realism.
    pub fn flat(size: u64) -> Result<Arc<Self>> {
        let map = Mapping::new(size)?;
        let memory = Self::empty();
        memory.insert(Region { gpa: 0, len: size, offset: 0, map });
        Ok(Arc::new(memory))
    }

    fn empty() -> Self {
        Self { regions: RwLock::default(), alloc: Arc::default() }
    }

    fn insert(&self, region: Region) {
        // Page 0 stays unused: an address of zero that works would hide mistakes.
        let first = region.gpa.max(PAGE);
        self.lock_alloc().give(Range { gpa: first, len: region.gpa + region.len - first });
        self.regions.write().unwrap_or_else(PoisonError::into_inner).push(region);
    }

    /// Plugs a new memfd of this many bytes in at an address; the caller tells the device.
    pub fn plug(&self, gpa: u64, size: u64) -> Result<Region> {
        self.plug_named(gpa, size, "guest")
    }

    /// As [`plug`](Self::plug), with a name that shows in the list of this process' mappings.
    pub fn plug_named(&self, gpa: u64, size: u64, name: &str) -> Result<Region> {
        let region = Region { gpa, len: size, offset: 0, map: Mapping::named(size, name)? };
        self.insert(region.clone());
        Ok(region)
    }

    /// Takes the region at an address out of the table; the caller tells the device.
    /// Buffers in it stay mapped here, as those of a user process would not.
    pub fn unplug(&self, gpa: u64) -> Option<Region> {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let at = regions.iter().position(|r| r.contains(gpa))?;
        let region = regions.remove(at);
        self.lock_alloc().forbid(Range { gpa: region.gpa, len: region.len });
        Some(region)
    }

    /// The regions as they are now.
    pub fn regions(&self) -> Vec<Region> {
        self.regions.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Allocates zeroed bytes in whole pages.
    pub fn alloc(&self, len: usize, placement: Placement) -> Result<Buf> {
        let ranges = self.lock_alloc().take(len as u64, placement).ok_or(Error::OutOfMemory(len))?;
        let buf = self.buf_of(&ranges, len)?.owned_by(Arc::clone(&self.alloc), ranges);
        buf.fill(0, buf.capacity(), 0);
        Ok(buf)
    }

    /// A view of bytes at a guest-physical address, which need not be allocated.
    pub fn view(&self, gpa: u64, len: u64) -> Result<Buf> {
        self.buf_of(&[Range { gpa, len }], len as usize)
    }

    fn buf_of(&self, ranges: &[Range], len: usize) -> Result<Buf> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        let mut buf = Buf::empty(len);
        for range in ranges {
            let region = regions.iter().find(|r| r.contains(range.gpa)).ok_or(Error::NoSuchMemory(range.gpa))?;
            if range.gpa + range.len > region.gpa + region.len {
                return Err(Error::NoSuchMemory(region.gpa + region.len));
            }
            buf.push(range.gpa, range.len as usize, &region.map, region.offset + range.gpa - region.gpa);
        }
        Ok(buf)
    }

    fn lock_alloc(&self) -> std::sync::MutexGuard<'_, Allocator> {
        self.alloc.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_layout_has_a_hole() {
        let memory = GuestMemory::new(8 << 20).unwrap();
        let regions = memory.regions();
        assert_eq!(regions.len(), 3);
        assert!(memory.view(VGA_HOLE.start, 1).is_err());
        assert!(memory.view(VGA_HOLE.start - 1, 2).is_err());
        assert!(memory.view(HIGH + (4 << 20) - 1, 1).is_ok());
        assert!(memory.view(HIGH + (4 << 20), 1).is_err());
        let bytes: u64 = regions.iter().map(|r| r.len).sum();
        assert_eq!(bytes, (8 << 20) - (VGA_HOLE.end - VGA_HOLE.start));
    }

    #[test]
    fn fragmented_buffers_read_back() {
        let memory = GuestMemory::new(8 << 20).unwrap();
        let buf = memory.alloc(10 * PAGE_SIZE, Placement::Fragmented).unwrap();
        assert_eq!(buf.extents(0, buf.len()).len(), 10);
        let bytes: Vec<u8> = (0..3 * PAGE_SIZE).map(|i| i as u8).collect();
        buf.write(PAGE_SIZE - 7, &bytes);
        let mut back = vec![0; bytes.len()];
        buf.read(PAGE_SIZE - 7, &mut back);
        assert_eq!(back, bytes);
    }

    #[test]
    fn plugged_memory_comes_and_goes() {
        let memory = GuestMemory::flat(4 << 20).unwrap();
        memory.plug(1 << 40, 1 << 20).unwrap();
        assert!(memory.view(1 << 40, 1 << 20).is_ok());
        assert!(memory.unplug(1 << 40).is_some());
        assert!(memory.view(1 << 40, 1).is_err());
        assert!(memory.alloc(4 << 20, Placement::Anywhere).is_err());
    }
}
