//! Elements of format 0, the one of Linux's stock rxe provider, parsed into the engine's own work requests.

use std::mem::offset_of;

use virtio_rdma::ib::{SendFlags, WrOpcode};
use virtio_rdma::ring::{
    ATOMIC_WRITE_SIZE, AtomicPart, BindMwPart, DmaInfo, FlushPart, RdmaPart, RecvWqe as RawRecv, RegMrPart,
    SendWqe as RawSend, Sge as RawSge, UdPart,
};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::Ring;
use crate::key_table::Bind;
use crate::mem::AtomicOp;
use crate::wqe::{FastReg, Flush, LocalOp, Op, ParseError, Recv, Send, Sge, SgeList};

const SEND_SIZE: usize = size_of::<RawSend>();
/// End of what is used of the request: the largest of the parts that [`operation`] reads.
const REQUEST_END: usize = offset_of!(RawSend, wr) + size_of::<RegMrPart>();
/// Start of what is used of the payload's description; what is before it, inline data alone need.
const NUM_SGE: usize = offset_of!(RawSend, dma) + offset_of!(DmaInfo, num_sge);
/// From there to the end of the first SGE: for most requests that and the start are all.
const TAIL: usize = SEND_SIZE + size_of::<RawSge>() - NUM_SGE;
const INLINE_LENGTH: usize = offset_of!(RawSend, dma) + offset_of!(DmaInfo, length);
/// Bytes that an atomic works on.
const ATOMIC_SIZE: u64 = 8;
const RECV_SIZE: usize = size_of::<RawRecv>();
/// A receive with one SGE, as most have. An element has room for that even where the queue has none: its size is a power of two.
const RECV_WITH_SGE: usize = RECV_SIZE + size_of::<RawSge>();

/// What a queue promised at creation; elements are held to it.
#[derive(Debug, Clone, Copy)]
pub struct Caps {
    /// Most SGEs of a work request.
    pub max_sge: u32,
    /// Most bytes of inline data.
    pub max_inline: u32,
    /// Whether it is a datagram queue: SENDs name their destination.
    pub datagram: bool,
    /// Whether the guest's kernel alone writes the ring: work requests may name guest-physical memory.
    pub kernel: bool,
}

impl Caps {
    /// Bytes that a send element needs.
    pub fn send_element(self) -> usize {
        SEND_SIZE + (self.max_sge as usize * size_of::<RawSge>()).max(self.max_inline as usize)
    }

    /// Bytes that a receive element needs.
    pub fn recv_element(self) -> usize {
        RECV_SIZE + self.max_sge as usize * size_of::<RawSge>()
    }
}

/// Copies the send element `index` and parses the copy into `wqe`.
///
/// # Errors
/// What is wrong with it; `wqe.wr_id` and `wqe.flags` are set all the same, for the completion that says so.
pub fn parse_send(ring: &Ring, index: u32, caps: Caps, wqe: &mut Send) -> Result<(), ParseError> {
    let mut raw = RawSend::new_zeroed();
    let bytes = raw.as_mut_bytes();
    // Only what is used is copied: every cache line of the ring was last written by another core.
    ring.read(index, 0, &mut bytes[..REQUEST_END]);
    wqe.wr_id = raw.wr_id.get();
    wqe.flags = SendFlags::from_bits_truncate(raw.send_flags.get());
    wqe.imm = raw.imm_data.get();
    wqe.wire_opcode = raw.opcode.get();
    wqe.length = 0;
    wqe.sges.clear();
    wqe.inline.clear();
    wqe.op = operation(&raw, caps)?;
    if wqe.is_inline() && !matches!(wqe.op, Op::AtomicWrite { .. }) {
        let mut len = [0; size_of::<u32>()];
        ring.read(index, INLINE_LENGTH, &mut len);
        let len = u32::from_le_bytes(len);
        if len > caps.max_inline {
            return Err(ParseError::InlineTooLong(len));
        }
        wqe.inline.resize(len as usize, 0);
        ring.read(index, SEND_SIZE, &mut wqe.inline);
        wqe.length = u64::from(len);
        return Ok(());
    }
    match wqe.op {
        Op::Local(_) | Op::Flush(_) => return Ok(()),
        Op::AtomicWrite { .. } => {
            wqe.inline.resize(ATOMIC_WRITE_SIZE, 0);
            ring.read(index, SEND_SIZE, &mut wqe.inline);
            wqe.length = ATOMIC_WRITE_SIZE as u64;
            return Ok(());
        }
        _ => {}
    }
    read_send_sges(ring, index, caps.max_sge, &mut wqe.sges)?;
    wqe.length = if let Op::Atomic { .. } = wqe.op { ATOMIC_SIZE } else { wqe.sges.total() };
    Ok(())
}

