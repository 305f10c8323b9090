//! Compare-and-swap and fetch-and-add.
#![allow(missing_docs, reason = "a test program")]

use std::sync::atomic::Ordering::Relaxed;

use freeflow_tests::bed::Bed;
use freeflow_tests::guest::verbs::{Mr, MrSpec, Op, Rc, RcOptions, Remote, SendWr};
use virtio_rdma::ib::{Access, QpState, WcOpcode, WcStatus};

fn all_access() -> Access {
    Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ | Access::REMOTE_ATOMIC
}

/// A connected pair, and a region of the second that atomics may reach.
fn pair(bed: &Bed) -> (Rc, Rc, Mr) {
    let (a, b) = bed.pair(4096);
    let mr = b.pd.reg_spec(MrSpec::whole(b.mr.buf()).access(all_access())).unwrap();
    (a, b, mr)
}

fn word(mr: &Mr, offset: usize) -> u64 {
    u64::from_le_bytes(mr.read(offset, 8).try_into().unwrap())
}

/// Does one; the value that came back.
fn run(a: &Rc, op: Op) -> u64 {
    a.qp.post(SendWr::new(1, op, &[a.mr.sge(0, 8)])).unwrap();
    a.cq.next().ok();
    word(&a.mr, 0)
}

#[test]
fn fetch_and_add_returns_the_old_value() {
    let bed = Bed::new(2);
    let (a, _b, mr) = pair(&bed);
    mr.write(64, &u64::MAX.to_le_bytes());
    a.qp.post(SendWr::new(9, Op::FetchAdd(mr.remote(64), 3), &[a.mr.sge(8, 8)])).unwrap();
    let wc = a.cq.next().ok();
    assert_eq!((wc.wr_id(), wc.opcode(), wc.byte_len()), (9, WcOpcode::FetchAdd, 8));
    assert_eq!((word(&a.mr, 8), word(&mr, 64)), (u64::MAX, 2));
    assert_eq!((word(&a.mr, 0), word(&a.mr, 16), word(&mr, 56), word(&mr, 72)), (0, 0, 0, 0));
}

#[test]
fn compare_and_swap_stores_on_a_match_only() {
    let bed = Bed::new(2);
    let (a, _b, mr) = pair(&bed);
    mr.write(0, &7u64.to_le_bytes());
    assert_eq!(run(&a, Op::CompareSwap(mr.remote(0), 6, 100)), 7);
    assert_eq!(word(&mr, 0), 7);
    assert_eq!(run(&a, Op::CompareSwap(mr.remote(0), 7, 100)), 7);
    assert_eq!(word(&mr, 0), 100);
    a.qp.post(SendWr::new(1, Op::CompareSwap(mr.remote(0), 0, 1), &[a.mr.sge(0, 8)])).unwrap();
    assert_eq!(a.cq.next().ok().opcode(), WcOpcode::CompSwap);
}

#[test]
fn the_answer_may_be_scattered_and_its_buffers_longer() {
    let bed = Bed::new(2);
    let (a, _b, mr) = pair(&bed);
    let old = 0x0807_0605_0403_0201u64;
    mr.write(0, &old.to_le_bytes());
    let sges = [a.mr.sge(100, 3), a.mr.sge(201, 1), a.mr.sge(300, 60)];
    a.qp.post(SendWr::new(1, Op::FetchAdd(mr.remote(0), 1), &sges)).unwrap();
    assert_eq!(a.cq.next().ok().byte_len(), 8);
    assert_eq!(a.mr.read(100, 4), [1, 2, 3, 0]);
    assert_eq!(a.mr.read(200, 3), [0, 4, 0]);
    assert_eq!(a.mr.read(300, 5), [5, 6, 7, 8, 0]);
}

