//! The general service interface: management datagrams between queue pairs 1.
#![allow(missing_docs, reason = "a test program")]

use std::time::Duration;

use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{AhAttr, Op, QpSpec, Rc, SendWr};
use freeflow_tests::guest::{Gid, Guest};
use freeflow_tests::router::RouterSpec;
use virtio_rdma::ctrl::Status;
use virtio_rdma::ib::{GSI_QKEY, GSI_QPN, QpState, WcOpcode};
use virtio_rdma::ring::GRH_SIZE;

/// Long enough for a datagram to have come if it were to come.
const A_WHILE: Duration = Duration::from_millis(60);
const SOON: Duration = Duration::from_secs(20);

fn end(guest: &Guest, spec: QpSpec, qkey: u32) -> Rc {
    let end = Rc::new(guest, spec, 8192).unwrap();
    end.qp.to_ud(qkey).unwrap();
    end.qp.post_recv(9, &[end.mr.sge(4096, 4096)]).unwrap();
    end
}

fn gsi(guest: &Guest) -> Rc {
    end(guest, QpSpec::gsi(), GSI_QKEY)
}

fn send(from: &Rc, gid: Gid, qpn: u32, qkey: u32) {
    let ah = from.pd.create_ah(AhAttr::to(gid, 1)).unwrap();
    let op = Op::UdSend { ah: ah.number(), qpn, qkey, imm: None };
    from.qp.post(SendWr::inline(1, op, b"a management datagram")).unwrap();
    assert_eq!(from.cq.next().ok().opcode(), WcOpcode::Send);
}

fn gid(end: &Rc) -> Gid {
    end.pd.guest().gids()[1]
}

#[test]
fn management_datagrams_find_queue_pair_1_of_the_destination() {
    let bed = Bed::new(3);
    let ends: Vec<Rc> = bed.guests.iter().map(gsi).collect();
    assert!(ends.iter().all(|end| end.qp.number() == GSI_QPN));
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        let (from, to) = (&ends[from], &ends[to]);
        send(from, gid(to), GSI_QPN, GSI_QKEY);
        let wc = to.cq.next().ok();
        assert_eq!((wc.0.src_qp.get(), wc.byte_len()), (GSI_QPN, GRH_SIZE + 21));
        assert_eq!(to.mr.read(4096 + 32, 4), gid(from)[12..]);
        assert_eq!(&to.mr.read(4096 + GRH_SIZE, 21), b"a management datagram");
    }
}

#[test]
fn a_guest_reaches_its_own() {
    let bed = Bed::new(1);
    let first = Rc::new(&bed.guests[0], QpSpec::gsi(), 8192).unwrap();
    first.qp.to_ud(GSI_QKEY).unwrap();
    first.qp.post_recv(9, &[first.mr.sge(4096, 4096)]).unwrap();
    let ah = first.pd.create_ah(AhAttr::to(gid(&first), 1)).unwrap();
    let op = Op::UdSend { ah: ah.number(), qpn: GSI_QPN, qkey: GSI_QKEY, imm: None };
    first.qp.post(SendWr::inline(1, op, b"x")).unwrap();
    let opcodes = first.cq.take(2).iter().map(|wc| wc.ok().opcode()).collect::<Vec<_>>();
    assert!(opcodes.contains(&WcOpcode::Recv) && opcodes.contains(&WcOpcode::Send));
}

#[test]
fn there_is_one_at_most() {
    let bed = Bed::new(1);
    let guest = &bed.guests[0];
    let first = gsi(guest);
    let second = first.pd.create_qp(QpSpec::gsi(), &first.cq).expect_err("a second queue pair 1");
    assert_eq!(second.status(), Some(Status::Busy));
    drop(first);
    assert_eq!(gsi(guest).qp.number(), GSI_QPN);
}

#[test]
fn its_qkey_is_that_of_the_specification_whatever_it_was_given() {
    let bed = Bed::new(2);
    let (a, b) = bed.two();
    let (from, to) = (end(a, QpSpec::gsi(), 5), end(b, QpSpec::gsi(), 5));
    send(&from, gid(&to), GSI_QPN, GSI_QKEY);
    assert_eq!(to.cq.next().ok().wr_id(), 9);
    to.qp.post_recv(10, &[to.mr.sge(4096, 4096)]).unwrap();
    send(&from, gid(&to), GSI_QPN, 5);
    assert!(to.cq.poll_for(A_WHILE).is_none());
}

#[test]
fn a_datagram_queue_pair_with_another_qkey_does_not_reach_it() {
    let bed = Bed::new(2);
    let (a, b) = bed.two();
    let (from, to) = (end(a, QpSpec::ud(), 0x1234), gsi(b));
    // A request with the top bit set stands for the sender's own key: it is not enough to name the right one.
    for qkey in [GSI_QKEY, 0x1234, 0] {
        send(&from, gid(&to), GSI_QPN, qkey);
    }
    assert!(to.cq.poll_for(A_WHILE).is_none());
    let privileged = end(a, QpSpec::ud(), GSI_QKEY);
    send(&privileged, gid(&to), GSI_QPN, GSI_QKEY);
    assert_eq!(to.cq.next().ok().wr_id(), 9);
}

#[test]
fn another_tenants_is_nobody() {
    let tenants = ["red", "blue"].map(str::to_owned).to_vec();
    let bed = Bed::with(&RouterSpec { tenants, ..RouterSpec::of(2) }, Placement::Contiguous);
    let (red, blue) = (gsi(&bed.guests[0]), gsi(&bed.guests[1]));
    for index in 0..3 {
        send(&red, bed.guests[1].gids()[index], GSI_QPN, GSI_QKEY);
    }
    assert!(blue.cq.poll_for(A_WHILE).is_none());
    assert_eq!(red.qp.state().unwrap(), QpState::Rts);
}

#[test]
fn before_it_is_ready_nothing_comes() {
    let bed = Bed::new(2);
    let (a, b) = bed.two();
    let from = gsi(a);
    let to = Rc::new(b, QpSpec::gsi(), 8192).unwrap();
    let dropped = || [0, 1].map(|nic| bed.router.status(nic).counters.messages_dropped).iter().sum::<u64>();
    send(&from, gid(&to), GSI_QPN, GSI_QKEY);
    eventually("loss", SOON, || dropped() == 1);
    to.qp.to_ud(GSI_QKEY).unwrap();
    to.qp.post_recv(9, &[to.mr.sge(4096, 4096)]).unwrap();
    assert!(to.cq.poll_for(A_WHILE).is_none());
    send(&from, gid(&to), GSI_QPN, GSI_QKEY);
    assert_eq!(to.cq.next().ok().wr_id(), 9);
}
