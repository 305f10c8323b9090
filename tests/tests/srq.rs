//! Shared receive queues.
#![allow(missing_docs, reason = "a test program")]

use std::time::Duration;

use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::Error;
use freeflow_tests::guest::verbs::{AhAttr, Op, Qp, QpSpec, Rc, RcOptions, SendWr, Srq, connect};
use virtio_rdma::ctrl::Status;
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{QpState, WcStatus};

const SOON: Duration = Duration::from_secs(10);
const QKEY: u32 = 5;

/// Several QPs of one guest that share an SRQ, each connected to a QP of the other guest.
struct Shared {
    bed: Bed,
    srq: Srq,
    /// Completions of all receivers go to its CQ.
    end: Rc,
    receivers: Vec<Qp>,
    senders: Vec<Rc>,
}

fn shared(spec: &QpSpec, count: usize, limit: u32) -> Shared {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let end = Rc::new(guest_b, QpSpec::rc(), 65_536).unwrap();
    let srq = end.pd.create_srq(63, 2, limit).unwrap();
    let options = RcOptions { rnr_retry: 1, ..RcOptions::default() };
    let (mut receivers, mut senders) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let receiver = end.pd.create_qp_srq(spec.clone(), &end.cq, &srq).unwrap();
        let sender = Rc::new(guest_a, spec.clone(), 4096).unwrap();
        connect(&sender.qp, &receiver, &options).unwrap();
        receivers.push(receiver);
        senders.push(sender);
    }
    Shared { bed, srq, end, receivers, senders }
}

#[test]
fn qps_share_receives_in_order() {
    let shared = shared(&QpSpec::rc(), 3, 0);
    for id in 0..9 {
        shared.srq.post_recv(id, &[shared.end.mr.sge(100 * id as usize, 100)]).unwrap();
    }
    for round in 0..3 {
        for (index, sender) in shared.senders.iter().enumerate() {
            let text = format!("round {round} sender {index}");
            sender.qp.post(SendWr::inline(1, Op::Send, text.as_bytes())).unwrap();
            sender.cq.next().ok();
            let wc = shared.end.cq.next().ok();
            let id = 3 * round + index;
            assert_eq!((wc.wr_id(), wc.qpn()), (id as u64, shared.receivers[index].number()));
            assert_eq!(shared.end.mr.read(100 * id, text.len()), text.as_bytes());
        }
    }
}

#[test]
fn an_empty_srq_is_not_ready() {
    let shared = shared(&QpSpec::rc(), 1, 0);
    let sender = &shared.senders[0];
    sender.qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
    assert_eq!(sender.cq.next().status(), WcStatus::RnrRetryExcErr);
}

#[test]
fn the_limit_raises_one_event_and_disarms() {
    let shared = shared(&QpSpec::rc(), 1, 0);
    let (guest, srq, sender) = (&shared.bed.guests[1], &shared.srq, &shared.senders[0]);
    let limit_event = |wait| guest.events().wait(EventType::SrqLimit, srq.number(), wait);
    for id in 0..10 {
        srq.post_recv(id, &[shared.end.mr.sge(0, 8)]).unwrap();
    }
    srq.set_limit(8).unwrap();
    assert_eq!(srq.limit().unwrap(), 8);
    let send = || {
        sender.qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
        sender.cq.next().ok();
    };
    send();
    send();
    // Eight are left, and eight is not fewer than eight.
    assert!(limit_event(Duration::from_millis(50)).is_err());
    send();
    limit_event(SOON).unwrap();
    assert_eq!(srq.limit().unwrap(), 0);
    send();
    assert!(limit_event(Duration::from_millis(50)).is_err());
    srq.set_limit(6).unwrap();
    send();
    limit_event(SOON).unwrap();
    assert!(matches!(srq.set_limit(64), Err(Error::Refused(Status::Invalid))));
}

#[test]
fn a_qp_in_error_says_when_it_took_its_last_receive() {
    let shared = shared(&QpSpec::rc(), 2, 0);
    for id in 0..4 {
        shared.srq.post_recv(id, &[shared.end.mr.sge(0, 64)]).unwrap();
    }
    let failing = &shared.receivers[0];
    failing.modify_state(QpState::Err).unwrap();
    shared.bed.guests[1].events().wait(EventType::LastWqeReached, failing.number(), SOON).unwrap();
    assert!(shared.end.cq.poll().is_none(), "receives of the SRQ are not flushed");
    let sender = &shared.senders[1];
    sender.qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
    sender.cq.next().ok();
    assert_eq!(shared.end.cq.next().ok().wr_id(), 0);
}

