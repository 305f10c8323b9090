//! Between hosts: what is different there. That everything else is not, all tests show with `FREEFLOW_TEST_PATH=tcp`, and `=cut`.
#![allow(missing_docs, reason = "a test program")]

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use freeflow_tcp::frame::{Frame, Hello, MAX_HEADER, Packet, VERSIONS};
use freeflow_tests::bed::{Bed, Witness, eventually};
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{AhAttr, Op, QpSpec, Rc, RcOptions, SendWr, Wc};
use freeflow_tests::guest::{Guest, GuestConfig};
use freeflow_tests::mesh::{Network, host_id};
use freeflow_tests::router::{Hosts, RouterSpec};
use virtio_rdma::ib::{QpState, WcStatus};
use virtio_rdma::ring::GRH_SIZE;

/// Long enough for a message to have come if it were to come.
const A_WHILE: Duration = Duration::from_millis(60);

fn bed(nics: usize, network: Network) -> Bed {
    let spec = RouterSpec { hosts: Hosts::Each(network), device: None, ..RouterSpec::of(nics) };
    Bed::with(&spec, Placement::Contiguous)
}

fn write(a: &Rc, b: &Rc, len: usize) -> WcStatus {
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, len)])).unwrap();
    a.cq.next().status()
}

#[test]
fn the_way_is_told() {
    let bed = bed(2, Network::Good);
    let (a, b) = bed.pair(4096);
    a.mr.write(0, b"over there");
    assert_eq!(write(&a, &b, 10), WcStatus::Success);
    assert_eq!(b.mr.read(0, 10), b"over there");
    let qps = bed.router.router().qps();
    let qp = qps.iter().find(|qp| qp.qpn == a.qp.number()).unwrap();
    assert_eq!((qp.path.as_deref(), qp.completed, qp.bytes), (Some("tcp"), 1, 10));
}

/// Every byte is compared by the witnesses, and by `FREEFLOW_TEST_PATH=cut` of all other suites.
#[test]
fn messages_survive_connections_that_break() {
    let bed = bed(3, Network::Cut);
    // A connection that breaks several times before it has worked once is tried again later and later: for two seconds all in all.
    let options = RcOptions { timeout: 16, retry_cnt: 7, ..RcOptions::default() };
    let start = |(a, b): (usize, usize)| Witness::start_with(&bed.guests[a], &bed.guests[b], &options);
    let witnesses: Vec<_> = [(0, 1), (1, 2), (2, 0)].map(start).into();
    eventually("connections that break", Duration::from_mins(1), || bed.router.mesh().cuts() >= 30);
    witnesses.into_iter().for_each(Witness::finish);
}

/// More of a long message arrives each time than was there before.
#[test]
fn long_messages_survive_connections_that_break() {
    const LEN: usize = 32 << 20;
    let spec = RouterSpec { hosts: Hosts::Each(Network::Cut), device: None, ..RouterSpec::of(2) };
    let config = GuestConfig { memory_size: 128 << 20, ..Default::default() };
    let bed = Bed::guests(&spec, &config);
    let options = RcOptions { timeout: 18, retry_cnt: 7, ..RcOptions::default() };
    let (a, b) = Rc::pair_with(&bed.guests[0], &bed.guests[1], &QpSpec::rc(), LEN, &options).unwrap();
    let start = Instant::now();
    let mut round = 0u8;
    while bed.router.mesh().cuts() < 10 {
        assert!(start.elapsed() < Duration::from_mins(1), "connections break");
        round = round.wrapping_add(1);
        let bytes: Vec<u8> = (0..LEN).map(|i| (i / 4096) as u8 ^ i as u8 ^ round).collect();
        a.mr.write(0, &bytes);
        assert_eq!(write(&a, &b, LEN), WcStatus::Success);
        assert!(b.mr.read(0, LEN) == bytes, "what was written, round {round}");
        b.mr.write(0, &vec![0; LEN]);
        b.qp.post(SendWr::new(2, Op::Read(a.mr.remote(0)), &[b.mr.sge(0, LEN)])).unwrap();
        b.cq.next().ok();
        assert!(b.mr.read(0, LEN) == bytes, "what was read, round {round}");
    }
}

