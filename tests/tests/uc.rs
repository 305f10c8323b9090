//! Data over unreliable connections: it arrives, or nobody hears of it.
#![allow(missing_docs, reason = "a test program")]

use std::time::Duration;

use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::verbs::{Mr, Op, QpSpec, Rc, RcOptions, Remote, SendWr};
use freeflow_tests::rng::Rng;
use virtio_rdma::ib::{QpMask, QpState, WcOpcode, WcStatus};

const SOON: Duration = Duration::from_secs(20);

/// That a WRITE has been sent says nothing of when it arrives, which between two NICs is later (IBA 9.8.2.2: nothing comes back).
fn wait_for(expected: &[u8], at: usize, mr: &Mr) {
    eventually("the arrival of a WRITE", SOON, || mr.read(at, expected.len()) == expected);
}

fn pair(bed: &Bed, len: usize) -> (Rc, Rc) {
    let (a, b) = bed.two();
    Rc::pair_with(a, b, &QpSpec::uc(), len, &RcOptions::default()).unwrap()
}

#[test]
fn sends_and_writes_arrive() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 300_000);
    let bytes = Rng::new(1).bytes(200_001);
    a.mr.write(0, &bytes);
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(7)), &[a.mr.sge(0, bytes.len())])).unwrap();
    assert_eq!(a.cq.next().ok().opcode(), WcOpcode::RdmaWrite);
    wait_for(&bytes, 7, &b.mr);
    b.qp.post_recv(5, &[b.mr.sge(1, 250_000)]).unwrap();
    b.qp.post_recv(6, &[]).unwrap();
    a.qp.post(SendWr::new(2, Op::SendImm(99), &[a.mr.sge(0, bytes.len())])).unwrap();
    a.qp.post(SendWr::new(3, Op::WriteImm(b.mr.remote(0), 77), &[a.mr.sge(0, 3)])).unwrap();
    let (got, second) = (b.cq.next().ok(), b.cq.next().ok());
    assert_eq!((got.wr_id(), got.imm(), got.byte_len()), (5, Some(99), bytes.len()));
    assert_eq!((second.wr_id(), second.imm()), (6, Some(77)));
    assert_eq!(b.mr.read(4, 1000), bytes[3..1003]);
}

#[test]
fn a_message_without_a_receive_is_lost() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 4096);
    // On one host the sender knows, between two the receiver alone.
    let dropped = || [0, 1].map(|nic| bed.router.status(nic).counters.messages_dropped).iter().sum::<u64>();
    a.qp.post(SendWr::inline(1, Op::Send, b"lost")).unwrap();
    a.cq.next().ok();
    eventually("loss", SOON, || dropped() == 1);
    b.qp.post_recv(5, &[b.mr.sge(0, 64)]).unwrap();
    a.qp.post(SendWr::inline(2, Op::Send, b"found")).unwrap();
    a.cq.next().ok();
    assert_eq!(b.cq.next().ok().byte_len(), 5);
    assert_eq!(b.mr.read(0, 5), b"found");
    assert!(b.cq.poll().is_none());
    assert_eq!(dropped(), 1);
}

#[test]
fn what_the_peer_would_refuse_is_lost_and_the_peer_goes_on() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 4096);
    let wrong = Remote { rkey: b.mr.remote(0).rkey ^ 0x100, ..b.mr.remote(0) };
    for op in [Op::Write(wrong), Op::Write(b.mr.remote(4096))] {
        a.qp.post(SendWr::inline(1, op, b"x")).unwrap();
        a.cq.next().ok();
    }
    // Longer than the receive, which stays for the next.
    b.qp.post_recv(5, &[b.mr.sge(0, 4)]).unwrap();
    a.qp.post(SendWr::inline(2, Op::Send, b"too long")).unwrap();
    a.cq.next().ok();
    a.qp.post(SendWr::inline(3, Op::Send, b"fits")).unwrap();
    a.cq.next().ok();
    let got = b.cq.next().ok();
    assert_eq!((got.wr_id(), got.byte_len()), (5, 4));
    assert_eq!(b.mr.read(0, 4), b"fits");
    assert_eq!((a.qp.state().unwrap(), b.qp.state().unwrap()), (QpState::Rts, QpState::Rts));
}

#[test]
fn a_peer_that_is_gone_or_starts_over_is_no_error() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 4096);
    let peer = b.qp.query().unwrap();
    b.qp.modify_state(QpState::Reset).unwrap();
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"gone")).unwrap();
    a.cq.next().ok();
    assert_eq!(b.mr.read(0, 4), [0; 4]);
    // Any PSN will do at the start of a message.
    let options = RcOptions::default();
    b.qp.to_init(options.access).unwrap();
    b.qp.to_rtr(peer.av.dgid, a.qp.number(), 0x12_3456, &options).unwrap();
    a.qp.post(SendWr::inline(2, Op::Write(b.mr.remote(0)), b"back")).unwrap();
    a.cq.next().ok();
    wait_for(b"back", 0, &b.mr);
}

#[test]
fn reads_and_atomics_are_not_for_uc() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 4096);
    for op in [Op::Read(b.mr.remote(0)), Op::FetchAdd(b.mr.remote(0), 1)] {
        a.qp.post(SendWr::new(1, op, &[a.mr.sge(0, 8)])).unwrap();
        assert_eq!(a.cq.next().status(), WcStatus::LocQpOpErr);
        assert_eq!(a.qp.state().unwrap(), QpState::Sqe);
        a.qp.modify(
            QpMask::STATE | QpMask::CUR_STATE,
            virtio_rdma::ctrl::QpAttr {
                qp_state: QpState::Rts.to_wire(),
                cur_qp_state: QpState::Sqe.to_wire(),
                ..Default::default()
            },
        )
        .unwrap();
    }
    a.qp.post(SendWr::inline(2, Op::Write(b.mr.remote(0)), b"fine")).unwrap();
    a.cq.next().ok();
}
