//! Completion queues and shared receive queues that are given another ring.

use std::time::Duration;

use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::verbs::{Cq, Op, QpSpec, Rc, RcOptions, SendWr, connect};
use virtio_rdma::ctrl::Status;

const SOON: Duration = Duration::from_secs(10);

/// A pair whose first end has a CQ of this depth.
fn pair(bed: &Bed, depth: u32) -> (Rc, Rc) {
    let (guest_a, guest_b) = bed.two();
    let pd = guest_a.alloc_pd().unwrap();
    let cq = guest_a.create_cq(depth).unwrap();
    let qp = pd.create_qp(QpSpec::rc(), &cq).unwrap();
    let a = Rc { qp, cq, mr: pd.reg_new(64).unwrap(), pd };
    let b = Rc::new(guest_b, QpSpec::rc(), 4096).unwrap();
    connect(&a.qp, &b.qp, &RcOptions::default()).unwrap();
    (a, b)
}

fn write(a: &Rc, b: &Rc, ids: std::ops::Range<u64>) {
    for id in ids {
        a.qp.post(SendWr::inline(id, Op::Write(b.mr.remote(0)), &id.to_le_bytes())).unwrap();
    }
}

/// Waits until so many completions are in the ring.
fn filled(cq: &Cq, count: u32) {
    let unpolled = || cq.ring().producer().load(std::sync::atomic::Ordering::Acquire).wrapping_sub(cq.ring().index());
    eventually("completions", SOON, || unpolled() & (cq.ring().entries() - 1) == count);
}

#[test]
fn completions_that_were_not_polled_move() {
    for fragmented in [false, true] {
        let bed = if fragmented { Bed::fragmented(2) } else { Bed::new(2) };
        let (a, b) = pair(&bed, 7);
        // The first sizes wrap around the ring's end.
        let mut next = 0;
        for depth in [7u32, 127, 15, 7, 500, 6] {
            write(&a, &b, next..next + 6);
            filled(&a.cq, 6);
            a.cq.resize(depth).unwrap();
            let got: Vec<u64> = a.cq.take(6).iter().map(|wc| wc.ok().wr_id()).collect();
            assert_eq!(got, (next..next + 6).collect::<Vec<_>>());
            next += 6;
        }
    }
}

#[test]
fn many_completions_move_in_several_goes() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 2000);
    for round in 0..10 {
        write(&a, &b, round * 100..round * 100 + 100);
        filled(&a.cq, round as u32 * 100 + 100);
    }
    a.cq.resize(1000).unwrap();
    let got: Vec<u64> = a.cq.take(1000).iter().map(|wc| wc.ok().wr_id()).collect();
    assert_eq!(got, (0..1000).collect::<Vec<_>>());
}

#[test]
fn completions_go_on_while_a_ring_is_exchanged() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 127);
    let mut expected = 0;
    for round in 0..14u64 {
        write(&a, &b, round * 100..round * 100 + 100);
        a.cq.resize(if round % 2 == 0 { 1000 } else { 127 }).unwrap();
        for wc in a.cq.take(100) {
            assert_eq!(wc.ok().wr_id(), expected);
            expected += 1;
        }
    }
}

#[test]
fn what_does_not_fit_changes_nothing() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 127);
    write(&a, &b, 0..8);
    filled(&a.cq, 8);
    assert_eq!(a.cq.resize(7).unwrap_err().status(), Some(Status::Invalid));
    let too_many = a.pd.guest().attr().max_cqe.get() * 2;
    assert_eq!(a.cq.resize(too_many).unwrap_err().status(), Some(Status::Invalid));
    write(&a, &b, 8..16);
    let got: Vec<u64> = a.cq.take(16).iter().map(|wc| wc.ok().wr_id()).collect();
    assert_eq!(got, (0..16).collect::<Vec<_>>());
}

#[test]
fn an_armed_queue_stays_armed() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 7);
    a.cq.arm(false);
    a.cq.resize(63).unwrap();
    write(&a, &b, 0..1);
    a.cq.wait_event(SOON).unwrap();
}

#[test]
fn the_ring_of_before_is_left_alone() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 7);
    let before = a.cq.ring();
    a.cq.resize(63).unwrap();
    let canary = vec![0x5a; before.buf().len()];
    before.buf().write(0, &canary);
    write(&a, &b, 0..40);
    a.cq.take(40);
    assert_eq!(before.buf().read_vec(0, canary.len()), canary);
}

#[test]
fn posted_receives_move() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let a = Rc::new(guest_a, QpSpec::rc(), 4096).unwrap();
    let pd = guest_b.alloc_pd().unwrap();
    let cq = guest_b.create_cq(255).unwrap();
    let srq = pd.create_srq(7, 2, 0).unwrap();
    let qp = pd.create_qp_srq(QpSpec::rc(), &cq, &srq).unwrap();
    let b = Rc { qp, cq, mr: pd.reg_new(4096).unwrap(), pd };
    connect(&a.qp, &b.qp, &RcOptions::default()).unwrap();
    let (mut posted, mut received) = (0, 0);
    let receive = |count: u64, received: &mut u64| {
        for _ in 0..count {
            a.qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
            a.cq.next().ok();
            assert_eq!(b.cq.next().ok().wr_id(), *received);
            *received += 1;
        }
    };
    for depth in [7u32, 100, 15, 200, 7] {
        for _ in 0..6 {
            srq.post_recv(posted, &[b.mr.sge(0, 8)]).unwrap();
            posted += 1;
        }
        receive(3, &mut received);
        srq.resize(depth).unwrap();
        receive(3, &mut received);
    }
    for id in 0..7 {
        srq.post_recv(posted + id, &[b.mr.sge(0, 8)]).unwrap();
    }
    assert_eq!(srq.resize(3).unwrap_err().status(), Some(Status::Invalid), "seven do not fit");
    srq.set_limit(5).unwrap();
    receive(6, &mut received);
    srq.set_limit(5).unwrap();
    assert_eq!(srq.resize(3).unwrap_err().status(), Some(Status::Invalid), "nor does the limit");
    srq.set_limit(0).unwrap();
    srq.resize(3).unwrap();
    receive(1, &mut received);
}
