//! Memory regions and windows: what a key allows, and where its bytes are (IBA 10.6). Which keys work at the moment is in
//! [`key_table`](crate::key_table).

use std::sync::Arc;

use virtio_rdma::PAGE_SIZE;
use virtio_rdma::ib::Access;

use crate::control::parse::RawExtent;
use crate::mem::{Extent, Map, Seg};
use crate::on_demand::{Absent, OnDemand};
use crate::profile::Profile;
use crate::verbs::{Grant, MemoryRegion, Share, Terms};

/// Why a key, address and length were refused. The guest sees a protection or access error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// No such key now.
    #[error("no region has key {0:#x}")]
    NoSuchKey(u32),
    /// The region is in another protection domain.
    #[error("key {0:#x} is of another protection domain")]
    WrongPd(u32),
    /// It is the key of a window of another queue pair.
    #[error("key {0:#x} is bound to another queue pair")]
    WrongQp(u32),
    /// The region does not allow this kind of access.
    #[error("key {0:#x} does not allow this access")]
    Access(u32),
    /// Some of the bytes are outside the region.
    #[error("{len} bytes at {addr:#x} are not in the region of key {key:#x}")]
    OutOfBounds {
        /// The key.
        key: u32,
        /// First byte.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// The guest's driver could not give a page of the region.
    #[error("a page of the region of key {0:#x} cannot be had")]
    NoPage(u32),
}

/// Why guest memory does not make a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Pages in the middle are not whole.
    #[error("pages in the middle must be whole")]
    CutPage,
    /// Not guest memory, or none that the VMM shares: guest physical address and length.
    #[error("{1} bytes at {0:#x} are no memory that the VMM shares")]
    NotThere(u64, u64),
    /// More pieces than there may be.
    #[error("too many pieces")]
    TooMany,
    /// More bytes than the region has.
    #[error("more than the region's length")]
    TooLong,
}

/// What an access key gives access to, at one time. Immutable: a change makes a new one.
#[derive(Debug)]
pub struct Mr {
    /// lkey and rkey; of a window, the rkey alone.
    pub key: u32,
    /// Protection domain.
    pub pdn: u32,
    /// What may be done with it.
    pub access: Access,
    /// Address of the first byte.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Where they are.
    memory: Memory,
    /// Where they begin there: a window may begin in the middle of its region.
    offset: u64,
    /// Who may use it.
    reach: Reach,
    /// What it is to the host's NIC, if that has it.
    on_nic: Option<OnNic>,
}

/// A region that the host's NIC has too.
#[derive(Debug, Clone)]
struct OnNic {
    grant: Arc<Grant>,
    _mr: Arc<dyn MemoryRegion>,
    /// Of its virtual NIC's quotas.
    _shares: Arc<[Share; 3]>,
}

/// Where the bytes of a region are.
#[derive(Debug, Clone)]
enum Memory {
    /// In these pieces.
    Pieces(Arc<Layout>),
    /// All guest memory, at its guest-physical addresses.
    Guest(Arc<Map>),
    /// Where the guest's driver says, page by page, while it says so.
    OnDemand(Arc<OnDemand>),
}

/// Who may use a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// A region's: work requests of the protection domain, local and remote.
    Region,
    /// A type 1 window's: peers of all queue pairs of the protection domain.
    Window,
    /// A type 2 window's: peers of this queue pair.
    QueuePair(u32),
}

/// What a window is bound with (IBA 10.6.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowPart {
    /// First byte, as the region addresses it.
    pub addr: u64,
    /// Bytes.
    pub length: u64,
    /// What peers may do.
    pub access: Access,
    /// The only queue pair that may use it, for type 2.
    pub qpn: Option<u32>,
}

/// Where the bytes of a region are.
#[derive(Debug, Default)]
pub struct Layout {
    extents: Vec<Extent>,
    /// For each extent the offset in the region at which it starts.
    starts: Vec<u64>,
    length: u64,
}

