//! Sessions between routers over real TLS on the loopback, and what a hostile network can do to the port.
#![allow(missing_docs, reason = "a test program")]

#[path = "common/authority.rs"]
mod authority;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use authority::{Authority, Certificate};
use freeflow_backend::PeerId;
use freeflow_backend::tcp::{Conn, Peering};
use freeflow_router::cluster::directory::{Board, Claim, Directory, Health, Known, Refused};
use freeflow_router::cluster::service::{Setup, new_epoch};
use freeflow_router::cluster::session::wire::{Hello, Incoming, Message};
use freeflow_router::cluster::session::{Limits, Me, TenantNames};
use freeflow_router::cluster::status::{HostState, HostStatus};
use freeflow_router::cluster::tls::{Pem, Tls};
use freeflow_router::cluster::{Carrier, Cluster, HostName};
use freeflow_tcp::frame::{Frame, Hello as DataHello, MAX_HEADER, Packet};
use freeflow_tests::bed::eventually;
use tokio::sync::watch;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

const SOON: Duration = Duration::from_secs(10);
const DEAD_AFTER: Duration = Duration::from_millis(900);

/// A directory that the test writes itself.
#[derive(Debug)]
struct Hosts(Board);

impl Hosts {
    fn new(hosts: &[(&str, SocketAddr)]) -> Arc<Self> {
        Arc::new(Self(Board::new(known(hosts))))
    }

    fn set(&self, hosts: &[(&str, SocketAddr)]) {
        self.0.post(known(hosts));
    }
}

fn known(hosts: &[(&str, SocketAddr)]) -> Known {
    let mut known = Known::default();
    for (name, address) in hosts {
        known.set_host(name.parse().unwrap(), *address);
    }
    known
}

impl Directory for Hosts {
    fn snapshot(&self) -> Arc<Known> {
        self.0.snapshot()
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.0.changed()
    }

    fn health(&self) -> Health {
        self.0.health()
    }

    fn claim(&self, _: Claim) -> Receiver<Result<(), Refused>> {
        unreachable!("sessions claim nothing")
    }

    fn release(&self, _: &str) -> Receiver<()> {
        unreachable!("sessions claim nothing")
    }

    fn source(&self) -> String {
        "a test".to_owned()
    }
}

/// A data path that remembers what it was told.
#[derive(Debug, Default)]
struct Remembers(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    joined: BTreeMap<u32, (Peering, String)>,
    joins: usize,
    hosts: usize,
    tenants: BTreeMap<u32, TenantNames>,
    dialed: Vec<(PeerId, u16, Conn, io::Result<TcpStream>)>,
    accepted: Vec<(PeerId, u16, TcpStream, Vec<u8>)>,
}

impl Carrier for Remembers {
    fn known(&self, known: Arc<Known>) {
        self.0.lock().unwrap().hosts = known.hosts().count();
    }

    fn join(&self, peering: Peering, name: &HostName) {
        let mut told = self.0.lock().unwrap();
        told.joins += 1;
        told.joined.insert(peering.peer.0, (peering, name.to_string()));
    }

    fn leave(&self, peer: PeerId) {
        let mut told = self.0.lock().unwrap();
        told.joined.remove(&peer.0).expect("it has joined");
        told.tenants.remove(&peer.0);
    }

    fn tenants(&self, peer: PeerId, names: TenantNames) {
        self.0.lock().unwrap().tenants.insert(peer.0, names);
    }

    fn dialed(&self, peer: PeerId, link: u16, conn: Conn, made: io::Result<TcpStream>) {
        self.0.lock().unwrap().dialed.push((peer, link, conn, made));
    }

    fn accepted(&self, peer: PeerId, link: u16, stream: TcpStream, first: Vec<u8>) {
        self.0.lock().unwrap().accepted.push((peer, link, stream, first));
    }
}

struct Node {
    cluster: Cluster,
    carrier: Arc<Remembers>,
    tenants: watch::Sender<Arc<TenantNames>>,
}

