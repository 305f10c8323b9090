//! One router and a peer that does what no router does.

use std::time::Duration;

use super::sim::{Rng, address, name};
use super::wire::{Hello, MAX_MESSAGE};
use super::*;

/// `host1` of the simulation is the one that waits for `host0` or `host2`, or dials them: whatever the numbers say.
fn other(side: Side) -> (HostName, HostName) {
    let (a, b) = (name(0), name(1));
    let (low, high) = if a.id() < b.id() { (a, b) } else { (b, a) };
    match side {
        Side::Dials => (low, high),
        Side::Accepts => (high, low),
    }
}

struct Bench {
    sessions: Sessions,
    now: Duration,
    me: HostName,
    peer: HostName,
    limits: Limits,
    joins: usize,
    leaves: usize,
    tenants: Option<TenantNames>,
    closed: Vec<SessionId>,
    sent: Vec<(SessionId, Message)>,
    dialed: Vec<SessionId>,
}

impl Bench {
    fn new(side: Side) -> Self {
        let (me, peer) = other(side);
        let limits = Limits::new(Duration::from_secs(3));
        let mut rng = Rng(7);
        let random: Random = Box::new(move |bytes| bytes.fill_with(|| rng.next() as u8));
        let who = Me { name: me.clone(), epoch: 1, workers: 2, lanes: 2 };
        let mut sessions = Sessions::new(who, limits.clone(), random);
        sessions.set_hosts([(&me, address(0)), (&peer, address(1))], Duration::ZERO);
        let mut bench = Self {
            sessions,
            now: Duration::ZERO,
            me,
            peer,
            limits,
            joins: 0,
            leaves: 0,
            tenants: None,
            closed: Vec::new(),
            sent: Vec::new(),
            dialed: Vec::new(),
        };
        bench.act();
        bench
    }

    fn act(&mut self) {
        while let Some(action) = self.sessions.next_action() {
            match action {
                Action::Dial(id, ..) => self.dialed.push(id),
                Action::Send(id, bytes) => {
                    let mut incoming = wire::Incoming::default();
                    incoming.push(&bytes);
                    self.sent.push((id, incoming.message().unwrap().unwrap()));
                }
                Action::Close(id) => self.closed.push(id),
                Action::Join(_) => self.joins += 1,
                Action::Leave(_) => self.leaves += 1,
                Action::Tenants(_, names) => self.tenants = Some(names),
                Action::Say(..) => {}
            }
        }
        assert!(self.joins - self.leaves <= 1);
    }

    fn accept(&mut self) -> SessionId {
        let id = self.sessions.accepted(vec![self.peer.clone()], self.now);
        self.act();
        id
    }

    fn dial(&mut self) -> SessionId {
        let id = self.dialed.pop().unwrap();
        self.sessions.dialed(id, self.now);
        self.act();
        id
    }

    fn hears(&mut self, id: SessionId, message: &Message) {
        self.sessions.received(id, &message.encode(), self.now);
        self.act();
    }

    fn wait(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(at) = self.sessions.next_wake().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.sessions.wake(self.now);
            self.act();
        }
        self.now = until;
    }

    fn hello(&self) -> Hello {
        Hello { oldest: 1, newest: 1, name: self.peer.clone(), epoch: 2, workers: 1, lanes: 1, links: None }
    }

    fn up(&mut self) -> SessionId {
        let id = self.accept();
        self.hears(id, &Message::Hello(self.hello()));
        self.hears(id, &links(1, 2, 2));
        assert_eq!((self.joins - self.leaves, self.state().contact), (1, Contact::Up));
        id
    }

    fn state(&self) -> PeerState {
        self.sessions.peers().remove(0)
    }

    fn why(&self) -> String {
        self.state().why.unwrap_or_default()
    }
}

fn links(number: u64, lanes: u16, tickets: u8) -> Message {
    let tickets = (0..tickets).map(|n| Ticket([n; 32])).collect();
    Message::Links(wire::Links { number, lanes, tickets })
}

fn tenants(anew: bool, known: &[(u32, &str)]) -> Message {
    let known = known.iter().map(|(n, name)| (*n, (*name).to_owned())).collect();
    Message::Tenants(wire::Tenants { anew, known, gone: Vec::new() })
}

type Say = Box<dyn Fn(&Bench) -> Message>;

