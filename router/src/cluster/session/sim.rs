//! Several hosts and the connections between them, as a seed says: cuts that both ends notice, one, or none; delays; hosts that are killed and begin
//! anew; a directory that changes. The clock is a number. `FREEFLOW_SCHEDULES=n` runs more, `FREEFLOW_SEED=n` one again.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use super::*;

/// Splitmix64.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

pub fn name(host: usize) -> HostName {
    format!("host{host}").parse().unwrap()
}

pub fn address(host: usize) -> SocketAddr {
    format!("192.0.2.{}:7471", host + 1).parse().unwrap()
}

/// A host, with what its data path was told.
pub struct Host {
    pub sessions: Sessions,
    pub joined: BTreeMap<PeerId, Joined>,
    pub tenants: BTreeMap<PeerId, TenantNames>,
    pub own_tenants: TenantNames,
    pub leaves: usize,
    pub dials: usize,
    next_peer: u32,
    workers: u16,
    versions: (u16, u16),
}

/// Bytes on their way, or the end.
type Piece = (Duration, Option<Vec<u8>>);

/// One connection: each end with its host, session, and what is on the way to it.
struct Pipe {
    ends: [(usize, SessionId); 2],
    ways: [VecDeque<Piece>; 2],
    /// Nothing arrives any more, and nobody is told.
    dead: bool,
}

pub struct World {
    pub now: Duration,
    pub rng: Rng,
    pub hosts: Vec<Host>,
    pub listed: Vec<bool>,
    pipes: Vec<Pipe>,
    dialing: Vec<(Duration, usize, SessionId, HostName)>,
    /// Pairs that do not reach each other, until then.
    apart: Vec<(usize, usize, Duration)>,
    latency: u64,
}

pub const DEAD_AFTER: Duration = Duration::from_secs(3);

impl World {
    pub fn new(seed: u64, hosts: usize, versions: &[(u16, u16)]) -> Self {
        let mut rng = Rng(seed);
        let latency = 1 + rng.below(30);
        let mut world = Self {
            now: Duration::ZERO,
            rng,
            hosts: Vec::new(),
            listed: vec![true; hosts],
            pipes: Vec::new(),
            dialing: Vec::new(),
            apart: Vec::new(),
            latency,
        };
        for host in 0..hosts {
            let (versions, workers) = (versions[host % versions.len()], 1 + world.rng.below(4) as u16);
            let fresh = world.life(host, versions, workers);
            world.hosts.push(fresh);
        }
        world.list();
        world
    }

    fn life(&mut self, host: usize, versions: (u16, u16), workers: u16) -> Host {
        let epoch = self.rng.next();
        let me = Me { name: name(host), epoch, workers, lanes: 1 + self.rng.below(3) as u16 };
        let limits = Limits { versions, ..Limits::new(DEAD_AFTER) };
        let mut random = Rng(self.rng.next());
        let random: Random = Box::new(move |bytes| bytes.fill_with(|| random.next() as u8));
        Host {
            sessions: Sessions::new(me, limits, random),
            joined: BTreeMap::new(),
            tenants: BTreeMap::new(),
            own_tenants: TenantNames::new(),
            leaves: 0,
            dials: 0,
            next_peer: 0,
            workers,
            versions,
        }
    }

    /// Tells all hosts which hosts there are.
    pub fn list(&mut self) {
        let listed: Vec<_> = (0..self.hosts.len()).filter(|host| self.listed[*host]).collect();
        let names: Vec<_> = listed.iter().map(|host| (name(*host), address(*host))).collect();
        for host in 0..self.hosts.len() {
            let hosts = names.iter().map(|(name, address)| (name, *address));
            self.hosts[host].sessions.set_hosts(hosts, self.now);
            self.act(host);
        }
    }

    pub fn set_tenants(&mut self, host: usize, tenants: &[(u32, &str)]) {
        let tenants: TenantNames = tenants.iter().map(|(n, name)| (*n, (*name).into())).collect();
        self.hosts[host].own_tenants.clone_from(&tenants);
        self.hosts[host].sessions.set_tenants(tenants, self.now);
        self.act(host);
    }

