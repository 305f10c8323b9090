//! What Prometheus and `freeflow top` are told.
#![allow(missing_docs, reason = "a test program")]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::time::Duration;

use common::{Daemon, Place, SOON};
use freeflow_tests::bed::eventually;
use freeflow_tests::guest::verbs::{AhAttr, Op, QpSpec, Rc, SendWr};
use virtio_rdma::ib::WcStatus;

/// An address of the loopback that no other test has, nor another run of these.
fn own_address() -> SocketAddr {
    static COUNT: AtomicU8 = AtomicU8::new(1);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    SocketAddr::from(([127, high, low, COUNT.fetch_add(1, Relaxed)], 9464))
}

fn ask(at: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

fn figures(at: SocketAddr) -> String {
    let reply = ask(at, "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(reply.starts_with("HTTP/1.1 200 OK\r\n") && reply.contains("application/openmetrics-text"), "{reply}");
    reply
}

/// A hundred WRITEs of 4 KiB from the first guest to the second.
fn traffic(daemon: &Daemon<'_>) -> (Rc, Rc) {
    let (a, b) = Rc::pair(&daemon.guest(0), &daemon.guest(1), 4096).unwrap();
    for _ in 0..100 {
        a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 4096)])).unwrap();
        a.cq.next().ok();
    }
    (a, b)
}

#[test]
fn prometheus_sees_what_there_is() {
    let (place, at) = (Place::new(), own_address());
    let daemon = place.start_with(2, &["--metrics", &at.to_string()]);
    let ends = traffic(&daemon);
    let labels = r#"{nic="n0",tenant="default""#;
    // Counters are added to at the end of a visit.
    eventually("the work requests", SOON, || {
        figures(at).contains(&format!("freeflow_nic_send_wqes_total{labels}}} 100\n"))
    });
    let text = figures(at);
    for line in [
        format!("freeflow_nic_send_bytes_total{labels}}} 409600\n"),
        format!("freeflow_nic_running{labels}}} 1\n"),
        format!("freeflow_nic_objects{labels},kind=\"qp\"}} 1\n"),
        format!("freeflow_nic_qps{labels},type=\"RC\",state=\"RTS\",path=\"local\"}} 1\n"),
        "# HELP freeflow_nic_rnr_waits Waits for a receive of the peer.\n".to_owned(),
        "freeflow_worker_sleeps_total{worker=\"0\"} ".to_owned(),
        "freeflow_worker_asleep_seconds_total{worker=\"0\"} ".to_owned(),
        "freeflow_worker_awake_seconds_total{worker=\"0\"} ".to_owned(),
        format!("freeflow_path_wqes_total{labels},type=\"RC\",path=\"local\"}} 100\n"),
        format!("freeflow_path_bytes_total{labels},type=\"RC\",path=\"local\"}} 409600\n"),
        format!("freeflow_path_latency_seconds_bucket{{le=\"+Inf\",{},type=\"RC\",path=\"local\"}} ", &labels[1..]),
        format!("freeflow_nic_queue_depth{labels},type=\"RC\",queue=\"send\",path=\"local\"}} 0\n"),
        format!("freeflow_nic_qps_scheduled{labels},type=\"RC\",path=\"local\"}} 0\n"),
    ] {
        assert!(text.contains(&line), "{line}{text}");
    }
    assert!(text.ends_with("# EOF\n"), "{text}");
    drop(ends);
    let (status, log) = daemon.stop();
    assert!(status.success(), "{status}\n{log}");
}

/// Figures whose names begin so: each with its labels, and its value.
fn series(at: SocketAddr, name: &str) -> Vec<(String, f64)> {
    let text = figures(at);
    let lines = text.lines().filter(|line| line.starts_with(name));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name.into(), value.parse().unwrap()))
        .collect()
}

#[test]
fn failures_are_counted_by_their_cause() {
    let (place, at) = (Place::new(), own_address());
    let daemon = place.start_with(2, &["--metrics", &at.to_string()]);
    let (a, b) = traffic(&daemon);
    b.qp.post_recv(1, &[b.mr.sge(0, 8)]).unwrap();
    // Longer than the receive; another is flushed behind it.
    a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, 64)])).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RemInvReqErr);
    assert_eq!(b.cq.next().status(), WcStatus::LocLenErr);
    a.qp.post(SendWr::new(2, Op::Send, &[a.mr.sge(0, 64)])).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::WrFlushErr);
    let sent = r#"freeflow_path_failures_total{nic="n0",tenant="default",type="RC",path="local",status="#;
    let received = r#"freeflow_nic_receive_failures_total{nic="n1",tenant="default",type="RC",status="#;
    for line in [
        format!("{sent}\"REM_INV_REQ_ERR\"}} 1\n"),
        format!("{sent}\"WR_FLUSH_ERR\"}} 1\n"),
        format!("{received}\"LOC_LEN_ERR\"}} 1\n"),
    ] {
        eventually(&format!("{line}: {:?}", series(at, "freeflow_path_failures")), SOON, || {
            figures(at).contains(&line)
        });
    }
}

