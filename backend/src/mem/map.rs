//! The memory table of one guest, as the VMM gave it over vhost-user.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use virtio_rdma::PAGE_SIZE;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::fault::Guard;
use super::{Alarm, Extent, Seg, read};

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Sizes or addresses that make no sense, or regions that overlap.
    #[error("memory region at guest address {gpa:#x} of {size:#x} bytes does not fit")]
    Layout {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// The file is shorter than the region: touching it would kill us.
    #[error("memory region at guest address {gpa:#x} ends after its file")]
    ShortFile {
        /// Guest-physical address.
        gpa: u64,
    },
    /// The file does not live in memory. Others could make whoever touches it wait, for a disk, a network or the VMM.
    #[error("memory region at guest address {gpa:#x} is not of a memory file")]
    NotMemory {
        /// Guest-physical address.
        gpa: u64,
    },
    /// It is of huge pages and ends within one: such a mapping can be neither replaced nor taken away.
    #[error("memory region at guest address {gpa:#x} ends within a huge page")]
    CutHugePage {
        /// Guest-physical address.
        gpa: u64,
    },
    /// More regions than were offered.
    #[error("more than {} memory regions", Map::MAX_REGIONS)]
    TooMany,
    /// The file cannot be mapped.
    #[error("cannot map guest memory")]
    Map(#[from] vm_memory::mmap::MmapRegionError),
    /// The file cannot be inspected, or there are too many.
    #[error("cannot use the file of guest memory")]
    File(#[from] std::io::Error),
    /// The table as a whole is inconsistent.
    #[error("inconsistent memory table")]
    Table(#[from] vm_memory::GuestRegionCollectionError),
    /// No region has these coordinates.
    #[error("no such memory region")]
    NotFound,
}

/// What tells one region from another: where it is, and which bytes of which file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionId {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Address of the first byte in the VMM; rings are named by it.
    pub vmm_addr: u64,
    /// Offset in the file.
    pub offset: u64,
}

/// One mapped piece of guest memory.
#[derive(Debug)]
pub struct Region {
    id: RegionId,
    file: (u64, u64),
    // Before the mapping, which must outlive it.
    _guard: Guard,
    mmap: Arc<GuestRegionMmap>,
}

impl Region {
    /// Maps `id.size` bytes of `file`. Should they go away later, `alarm` rings.
    ///
    /// # Errors
    /// When the file is shorter than that, does not live in memory, or cannot be mapped.
    pub fn map(id: RegionId, file: File, alarm: Option<Alarm>) -> Result<Arc<Self>, MapError> {
        let layout = MapError::Layout { gpa: id.gpa, size: id.size };
        let end = id.offset.checked_add(id.size);
        let (Some(end), Some(_), Some(_)) = (end, id.gpa.checked_add(id.size), id.vmm_addr.checked_add(id.size)) else {
            return Err(layout);
        };
        let aligned = [id.gpa, id.size, id.vmm_addr, id.offset].iter().all(|n| n.is_multiple_of(PAGE_SIZE as u64));
        if !aligned || id.size == 0 {
            return Err(layout);
        }
        if !is_memory(&file) {
            return Err(MapError::NotMemory { gpa: id.gpa });
        }
        let meta = file.metadata()?;
        if meta.len() < end {
            return Err(MapError::ShortFile { gpa: id.gpa });
        }
        if !id.size.is_multiple_of(page_size(&file)?) {
            return Err(MapError::CutHugePage { gpa: id.gpa });
        }
        let size = usize::try_from(id.size).map_err(|_| MapError::Layout { gpa: id.gpa, size: id.size })?;
        let mmap = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, id.offset))
            .build()?;
        let guard = Guard::new(mmap.as_ptr(), size, alarm)?;
        let mmap = GuestRegionMmap::new(mmap, GuestAddress(id.gpa)).ok_or(layout)?;
        Ok(Arc::new(Self { id, file: (meta.dev(), meta.ino()), _guard: guard, mmap: Arc::new(mmap) }))
    }

    /// Where it is.
    pub fn id(&self) -> RegionId {
        self.id
    }

    /// Whether `id` of `file` is just what is mapped here.
    fn is(&self, id: RegionId, file: &File) -> bool {
        self.id == id && is_memory(file) && file.metadata().is_ok_and(|m| (m.dev(), m.ino()) == self.file)
    }

    /// What is mapped.
    #[cfg(feature = "rdma")]
    pub(super) fn file(&self) -> Option<&File> {
        use vm_memory::GuestMemoryRegion;
        self.mmap.file_offset().map(FileOffset::file)
    }

    pub(super) fn host_address(&self) -> *mut u8 {
        self.mmap.as_ptr()
    }
}