/// What is late, and what is lost on the way and sent again by TCP, is waited for; `FREEFLOW_TEST_PATH=bad` has other suites over such a network.
#[test]
fn messages_survive_a_bad_network() {
    let bed = bed(3, Network::Bad);
    // As long as a segment that is sent again may take.
    let options = RcOptions { timeout: 16, retry_cnt: 7, ..RcOptions::default() };
    let start = |(a, b): (usize, usize)| Witness::start_with(&bed.guests[a], &bed.guests[b], &options);
    let witnesses: Vec<_> = [(0, 1), (1, 2), (2, 0)].map(start).into();
    eventually("losses", Duration::from_mins(1), || bed.router.mesh().losses() >= 5);
    witnesses.into_iter().for_each(Witness::finish);
}

/// An unreliable message is complete when it is sent, and its memory is written to again at once: what arrives is what was sent.
#[test]
fn unreliable_messages_are_what_was_sent() {
    const LEN: usize = 64 << 10;
    const COUNT: usize = 200;
    let spec = RouterSpec { hosts: Hosts::Each(Network::Good), device: None, ..RouterSpec::of(2) };
    let config = GuestConfig { memory_size: 64 << 20, ..Default::default() };
    let bed = Bed::guests(&spec, &config);
    let (a, b) =
        Rc::pair_with(&bed.guests[0], &bed.guests[1], &QpSpec::uc(), COUNT * LEN, &RcOptions::default()).unwrap();
    let depth = b.qp.spec().recv_depth as usize;
    let (mut posted, mut arrived) = (0, 0);
    for round in 0..COUNT {
        while posted < arrived + depth && posted < COUNT {
            b.qp.post_recv(posted as u64, &[b.mr.sge(posted * LEN, LEN)]).unwrap();
            posted += 1;
        }
        a.mr.write(0, &vec![round as u8; LEN]);
        a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, LEN)])).unwrap();
        a.cq.next().ok();
        arrived += b.cq.poll_many(COUNT).len();
    }
    eventually("all messages", Duration::from_secs(10), || {
        arrived += b.cq.poll_many(COUNT).len();
        arrived == COUNT
    });
    for round in 0..COUNT {
        assert!(b.mr.read(round * LEN, LEN) == vec![round as u8; LEN], "message {round}");
    }
}

/// A connection takes as many datagrams as its host reads. What is posted beyond that waits in the send queue, as before a port that is busy.
#[test]
fn datagrams_wait_for_room_on_their_connection() {
    const LEN: usize = 4096;
    const COUNT: usize = 3000;
    const QKEY: u32 = 7;
    let spec = RouterSpec { hosts: Hosts::Each(Network::Good), device: None, ..RouterSpec::of(2) };
    let bed = Bed::guests(&spec, &GuestConfig { memory_size: 64 << 20, ..Default::default() });
    let (a, b) = bed.two();
    let depth = QpSpec { send_depth: COUNT as u32, recv_depth: COUNT as u32, ..QpSpec::ud() };
    let end = |guest: &Guest, len: usize| {
        let (pd, cq) = (guest.alloc_pd().unwrap(), guest.create_cq(COUNT as u32).unwrap());
        let (qp, mr) = (pd.create_qp(depth.clone(), &cq).unwrap(), pd.reg_new(len).unwrap());
        qp.to_ud(QKEY).unwrap();
        (pd, cq, qp, mr)
    };
    let (pd, sent, from, source) = end(a, LEN);
    let (_pd, received, to, target) = end(b, GRH_SIZE + LEN);
    (0..COUNT).for_each(|n| to.post_recv(n as u64, &[target.sge(0, GRH_SIZE + LEN)]).unwrap());
    let ah = pd.create_ah(AhAttr::to(b.gids()[1], 1)).unwrap();
    for n in 0..COUNT {
        let op = Op::UdSend { ah: ah.number(), qpn: to.number(), qkey: QKEY, imm: None };
        from.post(SendWr::new(n as u64, op, &[source.sge(0, LEN)])).unwrap();
    }
    sent.take(COUNT).iter().for_each(|wc| assert_eq!(wc.status(), WcStatus::Success));
    let mut arrived = 0;
    let start = Instant::now();
    while arrived < COUNT && start.elapsed() < Duration::from_secs(10) {
        arrived += received.poll_many(COUNT).len();
    }
    assert_eq!(arrived, COUNT);
}

