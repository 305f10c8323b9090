//! What a hostile peer says, as bytes: good sessions with bits turned over, pieces left out, doubled and exchanged. Whatever comes, a
//! link neither panics nor grows, and completes what it was given once at most.
#![allow(missing_docs, reason = "a test program")]

use freeflow_tcp::frame::{
    Ack, AtomicReply, Bye, Datagram, FlowId, Frame, Hello, Nak, NakCode, Note, Op, Open, Opened, Packet, Piece,
    Position, Remote, Request, Trailer, Transport, VERSIONS,
};
use freeflow_tcp::host::{Availability, Bound, Host, Landed, Landing, QpKey, Refusal, Source, Token, Verdict};
use freeflow_tcp::link::Footprint;
use freeflow_tcp::stream::{Inbound, Next};
use freeflow_tcp::{Config, Conn, Limits, Link, Nanos, Retries, Work};
use proptest::collection::vec;
use proptest::prelude::*;
use virtio_rdma::ib::WcStatus;

/// QPs that a peer can open flows to.
const QPS: u32 = 4;
const DEPTH: u8 = 3;

/// A link that has flows of its own gets these bytes from its peer. What is no frame, or may not be, ends the connection, and the rest comes on the next.
fn frames(data: &[u8]) {
    let mut session = Session::new();
    let mut start = 0;
    while start < data.len() {
        start += session.connection(&data[start..]).max(1);
    }
    let ours = |(token, _): &(u64, WcStatus)| *token < session.posted;
    assert!(session.device.completed.iter().all(ours), "a completion of nothing: {:?}", session.device.completed);
}

struct Session {
    link: Link,
    device: Device,
    now: Nanos,
    generation: u64,
    posted: u64,
}

impl Session {
    fn new() -> Self {
        let limits = Limits { strays: 16, ..Limits::default() };
        let (host, peer, ticket) = ([2; 16], [1; 16], [0; 32]);
        let config = Config { host, peer, dials: false, epoch: 2, ticket, lanes: 1, limits };
        let link = Link::new(config, Nanos::ZERO);
        let mut session =
            Self { link, device: Device::default(), now: Nanos::from_millis(1), generation: 0, posted: 0 };
        for transport in [Transport::Rc, Transport::Rc, Transport::Uc] {
            session.open(transport);
        }
        session
    }

    fn open(&mut self, transport: Transport) {
        let open = Open {
            flow: FlowId(0),
            tenant: 0,
            transport,
            depth: DEPTH,
            incarnation: 1,
            source: [0; 16],
            destination: [0; 16],
            source_qpn: 1,
            destination_qpn: 1,
            psn: 0,
        };
        let flow = self.link.open(open, Retries { timeout: None, lost: 7, not_ready: None });
        let at = Remote { addr: 0, rkey: 0 };
        for op in [Op::Write { at, imm: None }, Op::Send(Some(1)), Op::Read { at, again_from: None }] {
            let work = Work { token: Token(self.posted), op, length: 200, fence: false, solicited: false };
            let taken = self.link.post(self.now, flow, work, &mut self.device);
            self.posted += u64::from(taken.is_ok());
        }
    }

    /// How many bytes one connection has taken.
    fn connection(&mut self, bytes: &[u8]) -> usize {
        self.generation += 1;
        let (generation, ticket) = (self.generation, [0; 32]);
        let hello =
            Hello { versions: VERSIONS, host: [1; 16], peer: [2; 16], epoch: 1, generation, lane: 0, lanes: 1, ticket };
        let conn = self.link.accept(self.now, &hello, &mut self.device).expect("a good HELLO is taken");
        let (mut inbound, mut start) = (Inbound::default(), 0);
        let mut landing = Landing::Nothing;
        loop {
            self.speak(conn);
            match inbound.next(&bytes[start..]) {
                Err(why) => {
                    self.link.on_malformed(self.now, conn, why.into(), &mut self.device);
                    return start;
                }
                Ok(Next::More) => return bytes.len(),
                Ok(Next::Frame(packet, len)) => {
                    start += len;
                    match self.link.on_frame(self.now, conn, &packet, &mut self.device) {
                        Ok(found) => landing = found,
                        Err(_) => return start,
                    }
                    assert_eq!(landing == Landing::Nothing, packet.payload == 0, "{packet:?}");
                }
                Ok(Next::Payload(_)) if start == bytes.len() => return start,
                Ok(Next::Payload(left)) => {
                    let taken = (bytes.len() - start).min(left as usize);
                    inbound.consumed(taken as u32);
                    start += taken;
                }
                Ok(Next::Trailer(_, len)) => {
                    start += len;
                    let landed = self.device.land(&landing);
                    self.link.on_payload(self.now, conn, landed, &mut self.device);
                }
            }
        }
    }

