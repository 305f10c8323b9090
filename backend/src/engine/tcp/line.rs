//! A link with its connections.

use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use crossbeam_queue::SegQueue;
use freeflow_tcp::frame::{Bye, FlowId, Frame, Hello, Packet};
use freeflow_tcp::{Config, Conn, Event, Link, Nanos, Violation};
use virtio_rdma::ib::{QpType, WcStatus};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::answering::Answering;
use super::device::{Device, PAGE_LOOK, Tables};
use super::inbox::{Ended, Inbox};
use super::links::Tell;
use super::outbox::Outbox;
use super::reap::{self, Reaped};
use crate::engine::Engine;
use crate::engine::context::Context;
use crate::engine::verbs::Pairs;
use crate::mem::socket::{Piece, send};
use crate::tcp::Peering;
use crate::verbs::grant::Recalls;

/// A connection is looked at in every round for so long after something has come, later only when the system says so.
const WARM: Nanos = Nanos::from_micros(200);
/// Reads in one round.
const READS: u32 = 4;

/// A connection.
#[derive(Debug)]
struct Lane {
    conn: Conn,
    socket: TcpStream,
    inbox: Inbox,
    outbox: Outbox,
    /// It is to be read from.
    ready: bool,
    /// When something came last.
    heard: Nanos,
    /// The system is to say when it takes more.
    watched: bool,
}

/// A link of this worker.
#[derive(Debug)]
pub(super) struct Line {
    pub peering: Arc<Peering>,
    /// Which of the links between the two hosts.
    pub index: u16,
    pub link: Link,
    lanes: Vec<Option<Lane>>,
    pub tables: Tables,
    /// Queue pairs that are connected over the hosts' NICs.
    pub pairs: Pairs,
    /// Flows that are not needed any more.
    pub closed: Arc<SegQueue<FlowId>>,
    /// Queue pairs that are gone are looked for at this time.
    sweep_at: Nanos,
    /// Names it to the system.
    pub id: u32,
}

/// How often queue pairs are looked for that are gone.
const SWEEP: Nanos = Nanos::from_millis(500);

impl Line {
    pub fn new(peering: Arc<Peering>, index: u16, id: u32, now: Nanos, recalls: Arc<Recalls>) -> Self {
        let lanes = peering.lanes.max(1);
        let config = Config {
            host: peering.ours,
            peer: peering.theirs,
            dials: peering.dials,
            epoch: peering.epoch,
            ticket: peering.tickets[usize::from(index)],
            lanes,
            limits: peering.limits.clone(),
        };
        Self {
            tables: Tables::new(peering.peer),
            pairs: Pairs::new(&peering, index, recalls),
            link: Link::new(config, now),
            lanes: (0..lanes).map(|_| None).collect(),
            closed: Arc::default(),
            sweep_at: now + SWEEP,
            peering,
            index,
            id,
        }
    }

