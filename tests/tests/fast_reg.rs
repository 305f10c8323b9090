//! What kernels use: regions that work requests give memory to, a region of all guest memory, and queue pairs that may name it.

use std::sync::Arc;
use std::time::Duration;

use freeflow_backend::Profile;
use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::Guest;
use freeflow_tests::guest::mem::{Buf, Placement};
use freeflow_tests::guest::verbs::{
    Bind, FastMr, MwType, Op, QpSpec, Rc, RcOptions, Remote, SendWr, connect, next_key,
};
use freeflow_tests::router::RouterSpec;
use virtio_rdma::ctrl::{Extent, Status};
use virtio_rdma::ib::{Access, QpState, SendFlags, WcFlags, WcOpcode, WcStatus};

const IOVA: u64 = 0xffff_8880_0001_0800;
const LEN: usize = 20_000;
const ALL: Access = Access::LOCAL_WRITE.union(Access::REMOTE_READ).union(Access::REMOTE_WRITE);

fn kernel_pair(bed: &Bed) -> (Rc, Rc) {
    let (a, b) = bed.two();
    Rc::pair_with(a, b, &QpSpec::kernel(), 1 << 16, &RcOptions::default()).unwrap()
}

fn post(rc: &Rc, op: Op) -> WcStatus {
    rc.qp.post(SendWr::new(1, op, &[])).unwrap();
    rc.cq.next().status()
}

fn write(rc: &Rc, to: Remote, len: usize) -> WcStatus {
    rc.qp.post(SendWr::new(2, Op::Write(to), &[rc.mr.sge(0, len)])).unwrap();
    rc.cq.next().status()
}

/// Memory in scattered pages, the first and the last of them cut.
fn scattered(rc: &Rc) -> Buf {
    rc.pd.guest().memory().alloc(LEN + 4096, Placement::Fragmented).unwrap()
}

const CUT: usize = 0x800;

#[test]
fn registered_used_invalidated_and_registered_again() {
    let bed = Bed::new(2);
    let (a, b) = kernel_pair(&bed);
    let (first, second) = (scattered(&b), scattered(&b));
    let mut mr = b.pd.alloc_fast_mr(16).unwrap();
    for (round, buf) in [&first, &second, &first].into_iter().enumerate() {
        let register = mr.register(buf, (CUT, LEN), IOVA, ALL);
        b.qp.post(SendWr::new(4, register, &[])).unwrap();
        let wc = b.cq.next().ok();
        assert_eq!((wc.wr_id(), wc.opcode(), wc.byte_len()), (4, WcOpcode::RegMr, 0));
        let bytes: Vec<u8> = (0..LEN).map(|i| (i * 7 + round) as u8).collect();
        a.mr.write(0, &bytes);
        assert_eq!(write(&a, Remote { addr: IOVA, rkey: mr.key }, LEN), WcStatus::Success);
        assert_eq!(buf.read_vec(CUT, LEN), bytes);
        // As a local key, too.
        b.qp.post(SendWr::new(5, Op::Write(a.mr.remote(40_000)), &[mr.sge(IOVA + 5000, 100)])).unwrap();
        b.cq.next().ok();
        assert_eq!(a.mr.read(40_000, 100), bytes[5000..5100]);
        assert_eq!(post(&b, Op::LocalInv(mr.key)), WcStatus::Success);
    }
    assert_eq!(write(&a, Remote { addr: IOVA, rkey: mr.key }, 8), WcStatus::RemAccessErr);
}

#[test]
fn the_peer_invalidates() {
    let bed = Bed::new(2);
    let (a, b) = kernel_pair(&bed);
    let buf = scattered(&b);
    let mut mr = b.pd.alloc_fast_mr(16).unwrap();
    assert_eq!(post(&b, mr.register(&buf, (CUT, LEN), IOVA, ALL)), WcStatus::Success);
    b.qp.post_recv(3, &[b.mr.sge(0, 8)]).unwrap();
    a.qp.post(SendWr::inline(1, Op::SendInv(mr.key), b"finished")).unwrap();
    a.cq.next().ok();
    let wc = b.cq.next().ok();
    assert_eq!((wc.flags(), wc.0.imm_data.get()), (WcFlags::WITH_INV, mr.key));
    assert_eq!(post(&b, Op::LocalInv(mr.key)), WcStatus::Success, "what is free may be made free again");
    assert_eq!(write(&a, Remote { addr: IOVA, rkey: mr.key }, 8), WcStatus::RemAccessErr);
}

