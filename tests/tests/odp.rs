//! On-demand paging: regions whose pages are missing until the driver gives them, and go when it takes them.
#![allow(missing_docs, reason = "a test program")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use freeflow_backend::Profile;
use freeflow_tests::attack::Attack;
use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{
    Ah, AhAttr, Bind, Fault, MwType, Op, PagedMr, Pd, Qp, QpSpec, Rc, RcOptions, Remote, SendWr, Sge, Wc, connect,
    next_key,
};
use freeflow_tests::rng::Rng;
use freeflow_tests::router::is_spread;
use freeflow_tests::stepped::Stepped;
use virtio_rdma::ctrl::Status;
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{Access, QpState, WcStatus};
use virtio_rdma::ring::GRH_SIZE;

const SOON: Duration = Duration::from_secs(10);
const A_WHILE: Duration = Duration::from_millis(30);
const PAGE: usize = 4096;
const ALL: Access = Access::LOCAL_WRITE
    .union(Access::REMOTE_READ)
    .union(Access::REMOTE_WRITE)
    .union(Access::REMOTE_ATOMIC)
    .union(Access::MW_BIND);
/// Where regions begin in their first page.
const HEAD: usize = 0x200;

/// A region of whole pages and a bit, whose pages lie scattered.
fn paged(pd: &Pd, pages: usize) -> PagedMr {
    let buf = pd.guest().alloc_placed((pages + 1) * PAGE, Placement::Fragmented).unwrap();
    pd.reg_on_demand(&buf, HEAD, pages * PAGE, ALL).unwrap()
}

fn spec(retry_cnt: u8) -> RcOptions {
    RcOptions { timeout: 1, retry_cnt, ..RcOptions::default() }
}

/// A connected pair and an on-demand region at each end.
struct Stage {
    bed: Bed,
    a: Rc,
    b: Rc,
    own: PagedMr,
    peers: PagedMr,
}

impl Stage {
    fn new() -> Self {
        Self::of(&QpSpec::rc(), &RcOptions::default())
    }

    fn of(qp: &QpSpec, options: &RcOptions) -> Self {
        let bed = Bed::new(2);
        let (a, b) = Rc::pair_with(&bed.guests[0], &bed.guests[1], qp, 1 << 20, options).unwrap();
        let (own, peers) = (paged(&a.pd, 64), paged(&b.pd, 64));
        Self { bed, a, b, own, peers }
    }

    /// The request at `a` waits for just this, completes when it is there, and asked once.
    #[track_caller]
    fn waits_for(&self, region: &PagedMr, fault: Fault) {
        assert_eq!(region.next_fault(SOON).unwrap(), fault);
        std::thread::sleep(A_WHILE);
        assert!(self.a.cq.poll().is_none() && self.b.cq.poll().is_none(), "it does not wait");
        assert_eq!(region.map(fault.pages(), fault.write), Status::Ok);
    }

    fn post(&self, op: Op, sge: Sge) {
        self.a.qp.post(SendWr::new(1, op, &[sge])).unwrap();
    }

    fn status(&self) -> WcStatus {
        self.a.cq.next().status()
    }
}

fn fault(page: u32, count: u32, write: bool) -> Fault {
    Fault { page, count, write }
}

#[test]
fn a_write_waits_for_pages_of_both_sides() {
    let stage = Stage::new();
    let bytes = Rng::new(1).bytes(3 * PAGE);
    stage.own.write(PAGE, &bytes);
    stage.post(Op::Write(stage.peers.remote(100)), stage.own.sge(PAGE, bytes.len()));
    stage.waits_for(&stage.own, fault(1, 4, false));
    stage.waits_for(&stage.peers, fault(0, 4, true));
    assert_eq!(stage.status(), WcStatus::Success);
    assert_eq!(stage.peers.read(100, bytes.len()), bytes);
    // They are still there.
    stage.post(Op::Write(stage.peers.remote(101)), stage.own.sge(PAGE, 5000));
    assert_eq!(stage.status(), WcStatus::Success);
    assert_eq!((stage.own.take_fault(), stage.peers.take_fault()), (None, None));
    assert_eq!(stage.bed.router.status(0).counters.page_faults, 1);
}

