//! The directory in a real etcd, and what can go wrong with that.
#![allow(missing_docs, reason = "a test program")]

#[path = "common/authority.rs"]
mod authority;
mod common;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc::TryRecvError;
use std::time::{Duration, Instant};

use authority::Authority;
use common::etcd::{Server, Way, free_address, path, settings_at};
use common::{Daemon, Place, SOON, guest_on};
use etcd_client::{Client, PutOptions, Txn, TxnOp};
use freeflow_backend::{Gid, Mac};
use freeflow_router::cluster::directory::{Claim, Connector, Directory, Etcd, Refused};
use freeflow_router::cluster::settings::EtcdSettings;
use freeflow_tests::bed::eventually;
use freeflow_tests::guest::Guest;
use freeflow_tests::guest::verbs::{Op, QpSpec, Rc, RcOptions, SendWr};
use nix::sys::signal::Signal;
use virtio_rdma::ib::WcStatus;

/// How soon others hear of a change.
const SECOND: Duration = Duration::from_secs(1);
/// A lease of the tests, and what etcd takes to notice that it is over.
const LEASE_ENDS: Duration = Duration::from_secs(20);

fn at(n: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, n], 7471))
}

fn start(settings: &EtcdSettings, n: u8) -> Etcd {
    let connector = Connector::new(settings).unwrap();
    Etcd::start(settings, &connector, format!("host{n}").parse().unwrap(), at(n)).unwrap()
}

fn host(settings: &EtcdSettings, n: u8) -> Etcd {
    let host = start(settings, n);
    eventually("the connection to etcd", SOON, || host.health().connected);
    host
}

fn claim(nic: &str, last: u8) -> Claim {
    let ip = vec![[10, 0, 0, last].into()];
    Claim { nic: nic.into(), tenant: "blue".into(), ip, mac: Mac([2, 0, 0, 0, 0, last]) }
}

fn has(host: &Etcd, nic: &str, last: u8) -> Result<(), Refused> {
    host.claim(claim(nic, last)).recv_timeout(SOON).unwrap()
}

const NOBODY: &str = "nobody";

fn owner(host: &Etcd, last: u8) -> String {
    let known = host.snapshot();
    known.owner("blue", Gid::of([10, 0, 0, last].into())).map_or_else(|| NOBODY.to_owned(), ToString::to_string)
}

/// An owner is told from another by what people are told of it.
fn is(nic: &str, n: u8) -> String {
    format!("virtual NIC {nic:?} of host host{n}")
}

/// As somebody else who may write to etcd.
fn other<T>(server: &Server, call: impl AsyncFnOnce(&mut Client) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = Client::connect([format!("http://{}", server.address())], None).await.unwrap();
        call(&mut client).await
    })
}

#[test]
fn hosts_hear_of_each_other_and_nobody_has_what_is_anothers() {
    let server = Server::start();
    let (first, second) = (host(&server.settings(), 1), host(&server.settings(), 2));
    has(&first, "a", 1).unwrap();
    has(&first, "a", 1).unwrap();
    eventually("news", SECOND, || owner(&second, 1) == is("a", 1));
    eventually("the hosts", SECOND, || second.snapshot().hosts().count() == 2);
    assert_eq!(second.snapshot().host("host1"), Some(at(1)));
    let refused = has(&second, "b", 1).unwrap_err().to_string();
    let both = "belongs to virtual NIC \"a\" of host host1, and virtual NIC \"b\" of host host2 cannot have it";
    assert!(refused.contains(both), "{refused}");
    second.release("b").recv_timeout(SOON).unwrap();
    let other_tenant = Claim { tenant: "a/b \u{e4}".into(), ..claim("c", 1) };
    second.claim(other_tenant).recv_timeout(SOON).unwrap().unwrap();
    let there = |tenant| first.snapshot().owner(tenant, Gid::of([10, 0, 0, 1].into())).cloned();
    eventually("news", SECOND, || there("a/b \u{e4}").is_some_and(|owner| owner.host.as_str() == "host2"));
}

#[test]
fn a_virtual_nic_moves_within_a_second() {
    let server = Server::start();
    let hosts = [1, 2, 3].map(|n| host(&server.settings(), n));
    has(&hosts[0], "a", 1).unwrap();
    for round in 0..6 {
        let (from, to) = (round % 2, 1 - round % 2);
        let start = Instant::now();
        hosts[from].release("a").recv_timeout(SOON).unwrap();
        has(&hosts[to], "a", 1).unwrap();
        eventually("the move", SECOND, || hosts.iter().all(|host| owner(host, 1) == is("a", to as u8 + 1)));
        assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
    }
}