fn tls(name: &str, authority: &Authority, certificate: &Certificate) -> Tls {
    let pem = |path: &'static str, text: &'static str| Pem { path: Path::new(path), text: text.as_bytes() };
    let leak = |text: &str| -> &'static str { Box::leak(text.to_owned().into_boxed_str()) };
    let (ca, cert, key) = (leak(&authority.pem), leak(&certificate.cert), leak(&certificate.key));
    Tls::new(&name.parse().unwrap(), pem("ca.pem", ca), pem("cert.pem", cert), pem("key.pem", key)).unwrap()
}

fn port() -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

impl Node {
    fn start(name: &str, workers: u16, listener: TcpListener, tls: Tls, directory: &Arc<Hosts>) -> Self {
        let (carrier, tenants) = (Arc::new(Remembers::default()), watch::Sender::new(Arc::default()));
        let me = Me { name: name.parse().unwrap(), epoch: new_epoch(), workers, lanes: 2 };
        let setup = Setup {
            me,
            limits: Limits::new(DEAD_AFTER),
            listener,
            tls,
            directory: directory.clone(),
            carrier: carrier.clone(),
            tenants: tenants.subscribe(),
        };
        Self { cluster: Cluster::start(setup).unwrap(), carrier, tenants }
    }

    fn host(&self, name: &str) -> Option<HostStatus> {
        self.cluster.board().hosts().into_iter().find(|host| host.name == name)
    }

    fn state(&self, name: &str) -> Option<HostState> {
        self.host(name).map(|host| host.state)
    }

    fn why(&self, name: &str) -> String {
        self.host(name).and_then(|host| host.why).unwrap_or_default()
    }

    fn joined(&self) -> Vec<Peering> {
        self.carrier.0.lock().unwrap().joined.values().map(|(peering, _)| peering.clone()).collect()
    }

    fn count(&self, name: &str) -> u64 {
        let named = self.cluster.board().counts.named();
        named.iter().find(|(known, ..)| *known == name).unwrap().2
    }
}

fn wait_until_up(node: &Node, name: &str) {
    eventually("a session", SOON, || node.state(name) == Some(HostState::Up));
}

/// Two routers with good certificates, on the loopback.
struct Pair {
    authority: Authority,
    hosts: Arc<Hosts>,
    addresses: [SocketAddr; 2],
    nodes: [Node; 2],
}

/// `host1` has the higher number: it waits, `host2` dials.
const NAMES: [&str; 2] = ["host1", "host2"];

fn pair() -> Pair {
    let authority = Authority::new();
    let listeners = [port(), port()];
    let addresses = [0, 1].map(|n| listeners[n].local_addr().unwrap());
    let hosts = Hosts::new(&[(NAMES[0], addresses[0]), (NAMES[1], addresses[1])]);
    let mut listeners = listeners.into_iter();
    let nodes = [0, 1].map(|n| {
        let tls = tls(NAMES[n], &authority, &authority.sign(&[NAMES[n]]));
        Node::start(NAMES[n], 1 + 2 * n as u16, listeners.next().unwrap(), tls, &hosts)
    });
    Pair { authority, hosts, addresses, nodes }
}

fn up() -> Pair {
    let pair = pair();
    wait_until_up(&pair.nodes[0], NAMES[1]);
    wait_until_up(&pair.nodes[1], NAMES[0]);
    pair
}

