//! Virtual NICs that come and go while the daemon runs: `freeflow nic`.
#![allow(missing_docs, reason = "a test program")]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{Daemon, Place, SOON, guest_on};
use freeflow_router::api;
use freeflow_tests::bed::eventually;
use freeflow_tests::guest::verbs::{Op, QpSpec, Rc, RcOptions, SendWr};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use virtio_rdma::ib::WcStatus;

/// A virtual NIC with the addresses that guest `n` of the tests has.
fn add(daemon: &Daemon<'_>, n: u8) -> String {
    let (name, ip, ip6) = (format!("added{n}"), format!("10.0.0.{n}/24"), format!("fd00::{n}"));
    let mac = format!("02:00:00:00:00:0{n}");
    daemon.says(&["nic", "add", "--name", &name, "--ip", &ip, "--ip", &ip6, "--mac", &mac])
}

fn names(daemon: &Daemon<'_>) -> Vec<String> {
    api::nics(&daemon.control()).unwrap().into_iter().map(|nic| nic.config.name).collect()
}

fn write(a: &Rc, b: &Rc) -> WcStatus {
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 4096)])).unwrap();
    a.cq.next().status()
}

#[test]
fn guests_of_added_nics_talk_to_those_of_configured_ones() {
    let place = Place::new();
    let daemon = place.start(1);
    let socket = add(&daemon, 2);
    assert_eq!(Path::new(&socket), daemon.path("added2.sock"));
    let (first, second) = (daemon.guest(0), guest_on(Path::new(&socket), 1));
    let (a, b) = Rc::pair(&first, &second, 4096).unwrap();
    assert_eq!([write(&a, &b), write(&b, &a)], [WcStatus::Success; 2]);
    drop((a, b, first, second));
    let (status, log) = daemon.stop();
    assert!(status.success(), "{status}\n{log}");
}

#[test]
fn a_removed_nic_is_as_one_that_never_was_and_may_come_back() {
    let place = Place::new();
    let daemon = place.start(1);
    let first = daemon.guest(0);
    for _ in 0..3 {
        let second = guest_on(Path::new(&add(&daemon, 2)), 1);
        let impatient = RcOptions { timeout: 8, retry_cnt: 2, ..RcOptions::default() };
        let (a, b) = Rc::pair_with(&first, &second, &QpSpec::rc(), 4096, &impatient).unwrap();
        assert_eq!(write(&a, &b), WcStatus::Success);
        assert_eq!(daemon.says(&["nic", "del", "added2"]), "removed added2");
        assert_eq!(write(&a, &b), WcStatus::RetryExcErr);
        assert!(!daemon.path("added2.sock").exists());
    }
    assert_eq!(names(&daemon), ["n0"]);
}

#[test]
fn commands_can_be_repeated() {
    let place = Place::new();
    let daemon = place.start(0);
    let socket = add(&daemon, 2);
    assert_eq!(add(&daemon, 2), socket);
    let again = daemon.says(&[
        "--json",
        "nic",
        "add",
        "--name",
        "added2",
        "--ip",
        "10.0.0.2",
        "--ip",
        "fd00::2",
        "--mac",
        "02:00:00:00:00:02",
    ]);
    assert!(again.contains("\"created\": false"), "{again}");
    let other = daemon.fails(&["nic", "add", "--name", "added2", "--ip", "10.0.0.2", "--qps", "7"]);
    assert!(other.contains("another ip, limits, mac") && other.contains("nic del added2"), "{other}");
    assert_eq!(daemon.says(&["nic", "del", "added2"]), "removed added2");
    assert_eq!(daemon.says(&["nic", "del", "added2"]), "there was no virtual NIC added2");
}

#[test]
fn what_is_not_possible_is_refused_and_changes_nothing() {
    let place = Place::new();
    let daemon = place.start(1);
    for (args, expected) in [
        (&["--ip", "10.0.0.1"][..], "\"n0\" and \"default-10.0.0.1\" both have address 10.0.0.1"),
        (&["--ip", "10.0.0.9", "--workers", "2"], "no more than engine.workers"),
        (&["--ip", "10.0.0.9", "--path", "nic"], "start it with --rdma-device"),
        (&["--ip", "10.0.0.9", "--qps", "0"], "max_qp must be between 1 and"),
        (&["--ip", "10.0.0.9", "--limit", "max_qps=1"], "unknown field `max_qps`"),
        (&["--ip", "10.0.0.9", "--socket", "/nowhere/a.sock"], "No such file or directory"),
        (&["--ip", "10.0.0.9", "--socket", "/etc/passwd"], "cannot listen on /etc/passwd"),
    ] {
        let error = daemon.fails(&[&["nic", "add"], args].concat());
        assert!(error.contains(expected), "{args:?}: {error}");
    }
    let error = daemon.fails(&["nic", "del", "n0"]);
    assert!(error.contains("in the router's configuration"), "{error}");
    assert_eq!(names(&daemon), ["n0"]);
    assert!(!place.state().exists());
}

#[test]
fn a_nic_that_cannot_be_kept_is_not_added() {
    let place = Place::new();
    let daemon = place.start(0);
    std::fs::remove_dir(place.state().parent().unwrap()).unwrap();
    std::fs::write(place.state().parent().unwrap(), "no folder").unwrap();
    let error = daemon.fails(&["nic", "add", "--ip", "10.0.0.2"]);
    assert!(error.contains("cannot keep the virtual NICs") && error.contains("--state"), "{error}");
    assert_eq!(names(&daemon), Vec::<String>::new());
    assert!(!daemon.path("default-10.0.0.2.sock").exists());
}