#[test]
fn what_is_known_holds_while_etcd_is_away() {
    let mut server = Server::start();
    let (first, second) = (host(&server.settings(), 1), host(&server.settings(), 2));
    has(&first, "a", 1).unwrap();
    eventually("news", SECOND, || owner(&second, 1) == is("a", 1));
    for (last, signal) in [(2, Signal::SIGTERM), (3, Signal::SIGKILL)] {
        server.end(signal);
        eventually("the loss", SOON, || !second.health().connected && !first.health().connected);
        let nic = format!("n{last}");
        let waiting = first.claim(claim(&nic, last));
        // Longer than a lease.
        std::thread::sleep(Duration::from_secs(6));
        assert_eq!(owner(&second, 1), is("a", 1));
        assert!(second.health().age >= Duration::from_secs(5));
        assert_eq!(waiting.try_recv(), Err(TryRecvError::Empty));
        server.resume();
        waiting.recv_timeout(SOON).unwrap().unwrap();
        eventually("the return", SOON, || second.health().connected && owner(&second, last) == is(&nic, 1));
        assert_eq!(owner(&second, 1), is("a", 1));
    }
}

#[test]
fn an_etcd_that_says_nothing_is_away() {
    let server = Server::start();
    let (first, second) = (host(&server.settings(), 1), host(&server.settings(), 2));
    has(&first, "a", 1).unwrap();
    eventually("news", SECOND, || owner(&second, 1) == is("a", 1));
    server.signal(Signal::SIGSTOP);
    eventually("that it is noticed", SOON, || !second.health().connected);
    assert_eq!(owner(&second, 1), is("a", 1));
    server.signal(Signal::SIGCONT);
    eventually("the return", SOON, || second.health().connected);
    has(&first, "b", 2).unwrap();
    eventually("news", SECOND, || owner(&second, 2) == is("b", 1));
}

#[test]
fn changes_that_etcd_has_forgotten_are_made_up_for() {
    let server = Server::start();
    let way = Way::to(server.address());
    let (first, second) = (host(&server.settings(), 1), host(&settings_at(&way.endpoint()), 2));
    has(&first, "a", 1).unwrap();
    has(&first, "b", 2).unwrap();
    eventually("news", SECOND, || owner(&second, 2) == is("b", 1));
    way.cut();
    eventually("the loss", SOON, || !second.health().connected);
    first.release("a").recv_timeout(SOON).unwrap();
    has(&first, "c", 3).unwrap();
    other(&server, async |client| {
        let revision = client.put("elsewhere", "", None).await.unwrap().header().unwrap().revision();
        client.compact(revision, None).await.unwrap();
    });
    way.mend();
    eventually("the return", SOON, || second.health().connected);
    assert_eq!([1, 2, 3].map(|last| owner(&second, last)), [NOBODY.to_owned(), is("b", 1), is("c", 1)]);
}

#[test]
fn a_lease_ends_and_is_made_again() {
    let server = Server::start();
    let way = Way::to(server.address());
    let (first, second) = (host(&settings_at(&way.endpoint()), 1), host(&server.settings(), 2));
    has(&first, "a", 1).unwrap();
    has(&first, "b", 2).unwrap();
    eventually("news", SECOND, || owner(&second, 2) == is("b", 1) && owner(&first, 2) == is("b", 1));
    way.cut();
    eventually("the end of the lease", LEASE_ENDS, || owner(&second, 1) == NOBODY && owner(&second, 2) == NOBODY);
    assert_eq!(second.snapshot().host("host1"), None);
    assert_eq!(owner(&first, 1), is("a", 1), "who is cut off knows what it knew");
    has(&second, "c", 2).unwrap();
    way.mend();
    eventually("the return", SOON, || owner(&second, 1) == is("a", 1) && owner(&first, 2) == is("c", 2));
    assert_eq!(second.snapshot().host("host1"), Some(at(1)));
    eventually("that it is noticed", SOON, || first.health().refused == 1);
    let refused = has(&first, "b", 2).unwrap_err().to_string();
    assert!(refused.contains("virtual NIC \"c\" of host host2"), "{refused}");
}

#[test]
fn a_host_that_ends_is_gone_at_once() {
    let server = Server::start();
    let (first, second) = (host(&server.settings(), 1), host(&server.settings(), 2));
    has(&first, "a", 1).unwrap();
    eventually("news", SECOND, || owner(&second, 1) == is("a", 1));
    drop(first);
    eventually("its end", SECOND, || second.snapshot().hosts().count() == 1 && owner(&second, 1) == NOBODY);
}

