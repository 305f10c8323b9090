//! The directory: which hosts there are, and which of them each (tenant, address) lives on.
//!
//! A source behind [`Directory`] keeps a [`Known`] up to date, which anybody may look at without waiting; and this host [claims](Directory::claim)
//! the addresses of its virtual NICs there, so that no two hosts have the same. What a directory says is not trusted to be sound: it comes
//! from files and servers that others write to.

mod board;
mod known;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use freeflow_backend::Gid;
use tokio::sync::{oneshot, watch};

use crate::config::NicSettings;

pub use self::board::Board;
pub use self::known::{Known, Owner};

/// Where everybody lives, and a place to say that somebody lives here.
pub trait Directory: fmt::Debug + Send + Sync {
    /// What is known now. Waits for nobody: workers may ask.
    fn snapshot(&self) -> Arc<Known>;

    /// Told of each new snapshot; some in between may be missed.
    fn changed(&self) -> watch::Receiver<u64>;

    /// How good the knowledge is.
    fn health(&self) -> Health;

    /// The addresses of a virtual NIC are to belong to this host. Until [`release`](Self::release) is called with its name, whatever the answer
    /// is; the answer says how it went, and comes late if the directory is away.
    fn claim(&self, claim: Claim) -> oneshot::Receiver<Result<(), Refused>>;

    /// The addresses of the virtual NIC of this name are free again.
    fn release(&self, nic: &str);
}

/// A virtual NIC's addresses in its tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Its name.
    pub nic: Arc<str>,
    /// Its tenant.
    pub tenant: Arc<str>,
    /// Its addresses, and the link-local GID of its MAC.
    pub gids: Vec<Gid>,
}

impl Claim {
    /// Of a virtual NIC.
    pub fn of(nic: &NicSettings) -> Self {
        let gids = nic.ip.iter().map(|&ip| Gid::of(ip)).chain([Gid::link_local(nic.mac().0)]);
        Self { nic: nic.name.as_str().into(), tenant: nic.tenant.as_str().into(), gids: gids.collect() }
    }
}

/// How good a directory's knowledge is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// Whether changes are heard of as they happen.
    pub connected: bool,
    /// How long ago the knowledge was last known to be up to date.
    pub age: Duration,
}

/// Why an address cannot be this host's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is another's.
    #[error(
        "address {address} of tenant {tenant:?} belongs to virtual NIC {:?} of host {}, and virtual NIC {:?} of host {} cannot have it, too: \
         remove it there first (freeflow nic del)",
        .owner.nic, .owner.host, .wanted.nic, .wanted.host
    )]
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
