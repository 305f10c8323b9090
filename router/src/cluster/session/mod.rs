//! Sessions with other routers: who they are, what each pair has for its data, and whether they live. No I/O and no clock: whoever has these calls, and
//! does what [`Sessions::next_action`] says. `docs/sessions.md` specifies what travels.
//!
//! * [`wire`] is what travels; [`talk`] is one connection; [`peer`] is another host, over all its connections.
//!
//! Of two hosts, the one with the lower [`HostId`] dials. A peer is authenticated, and not trusted further: each message is checked, and what
//! is kept for a peer has a bound.

mod hear;
mod limits;
mod peer;
#[cfg(test)]
mod sim;
mod talk;
#[cfg(test)]
mod tests;
pub mod wire;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use freeflow_backend::PeerId;
use freeflow_tcp::frame::HostId;
use log::Level;

use self::peer::{Agreed, Dial, Peer};
use self::talk::{Pulse, Talk, Violation};
use self::wire::{Bye, Message, Ticket};
use crate::cluster::HostName;

pub use self::limits::{Limits, MAX_TENANT_NAME, MAX_TENANTS};
pub use self::peer::Peering;
/// Names of a host's tenants by the number that its frames have.
pub use crate::overlay::TenantNumbers as TenantNames;

/// One connection between two routers; numbers are not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// What one side of a pair does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It makes the connections.
    Dials,
    /// It waits for them.
    Accepts,
}

/// Who we are.
#[derive(Debug, Clone)]
pub struct Me {
    /// Our name among hosts.
    pub name: HostName,
    /// This life of ours.
    pub epoch: u64,
    /// Data-path workers.
    pub workers: u16,
    /// Data connections that we would like for each link.
    pub lanes: u16,
}

/// What is to be done.
#[derive(Debug)]
pub enum Action {
    /// Connect to this host, as a session of this number; [`Sessions::dialed`] or [`Sessions::lost`] must follow.
    Dial(SessionId, HostName, SocketAddr),
    /// Send this.
    Send(SessionId, Vec<u8>),
    /// Close it once all was sent; nothing must follow.
    Close(SessionId),
    /// There is another host for the data path.
    Join(Joined),
    /// It is gone.
    Leave(PeerId),
    /// Its tenants are called this now.
    Tenants(PeerId, TenantNames),
    /// For the log.
    Say(Level, String),
}

/// Another host for the data path.
#[derive(Debug, Clone)]
pub struct Joined {
    /// What the data path calls it.
    pub peer: PeerId,
    /// Its name.
    pub name: HostName,
    /// What it is called in frames.
    pub host: HostId,
    /// Whether we make the data connections.
    pub side: Side,
    /// Data connections of each link.
    pub lanes: u16,
    /// One for each link.
    pub tickets: Vec<Ticket>,
}

/// What is known of another host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerState {
    /// Its name.
    pub name: HostName,
    /// Where it is.
    pub address: SocketAddr,
    /// Whether there is a session.
    pub contact: Contact,
    /// Since when.
    pub since: Duration,
    /// Why there is none.
    pub why: Option<String>,
    /// The protocol's version, if there is one.
    pub version: Option<u16>,
    /// Links of the pair, while it has any.
    pub links: usize,
    /// What the data path calls it.
    pub joined: Option<PeerId>,
    /// Sessions that there were, with the present one.
    pub sessions: u64,
}

/// How a host is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contact {
    /// There is a session.
    Up,
    /// There was one, and the host is not given up yet: its data connections go on.
    Lost,
    /// It is not reached.
    Down,
}

/// One connection, and who is at the other end.
#[derive(Debug)]
struct Session {
    talk: Talk,
    /// Hosts that its certificate is for.
    proven: Vec<HostName>,
    /// Which of them it is, once it has said so.
    name: Option<HostName>,
    agreed: Option<Agreed>,
}