#[test]
fn datagrams_and_unreliable_connections_use_it_too() {
    let uc = shared(&QpSpec::uc(), 1, 0);
    uc.srq.post_recv(7, &[uc.end.mr.sge(0, 64)]).unwrap();
    uc.senders[0].qp.post(SendWr::inline(1, Op::Send, b"uc")).unwrap();
    assert_eq!(uc.end.cq.next().ok().wr_id(), 7);

    let (guest_a, guest_b) = uc.bed.two();
    let receiver = uc.end.pd.create_qp_srq(QpSpec::ud(), &uc.end.cq, &uc.srq).unwrap();
    receiver.to_ud(QKEY).unwrap();
    let sender = Rc::new(guest_a, QpSpec::ud(), 4096).unwrap();
    sender.qp.to_ud(QKEY).unwrap();
    let ah = sender.pd.create_ah(AhAttr::to(guest_b.gids()[0], 0)).unwrap();
    uc.srq.post_recv(8, &[uc.end.mr.sge(1000, 64)]).unwrap();
    let op = Op::UdSend { ah: ah.number(), qpn: receiver.number(), qkey: QKEY, imm: None };
    sender.qp.post(SendWr::inline(1, op, b"ud")).unwrap();
    let wc = uc.end.cq.next().ok();
    assert_eq!((wc.wr_id(), wc.byte_len()), (8, 42));
    assert_eq!(uc.end.mr.read(1040, 2), b"ud");
}

#[test]
fn receives_are_held_to_the_domain_of_the_srq() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let end = Rc::new(guest_b, QpSpec::rc(), 4096).unwrap();
    let other = guest_b.alloc_pd().unwrap();
    let srq = end.pd.create_srq(15, 1, 0).unwrap();
    let receiver = other.create_qp_srq(QpSpec::rc(), &end.cq, &srq).unwrap();
    let sender = Rc::new(guest_a, QpSpec::rc(), 4096).unwrap();
    connect(&sender.qp, &receiver, &RcOptions::default()).unwrap();
    srq.post_recv(1, &[end.mr.sge(0, 64)]).unwrap();
    sender.qp.post(SendWr::inline(1, Op::Send, b"fine")).unwrap();
    sender.cq.next().ok();
    end.cq.next().ok();
    let theirs = other.reg_new(64).unwrap();
    srq.post_recv(2, &[theirs.sge(0, 64)]).unwrap();
    sender.qp.post(SendWr::inline(2, Op::Send, b"wrong")).unwrap();
    assert_eq!(sender.cq.next().status(), WcStatus::RemOpErr);
    assert_eq!(end.cq.next().status(), WcStatus::LocProtErr);
}

#[test]
fn life_of_an_srq() {
    let shared = shared(&QpSpec::rc(), 1, 3);
    let guest = &shared.bed.guests[1];
    assert_eq!(shared.srq.limit().unwrap(), 3);
    let destroy = |number: u32| {
        let body = virtio_rdma::ctrl::ObjectRequest { number: number.into(), reserved: 0.into() };
        guest.command_status(virtio_rdma::ctrl::Opcode::DestroySrq, &body, &[]).unwrap()
    };
    assert_eq!(destroy(shared.srq.number()), Status::Busy);
    assert_eq!(destroy(77), Status::NotFound);
    assert!(shared.end.pd.create_srq(15, 1, 16).is_err(), "a limit beyond the ring");
    let Shared { bed, srq, end, receivers, senders } = shared;
    drop((receivers, senders, end, srq));
    eventually("all objects to go", SOON, || bed.router.objects(1).qps == 0 && bed.router.objects(1).pds == 0);
}

#[test]
fn a_reset_gives_srqs_back() {
    let shared = shared(&QpSpec::rc(), 2, 0);
    shared.srq.post_recv(1, &[shared.end.mr.sge(0, 8)]).unwrap();
    shared.bed.guests[1].reload().unwrap();
    let again = Rc::new(&shared.bed.guests[1], QpSpec::rc(), 64).unwrap();
    assert_eq!(again.pd.create_srq(15, 1, 0).unwrap().number(), 0);
}

#[test]
fn an_index_that_jumps_fails_the_qp_that_meets_it() {
    let shared = shared(&QpSpec::rc(), 2, 0);
    shared.srq.ring().publish(1 << 20);
    shared.senders[0].qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
    assert_eq!(shared.senders[0].cq.next().status(), WcStatus::RemOpErr);
    shared.bed.guests[1].events().wait(EventType::QpFatal, shared.receivers[0].number(), SOON).unwrap();
    assert_eq!(shared.receivers[1].state().unwrap(), QpState::Rts);
}

#[test]
fn an_srq_in_memory_that_went_fails() {
    let bed = Bed::new(2);
    let guest = &bed.guests[1];
    let region = guest.memory().plug(1 << 40, 4 << 20).unwrap();
    guest.with_connection(|v| v.add_region(&region)).unwrap();
    let pd = guest.alloc_pd().unwrap();
    let hog = guest.hog_below(1 << 40);
    let srq = pd.create_srq(63, 1, 0).unwrap();
    assert!(srq.ring().buf().gpa(0) >= 1 << 40, "the ring is in the new memory");
    drop(hog);
    guest.memory().unplug(1 << 40).unwrap();
    guest.with_connection(|v| v.remove_region(&region)).unwrap();
    guest.events().wait(EventType::SrqError, srq.number(), SOON).unwrap();
}
