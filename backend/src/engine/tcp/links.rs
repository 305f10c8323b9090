//! All links of a worker.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freeflow_tcp::frame::Note;
use freeflow_tcp::{Link, Nanos};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::command::Command;
use super::line::Line;
use crate::engine::context::Context;
use crate::engine::verbs::Pairs;
use crate::nic::Nic;
use crate::qp::{Qp, RemoteFlow};
use crate::tcp::PeerId;
use crate::verbs::Pair;
use crate::verbs::grant::Recalls;

/// Rounds between two questions to the system which connections can be read, while some are looked at in every round.
const ROUNDS_PER_QUESTION: u32 = 64;

/// Is told of a queue pair that is to be visited, and what was done for it so far.
pub type Tell<'a> = dyn FnMut(&Arc<Nic>, &Arc<Qp>, u64) + 'a;

/// A worker's links, and how it learns that something has come.
#[derive(Debug)]
pub struct Links {
    lines: Vec<Line>,
    /// Of hosts that are gone, with work requests that are still to be completed.
    gone: Vec<Line>,
    epoll: Epoll,
    started: Instant,
    next_id: u32,
    rounds: u32,
}

impl Links {
    fn new(ctx: &Context) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        ctx.engine.mailbox(ctx.worker).also_wake(epoll.as_raw_fd())?;
        Ok(Self { lines: Vec::new(), gone: Vec::new(), epoll, started: ctx.now, next_id: 0, rounds: 0 })
    }

    /// The time as links know it.
    pub(super) fn time(&self, now: Instant) -> Nanos {
        Nanos(now.saturating_duration_since(self.started).as_nanos() as u64)
    }

    /// What people call a host.
    pub fn name_of(&self, peer: PeerId) -> Option<Arc<str>> {
        self.lines.iter().find(|line| line.peering.peer == peer).map(|line| line.peering.name.clone())
    }

    /// A link of this worker to a host, and what it has of queue pairs that are connected over the hosts' NICs.
    pub(in super::super) fn pairs_to(&mut self, peer: PeerId) -> Option<(&mut Pairs, &mut Link)> {
        self.to(peer).map(|line| (&mut line.pairs, &mut line.link))
    }

    /// This link, to say something of such a queue pair.
    pub(in super::super) fn say(&mut self, pair: &Pair, note: Note) -> bool {
        line_in(&mut self.lines, pair.peer, pair.link).is_some_and(|line| line.link.say(note))
    }

    /// A link of this worker to a host.
    pub(super) fn to(&mut self, peer: PeerId) -> Option<&mut Line> {
        self.lines.iter_mut().find(|line| line.peering.peer == peer)
    }

    /// The same, to look at.
    pub(super) fn link_to(&self, peer: PeerId) -> Option<&Link> {
        self.lines.iter().find(|line| line.peering.peer == peer).map(|line| &line.link)
    }

    /// This one.
    pub(super) fn line(&mut self, peer: PeerId, index: u16) -> Option<&mut Line> {
        line_in(&mut self.lines, peer, index)
    }

    /// The line that a queue pair's flow is on, also if its host has left.
    pub(super) fn of(&mut self, flow: &RemoteFlow) -> Option<&mut Line> {
        self.lines.iter_mut().chain(&mut self.gone).find(|line| flow.is(flow.flow, &line.closed))
    }

    /// Sends what there is to send to a host.
    pub(super) fn flush_to(&mut self, peer: PeerId, now: Nanos, ctx: &mut Context) {
        if let Some(line) = self.lines.iter_mut().find(|line| line.peering.peer == peer) {
            line.flush(now, &self.epoll, ctx);
        }
    }

    fn execute(&mut self, command: Command, now: Nanos, ctx: &mut Context) {
        match command {
            Command::Join(peering, index) => {
                let (engine, worker) = (Arc::downgrade(&ctx.engine), ctx.worker);
                let recalls = Recalls::new(move || {
                    if let Some(engine) = engine.upgrade() {
                        engine.wake(worker);
                    }
                });
                self.lines.push(Line::new(peering, index, self.next_id, now, Arc::new(recalls)));
                self.next_id += 1;
            }
            Command::Leave(peer) => {
                for mut line in self.lines.extract_if(.., |line| line.peering.peer == peer) {
                    line.leave(&ctx.engine);
                    self.gone.push(line);
                }
            }
            Command::Dialed(peer, index, conn, made) => {
                if let Some(line) = line_in(&mut self.lines, peer, index) {
                    line.dialed(conn, made, now, &self.epoll, ctx);
                }
            }
            Command::Accepted(peer, index, socket, first) => {
                if let Some(line) = line_in(&mut self.lines, peer, index) {
                    line.accepted(socket, &first, now, &self.epoll, ctx);
                }
            }
            Command::Hold(nic) => {
                for line in &mut self.lines {
                    line.pairs.hold(nic, &mut line.link);
                }
            }
            Command::Paired(peer, index, pair) => {
                if let Some(line) = line_in(&mut self.lines, peer, index) {
                    line.pairs.paired(pair, &mut line.link, ctx);
                }
            }
        }
    }

    /// Asks the system which connections can be read.
    fn question(&mut self) {
        let mut events = [EpollEvent::default(); 64];
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            let (id, lane) = ((event.data() >> 16) as u32, (event.data() & 0xffff) as usize);
            if let Some(line) = self.lines.iter_mut().find(|line| line.id == id) {
                line.note(lane, event.event_set());
            }
        }
    }

    /// When a link is to be looked at.
    fn timer(&self) -> Option<Nanos> {
        let gone = self.gone.iter().filter_map(Line::page_timer);
        self.lines.iter().filter_map(Line::timer).chain(gone).min()
    }
}

