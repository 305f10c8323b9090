//! Frames to bytes and back. What parses is canonical: encoded again it gives the same bytes.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::layout::{self, flag, kind, op};
use super::{
    Ack, AtomicReply, Bye, Datagram, FlowId, Frame, HEAD, Hello, MAGIC, MAX_DATAGRAM, MAX_HEADER, MAX_MESSAGE,
    MAX_PAYLOAD, Malformed, Nak, NakCode, Note, Op, Open, Opened, Packet, Piece, Position, Remote, Request, Transport,
};
use crate::Nanos;

/// Longest RNR timer (IBA table 45), which no wait on the wire exceeds.
pub(super) const MAX_WAIT_US: u32 = 655_360;
/// Stands for [`Ack::credit`] that is not known.
const NO_CREDIT: u64 = u64::MAX;

/// Head and body of a frame as they travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    bytes: [u8; MAX_HEADER],
    len: usize,
}

impl Header {
    fn new<B: IntoBytes + Immutable>(kind: u8, payload: u32, body: &B) -> Self {
        Self::with(kind, payload, body.as_bytes())
    }

    fn with(kind: u8, payload: u32, body: &[u8]) -> Self {
        let head = layout::Head { kind, reserved: 0, body: U16::new(body.len() as u16), payload: payload.into() };
        let len = HEAD + body.len();
        let mut bytes = [0; MAX_HEADER];
        bytes[..HEAD].copy_from_slice(head.as_bytes());
        bytes[HEAD..len].copy_from_slice(body);
        Self { bytes, len }
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Packet {
    /// Without payload.
    pub fn bare(frame: Frame) -> Self {
        Self { frame, payload: 0 }
    }

    /// Reads head and body of a frame from the beginning of `bytes`, and how many bytes they are. `None`: there are too few bytes yet.
    ///
    /// # Errors
    /// When this cannot become a frame.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, Malformed> {
        let Ok((head, rest)) = layout::Head::read_from_prefix(bytes) else {
            return Ok(None);
        };
        let (name, size) = body_of(head.kind)?;
        if head.reserved != 0 || usize::from(head.body.get()) != size {
            return Err(Malformed::Body(name));
        }
        let payload = head.payload.get();
        if payload > most_payload(head.kind) {
            return Err(Malformed::Payload(name, payload));
        }
        let Some(body) = rest.get(..size) else {
            return Ok(None);
        };
        let frame = parse_body(head.kind, body)?;
        if let Frame::Request(request) = frame
            && payload > if request.op.carries() { request.length } else { 0 }
        {
            return Err(Malformed::Payload(name, payload));
        }
        Ok(Some((Self { frame, payload }, HEAD + size)))
    }

    /// As it travels.
    pub fn encode(&self) -> Header {
        let payload = self.payload;
        match &self.frame {
            Frame::Hello(hello) => Header::new(kind::HELLO, payload, &layout::Hello::from(hello)),
            Frame::Open(open) => Header::new(kind::OPEN, payload, &layout::Open::from(open)),
            Frame::Opened(opened) => Header::new(kind::OPENED, payload, &layout::Opened::from(opened)),
            Frame::Resume { flow, oldest } => {
                let body = layout::Resume { flow: flow.0.into(), oldest: (*oldest).into() };
                Header::new(kind::RESUME, payload, &body)
            }
            Frame::Resumed(at) => Header::new(kind::RESUMED, payload, &layout::Position::from(at)),
            Frame::Request(request) => Header::new(kind::REQUEST, payload, &layout::Request::from(request)),
            Frame::Data(piece) => Header::new(kind::DATA, payload, &layout::Piece::from(piece)),
            Frame::Ack(ack) => Header::new(kind::ACK, payload, &layout::Ack::from(ack)),
            Frame::Nak(nak) => Header::new(kind::NAK, payload, &layout::Nak::from(nak)),
            Frame::ReadData(piece) => Header::new(kind::READ_DATA, payload, &layout::Piece::from(piece)),
            Frame::AtomicReply(reply) => Header::new(kind::ATOMIC_REPLY, payload, &layout::AtomicReply::from(reply)),
            Frame::Datagram(datagram) => Header::new(kind::DATAGRAM, payload, &layout::Datagram::from(datagram)),
            Frame::Ping(token) => Header::new(kind::PING, payload, &layout::Token { token: (*token).into() }),
            Frame::Pong(token) => Header::new(kind::PONG, payload, &layout::Token { token: (*token).into() }),
            Frame::Bye(cause) => {
                let body = layout::Bye { cause: bye_to_wire(*cause).into(), reserved: 0.into() };
                Header::new(kind::BYE, payload, &body)
            }
            Frame::Note(note) => note.encode(|kind, body| Header::with(kind, payload, body)),
        }
    }
}

fn body_of(kind: u8) -> Result<(&'static str, usize), Malformed> {
    Ok(match kind {
        kind::HELLO => ("HELLO", size_of::<layout::Hello>()),
        kind::OPEN => ("OPEN", size_of::<layout::Open>()),
        kind::OPENED => ("OPENED", size_of::<layout::Opened>()),
        kind::RESUME => ("RESUME", size_of::<layout::Resume>()),
        kind::RESUMED => ("RESUMED", size_of::<layout::Position>()),
        kind::REQUEST => ("REQUEST", size_of::<layout::Request>()),
        kind::DATA => ("DATA", size_of::<layout::Piece>()),
        kind::ACK => ("ACK", size_of::<layout::Ack>()),
        kind::NAK => ("NAK", size_of::<layout::Nak>()),
        kind::READ_DATA => ("READ_DATA", size_of::<layout::Piece>()),
        kind::ATOMIC_REPLY => ("ATOMIC_REPLY", size_of::<layout::AtomicReply>()),
        kind::DATAGRAM => ("DATAGRAM", size_of::<layout::Datagram>()),
        kind::PING => ("PING", size_of::<layout::Token>()),
        kind::PONG => ("PONG", size_of::<layout::Token>()),
        kind::BYE => ("BYE", size_of::<layout::Bye>()),
        kind::PAIR => ("PAIR", size_of::<layout::Pair>()),
        kind::PAIRED => ("PAIRED", size_of::<layout::Paired>()),
        kind::KEY => ("KEY", size_of::<layout::PairKey>()),
        kind::GRANT => ("GRANT", size_of::<layout::Granted>()),
        kind::REVOKE => ("REVOKE", size_of::<layout::PairKey>()),
        kind::REVOKED => ("REVOKED", size_of::<layout::PairKey>()),
        kind::WANTED => ("WANTED", size_of::<layout::Wanted>()),
        kind::GIVEN => ("GIVEN", size_of::<layout::Given>()),
        kind::HELD => ("HELD", size_of::<layout::PairKey>()),
        _ => return Err(Malformed::Kind(kind)),
    })
}

fn most_payload(kind: u8) -> u32 {
    match kind {
        kind::REQUEST | kind::DATA | kind::READ_DATA => MAX_PAYLOAD,
        kind::DATAGRAM => MAX_DATAGRAM,
        _ => 0,
    }
}

fn parse_body(kind: u8, body: &[u8]) -> Result<Frame, Malformed> {
    Ok(match kind {
        kind::HELLO => Frame::Hello(read::<layout::Hello>(body)?.try_into()?),
        kind::OPEN => Frame::Open(read::<layout::Open>(body)?.try_into()?),
        kind::OPENED => Frame::Opened(read::<layout::Opened>(body)?.try_into()?),
        kind::RESUME => {
            let raw = read::<layout::Resume>(body)?;
            Frame::Resume { flow: FlowId(raw.flow.get()), oldest: raw.oldest.get() }
        }
        kind::RESUMED => Frame::Resumed(read::<layout::Position>(body)?.try_into()?),
        kind::REQUEST => Frame::Request(read::<layout::Request>(body)?.try_into()?),
        kind::DATA => Frame::Data(read::<layout::Piece>(body)?.try_into()?),
        kind::ACK => Frame::Ack(read::<layout::Ack>(body)?.try_into()?),
        kind::NAK => Frame::Nak(read::<layout::Nak>(body)?.try_into()?),
        kind::READ_DATA => Frame::ReadData(read::<layout::Piece>(body)?.try_into()?),
        kind::ATOMIC_REPLY => {
            let raw = read::<layout::AtomicReply>(body)?;
            Frame::AtomicReply(AtomicReply { flow: FlowId(raw.flow.get()), seq: raw.seq.get(), value: raw.value.get() })
        }
        kind::DATAGRAM => Frame::Datagram(read::<layout::Datagram>(body)?.try_into()?),
        kind::PING => Frame::Ping(read::<layout::Token>(body)?.token.get()),
        kind::PONG => Frame::Pong(read::<layout::Token>(body)?.token.get()),
        kind::BYE => {
            let raw = read::<layout::Bye>(body)?;
            zero(raw.reserved.get() == 0)?;
            Frame::Bye(bye_from_wire(raw.cause.get())?)
        }
        note => Frame::Note(Note::parse(note, body)?),
    })
}

pub(super) fn read<T: FromBytes + KnownLayout + Immutable + Unaligned>(body: &[u8]) -> Result<T, Malformed> {
    T::read_from_bytes(body).map_err(|_| Malformed::Field("length"))
}

pub(super) fn zero(is_zero: bool) -> Result<(), Malformed> {
    if is_zero { Ok(()) } else { Err(Malformed::Field("reserved field")) }
}

pub(super) fn truth(raw: u8, name: &'static str) -> Result<bool, Malformed> {
    match raw {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Malformed::Field(name)),
    }
}