    /// The link, and what it asks, at the same time.
    pub fn parts<'a>(&'a mut self, ctx: &'a mut Context) -> (&'a mut Link, Device<'a>) {
        (&mut self.link, Device { ctx, tables: &mut self.tables })
    }

    /// A connection that this side has made.
    pub fn dialed(
        &mut self,
        conn: Conn,
        made: std::io::Result<TcpStream>,
        now: Nanos,
        epoll: &Epoll,
        ctx: &mut Context,
    ) {
        match made.and_then(|socket| Lane::new(conn, socket, (self.id, epoll))) {
            Ok(lane) => {
                self.install(lane, epoll);
                self.link.connected(now, conn);
            }
            Err(error) => {
                log::debug!("{}: connection {}.{}: {error}", self.peering.peer, self.index, conn.lane);
                let (link, mut device) = self.parts(ctx);
                link.disconnected(now, conn, &mut device);
            }
        }
    }

    /// A connection that the peer has made, and its first bytes.
    pub fn accepted(&mut self, socket: TcpStream, first: &[u8], now: Nanos, epoll: &Epoll, ctx: &mut Context) {
        let Some(hello) = hello(first) else { return };
        let (link, mut device) = self.parts(ctx);
        let conn = match link.accept(now, &hello, &mut device) {
            Ok(conn) => conn,
            Err(why) => {
                log::info!("{}: connection {} refused: {why}", self.peering.peer, self.index);
                return say_bye(&socket, why);
            }
        };
        self.see_to_events(epoll);
        if let Ok(lane) = Lane::new(conn, socket, (self.id, epoll)) {
            self.install(lane, epoll);
        } else {
            let (link, mut device) = self.parts(ctx);
            link.disconnected(now, conn, &mut device);
        }
    }

    fn install(&mut self, lane: Lane, epoll: &Epoll) {
        let index = usize::from(lane.conn.lane);
        self.hang_up(index, epoll);
        self.lanes[index] = Some(lane);
    }

    fn hang_up(&mut self, index: usize, epoll: &Epoll) {
        if let Some(lane) = self.lanes[index].take() {
            let _ = epoll.ctl(ControlOperation::Delete, lane.socket.as_raw_fd(), EpollEvent::default());
        }
    }

    /// The link wants connections made or closed.
    fn see_to_events(&mut self, epoll: &Epoll) {
        while let Some(event) = self.link.poll_event() {
            match event {
                Event::Dial(conn) => self.peering.dialer.dial(self.peering.peer, self.index, conn),
                Event::Close(conn, why) => {
                    let index = usize::from(conn.lane);
                    if let Some(lane) = self.lanes[index].as_ref().filter(|lane| lane.conn == conn) {
                        log::info!("{}: connection {}.{} closed: {why}", self.peering.peer, self.index, conn.lane);
                        if lane.outbox.is_empty() {
                            say_bye(&lane.socket, why);
                        }
                        self.hang_up(index, epoll);
                    }
                }
            }
        }
    }

    /// The system says that a connection can be read from, or takes more.
    pub fn note(&mut self, lane: usize, events: EventSet) {
        if let Some(lane) = self.lanes.get_mut(lane).and_then(Option::as_mut) {
            lane.ready |= !events.difference(EventSet::OUT).is_empty();
            lane.outbox.blocked &= !events.contains(EventSet::OUT);
        }
    }

    /// Whether something came on a connection so lately that more is likely to.
    pub fn is_warm(&self, now: Nanos) -> bool {
        self.lanes.iter().flatten().any(|lane| lane.heard + WARM > now)
    }

    /// Does what time and the peer ask for. `tell` is told of queue pairs that are to be visited. True if there was something.
    pub fn poll(&mut self, now: Nanos, epoll: &Epoll, ctx: &mut Context, tell: &mut Tell<'_>) -> bool {
        let mut any = false;
        self.forget_closed();
        for index in 0..self.lanes.len() {
            any |= self.receive(index, now, epoll, ctx);
        }
        // After that: what has come is not missed because this host looked late.
        if self.link.timer().is_some_and(|at| at <= now) {
            let (link, mut device) = self.parts(ctx);
            link.on_timer(now, &mut device);
        }
        self.tables.rest();
        any |= self.pairs.hear(&mut self.tables.notes, &mut self.link, now, ctx, tell);
        self.see_to_events(epoll);
        if now >= self.sweep_at {
            self.sweep(now);
        }
        any | self.reap(now, ctx, tell)
    }

    /// Lets go of flows that are not needed any more.
    pub fn forget_closed(&mut self) {
        // Asked for in every round, and nearly never so: to look whether there is one costs less than to take none.
        while !self.closed.is_empty()
            && let Some(flow) = self.closed.pop()
        {
            self.link.close(flow);
            self.tables.flows.remove(&flow);
        }
    }

    fn receive(&mut self, index: usize, now: Nanos, epoll: &Epoll, ctx: &mut Context) -> bool {
        let Some(lane) = self.lanes[index].as_mut().filter(|lane| lane.ready || lane.heard + WARM > now) else {
            return false;
        };
        let mut device = Device { ctx, tables: &mut self.tables };
        let mut any = false;
        for _ in 0..READS {
            match lane.inbox.read(&lane.socket, (&mut self.link, lane.conn), now, &mut device) {
                Ok(None) => {
                    lane.ready = false;
                    return any;
                }
                Ok(Some(more)) => {
                    (any, lane.ready, lane.heard) = (true, more, now);
                    if !more {
                        return any;
                    }
                }
                Err(ended) => {
                    self.end(index, ended, now, epoll, ctx);
                    return true;
                }
            }
        }
        any
    }

    fn end(&mut self, index: usize, ended: Ended, now: Nanos, epoll: &Epoll, ctx: &mut Context) {
        let Some(lane) = &self.lanes[index] else { return };
        let conn = lane.conn;
        match ended {
            Ended::Socket(error) => {
                log::info!("{}: connection {}.{index}: {error}", self.peering.peer, self.index);
                let (link, mut device) = self.parts(ctx);
                link.disconnected(now, conn, &mut device);
            }
            Ended::Violation(why) => {
                log::warn!("{}: connection {}.{index} closed: {why}", self.peering.peer, self.index);
                if lane.outbox.is_empty() {
                    say_bye(&lane.socket, why);
                }
            }
        }
        self.hang_up(index, epoll);
    }

    /// Sends what there is to send. True if something went.
    pub fn flush(&mut self, now: Nanos, epoll: &Epoll, ctx: &mut Context) -> bool {
        let mut any = false;
        for index in 0..self.lanes.len() {
            let Some(lane) = self.lanes[index].as_mut().filter(|lane| !lane.outbox.blocked) else { continue };
            let mut device = Device { ctx, tables: &mut self.tables };
            match lane.outbox.flush(&lane.socket, (&mut self.link, lane.conn), now, &mut device) {
                Ok(sent) => {
                    any |= sent;
                    lane.watch((self.id, epoll));
                }
                Err(ended) => self.end(index, ended, now, epoll, ctx),
            }
        }
        any
    }

    /// Completes work requests that are finished.
    pub fn reap(&mut self, now: Nanos, ctx: &mut Context, tell: &mut Tell<'_>) -> bool {
        if self.is_done() {
            return false;
        }
        let mut finished = std::mem::take(&mut self.tables.finished);
        if self.tables.page_look <= now {
            finished.append(&mut self.tables.paging);
        }
        let flows = &self.tables.flows;
        let runs = |id: &mut FlowId| flows.get(id).is_none_or(|flow| flow.nic.is_running());
        finished.extend(self.tables.parked.extract_if(.., runs));
        let any = !finished.is_empty();
        for id in finished {
            let Some(flow) = self.tables.flows.get_mut(&id) else { continue };
            match reap::reap(ctx, flow, |remote| remote.is(id, &self.closed)) {
                Reaped::Later => self.tables.finished.push(id),
                Reaped::Parked => self.tables.parked.push(id),
                Reaped::Paging => {
                    self.tables.paging.push(id);
                    self.tables.page_look = now + PAGE_LOOK;
                }
                Reaped::Done => {}
                Reaped::Visit(spent) => tell(&flow.nic, &flow.qp, spent),
            }
        }
        any
    }

    /// When it is to be looked at.
    pub fn timer(&self) -> Option<Nanos> {
        [self.link.timer(), self.page_timer(), self.pairs.timer()].into_iter().flatten().min()
    }

    /// When a page is to be looked for; after [`leave`](Self::leave) nothing else is waited for.
    pub fn page_timer(&self) -> Option<Nanos> {
        (!self.tables.paging.is_empty()).then_some(self.tables.page_look)
    }

    /// Whether there is something to do now, whatever time it is.
    pub fn is_wanted(&self) -> bool {
        !self.tables.finished.is_empty()
            || self.pairs.is_wanted()
            || !self.closed.is_empty()
            || self.lanes.iter().flatten().any(|lane| lane.ready)
    }

    /// The other host is gone: what is under way fails. It is complete when [reaped](Self::reap).
    pub fn leave(&mut self, engine: &Engine) {
        self.lanes.clear();
        self.pairs.leave(engine);
        self.tables.answering.values_mut().for_each(Answering::end);
        self.tables.rest();
        for (id, flow) in &mut self.tables.flows {
            let mut status = WcStatus::RetryExcErr;
            for _ in flow.finished.len()..flow.jobs.len() {
                // Nobody hears of what became of an unreliable message.
                let fate = if flow.qp.id.kind == QpType::Uc { WcStatus::Success } else { status };
                flow.finished.push_back(fate);
                status = WcStatus::WrFlushErr;
            }
            if !flow.finished.is_empty() && !self.tables.finished.contains(id) {
                self.tables.finished.push(*id);
            }
        }
    }

    /// Whether nothing waits to be completed.
    pub fn is_done(&self) -> bool {
        self.tables.finished.is_empty() && self.tables.parked.is_empty() && self.tables.paging.is_empty()
    }

    /// Lets go of queue pairs that are gone.
    fn sweep(&mut self, now: Nanos) {
        self.sweep_at = now + SWEEP;
        let gone = self.tables.answering.iter().filter(|(_, answering)| !answering.is_there());
        let gone: Vec<_> = gone.map(|(key, _)| *key).collect();
        for key in gone {
            self.link.unbind(key);
            self.tables.answering.remove(&key);
        }
        self.pairs.sweep();
    }
}

