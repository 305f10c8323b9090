//! Two links without a network between them: frames of one are given to the other, or left out, or made up.

use proptest::collection::vec;
use proptest::prelude::*;
use virtio_rdma::ib::WcStatus;

use super::*;
use crate::frame::tests::packet;
use crate::frame::{Bye, Frame, Hello, Nak, NakCode, Op, Packet, PairId, Position, Remote, Transport, VERSIONS};
use crate::host::{Availability, Bound, Landed, Landing, Source, Verdict};

const MS: Nanos = Nanos::from_millis(1);
const FOREVER: Retries = Retries { timeout: None, lost: 7, not_ready: None };

/// A device with receives, of which others can be counted.
#[derive(Debug, Default)]
struct Device {
    /// For each QP.
    receives: BTreeMap<u64, u32>,
    /// What finishing and landing say, in turn, where it is not yes.
    moods: VecDeque<Verdict>,
    admitted: Vec<(u64, u64)>,
    finished: Vec<(u64, u64)>,
    completed: Vec<(u64, WcStatus)>,
    datagrams: Vec<(u64, bool)>,
    unbound: Vec<u64>,
    notes: Vec<Note>,
}

impl Device {
    fn mood(&mut self) -> Verdict {
        self.moods.pop_front().unwrap_or(Verdict::Yes)
    }

    fn status(&self, token: u64) -> Option<WcStatus> {
        self.completed.iter().find(|(done, _)| *done == token).map(|(_, status)| *status)
    }
}

impl Host for Device {
    fn note(&mut self, note: &Note) {
        self.notes.push(*note);
    }

    fn bind(&mut self, open: &Open) -> Option<Bound> {
        (open.destination_qpn < 8).then(|| Bound { qp: QpKey(open.destination_qpn.into()), incarnation: 1, depth: 2 })
    }

    fn unbound(&mut self, qp: QpKey) {
        self.unbound.push(qp.0);
    }

    fn admit(&mut self, qp: QpKey, request: &crate::frame::Request) -> Verdict {
        if request.op.takes_receive() {
            match self.receives.get_mut(&qp.0) {
                None | Some(0) => return Verdict::NotReady(MS),
                Some(left) => *left -= 1,
            }
        }
        self.admitted.push((qp.0, request.seq));
        Verdict::Yes
    }

    fn finish(&mut self, qp: QpKey, request: &crate::frame::Request) -> Verdict {
        let mood = self.mood();
        if mood == Verdict::Yes {
            self.finished.push((qp.0, request.seq));
        }
        mood
    }

    fn atomic(&mut self, _: QpKey, _: &crate::frame::Request) -> Result<u64, Verdict> {
        match self.mood() {
            Verdict::Yes => Ok(7),
            mood => Err(mood),
        }
    }

    fn abandon(&mut self, _: QpKey) {}

    fn posted(&mut self, qp: QpKey) -> Option<u32> {
        self.receives.get(&qp.0).copied()
    }

    fn available(&mut self, _: &Source) -> Availability {
        Availability::Now
    }

    fn datagram(&mut self, datagram: &Datagram) -> bool {
        datagram.qkey != 0
    }

    fn datagram_landed(&mut self, _: &Datagram) {}

    fn datagram_sent(&mut self, token: Token, sent: bool) {
        self.datagrams.push((token.0, sent));
    }

    fn answered(&mut self, _: Token, _: u64) {}

    fn completed(&mut self, token: Token, status: WcStatus) {
        self.completed.push((token.0, status));
    }
}

fn config(dials: bool, lanes: u16) -> Config {
    let (host, peer) = if dials { ([1; 16], [2; 16]) } else { ([2; 16], [1; 16]) };
    Config { host, peer, dials, epoch: if dials { 11 } else { 22 }, ticket: [5; 32], lanes, limits: Limits::default() }
}

/// Two links that are connected; end 0 has dialled.
struct Pair {
    now: Nanos,
    links: [Link; 2],
    devices: [Device; 2],
    conns: Vec<Option<Conn>>,
}

impl Pair {
    fn new(lanes: u16) -> Self {
        let links = [true, false].map(|dials| Link::new(config(dials, lanes), Nanos::ZERO));
        let mut pair = Self { now: MS, links, devices: Default::default(), conns: vec![None; lanes.into()] };
        pair.connect();
        pair
    }