pub(super) fn up_to<T: PartialOrd + Copy>(value: T, most: T, name: &'static str) -> Result<T, Malformed> {
    if value <= most { Ok(value) } else { Err(Malformed::Field(name)) }
}

impl From<&Hello> for layout::Hello {
    fn from(hello: &Hello) -> Self {
        Self {
            magic: MAGIC.into(),
            oldest: hello.versions.0.into(),
            newest: hello.versions.1.into(),
            lane: hello.lane.into(),
            lanes: hello.lanes.into(),
            host: hello.host,
            peer: hello.peer,
            epoch: hello.epoch.into(),
            generation: hello.generation.into(),
            ticket: hello.ticket,
            ..Self::default()
        }
    }
}

impl TryFrom<layout::Hello> for Hello {
    type Error = Malformed;

    /// Its reserved fields are for later versions, and not looked at: this frame all versions must be able to read.
    fn try_from(raw: layout::Hello) -> Result<Self, Malformed> {
        if raw.magic.get() != MAGIC {
            return Err(Malformed::Field("magic"));
        }
        if raw.oldest > raw.newest || raw.lane >= raw.lanes {
            return Err(Malformed::Field("versions or lanes"));
        }
        Ok(Self {
            versions: (raw.oldest.get(), raw.newest.get()),
            host: raw.host,
            peer: raw.peer,
            epoch: raw.epoch.get(),
            generation: raw.generation.get(),
            lane: raw.lane.get(),
            lanes: raw.lanes.get(),
            ticket: raw.ticket,
        })
    }
}

