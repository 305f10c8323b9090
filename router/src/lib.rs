//! The Freeflow router: which virtual NICs this host has, who may talk to whom, and how to look at it.
//!
//! * [`config`] reads the TOML file; [`overlay`] answers the device's questions from it.
//! * [`router`] starts the device side with all virtual NICs and stops it.
//! * [`daemon`] is the daemon's life, [`sandbox`] what it gives up.
//! * [`api`] is the Unix socket by which [`cli`], the `freeflow` command, asks.

pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod overlay;
pub mod router;
pub mod sandbox;

pub use config::Config;
pub use router::Router;