#[test]
fn two_routers_agree_on_links_and_data_goes_where_it_belongs() {
    let pair = up();
    let [a, b] = [0, 1].map(|n| pair.nodes[n].joined().pop().unwrap());
    assert_eq!((&a.tickets, a.lanes), (&b.tickets, b.lanes));
    assert_eq!(a.tickets.len(), 3, "as many as the side with more workers has");
    assert!(a.dials != b.dials && a.ours == b.theirs && a.theirs == b.ours && a.epoch != b.epoch);
    let (dialing, waiting) = if a.dials { (0, 1) } else { (1, 0) };
    let peering = &[&a, &b][dialing];
    let conn = Conn { lane: 1, generation: 7 };
    peering.dialer.dial(peering.peer, 2, conn);
    eventually("a connection", SOON, || !pair.nodes[dialing].carrier.0.lock().unwrap().dialed.is_empty());
    let (peer, link, which, made) = pair.nodes[dialing].carrier.0.lock().unwrap().dialed.pop().unwrap();
    assert_eq!((peer, link, which), (peering.peer, 2, conn));
    let mut stream = made.unwrap();
    stream.set_nonblocking(false).unwrap();
    let first = data_hello(peering.tickets[2]);
    stream.write_all(&first).unwrap();
    stream.write_all(b"what follows is not read").unwrap();
    eventually("its arrival", SOON, || !pair.nodes[waiting].carrier.0.lock().unwrap().accepted.is_empty());
    let (peer, link, mut other, bytes) = pair.nodes[waiting].carrier.0.lock().unwrap().accepted.pop().unwrap();
    assert_eq!((peer, link, bytes), ([&a, &b][waiting].peer, 2, first));
    other.set_nonblocking(false).unwrap();
    let mut rest = [0; 24];
    other.read_exact(&mut rest).unwrap();
    assert_eq!(&rest, b"what follows is not read");
}

fn data_hello(ticket: [u8; 32]) -> Vec<u8> {
    let (host, peer) = ([1; 16], [2; 16]);
    let hello = DataHello { versions: (1, 1), host, peer, epoch: 1, generation: 1, lane: 0, lanes: 2, ticket };
    Packet::bare(Frame::Hello(hello)).encode().as_bytes().to_vec()
}

#[test]
fn tenants_are_announced_as_they_come_and_go() {
    let pair = up();
    let seen = || {
        let told = pair.nodes[0].carrier.0.lock().unwrap();
        let mut names: Vec<_> = told.tenants.values().flatten().map(|(n, name)| (*n, name.to_string())).collect();
        names.sort();
        names
    };
    for tenants in [&[(1, "blue")][..], &[(1, "blue"), (2, "red")], &[(2, "red")]] {
        let numbers: TenantNames = tenants.iter().map(|(n, name)| (*n, (*name).into())).collect();
        pair.nodes[1].tenants.send_replace(Arc::new(numbers));
        let expected: Vec<_> = tenants.iter().map(|(n, name)| (*n, (*name).to_owned())).collect();
        eventually("the news", SOON, || seen() == expected);
    }
}

#[test]
fn a_router_that_stops_is_gone_at_once_and_may_come_back() {
    let Pair { authority, hosts, addresses, nodes: [first, second] } = up();
    let before = first.joined().pop().unwrap();
    let stopping = Instant::now();
    drop(second);
    eventually("its end", SOON, || first.joined().is_empty());
    assert!(stopping.elapsed() < DEAD_AFTER, "it was told, and did not have to wait");
    assert!(first.why(NAMES[1]).contains("its router stops"), "{}", first.why(NAMES[1]));
    let listener = TcpListener::bind(addresses[1]).unwrap();
    listener.set_nonblocking(true).unwrap();
    let tls = tls(NAMES[1], &authority, &authority.sign(&[NAMES[1]]));
    let again = Node::start(NAMES[1], 1, listener, tls, &hosts);
    wait_until_up(&again, NAMES[0]);
    wait_until_up(&first, NAMES[1]);
    let after = first.joined().pop().unwrap();
    assert!(after.peer != before.peer && after.tickets != before.tickets);
}

#[test]
fn a_host_that_is_taken_out_of_the_directory_is_gone_at_once() {
    let pair = up();
    pair.hosts.set(&[(NAMES[0], pair.addresses[0])]);
    eventually("its end", SOON, || pair.nodes[0].joined().is_empty() && pair.nodes[0].host(NAMES[1]).is_none());
    pair.hosts.set(&[(NAMES[0], pair.addresses[0]), (NAMES[1], pair.addresses[1])]);
    wait_until_up(&pair.nodes[0], NAMES[1]);
}

