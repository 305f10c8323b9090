//! What a requester hears. The peer is not trusted: an answer that cannot be closes the connection.

use virtio_rdma::ib::WcStatus;

use super::{LONGEST_BACK_OFF, Phase, Requester, SHORTEST_WAIT};
use crate::frame::{Ack, AtomicReply, Nak, NakCode, Opened, Piece, Position};
use crate::host::{Host, Landed, Landing, Refusal};
use crate::{Env, Nanos, Violation};

impl Requester {
    /// There is a responder.
    pub(crate) fn on_opened<H: Host>(&mut self, opened: &Opened, env: &mut Env<'_, H>) -> Result<(), Violation> {
        match self.phase {
            Phase::Opening | Phase::Unbound => {
                self.phase = Phase::Bound;
                self.depth = usize::from(self.open.depth.min(opened.depth)).max(1);
                self.hold = None;
                self.progress(env.now, env.limits);
                Ok(())
            }
            // It was asked twice.
            Phase::Bound | Phase::Dead | Phase::Gone => Ok(()),
            Phase::Interrupted | Phase::Resuming => Err(Violation::Unexpected("OPENED")),
        }
    }

    /// What the responder has.
    pub(crate) fn on_resumed<H: Host>(&mut self, at: &Position, env: &mut Env<'_, H>) -> Result<(), Violation> {
        match self.phase {
            Phase::Resuming | Phase::Interrupted => {}
            // It was asked twice.
            Phase::Bound | Phase::Dead | Phase::Gone => return Ok(()),
            Phase::Unbound | Phase::Opening => return Err(Violation::Unexpected("RESUMED")),
        }
        self.advance(at, env)?;
        self.rewind(at);
        (self.phase, self.hold) = (Phase::Bound, None);
        // Those before `at` that were begun; no others still are.
        for message in self.messages.iter_mut().filter(|message| message.started && message.is_read()) {
            (message.again, message.skipping) = (!message.is_answered(), false);
        }
        self.repeats = self.messages.iter().filter(|message| message.again).count();
        self.progress(env.now, env.limits);
        self.retire(env);
        Ok(())
    }

    /// The responder is further.
    pub(crate) fn on_ack<H: Host>(&mut self, ack: &Ack, env: &mut Env<'_, H>) -> Result<(), Violation> {
        if !self.is_reliable() {
            return self.on_hint(ack, env);
        }
        if !self.hears("ACK")? {
            return Ok(());
        }
        self.advance(&ack.at, env)?;
        self.credit = ack.credit;
        self.retire(env);
        Ok(())
    }

    /// UC: how many receives the responder has. Nothing else is learnt of its messages.
    fn on_hint<H: Host>(&mut self, ack: &Ack, env: &mut Env<'_, H>) -> Result<(), Violation> {
        if ack.at.next > self.end() {
            return Err(Violation::Answer("position"));
        }
        if self.phase == Phase::Bound {
            self.credit = ack.credit;
            self.note_starving(env);
        }
        Ok(())
    }

    /// Whether an answer is for this life of the flow; those to one that has failed are late.
    fn hears(&self, what: &'static str) -> Result<bool, Violation> {
        match self.phase {
            Phase::Bound if self.is_reliable() => Ok(true),
            Phase::Dead | Phase::Gone => Ok(false),
            _ => Err(Violation::Unexpected(what)),
        }
    }

    /// Everything before `at` is executed.
    fn advance<H: Host>(&mut self, at: &Position, env: &mut Env<'_, H>) -> Result<(), Violation> {
        if at.next < self.executed || at.next > self.end() {
            return Err(Violation::Answer("position"));
        }
        let mut moved = at.next > self.executed;
        for seq in self.executed..at.next {
            self.acknowledge(seq, None)?;
        }
        self.executed = at.next;
        match self.message_mut(at.next) {
            Some(message) => {
                let backwards = at.got < message.acked || (message.taken && !at.taken);
                let takes = message.started && message.work.op.carries();
                if at.got > message.sent || backwards || (at.taken && !takes) {
                    return Err(Violation::Answer("position in a message"));
                }
                moved |= at.got > message.acked || at.taken != message.taken;
                message.taken = at.taken;
                self.acknowledge(at.next, Some(at.got))?;
            }
            None if at.taken => return Err(Violation::Answer("a message that was not sent")),
            None => {}
        }
        if self.probing.is_some_and(|seq| at.next > seq || (at.next == seq && at.taken)) {
            self.probing = None;
        }
        if moved {
            self.progress(env.now, env.limits);
        }
        Ok(())
    }