/// Whether a file is one of tmpfs or hugetlbfs, as memfds are. Only those have seals, and asking for these asks nobody
/// but the kernel, whereas even fstatfs(2) could wait for a file system that the VMM itself serves.
fn is_memory(file: &File) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok()
}

/// Bytes of the pages that a file [of memory](is_memory) is mapped in.
fn page_size(file: &File) -> std::io::Result<u64> {
    const HUGETLBFS: rustix::fs::FsWord = 0x9584_58f6;
    let filesystem = rustix::fs::fstatfs(file)?;
    let is_huge = filesystem.f_type == HUGETLBFS;
    Ok(if is_huge { filesystem.f_bsize.cast_unsigned() } else { PAGE_SIZE as u64 })
}

/// All regions of a guest. A value: changes make a new one.
#[derive(Debug, Default, Clone)]
pub struct Map {
    regions: Vec<Arc<Region>>,
    /// Stretches of addresses without a gap: a guest may have hundreds of regions side by side, and asking for each would take long.
    stretches: Vec<Range<u64>>,
    memory: GuestMemoryMmap,
    alarm: Option<Alarm>,
}

impl Map {
    /// Most regions of a guest: what KVM has slots for. Each is a mapping and a descriptor of ours.
    pub const MAX_REGIONS: usize = 509;

    /// No memory yet. When some that is added goes away, other than by this table, `alarm` rings.
    pub fn new(alarm: Alarm) -> Self {
        Self { alarm: Some(alarm), ..Self::default() }
    }

    fn with_regions(&self, mut regions: Vec<Arc<Region>>) -> Result<Self, MapError> {
        regions.sort_by_key(|r| r.id.gpa);
        let memory = match regions.len() {
            0 => GuestMemoryMmap::default(),
            _ => GuestMemoryMmap::from_arc_regions(regions.iter().map(|r| r.mmap.clone()).collect())?,
        };
        let stretches = stretches(&regions);
        Ok(Self { regions, stretches, memory, alarm: self.alarm.clone() })
    }

    /// A whole new table. A region that stands in this one already, same place and same bytes, stays the
    /// same mapping, so that what refers to it goes on.
    ///
    /// # Errors
    /// When there are too many, a region cannot be mapped, or two overlap.
    pub fn replaced(&self, table: Vec<(RegionId, File)>) -> Result<Self, MapError> {
        if table.len() > Self::MAX_REGIONS {
            return Err(MapError::TooMany);
        }
        let mut regions = Vec::with_capacity(table.len());
        for (id, file) in table {
            let known = self.regions.iter().find(|r| r.is(id, &file)).cloned();
            regions.push(known.map_or_else(|| Region::map(id, file, self.alarm.clone()), Ok)?);
        }
        self.with_regions(regions)
    }

    /// This table and one more region.
    ///
    /// # Errors
    /// When there are too many, it cannot be mapped, or it overlaps another.
    pub fn with(&self, id: RegionId, file: File) -> Result<Self, MapError> {
        if self.regions.len() >= Self::MAX_REGIONS {
            return Err(MapError::TooMany);
        }
        let mut regions = self.regions.clone();
        regions.push(Region::map(id, file, self.alarm.clone())?);
        self.with_regions(regions)
    }