    /// Makes the connections that are wanted.
    fn connect(&mut self) {
        self.links[0].on_timer(self.now, &mut self.devices[0]);
        while let Some(event) = self.links[0].poll_event() {
            let Event::Dial(conn) = event else { continue };
            self.links[0].connected(self.now, conn);
            let out = self.links[0].poll_transmit(self.now, conn, &mut self.devices[0]).unwrap();
            let Frame::Hello(hello) = out.packet.frame else { panic!("not HELLO") };
            self.links[1].accept(self.now, &hello, &mut self.devices[1]).unwrap();
            self.conns[usize::from(conn.lane)] = Some(conn);
            self.pass(1, conn).unwrap();
        }
    }

    /// Gives the next frame of this end to the other.
    fn pass(&mut self, end: usize, conn: Conn) -> Option<Packet> {
        let out = self.links[end].poll_transmit(self.now, conn, &mut self.devices[end])?;
        let (link, device) = (&mut self.links[1 - end], &mut self.devices[1 - end]);
        link.on_frame(self.now, conn, &out.packet, device).unwrap();
        if out.packet.payload > 0 {
            link.on_payload(self.now, conn, Landed::Good, device);
        }
        Some(out.packet)
    }

    /// Until there is nothing to send. What was sent.
    fn run(&mut self) -> Vec<(usize, Packet)> {
        let mut sent = Vec::new();
        loop {
            let before = sent.len();
            for conn in self.conns.clone().into_iter().flatten() {
                for end in 0..2 {
                    self.links[end].on_timer(self.now, &mut self.devices[end]);
                    sent.extend(self.pass(end, conn).map(|packet| (end, packet)));
                }
            }
            if sent.len() == before {
                return sent;
            }
        }
    }

    fn wait(&mut self, time: Nanos) -> Vec<(usize, Packet)> {
        self.now = self.now + time;
        self.run()
    }

    fn open(&mut self, qpn: u32, retries: Retries) -> FlowId {
        self.links[0].open(open(qpn), retries)
    }

    fn post(&mut self, flow: FlowId, token: u64, op: Op, length: u32) {
        let work = Work { token: Token(token), op, length, fence: false, solicited: false };
        self.links[0].post(self.now, flow, work, &mut self.devices[0]).unwrap();
    }

    fn cut(&mut self) {
        for conn in self.conns.iter_mut().filter_map(Option::take) {
            for end in 0..2 {
                self.links[end].disconnected(self.now, conn, &mut self.devices[end]);
            }
        }
    }
}

fn open(qpn: u32) -> Open {
    Open {
        flow: FlowId(0),
        tenant: 1,
        transport: Transport::Rc,
        depth: 4,
        incarnation: 9,
        source: [0; 16],
        destination: [0; 16],
        source_qpn: qpn,
        destination_qpn: qpn,
        psn: 0,
    }
}

fn write() -> Op {
    Op::Write { at: Remote { addr: 0, rkey: 1 }, imm: None }
}

fn kinds(sent: &[(usize, Packet)], end: usize) -> Vec<String> {
    let of_end = sent.iter().filter(|(from, _)| *from == end);
    of_end.map(|(_, packet)| format!("{:?}", packet.frame).split(['(', ' ']).next().unwrap().to_string()).collect()
}

#[test]
fn the_first_message_of_a_flow_costs_one_round_trip_more_than_the_next() {
    let mut pair = Pair::new(1);
    let flow = pair.open(1, FOREVER);
    pair.post(flow, 1, write(), 64);
    let sent = pair.run();
    assert_eq!(kinds(&sent, 0), ["Open", "Request"]);
    assert_eq!(kinds(&sent, 1), ["Opened", "Ack"]);
    pair.post(flow, 2, write(), 64);
    assert_eq!(kinds(&pair.run(), 0), ["Request"]);
    assert_eq!(pair.devices[0].completed, [(1, WcStatus::Success), (2, WcStatus::Success)]);
}

