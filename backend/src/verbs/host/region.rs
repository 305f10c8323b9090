#![expect(unsafe_code, reason = "calls libibverbs and maps memory")]
//! Protection domains, and the memory that is registered in them.
//!
//! A region of a guest lies in pieces. Those are mapped side by side, out of the memory's own files, into one *window*, which is registered
//! with the guest's address as its first: so addresses in work requests are the guest's. Memory in one piece needs no window.

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use rdma_sys::{ibv_alloc_pd, ibv_dealloc_pd, ibv_dereg_mr, ibv_mr, ibv_pd, ibv_reg_mr_iova2};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use virtio_rdma::PAGE_SIZE;

use super::super::device::{Access, DeviceError, MemoryRegion};
use super::Shared;
use super::context::{errno, last_error};
use super::mappings::{Mappings, Taken};
use crate::mem::Extent;
use crate::mr::Layout;

const PAGE: u64 = PAGE_SIZE as u64;
/// A protection domain of the device.
#[derive(Debug)]
pub struct Domain {
    pd: NonNull<ibv_pd>,
    pub(super) shared: Arc<Shared>,
}

// SAFETY: libibverbs may be called for one protection domain from many threads at a time.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    /// Makes one.
    pub fn alloc(shared: &Arc<Shared>) -> io::Result<Arc<Self>> {
        // SAFETY: the context is open, and kept as long as the domain.
        let pd = NonNull::new(unsafe { ibv_alloc_pd(shared.context.as_ptr()) }).ok_or_else(last_error)?;
        Ok(Arc::new(Self { pd, shared: shared.clone() }))
    }

    /// For calls of the library.
    pub fn as_ptr(&self) -> *mut ibv_pd {
        self.pd.as_ptr()
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: regions and queue pairs keep their domain, so it has none left, and nobody uses it after this.
        if let Err(error) = errno(unsafe { ibv_dealloc_pd(self.as_ptr()) }) {
            log::error!("the host's NIC keeps a protection domain: {error}");
        }
    }
}

/// A region that is registered.
#[derive(Debug)]
pub struct Region {
    mr: NonNull<ibv_mr>,
    window: Option<Window>,
    /// Without a window it is this mapping that the device knows.
    _memory: Arc<Layout>,
    domain: Arc<Domain>,
}

// SAFETY: libibverbs may be called for one region from many threads at a time; its keys do not change.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Registers memory.
    pub fn register(
        domain: &Arc<Domain>,
        memory: &Arc<Layout>,
        iova: u64,
        access: Access,
    ) -> Result<Self, DeviceError> {
        let (window, addr) = match memory.extents() {
            [] => return Err(DeviceError::Invalid("a region without memory")),
            [extent] => (None, extent.address()),
            extents => {
                let window = Window::over(&domain.shared.mappings, extents)?;
                let addr = window.addr.wrapping_byte_add((extents[0].file_offset() % PAGE) as usize);
                (Some(window), addr)
            }
        };
        let length = memory.length() as usize;
        // SAFETY: the memory is mapped, and stays so as long as the region, which keeps its mapping; that the guest changes it meanwhile is
        // what it is for, and nothing of ours refers to it.
        let mr = unsafe { ibv_reg_mr_iova2(domain.as_ptr(), addr, length, iova, access.bits()) };
        let Some(mr) = NonNull::new(mr) else {
            return Err(not_registered(memory.length(), domain.shared.memlock, last_error()));
        };
        Ok(Self { mr, window, _memory: memory.clone(), domain: domain.clone() })
    }
}

/// `ENOMEM` has two reasons, one of which whoever runs this can remove. `limit` is of what may be pinned.
fn not_registered(bytes: u64, limit: Option<u64>, source: io::Error) -> DeviceError {
    match (source.raw_os_error(), limit) {
        (Some(libc::ENOMEM | libc::ENOSPC), None) => DeviceError::Limit("a memory region"),
        _ => DeviceError::pinning(bytes, limit, source),
    }
}

impl MemoryRegion for Region {
    fn lkey(&self) -> u32 {
        // SAFETY: the region is registered.
        unsafe { self.mr.as_ref() }.lkey
    }

