//! The vhost-user side: one thread for each virtual NIC takes the VMM's messages and the guest's
//! control commands.

pub mod aio;
mod call;
pub mod server;
mod session;
pub mod socket;
pub mod vring;
