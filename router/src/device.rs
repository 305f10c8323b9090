//! The host's RDMA NIC, if it is to be used.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use freeflow_backend::PathChoice;
use freeflow_backend::verbs::{Device, DeviceChoice};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::{Config, NicSettings};

/// Less than this holds no guest's memory.
const LEAST_LOCKED: u64 = 64 << 20;

/// A NIC that is to be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Which.
    choice: DeviceChoice,
    /// Who says so, for people.
    by: String,
}

/// Which NIC is to be used, if any: the one that is named, or any if a virtual NIC needs one.
pub fn wanted(config: &Config, added: &[NicSettings]) -> Option<Wanted> {
    if let Some(choice) = &config.rdma_device {
        return Some(Wanted {
            choice: choice.clone(),
            by: format!("--rdma-device {choice} (rdma-device in the file)"),
        });
    }
    let nic = config.nic.iter().chain(added).find(|nic| nic.path == PathChoice::Nic)?;
    Some(Wanted { choice: DeviceChoice::Auto, by: format!("virtual NIC {:?} (path = \"nic\")", nic.name) })
}

/// Does what needs privileges that are given up later: guests' memory that the NIC reaches is locked, and that is limited.
///
/// # Errors
/// When so little may be locked that no guest would get far.
pub fn prepare(wanted: Option<&Wanted>) -> Result<()> {
    let Some(Wanted { by, .. }) = wanted else { return Ok(()) };
    let limit = getrlimit(Resource::Memlock);
    if limit.current.is_none() || setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }).is_ok() {
        return Ok(());
    }
    let Some(bytes) = limit.maximum else { return Ok(()) };
    setrlimit(Resource::Memlock, Rlimit { current: Some(bytes), maximum: Some(bytes) })?;
    ensure!(
        bytes >= LEAST_LOCKED,
        "{by} wants the host's RDMA NIC, which locks guests' memory, and this process may lock no more than {} KiB: raise \
         RLIMIT_MEMLOCK (LimitMEMLOCK=infinity in a systemd unit, ulimit -l unlimited in a shell)",
        bytes >> 10
    );
    log::warn!("no more than {} MiB of guests' memory can be locked for the host's NIC (RLIMIT_MEMLOCK)", bytes >> 20);
    Ok(())
}

/// Opens it.
///
/// # Errors
/// When there is none that can be used.
pub fn open(wanted: Option<&Wanted>) -> Result<Option<Arc<dyn Device>>> {
    let Some(Wanted { choice, by }) = wanted else { return Ok(None) };
    let device = find(choice).with_context(|| format!("{by} wants the host's RDMA NIC"))?;
    log::info!("the host's RDMA NIC: {}, GID {}", device.name(), device.gid());
    Ok(Some(device))
}

#[cfg(feature = "rdma")]
fn find(choice: &DeviceChoice) -> Result<Arc<dyn Device>> {
    Ok(Arc::new(freeflow_backend::verbs::host::HostNic::open(choice)?))
}

#[cfg(not(feature = "rdma"))]
fn find(_: &DeviceChoice) -> Result<Arc<dyn Device>> {
    anyhow::bail!("this freeflow-router was built without (cargo feature rdma)")
}
