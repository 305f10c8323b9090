//! What happens to requests that cannot be done, and to the queue pairs of such requests.
#![allow(missing_docs, reason = "a test program")]

use std::time::{Duration, Instant};

use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::verbs::{MrSpec, Op, QpSpec, Rc, RcOptions, SendWr, connect};
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{Access, QpState, WcStatus};

const SOON: Duration = Duration::from_secs(5);

fn pair_with(bed: &Bed, o: &RcOptions) -> (Rc, Rc) {
    let (a, b) = bed.two();
    Rc::pair_with(a, b, &QpSpec::rc(), 4096, o).unwrap()
}

#[test]
fn modify_to_error_flushes_both_queues() {
    let bed = Bed::new(2);
    let end = Rc::new(&bed.guests[0], QpSpec::rc(), 4096).unwrap();
    // Nobody is there, so that the sends stay.
    let o = RcOptions { timeout: 0, ..RcOptions::default() };
    end.qp.to_rts_alone([7; 16], 5, &o).unwrap();
    for id in 0..10 {
        end.qp.post_recv(100 + id, &[end.mr.sge(0, 8)]).unwrap();
        end.qp.post(SendWr::inline(id, Op::Send, b"x")).unwrap();
    }
    end.qp.modify_state(QpState::Err).unwrap();
    let mut ids = Vec::new();
    for wc in end.cq.take(20) {
        assert_eq!(wc.status(), WcStatus::WrFlushErr);
        ids.push(wc.wr_id());
    }
    let (sends, recvs): (Vec<u64>, Vec<u64>) = ids.into_iter().partition(|&id| id < 100);
    assert_eq!(sends, (0..10).collect::<Vec<u64>>());
    assert_eq!(recvs, (100..110).collect::<Vec<u64>>());
    end.qp.post(SendWr::inline(55, Op::Send, b"x")).unwrap();
    let wc = end.cq.next();
    assert_eq!((wc.wr_id(), wc.status()), (55, WcStatus::WrFlushErr));
}

#[test]
fn unsignalled_requests_are_flushed_with_completions() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    a.qp.modify_state(QpState::Err).unwrap();
    let wr = SendWr::inline(3, Op::Write(b.mr.remote(0)), b"x").flags(virtio_rdma::ib::SendFlags::empty());
    a.qp.post_send(&[wr; 3]).unwrap();
    a.cq.take(3).iter().for_each(|wc| assert_eq!(wc.status(), WcStatus::WrFlushErr));
}

#[test]
fn an_error_flushes_what_follows() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let bad = freeflow_tests::guest::verbs::Remote { addr: 0, rkey: 0x1234_5678 };
    let wrs = [
        SendWr::inline(1, Op::Write(b.mr.remote(0)), b"good"),
        SendWr::inline(2, Op::Write(bad), b"bad"),
        SendWr::inline(3, Op::Write(b.mr.remote(0)), b"late"),
    ];
    a.qp.post_recv(9, &[]).unwrap();
    a.qp.post_send(&wrs).unwrap();
    let got: Vec<(u64, WcStatus)> = a.cq.take(4).iter().map(|wc| (wc.wr_id(), wc.status())).collect();
    assert!(got.contains(&(9, WcStatus::WrFlushErr)));
    let sends: Vec<(u64, WcStatus)> = got.into_iter().filter(|&(id, _)| id != 9).collect();
    let expected = [(1, WcStatus::Success), (2, WcStatus::RemAccessErr), (3, WcStatus::WrFlushErr)];
    assert_eq!(sends, expected);
    assert_eq!(b.mr.read(0, 4), b"good");
    assert_eq!(a.qp.state().unwrap(), QpState::Err);
    b.pd.guest().events().wait(EventType::QpAccessError, b.qp.number(), SOON).unwrap();
    eventually("error of the responder", SOON, || b.qp.state().unwrap() == QpState::Err);
}

