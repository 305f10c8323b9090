//! The daemon's life, from a checked configuration to its end by a signal.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::api;
use crate::config::Config;
use crate::router::Router;
use crate::sandbox::Sandbox;

/// Serves the virtual NICs of `config` until SIGINT or SIGTERM. Privileges that it does not need are given up on the way, and do not
/// come back: this is for a process of its own.
///
/// # Errors
/// When something is wrong with the configuration, or the system does not give what it asks for.
pub fn run(config: &Config) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot wait for signals")?;
    let sandbox = Sandbox::new(&config.security)?;
    sandbox.enter(&make_folders(config)?)?;
    let router = Arc::new(Router::start(config)?);
    let api = api::Server::start(config.control(), router.clone())?;
    sandbox.seal()?;
    log::info!(
        "serving {} virtual NIC{}; look with: freeflow --control {} nics",
        config.nic.len(),
        if config.nic.len() == 1 { "" } else { "s" },
        config.control().display()
    );
    signals.forever().next();
    log::info!("stopping");
    drop(api);
    router.stop();
    Ok(())
}

/// Makes the folders that sockets go into; those that were not there before are returned.
fn make_folders(config: &Config) -> Result<Vec<PathBuf>> {
    let sockets = config.nic.iter().map(|nic| nic.socket.as_path()).chain([config.control()]);
    let mut made = Vec::new();
    for folder in sockets.filter_map(Path::parent).filter(|folder| !folder.as_os_str().is_empty()) {
        if !folder.exists() {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
            made.push(folder.to_owned());
        }
    }
    Ok(made)
}
