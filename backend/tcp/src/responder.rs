//! The receiving side of one flow (IBA 9.7.4): what the responder remembers of one life of one peer QP.
//!
//! This is the record that makes messages happen once: which message is next, how much of it is here, and what the last atomics found.
//! It outlives the connection. Nothing of a message is kept in here but that: what cannot be taken now is thrown away, and the
//! requester is told from where to come again.

use std::collections::VecDeque;

use crate::frame::{
    Ack, AtomicReply, FlowId, Frame, Nak, NakCode, Op, Open, Opened, Packet, Piece, Position, Remote, Request,
    Transport,
};
use crate::host::{Availability, Bound, Host, Landed, Landing, Origin, QpKey, Refusal, Source, Verdict};
use crate::lane::Queued;
use crate::requester::Sent;
use crate::{Env, Nanos, Violation};

/// A message whose bytes are arriving.
#[derive(Debug, Clone, Copy)]
struct Current {
    request: Request,
    got: u32,
}

/// What becomes of what arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// It is taken.
    Taking,
    /// It is thrown away until the requester comes again from where it was told.
    Waiting,
    /// It is thrown away: a message was refused for good.
    Failed(Nak),
}

/// A READ that is being answered.
#[derive(Debug, Clone, Copy)]
struct Answer {
    seq: u64,
    at: Remote,
    offset: u32,
    length: u32,
}

/// What an atomic has found.
#[derive(Debug, Clone, Copy)]
struct Found {
    seq: u64,
    value: u64,
    due: bool,
}

/// Frames that are to be sent.
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a frame that is to be sent")]
struct Due {
    opened: bool,
    resumed: bool,
    ack: bool,
    nak: bool,
}

/// The receiving side of a flow.
#[derive(Debug)]
pub(crate) struct Responder {
    flow: FlowId,
    pub(crate) qp: QpKey,
    transport: Transport,
    incarnation: u64,
    /// READs and atomics that may wait for their answers to be sent.
    depth: usize,
    next: u64,
    current: Option<Current>,
    mode: Mode,
    /// Messages that have taken a receive.
    takers: u64,
    /// Bytes that have arrived since the last ACK.
    unacked: u32,
    /// The requester waits for an answer to whatever arrives next.
    ack_at_once: bool,
    answers: VecDeque<Answer>,
    found: VecDeque<Found>,
    /// How many of those are to be sent.
    replies: usize,
    /// How many of them once more. The requester may have had them.
    resent: usize,
    /// Memory of a READ is not to be had before this time.
    hold: Option<Nanos>,
    due: Due,
    /// The last refusal that is not for good.
    nak: Option<Nak>,
    pub(crate) queued: Queued,
}

impl Responder {
    pub(crate) fn new(open: &Open, bound: &Bound) -> Self {
        Self {
            flow: open.flow,
            qp: bound.qp,
            transport: open.transport,
            incarnation: bound.incarnation,
            depth: usize::from(open.depth.min(bound.depth)),
            next: 0,
            current: None,
            mode: Mode::Taking,
            takers: 0,
            unacked: 0,
            ack_at_once: false,
            answers: VecDeque::new(),
            found: VecDeque::new(),
            replies: 0,
            resent: 0,
            hold: None,
            due: Due { opened: true, ..Due::default() },
            nak: None,
            queued: Queued::default(),
        }
    }

    /// What it keeps: answers to READs and to atomics.
    pub(crate) fn kept(&self) -> (usize, usize) {
        (self.answers.len(), self.found.len())
    }

    fn position(&self) -> Position {
        let got = self.current.map_or(0, |current| current.got);
        Position { flow: self.flow, next: self.next, got, taken: self.current.is_some() }
    }

    fn is_reliable(&self) -> bool {
        self.transport == Transport::Rc
    }

    /// The requester asks a second time whether it is there. One of UC does so whenever there is a new connection.
    pub(crate) fn on_open_again(&mut self, open: &Open) -> Result<(), Violation> {
        let new = self.next == 0 && self.current.is_none() && self.mode == Mode::Taking;
        if open.transport != self.transport || (self.is_reliable() && !new) {
            return Err(Violation::OpenedTwice);
        }
        self.due.opened = true;
        if !self.is_reliable() {
            self.takers = 0;
        }
        Ok(())
    }