#[test]
fn a_qp_works_again_after_reset() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    for round in 0..5u8 {
        a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), &[round; 7])).unwrap();
        a.cq.next().ok();
        assert_eq!(b.mr.read(0, 7), [round; 7]);
        a.qp.post_recv(1, &[]).unwrap();
        a.qp.modify_state(QpState::Reset).unwrap();
        b.qp.modify_state(QpState::Err).unwrap();
        b.qp.modify_state(QpState::Reset).unwrap();
        assert!(a.cq.poll().is_none(), "RESET completes nothing");
        let o = RcOptions { psn: 17 + u32::from(round), ..RcOptions::default() };
        connect(&a.qp, &b.qp, &o).unwrap();
    }
}

#[test]
fn nobody_there_ends_in_retry_exceeded() {
    let bed = Bed::new(2);
    let end = Rc::new(&bed.guests[0], QpSpec::rc(), 4096).unwrap();
    // 4.096 us * 2^12 = 16.8 ms, three times.
    let o = RcOptions { timeout: 12, retry_cnt: 3, ..RcOptions::default() };
    end.qp.to_rts_alone([7; 16], 5, &o).unwrap();
    let start = Instant::now();
    end.qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
    end.qp.post(SendWr::inline(2, Op::Send, b"x")).unwrap();
    assert_eq!(end.cq.next().status(), WcStatus::RetryExcErr);
    let took = start.elapsed();
    assert_eq!(end.cq.next().status(), WcStatus::WrFlushErr);
    assert!((Duration::from_millis(45)..Duration::from_secs(1)).contains(&took), "{took:?}");
    assert_eq!(end.qp.state().unwrap(), QpState::Err);
}

#[test]
fn a_peer_that_comes_late_is_found() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let (a, b) = (Rc::new(guest_a, QpSpec::rc(), 64).unwrap(), Rc::new(guest_b, QpSpec::rc(), 64).unwrap());
    let o = RcOptions { timeout: 15, ..RcOptions::default() };
    a.qp.to_rts_alone(guest_b.gids()[0], b.qp.number(), &o).unwrap();
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"late")).unwrap();
    assert!(a.cq.poll_for(Duration::from_millis(50)).is_none());
    b.qp.to_rts_alone(guest_a.gids()[0], a.qp.number(), &o).unwrap();
    a.cq.next().ok();
    assert_eq!(b.mr.read(0, 4), b"late");
}

#[test]
fn a_peer_that_names_another_is_nobody() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let (a, b) = (Rc::new(guest_a, QpSpec::rc(), 64).unwrap(), Rc::new(guest_b, QpSpec::rc(), 64).unwrap());
    let o = RcOptions { timeout: 8, retry_cnt: 2, ..RcOptions::default() };
    a.qp.to_rts_alone(guest_b.gids()[0], b.qp.number(), &o).unwrap();
    b.qp.to_rts_alone(guest_a.gids()[0], a.qp.number() ^ 1, &o).unwrap();
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"no")).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RetryExcErr);
    assert_eq!(b.mr.read(0, 2), [0; 2]);
}

#[test]
fn other_sequence_numbers_are_nobody() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let (a, b) = (Rc::new(guest_a, QpSpec::rc(), 64).unwrap(), Rc::new(guest_b, QpSpec::rc(), 64).unwrap());
    let o = RcOptions { timeout: 8, retry_cnt: 2, psn: 1, ..RcOptions::default() };
    a.qp.to_rts_alone(guest_b.gids()[0], b.qp.number(), &o).unwrap();
    b.qp.to_rts_alone(guest_a.gids()[0], a.qp.number(), &RcOptions { psn: 2, ..o }).unwrap();
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"no")).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RetryExcErr);
}

#[test]
fn a_peer_that_was_destroyed() {
    let bed = Bed::new(2);
    let (a, b) = pair_with(&bed, &RcOptions { timeout: 8, retry_cnt: 2, ..RcOptions::default() });
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"one")).unwrap();
    a.cq.next().ok();
    let remote = b.mr.remote(0);
    b.qp.destroy().unwrap();
    a.qp.post(SendWr::inline(1, Op::Write(remote), b"two")).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RetryExcErr);
    assert_eq!(b.mr.read(0, 3), b"one");
}