    /// The responder has so many bytes of a message, or all.
    fn acknowledge(&mut self, seq: u64, got: Option<u32>) -> Result<(), Violation> {
        let message = self.message_mut(seq).ok_or(Violation::Answer("no such message"))?;
        let got = match got {
            Some(got) => got,
            None if message.started && message.sent == message.carried() => message.sent,
            None => return Err(Violation::Answer("more than was sent")),
        };
        let newly = got - message.acked;
        message.acked = got;
        self.in_flight -= u64::from(newly);
        Ok(())
    }

    /// Sending goes on at `at`, to which the responder has been followed: what was sent beyond was thrown away.
    fn rewind(&mut self, at: &Position) {
        for seq in at.next..self.end() {
            let goes_on = seq == at.next && at.taken;
            let Some(message) = self.message_mut(seq) else { break };
            let lost = message.sent - message.acked;
            message.sent = message.acked;
            let undone = message.started && !goes_on;
            message.started = goes_on;
            let (takes, fetches) = (message.work.op.takes_receive(), message.fetches());
            self.in_flight -= u64::from(lost);
            if undone {
                self.takers -= u64::from(takes);
                self.fetching -= usize::from(fetches);
            }
        }
        self.cursor = at.next;
        self.probing = None;
    }

    /// The responder refuses.
    pub(crate) fn on_nak<H: Host>(&mut self, nak: &Nak, env: &mut Env<'_, H>) -> Result<(), Violation> {
        match nak.code {
            NakCode::Gone => self.on_gone(env),
            NakCode::NotThere if matches!(self.phase, Phase::Opening | Phase::Unbound) => {
                self.phase = Phase::Unbound;
                self.back_off(env.now);
                if !self.is_reliable() {
                    self.drop_all(env);
                }
                Ok(())
            }
            // To a second OPEN, when the QP went after the first.
            NakCode::NotThere if !self.is_reliable() => Ok(()),
            _ if !self.hears("NAK")? => Ok(()),
            NakCode::NotThere | NakCode::NotReady | NakCode::Later => self.on_not_now(nak, env),
            NakCode::Invalid => self.on_refused(&nak.at, WcStatus::RemInvReqErr, env),
            NakCode::Access => self.on_refused(&nak.at, WcStatus::RemAccessErr, env),
            NakCode::Operation => self.on_refused(&nak.at, WcStatus::RemOpErr, env),
        }
    }

    fn on_gone<H: Host>(&mut self, env: &mut Env<'_, H>) -> Result<(), Violation> {
        match self.phase {
            Phase::Unbound | Phase::Opening if self.is_reliable() => Err(Violation::Unexpected("NAK")),
            // Each message that was under way got this answer.
            Phase::Dead | Phase::Gone | Phase::Unbound | Phase::Opening => Ok(()),
            _ => {
                self.forsake(env);
                Ok(())
            }
        }
    }

    fn back_off(&mut self, now: Nanos) {
        self.hold = Some(now + self.back_off);
        self.back_off = self.back_off.doubled(LONGEST_BACK_OFF);
    }

    /// What was sent was thrown away from there on, and is to be sent again.
    fn on_not_now<H: Host>(&mut self, nak: &Nak, env: &mut Env<'_, H>) -> Result<(), Violation> {
        if nak.at.next >= self.end() {
            // To a second OPEN, when the QP went after the first: the next message will hear of it.
            let stray = nak.code == NakCode::NotThere;
            return if stray { Ok(()) } else { Err(Violation::Answer("a message that was not sent")) };
        }
        self.advance(&nak.at, env)?;
        self.rewind(&nak.at);
        self.careful = true;
        let wait = nak.wait.max(SHORTEST_WAIT);
        self.hold = Some(env.now + wait);
        match nak.code {
            NakCode::NotReady => {
                if let Err(status) = self.patience.not_ready(env.now, wait, env.limits.shortest_try) {
                    self.doom(nak.at.next, status, env);
                }
            }
            NakCode::Later => self.patience.page(env.now, env.limits.page_patience),
            _ => self.back_off(env.now),
        }
        self.retire(env);
        Ok(())
    }