    /// Another life of a host. Its peers may see their connections end, or not.
    pub fn restart(&mut self, host: usize, noticed: bool) {
        let (versions, workers) = (self.hosts[host].versions, self.hosts[host].workers);
        for pipe in &mut self.pipes {
            if let Some(end) = pipe.ends.iter().position(|(at, _)| *at == host) {
                pipe.ways[end].clear();
                // The next life counts its sessions anew.
                pipe.ends[end].0 = usize::MAX;
                if noticed {
                    pipe.ways[1 - end].push_back((self.now, None));
                }
                pipe.dead |= !noticed;
            }
        }
        self.dialing.retain(|(_, by, ..)| *by != host);
        self.hosts[host] = self.life(host, versions, workers);
        self.list();
    }

    /// The connections of a pair end, as each end notices or not.
    pub fn cut(&mut self, a: usize, b: usize, noticed: [bool; 2]) {
        for pipe in &mut self.pipes {
            let Some(end) = pipe.ends.iter().position(|(at, _)| *at == a) else { continue };
            if pipe.ends[1 - end].0 != b {
                continue;
            }
            for (end, noticed) in [(end, noticed[0]), (1 - end, noticed[1])] {
                pipe.ways[end].clear();
                if noticed {
                    pipe.ways[end].push_back((self.now, None));
                }
            }
            // Nothing new gets into it.
            pipe.dead |= noticed == [false; 2];
        }
    }

    /// Two do not reach each other for so long.
    pub fn part(&mut self, a: usize, b: usize, time: Duration) {
        self.cut(a, b, [false; 2]);
        self.apart.push((a, b, self.now + time));
    }

    fn is_apart(&self, a: usize, b: usize) -> bool {
        let now = self.now;
        self.apart.iter().any(|(x, y, until)| *until > now && ((*x, *y) == (a, b) || (*x, *y) == (b, a)))
    }

    fn act(&mut self, host: usize) {
        while let Some(action) = self.hosts[host].sessions.next_action() {
            match action {
                Action::Dial(id, to, _) => {
                    self.hosts[host].dials += 1;
                    let time = self.now + self.rng.ms(0, self.latency);
                    self.dialing.push((time, host, id, to));
                }
                Action::Send(id, bytes) => self.send(host, id, Some(bytes)),
                Action::Close(id) => {
                    self.send(host, id, None);
                    self.forget_end(host, id);
                }
                Action::Join(joined) => self.hosts[host].join(joined),
                Action::Leave(peer) => self.hosts[host].leave(peer),
                Action::Tenants(peer, names) => {
                    assert!(self.hosts[host].joined.contains_key(&peer));
                    self.hosts[host].tenants.insert(peer, names);
                }
                Action::Say(..) => {}
            }
        }
    }

    /// An end that was closed hears nothing more.
    fn forget_end(&mut self, host: usize, id: SessionId) {
        for pipe in &mut self.pipes {
            for end in 0..2 {
                if pipe.ends[end] == (host, id) {
                    pipe.ways[end].clear();
                    pipe.ends[end].0 = usize::MAX;
                }
            }
        }
    }

    /// Bytes go in pieces.
    fn send(&mut self, host: usize, id: SessionId, bytes: Option<Vec<u8>>) {
        let Some(pipe) = self.pipes.iter_mut().find(|pipe| pipe.ends.contains(&(host, id))) else { return };
        if pipe.dead {
            return;
        }
        let to = usize::from(pipe.ends[0] == (host, id));
        if pipe.ends[to].0 == usize::MAX {
            // The other end is closed: a reset comes back.
            pipe.ways[1 - to].push_back((self.now, None));
            return;
        }
        let earliest = pipe.ways[to].back().map_or(self.now, |(time, _)| *time);
        let time = earliest.max(self.now + Duration::from_millis(self.latency));
        let Some(bytes) = bytes else { return pipe.ways[to].push_back((time, None)) };
        let cut = self.rng.below(bytes.len() as u64 + 1) as usize;
        let (first, second) = bytes.split_at(cut);
        pipe.ways[to].push_back((time, Some(first.to_vec())));
        pipe.ways[to].push_back((time + self.rng.ms(0, 3), Some(second.to_vec())));
    }

    /// Until this time.
    pub fn run(&mut self, until: Duration) {
        loop {
            let wakes = self.hosts.iter().filter_map(|host| host.sessions.next_wake());
            let arrivals = self.pipes.iter().flat_map(|pipe| pipe.ways.iter().filter_map(|way| Some(way.front()?.0)));
            let dials = self.dialing.iter().map(|(time, ..)| *time);
            let next = wakes.chain(arrivals).chain(dials).min().unwrap_or(until).max(self.now);
            if next >= until {
                self.now = until;
                return;
            }
            self.now = next;
            self.step();
        }
    }

