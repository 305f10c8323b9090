//! Work requests and how they are written into rings (format 0, rxe's).

use virtio_rdma::ib::{SendFlags, WrOpcode};
use virtio_rdma::ring::{AtomicPart, BindMwPart, DmaInfo, FlushPart, RdmaPart, RecvWqe, RegMrPart, SendWqe, UdPart};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::mw::Bind;
use crate::guest::mem::Slot;

/// A local scatter/gather element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sge {
    /// Address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Key.
    pub lkey: u32,
}

/// Memory of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remote {
    /// Address.
    pub addr: u64,
    /// Key.
    pub rkey: u32,
}

/// What is sent.
#[derive(Debug, Clone, Copy)]
pub enum Payload<'a> {
    /// What these elements name.
    Sges(&'a [Sge]),
    /// These bytes, within the WQE.
    Inline(&'a [u8]),
}

/// Bytes of the union by opcode that the device reads.
pub const PART: usize = size_of::<RegMrPart>();

/// What a work request does.
#[derive(Debug, Clone, Copy)]
pub enum Op {
    /// RDMA WRITE.
    Write(Remote),
    /// RDMA WRITE with immediate.
    WriteImm(Remote, u32),
    /// RDMA READ.
    Read(Remote),
    /// Stores the second value if the word is the first.
    CompareSwap(Remote, u64, u64),
    /// Adds.
    FetchAdd(Remote, u64),
    /// SEND of a connected QP.
    Send,
    /// SEND with immediate of a connected QP.
    SendImm(u32),
    /// SEND that invalidates a key of the peer's.
    SendInv(u32),
    /// Invalidates a key.
    LocalInv(u32),
    /// Binds a window.
    BindMw(Bind),
    /// Fast registration.
    RegMr {
        /// Guest-physical address of the extents.
        list: u64,
        /// How many.
        num_extents: u32,
        /// Address of the first byte.
        iova: u64,
        /// Bytes.
        length: u64,
        /// New key.
        key: u32,
        /// Access bits.
        access: u32,
    },
    /// ATOMIC WRITE; the word is inline payload.
    AtomicWrite(Remote),
    /// FLUSH of so many bytes, with placement and selectivity.
    Flush(Remote, u32, u8, u8),
    /// SEND of a UD QP.
    UdSend {
        /// Address handle.
        ah: u32,
        /// The peer's QP number.
        qpn: u32,
        /// `Q_Key`.
        qkey: u32,
        /// Immediate data.
        imm: Option<u32>,
    },
    /// Any opcode, with the start of the union by opcode.
    Raw(u32, [u8; PART]),
}

/// A send work request.
#[derive(Debug, Clone, Copy)]
pub struct SendWr<'a> {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// What it does.
    pub op: Op,
    /// With what.
    pub payload: Payload<'a>,
    /// How.
    pub flags: SendFlags,
}

impl<'a> SendWr<'a> {
    /// A signalled request over scatter/gather elements.
    pub fn new(wr_id: u64, op: Op, sges: &'a [Sge]) -> Self {
        Self { wr_id, op, payload: Payload::Sges(sges), flags: SendFlags::SIGNALED }
    }

    /// A signalled request with its bytes inline.
    pub fn inline(wr_id: u64, op: Op, bytes: &'a [u8]) -> Self {
        Self { wr_id, op, payload: Payload::Inline(bytes), flags: SendFlags::SIGNALED }
    }

    /// With these flags instead.
    #[must_use]
    pub fn flags(self, flags: SendFlags) -> Self {
        Self { flags, ..self }
    }
}

/// First bytes of a `rxe_send_wqe`: all that the device reads of it but the payload.
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct Head {
    wr_id: U64,
    reserved: U32,
    opcode: U32,
    send_flags: U32,
    imm_data: U32,
    wr: [u8; PART],
}

/// `dma` and the first element, for the common case.
#[derive(IntoBytes, Immutable)]
#[repr(C, packed)]
struct Tail {
    dma: DmaInfo,
    sge: virtio_rdma::ring::Sge,
}