    /// Says what there is to say, some of it, and looks at what is kept.
    fn speak(&mut self, conn: Conn) {
        self.now = self.now + Nanos::from_micros(50);
        self.link.on_timer(self.now, &mut self.device);
        for _ in 0..2 {
            if let Some(out) = self.link.poll_transmit(self.now, conn, &mut self.device) {
                let header = out.packet.encode();
                let parsed = Packet::parse(header.as_bytes());
                assert!(matches!(parsed, Ok(Some((packet, _))) if packet == out.packet), "{out:?}");
            }
        }
        while self.link.poll_event().is_some() {}
        check_bounds(&self.link.footprint());
    }
}

fn check_bounds(held: &Footprint) {
    let (qps, depth) = (QPS as usize, usize::from(DEPTH));
    let bounded = held.responders <= qps && held.answers <= qps * depth && held.replies <= qps * depth;
    assert!(bounded && held.messages <= 9 && held.strays <= 16, "{held:?}");
    assert!(held.queued <= 4 + 2 * qps && held.timers <= 5 + qps, "{held:?}");
}

/// A device that takes nearly everything.
#[derive(Default)]
struct Device {
    calls: u32,
    completed: Vec<(u64, WcStatus)>,
}

impl Device {
    /// Most is good. Which is not depends on nothing but the number of calls.
    fn verdict(&mut self) -> Verdict {
        self.calls += 1;
        match self.calls % 16 {
            13 => Verdict::NotReady(Nanos::from_micros(20)),
            14 => Verdict::Later(Nanos::from_micros(20)),
            15 => Verdict::NotThere,
            _ => Verdict::Yes,
        }
    }

    fn land(&mut self, landing: &Landing) -> Landed {
        self.calls += 1;
        match self.calls % 32 {
            _ if *landing == Landing::Discard => Landed::Good,
            29 => Landed::Void,
            30 => Landed::Later(Nanos::from_micros(20)),
            31 => Landed::Refused(Refusal::Access),
            _ => Landed::Good,
        }
    }
}

impl Host for Device {
    fn note(&mut self, _: &Note) {}

    fn bind(&mut self, open: &Open) -> Option<Bound> {
        let qp = QpKey(u64::from(open.destination_qpn));
        (open.destination_qpn < QPS).then_some(Bound { qp, incarnation: 1, depth: DEPTH })
    }

    fn unbound(&mut self, _: QpKey) {}

    fn admit(&mut self, _: QpKey, _: &Request) -> Verdict {
        self.verdict()
    }

    fn finish(&mut self, _: QpKey, _: &Request) -> Verdict {
        self.verdict()
    }

    fn atomic(&mut self, _: QpKey, _: &Request) -> Result<u64, Verdict> {
        match self.verdict() {
            Verdict::Yes => Ok(1),
            other => Err(other),
        }
    }

    fn abandon(&mut self, _: QpKey) {}

    fn posted(&mut self, _: QpKey) -> Option<u32> {
        Some(self.calls % 3)
    }

    fn available(&mut self, _: &Source) -> Availability {
        self.calls += 1;
        match self.calls % 64 {
            62 => Availability::Later(Nanos::from_micros(20)),
            63 => Availability::Refused,
            _ => Availability::Now,
        }
    }

    fn datagram(&mut self, _: &Datagram) -> bool {
        true
    }

    fn datagram_landed(&mut self, _: &Datagram) {}

    fn datagram_sent(&mut self, _: Token, _: bool) {}

    fn answered(&mut self, _: Token, _: u64) {}

