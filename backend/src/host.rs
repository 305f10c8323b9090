//! The device side of one host: the engine and its virtual NICs. This is what the router drives.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use virtio_rdma::config::NUM_CTRL_QUEUES;
use virtio_rdma::ib::QpState;

use crate::engine::{Engine, EngineConfig, Spent};
use crate::nic::meters::PathFigures;
use crate::nic::stats::CounterValues;
use crate::nic::{Nic, NicConfig, PathChoice};
use crate::overlay::{Gid, NicId, Overlay};
use crate::profile::BadLimit;
use crate::qp::{Qp, SendQueue};
use crate::rate::Rates;
use crate::tcp::{Conn, PeerId, Peering};
use crate::verbs::Device;
use crate::vhost::aio::Signaller;
use crate::vhost::server::Server;
use crate::vhost::socket::Socket;
use crate::vhost::vring::Vring;

/// Why a virtual NIC could not be added.
#[derive(Debug, thiserror::Error)]
pub enum AddNicError {
    /// Its limits are not possible.
    #[error(transparent)]
    Limit(#[from] BadLimit),
    /// Number of vectors or workers.
    #[error("{0}")]
    Config(&'static str),
    /// The system gives no thread or descriptors for it.
    #[error("cannot serve it")]
    System(#[from] io::Error),
}

/// Virtual NICs of this host and the engine that serves them.
#[derive(Debug)]
pub struct Host {
    engine: Arc<Engine>,
    servers: Mutex<BTreeMap<NicId, (Arc<Nic>, Server)>>,
}

impl Host {
    /// Starts the engine, without virtual NICs; with the host's NIC, if there is one to use.
    ///
    /// # Errors
    /// When the system gives no threads or descriptors.
    pub fn start(config: EngineConfig, overlay: Arc<dyn Overlay>, device: Option<Arc<dyn Device>>) -> io::Result<Self> {
        // Without it no guest could be interrupted: better said now than to each VMM.
        Signaller::get()?;
        let engine = Engine::start(config, overlay, device)?;
        Ok(Self { engine, servers: Mutex::default() })
    }

    /// Adds a virtual NIC and waits for its VMM on `socket`.
    ///
    /// # Errors
    /// When its configuration is not possible, or the system has no room for it. The file of `socket` is left to the caller then.
    pub fn add_nic(&self, id: NicId, config: NicConfig, socket: Socket) -> Result<(), AddNicError> {
        config.profile.check()?;
        let workers = usize::from(config.num_workers);
        let vectors = usize::from(config.num_vectors);
        if workers == 0 || workers > self.engine.num_workers() {
            return Err(AddNicError::Config("a virtual NIC uses at least one worker, and no more than there are"));
        }
        if vectors == 0 || NUM_CTRL_QUEUES + vectors + workers > 64 {
            return Err(AddNicError::Config("a virtual NIC has 1 to 62 completion vectors"));
        }
        let count = NUM_CTRL_QUEUES + vectors + workers;
        let vrings: Vec<_> = (0..count).map(|_| Arc::new(Mutex::new(Vring::new()))).collect();
        let first = id.0 as usize;
        let served_by: Vec<_> = (0..workers).map(|w| (first + w) % self.engine.num_workers()).collect();
        let events = vrings.iter().skip(NUM_CTRL_QUEUES).take(vectors).cloned().collect();
        let groups = self.engine.tenants().groups(&config.tenant);
        let nic = Arc::new(Nic::new(id, config, groups, &served_by, events));
        let server = Server::start(socket, nic.clone(), self.engine.clone(), vrings)?;
        self.engine.add_nic(&nic);
        self.servers.lock().insert(id, (nic, server));
        Ok(())
    }

    /// Removes a virtual NIC: its VMM is disconnected, everything of its guest is freed. False if there is none.
    pub fn remove_nic(&self, id: NicId) -> bool {
        let Some((_, mut server)) = self.servers.lock().remove(&id) else {
            return false;
        };
        server.stop();
        self.engine.remove_nic(id);
        true
    }

    /// Changes how fast a virtual NIC may be. False if there is none.
    pub fn set_rates(&self, id: NicId, rates: Rates) -> bool {
        let servers = self.servers.lock();
        let Some((nic, _)) = servers.get(&id) else {
            return false;
        };
        nic.pacer.set(rates);
        // Workers that sleep until it may go on.
        self.engine.ports_changed();
        true
    }

    /// Another host can be reached from now on.
    pub fn join(&self, peering: Peering) {
        self.engine.join(peering);
    }

    /// It cannot any more: whatever waits for it fails.
    pub fn leave(&self, peer: PeerId) {
        self.engine.leave(peer);
    }

    /// A connection that was [asked for](crate::Dialer::dial) is there, or could not be made.
    pub fn dialed(&self, peer: PeerId, link: u16, conn: Conn, made: io::Result<TcpStream>) {
        self.engine.dialed(peer, link, conn, made);
    }

    /// A peer has made a connection for this link, and these are its first bytes: the frame with the link's ticket.
    pub fn accepted(&self, peer: PeerId, link: u16, stream: TcpStream, first: Vec<u8>) {
        self.engine.accepted(peer, link, stream, first);
    }

    /// Number of data-path workers: no link has to be for more.
    pub fn num_workers(&self) -> usize {
        self.engine.num_workers()
    }

    /// Removes all virtual NICs and ends the engine.
    pub fn stop(&self) {
        let servers = std::mem::take(&mut *self.servers.lock());
        for (_, server) in servers.values() {
            server.begin_stop();
        }
        for (id, (_, mut server)) in servers {
            server.stop();
            self.engine.remove_nic(id);
        }
        self.engine.stop();
    }

    /// What there is now.
    pub fn nics(&self) -> Vec<NicStatus> {
        self.servers.lock().values().map(|(nic, server)| NicStatus::of(nic, server)).collect()
    }

    /// Queue pairs of all virtual NICs, or of one.
    pub fn qps(&self, only: Option<NicId>) -> Vec<QpStatus> {
        let nics = self.engine.nics();
        let wanted = nics.iter().filter(|nic| only.is_none_or(|id| id == nic.id));
        let mut all: Vec<_> = wanted.flat_map(|nic| qps_of(nic)).collect();
        all.sort_by(|a, b| (&a.nic, a.qpn).cmp(&(&b.nic, b.qpn)));
        all
    }

    /// Data-path workers.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        let each = self.engine.sleeps().into_iter().zip(self.engine.spent());
        let seconds = |(sleeps, spent): (u64, Spent)| WorkerStatus {
            sleeps,
            asleep: spent.asleep.as_secs_f64(),
            awake: spent.awake.as_secs_f64(),
        };
        each.map(seconds).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A virtual NIC at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NicStatus {
    /// Number.
    pub id: NicId,
    /// What it was created with.
    pub config: NicConfig,
    /// Socket for the VMM.
    pub socket: String,
    /// Whether a VMM is connected.
    pub connected: bool,
    /// Whether a driver has set the device up.
    pub running: bool,
    /// GIDs in its table.
    pub gids: Vec<String>,
    /// Objects that exist.
    pub objects: Objects,
    /// Counters.
    pub counters: CounterValues,
    /// What its sends came to, by transport, path and other host.
    pub paths: Vec<PathFigures>,
    /// Receives that failed, by transport and status.
    pub failed_receives: BTreeMap<String, BTreeMap<String, u64>>,
}

/// Numbers of objects.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Objects {
    /// Protection domains.
    pub pds: usize,
    /// Memory regions.
    pub mrs: usize,
    /// Completion queues.
    pub cqs: usize,
    /// Queue pairs.
    pub qps: usize,
    /// Filled entries of the GID table.
    pub gids: usize,
}

impl NicStatus {
    fn of(nic: &Nic, server: &Server) -> Self {
        let (pds, mrs, cqs) = server.counts();
        let gids: Vec<_> = nic.gids.load().iter().map(|(_, gid)| gid.to_string()).collect();
        Self {
            id: nic.id,
            config: NicConfig { rates: nic.pacer.rates(), ..nic.config.clone() },
            socket: server.path().display().to_string(),
            connected: server.connected(),
            running: nic.is_running(),
            objects: Objects { pds, mrs, cqs, qps: nic.qps.len(), gids: gids.len() },
            gids,
            counters: nic.counters.values(),
            paths: nic.meters.values(),
            failed_receives: nic.meters.failed_receives(),
        }
    }
}

/// A queue pair at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QpStatus {
    /// Name of its virtual NIC.
    pub nic: String,
    /// Number.
    pub qpn: u32,
    /// Transport: `RC`, `UC`, `UD` or `GSI`.
    pub kind: String,
    /// State.
    pub state: String,
    /// Where it sends to, if it is connected: GID.
    pub remote_gid: Option<String>,
    /// Where it sends to, if it is connected: QP number.
    pub remote_qpn: Option<u32>,
    /// Path in use: `local`, `verbs`, `tcp`, or nothing while the peer has not been looked for.
    pub path: Option<String>,
    /// Why that one.
    pub why: Option<String>,
    /// Work requests completed.
    pub completed: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// What it waits for, if it does.
    pub waiting: Option<String>,
    /// Work requests that its worker has seen and not completed.
    pub sends: u32,
    /// Receives, not those of an SRQ, that workers have seen and not used.
    pub receives: u32,
    /// It waits for its turn.
    pub scheduled: bool,
}

/// What a worker did with its time, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// How many times it has slept.
    pub sleeps: u64,
    /// It slept.
    pub asleep: f64,
    /// It worked, or looked for work.
    pub awake: f64,
}

/// Whether it reaches its peer on another host from NIC to NIC.
fn is_between_nics(send: &SendQueue) -> bool {
    send.nic.as_ref().is_some_and(|queue| queue.between.is_some() && queue.apart.is_none())
}

fn path_of(send: &SendQueue) -> Option<String> {
    if is_between_nics(send) {
        return Some("verbs".to_owned());
    }
    if send.remote.is_some() {
        return Some("tcp".to_owned());
    }
    let over_nic = send.nic.as_ref().is_some_and(|queue| queue.peer.is_some());
    let path = if over_nic { "verbs" } else { "local" };
    send.binding.as_ref().map(|_| path.to_owned())
}

fn why_of(nic: &Nic, qp: &Qp, send: &SendQueue) -> Option<String> {
    if let Some(between) = send.nic.as_ref().and_then(|queue| queue.between.as_ref()) {
        let why = send.nic.as_ref().and_then(|queue| queue.apart).unwrap_or("both hosts have a NIC");
        return Some(format!("on another host ({}): {why}", between.pair.host));
    }
    if let Some(remote) = &send.remote {
        return Some(format!("on another host ({}), without a NIC here", remote.host));
    }
    send.binding.as_ref()?;
    Some(match &send.nic {
        _ if nic.config.path == PathChoice::Auto => "on the same host".to_owned(),
        None if qp.id.kind.is_datagram() => "a datagram".to_owned(),
        None => "no queue pair on the host's NIC".to_owned(),
        Some(queue) => match (queue.apart, queue.alone) {
            (Some(why), _) => why.to_owned(),
            (None, 0) => "both are on the host's NIC".to_owned(),
            (None, count) => format!("both are on the host's NIC; not for it were {count} requests"),
        },
    })
}

fn qps_of(nic: &Nic) -> Vec<QpStatus> {
    let qps = nic.qps.all();
    qps.iter().map(|qp| qp_status(nic, qp)).collect()
}

fn qp_status(nic: &Nic, qp: &Qp) -> QpStatus {
    let state = qp.state();
    let attr = qp.attrs.lock().attr;
    let connected = !qp.id.kind.is_datagram() && !matches!(state, QpState::Reset | QpState::Init);
    let send = qp.send.lock();
    QpStatus {
        nic: nic.config.name.clone(),
        qpn: qp.id.qpn,
        kind: format!("{:?}", qp.id.kind).to_uppercase(),
        state: format!("{state:?}").to_uppercase(),
        remote_gid: connected.then(|| Gid(attr.av.dgid).to_string()),
        remote_qpn: connected.then(|| attr.dest_qpn.get()),
        path: path_of(&send),
        why: why_of(nic, qp, &send),
        completed: send.completed,
        bytes: send.bytes,
        waiting: send.wait.map(|w| format!("{:?}", w.kind).to_lowercase()),
        sends: send.depth(),
        receives: qp.recv.lock().depth(),
        scheduled: qp.scheduled.load(Ordering::Relaxed),
    }
}
