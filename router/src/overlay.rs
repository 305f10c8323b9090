//! Who is where on the overlay network: virtual NICs of this router, and those that it knows of on other hosts.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use arc_swap::ArcSwap;
use freeflow_backend::{Gid, NicConfig, NicId, Overlay, PeerId, Place};
use tokio::sync::watch;

/// Where the addresses of each tenant are that live on other hosts.
pub type Elsewhere = HashMap<String, HashMap<Gid, PeerId>>;

/// What a host calls its tenants.
pub type TenantNumbers = BTreeMap<u32, Arc<str>>;

/// Addresses of virtual NICs.
#[derive(Debug, Default)]
pub struct Addresses {
    /// As of now: workers look at them for every datagram, and wait for nobody.
    tables: ArcSwap<Tables>,
    /// For peers, as tenants come and go.
    announced: watch::Sender<Arc<TenantNumbers>>,
}

#[derive(Debug, Clone, Default)]
struct Tables {
    tenants: HashMap<NicId, String>,
    /// For each tenant.
    places: HashMap<String, HashMap<Gid, NicId>>,
    elsewhere: Arc<Elsewhere>,
    /// For each tenant the hosts of `elsewhere`: asked for with every datagram to a group.
    hosts: Arc<HashMap<String, Arc<[PeerId]>>>,
    /// Of tenants that have, or had, a virtual NIC here. A number stays its tenant's as long as the router runs.
    numbers: HashMap<String, u32>,
    /// What peers call tenants.
    theirs: HashMap<PeerId, Arc<TenantNumbers>>,
}

impl Addresses {
    /// A virtual NIC is here from now on.
    pub fn add(&self, id: NicId, nic: &NicConfig) {
        self.change(|tables| {
            tables.tenants.insert(id, nic.tenant.clone());
            let next = tables.numbers.len() as u32;
            tables.numbers.entry(nic.tenant.clone()).or_insert(next);
            let gids = nic.addresses.iter().map(|&ip| Gid::of(ip)).chain([Gid::link_local(nic.mac.0)]);
            tables.places.entry(nic.tenant.clone()).or_default().extend(gids.map(|gid| (gid, id)));
        });
        self.announce();
    }

    /// It is here no longer.
    pub fn remove(&self, id: NicId) {
        self.change(|tables| {
            tables.tenants.remove(&id);
            tables.places.values_mut().for_each(|places| places.retain(|_, place| *place != id));
            tables.places.retain(|_, places| !places.is_empty());
        });
        self.announce();
    }

    /// What this host calls those tenants that have a virtual NIC here, for its peers.
    pub fn numbers(&self) -> TenantNumbers {
        let tables = self.tables.load();
        let here = tables.numbers.iter().filter(|(name, _)| tables.places.contains_key(*name));
        here.map(|(name, number)| (*number, name.as_str().into())).collect()
    }

    /// The same, and each change of it.
    pub fn announced(&self) -> watch::Receiver<Arc<TenantNumbers>> {
        self.announced.subscribe()
    }

    fn announce(&self) {
        self.announced.send_if_modified(|announced| {
            let numbers = self.numbers();
            let changed = **announced != numbers;
            *announced = Arc::new(numbers);
            changed
        });
    }

    /// What a peer calls its tenants, all of them; `None` when there is no such peer any more.
    pub fn set_numbers_of(&self, peer: PeerId, numbers: Option<TenantNumbers>) {
        let numbers = numbers.map(Arc::new);
        self.change(|tables| match &numbers {
            Some(numbers) => drop(tables.theirs.insert(peer, numbers.clone())),
            None => drop(tables.theirs.remove(&peer)),
        });
    }

    /// Where everything is that is on other hosts that can be reached.
    pub fn set_elsewhere(&self, elsewhere: Elsewhere) {
        let of =
            |places: &HashMap<Gid, PeerId>| places.values().copied().collect::<BTreeSet<_>>().into_iter().collect();
        let hosts: HashMap<_, _> = elsewhere.iter().map(|(tenant, places)| (tenant.clone(), of(places))).collect();
        let (hosts, elsewhere) = (Arc::new(hosts), Arc::new(elsewhere));
        self.change(|tables| (tables.elsewhere, tables.hosts) = (elsewhere.clone(), hosts.clone()));
    }

    fn change(&self, change: impl Fn(&mut Tables)) {
        self.tables.rcu(|tables| {
            let mut tables = Tables::clone(tables);
            change(&mut tables);
            tables
        });
    }
}

impl Overlay for Addresses {
    fn locate(&self, from: NicId, gid: Gid) -> Option<Place> {
        let tables = self.tables.load();
        let tenant = tables.tenants.get(&from)?;
        let here = tables.places.get(tenant).and_then(|places| places.get(&gid)).copied();
        let there = || tables.elsewhere.get(tenant)?.get(&gid).copied();
        here.map(Place::Local).or_else(|| there().map(Place::Remote))
    }

