//! All that two hosts have with each other: connections, and the flows in both directions over them.
//!
//! A link does nothing by itself. It is told what came, and what time it is; it says what to send next when somebody asks, and when it
//! wants to be asked again. Whoever asks has sockets, memory and a clock. A link belongs to one thread.
//!
//! Every flow has its place on one connection, by its number: TCP keeps its order, and when that connection breaks, the flow waits for
//! the same one to be made again.

mod connection;
mod incoming;
mod outgoing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub use outgoing::Outgoing;

use crate::config::{Config, Limits};
use crate::frame::{Datagram, FlowId, MAX_DATAGRAM, Note, Open, VERSION_OF_NOTES};
use crate::host::{Host, QpKey, Token};
use crate::lane::{Conn, Lane, Queued, Side, Waiting};
use crate::patience::Retries;
use crate::requester::{PostError, Requester, Work};
use crate::responder::Responder;
use crate::{Env, Nanos, Violation};

/// What whoever has the sockets is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Make this connection.
    Dial(Conn),
    /// Close this one; why.
    Close(Conn, Violation),
}

/// How much a link holds: each number has a bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Footprint {
    /// Flows that this side sends on.
    pub requesters: usize,
    /// Records of flows that the peer sends on: no more than this side has QPs.
    pub responders: usize,
    /// Messages that are not complete.
    pub messages: usize,
    /// Bytes that were sent and not acknowledged.
    pub in_flight: u64,
    /// READs that are being answered.
    pub answers: usize,
    /// Answers of atomics that are kept.
    pub replies: usize,
    /// Answers to frames of unknown flows.
    pub strays: usize,
    /// Notes that wait.
    pub notes: usize,
    /// Datagrams that wait.
    pub datagrams: usize,
    /// Places in queues of connections.
    pub queued: usize,
    /// Timers.
    pub timers: usize,
}

/// Two hosts' connections and flows, this side of them.
#[derive(Debug)]
pub struct Link {
    config: Config,
    peer_epoch: Option<u64>,
    lanes: Vec<Lane>,
    flows: Flows,
    events: VecDeque<Event>,
}

#[derive(Debug, Default)]
struct Flows {
    requesters: BTreeMap<FlowId, Requester>,
    responders: BTreeMap<FlowId, Responder>,
    /// The flow that each QP takes messages of.
    by_qp: BTreeMap<QpKey, FlowId>,
    timers: BTreeSet<(Nanos, Side)>,
    next: u64,
}

impl Link {
    /// Without connections and flows.
    pub fn new(config: Config, now: Nanos) -> Self {
        let dial_at = config.dials.then_some(now);
        let lanes = (0..config.lanes.max(1)).map(|index| Lane::new(index, dial_at, &config.limits)).collect();
        let mut link = Self { config, peer_epoch: None, lanes, flows: Flows::default(), events: VecDeque::new() };
        for index in 0..link.lanes.len() {
            link.refresh(Side::Lane(index as u16), now);
        }
        link
    }

