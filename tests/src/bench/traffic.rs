//! One connection of two in-process guests, driven by one thread that plays both: how long an operation takes, and how many a second.

use std::hint::spin_loop;
use std::time::Instant;

use anyhow::{Result, ensure};
use virtio_rdma::ib::{Access, SendFlags, WcStatus};

use super::median;
use crate::guest::verbs::{Cq, MrSpec, Op, Qp, QpSpec, Rc, RcOptions, SendWr, connect};
use crate::guest::{Guest, Result as GuestResult};

/// Work requests of a list.
pub const LIST: usize = 32;
/// Lists of one connection that are under way at once.
pub const WINDOW: usize = 3;

/// Messages of a stream that are under way at once.
pub const STREAM: usize = 8;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// RDMA WRITE.
    Write,
    /// RDMA READ.
    Read,
    /// SEND into a receive that was posted before; the receiver's completion is taken too.
    Send,
    /// Fetch-and-add.
    FetchAdd,
}

/// A connected pair.
#[derive(Debug)]
pub struct Traffic {
    /// Who posts.
    pub a: Rc,
    /// The responder.
    pub b: Rc,
}

impl Traffic {
    /// Between two guests, with regions of `len` bytes that allow everything.
    ///
    /// # Errors
    /// When something cannot be made.
    pub fn between(a: &Guest, b: &Guest, len: usize) -> Result<Self> {
        let (a, b) = (end(a, len)?, end(b, len)?);
        connect(&a.qp, &b.qp, &RcOptions::default())?;
        Ok(Self { a, b })
    }

    /// Median microseconds from posting to the completion.
    ///
    /// # Errors
    /// When a work request fails.
    pub fn latency(&self, kind: Kind, size: usize, count: usize) -> Result<f64> {
        self.latencies(kind, size, count).map(median)
    }

    /// Microseconds from posting to the completion; for SEND to those of both sides.
    ///
    /// # Errors
    /// When a work request fails.
    pub fn latencies(&self, kind: Kind, size: usize, count: usize) -> Result<Vec<f64>> {
        let (from, to) = ([self.a.mr.sge(0, size)], [self.b.mr.sge(0, size)]);
        let request = [SendWr::new(1, self.op(kind), &from)];
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            if kind == Kind::Send {
                self.b.qp.post_recv(1, &to)?;
            }
            let start = Instant::now();
            self.a.qp.post_send(&request)?;
            complete(&self.a.cq)?;
            if kind == Kind::Send {
                complete(&self.b.cq)?;
            }
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        Ok(times)
    }

    /// Million operations of 8 B a second, posted in lists of [`LIST`] with one completion each, [`WINDOW`] lists under way.
    ///
    /// # Errors
    /// When a work request fails.
    pub fn rate(&self, kind: Kind, lists: usize) -> Result<f64> {
        let (from, to) = ([self.a.mr.sge(0, 8)], [self.b.mr.sge(0, 8)]);
        let list = list(SendWr::new(1, self.op(kind), &from));
        let start = Instant::now();
        for turn in 0..lists + WINDOW {
            if turn >= WINDOW {
                complete(&self.a.cq)?;
                if kind == Kind::Send {
                    (0..LIST).try_for_each(|_| complete(&self.b.cq).map(drop))?;
                }
            }
            if turn < lists {
                if kind == Kind::Send {
                    self.b.qp.post_recvs(1, &to, LIST)?;
                }
                self.a.qp.post_send(&list)?;
            }
        }
        Ok(per_microsecond(lists * LIST, start))
    }

    /// GB/s of messages of this size, [`STREAM`] under way, between the same two buffers all the time.
    ///
    /// # Errors
    /// When a work request fails.
    pub fn stream(&self, kind: Kind, size: usize, count: usize) -> Result<f64> {
        let (from, to) = ([self.a.mr.sge(0, size)], [self.b.mr.sge(0, size)]);
        let request = [SendWr::new(1, self.op(kind), &from)];
        let start = Instant::now();
        for turn in 0..count + STREAM {
            if turn >= STREAM {
                complete(&self.a.cq)?;
                if kind == Kind::Send {
                    complete(&self.b.cq)?;
                }
            }
            if turn < count {
                if kind == Kind::Send {
                    self.b.qp.post_recv(1, &to)?;
                }
                self.a.qp.post_send(&request)?;
            }
        }
        Ok(per_microsecond(count * size, start) / 1e3)
    }

    fn op(&self, kind: Kind) -> Op {
        let there = self.b.mr.remote(0);
        match kind {
            Kind::Write => Op::Write(there),
            Kind::Read => Op::Read(there),
            Kind::Send => Op::Send,
            Kind::FetchAdd => Op::FetchAdd(there, 1),
        }
    }
}

/// An end whose region allows atomics too.
fn end(guest: &Guest, len: usize) -> GuestResult<Rc> {
    let spec = QpSpec::rc();
    let pd = guest.alloc_pd()?;
    let cq = guest.create_cq(spec.send_depth + spec.recv_depth)?;
    let whole = MrSpec::whole(&guest.alloc(len)?);
    let access = whole.access | Access::REMOTE_ATOMIC;
    let mr = pd.reg_spec(whole.access(access))?;
    let qp: Qp = pd.create_qp(spec, &cq)?;
    Ok(Rc { qp, cq, mr, pd })
}

/// The same request [`LIST`] times, the last one signalled.
pub fn list(request: SendWr<'_>) -> [SendWr<'_>; LIST] {
    let mut list = [request.flags(SendFlags::empty()); LIST];
    list[LIST - 1] = request.flags(SendFlags::SIGNALED);
    list
}

/// Million a second.
#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
pub fn per_microsecond(count: usize, since: Instant) -> f64 {
    count as f64 / since.elapsed().as_secs_f64() / 1e6
}

/// Waits for one completion; its `wr_id`.
///
/// # Errors
/// When it says that the work request failed.
#[inline]
pub fn complete(cq: &Cq) -> Result<u64> {
    loop {
        if let Some(wc) = cq.poll() {
            ensure!(wc.status() == WcStatus::Success, "a work request failed: {:?}", wc.status());
            return Ok(wc.wr_id());
        }
        spin_loop();
    }
}
