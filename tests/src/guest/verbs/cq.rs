//! Completion queues.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use virtio_rdma::area::{ARM_NEXT, ARM_NONE, ARM_SOLICITED, ARM_STRIDE};
use virtio_rdma::ctrl::{CreateCq, ObjectResponse, Opcode, ResizeCq};
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{WcFlags, WcOpcode, WcStatus};
use virtio_rdma::ring::{Cqe, RXE_CQE_STRIDE};

use super::Ring;
use super::rings::Rings;
use crate::guest::mem::{Placement, Word32};
use crate::guest::{Error, Guest, Result};

/// A completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wc(pub Cqe);

impl Wc {
    /// Of the work request.
    pub fn wr_id(&self) -> u64 {
        self.0.wr_id.get()
    }

    /// How it ended; panics on numbers that there are not.
    pub fn status(&self) -> WcStatus {
        WcStatus::from_wire(self.0.status.get()).expect("a status of the specification")
    }

    /// What ended; panics on numbers that there are not.
    pub fn opcode(&self) -> WcOpcode {
        WcOpcode::from_wire(self.0.opcode.get()).expect("an opcode of the specification")
    }

    /// Bytes received or read.
    pub fn byte_len(&self) -> usize {
        self.0.byte_len.get() as usize
    }

    /// The QP whose request it was.
    pub fn qpn(&self) -> u32 {
        self.0.qp_num.get()
    }

    /// Immediate data, if there are any.
    pub fn imm(&self) -> Option<u32> {
        self.flags().contains(WcFlags::WITH_IMM).then(|| self.0.imm_data.get())
    }

    /// Flags; unknown ones included.
    pub fn flags(&self) -> WcFlags {
        WcFlags::from_bits_retain(self.0.wc_flags.get())
    }

    /// Itself if it succeeded; panics otherwise.
    #[track_caller]
    #[allow(clippy::return_self_not_must_use, reason = "often called for the check alone")]
    pub fn ok(self) -> Self {
        assert_eq!(self.status(), WcStatus::Success, "{self:?}");
        self
    }
}

/// A completion queue; clones are the same one. One thread at a time polls.
#[derive(Debug, Clone)]
pub struct Cq(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    guest: Guest,
    generation: u64,
    number: u32,
    vector: u16,
    ring: Rings,
    arm: Word32,
}

impl Guest {
    /// A completion queue with room for at least `depth` completions.
    pub fn create_cq(&self, depth: u32) -> Result<Cq> {
        self.create_cq_on(depth, 0, self.placement())
    }

    /// As [`create_cq`](Self::create_cq), on a completion vector and with the ring placed as asked.
    pub fn create_cq_on(&self, depth: u32, vector: u16, placement: Placement) -> Result<Cq> {
        let ring = Ring::new(self.memory(), (depth + 1).next_power_of_two(), RXE_CQE_STRIDE, placement)?;
        let (desc, extents) = ring.desc();
        let generation = self.generation();
        let body = CreateCq { vector: vector.into(), reserved: [0; 6], ring: desc };
        let response: ObjectResponse = self.command(Opcode::CreateCq, &body, &extents)?;
        let number = response.number.get();
        if number >= self.attr().max_cq.get() {
            return Err(Error::BadResponse("CQ number beyond the limit"));
        }
        // The word was cleared with the area, or below when the CQ that had this number before was dropped.
        let arm = self.arm_words().word32(number as usize * ARM_STRIDE);
        Ok(Cq(Arc::new(Inner { guest: self.clone(), generation, number, vector, ring: Rings::new(ring), arm })))
    }
}

impl Cq {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.0.number
    }

    /// Its ring.
    #[inline]
    pub fn ring(&self) -> &Ring {
        self.0.ring.current()
    }

    /// Gives it another ring; nobody polls meanwhile.
    pub fn resize(&self, depth: u32) -> Result<()> {
        let guest = &self.0.guest;
        let entries = (depth + 1).next_power_of_two().max(2);
        let new = Ring::new(guest.memory(), entries, RXE_CQE_STRIDE, guest.placement())?;
        let (desc, extents) = new.desc();
        let body = ResizeCq { cqn: self.0.number.into(), reserved: 0.into(), ring: desc };
        guest.command_ok(Opcode::ResizeCq, &body, &extents)?;
        self.0.ring.replace(new)
    }

    /// Its arm word.
    pub fn arm_word(&self) -> &Word32 {
        &self.0.arm
    }

    /// Takes the next completion.
    #[inline]
    pub fn poll(&self) -> Option<Wc> {
        let ring = self.ring();
        if !ring.has_element() {
            return None;
        }
        let cqe = ring.read_element(ring.index());
        ring.advance();
        Some(Wc(cqe))
    }

    /// Takes up to `max` completions.
    pub fn poll_many(&self, max: usize) -> Vec<Wc> {
        std::iter::from_fn(|| self.poll()).take(max).collect()
    }

    /// Polls until a completion comes or the time is over, giving the processor away now and then.
    pub fn poll_for(&self, timeout: Duration) -> Option<Wc> {
        let start = Instant::now();
        for round in 0u32.. {
            if let Some(wc) = self.poll() {
                return Some(wc);
            }
            if start.elapsed() > timeout {
                break;
            }
            match round {
                0..200 => std::hint::spin_loop(),
                200..2000 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
        }
        self.poll()
    }

    /// Polls for `count` completions; panics when they do not come in a few seconds.
    #[track_caller]
    pub fn take(&self, count: usize) -> Vec<Wc> {
        (0..count).map(|_| self.next()).collect()
    }

    /// Polls for one completion; panics when it does not come in a few seconds.
    #[track_caller]
    pub fn next(&self) -> Wc {
        self.poll_for(Duration::from_secs(20)).expect("a completion in time")
    }

    /// `ibv_req_notify_cq`.
    pub fn arm(&self, solicited_only: bool) {
        if solicited_only {
            let _ = self.0.arm.compare_exchange(ARM_NONE, ARM_SOLICITED, SeqCst, SeqCst);
        } else {
            self.0.arm.swap(ARM_NEXT, SeqCst);
        }
    }

    /// Waits for the event of an armed CQ.
    pub fn wait_event(&self, timeout: Duration) -> Result<()> {
        let events = self.0.guest.events();
        let vector = usize::from(self.0.vector);
        let (queue, _) = events.wait_from(vector, EventType::Completion, self.0.number, timeout)?;
        if queue == vector { Ok(()) } else { Err(Error::BadResponse("completion event on another vector's queue")) }
    }

    /// Whether the event of an armed CQ has come.
    pub fn take_event(&self) -> Result<bool> {
        Ok(self.0.guest.events().take(EventType::Completion, self.0.number)?.is_some())
    }

    /// Sleeps until there is a completion, as an application with a completion channel does.
    pub fn next_sleeping(&self, timeout: Duration) -> Result<Wc> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(wc) = self.poll() {
                return Ok(wc);
            }
            self.arm(false);
            if let Some(wc) = self.poll() {
                return Ok(wc);
            }
            self.wait_event(deadline.saturating_duration_since(Instant::now()))?;
        }
    }

    /// The guest that it belongs to.
    pub fn guest(&self) -> &Guest {
        &self.0.guest
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.guest.destroy(self.generation, Opcode::DestroyCq, self.number);
        if self.generation == self.guest.generation() {
            self.arm.store(ARM_NONE, SeqCst);
        }
    }
}
