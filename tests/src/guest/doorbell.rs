//! Doorbell areas and how they are rung (docs/device.md, 4.1).

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use virtio_rdma::area::DoorbellLayout;
use vmm_sys_util::eventfd::EventFd;

use super::Result;
use super::mem::{Buf, GuestMemory, Placement, Word32, Word64};

/// The area of one doorbell queue.
#[derive(Debug)]
pub struct DoorbellArea {
    buf: Buf,
    layout: DoorbellLayout,
    sleeping: Word32,
    kick: EventFd,
}

impl DoorbellArea {
    /// An area of `num` doorbells whose queue is notified through `kick`.
    pub fn new(memory: &GuestMemory, num: u32, kick: EventFd, placement: Placement) -> Result<Self> {
        let layout = DoorbellLayout::new(num);
        let buf = memory.alloc(layout.size(), placement)?;
        let sleeping = buf.word32(DoorbellLayout::SLEEPING);
        Ok(Self { buf, layout, sleeping, kick })
    }

    /// Its memory.
    pub fn buf(&self) -> &Buf {
        &self.buf
    }

    /// Whether the device has said that it sleeps.
    pub fn device_sleeps(&self) -> bool {
        self.sleeping.load(SeqCst) != 0
    }

    /// Notifies the queue without setting a bit.
    pub fn kick(&self) {
        let _ = self.kick.write(1);
    }

    /// Doorbell number `d` of an area.
    pub fn doorbell(area: &Arc<Self>, d: u32) -> Doorbell {
        let (word, bit) = (d as usize / 64, d % 64);
        let summary = DoorbellLayout::SUMMARY + word / 64 * 8;
        Doorbell {
            word: area.buf.word64(area.layout.bitmap() + word * 8),
            bit: 1 << bit,
            summary: area.buf.word64(summary),
            summary_bit: 1 << (word % 64),
            area: Arc::clone(area),
        }
    }
}

/// The doorbell of one QP.
#[derive(Debug)]
pub struct Doorbell {
    word: Word64,
    bit: u64,
    summary: Word64,
    summary_bit: u64,
    area: Arc<DoorbellArea>,
}

impl Doorbell {
    /// Tells the device that there is work; a system call only if it sleeps.
    #[inline]
    pub fn ring(&self) {
        // A bit that is still set was set by an earlier call of the same poster, which completed step 2. The device exchanges
        // the summary before the bitmap: either it has still to take the bit, or the summary bit is still there.
        if self.word.fetch_or(self.bit, SeqCst) & self.bit == 0 {
            self.summary.fetch_or(self.summary_bit, SeqCst);
        }
        if self.area.sleeping.load(SeqCst) != 0 {
            self.area.kick();
        }
    }

    /// The area that it is in.
    pub fn area(&self) -> &DoorbellArea {
        &self.area
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area() -> (Arc<DoorbellArea>, EventFd) {
        let memory = GuestMemory::flat(4 << 20).unwrap();
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let ours = kick.try_clone().unwrap();
        let area = DoorbellArea::new(&memory, 64 * 1024, ours, Placement::Fragmented).unwrap();
        (Arc::new(area), kick)
    }

    #[test]
    fn rings_both_levels() {
        let (area, kick) = area();
        let d = 4096 * 3 + 64 * 5 + 7;
        DoorbellArea::doorbell(&area, d).ring();
        assert_eq!(area.buf.word64(64 + 3 * 8).load(SeqCst), 1 << 5);
        assert_eq!(area.buf.word64(area.layout.bitmap() + (d as usize / 64) * 8).load(SeqCst), 1 << 7);
        assert!(kick.read().is_err());
    }

    #[test]
    fn kicks_a_sleeping_device() {
        let (area, kick) = area();
        area.sleeping.store(1, SeqCst);
        DoorbellArea::doorbell(&area, 0).ring();
        assert_eq!(kick.read().unwrap(), 1);
        assert!(area.device_sleeps());
    }
}
