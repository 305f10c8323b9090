//! What travels between two hosts over TCP. Two ends of a link talk, and what the one says reaches the other as the input wants it: whole,
//! with bits turned over, cut off, twice, late, again after others, or in bytes of the input's own. What must hold all the same: no end
//! panics or grows, and none completes a work request twice or out of order, executes a message twice, or puts bytes where they do not
//! belong.

mod device;

use freeflow_tcp::frame::{Bye, Datagram, FlowId, Frame, Op, Open, Packet, Remote, Trailer, Transport};
use freeflow_tcp::host::{Landed, Landing, Token};
use freeflow_tcp::stream::{Inbound, Next};
use freeflow_tcp::{Config, Conn, Event, Limits, Link, Nanos, Outgoing, Retries, Work};

use self::device::{DEPTH, Device, Posted, QPS};
use super::Input;

/// Frames that are remembered, to come again.
const REMEMBERED: usize = 16;
/// Most answers to unknown flows that wait.
const STRAYS: usize = 16;
/// Most datagrams that wait.
const DATAGRAMS: usize = 4;

/// Runs one input.
///
/// # Panics
/// When an end does what it must not.
pub fn stream(data: &[u8]) {
    let mut input = Input(data);
    let mut wire = Wire { ends: [End::new(0), End::new(1)], now: Nanos::from_millis(1), said: Vec::new() };
    while !input.is_empty() {
        wire.step(&mut input);
        wire.ends.iter().for_each(End::check_bounds);
    }
}

/// One end: 0 dials, and 1 hears what the input makes of what 0 says.
struct End {
    link: Link,
    device: Device,
    flows: Vec<FlowId>,
    conn: Option<Conn>,
    inbound: Inbound,
    /// What has come and was not read.
    bytes: Vec<u8>,
    landing: Landing,
}

impl End {
    fn new(number: u8) -> Self {
        let limits = Limits { window: 4096, messages: 8, strays: STRAYS, datagrams: DATAGRAMS, ..Limits::default() };
        let config = Config {
            host: [number; 16],
            peer: [1 - number; 16],
            dials: number == 0,
            epoch: u64::from(number) + 1,
            ticket: [0; 32],
            lanes: 1,
            limits,
        };
        let mut link = Link::new(config, Nanos::ZERO);
        let flows = (0..QPS).map(|qp| link.open(open(qp), Retries { timeout: None, lost: 7, not_ready: None }));
        let flows = flows.collect();
        let (device, inbound, landing) = (Device::default(), Inbound::default(), Landing::Nothing);
        Self { link, device, flows, conn: None, inbound, bytes: Vec::new(), landing }
    }

    fn post(&mut self, input: &mut Input<'_>, now: Nanos) {
        let flow = usize::from(input.byte()) % self.flows.len();
        let at = Remote { addr: 0, rkey: 0 };
        let (op, length) = match input.byte() % 8 {
            0 => (Op::Send(None), input.below(9000) as u32),
            1 => (Op::Send(Some(1)), input.below(300) as u32),
            2 => (Op::Write { at, imm: None }, input.below(70_000) as u32),
            3 => (Op::Write { at, imm: Some(2) }, 0),
            4 => (Op::Read { at, again_from: None }, input.below(9000) as u32),
            5 => (Op::FetchAdd { at, add: 1 }, 8),
            6 => (Op::CompareSwap { at, compare: 0, swap: 1 }, 8),
            _ => (Op::SendInvalidate(3), 8),
        };
        let unreliable = device::transport_of(flow as u32) == Transport::Uc;
        if unreliable && !matches!(op, Op::Send(_) | Op::Write { .. }) {
            return;
        }
        let token = self.device.next_token();
        let fence = input.byte().is_multiple_of(8);
        let work = Work { token, op, length, fence, solicited: false };
        // Before it is taken: it may complete at once.
        self.device.posted.insert(token.0, Posted { flow, length, reads: matches!(op, Op::Read { .. }) });
        if self.link.post(now, self.flows[flow], work, &mut self.device).is_err() {
            self.device.posted.remove(&token.0);
        }
    }

    fn send_datagram(&mut self, input: &mut Input<'_>, now: Nanos) {
        let datagram = Datagram {
            tenant: 0,
            source_qpn: 1,
            destination_qpn: 2,
            qkey: 0,
            source: [0; 16],
            destination: [0; 16],
            imm: None,
            solicited: false,
            traffic_class: 0,
            hop_limit: 0,
            flow_label: 0,
        };
        // Datagrams have names of their own.
        self.link.send_datagram(now, datagram, input.below(300) as u32, Token(u64::MAX), &mut self.device);
    }