/// Copies the receive element `index` and parses the copy into `wqe`.
///
/// # Errors
/// What is wrong with it; `wqe.wr_id` is set all the same.
pub fn parse_recv(ring: &Ring, index: u32, caps: Caps, wqe: &mut Recv) -> Result<(), ParseError> {
    let mut bytes = [0; RECV_WITH_SGE];
    ring.read(index, 0, &mut bytes);
    let (raw, first) = split_recv(&bytes);
    wqe.wr_id = raw.wr_id.get();
    wqe.sges.clear();
    let num = raw.dma.num_sge.get();
    if num == 1 && caps.max_sge > 0 {
        wqe.sges.push(parse_sge(&first));
        return Ok(());
    }
    read_sges(ring, index, RECV_SIZE, num, caps.max_sge, &mut wqe.sges)
}

fn split_recv(bytes: &[u8; RECV_WITH_SGE]) -> (RawRecv, RawSge) {
    let (raw, rest) = RawRecv::read_from_prefix(bytes).expect("longer than the request");
    (raw, RawSge::read_from_bytes(rest).expect("the rest is an SGE"))
}

fn operation(raw: &RawSend, caps: Caps) -> Result<Op, ParseError> {
    let code = raw.opcode.get();
    let op = WrOpcode::from_wire(code).ok_or(ParseError::Opcode(code))?;
    let rdma = || {
        let (part, _) = RdmaPart::read_from_prefix(&raw.wr).expect("a part is smaller than the union");
        (part.remote_addr.get(), part.rkey.get())
    };
    Ok(match op {
        WrOpcode::Send | WrOpcode::SendWithImm if caps.datagram => {
            let (ud, _) = UdPart::read_from_prefix(&raw.wr).expect("a part is smaller than the union");
            Op::Datagram {
                imm: op == WrOpcode::SendWithImm,
                qpn: ud.remote_qpn.get(),
                qkey: ud.remote_qkey.get(),
                ah: ud.ah_num.get(),
            }
        }
        _ if caps.datagram => return Err(ParseError::Opcode(code)),
        WrOpcode::Send | WrOpcode::SendWithImm => Op::Send { imm: op == WrOpcode::SendWithImm },
        WrOpcode::RdmaWrite | WrOpcode::RdmaWriteWithImm => {
            let (remote_addr, rkey) = rdma();
            Op::Write { imm: op == WrOpcode::RdmaWriteWithImm, remote_addr, rkey }
        }
        WrOpcode::RdmaRead => {
            let (remote_addr, rkey) = rdma();
            Op::Read { remote_addr, rkey }
        }
        WrOpcode::AtomicCmpAndSwp | WrOpcode::AtomicFetchAndAdd => atomic(op, &raw.wr),
        WrOpcode::AtomicWrite => {
            let (remote_addr, rkey) = rdma();
            Op::AtomicWrite { remote_addr, rkey }
        }
        WrOpcode::Flush => Op::Flush(flush(&raw.wr)),
        WrOpcode::SendWithInv => Op::SendInvalidate { rkey: raw.imm_data.get() },
        WrOpcode::LocalInv => Op::Local(LocalOp::Invalidate(raw.imm_data.get())),
        WrOpcode::BindMw => Op::Local(LocalOp::Bind(bind(&raw.wr))),
        WrOpcode::RegMr if caps.kernel => Op::Local(LocalOp::Register(register(&raw.wr))),
        WrOpcode::RegMr => return Err(ParseError::Opcode(code)),
    })
}

