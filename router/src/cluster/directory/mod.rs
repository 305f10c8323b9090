//! The directory: which hosts there are, and which of them each (tenant, address) lives on.
//!
//! A source behind [`Directory`] keeps a [`Known`] up to date, which anybody may look at without waiting; and this host [claims](Directory::claim)
//! the addresses of its virtual NICs there, so that no two hosts have the same. What a directory says is not trusted to be sound: it comes
//! from files and servers that others write to.

mod board;
mod etcd;
mod file;
mod known;
mod static_file;
mod view;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context, Result};
use freeflow_backend::{Gid, Mac};
use tokio::sync::watch;

use super::ClusterSettings;
use crate::config::NicSettings;
use crate::files::Files;

pub use self::board::Board;
pub use self::etcd::{Connector, Etcd};
pub use self::file::{BadFile, HostsFile};
pub use self::known::{Known, Owner};
pub use self::static_file::StaticFile;
pub use self::view::{HostView, NicView, View};

/// Where everybody lives, and a place to say that somebody lives here.
pub trait Directory: fmt::Debug + Send + Sync {
    /// What is known now. Waits for nobody: workers may ask.
    fn snapshot(&self) -> Arc<Known>;

    /// Told of each new snapshot; some in between may be missed.
    fn changed(&self) -> watch::Receiver<u64>;

    /// How good the knowledge is.
    fn health(&self) -> Health;

    /// The addresses of a virtual NIC are to belong to this host, until [`release`](Self::release) is called with its name: also if the answer is no,
    /// since they may become free. No answer comes while the directory is away.
    fn claim(&self, claim: Claim) -> Receiver<Result<(), Refused>>;

    /// The addresses of the virtual NIC of this name are to be free again. Answered when they are.
    fn release(&self, nic: &str) -> Receiver<()>;

    /// What it is, for people.
    fn source(&self) -> String;
}

/// A virtual NIC's addresses in its tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Its name.
    pub nic: Arc<str>,
    /// Its tenant.
    pub tenant: Arc<str>,
    /// Its addresses.
    pub ip: Vec<IpAddr>,
    /// Its MAC, of which one more address is made.
    pub mac: Mac,
}

impl Claim {
    /// Of a virtual NIC.
    pub fn of(nic: &NicSettings) -> Self {
        Self { nic: nic.name.as_str().into(), tenant: nic.tenant.as_str().into(), ip: nic.ip.clone(), mac: nic.mac() }
    }

    /// All that is claimed.
    pub fn gids(&self) -> impl Iterator<Item = Gid> {
        self.ip.iter().map(|&ip| Gid::of(ip)).chain([Gid::link_local(self.mac.0)])
    }
}

/// How good a directory's knowledge is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// Whether changes are heard of as they happen.
    pub connected: bool,
    /// How long ago the knowledge was last known to be up to date.
    pub age: Duration,
    /// How many virtual NICs are here whose addresses it gives to others.
    pub refused: usize,
}

/// How a directory is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// How good its knowledge is.
    pub health: Health,
    /// How many hosts it has.
    pub hosts: usize,
    /// How many addresses, of all tenants.
    pub addresses: usize,
}

impl Status {
    /// Of `directory`, now.
    pub fn of(directory: &dyn Directory) -> Self {
        let known = directory.snapshot();
        Self { health: directory.health(), hosts: known.hosts().count(), addresses: known.addresses().count() }
    }
}

/// Why an address cannot be this host's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is another's.
    #[error("address {address} of tenant {tenant:?} belongs to {owner}, and {wanted} cannot have it, too")]
    Taken {
        /// The address.
        address: IpAddr,
        /// Whose addresses these are.
        tenant: Arc<str>,
        /// Who has it.
        owner: Owner,
        /// Who wants it.
        wanted: Owner,
    },
    /// The directory does not allow it, and says why.
    #[error("{0}")]
    Forbidden(String),
}

/// What must be read and looked up while the daemon may, if the configuration names etcd.
///
/// # Errors
/// When a file cannot be read or a name is not known.
pub fn prepare(settings: &ClusterSettings) -> Result<Option<Connector>> {
    settings.etcd.as_ref().map(Connector::new).transpose()
}

/// The directory that the configuration names: etcd if that was [prepared](prepare), else a file, which `files` opens.
///
/// # Errors
/// When it cannot be used.
pub fn open(settings: &ClusterSettings, etcd: Option<Connector>, files: Arc<dyn Files>) -> Result<Arc<dyn Directory>> {
    let host = settings.name().context("[cluster] name = NAME gives this host one that can be used")?;
    if let Some((etcd, connector)) = settings.etcd.as_ref().zip(etcd) {
        let address = settings.advertise.context("[cluster] advertise is missing")?;
        return Ok(Arc::new(Etcd::start(etcd, &connector, host, address)?));
    }
    let path = settings.directory.as_deref().context("[cluster] names no directory")?;
    Ok(Arc::new(StaticFile::start(settings, host, path, files)?))
}
