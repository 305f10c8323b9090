//! This router's data path, as sessions drive it: other hosts come and go, and addresses of the directory are reached where such a host is.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freeflow_backend::PeerId;
use freeflow_backend::tcp::{Conn, Peering};

use super::directory::Known;
use super::session::TenantNames;
use super::{Carrier, HostName};
use crate::overlay::Elsewhere;
use crate::router::Router;

/// A router's.
#[derive(Debug)]
pub struct DataPath {
    router: Arc<Router>,
    reach: Mutex<Reach>,
}

/// What is needed to know where addresses are.
#[derive(Debug, Default)]
struct Reach {
    known: Arc<Known>,
    /// Hosts that can be reached.
    peers: BTreeMap<HostName, PeerId>,
}

impl Reach {
    fn elsewhere(&self) -> Elsewhere {
        let mut elsewhere = Elsewhere::new();
        for (tenant, gid, owner) in self.known.addresses() {
            if let Some(peer) = self.peers.get(&owner.host) {
                elsewhere.entry(tenant.to_owned()).or_default().insert(gid, *peer);
            }
        }
        elsewhere
    }
}

impl DataPath {
    /// Of `router`.
    pub fn new(router: Arc<Router>) -> Self {
        Self { router, reach: Mutex::default() }
    }

    fn change(&self, change: impl FnOnce(&mut Reach)) {
        let mut reach: MutexGuard<'_, Reach> = self.reach.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut reach);
        self.router.addresses().set_elsewhere(reach.elsewhere());
    }
}

impl Carrier for DataPath {
    fn known(&self, known: Arc<Known>) {
        self.change(|reach| reach.known = known);
    }

    fn join(&self, peering: Peering, name: &HostName) {
        let peer = peering.peer;
        self.router.host().join(peering);
        self.change(|reach| {
            reach.peers.insert(name.clone(), peer);
        });
    }

    fn leave(&self, peer: PeerId) {
        // Nobody finds it any more, and then it is gone.
        self.change(|reach| reach.peers.retain(|_, known| *known != peer));
        self.router.addresses().set_numbers_of(peer, None);
        self.router.host().leave(peer);
    }

    fn tenants(&self, peer: PeerId, names: TenantNames) {
        self.router.addresses().set_numbers_of(peer, Some(names));
    }

    fn dialed(&self, peer: PeerId, link: u16, conn: Conn, made: io::Result<TcpStream>) {
        self.router.host().dialed(peer, link, conn, made);
    }

    fn accepted(&self, peer: PeerId, link: u16, stream: TcpStream, first: Vec<u8>) {
        self.router.host().accepted(peer, link, stream, first);
    }
}

#[cfg(test)]
mod tests {
    use freeflow_backend::Gid;

    use super::*;
    use crate::cluster::directory::Owner;

    #[test]
    fn addresses_are_where_their_host_is_once_that_is_reached() {
        let gid = |text: &str| Gid::of(text.parse().unwrap());
        let owner = |host: &str| Owner { host: host.parse().unwrap(), nic: "n".into() };
        let mut known = Known::default();
        known.set_owner("blue", gid("10.0.0.1"), owner("host1"));
        known.set_owner("blue", gid("10.0.0.2"), owner("host2"));
        known.set_owner("red", gid("10.0.0.1"), owner("host2"));
        let peers = BTreeMap::from([("host2".parse().unwrap(), PeerId(7))]);
        let elsewhere = Reach { known: Arc::new(known), peers }.elsewhere();
        assert_eq!(elsewhere["blue"], [(gid("10.0.0.2"), PeerId(7))].into());
        assert_eq!(elsewhere["red"], [(gid("10.0.0.1"), PeerId(7))].into());
    }
}
