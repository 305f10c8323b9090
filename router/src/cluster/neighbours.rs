//! Other hosts in the daemon's life: what has to be had before privileges are given up, sessions once there is a router, and other certificates when the
//! operator says so.

use std::net::TcpListener;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::directory::Directory;
use super::service::{Setup, listen, new_epoch};
use super::session::{Limits, Me};
use super::tls::Tls;
use super::{Cluster, ClusterSettings, DataPath, HostName, certificates};
use crate::config::Config;
use crate::files::{Direct, Files};
use crate::router::Router;

/// Data connections of each link.
const LANES: u16 = 2;

/// Ready for sessions.
#[derive(Debug)]
pub struct Neighbours {
    settings: ClusterSettings,
    name: HostName,
    listener: TcpListener,
    tls: Tls,
}

impl Neighbours {
    /// Listens, and reads the certificates, which others than the user to come may own.
    ///
    /// # Errors
    /// When that is not possible.
    pub fn prepare(settings: &ClusterSettings, files: &Direct) -> Result<Self> {
        let name = settings.name().context("[cluster] name = NAME gives this host one that can be used")?;
        let tls = certificates::read(settings, &name, files)?;
        Ok(Self { settings: settings.clone(), name, listener: listen(settings)?, tls })
    }

    /// Begins sessions with the hosts of `directory`, for the data path of `router`.
    ///
    /// # Errors
    /// When the system gives no thread or descriptors.
    pub fn meet(self, config: &Config, router: &Arc<Router>, directory: Arc<dyn Directory>) -> Result<Met> {
        let Self { settings, name, listener, tls } = self;
        let workers = u16::try_from(config.engine.workers).unwrap_or(u16::MAX);
        let me = Me { name: name.clone(), epoch: new_epoch(), workers, lanes: LANES };
        let setup = Setup {
            me,
            limits: Limits::new(settings.dead_after),
            listener,
            tls,
            directory,
            carrier: Arc::new(DataPath::new(router.clone())),
            tenants: router.addresses().announced(),
        };
        let cluster = Cluster::start(setup).context("cannot begin sessions with other hosts")?;
        router.has_sessions(cluster.board());
        log::info!("this is host {name}; others connect to {}; look with: freeflow hosts", settings.listen);
        Ok(Met { settings, name, cluster })
    }
}

/// There are sessions, or will be.
#[derive(Debug)]
pub struct Met {
    settings: ClusterSettings,
    name: HostName,
    cluster: Cluster,
}

impl Met {
    /// Reads the certificates again, for sessions from now on. Where that does not work, those of before hold.
    pub fn reload(&self, files: &dyn Files) {
        match certificates::read(&self.settings, &self.name, files) {
            Ok(tls) => {
                self.cluster.set_tls(tls);
                log::info!("the certificates were read again, and are used for new sessions");
            }
            Err(error) => log::error!("the certificates of before are used: {error:#}"),
        }
    }
}
