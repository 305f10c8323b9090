//! How frames lie in the stream: little-endian, no padding, sizes asserted (`docs/tcp.md`, section 3).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

macro_rules! layout {
    ($name:ident = $size:literal { $($field:ident: $type:ty,)* }) => {
        #[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub(super) struct $name { $(pub(super) $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size && $size + super::HEAD <= super::MAX_HEADER);
    };
}

layout!(Head = 8 { kind: u8, reserved: u8, body: U16, payload: U32, });

layout!(Hello = 104 {
    magic: U32,
    oldest: U16,
    newest: U16,
    lane: U16,
    lanes: U16,
    reserved: U32,
    host: [u8; 16],
    peer: [u8; 16],
    epoch: U64,
    generation: U64,
    ticket: [u8; 32],
    reserved_2: U64,
});

layout!(Open = 72 {
    flow: U64,
    incarnation: U64,
    source: [u8; 16],
    destination: [u8; 16],
    source_qpn: U32,
    destination_qpn: U32,
    psn: U32,
    tenant: U32,
    transport: u8,
    depth: u8,
    reserved: [u8; 6],
});

layout!(Opened = 24 { flow: U64, incarnation: U64, depth: u8, reserved: [u8; 7], });

layout!(Resume = 16 { flow: U64, oldest: U64, });

layout!(Position = 24 { flow: U64, next: U64, got: U32, taken: u8, reserved: [u8; 3], });

layout!(Request = 56 {
    flow: U64,
    seq: U64,
    addr: U64,
    rkey: U32,
    length: U32,
    op: u8,
    flags: u8,
    reserved: U16,
    word: U32,
    operands: [U64; 2],
});

layout!(Piece = 24 { flow: U64, seq: U64, offset: U32, reserved: U32, });

layout!(Ack = 32 { at: Position, credit: U64, });

layout!(Nak = 32 { at: Position, wait_us: U32, code: u8, reserved: [u8; 3], });

layout!(AtomicReply = 24 { flow: U64, seq: U64, value: U64, });

layout!(Datagram = 64 {
    tenant: U32,
    source_qpn: U32,
    destination_qpn: U32,
    qkey: U32,
    source: [u8; 16],
    destination: [u8; 16],
    imm: U32,
    flow_label: U32,
    flags: u8,
    traffic_class: u8,
    hop_limit: u8,
    reserved: [u8; 5],
});

layout!(Pair = 104 { open: Open, gid: [u8; 16], qpn: U32, psn_mtu: U32, fabric: U64, });

layout!(Paired = 40 { pair: U64, gid: [u8; 16], qpn: U32, psn_mtu: U32, apart: u8, reserved: [u8; 7], });

layout!(PairKey = 16 { pair: U64, key: U32, reserved: U32, });

layout!(Granted = 40 {
    pair: U64,
    key: U32,
    nic_key: U32,
    addr: U64,
    length: U64,
    access: U32,
    known: u8,
    reserved: [u8; 3],
});

layout!(Wanted = 32 { pair: U64, total: U64, solicited: U64, bare: U64, });

layout!(Given = 24 { pair: U64, total: U64, wait_us: U32, short: u8, reserved: [u8; 3], });

layout!(Token = 8 { token: U64, });

layout!(Bye = 8 { cause: U32, reserved: U32, });

/// Kinds of frames.
pub(super) mod kind {
    pub(in super::super) const HELLO: u8 = 1;
    pub(in super::super) const OPEN: u8 = 2;
    pub(in super::super) const OPENED: u8 = 3;
    pub(in super::super) const RESUME: u8 = 4;
    pub(in super::super) const RESUMED: u8 = 5;
    pub(in super::super) const REQUEST: u8 = 6;
    pub(in super::super) const DATA: u8 = 7;
    pub(in super::super) const ACK: u8 = 8;
    pub(in super::super) const NAK: u8 = 9;
    pub(in super::super) const READ_DATA: u8 = 10;
    pub(in super::super) const ATOMIC_REPLY: u8 = 11;
    pub(in super::super) const DATAGRAM: u8 = 12;
    pub(in super::super) const PING: u8 = 13;
    pub(in super::super) const PONG: u8 = 14;
    pub(in super::super) const BYE: u8 = 15;
    pub(in super::super) const PAIR: u8 = 16;
    pub(in super::super) const PAIRED: u8 = 17;
    pub(in super::super) const KEY: u8 = 18;
    pub(in super::super) const GRANT: u8 = 19;
    pub(in super::super) const REVOKE: u8 = 20;
    pub(in super::super) const REVOKED: u8 = 21;
    pub(in super::super) const WANTED: u8 = 22;
    pub(in super::super) const GIVEN: u8 = 23;
    pub(in super::super) const HELD: u8 = 24;
}

/// Operations of a request; the numbers of the work request opcodes are another matter.
pub(super) mod op {
    pub(in super::super) const SEND: u8 = 0;
    pub(in super::super) const SEND_INVALIDATE: u8 = 1;
    pub(in super::super) const WRITE: u8 = 2;
    pub(in super::super) const READ: u8 = 3;
    pub(in super::super) const COMPARE_SWAP: u8 = 4;
    pub(in super::super) const FETCH_ADD: u8 = 5;
    pub(in super::super) const ATOMIC_WRITE: u8 = 6;
    pub(in super::super) const FLUSH: u8 = 7;
}

/// Flags of a request and of a datagram.
pub(super) mod flag {
    pub(in super::super) const SOLICITED: u8 = 1;
    pub(in super::super) const IMM: u8 = 2;
    pub(in super::super) const PROBE: u8 = 4;
    pub(in super::super) const AGAIN: u8 = 8;
    pub(in super::super) const WHOLE: u8 = 16;
    pub(in super::super) const PERSISTENT: u8 = 32;
}
