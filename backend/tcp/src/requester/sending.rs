//! What a requester sends next.

use virtio_rdma::ib::WcStatus;

use super::{Phase, Requester};
use crate::config::Limits;
use crate::frame::{Frame, Op, Packet, Piece, Request};
use crate::host::{Availability, Host, Origin, Source};
use crate::{Env, Nanos};

/// A frame to be sent, and what it carries.
pub(crate) type Sent = (Packet, Option<Source>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Open,
    Resume,
    /// Asks for the answer to a READ again.
    Again(u64),
    /// Begins the message at the cursor.
    Begin,
    /// Sends more of it.
    Continue,
}

impl Requester {
    /// Whether there is something to send.
    pub(crate) fn wants(&self, now: Nanos, limits: &Limits) -> bool {
        self.choose(now, limits).is_some()
    }

    fn choose(&self, now: Nanos, limits: &Limits) -> Option<Choice> {
        if self.messages.is_empty() || self.hold.is_some_and(|hold| now < hold) {
            return None;
        }
        match self.phase {
            Phase::Unbound => Some(Choice::Open),
            Phase::Interrupted => Some(Choice::Resume),
            Phase::Bound => self.choose_message(limits),
            Phase::Opening | Phase::Resuming | Phase::Gone | Phase::Dead => None,
        }
    }

    fn choose_message(&self, limits: &Limits) -> Option<Choice> {
        if self.repeats > 0
            && let Some(index) = self.messages.iter().position(|message| message.again)
        {
            return Some(Choice::Again(self.oldest + index as u64));
        }
        let message = self.message(self.cursor)?;
        if self.go_anyway.is_some() || self.probing.is_some() || self.doomed.is_some_and(|doomed| self.cursor >= doomed)
        {
            return None;
        }
        let full = self.in_flight >= u64::from(limits.window) && message.carried() > 0;
        if message.started {
            return (!full).then_some(Choice::Continue);
        }
        let most = if message.work.fence { 1 } else { self.depth };
        let must_wait = self.fetching >= most && (message.work.fence || message.fetches());
        (!must_wait && !full).then_some(Choice::Begin)
    }

    /// The next frame, if there is something to send.
    pub(crate) fn next_frame<H: Host>(&mut self, env: &mut Env<'_, H>) -> Option<Sent> {
        match self.choose(env.now, env.limits)? {
            Choice::Open => {
                (self.phase, self.hold) = (Phase::Opening, Some(env.now + env.limits.ask_again));
                Some((Packet::bare(Frame::Open(self.open)), None))
            }
            Choice::Resume => {
                (self.phase, self.hold) = (Phase::Resuming, Some(env.now + env.limits.ask_again));
                Some((Packet::bare(Frame::Resume { flow: self.open.flow, oldest: self.oldest }), None))
            }
            Choice::Again(seq) => self.ask_again(seq),
            Choice::Begin => self.begin(env),
            Choice::Continue => self.go_on(env),
        }
    }

    fn ask_again(&mut self, seq: u64) -> Option<Sent> {
        let flow = self.open.flow;
        let message = self.message_mut(seq)?;
        message.again = false;
        self.repeats -= 1;
        let message = self.message(seq)?;
        let Op::Read { at, .. } = message.work.op else {
            return None;
        };
        let (op, length) = (Op::Read { at, again_from: Some(message.got) }, message.work.length);
        let request = Request { flow, seq, op, length, solicited: false, probe: false };
        Some((Packet::bare(Frame::Request(request)), None))
    }

    /// The responder is asked first, where it may not take the message.
    fn is_probe(&self, op: Op) -> bool {
        let starved = op.takes_receive() && self.credit.is_some_and(|credit| self.takers >= credit);
        self.is_reliable() && (self.careful || starved)
    }

    fn begin<H: Host>(&mut self, env: &mut Env<'_, H>) -> Option<Sent> {
        let (seq, message) = (self.cursor, self.message(self.cursor)?);
        let (work, carried, fetches) = (message.work, message.carried(), message.fetches());
        let probe = self.is_probe(work.op);
        let alone = probe && carried > env.limits.eager;
        let payload = if alone { 0 } else { carried.min(env.limits.chunk) };
        let source = self.source(seq, payload, env)?;
        let flow = self.open.flow;
        let request = Request { flow, seq, op: work.op, length: work.length, solicited: work.solicited, probe };
        self.message_mut(seq)?.started = true;
        self.takers += u64::from(work.op.takes_receive());
        self.fetching += usize::from(fetches);
        self.sent(seq, payload, probe, env);
        Some((Packet { frame: Frame::Request(request), payload }, Some(source).filter(|_| payload > 0)))
    }

    fn go_on<H: Host>(&mut self, env: &mut Env<'_, H>) -> Option<Sent> {
        let (seq, flow, message) = (self.cursor, self.open.flow, self.message(self.cursor)?);
        let offset = message.sent;
        let payload = (message.carried() - offset).min(env.limits.chunk);
        let source = self.source(seq, payload, env)?;
        self.sent(seq, payload, self.careful, env);
        let frame = Frame::Data(Piece { flow, seq, offset });
        Some((Packet { frame, payload }, Some(source).filter(|_| payload > 0)))
    }

    /// Where the next bytes of a message come from, if they can be had.
    fn source<H: Host>(&mut self, seq: u64, len: u32, env: &mut Env<'_, H>) -> Option<Source> {
        let message = self.message(seq)?;
        let source = Source { origin: Origin::Message(message.work.token), offset: message.sent, len };
        let availability = if len == 0 { Availability::Now } else { env.host.available(&source) };
        match availability {
            Availability::Now => Some(source),
            Availability::Later(wait) => {
                // Its own guest's matter: no try is spent on it.
                let wait = wait.max(super::SHORTEST_WAIT);
                self.hold = Some(env.now + wait);
                self.patience.start(env.now + wait, env.limits.shortest_try);
                None
            }
            Availability::Refused => {
                self.doom(seq, WcStatus::LocProtErr, env);
                None
            }
        }
    }

    fn sent<H: Host>(&mut self, seq: u64, payload: u32, probe: bool, env: &mut Env<'_, H>) {
        if probe {
            self.probing = Some(seq);
        } else if !self.careful {
            self.patience.start(env.now, env.limits.shortest_try);
        }
        let Some(message) = self.message_mut(seq) else { return };
        message.sent += payload;
        let all = message.sent == message.carried();
        self.cursor += u64::from(all);
        if self.is_reliable() {
            self.in_flight += u64::from(payload);
        } else if all {
            // Nobody will say what becomes of it.
            self.executed = self.cursor;
            self.retire(env);
            self.note_starving(env);
        }
    }

    /// The payload of a frame could not be gathered to its end: it went out as void.
    pub(crate) fn source_failed<H: Host>(&mut self, seq: u64, env: &mut Env<'_, H>) {
        self.doom(seq, WcStatus::LocProtErr, env);
    }
}
