//! One connection of a link: whether it is there, what wants to be sent on it, and what is arriving.

use std::collections::VecDeque;

use crate::Nanos;
use crate::config::Limits;
use crate::frame::{Datagram, FlowId, NakCode, Note};
use crate::host::Token;

/// One attempt for one lane. Frames of an attempt that another has replaced are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Conn {
    /// Which of the connections between the two hosts.
    pub lane: u16,
    /// Which attempt.
    pub generation: u64,
}

/// Who has something to send, or waits for a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    Lane(u16),
    Requester(FlowId),
    Responder(FlowId),
    Datagrams(u16),
}

/// In which queues somebody is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Queued {
    pub(crate) control: bool,
    pub(crate) data: bool,
    /// Its entry among the timers, no later than its timer.
    pub(crate) timer: Option<Nanos>,
}

/// State of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// There is none; the dialling side tries again at this time.
    Down(Option<Nanos>),
    /// It is being made.
    Dialing,
    /// HELLO was sent, and the answer has not come.
    Greeting,
    /// It works.
    Up,
}

/// A datagram that waits to be sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waiting {
    pub(crate) token: Token,
    pub(crate) datagram: Datagram,
    pub(crate) len: u32,
    pub(crate) ends: Nanos,
}

/// Whose payload is arriving.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pending {
    Message { flow: FlowId, seq: u64, len: u32 },
    Answer { flow: FlowId, seq: u64, len: u32 },
    Datagram(Datagram),
    Nobody,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) index: u16,
    pub(crate) state: State,
    /// The newest attempt.
    pub(crate) generation: u64,
    /// Of the protocol, once both have said which they speak.
    pub(crate) version: u16,
    pub(crate) hello_due: bool,
    pub(crate) ping_due: bool,
    pub(crate) pong_due: Option<u64>,
    /// Answers to frames of flows that are not known.
    pub(crate) strays: VecDeque<(FlowId, NakCode)>,
    /// Of queue pairs that are connected over the hosts' NICs.
    pub(crate) notes: VecDeque<Note>,
    /// Who has frames without payload to send. They go first: there are no more of them than frames that came.
    pub(crate) control: VecDeque<Side>,
    /// Who has others; each sends one in turn.
    pub(crate) data: VecDeque<Side>,
    pub(crate) datagrams: VecDeque<Waiting>,
    pub(crate) queued: Queued,
    pub(crate) datagrams_queued: Queued,
    /// Nobody waits for room for datagrams any more, until one has gone.
    pub(crate) stuck: bool,
    pub(crate) pending: Option<Pending>,
    pub(crate) heard: Nanos,
    pub(crate) said: Nanos,
    redial: Nanos,
}

impl Lane {
    pub(crate) fn new(index: u16, dial_at: Option<Nanos>, limits: &Limits) -> Self {
        Self {
            index,
            state: State::Down(dial_at),
            generation: 0,
            version: 0,
            hello_due: false,
            ping_due: false,
            pong_due: None,
            strays: VecDeque::new(),
            notes: VecDeque::new(),
            control: VecDeque::new(),
            data: VecDeque::new(),
            datagrams: VecDeque::new(),
            queued: Queued::default(),
            datagrams_queued: Queued::default(),
            stuck: false,
            pending: None,
            heard: Nanos::ZERO,
            said: Nanos::ZERO,
            redial: limits.redial,
        }
    }

    pub(crate) fn conn(&self) -> Conn {
        Conn { lane: self.index, generation: self.generation }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.state == State::Up
    }

    pub(crate) fn is_down(&self) -> bool {
        matches!(self.state, State::Down(_) | State::Dialing)
    }

    /// There is a connection.
    pub(crate) fn begin(&mut self, state: State, now: Nanos) {
        self.state = state;
        self.hello_due = true;
        (self.heard, self.said) = (now, now);
    }

    /// It works: the next attempt after it may come soon.
    pub(crate) fn works(&mut self, limits: &Limits) {
        self.state = State::Up;
        self.redial = limits.redial;
    }

    /// There is none any more. With `dials` another is made, after a time that doubles as long as none works.
    pub(crate) fn end(&mut self, dials: bool, now: Nanos, limits: &Limits) {
        self.state = State::Down(dials.then_some(now + self.redial));
        self.redial = self.redial.doubled(limits.longest_redial);
        (self.hello_due, self.ping_due, self.pong_due, self.pending) = (false, false, None, None);
        self.strays.clear();
        self.notes.clear();
        self.control.clear();
        self.data.clear();
        self.datagrams_queued = Queued { timer: self.datagrams_queued.timer, ..Queued::default() };
    }

    /// Answers a frame of a flow that is not known, if there is room.
    pub(crate) fn answer_stray(&mut self, flow: FlowId, code: NakCode, limits: &Limits) {
        let known = self.strays.back() == Some(&(flow, code));
        if !known && self.strays.len() < limits.strays {
            self.strays.push_back((flow, code));
        }
    }

    /// Somebody is no more.
    pub(crate) fn forget(&mut self, side: Side, queued: Queued) {
        if queued.control {
            self.control.retain(|waiting| *waiting != side);
        }
        if queued.data {
            self.data.retain(|waiting| *waiting != side);
        }
    }

    /// When it has to be looked at.
    pub(crate) fn timer(&self, limits: &Limits) -> Option<Nanos> {
        match self.state {
            State::Down(at) => at,
            State::Dialing => None,
            State::Greeting => Some(self.heard + limits.silence),
            State::Up => Some((self.heard + limits.silence).min(self.said + limits.keepalive)),
        }
    }
}
