//! The way to other hosts: RDMA messages over TCP connections (`docs/tcp.md`). The protocol is [`freeflow_tcp`]; here are its sockets.
//!
//! A pair of hosts has several *links*, as many as the one with more workers has of these. Each is served, on each side, by one worker, which looks at
//! its sockets itself: what a worker's queue pairs send goes over a link of that worker.
//!
//! Who the other hosts are, and that they are who they say, is the router's business: it [joins](crate::Host::join) them, makes connections when it is
//! [asked to](Dialer) and hands over those that others make.

use std::fmt;
use std::sync::Arc;

pub use freeflow_tcp::frame::HostId;
pub use freeflow_tcp::{Conn, Limits};

/// Another host; numbers are not used again while the router runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub u32);

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "peer{}", self.0)
    }
}

/// Proves that a connection is for a link: given out over the control session, and secret.
pub type Ticket = [u8; 32];

/// What two hosts have agreed on.
#[derive(Debug, Clone)]
pub struct Peering {
    /// The other host, here.
    pub peer: PeerId,
    /// Its name, for people.
    pub name: Arc<str>,
    /// What it is called among hosts.
    pub theirs: HostId,
    /// What this host is called.
    pub ours: HostId,
    /// This side makes the connections. It is so on one of the two.
    pub dials: bool,
    /// This life of this router: never the same again.
    pub epoch: u64,
    /// Connections of each link, at least 1. Both sides have the same number.
    pub lanes: u16,
    /// Bounds and times of links.
    pub limits: Limits,
    /// One for each link: as many as the side with more workers has of these.
    pub tickets: Vec<Ticket>,
    /// Who makes connections.
    pub dialer: Arc<dyn Dialer>,
}

/// Makes connections. Called by workers: it must not block.
pub trait Dialer: Send + Sync + fmt::Debug {
    /// Makes this connection, and says what came of it with [`dialed`](crate::Host::dialed).
    fn dial(&self, peer: PeerId, link: u16, conn: Conn);
}