impl From<&Open> for layout::Open {
    fn from(open: &Open) -> Self {
        Self {
            flow: open.flow.0.into(),
            incarnation: open.incarnation.into(),
            source: open.source,
            destination: open.destination,
            source_qpn: open.source_qpn.into(),
            destination_qpn: open.destination_qpn.into(),
            psn: open.psn.into(),
            tenant: open.tenant.into(),
            transport: match open.transport {
                Transport::Rc => 0,
                Transport::Uc => 1,
            },
            depth: open.depth,
            reserved: [0; 6],
        }
    }
}

impl TryFrom<layout::Open> for Open {
    type Error = Malformed;

    fn try_from(raw: layout::Open) -> Result<Self, Malformed> {
        zero(raw.reserved == [0; 6])?;
        Ok(Self {
            flow: FlowId(raw.flow.get()),
            tenant: raw.tenant.get(),
            transport: if truth(raw.transport, "transport")? { Transport::Uc } else { Transport::Rc },
            depth: raw.depth,
            incarnation: raw.incarnation.get(),
            source: raw.source,
            destination: raw.destination,
            source_qpn: up_to(raw.source_qpn.get(), 0xff_ffff, "QP number")?,
            destination_qpn: up_to(raw.destination_qpn.get(), 0xff_ffff, "QP number")?,
            psn: up_to(raw.psn.get(), 0xff_ffff, "PSN")?,
        })
    }
}