    /// This table without the region at this place.
    ///
    /// # Errors
    /// When there is none.
    pub fn without(&self, gpa: u64, size: u64, vmm_addr: u64) -> Result<Self, MapError> {
        let is_it = |r: &Arc<Region>| (r.id.gpa, r.id.size, r.id.vmm_addr) == (gpa, size, vmm_addr);
        if !self.regions.iter().any(is_it) {
            return Err(MapError::NotFound);
        }
        self.with_regions(self.regions.iter().filter(|r| !is_it(r)).cloned().collect())
    }

    /// The same memory for the virtqueue library.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Bytes of all regions.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|r| r.id.size).sum()
    }

    /// Whether this very mapping is part of the table.
    pub fn contains(&self, region: &Arc<Region>) -> bool {
        self.regions.iter().any(|r| Arc::ptr_eq(r, region))
    }

    /// Guest-physical address of an address of the VMM.
    pub fn gpa_of_vmm_addr(&self, addr: u64) -> Option<u64> {
        let region = self.regions.iter().find(|r| addr.checked_sub(r.id.vmm_addr).is_some_and(|o| o < r.id.size))?;
        Some(addr - region.id.vmm_addr + region.id.gpa)
    }

    /// Looks up `len` bytes at `gpa` and appends where they are on this host: one extent for each region that they touch.
    /// False, with nothing appended, when any of them is outside guest memory or `len` is zero.
    pub fn resolve(&self, gpa: u64, len: u64, out: &mut Vec<Extent>) -> bool {
        let before = out.len();
        let (mut at, mut left) = (gpa, len);
        while left > 0 {
            let Some(extent) = self.first_extent(at, left) else {
                out.truncate(before);
                return false;
            };
            at = at.wrapping_add(extent.len());
            left -= extent.len();
            out.push(extent);
        }
        len > 0
    }

    /// Whether all of these bytes are guest memory.
    pub fn covers(&self, gpa: u64, len: u64) -> bool {
        let before = self.stretches.partition_point(|s| s.start <= gpa);
        let stretch = before.checked_sub(1).map(|index| &self.stretches[index]);
        len == 0 || stretch.is_some_and(|s| gpa.checked_add(len).is_some_and(|end| end <= s.end))
    }

    /// Appends where these bytes are, as far as they are guest memory.
    pub fn segments(&self, gpa: u64, len: u64, out: &mut Vec<Seg>) {
        let (mut at, mut left) = (gpa, len);
        while let Some(extent) = self.first_extent(at, left) {
            at = at.wrapping_add(extent.len());
            left -= extent.len();
            out.push(extent.slice(0, extent.len()));
        }
    }

    /// Copies guest bytes out; false if some are no guest memory.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> bool {
        if !self.covers(gpa, buf.len() as u64) {
            return false;
        }
        let mut segs = Vec::new();
        self.segments(gpa, buf.len() as u64, &mut segs);
        let mut rest = buf;
        for seg in segs {
            let (now, later) = rest.split_at_mut(seg.len());
            read(seg, now);
            rest = later;
        }
        true
    }

    fn first_extent(&self, gpa: u64, len: u64) -> Option<Extent> {
        let (region, offset, there) = self.find(gpa)?;
        (len > 0).then(|| Extent::new(region, offset, len.min(there)))
    }

    /// The region of an address, its offset there, and how many bytes follow.
    fn find(&self, gpa: u64) -> Option<(&Arc<Region>, u64, u64)> {
        let index = self.regions.partition_point(|r| r.id.gpa <= gpa).checked_sub(1)?;
        let region = &self.regions[index];
        let offset = gpa - region.id.gpa;
        let there = region.id.size.checked_sub(offset).filter(|&n| n > 0)?;
        Some((region, offset, there))
    }
}

