//! Other hosts: which there are and who lives where ([`directory`]), and how to talk to them.
//!
//! Only with `[cluster]` in the configuration; without it a router serves its own host and nothing of this runs.
//!
//! * [`session`] is what routers say to each other, without I/O; [`tls`] makes sure to whom.
//! * [`service`] is the thread on which sessions live, [`node`] what it does; [`entrance`] takes connections, [`dialing`] makes them, [`connection`] is one.
//! * [`neighbours`] is all of it in the daemon's life, [`certificates`] what it reads from files.
//! * [`data_path`] is what they are for: it is told of hosts that come and go.
//! * [`tickets`] says which link of the data path a connection is for.
//! * [`status`] is what people and Prometheus see.

mod certificates;
mod connection;
mod data_path;
mod dialing;
pub mod directory;
mod entrance;
mod limited_log;
pub mod name;
mod neighbours;
mod node;
pub mod service;
pub mod session;
pub mod settings;
pub mod status;
mod tickets;
pub mod tls;

use std::fmt;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;

use freeflow_backend::PeerId;
use freeflow_backend::tcp::{Conn, Peering};

pub use self::data_path::DataPath;
pub use self::name::HostName;
pub use self::neighbours::{Met, Neighbours};
pub use self::service::Cluster;
pub use self::settings::ClusterSettings;

use self::directory::Known;
use self::session::TenantNames;

/// The data path, as sessions see it. None of these waits for anything.
pub trait Carrier: fmt::Debug + Send + Sync {
    /// The directory says this from now on.
    fn known(&self, known: Arc<Known>);

    /// Another host can be reached.
    fn join(&self, peering: Peering, name: &HostName);

    /// It cannot any more.
    fn leave(&self, peer: PeerId);

    /// Its tenants have these numbers.
    fn tenants(&self, peer: PeerId, names: TenantNames);

    /// A connection that was asked for is there, or could not be made.
    fn dialed(&self, peer: PeerId, link: u16, conn: Conn, made: io::Result<TcpStream>);

    /// A peer has made a connection; these are its first bytes.
    fn accepted(&self, peer: PeerId, link: u16, stream: TcpStream, first: Vec<u8>);
}