    fn step(&mut self) {
        while let Some(at) = self.dialing.iter().position(|(time, ..)| *time <= self.now) {
            let (_, host, id, to) = self.dialing.remove(at);
            self.connect(host, id, &to);
        }
        for pipe in 0..self.pipes.len() {
            for end in 0..2 {
                while self.pipes[pipe].ways[end].front().is_some_and(|(time, _)| *time <= self.now) {
                    self.arrive(pipe, end);
                }
            }
        }
        self.pipes.retain(|pipe| !pipe.ends.iter().all(|(host, _)| *host == usize::MAX));
        for host in 0..self.hosts.len() {
            if self.hosts[host].sessions.next_wake().is_some_and(|at| at <= self.now) {
                self.hosts[host].sessions.wake(self.now);
                self.act(host);
                let next = self.hosts[host].sessions.next_wake();
                assert!(next.is_none_or(|at| at > self.now), "a wake that does nothing");
            }
            let bound = 4 * self.hosts.len() + 4;
            assert!(self.hosts[host].sessions.open.len() <= bound, "sessions pile up");
        }
    }

    fn arrive(&mut self, pipe: usize, end: usize) {
        let (host, id) = self.pipes[pipe].ends[end];
        let Some((_, piece)) = self.pipes[pipe].ways[end].pop_front() else { return };
        if host == usize::MAX {
            return;
        }
        if let Some(bytes) = piece {
            self.hosts[host].sessions.received(id, &bytes, self.now);
        } else {
            self.forget_end(host, id);
            self.hosts[host].sessions.lost(id, "the connection was closed", self.now);
        }
        self.act(host);
    }

    fn connect(&mut self, host: usize, id: SessionId, to: &HostName) {
        let other = (0..self.hosts.len()).find(|other| name(*other) == *to).unwrap();
        if self.is_apart(host, other) {
            self.hosts[host].sessions.lost(id, "no route", self.now);
        } else {
            let proven = vec![name(host)];
            let accepted = self.hosts[other].sessions.accepted(proven, self.now);
            self.pipes.push(Pipe {
                ends: [(host, id), (other, accepted)],
                ways: [VecDeque::new(), VecDeque::new()],
                dead: false,
            });
            self.hosts[host].sessions.dialed(id, self.now);
            self.act(other);
        }
        self.act(host);
    }

    /// All that are listed have sessions with each other, and agree on everything.
    pub fn assert_all_is_well(&self) {
        let listed: Vec<_> = (0..self.hosts.len()).filter(|host| self.listed[*host]).collect();
        for &a in &listed {
            let host = &self.hosts[a];
            let others = host.joined.values().map(|joined| joined.name.clone()).collect::<Vec<_>>();
            let mut expected: Vec<_> = listed.iter().filter(|b| **b != a).map(|b| name(*b)).collect();
            expected.sort();
            let mut sorted = others.clone();
            sorted.sort();
            assert_eq!(sorted, expected, "who host {a} knows: {:#?}", host.sessions.peers());
            for &b in listed.iter().filter(|b| **b != a) {
                self.assert_agree(a, b);
            }
        }
    }

    fn assert_agree(&self, a: usize, b: usize) {
        let find = |a: usize, b: usize| {
            let found = self.hosts[a].joined.values().find(|joined| joined.name == name(b));
            found.unwrap_or_else(|| panic!("{a} has not joined {b}"))
        };
        let (ours, theirs) = (find(a, b), find(b, a));
        assert_eq!((&ours.tickets, ours.lanes), (&theirs.tickets, theirs.lanes));
        assert_ne!(ours.side, theirs.side);
        assert_eq!(ours.tickets.len(), usize::from(self.hosts[a].workers.max(self.hosts[b].workers)));
        let state = self.hosts[a].sessions.peers().into_iter().find(|state| state.name == name(b)).unwrap();
        assert_eq!((state.contact, state.joined), (Contact::Up, Some(ours.peer)));
        assert_eq!(state.version, Some(self.hosts[a].versions.1.min(self.hosts[b].versions.1)));
        let said = self.hosts[b].own_tenants.clone();
        assert_eq!(self.hosts[a].tenants.get(&ours.peer), Some(&said), "tenants of {b} at {a}");
    }
}

impl Host {
    fn join(&mut self, joined: Joined) {
        assert_eq!(joined.peer, PeerId(self.next_peer), "numbers are not used again");
        self.next_peer += 1;
        assert!(self.joined.values().all(|other| other.name != joined.name), "one life at a time");
        self.joined.insert(joined.peer, joined);
    }