/// What a guest does decides how much is counted, and hardly how many series there are.
#[test]
fn a_guest_cannot_make_series_without_end() {
    let (place, at) = (Place::new(), own_address());
    let daemon = place.start_with(2, &["--metrics", &at.to_string()]);
    let guests = [daemon.guest(0), daemon.guest(1)];
    let end = Rc::new(&guests[0], QpSpec::ud(), 4096).unwrap();
    end.qp.to_ud(1).unwrap();
    for number in 0..300 {
        // To everybody of whom there is an address or a number, and to many of whom there is none.
        let gid = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, (number >> 8) as u8, number as u8];
        let ah = end.pd.create_ah(AhAttr::to(gid, 1)).unwrap();
        let op = Op::UdSend { ah: ah.number(), qpn: number, qkey: 1, imm: None };
        end.qp.post(SendWr::inline(1, op, b"hello")).unwrap();
        end.cq.next().ok();
    }
    let wqes = || series(at, "freeflow_path_wqes_total");
    eventually("all of them", SOON, || wqes().iter().map(|(_, count)| count).sum::<f64>() >= 300.0);
    assert!(wqes().len() <= 3, "{:?}", wqes());
    let all = figures(at).lines().count();
    assert!(all < 600, "{all} lines");
}

#[test]
fn other_requests_are_told_what_is_wrong() {
    let (place, at) = (Place::new(), own_address());
    let daemon = place.start_with(0, &["--metrics", &at.to_string()]);
    for (request, status) in
        [("GET / HTTP/1.1\r\n\r\n", "404"), ("POST /metrics HTTP/1.1\r\n\r\n", "405"), ("what?\r\n\r\n", "400")]
    {
        assert!(ask(at, request).starts_with(&format!("HTTP/1.1 {status} ")), "{request}");
    }
    // What is allowed, to the byte: closing a connection with more unread would lose the answer.
    let endless = format!("GET /metrics HTTP/1.1\r\nX: {}", "a".repeat(8 * 1024));
    assert!(ask(at, &endless[..8 * 1024]).starts_with("HTTP/1.1 400 "));
    drop(daemon);
}

/// Who connects and says nothing, or too slowly, is cut, and others are served after it.
#[test]
fn a_silent_client_is_cut() {
    let (place, at) = (Place::new(), own_address());
    let _daemon = place.start_with(0, &["--metrics", &at.to_string()]);
    let mut silent = TcpStream::connect(at).unwrap();
    let mut slow = TcpStream::connect(at).unwrap();
    let drip = std::thread::spawn(move || {
        // A byte now and then would renew a timeout of each read.
        while slow.write_all(b"G").is_ok() {
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    figures(at);
    drip.join().unwrap();
}

#[test]
fn an_address_that_is_taken_is_a_mistake() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let error = place.refuses(&["--metrics", &taken.local_addr().unwrap().to_string()]);
    assert!(error.contains("for metrics"), "{error}");
}

#[test]
fn top_shows_who_works() {
    let place = Place::new();
    let daemon = place.start(2);
    let (a, b) = traffic(&daemon);
    let done = AtomicBool::new(false);
    let (table, json) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 4096)])).unwrap();
                a.cq.next().ok();
            }
        });
        let table = daemon.says(&["top", "--interval", "0.2", "--count", "1"]);
        let json = daemon.says(&["top", "--json", "--interval", "0.2", "--count", "2"]);
        done.store(true, Relaxed);
        (table, json)
    });
    assert!(table.contains("OPS/S") && table.contains("RC") && table.contains("local"), "{table}");
    assert!(table.contains("P99 <=") && table.contains(" us"), "{table}");
    assert_eq!(json.lines().count(), 2);
    for line in json.lines() {
        let look: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(look["nics"][0]["ops"].as_f64().unwrap() > 10.0, "{line}");
        let path = &look["paths"][0];
        assert_eq!((&path["type"], &path["path"]), (&"RC".into(), &"local".into()));
        assert!(path["ops"].as_f64().unwrap() > 10.0 && path["p99"].as_f64().is_some(), "{line}");
        assert_eq!(look["qps"][0]["qpn"], a.qp.number());
    }
}