impl Layout {
    /// Appends guest memory to a region of `total` bytes, all or nothing, and returns in how many pieces it lies: an extent may
    /// reach over several regions of the VMM. Only the first and the last page of a region may be cut, so that no amount of bytes
    /// lies in more pieces than pages.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn append(&mut self, map: &Map, extents: &[RawExtent], total: u64, most: usize) -> Result<usize, LayoutError> {
        if !is_cut_at_ends(extents, self.length, total) {
            return Err(LayoutError::CutPage);
        }
        let mut found = Vec::with_capacity(extents.len());
        for &(addr, len) in extents {
            if !map.resolve(addr, len, &mut found) {
                return Err(LayoutError::NotThere(addr, len));
            }
            if found.len() > most {
                return Err(LayoutError::TooMany);
            }
        }
        let added: u64 = found.iter().map(Extent::len).sum();
        if self.length.saturating_add(added) > total {
            return Err(LayoutError::TooLong);
        }
        let pieces = found.len();
        for extent in found {
            self.push(extent);
        }
        Ok(pieces)
    }

    /// Appends memory; neighbours are merged.
    fn push(&mut self, extent: Extent) {
        let len = extent.len();
        match self.extents.last_mut() {
            Some(last) if last.touches(&extent) => last.join(&extent),
            _ => {
                self.starts.push(self.length);
                self.extents.push(extent);
            }
        }
        self.length += len;
    }

    /// Bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// In which pieces.
    pub(crate) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Of so many bytes that are nowhere.
    #[cfg(test)]
    pub fn of_length(length: u64) -> Self {
        Self { length, ..Self::default() }
    }

    /// Whether all of it is still guest memory.
    pub fn is_in(&self, map: &Map) -> bool {
        self.extents.iter().all(|e| map.contains(e.region()))
    }

    /// Appends the segments of `len` bytes from `offset` on, which the caller has checked to be inside.
    #[inline]
    pub(crate) fn segments(&self, offset: u64, len: u64, out: &mut Vec<Seg>) {
        match &self.extents[..] {
            [extent] if len > 0 => out.push(extent.slice(offset, len)),
            _ => self.many_segments(offset, len, out),
        }
    }

    #[inline(never)]
    fn many_segments(&self, offset: u64, len: u64, out: &mut Vec<Seg>) {
        let (mut at, mut left) = (offset, len);
        let mut index = self.starts.partition_point(|&s| s <= at).saturating_sub(1);
        while left > 0 {
            let seg = self.extents[index].slice(at - self.starts[index], left);
            at += seg.len() as u64;
            left -= seg.len() as u64;
            index += 1;
            out.push(seg);
        }
    }
}

impl Mr {
    /// A region whose memory is complete.
    pub fn new(key: u32, pdn: u32, access: Access, iova: u64, layout: Arc<Layout>) -> Self {
        let (length, memory) = (layout.length, Memory::Pieces(layout));
        Self { key, pdn, access, iova, length, memory, offset: 0, reach: Reach::Region, on_nic: None }
    }

    /// The same, which the host's NIC has too.
    #[must_use]
    pub fn on_nic(mut self, mr: Arc<dyn MemoryRegion>, shares: [Share; 3]) -> Self {
        let terms = Terms { pdn: self.pdn, access: self.access, iova: self.iova, length: self.length };
        let grant = Grant::region(terms, &*mr);
        self.on_nic = Some(OnNic { grant: Arc::new(grant), _mr: mr, _shares: Arc::new(shares) });
        self
    }

    /// What it is to the host's NIC; `None` if that does not have it.
    pub fn grant(&self) -> Option<&Arc<Grant>> {
        self.on_nic.as_ref().map(|on_nic| &on_nic.grant)
    }

