//! The sending side of one flow: messages of a QP's send queue, from when they are posted until they are complete (IBA 9.7.3, 9.7.5).
//!
//! Messages have numbers, and are sent, executed and completed in that order. Four numbers say where things are: `oldest` (everything
//! before is complete), `executed` (everything before was executed by the responder), `cursor` (everything before was sent), and the
//! end of the queue. READs and atomics are complete when, besides, their answer is here.
//!
//! A message whose sending was refused for now is sent again from where the responder stands, and what has been executed is never sent
//! again: there is no way back over `executed`.

mod answers;
mod sending;

use std::collections::VecDeque;

pub(crate) use sending::Sent;
use virtio_rdma::ib::WcStatus;

use crate::config::Limits;
use crate::frame::{MAX_MESSAGE, Op, Open, Transport};
use crate::host::{Host, Token};
use crate::patience::{Patience, Retries};
use crate::{Env, Nanos};

/// A work request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// The device's name for it.
    pub token: Token,
    /// What to do.
    pub op: Op,
    /// Bytes of the message, or that are asked for.
    pub length: u32,
    /// Not before all earlier READs and atomics are complete (IBA 10.8.3.3).
    pub fence: bool,
    /// The receive's completion is a solicited one.
    pub solicited: bool,
}

impl Work {
    fn is_valid(&self, transport: Transport) -> bool {
        let is_word = self.op.is_atomic() || matches!(self.op, Op::AtomicWrite { .. });
        let again = matches!(self.op, Op::Read { again_from: Some(_), .. });
        let known = transport == Transport::Rc || self.op.is_for_uc();
        known && !again && self.length <= MAX_MESSAGE && (!is_word || self.length == 8)
    }
}

/// Why a work request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// As many as may be are under way: later.
    #[error("too many messages are under way")]
    Full,
    /// The flow has failed, or never was.
    #[error("no such flow, or it has failed")]
    Dead,
    /// Not an operation of this transport, or too long.
    #[error("not a message of this transport")]
    Invalid,
}

/// Longest time between two questions whether a responder is there.
const LONGEST_BACK_OFF: Nanos = Nanos::from_millis(100);
/// First of them.
const BACK_OFF: Nanos = Nanos::from_millis(1);
/// Shortest time after which a refused message is tried again.
const SHORTEST_WAIT: Nanos = Nanos::from_micros(10);

/// What a flow needs to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// A responder; it has to be asked for.
    Unbound,
    /// A responder; it was asked for.
    Opening,
    /// Nothing.
    Bound,
    /// What the responder has of the messages that were under way when the connection broke.
    Interrupted,
    /// The same; it was asked for.
    Resuming,
    /// It cannot: the responder's record is gone.
    Gone,
    /// It cannot: a message has failed.
    Dead,
}

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is something that has happened or not, in nearly any order")]
struct Message {
    work: Work,
    /// It was begun to be sent.
    started: bool,
    /// The responder has said that it takes it.
    taken: bool,
    /// Bytes sent.
    sent: u32,
    /// Bytes that the responder has.
    acked: u32,
    /// Bytes of the answer to a READ that are here.
    got: u32,
    /// The answer of an atomic is here.
    answered: bool,
    /// A READ whose answer has to be asked for again.
    again: bool,
    /// Parts of the answer are on their way that do not follow on what is here.
    skipping: bool,
    /// How it fails, once everything before is complete.
    doom: Option<WcStatus>,
}

impl Message {
    fn new(work: Work) -> Self {
        Self {
            work,
            started: false,
            taken: false,
            sent: 0,
            acked: 0,
            got: 0,
            answered: false,
            again: false,
            skipping: false,
            doom: None,
        }
    }

    /// Bytes that travel to the responder.
    fn carried(&self) -> u32 {
        if self.work.op.carries() { self.work.length } else { 0 }
    }

    fn is_read(&self) -> bool {
        matches!(self.work.op, Op::Read { .. })
    }

    /// Whether something has to come back.
    fn fetches(&self) -> bool {
        self.work.op.fetches() && self.work.length > 0
    }

    /// Whether what has to come back is here.
    fn is_answered(&self) -> bool {
        match self.work.op {
            Op::Read { .. } => self.got == self.work.length,
            op => !op.is_atomic() || self.answered,
        }
    }
}

