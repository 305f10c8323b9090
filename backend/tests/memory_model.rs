//! Bounds and lookup of guest memory against a model that knows each byte by itself: what `mem::Map`, `mr::Layout`, regions, windows
//! and rings' pages say must be what the model says.
#![allow(missing_docs, reason = "a test program")]

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use freeflow_backend::mem::{Map, Pages, RegionId, Seg, read};
use freeflow_backend::mr::{Layout, Mr, WindowPart};
use proptest::prelude::*;
use virtio_rdma::PAGE_SIZE;
use virtio_rdma::ib::Access;

const PAGE: u64 = PAGE_SIZE as u64;
const PD: u32 = 3;

/// Guest memory, and which page of the file each of its pages is.
struct Guest {
    map: Map,
    file: Vec<u8>,
    pages: HashMap<u64, u64>,
}

impl Guest {
    /// Regions with gaps before them, both in pages; in the file they lie in the opposite order.
    fn new(regions: &[(u64, u64)]) -> Self {
        let total: u64 = regions.iter().map(|r| r.1).sum();
        let file = File::from(rustix::fs::memfd_create("model", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let bytes: Vec<u8> = (0..total * PAGE).map(|i| (i * 7 + i / 253) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        let (mut map, mut pages) = (Map::default(), HashMap::new());
        let (mut gpa, mut end) = (0, total);
        for &(gap, size) in regions {
            gpa += gap;
            end -= size;
            let id = RegionId { gpa: gpa * PAGE, size: size * PAGE, vmm_addr: gpa * PAGE, offset: end * PAGE };
            map = map.with(id, file.try_clone().unwrap()).unwrap();
            pages.extend((0..size).map(|i| (gpa + i, end + i)));
            gpa += size;
        }
        Self { map, file: bytes, pages }
    }

    fn byte(&self, gpa: u64) -> Option<u8> {
        let page = self.pages.get(&(gpa / PAGE))?;
        Some(self.file[(page * PAGE + gpa % PAGE) as usize])
    }

    fn bytes(&self, gpa: u64, len: u64) -> Option<Vec<u8>> {
        (0..len).map(|i| self.byte(gpa.checked_add(i)?)).collect()
    }

    /// The bytes of extents laid end to end.
    fn described(&self, extents: &[(u64, u64)]) -> Option<Vec<u8>> {
        let all: Option<Vec<_>> = extents.iter().map(|&(gpa, len)| self.bytes(gpa, len)).collect();
        Some(all?.concat())
    }
}

fn bytes_of(segs: &[Seg]) -> Vec<u8> {
    let one = |seg: &Seg| {
        let mut bytes = vec![0; seg.len()];
        read(*seg, &mut bytes);
        bytes
    };
    segs.iter().flat_map(one).collect()
}

fn regions() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0..3u64, 1..4u64), 1..5)
}

/// Addresses in and around memory, and far away.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0..20 * PAGE, 1 => any::<u64>(), 1 => u64::MAX - 2 * PAGE..=u64::MAX]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0..5 * PAGE, 1 => any::<u64>(), 1 => Just(0)]
}

/// Extents as a driver makes them: pages, of which the first begins and the last ends anywhere.
fn extents() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let pages = prop::collection::vec((0..16u64, 1..3u64), 1..5);
    (pages, 0..PAGE, 0..PAGE).prop_map(|(pages, cut, short)| {
        let mut extents: Vec<_> = pages.iter().map(|&(page, count)| (page * PAGE, count * PAGE)).collect();
        let last = extents.len() - 1;
        extents[last].1 -= short;
        let cut = cut.min(extents[0].1 - 1);
        extents[0] = (extents[0].0 + cut, extents[0].1 - cut);
        extents
    })
}

/// A region of these extents, and its bytes; `None` when they are not guest memory.
fn region(guest: &Guest, extents: &[(u64, u64)], iova: u64) -> Option<(Mr, Vec<u8>)> {
    let mut layout = Layout::default();
    let total = extents.iter().map(|e| e.1).sum();
    let appended = layout.append(&guest.map, extents, total, usize::MAX).is_ok();
    let described = guest.described(extents);
    assert_eq!(appended, described.is_some(), "{extents:x?}");
    let access = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::MW_BIND;
    described.map(|bytes| (Mr::new(7, PD, access, iova, Arc::new(layout)), bytes))
}

