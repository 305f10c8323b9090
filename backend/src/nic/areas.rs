//! Areas that the guest's driver shares with the device (`docs/device.md`, 4).

use virtio_rdma::area::{AH_STRIDE, AddressHandle, DoorbellLayout};
use zerocopy::{FromZeros, IntoBytes};

use crate::handshake;
use crate::mem::{Map, Pages};

/// Doorbells of one worker.
#[derive(Debug)]
pub struct DoorbellArea {
    layout: DoorbellLayout,
    pages: Pages,
}

impl DoorbellArea {
    /// The area for `num` doorbells in these extents; `None` when they are not guest pages or too few.
    pub fn new(map: &Map, num: u32, extents: &[(u64, u64)]) -> Option<Self> {
        let layout = DoorbellLayout::new(num);
        Pages::new(map, extents, layout.size()).map(|pages| Self { layout, pages })
    }

    /// Whether its memory is still there.
    pub fn is_in(&self, map: &Map) -> bool {
        self.pages.is_in(map)
    }

    /// Number of words in the summary.
    pub fn summary_words(&self) -> usize {
        self.layout.summary_words()
    }

    /// Tells the driver whether it must notify. Before sleeping, look for doorbells once more.
    pub fn set_sleeping(&self, sleeping: bool) {
        let word = self.pages.u32(DoorbellLayout::SLEEPING);
        if sleeping { handshake::begin_sleep(word) } else { handshake::end_sleep(word) }
    }

    /// Takes a summary word: each bit names a bitmap word with doorbells in it.
    pub fn take_summary(&self, word: usize) -> u64 {
        handshake::take(self.pages.u64(DoorbellLayout::SUMMARY + word * 8))
    }

    /// Whether the summary names any doorbells.
    pub fn is_rung(&self) -> bool {
        self.pages.any(DoorbellLayout::SUMMARY, self.summary_words())
    }

    /// Takes a bitmap word: each bit is a doorbell. Zero for words beyond the bitmap.
    pub fn take_doorbells(&self, word: usize) -> u64 {
        if word >= self.layout.bitmap_words() {
            return 0;
        }
        handshake::take(self.pages.u64(self.layout.bitmap() + word * 8))
    }
}

/// Address handles.
#[derive(Debug)]
pub struct AhArea {
    num: u32,
    pages: Pages,
}

impl AhArea {
    /// The area for `num` handles in these extents; `None` when they are not guest pages or too few.
    pub fn new(map: &Map, num: u32, extents: &[(u64, u64)]) -> Option<Self> {
        Pages::new(map, extents, num as usize * AH_STRIDE).map(|pages| Self { num, pages })
    }

    /// Whether its memory is still there.
    pub fn is_in(&self, map: &Map) -> bool {
        self.pages.is_in(map)
    }

    /// A copy of record `ah`; `None` if there is no such record.
    pub fn get(&self, ah: u32) -> Option<AddressHandle> {
        if ah == 0 || ah >= self.num {
            return None;
        }
        let mut record = AddressHandle::new_zeroed();
        self.pages.read(ah as usize * AH_STRIDE, record.as_mut_bytes());
        Some(record)
    }
}