/// The sending side of a flow.
#[derive(Debug)]
pub(crate) struct Requester {
    open: Open,
    /// READs and atomics that may be outstanding.
    depth: usize,
    patience: Patience,
    phase: Phase,
    messages: VecDeque<Message>,
    oldest: u64,
    executed: u64,
    cursor: u64,
    /// Bytes sent that the responder may not have.
    in_flight: u64,
    /// READs and atomics sent and not answered.
    fetching: usize,
    /// READs whose answers have to be asked for again.
    repeats: usize,
    /// This message will fail: neither it nor what comes after it is sent.
    doomed: Option<u64>,
    /// Messages sent that take a receive.
    takers: u64,
    /// How many of those find one, as far as is known.
    credit: Option<u64>,
    /// The last message was refused: one thing at a time, until one is taken.
    careful: bool,
    /// Message after which nothing is sent until the responder has answered.
    probing: Option<u64>,
    /// Nothing is sent before this time.
    hold: Option<Nanos>,
    back_off: Nanos,
    /// UC: when messages are dropped that wait for a responder.
    give_up: Option<Nanos>,
    /// UC: when the next message goes although no receive is known of.
    go_anyway: Option<Nanos>,
    /// In which queues of its connection it is.
    pub(crate) queued: crate::lane::Queued,
}

impl Requester {
    pub(crate) fn new(open: Open, retries: Retries) -> Self {
        Self {
            open,
            depth: 1,
            patience: Patience::new(retries),
            phase: Phase::Unbound,
            messages: VecDeque::new(),
            oldest: 0,
            executed: 0,
            cursor: 0,
            in_flight: 0,
            fetching: 0,
            repeats: 0,
            doomed: None,
            takers: 0,
            credit: None,
            careful: false,
            probing: None,
            hold: None,
            back_off: BACK_OFF,
            give_up: None,
            go_anyway: None,
            queued: crate::lane::Queued::default(),
        }
    }

    /// Messages that are not complete.
    pub(crate) fn outstanding(&self) -> usize {
        self.messages.len()
    }

    /// Bytes sent that the responder may not have.
    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    fn is_reliable(&self) -> bool {
        self.open.transport == Transport::Rc
    }

    /// Takes a work request.
    pub(crate) fn post<H: Host>(&mut self, work: Work, env: &mut Env<'_, H>) -> Result<(), PostError> {
        if self.phase == Phase::Dead {
            return Err(PostError::Dead);
        }
        if self.messages.len() >= env.limits.messages {
            return Err(PostError::Full);
        }
        if !work.is_valid(self.open.transport) {
            return Err(PostError::Invalid);
        }
        if self.messages.is_empty() {
            self.patience.start(env.now, env.limits.shortest_try);
            self.give_up = Some(env.now + env.limits.open_patience);
        }
        self.messages.push_back(Message::new(work));
        self.note_starving(env);
        if self.phase == Phase::Gone {
            self.die(WcStatus::RetryExcErr, env);
        }
        Ok(())
    }

    /// The connection is no more.
    pub(crate) fn interrupt<H: Host>(&mut self, env: &mut Env<'_, H>) {
        self.probing = None;
        if !self.is_reliable() {
            self.drop_all(env);
            self.phase = Phase::Unbound;
            (self.hold, self.go_anyway, self.credit, self.takers) = (None, None, None, 0);
            return;
        }
        match self.phase {
            Phase::Opening => (self.phase, self.hold) = (Phase::Unbound, None),
            Phase::Resuming => (self.phase, self.hold) = (Phase::Interrupted, None),
            Phase::Bound if self.end() > self.oldest => self.phase = Phase::Interrupted,
            _ => {}
        }
    }

    /// The peer has forgotten everything: what was under way may have been executed or not, and no one knows.
    pub(crate) fn forsake<H: Host>(&mut self, env: &mut Env<'_, H>) {
        match self.phase {
            Phase::Unbound | Phase::Opening | Phase::Dead => self.interrupt(env),
            _ if !self.is_reliable() => self.interrupt(env),
            _ => self.lose_record(env),
        }
    }

    fn lose_record<H: Host>(&mut self, env: &mut Env<'_, H>) {
        self.phase = Phase::Gone;
        if !self.messages.is_empty() {
            self.die(WcStatus::RetryExcErr, env);
        }
    }

