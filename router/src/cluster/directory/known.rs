//! What a directory says, as of one moment: where hosts are, and which of them each address of each tenant lives on.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use freeflow_backend::Gid;

use crate::cluster::HostName;

/// Who has an address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    /// The host that it lives on; the directory need not know where that is.
    pub host: HostName,
    /// The virtual NIC there, for people; empty if the directory does not say.
    pub nic: Arc<str>,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.nic.as_ref() {
            "" => write!(f, "host {}", self.host),
            nic => write!(f, "virtual NIC {nic:?} of host {}", self.host),
        }
    }
}

/// A directory's content. Cheap to copy: what does not change is shared between copies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    hosts: Arc<BTreeMap<HostName, SocketAddr>>,
    tenants: HashMap<Arc<str>, Arc<HashMap<Gid, Owner>>>,
}

impl Known {
    /// Where a host listens for others.
    pub fn host(&self, name: &str) -> Option<SocketAddr> {
        self.hosts.get(name).copied()
    }

    /// All hosts, by name.
    pub fn hosts(&self) -> impl Iterator<Item = (&HostName, SocketAddr)> {
        self.hosts.iter().map(|(name, address)| (name, *address))
    }

    /// Who has this address of this tenant.
    pub fn owner(&self, tenant: &str, gid: Gid) -> Option<&Owner> {
        self.tenants.get(tenant)?.get(&gid)
    }

    /// All addresses with their tenants, in no order.
    pub fn addresses(&self) -> impl Iterator<Item = (&str, Gid, &Owner)> {
        self.tenants
            .iter()
            .flat_map(|(tenant, gids)| gids.iter().map(move |(gid, owner)| (tenant.as_ref(), *gid, owner)))
    }

    /// A host is there from now on, or elsewhere.
    pub fn set_host(&mut self, name: HostName, address: SocketAddr) {
        Arc::make_mut(&mut self.hosts).insert(name, address);
    }

    /// Nobody knows where a host is; whether somebody did.
    pub fn forget_host(&mut self, name: &str) -> bool {
        self.hosts.contains_key(name) && Arc::make_mut(&mut self.hosts).remove(name).is_some()
    }

    /// An address belongs to this one from now on; who had it before is returned.
    pub fn set_owner(&mut self, tenant: &str, gid: Gid, owner: Owner) -> Option<Owner> {
        if let Some(gids) = self.tenants.get_mut(tenant) {
            return Arc::make_mut(gids).insert(gid, owner);
        }
        self.tenants.insert(tenant.into(), Arc::new(HashMap::from([(gid, owner)])));
        None
    }

    /// An address belongs to nobody; whether it did to somebody.
    pub fn forget_owner(&mut self, tenant: &str, gid: Gid) -> bool {
        let Some(gids) = self.tenants.get_mut(tenant).filter(|gids| gids.contains_key(&gid)) else { return false };
        Arc::make_mut(gids).remove(&gid);
        if gids.is_empty() {
            self.tenants.remove(tenant);
        }
        true
    }

    /// This, and what `other` knows of besides.
    #[must_use]
    pub fn over(&self, other: &Self) -> Self {
        let mut both = other.clone();
        self.hosts().for_each(|(name, address)| both.set_host(name.clone(), address));
        for (tenant, gid, owner) in self.addresses() {
            both.set_owner(tenant, gid, owner.clone());
        }
        both
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(text: &str) -> Gid {
        Gid::of(text.parse().unwrap())
    }

    fn owner(host: &str, nic: &str) -> Owner {
        Owner { host: host.parse().unwrap(), nic: nic.into() }
    }

    #[test]
    fn tenants_have_addresses_of_their_own() {
        let mut known = Known::default();
        assert_eq!(known.set_owner("blue", gid("10.0.0.1"), owner("host1", "a")), None);
        assert_eq!(known.set_owner("red", gid("10.0.0.1"), owner("host2", "b")), None);
        let before = known.clone();
        assert_eq!(known.set_owner("blue", gid("10.0.0.1"), owner("host2", "c")), Some(owner("host1", "a")));
        assert_eq!(before.owner("blue", gid("10.0.0.1")), Some(&owner("host1", "a")), "a copy stays as it is");
        assert_eq!(known.owner("red", gid("10.0.0.1")), Some(&owner("host2", "b")));
        assert!(known.forget_owner("blue", gid("10.0.0.1")));
        assert!(!known.forget_owner("blue", gid("10.0.0.1")));
        assert_eq!(known.addresses().collect::<Vec<_>>(), [("red", gid("10.0.0.1"), &owner("host2", "b"))]);
    }

    #[test]
    fn hosts_move() {
        let mut known = Known::default();
        for address in ["192.0.2.1:1", "192.0.2.2:2"] {
            known.set_host("host1".parse().unwrap(), address.parse().unwrap());
            assert_eq!(known.host("host1"), Some(address.parse().unwrap()));
        }
        assert_eq!(known.hosts().count(), 1);
        assert!(known.forget_host("host1"));
        assert!(!known.forget_host("host1"));
        assert_eq!((known.host("host1"), known.hosts().count()), (None, 0));
    }
}
