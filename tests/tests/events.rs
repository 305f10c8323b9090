//! Completion events and asynchronous events.
#![allow(missing_docs, reason = "a test program")]

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use freeflow_tests::bed::Bed;
use freeflow_tests::guest::verbs::{Op, QpSpec, Rc, RcOptions, Remote, SendWr, Sge};
use virtio_rdma::area::{ARM_NEXT, ARM_NONE, ARM_SOLICITED};
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{QpState, SendFlags, WcStatus};

const SOON: Duration = Duration::from_secs(5);
const A_WHILE: Duration = Duration::from_millis(30);

fn send(a: &Rc, flags: SendFlags) {
    a.qp.post(SendWr::inline(1, Op::Send, b"x").flags(flags | SendFlags::SIGNALED)).unwrap();
    a.cq.next().ok();
}

#[test]
fn an_armed_cq_raises_one_event() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(64);
    b.cq.arm(false);
    assert_eq!(b.cq.arm_word().load(SeqCst), ARM_NEXT);
    for _ in 0..3 {
        b.qp.post_recv(1, &[b.mr.sge(0, 8)]).unwrap();
        send(&a, SendFlags::empty());
    }
    b.cq.wait_event(SOON).unwrap();
    b.cq.take(3);
    assert_eq!(b.cq.arm_word().load(SeqCst), ARM_NONE);
    std::thread::sleep(A_WHILE);
    assert!(!b.cq.take_event().unwrap(), "one arming, one event");
    assert!(!a.cq.take_event().unwrap(), "not armed");
}

#[test]
fn only_solicited_completions() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(64);
    for _ in 0..3 {
        b.qp.post_recv(1, &[b.mr.sge(0, 8)]).unwrap();
    }
    b.cq.arm(true);
    assert_eq!(b.cq.arm_word().load(SeqCst), ARM_SOLICITED);
    send(&a, SendFlags::empty());
    b.cq.next().ok();
    std::thread::sleep(A_WHILE);
    assert!(!b.cq.take_event().unwrap());
    send(&a, SendFlags::SOLICITED);
    b.cq.wait_event(SOON).unwrap();
    b.cq.next().ok();
    // Asking for all beats asking for solicited ones, whatever comes later.
    b.cq.arm(false);
    b.cq.arm(true);
    assert_eq!(b.cq.arm_word().load(SeqCst), ARM_NEXT);
    send(&a, SendFlags::empty());
    b.cq.wait_event(SOON).unwrap();
}

#[test]
fn write_with_immediate_can_be_solicited() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(64);
    b.qp.post_recv(1, &[]).unwrap();
    b.cq.arm(true);
    let wr = SendWr::inline(1, Op::WriteImm(b.mr.remote(0), 1), b"x");
    a.qp.post(wr.flags(SendFlags::SOLICITED | SendFlags::SIGNALED)).unwrap();
    b.cq.wait_event(SOON).unwrap();
}

#[test]
fn errors_count_as_solicited() {
    let bed = Bed::new(2);
    let (a, _b) = bed.pair(64);
    a.cq.arm(true);
    a.qp.post(SendWr::inline(1, Op::Write(Remote { addr: 0, rkey: 1 }), b"x")).unwrap();
    a.cq.wait_event(SOON).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RemAccessErr);
}

#[test]
fn sleeping_for_completions() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(64);
    let count = 300;
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            for i in 0..count {
                let wc = b.cq.next_sleeping(SOON).expect("a completion").ok();
                assert_eq!(wc.wr_id(), i);
                b.qp.post_recv(i + 100, &[b.mr.sge(0, 8)]).unwrap();
            }
        });
        for i in 0..100 {
            b.qp.post_recv(i, &[b.mr.sge(0, 8)]).unwrap();
        }
        for i in 0..count {
            a.qp.post(SendWr::inline(i, Op::Send, &i.to_le_bytes())).unwrap();
            a.cq.next_sleeping(SOON).expect("a completion").ok();
            if i % 50 == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        receiver.join().unwrap();
    });
}

#[test]
fn every_vector_has_its_queue() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    for vector in 0..guest_a.config().num_event_queues.get() {
        let pd = guest_a.alloc_pd().unwrap();
        let cq = guest_a.create_cq_on(10, vector, guest_a.placement()).unwrap();
        let qp = pd.create_qp(QpSpec::rc(), &cq).unwrap();
        let peer = Rc::new(guest_b, QpSpec::rc(), 64).unwrap();
        freeflow_tests::guest::verbs::connect(&qp, &peer.qp, &RcOptions::default()).unwrap();
        cq.arm(false);
        qp.post(SendWr::inline(1, Op::Write(peer.mr.remote(0)), b"v")).unwrap();
        cq.wait_event(SOON).unwrap();
    }
    let beyond = guest_a.config().num_event_queues.get();
    let refused = guest_a.create_cq_on(10, beyond, guest_a.placement()).unwrap_err();
    assert_eq!(refused.status(), Some(virtio_rdma::ctrl::Status::Invalid));
}