/// What ends a session, by what is said before it is up and after.
#[test]
fn what_a_router_does_not_say_ends_the_session() {
    let hello = |change: fn(&mut Hello)| {
        move |bench: &Bench| {
            let mut hello = bench.hello();
            change(&mut hello);
            Message::Hello(hello)
        }
    };
    let before: Vec<(Say, &str)> = vec![
        (Box::new(|_| Message::Ping(1)), "before its HELLO"),
        (Box::new(|_| links(1, 2, 2)), "before its HELLO"),
        (Box::new(hello(|hello| hello.name = name(5))), "its certificate is for"),
        (Box::new(hello(|hello| (hello.oldest, hello.newest) = (2, 3))), "speaks versions (2, 3)"),
        (Box::new(hello(|hello| (hello.oldest, hello.newest) = (2, 1))), "versions cannot be"),
        (Box::new(hello(|hello| hello.workers = 0)), "number of workers"),
        (Box::new(hello(|hello| hello.workers = 257)), "number of workers"),
        (Box::new(hello(|hello| hello.lanes = 0)), "number of lanes"),
        (Box::new(hello(|hello| hello.lanes = u16::MAX)), "number of lanes"),
    ];
    for (say, expected) in before {
        let mut bench = Bench::new(Side::Accepts);
        let id = bench.accept();
        let message = say(&bench);
        bench.hears(id, &message);
        assert_eq!(bench.closed, [id], "{message:?}");
        assert!(bench.why().contains(expected), "{message:?}: {}", bench.why());
        assert!(!bench.sent.iter().any(|(_, message)| matches!(message, Message::Hello(_))), "it learns nothing");
    }
    let between: [(Message, &str); 8] = [
        (links(1, 2, 1), "number of links"),
        (links(1, 2, 3), "number of links"),
        (links(1, 1, 2), "number of lanes"),
        (Message::Links(wire::Links { number: 1, lanes: 2, tickets: vec![Ticket([1; 32]); 2] }), "tickets"),
        (Message::Linked(1), "links out of turn"),
        (tenants(true, &[]), "tenants before its links"),
        (Message::Pong(0), "what was not asked"),
        (Message::Tenants(wire::Tenants { anew: false, known: vec![], gone: vec![1] }), "tenants before"),
    ];
    for (message, expected) in between {
        let mut bench = Bench::new(Side::Accepts);
        let id = bench.accept();
        bench.hears(id, &Message::Hello(bench.hello()));
        bench.hears(id, &message);
        assert!(bench.why().contains(expected) && bench.closed == [id], "{message:?}: {}", bench.why());
        assert_eq!(bench.joins, 0);
    }
    let after: [(Message, &str); 5] = [
        (links(2, 2, 2), "links out of turn"),
        (Message::Pong(0), "what was not asked"),
        (tenants(false, &[(1, "a"), (1, "b")]), "another name"),
        (tenants(false, &[(1, &"x".repeat(256))]), "name of a tenant"),
        (Message::Hello(Bench::new(Side::Accepts).hello()), "second HELLO"),
    ];
    for (message, expected) in after {
        let mut bench = Bench::new(Side::Accepts);
        let id = bench.up();
        bench.hears(id, &message);
        assert!(bench.why().contains(expected) && bench.closed == [id], "{message:?}: {}", bench.why());
        assert_eq!((bench.leaves, bench.state().contact), (0, Contact::Lost), "it may come back");
    }
}

#[test]
fn bytes_that_are_no_messages_end_the_session() {
    let too_long = (MAX_MESSAGE as u32 + 1).to_le_bytes();
    let all: [(&[u8], &str); 4] = [
        (b"\x05\0\0\0hello", "not a message"),
        (&too_long, "1048577 bytes"),
        (b"\0\0\0\0", "not a message"),
        (&[0xff; 4096], "4294967295 bytes"),
    ];
    for (bytes, expected) in all {
        let mut bench = Bench::new(Side::Accepts);
        let id = bench.up();
        bench.sessions.received(id, bytes, bench.now);
        bench.act();
        assert!(bench.why().contains(expected) && bench.closed == [id], "{}", bench.why());
    }
}

