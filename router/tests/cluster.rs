//! Two daemons on one machine as two hosts: sealed, with certificates, a directory in a file, and guests that talk across.
#![allow(missing_docs, reason = "a test program")]

#[path = "common/authority.rs"]
mod authority;
mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use authority::{Authority, Certificate};
use common::{Daemon, Place, SOON};
use freeflow_router::api;
use freeflow_router::cluster::status::HostState;
use freeflow_tests::bed::eventually;
use freeflow_tests::guest::verbs::{Op, QpSpec, Rc, RcOptions, SendWr};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use virtio_rdma::ib::WcStatus;

/// What both hosts have.
struct Hosts {
    authority: Authority,
    folder: tempfile::TempDir,
    addresses: [SocketAddr; 2],
}

const NAMES: [&str; 2] = ["host1", "host2"];

/// An address that was free a moment ago.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

impl Hosts {
    fn new() -> Self {
        let hosts =
            Self { authority: Authority::new(), folder: tempfile::tempdir().unwrap(), addresses: [free(), free()] };
        // The user of the daemons must get through.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(hosts.folder.path(), open).unwrap();
        let of = |n: usize| {
            let (name, address, i) = (NAMES[n], hosts.addresses[n], n + 1);
            let nic = format!("ip = [\"10.0.0.{i}\", \"fd00::{i}\"]\nmac = \"02:00:00:00:00:0{i}\"");
            format!("[[host]]\nname = {name:?}\naddress = \"{address}\"\n[[host.nic]]\n{nic}\n")
        };
        std::fs::write(hosts.folder.path().join("hosts.toml"), [of(0), of(1)].concat()).unwrap();
        for (n, name) in NAMES.iter().enumerate() {
            hosts.write(n, &hosts.authority, &hosts.authority.sign(&[name]));
        }
        hosts
    }

    /// The certificates of a host.
    fn write(&self, n: usize, authority: &Authority, certificate: &Certificate) {
        let folder = self.folder.path().join(NAMES[n]);
        std::fs::create_dir_all(&folder).unwrap();
        authority::write(&folder, authority, certificate);
    }

    /// The configuration of a host.
    fn config(&self, n: usize, more: &str) -> PathBuf {
        let (name, folder, address) = (NAMES[n], self.folder.path(), self.addresses[n]);
        let text = format!(
            "[cluster]\nname = {name:?}\nlisten = \"{address}\"\ndirectory = \"{0}/hosts.toml\"\ndead-after = \"1s\"\n\
             [cluster.tls]\nca = \"{0}/{name}/ca.pem\"\ncert = \"{0}/{name}/cert.pem\"\nkey = \"{0}/{name}/key.pem\"\n{more}",
            folder.display()
        );
        let path = folder.join(format!("{name}.toml"));
        std::fs::write(&path, text).unwrap();
        path
    }

    /// The daemon of a host, with the virtual NIC of that number.
    fn start<'a>(&self, n: usize, place: &'a Place) -> Daemon<'a> {
        let i = n + 1;
        let nic = format!(
            "[[nic]]\nname = \"n{n}\"\nip = [\"10.0.0.{i}\", \"fd00::{i}\"]\nmac = \"02:00:00:00:00:0{i}\"\nsocket = \"{}\"\n",
            place.run().join(format!("nic{n}")).display()
        );
        let config = self.config(n, &nic);
        place.start_with(0, &["--config", config.to_str().unwrap()])
    }
}

fn state(daemon: &Daemon<'_>) -> (HostState, String) {
    let mut hosts = Vec::new();
    eventually("another host", SOON, || {
        hosts = api::hosts(&daemon.control()).unwrap();
        !hosts.is_empty()
    });
    let host = hosts.remove(0);
    (host.state, host.why.unwrap_or_default())
}

fn wait_for(daemon: &Daemon<'_>, expected: HostState) {
    eventually("another state of the session", SOON, || state(daemon).0 == expected);
}

fn write(a: &Rc, b: &Rc) -> WcStatus {
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 4096)])).unwrap();
    a.cq.next().status()
}

#[test]
fn guests_of_two_hosts_talk_and_a_host_that_is_killed_may_come_back() {
    let (hosts, places) = (Hosts::new(), [Place::new(), Place::new()]);
    let first = hosts.start(0, &places[0]);
    assert_eq!(state(&first).0, HostState::Down);
    let second = hosts.start(1, &places[1]);
    wait_for(&first, HostState::Up);
    wait_for(&second, HostState::Up);
    let (here, there) = (first.guest(0), second.guest(1));
    let impatient = RcOptions { timeout: 14, retry_cnt: 7, ..RcOptions::default() };
    let (a, b) = Rc::pair_with(&here, &there, &QpSpec::rc(), 4096, &impatient).unwrap();
    assert_eq!([write(&a, &b), write(&b, &a)], [WcStatus::Success; 2]);
    let shown = first.says(&["qps"]);
    assert!(shown.contains("tcp") && shown.contains("on another host (host2)"), "{shown}");
    let (b, there) = (std::mem::ManuallyDrop::new(b), std::mem::ManuallyDrop::new(there));
    kill(Pid::from_raw(second.child.id().cast_signed()), Signal::SIGKILL).unwrap();
    let killed = Instant::now();
    drop(second);
    wait_for(&first, HostState::Down);
    assert!(killed.elapsed() < Duration::from_secs(3), "{:?}", killed.elapsed());
    assert_eq!(write(&a, &b), WcStatus::RetryExcErr);
    let _ = there;
    let second = hosts.start(1, &places[1]);
    wait_for(&first, HostState::Up);
    let there = second.guest(1);
    let (a, b) = Rc::pair_with(&here, &there, &QpSpec::rc(), 4096, &impatient).unwrap();
    assert_eq!([write(&a, &b), write(&b, &a)], [WcStatus::Success; 2]);
    // The host is the same one, though it has another life.
    let path = || api::nics(&first.control()).unwrap()[0].paths.iter().find(|path| path.path == "tcp").cloned();
    eventually("figures", SOON, || path().is_some_and(|path| path.wqes == 3 && path.failed.len() == 1));
    let path = path().unwrap();
    assert_eq!((path.class.as_str(), path.host.as_deref(), path.bytes), ("RC", Some("host2"), 2 * 4096));
    assert_eq!((path.failed["RETRY_EXC_ERR"], path.latency.count()), (1, 2));
    drop((a, b, there, here));
    for daemon in [second, first] {
        let (status, log) = daemon.stop();
        assert!(status.success(), "{status}\n{log}");
    }
}