    /// The connection is no more: nothing that was on its way will arrive, and what is half here stays.
    pub(crate) fn interrupt<H: Host>(&mut self, env: &mut Env<'_, H>) {
        self.due = Due::default();
        self.answers.clear();
        self.hold = None;
        self.found.iter_mut().for_each(|found| found.due = false);
        (self.replies, self.resent) = (0, 0);
        if self.mode == Mode::Waiting {
            self.mode = Mode::Taking;
        }
        if !self.is_reliable() {
            self.abandon(env);
        }
    }

    /// On a new connection: messages before `oldest` are complete.
    pub(crate) fn on_resume(&mut self, oldest: u64) -> Result<(), Violation> {
        if oldest > self.next || !self.is_reliable() {
            return Err(Violation::Answer("messages that never were"));
        }
        self.due.resumed = true;
        self.found.iter_mut().for_each(|found| found.due = found.seq >= oldest);
        self.replies = self.found.iter().filter(|found| found.due).count();
        self.resent = self.replies;
        match self.mode {
            Mode::Waiting => self.mode = Mode::Taking,
            Mode::Failed(_) => self.due.nak = true,
            Mode::Taking => {}
        }
        self.ack_at_once = true;
        Ok(())
    }

    /// A message begins.
    pub(crate) fn on_request<H: Host>(
        &mut self,
        request: &Request,
        payload: u32,
        env: &mut Env<'_, H>,
    ) -> Result<Landing, Violation> {
        if let Op::Read { at, again_from: Some(from) } = request.op {
            self.read_again(request, at, from)?;
            return Ok(Landing::Nothing);
        }
        if !self.is_reliable() {
            return self.on_unreliable(request, payload, env);
        }
        match self.mode {
            Mode::Failed(_) => return Ok(Landing::Discard),
            Mode::Waiting if request.seq > self.next => return Ok(Landing::Discard),
            _ if request.seq != self.next || self.current.is_some() => return Err(Violation::Order("REQUEST")),
            _ => self.mode = Mode::Taking,
        }
        Ok(self.begin(request, payload, env))
    }

    fn begin<H: Host>(&mut self, request: &Request, payload: u32, env: &mut Env<'_, H>) -> Landing {
        let fetches = request.op.fetches() && request.length > 0;
        if fetches && self.pending() >= self.depth {
            self.refuse(NakCode::Invalid);
            return Landing::Nothing;
        }
        match env.host.admit(self.qp, request) {
            Verdict::Yes => self.accept(request, payload, env),
            verdict => {
                self.turn_away(verdict);
                Landing::Discard
            }
        }
    }

    /// READs and atomics whose answers have not been sent.
    fn pending(&self) -> usize {
        self.answers.len() + self.replies - self.resent
    }

    fn accept<H: Host>(&mut self, request: &Request, payload: u32, env: &mut Env<'_, H>) -> Landing {
        self.takers += u64::from(request.op.takes_receive());
        match request.op {
            Op::Read { at, .. } => {
                if request.length > 0 {
                    self.answers.push_back(Answer { seq: request.seq, at, offset: 0, length: request.length });
                }
                self.executed();
                Landing::Nothing
            }
            Op::CompareSwap { .. } | Op::FetchAdd { .. } => {
                self.execute_atomic(request, env);
                Landing::Nothing
            }
            op if !op.carries() => {
                match env.host.finish(self.qp, request) {
                    Verdict::Yes => self.executed(),
                    verdict => self.turn_away(verdict),
                }
                Landing::Nothing
            }
            _ => {
                self.current = Some(Current { request: *request, got: 0 });
                self.due.ack |= self.is_reliable() && (request.probe || self.ack_at_once);
                if request.length == 0 {
                    self.finish(env);
                }
                if payload == 0 {
                    return Landing::Nothing;
                }
                Landing::Message { qp: self.qp, request: *request, offset: 0 }
            }
        }
    }

    fn execute_atomic<H: Host>(&mut self, request: &Request, env: &mut Env<'_, H>) {
        match env.host.atomic(self.qp, request) {
            Ok(value) => {
                self.forget_oldest();
                self.found.push_back(Found { seq: request.seq, value, due: true });
                self.replies += 1;
                self.executed();
            }
            Err(verdict) => self.turn_away(verdict),
        }
    }

    /// The requester has the oldest answer if there are `depth`: it has no more outstanding, and gets them in order.
    fn forget_oldest(&mut self) {
        if self.found.len() < self.depth {
            return;
        }
        if self.found.pop_front().is_some_and(|oldest| oldest.due) {
            self.replies -= 1;
            self.resent = self.resent.saturating_sub(1);
        }
    }

