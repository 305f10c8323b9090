//! Memory regions.

use std::sync::Arc;

use virtio_rdma::ctrl::{
    ExtendMr, Extent, Header, MAX_REQUEST, ObjectRequest, ObjectResponse, Opcode, REREG_ACCESS, REREG_PD, REREG_TRANS,
    RegMr, ReregMr,
};
use virtio_rdma::ib::Access;

use super::Pd;
use super::wr::{Remote, Sge};
use crate::guest::ctrl::{Request, Response};
use crate::guest::mem::Buf;
use crate::guest::{Guest, Result};

/// Most extents that fit into one request of either kind.
pub const MAX_EXTENTS: usize = (MAX_REQUEST - size_of::<Header>() - size_of::<ReregMr>()) / size_of::<Extent>();
/// Where regions begin unless asked otherwise: like a process that mapped the buffer, with bits above 32.
const IOVA: u64 = 0x7f12_0000_0000;

/// What a region covers and allows.
#[derive(Debug, Clone)]
pub struct MrSpec {
    /// The memory.
    pub buf: Arc<Buf>,
    /// First byte in the buffer.
    pub offset: usize,
    /// Bytes.
    pub len: usize,
    /// Address that work requests use for the first byte.
    pub iova: u64,
    /// What is allowed.
    pub access: Access,
}

impl MrSpec {
    /// A whole buffer that may be read and written from anywhere.
    pub fn whole(buf: &Arc<Buf>) -> Self {
        let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
        Self { buf: Arc::clone(buf), offset: 0, len: buf.len(), iova: IOVA + buf.gpa(0), access }
    }

    /// A part of the buffer.
    #[must_use]
    pub fn part(self, offset: usize, len: usize) -> Self {
        Self { offset, len, iova: self.iova + offset as u64, ..self }
    }

    /// With these access flags.
    #[must_use]
    pub fn access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    /// At another address.
    #[must_use]
    pub fn iova(self, iova: u64) -> Self {
        Self { iova, ..self }
    }

    fn extents(&self) -> Vec<Extent> {
        self.buf.extents(self.offset, self.len)
    }
}

/// A memory region. It keeps its buffer.
#[derive(Debug)]
pub struct Mr {
    guest: Guest,
    generation: u64,
    pd: Pd,
    key: u32,
    spec: MrSpec,
    alive: bool,
}

impl Pd {
    /// Registers a whole buffer with all rights.
    pub fn reg(&self, buf: &Arc<Buf>) -> Result<Mr> {
        self.reg_spec(MrSpec::whole(buf))
    }

    /// Allocates and registers this many adjacent bytes with all rights.
    pub fn reg_new(&self, len: usize) -> Result<Mr> {
        self.reg(&self.guest().alloc(len)?)
    }

    /// The same region many times, each under a key of its own, with the commands in a pipeline.
    pub fn reg_many(&self, spec: &MrSpec, count: usize) -> Result<Vec<Mr>> {
        let guest = self.guest();
        let extents = spec.extents();
        assert!(extents.len() <= MAX_EXTENTS, "regions of one request");
        let request = Request::typed::<RegMr, ObjectResponse>(Opcode::RegMr, &self.reg_body(spec, &extents), &extents);
        let generation = guest.generation();
        let made = guest.pipeline(&vec![request; count])?;
        let mr = |made: &Response| {
            let key = made.body::<ObjectResponse>()?.number.get();
            Ok(Mr { guest: guest.clone(), generation, pd: self.clone(), key, spec: spec.clone(), alive: true })
        };
        made.iter().map(mr).collect()
    }

    fn reg_body(&self, spec: &MrSpec, extents: &[Extent]) -> RegMr {
        RegMr {
            pdn: self.number().into(),
            access: spec.access.bits().into(),
            iova: spec.iova.into(),
            length: (spec.len as u64).into(),
            num_extents: (extents.len() as u32).into(),
            flags: 0.into(),
        }
    }

    /// Registers memory.
    pub fn reg_spec(&self, spec: MrSpec) -> Result<Mr> {
        let guest = self.guest().clone();
        let extents = spec.extents();
        let first = &extents[..extents.len().min(MAX_EXTENTS)];
        let body = self.reg_body(&spec, first);
        let generation = guest.generation();
        let response: ObjectResponse = guest.command(Opcode::RegMr, &body, first)?;
        let mr = Mr { guest, generation, pd: self.clone(), key: response.number.get(), spec, alive: true };
        mr.extend(&extents[first.len()..])?;
        Ok(mr)
    }
}