#[test]
fn no_receive_ends_in_rnr_exceeded() {
    let bed = Bed::new(2);
    // Code 22 is 20.48 ms (IBA table 45), three times.
    let (a, b) = pair_with(&bed, &RcOptions { rnr_retry: 3, min_rnr_timer: 22, ..RcOptions::default() });
    let start = Instant::now();
    a.qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RnrRetryExcErr);
    let took = start.elapsed();
    assert!((Duration::from_millis(55)..Duration::from_secs(1)).contains(&took), "{took:?}");
    assert_eq!(b.qp.state().unwrap(), QpState::Rts, "the responder did nothing wrong");
}

#[test]
fn no_rnr_retry_at_all() {
    let bed = Bed::new(2);
    let (a, b) = pair_with(&bed, &RcOptions { rnr_retry: 0, min_rnr_timer: 22, ..RcOptions::default() });
    a.qp.post(SendWr::inline(1, Op::WriteImm(b.mr.remote(0), 1), b"x")).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RnrRetryExcErr);
}

#[test]
fn a_receive_posted_late_is_used() {
    let bed = Bed::new(2);
    for (code, rnr_retry) in [(1, 7), (18, 7), (20, 6)] {
        let (a, b) = pair_with(&bed, &RcOptions { rnr_retry, min_rnr_timer: code, ..RcOptions::default() });
        a.qp.post(SendWr::inline(1, Op::Send, b"waited")).unwrap();
        assert!(a.cq.poll_for(Duration::from_millis(25)).is_none());
        b.qp.post_recv(2, &[b.mr.sge(0, 64)]).unwrap();
        a.cq.next().ok();
        assert_eq!(b.cq.next().ok().byte_len(), 6);
        assert_eq!(b.mr.read(0, 6), b"waited");
    }
}

#[test]
fn waiting_for_a_receive_delays_nobody_else() {
    let bed = Bed::new(2);
    let (a, b) = pair_with(&bed, &RcOptions { min_rnr_timer: 0, ..RcOptions::default() });
    let (c, d) = bed.pair(64);
    a.qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
    for i in 0..1000u64 {
        c.qp.post(SendWr::inline(i, Op::Write(d.mr.remote(0)), b"y")).unwrap();
        c.cq.next().ok();
    }
    b.qp.post_recv(1, &[b.mr.sge(0, 8)]).unwrap();
    a.cq.next().ok();
}

#[test]
fn send_longer_than_the_receive() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    b.qp.post_recv(4, &[b.mr.sge(0, 9)]).unwrap();
    b.qp.post_recv(5, &[b.mr.sge(0, 100)]).unwrap();
    a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, 10)])).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RemInvReqErr);
    let first = b.cq.next();
    assert_eq!((first.wr_id(), first.status()), (4, WcStatus::LocLenErr));
    let second = b.cq.next();
    assert_eq!((second.wr_id(), second.status()), (5, WcStatus::WrFlushErr));
    assert_eq!(b.qp.state().unwrap(), QpState::Err);
}

#[test]
fn receive_with_a_bad_key() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let bad = freeflow_tests::guest::verbs::Sge { lkey: 0x4242, ..b.mr.sge(0, 100) };
    b.qp.post_recv(4, &[bad]).unwrap();
    a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, 10)])).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RemOpErr);
    assert_eq!(b.cq.next().status(), WcStatus::LocProtErr);
    assert_eq!((a.qp.state().unwrap(), b.qp.state().unwrap()), (QpState::Err, QpState::Err));
}

