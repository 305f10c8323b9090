//! ATOMIC WRITE and FLUSH (IBA A19), and the resources that READs and atomics need.

use freeflow_tests::bed::Bed;
use freeflow_tests::guest::verbs::{MrSpec, Op, Payload, QpSpec, Rc, RcOptions, Remote, SendWr};
use virtio_rdma::ctrl::QpAttr;
use virtio_rdma::ib::{Access, QpMask, QpState, SendFlags, WcOpcode, WcStatus};

const ALL: Access = Access::LOCAL_WRITE.union(Access::REMOTE_READ).union(Access::REMOTE_WRITE);
const FLUSH: Access = ALL.union(Access::FLUSH_GLOBAL);
const GLOBAL: u8 = 1;
const PERSISTENT: u8 = 2;

/// A pair whose QPs allow flushes, and a region at the second end.
fn stage(access: Access) -> (Bed, Rc, Rc, freeflow_tests::guest::verbs::Mr) {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let o = RcOptions { access: FLUSH, ..RcOptions::default() };
    let (a, b) = Rc::pair_with(guest_a, guest_b, &QpSpec::rc(), 4096, &o).unwrap();
    let buf = b.pd.guest().alloc(4096).unwrap();
    let mr = b.pd.reg_spec(MrSpec::whole(&buf).access(access)).unwrap();
    (bed, a, b, mr)
}

fn post(rc: &Rc, op: Op, payload: Payload<'_>) -> (WcStatus, WcOpcode) {
    rc.qp.post(SendWr { wr_id: 1, op, payload, flags: SendFlags::SIGNALED }).unwrap();
    let wc = rc.cq.next();
    (wc.status(), wc.opcode())
}

#[test]
fn an_atomic_write_stores_one_word() {
    let (_bed, a, _b, mr) = stage(ALL);
    assert_eq!(
        post(&a, Op::AtomicWrite(mr.remote(8)), Payload::Inline(b"one word")),
        (WcStatus::Success, WcOpcode::AtomicWrite)
    );
    assert_eq!(mr.read(0, 24), b"\0\0\0\0\0\0\0\0one word\0\0\0\0\0\0\0\0");
}

#[test]
fn an_atomic_write_to_a_crooked_address_or_without_the_right() {
    type Where = fn(Remote) -> Remote;
    let cases: [(Access, WcStatus, Where); 3] = [
        (ALL, WcStatus::RemInvReqErr, |r| Remote { addr: r.addr + 4, ..r }),
        (ALL, WcStatus::RemAccessErr, |r| Remote { addr: r.addr + 4096, ..r }),
        (Access::REMOTE_READ, WcStatus::RemAccessErr, |r| r),
    ];
    for (access, status, place) in cases {
        let (_bed, a, _b, mr) = stage(access);
        let op = Op::AtomicWrite(place(mr.remote(0)));
        assert_eq!(post(&a, op, Payload::Inline(b"one word")).0, status);
        assert_eq!(mr.read(0, 4096), vec![0; 4096]);
    }
}

/// Addresses are aligned, and memory is not.
#[test]
fn an_atomic_write_to_crooked_memory() {
    let (_bed, a, b, _mr) = stage(ALL);
    let buf = b.pd.guest().alloc(4096).unwrap();
    let mr = b.pd.reg_spec(MrSpec::whole(&buf).part(4, 64).iova(0x1000)).unwrap();
    let op = Op::AtomicWrite(Remote { addr: 0x1008, rkey: mr.key() });
    assert_eq!(post(&a, op, Payload::Inline(b"one word")).0, WcStatus::RemInvReqErr);
    assert_eq!(buf.read_vec(0, 64), [0; 64]);
}

#[test]
fn a_flush_checks_what_it_names() {
    let flush = |access, offset, len, placement, selectivity| {
        let (_bed, a, _b, mr) = stage(access);
        let got = post(&a, Op::Flush(mr.remote(offset), len, placement, selectivity), Payload::Sges(&[]));
        assert_eq!(got.1, WcOpcode::Flush);
        got.0
    };
    assert_eq!(flush(FLUSH, 0, 4096, GLOBAL, 0), WcStatus::Success);
    assert_eq!(flush(FLUSH, 4096, 4096, GLOBAL, 1), WcStatus::Success, "the whole region, whatever is said of bytes");
    assert_eq!(flush(FLUSH, 1, 4096, GLOBAL, 0), WcStatus::RemAccessErr);
    assert_eq!(flush(ALL, 0, 8, GLOBAL, 0), WcStatus::RemAccessErr);
    assert_eq!(flush(FLUSH, 0, 8, PERSISTENT, 0), WcStatus::RemAccessErr);
}

#[test]
fn a_flush_needs_a_queue_pair_that_allows_it() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(64);
    let buf = b.pd.guest().alloc(4096).unwrap();
    let mr = b.pd.reg_spec(MrSpec::whole(&buf).access(FLUSH)).unwrap();
    let op = Op::Flush(mr.remote(0), 8, GLOBAL, 0);
    assert_eq!(post(&a, op, Payload::Sges(&[])).0, WcStatus::RemInvReqErr);
}

/// A pair of which one end lends or takes no resources for READs and atomics.
fn without_resources(initiator: bool) -> (Bed, Rc, Rc) {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(64);
    let (qp, mask) = if initiator { (&a.qp, QpMask::MAX_QP_RD_ATOMIC) } else { (&b.qp, QpMask::MAX_DEST_RD_ATOMIC) };
    qp.modify_state(QpState::Sqd).unwrap();
    qp.modify(mask, QpAttr::default()).unwrap();
    qp.modify_state(QpState::Rts).unwrap();
    (bed, a, b)
}

#[test]
fn reads_and_atomics_need_resources_on_both_sides() {
    for (initiator, expected) in [(true, WcStatus::LocQpOpErr), (false, WcStatus::RemInvReqErr)] {
        for op in [Op::Read as fn(Remote) -> Op, |r| Op::FetchAdd(r, 1), Op::AtomicWrite] {
            let (_bed, a, b) = without_resources(initiator);
            let sges = [a.mr.sge(0, 8)];
            let op = op(b.mr.remote(0));
            let payload =
                if matches!(op, Op::AtomicWrite(_)) { Payload::Inline(b"one word") } else { Payload::Sges(&sges) };
            assert_eq!(post(&a, op, payload).0, expected, "{op:?}");
        }
        let (_bed, a, b) = without_resources(initiator);
        assert_eq!(post(&a, Op::Write(b.mr.remote(0)), Payload::Inline(b"fine")).0, WcStatus::Success);
    }
}
