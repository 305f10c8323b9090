//! Frames and bytes: there and back, and whatever else arrives.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;

fn flow() -> impl Strategy<Value = FlowId> {
    prop_oneof![0..4u64, any::<u64>()].prop_map(FlowId)
}

fn seq() -> impl Strategy<Value = u64> {
    prop_oneof![0..6u64, any::<u64>()]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![0..300u32, 0..=MAX_MESSAGE]
}

fn remote() -> impl Strategy<Value = Remote> {
    (any::<u64>(), any::<u32>()).prop_map(|(addr, rkey)| Remote { addr, rkey })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        any::<Option<u32>>().prop_map(Op::Send),
        any::<u32>().prop_map(Op::SendInvalidate),
        (remote(), any::<Option<u32>>()).prop_map(|(at, imm)| Op::Write { at, imm }),
        (remote(), option::of(0..100u32)).prop_map(|(at, again_from)| Op::Read { at, again_from }),
        (remote(), any::<u64>(), any::<u64>()).prop_map(|(at, compare, swap)| Op::CompareSwap { at, compare, swap }),
        (remote(), any::<u64>()).prop_map(|(at, add)| Op::FetchAdd { at, add }),
        (remote(), any::<u64>()).prop_map(|(at, value)| Op::AtomicWrite { at, value }),
        (remote(), any::<bool>(), any::<bool>()).prop_map(|(at, whole, persistent)| Op::Flush {
            at,
            whole,
            persistent
        }),
    ]
}

fn request() -> impl Strategy<Value = Request> {
    (flow(), seq(), op(), length(), any::<bool>(), any::<bool>()).prop_map(
        |(flow, seq, op, mut length, solicited, probe)| {
            if op.is_atomic() || matches!(op, Op::AtomicWrite { .. }) {
                length = 8;
            }
            if let Op::Read { again_from: Some(from), .. } = op {
                length = length.max(from + 1);
            }
            Request { flow, seq, op, length, solicited, probe }
        },
    )
}

fn position() -> impl Strategy<Value = Position> {
    (flow(), seq(), length(), any::<bool>()).prop_map(|(flow, next, got, taken)| Position {
        flow,
        next,
        got: if taken { got } else { 0 },
        taken,
    })
}

fn piece() -> impl Strategy<Value = Piece> {
    (flow(), seq(), length()).prop_map(|(flow, seq, offset)| Piece { flow, seq, offset })
}

fn nak() -> impl Strategy<Value = Nak> {
    let code = prop_oneof![
        Just(NakCode::NotReady),
        Just(NakCode::Later),
        Just(NakCode::NotThere),
        Just(NakCode::Gone),
        Just(NakCode::Invalid),
        Just(NakCode::Access),
        Just(NakCode::Operation),
    ];
    (position(), code, 0..655_360u32).prop_map(|(at, code, us)| Nak { at, code, wait: Nanos::from_micros(us) })
}

fn open() -> impl Strategy<Value = Open> {
    let numbers = (0..1u32 << 24, 0..1u32 << 24, 0..1u32 << 24);
    (flow(), any::<(u32, bool, u8, u64, [u8; 16], [u8; 16])>(), numbers).prop_map(|(flow, raw, numbers)| Open {
        flow,
        tenant: raw.0,
        transport: if raw.1 { Transport::Uc } else { Transport::Rc },
        depth: raw.2,
        incarnation: raw.3,
        source: raw.4,
        destination: raw.5,
        source_qpn: numbers.0,
        destination_qpn: numbers.1,
        psn: numbers.2,
    })
}

fn hello() -> impl Strategy<Value = Hello> {
    any::<([u8; 16], [u8; 16], u64, u64, [u8; 32], u16, u16)>().prop_map(|raw| Hello {
        versions: (raw.5.min(raw.6), raw.5.max(raw.6)),
        host: raw.0,
        peer: raw.1,
        epoch: raw.2,
        generation: raw.3,
        lane: raw.5 % 8,
        lanes: 8,
        ticket: raw.4,
    })
}

