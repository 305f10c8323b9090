//! A directory as `freeflow directory` shows it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::{Directory, Known};

/// What a directory has, and how good that is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// What it is.
    pub source: String,
    /// Whether changes are heard of as they happen.
    pub connected: bool,
    /// Seconds since it was last known to be up to date.
    pub age: f64,
    /// All hosts, by name.
    pub hosts: Vec<HostView>,
    /// Virtual NICs, by tenant, host and name.
    pub nics: Vec<NicView>,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostView {
    /// Its name.
    pub name: String,
    /// Where it listens for others.
    pub address: SocketAddr,
}

/// A virtual NIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicView {
    /// Its tenant.
    pub tenant: String,
    /// Its host.
    pub host: String,
    /// Its name, or nothing if the directory does not say.
    pub name: String,
    /// Its addresses, with the link-local one that is made of its MAC.
    pub addresses: Vec<IpAddr>,
}

impl View {
    /// What `directory` has of `tenant`, or of all.
    pub fn of(directory: &dyn Directory, tenant: Option<&str>) -> Self {
        let (known, health) = (directory.snapshot(), directory.health());
        let hosts = known.hosts().map(|(name, address)| HostView { name: name.to_string(), address });
        Self {
            source: directory.source(),
            connected: health.connected,
            age: health.age.as_secs_f64(),
            hosts: hosts.collect(),
            nics: nics(&known, tenant),
        }
    }
}

fn nics(known: &Known, only: Option<&str>) -> Vec<NicView> {
    let mut nics: BTreeMap<_, Vec<IpAddr>> = BTreeMap::new();
    for (tenant, gid, owner) in known.addresses().filter(|(tenant, ..)| only.is_none_or(|only| only == *tenant)) {
        nics.entry((tenant, owner)).or_default().push(gid.address());
    }
    let view = |((tenant, owner), mut addresses): ((&str, &super::Owner), Vec<IpAddr>)| {
        addresses.sort();
        NicView {
            tenant: tenant.to_owned(),
            host: owner.host.to_string(),
            name: owner.nic.as_ref().to_owned(),
            addresses,
        }
    };
    nics.into_iter().map(view).collect()
}

#[cfg(test)]
mod tests {
    use freeflow_backend::Gid;

    use super::super::Owner;
    use super::*;

    #[test]
    fn addresses_are_shown_with_their_virtual_nics() {
        let mut known = Known::default();
        for (tenant, address, host, nic) in [
            ("red", "10.0.0.1", "host2", "r"),
            ("blue", "fe80::1", "host1", "b"),
            ("blue", "10.0.0.2", "host1", "b"),
            ("blue", "10.0.0.3", "host1", ""),
        ] {
            let owner = Owner { host: host.parse().unwrap(), nic: nic.into() };
            known.set_owner(tenant, Gid::of(address.parse().unwrap()), owner);
        }
        let shown = |tenant| -> Vec<String> {
            let line = |nic: &NicView| format!("{} {} {:?} {:?}", nic.tenant, nic.host, nic.name, nic.addresses);
            nics(&known, tenant).iter().map(line).collect()
        };
        let blue = ["blue host1 \"\" [10.0.0.3]", "blue host1 \"b\" [10.0.0.2, fe80::1]"];
        assert_eq!(shown(Some("blue")), blue);
        assert_eq!(shown(None), [blue[0], blue[1], "red host2 \"r\" [10.0.0.1]"]);
        assert!(shown(Some("green")).is_empty());
    }
}