#[test]
fn a_read_waits_for_pages_of_both_sides() {
    let stage = Stage::new();
    stage.peers.write(0, b"from afar");
    stage.post(Op::Read(stage.peers.remote(0)), stage.own.sge(PAGE - HEAD, 9));
    stage.waits_for(&stage.peers, fault(0, 1, false));
    stage.waits_for(&stage.own, fault(1, 1, true));
    assert_eq!(stage.status(), WcStatus::Success);
    assert_eq!(stage.own.read(PAGE - HEAD, 9), b"from afar");
}

#[test]
fn a_send_waits_for_its_payload_and_for_the_memory_of_the_receive() {
    let stage = Stage::new();
    stage.own.write(0, b"message");
    stage.b.qp.post_recv(7, &[stage.peers.sge(10, 7)]).unwrap();
    stage.post(Op::Send, stage.own.sge(0, 7));
    stage.waits_for(&stage.own, fault(0, 1, false));
    stage.waits_for(&stage.peers, fault(0, 1, true));
    assert_eq!(stage.status(), WcStatus::Success);
    let wc = stage.b.cq.next().ok();
    assert_eq!((wc.wr_id(), wc.byte_len()), (7, 7));
    assert_eq!(stage.peers.read(10, 7), b"message");
}

#[test]
fn atomics_wait_and_are_executed_once() {
    let stage = Stage::new();
    stage.peers.write(8, &40u64.to_ne_bytes());
    stage.post(Op::FetchAdd(stage.peers.remote(8), 2), stage.own.sge(0, 8));
    stage.waits_for(&stage.peers, fault(0, 1, true));
    stage.waits_for(&stage.own, fault(0, 1, true));
    assert_eq!(stage.status(), WcStatus::Success);
    assert_eq!(stage.own.read(0, 8), 40u64.to_ne_bytes());
    assert_eq!(stage.peers.read(8, 8), 42u64.to_ne_bytes());
    assert_eq!(stage.peers.unmap(0..1), Status::Ok);
    stage.post(Op::CompareSwap(stage.peers.remote(8), 42, 9), stage.own.sge(0, 8));
    stage.waits_for(&stage.peers, fault(0, 1, true));
    assert_eq!(stage.status(), WcStatus::Success);
    assert_eq!(stage.peers.read(8, 8), 9u64.to_ne_bytes());
}

#[test]
fn a_page_to_be_read_is_asked_for_again_to_be_written() {
    let stage = Stage::new();
    assert_eq!(stage.peers.map(0..64, false), Status::Ok);
    stage.post(Op::Read(stage.peers.remote(0)), stage.a.mr.sge(0, 10 * PAGE));
    assert_eq!(stage.status(), WcStatus::Success);
    stage.post(Op::Write(stage.peers.remote(PAGE - HEAD)), stage.a.mr.sge(0, 2 * PAGE));
    stage.waits_for(&stage.peers, fault(1, 2, true));
    assert_eq!(stage.status(), WcStatus::Success);
    assert_eq!(stage.peers.take_fault(), None);
}

#[test]
fn a_long_message_asks_piece_by_piece() {
    let stage = Stage::new();
    let bytes = Rng::new(2).bytes(60 * PAGE);
    for op in [Op::Write(stage.peers.remote(7)), Op::Read(stage.peers.remote(7)), Op::Send] {
        assert_eq!((stage.own.unmap(0..65), stage.peers.unmap(0..65)), (Status::Ok, Status::Ok));
        let (from, to) =
            if matches!(op, Op::Read(_)) { (&stage.peers, &stage.own) } else { (&stage.own, &stage.peers) };
        let zeros = vec![0; bytes.len()];
        from.write(7, &bytes);
        to.write(7, &zeros);
        stage.b.qp.post_recv(7, &[stage.peers.sge(7, bytes.len())]).unwrap();
        stage.post(op, stage.own.sge(7, bytes.len()));
        let mut asked = [0, 0];
        eventually("the end of the message", SOON, || {
            asked[0] += stage.own.serve();
            asked[1] += stage.peers.serve();
            stage.a.cq.poll().map(|wc| wc.ok()).is_some()
        });
        assert_eq!(asked, [4, 4], "64 KiB at a time");
        assert_eq!(to.read(7, bytes.len()), bytes);
    }
}