fn datagram() -> impl Strategy<Value = Datagram> {
    any::<(u32, [u8; 3], u32, [u8; 16], [u8; 16], Option<u32>, bool, u8, u8)>().prop_map(|raw| Datagram {
        tenant: raw.0,
        source_qpn: u32::from(raw.1[0]),
        destination_qpn: u32::from(raw.1[1]),
        qkey: raw.2,
        source: raw.3,
        destination: raw.4,
        imm: raw.5,
        solicited: raw.6,
        traffic_class: raw.7,
        hop_limit: raw.8,
        flow_label: u32::from(raw.1[2]),
    })
}

fn nic_end() -> impl Strategy<Value = NicEnd> {
    (0..1u32 << 24, 0..1u32 << 24, 1..6u8, any::<[u8; 16]>()).prop_map(|(qpn, psn, mtu, gid)| NicEnd {
        qpn,
        psn,
        mtu,
        gid,
    })
}

fn note() -> impl Strategy<Value = Note> {
    let pair = || flow().prop_map(PairId::from);
    let apart = prop_oneof![Just(Apart::NotThere), Just(Apart::NoNic)];
    let end = prop_oneof![nic_end().prop_map(Ok), apart.prop_map(Err)];
    let grant = any::<Option<(u32, u32, u64, u64)>>();
    let grant = grant.prop_map(|raw| raw.map(|(key, access, addr, length)| NicKey { key, access, addr, length }));
    let short = option::of(prop_oneof![
        (0..655_360u32).prop_map(|us| Short::NotReady(Nanos::from_micros(us))),
        Just(Short::NotForNic),
    ]);
    prop_oneof![
        (open(), nic_end(), any::<u64>()).prop_map(|(open, end, fabric)| Note::Pair { open, end, fabric }),
        (pair(), end).prop_map(|(pair, end)| Note::Paired { pair, end }),
        pair().prop_map(|pair| Note::Held { pair }),
        (pair(), any::<u32>()).prop_map(|(pair, key)| Note::Key { pair, key }),
        (pair(), any::<u32>(), grant).prop_map(|(pair, key, grant)| Note::Grant { pair, key, grant }),
        (pair(), any::<u32>()).prop_map(|(pair, key)| Note::Revoke { pair, key }),
        (pair(), any::<u32>()).prop_map(|(pair, key)| Note::Revoked { pair, key }),
        (pair(), any::<[u64; 3]>())
            .prop_map(|(pair, [total, solicited, bare])| { Note::Wanted(Wanted { pair, total, solicited, bare }) }),
        (pair(), any::<u64>(), short).prop_map(|(pair, given, short)| Note::Given { pair, given, short }),
    ]
}

/// Any frame that has a form on the wire.
pub(crate) fn frame() -> impl Strategy<Value = Frame> {
    let opened = (flow(), any::<u64>(), any::<u8>());
    prop_oneof![
        1 => hello().prop_map(Frame::Hello),
        2 => open().prop_map(Frame::Open),
        2 => opened.prop_map(|(flow, incarnation, depth)| Frame::Opened(Opened { flow, incarnation, depth })),
        2 => (flow(), seq()).prop_map(|(flow, oldest)| Frame::Resume { flow, oldest }),
        2 => position().prop_map(Frame::Resumed),
        6 => request().prop_map(Frame::Request),
        4 => piece().prop_map(Frame::Data),
        4 => (position(), any::<Option<u32>>()).prop_map(|(at, credit)| {
            Frame::Ack(Ack { at, credit: credit.map(u64::from) })
        }),
        3 => nak().prop_map(Frame::Nak),
        3 => piece().prop_map(Frame::ReadData),
        2 => (flow(), seq(), any::<u64>()).prop_map(|(flow, seq, value)| {
            Frame::AtomicReply(AtomicReply { flow, seq, value })
        }),
        2 => datagram().prop_map(Frame::Datagram),
        1 => any::<u64>().prop_map(Frame::Ping),
        1 => any::<u64>().prop_map(Frame::Pong),
        1 => Just(Frame::Bye(Bye::Protocol)),
        4 => note().prop_map(Frame::Note),
    ]
}

/// Any packet that has a form on the wire.
pub(crate) fn packet() -> impl Strategy<Value = Packet> {
    (frame(), 0..300u32).prop_map(|(frame, some)| {
        let payload = match frame {
            Frame::Request(request) if request.op.carries() => some.min(request.length),
            Frame::Data(_) | Frame::ReadData(_) | Frame::Datagram(_) => some,
            _ => 0,
        };
        Packet { frame, payload }
    })
}

