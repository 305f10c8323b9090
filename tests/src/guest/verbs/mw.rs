//! Keys whose low byte is the consumer's: memory windows and regions for fast registration; and a region of all guest memory.

use virtio_rdma::ctrl::{
    AllocMr, AllocMw, Extent, MW_TYPE_1, MW_TYPE_2, ObjectRequest, ObjectResponse, Opcode, REG_DMA, RegMr,
};
use virtio_rdma::ib::Access;
use zerocopy::IntoBytes;

use super::wr::{Op, Remote, Sge};
use super::{Mr, Pd};
use crate::guest::mem::{Buf, Placement};
use crate::guest::{Guest, Result};

/// The key with the next low byte, as `ibv_inc_rkey` makes it.
pub fn next_key(key: u32) -> u32 {
    key & !0xff | key.wrapping_add(1) & 0xff
}

/// Kinds of windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MwType {
    /// For the protection domain.
    One,
    /// For the QP that binds it.
    Two,
}

/// What a window is bound with.
#[derive(Debug, Clone, Copy)]
pub struct Bind {
    /// Key of the window.
    pub window: u32,
    /// New key.
    pub key: u32,
    /// Key of the region.
    pub region: u32,
    /// First byte.
    pub addr: u64,
    /// Bytes.
    pub length: u64,
    /// What peers may do.
    pub access: Access,
}

impl Bind {
    /// All of a region, for peers to write, with the next key.
    pub fn whole(window: &Mw, mr: &Mr) -> Self {
        let key = next_key(window.key);
        let access = Access::REMOTE_WRITE | Access::REMOTE_READ;
        Self { window: window.key, key, region: mr.key(), addr: mr.addr(0), length: mr.len() as u64, access }
    }

    /// The work request.
    pub fn op(self) -> Op {
        Op::BindMw(self)
    }

    /// Where a peer reaches the first byte with the new key.
    pub fn remote(&self) -> Remote {
        let zero_based = self.access.contains(Access::ZERO_BASED);
        Remote { addr: if zero_based { 0 } else { self.addr }, rkey: self.key }
    }
}

/// A memory window.
#[derive(Debug)]
pub struct Mw {
    guest: Guest,
    generation: u64,
    /// Its key now, as far as the application keeps it up to date.
    pub key: u32,
    alive: bool,
    _pd: Pd,
}

impl Pd {
    /// A window.
    pub fn alloc_mw(&self, kind: MwType) -> Result<Mw> {
        let guest = self.guest().clone();
        let kind = if kind == MwType::One { MW_TYPE_1 } else { MW_TYPE_2 };
        let body = AllocMw { pdn: self.number().into(), kind, reserved: [0; 3] };
        let generation = guest.generation();
        let made: ObjectResponse = guest.command(Opcode::AllocMw, &body, &[])?;
        Ok(Mw { guest, generation, key: made.number.get(), alive: true, _pd: self.clone() })
    }

    /// A region for fast registration.
    pub fn alloc_fast_mr(&self, max_extents: u32) -> Result<FastMr> {
        let guest = self.guest().clone();
        let body = AllocMr { pdn: self.number().into(), max_extents: max_extents.into() };
        let list = guest.memory().alloc(max_extents.max(1) as usize * size_of::<Extent>(), Placement::Contiguous)?;
        let generation = guest.generation();
        let made: ObjectResponse = guest.command(Opcode::AllocMr, &body, &[])?;
        Ok(FastMr { guest, generation, key: made.number.get(), list, alive: true, _pd: self.clone() })
    }

    /// A region of all guest memory.
    pub fn reg_guest(&self, access: Access) -> Result<GuestMr> {
        let guest = self.guest().clone();
        let body = RegMr {
            pdn: self.number().into(),
            access: access.bits().into(),
            flags: REG_DMA.into(),
            ..RegMr::default()
        };
        let generation = guest.generation();
        let made: ObjectResponse = guest.command(Opcode::RegMr, &body, &[])?;
        Ok(GuestMr { guest, generation, key: made.number.get(), _pd: self.clone() })
    }
}

fn free(guest: &Guest, opcode: Opcode, key: u32) -> Result<()> {
    guest.command_ok(opcode, &ObjectRequest { number: key.into(), reserved: 0.into() }, &[])
}

impl Mw {
    /// Frees it, and says how that went.
    pub fn dealloc(mut self) -> Result<()> {
        free(&self.guest, Opcode::DeallocMw, self.key)?;
        self.alive = false;
        Ok(())
    }
}

impl Drop for Mw {
    fn drop(&mut self) {
        if self.alive {
            self.guest.destroy(self.generation, Opcode::DeallocMw, self.key);
        }
    }
}

/// A region for fast registration.
#[derive(Debug)]
pub struct FastMr {
    guest: Guest,
    generation: u64,
    /// Its key now, as far as the driver keeps it up to date.
    pub key: u32,
    list: Buf,
    alive: bool,
    _pd: Pd,
}

impl FastMr {
    /// The work request that registers part of a buffer under the next key.
    pub fn register(&mut self, buf: &Buf, (off, len): (usize, usize), iova: u64, access: Access) -> Op {
        let extents = buf.extents(off, len);
        self.key = next_key(self.key);
        self.register_extents(&extents, len as u64, iova, access)
    }

    /// The work request that registers these extents under the present key.
    pub fn register_extents(&self, extents: &[Extent], length: u64, iova: u64, access: Access) -> Op {
        self.list.write(0, extents.as_bytes());
        let (list, num_extents) = (self.list.gpa(0), extents.len() as u32);
        Op::RegMr { list, num_extents, iova, length, key: self.key, access: access.bits() }
    }

    /// A local element.
    pub fn sge(&self, addr: u64, len: usize) -> Sge {
        Sge { addr, len: len as u32, lkey: self.key }
    }

    /// Frees it, and says how that went.
    pub fn dereg(mut self) -> Result<()> {
        free(&self.guest, Opcode::DeregMr, self.key)?;
        self.alive = false;
        Ok(())
    }
}

impl Drop for FastMr {
    fn drop(&mut self) {
        if self.alive {
            self.guest.destroy(self.generation, Opcode::DeregMr, self.key);
        }
    }
}

/// A region of all guest memory.
#[derive(Debug)]
pub struct GuestMr {
    guest: Guest,
    generation: u64,
    key: u32,
    _pd: Pd,
}

impl GuestMr {
    /// Bytes of a buffer by their guest-physical address.
    pub fn sge(&self, buf: &Buf, off: usize, len: usize) -> Sge {
        Sge { addr: buf.gpa(off), len: len as u32, lkey: self.key }
    }

    /// Where a peer reaches a byte.
    pub fn remote(&self, buf: &Buf, off: usize) -> Remote {
        Remote { addr: buf.gpa(off), rkey: self.key }
    }
}

impl Drop for GuestMr {
    fn drop(&mut self) {
        self.guest.destroy(self.generation, Opcode::DeregMr, self.key);
    }
}