impl From<&Opened> for layout::Opened {
    fn from(opened: &Opened) -> Self {
        let (flow, incarnation) = (opened.flow.0.into(), opened.incarnation.into());
        Self { flow, incarnation, depth: opened.depth, reserved: [0; 7] }
    }
}

impl TryFrom<layout::Opened> for Opened {
    type Error = Malformed;

    fn try_from(raw: layout::Opened) -> Result<Self, Malformed> {
        zero(raw.reserved == [0; 7])?;
        Ok(Self { flow: FlowId(raw.flow.get()), incarnation: raw.incarnation.get(), depth: raw.depth })
    }
}

impl From<&Position> for layout::Position {
    fn from(at: &Position) -> Self {
        Self {
            flow: at.flow.0.into(),
            next: at.next.into(),
            got: at.got.into(),
            taken: at.taken.into(),
            reserved: [0; 3],
        }
    }
}

impl TryFrom<layout::Position> for Position {
    type Error = Malformed;

    fn try_from(raw: layout::Position) -> Result<Self, Malformed> {
        zero(raw.reserved == [0; 3])?;
        let taken = truth(raw.taken, "taken")?;
        let most = if taken { MAX_MESSAGE } else { 0 };
        let got = up_to(raw.got.get(), most, "bytes that have arrived")?;
        Ok(Self { flow: FlowId(raw.flow.get()), next: raw.next.get(), got, taken })
    }
}

impl From<&Ack> for layout::Ack {
    fn from(ack: &Ack) -> Self {
        Self { at: (&ack.at).into(), credit: ack.credit.unwrap_or(NO_CREDIT).into() }
    }
}

impl TryFrom<layout::Ack> for Ack {
    type Error = Malformed;

    fn try_from(raw: layout::Ack) -> Result<Self, Malformed> {
        Ok(Self { at: raw.at.try_into()?, credit: Some(raw.credit.get()).filter(|&credit| credit != NO_CREDIT) })
    }
}

const NAK_CODES: [NakCode; 7] = [
    NakCode::NotReady,
    NakCode::Later,
    NakCode::NotThere,
    NakCode::Gone,
    NakCode::Invalid,
    NakCode::Access,
    NakCode::Operation,
];

impl From<&Nak> for layout::Nak {
    fn from(nak: &Nak) -> Self {
        let code = NAK_CODES.iter().position(|&code| code == nak.code).unwrap_or(0) as u8;
        Self { at: (&nak.at).into(), wait_us: nak.wait.as_micros().into(), code, reserved: [0; 3] }
    }
}

impl TryFrom<layout::Nak> for Nak {
    type Error = Malformed;

    fn try_from(raw: layout::Nak) -> Result<Self, Malformed> {
        zero(raw.reserved == [0; 3])?;
        let code = *NAK_CODES.get(usize::from(raw.code)).ok_or(Malformed::Field("cause of a NAK"))?;
        let wait = Nanos::from_micros(up_to(raw.wait_us.get(), MAX_WAIT_US, "time to wait")?);
        Ok(Self { at: raw.at.try_into()?, code, wait })
    }
}