fn line_in(lines: &mut [Line], peer: PeerId, index: u16) -> Option<&mut Line> {
    lines.iter_mut().find(|line| line.peering.peer == peer && line.index == index)
}

/// Does what the router, time and peers ask for. `tell` is told of queue pairs that are to be visited. True if there was something.
pub(in super::super) fn poll(ctx: &mut Context, tell: &mut Tell<'_>) -> bool {
    let mut any = false;
    while let Some(command) = ctx.engine.mailbox(ctx.worker).next_command() {
        any = true;
        with_links(ctx, |links, now, ctx| links.execute(command, now, ctx));
    }
    if ctx.tcp.is_none() {
        return any;
    }
    with_links(ctx, |links, now, ctx| {
        let warm = links.lines.iter().any(|line| line.is_warm(now));
        links.rounds += 1;
        if !warm || links.rounds >= ROUNDS_PER_QUESTION {
            links.rounds = 0;
            links.question();
        }
        for line in &mut links.lines {
            any |= line.poll(now, &links.epoll, ctx, tell);
        }
        for line in &mut links.gone {
            line.forget_closed();
            any |= line.reap(now, ctx, tell);
        }
        links.gone.retain(|line| !line.is_done());
    });
    any
}

/// Sends what there is to send. True if something went.
pub(in super::super) fn flush(ctx: &mut Context, tell: &mut Tell<'_>) -> bool {
    let mut any = false;
    if ctx.tcp.is_some() {
        with_links(ctx, |links, now, ctx| {
            for line in &mut links.lines {
                any |= line.flush(now, &links.epoll, ctx);
                any |= line.reap(now, ctx, tell);
            }
        });
    }
    any
}

/// Whether there is something to do for links that nobody will wake the worker for.
pub(in super::super) fn is_wanted(ctx: &Context) -> bool {
    ctx.tcp.as_ref().is_some_and(|links| links.lines.iter().chain(&links.gone).any(Line::is_wanted))
}

/// When links are to be looked at.
pub(in super::super) fn next_timer(ctx: &Context) -> Option<Instant> {
    let links = ctx.tcp.as_ref()?;
    Some(links.started + Duration::from_nanos(links.timer()?.0))
}

/// Takes the links out of the context while they are worked with; makes them the first time.
pub(in super::super) fn with_links(ctx: &mut Context, work: impl FnOnce(&mut Links, Nanos, &mut Context)) {
    let mut links = match ctx.tcp.take() {
        Some(links) => links,
        None => match Links::new(ctx) {
            Ok(links) => Box::new(links),
            Err(error) => return log::error!("no connections to other hosts: {error}"),
        },
    };
    let now = links.time(ctx.now);
    work(&mut links, now, ctx);
    ctx.tcp = Some(links);
}