proptest! {
    #[test]
    fn a_frame_is_the_same_after_its_way_through_bytes(packet in packet(), more in vec(any::<u8>(), 0..9)) {
        let header = packet.encode();
        let bytes = [header.as_bytes(), &more].concat();
        prop_assert_eq!(Packet::parse(&bytes), Ok(Some((packet, header.as_bytes().len()))));
        for short in 0..header.as_bytes().len() {
            prop_assert_eq!(Packet::parse(&bytes[..short]), Ok(None));
        }
    }

    #[test]
    fn what_parses_is_canonical_but_for_hello(kind in 2..26u8, mut bytes in vec(any::<u8>(), 112), zeros in vec(any::<bool>(), 112)) {
        for (byte, _) in bytes.iter_mut().zip(zeros).filter(|(_, zero)| *zero) {
            *byte = 0;
        }
        bytes[..2].copy_from_slice(&[kind, 0]);
        let size = match kind {
            2 => 72,
            4 | 18 | 20 | 21 | 24 => 16,
            6 => 56,
            8 | 9 | 22 => 32,
            12 => 64,
            13..=15 => 8,
            16 => 104,
            17 | 19 => 40,
            _ => 24,
        };
        bytes[2..8].copy_from_slice(&[size, 0, 0, 0, 0, 0]);
        if let Ok(Some((packet, len))) = Packet::parse(&bytes) {
            let again = packet.encode();
            prop_assert_eq!(again.as_bytes(), &bytes[..len]);
        }
    }

    #[test]
    fn one_changed_bit_never_makes_a_frame_that_claims_too_much(packet in packet(), bit in 0..MAX_HEADER * 8) {
        let mut bytes = packet.encode().as_bytes().to_vec();
        let bit = bit % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(Some((changed, len))) = Packet::parse(&bytes) {
            prop_assert!(changed.payload <= MAX_PAYLOAD && len <= MAX_HEADER);
            if let Frame::Request(request) = changed.frame {
                prop_assert!(changed.payload <= request.length && request.length <= MAX_MESSAGE);
            }
        }
    }
}

#[test]
fn what_a_frame_may_not_say_is_refused() {
    let ping = Packet::bare(Frame::Ping(7)).encode().as_bytes().to_vec();
    let with = |at: usize, value: u8| {
        let mut bytes = ping.clone();
        bytes[at] = value;
        Packet::parse(&bytes)
    };
    assert_eq!(with(0, 0), Err(Malformed::Kind(0)));
    assert_eq!(with(0, 25), Err(Malformed::Kind(25)));
    assert_eq!(with(1, 1), Err(Malformed::Body("PING")));
    assert_eq!(with(2, 9), Err(Malformed::Body("PING")));
    assert_eq!(with(4, 1), Err(Malformed::Payload("PING", 1)));
    let length = MAX_PAYLOAD + 1;
    let op = Op::Send(None);
    let request = Request { flow: FlowId(1), seq: 0, op, length, solicited: false, probe: false };
    let parse =
        |payload, request| Packet::parse(Packet { frame: Frame::Request(request), payload }.encode().as_bytes());
    assert!(parse(MAX_PAYLOAD, request).is_ok());
    assert_eq!(parse(length, request), Err(Malformed::Payload("REQUEST", length)));
    assert_eq!(parse(9, Request { length: 8, ..request }), Err(Malformed::Payload("REQUEST", 9)));
    let at = Remote { addr: 0, rkey: 0 };
    let read = Request { op: Op::Read { at, again_from: None }, ..request };
    assert_eq!(parse(1, read), Err(Malformed::Payload("REQUEST", 1)));
    let again = Request { op: Op::Read { at, again_from: Some(length) }, ..request };
    assert_eq!(parse(0, again), Err(Malformed::Field("offset")));
    assert_eq!(parse(0, Request { length: MAX_MESSAGE + 1, ..request }), Err(Malformed::Field("length")));
    assert_eq!(parse(0, Request { op: Op::FetchAdd { at, add: 1 }, ..request }), Err(Malformed::Field("length")));
    assert_eq!(Trailer::parse(*b"go0d"), Err(Malformed::Field("trailer")));
}