#[test]
fn a_long_message_lets_a_short_one_pass_after_one_frame() {
    let mut pair = Pair::new(1);
    let flows = [pair.open(1, FOREVER), pair.open(2, FOREVER)];
    pair.post(flows[0], 1, write(), 0);
    pair.post(flows[1], 2, write(), 0);
    pair.run();
    pair.post(flows[0], 3, write(), 1 << 20);
    pair.post(flows[1], 4, write(), 8);
    let sent = pair.run();
    let place = sent.iter().position(|(_, packet)| packet.payload == 8).unwrap();
    assert_eq!(sent[..place].iter().filter(|(_, packet)| packet.payload > 0).count(), 1);
    assert!(sent.iter().all(|(_, packet)| packet.payload <= pair.links[0].config.limits.chunk));
}

#[test]
fn a_receiver_that_never_acknowledges_is_sent_one_window_and_others_go_on() {
    let mut pair = Pair::new(1);
    let flows = [pair.open(1, FOREVER), pair.open(2, FOREVER)];
    for (flow, token) in flows.into_iter().zip(1..) {
        pair.post(flow, token, write(), 0);
    }
    pair.run();
    pair.post(flows[0], 3, write(), 1 << 30);
    let (limits, conn) = (pair.links[0].config.limits.clone(), pair.conns[0].unwrap());
    let mut sent = 0;
    while let Some(out) = pair.links[0].poll_transmit(pair.now, conn, &mut pair.devices[0]) {
        sent += out.packet.payload;
    }
    assert_eq!(sent, limits.window);
    pair.post(flows[1], 4, write(), 8);
    assert_eq!(pair.links[0].poll_transmit(pair.now, conn, &mut pair.devices[0]).unwrap().packet.payload, 8);
}

#[test]
fn a_refused_message_is_asked_for_without_its_payload_until_there_is_a_receive() {
    let mut pair = Pair::new(1);
    let flow = pair.open(1, FOREVER);
    pair.post(flow, 1, Op::Send(None), 100_000);
    let first: u32 = pair.run().iter().map(|(_, packet)| packet.payload).sum();
    assert!(first > 0);
    for _ in 0..5 {
        let sent = pair.wait(MS);
        assert_eq!(kinds(&sent, 0), ["Request"]);
        assert_eq!((sent[0].1.payload, kinds(&sent, 1)), (0, vec!["Nak".to_string()]));
    }
    pair.devices[1].receives.insert(1, 1);
    pair.wait(MS);
    assert_eq!(pair.devices[0].completed, [(1, WcStatus::Success)]);
    // Now it knows that there is none: it does not send a long one before it has asked.
    pair.post(flow, 2, Op::Send(None), 100_000);
    assert_eq!(pair.run()[0].1.payload, 0);
}

#[test]
fn rnr_retries_end_after_as_many_as_the_attributes_say() {
    let mut pair = Pair::new(1);
    let flow = pair.open(1, Retries { not_ready: Some(2), ..FOREVER });
    pair.post(flow, 1, Op::Send(None), 8);
    pair.post(flow, 2, Op::Send(None), 8);
    pair.run();
    let tries = (0..10).take_while(|_| pair.devices[0].completed.is_empty() && !pair.wait(MS).is_empty()).count();
    assert_eq!(tries, 2);
    assert_eq!(pair.devices[0].completed, [(1, WcStatus::RnrRetryExcErr), (2, WcStatus::WrFlushErr)]);
}

#[test]
fn a_peer_that_is_not_there_uses_up_timeout_times_retries() {
    let mut pair = Pair::new(1);
    let retries = Retries { timeout: Some(Nanos::from_millis(20)), lost: 3, not_ready: None };
    let flow = pair.open(99, retries);
    pair.post(flow, 1, write(), 8);
    let start = pair.now;
    while pair.devices[0].completed.is_empty() {
        pair.wait(MS);
    }
    assert_eq!(pair.devices[0].completed, [(1, WcStatus::RetryExcErr)]);
    assert_eq!(pair.now - start, Nanos::from_millis(80));
}

