//! Connections: who is on the other end, when they work, and what becomes of flows when they break.

use super::{Event, Link};
use crate::frame::{FlowId, Hello, VERSIONS};
use crate::host::Host;
use crate::lane::{Conn, Lane, Side, State};
use crate::{Env, Nanos, Violation};

impl Link {
    /// The dialling side has made the connection.
    pub fn connected(&mut self, now: Nanos, conn: Conn) {
        if let Ok(lane) = self.lane(conn)
            && lane.state == State::Dialing
        {
            lane.begin(State::Greeting, now);
            self.refresh(Side::Lane(conn.lane), now);
        }
    }

    /// Somebody has connected, and this is the first frame.
    ///
    /// # Errors
    /// Why the connection is to be closed. Nothing else has changed.
    pub fn accept<H: Host>(&mut self, now: Nanos, hello: &Hello, host: &mut H) -> Result<Conn, Violation> {
        if self.config.dials {
            return Err(Violation::Refused("direction"));
        }
        self.check(hello)?;
        let version = common_version(hello)?;
        let same_life = self.peer_epoch == Some(hello.epoch);
        let lane = &self.lanes[usize::from(hello.lane)];
        if same_life && hello.generation <= lane.generation {
            return Err(Violation::Stale);
        }
        self.meet(hello.epoch, now, host);
        self.end(hello.lane, now, Some(Violation::Stale), host);
        let lane = &mut self.lanes[usize::from(hello.lane)];
        (lane.generation, lane.version) = (hello.generation, version);
        lane.begin(State::Up, now);
        self.come_up(hello.lane, now);
        Ok(Conn { lane: hello.lane, generation: hello.generation })
    }

    /// The peer has answered our HELLO.
    pub(super) fn on_hello<H: Host>(
        &mut self,
        conn: Conn,
        hello: &Hello,
        now: Nanos,
        host: &mut H,
    ) -> Result<(), Violation> {
        if self.lane(conn)?.state != State::Greeting {
            return Err(Violation::Unexpected("HELLO"));
        }
        self.check(hello)?;
        if hello.versions.0 != hello.versions.1 {
            return Err(Violation::Refused("version"));
        }
        self.lane(conn)?.version = common_version(hello)?;
        if (hello.lane, hello.generation) != (conn.lane, conn.generation) {
            return Err(Violation::Refused("lane"));
        }
        self.meet(hello.epoch, now, host);
        self.come_up(conn.lane, now);
        Ok(())
    }

    fn check(&self, hello: &Hello) -> Result<(), Violation> {
        if hello.host != self.config.peer || hello.peer != self.config.host {
            return Err(Violation::Refused("host"));
        }
        if hello.lanes != self.config.lanes {
            return Err(Violation::Refused("number of lanes"));
        }
        // All of it is looked at, whatever differs: how long that takes says nothing.
        let wrong = hello.ticket.iter().zip(&self.config.ticket).fold(0, |wrong, (a, b)| wrong | (a ^ b));
        if wrong == 0 { Ok(()) } else { Err(Violation::Refused("ticket")) }
    }

    /// The peer that speaks is in this life. If that is another one than before, it knows nothing of what was.
    fn meet<H: Host>(&mut self, epoch: u64, now: Nanos, host: &mut H) {
        if self.peer_epoch.replace(epoch).is_none_or(|before| before == epoch) {
            return;
        }
        for index in 0..self.lanes.len() as u16 {
            // The one that speaks stays.
            if self.lanes[usize::from(index)].state != State::Greeting {
                self.end(index, now, Some(Violation::Stale), host);
                self.refresh(Side::Lane(index), now);
            }
            if !self.config.dials {
                self.lanes[usize::from(index)].generation = 0;
            }
        }
        for requester in self.flows.requesters.values_mut() {
            requester.forsake(&mut Env { now, limits: &self.config.limits, host });
        }
        self.flows.by_qp.clear();
        while let Some((&flow, responder)) = self.flows.responders.first_key_value() {
            host.unbound(responder.qp);
            self.remove_responder(flow);
        }
    }

    fn come_up(&mut self, index: u16, now: Nanos) {
        self.lanes[usize::from(index)].works(&self.config.limits);
        self.refresh(Side::Lane(index), now);
        self.refresh(Side::Datagrams(index), now);
        for flow in self.flows_of(index) {
            self.refresh(Side::Requester(flow), now);
        }
    }

    /// Flows that this side sends on over this connection.
    fn flows_of(&self, index: u16) -> Vec<FlowId> {
        let on_it = |flow: &&FlowId| self.lane_of_flow(**flow) == usize::from(index);
        self.flows.requesters.keys().filter(on_it).copied().collect()
    }

    /// The connection is broken, or could not be made.
    pub fn disconnected<H: Host>(&mut self, now: Nanos, conn: Conn, host: &mut H) {
        if self.lane(conn).is_ok() {
            self.end(conn.lane, now, None, host);
        }
    }

    /// Takes a connection out of use; with a reason, whoever has the sockets is told.
    pub(super) fn end<H: Host>(&mut self, index: u16, now: Nanos, why: Option<Violation>, host: &mut H) {
        let (dials, limits) = (self.config.dials, &self.config.limits);
        let lane = &mut self.lanes[usize::from(index)];
        if matches!(lane.state, State::Down(_)) {
            return;
        }
        let conn = lane.conn();
        let there = !lane.is_down();
        lane.end(dials, now, limits);
        if there && let Some(why) = why {
            self.events.push_back(Event::Close(conn, why));
        }
        let on_it = |flow: FlowId| flow.0 % u64::from(self.config.lanes.max(1)) == u64::from(index);
        for (_, requester) in self.flows.requesters.iter_mut().filter(|(flow, _)| on_it(**flow)) {
            requester.interrupt(&mut Env { now, limits, host });
            (requester.queued.control, requester.queued.data) = (false, false);
        }
        for (_, responder) in self.flows.responders.iter_mut().filter(|(flow, _)| on_it(**flow)) {
            responder.interrupt(&mut Env { now, limits, host });
            (responder.queued.control, responder.queued.data) = (false, false);
        }
        self.refresh(Side::Lane(index), now);
    }

    pub(super) fn lane_timer<H: Host>(&mut self, index: u16, now: Nanos, host: &mut H) {
        let limits = &self.config.limits;
        let lane = &mut self.lanes[usize::from(index)];
        match lane.state {
            State::Down(Some(at)) if at <= now => {
                lane.generation += 1;
                lane.state = State::Dialing;
                self.events.push_back(Event::Dial(lane.conn()));
            }
            State::Greeting | State::Up if lane.heard + limits.silence <= now => {
                self.end(index, now, Some(Violation::Silent), host);
            }
            State::Up if lane.said + limits.keepalive <= now => {
                lane.ping_due = true;
                lane.said = now;
            }
            _ => {}
        }
    }

    /// The lane that this connection is for, if it is the newest one and not ended.
    pub(super) fn lane(&mut self, conn: Conn) -> Result<&mut Lane, Violation> {
        let lane = self.lanes.get_mut(usize::from(conn.lane)).ok_or(Violation::Stale)?;
        let there = lane.generation == conn.generation && !matches!(lane.state, State::Down(_));
        if there { Ok(lane) } else { Err(Violation::Stale) }
    }
}

/// The newest version that both speak.
fn common_version(hello: &Hello) -> Result<u16, Violation> {
    let (oldest, newest) = (hello.versions.0.max(VERSIONS.0), hello.versions.1.min(VERSIONS.1));
    if oldest <= newest { Ok(newest) } else { Err(Violation::Version(hello.versions.0, hello.versions.1)) }
}
