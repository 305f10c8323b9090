//! What two hosts are to each other, and the bounds that a link keeps.

use crate::Nanos;
use crate::frame::{HostId, MAX_PAYLOAD};

/// A link's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// This host.
    pub host: HostId,
    /// The other one.
    pub peer: HostId,
    /// This side makes the connections. It is so on one of the two.
    pub dials: bool,
    /// This life of this side: never the same again.
    pub epoch: u64,
    /// What both sides got over the control session.
    pub ticket: [u8; 32],
    /// Connections. Both sides have the same number.
    pub lanes: u16,
    /// Bounds and times.
    pub limits: Limits,
}

/// Bounds and times of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of a message in one frame: what others of the same connection wait for.
    pub chunk: u32,
    /// Most bytes of one flow that are sent and not acknowledged.
    pub window: u32,
    /// Messages up to this length travel even when the responder may have no receive for them.
    pub eager: u32,
    /// Most messages of one flow that are posted and not complete.
    pub messages: usize,
    /// Most datagrams that wait for one connection.
    pub datagrams: usize,
    /// Most answers to frames of unknown flows that wait for one connection; more are not given.
    pub strays: usize,
    /// Most notes that wait for one connection; more are not said.
    pub notes: usize,
    /// How long a datagram waits for its connection, which may be being made, before it is dropped.
    pub datagram_patience: Nanos,
    /// How long a UC message waits for its responder to have a receive before it is sent anyway.
    pub receive_patience: Nanos,
    /// How long UC messages wait for their QP's flow to be opened before they are dropped.
    pub open_patience: Nanos,
    /// Shortest time after which an RC message that is not answered counts as lost.
    pub shortest_try: Nanos,
    /// The same while the peer says that it waits for a page of memory.
    pub page_patience: Nanos,
    /// After this time without an answer a flow asks again whether there is a responder.
    pub ask_again: Nanos,
    /// A connection on which nothing was sent for so long is pinged.
    pub keepalive: Nanos,
    /// A connection on which nothing came for so long is dead.
    pub silence: Nanos,
    /// Time between the first two attempts for a connection; it doubles from one to the next.
    pub redial: Nanos,
    /// Longest time between two attempts.
    pub longest_redial: Nanos,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            chunk: MAX_PAYLOAD,
            window: 1 << 20,
            eager: 4096,
            messages: 256,
            datagrams: 64,
            strays: 4096,
            notes: 4096,
            datagram_patience: Nanos::from_millis(500),
            receive_patience: Nanos::from_millis(2),
            open_patience: Nanos::from_millis(500),
            shortest_try: Nanos::from_millis(10),
            page_patience: Nanos::from_millis(500),
            ask_again: Nanos::from_millis(200),
            keepalive: Nanos::from_millis(500),
            silence: Nanos::from_millis(2000),
            redial: Nanos::from_millis(1),
            longest_redial: Nanos::from_millis(1000),
        }
    }
}