    /// A region of all guest memory.
    pub fn of_guest(key: u32, pdn: u32, access: Access, map: Arc<Map>) -> Self {
        let memory = Memory::Guest(map);
        Self { key, pdn, access, iova: 0, length: u64::MAX, memory, offset: 0, reach: Reach::Region, on_nic: None }
    }

    /// A region whose pages come and go.
    pub fn on_demand(pdn: u32, access: Access, iova: u64, pages: Arc<OnDemand>) -> Self {
        let (key, length, memory) = (pages.key(), pages.length(), Memory::OnDemand(pages));
        Self { key, pdn, access, iova, length, memory, offset: 0, reach: Reach::Region, on_nic: None }
    }

    /// A window over part of this region, if that allows it (IBA 10.6.6.2.5; what rxe checks, and that the bytes of a zero-based window
    /// are in the region too).
    pub fn window(&self, key: u32, part: &WindowPart) -> Option<Self> {
        let changes = part.access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC);
        let allowed = self.reach == Reach::Region
            && self.access.contains(Access::MW_BIND)
            && !self.access.contains(Access::ZERO_BASED)
            && (!changes || self.access.contains(Access::LOCAL_WRITE))
            && self.contains(part.addr, part.length);
        let iova = if part.access.contains(Access::ZERO_BASED) { 0 } else { part.addr };
        allowed.then(|| Self {
            key,
            pdn: self.pdn,
            access: part.access,
            iova,
            length: part.length,
            memory: self.memory.clone(),
            offset: self.offset + (part.addr - self.iova),
            reach: part.qpn.map_or(Reach::Window, Reach::QueuePair),
            // The NIC has regions only: what it is at when a window goes could not be stopped.
            on_nic: None,
        })
    }

    /// Whether it is there for all guest memory.
    pub fn is_of_guest(&self) -> bool {
        matches!(self.memory, Memory::Guest(_))
    }

    /// Whether its pages come and go.
    pub fn is_on_demand(&self) -> bool {
        matches!(self.memory, Memory::OnDemand(_))
    }

    /// Whether it is a window.
    pub fn is_window(&self) -> bool {
        self.reach != Reach::Region
    }

    /// Whether this is the guest's memory that it is over.
    pub fn is_of(&self, map: &Arc<Map>) -> bool {
        match &self.memory {
            Memory::Pieces(layout) => layout.is_in(map),
            Memory::Guest(known) => Arc::ptr_eq(known, map),
            // Pages of memory that goes are taken away one by one.
            Memory::OnDemand(_) => true,
        }
    }

    /// The same over another table of memory, if it is for all guest memory.
    #[must_use]
    pub fn with_map(&self, map: &Arc<Map>) -> Option<Self> {
        let memory = Memory::Guest(map.clone());
        self.is_of_guest().then_some(Self { memory, on_nic: None, ..*self })
    }

    /// Checks that a work request of protection domain `pdn` may access `len` bytes at `addr` this way.
    ///
    /// # Errors
    /// What does not hold.
    #[inline]
    pub fn check(&self, pdn: u32, need: Access, addr: u64, len: u64) -> Result<(), KeyError> {
        if self.reach == Reach::Region && self.allows(pdn, need, addr, len) {
            return Ok(());
        }
        Err(if self.is_window() { KeyError::NoSuchKey(self.key) } else { self.why_not(pdn, need, addr, len) })
    }

    /// Checks that the peer of queue pair `qpn` of protection domain `pdn` may access `len` bytes at `addr` this way.
    ///
    /// # Errors
    /// What does not hold.
    #[inline]
    pub fn check_remote(&self, (pdn, qpn): (u32, u32), need: Access, addr: u64, len: u64) -> Result<(), KeyError> {
        if matches!(self.reach, Reach::QueuePair(only) if only != qpn) {
            return Err(KeyError::WrongQp(self.key));
        }
        if self.allows(pdn, need, addr, len) { Ok(()) } else { Err(self.why_not(pdn, need, addr, len)) }
    }

    /// Asked several times for each request: why not is found out when it is not.
    #[inline]
    fn allows(&self, pdn: u32, need: Access, addr: u64, len: u64) -> bool {
        self.pdn == pdn && self.access.contains(need) && self.contains(addr, len)
    }

    #[cold]
    fn why_not(&self, pdn: u32, need: Access, addr: u64, len: u64) -> KeyError {
        if self.pdn != pdn {
            KeyError::WrongPd(self.key)
        } else if !self.access.contains(need) {
            KeyError::Access(self.key)
        } else {
            KeyError::OutOfBounds { key: self.key, addr, len }
        }
    }

    #[inline]
    fn contains(&self, addr: u64, len: u64) -> bool {
        let start = addr.checked_sub(self.iova);
        let inside = start.and_then(|o| o.checked_add(len)).is_some_and(|end| end <= self.length);
        match &self.memory {
            Memory::Pieces(_) | Memory::OnDemand(_) => inside,
            // A window over guest memory has its offset there.
            Memory::Guest(map) => inside && map.covers(addr - self.iova + self.offset, len),
        }
    }

    /// Appends where `len` bytes at `addr` are, to be used as `need` says. They were checked before.
    ///
    /// # Errors
    /// When some of them have no page now: whose, and why.
    #[inline]
    pub fn segments(
        &self,
        need: Access,
        addr: u64,
        len: u64,
        out: &mut Vec<Seg>,
    ) -> Result<(), (&Arc<OnDemand>, Absent)> {
        let at = addr - self.iova + self.offset;
        match &self.memory {
            Memory::Pieces(layout) => layout.segments(at, len, out),
            Memory::Guest(map) => map.segments(at, len, out),
            Memory::OnDemand(pages) => return on_demand_segments(pages, need, at, len, out),
        }
        Ok(())
    }
}

