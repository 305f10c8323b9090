//! Hosts, the connections between them, applications on them, and what befalls them.

use std::fmt::Write;
use std::rc::Rc;

use virtio_rdma::ib::WcStatus;

use super::device::{Device, Qp, token};
use super::plan::{Kind, Plan};
use super::rng::Rng;
use super::wire::Wire;
use crate::frame::{Datagram, FlowId, Open, Transport};
use crate::host::{QpKey, Token};
use crate::link::{Event, Footprint};
use crate::{Config, Link, Nanos, Work};

/// Steps after which a schedule has gone wrong.
const TOO_MANY: u32 = 60_000;

/// The link between two hosts, both ends, and the connections that it has made.
struct Pair {
    hosts: [usize; 2],
    links: [Link; 2],
    wires: Vec<Wire>,
    /// QPs of both hosts and their flows.
    qps: [Vec<(usize, FlowId)>; 2],
    /// The life of each side.
    epochs: [u64; 2],
}

/// Everything.
pub(super) struct World {
    plan: Plan,
    rng: Rng,
    now: Nanos,
    devices: Vec<Device>,
    pairs: Vec<Pair>,
    datagrams: u32,
    /// What has happened.
    pub(super) cuts: u32,
    pub(super) forgotten: u32,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::new(&mut rng);
        Self::of(plan, rng)
    }

    /// A seed's plan on many hosts, each linked with the next eight; one connection between two QPs on each link.
    pub(super) fn large(seed: u64, hosts: usize) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan { hosts, neighbours: 8, qps: 1, cut: 5, ..Plan::new(&mut rng) };
        Self::of(plan, rng)
    }

    fn of(plan: Plan, mut rng: Rng) -> Self {
        let devices = (0..plan.hosts).map(|_| Device::new(Rng::new(rng.next()), plan.later)).collect();
        let mut world =
            Self { plan, rng, now: Nanos(1), devices, pairs: Vec::new(), datagrams: 0, cuts: 0, forgotten: 0 };
        for first in 0..world.plan.hosts {
            for second in first + 1..world.plan.hosts.min(first + 1 + world.plan.neighbours) {
                world.add_pair(first, second);
            }
        }
        world
    }

    fn link(&self, own: usize, peer: usize, epoch: u64) -> Link {
        let config = Config {
            host: [own as u8; 16],
            peer: [peer as u8; 16],
            dials: own < peer,
            epoch,
            ticket: [9; 32],
            lanes: self.plan.lanes,
            limits: self.plan.limits.clone(),
        };
        Link::new(config, self.now)
    }

    fn add_pair(&mut self, first: usize, second: usize) {
        let hosts = [first, second];
        let links = [self.link(first, second, 1), self.link(second, first, 2)];
        let mut pair = Pair { hosts, links, wires: Vec::new(), qps: [Vec::new(), Vec::new()], epochs: [1, 2] };
        for _ in 0..self.plan.qps {
            self.add_qps(&mut pair);
        }
        self.pairs.push(pair);
    }

    /// Two QPs that are connected.
    fn add_qps(&mut self, pair: &mut Pair) {
        let transport = if self.rng.chance(200) { Transport::Uc } else { Transport::Rc };
        let scripts = [0, 1].map(|_| Rc::new(self.plan.script(&mut self.rng, transport)));
        let numbers = pair.hosts.map(|host| self.devices[host].qps.len());
        for end in 0..2 {
            let mut qp = Qp::new(numbers[end], numbers[1 - end], transport, self.plan.depth);
            (qp.script, qp.peers_script) = (scripts[end].clone(), scripts[1 - end].clone());
            qp.receives = self.rng.below(4) as u32;
            qp.shared = self.rng.chance(300);
            self.devices[pair.hosts[end]].qps.push(qp);
            let open = Open {
                flow: FlowId(0),
                tenant: 0,
                transport,
                depth: self.rng.between(1, 5) as u8,
                incarnation: 1,
                source: [0; 16],
                destination: [0; 16],
                source_qpn: numbers[end] as u32,
                destination_qpn: numbers[1 - end] as u32,
                psn: 0,
            };
            let retries = self.plan.retries;
            pair.qps[end].push((numbers[end], pair.links[end].open(open, retries)));
        }
    }

    /// Runs to the end.
    pub(super) fn run(&mut self) {
        for _ in 0..TOO_MANY {
            if self.is_over() {
                self.check_end();
                return;
            }
            let mut moved = self.post();
            for index in 0..self.pairs.len() {
                moved |= self.step_pair(index);
            }
            if self.now < self.plan.peace {
                (0..self.pairs.len().div_ceil(8)).for_each(|_| self.befall());
            }
            self.check_bounds();
            self.advance(moved);
        }
        panic!("not at its end after {TOO_MANY} steps, at {:?}", self.now);
    }

    fn advance(&mut self, moved: bool) {
        if moved || self.now < self.plan.peace {
            self.now = self.now + Nanos(self.rng.below(20_000));
            return;
        }
        let times = self.pairs.iter().flat_map(|pair| {
            let timers = pair.links.iter().filter_map(Link::timer);
            timers.chain(pair.wires.iter().filter_map(|wire| wire.next_time(self.now)))
        });
        let next = times.min().unwrap_or(self.now).max(self.now);
        self.now = next + Nanos(self.rng.below(1000));
    }

    /// Applications post sends and receives.
    fn post(&mut self) -> bool {
        let mut moved = false;
        let peace = self.now >= self.plan.peace;
        for pair in &mut self.pairs {
            for end in 0..2 {
                let device = &mut self.devices[pair.hosts[end]];
                for &(index, flow) in &pair.qps[end] {
                    if self.rng.chance(self.plan.receive) || peace {
                        let qp = &mut device.qps[index];
                        let missing =
                            qp.receives == 0 && (peace || self.plan.kind != Kind::NotReady || self.rng.chance(100));
                        qp.receives += u32::from(missing) * self.rng.below(3) as u32;
                    }
                    let qp = &mut device.qps[index];
                    if qp.failed.is_some() || qp.posted == qp.script.len() || !self.rng.chance(600) {
                        continue;
                    }
                    let item = qp.script[qp.posted].clone();
                    let (op, length, fence, solicited) = (item.op, item.length, item.fence, item.solicited);
                    let work = Work { token: token(index, qp.posted), op, length, fence, solicited };
                    qp.posted += 1;
                    match pair.links[end].post(self.now, flow, work, device) {
                        Ok(()) => moved = true,
                        Err(crate::PostError::Full) => device.qps[index].posted -= 1,
                        Err(error) => panic!("post: {error}"),
                    }
                }
            }
        }
        moved | self.post_datagram()
    }

    fn post_datagram(&mut self) -> bool {
        if self.datagrams >= self.plan.datagrams || !self.rng.chance(100) {
            return false;
        }
        let (pair, end) = (self.rng.below(self.pairs.len() as u64) as usize, self.rng.below(2) as usize);
        let pair = &mut self.pairs[pair];
        let id = self.datagrams;
        self.datagrams += 1;
        let datagram = Datagram {
            tenant: 0,
            source_qpn: id,
            destination_qpn: 0,
            qkey: 0,
            source: [0; 16],
            destination: [0; 16],
            imm: Some(id),
            solicited: false,
            traffic_class: 0,
            hop_limit: 0,
            flow_label: 0,
        };
        let len = self.rng.below(200) as u32;
        let device = &mut self.devices[pair.hosts[end]];
        pair.links[end].send_datagram(self.now, datagram, len, Token(id.into()), device);
        true
    }

    /// Timers, sockets and bytes of a pair of hosts.
    fn step_pair(&mut self, index: usize) -> bool {
        let mut moved = false;
        for end in 0..2 {
            let pair = &mut self.pairs[index];
            let device = &mut self.devices[pair.hosts[end]];
            if pair.links[end].timer().is_some_and(|at| at <= self.now) {
                pair.links[end].on_timer(self.now, device);
                moved = true;
            }
            moved |= self.events(index, end);
        }
        for wire in 0..self.pairs[index].wires.len() {
            for end in 0..2 {
                moved |= self.step_wire(index, wire, end);
                self.events(index, end);
            }
        }
        self.pairs[index].wires.retain(|wire| !wire.is_dead());
        moved
    }

    fn step_wire(&mut self, index: usize, wire: usize, end: usize) -> bool {
        let Pair { hosts, links, wires, .. } = &mut self.pairs[index];
        let (device, link, wire) = (&mut self.devices[hosts[end]], &mut links[end], &mut wires[wire]);
        let mut moved = false;
        if wire.ends[end].open && wire.ends[end].notices.is_some_and(|at| at <= self.now) {
            wire.close(end, self.now);
            if let Some(conn) = wire.ends[end].conn {
                link.disconnected(self.now, conn, device);
            }
            moved = true;
        }
        moved |= wire.pump(end, link, device, self.now, (self.plan.pipe, self.rng.below(6)));
        let most = if self.rng.chance(300) { self.rng.below(20) } else { self.rng.below(2000) } as usize;
        let Ok(some) = wire.deliver(end, link, device, self.now, most) else {
            let notices = self.now + self.rng.micros(0, 200);
            wire.close(end, notices);
            return true;
        };
        moved | some
    }

    /// What links want of sockets.
    fn events(&mut self, index: usize, end: usize) -> bool {
        let mut some = false;
        let peace = self.now >= self.plan.peace;
        let pair = &mut self.pairs[index];
        while let Some(event) = pair.links[end].poll_event() {
            some = true;
            match event {
                Event::Dial(conn) if !peace && self.rng.chance(self.plan.dial_fails) => {
                    let device = &mut self.devices[pair.hosts[end]];
                    pair.links[end].disconnected(self.now, conn, device);
                }
                Event::Dial(conn) => {
                    let arrives = self.now + self.rng.micros(0, if peace { 10 } else { 400 });
                    pair.wires.push(Wire::new(conn, arrives));
                    pair.links[end].connected(self.now, conn);
                }
                Event::Close(conn, _) => {
                    let notices = self.now + self.rng.micros(0, 200);
                    let own = |wire: &&mut Wire| wire.ends[end].conn == Some(conn) && wire.ends[end].open;
                    for wire in pair.wires.iter_mut().filter(own) {
                        // Its bytes may still be read for a while: whoever has the sockets is slow.
                        if self.rng.chance(500) {
                            wire.close(end, notices);
                        } else {
                            wire.ends[end].notices = Some(notices);
                        }
                    }
                }
            }
        }
        some
    }

    /// Something bad happens, maybe.
    fn befall(&mut self) {
        let pair = self.rng.below(self.pairs.len() as u64) as usize;
        let wires = self.pairs[pair].wires.len() as u64;
        if wires > 0 {
            let wire = self.rng.below(wires) as usize;
            if self.rng.chance(self.plan.cut) {
                self.cut(pair, wire);
            } else if self.rng.chance(self.plan.stall) {
                let (end, until) = (self.rng.below(2) as usize, self.now + self.rng.micros(1, 1500));
                self.pairs[pair].wires[wire].pipes[end].stalled = until;
            }
        }
        if self.plan.kind == Kind::Forgetful && self.forgotten < 2 && self.rng.chance(20) {
            self.forget(pair);
        }
    }

    /// A connection breaks. One end may not notice for a long time: until it says something, or for ever.
    fn cut(&mut self, pair: usize, wire: usize) {
        self.cuts += 1;
        let wire = &mut self.pairs[pair].wires[wire];
        for end in 0..2 {
            wire.pipes[end].cut(&mut self.rng);
            if !self.rng.chance(250) {
                wire.ends[end].notices = Some(self.now + self.rng.micros(0, 300));
            }
        }
    }

    /// A QP is reset, or a host begins a new life.
    fn forget(&mut self, index: usize) {
        self.forgotten += 1;
        let end = self.rng.below(2) as usize;
        let which = self.rng.below(self.plan.qps as u64) as usize;
        let whole = self.rng.chance(400);
        let pair = &mut self.pairs[index];
        let device = &mut self.devices[pair.hosts[end]];
        if !whole {
            let Some(&(qp, _)) = pair.qps[end].get(which) else { return };
            device.qps[qp].gone = true;
            pair.links[end].unbind(QpKey(qp as u64));
            return;
        }
        for &(qp, _) in &pair.qps[end] {
            // Nobody hears of what it had under way.
            let qp = &mut device.qps[qp];
            qp.gone = true;
            qp.failed.get_or_insert(WcStatus::GeneralErr);
        }
        pair.qps[end].clear();
        pair.epochs[end] += 10;
        let (hosts, epoch) = (pair.hosts, pair.epochs[end]);
        for wire in pair.wires.iter_mut().filter(|wire| wire.ends[end].open) {
            wire.close(end, self.now);
        }
        self.pairs[index].links[end] = self.link(hosts[end], hosts[1 - end], epoch);
    }

    fn is_over(&self) -> bool {
        let datagrams = self.datagrams as usize == self.devices.iter().map(|device| device.datagrams_sent.len()).sum();
        let done = |qp: &Qp| qp.failed.is_some() || qp.completed == qp.script.len();
        datagrams && self.devices.iter().all(|device| device.qps.iter().all(done))
    }

    /// Everything that is kept has a bound, whatever happens.
    fn check_bounds(&self) {
        for pair in &self.pairs {
            for end in 0..2 {
                let held = pair.links[end].footprint();
                let qps = self.plan.qps;
                let lanes = usize::from(self.plan.lanes);
                let limits = &self.plan.limits;
                let depth = usize::from(self.plan.depth);
                let most = Footprint {
                    requesters: qps,
                    responders: qps,
                    messages: qps * limits.messages,
                    in_flight: qps as u64 * u64::from(limits.window + limits.chunk),
                    answers: qps * depth,
                    replies: qps * depth,
                    strays: lanes * limits.strays,
                    notes: 0,
                    datagrams: lanes * limits.datagrams,
                    queued: 4 * qps + lanes,
                    timers: 2 * qps + 2 * lanes,
                };
                assert!(held.is_within(&most), "{held:?} is more than {most:?}");
            }
        }
    }

    fn check_end(&self) {
        for pair in &self.pairs {
            for end in 0..2 {
                for &(index, _) in &pair.qps[end] {
                    let qp = &self.devices[pair.hosts[end]].qps[index];
                    let peer = &self.devices[pair.hosts[1 - end]].qps[qp.peer];
                    self.check_qp(qp, peer);
                }
            }
        }
    }

    /// What became of a QP's messages is what may have become of them.
    fn check_qp(&self, qp: &Qp, peer: &Qp) {
        let kind = self.plan.kind;
        let who = format!("QP {} to {} ({kind:?}, {:?})", qp.number, qp.peer, qp.transport);
        if qp.transport == Transport::Uc {
            assert!(qp.failed.is_none() && peer.delivered <= qp.script.len(), "{who}");
            return;
        }
        let good = qp.completed.min(qp.failed_at());
        assert!(peer.executed >= good, "{who}: {good} complete, {} executed", peer.executed);
        let bad = qp.script.iter().enumerate().find_map(|(at, item)| Some((at, item.fails_with()?)));
        let expected = match (kind, qp.failed) {
            (Kind::Patient, failed) => failed.is_none(),
            (Kind::Impatient, failed) => failed.is_none_or(|status| status == WcStatus::RetryExcErr),
            (Kind::NotReady, failed) => failed.is_none_or(|status| status == WcStatus::RnrRetryExcErr),
            (Kind::Refused, failed) => {
                failed == bad.map(|(_, status)| status) && bad.is_none_or(|(at, _)| qp.failed_at() == at)
            }
            (Kind::Forgetful, failed) => failed.is_none_or(|status| status == WcStatus::RetryExcErr),
        };
        assert!(expected, "{who}: {:?} at {}", qp.failed, qp.failed_at());
    }

    /// QPs of all hosts.
    pub(super) fn qps(&self) -> usize {
        self.devices.iter().map(|device| device.qps.len()).sum()
    }

    /// What is worth knowing when it goes wrong.
    pub(super) fn describe(&self) -> String {
        let mut text = format!("{:?} at {:?}, {} cuts, {} forgotten", self.plan, self.now, self.cuts, self.forgotten);
        for (host, device) in self.devices.iter().enumerate() {
            for qp in device.qps.iter().filter(|qp| qp.failed.is_none() && qp.completed < qp.script.len()) {
                let (posted, all, next) = (qp.posted, qp.script.len(), &qp.script[qp.completed]);
                let now = (qp.completed, posted, all, qp.executed, qp.receives);
                let _ = write!(
                    text,
                    "\nhost {host} QP {} {:?}: complete, posted, of, executed, receives {now:?}",
                    qp.number, qp.transport
                );
                let _ = write!(text, "\n    {:?} {}", next.op, next.length);
            }
        }
        for pair in &self.pairs {
            let _ = write!(text, "\n{:?}: {:?}\n{:?}", pair.hosts, pair.links, pair.wires);
        }
        text
    }
}

impl Footprint {
    fn is_within(&self, most: &Self) -> bool {
        let list = |f: &Self| {
            let in_flight = f.in_flight as usize;
            [
                f.requesters,
                f.responders,
                f.messages,
                in_flight,
                f.answers,
                f.replies,
                f.strays,
                f.datagrams,
                f.queued,
                f.timers,
            ]
        };
        list(self).iter().zip(list(most)).all(|(held, most)| *held <= most)
    }
}
