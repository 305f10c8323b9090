//! The I/O around [`Sessions`]: it is told what happens, and what it wants is done. One task on the thread of [`Cluster`](super::Cluster).

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use freeflow_backend::tcp::Peering;
use freeflow_backend::{Dialer, PeerId};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, sleep_until};
use tokio_rustls::{client, server};

use super::connection::Connection;
use super::dialing::{self, Wanted};
use super::directory::Directory;
use super::limited_log::LimitedLog;
use super::session::TenantNames;
use super::session::{Action, Joined, SessionId, Sessions, Side};
use super::status::Board;
use super::tickets::Tickets;
use super::tls::Tls;
use super::{Carrier, HostName};

/// What happens.
#[derive(Debug)]
pub enum Event {
    /// A connection for a session was made, or could not be.
    Dialed(SessionId, Result<Box<client::TlsStream<TcpStream>>, String>),
    /// Somebody has connected, whose certificate is for these hosts.
    Accepted(Box<server::TlsStream<TcpStream>>, Vec<HostName>, SocketAddr),
    /// Somebody at this address was not let in.
    Refused(IpAddr, String),
    /// Bytes have come.
    Received(SessionId, Vec<u8>),
    /// A connection is over.
    Lost(SessionId, String),
}

/// What all tasks use.
#[derive(Debug)]
pub struct Shared {
    pub tls: ArcSwap<Tls>,
    pub directory: Arc<dyn Directory>,
    pub carrier: Arc<dyn Carrier>,
    pub tickets: Tickets,
    pub board: Arc<Board>,
    pub log: LimitedLog,
}

/// Changes of tenants are announced together if they come so close.
const TOGETHER: Duration = Duration::from_millis(20);
/// For peers to hear that we stop.
const FAREWELL: Duration = Duration::from_millis(100);

/// Everything.
pub struct Node {
    pub sessions: Sessions,
    pub ours: HostName,
    pub epoch: u64,
    /// Bounds and times of data connections.
    pub links: freeflow_tcp::Limits,
    pub start: Instant,
    pub shared: Arc<Shared>,
    pub dialer: Arc<dyn Dialer>,
    pub events: mpsc::Sender<Event>,
    pub connections: HashMap<SessionId, Connection>,
    pub names: BTreeMap<PeerId, HostName>,
    /// What can be seen is not what is.
    pub changed: bool,
}

/// Where news come from.
pub struct News {
    pub events: mpsc::Receiver<Event>,
    pub wanted: mpsc::UnboundedReceiver<Wanted>,
    pub tenants: watch::Receiver<Arc<TenantNames>>,
    pub stop: oneshot::Receiver<()>,
}

impl Node {
    /// Until it is to stop.
    pub async fn run(mut self, mut news: News) {
        let mut directory = self.shared.directory.changed();
        self.set_hosts();
        self.set_tenants(&news.tenants.borrow_and_update().clone());
        loop {
            self.act();
            let wake = self.sessions.next_wake().map(|at| (self.start + at).into());
            tokio::select! {
                // Whoever drops the other end wants the same.
                _ = &mut news.stop => break,
                Some(event) = news.events.recv() => self.happens(event),
                Some(wanted) = news.wanted.recv() => self.dial_data(wanted),
                Ok(()) = directory.changed() => self.set_hosts(),
                Ok(()) = news.tenants.changed() => {
                    sleep(TOGETHER).await;
                    let tenants = news.tenants.borrow_and_update().clone();
                    self.set_tenants(&tenants);
                }
                () = sleep_until(wake.unwrap_or_else(tokio::time::Instant::now)), if wake.is_some() => {
                    self.sessions.wake(self.now());
                }
            }
        }
        self.sessions.stop(self.now());
        self.act();
        sleep(FAREWELL).await;
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn set_hosts(&mut self) {
        let known = self.shared.directory.snapshot();
        self.changed = true;
        self.sessions.set_hosts(known.hosts(), self.now());
        self.shared.carrier.known(known);
    }

    fn set_tenants(&mut self, tenants: &TenantNames) {
        self.sessions.set_tenants(tenants.clone(), self.now());
    }

    fn happens(&mut self, event: Event) {
        let now = self.now();
        self.changed |= !matches!(event, Event::Received(..));
        match event {
            Event::Dialed(id, Ok(stream)) => {
                self.connections.insert(id, Connection::start(id, stream, self.events.clone()));
                self.sessions.dialed(id, now);
            }
            Event::Dialed(id, Err(why)) => self.sessions.lost(id, &why, now),
            Event::Accepted(stream, proven, from) => {
                log::debug!("a session from {from}, whose certificate is for {proven:?}");
                let id = self.sessions.accepted(proven, now);
                self.connections.insert(id, Connection::start(id, stream, self.events.clone()));
            }
            Event::Refused(from, why) => self.sessions.refused(from, &why),
            Event::Received(id, bytes) => self.sessions.received(id, &bytes, now),
            Event::Lost(id, why) => {
                self.connections.remove(&id);
                self.sessions.lost(id, &why, now);
            }
        }
    }

    fn dial_data(&self, wanted: Wanted) {
        let address =
            self.names.get(&wanted.peer).and_then(|name| self.shared.directory.snapshot().host(name.as_str()));
        tokio::spawn(dialing::data(wanted, address, self.shared.clone()));
    }

    fn act(&mut self) {
        while let Some(action) = self.sessions.next_action() {
            self.changed |= !matches!(action, Action::Send(..));
            match action {
                Action::Dial(id, name, address) => self.dial(id, name, address),
                Action::Send(id, bytes) => self.send(id, bytes),
                Action::Close(id) => self.connections.remove(&id).into_iter().for_each(Connection::close),
                Action::Join(joined) => self.join(joined),
                Action::Leave(peer) => self.leave(peer),
                Action::Tenants(peer, names) => self.shared.carrier.tenants(peer, names),
                Action::Say(level, line) => self.shared.log.write(level, format_args!("{line}")),
            }
        }
        if std::mem::take(&mut self.changed) {
            self.shared.board.post(self.sessions.peers());
        }
    }

    fn dial(&self, id: SessionId, name: HostName, address: SocketAddr) {
        let (shared, events) = (self.shared.clone(), self.events.clone());
        tokio::spawn(async move {
            let made = dialing::session(name, address, shared).await.map(Box::new);
            // It fails only when this router stops.
            let _ = events.send(Event::Dialed(id, made)).await;
        });
    }

    fn send(&mut self, id: SessionId, bytes: Vec<u8>) {
        if self.connections.get(&id).is_some_and(|connection| !connection.send(bytes)) {
            self.connections.remove(&id).into_iter().for_each(Connection::abort);
            self.sessions.lost(id, "it does not read what it is sent", self.now());
        }
    }

    fn join(&mut self, joined: Joined) {
        let Joined { peer, name, host, side, lanes, tickets } = joined;
        let peering = Peering {
            peer,
            name: name.as_str().into(),
            theirs: host,
            ours: self.ours.id(),
            dials: side == Side::Dials,
            epoch: self.epoch,
            lanes,
            limits: self.links.clone(),
            tickets: tickets.iter().map(|ticket| ticket.0).collect(),
            dialer: self.dialer.clone(),
        };
        self.shared.carrier.join(peering, &name);
        // Whoever dials takes no connections.
        if side == Side::Accepts {
            self.shared.tickets.add(peer, &tickets);
        }
        self.names.insert(peer, name);
    }

    fn leave(&mut self, peer: PeerId) {
        self.shared.tickets.remove(peer);
        self.names.remove(&peer);
        self.shared.carrier.leave(peer);
    }
}