    /// When [`on_timer`](Self::on_timer) is due.
    pub(crate) fn timer(&self) -> Option<Nanos> {
        if self.messages.is_empty() {
            return None;
        }
        let patience = if self.is_reliable() { self.patience.ends() } else { self.give_up() };
        [self.hold, patience, self.go_anyway].into_iter().flatten().min()
    }

    fn give_up(&self) -> Option<Nanos> {
        self.give_up.filter(|_| self.phase != Phase::Bound)
    }

    /// Time has passed.
    pub(crate) fn on_timer<H: Host>(&mut self, env: &mut Env<'_, H>) {
        if self.hold.is_some_and(|hold| hold <= env.now) {
            self.hold = None;
            match self.phase {
                Phase::Opening => self.phase = Phase::Unbound,
                Phase::Resuming => self.phase = Phase::Interrupted,
                _ => {}
            }
        }
        if self.messages.is_empty() {
            return;
        }
        if self.go_anyway.is_some_and(|at| at <= env.now) {
            self.credit = Some(self.takers + 1);
            self.note_starving(env);
        }
        if !self.is_reliable() {
            if self.give_up().is_some_and(|at| at <= env.now) {
                self.drop_all(env);
            }
        } else if self.patience.ends().is_some_and(|at| at <= env.now)
            && let Err(status) = self.patience.lost(env.now, env.limits.shortest_try)
        {
            self.die(status, env);
        }
    }

    /// UC: whether the next message waits for its responder to have a receive. Nothing is sure about that: it does so for a while.
    fn is_starving(&self) -> bool {
        let next = self.message(self.cursor).filter(|message| !message.started && message.work.op.takes_receive());
        !self.is_reliable() && next.is_some() && self.credit.is_some_and(|credit| self.takers >= credit)
    }

    fn note_starving<H: Host>(&mut self, env: &Env<'_, H>) {
        let until = env.now + env.limits.receive_patience;
        self.go_anyway = self.is_starving().then(|| self.go_anyway.filter(|at| *at > env.now).unwrap_or(until));
    }

    /// One past the last message that was begun.
    fn end(&self) -> u64 {
        self.cursor + u64::from(self.message(self.cursor).is_some_and(|message| message.started))
    }

    fn message(&self, seq: u64) -> Option<&Message> {
        self.messages.get(usize::try_from(seq.checked_sub(self.oldest)?).ok()?)
    }

    fn message_mut(&mut self, seq: u64) -> Option<&mut Message> {
        self.messages.get_mut(usize::try_from(seq.checked_sub(self.oldest)?).ok()?)
    }

    /// Completes what is complete, in order.
    fn retire<H: Host>(&mut self, env: &mut Env<'_, H>) {
        while let Some(front) = self.messages.front() {
            if let Some(status) = front.doom {
                self.die(status, env);
                return;
            }
            if self.oldest >= self.executed || !front.is_answered() {
                return;
            }
            let token = front.work.token;
            self.messages.pop_front();
            self.oldest += 1;
            env.host.completed(token, WcStatus::Success);
        }
        self.patience.stop();
    }

    /// This message fails as soon as everything before it is complete.
    fn doom<H: Host>(&mut self, seq: u64, status: WcStatus, env: &mut Env<'_, H>) {
        if let Some(message) = self.message_mut(seq) {
            message.doom.get_or_insert(status);
            self.doomed = Some(self.doomed.map_or(seq, |before| before.min(seq)));
        }
        self.retire(env);
    }

    /// The oldest message fails, and all others are flushed.
    fn die<H: Host>(&mut self, status: WcStatus, env: &mut Env<'_, H>) {
        self.phase = Phase::Dead;
        self.patience.stop();
        let mut status = status;
        for message in self.messages.drain(..) {
            env.host.completed(message.work.token, status);
            status = WcStatus::WrFlushErr;
        }
    }

    /// UC: all that waits is lost, which its sender never learns (IBA 9.8.2).
    fn drop_all<H: Host>(&mut self, env: &mut Env<'_, H>) {
        self.oldest += self.messages.len() as u64;
        (self.executed, self.cursor) = (self.oldest, self.oldest);
        for message in self.messages.drain(..) {
            env.host.completed(message.work.token, WcStatus::Success);
        }
    }

    fn progress(&mut self, now: Nanos, limits: &Limits) {
        self.patience.progress(now, limits.shortest_try);
        self.careful = false;
        self.back_off = BACK_OFF;
    }
}