    fn completed(&mut self, token: Token, status: WcStatus) {
        let done = |(before, _): &(u64, WcStatus)| *before == token.0;
        assert!(!self.completed.iter().any(done), "{token:?} completes twice");
        self.completed.push((token.0, status));
    }
}

const NOWHERE: Remote = Remote { addr: 0, rkey: 0 };
const READ: Op = Op::Read { at: NOWHERE, again_from: None };

/// A frame as it travels.
fn sent(frame: Frame, payload: u32, trailer: Trailer) -> Vec<u8> {
    let mut bytes = Packet { frame, payload }.encode().as_bytes().to_vec();
    if payload > 0 {
        bytes.resize(bytes.len() + payload as usize, 0xab);
        bytes.extend(trailer.to_wire());
    }
    bytes
}

fn good(frame: Frame, payload: u32) -> Vec<u8> {
    sent(frame, payload, Trailer::Good)
}

fn open(flow: u64, qpn: u32, transport: Transport) -> Vec<u8> {
    let (source, destination) = ([0; 16], [0; 16]);
    let open = Open {
        flow: FlowId(flow),
        tenant: 0,
        transport,
        depth: DEPTH,
        incarnation: 1,
        source,
        destination,
        source_qpn: 1,
        destination_qpn: qpn,
        psn: 0,
    };
    good(Frame::Open(open), 0)
}

fn request(flow: u64, seq: u64, op: Op, length: u32, payload: u32) -> Vec<u8> {
    let request = Request { flow: FlowId(flow), seq, op, length, solicited: false, probe: false };
    good(Frame::Request(request), payload)
}

fn piece(flow: u64, seq: u64, offset: u32) -> Piece {
    Piece { flow: FlowId(flow), seq, offset }
}

fn at(flow: u64, next: u64, got: u32) -> Position {
    Position { flow: FlowId(flow), next, got, taken: got > 0 }
}

fn ack(flow: u64, next: u64, got: u32) -> Vec<u8> {
    good(Frame::Ack(Ack { at: at(flow, next, got), credit: Some(2) }), 0)
}

fn nak(flow: u64, next: u64, code: NakCode) -> Vec<u8> {
    good(Frame::Nak(Nak { at: at(flow, next, 0), code, wait: Nanos::from_micros(10) }), 0)
}

fn opened(flow: u64) -> Vec<u8> {
    good(Frame::Opened(Opened { flow: FlowId(flow), incarnation: 1, depth: DEPTH }), 0)
}

fn resume(flow: u64, oldest: u64) -> Vec<u8> {
    good(Frame::Resume { flow: FlowId(flow), oldest }, 0)
}

fn resumed(flow: u64, next: u64, got: u32) -> Vec<u8> {
    good(Frame::Resumed(at(flow, next, got)), 0)
}

/// Ends the connection, so that the rest comes on the next.
fn broken() -> Vec<u8> {
    good(Frame::Bye(Bye::Shutdown), 0)
}

