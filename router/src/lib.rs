//! The Freeflow router: which virtual NICs this host has, who may talk to whom, and how to look at it.
//!
//! * [`config`] reads the TOML file; [`overlay`] answers the device's questions from it.
//! * [`router`] starts the device side with all virtual NICs and stops it; [`inventory`] decides which may come and go.
//! * [`cluster`] is about other hosts.
//! * [`device`] opens the host's RDMA NIC, if it is to be used.
//! * [`daemon`] is the daemon's life, [`sandbox`] what it gives up, [`steward`] the process that has [`files`] and sockets made for it.
//! * [`api`] is the Unix socket by which [`cli`], the `freeflow` command, asks; [`metrics`] is what Prometheus asks; an [`acceptor`] answers for both.

pub mod acceptor;
pub mod api;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod daemon;
pub mod device;
pub mod files;
pub mod inventory;
pub mod metrics;
pub mod overlay;
pub mod router;
pub mod sandbox;
pub mod steward;

pub use config::Config;
pub use router::Router;