#[test]
fn what_was_executed_is_not_sent_again_after_a_break() {
    let mut pair = Pair::new(1);
    let flow = pair.open(1, FOREVER);
    pair.post(flow, 1, write(), 8);
    pair.run();
    pair.post(flow, 2, write(), 8);
    pair.post(flow, 3, write(), 8);
    let conn = pair.conns[0].unwrap();
    pair.pass(0, conn).unwrap();
    // Its ACK is lost.
    pair.cut();
    pair.now = pair.now + MS;
    pair.connect();
    let sent = pair.run();
    assert_eq!(kinds(&sent, 0), ["Resume", "Request"]);
    assert_eq!(pair.devices[1].finished, [(1, 0), (1, 1), (1, 2)]);
    assert_eq!(pair.devices[0].completed.len(), 3);
}

#[test]
fn a_flow_whose_record_is_gone_fails_and_sends_nothing_again() {
    let mut pair = Pair::new(1);
    let flow = pair.open(1, FOREVER);
    pair.post(flow, 1, write(), 8);
    pair.run();
    pair.links[1].unbind(QpKey(1));
    pair.post(flow, 2, write(), 8);
    pair.run();
    assert_eq!(pair.devices[0].status(2), Some(WcStatus::RetryExcErr));
    assert_eq!(pair.devices[1].finished, [(1, 0)]);
}

#[test]
fn a_peer_in_another_life_knows_nothing_and_everything_of_before_is_freed() {
    let mut pair = Pair::new(1);
    let flow = pair.open(1, FOREVER);
    pair.post(flow, 1, write(), 8);
    pair.run();
    pair.post(flow, 2, write(), 8);
    let conn = pair.conns[0].unwrap();
    let hello = Hello {
        versions: VERSIONS,
        host: [1; 16],
        peer: [2; 16],
        epoch: 12,
        generation: 1,
        lane: 0,
        lanes: 1,
        ticket: [5; 32],
    };
    assert_eq!(pair.links[1].accept(pair.now, &hello, &mut pair.devices[1]), Ok(Conn { lane: 0, generation: 1 }));
    assert_eq!(pair.links[1].poll_event(), Some(Event::Close(conn, Violation::Stale)));
    assert_eq!((pair.devices[1].unbound.as_slice(), pair.links[1].footprint().responders), ([1].as_slice(), 0));
}

#[test]
fn hello_is_refused_where_it_is_not_for_this_link() {
    let mut link = Link::new(config(false, 2), Nanos::ZERO);
    let good = Hello {
        versions: (1, 9),
        host: [1; 16],
        peer: [2; 16],
        epoch: 1,
        generation: 3,
        lane: 1,
        lanes: 2,
        ticket: [5; 32],
    };
    let mut ticket = good.ticket;
    ticket[31] ^= 1;
    let bad = [
        Hello { host: [3; 16], ..good },
        Hello { peer: [3; 16], ..good },
        Hello { lanes: 3, ..good },
        Hello { ticket, ..good },
        Hello { versions: (3, 9), ..good },
    ];
    let mut device = Device::default();
    for hello in bad {
        let refused = link.accept(MS, &hello, &mut device);
        assert!(matches!(refused, Err(Violation::Refused(_) | Violation::Version(..))), "{hello:?}: {refused:?}");
    }
    let conn = link.accept(MS, &good, &mut device).unwrap();
    assert_eq!(link.accept(MS, &good, &mut device), Err(Violation::Stale));
    // The answer says which version is spoken.
    let Frame::Hello(answer) = link.poll_transmit(MS, conn, &mut device).unwrap().packet.frame else { panic!() };
    assert_eq!(answer.versions, (2, 2));
    let newer = link.accept(MS, &Hello { generation: 4, ..good }, &mut device).unwrap();
    assert_eq!(link.on_frame(MS, conn, &Packet::bare(Frame::Ping(1)), &mut device), Err(Violation::Stale));
    assert_eq!(link.on_frame(MS, newer, &Packet::bare(Frame::Ping(1)), &mut device), Ok(Landing::Nothing));
}

#[test]
fn a_silent_peer_is_pinged_and_then_given_up() {
    let mut pair = Pair::new(1);
    let limits = pair.links[0].config.limits.clone();
    let sent = pair.wait(limits.keepalive + MS);
    assert!(kinds(&sent, 0).contains(&"Ping".into()) && kinds(&sent, 1).contains(&"Pong".into()));
    let conn = pair.conns[0].unwrap();
    pair.now = pair.now + limits.silence;
    pair.links[0].on_timer(pair.now, &mut pair.devices[0]);
    assert_eq!(pair.links[0].poll_event(), Some(Event::Close(conn, Violation::Silent)));
    assert!(!pair.links[0].is_up(0));
}