/// Its peers' messages wait for it, and come when it runs again.
#[test]
fn a_guest_that_is_paused_is_waited_for() {
    let bed = bed(2, Network::Bad);
    let options = RcOptions { timeout: 18, retry_cnt: 7, ..RcOptions::default() };
    let (a, b) = Rc::pair_with(&bed.guests[0], &bed.guests[1], &QpSpec::rc(), 4096, &options).unwrap();
    for paused in [1, 0, 1, 0] {
        for (from, to) in [(&a, &b), (&b, &a)] {
            from.qp.post(SendWr::new(1, Op::Write(to.mr.remote(2048)), &[from.mr.sge(0, 2048)])).unwrap();
            from.qp.post(SendWr::new(2, Op::Read(to.mr.remote(0)), &[from.mr.sge(1024, 1024)])).unwrap();
        }
        let bases = bed.guests[paused].stop_queues().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        bed.guests[paused].start_queues_at(&bases).unwrap();
        for end in [&a, &b] {
            let ends: Vec<_> = end.cq.take(2).iter().map(|wc| (wc.wr_id(), wc.status())).collect();
            assert_eq!(ends, [(1, WcStatus::Success), (2, WcStatus::Success)], "guest {paused} was paused");
        }
    }
}

#[test]
fn a_host_that_is_gone_fails_what_waits_for_it_and_can_come_back() {
    let bed = bed(2, Network::Good);
    let (guest_a, guest_b) = bed.two();
    // For ever, were it not for the host that leaves.
    let options = RcOptions { timeout: 0, rnr_retry: 7, ..RcOptions::default() };
    let (a, b) = Rc::pair_with(guest_a, guest_b, &QpSpec::rc(), 4096, &options).unwrap();
    assert_eq!(write(&a, &b, 8), WcStatus::Success);
    for id in 0..3 {
        a.qp.post(SendWr::inline(id, Op::Send, b"nobody takes it")).unwrap();
    }
    assert!(a.cq.poll_for(Duration::from_millis(50)).is_none());
    bed.router.mesh().leave(0, 1);
    let statuses: Vec<_> = a.cq.take(3).iter().map(Wc::status).collect();
    assert_eq!(statuses, [WcStatus::RetryExcErr, WcStatus::WrFlushErr, WcStatus::WrFlushErr]);
    assert_eq!(a.qp.state().unwrap(), QpState::Err);
    bed.router.mesh().leave(1, 0);
    bed.router.mesh().pair(0, 1);
    let (c, d) = Rc::pair(guest_a, guest_b, 4096).unwrap();
    assert_eq!(write(&c, &d, 8), WcStatus::Success);
}