/// Whether `len` bytes at `addr` are within those of a region, reckoned without overflow.
fn is_inside(mr: &Mr, addr: u64, len: u64) -> bool {
    let (addr, len, start) = (u128::from(addr), u128::from(len), u128::from(mr.iova));
    addr >= start && addr + len <= start + u128::from(mr.length)
}

/// The bytes that a region or window gives.
fn given(mr: &Mr, addr: u64, len: u64) -> Vec<u8> {
    let mut segs = Vec::new();
    mr.segments(Access::empty(), addr, len, &mut segs).unwrap();
    bytes_of(&segs)
}

proptest! {
    #[test]
    fn memory_is_found_where_it_is_and_nowhere_else(regions in regions(), gpa in address(), len in length()) {
        let guest = Guest::new(&regions);
        let mut found = Vec::new();
        let is_there = guest.map.resolve(gpa, len, &mut found);
        let expected = if len == 0 || len > 64 * PAGE { None } else { guest.bytes(gpa, len) };
        prop_assert_eq!(is_there, expected.is_some());
        let segs: Vec<_> = found.iter().map(|extent| extent.slice(0, u64::MAX)).collect();
        prop_assert_eq!(bytes_of(&segs), expected.unwrap_or_default());
    }

    #[test]
    fn a_region_gives_its_bytes_and_no_others(
        regions in regions(), extents in extents(), iova in 0..1u64 << 40, addr in address(), len in length(),
    ) {
        let guest = Guest::new(&regions);
        if let Some((mr, bytes)) = region(&guest, &extents, iova) {
            for addr in [addr, iova.wrapping_add(addr)] {
                let allowed = mr.check(PD, Access::REMOTE_READ, addr, len).is_ok();
                prop_assert_eq!(allowed, is_inside(&mr, addr, len));
                prop_assert!(mr.check(PD + 1, Access::REMOTE_READ, addr, len).is_err());
                prop_assert!(mr.check(PD, Access::REMOTE_WRITE, addr, len).is_err());
                if allowed {
                    let start = (addr - iova) as usize;
                    prop_assert_eq!(given(&mr, addr, len), &bytes[start..start + len as usize]);
                }
            }
        }
    }

    #[test]
    fn a_window_gives_its_part_and_no_more(
        regions in regions(), extents in extents(), iova in 0..1u64 << 40, part in (0..6 * PAGE, 0..6 * PAGE),
        zero_based: bool, addr in 0..6 * PAGE, len in 0..6 * PAGE,
    ) {
        let guest = Guest::new(&regions);
        if let Some((mr, bytes)) = region(&guest, &extents, iova) {
            let mut access = Access::REMOTE_READ;
            access.set(Access::ZERO_BASED, zero_based);
            let part = WindowPart { addr: iova + part.0, length: part.1, access, qpn: Some(9) };
            let window = mr.window(8, &part);
            prop_assert_eq!(window.is_some(), is_inside(&mr, part.addr, part.length));
            if let Some(window) = window {
                let addr = window.iova + addr;
                prop_assert!(window.check(PD, Access::empty(), addr, len).is_err(), "it is for peers only");
                prop_assert!(window.check_remote((PD, 10), Access::REMOTE_READ, addr, len).is_err());
                let allowed = window.check_remote((PD, 9), Access::REMOTE_READ, addr, len).is_ok();
                prop_assert_eq!(allowed, is_inside(&window, addr, len));
                if allowed {
                    let start = (part.addr - iova + addr - window.iova) as usize;
                    prop_assert_eq!(given(&window, addr, len), &bytes[start..start + len as usize]);
                }
            }
        }
    }

    #[test]
    fn pages_of_a_ring_are_those_of_its_extents(
        regions in regions(), pages in prop::collection::vec((0..16u64, 1..3u64), 1..4), cut in 0..PAGE, skew in 0..2u64,
    ) {
        let guest = Guest::new(&regions);
        let extents: Vec<_> = pages.iter().map(|&(page, count)| (page * PAGE + skew * 8, count * PAGE)).collect();
        let size = (extents.iter().map(|e| e.1).sum::<u64>() - cut) as usize;
        let ring = Pages::new(&guest.map, &extents, size);
        let described = guest.described(&extents).filter(|_| skew == 0);
        prop_assert_eq!(ring.is_some(), described.is_some());
        if let (Some(ring), Some(bytes)) = (ring, described) {
            let mut there = vec![0; size];
            ring.read(0, &mut there);
            prop_assert_eq!(&there, &bytes[..size]);
            prop_assert!(Pages::new(&guest.map, &extents, bytes.len() + 1).is_none(), "more than there is");
        }
    }
}