impl Mr {
    /// Describes more of the region.
    fn extend(&self, extents: &[Extent]) -> Result<()> {
        for chunk in extents.chunks(MAX_EXTENTS) {
            let body = ExtendMr { key: self.key.into(), num_extents: (chunk.len() as u32).into() };
            self.guest.command_ok(Opcode::ExtendMr, &body, chunk)?;
        }
        Ok(())
    }

    /// The key, local and remote.
    pub fn key(&self) -> u32 {
        self.key
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.spec.len
    }

    /// Whether it has none, which the device refuses.
    pub fn is_empty(&self) -> bool {
        self.spec.len == 0
    }

    /// Address of a byte for work requests.
    pub fn addr(&self, off: usize) -> u64 {
        self.spec.iova.wrapping_add(off as u64)
    }

    /// The protection domain.
    pub fn pd(&self) -> &Pd {
        &self.pd
    }

    /// The buffer beneath.
    pub fn buf(&self) -> &Arc<Buf> {
        &self.spec.buf
    }

    /// A local scatter/gather element.
    pub fn sge(&self, off: usize, len: usize) -> Sge {
        Sge { addr: self.addr(off), len: len as u32, lkey: self.key }
    }

    /// The whole region as one element.
    pub fn sge_all(&self) -> Sge {
        self.sge(0, self.spec.len)
    }

    /// Where a peer reaches a byte.
    pub fn remote(&self, off: usize) -> Remote {
        Remote { addr: self.addr(off), rkey: self.key }
    }

    /// Writes bytes of the region as the application would.
    pub fn write(&self, off: usize, bytes: &[u8]) {
        self.spec.buf.write(self.spec.offset + off, bytes);
    }

    /// Reads bytes of the region as the application would.
    pub fn read(&self, off: usize, len: usize) -> Vec<u8> {
        self.spec.buf.read_vec(self.spec.offset + off, len)
    }

    /// Fills bytes of the region.
    pub fn fill(&self, off: usize, len: usize, value: u8) {
        self.spec.buf.fill(self.spec.offset + off, len, value);
    }

    /// Changes what the region covers.
    pub fn rereg_memory(&mut self, spec: MrSpec) -> Result<()> {
        let pd = self.pd.clone();
        self.rereg(REREG_TRANS, &pd, MrSpec { access: self.spec.access, ..spec })
    }

    /// Moves the region to another protection domain.
    pub fn rereg_pd(&mut self, pd: &Pd) -> Result<()> {
        self.rereg(REREG_PD, pd, self.spec.clone())
    }

    /// Changes what the region allows.
    pub fn rereg_access(&mut self, access: Access) -> Result<()> {
        let pd = self.pd.clone();
        self.rereg(REREG_ACCESS, &pd, MrSpec { access, ..self.spec.clone() })
    }

    /// Changes everything at once.
    pub fn rereg_all(&mut self, pd: &Pd, spec: MrSpec) -> Result<()> {
        self.rereg(REREG_TRANS | REREG_PD | REREG_ACCESS, pd, spec)
    }

    fn rereg(&mut self, flags: u32, pd: &Pd, spec: MrSpec) -> Result<()> {
        let extents = if flags & REREG_TRANS == 0 { Vec::new() } else { spec.extents() };
        let first = &extents[..extents.len().min(MAX_EXTENTS)];
        let named = |flag: u32, value: u64| if flags & flag == 0 { 0 } else { value };
        let body = ReregMr {
            key: self.key.into(),
            flags: flags.into(),
            pdn: (named(REREG_PD, pd.number().into()) as u32).into(),
            access: (named(REREG_ACCESS, spec.access.bits().into()) as u32).into(),
            iova: named(REREG_TRANS, spec.iova).into(),
            length: named(REREG_TRANS, spec.len as u64).into(),
            num_extents: (first.len() as u32).into(),
            reserved: 0.into(),
        };
        self.guest.command_ok(Opcode::ReregMr, &body, first)?;
        self.extend(&extents[first.len()..])?;
        self.pd = pd.clone();
        self.spec = spec;
        Ok(())
    }

    /// Deregisters, and says how that went. The key can still be asked for.
    pub fn dereg(&mut self) -> Result<()> {
        let body = ObjectRequest { number: self.key.into(), reserved: 0.into() };
        self.guest.command_ok(Opcode::DeregMr, &body, &[])?;
        self.alive = false;
        Ok(())
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        if self.alive {
            self.guest.destroy(self.generation, Opcode::DeregMr, self.key);
        }
    }
}