#[test]
fn hosts_are_shown() {
    let (hosts, places) = (Hosts::new(), [Place::new(), Place::new()]);
    let metrics = free();
    let config = hosts.config(0, "");
    let first = places[0].start_with(0, &["--config", config.to_str().unwrap(), "--metrics", &metrics.to_string()]);
    assert_eq!(state(&first).0, HostState::Down);
    let shown = first.says(&["hosts"]);
    assert!(shown.contains("host2") && shown.contains(&hosts.addresses[1].to_string()), "{shown}");
    assert!(shown.contains("down") && shown.contains("it has not connected"), "{shown}");
    assert!(figures(metrics).contains("freeflow_host_session{host=\"host2\"} 0"));
    let second = hosts.start(1, &places[1]);
    wait_for(&first, HostState::Up);
    let shown = first.says(&["--json", "hosts"]);
    assert!(shown.contains("\"state\": \"up\"") && shown.contains("\"version\": 1"), "{shown}");
    let figures = figures(metrics);
    for line in
        ["host_session{host=\"host2\"} 1", "host_sessions_total{host=\"host2\"} 1", "connections_accepted_total"]
    {
        assert!(figures.contains(&format!("freeflow_{line}")), "{line}: {figures}");
    }
    drop(second);
    let alone = Place::new();
    let daemon = alone.start(0);
    assert!(daemon.fails(&["hosts"]).contains("has no [cluster]"));
}

fn figures(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn certificates_are_read_again_by_a_sealed_daemon() {
    let (hosts, places) = (Hosts::new(), [Place::new(), Place::new()]);
    let other = Authority::new();
    hosts.write(1, &other, &other.sign(&[NAMES[1]]));
    let (first, second) = (hosts.start(0, &places[0]), hosts.start(1, &places[1]));
    eventually("a refusal", SOON, || state(&first).1.contains("refused") && state(&second).0 == HostState::Down);
    // A mistake changes nothing.
    std::fs::write(hosts.folder.path().join("host2/key.pem"), "no key").unwrap();
    let reload = || kill(Pid::from_raw(second.child.id().cast_signed()), Signal::SIGHUP).unwrap();
    reload();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(state(&second).0, HostState::Down);
    hosts.write(1, &hosts.authority, &hosts.authority.sign(&[NAMES[1]]));
    reload();
    wait_for(&first, HostState::Up);
    let (status, log) = second.stop();
    assert!(status.success(), "{status}\n{log}");
    assert!(log.contains("key.pem has no private key") && log.contains("were read again"), "{log}");
    eventually("its end", SOON, || state(&first).1.contains("its router stops"));
}

#[test]
fn the_examples_are_valid() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_freeflow-router"));
    let output = command.arg("--config").arg(folder.join("router.toml")).arg("--check").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let hosts = std::fs::read_to_string(folder.join("hosts.toml")).unwrap();
    let known = freeflow_router::cluster::directory::HostsFile::parse(&hosts).unwrap();
    assert_eq!(known.hosts().count(), 2);
}

#[test]
fn what_is_wrong_is_said_at_the_start() {
    let (hosts, place) = (Hosts::new(), Place::new());
    let refuses = |hosts: &Hosts| place.refuses(&["--config", hosts.config(0, "").to_str().unwrap()]);
    std::fs::remove_file(hosts.folder.path().join("host1/cert.pem")).unwrap();
    let error = refuses(&hosts);
    assert!(error.contains("host1/cert.pem ([cluster.tls] cert): No such file"), "{error}");
    hosts.write(0, &hosts.authority, &hosts.authority.sign(&[NAMES[0]]));
    let taken = TcpListener::bind(hosts.addresses[0]).unwrap();
    let error = refuses(&hosts);
    assert!(error.contains("for other hosts ([cluster] listen)") && error.contains("in use"), "{error}");
    drop(taken);
    // Its own guests need no other host: it starts, and says what is wrong.
    hosts.write(0, &hosts.authority, &hosts.authority.sign_until(&[NAMES[0]], 2020));
    let place = Place::new();
    let (status, log) = hosts.start(0, &place).stop();
    assert!(status.success() && log.contains("other hosts will not accept the certificate"), "{log}");
    assert!(log.to_lowercase().contains("expired"), "{log}");
}