impl From<&Piece> for layout::Piece {
    fn from(piece: &Piece) -> Self {
        let (flow, seq) = (piece.flow.0.into(), piece.seq.into());
        Self { flow, seq, offset: piece.offset.into(), reserved: U32::ZERO }
    }
}

impl TryFrom<layout::Piece> for Piece {
    type Error = Malformed;

    fn try_from(raw: layout::Piece) -> Result<Self, Malformed> {
        zero(raw.reserved.get() == 0)?;
        let offset = up_to(raw.offset.get(), MAX_MESSAGE, "offset")?;
        Ok(Self { flow: FlowId(raw.flow.get()), seq: raw.seq.get(), offset })
    }
}

impl From<&AtomicReply> for layout::AtomicReply {
    fn from(reply: &AtomicReply) -> Self {
        Self { flow: reply.flow.0.into(), seq: reply.seq.into(), value: reply.value.into() }
    }
}

/// What of a request depends on its operation: number, flags, where, word, operands.
type Parts = (u8, u8, Remote, u32, [u64; 2]);

fn parts(operation: Op) -> Parts {
    let nowhere = Remote { addr: 0, rkey: 0 };
    let imm_flag = |imm: Option<u32>| if imm.is_some() { flag::IMM } else { 0 };
    match operation {
        Op::Send(imm) => (op::SEND, imm_flag(imm), nowhere, imm.unwrap_or(0), [0; 2]),
        Op::SendInvalidate(key) => (op::SEND_INVALIDATE, 0, nowhere, key, [0; 2]),
        Op::Write { at, imm } => (op::WRITE, imm_flag(imm), at, imm.unwrap_or(0), [0; 2]),
        Op::Read { at, again_from: None } => (op::READ, 0, at, 0, [0; 2]),
        Op::Read { at, again_from: Some(from) } => (op::READ, flag::AGAIN, at, from, [0; 2]),
        Op::CompareSwap { at, compare, swap } => (op::COMPARE_SWAP, 0, at, 0, [compare, swap]),
        Op::FetchAdd { at, add } => (op::FETCH_ADD, 0, at, 0, [add, 0]),
        Op::AtomicWrite { at, value } => (op::ATOMIC_WRITE, 0, at, 0, [value, 0]),
        Op::Flush { at, whole, persistent } => {
            let flags = if whole { flag::WHOLE } else { 0 } | if persistent { flag::PERSISTENT } else { 0 };
            (op::FLUSH, flags, at, 0, [0; 2])
        }
    }
}

impl From<&Request> for layout::Request {
    fn from(request: &Request) -> Self {
        let (op, mut flags, at, word, operands) = parts(request.op);
        flags |= if request.solicited { flag::SOLICITED } else { 0 };
        flags |= if request.probe { flag::PROBE } else { 0 };
        Self {
            flow: request.flow.0.into(),
            seq: request.seq.into(),
            addr: at.addr.into(),
            rkey: at.rkey.into(),
            length: request.length.into(),
            op,
            flags,
            reserved: U16::ZERO,
            word: word.into(),
            operands: operands.map(U64::from),
        }
    }
}

impl TryFrom<layout::Request> for Request {
    type Error = Malformed;

    fn try_from(raw: layout::Request) -> Result<Self, Malformed> {
        let request = Self {
            flow: FlowId(raw.flow.get()),
            seq: raw.seq.get(),
            op: parse_op(&raw)?,
            length: up_to(raw.length.get(), MAX_MESSAGE, "length")?,
            solicited: raw.flags & flag::SOLICITED != 0,
            probe: raw.flags & flag::PROBE != 0,
        };
        let is_word = request.op.is_atomic() || matches!(request.op, Op::AtomicWrite { .. });
        if is_word && request.length != 8 {
            return Err(Malformed::Field("length"));
        }
        if let Op::Read { again_from: Some(from), .. } = request.op
            && from >= request.length
        {
            return Err(Malformed::Field("offset"));
        }
        // Whatever its operation has no use for is zero.
        let canonical = layout::Request::from(&request);
        zero(canonical.as_bytes() == raw.as_bytes())?;
        Ok(request)
    }
}