/// As when a kernel moves or frees pages: once the command is answered, what was there is not written any more.
#[test]
fn nothing_is_written_to_a_page_once_it_was_taken_away() {
    let stage = Stage::new();
    let (stop, peers) = (AtomicBool::new(false), &stage.peers);
    std::thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            while !stop.load(Relaxed) {
                stage.post(Op::Write(peers.remote(0)), stage.a.mr.sge(0, 64 * PAGE));
                assert_eq!(stage.status(), WcStatus::Success);
            }
        });
        let mut rng = Rng::new(3);
        for _ in 0..60 {
            peers.serve();
            std::thread::sleep(Duration::from_micros(200));
            let first = rng.below(60) as u32;
            let pages = first..first + 1 + rng.below(4) as u32;
            assert_eq!(peers.unmap(pages.clone()), Status::Ok);
            let (at, len) = (pages.start as usize * PAGE, pages.len() * PAGE);
            peers.buf.fill(at, len, 0x5a);
            std::thread::sleep(Duration::from_millis(1));
            assert!(peers.buf.read_vec(at, len).iter().all(|&byte| byte == 0x5a), "written after it was taken");
        }
        stop.store(true, Relaxed);
        eventually("the last message", SOON, || {
            peers.serve();
            traffic.is_finished()
        });
    });
}

#[test]
fn pages_can_be_elsewhere_each_time() {
    let stage = Stage::new();
    for from in [3, 9, 3] {
        assert_eq!(stage.peers.map_from(0..1, from, true), Status::Ok, "in place of what was there");
        stage.peers.buf.fill(0, 64 * PAGE, 0);
        stage.a.qp.post(SendWr::inline(1, Op::Write(stage.peers.remote(0)), b"here")).unwrap();
        assert_eq!(stage.status(), WcStatus::Success);
        assert_eq!(stage.peers.buf.read_vec(from as usize * PAGE + HEAD, 4), b"here");
        assert_eq!(stage.peers.read(0, 4), [0; 4]);
    }
}

/// Which statuses follow a denial: those of a key that does not allow the access, as on rxe.
#[test]
fn a_page_that_is_denied_fails_the_requests_that_wait_for_it() {
    let denied = |post: &dyn Fn(&Stage), own: bool| {
        let stage = Stage::new();
        post(&stage);
        let region = if own { &stage.own } else { &stage.peers };
        let fault = region.next_fault(SOON).unwrap();
        assert_eq!(region.deny(fault.pages(), fault.write), Status::Ok);
        (stage.status(), stage)
    };
    for op in [Op::Write as fn(Remote) -> Op, Op::Read] {
        let local = |stage: &Stage| stage.post(op(stage.b.mr.remote(0)), stage.own.sge(0, 8));
        assert_eq!(denied(&local, true).0, WcStatus::LocProtErr);
        let remote = |stage: &Stage| stage.post(op(stage.peers.remote(0)), stage.a.mr.sge(0, 8));
        let (status, stage) = denied(&remote, false);
        assert_eq!(status, WcStatus::RemAccessErr);
        stage.b.pd.guest().events().wait(EventType::QpAccessError, stage.b.qp.number(), SOON).unwrap();
    }
    let receive = |stage: &Stage| {
        stage.b.qp.post_recv(7, &[stage.peers.sge(0, 8)]).unwrap();
        stage.post(Op::Send, stage.a.mr.sge(0, 8));
    };
    let (status, stage) = denied(&receive, false);
    assert_eq!(status, WcStatus::RemOpErr);
    let wc = stage.b.cq.next();
    assert_eq!((wc.wr_id(), wc.status()), (7, WcStatus::LocProtErr));
}

#[test]
fn a_denial_is_not_for_the_next_request() {
    let stage = Stage::new();
    let first = |stage: &Stage| stage.post(Op::Write(stage.peers.remote(0)), stage.a.mr.sge(0, 8));
    first(&stage);
    stage.peers.next_fault(SOON).unwrap();
    assert_eq!(stage.peers.deny(0..1, false), Status::Ok);
    assert_eq!(stage.status(), WcStatus::RemAccessErr);
    let (c, d) = stage.bed.pair(64);
    let region = paged(&d.pd, 4);
    assert_eq!(region.deny(0..4, false), Status::Ok, "nobody waits");
    c.qp.post(SendWr::inline(1, Op::Write(region.remote(0)), b"now")).unwrap();
    assert_eq!(region.next_fault(SOON).unwrap(), fault(0, 1, true));
    assert_eq!(region.deny(0..1, false), Status::Ok);
    assert_eq!(c.cq.next().status(), WcStatus::RemAccessErr);
}