    /// The next frame, as it is to travel.
    fn speak(&mut self, now: Nanos) -> Option<Vec<u8>> {
        self.device.begin_frame();
        let out = self.link.poll_transmit(now, self.conn?, &mut self.device)?;
        self.device.check_source(&out);
        Some(travelling(&out))
    }

    /// Reads what has come. False if the connection is over.
    fn hear(&mut self, now: Nanos) -> bool {
        let mut start = 0;
        let alive = self.read(&mut start, now);
        self.bytes.drain(..start);
        alive
    }

    fn read(&mut self, start: &mut usize, now: Nanos) -> bool {
        loop {
            match self.inbound.next(&self.bytes[*start..]) {
                Ok(Next::More) => return true,
                Ok(Next::Frame(packet, len)) => {
                    *start += len;
                    if !self.take(&packet, now) {
                        return false;
                    }
                }
                Ok(Next::Payload(left)) => {
                    let taken = (self.bytes.len() - *start).min(left as usize);
                    if taken == 0 {
                        return true;
                    }
                    self.inbound.consumed(taken as u32);
                    *start += taken;
                }
                Ok(Next::Trailer(trailer, len)) => {
                    *start += len;
                    let Some(conn) = self.conn else { return false };
                    let landed = if trailer == Trailer::Good { self.device.land(&self.landing) } else { Landed::Void };
                    self.link.on_payload(now, conn, landed, &mut self.device);
                }
                Err(why) => {
                    if let Some(conn) = self.conn {
                        self.link.on_malformed(now, conn, why.into(), &mut self.device);
                    }
                    return false;
                }
            }
        }
    }

    /// False if it may not be.
    fn take(&mut self, packet: &Packet, now: Nanos) -> bool {
        let Some(conn) = self.conn else {
            let Frame::Hello(hello) = packet.frame else { return false };
            self.conn = self.link.accept(now, &hello, &mut self.device).ok();
            return self.conn.is_some();
        };
        let Ok(landing) = self.link.on_frame(now, conn, packet, &mut self.device) else { return false };
        self.device.check_landing(&landing, packet.payload);
        self.landing = landing;
        true
    }

    fn hang_up(&mut self, now: Nanos, tell: bool) {
        if let Some(conn) = self.conn.take()
            && tell
        {
            self.link.disconnected(now, conn, &mut self.device);
        }
        (self.inbound, self.landing) = (Inbound::default(), Landing::Nothing);
        self.bytes.clear();
    }

    fn check_bounds(&self) {
        let held = self.link.footprint();
        let (qps, depth) = (QPS as usize, usize::from(DEPTH));
        let of_peer = held.responders <= qps && held.answers <= qps * depth && held.replies <= qps * depth;
        assert!(of_peer && held.strays <= STRAYS && held.datagrams <= DATAGRAMS, "{held:?}");
        assert!(held.messages <= self.device.posted.len() && held.requesters <= qps, "{held:?}");
        // Each flow of either side, datagrams and the connection itself are in either queue once.
        assert!(held.queued <= 2 * (2 * qps + 2) && held.timers <= 2 * qps + 2, "{held:?}");
    }
}

/// The two ends and what is between them.
struct Wire {
    ends: [End; 2],
    now: Nanos,
    /// Frames that end 0 has said.
    said: Vec<Vec<u8>>,
}

impl Wire {
    fn step(&mut self, input: &mut Input<'_>) {
        let step = input.byte();
        let end = usize::from(step >> 7);
        match step & 15 {
            0..4 => self.ends[end].post(input, self.now),
            4..9 => self.talk(0, input),
            9..12 => self.talk(1, input),
            12 => self.ends[end].send_datagram(input, self.now),
            13 => self.pass_time(input),
            14 => self.intrude(input),
            _ => self.disturb(input),
        }
        self.see_to_events();
    }

    fn pass_time(&mut self, input: &mut Input<'_>) {
        self.now = self.now + Nanos(u64::from(input.byte()) << (input.byte() % 24));
        for end in &mut self.ends {
            end.link.on_timer(self.now, &mut end.device);
        }
    }

    /// One end says some frames. Those of end 0 arrive as the input wants.
    fn talk(&mut self, from: usize, input: &mut Input<'_>) {
        for _ in 0..=input.byte() % 4 {
            let Some(mut frame) = self.ends[from].speak(self.now) else { return };
            if from == 0 {
                self.said.truncate(REMEMBERED - 1);
                self.said.insert(0, frame.clone());
                change(&mut frame, input);
            }
            if !self.deliver(1 - from, &frame) {
                return;
            }
        }
    }

