//! Completions on their way from a worker to their CQs: written several at a time, so that the CQ's lock, and the way of its cache
//! lines to the guest and back, are paid once for all of them.
//!
//! A completion waits here only if the CQ had room for it when it was last looked at. So the one that finds none is written, and
//! refused, at once; only where another worker has used that room up meanwhile is a completion lost later, and its QP fails then.

use std::sync::Arc;

use virtio_rdma::event::EventType;
use virtio_rdma::ring::Cqe;

use super::failure::{OVERFLOW, fatal};
use super::{Engine, cost};
use crate::cq::{Cq, CqBroken};
use crate::nic::Nic;

/// Completions that wait for others before the guest sees them.
const MOST: usize = 8;

/// What a worker has of completions in a quantum.
#[derive(Debug, Default)]
pub(super) struct Completions {
    touched: Vec<Touched>,
    /// Those not written yet, each with the place of its CQ in `touched`.
    waiting: [Waiting; MOST],
    num_waiting: usize,
    /// Those written that the guest may not have been shown.
    hidden: usize,
}

/// A completion that is not written yet. It is written and read in other pieces: within one cache line that is no matter.
#[derive(Debug, Default, Clone, Copy)]
#[repr(align(64))]
struct Waiting {
    cqe: Cqe,
    of: usize,
}

/// A CQ that got completions in this quantum.
#[derive(Debug)]
struct Touched {
    nic: Arc<Nic>,
    cq: Arc<Cq>,
    solicited: bool,
    /// Completions for which it had room when it was last looked at.
    room: u32,
}

/// How a completion is to be written.
#[derive(Debug, Clone, Copy)]
pub(super) struct How {
    /// For events that are wanted for such alone.
    pub solicited: bool,
    /// The guest may see it a little later, together with others.
    pub hold: bool,
    /// No other worker writes completions of the same queue of the same QP: it need not be there before theirs.
    pub alone: bool,
}

impl Completions {
    /// Takes a completion. Small enough to be made in its place here.
    ///
    /// # Errors
    /// When the CQ is broken; that was reported to the guest here.
    #[inline]
    pub fn push(
        &mut self,
        engine: &Engine,
        (nic, cq): (&Arc<Nic>, &Arc<Cq>),
        cqe: &Cqe,
        how: How,
    ) -> Result<(), CqBroken> {
        let index = self.touch(nic, cq, how.solicited);
        let touched = &mut self.touched[index];
        if how.alone && touched.room > 0 && self.num_waiting < MOST {
            touched.room -= 1;
            self.waiting[self.num_waiting] = Waiting { cqe: *cqe, of: index };
            self.num_waiting += 1;
        } else {
            self.push_now(engine, index, cqe, how.hold)?;
        }
        if !how.hold || self.num_waiting + self.hidden >= MOST {
            self.publish(engine);
        }
        Ok(())
    }

    #[inline(never)]
    fn push_now(&mut self, engine: &Engine, index: usize, cqe: &Cqe, hold: bool) -> Result<(), CqBroken> {
        self.write(engine);
        // One alone is written and shown under one lock.
        let show = !hold && self.hidden == 0;
        self.touched[index].push(cqe, show)?;
        self.hidden += usize::from(!show);
        Ok(())
    }

    #[inline]
    fn touch(&mut self, nic: &Arc<Nic>, cq: &Arc<Cq>, solicited: bool) -> usize {
        if let Some(index) = self.touched.iter().position(|touched| Arc::ptr_eq(&touched.cq, cq)) {
            self.touched[index].solicited |= solicited;
            return index;
        }
        self.touch_first(nic, cq, solicited)
    }

    #[inline(never)]
    fn touch_first(&mut self, nic: &Arc<Nic>, cq: &Arc<Cq>, solicited: bool) -> usize {
        self.touched.push(Touched { nic: nic.clone(), cq: cq.clone(), solicited, room: 0 });
        self.touched.len() - 1
    }

    /// Shows guests all completions.
    pub fn publish(&mut self, engine: &Engine) {
        if self.num_waiting == 0 && self.hidden == 0 {
            return;
        }
        self.write(engine);
        if self.hidden > 0 {
            self.hidden = 0;
            self.touched.iter().for_each(|touched| touched.cq.publish());
        }
    }

    /// Shows guests all completions, and raises events where they wait for them. What that cost.
    pub fn announce(&mut self, engine: &Engine) -> u64 {
        self.write(engine);
        self.hidden = 0;
        let mut spent = 0;
        for touched in self.touched.drain(..) {
            if touched.cq.take_event(touched.solicited) {
                spent += cost::EVENT;
                touched.nic.raise_on(touched.cq.vector, EventType::Completion, touched.cq.cqn);
            }
        }
        spent
    }

    /// Writes those that wait; the guest sees them.
    fn write(&mut self, engine: &Engine) {
        let waiting = &self.waiting[..std::mem::take(&mut self.num_waiting)];
        if waiting.is_empty() {
            return;
        }
        for (index, touched) in self.touched.iter_mut().enumerate() {
            let mut own = waiting.iter().filter(|w| w.of == index).map(|w| &w.cqe).peekable();
            if own.peek().is_some() {
                touched.append(engine, own);
            }
        }
    }
}

impl Touched {
    /// Writes one now.
    fn push(&mut self, cqe: &Cqe, show: bool) -> Result<(), CqBroken> {
        self.room = self.cq.push(cqe, show).inspect_err(|_| self.broke())?;
        Ok(())
    }

    /// Writes several, for which there was room.
    fn append<'a>(&mut self, engine: &Engine, cqes: impl Iterator<Item = &'a Cqe> + Clone) {
        let (written, room) = self.cq.append(cqes.clone());
        match room {
            Ok(room) => self.room = room,
            Err(CqBroken) => self.lost(engine, cqes.skip(written)),
        }
    }

    /// These could not be written: their QPs fail.
    #[cold]
    fn lost<'a>(&mut self, engine: &Engine, cqes: impl Iterator<Item = &'a Cqe>) {
        self.room = 0;
        self.broke();
        for qp in cqes.filter_map(|cqe| self.nic.qp(cqe.qp_num.get())) {
            fatal(&self.nic, &qp, OVERFLOW);
            engine.attend(&self.nic, &qp);
        }
    }

    #[cold]
    fn broke(&self) {
        if self.cq.first_break() {
            self.nic.warn(format_args!("completion queue {} overflowed", self.cq.cqn));
            self.nic.raise(EventType::CqError, self.cq.cqn);
        }
    }
}
