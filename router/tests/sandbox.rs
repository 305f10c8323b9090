//! The daemon itself, without privileges and behind its system-call filter, under guests that use all of it.
#![allow(missing_docs, reason = "a test program")]

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use freeflow_router::api;
use freeflow_router::sandbox::{Sandbox, Seccomp, Security, Uses};
use freeflow_tests::bed::eventually;
use freeflow_tests::guest::Guest;
use freeflow_tests::guest::verbs::{MrSpec, Op, QpSpec, Rc, RcOptions, SendWr};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use virtio_rdma::ib::WcStatus;

mod common;

use common::{Daemon, Place, SOON};

fn status_field(path: &Path, field: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn write(a: &Rc, b: &Rc) {
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 4096)])).unwrap();
    a.cq.next().ok();
}

#[test]
fn all_threads_are_without_privileges() {
    let place = Place::new();
    let daemon = place.start(2);
    // The last filter is installed a moment after the control socket answers.
    let threads = |field: &str| status_of(daemon.child.id(), field);
    eventually("the last filter", SOON, || threads("Seccomp_filters").iter().all(|value| value == "4"));
    assert!(threads("Uid").len() >= 5, "main, control, a worker, two virtual NICs");
    assert_without_privileges(daemon.child.id());
    let steward = children_of(daemon.child.id());
    assert_eq!(steward.len(), 1, "one process beside it");
    eventually("the steward's filter", SOON, || status_of(steward[0], "Seccomp_filters") == ["1"]);
    assert_without_privileges(steward[0]);
}

fn assert_without_privileges(process: u32) {
    let all = |field: &str, expected: &str| status_of(process, field).iter().all(|value| value == expected);
    assert!(all("NoNewPrivs", "1"));
    assert!(all("Seccomp", "2"));
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        assert!(all(set, "0000000000000000"), "{set}");
    }
    if Uid::effective().is_root() {
        assert!(all("CapBnd", "0000000000000000"));
        for ids in ["Uid", "Gid"] {
            assert!(all(ids, "65534 65534 65534 65534"), "{ids}");
        }
        assert!(status_of(process, "Groups").iter().all(|value| value == "65534" || value.is_empty()));
    }
}

fn children_of(process: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap();
    children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// A field of the status of each thread of a process.
fn status_of(process: u32, field: &str) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap();
    tasks.map(|task| status_field(&task.unwrap().path().join("status"), field)).collect()
}

/// Guests that come, work, sleep, change their memory, lose it, and go: none of that makes a call that is not allowed.
#[test]
fn guests_can_do_everything() {
    let place = Place::new();
    let daemon = place.start(2);
    let (first, second) = (daemon.guest(0), daemon.guest(1));
    let impatient = RcOptions { timeout: 8, retry_cnt: 2, ..RcOptions::default() };
    let (a, b) = Rc::pair_with(&first, &second, &QpSpec::rc(), 4096, &impatient).unwrap();
    write(&a, &b);
    sleep_for_a_completion(&a, &b);
    refuse(&first, &second);
    stop_and_start(&second);
    write(&a, &b);
    lose_memory(&daemon, &second, &a, &b);
    let again = daemon.guest(1);
    let (a, b) = Rc::pair(&first, &again, 4096).unwrap();
    write(&a, &b);
    api::qps(&daemon.control()).unwrap();
    drop((a, b, again, first));
    let (status, log) = daemon.stop();
    assert!(status.success(), "{status}\n{log}");
}

fn sleep_for_a_completion(a: &Rc, b: &Rc) {
    // Longer than a worker polls, so that both sides sleep.
    std::thread::sleep(Duration::from_millis(20));
    b.qp.post_recv(7, &[b.mr.sge(0, 64)]).unwrap();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| b.cq.next_sleeping(SOON).unwrap());
        std::thread::sleep(Duration::from_millis(20));
        a.qp.post(SendWr::inline(2, Op::Send, b"wake up")).unwrap();
        assert_eq!(receiver.join().unwrap().ok().wr_id(), 7);
    });
    a.cq.next().ok();
}

/// Who may lock next to nothing, and cannot change that, is told before it opens a NIC.
#[test]
fn a_nic_is_not_used_with_a_small_limit_of_locked_memory() {
    let place = Place::new();
    let mut command = Command::new("prlimit");
    command.arg("--memlock=1048576:1048576");
    if Uid::effective().is_root() {
        command.args(["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]);
    }
    command.args([env!("CARGO_BIN_EXE_freeflow-router"), "--rdma-device", "auto", "--control"]);
    let output = command.arg(place.run().join("control.sock")).arg("--state").arg(place.state()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in ["--rdma-device auto", "no more than 1024 KiB", "RLIMIT_MEMLOCK", "LimitMEMLOCK=infinity"] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
}

/// A refusal, with a warning in the log.
fn refuse(first: &Guest, second: &Guest) {
    let (a, b) = Rc::pair(first, second, 4096).unwrap();
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(4096)), &[a.mr.sge(0, 8)])).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RemAccessErr);
}

fn stop_and_start(guest: &Guest) {
    let bases = guest.stop_queues().unwrap();
    guest.start_queues_at(&bases).unwrap();
}

