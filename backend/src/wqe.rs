//! Work requests as the engine knows them, whatever ring format they came in.

use virtio_rdma::ib::{SendFlags, WcOpcode, WrOpcode};

use crate::key_table::Bind;
use crate::mem::AtomicOp;
use crate::profile::Profile;

/// What is wrong with a ring element. The guest sees `IBV_WC_LOC_QP_OP_ERR`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Not an operation, or not one of this transport.
    #[error("opcode {0} is not offered on this QP")]
    Opcode(u32),
    /// More SGEs than the queue was created for.
    #[error("{0} SGEs are more than the queue has")]
    SgeCount(u32),
    /// More inline data than the queue was created for.
    #[error("{0} bytes of inline data are more than the queue has")]
    InlineTooLong(u32),
}

/// One scatter/gather element (IBA 10.8.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sge {
    /// Address in the region's own addresses.
    pub addr: u64,
    /// Bytes.
    pub length: u32,
    /// Key of the region.
    pub lkey: u32,
}

/// A short list of SGEs without a heap allocation.
#[derive(Debug, Clone)]
pub struct SgeList {
    len: usize,
    sges: [Sge; Self::CAPACITY],
}

impl SgeList {
    /// Most SGEs of any profile.
    pub const CAPACITY: usize = 32;

    /// Forgets all.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends one; the parser has checked that there is room.
    pub fn push(&mut self, sge: Sge) {
        self.sges[self.len] = sge;
        self.len += 1;
    }

    /// The SGEs.
    pub fn as_slice(&self) -> &[Sge] {
        &self.sges[..self.len]
    }

    /// Bytes of all.
    pub fn total(&self) -> u64 {
        self.as_slice().iter().map(|s| u64::from(s.length)).sum()
    }
}

impl Default for SgeList {
    fn default() -> Self {
        Self { len: 0, sges: [Sge::default(); Self::CAPACITY] }
    }
}

/// What a send work request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Op {
    /// Nothing yet: a work request that did not parse.
    #[default]
    Invalid,
    /// SEND on a connected QP.
    Send {
        /// With immediate data.
        imm: bool,
    },
    /// SEND on a UD QP.
    Datagram {
        /// With immediate data.
        imm: bool,
        /// Destination QP number.
        qpn: u32,
        /// `Q_Key` of the request.
        qkey: u32,
        /// Address handle.
        ah: u32,
    },
    /// SEND that makes a key of the peer's free once it has arrived.
    SendInvalidate {
        /// The key.
        rkey: u32,
    },
    /// RDMA WRITE.
    Write {
        /// With immediate data.
        imm: bool,
        /// First byte at the peer.
        remote_addr: u64,
        /// Key of the peer's region.
        rkey: u32,
    },
    /// RDMA READ.
    Read {
        /// First byte at the peer.
        remote_addr: u64,
        /// Key of the peer's region.
        rkey: u32,
    },
    /// Atomic on a word of the peer; its old value comes back.
    Atomic {
        /// The word.
        remote_addr: u64,
        /// Key of the peer's region.
        rkey: u32,
        /// What to do with it.
        action: AtomicOp,
    },
    /// Stores one word at the peer, as one.
    AtomicWrite {
        /// The word.
        remote_addr: u64,
        /// Key of the peer's region.
        rkey: u32,
    },
    /// Has earlier WRITEs become visible, which they are.
    Flush(Flush),
    /// What needs no peer.
    Local(LocalOp),
}

/// What a FLUSH names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flush {
    /// First byte at the peer.
    pub remote_addr: u64,
    /// Bytes.
    pub length: u32,
    /// Key of the peer's region.
    pub rkey: u32,
    /// Persistence is asked for, which is not offered.
    pub persistent: bool,
    /// The whole region is meant.
    pub whole: bool,
}

/// What needs no peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalOp {
    /// Makes this key free.
    Invalidate(u32),
    /// Binds a window.
    Bind(Bind),
    /// Gives a region memory.
    Register(FastReg),
}