    fn on_refused<H: Host>(&mut self, at: &Position, status: WcStatus, env: &mut Env<'_, H>) -> Result<(), Violation> {
        if at.next >= self.executed {
            // It may have been sent on a connection of before only.
            if self.message(at.next).is_none() {
                return Err(Violation::Answer("a message that was not posted"));
            }
            self.advance(at, env)?;
        } else if !self.message(at.next).is_some_and(|message| message.is_read() && !message.is_answered()) {
            return Err(Violation::Answer("a message that is complete"));
        }
        self.doom(at.next, status, env);
        Ok(())
    }

    /// A message that is answered was executed, and so was everything before it.
    fn answer_to<H: Host>(&mut self, seq: u64, env: &mut Env<'_, H>) -> Result<(), Violation> {
        if seq >= self.end() {
            return Err(Violation::Answer("a message that was not sent"));
        }
        if seq >= self.executed {
            let at = Position { flow: self.open.flow, next: seq + 1, got: 0, taken: false };
            self.advance(&at, env)?;
        }
        Ok(())
    }

    /// Some of the answer to a READ: where it goes.
    pub(crate) fn on_read_data<H: Host>(
        &mut self,
        piece: &Piece,
        len: u32,
        env: &mut Env<'_, H>,
    ) -> Result<Landing, Violation> {
        if !self.hears("READ_DATA")? {
            return Ok(Landing::Discard);
        }
        self.answer_to(piece.seq, env)?;
        let Some(message) = self.message_mut(piece.seq) else {
            return Err(Violation::Answer("a message that is complete"));
        };
        if message.skipping && (message.again || piece.offset != message.got) {
            return Ok(Landing::Discard);
        }
        let fits = message.work.length - message.got >= len && len > 0;
        if !message.is_read() || message.again || piece.offset != message.got || !fits {
            return Err(Violation::Answer("not the next bytes"));
        }
        message.skipping = false;
        Ok(Landing::Answer { token: message.work.token, offset: piece.offset })
    }

    /// What became of it.
    pub(crate) fn read_landed<H: Host>(&mut self, seq: u64, len: u32, landed: Landed, env: &mut Env<'_, H>) {
        let Some(message) = self.message_mut(seq) else { return };
        match landed {
            Landed::Good => {
                message.got += len;
                let all = message.is_answered();
                self.fetching -= usize::from(all);
                self.progress_of_answer(env);
            }
            // The responder says why.
            Landed::Void => {}
            Landed::Later(wait) => {
                (message.again, message.skipping) = (true, true);
                self.repeats += 1;
                self.hold = Some(env.now + wait.max(SHORTEST_WAIT));
            }
            Landed::Refused(Refusal::Invalid | Refusal::Access | Refusal::Operation) => {
                self.doom(seq, WcStatus::LocProtErr, env);
            }
        }
    }

    fn progress_of_answer<H: Host>(&mut self, env: &mut Env<'_, H>) {
        self.patience.progress(env.now, env.limits.shortest_try);
        self.retire(env);
    }

    /// What an atomic has found.
    pub(crate) fn on_atomic_reply<H: Host>(
        &mut self,
        reply: &AtomicReply,
        env: &mut Env<'_, H>,
    ) -> Result<(), Violation> {
        if !self.hears("ATOMIC_REPLY")? {
            return Ok(());
        }
        self.answer_to(reply.seq, env)?;
        // All that is kept comes again when a connection breaks, or when it was asked for twice.
        let Some(message) = self.message_mut(reply.seq) else {
            return Ok(());
        };
        if !message.work.op.is_atomic() {
            return Err(Violation::Answer("not an atomic"));
        }
        if message.answered {
            return Ok(());
        }
        message.answered = true;
        let token = message.work.token;
        self.fetching -= 1;
        env.host.answered(token, reply.value);
        self.progress_of_answer(env);
        Ok(())
    }
}
