//! A running router.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use freeflow_backend::verbs::Device;
use freeflow_backend::{Host, NicId, NicStatus, PathChoice, QpStatus};

use crate::config::{Config, NicSettings};
use crate::overlay::LocalOverlay;

/// The device side of this host with its virtual NICs. Dropping it stops everything.
#[derive(Debug)]
pub struct Router {
    host: Host,
    overlay: Arc<LocalOverlay>,
}

impl Router {
    /// Starts with the virtual NICs of `config`.
    ///
    /// # Errors
    /// When the configuration is wrong, or a socket cannot be made.
    pub fn start(config: &Config) -> Result<Self> {
        Self::start_on(config, None)
    }

    /// The same, on this NIC of the host.
    ///
    /// # Errors
    /// When the configuration is wrong, or a socket cannot be made.
    pub fn start_on(config: &Config, device: Option<Arc<dyn Device>>) -> Result<Self> {
        config.check()?;
        if let (Some(nic), None) = (config.nic.iter().find(|nic| nic.path == PathChoice::Nic), &device) {
            bail!(
                "virtual NIC {:?} is to use the host's RDMA NIC (path = \"nic\"), and there is none to use",
                nic.name
            );
        }
        let overlay = Arc::new(LocalOverlay::default());
        let host =
            Host::start(config.engine.to_engine(), overlay.clone(), device).context("cannot start the data path")?;
        let router = Self { host, overlay };
        for (index, nic) in config.nic.iter().enumerate() {
            router.add(NicId(index as u32), nic)?;
        }
        Ok(router)
    }

    fn add(&self, id: NicId, settings: &NicSettings) -> Result<()> {
        let nic = settings.to_nic();
        make_parent(&settings.socket)?;
        self.overlay.add(id, &nic);
        self.host.add_nic(id, nic, &settings.socket).with_context(|| format!("virtual NIC {:?}", settings.name))?;
        let group_may_connect = Permissions::from_mode(0o660);
        std::fs::set_permissions(&settings.socket, group_may_connect)
            .with_context(|| format!("cannot set the mode of {}", settings.socket.display()))?;
        log::info!("virtual NIC {}: {} for tenant {}", settings.name, settings.socket.display(), settings.tenant);
        Ok(())
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

/// Makes the folder that a socket goes into.
pub(crate) fn make_parent(socket: &Path) -> Result<()> {
    match socket.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))
        }
        _ => Ok(()),
    }
}
