//! A running router.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use freeflow_backend::verbs::Device;
use freeflow_backend::vhost::socket::Socket;
use freeflow_backend::{Host, NicId, NicStatus, PathChoice, QpStatus, Rates};
use serde::{Deserialize, Serialize};

use crate::config::{Config, NicSettings};
use crate::files::{Direct, Files};
use crate::inventory::{Inventory, NewNic, Origin};
use crate::overlay::Addresses;

/// The device side of this host with its virtual NICs. Dropping it stops everything.
#[derive(Debug)]
pub struct Router {
    host: Host,
    overlay: Arc<Addresses>,
    files: Box<dyn Files>,
    /// Where sockets go for which no place was named.
    folder: PathBuf,
    has_device: bool,
    inventory: Mutex<Inventory>,
}

/// Answer to [`Router::add`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added {
    /// Its name.
    pub name: String,
    /// The socket for its VMM.
    pub socket: PathBuf,
    /// False if it was there already.
    pub created: bool,
}

/// Answer to [`Router::remove`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// Its name.
    pub name: String,
    /// False if there was none.
    pub removed: bool,
}

/// Answer to [`Router::set_rate`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateSet {
    /// The virtual NIC.
    pub name: String,
    /// What holds now.
    pub rate: Rates,
    /// Whether it will after a restart, too: not if the virtual NIC comes from the configuration.
    pub kept: bool,
}

impl Router {
    /// Starts with the virtual NICs of `config`, on this NIC of the host if there is one.
    ///
    /// # Errors
    /// When the configuration is wrong, or a socket cannot be made.
    pub fn start_on(config: &Config, device: Option<Arc<dyn Device>>) -> Result<Self> {
        Self::start_with(config, device, Box::new(Direct::default()), &[])
    }

    /// The same, with virtual NICs that were added by an earlier life of it, and somebody who makes sockets and files.
    ///
    /// # Errors
    /// When the configuration is wrong, or a socket cannot be made.
    pub fn start_with(
        config: &Config,
        device: Option<Arc<dyn Device>>,
        files: Box<dyn Files>,
        added: &[NicSettings],
    ) -> Result<Self> {
        config.check()?;
        let overlay = Arc::new(Addresses::default());
        let has_device = device.is_some();
        let host =
            Host::start(config.engine.to_engine(), overlay.clone(), device).context("cannot start the data path")?;
        let inventory = Mutex::new(Inventory::new(config.engine.workers, config.control()));
        let folder = config.control().parent().map(Path::to_owned).unwrap_or_default();
        let router = Self { host, overlay, files, folder, has_device, inventory };
        for nic in &config.nic {
            router.start_nic(nic, Origin::Configured)?;
        }
        for nic in added {
            let kept = || format!("{} keeps virtual NIC {:?}, which was added", config.state().display(), nic.name);
            router.start_nic(nic, Origin::Added).with_context(kept)?;
        }
        Ok(router)
    }

    /// Adds a virtual NIC, and sees to it that it is there after a restart. One that is there already and is the same is left alone.
    ///
    /// # Errors
    /// When it is not possible beside the others, or the system has no room for it: nothing has changed then.
    pub fn add(&self, nic: NewNic) -> Result<Added> {
        let nic = nic.settle(&self.folder);
        let created = self.start_nic(&nic, Origin::Added)?;
        if let Some(id) = created {
            let saved = self.save(&self.inventory());
            saved.inspect_err(|_| self.stop_nic(id))?;
        }
        Ok(Added { name: nic.name, socket: nic.socket, created: created.is_some() })
    }

    /// Removes a virtual NIC that was added: its VMM is disconnected, everything of its guest is freed.
    ///
    /// # Errors
    /// When it comes from the configuration, or what is kept for a restart cannot be written: nothing has changed then.
    pub fn remove(&self, name: String) -> Result<Removed> {
        let id = self.change(|inventory| {
            let id = inventory.removable(&name)?;
            id.and_then(|id| inventory.remove(id));
            Ok(id)
        })?;
        if let Some(id) = id {
            self.stop_nic(id);
            log::info!("virtual NIC {name} is removed");
        }
        Ok(Removed { name, removed: id.is_some() })
    }

