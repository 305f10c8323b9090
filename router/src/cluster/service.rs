//! The thread on which sessions live.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot, watch};

use super::dialing::Asking;
use super::directory::Directory;
use super::limited_log::LimitedLog;
use super::node::{News, Node, Shared};
use super::session::TenantNames;
use super::session::{Limits, Me, Random, Sessions};
use super::status::Board;
use super::tickets::Tickets;
use super::tls::Tls;
use super::{Carrier, ClusterSettings, entrance};

/// Events that wait to be looked at.
const WAITING: usize = 64;

/// What sessions need.
#[derive(Debug)]
pub struct Setup {
    /// Who we are.
    pub me: Me,
    /// Times and bounds.
    pub limits: Limits,
    /// Where others connect; see [`listen`].
    pub listener: TcpListener,
    /// Certificates.
    pub tls: Tls,
    /// Which hosts there are.
    pub directory: Arc<dyn Directory>,
    /// The data path.
    pub carrier: Arc<dyn Carrier>,
    /// Tenants of this host.
    pub tenants: watch::Receiver<Arc<TenantNames>>,
}

/// Sessions with all other hosts. Dropping it tells them, and ends everything.
#[derive(Debug)]
pub struct Cluster {
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Listens where other hosts connect. Before privileges are given up: a sealed daemon cannot.
///
/// # Errors
/// When the address cannot be had.
pub fn listen(settings: &ClusterSettings) -> Result<TcpListener> {
    let address: SocketAddr = settings.listen;
    let cannot = || format!("cannot listen on {address} for other hosts ([cluster] listen)");
    let listener = TcpListener::bind(address).with_context(cannot)?;
    listener.set_nonblocking(true).with_context(cannot)?;
    Ok(listener)
}

impl Cluster {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system gives no thread or descriptors.
    pub fn start(setup: Setup) -> io::Result<Self> {
        let Setup { me, limits, listener, tls, directory, carrier, tenants } = setup;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let start = Instant::now();
        let shared = Arc::new(Shared {
            tls: ArcSwap::from_pointee(tls),
            directory,
            carrier,
            tickets: Tickets::default(),
            board: Arc::new(Board::new(start)),
            log: LimitedLog::default(),
        });
        let (events, happening) = mpsc::channel(WAITING);
        let (asking, wanted) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel();
        let (ours, epoch, links) = (me.name.clone(), me.epoch, limits.of_links());
        let node = Node {
            sessions: Sessions::new(me, limits, random()),
            ours,
            epoch,
            links,
            start,
            shared: shared.clone(),
            dialer: Arc::new(Asking(asking)),
            events: events.clone(),
            connections: HashMap::new(),
            names: BTreeMap::new(),
            changed: false,
        };
        let news = News { events: happening, wanted, tenants, stop: stopped };
        let admission = shared.clone();
        let thread = std::thread::Builder::new().name("cluster".to_owned()).spawn(move || {
            runtime.block_on(async move {
                let entrance = tokio::spawn(entrance::serve(listener, admission, events));
                node.run(news).await;
                entrance.abort();
            });
        })?;
        Ok(Self { shared, stop: Some(stop), thread: Some(thread) })
    }

    /// Other certificates, for sessions from now on.
    pub fn set_tls(&self, tls: Tls) {
        self.shared.tls.store(Arc::new(tls));
    }

    /// Where the state of sessions can be seen.
    pub fn board(&self) -> Arc<Board> {
        self.shared.board.clone()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// The kernel's.
fn random() -> Random {
    Box::new(|bytes| {
        let mut rest = bytes;
        while !rest.is_empty() {
            let count = rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty());
            rest = &mut rest[count.expect("the kernel has random numbers")..];
        }
    })
}

/// A number that no other life of any router has.
pub fn new_epoch() -> u64 {
    let mut bytes = [0; 8];
    random()(&mut bytes);
    u64::from_le_bytes(bytes)
}