/// What `host1` and `host2` say of each other where the second has this certificate.
fn whys(authority: &Authority, certificate: &Certificate, trusted: &Authority) -> [String; 2] {
    let listeners = [port(), port()];
    let [one, two] = [0, 1].map(|n| listeners[n].local_addr().unwrap());
    let hosts = Hosts::new(&[(NAMES[0], one), (NAMES[1], two)]);
    let [first, second] = listeners;
    let good = tls(NAMES[0], authority, &authority.sign(&[NAMES[0]]));
    let first = Node::start(NAMES[0], 1, first, good, &hosts);
    let second = Node::start(NAMES[1], 1, second, tls(NAMES[1], trusted, certificate), &hosts);
    let said = |node: &Node, name: &str| {
        let why = node.why(name);
        !why.is_empty() && why != "it has not connected"
    };
    eventually("two refusals", SOON, || said(&first, NAMES[1]) && said(&second, NAMES[0]));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!([first.joined().len(), second.joined().len()], [0, 0], "nothing was agreed on");
    [first.why(NAMES[1]), second.why(NAMES[0])]
}

#[test]
fn without_a_good_certificate_there_is_no_session() {
    let authority = Authority::new();
    let expired = whys(&authority, &authority.sign_until(&[NAMES[1]], 2020), &authority);
    assert!(expired.iter().all(|why| why.to_lowercase().contains("expired")), "{expired:?}");
    let other = Authority::new();
    let foreign = whys(&authority, &other.sign(&[NAMES[1]]), &authority);
    assert!(foreign[0].contains("UnknownIssuer"), "{foreign:?}");
    assert!(foreign[1].contains("UnknownCA") || foreign[1].contains("refused"), "{foreign:?}");
    let wrong = whys(&authority, &authority.sign(&["host3"]), &authority);
    assert!(wrong[0].contains("for no host of the directory"), "{wrong:?}");
}

/// A certificate of a third host does not make a second one of it.
#[test]
fn a_host_cannot_pose_as_another() {
    let authority = Authority::new();
    let listener = port();
    let address = listener.local_addr().unwrap();
    let elsewhere: SocketAddr = "127.0.0.1:1".parse().unwrap();
    let hosts = Hosts::new(&[(NAMES[0], address), (NAMES[1], elsewhere), ("host3", elsewhere)]);
    let node = Node::start(NAMES[0], 1, listener, tls(NAMES[0], &authority, &authority.sign(&[NAMES[0]])), &hosts);
    let answer = pose(address, &authority, &authority.sign(&["host3"]), &hello(NAMES[1]));
    assert!(answer.contains("says that it is host2, and its certificate is for host3"), "{answer}");
    let answer = pose(address, &authority, &authority.sign(&[NAMES[1]]), &Message::Linked(1));
    assert!(answer.contains("before its HELLO"), "{answer}");
    let old = Message::Hello(Hello { oldest: 0, newest: 0, ..plain(NAMES[1]) });
    let answer = pose(address, &authority, &authority.sign(&[NAMES[1]]), &old);
    assert!(answer.contains("speaks versions (0, 0)"), "{answer}");
    assert!(node.joined().is_empty());
}

fn plain(name: &str) -> Hello {
    Hello { oldest: 1, newest: 1, name: name.parse().unwrap(), epoch: 1, workers: 1, lanes: 1, links: None }
}

fn hello(name: &str) -> Message {
    Message::Hello(plain(name))
}

/// Says this with that certificate, and returns the reason of the BYE that follows.
fn pose(address: SocketAddr, authority: &Authority, certificate: &Certificate, message: &Message) -> String {
    let mut stream = client(address, authority, certificate);
    stream.write_all(&message.encode()).unwrap();
    stream.flush().unwrap();
    let mut incoming = Incoming::default();
    let mut bytes = [0; 4096];
    loop {
        while let Some(message) = incoming.message().unwrap() {
            if let Message::Bye(bye) = message {
                return bye.why;
            }
        }
        match stream.read(&mut bytes) {
            Ok(0) | Err(_) => return "nothing".to_owned(),
            Ok(count) => incoming.push(&bytes[..count]),
        }
    }
}

