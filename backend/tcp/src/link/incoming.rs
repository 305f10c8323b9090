//! Frames that came: to whom they go.

use super::Link;
use crate::frame::{FlowId, Frame, NakCode, Open, Packet, Piece, Request, VERSION_OF_NOTES};
use crate::host::{Host, Landed, Landing};
use crate::lane::{Conn, Pending, Side};
use crate::responder::Responder;
use crate::{Env, Nanos, Violation};

impl Link {
    /// A frame has come, its payload not yet: says where that goes. When it is there, and its trailer, [`on_payload`](Self::on_payload) is due before the
    /// next frame.
    ///
    /// # Errors
    /// Why the connection is to be closed; in here it is already.
    pub fn on_frame<H: Host>(
        &mut self,
        now: Nanos,
        conn: Conn,
        packet: &Packet,
        host: &mut H,
    ) -> Result<Landing, Violation> {
        let lane = self.lane(conn)?;
        lane.heard = now;
        if lane.pending.is_some() {
            return Err(self.fail(conn, Violation::Unexpected("frame"), now, host));
        }
        if !lane.is_up() && !matches!(packet.frame, Frame::Hello(_) | Frame::Bye(_)) {
            return Err(self.fail(conn, Violation::Unexpected("frame before HELLO"), now, host));
        }
        let landing = self.dispatch(conn, packet, now, host).map_err(|why| self.fail(conn, why, now, host))?;
        if packet.payload == 0 {
            return Ok(Landing::Nothing);
        }
        let landing = if landing == Landing::Nothing { Landing::Discard } else { landing };
        self.expect(conn, packet, landing);
        Ok(landing)
    }

    /// What came on this connection is not a frame.
    pub fn on_malformed<H: Host>(&mut self, now: Nanos, conn: Conn, why: Violation, host: &mut H) {
        if self.lane(conn).is_ok() {
            self.fail(conn, why, now, host);
        }
    }

    fn fail<H: Host>(&mut self, conn: Conn, why: Violation, now: Nanos, host: &mut H) -> Violation {
        self.end(conn.lane, now, None, host);
        why
    }

    /// Remembers whose payload is coming.
    fn expect(&mut self, conn: Conn, packet: &Packet, landing: Landing) {
        let len = packet.payload;
        let pending = match (landing, packet.frame) {
            (Landing::Message { request, .. }, _) => Pending::Message { flow: request.flow, seq: request.seq, len },
            (Landing::Answer { .. }, Frame::ReadData(piece)) => {
                Pending::Answer { flow: piece.flow, seq: piece.seq, len }
            }
            (Landing::Datagram(datagram), _) => Pending::Datagram(datagram),
            _ => Pending::Nobody,
        };
        if let Ok(lane) = self.lane(conn) {
            lane.pending = Some(pending);
        }
    }

    fn dispatch<H: Host>(
        &mut self,
        conn: Conn,
        packet: &Packet,
        now: Nanos,
        host: &mut H,
    ) -> Result<Landing, Violation> {
        match &packet.frame {
            Frame::Hello(hello) => self.on_hello(conn, hello, now, host)?,
            Frame::Open(open) => self.on_open(conn, open, now, host)?,
            Frame::Resume { flow, oldest } => {
                let known = self.responder(conn, *flow, now, host, |responder, _| responder.on_resume(*oldest))?;
                if known.is_none() {
                    self.answer_stray(conn, *flow, NakCode::Gone);
                }
            }
            Frame::Request(request) => return self.on_request(conn, request, packet.payload, now, host),
            Frame::Data(piece) => {
                let known =
                    self.responder(conn, piece.flow, now, host, |r, env| r.on_data(piece, packet.payload, env))?;
                // Of a flow that is not known: the frame that began the message was answered.
                return Ok(known.unwrap_or(Landing::Discard));
            }
            Frame::ReadData(piece) => return self.on_read_data(conn, piece, packet.payload, now, host),
            Frame::Opened(opened) => {
                self.requester(conn, opened.flow, now, host, |requester, env| requester.on_opened(opened, env))?;
            }
            Frame::Resumed(at) => {
                self.requester(conn, at.flow, now, host, |requester, env| requester.on_resumed(at, env))?;
            }
            Frame::Ack(ack) => {
                self.requester(conn, ack.at.flow, now, host, |requester, env| requester.on_ack(ack, env))?;
            }
            Frame::Nak(nak) => {
                self.requester(conn, nak.at.flow, now, host, |requester, env| requester.on_nak(nak, env))?;
            }
            Frame::AtomicReply(reply) => {
                self.requester(conn, reply.flow, now, host, |requester, env| requester.on_atomic_reply(reply, env))?;
            }
            Frame::Datagram(datagram) => {
                return Ok(match host.datagram(datagram) {
                    true if packet.payload > 0 => Landing::Datagram(*datagram),
                    true => {
                        host.datagram_landed(datagram);
                        Landing::Nothing
                    }
                    false => Landing::Discard,
                });
            }
            Frame::Ping(token) => self.lane(conn)?.pong_due = Some(*token),
            Frame::Pong(_) => {}
            Frame::Bye(cause) => return Err(Violation::Bye(*cause)),
            Frame::Note(note) => {
                if self.lane(conn)?.version < VERSION_OF_NOTES {
                    return Err(Violation::Unexpected("a note in version 1"));
                }
                self.check_lane(conn, FlowId(note.pair().0))?;
                host.note(note);
            }
        }
        Ok(Landing::Nothing)
    }

