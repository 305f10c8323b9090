//! Several hosts in one process, without sessions: their routers know of each other what sessions would tell them.

use std::collections::HashMap;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use freeflow_backend::tcp::{Conn, HostId, Ticket};
use freeflow_backend::{Dialer, Gid, PeerId, Peering};
use freeflow_router::Router;
use freeflow_router::overlay::Elsewhere;
use freeflow_tcp::frame::{Frame, MAX_HEADER, Packet};
use freeflow_tcp::{Limits, Nanos};

use crate::relay::Relay;

/// Connections of each link.
const LANES: u16 = 2;

/// Routers that reach each other over loopback. They leave each other when it is dropped.
#[derive(Debug)]
pub struct Mesh {
    routers: Vec<Arc<Router>>,
    doors: Vec<Door>,
    cutter: Option<Cutter>,
    /// In front of the doors.
    relays: Vec<Relay>,
}

/// What connections between hosts are like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// As those of this machine.
    Good,
    /// They break all the time, and are made again.
    Cut,
    /// They are slow, and now and then nothing comes for a while.
    Bad,
}

/// Where a host takes connections.
#[derive(Debug)]
struct Door {
    at: SocketAddr,
    /// The link that a ticket is for.
    tickets: Arc<Mutex<HashMap<Ticket, (PeerId, u16)>>>,
    /// Connections, to be cut. Those that are not to be are not kept: the peer would not see that they are closed.
    streams: Option<Streams>,
    thread: Option<JoinHandle<()>>,
}

type Streams = Arc<Mutex<Vec<TcpStream>>>;

/// Breaks connections, one after the other.
#[derive(Debug)]
struct Cutter {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    thread: JoinHandle<()>,
}

impl Cutter {
    fn start(streams: Vec<Streams>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let count = Arc::new(AtomicUsize::new(0));
        let cuts = count.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(rand::random_range(5..150)));
                let mut streams = streams[rand::random_range(0..streams.len())].lock().unwrap();
                if !streams.is_empty() {
                    let index = rand::random_range(0..streams.len());
                    // It may have ended before.
                    let cut = streams.swap_remove(index).shutdown(Shutdown::Both).is_ok();
                    cuts.fetch_add(cut.into(), Ordering::Relaxed);
                }
            }
        });
        Self { stop, count, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("connections were cut");
    }
}

/// What a host is called among hosts.
pub fn host_id(host: usize) -> HostId {
    [host as u8 + 1; 16]
}

/// What each router calls the others.
fn peer_id(host: usize) -> PeerId {
    PeerId(host as u32)
}

impl Mesh {
    /// Has all routers join each other.
    pub fn join(routers: Vec<Arc<Router>>, network: Network) -> Self {
        let open = |router| Door::open(router, network == Network::Cut).expect("a port on loopback");
        let doors: Vec<_> = routers.iter().map(open).collect();
        let streams: Vec<_> = doors.iter().filter_map(|door| door.streams.clone()).collect();
        let cutter = (!streams.is_empty()).then(|| Cutter::start(streams));
        let relayed = doors.iter().filter(|_| network == Network::Bad);
        let relays = relayed.map(|door| Relay::to(door.at).expect("a port on loopback")).collect();
        let mesh = Self { routers, doors, cutter, relays };
        for host in 0..mesh.routers.len() {
            mesh.tell_addresses(host);
            for other in host + 1..mesh.routers.len() {
                mesh.pair(host, other);
            }
        }
        mesh
    }

    /// Connections that were broken so far.
    pub fn cuts(&self) -> usize {
        self.cutter.as_ref().map_or(0, |cutter| cutter.count.load(Ordering::Relaxed))
    }

    /// Pieces of what was sent that were late as if they had been lost on the way, so far.
    pub fn losses(&self) -> usize {
        self.relays.iter().map(Relay::losses).sum()
    }

    /// Where others reach a host.
    fn way_to(&self, host: usize) -> SocketAddr {
        self.relays.get(host).map_or(self.doors[host].at, Relay::at)
    }

    /// One host loses another, which knows nothing of it.
    pub fn leave(&self, host: usize, other: usize) {
        self.routers[host].host().leave(peer_id(other));
    }

    /// Where a host takes connections, and a ticket for one from another.
    pub fn door_of(&self, host: usize, from: usize) -> (SocketAddr, Ticket) {
        let door = &self.doors[host];
        let tickets = door.tickets.lock().unwrap();
        let ticket = tickets.iter().find(|(_, link)| **link == (peer_id(from), 0)).map(|(ticket, _)| *ticket);
        (door.at, ticket.expect("the two have joined"))
    }