/// Frames of sessions that are as they should be, or nearly.
fn sessions() -> Vec<Vec<Vec<u8>>> {
    let (rc, uc) = (Transport::Rc, Transport::Uc);
    let write = Op::Write { at: NOWHERE, imm: Some(7) };
    let add = Op::FetchAdd { at: NOWHERE, add: 1 };
    let swap = Op::CompareSwap { at: NOWHERE, compare: 1, swap: 2 };
    let again = Op::Read { at: NOWHERE, again_from: Some(400) };
    let more = |seq, offset, len| good(Frame::Data(piece(0, seq, offset)), len);
    let answer = |flow, seq, offset, len| good(Frame::ReadData(piece(flow, seq, offset)), len);
    let void = sent(Frame::Data(piece(0, 1, 0)), 64, Trailer::Void);
    let datagram = Datagram {
        tenant: 0,
        source_qpn: 1,
        destination_qpn: 1,
        qkey: 9,
        source: [0; 16],
        destination: [0; 16],
        imm: Some(1),
        solicited: true,
        traffic_class: 0,
        hop_limit: 64,
        flow_label: 1,
    };
    let reply = AtomicReply { flow: FlowId(0), seq: 1, value: 3 };
    vec![
        vec![
            open(0, 0, rc),
            request(0, 0, Op::Send(None), 64, 64),
            request(0, 1, write, 64, 64),
            request(0, 2, swap, 8, 0),
        ],
        vec![
            open(0, 0, rc),
            request(0, 0, write, 128, 64),
            more(0, 64, 64),
            request(0, 1, add, 8, 0),
            request(0, 2, READ, 99, 0),
        ],
        vec![open(0, 0, uc), request(0, 0, write, 128, 64), request(0, 3, Op::Send(None), 128, 64), more(3, 64, 64)],
        vec![
            open(0, 1, rc),
            open(0, 1, rc),
            request(0, 0, Op::SendInvalidate(5), 8, 8),
            resume(0, 0),
            request(0, 1, write, 64, 0),
            void,
        ],
        vec![
            opened(0),
            ack(0, 1, 0),
            nak(0, 1, NakCode::NotReady),
            ack(0, 2, 0),
            answer(0, 2, 0, 100),
            answer(0, 2, 100, 100),
        ],
        vec![opened(0), opened(1), ack(1, 0, 100), nak(1, 0, NakCode::Later), ack(1, 2, 0), nak(0, 1, NakCode::Access)],
        vec![
            opened(2),
            nak(2, 0, NakCode::Gone),
            opened(2),
            good(Frame::Ping(1), 0),
            good(Frame::Datagram(datagram), 99),
        ],
        vec![nak(0, 0, NakCode::NotThere), opened(0), nak(0, 0, NakCode::NotThere), nak(0, 1, NakCode::Operation)],
        vec![
            opened(0),
            opened(1),
            broken(),
            resumed(0, 1, 0),
            answer(0, 2, 0, 64),
            resumed(1, 0, 200),
            broken(),
            resumed(1, 1, 50),
        ],
        vec![
            open(0, 0, rc),
            request(0, 0, READ, 1000, 0),
            request(0, 1, READ, 9, 0),
            broken(),
            resume(0, 0),
            request(0, 0, again, 1000, 0),
        ],
        vec![
            open(0, 0, rc),
            request(0, 0, add, 8, 0),
            request(0, 1, add, 8, 0),
            broken(),
            resume(0, 1),
            request(0, 2, add, 8, 0),
        ],
        vec![
            good(Frame::AtomicReply(reply), 0),
            opened(0),
            good(Frame::AtomicReply(reply), 0),
            resume(77, 0),
            broken(),
        ],
    ]
}

#[derive(Debug, Clone)]
enum Change {
    Flip(usize),
    Drop(usize),
    Double(usize),
    Swap(usize, usize),
    Insert(usize, Vec<u8>),
}

fn change() -> impl Strategy<Value = Change> {
    let place = any::<usize>;
    prop_oneof![
        4 => place().prop_map(Change::Flip),
        2 => place().prop_map(Change::Drop),
        2 => place().prop_map(Change::Double),
        1 => (place(), place()).prop_map(|(a, b)| Change::Swap(a, b)),
        1 => (place(), vec(any::<u8>(), 1..40)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
    ]
}

fn apply(frames: &mut Vec<Vec<u8>>, change: Change) {
    let count = frames.len();
    match change {
        _ if count == 0 => {}
        Change::Flip(bit) => {
            let frame = &mut frames[bit / 8 / 128 % count];
            let byte = bit / 8 % frame.len();
            frame[byte] ^= 1 << (bit % 8);
        }
        Change::Drop(at) => drop(frames.remove(at % count)),
        Change::Double(at) => frames.insert(at % count, frames[at % count].clone()),
        Change::Swap(a, b) => frames.swap(a % count, b % count),
        Change::Insert(at, bytes) => frames.insert(at % count, bytes),
    }
}

#[test]
fn sessions_as_they_should_be_are_taken() {
    for session in sessions() {
        frames(&session.concat());
    }
}

proptest! {
    #[test]
    fn changed_sessions_and_mixtures_of_them_do_no_harm(which in vec(0..12usize, 1..4), changes in vec(change(), 0..6)) {
        let sessions = sessions();
        let mut all: Vec<_> = which.into_iter().flat_map(|index| sessions[index].clone()).collect();
        for change in changes {
            apply(&mut all, change);
        }
        frames(&all.concat());
    }
}
