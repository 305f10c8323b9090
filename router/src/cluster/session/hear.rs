//! What follows from what a peer says.

use std::time::Duration;

use freeflow_backend::PeerId;
use log::Level;

use super::peer::Agreed;
use super::talk::{Heard, Violation};
use super::wire::{Bye, Hello, Links, Message, Tenants, Ticket};
use super::{Action, Joined, Peering, Session, SessionId, Sessions, Side, shown};
use crate::cluster::HostName;

impl Sessions {
    pub(super) fn hear(&mut self, id: SessionId, heard: Heard, now: Duration) -> Result<(), Violation> {
        match heard {
            Heard::Hello(hello) => self.hear_hello(id, &hello, now),
            Heard::Links(links) => self.hear_links(id, links, now),
            Heard::Linked(number) => self.hear_linked(id, number, now),
            Heard::Tenants(tenants) => self.hear_tenants(id, tenants),
            Heard::Bye(bye) => {
                self.hear_bye(id, &bye, now);
                Ok(())
            }
        }
    }

    fn hear_hello(&mut self, id: SessionId, hello: &Hello, now: Duration) -> Result<(), Violation> {
        let Some(session) = self.open.get_mut(&id) else { return Ok(()) };
        let (side, name) = (session.talk.side(), hello.name.clone());
        if !session.proven.contains(&name) {
            let proven: Vec<_> = session.proven.iter().map(HostName::as_str).collect();
            return Err(Violation::Name { said: name, proven: proven.join(", ") });
        }
        let Some(peer) = self.peers.get(&name) else { return Err(Violation::OutOfPlace("the name of no host")) };
        if peer.side != side {
            return Err(Violation::OutOfPlace("a HELLO on a session that was for us to make"));
        }
        let agreed = Agreed {
            epoch: hello.epoch,
            links: hello.workers.max(self.me.workers),
            lanes: hello.lanes.max(self.me.lanes),
        };
        (session.name, session.agreed) = (Some(name.clone()), Some(agreed));
        self.replace(&name, id, now);
        if self.peers.get(&name).is_some_and(|peer| !peer.agrees(hello)) {
            self.leave(&name, "it has begun anew");
        }
        match side {
            Side::Accepts => self.greet(id, &name, now),
            Side::Dials => self.offer(id, &name, agreed, now),
        }
        Ok(())
    }