    fn leave(&mut self, peer: PeerId) {
        self.joined.remove(&peer).expect("who leaves has joined");
        self.tenants.remove(&peer);
        self.leaves += 1;
    }
}

fn trouble(world: &mut World) {
    let hosts = world.hosts.len() as u64;
    let a = world.rng.below(hosts) as usize;
    let b = (a + 1 + world.rng.below(hosts - 1) as usize) % hosts as usize;
    match world.rng.below(10) {
        0..4 => {
            let noticed = [world.rng.one_in(2), world.rng.one_in(2)];
            world.cut(a, b, noticed);
        }
        4..6 => {
            let time = world.rng.ms(10, 6000);
            world.part(a, b, time);
        }
        6 => {
            let noticed = world.rng.one_in(2);
            world.restart(a, noticed);
        }
        7 => {
            world.listed[a] = !world.listed[a];
            world.list();
        }
        _ => {
            let number = world.rng.below(3) as u32;
            let name: &str = &format!("tenant{number}");
            world.set_tenants(a, &[(number, name), (7, "same")][..=world.rng.clone().below(2) as usize]);
        }
    }
}

fn schedule(seed: u64) {
    let versions: &[_] = if seed.is_multiple_of(2) { &[(1, 1)] } else { &[(1, 1), (1, 2)] };
    let mut world = World::new(seed, 2 + (seed % 3) as usize, versions);
    for _ in 0..world.rng.below(30) {
        let time = world.now + world.rng.ms(0, 1500);
        world.run(time);
        trouble(&mut world);
    }
    world.listed.fill(true);
    world.list();
    let calm = world.now + Duration::from_secs(12);
    world.run(calm);
    world.assert_all_is_well();
}

fn seeds() -> impl Iterator<Item = u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match number("FREEFLOW_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("FREEFLOW_SCHEDULES").unwrap_or(500),
    }
}

#[test]
fn whatever_happens_all_is_well_in_the_end() {
    for seed in seeds() {
        let result = std::panic::catch_unwind(|| schedule(seed));
        assert!(result.is_ok(), "FREEFLOW_SEED={seed}");
    }
}

/// Sessions that are cut, but come back in time, are nothing to the data path.
#[test]
fn cuts_do_not_disturb_the_data() {
    for seed in seeds() {
        let mut world = World::new(seed, 2, &[(1, 1)]);
        world.run(Duration::from_secs(1));
        let joined = [0, 1].map(|host| world.hosts[host].joined.keys().copied().collect::<Vec<_>>());
        for _ in 0..20 {
            let noticed = [[true, true], [true, false], [false, true]][world.rng.below(3) as usize];
            world.cut(0, 1, noticed);
            let time = world.now + world.rng.ms(2000, 4000);
            world.run(time);
        }
        world.assert_all_is_well();
        let now = [0, 1].map(|host| world.hosts[host].joined.keys().copied().collect::<Vec<_>>());
        assert_eq!((now, world.hosts[0].leaves + world.hosts[1].leaves), (joined, 0), "FREEFLOW_SEED={seed}");
    }
}

/// Two that do not reach each other give each other up after the time that was set, and not before.
#[test]
fn who_is_not_heard_of_is_given_up_in_time() {
    for seed in seeds() {
        let mut world = World::new(seed, 2, &[(1, 1)]);
        let start = world.rng.ms(1000, 3000);
        world.run(start);
        world.assert_all_is_well();
        world.part(0, 1, Duration::from_mins(1));
        let limits = Limits::new(DEAD_AFTER);
        // Both have heard of each other within the keepalive time and the time on the way.
        let earliest = DEAD_AFTER.saturating_sub(limits.keepalive + Duration::from_millis(40));
        world.run(start + earliest);
        assert_eq!([0, 1].map(|host| world.hosts[host].joined.len()), [1, 1], "FREEFLOW_SEED={seed}");
        world.run(start + DEAD_AFTER + Duration::from_millis(1));
        assert_eq!([0, 1].map(|host| world.hosts[host].joined.len()), [0, 0], "FREEFLOW_SEED={seed}");
        let dials = world.hosts[0].dials + world.hosts[1].dials;
        world.run(start + Duration::from_mins(1));
        let more = world.hosts[0].dials + world.hosts[1].dials - dials;
        assert!((50..=100).contains(&more), "one every 750 ms: {more}");
        world.run(start + Duration::from_secs(63));
        world.assert_all_is_well();
    }
}