/// The start of the union by opcode.
fn part<T: FromBytes + KnownLayout + Immutable>(union: &[u8]) -> T {
    let (part, _) = T::read_from_prefix(union).expect("a part is no longer than the union");
    part
}

fn flush(union: &[u8]) -> Flush {
    const PERSISTENT: u8 = 2;
    let part: FlushPart = part(union);
    Flush {
        remote_addr: part.remote_addr.get(),
        length: part.length.get(),
        rkey: part.rkey.get(),
        persistent: part.placement & PERSISTENT != 0,
        whole: part.selectivity != 0,
    }
}

fn bind(union: &[u8]) -> Bind {
    let part: BindMwPart = part(union);
    Bind {
        window: part.mw_rkey.get(),
        key: part.rkey.get(),
        region: part.mr_lkey.get(),
        addr: part.addr.get(),
        length: part.length.get(),
        access: part.access.get(),
    }
}

fn register(union: &[u8]) -> FastReg {
    let part: RegMrPart = part(union);
    FastReg {
        extents: part.extents.get(),
        iova: part.iova.get(),
        length: part.length.get(),
        key: part.key.get(),
        access: part.access.get(),
        num_extents: part.num_extents.get(),
    }
}

fn atomic(op: WrOpcode, part: &[u8]) -> Op {
    let (part, _) = AtomicPart::read_from_prefix(part).expect("a part is no longer than the union");
    let action = if op == WrOpcode::AtomicCmpAndSwp {
        AtomicOp::CompareSwap { compare: part.compare_add.get(), swap: part.swap.get() }
    } else {
        AtomicOp::FetchAdd(part.compare_add.get())
    };
    Op::Atomic { remote_addr: part.remote_addr.get(), rkey: part.rkey.get(), action }
}

/// The keys that a send element seems to name: the peer's and one's own, the first of each. Not checked, and good for nothing but to have
/// fetched what will be looked up.
#[inline]
pub fn guess_keys(ring: &Ring, index: u32) -> (u32, u32) {
    let word = |offset| {
        let mut bytes = [0; size_of::<u32>()];
        ring.read(index, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    (word(offset_of!(RawSend, wr) + offset_of!(RdmaPart, rkey)), word(SEND_SIZE + offset_of!(RawSge, lkey)))
}

/// Has the lines of a send element that [`parse_send`] reads fetched.
pub fn prefetch_send(ring: &Ring, index: u32) {
    ring.prefetch(index, 0);
    ring.prefetch(index, NUM_SGE);
}

fn read_send_sges(ring: &Ring, index: u32, max: u32, out: &mut SgeList) -> Result<(), ParseError> {
    // An element has room for the first SGE even where the queue has none: its size is a power of two.
    let mut tail = [0; TAIL];
    ring.read(index, NUM_SGE, &mut tail);
    let (num, rest) = tail.split_at(size_of::<u32>());
    let num = u32::from_le_bytes(num.try_into().expect("four bytes"));
    if num == 1 && max > 0 {
        let (_, sge) = RawSge::read_from_suffix(rest).expect("the tail ends with an SGE");
        out.push(parse_sge(&sge));
        return Ok(());
    }
    read_sges(ring, index, SEND_SIZE, num, max, out)
}

fn parse_sge(sge: &RawSge) -> Sge {
    Sge { addr: sge.addr.get(), length: sge.length.get(), lkey: sge.lkey.get() }
}

fn read_sges(ring: &Ring, index: u32, at: usize, num: u32, max: u32, out: &mut SgeList) -> Result<(), ParseError> {
    if num > max {
        return Err(ParseError::SgeCount(num));
    }
    for i in 0..num as usize {
        let mut sge = RawSge::new_zeroed();
        ring.read(index, at + i * size_of::<RawSge>(), sge.as_mut_bytes());
        out.push(parse_sge(&sge));
    }
    Ok(())
}