    fn tenant(&self, nic: NicId) -> Option<u32> {
        let tables = self.tables.load();
        tables.numbers.get(tables.tenants.get(&nic)?).copied()
    }

    fn tenant_of(&self, from: PeerId, tenant: u32, source: Gid) -> Option<Arc<str>> {
        let tables = self.tables.load();
        let name = tables.theirs.get(&from)?.get(&tenant)?;
        let lives_there = tables.elsewhere.get(&**name)?.get(&source) == Some(&from);
        lives_there.then(|| name.clone())
    }

    fn find(&self, tenant: &str, gid: Gid) -> Option<NicId> {
        self.tables.load().places.get(tenant)?.get(&gid).copied()
    }

    fn hosts(&self, nic: NicId) -> Arc<[PeerId]> {
        let tables = self.tables.load();
        let hosts = tables.tenants.get(&nic).and_then(|tenant| tables.hosts.get(tenant));
        hosts.cloned().unwrap_or_default()
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

    fn gid(last: u8) -> Gid {
        Gid::of([10, 0, 0, last].into())
    }

    fn elsewhere(tenant: &str, last: u8, peer: u32) -> Elsewhere {
        [(tenant.to_owned(), [(gid(last), PeerId(peer))].into())].into()
    }

    #[test]
    fn a_tenant_sees_its_own_addresses_only() {
        let overlay = Addresses::default();
        overlay.add(NicId(1), &nic("red", 1));
        overlay.add(NicId(2), &nic("red", 2));
        overlay.add(NicId(3), &nic("blue", 1));
        assert_eq!(overlay.locate(NicId(2), gid(1)), Some(Place::Local(NicId(1))));
        assert_eq!(overlay.locate(NicId(3), gid(1)), Some(Place::Local(NicId(3))));
        assert_eq!(overlay.locate(NicId(3), gid(2)), None);
        assert_eq!(overlay.locate(NicId(3), Gid::link_local([2, 0, 0, 0, 0, 2])), None);
        overlay.remove(NicId(1));
        assert_eq!(overlay.locate(NicId(2), gid(1)), None);
    }

    #[test]
    fn addresses_of_other_hosts_are_the_tenants_too_and_its_own_come_first() {
        let overlay = Addresses::default();
        overlay.add(NicId(1), &nic("red", 1));
        overlay.add(NicId(2), &nic("blue", 2));
        overlay.set_elsewhere(elsewhere("red", 9, 7));
        assert_eq!(overlay.locate(NicId(1), gid(9)), Some(Place::Remote(PeerId(7))));
        assert_eq!(overlay.locate(NicId(2), gid(9)), None);
        assert_eq!((&*overlay.hosts(NicId(1)), &*overlay.hosts(NicId(2))), (&[PeerId(7)][..], &[][..]));
        overlay.set_elsewhere(elsewhere("red", 1, 7));
        assert_eq!(overlay.locate(NicId(1), gid(1)), Some(Place::Local(NicId(1))));
    }

    #[test]
    fn a_peer_speaks_for_the_addresses_that_live_there_and_no_others() {
        let overlay = Addresses::default();
        overlay.set_elsewhere(elsewhere("red", 9, 7));
        let numbers = TenantNumbers::from([(4, "red".into()), (5, "blue".into())]);
        overlay.set_numbers_of(PeerId(7), Some(numbers.clone()));
        overlay.set_numbers_of(PeerId(8), Some(numbers));
        assert_eq!(overlay.tenant_of(PeerId(7), 4, gid(9)).as_deref(), Some("red"));
        assert_eq!(overlay.tenant_of(PeerId(7), 5, gid(9)), None, "another tenant");
        assert_eq!(overlay.tenant_of(PeerId(7), 6, gid(9)), None, "no such number");
        assert_eq!(overlay.tenant_of(PeerId(7), 4, gid(8)), None, "an address of nobody");
        assert_eq!(overlay.tenant_of(PeerId(8), 4, gid(9)), None, "another host's");
        overlay.set_numbers_of(PeerId(7), None);
        assert_eq!(overlay.tenant_of(PeerId(7), 4, gid(9)), None);
    }

    #[test]
    fn a_tenants_number_stays() {
        let overlay = Addresses::default();
        overlay.add(NicId(1), &nic("red", 1));
        overlay.add(NicId(2), &nic("blue", 2));
        overlay.remove(NicId(1));
        overlay.add(NicId(3), &nic("green", 3));
        overlay.add(NicId(4), &nic("red", 1));
        assert_eq!((overlay.tenant(NicId(4)), overlay.tenant(NicId(3))), (Some(0), Some(2)));
        let numbers: Vec<_> = overlay.numbers().into_iter().map(|(n, name)| (n, name.to_string())).collect();
        assert_eq!(numbers, [(0, "red".to_owned()), (1, "blue".to_owned()), (2, "green".to_owned())]);
    }
}
