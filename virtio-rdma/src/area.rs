//! Memory that the driver owns and shares with the device: doorbells, CQ arm words and address handles.
//!
//! The areas are guest pages that no user process maps. The driver gives them to the device with
//! [`SET_AREA`](crate::ctrl::SetArea) as page-aligned extents; offsets below are offsets into the extents laid end to end.

use zerocopy::little_endian::{U16, U32};

use crate::ib::wire_enum;
use crate::wire::wire;

wire_enum! {
    /// Which area a `SET_AREA` describes.
    AreaKind: u16 {
        /// Doorbells of one worker; `index` is the doorbell queue, counted from 0.
        Doorbell = 0,
        /// Arm words of all CQs.
        CqArm = 1,
        /// Address handles.
        AddressHandle = 2,
    }
}

/// Where things are in a doorbell area for `num` doorbells.
///
/// A doorbell is a bit. The driver sets the bit in the bitmap, then the bit of its word in the
/// summary, both with a full barrier, then reads [`sleeping`](Self::SLEEPING) and notifies the doorbell queue if that
/// is not zero. The device takes summary words and then bitmap words by exchanging them with zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DoorbellLayout {
    num: u32,
}

impl DoorbellLayout {
    /// Offset of the 32-bit word that the device sets to 1 before it sleeps and to 0 when it polls.
    pub const SLEEPING: usize = 0;
    /// Offset of the summary: 64-bit words, bit `i` of which covers bitmap word `i`.
    pub const SUMMARY: usize = 64;

    /// The layout for this many doorbells (the device's `max_doorbells`, a multiple of 64).
    pub const fn new(num: u32) -> Self {
        Self { num }
    }

    /// Number of 64-bit words in the bitmap.
    pub const fn bitmap_words(self) -> usize {
        (self.num as usize).div_ceil(64)
    }

    /// Number of 64-bit words in the summary.
    pub const fn summary_words(self) -> usize {
        self.bitmap_words().div_ceil(64)
    }

    /// Offset of the bitmap: the next multiple of 64 after the summary.
    pub const fn bitmap(self) -> usize {
        Self::SUMMARY + (self.summary_words() * 8).next_multiple_of(64)
    }

    /// Bytes needed, before rounding up to pages.
    pub const fn size(self) -> usize {
        self.bitmap() + self.bitmap_words() * 8
    }
}

/// Value of an arm word: no event is wanted.
pub const ARM_NONE: u32 = 0;
/// Value of an arm word: an event is wanted for the next solicited completion or error.
pub const ARM_SOLICITED: u32 = 1;
/// Value of an arm word: an event is wanted for the next completion.
pub const ARM_NEXT: u32 = 2;
/// Bytes of one arm word; that of CQ `n` is at `n * ARM_STRIDE`.
pub const ARM_STRIDE: usize = 4;

/// Bytes of one address handle record; that of handle `n` is at `n * AH_STRIDE`.
pub const AH_STRIDE: usize = 64;
/// Bit of [`AddressHandle::flags`]: the record is in use.
pub const AH_VALID: u8 = 1;

wire! {
    /// One address handle (IBA 11.2.2.1). Handle 0 is never used.
    AddressHandle = "virtio_rdma_ah", 64 {
        /// [`AH_VALID`]; the driver writes it last, and clears it first.
        flags: u8,
        /// Port, 1.
        port_num: u8,
        /// Index of the source GID.
        sgid_index: U16,
        /// The protection domain that it belongs to.
        pdn: U32,
        /// Destination GID.
        dgid: [u8; 16],
        /// Flow label of the GRH.
        flow_label: U32,
        /// Hop limit of the GRH.
        hop_limit: u8,
        /// Traffic class of the GRH.
        traffic_class: u8,
        /// Service level.
        sl: u8,
        /// Zero.
        reserved0: u8,
        /// Zero.
        reserved1: [u8; 32],
    }
}
