//! Who is where on the overlay network: in this version, virtual NICs of this router only.

use std::collections::HashMap;

use arc_swap::ArcSwap;
use freeflow_backend::{Gid, NicConfig, NicId, Overlay, Place};

/// Addresses of the virtual NICs that this router serves.
#[derive(Debug, Default)]
pub struct LocalOverlay {
    /// As of now: workers look at them for every datagram, and wait for nobody.
    tables: ArcSwap<Tables>,
}

#[derive(Debug, Clone, Default)]
struct Tables {
    tenants: HashMap<NicId, String>,
    /// For each tenant.
    places: HashMap<String, HashMap<Gid, NicId>>,
}

impl LocalOverlay {
    /// A virtual NIC is here from now on.
    pub fn add(&self, id: NicId, nic: &NicConfig) {
        self.change(|tables| {
            tables.tenants.insert(id, nic.tenant.clone());
            let gids = nic.addresses.iter().map(|&ip| Gid::of(ip)).chain([Gid::link_local(nic.mac.0)]);
            tables.places.entry(nic.tenant.clone()).or_default().extend(gids.map(|gid| (gid, id)));
        });
    }

    /// It is here no longer.
    pub fn remove(&self, id: NicId) {
        self.change(|tables| {
            tables.tenants.remove(&id);
            tables.places.values_mut().for_each(|places| places.retain(|_, place| *place != id));
            tables.places.retain(|_, places| !places.is_empty());
        });
    }

    fn change(&self, change: impl Fn(&mut Tables)) {
        self.tables.rcu(|tables| {
            let mut tables = Tables::clone(tables);
            change(&mut tables);
            tables
        });
    }
}

impl Overlay for LocalOverlay {
    fn locate(&self, from: NicId, gid: Gid) -> Option<Place> {
        let tables = self.tables.load();
        let tenant = tables.tenants.get(&from)?;
        tables.places.get(tenant)?.get(&gid).copied().map(Place::Local)
    }
}

#[cfg(test)]
mod tests {
    use freeflow_backend::Profile;

    use super::*;

    fn nic(tenant: &str, last: u8) -> NicConfig {
        NicConfig {
            name: String::new(),
            tenant: tenant.to_owned(),
            addresses: vec![[10, 0, 0, last].into()],
            mac: freeflow_backend::Mac([2, 0, 0, 0, 0, last]),
            num_vectors: 1,
            num_workers: 1,
            profile: Profile::default(),
            path: freeflow_backend::PathChoice::Auto,
            quota: freeflow_backend::NicQuota::default(),
            rates: freeflow_backend::Rates::default(),
        }
    }

    #[test]
    fn a_tenant_sees_its_own_addresses_only() {
        let overlay = LocalOverlay::default();
        overlay.add(NicId(1), &nic("red", 1));
        overlay.add(NicId(2), &nic("red", 2));
        overlay.add(NicId(3), &nic("blue", 1));
        let gid = Gid::of([10, 0, 0, 1].into());
        assert_eq!(overlay.locate(NicId(2), gid), Some(Place::Local(NicId(1))));
        assert_eq!(overlay.locate(NicId(3), gid), Some(Place::Local(NicId(3))));
        assert_eq!(overlay.locate(NicId(3), Gid::of([10, 0, 0, 2].into())), None);
        assert_eq!(overlay.locate(NicId(3), Gid::link_local([2, 0, 0, 0, 0, 2])), None);
        overlay.remove(NicId(1));
        assert_eq!(overlay.locate(NicId(2), gid), None);
    }
}