#[test]
fn requests_that_wait_end_with_their_region() {
    for own in [true, false] {
        let mut stage = Stage::new();
        let (op, sge) = if own {
            (Op::Write(stage.b.mr.remote(0)), stage.own.sge(0, 8))
        } else {
            (Op::Write(stage.peers.remote(0)), stage.a.mr.sge(0, 8))
        };
        stage.post(op, sge);
        let Stage { a, own: mine, peers, .. } = &mut stage;
        let region = if own { mine } else { peers };
        region.next_fault(SOON).unwrap();
        region.dereg().unwrap();
        let status = a.cq.next().status();
        assert_eq!(status, if own { WcStatus::LocProtErr } else { WcStatus::RemAccessErr });
        assert_eq!(region.map(0..1, true), Status::NotFound);
    }
}

#[test]
fn many_that_wait_are_all_flushed() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let waiting = |_| {
        let (a, b) = Rc::pair(guest_a, guest_b, 64).unwrap();
        let own = paged(&a.pd, 1);
        a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[own.sge(0, 8)])).unwrap();
        own.next_fault(SOON).unwrap();
        (a, b, own)
    };
    let pairs: Vec<_> = (0..100).map(waiting).collect();
    for (a, ..) in &pairs {
        a.qp.modify_state(QpState::Err).unwrap();
    }
    for (a, ..) in &pairs {
        assert_eq!(a.cq.next().status(), WcStatus::WrFlushErr);
    }
}

#[test]
fn requests_that_wait_are_flushed_with_their_queue_pair() {
    let stage = Stage::new();
    stage.post(Op::Write(stage.b.mr.remote(0)), stage.own.sge(0, 8));
    stage.own.next_fault(SOON).unwrap();
    stage.a.qp.modify_state(QpState::Err).unwrap();
    assert_eq!(stage.status(), WcStatus::WrFlushErr);
    stage.a.qp.modify_state(QpState::Reset).unwrap();
    assert_eq!(stage.own.map(0..1, false), Status::Ok, "an answer to nobody");
}

#[test]
fn a_queue_pair_is_destroyed_while_it_waits() {
    let Stage { bed, a, b, own, peers } = Stage::new();
    b.qp.post_recv(7, &[peers.sge(0, 64)]).unwrap();
    a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, 64)])).unwrap();
    peers.next_fault(SOON).unwrap();
    let Rc { qp, cq, .. } = a;
    qp.destroy().unwrap();
    assert_eq!(peers.map(0..1, true), Status::Ok);
    std::thread::sleep(A_WHILE);
    assert!(cq.poll().is_none() && b.cq.poll().is_none());
    // Its receive is the peer's to flush.
    b.qp.modify_state(QpState::Err).unwrap();
    let wc = b.cq.next();
    assert_eq!((wc.wr_id(), wc.status()), (7, WcStatus::WrFlushErr));
    drop((own, bed));
}

/// The requester is not at the mercy of its peer's driver: the message ends as one that is not answered.
#[test]
fn a_peer_that_does_not_give_a_page_is_one_that_does_not_answer() {
    let stage = Stage::of(&QpSpec::rc(), &spec(0));
    stage.b.qp.post_recv(7, &[stage.peers.sge(0, 64)]).unwrap();
    stage.post(Op::Send, stage.a.mr.sge(0, 64));
    assert_eq!(stage.status(), WcStatus::RetryExcErr);
    assert!(stage.peers.take_fault().is_some());
    stage.b.qp.modify_state(QpState::Err).unwrap();
    assert_eq!(stage.b.cq.next().status(), WcStatus::WrFlushErr);
}

