//! A running router.

use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use freeflow_backend::verbs::Device;
use freeflow_backend::vhost::socket::Socket;
use freeflow_backend::{Host, NicId, NicStatus, PathChoice, QpStatus, Rates, WorkerStatus};
use serde::{Deserialize, Serialize};

use crate::cluster::directory::{Claim, Directory, Refused, Status, View};
use crate::cluster::status::Board;
use crate::config::{Config, NicSettings};
use crate::files::{Direct, Files};
use crate::inventory::{Inventory, NewNic, Origin};
use crate::overlay::Addresses;

/// The device side of this host with its virtual NICs. Dropping it stops everything.
#[derive(Debug)]
pub struct Router {
    host: Host,
    overlay: Arc<Addresses>,
    files: Arc<dyn Files>,
    directory: Option<Arc<dyn Directory>>,
    /// State of sessions, once there are any.
    sessions: OnceLock<Arc<Board>>,
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
        Self::start_with(config, device, Arc::new(Direct::default()), None, &[])
    }

    /// The same, with somebody who makes sockets and files, other hosts if there are any, and virtual NICs that were added by an earlier life of it.
    ///
    /// # Errors
    /// When the configuration is wrong, or a socket cannot be made.
    pub fn start_with(
        config: &Config,
        device: Option<Arc<dyn Device>>,
        files: Arc<dyn Files>,
        directory: Option<Arc<dyn Directory>>,
        added: &[NicSettings],
    ) -> Result<Self> {
        config.check()?;
        let overlay = Arc::new(Addresses::default());
        let has_device = device.is_some();
        let host = Host::start(config.to_engine(), overlay.clone(), device).context("cannot start the data path")?;
        let inventory = Mutex::new(Inventory::new(config.engine.workers, config.control()));
        let folder = config.control().parent().map(Path::to_owned).unwrap_or_default();
        let sessions = OnceLock::new();
        let router = Self { host, overlay, files, directory, sessions, folder, has_device, inventory };
        let configured = config.nic.iter().map(|nic| (nic, Origin::Configured));
        let kept = added.iter().map(|nic| (nic, Origin::Added));
        router.start_nics(configured.chain(kept), config.state())?;
        Ok(router)
    }

    /// Those of the configuration and of earlier. One that the directory refuses is no reason to leave the others without; and those that were here
    /// before are here again though nobody can be asked.
    fn start_nics<'a>(&self, nics: impl Iterator<Item = (&'a NicSettings, Origin)>, state: &Path) -> Result<()> {
        let by = Instant::now() + DIRECTORY_PATIENCE;
        let claimed: Vec<_> = nics.map(|(nic, origin)| (nic, origin, self.claim(nic))).collect();
        for (nic, origin, claim) in claimed {
            if let Some(Err(refused)) = claim.and_then(|claim| claim.recv_timeout(by - Instant::now().min(by)).ok()) {
                log::error!("virtual NIC {:?} is not started: {refused}", nic.name);
                self.release(&nic.name);
                if origin == Origin::Added {
                    self.inventory().set_aside(nic.clone());
                }
                continue;
            }
            let mut inventory = self.inventory();
            let started = self.check(&inventory, nic).and_then(|_| self.start_nic(&mut inventory, nic, origin));
            match origin {
                Origin::Configured => started?,
                Origin::Added => started.with_context(|| {
                    format!("{} keeps virtual NIC {:?}, which was added", state.display(), nic.name)
                })?,
            };
        }
        Ok(())
    }

    /// Adds a virtual NIC, and sees to it that it is there after a restart. One that is there already and is the same is left alone.
    ///
    /// # Errors
    /// When it is not possible beside the others, or the system has no room for it: nothing has changed then.
    pub fn add(&self, nic: NewNic) -> Result<Added> {
        let nic = nic.settle(&self.folder);
        let mut inventory = self.inventory();
        let created = self.check(&inventory, &nic)?.is_none();
        if created {
            self.create(&mut inventory, &nic)?;
        }
        Ok(Added { name: nic.name, socket: nic.socket, created })
    }

    fn create(&self, inventory: &mut Inventory, nic: &NicSettings) -> Result<()> {
        let undo = |_: &anyhow::Error| self.release(&nic.name);
        self.claim_now(nic).inspect_err(undo)?;
        let id = self.start_nic(inventory, nic, Origin::Added).inspect_err(undo)?;
        self.save(inventory).inspect_err(|_| {
            inventory.remove(id);
            self.stop_nic(id, &nic.name);
        })
    }

    /// Removes a virtual NIC that was added: its VMM is disconnected, everything of its guest is freed.
    ///
    /// # Errors
    /// When it comes from the configuration, or what is kept for a restart cannot be written: nothing has changed then.
    pub fn remove(&self, name: String) -> Result<Removed> {
        let (id, aside) = self.change(|inventory| {
            let id = inventory.removable(&name)?;
            id.and_then(|id| inventory.remove(id));
            Ok((id, inventory.forget_aside(&name)))
        })?;
        if let Some(id) = id {
            self.stop_nic(id, &name);
            log::info!("virtual NIC {name} is removed");
        }
        Ok(Removed { name, removed: id.is_some() || aside })
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

    /// Whether it can come; `Some` if it is there already.
    fn check(&self, inventory: &Inventory, settings: &NicSettings) -> Result<Option<NicId>> {
        ensure!(
            self.has_device || settings.path != PathChoice::Nic,
            "virtual NIC {:?} is to use the host's RDMA NIC (path = \"nic\"), and there is none: start it with --rdma-device",
            settings.name
        );
        Ok(inventory.check(settings)?)
    }

    fn start_nic(&self, inventory: &mut Inventory, settings: &NicSettings, origin: Origin) -> Result<NicId> {
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
        Ok(id)
    }

    fn stop_nic(&self, id: NicId, name: &str) {
        // Nobody finds it any more, and then nobody uses it any more, and then somebody else may have its addresses.
        self.overlay.remove(id);
        self.host.remove_nic(id);
        self.release(name);
    }

    fn claim(&self, nic: &NicSettings) -> Option<Receiver<Result<(), Refused>>> {
        self.directory.as_ref().map(|directory| directory.claim(Claim::of(nic)))
    }

    /// Has the directory's word that its addresses are this host's.
    fn claim_now(&self, nic: &NicSettings) -> Result<()> {
        let Some(claim) = self.claim(nic) else { return Ok(()) };
        let answer = claim.recv_timeout(DIRECTORY_PATIENCE);
        answer.with_context(|| {
            let seconds = DIRECTORY_PATIENCE.as_secs();
            format!(
                "the directory has not said within {seconds} s whether its addresses are free (see: freeflow directory)"
            )
        })??;
        Ok(())
    }

    fn release(&self, name: &str) {
        let Some(directory) = &self.directory else { return };
        if directory.release(name).recv_timeout(DIRECTORY_PATIENCE).is_err() {
            log::warn!("the directory does not answer: addresses of virtual NIC {name:?} are free when it does");
        }
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

    /// What the directory has of a tenant, or of all; `None` without other hosts.
    pub fn directory(&self, tenant: Option<&str>) -> Option<View> {
        self.directory.as_ref().map(|directory| View::of(directory.as_ref(), tenant))
    }

    /// Sessions with other hosts begin, and this is where their state is seen.
    pub fn has_sessions(&self, board: Arc<Board>) {
        // There is one set of sessions in a router's life.
        let _ = self.sessions.set(board);
    }

    /// State of sessions; `None` without other hosts.
    pub fn sessions(&self) -> Option<&Board> {
        self.sessions.get().map(|board| &**board)
    }

    /// How the directory is doing; `None` without other hosts.
    pub fn directory_status(&self) -> Option<Status> {
        self.directory.as_deref().map(Status::of)
    }

    /// Data-path workers.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        self.host.workers()
    }

    /// Disconnects every VMM, frees everything and removes the sockets.
    pub fn stop(&self) {
        self.host.stop();
    }
}

/// How long the directory may take.
const DIRECTORY_PATIENCE: Duration = Duration::from_secs(5);

/// What fails when the state cannot be saved.
const CANNOT_KEEP: &str = "cannot keep the virtual NICs for the next start (--state FILE names another file)";

fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        log::debug!("cannot remove {}: {error}", path.display());
    }
}