/// Half a message, and nothing more; or byte by byte, for ever: neither counts as a sign of life.
#[test]
fn half_a_message_is_silence() {
    for trickle in [false, true] {
        let mut bench = Bench::new(Side::Accepts);
        let id = bench.up();
        bench.sessions.received(id, &(MAX_MESSAGE as u32).to_le_bytes(), bench.now);
        let start = bench.now;
        while bench.closed.is_empty() && bench.now < start + Duration::from_mins(1) {
            if trickle {
                bench.sessions.received(id, b" ", bench.now);
            }
            bench.wait(Duration::from_millis(10));
        }
        assert!(bench.why().contains("nothing is heard"), "{}", bench.why());
        assert!(bench.now.saturating_sub(start) <= bench.limits.silence + Duration::from_millis(20));
        bench.wait(bench.limits.dead_after);
        assert_eq!((bench.leaves, bench.state().contact), (1, Contact::Down));
    }
}

#[test]
fn who_does_not_come_to_an_agreement_is_cut_however_much_it_says() {
    for hello in [false, true] {
        let mut bench = Bench::new(Side::Accepts);
        let id = bench.accept();
        if hello {
            bench.hears(id, &Message::Hello(bench.hello()));
        }
        let start = bench.now;
        while bench.closed.is_empty() && bench.now < start + Duration::from_mins(1) {
            if hello {
                bench.hears(id, &Message::Ping(1));
            }
            bench.wait(Duration::from_millis(50));
        }
        assert!(
            bench.now.saturating_sub(start) <= bench.limits.agreement + Duration::from_millis(50),
            "{:?}",
            bench.now
        );
        assert!(bench.why().contains("agreement in time"), "{}", bench.why());
    }
}

#[test]
fn a_flood_is_cut_and_what_a_router_says_is_no_flood() {
    let mut bench = Bench::new(Side::Accepts);
    let id = bench.up();
    let mut sent = 0;
    while bench.closed.is_empty() && sent < 100_000 {
        bench.hears(id, &Message::Ping(sent));
        sent += 1;
    }
    assert!(u32::try_from(sent).unwrap() <= bench.limits.burst, "{sent}");
    assert!(bench.why().contains("too many"));
    // 100 a second, for a minute.
    let mut bench = Bench::new(Side::Accepts);
    let id = bench.up();
    for n in 0..6000 {
        bench.hears(id, &tenants(false, &[(n, "x")]));
        bench.wait(Duration::from_millis(10));
    }
    assert!(bench.closed.is_empty());
}

#[test]
fn tenants_have_a_bound() {
    let mut bench = Bench::new(Side::Accepts);
    let id = bench.up();
    let most = bench.limits.tenants as u32;
    for n in 0..most {
        bench.hears(id, &tenants(n == 0, &[(n, "x")]));
        bench.wait(Duration::from_millis(10));
    }
    assert_eq!(bench.tenants.as_ref().map(BTreeMap::len), Some(most as usize));
    bench.hears(id, &tenants(true, &[(most, "x")]));
    assert_eq!(bench.tenants.as_ref().map(BTreeMap::len), Some(1), "all others are void");
    let many: Vec<_> = (0..=most).map(|n| (n, "x")).collect();
    bench.hears(id, &tenants(true, &many));
    assert!(bench.why().contains("number of tenants"), "{}", bench.why());
}

/// What was recorded on one connection is nothing on another: TLS does not let it, and a HELLO of before brings nothing back.
#[test]
fn an_old_session_brings_nothing_back() {
    let mut bench = Bench::new(Side::Accepts);
    let first = bench.up();
    let second = bench.accept();
    bench.hears(second, &Message::Hello(bench.hello()));
    assert_eq!(bench.closed, [first], "the newest counts");
    assert_eq!((bench.joins, bench.leaves), (1, 1), "it does not know of the links any more");
    bench.hears(first, &tenants(true, &[(1, "late")]));
    assert_eq!(bench.tenants, None);
    bench.hears(second, &links(1, 2, 2));
    assert_eq!((bench.joins, bench.leaves), (2, 1));
}

#[test]
fn the_same_links_with_other_tickets_are_refused() {
    let mut bench = Bench::new(Side::Accepts);
    bench.up();
    let second = bench.accept();
    bench.hears(second, &Message::Hello(Hello { links: Some(1), ..bench.hello() }));
    let other = Message::Links(wire::Links { number: 1, lanes: 2, tickets: vec![Ticket([8; 32]), Ticket([9; 32])] });
    bench.hears(second, &other);
    assert!(bench.why().contains("not those that it has"), "{}", bench.why());
    assert_eq!((bench.joins, bench.leaves), (1, 0));
}

