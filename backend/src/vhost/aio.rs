#![expect(unsafe_code, reason = "the kernel's asynchronous I/O has no safe wrapper")]
//! Signalling an eventfd that somebody else holds too, without ever blocking.
//!
//! `write` and `RWF_NOWAIT` cannot do that: whether the one blocks on a full counter is a flag of the open file, which
//! the other holder may change at any moment, and eventfds do not support the other for writing. But the kernel itself
//! signals eventfds without blocking, for one at the end of an asynchronous request that names one (`IOCB_FLAG_RESFD`,
//! `io_submit(2)`). So we submit a request that is over at once: to read nothing from `/dev/null`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

/// Requests that may be over and not collected yet.
const REQUESTS: libc::c_long = 256;
/// Results that are collected with one call.
const BATCH: u8 = 64;
/// Tries, each after results were collected: other threads may take the room that was made.
const TRIES: usize = 8;
/// `IOCB_CMD_PREAD` of `linux/aio_abi.h`.
const PREAD: u16 = 0;
/// `IOCB_FLAG_RESFD` of `linux/aio_abi.h`.
const RESFD: u32 = 1;

/// `struct iocb` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    /// Two words whose order depends on the machine's, both zero.
    key_and_flags: u64,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// `struct io_event` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct Outcome {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

/// A context of asynchronous requests; threads share it.
#[derive(Debug)]
pub struct Signaller {
    context: libc::c_ulong,
    null: File,
}

impl Signaller {
    /// The one of this process; `None` where the kernel has no asynchronous I/O for us.
    pub fn get() -> Option<&'static Self> {
        static ONLY: OnceLock<Option<Signaller>> = OnceLock::new();
        let make = || Self::new().inspect_err(|error| log::warn!("no asynchronous I/O: {error}")).ok();
        ONLY.get_or_init(make).as_ref()
    }

    fn new() -> io::Result<Self> {
        let null = File::open("/dev/null")?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup(2) writes the context to the pointer, which leads to a live local that is zero, as it asks.
        check(unsafe { libc::syscall(libc::SYS_io_setup, REQUESTS, &raw mut context) })?;
        Ok(Self { context, null })
    }

    /// Adds one to the counter of an eventfd; one that is full stays so, and its readers are woken all the same.
    ///
    /// # Errors
    /// When it is no eventfd.
    pub fn signal(&self, eventfd: &File) -> io::Result<()> {
        for _ in 0..TRIES {
            match self.submit(eventfd) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.collect()?,
                result => return result,
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn submit(&self, eventfd: &File) -> io::Result<()> {
        let mut request = Request {
            opcode: PREAD,
            fd: self.null.as_raw_fd().cast_unsigned(),
            flags: RESFD,
            eventfd: eventfd.as_raw_fd().cast_unsigned(),
            ..Request::default()
        };
        let mut list = [&raw mut request];
        // SAFETY: the list has the one request that the count says, and the kernel uses both during the call only (it
        // writes the request's key). The request reads no bytes, so its null buffer is never touched.
        check(unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1 as libc::c_long, list.as_mut_ptr()) })
    }

    /// Makes room for requests.
    fn collect(&self) -> io::Result<()> {
        let mut outcomes = [Outcome::default(); BATCH as usize];
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let (least, most): (libc::c_long, libc::c_long) = (0, BATCH.into());
        // SAFETY: there is room for as many results as the call may write; the time lives during the call.
        check(unsafe {
            libc::syscall(libc::SYS_io_getevents, self.context, least, most, outcomes.as_mut_ptr(), &raw const now)
        })
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::{FromRawFd, IntoRawFd};

    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    fn eventfd() -> File {
        let fd = EventFd::new(0).unwrap().into_raw_fd();
        // SAFETY: nobody else owns the descriptor.
        unsafe { File::from_raw_fd(fd) }
    }

    #[test]
    fn signals_are_counted() {
        let (signaller, mut fd) = (Signaller::get().unwrap(), eventfd());
        // More than fit without collecting results.
        for _ in 0..10_000 {
            signaller.signal(&fd).unwrap();
        }
        let mut count = [0; 8];
        fd.read_exact(&mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 10_000);
    }

    #[test]
    fn threads_share_it() {
        let (signaller, mut fd) = (Signaller::get().unwrap(), eventfd());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..5_000).for_each(|_| signaller.signal(&fd).unwrap()));
            }
        });
        let mut count = [0; 8];
        fd.read_exact(&mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 20_000);
    }

    #[test]
    fn a_full_counter_does_not_block() {
        let (signaller, mut fd) = (Signaller::get().unwrap(), eventfd());
        fd.write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
        for _ in 0..3 {
            signaller.signal(&fd).unwrap();
        }
    }

    #[test]
    fn nothing_but_eventfds() {
        assert!(Signaller::get().unwrap().signal(&File::open("/dev/null").unwrap()).is_err());
    }
}