#[test]
fn unreliable_connections_wait_and_lose_the_message_at_last() {
    if is_spread() {
        // Between hosts a message waits at its sender alone, and nobody tells an unreliable one to wait (docs/tcp.md, section 6).
        return;
    }
    let stage = Stage::of(&QpSpec::uc(), &RcOptions::default());
    stage.own.write(0, b"message");
    stage.b.qp.post_recv(7, &[stage.peers.sge(0, 64)]).unwrap();
    stage.post(Op::Send, stage.own.sge(0, 7));
    stage.waits_for(&stage.own, fault(0, 1, false));
    stage.waits_for(&stage.peers, fault(0, 1, true));
    assert_eq!(stage.status(), WcStatus::Success);
    assert_eq!(stage.b.cq.next().ok().byte_len(), 7);
    assert_eq!(stage.peers.unmap(0..1), Status::Ok);
    stage.b.qp.post_recv(8, &[stage.peers.sge(0, 64)]).unwrap();
    stage.post(Op::Send, stage.own.sge(0, 7));
    assert_eq!(stage.status(), WcStatus::Success);
    assert_eq!(stage.bed.router.status(0).counters.messages_dropped, 1);
    // The receive was for the next.
    stage.peers.serve();
    stage.post(Op::Send, stage.own.sge(0, 5));
    let wc = stage.b.cq.next().ok();
    assert_eq!((wc.wr_id(), wc.byte_len()), (8, 5));
}

const QKEY: u32 = 0x1122_3344;

/// A UD queue pair of a guest, with an address handle to itself.
fn datagrams(rc: &Rc) -> (Qp, Ah) {
    let qp = rc.pd.create_qp(QpSpec::ud(), &rc.cq).unwrap();
    qp.to_ud(QKEY).unwrap();
    let ah = rc.pd.create_ah(AhAttr::to(rc.pd.guest().gids()[1], 1)).unwrap();
    (qp, ah)
}

fn datagram(qp: &Qp, ah: &Ah, sge: Sge) {
    let op = Op::UdSend { ah: ah.number(), qpn: qp.number(), qkey: QKEY, imm: None };
    qp.post(SendWr::new(1, op, &[sge])).unwrap();
}

#[test]
fn datagrams_wait_for_their_payload_and_a_little_for_the_memory_of_a_receive() {
    let stage = Stage::new();
    let (qp, ah) = datagrams(&stage.a);
    stage.own.write(0, b"datagram");
    qp.post_recv(7, &[stage.a.mr.sge(0, 100)]).unwrap();
    datagram(&qp, &ah, stage.own.sge(0, 8));
    stage.waits_for(&stage.own, fault(0, 1, false));
    let mut got = [stage.a.cq.next().ok(), stage.a.cq.next().ok()];
    got.sort_by_key(Wc::wr_id);
    assert_eq!((got[1].wr_id(), got[1].byte_len()), (7, GRH_SIZE + 8));
    assert_eq!(&stage.a.mr.read(GRH_SIZE, 8), b"datagram");
    // Its own memory for ever, but that of a receive only as long as for a receive, and the receive stays.
    qp.post_recv(8, &[stage.own.sge(2 * PAGE, 100)]).unwrap();
    datagram(&qp, &ah, stage.own.sge(0, 8));
    assert_eq!(stage.a.cq.next().ok().wr_id(), 1);
    assert_eq!(stage.bed.router.status(0).counters.messages_dropped, 1);
    assert_eq!(stage.own.next_fault(SOON).unwrap(), fault(2, 1, true));
    datagram(&qp, &ah, stage.own.sge(0, 8));
    assert_eq!(stage.a.cq.next().ok().wr_id(), 1);
    assert_eq!(stage.own.map(2..3, true), Status::Ok);
    datagram(&qp, &ah, stage.own.sge(0, 8));
    let mut got = [stage.a.cq.next().ok(), stage.a.cq.next().ok()];
    got.sort_by_key(Wc::wr_id);
    assert_eq!((got[1].wr_id(), got[1].byte_len()), (8, GRH_SIZE + 8));
    assert_eq!(&stage.own.read(2 * PAGE + GRH_SIZE, 8), b"datagram");
}