#[test]
fn who_is_to_be_dialed_may_not_dial() {
    let mut bench = Bench::new(Side::Dials);
    let id = bench.accept();
    bench.hears(id, &Message::Hello(bench.hello()));
    assert!(bench.closed == [id] && bench.why().contains("for us to make"), "{}", bench.why());
}

#[test]
fn the_side_that_dials_believes_only_what_it_offered() {
    for wrong in [false, true] {
        let mut bench = Bench::new(Side::Dials);
        let id = bench.dial();
        bench.hears(id, &Message::Hello(bench.hello()));
        let offered = bench.sent.iter().find_map(|(_, message)| match message {
            Message::Links(links) => Some(links.clone()),
            _ => None,
        });
        let offered = offered.unwrap();
        assert_eq!((offered.tickets.len(), offered.lanes, bench.joins), (2, 2, 0));
        bench.hears(id, &Message::Linked(offered.number.wrapping_add(wrong.into())));
        assert_eq!(bench.joins, usize::from(!wrong));
        bench.hears(id, &Message::Hello(bench.hello()));
        assert_eq!(bench.closed, [id]);
    }
}

/// Sessions that are changed at random: nothing panics, nothing piles up, nobody joins who was not agreed with.
#[test]
fn random_bytes_do_no_harm() {
    for seed in 0..2000 {
        let mut rng = Rng(seed);
        let mut bench = Bench::new(if seed % 2 == 0 { Side::Accepts } else { Side::Dials });
        for _ in 0..4 {
            let dials = !bench.dialed.is_empty() && rng.one_in(2);
            let id = if dials { bench.dial() } else { bench.accept() };
            let linked = bench.sent.iter().rev().find_map(|(_, message)| match message {
                Message::Links(links) => Some(Message::Linked(links.number)),
                _ => None,
            });
            let script = [
                Message::Hello(Hello { links: (rng.one_in(2)).then_some(1), epoch: rng.below(2), ..bench.hello() }),
                links(rng.below(2), 2, 2),
                linked.unwrap_or(Message::Linked(rng.below(2))),
                tenants(rng.one_in(2), &[(1, "a"), (2, "b")]),
                Message::Ping(3),
                Message::Pong(rng.below(2)),
                Message::Bye(wire::Bye { why: "\n\u{1b}[2J".repeat(100), stopping: rng.one_in(2) }),
            ];
            let mut bytes: Vec<u8> =
                script.iter().filter(|_| !rng.clone().one_in(5)).flat_map(Message::encode).collect();
            for _ in 0..rng.below(4) {
                if bytes.len() < 2 {
                    break;
                }
                let at = rng.below(bytes.len() as u64) as usize;
                match rng.below(3) {
                    0 => bytes[at] ^= 1 << rng.below(8),
                    1 => drop(bytes.remove(at)),
                    _ => bytes.truncate(at + 1),
                }
            }
            while !bytes.is_empty() {
                let n = 1 + rng.below(bytes.len() as u64) as usize;
                bench.sessions.received(id, &bytes[..n], bench.now);
                bench.act();
                bytes.drain(..n);
                let time = Duration::from_millis(rng.below(700));
                bench.wait(time);
            }
            assert!(bench.sessions.open.values().all(|session| session.talk.kept() <= MAX_MESSAGE));
            assert!(!bench.why().contains(['\n', '\u{1b}']) && bench.why().chars().count() < 2000);
        }
        bench.wait(Duration::from_secs(20));
        assert_eq!((bench.joins - bench.leaves, bench.sessions.open.len()), (0, 0), "seed {seed}");
    }
}

#[test]
fn a_host_that_was_taken_out_is_forgotten_while_it_is_dialed() {
    let mut bench = Bench::new(Side::Dials);
    let me = bench.me.clone();
    bench.sessions.set_hosts([(&me, address(0))], bench.now);
    let id = bench.dial();
    assert_eq!((bench.closed.clone(), bench.sessions.peers().len()), (vec![id], 0));
    assert_eq!(bench.sessions.next_wake(), None);
}
