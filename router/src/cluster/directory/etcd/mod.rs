//! The directory in etcd: every host says there where it is and which addresses it has, and hears what others say.
//!
//! What to do is decided without I/O, by the [mirror] for what is heard and by the [registrar] for what is said; a task of each does it through
//! [client] (`listen.rs`, `speak.rs`). While etcd is away what is known is served, and what is to be said waits.

mod client;
mod listen;
mod mirror;
mod record;
mod registrar;
#[cfg(test)]
mod sim;
mod speak;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Board, Claim, Directory, Health, Known, Refused};
use crate::cluster::HostName;
use crate::cluster::settings::EtcdSettings;

pub use self::client::Connector;

use self::client::{Cause, Link};
use self::listen::listen;
use self::mirror::Mirror;
use self::record::Prefix;
use self::registrar::Registrar;
use self::speak::{Order, Speaker};

/// How long the end of the router waits for etcd.
const FAREWELL: Duration = Duration::from_secs(1);

/// The directory in etcd.
#[derive(Debug)]
pub struct Etcd {
    endpoints: String,
    board: Arc<Board>,
    /// Dropped to end the registrar.
    orders: Option<UnboundedSender<Order>>,
    registrar: Option<JoinHandle<()>>,
    runtime: Option<Runtime>,
}

impl Etcd {
    /// Begins to look at etcd, and to say there that `host` is at `address`. It need not be there yet.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub fn start(settings: &EtcdSettings, connector: &Connector, host: HostName, address: SocketAddr) -> Result<Self> {
        let prefix = Prefix::new(&settings.prefix);
        let board = Arc::new(Board::new(Known::default()));
        let mut builder = Builder::new_multi_thread();
        let runtime = builder
            .worker_threads(1)
            .thread_name("etcd")
            .enable_all()
            .build()
            .context("cannot start threads for etcd")?;
        let link = || Link::new(connector.clone(), prefix.clone());
        runtime.spawn(listen(Mirror::new(prefix.clone(), settings.ttl), link(), board.clone()));
        let (orders, receiver) = unbounded_channel();
        let speaker =
            Speaker::new(Registrar::new(prefix.clone(), host, address, settings.ttl), link(), receiver, board.clone());
        let registrar = runtime.spawn(speaker.run());
        let endpoints = settings.endpoints.join(", ");
        Ok(Self { endpoints, board, orders: Some(orders), registrar: Some(registrar), runtime: Some(runtime) })
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.orders = None;
        let (Some(runtime), Some(registrar)) = (self.runtime.take(), self.registrar.take()) else { return };
        let farewell = runtime.block_on(async { tokio::time::timeout(FAREWELL, registrar).await });
        if farewell.is_err() {
            log::warn!(
                "etcd cannot be told that this host goes, and keeps it until its lease ends: it does not answer"
            );
        }
        runtime.shutdown_timeout(FAREWELL);
    }
}

impl Directory for Etcd {
    fn snapshot(&self) -> Arc<Known> {
        self.board.snapshot()
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.board.changed()
    }

    fn health(&self) -> Health {
        self.board.health()
    }

    fn claim(&self, claim: Claim) -> Receiver<Result<(), Refused>> {
        let (answer, receiver) = sync_channel(1);
        self.order(Order::Claim(claim, answer));
        receiver
    }

    fn release(&self, nic: &str) -> Receiver<()> {
        let (answer, receiver) = sync_channel(1);
        self.order(Order::Release(nic.into(), answer));
        receiver
    }

    fn source(&self) -> String {
        format!("etcd at {}", self.endpoints)
    }
}

impl Etcd {
    fn order(&self, order: Order) {
        // Nobody listens once it has ended; then nobody answers, which who asks will notice.
        let _ = self.orders.as_ref().map(|orders| orders.send(order));
    }
}

/// Failures in a row, of which the first is for the log, and their end.
#[derive(Debug)]
struct Trouble {
    /// What cannot be done meanwhile.
    what: &'static str,
    since: Option<Instant>,
}

impl Trouble {
    fn new(what: &'static str) -> Self {
        Self { what, since: None }
    }

    fn failed(&mut self, cause: &Cause) {
        if self.since.is_none() {
            let mut causes = cause.to_string();
            let mut source = cause.source();
            while let Some(error) = source {
                causes = format!("{causes}: {error}");
                source = error.source();
            }
            log::warn!("etcd: {}: {causes}", self.what);
            self.since = Some(Instant::now());
        }
    }

    fn over(&mut self) {
        if let Some(since) = self.since.take() {
            log::info!("etcd is back after {:.1} s (it was: {})", since.elapsed().as_secs_f32(), self.what);
        }
    }
}