fn parse_op(raw: &layout::Request) -> Result<Op, Malformed> {
    let at = Remote { addr: raw.addr.get(), rkey: raw.rkey.get() };
    let (word, [first, second]) = (raw.word.get(), raw.operands.map(U64::get));
    let imm = Some(word).filter(|_| raw.flags & flag::IMM != 0);
    Ok(match raw.op {
        op::SEND => Op::Send(imm),
        op::SEND_INVALIDATE => Op::SendInvalidate(word),
        op::WRITE => Op::Write { at, imm },
        op::READ => Op::Read { at, again_from: Some(word).filter(|_| raw.flags & flag::AGAIN != 0) },
        op::COMPARE_SWAP => Op::CompareSwap { at, compare: first, swap: second },
        op::FETCH_ADD => Op::FetchAdd { at, add: first },
        op::ATOMIC_WRITE => Op::AtomicWrite { at, value: first },
        op::FLUSH => {
            let [whole, persistent] = [flag::WHOLE, flag::PERSISTENT].map(|bit| raw.flags & bit != 0);
            Op::Flush { at, whole, persistent }
        }
        _ => return Err(Malformed::Field("operation")),
    })
}

impl From<&Datagram> for layout::Datagram {
    fn from(datagram: &Datagram) -> Self {
        let imm_flag = if datagram.imm.is_some() { flag::IMM } else { 0 };
        Self {
            tenant: datagram.tenant.into(),
            source_qpn: datagram.source_qpn.into(),
            destination_qpn: datagram.destination_qpn.into(),
            qkey: datagram.qkey.into(),
            source: datagram.source,
            destination: datagram.destination,
            imm: datagram.imm.unwrap_or(0).into(),
            flow_label: datagram.flow_label.into(),
            flags: imm_flag | if datagram.solicited { flag::SOLICITED } else { 0 },
            traffic_class: datagram.traffic_class,
            hop_limit: datagram.hop_limit,
            reserved: [0; 5],
        }
    }
}

impl TryFrom<layout::Datagram> for Datagram {
    type Error = Malformed;

    fn try_from(raw: layout::Datagram) -> Result<Self, Malformed> {
        let with_imm = raw.flags & flag::IMM != 0;
        zero(raw.reserved == [0; 5] && (with_imm || raw.imm.get() == 0))?;
        if raw.flags & !(flag::IMM | flag::SOLICITED) != 0 {
            return Err(Malformed::Field("flags"));
        }
        Ok(Self {
            tenant: raw.tenant.get(),
            source_qpn: up_to(raw.source_qpn.get(), 0xff_ffff, "QP number")?,
            destination_qpn: up_to(raw.destination_qpn.get(), 0xff_ffff, "QP number")?,
            qkey: raw.qkey.get(),
            source: raw.source,
            destination: raw.destination,
            imm: Some(raw.imm.get()).filter(|_| with_imm),
            solicited: raw.flags & flag::SOLICITED != 0,
            traffic_class: raw.traffic_class,
            hop_limit: raw.hop_limit,
            flow_label: up_to(raw.flow_label.get(), 0xf_ffff, "flow label")?,
        })
    }
}

const BYES: [Bye; 5] = [Bye::Version, Bye::Refused, Bye::Protocol, Bye::Silent, Bye::Shutdown];

fn bye_to_wire(cause: Bye) -> u32 {
    BYES.iter().position(|&bye| bye == cause).unwrap_or(0) as u32
}

fn bye_from_wire(raw: u32) -> Result<Bye, Malformed> {
    BYES.get(raw as usize).copied().ok_or(Malformed::Field("cause of BYE"))
}
