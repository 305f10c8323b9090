#![expect(unsafe_code, reason = "a signal handler that repairs mappings of guest memory")]
//! Memory that goes away behind our back: a VMM that truncates its memory file, or a host without huge pages for it.
//!
//! Touching such memory raises SIGBUS, which would end the router and with it every guest. For addresses inside guest memory the handler puts
//! anonymous memory in the region's place, so that the access under way ends harmlessly, and rings the region's
//! alarm, after which the connection is closed. All other faults are left to whoever handled them before.

use std::ffi::{c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Most regions of all guests together; 64 virtual NICs with all the memory slots they may have.
const CAPACITY: usize = 64 * 512;

/// What the handler knows of a region. `start` is zero while nobody uses the slot.
struct Slot {
    start: AtomicUsize,
    len: AtomicUsize,
    alarm: AtomicI32,
}

impl Slot {
    fn contains(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        let Some(offset) = address.checked_sub(start).filter(|_| start != 0) else { return false };
        // Another thread may have given the slot to another region meanwhile: length and start must be of the same.
        offset < self.len.load(Ordering::Acquire) && self.start.load(Ordering::Acquire) == start
    }
}

/// In static memory, since a signal handler can take no lock.
static SLOTS: [Slot; CAPACITY] =
    [const { Slot { start: AtomicUsize::new(0), len: AtomicUsize::new(0), alarm: AtomicI32::new(-1) } }; CAPACITY];

/// What handled SIGBUS before us.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// An eventfd that is signalled when memory of a guest has gone.
#[derive(Debug, Clone)]
pub struct Alarm(Arc<EventFd>);

impl Alarm {
    /// A new one.
    ///
    /// # Errors
    /// When the system has no descriptors left.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(|fd| Self(Arc::new(fd)))
    }

    /// Whether it has rung since the last call.
    pub fn take(&self) -> bool {
        self.0.read().is_ok()
    }
}

impl AsRawFd for Alarm {
    fn as_raw_fd(&self) -> c_int {
        self.0.as_raw_fd()
    }
}

/// Keeps a mapping known to the handler.
#[derive(Debug)]
pub struct Guard {
    slot: usize,
    _alarm: Option<Alarm>,
}

impl Guard {
    /// Looks after `len` bytes at `start`, a shared mapping of its own, until dropped. The mapping must outlive the guard.
    ///
    /// # Errors
    /// When there are too many already.
    pub(super) fn new(start: *mut u8, len: usize, alarm: Option<Alarm>) -> io::Result<Self> {
        install()?;
        let start = start.addr();
        let slot = SLOTS
            .iter()
            .position(|slot| {
                slot.start.load(Ordering::Relaxed) == 0
                    && slot.start.compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            })
            .ok_or_else(|| io::Error::other("too many memory regions"))?;
        SLOTS[slot].alarm.store(alarm.as_ref().map_or(-1, Alarm::as_raw_fd), Ordering::Relaxed);
        // Last: a slot without length contains no address.
        SLOTS[slot].len.store(len, Ordering::Release);
        Ok(Self { slot, _alarm: alarm })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let slot = &SLOTS[self.slot];
        slot.len.store(0, Ordering::Relaxed);
        slot.start.store(0, Ordering::Release);
    }
}

/// Installs the handler, once.
fn install() -> io::Result<()> {
    static DONE: parking_lot::Mutex<bool> = parking_lot::Mutex::new(false);
    let mut done = DONE.lock();
    if *done {
        return Ok(());
    }
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: with a null new action the call only writes the old one to `before`, which has room for it.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), before.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: written by the call above (and valid as zeroes before).
    BEFORE.get_or_init(|| unsafe { before.assume_init() });
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = handle;
    // SAFETY: `sigaction` is plain data for which zeroes are valid; the handler has the signature that SA_SIGINFO
    // asks for and does only what is allowed in a signal handler.
    let result = unsafe {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut())
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    *done = true;
    Ok(())
}

extern "C" fn handle(_signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid `info` to a handler installed with SA_SIGINFO.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    if code <= 0 {
        // Sent by a process: there is no address.
        return give_back_and_repeat();
    }
    match SLOTS.iter().find(|slot| slot.contains(address)) {
        Some(slot) => replace(slot),
        None => give_back(),
    }
}

/// Puts anonymous memory in the place of a region.
fn replace(slot: &Slot) {
    let (start, len) = (slot.start.load(Ordering::Acquire), slot.len.load(Ordering::Acquire));
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let alarm = slot.alarm.load(Ordering::Relaxed);
    // SAFETY: the range is one whole mapping of guest memory. It cannot have been unmapped or reused: the guard goes before
    // the mapping does, and the thread that was interrupted is using it. Nothing in Rust refers to its
    // contents. `mmap` and `write` are plain system calls, which a handler may make; errno is put back.
    unsafe {
        let errno = *libc::__errno_location();
        let got = libc::mmap(start as *mut c_void, len, protection, flags, -1, 0);
        if got == libc::MAP_FAILED {
            give_back();
        } else if alarm >= 0 {
            libc::write(alarm, (&raw const ONE).cast(), size_of::<u64>());
        }
        *libc::__errno_location() = errno;
    }
}

/// What an alarm's eventfd takes.
static ONE: u64 = 1;

/// Somebody wants us to have SIGBUS: whoever handled it before decides.
fn give_back_and_repeat() {
    give_back();
    // SAFETY: `raise` is a plain system call; the signal is blocked until this handler returns.
    unsafe { libc::raise(libc::SIGBUS) };
}

/// Not ours: the access is repeated with the handler that was there before.
fn give_back() {
    if let Some(before) = BEFORE.get() {
        // SAFETY: an action that `sigaction` returned earlier.
        unsafe { libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::super::{Map, RegionId, read, write};
    use super::*;

    fn memory(size: u64) -> File {
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        file
    }

    fn id(gpa: u64, size: u64) -> RegionId {
        RegionId { gpa, size, vmm_addr: gpa, offset: 0 }
    }

    #[test]
    fn truncated_memory_is_zero_and_rings_the_alarm() {
        let (one, other) = (memory(1 << 16), memory(1 << 16));
        let alarm = Alarm::new().unwrap();
        let map = Map::new(alarm.clone()).with(id(0, 1 << 16), one.try_clone().unwrap()).unwrap();
        let map = map.with(id(1 << 20, 1 << 16), other).unwrap();
        let mut extents = Vec::new();
        assert!(map.resolve(0x8000, 8, &mut extents) && map.resolve(1 << 20, 8, &mut extents));
        let (gone, stays) = (extents[0].slice(0, 8), extents[1].slice(0, 8));
        let mut bytes = [7; 8];
        write(&bytes, gone);
        write(&bytes, stays);
        assert!(!alarm.take());

        one.set_len(0).unwrap();
        read(gone, &mut bytes);
        assert_eq!(bytes, [0; 8]);
        assert!(alarm.take());
        // Harmless from now on.
        write(&[9; 8], gone);
        assert!(!alarm.take());
        read(stays, &mut bytes);
        assert_eq!(bytes, [7; 8]);
    }

    #[test]
    fn slots_are_used_again() {
        let count = || SLOTS.iter().filter(|slot| slot.start.load(Ordering::Relaxed) != 0).count();
        let file = memory(1 << 16);
        for _ in 0..1000 {
            drop(Map::default().with(id(0, 1 << 16), file.try_clone().unwrap()).unwrap());
        }
        assert!(count() < 500, "guards leak: {}", count());
    }
}
