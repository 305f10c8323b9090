//! The few system calls that the standard library has no safe form of. Nothing here knows about RDMA.
#![expect(unsafe_code, reason = "poll, affinity and processor time come from libc")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

/// Waits until a descriptor is readable; false when the time is over first.
pub fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let time = libc::timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: i64::from(timeout.subsec_nanos()) };
    // SAFETY: both pointers are to live locals, the count of one matches, and a null mask is allowed by ppoll(2).
    let n = unsafe { libc::ppoll(&raw mut poll, 1, &raw const time, std::ptr::null()) };
    match n {
        0 => Ok(false),
        n if n > 0 => Ok(true),
        _ => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(false),
            e => Err(e),
        },
    }
}

/// Whether the other end of a socket is closed.
pub fn is_hung_up(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: the pointer is to one live local, as the count says.
    let n = unsafe { libc::poll(&raw mut poll, 1, 0) };
    n > 0 && poll.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
}

/// Waits for an eventfd that was made non-blocking, and clears it; false when the time is over first.
pub fn wait_event(fd: &EventFd, timeout: Duration) -> io::Result<bool> {
    // SAFETY: the descriptor belongs to `fd`, which is borrowed for the whole call.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    let ready = wait_readable(borrowed, timeout)?;
    if ready {
        // Another thread may have taken the count in between; both were woken, which is what counts.
        let _ = fd.read();
    }
    Ok(ready)
}

/// The processors that this thread may run on.
pub fn allowed_cores() -> Vec<usize> {
    // SAFETY: all zero is a valid, empty cpu_set_t.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the size is that of the set that the pointer leads to; thread 0 is the caller.
    let ok = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) } == 0;
    let bits = size_of::<libc::cpu_set_t>() * 8;
    // SAFETY: the index stays below the number of bits of the set.
    (0..bits).filter(|&core| ok && unsafe { libc::CPU_ISSET(core, &set) }).collect()
}

/// Binds a thread to one processor; thread 0 is the caller.
pub fn pin_thread(tid: i32, core: usize) -> io::Result<()> {
    assert!(core < size_of::<libc::cpu_set_t>() * 8, "no such processor");
    // SAFETY: all zero is a valid, empty cpu_set_t, and the index was checked above.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        set
    };
    // SAFETY: the size is that of the set that the pointer leads to.
    if unsafe { libc::sched_setaffinity(tid, size_of::<libc::cpu_set_t>(), &raw const set) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eventfd_wakes_and_clears() {
        let fd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        assert!(!wait_event(&fd, Duration::ZERO).unwrap());
        fd.write(1).unwrap();
        assert!(wait_event(&fd, Duration::from_secs(1)).unwrap());
        assert!(!wait_event(&fd, Duration::ZERO).unwrap());
    }

    #[test]
    fn some_core_is_allowed() {
        assert!(!allowed_cores().is_empty());
    }
}
