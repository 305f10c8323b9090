//! Shared receive queues.

use std::sync::Arc;

use virtio_rdma::ctrl::{CreateSrq, ModifySrq, ObjectRequest, ObjectResponse, Opcode, SrqAttr};
use virtio_rdma::ring::RecvWqe;

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
    ring: Ring,
    // Dropped after the SRQ itself.
    _pd: Pd,
}

impl Pd {
    /// An SRQ for at least this many receives of so many SGEs.
    pub fn create_srq(&self, depth: u32, max_sge: u16, limit: u32) -> Result<Srq> {
        let guest = self.guest().clone();
        let stride = (size_of::<RecvWqe>() as u32 + 16 * u32::from(max_sge)).next_power_of_two();
        let ring = Ring::new(guest.memory(), (depth + 1).next_power_of_two().max(2), stride, guest.placement())?;
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
        Ok(Srq(Arc::new(Inner { guest, generation, number: made.number.get(), ring, _pd: self.clone() })))
    }
}

impl Srq {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.0.number
    }

    /// Its ring, also as raw memory.
    pub fn ring(&self) -> &Ring {
        &self.0.ring
    }

    /// Posts one receive.
    pub fn post_recv(&self, wr_id: u64, sges: &[Sge]) -> Result<()> {
        let ring = &self.0.ring;
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