/// One end writes without pause, on its own worker, while a peer of another QP, on another, sends that the key is free: who has received that
/// has the memory for itself. It is what `NVMe` over RDMA relies on.
#[test]
fn after_a_peer_has_invalidated_nobody_writes() {
    const LEN: usize = 1 << 20;
    let bed = Bed::new(2);
    let (a, b) = bed.two();
    let spec = QpSpec::kernel();
    let (a, b) = Rc::pair_with(a, b, &spec, LEN, &RcOptions::default()).unwrap();
    // QPs take turns on the workers: one of these is on another than the writer.
    let siblings = [(); 2].map(|()| Rc::sibling((&a, &b), &spec, 64).unwrap());
    let buf = b.pd.guest().alloc(LEN).unwrap();
    let mut mr = b.pd.alloc_fast_mr(16).unwrap();
    a.mr.fill(0, LEN, 0xaa);
    for round in 0..40u8 {
        let (c, d) = &siblings[usize::from(round) % 2];
        assert_eq!(post(d, mr.register(&buf, (0, LEN), IOVA & !0xfff, ALL)), WcStatus::Success);
        let to = Remote { addr: IOVA & !0xfff, rkey: mr.key };
        for id in 0..120 {
            let sges = [a.mr.sge(0, LEN)];
            a.qp.post(SendWr::new(id, Op::Write(to), &sges).flags(SendFlags::empty())).unwrap();
        }
        eventually("a write", Duration::from_secs(5), || buf.read_vec(0, 1) == [0xaa]);
        d.qp.post_recv(3, &[d.mr.sge(0, 8)]).unwrap();
        c.qp.post(SendWr::inline(1, Op::SendInv(mr.key), b"yours")).unwrap();
        assert_eq!(d.cq.next().ok().flags(), WcFlags::WITH_INV);
        buf.fill(0, LEN, round);
        std::thread::sleep(Duration::from_millis(1));
        assert!(buf.read_vec(0, LEN).iter().all(|&byte| byte == round), "written to after it was invalidated");
        c.cq.next().ok();
        // The rest was refused, or all had been written.
        for end in [&a, &b] {
            end.qp.modify_state(QpState::Reset).unwrap();
            while end.cq.poll().is_some() {}
        }
        connect(&a.qp, &b.qp, &RcOptions { psn: 1000 + u32::from(round), ..RcOptions::default() }).unwrap();
    }
}

#[test]
fn only_a_kernels_queue_pair_may_register() {
    let bed = Bed::new(2);
    let (_a, b) = bed.pair(64);
    let buf = scattered(&b);
    let mut mr = b.pd.alloc_fast_mr(16).unwrap();
    assert_eq!(post(&b, mr.register(&buf, (CUT, LEN), IOVA, ALL)), WcStatus::LocQpOpErr);
    assert_eq!(b.qp.state().unwrap(), QpState::Err);
}

#[test]
fn registrations_that_are_refused() {
    type Change = fn(&Rc, &mut FastMr, &Buf) -> Op;
    let good = |mr: &mut FastMr, buf: &Buf| mr.register(buf, (0, 8192), IOVA & !0xfff, ALL);
    let cases: [(&str, Change); 9] = [
        ("another's key", |_, mr, buf| {
            mr.key ^= 0x1111_1100;
            mr.register(buf, (0, 4096), IOVA, ALL)
        }),
        ("an ordinary region's key", |b, mr, buf| {
            mr.key = b.mr.key();
            mr.register(buf, (0, 4096), IOVA, ALL)
        }),
        ("rights there are not", |_, mr, buf| mr.register(buf, (0, 4096), IOVA, Access::from_bits_retain(1 << 30))),
        ("remote without local write", |_, mr, buf| mr.register(buf, (0, 4096), IOVA, Access::REMOTE_WRITE)),
        ("no bytes", |_, mr, _| mr.register_extents(&[], 0, IOVA, ALL)),
        ("fewer bytes than said", |_, mr, buf| mr.register_extents(&buf.extents(0, 4096), 8192, IOVA, ALL)),
        ("more bytes than said", |_, mr, buf| mr.register_extents(&buf.extents(0, 8192), 4096, IOVA, ALL)),
        ("holes", |_, mr, buf| {
            let cut = [buf.extents(0, 100), buf.extents(4096, 4096)].concat();
            mr.register_extents(&cut, 4196, IOVA, ALL)
        }),
        ("more extents than it was made for", |_, mr, buf| mr.register(buf, (0, 5 * 4096), IOVA, ALL)),
    ];
    for (name, change) in cases {
        let bed = Bed::new(2);
        let (_a, b) = kernel_pair(&bed);
        let (buf, mut mr) = (scattered(&b), b.pd.alloc_fast_mr(4).unwrap());
        assert_eq!(post(&b, good(&mut mr, &buf)), WcStatus::Success);
        assert_eq!(post(&b, Op::LocalInv(mr.key)), WcStatus::Success);
        let key = mr.key;
        let bad = change(&b, &mut mr, &buf);
        assert_eq!(post(&b, bad), WcStatus::LocQpOpErr, "{name}");
        assert_eq!(b.qp.state().unwrap(), QpState::Err, "{name}");
        mr.key = key;
        mr.dereg().unwrap();
    }
}