    /// This is the host's session now, and another no more.
    fn replace(&mut self, name: &HostName, id: SessionId, now: Duration) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        peer.heard = now;
        if let Some(old) = peer.session.replace(id).filter(|old| *old != id) {
            self.part(old, "there is a newer session", false, now);
        }
    }

    pub(super) fn greet(&mut self, id: SessionId, name: &HostName, now: Duration) {
        let peering = self.peers.get(name).and_then(|peer| peer.peering.as_ref());
        let hello = Hello {
            oldest: self.limits.versions.0,
            newest: self.limits.versions.1,
            name: self.me.name.clone(),
            epoch: self.me.epoch,
            workers: self.me.workers,
            lanes: self.me.lanes,
            links: peering.map(|peering| peering.number),
        };
        self.send(id, &Message::Hello(hello), now);
    }

    /// What both have already, or what they are to have.
    fn offer(&mut self, id: SessionId, name: &HostName, agreed: Agreed, now: Duration) {
        if self.peers.get(name).is_some_and(|peer| peer.peering.is_none()) {
            let peering = Peering {
                number: u64::from_le_bytes(self.random()),
                epoch: agreed.epoch,
                lanes: agreed.lanes,
                tickets: (0..agreed.links).map(|_| Ticket(self.random())).collect(),
                joined: None,
            };
            self.peers.get_mut(name).expect("it was just there").peering = Some(peering);
        }
        if let Some(peering) = self.peers.get(name).and_then(|peer| peer.peering.as_ref()) {
            let links = Links { number: peering.number, lanes: peering.lanes, tickets: peering.tickets.clone() };
            self.send(id, &Message::Links(links), now);
        }
    }

    fn hear_links(&mut self, id: SessionId, links: Links, now: Duration) -> Result<(), Violation> {
        let Some((name, agreed)) = self.agreement(id) else { return Ok(()) };
        let number = links.number;
        let foreign = |ticket: &Ticket| {
            let others = self.peers.iter().filter(|(other, _)| **other != name);
            others.filter_map(|(_, peer)| peer.peering.as_ref()).any(|peering| peering.tickets.contains(ticket))
        };
        let twice = |(n, ticket): (usize, &Ticket)| links.tickets[..n].contains(ticket);
        if links.tickets.len() > usize::from(self.limits.workers)
            || links.tickets.iter().enumerate().any(twice)
            || links.tickets.iter().any(foreign)
        {
            return Err(Violation::Field("tickets"));
        }
        let Some(peer) = self.peers.get_mut(&name) else { return Ok(()) };
        peer.take(links, &agreed)?;
        self.send(id, &Message::Linked(number), now);
        self.is_up(id, &name, now);
        Ok(())
    }

    fn hear_linked(&mut self, id: SessionId, number: u64, now: Duration) -> Result<(), Violation> {
        let Some((name, _)) = self.agreement(id) else { return Ok(()) };
        let offered = self.peers.get(&name).and_then(|peer| peer.peering.as_ref());
        if offered.is_none_or(|peering| peering.number != number) {
            return Err(Violation::Field("number of links"));
        }
        self.is_up(id, &name, now);
        Ok(())
    }

    fn agreement(&self, id: SessionId) -> Option<(HostName, Agreed)> {
        let session = self.open.get(&id)?;
        session.name.clone().zip(session.agreed)
    }

    /// A session is in order.
    fn is_up(&mut self, id: SessionId, name: &HostName, now: Duration) {
        let (Some(session), Some(peer)) = (self.open.get_mut(&id), self.peers.get_mut(name)) else { return };
        session.talk.is_linked();
        peer.is_up(now);
        let Some(peering) = peer.peering.as_mut() else { return };
        if peering.joined.is_none() {
            let number = PeerId(self.next_peer);
            self.next_peer += 1;
            peering.joined = Some(number);
            let (lanes, tickets) = (peering.lanes, peering.tickets.clone());
            let joined = Joined { peer: number, name: name.clone(), host: peer.id, side: peer.side, lanes, tickets };
            self.actions.push_back(Action::Join(joined));
        }
        let version = session.talk.version().unwrap_or_default();
        self.say(Level::Info, format!("host {name}: there is a session (version {version})"));
        let all: Vec<_> = self.tenants.iter().map(|(number, name)| (*number, name.to_string())).collect();
        self.announce(id, true, &all, &[], now);
    }

    /// Says what tenants are called, in messages of a bounded length.
    pub(super) fn announce(&mut self, id: SessionId, anew: bool, known: &[(u32, String)], gone: &[u32], now: Duration) {
        const AT_ONCE: usize = 256;
        let empty = || Tenants { anew: false, known: Vec::new(), gone: Vec::new() };
        let first = anew.then(|| Tenants { anew, ..empty() });
        let gone = gone.chunks(AT_ONCE).map(|some| Tenants { gone: some.to_vec(), ..empty() });
        let known = known.chunks(AT_ONCE).map(|some| Tenants { known: some.to_vec(), ..empty() });
        for tenants in first.into_iter().chain(gone).chain(known) {
            self.send(id, &Message::Tenants(tenants), now);
        }
    }

    fn hear_tenants(&mut self, id: SessionId, tenants: Tenants) -> Result<(), Violation> {
        let Some((name, _)) = self.agreement(id) else { return Ok(()) };
        let Some(peer) = self.peers.get_mut(&name) else { return Ok(()) };
        peer.rename(tenants, &self.limits)?;
        if let Some(number) = peer.peering.as_ref().and_then(|peering| peering.joined) {
            self.actions.push_back(Action::Tenants(number, peer.tenants.clone()));
        }
        Ok(())
    }

    fn hear_bye(&mut self, id: SessionId, bye: &Bye, now: Duration) {
        let name = self.open.remove(&id).and_then(Session::into_name);
        self.actions.push_back(Action::Close(id));
        let Some(name) = name else { return };
        if bye.stopping && self.peers.get(&name).is_some_and(|peer| peer.session == Some(id)) {
            self.leave(&name, "its router stops");
        }
        self.fail(&name, id, &format!("it said: {}", shown(&bye.why)), now);
    }
}