#[test]
fn an_etcd_that_lost_its_data_gets_them_again() {
    let mut server = Server::start();
    let (first, second) = (host(&server.settings(), 1), host(&server.settings(), 2));
    for last in 1..=5 {
        has(&first, &format!("n{last}"), last).unwrap();
    }
    eventually("news", SECOND, || owner(&second, 5) == is("n5", 1));
    server.lose();
    eventually("the loss", SOON, || !second.health().connected);
    server.resume();
    let until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until {
        assert_eq!(owner(&second, 1), is("n1", 1));
        assert_eq!(second.snapshot().host("host1"), Some(at(1)));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(second.health().connected);
    let third = host(&server.settings(), 3);
    eventually("what was said again", SECOND, || (1..=5).all(|last| owner(&third, last) == is(&format!("n{last}"), 1)));
}

#[test]
fn garbage_in_etcd_harms_nobody() {
    let server = Server::start();
    let first = host(&server.settings(), 1);
    let garbage = |name: &str| format!("/freeflow/v1/{name}").into_bytes();
    other(&server, async |client| {
        for (key, value) in [
            (garbage("host/host9"), b"{\"address\":\"nowhere\"}".to_vec()),
            (garbage("host/host8"), vec![b'['; 1_000_000]),
            (garbage("address/blue/10.0.0.1"), b"\xff\xfe".to_vec()),
            (garbage("address/blue/::ffff:10.0.0.2"), b"{\"host\":\"host9\",\"nic\":\"x\"}".to_vec()),
            (garbage("address/%zz/10.0.0.3"), b"{}".to_vec()),
            (b"/freeflow/v1/\xff\xff".to_vec(), vec![0; 1_000_000]),
        ] {
            client.put(key, value, None).await.unwrap();
        }
        for n in 0..30 {
            client.put(garbage(&format!("large/{n}")), vec![b'x'; 1_000_000], None).await.unwrap();
        }
    });
    let refused = has(&first, "a", 1).unwrap_err().to_string();
    assert!(refused.contains("/freeflow/v1/address/blue/10.0.0.1") && refused.contains("delete it"), "{refused}");
    has(&first, "b", 2).unwrap();
    // More than one answer may have: it is listed in smaller pages.
    let second = host(&server.settings(), 2);
    assert_eq!(owner(&second, 2), is("b", 1));
    assert_eq!(second.snapshot().host("host9"), None);
    other(&server, async |client| {
        client.delete(garbage("address/blue/10.0.0.1"), None).await.unwrap();
    });
    eventually("the address", SOON, || owner(&second, 1) == is("a", 1));
}

#[test]
fn ten_thousand_addresses() {
    let server = Server::start();
    let first = host(&server.settings(), 1);
    other(&server, async |client| {
        for block in 0..100 {
            let puts = (0..100).map(|n| {
                let key = format!("/freeflow/v1/address/blue/10.1.{block}.{n}");
                TxnOp::put(key, "{\"host\":\"host9\",\"nic\":\"many\"}", Some(PutOptions::new()))
            });
            client.txn(Txn::new().and_then(puts.collect::<Vec<_>>())).await.unwrap();
        }
    });
    let all = |host: &Etcd| host.snapshot().addresses().filter(|(.., owner)| owner.host.as_str() == "host9").count();
    eventually("all of them", SOON, || all(&first) == 10_000);
    let second = host(&server.settings(), 2);
    assert_eq!(all(&second), 10_000);
    let start = Instant::now();
    has(&first, "a", 1).unwrap();
    eventually("news", SECOND, || owner(&second, 1) == is("a", 1));
    assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
}

/// An authority, and certificates of its for etcd and for routers, as files.
fn certificates(folder: &Path) {
    let authority = Authority::new();
    std::fs::write(folder.join("ca"), &authority.pem).unwrap();
    for name in ["localhost", "router", "host1", "host2", "host3"] {
        let certificate = authority.sign(&[name]);
        std::fs::write(folder.join(name), certificate.cert).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), certificate.key).unwrap();
    }
}