#[test]
fn extents_outside_the_guest() {
    let outside = Extent { addr: (1u64 << 45).into(), len: 4096.into() };
    for list_is_outside in [false, true] {
        let bed = Bed::new(2);
        let (_a, b) = kernel_pair(&bed);
        let mr = b.pd.alloc_fast_mr(4).unwrap();
        let mut op = mr.register_extents(&[outside], 4096, IOVA, ALL);
        if let (true, Op::RegMr { list, .. }) = (list_is_outside, &mut op) {
            *list = (1 << 45) - 8;
        }
        assert_eq!(post(&b, op), WcStatus::LocQpOpErr);
    }
}

#[test]
fn a_registered_region_is_not_registered_again_nor_by_others() {
    let bed = Bed::new(2);
    let (a, b) = kernel_pair(&bed);
    let (_c, d) = kernel_pair(&bed);
    let (buf, other) = (scattered(&b), scattered(&b));
    let mut mr = b.pd.alloc_fast_mr(16).unwrap();
    let register = mr.register(&buf, (CUT, LEN), IOVA, ALL);
    assert_eq!(post(&d, register), WcStatus::LocQpOpErr, "another protection domain");
    assert_eq!(post(&b, register), WcStatus::Success);
    let first = mr.key;
    assert_eq!(post(&b, mr.register(&other, (CUT, LEN), IOVA, ALL)), WcStatus::LocQpOpErr);
    b.qp.modify_state(QpState::Reset).unwrap();
    a.qp.modify_state(QpState::Reset).unwrap();
    while b.cq.poll().is_some() {}
    freeflow_tests::guest::verbs::connect(&a.qp, &b.qp, &RcOptions { psn: 5, ..RcOptions::default() }).unwrap();
    a.mr.fill(0, 8, 0x77);
    assert_eq!(write(&a, Remote { addr: IOVA, rkey: first }, 8), WcStatus::Success, "the first is as it was");
    assert_eq!(buf.read_vec(CUT, 8), [0x77; 8]);
}

#[test]
fn windows_keep_a_registered_region_from_being_invalidated() {
    let bed = Bed::new(2);
    let (a, b) = kernel_pair(&bed);
    let buf = scattered(&b);
    let mut mr = b.pd.alloc_fast_mr(16).unwrap();
    assert_eq!(post(&b, mr.register(&buf, (CUT, LEN), IOVA, ALL | Access::MW_BIND)), WcStatus::Success);
    let window = b.pd.alloc_mw(MwType::Two).unwrap();
    let (key, access) = (next_key(window.key), Access::REMOTE_WRITE);
    let bind = Bind { window: window.key, key, region: mr.key, addr: IOVA + 10, length: 8, access };
    assert_eq!(post(&b, bind.op()), WcStatus::Success);
    assert_eq!(write(&a, bind.remote(), 8), WcStatus::Success);
    assert_eq!(post(&b, Op::LocalInv(mr.key)), WcStatus::LocQpOpErr);
    window.dealloc().unwrap();
    mr.dereg().unwrap();
}