/// What a region is registered with, as the guest wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FastReg {
    /// Guest-physical address of the extents.
    pub extents: u64,
    /// Address of the first byte.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// New key.
    pub key: u32,
    /// Access bits.
    pub access: u32,
    /// Number of extents.
    pub num_extents: u32,
}

impl Op {
    /// Whether the request carries bytes away from the requester.
    pub fn sends_payload(self) -> bool {
        self.takes_receive() || matches!(self, Self::Write { .. } | Self::AtomicWrite { .. })
    }

    /// Whether the responder has to keep something for it (IBA 9.7.4.1.2): READs and atomics.
    pub fn takes_resource(self) -> bool {
        self.fetches() || matches!(self, Self::AtomicWrite { .. })
    }

    /// Whether UC knows it.
    pub fn is_for_uc(self) -> bool {
        matches!(self, Self::Send { .. } | Self::Write { .. })
    }

    /// Whether bytes come back to the requester's buffers.
    pub fn fetches(self) -> bool {
        matches!(self, Self::Read { .. } | Self::Atomic { .. })
    }

    /// Whether it takes a receive at the peer.
    pub fn takes_receive(self) -> bool {
        matches!(
            self,
            Self::Send { .. } | Self::SendInvalidate { .. } | Self::Datagram { .. } | Self::Write { imm: true, .. }
        )
    }
}

/// A send work request.
#[derive(Debug, Clone, Default)]
pub struct Send {
    /// Of the application; comes back in the completion.
    pub wr_id: u64,
    /// What to do.
    pub op: Op,
    /// How the guest encoded `op`, for the completion of a request that did not parse.
    pub wire_opcode: u32,
    /// Modifiers.
    pub flags: SendFlags,
    /// Immediate data as it stands in memory.
    pub imm: u32,
    /// Payload, unless inline.
    pub sges: SgeList,
    /// Inline payload.
    pub inline: Vec<u8>,
    /// Bytes of payload.
    pub length: u64,
}

impl Send {
    /// Whether its payload is in [`inline`](Self::inline).
    pub fn is_inline(&self) -> bool {
        let always = matches!(self.op, Op::AtomicWrite { .. });
        always || (self.flags.contains(SendFlags::INLINE) && self.op.sends_payload())
    }

    /// How many keys or extents are looked up for it.
    pub fn lookups(&self) -> usize {
        match self.op {
            // With more it is refused.
            Op::Local(LocalOp::Register(args)) => args.num_extents.min(Profile::FAST_REG_EXTENTS) as usize,
            _ => self.sges.as_slice().len(),
        }
    }

    /// The opcode that its completion names.
    pub fn completion_opcode(&self) -> WcOpcode {
        match WrOpcode::from_wire(self.wire_opcode) {
            Some(WrOpcode::RdmaWrite | WrOpcode::RdmaWriteWithImm) => WcOpcode::RdmaWrite,
            Some(WrOpcode::RdmaRead) => WcOpcode::RdmaRead,
            Some(WrOpcode::AtomicCmpAndSwp) => WcOpcode::CompSwap,
            Some(WrOpcode::AtomicFetchAndAdd) => WcOpcode::FetchAdd,
            Some(WrOpcode::AtomicWrite) => WcOpcode::AtomicWrite,
            Some(WrOpcode::Flush) => WcOpcode::Flush,
            Some(WrOpcode::BindMw) => WcOpcode::BindMw,
            Some(WrOpcode::LocalInv) => WcOpcode::LocalInv,
            Some(WrOpcode::RegMr) => WcOpcode::RegMr,
            _ => WcOpcode::Send,
        }
    }
}

/// A receive work request.
#[derive(Debug, Clone, Default)]
pub struct Recv {
    /// Of the application; comes back in the completion.
    pub wr_id: u64,
    /// The buffers.
    pub sges: SgeList,
}
