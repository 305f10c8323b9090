//! Who may talk to whom.
#![allow(missing_docs, reason = "a test program")]

use std::time::Duration;

use freeflow_tests::bed::Bed;
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{AhAttr, Op, QpSpec, Rc, RcOptions, SendWr};
use freeflow_tests::router::RouterSpec;
use virtio_rdma::ib::WcStatus;

fn two_tenants() -> Bed {
    let tenants = ["red", "blue", "red"].map(str::to_owned).to_vec();
    Bed::with(&RouterSpec { tenants, ..RouterSpec::of(3) }, Placement::Contiguous)
}

#[test]
fn another_tenant_is_nobody() {
    let bed = two_tenants();
    let o = RcOptions { timeout: 8, retry_cnt: 2, ..RcOptions::default() };
    for gid_index in 0..3 {
        let o = RcOptions { gid_index, ..o };
        let (a, b) = Rc::pair_with(&bed.guests[0], &bed.guests[1], &QpSpec::rc(), 64, &o).unwrap();
        a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x")).unwrap();
        assert_eq!(a.cq.next().status(), WcStatus::RetryExcErr);
        assert_eq!(b.mr.read(0, 1), [0]);
        let (a, c) = Rc::pair_with(&bed.guests[0], &bed.guests[2], &QpSpec::rc(), 64, &o).unwrap();
        a.qp.post(SendWr::inline(1, Op::Write(c.mr.remote(0)), b"x")).unwrap();
        a.cq.next().ok();
    }
}

#[test]
fn datagrams_do_not_reach_another_tenant() {
    let bed = two_tenants();
    let (a, b) = (&bed.guests[0], &bed.guests[1]);
    let (from, to) = (Rc::new(a, QpSpec::ud(), 4096).unwrap(), Rc::new(b, QpSpec::ud(), 4096).unwrap());
    from.qp.to_ud(1).unwrap();
    to.qp.to_ud(1).unwrap();
    to.qp.post_recv(1, &[to.mr.sge_all()]).unwrap();
    let ah = from.pd.create_ah(AhAttr::to(b.gids()[1], 1)).unwrap();
    let op = Op::UdSend { ah: ah.number(), qpn: to.qp.number(), qkey: 1, imm: None };
    from.qp.post(SendWr::inline(1, op, b"x")).unwrap();
    from.cq.next().ok();
    assert!(to.cq.poll_for(Duration::from_millis(50)).is_none());
}
