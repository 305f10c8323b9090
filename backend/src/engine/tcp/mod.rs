//! The `tcp` path: messages to and from queue pairs of other hosts.

mod command;

pub use command::Command;
