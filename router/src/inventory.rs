//! Which virtual NICs a router has, where each comes from, and which may come. No I/O: the router does what is decided here.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use freeflow_backend::{Mac, NicId, NicQuota, PathChoice, Profile, Rates};
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, NicSettings, check_nics};

/// Where a virtual NIC comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The configuration file, or the command line.
    Configured,
    /// `freeflow nic add`.
    Added,
}

/// Why a virtual NIC cannot come, or go.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// It is not possible beside the others, or at all.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// There is another one of that name.
    #[error(
        "there is a virtual NIC {name:?} already, with another {differences}: remove it first (freeflow nic del {name}); \
         a rate can be changed (freeflow nic set {name})"
    )]
    Different {
        /// The name.
        name: String,
        /// In what they differ.
        differences: String,
    },
    /// It would come back at the next start.
    #[error("virtual NIC {0:?} is in the router's configuration: remove it there, and restart the router")]
    Configured(String),
}

/// A virtual NIC to be added; what is left out is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NewNic {
    /// Name; made of tenant and first address if left out.
    pub name: Option<String>,
    /// Tenant.
    pub tenant: String,
    /// Addresses.
    pub ip: Vec<IpAddr>,
    /// MAC; made of the first address if left out.
    pub mac: Option<Mac>,
    /// Socket; named after the virtual NIC, beside the control socket, if left out.
    pub socket: Option<PathBuf>,
    /// Completion vectors.
    pub vectors: u16,
    /// Data-path workers that serve it.
    pub workers: u16,
    /// How bytes get to peers.
    pub path: PathChoice,
    /// How fast it and its QPs may be.
    pub rate: Rates,
    /// How much of the host's RDMA NIC it may have.
    #[serde(default)]
    pub quota: NicQuota,
    /// Limits.
    pub limits: Profile,
}

impl NewNic {
    /// With everything chosen; sockets go into `folder`.
    pub fn settle(self, folder: &Path) -> NicSettings {
        let first = self.ip.first().map_or_else(String::new, IpAddr::to_string);
        let name = self.name.unwrap_or_else(|| format!("{}-{first}", self.tenant));
        // A name may have anything in it; a file's may not have a slash.
        let file = name.replace('/', "_") + ".sock";
        NicSettings {
            socket: self.socket.unwrap_or_else(|| folder.join(file)),
            name,
            tenant: self.tenant,
            ip: self.ip,
            mac: self.mac,
            vectors: self.vectors,
            workers: self.workers,
            quota: self.quota,
            path: self.path,
            rate: self.rate,
            limits: self.limits,
        }
    }
}

/// What is kept for the next start.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct State {
    nic: Vec<NicSettings>,
}

const STATE_HEADER: &str =
    "# Virtual NICs that were added with `freeflow nic add`. Written by freeflow-router: changes are lost.\n\n";

/// The virtual NICs of a router.
#[derive(Debug, Clone)]
pub struct Inventory {
    workers: usize,
    control: PathBuf,
    next: u32,
    nics: BTreeMap<NicId, (NicSettings, Origin)>,
    /// Added once, and not here now, since the directory does not allow it.
    aside: BTreeMap<String, NicSettings>,
}

impl Inventory {
    /// None yet, for a router with so many workers and this control socket.
    pub fn new(workers: usize, control: &Path) -> Self {
        Self { workers, control: control.to_owned(), next: 0, nics: BTreeMap::new(), aside: BTreeMap::new() }
    }

    /// Whether a virtual NIC can come: `Some` number of the one that is there already and is the same.
    ///
    /// # Errors
    /// When it cannot.
    pub fn check(&self, new: &NicSettings) -> Result<Option<NicId>, InventoryError> {
        if let Some((id, (there, _))) = self.named(&new.name) {
            return match differences(there, new) {
                none if none.is_empty() => Ok(Some(id)),
                some => Err(InventoryError::Different { name: new.name.clone(), differences: some.join(", ") }),
            };
        }
        let all = self.nics.values().map(|(nic, _)| nic).chain([new]);
        Ok(check_nics(all, self.workers, &self.control).map(|()| None)?)
    }