#[test]
fn added_nics_survive_a_restart() {
    let place = Place::new();
    let daemon = place.start(1);
    let (second, third) = (add(&daemon, 2), add(&daemon, 3));
    daemon.says(&["nic", "del", "added3"]);
    daemon.stop();
    let daemon = place.start(1);
    assert_eq!(names(&daemon), ["n0", "added2"]);
    let shown = daemon.says(&["nic", "show", "added2"]);
    assert!(shown.contains("10.0.0.2 fd00::2") && shown.contains(&second), "{shown}");
    let error = daemon.fails(&["nic", "show", "added3"]);
    assert!(error.contains("only n0, added2"), "{error}");
    let (first, second) = (daemon.guest(0), guest_on(Path::new(&second), 1));
    let (a, b) = Rc::pair(&first, &second, 4096).unwrap();
    assert_eq!(write(&a, &b), WcStatus::Success);
    assert!(!Path::new(&third).exists());
}

/// By the clock: how long what goes beyond the burst takes.
fn time_of(a: &Rc, b: &Rc, writes: u64) -> Duration {
    let start = Instant::now();
    for _ in 0..writes {
        assert_eq!(write(a, b), WcStatus::Success);
    }
    start.elapsed()
}

#[test]
fn a_rate_holds_at_once_and_after_a_restart() {
    let place = Place::new();
    let daemon = place.start(1);
    let socket = add(&daemon, 2);
    let (first, second) = (daemon.guest(0), guest_on(Path::new(&socket), 1));
    let (a, b) = Rc::pair(&first, &second, 4096).unwrap();
    let said = daemon.says(&["nic", "set", "added2", "--rate", "8M", "--burst-ms", "0"]);
    assert_eq!(said, "added2: 8M bit/s, burst 0 ms");
    // 25 KiB and more at a million bytes a second: each but the first waits for the one before.
    assert!(time_of(&b, &a, 7) >= Duration::from_millis(24));
    let waits = || api::nics(&daemon.control()).unwrap()[1].counters.rate_waits;
    // Not each: who is given the processor late posts when the one before has been made up for.
    assert!(waits() >= 1);
    daemon.says(&["nic", "set", "added2", "--rate", "none"]);
    let before = waits();
    time_of(&b, &a, 7);
    assert_eq!(waits(), before);
    daemon.says(&["nic", "set", "added2", "--ops", "200"]);
    assert!(daemon.says(&["nic", "set", "n0", "--ops", "5"]).contains("until the next start"));
    assert!(daemon.fails(&["nic", "set", "added3", "--ops", "5"]).contains("no virtual NIC \"added3\""));
    assert!(daemon.fails(&["nic", "set", "n0", "--burst-ms", "10001"]).contains("at most 10000"));
    drop((a, b, first, second));
    daemon.stop();
    let daemon = place.start(1);
    let shown = daemon.says(&["nic", "show", "added2"]);
    assert!(shown.contains("200 ops/s, burst 0 ms"), "{shown}");
    assert!(daemon.says(&["nic", "show", "n0"]).contains("unlimited"));
    let (first, second) = (daemon.guest(0), guest_on(Path::new(&socket), 1));
    let (a, b) = Rc::pair(&first, &second, 4096).unwrap();
    assert!(time_of(&b, &a, 5) >= Duration::from_millis(20));
}

/// What the daemon itself cannot do any more when it is killed.
#[test]
fn the_steward_removes_the_sockets_of_a_daemon_that_was_killed() {
    let place = Place::new();
    let daemon = place.start(1);
    let sockets = [daemon.path("nic0"), add(&daemon, 2).into()];
    assert!(sockets.iter().all(|socket| socket.exists()));
    kill(Pid::from_raw(daemon.child.id().cast_signed()), Signal::SIGKILL).unwrap();
    eventually("the sockets' end", SOON, || !sockets.iter().any(|socket| socket.exists()));
    drop(daemon);
    assert_eq!(names(&place.start(1)), ["n0", "added2"]);
}

/// As `systemctl reload` sends it. There are no certificates to read again.
#[test]
fn a_hangup_does_not_end_a_daemon_without_a_cluster() {
    let place = Place::new();
    let daemon = place.start(1);
    kill(Pid::from_raw(daemon.child.id().cast_signed()), Signal::SIGHUP).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(names(&daemon), ["n0"]);
    let (status, log) = daemon.stop();
    assert!(status.success() && log.contains("nothing is read again"), "{status}\n{log}");
}

#[test]
fn without_its_steward_a_daemon_serves_what_it_has() {
    let place = Place::new();
    let daemon = place.start(2);
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.child.id())).unwrap();
    kill(Pid::from_raw(children.trim().parse().unwrap()), Signal::SIGKILL).unwrap();
    for _ in 0..2 {
        let error = daemon.fails(&["nic", "add", "--ip", "10.0.0.9"]);
        assert!(error.contains("steward") && error.contains("restart freeflow-router"), "{error}");
    }
    let (first, second) = (daemon.guest(0), daemon.guest(1));
    let (a, b) = Rc::pair(&first, &second, 4096).unwrap();
    assert_eq!(write(&a, &b), WcStatus::Success);
}

#[test]
fn a_state_that_is_not_ours_is_refused() {
    let place = Place::new();
    std::fs::create_dir(place.state().parent().unwrap()).unwrap();
    std::fs::write(place.state(), "nic = 7").unwrap();
    let error = place.refuses(&[]);
    assert!(error.contains("not what a router of this version writes"), "{error}");
}