/// Neighbours of a sorted list as one.
fn stretches(regions: &[Arc<Region>]) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    for RegionId { gpa, size, .. } in regions.iter().map(|r| r.id) {
        match all.last_mut() {
            Some(last) if last.end == gpa => last.end = gpa + size,
            _ => all.push(gpa..gpa + size),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_side_by_side_cover_as_one() {
        let memory = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(4096).unwrap();
        let region = |page: u64| {
            let gpa = 4096 * page;
            (RegionId { gpa, size: 4096, vmm_addr: gpa, offset: 0 }, memory.try_clone().unwrap())
        };
        let map = Map::default().replaced([3, 1, 2, 5].map(region).into()).unwrap();
        for (gpa, len, covered) in [
            (4096, 3 * 4096, true),
            (4096, 3 * 4096 + 1, false),
            (4095, 2, false),
            (0, 1, false),
            (4 * 4096, 1, false),
            (5 * 4096 + 4095, 1, true),
            (6 * 4096, 1, false),
            (6 * 4096, 0, true),
            (u64::MAX, 2, false),
            (4096, u64::MAX, false),
        ] {
            assert_eq!(map.covers(gpa, len), covered, "{len} bytes at {gpa:#x}");
        }
        assert!(map.without(2 * 4096, 4096, 2 * 4096).unwrap().covers(3 * 4096, 4096));
        assert!(!map.without(2 * 4096, 4096, 2 * 4096).unwrap().covers(4096, 4097));
    }

    #[test]
    fn only_memory_files() {
        // A file of some size that is no memory file, wherever this runs.
        let file = || File::open("/sys/devices/system/cpu/online").unwrap();
        let id = RegionId { gpa: 0, size: 4096, vmm_addr: 0, offset: 0 };
        assert!(matches!(Map::default().with(id, file()), Err(MapError::NotMemory { gpa: 0 })));
        assert!(matches!(Map::default().replaced(vec![(id, file())]), Err(MapError::NotMemory { gpa: 0 })));
        let memory = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(4096).unwrap();
        assert!(Map::default().with(id, memory).is_ok());
    }

    /// A mapping of huge pages cannot be cut: what SIGBUS would put in its place, and the end of it, would fail.
    #[test]
    fn huge_pages_are_whole() {
        use rustix::fs::MemfdFlags;
        const HUGE: u64 = 2 << 20;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        let Ok(file) = rustix::fs::memfd_create("guest", flags) else {
            return; // A kernel without.
        };
        let file = File::from(file);
        file.set_len(2 * HUGE).unwrap();
        let alarm = Alarm::new().unwrap();
        let region = |size| {
            let id = RegionId { gpa: 0, size, vmm_addr: 0, offset: 0 };
            Map::new(alarm.clone()).with(id, file.try_clone().unwrap())
        };
        assert!(matches!(region(HUGE + 4096), Err(MapError::CutHugePage { gpa: 0 })));
        // The host may have no huge pages for it: then it goes away when it is touched.
        let map = region(HUGE).unwrap();
        assert!(map.read(0, &mut [0; 8]));
    }

    #[test]
    fn no_more_regions_than_offered() {
        let memory = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(4096).unwrap();
        let region = |n: usize| {
            let gpa = 4096 * n as u64;
            (RegionId { gpa, size: 4096, vmm_addr: gpa, offset: 0 }, memory.try_clone().unwrap())
        };
        let full = Map::default().replaced((0..Map::MAX_REGIONS).map(region).collect()).unwrap();
        let (id, file) = region(Map::MAX_REGIONS);
        assert!(matches!(full.with(id, file), Err(MapError::TooMany)));
        let more = (0..=Map::MAX_REGIONS).map(region).collect();
        assert!(matches!(Map::default().replaced(more), Err(MapError::TooMany)));
    }
}