#[test]
fn atomics_of_many_guests_and_of_the_owner_add_up() {
    const EACH: u64 = 2_000;
    let bed = Bed::new(4);
    let target = &bed.guests[0];
    let ends: Vec<_> = (1..4).map(|i| Rc::pair(&bed.guests[i], target, 4096).unwrap()).collect();
    let shared = ends[0].1.mr.buf();
    let mrs: Vec<_> =
        ends.iter().map(|(_, b)| b.pd.reg_spec(MrSpec::whole(shared).access(all_access())).unwrap()).collect();
    std::thread::scope(|scope| {
        for ((a, _), mr) in ends.iter().zip(&mrs) {
            scope.spawn(move || {
                for _ in 0..EACH {
                    run(a, Op::FetchAdd(mr.remote(0), 1));
                }
            });
        }
        let own = shared.word64(0);
        for _ in 0..EACH {
            own.fetch_add(1, Relaxed);
        }
    });
    assert_eq!(word(&ends[0].1.mr, 0), EACH * 4);
}

/// The status that an atomic ends with, and the state of the responder after it.
fn refused(change: impl FnOnce(&Rc, &Rc, &Mr) -> (Op, usize)) -> (WcStatus, QpState) {
    let bed = Bed::new(2);
    let (a, b, mr) = pair(&bed);
    let before = mr.read(0, 4096);
    let (op, room) = change(&a, &b, &mr);
    a.qp.post(SendWr::new(1, op, &[a.mr.sge(0, room)])).unwrap();
    let status = a.cq.next().status();
    assert_eq!(mr.read(0, 4096), before, "a refused atomic changed memory");
    (status, b.qp.state().unwrap())
}

#[test]
fn bad_atomics_are_refused() {
    let add = |remote: Remote| (Op::FetchAdd(remote, 1), 8);
    let misaligned = refused(|_, _, mr| add(mr.remote(4)));
    assert_eq!(misaligned, (WcStatus::RemInvReqErr, QpState::Err));
    let no_permission = refused(|_, b, _| add(b.mr.remote(0)));
    assert_eq!(no_permission, (WcStatus::RemAccessErr, QpState::Err));
    let outside = refused(|_, _, mr| add(mr.remote(4096)));
    assert_eq!(outside, (WcStatus::RemAccessErr, QpState::Err));
    let wrong_key = refused(|_, _, mr| add(Remote { rkey: mr.remote(0).rkey ^ 0x100, ..mr.remote(0) }));
    assert_eq!(wrong_key, (WcStatus::RemAccessErr, QpState::Err));
    let no_room = refused(|_, _, mr| (Op::FetchAdd(mr.remote(0), 1), 7));
    assert_eq!(no_room, (WcStatus::LocProtErr, QpState::Rts));
}

#[test]
fn a_qp_that_does_not_allow_atomics_refuses_them() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let options = RcOptions { access: Access::REMOTE_WRITE | Access::REMOTE_READ, ..RcOptions::default() };
    let spec = freeflow_tests::guest::verbs::QpSpec::rc();
    let (a, b) = Rc::pair_with(guest_a, guest_b, &spec, 4096, &options).unwrap();
    let mr = b.pd.reg_spec(MrSpec::whole(b.mr.buf()).access(all_access())).unwrap();
    a.qp.post(SendWr::new(1, Op::FetchAdd(mr.remote(0), 1), &[a.mr.sge(0, 8)])).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RemInvReqErr);
}

#[test]
fn memory_that_is_not_aligned_as_its_addresses_are_is_refused() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let spec = MrSpec::whole(b.mr.buf()).access(all_access());
    let mr = b.pd.reg_spec(MrSpec { iova: spec.iova + 4, ..spec }).unwrap();
    // Aligned in the region's addresses, not in memory.
    let remote = mr.remote(4);
    assert!(remote.addr.is_multiple_of(8));
    a.qp.post(SendWr::new(1, Op::FetchAdd(remote, 1), &[a.mr.sge(0, 8)])).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RemInvReqErr);
}