    /// It is there from now on.
    pub fn insert(&mut self, nic: NicSettings, origin: Origin) -> NicId {
        let id = NicId(self.next);
        self.next += 1;
        self.aside.remove(&nic.name);
        self.nics.insert(id, (nic, origin));
        id
    }

    /// Whether the virtual NIC of this name may go, and which it is; `None` if there is none.
    ///
    /// # Errors
    /// When it comes from the configuration.
    pub fn removable(&self, name: &str) -> Result<Option<NicId>, InventoryError> {
        match self.named(name) {
            Some((_, (_, Origin::Configured))) => Err(InventoryError::Configured(name.to_owned())),
            found => Ok(found.map(|(id, _)| id)),
        }
    }

    /// It is gone.
    pub fn remove(&mut self, id: NicId) -> Option<(NicSettings, Origin)> {
        self.nics.remove(&id)
    }

    /// It was added, and cannot be here for now; it is kept for the next start.
    pub fn set_aside(&mut self, nic: NicSettings) {
        self.aside.insert(nic.name.clone(), nic);
    }

    /// It is not kept any longer; whether it was.
    pub fn forget_aside(&mut self, name: &str) -> bool {
        self.aside.remove(name).is_some()
    }

    /// What is known of the virtual NIC of this name, to be changed.
    pub fn find_mut(&mut self, name: &str) -> Option<(NicId, Origin, &mut NicSettings)> {
        let found = self.nics.iter_mut().find(|(_, (nic, _))| nic.name == name);
        found.map(|(id, (nic, origin))| (*id, *origin, nic))
    }

    /// What is to be kept for the next start.
    ///
    /// # Errors
    /// When a path is not text.
    pub fn to_state(&self) -> Result<String, toml::ser::Error> {
        let added = self.nics.values().filter(|(_, origin)| *origin == Origin::Added);
        let kept = added.map(|(nic, _)| nic).chain(self.aside.values());
        let state = State { nic: kept.cloned().collect() };
        Ok(STATE_HEADER.to_owned() + &toml::to_string_pretty(&state)?)
    }

    fn named(&self, name: &str) -> Option<(NicId, &(NicSettings, Origin))> {
        self.nics.iter().find(|(_, (nic, _))| nic.name == name).map(|(id, nic)| (*id, nic))
    }
}

/// What was kept by the router before.
///
/// # Errors
/// When it is not what a router writes.
pub fn from_state(text: &str) -> Result<Vec<NicSettings>, toml::de::Error> {
    toml::from_str::<State>(text).map(|state| state.nic)
}