/// The VMM takes memory away behind the daemon's back: SIGBUS, and the end of its session.
fn lose_memory(daemon: &Daemon<'_>, guest: &Guest, a: &Rc, b: &Rc) {
    let region = guest.memory().plug(1 << 40, 16 << 20).unwrap();
    guest.with_connection(|vmm| vmm.add_region(&region)).unwrap();
    let plugged = Arc::new(guest.memory().view(1 << 40, 16 << 20).unwrap());
    let mr = b.pd.reg_spec(MrSpec::whole(&plugged)).unwrap();
    region.truncate().unwrap();
    a.qp.post(SendWr::new(1, Op::Write(mr.remote(0)), &[a.mr.sge(0, 4096)])).unwrap();
    a.cq.next();
    eventually("end of the session", SOON, || !api::nics(&daemon.control()).unwrap()[1].connected);
}

/// What [`forbidden`] is told to do, and whether the daemon may do it at its start, and when it runs.
const CALLS: [(&str, bool, bool); 18] = [
    ("nothing", true, true),
    // When it runs, it gets an error.
    ("open", true, true),
    ("give-memory-back", true, true),
    ("thread", true, true),
    ("fork", true, false),
    ("connect", true, false),
    ("write-file", false, false),
    ("internet", false, false),
    ("tcp", false, false),
    ("tcp-in-cluster", true, true),
    ("tcp6-in-cluster", true, true),
    ("internet-in-cluster", false, false),
    ("connect-in-cluster", true, false),
    ("listen-in-cluster", true, false),
    ("program", false, false),
    ("kill", false, false),
    ("nic", false, false),
    ("nic-in-use", true, true),
];

/// Not a test by itself: the process that [`refused_calls_end_the_daemon`] starts.
#[test]
#[ignore = "only as a process of its own"]
fn forbidden() {
    let Ok(plan) = std::env::var("FREEFLOW_FORBIDDEN") else {
        return;
    };
    let [mode, stage, call] = plan.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let security = Security { user: None, seccomp: mode.parse().unwrap() };
    let sandbox =
        Sandbox::new(&security, Uses { nic: call == "nic-in-use", network: call.ends_with("-in-cluster") }).unwrap();
    let (go, wait) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || wait.recv().is_ok().then(give_memory_back));
    sandbox.drop_privileges(&[]).unwrap();
    sandbox.enter().unwrap();
    if stage == "running" {
        sandbox.seal().unwrap();
    }
    // Whether they work does not matter: the process lives or not.
    match call {
        "nothing" => {}
        "open" => {
            let opened = std::fs::File::open("/etc/passwd").is_ok();
            assert_eq!(opened, mode == "off" || stage == "start");
        }
        "give-memory-back" => {
            go.send(()).unwrap();
            thread.join().unwrap().unwrap();
        }
        "write-file" => drop(std::fs::OpenOptions::new().write(true).open("/dev/null")),
        "thread" => drop(std::thread::Builder::new().spawn(|| {}).map(std::thread::JoinHandle::join)),
        "fork" => drop(Command::new("/nowhere").spawn()),
        "tcp" | "tcp-in-cluster" => drop(std::net::TcpStream::connect("127.0.0.1:1")),
        "tcp6-in-cluster" => drop(std::net::TcpStream::connect("[::1]:1")),
        "listen-in-cluster" => drop(std::net::TcpListener::bind("127.0.0.1:0")),
        "connect" | "connect-in-cluster" => drop(std::os::unix::net::UnixStream::connect("/nowhere")),
        "internet" | "internet-in-cluster" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
        "program" => drop(Command::new("/nowhere").exec()),
        "kill" => drop(kill(Pid::from_raw(std::process::id().cast_signed()), None)),
        "nic" | "nic-in-use" => command_a_nic(),
        _ => unreachable!(),
    }
    // Not by way of the test harness, which does all kinds of things.
    nix::unistd::write(std::io::stdout(), b"survived").unwrap();
    std::process::exit(0);
}

/// The first time that a thread's heap shrinks, glibc opens `/proc/sys/vm/overcommit_memory`.
fn give_memory_back() {
    drop((0..100).map(|_| vec![1u8; 100_000]).collect::<Vec<_>>());
}

/// `RDMA_VERBS_IOCTL`, to nobody.
#[expect(unsafe_code, reason = "ioctl")]
fn command_a_nic() {
    // SAFETY: there is no such descriptor, so the kernel reads and writes nothing.
    unsafe { libc::ioctl(-1, 0xc018_1b01, std::ptr::null_mut::<u8>()) };
}

fn survives(mode: &str, stage: &str, call: &str) -> bool {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "forbidden", "--ignored", "--nocapture", "--test-threads=1"])
        .env("FREEFLOW_FORBIDDEN", format!("{mode} {stage} {call}"))
        .output()
        .unwrap();
    let survived = String::from_utf8_lossy(&output.stdout).contains("survived");
    if !survived {
        assert_eq!(output.status.signal(), Some(Signal::SIGSYS as i32), "{mode} {stage} {call}: {output:?}");
    }
    survived
}

#[test]
fn refused_calls_end_the_daemon() {
    assert_eq!(Seccomp::default(), Seccomp::Enforce);
    for (call, at_start, running) in CALLS {
        assert_eq!(survives("enforce", "start", call), at_start, "{call} at the start");
        assert_eq!(survives("enforce", "running", call), running, "{call} when running");
    }
}

#[test]
fn a_filter_that_only_logs_ends_nothing() {
    for (call, ..) in CALLS {
        assert!(survives("log", "running", call), "{call}");
        assert!(survives("off", "running", call), "{call}");
    }
}

#[test]
fn a_user_that_is_not_there_is_a_mistake() {
    let place = Place::new();
    let error = place.refuses(&["--user", "no-such-user", "--nic", "name=a,ip=10.0.0.1,socket=/nowhere/a.sock"]);
    assert!(error.contains("no user \"no-such-user\""), "{error}");
    assert!(!place.run().exists(), "nothing was made for it");
}
