//! Shared receive queues.

use std::sync::Arc;

use virtio_rdma::ctrl::{CreateSrq, ModifySrq, ObjectRequest, ObjectResponse, Opcode, ResizeSrq, SrqAttr};
use virtio_rdma::ring::RecvWqe;

use super::rings::Rings;
use super::wr::{self, Sge};
use super::{Pd, Ring};
use crate::guest::{Error, Guest, Result};

/// A shared receive queue; clones are the same one. Posting is for one thread at a time.
#[derive(Debug, Clone)]
pub struct Srq(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    guest: Guest,
    generation: u64,
    number: u32,
    ring: Rings,
    max_sge: u16,
    // Dropped after the SRQ itself.
    _pd: Pd,
}

impl Pd {
    /// An SRQ for at least this many receives of so many SGEs.
    pub fn create_srq(&self, depth: u32, max_sge: u16, limit: u32) -> Result<Srq> {
        let guest = self.guest().clone();
        let ring = new_ring(&guest, depth, max_sge)?;
        let (desc, extents) = ring.desc();
        let body = CreateSrq {
            pdn: self.number().into(),
            max_sge: max_sge.into(),
            limit: limit.into(),
            ring: desc,
            ..CreateSrq::default()
        };
        let generation = guest.generation();
        let made: ObjectResponse = guest.command(Opcode::CreateSrq, &body, &extents)?;
        let (number, ring) = (made.number.get(), Rings::new(ring));
        Ok(Srq(Arc::new(Inner { guest, generation, number, ring, max_sge, _pd: self.clone() })))
    }
}

fn new_ring(guest: &Guest, depth: u32, max_sge: u16) -> Result<Ring> {
    let stride = (size_of::<RecvWqe>() as u32 + 16 * u32::from(max_sge)).next_power_of_two();
    Ring::new(guest.memory(), (depth + 1).next_power_of_two().max(2), stride, guest.placement())
}

impl Srq {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.0.number
    }

    /// Its ring, also as raw memory.
    pub fn ring(&self) -> &Ring {
        self.0.ring.current()
    }

    /// Gives it another ring; nobody posts meanwhile.
    pub fn resize(&self, depth: u32) -> Result<()> {
        let new = new_ring(&self.0.guest, depth, self.0.max_sge)?;
        let (desc, extents) = new.desc();
        let body = ResizeSrq { srqn: self.0.number.into(), reserved: 0.into(), ring: desc };
        self.0.guest.command_ok(Opcode::ResizeSrq, &body, &extents)?;
        new.take_over();
        self.0.ring.replace(new)
    }

    /// Posts one receive.
    pub fn post_recv(&self, wr_id: u64, sges: &[Sge]) -> Result<()> {
        let ring = self.ring();
        let index = ring.index();
        if !ring.has_room(index) {
            return Err(Error::Full);
        }
        ring.write_element(index, |slot| wr::write_recv(slot, wr_id, sges));
        ring.publish(ring.after(index));
        Ok(())
    }

    /// Arms the limit.
    pub fn set_limit(&self, limit: u32) -> Result<()> {
        let body = ModifySrq { srqn: self.0.number.into(), limit: limit.into() };
        self.0.guest.command_ok(Opcode::ModifySrq, &body, &[])
    }

    /// The limit; zero when it is not armed.
    pub fn limit(&self) -> Result<u32> {
        let body = ObjectRequest { number: self.0.number.into(), reserved: 0.into() };
        let attr: SrqAttr = self.0.guest.command(Opcode::QuerySrq, &body, &[])?;
        Ok(attr.limit.get())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.guest.destroy(self.generation, Opcode::DestroySrq, self.number);
    }
}
