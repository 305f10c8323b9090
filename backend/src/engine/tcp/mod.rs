//! The `tcp` path: messages to and from queue pairs of other hosts (`docs/tcp.md`).
//!
//! The protocol is [`freeflow_tcp`]. It says which bytes belong where; they are moved here, straight between sockets and guest memory, by the
//! worker that a link belongs to:
//!
//! * [`run`] has the work requests of a queue pair posted, [`reap`] completes them;
//! * [`device`] answers the protocol's questions about queue pairs and memory of this host: `flow` for what they send, `answering` for what they receive;
//! * [`inbox`] and [`outbox`] are the two directions of a connection, [`line`] is a link with its connections, [`links`] are all of a worker's;
//! * [`command`]: what the router tells workers.
//!
//! Whatever a message does at its responder is what it does between guests of one host ([`super::connected`]), with the same checks.

mod answering;
mod command;
mod datagram;
mod device;
mod flow;
mod inbox;
mod line;
mod links;
mod outbox;
mod reap;
mod run;

pub(super) use answering::{accept, key_of};
pub use command::Command;
pub(super) use datagram::{give_up_on, is_congested, send as send_datagram};
pub use links::{Links, Tell};
pub(super) use links::{flush, is_wanted, next_timer, poll, with_links};
pub(super) use reap::settled;
pub(super) use run::{has_gid, open_of, run};