#[test]
fn a_datagram_waits_for_its_connection_for_a_while() {
    let mut pair = Pair::new(1);
    let datagram = Datagram {
        tenant: 0,
        source_qpn: 1,
        destination_qpn: 2,
        qkey: 3,
        source: [0; 16],
        destination: [0; 16],
        imm: None,
        solicited: false,
        traffic_class: 0,
        hop_limit: 0,
        flow_label: 0,
    };
    let send = |pair: &mut Pair, token| {
        pair.links[0].send_datagram(pair.now, datagram, 100, Token(token), &mut pair.devices[0]);
    };
    send(&mut pair, 1);
    pair.run();
    // The socket is full: patience, and no more of them than there is room for.
    let most = pair.links[0].config.limits.datagrams as u64;
    (2..=most).for_each(|token| send(&mut pair, token));
    assert!(!pair.links[0].is_congested(1));
    send(&mut pair, most + 1);
    assert!(pair.links[0].is_congested(1));
    pair.links[0].give_up_on(1);
    assert!(!pair.links[0].is_congested(1));
    send(&mut pair, most + 2);
    assert_eq!(pair.devices[0].datagrams, [(1, true), (most + 2, false)]);
    let patience = pair.links[0].config.limits.datagram_patience;
    pair.now = pair.now + patience;
    // A host that was slow itself sends them nevertheless.
    let conn = pair.conns[0].unwrap();
    pair.pass(0, conn).unwrap();
    send(&mut pair, most + 1);
    assert!(pair.links[0].is_congested(1), "one has gone, and another is in its place");
    while pair.pass(0, conn).is_some() {}
    assert_eq!(pair.devices[0].datagrams.last(), Some(&(most + 1, true)));
    // There is no connection.
    pair.cut();
    send(&mut pair, 1000);
    assert_eq!(pair.links[0].footprint().datagrams, 1);
    (1..most).for_each(|_| send(&mut pair, 999));
    assert!(!pair.links[0].is_congested(1), "nobody waits for a connection that is not there");
    pair.now = pair.now + pair.links[0].config.limits.redial;
    pair.connect();
    pair.run();
    assert!(pair.devices[0].datagrams.contains(&(1000, true)));
    pair.cut();
    send(&mut pair, 1001);
    pair.now = pair.now + patience;
    pair.links[0].on_timer(pair.now, &mut pair.devices[0]);
    assert_eq!(pair.devices[0].datagrams.last(), Some(&(1001, false)));
    assert_eq!(pair.links[0].footprint().datagrams, 0);
}

#[test]
fn flows_that_come_and_go_leave_nothing_behind_though_nobody_sends() {
    let mut link = Link::new(config(false, 1), Nanos::ZERO);
    let mut device = Device::default();
    let conn = connect_to(&mut link, 1, &mut device);
    for number in 0..1000 {
        let flow = link.open(open(1), FOREVER);
        let work = Work { token: Token(number), op: write(), length: 8, fence: false, solicited: false };
        link.post(MS, flow, work, &mut device).unwrap();
        link.close(flow);
        let theirs = Open { flow: FlowId(number), transport: Transport::Uc, ..open(2) };
        link.on_frame(MS, conn, &Packet::bare(Frame::Open(theirs)), &mut device).unwrap();
    }
    let held = link.footprint();
    assert_eq!((held.requesters, held.responders, held.queued, held.timers), (0, 1, 1, 1));
}

#[test]
fn answers_to_unknown_flows_are_bounded() {
    let mut link = Link::new(config(false, 1), Nanos::ZERO);
    let mut device = Device::default();
    let conn = connect_to(&mut link, 1, &mut device);
    for flow in 0..10_000 {
        let resume = Packet::bare(Frame::Resume { flow: FlowId(flow), oldest: 0 });
        link.on_frame(MS, conn, &resume, &mut device).unwrap();
    }
    assert_eq!(link.footprint().strays, link.config.limits.strays);
}