#[test]
fn no_event_is_lost_without_buffers() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    // 200 CQs have an event each, and the queue has 64 buffers, which nobody empties meanwhile.
    let pairs: Vec<(Rc, Rc)> = (0..200)
        .map(|_| Rc::pair_with(guest_a, guest_b, &QpSpec::rc().depth(3), 64, &RcOptions::default()).unwrap())
        .collect();
    for (a, b) in &pairs {
        a.cq.arm(false);
        a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"e")).unwrap();
    }
    for (a, _) in &pairs {
        a.cq.next().ok();
    }
    for (a, _) in &pairs {
        a.cq.wait_event(SOON).unwrap();
    }
}

#[test]
fn completion_queue_overflow_is_an_error() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let (pd, cq) = (guest_a.alloc_pd().unwrap(), guest_a.create_cq(3).unwrap());
    let qp = pd.create_qp(QpSpec::rc(), &cq).unwrap();
    let peer = Rc::new(guest_b, QpSpec::rc(), 64).unwrap();
    freeflow_tests::guest::verbs::connect(&qp, &peer.qp, &RcOptions::default()).unwrap();
    for i in 0..10 {
        qp.post(SendWr::inline(i, Op::Write(peer.mr.remote(0)), b"o")).unwrap();
    }
    guest_a.events().wait(EventType::CqError, cq.number(), SOON).unwrap();
    freeflow_tests::bed::eventually("error of the QP", SOON, || qp.state().unwrap() == QpState::Err);
    let (c, d) = bed.pair(64);
    c.qp.post(SendWr::inline(1, Op::Write(d.mr.remote(0)), b"fine")).unwrap();
    c.cq.next().ok();
}

/// Each worker counts on room that the other may use up. The queue gets as many completions as it holds, those of each queue pair in order,
/// and every queue pair that loses one fails.
#[test]
fn a_completion_queue_overflows_under_two_workers() {
    const ROOM: usize = 15;
    const LIST: usize = 32;
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let (pd, peer_pd) = (guest_a.alloc_pd().unwrap(), guest_b.alloc_pd().unwrap());
    let (mr, peer_cq) = (peer_pd.reg_new(64).unwrap(), guest_b.create_cq(3).unwrap());
    for _ in 0..20 {
        let cq = guest_a.create_cq(ROOM as u32).unwrap();
        let qps = pd.create_qps(&QpSpec::rc(), &cq, 4).unwrap();
        let peers = peer_pd.create_qps(&QpSpec::rc(), &peer_cq, 4).unwrap();
        for (qp, peer) in qps.iter().zip(&peers) {
            freeflow_tests::guest::verbs::connect(qp, peer, &RcOptions::default()).unwrap();
        }
        let list: [_; LIST] = std::array::from_fn(|n| SendWr::inline(n as u64, Op::Write(mr.remote(0)), b"o"));
        for qp in &qps {
            qp.post_send(&list).unwrap();
        }
        guest_a.events().wait(EventType::CqError, cq.number(), SOON).unwrap();
        for qp in &qps {
            freeflow_tests::bed::eventually("error of the QP", SOON, || qp.state().unwrap() == QpState::Err);
        }
        let wcs = cq.poll_many(2 * ROOM);
        assert_eq!(wcs.len(), ROOM);
        for qp in &qps {
            let own: Vec<u64> = wcs.iter().filter(|wc| wc.qpn() == qp.number()).map(|wc| wc.ok().wr_id()).collect();
            assert_eq!(own, (0..own.len() as u64).collect::<Vec<_>>());
        }
    }
}

/// Of a request that fails there is no completion either, if there is no room for it: an event says so.
#[test]
fn a_failure_that_no_completion_can_tell_is_an_event() {
    for spec in [QpSpec::rc(), QpSpec::uc()] {
        let bed = Bed::new(2);
        let (guest_a, guest_b) = bed.two();
        let (pd, cq) = (guest_a.alloc_pd().unwrap(), guest_a.create_cq(3).unwrap());
        let qp = pd.create_qp(spec.clone(), &cq).unwrap();
        let peer = Rc::new(guest_b, spec, 64).unwrap();
        freeflow_tests::guest::verbs::connect(&qp, &peer.qp, &RcOptions::default()).unwrap();
        for i in 0..3 {
            qp.post(SendWr::inline(i, Op::Write(peer.mr.remote(0)), b"o")).unwrap();
        }
        let wrong_lkey = Sge { addr: 0, len: 8, lkey: 0x1234_5678 };
        qp.post(SendWr::new(3, Op::Write(peer.mr.remote(0)), &[wrong_lkey])).unwrap();
        guest_a.events().wait(EventType::QpFatal, qp.number(), SOON).unwrap();
        assert_eq!(qp.state().unwrap(), QpState::Err);
    }
}

#[test]
fn a_destroyed_cq_raises_nothing_for_its_successor() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(64);
    a.cq.arm(false);
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"e")).unwrap();
    a.cq.next().ok();
    drop(a);
    let (c, d) = bed.pair(64);
    bed.guests[0].events().forget();
    c.qp.post(SendWr::inline(1, Op::Write(d.mr.remote(0)), b"e")).unwrap();
    c.cq.next().ok();
    std::thread::sleep(A_WHILE);
    assert!(!c.cq.take_event().unwrap());
}
