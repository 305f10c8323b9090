//! What is known of other hosts and of those who connect, for people and Prometheus.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};

use super::session::{Contact, PeerState};

/// Another host, as this router sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub address: SocketAddr,
    /// How it is reached.
    pub state: HostState,
    /// For how many milliseconds.
    pub since_ms: u64,
    /// Why there is no session.
    pub why: Option<String>,
    /// Version of the protocol of the session.
    pub version: Option<u16>,
    /// Links for data.
    pub links: usize,
    /// Sessions that there were in this life of the router, with the present one.
    pub sessions: u64,
}

/// How a host is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    /// There is a session.
    Up,
    /// The session is lost, and the data connections go on for a while.
    Lost,
    /// It is not reached.
    Down,
}

impl HostState {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Lost => "lost",
            Self::Down => "down",
        }
    }
}

/// Where the present state is put, for all to see.
#[derive(Debug)]
pub struct Board {
    start: Instant,
    peers: ArcSwap<Vec<PeerState>>,
    /// What was counted.
    pub counts: Counts,
}

impl Board {
    /// For times that count from `start`.
    pub fn new(start: Instant) -> Self {
        Self { start, peers: ArcSwap::default(), counts: Counts::default() }
    }

    /// This is how it is now.
    pub fn post(&self, peers: Vec<PeerState>) {
        self.peers.store(Arc::new(peers));
    }

    /// All other hosts.
    pub fn hosts(&self) -> Vec<HostStatus> {
        let now = self.start.elapsed();
        let status = |peer: &PeerState| HostStatus {
            name: peer.name.to_string(),
            address: peer.address,
            state: match peer.contact {
                Contact::Up => HostState::Up,
                Contact::Lost => HostState::Lost,
                Contact::Down => HostState::Down,
            },
            since_ms: now.saturating_sub(peer.since).as_millis() as u64,
            why: peer.why.clone(),
            version: peer.version,
            links: peer.links,
            sessions: peer.sessions,
        };
        self.peers.load().iter().map(status).collect()
    }
}

macro_rules! counts {
    ($($(#[doc = $help:literal])+ $name:ident,)*) => {
        /// What was counted of connections.
        #[derive(Debug, Default)]
        pub struct Counts { $($(#[doc = $help])+ pub $name: AtomicU64,)* }

        impl Counts {
            /// Name, what it is, and value of each.
            pub fn named(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((stringify!($name), concat!($($help),+), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counts! {
    /// Connections of others that were taken.
    accepted,
    /// Connections that were closed at once, since too many others had not said yet who they are.
    refused_busy,
    /// Connections that did not say in time who they are.
    refused_slow,
    /// Connections that began with what is no session and no data.
    refused_garbage,
    /// Sessions without a certificate that is good, and for a host of the directory.
    refused_certificate,
    /// Data connections that belong to no session.
    refused_ticket,
    /// Data connections of others that were handed to the data path.
    data_accepted,
    /// Data connections that were made.
    data_dialed,
    /// Data connections that could not be made.
    data_failed,
}

/// One more.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
