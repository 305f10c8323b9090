//! One memfd and its mapping.
#![expect(unsafe_code, reason = "memory shared with another process is mapped by hand")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Arc;

/// A memfd mapped as a whole, shared and writable, until the value is dropped.
#[derive(Debug)]
pub struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
    file: File,
}

// SAFETY: the pointer is to memory that any process may change anyway; whoever dereferences it does so by
// copying or atomically (see `buf`), from whichever thread.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; `&Mapping` allows nothing that is tied to a thread.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// A new memfd of this many bytes, all zero, not yet backed by memory.
    pub fn new(len: u64) -> io::Result<Arc<Self>> {
        Self::named(len, "freeflow-guest")
    }

    /// As [`new`](Self::new), with a name that shows in lists of mappings.
    pub fn named(len: u64, name: &str) -> io::Result<Arc<Self>> {
        let name = CString::new(name)?;
        // SAFETY: the name is a C string that outlives the call, the flags are memfd_create(2)'s own.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(len)?;
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let ptr = map_shared(&file, len)?;
        Ok(Arc::new(Self { ptr, len, file }))
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Address of the first byte in this process.
    pub fn address(&self) -> u64 {
        self.ptr.as_ptr() as u64
    }

    /// Pointer to `len` bytes at an offset; panics when they are not all within the mapping.
    pub(super) fn at(&self, offset: u64, len: usize) -> NonNull<u8> {
        let offset = usize::try_from(offset).expect("offset fits");
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "outside of the mapping");
        // SAFETY: offset + len was just checked to be within the mapping.
        unsafe { self.ptr.add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: pointer and length are those of the mmap in `new`, and every user of the memory holds an Arc of
        // this mapping, so nobody is left who could touch it.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

fn map_shared(file: &File, len: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
    let ptr = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            0,
        )
    };
    if ptr == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(ptr.cast()).ok_or_else(|| io::Error::other("mapped at null"))
}