    fn tell_addresses(&self, host: usize) {
        let mut elsewhere = Elsewhere::new();
        for (other, router) in self.routers.iter().enumerate().filter(|(other, _)| *other != host) {
            for nic in router.nics() {
                let config = nic.config;
                let gids = config.addresses.iter().map(|&ip| Gid::of(ip)).chain([Gid::link_local(config.mac.0)]);
                elsewhere.entry(config.tenant).or_default().extend(gids.map(|gid| (gid, peer_id(other))));
            }
        }
        self.routers[host].addresses().set_elsewhere(elsewhere);
    }

    /// Has two hosts join each other, the first time or once more; the first one makes connections.
    pub fn pair(&self, one: usize, other: usize) {
        let links = self.routers[one].host().num_workers().max(self.routers[other].host().num_workers());
        let tickets: Vec<Ticket> = (0..links).map(|_| rand::random()).collect();
        for (host, peer) in [(one, other), (other, one)] {
            let router = &self.routers[host];
            router.addresses().set_numbers_of(peer_id(peer), Some(self.routers[peer].addresses().numbers()));
            router.host().join(Peering {
                peer: peer_id(peer),
                name: format!("host{peer}").into(),
                theirs: host_id(peer),
                ours: host_id(host),
                dials: host == one,
                epoch: rand::random(),
                lanes: LANES,
                limits: patient(),
                tickets: tickets.clone(),
                dialer: Arc::new(Caller { router: Arc::downgrade(router), at: self.way_to(peer) }),
            });
            // After that: a connection that comes before its link is there would be kept open here and answered by nobody.
            let named = tickets.iter().enumerate().map(|(link, ticket)| (*ticket, (peer_id(peer), link as u16)));
            self.doors[host].tickets.lock().unwrap().extend(named);
        }
    }
}

/// Debug builds on a busy machine must not look like dead hosts.
fn patient() -> Limits {
    Limits { silence: Nanos::from_millis(30_000), ..Limits::default() }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if let Some(cutter) = self.cutter.take() {
            cutter.stop();
        }
        for (host, router) in self.routers.iter().enumerate() {
            let others = (0..self.routers.len()).filter(|other| *other != host);
            others.for_each(|other| router.host().leave(peer_id(other)));
        }
        self.relays.clear();
        self.doors.iter_mut().for_each(Door::close);
    }
}

impl Door {
    fn open(router: &Arc<Router>, cut: bool) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let at = listener.local_addr()?;
        let tickets = Arc::<Mutex<HashMap<_, _>>>::default();
        let (known, router) = (tickets.clone(), Arc::downgrade(router));
        let streams = cut.then(Streams::default);
        let made = streams.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Some(router) = router.upgrade() else { return };
                let Ok((stream, first, ticket)) = stream.and_then(greeting) else { return };
                let link = known.lock().unwrap().get(&ticket).copied();
                if let Some((peer, link)) = link {
                    if let Some(made) = &made {
                        made.lock().unwrap().extend(stream.try_clone());
                    }
                    router.host().accepted(peer, link, stream, first);
                }
            }
        });
        Ok(Self { at, tickets, streams, thread: Some(thread) })
    }

    /// A connection that says nothing ends its thread.
    fn close(&mut self) {
        drop(TcpStream::connect(self.at));
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the door closes");
        }
    }
}

/// The first frame of a connection, and its ticket.
///
/// # Errors
/// When that does not come.
pub fn greeting(mut stream: TcpStream) -> io::Result<(TcpStream, Vec<u8>, Ticket)> {
    let mut first = vec![0; MAX_HEADER];
    stream.read_exact(&mut first)?;
    match Packet::parse(&first) {
        Ok(Some((Packet { frame: Frame::Hello(hello), .. }, _))) => Ok((stream, first, hello.ticket)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Makes connections to one host.
#[derive(Debug)]
struct Caller {
    router: Weak<Router>,
    at: SocketAddr,
}

impl Dialer for Caller {
    fn dial(&self, peer: PeerId, link: u16, conn: Conn) {
        let (router, at) = (self.router.clone(), self.at);
        std::thread::spawn(move || {
            let made = TcpStream::connect(at);
            if let Some(router) = router.upgrade() {
                router.host().dialed(peer, link, conn, made);
            }
        });
    }
}