/// A client of our own making, for what a router would not do.
fn client(
    address: SocketAddr,
    authority: &Authority,
    certificate: &Certificate,
) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
    let chain = vec![CertificateDer::from_pem_slice(certificate.cert.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(certificate.key.as_bytes()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"freeflow-session".to_vec()];
    let connection = ClientConnection::new(Arc::new(config), ServerName::try_from(NAMES[0]).unwrap()).unwrap();
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    StreamOwned::new(connection, socket)
}

#[test]
fn whoever_is_no_router_is_cut_and_learns_nothing() {
    let pair = up();
    let node = &pair.nodes[0];
    let connect = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(pair.addresses[0]).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    };
    let garbage = connect(b"GET / HTTP/1.1\r\n\r\n");
    let no_tls = connect(b"\x16\x03\x01\x00\x05nonsense");
    let guessed = connect(&data_hello([7; 32]));
    let ticket = pair.nodes[0].joined()[0].tickets[0];
    let mut wrong = data_hello(ticket);
    wrong[4] = 1;
    let wrong = connect(&wrong);
    let silent = connect(b"");
    let half = connect(&data_hello(ticket)[..MAX_HEADER - 1]);
    let half_of_tls = connect(b"\x16\x03\x01\x02\x00\x01");
    for (stream, what) in [
        (garbage, "garbage"),
        (no_tls, "no TLS"),
        (guessed, "a ticket that was guessed"),
        (wrong, "a wrong frame"),
        (silent, "silence"),
        (half, "half a frame"),
        (half_of_tls, "half a handshake"),
    ] {
        assert!(ends(stream), "{what}");
    }
    let counts = ["refused_garbage", "refused_ticket", "refused_certificate", "refused_slow"];
    let count = || counts.map(|name| node.count(name));
    // They are cut before they are counted.
    let deadline = Instant::now() + SOON;
    while count().iter().sum::<u64>() < 7 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(count(), [2, 1, 1, 3]);
    assert!(node.carrier.0.lock().unwrap().accepted.is_empty());
    assert_eq!(node.state(NAMES[1]), Some(HostState::Up), "and the session goes on");
}