const DMA: usize = std::mem::offset_of!(SendWqe, dma);
const DATA: usize = size_of::<SendWqe>();
const _: () = assert!(size_of::<Head>() == std::mem::offset_of!(SendWqe, wr) + PART);
const _: () = assert!(DMA + size_of::<DmaInfo>() == DATA);

/// Writes a send work request into its place; panics when it does not fit.
#[inline]
pub(super) fn write_send(slot: Slot<'_>, wr: &SendWr<'_>) {
    let (opcode, imm, part) = encode(wr.op);
    let mut flags = wr.flags.bits();
    match wr.payload {
        Payload::Sges([only]) => {
            let dma = dma(only.len, 1);
            slot.put(DMA, &Tail { dma, sge: wire_sge(only) });
        }
        Payload::Sges(sges) => {
            slot.put(DMA, &dma(total(sges), sges.len() as u32));
            write_sges(slot, DATA, sges);
        }
        Payload::Inline(bytes) => {
            flags |= SendFlags::INLINE.bits();
            slot.put(DMA, &dma(bytes.len() as u32, 0));
            slot.put_bytes(DATA, bytes);
        }
    }
    let head = Head {
        wr_id: wr.wr_id.into(),
        reserved: 0.into(),
        opcode: opcode.into(),
        send_flags: flags.into(),
        imm_data: imm.into(),
        wr: part,
    };
    slot.put(0, &head);
}

/// Writes a receive work request into its place; panics when it does not fit.
#[inline]
pub(super) fn write_recv(slot: Slot<'_>, wr_id: u64, sges: &[Sge]) {
    let dma = dma(total(sges), sges.len() as u32);
    slot.put(0, &RecvWqe { wr_id: wr_id.into(), reserved: 0.into(), padding: 0.into(), dma });
    write_sges(slot, size_of::<RecvWqe>(), sges);
}

/// Opcode, immediate data and the union by opcode.
#[inline]
fn encode(op: Op) -> (u32, u32, [u8; PART]) {
    let rdma = |r: Remote| -> [u8; PART] {
        let part = RdmaPart { remote_addr: r.addr.into(), rkey: r.rkey.into(), reserved: 0.into() };
        padded(part.as_bytes())
    };
    let atomic = |r: Remote, compare_add: u64, swap: u64| -> [u8; PART] {
        let part = AtomicPart {
            remote_addr: r.addr.into(),
            compare_add: compare_add.into(),
            swap: swap.into(),
            rkey: r.rkey.into(),
            reserved: 0.into(),
        };
        padded(part.as_bytes())
    };
    match op {
        Op::Write(r) => (WrOpcode::RdmaWrite.to_wire(), 0, rdma(r)),
        Op::WriteImm(r, imm) => (WrOpcode::RdmaWriteWithImm.to_wire(), imm, rdma(r)),
        Op::Read(r) => (WrOpcode::RdmaRead.to_wire(), 0, rdma(r)),
        Op::CompareSwap(r, compare, swap) => (WrOpcode::AtomicCmpAndSwp.to_wire(), 0, atomic(r, compare, swap)),
        Op::FetchAdd(r, add) => (WrOpcode::AtomicFetchAndAdd.to_wire(), 0, atomic(r, add, 0)),
        Op::Send => (WrOpcode::Send.to_wire(), 0, [0; PART]),
        Op::SendImm(imm) => (WrOpcode::SendWithImm.to_wire(), imm, [0; PART]),
        Op::SendInv(rkey) => (WrOpcode::SendWithInv.to_wire(), rkey, [0; PART]),
        Op::LocalInv(rkey) => (WrOpcode::LocalInv.to_wire(), rkey, [0; PART]),
        Op::BindMw(bind) => (WrOpcode::BindMw.to_wire(), 0, padded(bind_part(&bind).as_bytes())),
        Op::RegMr { list, num_extents, iova, length, key, access } => {
            let part = RegMrPart {
                extents: list.into(),
                iova: iova.into(),
                length: length.into(),
                key: key.into(),
                access: access.into(),
                num_extents: num_extents.into(),
                reserved: 0.into(),
            };
            (WrOpcode::RegMr.to_wire(), 0, padded(part.as_bytes()))
        }
        Op::AtomicWrite(r) => (WrOpcode::AtomicWrite.to_wire(), 0, rdma(r)),
        Op::Flush(r, length, placement, selectivity) => {
            let (remote_addr, rkey, length) = (r.addr.into(), r.rkey.into(), length.into());
            let part = FlushPart { remote_addr, length, rkey, placement, selectivity, ..FlushPart::default() };
            (WrOpcode::Flush.to_wire(), 0, padded(part.as_bytes()))
        }
        Op::UdSend { ah, qpn, qkey, imm } => {
            let opcode = if imm.is_some() { WrOpcode::SendWithImm } else { WrOpcode::Send };
            let part = UdPart {
                remote_qpn: qpn.into(),
                remote_qkey: qkey.into(),
                pkey_index: U16::ZERO,
                reserved: U16::ZERO,
                ah_num: ah.into(),
            };
            (opcode.to_wire(), imm.unwrap_or(0), padded(part.as_bytes()))
        }
        Op::Raw(opcode, part) => (opcode, 0, part),
    }
}

