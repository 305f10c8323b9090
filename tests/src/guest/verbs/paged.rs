//! Regions with on-demand paging, and the driver's answers to their faults.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use virtio_rdma::PAGE_SIZE;
use virtio_rdma::ctrl::{
    MapPages, ObjectRequest, ObjectResponse, Opcode, PAGES_WRITE, PageRange, REG_ON_DEMAND, RegMr, Status,
};
use virtio_rdma::event::{Event, EventType};
use virtio_rdma::ib::Access;

use super::Pd;
use super::wr::{Remote, Sge};
use crate::guest::mem::Buf;
use crate::guest::{Guest, Result};

/// Where regions are, but for where they begin in their first page.
const IOVA: u64 = 0x7f34_0000_0000;

/// A region without pages of its own: pages of a buffer are put in their places as asked.
#[derive(Debug)]
pub struct PagedMr {
    guest: Guest,
    generation: u64,
    key: u32,
    /// The memory that pages come from: page n of the region is page n here unless asked otherwise.
    pub buf: Arc<Buf>,
    /// First byte in the buffer, within its first page.
    head: usize,
    len: usize,
    alive: bool,
    _pd: Pd,
}

/// What the device asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// First page.
    pub page: u32,
    /// How many.
    pub count: u32,
    /// To be written.
    pub write: bool,
}

impl Fault {
    /// As an event says it.
    pub fn of(event: &Event) -> Self {
        Self { page: event.page.get(), count: event.count.get(), write: event.write.get() == 1 }
    }

    /// The pages.
    pub fn pages(self) -> Range<u32> {
        self.page..self.page + self.count
    }
}

impl Pd {
    /// A region of `len` bytes that begins `head` bytes into a buffer's first page and has no pages yet.
    pub fn reg_on_demand(&self, buf: &Arc<Buf>, head: usize, len: usize, access: Access) -> Result<PagedMr> {
        let guest = self.guest().clone();
        let body = RegMr {
            pdn: self.number().into(),
            access: access.bits().into(),
            iova: (IOVA + head as u64).into(),
            length: (len as u64).into(),
            flags: REG_ON_DEMAND.into(),
            ..RegMr::default()
        };
        let generation = guest.generation();
        let made: ObjectResponse = guest.command(Opcode::RegMr, &body, &[])?;
        let (key, buf) = (made.number.get(), Arc::clone(buf));
        Ok(PagedMr { guest, generation, key, buf, head, len, alive: true, _pd: self.clone() })
    }
}

impl PagedMr {
    /// The key, local and remote.
    pub fn key(&self) -> u32 {
        self.key
    }

    /// Address of a byte for work requests.
    pub fn addr(&self, off: usize) -> u64 {
        IOVA + (self.head + off) as u64
    }

    /// A local scatter/gather element.
    pub fn sge(&self, off: usize, len: usize) -> Sge {
        Sge { addr: self.addr(off), len: len as u32, lkey: self.key }
    }

    /// Where a peer reaches a byte.
    pub fn remote(&self, off: usize) -> Remote {
        Remote { addr: self.addr(off), rkey: self.key }
    }

    /// All pages.
    pub fn pages(&self) -> Range<u32> {
        0..(self.head + self.len).div_ceil(PAGE_SIZE) as u32
    }

    /// Writes bytes where pages of the region come from.
    pub fn write(&self, off: usize, bytes: &[u8]) {
        self.buf.write(self.head + off, bytes);
    }

    /// Reads them.
    pub fn read(&self, off: usize, len: usize) -> Vec<u8> {
        self.buf.read_vec(self.head + off, len)
    }

    /// Gives pages.
    pub fn map(&self, pages: Range<u32>, write: bool) -> Status {
        let from = pages.start;
        self.map_from(pages, from, write)
    }

    /// Gives pages that lie elsewhere in the buffer, from page `from` on.
    pub fn map_from(&self, pages: Range<u32>, from: u32, write: bool) -> Status {
        let extents = self.buf.extents(from as usize * PAGE_SIZE, pages.len() * PAGE_SIZE);
        let flags = if write { PAGES_WRITE } else { 0 };
        let num_extents = (extents.len() as u32).into();
        let body = MapPages { key: self.key.into(), flags: flags.into(), first: pages.start.into(), num_extents };
        self.guest.command_status(Opcode::MapPages, &body, &extents).expect("an answer")
    }

    /// Takes pages away.
    pub fn unmap(&self, pages: Range<u32>) -> Status {
        self.range_command(Opcode::UnmapPages, pages, 0)
    }

    /// Says that pages cannot be had, or not to be written.
    pub fn deny(&self, pages: Range<u32>, only_to_write: bool) -> Status {
        self.range_command(Opcode::DenyPages, pages, if only_to_write { PAGES_WRITE } else { 0 })
    }

    fn range_command(&self, opcode: Opcode, pages: Range<u32>, flags: u32) -> Status {
        let count = (pages.end - pages.start).into();
        let body = PageRange { key: self.key.into(), flags: flags.into(), first: pages.start.into(), count };
        self.guest.command_status(opcode, &body, &[]).expect("an answer")
    }

    /// Waits for the device to ask for pages.
    pub fn next_fault(&self, timeout: Duration) -> Result<Fault> {
        self.guest.events().wait(EventType::PageFault, self.key, timeout).map(|event| Fault::of(&event))
    }

    /// A fault, if there is one now.
    pub fn take_fault(&self) -> Option<Fault> {
        self.guest.events().take(EventType::PageFault, self.key).expect("events").map(|event| Fault::of(&event))
    }

    /// Gives what the device asks for now; how many times it did.
    pub fn serve(&self) -> usize {
        let mut served = 0;
        while let Some(fault) = self.take_fault() {
            assert_eq!(self.map(fault.pages(), fault.write), Status::Ok);
            served += 1;
        }
        served
    }

    /// Deregisters, and says how that went.
    pub fn dereg(&mut self) -> Result<()> {
        let body = ObjectRequest { number: self.key.into(), reserved: 0.into() };
        self.guest.command_ok(Opcode::DeregMr, &body, &[])?;
        self.alive = false;
        Ok(())
    }
}

impl Drop for PagedMr {
    fn drop(&mut self) {
        if self.alive {
            self.guest.destroy(self.generation, Opcode::DeregMr, self.key);
        }
    }
}