/// Names of settings that are not the same.
fn differences(one: &NicSettings, other: &NicSettings) -> Vec<String> {
    let fields = |nic: &NicSettings| -> HashMap<String, toml::Value> {
        let whole = NicSettings { mac: Some(nic.mac()), ..nic.clone() };
        toml::Table::try_from(whole).unwrap_or_default().into_iter().collect()
    };
    let (one, other) = (fields(one), fields(other));
    let mut names: Vec<_> = one.keys().filter(|name| one.get(*name) != other.get(*name)).cloned().collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(last: u8) -> NewNic {
        NewNic {
            name: None,
            tenant: "blue".to_owned(),
            ip: vec![[10, 32, 0, last].into()],
            mac: None,
            socket: None,
            vectors: 1,
            workers: 1,
            path: PathChoice::Auto,
            rate: Rates::default(),
            quota: NicQuota::default(),
            limits: Profile::default(),
        }
    }

    fn nic(last: u8) -> NicSettings {
        new(last).settle(Path::new("/run/freeflow"))
    }

    fn inventory() -> Inventory {
        let mut inventory = Inventory::new(2, Path::new("/run/freeflow/control.sock"));
        inventory.insert(NicSettings { name: "fixed".to_owned(), ..nic(1) }, Origin::Configured);
        inventory.insert(nic(2), Origin::Added);
        inventory
    }

    #[test]
    fn what_is_left_out_is_chosen() {
        let chosen = nic(7);
        assert_eq!((chosen.name.as_str(), chosen.mac()), ("blue-10.32.0.7", Mac([2, 0xff, 10, 32, 0, 7])));
        assert_eq!(chosen.socket, Path::new("/run/freeflow/blue-10.32.0.7.sock"));
        let odd = NewNic { name: Some("a/b".to_owned()), ..new(7) }.settle(Path::new("/s"));
        assert_eq!(odd.socket, Path::new("/s/a_b.sock"));
    }

    #[test]
    fn adding_the_same_again_changes_nothing() {
        let inventory = inventory();
        assert_eq!(inventory.check(&nic(2)).unwrap(), Some(NicId(1)));
        let explicit = NicSettings { mac: Some(nic(2).mac()), ..nic(2) };
        assert_eq!(inventory.check(&explicit).unwrap(), Some(NicId(1)), "the MAC that it has anyway");
        assert_eq!(inventory.check(&nic(3)).unwrap(), None);
    }

    #[test]
    fn adding_another_of_that_name_says_what_differs() {
        let limits = Profile { max_qp: 8, ..Profile::default() };
        let quota = NicQuota { max_qp: 8, ..NicQuota::default() };
        let other = NewNic { quota, limits, vectors: 2, ..new(2) }.settle(Path::new("/run/freeflow"));
        let error = inventory().check(&other).unwrap_err().to_string();
        assert!(error.contains("limits, quota, vectors") && error.contains("nic del blue-10.32.0.2"), "{error}");
    }

    #[test]
    fn what_collides_or_is_not_possible_is_refused() {
        let fresh = || NicSettings { name: "fresh".to_owned(), socket: "/run/freeflow/fresh".into(), ..nic(2) };
        for (bad, expected) in [
            (fresh(), "\"blue-10.32.0.2\" and \"fresh\" both have MAC"),
            (NicSettings { mac: Some(Mac([2, 0, 0, 0, 0, 9])), ..fresh() }, "both have address 10.32.0.2"),
            (NicSettings { workers: 3, ..nic(3) }, "no more than engine.workers"),
            (NicSettings { socket: "/run/freeflow/control.sock".into(), ..nic(3) }, "control socket"),
            (NicSettings { ip: Vec::new(), ..nic(3) }, "at least one address"),
        ] {
            let error = inventory().check(&bad).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn what_is_set_aside_is_kept_until_it_is_removed_or_comes() {
        let mut inventory = inventory();
        let kept = |inventory: &Inventory| from_state(&inventory.to_state().unwrap()).unwrap();
        inventory.set_aside(nic(3));
        assert_eq!(kept(&inventory), [nic(2), nic(3)]);
        assert_eq!(inventory.check(&nic(3)).unwrap(), None);
        inventory.insert(nic(3), Origin::Added);
        assert_eq!(kept(&inventory), [nic(2), nic(3)]);
        assert!(!inventory.forget_aside(&nic(3).name));
        inventory.set_aside(nic(4));
        assert!(inventory.forget_aside(&nic(4).name));
        assert_eq!(kept(&inventory), [nic(2), nic(3)]);
    }

    #[test]
    fn only_what_was_added_can_be_removed_and_is_kept() {
        let mut inventory = inventory();
        assert!(matches!(inventory.removable("fixed"), Err(InventoryError::Configured(_))));
        assert_eq!(inventory.removable("nobody").unwrap(), None);
        assert_eq!(from_state(&inventory.to_state().unwrap()).unwrap(), [nic(2)]);
        let id = inventory.removable("blue-10.32.0.2").unwrap().unwrap();
        inventory.remove(id).unwrap();
        assert_eq!(from_state(&inventory.to_state().unwrap()).unwrap(), []);
        assert_eq!(inventory.insert(nic(2), Origin::Added), NicId(2), "numbers are not used again");
    }
}