    /// Has a requester hear something. One that is no more hears nothing, and that is all.
    fn requester<H: Host, T>(
        &mut self,
        conn: Conn,
        flow: FlowId,
        now: Nanos,
        host: &mut H,
        hear: impl FnOnce(&mut crate::requester::Requester, &mut Env<'_, H>) -> Result<T, Violation>,
    ) -> Result<Option<T>, Violation> {
        self.check_lane(conn, flow)?;
        let Some(requester) = self.flows.requesters.get_mut(&flow) else {
            return Ok(None);
        };
        let heard = hear(requester, &mut Env { now, limits: &self.config.limits, host })?;
        self.refresh(Side::Requester(flow), now);
        Ok(Some(heard))
    }

    /// Has a responder hear something.
    fn responder<H: Host, T>(
        &mut self,
        conn: Conn,
        flow: FlowId,
        now: Nanos,
        host: &mut H,
        hear: impl FnOnce(&mut Responder, &mut Env<'_, H>) -> Result<T, Violation>,
    ) -> Result<Option<T>, Violation> {
        self.check_lane(conn, flow)?;
        let Some(responder) = self.flows.responders.get_mut(&flow) else {
            return Ok(None);
        };
        let heard = hear(responder, &mut Env { now, limits: &self.config.limits, host })?;
        self.refresh(Side::Responder(flow), now);
        Ok(Some(heard))
    }

    fn check_lane(&self, conn: Conn, flow: FlowId) -> Result<(), Violation> {
        let own = self.lane_of_flow(flow) == usize::from(conn.lane);
        if own { Ok(()) } else { Err(Violation::Lane) }
    }

    fn answer_stray(&mut self, conn: Conn, flow: FlowId, code: NakCode) {
        self.lanes[usize::from(conn.lane)].answer_stray(flow, code, &self.config.limits);
    }

    fn on_open<H: Host>(&mut self, conn: Conn, open: &Open, now: Nanos, host: &mut H) -> Result<(), Violation> {
        let known = self.responder(conn, open.flow, now, host, |responder, _| responder.on_open_again(open))?;
        if known.is_some() {
            return Ok(());
        }
        let Some(bound) = host.bind(open) else {
            self.answer_stray(conn, open.flow, NakCode::NotThere);
            return Ok(());
        };
        if let Some(before) = self.flows.by_qp.insert(bound.qp, open.flow) {
            self.remove_responder(before);
        }
        self.flows.responders.insert(open.flow, Responder::new(open, &bound));
        self.refresh(Side::Responder(open.flow), now);
        Ok(())
    }

    fn on_request<H: Host>(
        &mut self,
        conn: Conn,
        request: &Request,
        payload: u32,
        now: Nanos,
        host: &mut H,
    ) -> Result<Landing, Violation> {
        let known = self.responder(conn, request.flow, now, host, |r, env| r.on_request(request, payload, env))?;
        if known.is_none() {
            self.answer_stray(conn, request.flow, NakCode::Gone);
        }
        Ok(known.unwrap_or(Landing::Discard))
    }

    fn on_read_data<H: Host>(
        &mut self,
        conn: Conn,
        piece: &Piece,
        len: u32,
        now: Nanos,
        host: &mut H,
    ) -> Result<Landing, Violation> {
        let known = self.requester(conn, piece.flow, now, host, |r, env| r.on_read_data(piece, len, env))?;
        Ok(known.unwrap_or(Landing::Discard))
    }

    /// The payload of the last frame, and its trailer, have come.
    pub fn on_payload<H: Host>(&mut self, now: Nanos, conn: Conn, landed: Landed, host: &mut H) {
        let Ok(lane) = self.lane(conn) else { return };
        lane.heard = now;
        let pending = lane.pending.take();
        let mut env = Env { now, limits: &self.config.limits, host };
        match pending {
            Some(Pending::Message { flow, seq, len }) => {
                if let Some(responder) = self.flows.responders.get_mut(&flow) {
                    responder.landed(seq, len, landed, &mut env);
                    self.refresh(Side::Responder(flow), now);
                }
            }
            Some(Pending::Answer { flow, seq, len }) => {
                if let Some(requester) = self.flows.requesters.get_mut(&flow) {
                    requester.read_landed(seq, len, landed, &mut env);
                    self.refresh(Side::Requester(flow), now);
                }
            }
            Some(Pending::Datagram(datagram)) if landed == Landed::Good => host.datagram_landed(&datagram),
            Some(Pending::Datagram(_) | Pending::Nobody) | None => {}
        }
    }
}