#[test]
fn etcd_may_want_certificates() {
    let folder = tempfile::tempdir().unwrap();
    certificates(folder.path());
    let [ca, cert, key] = ["ca", "localhost", "localhost.key"].map(|name| path(folder.path(), name));
    let server =
        Server::start_with(&["--cert-file", &cert, "--key-file", &key, "--trusted-ca-file", &ca, "--client-cert-auth"]);
    let file = |name: &str| Some(folder.path().join(name));
    let good = EtcdSettings { ca: file("ca"), cert: file("router"), key: file("router.key"), ..server.settings() };
    let (first, second) = (host(&good, 1), host(&good, 2));
    has(&first, "a", 1).unwrap();
    eventually("news", SECOND, || owner(&second, 1) == is("a", 1));
    let other_ca = tempfile::tempdir().unwrap();
    certificates(other_ca.path());
    for bad in [
        EtcdSettings { cert: None, key: None, ..good.clone() },
        EtcdSettings { ca: Some(other_ca.path().join("ca")), ..good.clone() },
        EtcdSettings { endpoints: vec![format!("https://{}", server.address())], ..good.clone() },
    ] {
        let third = start(&bad, 3);
        std::thread::sleep(SECOND);
        assert!(!third.health().connected, "{bad:?}");
        assert_eq!(first.snapshot().host("host3"), None);
    }
    let error = format!("{:#}", Connector::new(&EtcdSettings { ca: file("none"), ..good }).unwrap_err());
    assert!(error.contains("none: No such file"), "{error}");
}