    fn executed(&mut self) {
        self.next += 1;
        self.current = None;
        self.unacked = 0;
        self.ack_at_once = false;
        self.due.ack = true;
    }

    fn turn_away(&mut self, verdict: Verdict) {
        let (code, wait) = match verdict {
            Verdict::NotReady(wait) => (NakCode::NotReady, wait),
            Verdict::Later(wait) => (NakCode::Later, wait),
            Verdict::Yes | Verdict::NotThere => (NakCode::NotThere, Nanos::ZERO),
            Verdict::Refused(refusal) => return self.refuse(refusal.code()),
        };
        self.mode = Mode::Waiting;
        self.nak = Some(Nak { at: self.position(), code, wait });
        (self.due.nak, self.due.ack, self.ack_at_once) = (true, false, true);
    }

    fn refuse(&mut self, code: NakCode) {
        let at = self.position();
        self.refuse_at(at, code);
    }

    fn refuse_at(&mut self, at: Position, code: NakCode) {
        if matches!(self.mode, Mode::Failed(_)) {
            return;
        }
        self.mode = Mode::Failed(Nak { at, code, wait: Nanos::ZERO });
        (self.due.nak, self.due.ack) = (true, false);
    }

    /// More of a message.
    pub(crate) fn on_data<H: Host>(
        &mut self,
        piece: &Piece,
        len: u32,
        env: &mut Env<'_, H>,
    ) -> Result<Landing, Violation> {
        let begun = self.current.filter(|_| piece.seq == self.next);
        let fits = begun.filter(|now| piece.offset == now.got && len <= now.request.length - now.got);
        match (self.mode, fits) {
            (Mode::Failed(_), _) => Ok(Landing::Discard),
            (_, Some(now)) if len > 0 => {
                self.mode = Mode::Taking;
                Ok(Landing::Message { qp: self.qp, request: now.request, offset: piece.offset })
            }
            // All of it is here; it could not be finished.
            (_, Some(now)) if now.got == now.request.length => {
                self.mode = Mode::Taking;
                self.finish(env);
                Ok(Landing::Nothing)
            }
            (Mode::Waiting, None) if piece.seq >= self.next => Ok(Landing::Discard),
            (Mode::Taking, None) if !self.is_reliable() => {
                self.abandon(env);
                Ok(Landing::Discard)
            }
            _ => Err(Violation::Order("DATA")),
        }
    }

    /// What became of the payload of the last frame of this flow.
    pub(crate) fn landed<H: Host>(&mut self, seq: u64, len: u32, landed: Landed, env: &mut Env<'_, H>) {
        let Some(current) = self.current.as_mut().filter(|_| seq == self.next) else {
            return;
        };
        match landed {
            Landed::Good => {
                current.got += len;
                self.unacked += len;
                let all = current.got == current.request.length;
                let window = env.limits.window;
                if all {
                    self.finish(env);
                } else if self.is_reliable() && (self.unacked >= window / 4 || self.ack_at_once) {
                    self.due.ack = true;
                    (self.unacked, self.ack_at_once) = (0, false);
                }
            }
            _ if !self.is_reliable() => self.abandon(env),
            // The requester has failed; it will not come again.
            Landed::Void => self.mode = Mode::Waiting,
            Landed::Later(wait) => self.turn_away(Verdict::Later(wait)),
            Landed::Refused(refusal) => self.refuse(refusal.code()),
        }
    }

    fn finish<H: Host>(&mut self, env: &mut Env<'_, H>) {
        let Some(current) = self.current else { return };
        match env.host.finish(self.qp, &current.request) {
            Verdict::Yes => self.executed(),
            _ if !self.is_reliable() => self.abandon(env),
            verdict => self.turn_away(verdict),
        }
    }

    /// UC: a message begins. That of before is lost if it was not complete.
    fn on_unreliable<H: Host>(
        &mut self,
        request: &Request,
        payload: u32,
        env: &mut Env<'_, H>,
    ) -> Result<Landing, Violation> {
        if !request.op.is_for_uc() || request.seq < self.next {
            return Err(Violation::Order("REQUEST"));
        }
        self.abandon(env);
        self.next = request.seq;
        if env.host.admit(self.qp, request) == Verdict::Yes {
            return Ok(self.accept(request, payload, env));
        }
        // It counts among those that the requester has sent.
        self.takers += u64::from(request.op.takes_receive());
        self.due.ack = true;
        Ok(Landing::Discard)
    }

