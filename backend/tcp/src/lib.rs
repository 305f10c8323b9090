//! RDMA messages between two hosts over a few TCP connections: the core of the `tcp` path, without I/O and without a clock.
//! `docs/tcp.md` specifies what travels.
//!
//! * [`frame`] is what travels, as typed values; [`stream`] finds frames in a stream of bytes.
//! * `requester` and `responder` are the two ends of a *flow*, the messages of one QP to its peer: order, exactly once, retries.
//! * [`link`] is a pair of hosts: connections, and the flows over them.
//! * [`host`] is what all of it asks of the device.
//!
//! Payload never passes through here. The core says where each piece of it comes from and goes to, as an offset into a message; whoever
//! has the sockets moves it between them and guest memory. So the whole protocol runs in a simulation, with hosts, cuts and stalls as a seed says
//! (`sim`), thousands of times a second. The I/O comes next.
//!
//! The peer is another router, which has authenticated itself, and is not trusted further than that: each frame is checked
//! against what can be, and what is kept for a peer has a bound ([`link::Footprint`]).

#![forbid(unsafe_code)]

pub mod config;
pub mod frame;
pub mod host;
mod lane;
pub mod link;
mod patience;
mod requester;
mod responder;
#[cfg(test)]
mod sim;
pub mod stream;
mod time;
mod violation;

pub use config::{Config, Limits};
pub use lane::Conn;
pub use link::{Event, Link, Outgoing};
pub use patience::Retries;
pub use requester::{PostError, Work};
pub use time::Nanos;
pub use violation::Violation;

/// What a state machine gets with every call.
struct Env<'a, H> {
    now: Nanos,
    limits: &'a Limits,
    host: &'a mut H,
}