#[test]
fn a_peer_cannot_replay_acknowledge_or_answer_what_was_not_sent() {
    let at = |next, got, taken| Position { flow: FlowId(0), next, got, taken };
    let ack = |at| Frame::Ack(crate::frame::Ack { at, credit: None });
    let nak = |next, code| Frame::Nak(Nak { at: at(next, 0, false), code, wait: Nanos::ZERO });
    let lies = [
        ack(at(3, 0, false)),
        ack(at(0, 0, false)),
        ack(at(1, 65, true)),
        nak(2, NakCode::NotReady),
        nak(2, NakCode::Access),
        nak(0, NakCode::Access),
        Frame::ReadData(crate::frame::Piece { flow: FlowId(0), seq: 1, offset: 0 }),
        Frame::AtomicReply(crate::frame::AtomicReply { flow: FlowId(0), seq: 1, value: 0 }),
        Frame::AtomicReply(crate::frame::AtomicReply { flow: FlowId(0), seq: 5, value: 0 }),
        Frame::Resumed(at(u64::MAX, 0, false)),
    ];
    for lie in lies {
        let mut pair = Pair::new(1);
        let flow = pair.open(1, FOREVER);
        pair.post(flow, 1, write(), 8);
        pair.run();
        pair.post(flow, 2, write(), 64);
        let conn = pair.conns[0].unwrap();
        pair.links[0].poll_transmit(pair.now, conn, &mut pair.devices[0]).unwrap();
        let heard = pair.links[0].on_frame(pair.now, conn, &Packet { frame: lie, payload: 0 }, &mut pair.devices[0]);
        let ignored = matches!(lie, Frame::Resumed(_));
        assert_eq!(heard.is_ok(), ignored, "{lie:?}: {heard:?}");
        assert_eq!(pair.links[0].is_up(0), ignored);
        assert_eq!(pair.devices[0].completed.len(), 1, "{lie:?}");
    }
}

#[test]
fn a_message_that_comes_again_or_too_early_closes_the_connection() {
    for seq in [0, 2, u64::MAX] {
        let mut pair = Pair::new(1);
        let flow = pair.open(1, FOREVER);
        pair.post(flow, 1, write(), 8);
        pair.run();
        let conn = pair.conns[0].unwrap();
        let request = crate::frame::Request { flow, seq, op: write(), length: 8, solicited: false, probe: false };
        let packet = Packet { frame: Frame::Request(request), payload: 8 };
        let heard = pair.links[1].on_frame(pair.now, conn, &packet, &mut pair.devices[1]);
        assert_eq!(heard, Err(Violation::Order("REQUEST")));
        assert_eq!(pair.devices[1].finished, [(1, 0)]);
    }
}

#[test]
fn more_reads_than_may_be_outstanding_are_refused() {
    let mut pair = Pair::new(1);
    let flow = pair.open(1, FOREVER);
    pair.post(flow, 1, write(), 0);
    pair.run();
    let (conn, op) = (pair.conns[0].unwrap(), Op::Read { at: Remote { addr: 0, rkey: 1 }, again_from: None });
    for seq in 1..9 {
        let request = crate::frame::Request { flow, seq, op, length: 1 << 30, solicited: false, probe: false };
        let packet = Packet::bare(Frame::Request(request));
        pair.links[1].on_frame(pair.now, conn, &packet, &mut pair.devices[1]).unwrap();
    }
    assert_eq!(pair.links[1].footprint().answers, 2);
    let refusal = pair.links[1].poll_transmit(pair.now, conn, &mut pair.devices[1]).unwrap().packet.frame;
    assert!(matches!(refusal, Frame::Nak(Nak { code: NakCode::Invalid, at: Position { next: 3, .. }, .. })));
}

/// A link that accepts gets this connection.
fn connect_to(link: &mut Link, generation: u64, device: &mut Device) -> Conn {
    connect_with(link, VERSIONS, generation, device)
}

fn connect_with(link: &mut Link, versions: (u16, u16), generation: u64, device: &mut Device) -> Conn {
    let lanes = link.config.lanes;
    let hello = Hello { versions, host: [1; 16], peer: [2; 16], epoch: 1, generation, lane: 0, lanes, ticket: [5; 32] };
    link.accept(MS, &hello, device).unwrap()
}

