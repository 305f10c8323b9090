#![expect(unsafe_code, reason = "calls libibverbs")]
//! A completion queue.

use std::ffi::c_int;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use rdma_sys::{
    ibv_ack_cq_events, ibv_comp_channel, ibv_cq, ibv_create_comp_channel, ibv_create_cq, ibv_destroy_comp_channel,
    ibv_destroy_cq, ibv_get_cq_event, ibv_poll_cq, ibv_req_notify_cq, ibv_wc, ibv_wc_flags,
};
use virtio_rdma::ib::{WcOpcode, WcStatus};

use super::super::device::{CompletionQueue, DeviceError, Wc};
use super::Shared;
use super::ahead::{Ahead, BATCH, Source};
use super::context::{do_not_wait, errno, last_error};

/// A completion queue of the device, with a channel of its own for events.
#[derive(Debug)]
pub struct Completions {
    queue: Ahead<Queue>,
    /// After the queue.
    channel: Channel,
    _shared: Arc<Shared>,
}

impl Completions {
    /// Makes one.
    pub fn create(shared: &Arc<Shared>, entries: u32) -> io::Result<Self> {
        let channel = Channel::create(shared)?;
        let queue = Queue::create(shared, &channel, entries)?;
        Ok(Self { queue: Ahead::of(queue), channel, _shared: shared.clone() })
    }

    /// For calls of the library.
    pub fn as_ptr(&self) -> *mut ibv_cq {
        self.queue.source.0.as_ptr()
    }

    /// Makes a queue pair that completes here.
    pub fn make<T>(&self, make: impl FnOnce() -> T) -> T {
        self.queue.make(make)
    }

    /// Destroys the queue pair of this number. Nothing that it completed is seen after this.
    pub fn destroy(&self, number: u32, destroy: impl FnOnce()) {
        self.queue.destroy(number, destroy);
    }
}

/// The queue itself.
#[derive(Debug)]
struct Queue(NonNull<ibv_cq>);

// SAFETY: libibverbs may be called for one completion queue from many threads at a time.
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

impl Queue {
    fn create(shared: &Shared, channel: &Channel, entries: u32) -> io::Result<Self> {
        let entries = c_int::try_from(entries).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: the context is open, and kept as long as the queue, as is the channel.
        let cq = unsafe { ibv_create_cq(shared.context.as_ptr(), entries, null_mut(), channel.0.as_ptr(), 0) };
        NonNull::new(cq).map(Self).ok_or_else(last_error)
    }
}

impl Source for Queue {
    fn take(&self, most: usize, mut each: impl FnMut(u32, Wc)) -> usize {
        let mut batch = Batch { wcs: [const { MaybeUninit::uninit() }; BATCH], len: 0 };
        let most = most.min(BATCH) as c_int;
        // SAFETY: the queue is there, and so many completions may be written.
        let count = unsafe { ibv_poll_cq(self.0.as_ptr(), most, batch.wcs.as_mut_ptr().cast()) };
        // A negative number is an error of the device, of which we hear otherwise.
        batch.len = usize::try_from(count).unwrap_or(0).min(BATCH);
        batch.iter().for_each(|wc| each(wc.qp_num, completion(wc)));
        batch.len
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: queue pairs keep their completion queue, so it has none left, and nobody uses it after this.
        if let Err(error) = errno(unsafe { ibv_destroy_cq(self.0.as_ptr()) }) {
            log::error!("the host's NIC keeps a completion queue: {error}");
        }
    }
}

/// Where events of a queue come from.
#[derive(Debug)]
struct Channel(NonNull<ibv_comp_channel>);

// SAFETY: libibverbs may be called for one channel from many threads at a time.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    fn create(shared: &Shared) -> io::Result<Self> {
        // SAFETY: the context is open, and kept by the queue that has the channel.
        let channel =
            NonNull::new(unsafe { ibv_create_comp_channel(shared.context.as_ptr()) }).ok_or_else(last_error)?;
        let channel = Self(channel);
        do_not_wait(channel.fd())?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel has this descriptor as long as it is there, which is as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.0.as_ref().fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: its queue is gone, and nobody uses it after this.
        if let Err(error) = errno(unsafe { ibv_destroy_comp_channel(self.0.as_ptr()) }) {
            log::error!("the host's NIC keeps a completion channel: {error}");
        }
    }
}

/// Completions as the library gives them.
struct Batch {
    wcs: [MaybeUninit<ibv_wc>; BATCH],
    len: usize,
}

impl std::ops::Deref for Batch {
    type Target = [ibv_wc];

    fn deref(&self) -> &[ibv_wc] {
        // SAFETY: `len` is how many the library has written.
        unsafe { std::slice::from_raw_parts(self.wcs.as_ptr().cast(), self.len) }
    }
}

impl CompletionQueue for Completions {
    fn poll(&self, most: usize, out: &mut Vec<Wc>) {
        self.queue.poll(most, out);
    }

    fn arm(&self) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::System { what: "the completion queue cannot be armed", source };
        // SAFETY: the queue is there.
        errno(unsafe { ibv_req_notify_cq(self.as_ptr(), 0) }).map_err(failed)
    }

    fn take_events(&self) {
        let (mut cq, mut context) = (null_mut(), null_mut());
        // SAFETY: the channel is there, and both may be written to. It does not wait, and fails when there is no event.
        while unsafe { ibv_get_cq_event(self.channel.0.as_ptr(), &raw mut cq, &raw mut context) } == 0 {
            // SAFETY: the channel has one queue only, this one, whose event this is; it is acknowledged once.
            unsafe { ibv_ack_cq_events(cq, 1) };
        }
    }

    fn events_fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }
}

fn completion(wc: &ibv_wc) -> Wc {
    let status = WcStatus::from_wire(wc.status).unwrap_or(WcStatus::GeneralErr);
    let with_imm = wc.wc_flags & ibv_wc_flags::IBV_WC_WITH_IMM.0 != 0 && status == WcStatus::Success;
    // SAFETY: both parts are numbers of 32 bits.
    let imm = unsafe { wc.imm_data_invalidated_rkey_union.imm_data };
    Wc {
        id: wc.wr_id,
        status,
        // Of one that failed nothing else is said.
        opcode: WcOpcode::from_wire(wc.opcode).unwrap_or(WcOpcode::Send),
        byte_len: wc.byte_len,
        imm: with_imm.then_some(imm),
    }
}