fn bind_part(bind: &Bind) -> BindMwPart {
    BindMwPart {
        addr: bind.addr.into(),
        length: bind.length.into(),
        mr_lkey: bind.region.into(),
        mw_rkey: bind.window.into(),
        rkey: bind.key.into(),
        access: bind.access.bits().into(),
    }
}

fn padded(part: &[u8]) -> [u8; PART] {
    let mut whole = [0; PART];
    whole[..part.len()].copy_from_slice(part);
    whole
}

fn dma(length: u32, num_sge: u32) -> DmaInfo {
    DmaInfo { length: length.into(), resid: length.into(), num_sge: num_sge.into(), ..DmaInfo::default() }
}

fn total(sges: &[Sge]) -> u32 {
    sges.iter().fold(0u32, |sum, sge| sum.wrapping_add(sge.len))
}

fn wire_sge(sge: &Sge) -> virtio_rdma::ring::Sge {
    virtio_rdma::ring::Sge { addr: sge.addr.into(), length: sge.len.into(), lkey: sge.lkey.into() }
}

fn write_sges(slot: Slot<'_>, at: usize, sges: &[Sge]) {
    for (i, sge) in sges.iter().enumerate() {
        slot.put(at + 16 * i, &wire_sge(sge));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromBytes;

    #[test]
    fn writes_what_the_abi_says() {
        let mut bytes = [0xff; 256];
        let sge = Sge { addr: 0x1000, len: 64, lkey: 7 };
        let wr = SendWr::new(5, Op::WriteImm(Remote { addr: 0x2000, rkey: 9 }, 0xabcd), &[]);
        write_send(Slot::over(&mut bytes), &SendWr { payload: Payload::Sges(&[sge]), ..wr });
        let (wqe, rest) = SendWqe::read_from_prefix(&bytes).unwrap();
        assert_eq!((wqe.wr_id.get(), wqe.opcode.get(), wqe.imm_data.get()), (5, 1, 0xabcd));
        assert_eq!(wqe.send_flags.get(), SendFlags::SIGNALED.bits());
        let (rdma, _) = RdmaPart::read_from_prefix(&wqe.wr).unwrap();
        assert_eq!((rdma.remote_addr.get(), rdma.rkey.get()), (0x2000, 9));
        assert_eq!((wqe.dma.length.get(), wqe.dma.num_sge.get()), (64, 1));
        let (back, _) = virtio_rdma::ring::Sge::read_from_prefix(rest).unwrap();
        assert_eq!((back.addr.get(), back.length.get(), back.lkey.get()), (0x1000, 64, 7));
    }

    #[test]
    fn inline_bytes_follow() {
        let mut bytes = [0xff; 256];
        write_send(Slot::over(&mut bytes), &SendWr::inline(1, Op::Send, b"hello"));
        let (wqe, rest) = SendWqe::read_from_prefix(&bytes).unwrap();
        assert_eq!(wqe.send_flags.get(), (SendFlags::SIGNALED | SendFlags::INLINE).bits());
        assert_eq!((wqe.dma.length.get(), &rest[..5]), (5, &b"hello"[..]));
    }
}