#[inline(never)]
fn on_demand_segments<'a>(
    pages: &'a Arc<OnDemand>,
    need: Access,
    at: u64,
    len: u64,
    out: &mut Vec<Seg>,
) -> Result<(), (&'a Arc<OnDemand>, Absent)> {
    let write = need.intersects(Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_ATOMIC);
    pages.segments(at, len, write, out).map_err(|absent| (pages, absent))
}

/// Checks access flags of a region.
///
/// # Errors
/// What is wrong with them.
pub fn check_access(bits: u32) -> Result<Access, &'static str> {
    let access = Access::from_bits(bits).filter(|a| Profile::access().contains(*a)).ok_or("access flags")?;
    let remote_change = access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC);
    if remote_change && !access.contains(Access::LOCAL_WRITE) {
        return Err("access flags: remote write needs local write");
    }
    Ok(access)
}

/// Checks address and length of a region.
///
/// # Errors
/// What is wrong with them.
pub fn check_range(access: Access, iova: u64, length: u64) -> Result<(), &'static str> {
    if length == 0 || length > Profile::MAX_MR_SIZE || iova.checked_add(length).is_none() {
        return Err("address or length");
    }
    if access.contains(Access::ZERO_BASED) && iova != 0 {
        return Err("address of a zero-based region");
    }
    Ok(())
}

/// Whether all of these are whole pages.
pub fn is_paged(extents: &[RawExtent]) -> bool {
    extents.iter().all(|&(addr, len)| addr.is_multiple_of(PAGE_SIZE as u64) && len.is_multiple_of(PAGE_SIZE as u64))
}

/// Whether only the first and the last page of a region of `length` bytes are cut; `before` bytes were described before.
fn is_cut_at_ends(extents: &[RawExtent], before: u64, length: u64) -> bool {
    let mut offset = before;
    extents.iter().all(|&(addr, len)| {
        let first = offset == 0;
        offset = offset.saturating_add(len);
        let last = offset == length;
        let whole = |at: u64| at.is_multiple_of(PAGE_SIZE as u64);
        (first || whole(addr)) && (last || whole(addr.wrapping_add(len)))
    })
}