/// Registers a region at b with other rights, and does one operation on it from a.
fn with_rights(access: Access, qp_access: Access, op: impl Fn(freeflow_tests::guest::verbs::Remote) -> Op) -> WcStatus {
    let bed = Bed::new(2);
    let (a, b) = pair_with(&bed, &RcOptions { access: qp_access, ..RcOptions::default() });
    let buf = b.pd.guest().alloc(4096).unwrap();
    let mr = b.pd.reg_spec(MrSpec::whole(&buf).access(access)).unwrap();
    b.qp.post_recv(1, &[]).unwrap();
    a.mr.fill(0, 100, 0xee);
    a.qp.post(SendWr::new(1, op(mr.remote(0)), &[a.mr.sge(0, 100)])).unwrap();
    let status = a.cq.next().status();
    if status != WcStatus::Success {
        assert_eq!(mr.read(0, 4096), vec![0; 4096]);
        assert_eq!(a.mr.read(0, 100), [0xee; 100]);
        assert_eq!(a.qp.state().unwrap(), QpState::Err);
    }
    status
}

#[test]
fn rights_of_regions_are_enforced() {
    let all = Access::REMOTE_READ | Access::REMOTE_WRITE;
    let local = Access::LOCAL_WRITE;
    let (read, write) = (local | Access::REMOTE_READ, local | Access::REMOTE_WRITE);
    assert_eq!(with_rights(write, all, Op::Write), WcStatus::Success);
    assert_eq!(with_rights(read, all, Op::Read), WcStatus::Success);
    assert_eq!(with_rights(read, all, Op::Write), WcStatus::RemAccessErr);
    assert_eq!(with_rights(read, all, |r| Op::WriteImm(r, 1)), WcStatus::RemAccessErr);
    assert_eq!(with_rights(write, all, Op::Read), WcStatus::RemAccessErr);
    assert_eq!(with_rights(local, all, Op::Write), WcStatus::RemAccessErr);
    assert_eq!(with_rights(Access::empty(), all, Op::Read), WcStatus::RemAccessErr);
}

#[test]
fn rights_of_queue_pairs_are_enforced() {
    let region = Access::LOCAL_WRITE | Access::REMOTE_READ | Access::REMOTE_WRITE;
    let refused = [WcStatus::RemInvReqErr, WcStatus::RemAccessErr];
    assert!(refused.contains(&with_rights(region, Access::REMOTE_READ, Op::Write)));
    assert!(refused.contains(&with_rights(region, Access::REMOTE_WRITE, Op::Read)));
    assert_eq!(with_rights(region, Access::REMOTE_WRITE, Op::Write), WcStatus::Success);
    assert_eq!(with_rights(region, Access::REMOTE_READ, Op::Read), WcStatus::Success);
}

#[test]
fn reading_into_a_region_without_local_write() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let buf = a.pd.guest().alloc(4096).unwrap();
    let mr = a.pd.reg_spec(MrSpec::whole(&buf).access(Access::REMOTE_READ)).unwrap();
    b.mr.fill(0, 100, 1);
    a.qp.post(SendWr::new(1, Op::Read(b.mr.remote(0)), &[mr.sge(0, 100)])).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::LocProtErr);
    assert_eq!(mr.read(0, 100), [0; 100]);
}

#[test]
fn more_sges_than_the_qp_has() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    // The stride has room for more than the four that the QP was created with.
    let sges = [a.mr.sge(0, 4); 5];
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &sges)).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::LocQpOpErr);
}

#[test]
fn drained_queue_raises_an_event() {
    use virtio_rdma::ctrl::QpAttr;
    use virtio_rdma::ib::QpMask;
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let attr = QpAttr { qp_state: QpState::Sqd.to_wire(), en_sqd_async_notify: 1, ..QpAttr::default() };
    a.qp.modify(QpMask::STATE | QpMask::EN_SQD_ASYNC_NOTIFY, attr).unwrap();
    a.pd.guest().events().wait(EventType::SqDrained, a.qp.number(), SOON).unwrap();
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"later")).unwrap();
    assert!(a.cq.poll_for(Duration::from_millis(20)).is_none(), "a drained queue sends nothing");
    assert_eq!(a.qp.state().unwrap(), QpState::Sqd);
    a.qp.modify_state(QpState::Rts).unwrap();
    a.cq.next().ok();
    assert_eq!(b.mr.read(0, 5), b"later");
}