#[test]
fn extents_of_fast_registration_count_from_the_start() {
    let spec = RouterSpec { limits: Profile { max_extents: 40, ..Profile::default() }, ..RouterSpec::of(1) };
    let bed = Bed::with(&spec, Placement::Contiguous);
    let pd = bed.guests[0].alloc_pd().unwrap();
    let refused = |n| pd.alloc_fast_mr(n).unwrap_err().status();
    assert_eq!(refused(0), Some(Status::Invalid));
    assert_eq!(refused(513), Some(Status::Invalid));
    let (first, second) = (pd.alloc_fast_mr(20).unwrap(), pd.alloc_fast_mr(20).unwrap());
    assert_eq!(refused(1), Some(Status::NoResources));
    drop((first, second));
    pd.alloc_fast_mr(40).unwrap().dereg().unwrap();
}

#[test]
fn all_guest_memory_by_its_physical_addresses() {
    let bed = Bed::new(2);
    let (a, b) = kernel_pair(&bed);
    let (from, to) = (scattered(&a), scattered(&b));
    let (source, target) = (a.pd.reg_guest(Access::LOCAL_WRITE).unwrap(), b.pd.reg_guest(ALL).unwrap());
    from.fill(4096, 4096, 0x3c);
    a.qp.post(SendWr::new(1, Op::Write(target.remote(&to, 8192)), &[source.sge(&from, 4096, 4096)])).unwrap();
    a.cq.next().ok();
    assert_eq!(to.read_vec(8192, 4096), [0x3c; 4096]);
    let nowhere = Remote { addr: 1 << 45, ..target.remote(&to, 0) };
    assert_eq!(write(&a, nowhere, 8), WcStatus::RemAccessErr);
}

#[test]
fn all_guest_memory_is_still_of_its_protection_domain() {
    let bed = Bed::new(2);
    let (a, b) = kernel_pair(&bed);
    let other = b.pd.guest().alloc_pd().unwrap();
    let (buf, mr) = (scattered(&b), other.reg_guest(ALL).unwrap());
    assert_eq!(write(&a, mr.remote(&buf, 0), 8), WcStatus::RemAccessErr);
    assert!(b.cq.poll_for(Duration::from_millis(1)).is_none());
}

/// Memory that a VMM adds and removes: 1 MiB at this address.
fn plug(guest: &Guest, at: u64) -> (Arc<Buf>, impl FnOnce()) {
    let region = guest.memory().plug(at, 1 << 20).unwrap();
    guest.with_connection(|v| v.add_region(&region)).unwrap();
    let buf = Arc::new(guest.memory().view(at, 1 << 20).unwrap());
    let guest = guest.clone();
    let unplug = move || {
        guest.memory().unplug(at).unwrap();
        guest.with_connection(|v| v.remove_region(&region)).unwrap();
    };
    (buf, unplug)
}

#[test]
fn all_guest_memory_follows_what_comes_and_goes() {
    let bed = Bed::new(2);
    let (a, b) = kernel_pair(&bed);
    let all = b.pd.reg_guest(ALL).unwrap();
    a.mr.fill(0, 64, 0x42);
    let (plugged, unplug) = plug(b.pd.guest(), 1 << 40);
    assert_eq!(write(&a, all.remote(&plugged, (1 << 20) - 64), 64), WcStatus::Success);
    assert_eq!(plugged.read_vec((1 << 20) - 64, 64), [0x42; 64]);
    unplug();
    assert_eq!(write(&a, all.remote(&plugged, 0), 64), WcStatus::RemAccessErr);
    assert_eq!(plugged.read_vec(0, 64), [0; 64]);
}

#[test]
fn a_registration_over_memory_that_went() {
    let bed = Bed::new(2);
    let (a, b) = kernel_pair(&bed);
    let (plugged, unplug) = plug(b.pd.guest(), 1 << 40);
    let mut mr = b.pd.alloc_fast_mr(16).unwrap();
    let register = mr.register(&plugged, (0, 8192), IOVA, ALL);
    assert_eq!(post(&b, register), WcStatus::Success);
    assert_eq!(write(&a, Remote { addr: IOVA, rkey: mr.key }, 64), WcStatus::Success);
    unplug();
    assert_eq!(post(&b, Op::LocalInv(mr.key)), WcStatus::Success);
    let staying = scattered(&b);
    assert_eq!(post(&b, mr.register(&staying, (CUT, LEN), IOVA, ALL)), WcStatus::Success, "it can be used again");
    assert_eq!(write(&a, Remote { addr: IOVA, rkey: mr.key }, 64), WcStatus::Success);
    assert_eq!(post(&b, Op::LocalInv(mr.key)), WcStatus::Success);
    assert_eq!(post(&b, register), WcStatus::LocQpOpErr, "that memory is no longer");
}