#[test]
fn a_datagrams_receive_is_flushed_when_its_memory_never_comes() {
    let stage = Stage::new();
    let (qp, ah) = datagrams(&stage.a);
    qp.post_recv(7, &[stage.own.sge(0, 100)]).unwrap();
    qp.post_recv(8, &[stage.own.sge(0, 100)]).unwrap();
    datagram(&qp, &ah, stage.a.mr.sge(0, 8));
    assert_eq!(stage.a.cq.next().ok().wr_id(), 1);
    qp.modify_state(QpState::Err).unwrap();
    let ids: Vec<_> = stage.a.cq.take(2).iter().map(|wc| (wc.wr_id(), wc.status())).collect();
    assert_eq!(ids, [(7, WcStatus::WrFlushErr), (8, WcStatus::WrFlushErr)]);
}

#[test]
fn a_denied_page_fails_datagrams_on_the_side_that_it_is_of() {
    let stage = Stage::new();
    let (qp, ah) = datagrams(&stage.a);
    qp.post_recv(7, &[stage.a.mr.sge(0, 100)]).unwrap();
    datagram(&qp, &ah, stage.own.sge(0, 8));
    stage.own.next_fault(SOON).unwrap();
    assert_eq!(stage.own.deny(0..1, false), Status::Ok);
    assert_eq!(stage.status(), WcStatus::LocProtErr);
    assert_eq!(qp.state().unwrap(), QpState::Sqe);
}

#[test]
fn a_multicast_waits_for_its_payload_and_for_no_member() {
    let stage = Stage::new();
    let mgid = std::net::Ipv4Addr::new(239, 1, 2, 3).to_ipv6_mapped().octets();
    let (qp, _) = datagrams(&stage.a);
    qp.attach(mgid).unwrap();
    let ah = stage.a.pd.create_ah(AhAttr::to(mgid, 1)).unwrap();
    let send = || {
        let op = Op::UdSend { ah: ah.number(), qpn: 0xff_ffff, qkey: QKEY, imm: None };
        qp.post(SendWr::new(1, op, &[stage.own.sge(0, 8)])).unwrap();
    };
    qp.post_recv(7, &[stage.own.sge(2 * PAGE, 100)]).unwrap();
    send();
    stage.waits_for(&stage.own, fault(0, 1, false));
    assert_eq!(stage.a.cq.next().ok().wr_id(), 1);
    assert_eq!(stage.bed.router.status(0).counters.messages_dropped, 1);
    assert_eq!(stage.own.serve(), 1);
    send();
    let mut ids: Vec<_> = stage.a.cq.take(2).into_iter().map(|wc| wc.ok().wr_id()).collect();
    ids.sort_unstable();
    assert_eq!(ids, [1, 7]);
    qp.detach(mgid).unwrap();
}

#[test]
fn windows_over_an_on_demand_region() {
    let stage = Stage::new();
    let window = stage.b.pd.alloc_mw(MwType::Two).unwrap();
    let bind = Bind {
        window: window.key,
        key: next_key(window.key),
        region: stage.peers.key(),
        addr: stage.peers.addr(3 * PAGE),
        length: 2 * PAGE as u64,
        access: Access::REMOTE_WRITE,
    };
    stage.b.qp.post(SendWr::new(1, bind.op(), &[])).unwrap();
    stage.b.cq.next().ok();
    stage.a.qp.post(SendWr::inline(1, Op::Write(bind.remote()), b"through")).unwrap();
    // The driver knows the region and not the window.
    stage.waits_for(&stage.peers, fault(3, 1, true));
    assert_eq!(stage.status(), WcStatus::Success);
    assert_eq!(stage.peers.read(3 * PAGE, 7), b"through");
}

#[test]
fn pages_of_memory_that_went_are_asked_for_again() {
    let stage = Stage::new();
    let guest = &stage.bed.guests[1];
    let region = guest.memory().plug(1 << 40, 1 << 20).unwrap();
    guest.with_connection(|v| v.add_region(&region)).unwrap();
    let plugged = Arc::new(guest.memory().view(1 << 40, 1 << 20).unwrap());
    let mut mr = stage.b.pd.reg_on_demand(&plugged, HEAD, 4 * PAGE, ALL).unwrap();
    assert_eq!(mr.map(0..5, true), Status::Ok);
    let write = || stage.a.qp.post(SendWr::inline(1, Op::Write(mr.remote(0)), b"x")).unwrap();
    write();
    assert_eq!(stage.status(), WcStatus::Success);
    guest.memory().unplug(1 << 40).unwrap();
    guest.with_connection(|v| v.remove_region(&region)).unwrap();
    write();
    assert_eq!(mr.next_fault(SOON).unwrap(), fault(0, 1, true));
    assert_eq!(mr.map(0..1, true), Status::BadAddress);
    mr.buf = Arc::clone(&stage.peers.buf);
    assert_eq!(mr.map(0..1, true), Status::Ok);
    assert_eq!(stage.status(), WcStatus::Success);
}