    fn abandon<H: Host>(&mut self, env: &mut Env<'_, H>) {
        if self.current.take().is_some() {
            self.next += 1;
            env.host.abandon(self.qp);
        }
    }

    /// The answer to a READ did not arrive; it is read once more (IBA 9.4.4).
    fn read_again(&mut self, request: &Request, at: Remote, from: u32) -> Result<(), Violation> {
        if request.seq >= self.next || !self.is_reliable() {
            return Err(Violation::Order("READ"));
        }
        if let Mode::Failed(nak) = self.mode
            && request.seq >= nak.at.next
        {
            return Ok(());
        }
        self.answers.retain(|answer| answer.seq != request.seq);
        if self.pending() >= self.depth {
            return Err(Violation::Order("more READs than may be"));
        }
        self.answers.push_back(Answer { seq: request.seq, at, offset: from, length: request.length });
        Ok(())
    }

    /// Whether there is something without payload to send.
    pub(crate) fn wants_control(&self) -> bool {
        self.due.opened || self.due.resumed || self.due.ack || self.due.nak || self.replies > 0
    }

    /// Whether there is an answer to a READ to send.
    pub(crate) fn wants_data(&self, now: Nanos) -> bool {
        !self.answers.is_empty() && self.hold.is_none_or(|hold| hold <= now)
    }

    /// When a READ can be looked at again.
    pub(crate) fn timer(&self) -> Option<Nanos> {
        self.hold.filter(|_| !self.answers.is_empty())
    }

    /// Time has passed.
    pub(crate) fn on_timer(&mut self, now: Nanos) {
        self.hold = self.hold.filter(|&hold| hold > now);
    }

    /// The next frame without payload.
    pub(crate) fn next_control<H: Host>(&mut self, env: &mut Env<'_, H>) -> Option<Packet> {
        let due = &mut self.due;
        if std::mem::take(&mut due.opened) {
            let (flow, incarnation, depth) = (self.flow, self.incarnation, self.depth as u8);
            return Some(Packet::bare(Frame::Opened(Opened { flow, incarnation, depth })));
        }
        if std::mem::take(&mut due.resumed) {
            return Some(Packet::bare(Frame::Resumed(self.position())));
        }
        if self.replies > 0
            && let Some(found) = self.found.iter_mut().find(|found| found.due)
        {
            found.due = false;
            self.replies -= 1;
            self.resent = self.resent.saturating_sub(1);
            let (flow, seq, value) = (self.flow, found.seq, found.value);
            return Some(Packet::bare(Frame::AtomicReply(AtomicReply { flow, seq, value })));
        }
        if std::mem::take(&mut due.nak) {
            let nak = if let Mode::Failed(nak) = self.mode { Some(nak) } else { self.nak };
            return nak.map(|nak| Packet::bare(Frame::Nak(nak)));
        }
        if std::mem::take(&mut due.ack) {
            let credit = env.host.posted(self.qp).map(|posted| self.takers + u64::from(posted));
            return Some(Packet::bare(Frame::Ack(Ack { at: self.position(), credit })));
        }
        None
    }

    /// The next piece of an answer to a READ.
    pub(crate) fn next_data<H: Host>(&mut self, env: &mut Env<'_, H>) -> Option<Sent> {
        if !self.wants_data(env.now) {
            return None;
        }
        self.hold = None;
        let answer = self.answers.front_mut()?;
        let len = (answer.length - answer.offset).min(env.limits.chunk);
        let source = Source { origin: Origin::Read(self.qp, answer.at), offset: answer.offset, len };
        match env.host.available(&source) {
            Availability::Now => {}
            Availability::Later(wait) => {
                self.hold = Some(env.now + wait.max(Nanos::from_micros(10)));
                return None;
            }
            Availability::Refused => {
                let seq = answer.seq;
                self.source_failed(seq);
                return None;
            }
        }
        let (flow, seq, offset) = (self.flow, answer.seq, answer.offset);
        answer.offset += len;
        if answer.offset == answer.length {
            self.answers.pop_front();
        }
        Some((Packet { frame: Frame::ReadData(Piece { flow, seq, offset }), payload: len }, Some(source)))
    }

    /// Memory that a READ names may not be reached any more: it fails, and what comes after it.
    pub(crate) fn source_failed(&mut self, seq: u64) {
        self.answers.retain(|answer| answer.seq < seq);
        let at = Position { flow: self.flow, next: seq, got: 0, taken: false };
        self.refuse_at(at, Refusal::Access.code());
    }
}
