//! Another host, over all its sessions: what the two have for their data, when the next session is tried, and when the host is given up.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use freeflow_backend::PeerId;
use freeflow_tcp::frame::HostId;

use super::talk::Violation;
use super::wire::{Hello, Links, Number, Tenants, Ticket};
use super::{Limits, SessionId, Side, TenantNames};

/// What two hosts have for their data.
#[derive(Debug, Clone)]
pub struct Peering {
    /// Which life of it.
    pub number: Number,
    /// Life of the other host.
    pub epoch: u64,
    /// Data connections of each link.
    pub lanes: u16,
    /// One for each link.
    pub tickets: Vec<Ticket>,
    /// Once both have it, what the data path calls the other host.
    pub joined: Option<PeerId>,
}

/// When the next session is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dial {
    /// It is not for us to.
    No,
    /// At this time.
    At(Duration),
    /// It is being tried, or there is one.
    UnderWay(SessionId),
}

/// Another host.
#[derive(Debug)]
pub struct Peer {
    pub id: HostId,
    pub address: SocketAddr,
    pub side: Side,
    pub dial: Dial,
    redial: Duration,
    /// Since when there is a session that is in order. One that does not last is no reason to try the next sooner.
    up: Option<Duration>,
    /// The newest that has said HELLO.
    pub session: Option<SessionId>,
    pub peering: Option<Peering>,
    pub tenants: TenantNames,
    /// When it was last heard of.
    pub heard: Duration,
    /// Since when its state is what it is.
    pub since: Duration,
    /// Why there is no session.
    pub why: Option<String>,
    /// Sessions that were in order.
    pub sessions: u64,
}

impl Peer {
    /// It has just been heard of.
    pub fn new(id: HostId, address: SocketAddr, side: Side, now: Duration, limits: &Limits) -> Self {
        Self {
            id,
            address,
            side,
            dial: if side == Side::Dials { Dial::At(now) } else { Dial::No },
            redial: limits.redial,
            up: None,
            session: None,
            peering: None,
            tenants: TenantNames::new(),
            heard: now,
            since: now,
            why: (side == Side::Accepts).then(|| "it has not connected".to_owned()),
            sessions: 0,
        }
    }

    /// Its session is in order.
    pub fn is_up(&mut self, now: Duration) {
        (self.since, self.why, self.up) = (now, None, Some(now));
        self.sessions += 1;
    }

    /// There is no session any more, or none could be made.
    pub fn has_failed(&mut self, session: SessionId, why: &str, now: Duration, limits: &Limits) {
        if self.session == Some(session) {
            (self.session, self.since) = (None, now);
        }
        self.why = Some(why.to_owned());
        if self.up.take().is_some_and(|since| now >= since + limits.longest_redial) {
            self.redial = limits.redial;
        }
        if self.dial == Dial::UnderWay(session) {
            self.dial = Dial::At(now + self.redial);
            self.redial = (self.redial * 2).min(limits.longest_redial);
        }
    }

    /// It is elsewhere: no reason to wait any longer.
    pub fn moves(&mut self, address: SocketAddr, now: Duration, limits: &Limits) {
        if self.address != address {
            (self.address, self.redial) = (address, limits.redial);
            if matches!(self.dial, Dial::At(_)) {
                self.dial = Dial::At(now);
            }
        }
    }

    /// Whether what both have for their data is still the same thing to both, by the peer's HELLO.
    pub fn agrees(&self, hello: &Hello) -> bool {
        self.peering.as_ref().is_none_or(|ours| ours.epoch == hello.epoch && Some(ours.number) == hello.links)
    }

    /// Takes what the peer offers. True if it is new.
    pub fn take(&mut self, links: Links, hello: &Agreed) -> Result<bool, Violation> {
        if links.tickets.len() != usize::from(hello.links) {
            return Err(Violation::Field("number of links"));
        }
        if links.lanes != hello.lanes {
            return Err(Violation::Field("number of lanes"));
        }
        if let Some(ours) = &self.peering {
            let same = ours.number == links.number && ours.tickets == links.tickets && ours.lanes == links.lanes;
            return if same { Ok(false) } else { Err(Violation::Field("links, which are not those that it has,")) };
        }
        let Links { number, lanes, tickets } = links;
        self.peering = Some(Peering { number, epoch: hello.epoch, lanes, tickets, joined: None });
        Ok(true)
    }

    /// Its tenants are called something else.
    pub fn rename(&mut self, tenants: Tenants, limits: &Limits) -> Result<(), Violation> {
        if tenants.anew {
            self.tenants.clear();
        }
        for number in tenants.gone {
            self.tenants.remove(&number);
        }
        for (number, name) in tenants.known {
            if name.len() > limits.tenant_name {
                return Err(Violation::Field("name of a tenant"));
            }
            let name: Arc<str> = name.into();
            if self.tenants.insert(number, name.clone()).is_some_and(|before| before != name) {
                return Err(Violation::Field("tenant, which has another name already,"));
            }
            if self.tenants.len() > limits.tenants {
                return Err(Violation::Field("number of tenants"));
            }
        }
        Ok(())
    }

    /// When it is given up, if nothing is heard of it: only where there is something to give up.
    pub fn dies(&self, limits: &Limits) -> Option<Duration> {
        (self.session.is_none() && self.peering.is_some()).then(|| self.heard + limits.dead_after)
    }
}

/// What follows from the HELLOs of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// Life of the other host.
    pub epoch: u64,
    /// Links of the pair.
    pub links: u16,
    /// Data connections of each.
    pub lanes: u16,
}