    /// What to do with sockets.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Makes a flow for messages of one life of a QP; `open.flow` is replaced. The peer is asked at the first message.
    pub fn open(&mut self, open: Open, retries: Retries) -> FlowId {
        let flow = FlowId(self.flows.next);
        self.flows.next += 1;
        self.flows.requesters.insert(flow, Requester::new(Open { flow, ..open }, retries));
        flow
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Why it was not taken. One that was taken will complete, whatever happens.
    pub fn post<H: Host>(&mut self, now: Nanos, flow: FlowId, work: Work, host: &mut H) -> Result<(), PostError> {
        let requester = self.flows.requesters.get_mut(&flow).ok_or(PostError::Dead)?;
        requester.post(work, &mut Env { now, limits: &self.config.limits, host })?;
        self.refresh(Side::Requester(flow), now);
        Ok(())
    }

    /// Ends a flow: its QP is reset or destroyed. Its messages are not completed.
    pub fn close(&mut self, flow: FlowId) {
        if let Some(requester) = self.flows.requesters.remove(&flow) {
            self.forget(Side::Requester(flow), requester.queued);
        }
    }

    /// Somebody is no more: no queue has him.
    fn forget(&mut self, side: Side, queued: Queued) {
        if let Some(at) = queued.timer {
            self.flows.timers.remove(&(at, side));
        }
        let index = self.lane_of(side);
        self.lanes[index].forget(side, queued);
    }

    fn remove_responder(&mut self, flow: FlowId) {
        if let Some(responder) = self.flows.responders.remove(&flow) {
            self.forget(Side::Responder(flow), responder.queued);
        }
    }

    /// A QP takes no more messages: it is reset or destroyed.
    pub fn unbind(&mut self, qp: QpKey) {
        if let Some(flow) = self.flows.by_qp.remove(&qp) {
            self.remove_responder(flow);
        }
    }

    /// The connection that a queue pair's datagrams take.
    fn lane_of_datagrams(&self, qpn: u32) -> usize {
        qpn as usize % self.lanes.len()
    }

    /// Whether a datagram of this queue pair would be dropped now, and could be taken soon: its connection works, and as many wait for it as may.
    pub fn is_congested(&self, qpn: u32) -> bool {
        let lane = &self.lanes[self.lane_of_datagrams(qpn)];
        lane.is_up() && !lane.stuck && lane.datagrams.len() >= self.config.limits.datagrams
    }

    /// Patience with a congested connection has ended: it does not count as congested until one more datagram has gone.
    pub fn give_up_on(&mut self, qpn: u32) {
        let index = self.lane_of_datagrams(qpn);
        self.lanes[index].stuck = true;
    }

    /// Sends a datagram, or drops it.
    pub fn send_datagram<H: Host>(&mut self, now: Nanos, datagram: Datagram, len: u32, token: Token, host: &mut H) {
        let index = self.lane_of_datagrams(datagram.source_qpn);
        let limits = &self.config.limits;
        let lane = &mut self.lanes[index];
        if lane.datagrams.len() >= limits.datagrams || len > MAX_DATAGRAM {
            host.datagram_sent(token, false);
            return;
        }
        lane.datagrams.push_back(Waiting { token, datagram, len, ends: now + limits.datagram_patience });
        self.refresh(Side::Datagrams(index as u16), now);
    }

    /// Says something of a queue pair that is connected over the hosts' NICs. False if the peer does not hear it, since there is no connection now or too
    /// much is waiting: what is not answered is said again.
    pub fn say(&mut self, note: Note) -> bool {
        let index = self.lane_of_flow(FlowId(note.pair().0));
        let most = self.config.limits.notes;
        let lane = &mut self.lanes[index];
        let heard = lane.is_up() && lane.version >= VERSION_OF_NOTES && lane.notes.len() < most;
        if heard {
            lane.notes.push_back(note);
        }
        heard
    }

    /// When [`on_timer`](Self::on_timer) is due.
    pub fn timer(&self) -> Option<Nanos> {
        self.flows.timers.first().map(|(at, _)| *at)
    }

    /// Time has passed.
    pub fn on_timer<H: Host>(&mut self, now: Nanos, host: &mut H) {
        while let Some(&(at, side)) = self.flows.timers.first()
            && at <= now
        {
            self.flows.timers.pop_first();
            if let Some(queued) = queued(&mut self.lanes, &mut self.flows, side) {
                queued.timer = None;
            }
            self.fire(side, now, host);
            self.refresh(side, now);
        }
    }

    fn fire<H: Host>(&mut self, side: Side, now: Nanos, host: &mut H) {
        match side {
            Side::Lane(index) => self.lane_timer(index, now, host),
            Side::Requester(flow) => {
                if let Some(requester) = self.flows.requesters.get_mut(&flow) {
                    requester.on_timer(&mut Env { now, limits: &self.config.limits, host });
                }
            }
            Side::Responder(flow) => {
                if let Some(responder) = self.flows.responders.get_mut(&flow) {
                    responder.on_timer(now);
                }
            }
            Side::Datagrams(index) => self.lanes[usize::from(index)].drop_late(now, host),
        }
    }

    /// Somebody's state has changed: puts him where he belongs.
    fn refresh(&mut self, side: Side, now: Nanos) {
        let limits = &self.config.limits;
        let index = self.lane_of(side);
        let lane = &mut self.lanes[index];
        let wants = if lane.is_up() { self.flows.wants(side, lane, now, limits) } else { Wants::default() };
        let timer = self.flows.timer_of(side, lane, limits);
        let Some(queued) = queued(&mut self.lanes, &mut self.flows, side) else {
            return;
        };
        let add = Wants { control: wants.control && !queued.control, data: wants.data && !queued.data };
        queued.control |= wants.control;
        queued.data |= wants.data;
        let before = queued.timer;
        let earlier = timer.filter(|at| before.is_none_or(|before| *at < before));
        queued.timer = earlier.or(before);
        if let Some(at) = earlier {
            before.map(|before| self.flows.timers.remove(&(before, side)));
            self.flows.timers.insert((at, side));
        }
        let lane = &mut self.lanes[index];
        if add.control {
            lane.control.push_back(side);
        }
        if add.data {
            lane.data.push_back(side);
        }
    }

    fn lane_of(&self, side: Side) -> usize {
        match side {
            Side::Lane(index) | Side::Datagrams(index) => usize::from(index),
            Side::Requester(flow) | Side::Responder(flow) => self.lane_of_flow(flow),
        }
    }

    fn lane_of_flow(&self, flow: FlowId) -> usize {
        (flow.0 % self.lanes.len() as u64) as usize
    }

    /// Whether this connection works.
    pub fn is_up(&self, lane: u16) -> bool {
        self.lanes.get(usize::from(lane)).is_some_and(Lane::is_up)
    }

    /// How much it holds.
    pub fn footprint(&self) -> Footprint {
        let flows = &self.flows;
        let kept = flows.responders.values().map(Responder::kept);
        let (answers, replies) = kept.fold((0, 0), |sum, kept| (sum.0 + kept.0, sum.1 + kept.1));
        Footprint {
            requesters: flows.requesters.len(),
            responders: flows.responders.len(),
            messages: flows.requesters.values().map(Requester::outstanding).sum(),
            in_flight: flows.requesters.values().map(Requester::in_flight).sum(),
            answers,
            replies,
            strays: self.lanes.iter().map(|lane| lane.strays.len()).sum(),
            notes: self.lanes.iter().map(|lane| lane.notes.len()).sum(),
            datagrams: self.lanes.iter().map(|lane| lane.datagrams.len()).sum(),
            queued: self.lanes.iter().map(|lane| lane.control.len() + lane.data.len()).sum(),
            timers: flows.timers.len(),
        }
    }
}

/// What somebody has to send.
#[derive(Debug, Clone, Copy, Default)]
struct Wants {
    /// Frames without payload.
    control: bool,
    /// Others.
    data: bool,
}

/// Where somebody's places are noted.
fn queued<'a>(lanes: &'a mut [Lane], flows: &'a mut Flows, side: Side) -> Option<&'a mut Queued> {
    match side {
        Side::Lane(index) => lanes.get_mut(usize::from(index)).map(|lane| &mut lane.queued),
        Side::Datagrams(index) => lanes.get_mut(usize::from(index)).map(|lane| &mut lane.datagrams_queued),
        Side::Requester(flow) => flows.requesters.get_mut(&flow).map(|requester| &mut requester.queued),
        Side::Responder(flow) => flows.responders.get_mut(&flow).map(|responder| &mut responder.queued),
    }
}

impl Flows {
    fn wants(&self, side: Side, lane: &Lane, now: Nanos, limits: &Limits) -> Wants {
        let data = |data| Wants { control: false, data };
        match side {
            Side::Lane(_) => Wants::default(),
            Side::Datagrams(_) => data(!lane.datagrams.is_empty()),
            Side::Requester(flow) => data(self.requesters.get(&flow).is_some_and(|r| r.wants(now, limits))),
            Side::Responder(flow) => self.responders.get(&flow).map_or(Wants::default(), |responder| Wants {
                control: responder.wants_control(),
                data: responder.wants_data(now),
            }),
        }
    }

    fn timer_of(&self, side: Side, lane: &Lane, limits: &Limits) -> Option<Nanos> {
        match side {
            Side::Lane(_) => lane.timer(limits),
            Side::Datagrams(_) => lane.datagrams.front().map(|first| first.ends),
            Side::Requester(flow) => self.requesters.get(&flow)?.timer(),
            Side::Responder(flow) => self.responders.get(&flow)?.timer(),
        }
    }
}