    /// Changes how fast a virtual NIC may be, at once.
    ///
    /// # Errors
    /// When there is none of that name, the limits are not possible, or they cannot be kept for a restart: nothing has changed then.
    pub fn set_rate(&self, name: &str, rate: Rates) -> Result<RateSet> {
        rate.check().map_err(anyhow::Error::msg)?;
        let (id, kept) = self.change(|inventory| {
            let found = inventory.find_mut(name).with_context(|| format!("there is no virtual NIC {name:?}"))?;
            let (id, origin, nic) = found;
            nic.rate = rate.clone();
            Ok((id, origin == Origin::Added))
        })?;
        self.host.set_rates(id, rate.clone());
        Ok(RateSet { name: name.to_owned(), rate, kept })
    }

    /// The device side.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Who is where.
    pub fn addresses(&self) -> &Arc<Addresses> {
        &self.overlay
    }

    /// Its number, unless it is there already.
    fn start_nic(&self, settings: &NicSettings, origin: Origin) -> Result<Option<NicId>> {
        ensure!(
            self.has_device || settings.path != PathChoice::Nic,
            "virtual NIC {:?} is to use the host's RDMA NIC (path = \"nic\"), and there is none: start it with --rdma-device",
            settings.name
        );
        let mut inventory = self.inventory();
        if inventory.check(settings)?.is_some() {
            return Ok(None);
        }
        let path = settings.socket.clone();
        let listener = self.files.listen(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
        let nic = settings.to_nic();
        let id = inventory.insert(settings.clone(), origin);
        self.overlay.add(id, &nic);
        let started = self.host.add_nic(id, nic, Socket { path: path.clone(), listener });
        if let Err(error) = started {
            self.overlay.remove(id);
            inventory.remove(id);
            remove_socket(&path);
            return Err(error).with_context(|| format!("virtual NIC {:?}", settings.name));
        }
        log::info!("virtual NIC {}: {} for tenant {}", settings.name, path.display(), settings.tenant);
        Ok(Some(id))
    }

    fn stop_nic(&self, id: NicId) {
        // Nobody finds it any more, and then nobody uses it any more.
        self.overlay.remove(id);
        self.host.remove_nic(id);
        self.inventory().remove(id);
    }

    /// Changes what there is and what is kept of it for a restart, both or neither.
    fn change<T>(&self, change: impl FnOnce(&mut Inventory) -> Result<T>) -> Result<T> {
        let mut inventory = self.inventory();
        let mut changed = inventory.clone();
        let value = change(&mut changed)?;
        if changed.to_state()? != inventory.to_state()? {
            self.save(&changed)?;
        }
        *inventory = changed;
        Ok(value)
    }

    fn save(&self, inventory: &Inventory) -> Result<()> {
        let state = inventory.to_state().context(CANNOT_KEEP)?;
        self.files.save(&state).context(CANNOT_KEEP)
    }

    fn inventory(&self) -> MutexGuard<'_, Inventory> {
        self.inventory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Virtual NICs, with their objects and counters.
    pub fn nics(&self) -> Vec<NicStatus> {
        self.host.nics()
    }

    /// Queue pairs of all virtual NICs.
    pub fn qps(&self) -> Vec<QpStatus> {
        self.host.qps(None)
    }

    /// How many times each worker has slept.
    pub fn worker_sleeps(&self) -> Vec<u64> {
        self.host.worker_sleeps()
    }

    /// Disconnects every VMM, frees everything and removes the sockets.
    pub fn stop(&self) {
        self.host.stop();
    }
}

/// What fails when the state cannot be saved.
const CANNOT_KEEP: &str = "cannot keep the virtual NICs for the next start (--state FILE names another file)";

fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        log::debug!("cannot remove {}: {error}", path.display());
    }
}