#[test]
fn etcd_may_want_a_password() {
    let mut server = Server::start();
    other(&server, async |client| {
        for user in ["root", "freeflow"] {
            client.user_add(user, "secret", None).await.unwrap();
        }
        client.role_add("routers").await.unwrap();
        let ours = etcd_client::Permission::read_write("/freeflow/").with_prefix();
        client.role_grant_permission("routers", ours).await.unwrap();
        client.user_grant_role("root", "root").await.unwrap();
        client.user_grant_role("freeflow", "routers").await.unwrap();
        client.auth_enable().await.unwrap();
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("good"), "secret\n").unwrap();
    std::fs::write(folder.path().join("bad"), "guess\n").unwrap();
    let with = |file: &str| EtcdSettings {
        user: Some("freeflow".to_owned()),
        password_file: Some(folder.path().join(file)),
        ..server.settings()
    };
    let (good, bad, none) = (with("good"), with("bad"), server.settings());
    let (first, second) = (host(&good, 1), host(&good, 2));
    has(&first, "a", 1).unwrap();
    eventually("news", SECOND, || owner(&second, 1) == is("a", 1));
    for settings in [bad, none] {
        let third = start(&settings, 3);
        std::thread::sleep(SECOND);
        assert!(!third.health().connected, "{settings:?}");
    }
    // It forgets who has shown a password.
    server.end(Signal::SIGKILL);
    server.resume();
    has(&first, "b", 2).unwrap();
    eventually("news", SOON, || owner(&second, 2) == is("b", 1));
}

/// Configurations of daemons of these hosts with etcd and certificates for sessions, in a folder that their user may read.
fn configured(server: &Server, hosts: std::ops::RangeInclusive<u8>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    certificates(folder.path());
    hosts.for_each(|n| configure(folder.path(), server, n));
    for file in std::fs::read_dir(folder.path()).unwrap() {
        std::os::unix::fs::chown(file.unwrap().path(), Some(65534), None).unwrap();
    }
    std::os::unix::fs::chown(folder.path(), Some(65534), None).unwrap();
    folder
}

fn configure(folder: &Path, server: &Server, n: u8) {
    let (name, address) = (format!("host{n}"), free_address());
    let [ca, cert, key] = ["ca", &name, &format!("{name}.key")].map(|name| path(folder, name));
    let config = format!(
        "[cluster]\nname = '{name}'\nlisten = '{address}'\nadvertise = '{address}'\ndead-after = '1s'\n\
         tls = {{ ca = '{ca}', cert = '{cert}', key = '{key}' }}\n\
         [cluster.etcd]\nendpoints = ['http://localhost:{}']\nttl = '5s'\n",
        server.address().port()
    );
    std::fs::write(folder.join(format!("{name}.toml")), config).unwrap();
}

#[test]
fn a_daemon_has_its_virtual_nics_in_etcd() {
    let mut server = Server::start();
    let (folder, place) = (configured(&server, 1..=1), Place::new());
    let config = path(folder.path(), "host1.toml");
    let args = ["--config", config.as_str()];
    let add = |n: u8| {
        [
            "nic",
            "add",
            "--tenant",
            "blue",
            "--name",
            if n == 1 { "a" } else { "b" },
            "--ip",
            if n == 1 { "10.0.0.1" } else { "10.0.0.2" },
        ]
    };
    let second = host(&server.settings(), 2);
    has(&second, "x", 2).unwrap();
    let daemon = place.start_with(0, &args);
    daemon.says(&add(1));
    eventually("news", SECOND, || owner(&second, 1) == is("a", 1));
    let refused = daemon.fails(&add(2));
    let both = "virtual NIC \"x\" of host host2, and virtual NIC \"b\" of host host1 cannot have it";
    assert!(refused.contains(both), "{refused}");
    second.release("x").recv_timeout(SOON).unwrap();
    daemon.says(&add(2));
    assert_eq!(daemon.says(&["nic", "del", "b"]), "removed b");
    has(&second, "x", 2).unwrap();
    let shown = || daemon.says(&["directory", "--tenant", "blue"]);
    eventually("news", SECOND, || shown().lines().any(|line| line.contains("10.0.0.2") && line.contains("host2")));
    server.end(Signal::SIGKILL);
    eventually("the loss", SOON, || shown().contains("cut off for"));
    assert!(daemon.fails(&["nic", "add", "--ip", "10.0.0.3"]).contains("the directory has not said within 5 s"));
    assert_eq!(daemon.says(&["nics"]).lines().count(), 2);
    let (status, log) = daemon.stop();
    assert!(status.success() && log.contains("keeps it until its lease ends"), "{status}\n{log}");
    // etcd is no reason not to serve what was served before.
    let daemon = place.start_with(0, &args);
    assert!(daemon.says(&["nics"]).contains("10.0.0.1"));
    server.resume();
    eventually("the return", SOON, || second.health().connected);
    assert_eq!(owner(&second, 1), is("a", 1));
    // Said by this life: what was said by the one before hangs on that one's lease.
    second.release("x").recv_timeout(SOON).unwrap();
    daemon.says(&add(2));
    let (status, log) = daemon.stop();
    assert!(status.success(), "{status}\n{log}");
    eventually("its end", SECOND, || owner(&second, 1) == NOBODY);
}

/// The virtual NIC that guest `n` of the tests has, on this daemon, and that guest.
fn guest(daemon: &Daemon<'_>, n: u8) -> Guest {
    let (name, ip, ip6) = (format!("n{n}"), format!("10.0.0.{n}"), format!("fd00::{n}"));
    let mac = format!("02:00:00:00:00:0{n}");
    let args = ["nic", "add", "--tenant", "blue", "--name", &name, "--ip", &ip, "--ip", &ip6, "--mac", &mac];
    guest_on(Path::new(&daemon.says(&args)), usize::from(n) - 1)
}

/// Whether both can write into each other's memory.
fn talk(a: &Guest, b: &Guest) {
    let patient = RcOptions { timeout: 14, retry_cnt: 7, ..RcOptions::default() };
    let (a, b) = Rc::pair_with(a, b, &QpSpec::rc(), 4096, &patient).unwrap();
    for (from, to) in [(&a, &b), (&b, &a)] {
        from.qp.post(SendWr::new(1, Op::Write(to.mr.remote(0)), &[from.mr.sge(0, 4096)])).unwrap();
        assert_eq!(from.cq.next().status(), WcStatus::Success);
    }
}

#[test]
fn guests_find_each_other_by_etcd_also_where_they_have_moved_to() {
    let mut server = Server::start();
    let folder = configured(&server, 1..=3);
    let places = [1, 2, 3].map(|_| Place::new());
    let configs = [1, 2, 3].map(|n| path(folder.path(), &format!("host{n}.toml")));
    let daemons = [0, 1, 2].map(|n| places[n].start_with(0, &["--config", &configs[n]]));
    let up = |daemon: &Daemon<'_>| daemon.says(&["hosts"]).lines().filter(|line| line.contains(" up ")).count() == 2;
    eventually("sessions", SOON, || daemons.iter().all(up));
    let first = guest(&daemons[0], 1);
    let second = guest(&daemons[1], 2);
    let known = |by: usize, host: &str| {
        daemons[by].says(&["directory"]).lines().any(|line| line.contains("10.0.0.2") && line.contains(host))
    };
    eventually("news", SECOND, || known(0, "host2"));
    talk(&first, &second);
    drop(second);
    daemons[1].says(&["nic", "del", "n2"]);
    let moved = Instant::now();
    let second = guest(&daemons[2], 2);
    eventually("news", SECOND, || known(0, "host3"));
    assert!(moved.elapsed() < SECOND, "{:?}", moved.elapsed());
    talk(&first, &second);
    server.end(Signal::SIGKILL);
    eventually("the loss", SOON, || daemons[0].says(&["directory"]).contains("cut off for"));
    talk(&first, &second);
    drop((first, second));
    server.resume();
    eventually("the return", SOON, || daemons[0].says(&["directory"]).contains("up to date"));
    for daemon in daemons {
        let (status, log) = daemon.stop();
        assert!(status.success(), "{status}\n{log}");
    }
}