impl Session {
    /// Whose it is, if there is no doubt: whoever has not said so may be any host that its certificate is for.
    fn name(&self) -> Option<&HostName> {
        match (&self.name, &self.proven[..]) {
            (Some(name), _) => Some(name),
            (None, [only]) => Some(only),
            (None, _) => None,
        }
    }

    fn into_name(self) -> Option<HostName> {
        self.name().cloned()
    }
}

/// Where random numbers come from.
pub type Random = Box<dyn FnMut(&mut [u8]) + Send>;

/// All sessions of a router.
pub struct Sessions {
    me: Me,
    limits: Limits,
    random: Random,
    peers: BTreeMap<HostName, Peer>,
    open: HashMap<SessionId, Session>,
    tenants: TenantNames,
    next_session: u64,
    next_peer: u32,
    actions: VecDeque<Action>,
}

impl Sessions {
    /// None yet.
    pub fn new(me: Me, limits: Limits, random: Random) -> Self {
        Self {
            me,
            limits,
            random,
            peers: BTreeMap::new(),
            open: HashMap::new(),
            tenants: TenantNames::new(),
            next_session: 0,
            next_peer: 0,
            actions: VecDeque::new(),
        }
    }

    /// What is to be done next.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// These are the hosts that there are, whether this one is among them or not.
    pub fn set_hosts<'a>(&mut self, hosts: impl IntoIterator<Item = (&'a HostName, SocketAddr)>, now: Duration) {
        let hosts: BTreeMap<_, _> = hosts.into_iter().filter(|(name, _)| **name != self.me.name).collect();
        let gone: Vec<_> = self.peers.keys().filter(|name| !hosts.contains_key(name)).cloned().collect();
        for name in gone {
            self.forget(&name, now);
        }
        for (name, address) in hosts {
            let (ours, theirs) = (self.me.name.id(), name.id());
            let side = if ours < theirs { Side::Dials } else { Side::Accepts };
            let new = || Peer::new(theirs, address, side, now, &self.limits);
            self.peers.entry(name.clone()).or_insert_with(new).moves(address, now, &self.limits);
        }
        self.dial(now);
    }

    /// Another is not of us any more.
    fn forget(&mut self, name: &HostName, now: Duration) {
        self.leave(name, "the directory does not have it any more");
        let its = |session: &Session| session.name() == Some(name);
        let sessions: Vec<_> = self.open.iter().filter(|(_, session)| its(session)).map(|(id, _)| *id).collect();
        for id in sessions {
            self.close(id, "the directory does not have this host any more", now);
        }
        self.peers.remove(name);
    }

    /// These are the tenants of this host, by number.
    pub fn set_tenants(&mut self, tenants: TenantNames, now: Duration) {
        let gone: Vec<_> = self.tenants.keys().filter(|number| !tenants.contains_key(number)).copied().collect();
        let new = tenants.iter().filter(|(number, _)| !self.tenants.contains_key(number));
        let known: Vec<_> = new.map(|(number, name)| (*number, name.to_string())).collect();
        self.tenants = tenants;
        if gone.is_empty() && known.is_empty() {
            return;
        }
        let up: Vec<_> = self.open.iter().filter(|(_, session)| session.talk.is_up()).map(|(id, _)| *id).collect();
        for id in up {
            self.announce(id, false, &known, &gone, now);
        }
    }

    /// A connection that was asked for is there, and TLS has said that it is to the host that was meant.
    pub fn dialed(&mut self, id: SessionId, now: Duration) {
        let meant = self.peers.iter().find(|(_, peer)| peer.dial == Dial::UnderWay(id));
        let Some(name) = meant.map(|(name, _)| name.clone()) else {
            // The host was taken out of the directory meanwhile.
            self.actions.push_back(Action::Close(id));
            return;
        };
        self.begin(id, Side::Dials, vec![name.clone()], now);
        self.greet(id, &name, now);
    }

    /// Somebody has connected, and TLS has said which of the hosts of the directory its certificate is for.
    pub fn accepted(&mut self, proven: Vec<HostName>, now: Duration) -> SessionId {
        let id = self.new_id();
        self.begin(id, Side::Accepts, proven, now);
        id
    }

    fn begin(&mut self, id: SessionId, side: Side, proven: Vec<HostName>, now: Duration) {
        let talk = Talk::new(side, now, &self.limits);
        self.open.insert(id, Session { talk, proven, name: None, agreed: None });
    }

    fn new_id(&mut self) -> SessionId {
        self.next_session += 1;
        SessionId(self.next_session - 1)
    }

    /// Bytes have come.
    pub fn received(&mut self, id: SessionId, bytes: &[u8], now: Duration) {
        let Some(session) = self.open.get_mut(&id) else { return };
        session.talk.push(bytes);
        while let Some(session) = self.open.get_mut(&id) {
            let mut answers = Vec::new();
            let heard = session.talk.next(now, &self.limits, &mut answers);
            for answer in answers {
                self.send(id, &answer, now);
            }
            match heard.and_then(|heard| heard.map(|heard| self.hear(id, heard, now)).transpose()) {
                Ok(Some(())) => {}
                Ok(None) => break,
                Err(violation) => {
                    self.punish(id, &violation, now);
                    return;
                }
            }
        }
        if let Some((peer, heard)) = self.peer_of(id) {
            peer.heard = heard;
        }
    }

    /// The host at the other end, and when it was heard of.
    fn peer_of(&mut self, id: SessionId) -> Option<(&mut Peer, Duration)> {
        let session = self.open.get(&id)?;
        let peer = self.peers.get_mut(session.name.as_ref()?)?;
        (peer.session == Some(id)).then_some((peer, session.talk.heard()))
    }

    /// A connection is no more, or could not be made.
    pub fn lost(&mut self, id: SessionId, why: &str, now: Duration) {
        let name = self.open.remove(&id).and_then(Session::into_name);
        let dialed =
            || self.peers.iter().find(|(_, peer)| peer.dial == Dial::UnderWay(id)).map(|(name, _)| name.clone());
        if let Some(name) = name.or_else(dialed) {
            self.fail(&name, id, why, now);
        }
        self.dial(now);
    }

    /// Somebody at this address was not let in. If that is the address of a host, it explains why there is no session.
    pub fn refused(&mut self, address: IpAddr, why: &str) {
        let waits = |peer: &&mut Peer| peer.side == Side::Accepts && peer.session.is_none();
        for peer in self.peers.values_mut().filter(waits).filter(|peer| peer.address.ip() == address) {
            peer.why = Some(format!("a connection from its address was refused: {why}"));
        }
    }

    fn fail(&mut self, name: &HostName, id: SessionId, why: &str, now: Duration) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        let news = peer.session == Some(id) || peer.why.as_deref() != Some(why);
        peer.has_failed(id, why, now, &self.limits);
        if news {
            self.say(Level::Warn, format!("host {name}: no session: {why}"));
        }
    }

    /// Time has passed.
    pub fn wake(&mut self, now: Duration) {
        let ids: Vec<_> = self.open.keys().copied().collect();
        for id in ids {
            let Some(session) = self.open.get_mut(&id) else { continue };
            match session.talk.wake(now, &self.limits) {
                Pulse::Nothing => {}
                Pulse::Say(message) => self.send(id, &message, now),
                Pulse::Silent(why) => self.close(id, why, now),
            }
        }
        let dead = self.peers.iter().filter(|(_, peer)| peer.dies(&self.limits).is_some_and(|at| now >= at));
        let dead: Vec<_> = dead.map(|(name, _)| name.clone()).collect();
        for name in dead {
            self.leave(&name, "it has not been heard of for too long");
            if let Some(peer) = self.peers.get_mut(&name) {
                peer.since = now;
            }
        }
        self.dial(now);
    }

    /// When [`wake`](Self::wake) is to be called.
    pub fn next_wake(&self) -> Option<Duration> {
        let talks = self.open.values().map(|session| session.talk.next_wake(&self.limits));
        let peers = self.peers.values().flat_map(|peer| {
            let dial = if let Dial::At(at) = peer.dial { Some(at) } else { None };
            [dial, peer.dies(&self.limits)].into_iter().flatten()
        });
        talks.chain(peers).min()
    }

    /// Sessions that are due are tried.
    fn dial(&mut self, now: Duration) {
        let due = self.peers.iter().filter(|(_, peer)| matches!(peer.dial, Dial::At(at) if at <= now));
        let due: Vec<_> = due.map(|(name, peer)| (name.clone(), peer.address)).collect();
        for (name, address) in due {
            let id = self.new_id();
            if let Some(peer) = self.peers.get_mut(&name) {
                peer.dial = Dial::UnderWay(id);
            }
            self.actions.push_back(Action::Dial(id, name, address));
        }
    }

    /// All is over: peers are told.
    pub fn stop(&mut self, now: Duration) {
        let ids: Vec<_> = self.open.keys().copied().collect();
        for id in ids {
            self.part(id, "its router stops", true, now);
        }
        let names: Vec<_> = self.peers.keys().cloned().collect();
        for name in names {
            self.leave(&name, "this router stops");
        }
        self.peers.clear();
    }

    /// The data path is to have nothing of a host any more.
    fn leave(&mut self, name: &HostName, why: &str) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        peer.tenants.clear();
        if let Some(number) = peer.peering.take().and_then(|peering| peering.joined) {
            self.actions.push_back(Action::Leave(number));
            self.say(Level::Warn, format!("host {name} is gone: {why}"));
        }
    }

    /// A peer has done what it must not.
    fn punish(&mut self, id: SessionId, violation: &Violation, now: Duration) {
        let why = with_causes(violation);
        self.close(id, &why, now);
    }

    /// Ends a session of our own accord.
    fn close(&mut self, id: SessionId, why: &str, now: Duration) {
        if let Some(name) = self.part(id, why, false, now) {
            self.fail(&name, id, why, now);
        }
    }

    /// Says so, and forgets a session. Returns whose it was.
    fn part(&mut self, id: SessionId, why: &str, stopping: bool, now: Duration) -> Option<HostName> {
        self.send(id, &Message::Bye(Bye { why: why.to_owned(), stopping }), now);
        let session = self.open.remove(&id)?;
        self.actions.push_back(Action::Close(id));
        session.into_name()
    }

    fn send(&mut self, id: SessionId, message: &Message, now: Duration) {
        if let Some(session) = self.open.get_mut(&id) {
            session.talk.has_said(now);
            self.actions.push_back(Action::Send(id, message.encode()));
        }
    }

    fn say(&mut self, level: Level, line: String) {
        self.actions.push_back(Action::Say(level, line));
    }

    fn random<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        (self.random)(&mut bytes);
        bytes
    }

    /// All hosts, as of now.
    pub fn peers(&self) -> Vec<PeerState> {
        self.peers.iter().map(|(name, peer)| self.state_of(name, peer)).collect()
    }

    fn state_of(&self, name: &HostName, peer: &Peer) -> PeerState {
        let talk = peer.session.and_then(|id| self.open.get(&id)).map(|session| &session.talk);
        let talk = talk.filter(|talk| talk.is_up());
        let joined = peer.peering.as_ref().and_then(|peering| peering.joined);
        PeerState {
            name: name.clone(),
            address: peer.address,
            contact: match (talk, joined) {
                (Some(_), _) => Contact::Up,
                (None, Some(_)) => Contact::Lost,
                (None, None) => Contact::Down,
            },
            since: peer.since,
            why: peer.why.clone(),
            version: talk.and_then(Talk::version),
            links: peer.peering.as_ref().filter(|_| joined.is_some()).map_or(0, |peering| peering.tickets.len()),
            joined,
            sessions: peer.sessions,
        }
    }
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").field("me", &self.me).field("peers", &self.peers).finish_non_exhaustive()
    }
}

/// An error with what caused it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Text of a peer, fit for a log: short, and of one line.
fn shown(text: &str) -> String {
    text.chars().take(200).flat_map(char::escape_debug).collect()
}