    /// Something that end 0 has not said now: a frame of before, or bytes.
    fn intrude(&mut self, input: &mut Input<'_>) {
        let kind = input.byte();
        let bytes = if kind & 1 == 0 && !self.said.is_empty() {
            self.said[usize::from(kind >> 1) % self.said.len()].clone()
        } else {
            let len = usize::from(kind >> 1);
            input.take(len).to_vec()
        };
        self.deliver(1, &bytes);
    }

    /// The connection breaks, an end lets go of a flow, or a QP is no more.
    fn disturb(&mut self, input: &mut Input<'_>) {
        let what = input.byte();
        let end = &mut self.ends[usize::from(what >> 7)];
        match what % 8 {
            0 => drop(self.deliver(1, Packet::bare(Frame::Bye(Bye::Shutdown)).encode().as_bytes())),
            1 => {
                let qp = u32::from(what >> 3) % QPS;
                end.link.unbind(device::key(qp));
                end.device.forget(device::key(qp));
            }
            2 => {
                let index = usize::from(what >> 3) % end.flows.len();
                end.link.close(end.flows[index]);
                end.device.posted.retain(|_, posted| posted.flow != index);
                end.flows[index] =
                    end.link.open(open(index as u32), Retries { timeout: None, lost: 7, not_ready: None });
            }
            _ => self.cut(None),
        }
    }

    /// False if the connection is over.
    fn deliver(&mut self, to: usize, bytes: &[u8]) -> bool {
        // A connection carries nothing from who has not made it.
        if self.ends[0].conn.is_none() {
            return false;
        }
        self.ends[to].bytes.extend_from_slice(bytes);
        let alive = self.ends[to].hear(self.now);
        if !alive {
            self.cut(Some(to));
        }
        alive
    }

    /// The connection is no more; this end knows it already.
    fn cut(&mut self, by: Option<usize>) {
        for (index, end) in self.ends.iter_mut().enumerate() {
            end.hang_up(self.now, by != Some(index));
        }
    }

    fn see_to_events(&mut self) {
        for index in 0..2 {
            while let Some(event) = self.ends[index].link.poll_event() {
                match event {
                    Event::Dial(conn) => {
                        self.cut(None);
                        self.ends[index].conn = Some(conn);
                        self.ends[index].link.connected(self.now, conn);
                    }
                    Event::Close(conn, _) if self.ends[index].conn == Some(conn) => self.cut(Some(index)),
                    Event::Close(..) => {}
                }
            }
        }
    }
}

fn open(qp: u32) -> Open {
    Open {
        flow: FlowId(0),
        tenant: 0,
        transport: device::transport_of(qp),
        depth: DEPTH,
        incarnation: 1,
        source: [0; 16],
        destination: [0; 16],
        source_qpn: qp,
        destination_qpn: qp,
        psn: 0,
    }
}

/// A frame with its payload and trailer.
fn travelling(out: &Outgoing) -> Vec<u8> {
    let header = out.packet.encode();
    let parsed = Packet::parse(header.as_bytes());
    assert!(matches!(parsed, Ok(Some((packet, _))) if packet == out.packet), "{out:?}");
    let mut bytes = header.as_bytes().to_vec();
    if out.packet.payload > 0 {
        bytes.resize(bytes.len() + out.packet.payload as usize, 0xab);
        bytes.extend(Trailer::Good.to_wire());
    }
    bytes
}

/// What the input makes of a frame: most are left as they are.
fn change(frame: &mut Vec<u8>, input: &mut Input<'_>) {
    match input.byte() % 16 {
        // In its head and body, mostly.
        0 => {
            let at = input.below(frame.len().min(160));
            frame[at] ^= 1 << (input.byte() % 8);
        }
        1 => {
            let at = input.below(frame.len());
            frame[at] = input.byte();
        }
        2 => frame.clear(),
        3 => frame.truncate(input.below(frame.len())),
        4 => frame.extend_from_within(..),
        5 => {
            let len = usize::from(input.byte() % 32);
            frame.splice(..0, input.take(len).iter().copied());
        }
        // The trailer.
        6 => {
            let end = frame.len();
            frame[end.saturating_sub(4)..].copy_from_slice(&Trailer::Void.to_wire());
        }
        _ => {}
    }
}