#[test]
fn a_reset_while_requests_wait() {
    let stage = Stage::new();
    stage.post(Op::Write(stage.peers.remote(0)), stage.own.sge(0, 8));
    stage.own.next_fault(SOON).unwrap();
    assert_eq!(stage.own.map(0..1, false), Status::Ok);
    stage.peers.next_fault(SOON).unwrap();
    stage.bed.guests[1].reload().unwrap();
    assert_eq!(stage.peers.map(0..1, true), Status::NotFound);
    let (c, d) = stage.bed.pair(64);
    c.qp.post(SendWr::inline(1, Op::Write(d.mr.remote(0)), b"again")).unwrap();
    c.cq.next().ok();
}

/// Two guests on a device without a clock, and a region of the first's.
fn stepped() -> (Stepped, Rc, Rc, PagedMr) {
    let mut bed = Stepped::new(2, &Profile::default()).unwrap();
    let (a, b) = Rc::pair_with(&bed.guests[0], &bed.guests[1], &QpSpec::rc(), 4096, &spec(0)).unwrap();
    let region = paged(&a.pd, 4);
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[region.sge(0, 8)])).unwrap();
    bed.settle();
    (bed, a, b, region)
}

#[test]
fn a_guest_that_does_not_answer_itself_waits_and_is_asked_now_and_then() {
    let (mut bed, a, _b, region) = stepped();
    for _ in 0..1000 {
        bed.pass(Duration::from_millis(50));
        bed.settle();
    }
    assert!(a.cq.poll().is_none());
    let mut asked = 0;
    while region.take_fault().is_some() {
        asked += 1;
    }
    assert!((2..=201).contains(&asked), "{asked} times in 50 s");
    a.qp.modify_state(QpState::Err).unwrap();
    bed.settle();
    assert_eq!(a.cq.poll().map(|wc| wc.status()), Some(WcStatus::WrFlushErr));
}

/// The driver had no memory to note the event: it comes again.
#[test]
fn a_fault_that_the_driver_forgot_is_told_again() {
    let (mut bed, a, _b, region) = stepped();
    assert_eq!(region.take_fault(), Some(fault(0, 1, false)));
    assert_eq!(region.take_fault(), None);
    bed.pass(Duration::from_secs(1));
    bed.settle();
    assert_eq!(region.take_fault(), Some(fault(0, 1, false)));
    assert_eq!(region.deny(0..1, false), Status::Ok);
    bed.pass(Duration::from_secs(1));
    bed.settle();
    assert_eq!(a.cq.poll().map(|wc| wc.status()), Some(WcStatus::LocProtErr));
}

/// A guest with many requests that it never gives pages for is nobody else's matter.
#[test]
fn many_requests_that_wait_for_ever_disturb_nobody() {
    let attack = Attack::start();
    let pd = attack.attacker().alloc_pd().unwrap();
    let cq = attack.attacker().create_cq(4096).unwrap();
    let region = paged(&pd, 64);
    let qps: Vec<_> = (0..200)
        .map(|n| {
            let qp = pd.create_qp(QpSpec::uc(), &cq).unwrap();
            connect(&qp, &qp, &RcOptions::default()).unwrap();
            qp.post(SendWr::new(n, Op::Write(region.remote(0)), &[region.sge(n as usize % 64 * PAGE, 8)])).unwrap();
            qp
        })
        .collect();
    for round in 0..300u32 {
        let first = round % 60;
        assert_eq!(region.map(first..first + 4, false), Status::Ok);
        assert_eq!(region.unmap(0..64), Status::Ok);
        assert_eq!(region.deny(first + 5..first + 6, true), Status::Ok);
    }
    drop(qps);
    attack.finish();
}
