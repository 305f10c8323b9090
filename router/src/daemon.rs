//! The daemon's life, from a checked configuration to its end by a signal.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::api;
use crate::cluster::{Neighbours, directory};
use crate::config::{Config, NicSettings};
use crate::device;
use crate::files::{Direct, Files};
use crate::inventory;
use crate::metrics;
use crate::router::Router;
use crate::sandbox::{Sandbox, Uses};
use crate::steward::Steward;

/// Serves the virtual NICs of `config` until SIGINT or SIGTERM. Privileges that it does not need are given up on the way, and do not
/// come back: this is for a process of its own.
///
/// # Errors
/// When something is wrong with the configuration, or the system does not give what it asks for.
pub fn run(config: &Config) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot wait for signals")?;
    let added = load_added(config)?;
    let nic = device::wanted(config, &added);
    let sandbox = Sandbox::new(&config.security, Uses { nic: nic.is_some(), network: config.cluster.is_some() })?;
    device::prepare(nic.as_ref())?;
    let folders = make_folders(config)?;
    let metrics = config.metrics.map(metrics::listen).transpose()?;
    let files = Direct::of(config);
    let neighbours = config.cluster.as_ref().map(|settings| Neighbours::prepare(settings, &files)).transpose()?;
    let etcd = config.cluster.as_ref().map(directory::prepare).transpose()?.flatten();
    let steward = Steward::start(&config.security, &files)?;
    sandbox.drop_privileges(&folders)?;
    // As the user to come, and with its rights: the kernel takes no commands for a NIC but from whoever opened it.
    let device = device::open(nic.as_ref())?;
    sandbox.enter()?;
    let steward: Arc<dyn Files> = Arc::new(steward);
    let directory =
        config.cluster.as_ref().map(|cluster| directory::open(cluster, etcd, steward.clone())).transpose()?;
    let router = Arc::new(Router::start_with(config, device, steward.clone(), directory.clone(), &added)?);
    let neighbours =
        neighbours.zip(directory).map(|(all, directory)| all.meet(config, &router, directory)).transpose()?;
    let api = api::Server::start(config.control(), router.clone())?;
    let metrics = metrics.map(|listener| metrics::serve(listener, router.clone())).transpose()?;
    sandbox.seal()?;
    log::info!(
        "serving {}; look with: freeflow --control {} nics",
        match router.nics().len() {
            0 => "no virtual NIC yet (freeflow nic add)".to_owned(),
            1 => "1 virtual NIC".to_owned(),
            n => format!("{n} virtual NICs"),
        },
        config.control().display()
    );
    for signal in signals.forever() {
        match (signal, &neighbours) {
            (SIGHUP, Some(neighbours)) => neighbours.reload(&*steward),
            // `systemctl reload` must not take the guests' NICs away.
            (SIGHUP, None) => log::info!("SIGHUP: nothing is read again, since there is no [cluster]"),
            _ => break,
        }
    }
    log::info!("stopping");
    drop((api, metrics, neighbours));
    router.stop();
    Ok(())
}

/// Virtual NICs that were added before the last end. The configuration has the last word on those that it has, too.
fn load_added(config: &Config) -> Result<Vec<NicSettings>> {
    let path = config.state();
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.with_context(|| format!("cannot read the virtual NICs that were added, {}", path.display()))?,
    };
    let mut added = inventory::from_state(&text)
        .with_context(|| format!("{} is not what a router of this version writes", path.display()))?;
    added.retain(|nic| {
        let configured = config.nic.iter().any(|other| other.name == nic.name);
        if configured {
            log::warn!("virtual NIC {:?} was added, and is in the configuration now: that is used", nic.name);
        }
        !configured
    });
    Ok(added)
}

/// Makes the folders that sockets go into; those that were not there before are returned.
fn make_folders(config: &Config) -> Result<Vec<PathBuf>> {
    let sockets = config.nic.iter().map(|nic| nic.socket.as_path()).chain([config.control()]);
    let mut made = Vec::new();
    // Whether it can be made matters only if a virtual NIC is added.
    if let Some(folder) = config.state().parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.exists())
        && std::fs::create_dir_all(folder).is_ok()
    {
        made.push(folder.to_owned());
    }
    for folder in sockets.filter_map(Path::parent).filter(|folder| !folder.as_os_str().is_empty()) {
        if !folder.exists() {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
            made.push(folder.to_owned());
        }
    }
    Ok(made)
}