/// Whether it is closed in time, whatever comes before (an alert of TLS).
fn ends(mut stream: TcpStream) -> bool {
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Ok(_) => all.len() < 50,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_crowd_that_says_nothing_has_few_places() {
    let pair = up();
    let crowd: Vec<_> = (0..200).map(|_| TcpStream::connect(pair.addresses[0]).unwrap()).collect();
    eventually("refusals", SOON, || pair.nodes[0].count("refused_busy") >= 168);
    drop(crowd);
    assert_eq!(pair.nodes[0].state(NAMES[1]), Some(HostState::Up));
}

/// A peer that is who it says, and floods: its session ends, and the next may come.
#[test]
fn a_flood_of_a_peer_ends_its_session() {
    let authority = Authority::new();
    let listener = port();
    let address = listener.local_addr().unwrap();
    let hosts = Hosts::new(&[(NAMES[0], address), (NAMES[1], "127.0.0.1:1".parse().unwrap())]);
    let node = Node::start(NAMES[0], 1, listener, tls(NAMES[0], &authority, &authority.sign(&[NAMES[0]])), &hosts);
    let mut stream = client(address, &authority, &authority.sign(&[NAMES[1]]));
    stream.write_all(&hello(NAMES[1]).encode()).unwrap();
    let pings: Vec<u8> = (0..5000).flat_map(|n| Message::Ping(n).encode()).collect();
    // It may be cut in the middle of this.
    let _ = stream.write_all(&pings);
    eventually("its end", SOON, || node.why(NAMES[1]).contains("too many messages"));
}

#[test]
fn new_certificates_are_for_new_sessions() {
    let Pair { authority: old, hosts, addresses, nodes: [first, second] } = up();
    let new = Authority::new();
    first.cluster.set_tls(tls(NAMES[0], &new, &new.sign(&[NAMES[0]])));
    std::thread::sleep(DEAD_AFTER);
    assert_eq!(first.state(NAMES[1]), Some(HostState::Up), "a session that is there goes on");
    drop(second);
    let listener = TcpListener::bind(addresses[1]).unwrap();
    listener.set_nonblocking(true).unwrap();
    let second = Node::start(NAMES[1], 1, listener, tls(NAMES[1], &old, &old.sign(&[NAMES[1]])), &hosts);
    eventually("a refusal", SOON, || {
        first.why(NAMES[1]).contains("Unknown") || second.why(NAMES[0]).contains("Unknown")
    });
    second.cluster.set_tls(tls(NAMES[1], &new, &new.sign(&[NAMES[1]])));
    wait_until_up(&first, NAMES[1]);
}

#[test]
fn what_is_wrong_with_our_own_certificate_is_said() {
    let (authority, other) = (Authority::new(), Authority::new());
    let complaint = |name: &str, certificate: &Certificate| {
        tls(name, &authority, certificate).complaint().map(ToOwned::to_owned).unwrap_or_default()
    };
    assert_eq!(complaint("host1", &authority.sign(&["host1"])), "");
    assert!(complaint("host1", &authority.sign_until(&["host1"], 2020)).contains("expired"));
    assert!(complaint("host1", &other.sign(&["host1"])).contains("UnknownIssuer"));
    assert!(complaint("host1", &authority.sign(&["host2"])).contains("not valid for name"));
    let [mine, its] = [authority.sign(&["host1"]), authority.sign(&["host1"])];
    let pem = |path: &'static str, text: &'static str| Pem { path: Path::new(path), text: text.as_bytes() };
    let leak = |text: &str| -> &'static str { Box::leak(text.to_owned().into_boxed_str()) };
    let name = "host1".parse().unwrap();
    let (ca, cert) = (pem("ca.pem", leak(&authority.pem)), pem("cert.pem", leak(&mine.cert)));
    let mixed = Tls::new(&name, ca, cert, pem("key.pem", leak(&its.key))).unwrap_err();
    assert!(mixed.to_string().contains("cert.pem and the key in key.pem cannot be used together"), "{mixed}");
    let none = Tls::new(&name, ca, cert, pem("key.pem", "no key")).unwrap_err();
    assert!(none.to_string().contains("key.pem has no private key"), "{none}");
    let empty = Tls::new(&name, pem("ca.pem", ""), cert, cert).unwrap_err();
    assert!(empty.to_string().contains("ca.pem has no certificate"), "{empty}");
}

#[test]
fn a_dead_connection_is_no_reason_to_give_a_host_up_and_a_dead_host_is() {
    let authority = Authority::new();
    let listener = port();
    let address = listener.local_addr().unwrap();
    let hosts = Hosts::new(&[(NAMES[0], address), (NAMES[1], "127.0.0.1:1".parse().unwrap())]);
    let node = Node::start(NAMES[0], 1, listener, tls(NAMES[0], &authority, &authority.sign(&[NAMES[0]])), &hosts);
    let certificate = authority.sign(&[NAMES[1]]);
    let links = |links| Message::Hello(Hello { links, ..plain(NAMES[1]) });
    let tickets = vec![freeflow_router::cluster::session::wire::Ticket([9; 32])];
    let offer = Message::Links(freeflow_router::cluster::session::wire::Links { number: 5, lanes: 2, tickets });
    let mut first = client(address, &authority, &certificate);
    for message in [&links(None), &offer] {
        first.write_all(&message.encode()).unwrap();
    }
    wait_until_up(&node, NAMES[1]);
    drop(first);
    eventually("its loss", SOON, || node.state(NAMES[1]) == Some(HostState::Lost));
    let mut second = client(address, &authority, &certificate);
    for message in [&links(Some(5)), &offer] {
        second.write_all(&message.encode()).unwrap();
    }
    wait_until_up(&node, NAMES[1]);
    assert_eq!(node.joined().len(), 1);
    assert_eq!(node.carrier.0.lock().unwrap().joins, 1, "the same links as before");
    let silent = Instant::now();
    eventually("its end", SOON, || node.joined().is_empty());
    assert!(silent.elapsed() >= DEAD_AFTER / 2 && silent.elapsed() < DEAD_AFTER * 3, "{:?}", silent.elapsed());
    assert!(node.why(NAMES[1]).contains("nothing is heard"), "{}", node.why(NAMES[1]));
    drop(second);
}
