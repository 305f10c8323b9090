//! What to send next on a connection. Nothing is made before there is room for it in the socket: there are no queues of frames.

use super::Link;
use crate::frame::{FlowId, Frame, Hello, Nak, NakCode, Packet, Position, VERSIONS};
use crate::host::{Host, Origin, Source};
use crate::lane::{Conn, Lane, Side, State};
use crate::{Env, Nanos};

/// A frame to be sent: its bytes, then the payload, then a trailer if there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outgoing {
    /// Head and body.
    pub packet: Packet,
    /// Where the payload comes from.
    pub source: Option<Source>,
}

impl Outgoing {
    fn bare(frame: Frame) -> Self {
        Self { packet: Packet::bare(frame), source: None }
    }
}

impl Link {
    /// The next frame for this connection, if there is one. It must be sent as a whole before the next.
    pub fn poll_transmit<H: Host>(&mut self, now: Nanos, conn: Conn, host: &mut H) -> Option<Outgoing> {
        let lane = self.lane(conn).ok()?;
        if std::mem::take(&mut lane.hello_due) {
            lane.said = now;
            let version = lane.version;
            return Some(Outgoing::bare(Frame::Hello(self.hello(conn, version))));
        }
        if !lane.is_up() {
            return None;
        }
        let out = match lane.next_own(now) {
            Some(own) => own,
            None => self.next_of_flows(conn, now, host)?,
        };
        self.lane(conn).ok()?.said = now;
        Some(out)
    }

    /// Of an answer both versions are the one that is spoken.
    fn hello(&self, conn: Conn, version: u16) -> Hello {
        let versions = if self.config.dials { VERSIONS } else { (version, version) };
        Hello {
            versions,
            host: self.config.host,
            peer: self.config.peer,
            epoch: self.config.epoch,
            generation: conn.generation,
            lane: conn.lane,
            lanes: self.config.lanes,
            ticket: self.config.ticket,
        }
    }

    fn next_of_flows<H: Host>(&mut self, conn: Conn, now: Nanos, host: &mut H) -> Option<Outgoing> {
        let index = usize::from(conn.lane);
        for _ in 0..self.lanes[index].control.len() {
            let side = self.lanes[index].control.pop_front()?;
            let out = self.control_of(side, now, host);
            self.refresh(side, now);
            if out.is_some() {
                return out;
            }
        }
        for _ in 0..self.lanes[index].data.len() {
            let side = self.lanes[index].data.pop_front()?;
            let out = self.data_of(side, now, host);
            self.refresh(side, now);
            if out.is_some() {
                return out;
            }
        }
        None
    }

    fn control_of<H: Host>(&mut self, side: Side, now: Nanos, host: &mut H) -> Option<Outgoing> {
        let Side::Responder(flow) = side else {
            return None;
        };
        let responder = self.flows.responders.get_mut(&flow)?;
        responder.queued.control = false;
        let packet = responder.next_control(&mut Env { now, limits: &self.config.limits, host })?;
        Some(Outgoing { packet, source: None })
    }

    fn data_of<H: Host>(&mut self, side: Side, now: Nanos, host: &mut H) -> Option<Outgoing> {
        let env = &mut Env { now, limits: &self.config.limits, host };
        let (packet, source) = match side {
            Side::Lane(_) => return None,
            Side::Datagrams(index) => return self.lanes[usize::from(index)].next_datagram(env.host),
            Side::Requester(flow) => {
                let requester = self.flows.requesters.get_mut(&flow)?;
                requester.queued.data = false;
                requester.next_frame(env)?
            }
            Side::Responder(flow) => {
                let responder = self.flows.responders.get_mut(&flow)?;
                responder.queued.data = false;
                responder.next_data(env)?
            }
        };
        Some(Outgoing { packet, source })
    }

    /// The payload of this frame could not be taken from memory to its end. The rest was filled up, and the trailer says that it is void.
    pub fn on_source_failed<H: Host>(&mut self, now: Nanos, out: &Outgoing, host: &mut H) {
        match out.packet.frame {
            Frame::Request(request) => self.message_failed(request.flow, request.seq, now, host),
            Frame::Data(piece) => self.message_failed(piece.flow, piece.seq, now, host),
            Frame::ReadData(piece) => {
                if let Some(responder) = self.flows.responders.get_mut(&piece.flow) {
                    responder.source_failed(piece.seq);
                    self.refresh(Side::Responder(piece.flow), now);
                }
            }
            _ => {}
        }
    }

    fn message_failed<H: Host>(&mut self, flow: FlowId, seq: u64, now: Nanos, host: &mut H) {
        if let Some(requester) = self.flows.requesters.get_mut(&flow) {
            requester.source_failed(seq, &mut Env { now, limits: &self.config.limits, host });
            self.refresh(Side::Requester(flow), now);
        }
    }
}

impl Lane {
    /// What belongs to no flow that is known.
    fn next_own(&mut self, now: Nanos) -> Option<Outgoing> {
        debug_assert_eq!(self.state, State::Up);
        if let Some(token) = self.pong_due.take() {
            return Some(Outgoing::bare(Frame::Pong(token)));
        }
        if std::mem::take(&mut self.ping_due) {
            return Some(Outgoing::bare(Frame::Ping(now.0)));
        }
        if let Some(note) = self.notes.pop_front() {
            return Some(Outgoing { packet: note.into(), source: None });
        }
        let (flow, code) = self.strays.pop_front()?;
        Some(Outgoing::bare(Frame::Nak(stray(Position { flow, next: 0, got: 0, taken: false }, code))))
    }

    fn next_datagram<H: Host>(&mut self, host: &mut H) -> Option<Outgoing> {
        self.datagrams_queued.data = false;
        let next = self.datagrams.pop_front()?;
        self.stuck = false;
        host.datagram_sent(next.token, true);
        let source = Source { origin: Origin::Datagram(next.token), offset: 0, len: next.len };
        let packet = Packet { frame: Frame::Datagram(next.datagram), payload: next.len };
        Some(Outgoing { packet, source: Some(source).filter(|source| source.len > 0) })
    }

    /// Drops datagrams that have waited for too long. Only the timer does: one that can be sent now is not dropped because this host was slow.
    pub(super) fn drop_late<H: Host>(&mut self, now: Nanos, host: &mut H) {
        while let Some(first) = self.datagrams.front()
            && first.ends <= now
        {
            host.datagram_sent(first.token, false);
            self.datagrams.pop_front();
        }
    }
}

fn stray(at: Position, code: NakCode) -> Nak {
    Nak { at, code, wait: Nanos::ZERO }
}