impl Lane {
    fn new(conn: Conn, socket: TcpStream, (line, epoll): (u32, &Epoll)) -> std::io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        let event = EpollEvent::new(EventSet::IN, name(line, conn.lane));
        epoll.ctl(ControlOperation::Add, socket.as_raw_fd(), event)?;
        let (inbox, outbox) = (Inbox::new(), Outbox::default());
        Ok(Self { conn, socket, inbox, outbox, ready: true, heard: Nanos::ZERO, watched: false })
    }

    /// Has the system say when the socket takes more, while it does not.
    fn watch(&mut self, (line, epoll): (u32, &Epoll)) {
        if self.watched == self.outbox.blocked {
            return;
        }
        self.watched = self.outbox.blocked;
        let events = if self.watched { EventSet::IN | EventSet::OUT } else { EventSet::IN };
        let event = EpollEvent::new(events, name(line, self.conn.lane));
        if let Err(error) = epoll.ctl(ControlOperation::Modify, self.socket.as_raw_fd(), event) {
            log::error!("cannot wait for a connection: {error}");
        }
    }
}

/// What the system calls a connection.
fn name(line: u32, lane: u16) -> u64 {
    u64::from(line) << 16 | u64::from(lane)
}

/// The first frame of a connection. Nothing else comes before that is answered.
fn hello(first: &[u8]) -> Option<Hello> {
    match Packet::parse(first) {
        Ok(Some((Packet { frame: Frame::Hello(hello), .. }, len))) if len == first.len() => Some(hello),
        _ => None,
    }
}

/// Tells the peer why its connection is closed, if it can be told now.
fn say_bye(socket: &TcpStream, why: Violation) {
    let bye: Bye = why.bye();
    let _ = send(socket, &[Piece::Own(Packet::bare(Frame::Bye(bye)).encode().as_bytes())]);
}