    fn rkey(&self) -> u32 {
        // SAFETY: the region is registered.
        unsafe { self.mr.as_ref() }.rkey
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: nobody uses the region after this; its memory and its domain are there until it is gone.
        if let Err(error) = errno(unsafe { ibv_dereg_mr(self.mr.as_ptr()) }) {
            log::error!("the host's NIC {:?} keeps a memory region: {error}", self.domain.shared.port);
            // The device has pinned the pages, so that it cannot reach others; that the addresses are not used again is not needed for that.
        }
        drop(self.window.take());
    }
}

/// Pieces of guest memory, side by side.
#[derive(Debug)]
struct Window {
    addr: *mut c_void,
    len: usize,
    /// Given back after they are gone.
    _mappings: Taken,
}

impl Window {
    fn over(all: &Arc<Mappings>, extents: &[Extent]) -> Result<Self, DeviceError> {
        let pieces = pieces(extents).ok_or(DeviceError::Invalid("pages in the middle that are not whole"))?;
        let len = pieces.iter().map(|(_, len)| *len as usize).sum();
        // One more for what the reservation leaves beside them.
        let mappings = all.take(pieces.len() + 1);
        let mappings = mappings.ok_or(DeviceError::Limit("a region in so many pieces (vm.max_map_count)"))?;
        let mut window = Self { addr: null_mut(), len, _mappings: mappings };
        let failed =
            |error: rustix::io::Errno| DeviceError::System { what: "memory cannot be mapped", source: error.into() };
        // SAFETY: a mapping of nothing at an address that the kernel chooses.
        window.addr =
            unsafe { mmap_anonymous(null_mut(), len, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE) }
                .map_err(failed)?;
        let mut at = window.addr;
        for (extent, (offset, len)) in extents.iter().zip(pieces) {
            let file = extent.file().ok_or(DeviceError::Invalid("memory without a file"))?;
            let (prot, flags) =
                (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE);
            // SAFETY: it replaces a part of the mapping just made, which is nobody else's: the pieces together are as long as that.
            unsafe { mmap(at, len as usize, prot, flags, file.as_fd(), offset) }.map_err(failed)?;
            at = at.wrapping_byte_add(len as usize);
        }
        Ok(window)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if !self.addr.is_null() {
            // SAFETY: the mappings are ours, and the region that used them is gone.
            if let Err(error) = unsafe { munmap(self.addr, self.len) } {
                log::error!("a window over guest memory cannot be unmapped: {error}");
            }
        }
    }
}

/// Offset in its file and length of each piece in whole pages; `None` if they do not make one stretch of bytes then.
fn pieces(extents: &[Extent]) -> Option<Vec<(u64, u64)>> {
    let ranges: Vec<_> = extents.iter().map(|extent| (extent.file_offset(), extent.len())).collect();
    whole_pages(&ranges)
}

fn whole_pages(ranges: &[(u64, u64)]) -> Option<Vec<(u64, u64)>> {
    let last = ranges.len().checked_sub(1)?;
    let whole = ranges.iter().enumerate().map(|(index, &(offset, len))| {
        let (start, end) = (offset - offset % PAGE, (offset + len).next_multiple_of(PAGE));
        let is_cut = (index > 0 && start != offset) || (index < last && end != offset + len);
        (!is_cut).then_some((start, end - start))
    });
    whole.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_where_pinning_is_limited_that_may_be_the_reason() {
        let refused = |limit, error| not_registered(4096, limit, io::Error::from_raw_os_error(error));
        assert!(matches!(refused(None, libc::ENOMEM), DeviceError::Limit(_)));
        assert!(matches!(refused(Some(9), libc::ENOMEM), DeviceError::Memlock { bytes: 4096, limit: 9, .. }));
        assert!(matches!(refused(Some(9), libc::EFAULT), DeviceError::System { .. }));
    }

    #[test]
    fn pieces_are_whole_pages_but_at_the_ends() {
        assert_eq!(
            whole_pages(&[(0x1004, 0xffc), (0x9000, 0x2000), (0x3000, 5)]),
            Some(vec![(0x1000, 0x1000), (0x9000, 0x2000), (0x3000, 0x1000)])
        );
        assert_eq!(whole_pages(&[(0x1004, 0xffb), (0x9000, 0x1000)]), None, "a hole after the first");
        assert_eq!(whole_pages(&[(0x1000, 0x1000), (0x9001, 0xfff)]), None, "a hole before the last");
        assert_eq!(whole_pages(&[(0, 0x1000), (0x9000, 1), (0x1000, 0x1000)]), None, "a hole in the middle");
    }
}