/// What was begun when a queue pair goes to SQD is finished; what was only looked at waits until it is back.
#[test]
fn a_drained_queue_pair_goes_on_where_it_was() {
    const LEN: usize = 256 << 10;
    const COUNT: usize = 48;
    let spec = RouterSpec { hosts: Hosts::Each(Network::Good), device: None, ..RouterSpec::of(2) };
    let config = GuestConfig { memory_size: 64 << 20, ..Default::default() };
    let bed = Bed::guests(&spec, &config);
    let (a, b) =
        Rc::pair_with(&bed.guests[0], &bed.guests[1], &QpSpec::rc(), COUNT * LEN, &RcOptions::default()).unwrap();
    for round in 0..4u8 {
        (0..COUNT).for_each(|n| a.mr.fill(n * LEN, LEN, n as u8 ^ round));
        for n in 0..COUNT {
            // More than may be on its way at once.
            let sges = [a.mr.sge(n * LEN, LEN)];
            a.qp.post(SendWr::new(n as u64, Op::Write(b.mr.remote(n * LEN)), &sges)).unwrap();
        }
        a.qp.modify_state(QpState::Sqd).unwrap();
        let mut done = Vec::new();
        eventually("the end of what was begun", Duration::from_secs(10), || {
            std::thread::sleep(A_WHILE);
            let before = done.len();
            done.extend(a.cq.poll_many(COUNT));
            done.len() == before
        });
        a.qp.modify_state(QpState::Rts).unwrap();
        done.extend(a.cq.take(COUNT - done.len()));
        assert!(done.iter().all(|wc| wc.status() == WcStatus::Success), "{done:?}");
        assert!((0..COUNT).all(|n| b.mr.read(n * LEN, LEN) == vec![n as u8 ^ round; LEN]));
    }
}

#[test]
fn a_host_that_is_cut_off_is_waited_for_as_long_as_the_queue_pair_says() {
    let bed = bed(2, Network::Good);
    let options = RcOptions { timeout: 8, retry_cnt: 2, ..RcOptions::default() };
    let (a, b) = Rc::pair_with(&bed.guests[0], &bed.guests[1], &QpSpec::rc(), 4096, &options).unwrap();
    assert_eq!(write(&a, &b, 8), WcStatus::Success);
    // The other side does not take connections any more.
    bed.router.mesh().leave(1, 0);
    assert_eq!(write(&a, &b, 8), WcStatus::RetryExcErr);
}

/// What a peer says that has a ticket, and nothing good in mind.
#[test]
fn a_peer_that_talks_nonsense_disturbs_nobody() {
    let bed = bed(3, Network::Good);
    let witness = Witness::start(&bed.guests[1], &bed.guests[2]);
    // Host 2 takes connections of host 0, which makes none itself any more: the newest one counts.
    bed.router.mesh().leave(0, 2);
    let (at, ticket) = bed.router.mesh().door_of(2, 0);
    let hello = Hello {
        versions: VERSIONS,
        host: host_id(0),
        peer: host_id(2),
        epoch: 1,
        generation: 1000,
        lane: 0,
        lanes: 2,
        ticket,
    };
    let connect = |generation: u64| {
        let mut stream = TcpStream::connect(at).unwrap();
        let hello = Packet::bare(Frame::Hello(Hello { generation, ..hello }));
        stream.write_all(hello.encode().as_bytes()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut answer = [0; MAX_HEADER];
        stream.read_exact(&mut answer).unwrap();
        stream
    };
    // Garbage ends the connection.
    let mut stream = connect(1000);
    stream.write_all(&[0xff; 4096]).unwrap();
    let end = stream.read_to_end(&mut Vec::new());
    let is_over = end.as_ref().map_or_else(|error| error.kind() == ErrorKind::ConnectionReset, |_| true);
    assert!(is_over, "{end:?}");
    // One that stalls half-way through a frame is replaced by the next, and the one after that is a flood of it.
    let mut stalled = connect(1001);
    stalled.write_all(&[2, 0, 72]).unwrap();
    let mut flood = connect(1002);
    let ping = Packet::bare(Frame::Ping(7)).encode();
    let pings = ping.as_bytes().repeat(1000);
    flood.set_nonblocking(true).unwrap();
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until {
        // Nobody reads the answers: it takes what it takes.
        let _ = flood.write(&pings);
    }
    witness.finish();
}