proptest! {
    #[test]
    fn no_sequence_of_frames_breaks_a_link_or_makes_it_grow(
        packets in vec((packet(), 0..5u8, 0..3u8), 1..120),
        receives in 0..4u32,
    ) {
        let mut link = Link::new(config(false, 1), Nanos::ZERO);
        let mut device = Device::default();
        device.receives.extend((0..8).map(|qp| (qp, receives)));
        let mut conn = connect_to(&mut link, 1, &mut device);
        for (qpn, transport) in [(0, Transport::Rc), (1, Transport::Rc), (2, Transport::Uc)] {
            let flow = link.open(Open { transport, ..open(qpn) }, FOREVER);
            let ops = [write(), Op::Send(None), Op::Read { at: Remote { addr: 0, rkey: 0 }, again_from: None }];
            for op in ops {
                let work = Work { token: Token(0), op, length: 200, fence: false, solicited: false };
                let _ = link.post(MS, flow, work, &mut device);
            }
        }
        let mut now = MS;
        for (index, (packet, mood, frames)) in packets.into_iter().enumerate() {
            now = now + Nanos::from_micros(50);
            let landed = [
                Landed::Good,
                Landed::Good,
                Landed::Void,
                Landed::Later(MS),
                Landed::Refused(crate::host::Refusal::Access),
            ][usize::from(mood)];
            if mood == 3 {
                device.moods.push_back(Verdict::Later(MS));
            }
            match link.on_frame(now, conn, &packet, &mut device) {
                Ok(landing) => {
                    prop_assert_eq!(landing == Landing::Nothing, packet.payload == 0);
                    if packet.payload > 0 {
                        link.on_payload(now, conn, landed, &mut device);
                    }
                }
                Err(why) => {
                    prop_assert!(why.bye() != Bye::Silent);
                    conn = connect_to(&mut link, 2 + index as u64, &mut device);
                }
            }
            for _ in 0..frames {
                if let Some(out) = link.poll_transmit(now, conn, &mut device) {
                    prop_assert_eq!(Packet::parse(out.packet.encode().as_bytes()).unwrap().unwrap().0, out.packet);
                }
            }
            link.on_timer(now, &mut device);
            while link.poll_event().is_some() {}
            let held = link.footprint();
            prop_assert!(held.responders <= 8 && held.messages <= 9 && held.answers <= 16 && held.replies <= 16);
            prop_assert!(held.queued <= 4 + 2 * held.responders && held.timers <= 5 + held.responders);
            prop_assert!(held.in_flight <= 3 * (1 << 20));
        }
    }
}

/// A link with a peer that speaks up to this version.
fn greeted(newest: u16) -> (Link, Conn, Device) {
    let mut device = Device::default();
    let mut link = Link::new(config(false, 1), Nanos::ZERO);
    let conn = connect_with(&mut link, (1, newest), 1, &mut device);
    while link.poll_transmit(MS, conn, &mut device).is_some() {}
    (link, conn, device)
}

#[test]
fn notes_keep_their_order_and_are_lost_with_their_connection() {
    let (mut link, conn, mut device) = greeted(2);
    let key = |key| Note::Key { pair: PairId(4), key };
    assert!(link.say(key(1)) && link.say(key(2)));
    let next = |link: &mut Link, device: &mut Device| link.poll_transmit(MS, conn, device).map(|out| out.packet.frame);
    assert_eq!(next(&mut link, &mut device), Some(Frame::Note(key(1))));
    assert_eq!(link.on_frame(MS, conn, &key(7).into(), &mut device), Ok(Landing::Nothing));
    assert_eq!(device.notes, [key(7)]);
    link.disconnected(MS, conn, &mut device);
    assert!(!link.say(key(3)), "nobody hears it");
    assert_eq!(link.footprint().notes, 0);
}

#[test]
fn no_more_notes_wait_than_may() {
    let (mut link, ..) = greeted(2);
    let said = (0..10_000).filter(|&key| link.say(Note::Key { pair: PairId(0), key })).count();
    assert_eq!((said, link.footprint().notes), (Limits::default().notes, Limits::default().notes));
}

#[test]
fn version_1_has_no_notes() {
    let (mut link, conn, mut device) = greeted(1);
    let note = Note::Key { pair: PairId(0), key: 1 };
    assert!(!link.say(note));
    assert!(link.on_frame(MS, conn, &note.into(), &mut device).is_err());
}
