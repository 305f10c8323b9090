//! Memory windows and their keys: bind, use, invalidate from here and from there, and all that must not work.

use std::time::Duration;

use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::verbs::{
    Bind, Mr, MrSpec, Mw, MwType, Op, QpSpec, Rc, RcOptions, Remote, SendWr, connect, next_key,
};
use virtio_rdma::ctrl::Status;
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{Access, QpState, SendFlags, WcFlags, WcOpcode, WcStatus};

const SOON: Duration = Duration::from_secs(10);
const ALL: Access =
    Access::LOCAL_WRITE.union(Access::REMOTE_READ).union(Access::REMOTE_WRITE).union(Access::REMOTE_ATOMIC);

/// A connected pair, and at the second end a region for windows.
struct Stage {
    bed: Bed,
    a: Rc,
    b: Rc,
    mr: Mr,
}

impl Stage {
    fn new() -> Self {
        Self::sized(8192)
    }

    /// With regions of so many bytes.
    fn sized(len: usize) -> Self {
        let bed = Bed::new(2);
        let (a, b) = bed.pair(len);
        let buf = b.pd.guest().alloc(len).unwrap();
        let mr = b.pd.reg_spec(MrSpec::whole(&buf).access(Access::LOCAL_WRITE | Access::MW_BIND)).unwrap();
        Self { bed, a, b, mr }
    }

    /// A second connected pair whose ends share protection domains with the first.
    fn sibling(&self) -> (Rc, Rc) {
        Rc::sibling((&self.a, &self.b), &QpSpec::rc(), 64).unwrap()
    }

    fn window(&self, kind: MwType) -> Mw {
        self.b.pd.alloc_mw(kind).unwrap()
    }

    /// Binds a window to the whole region; its key is the new one afterwards.
    fn bind(&self, window: &mut Mw) -> Bind {
        let bind = Bind::whole(window, &self.mr);
        assert_eq!(post(&self.b, bind.op()), WcStatus::Success);
        window.key = bind.key;
        bind
    }

    fn write(&self, to: Remote) -> WcStatus {
        write(&self.a, to)
    }
}

fn bindable(rc: &Rc, access: Access) -> Mr {
    let buf = rc.pd.guest().alloc(8192).unwrap();
    rc.pd.reg_spec(MrSpec::whole(&buf).access(access)).unwrap()
}

fn post(rc: &Rc, op: Op) -> WcStatus {
    rc.qp.post(SendWr::new(1, op, &[])).unwrap();
    rc.cq.next().status()
}

fn write(rc: &Rc, to: Remote) -> WcStatus {
    rc.qp.post(SendWr::inline(2, Op::Write(to), b"through")).unwrap();
    rc.cq.next().status()
}

#[test]
fn a_window_gives_access_to_its_part_of_a_region() {
    let stage = Stage::new();
    for kind in [MwType::One, MwType::Two] {
        let mut window = stage.window(kind);
        let part = Bind { addr: stage.mr.addr(100), length: 50, ..Bind::whole(&window, &stage.mr) };
        stage.b.qp.post(SendWr::new(7, part.op(), &[])).unwrap();
        let wc = stage.b.cq.next().ok();
        assert_eq!((wc.wr_id(), wc.opcode(), wc.byte_len()), (7, WcOpcode::BindMw, 0));
        window.key = part.key;
        stage.mr.fill(0, 8192, 0);
        assert_eq!(stage.write(Remote { addr: stage.mr.addr(143), rkey: part.key }), WcStatus::Success);
        assert_eq!(stage.mr.read(143, 7), b"through");
        stage.a.qp.post(SendWr::new(3, Op::Read(part.remote()), &[stage.a.mr.sge(0, 50)])).unwrap();
        stage.a.cq.next().ok();
        assert_eq!(stage.a.mr.read(43, 7), b"through");
        window.dealloc().unwrap();
    }
}

/// Each of these writes fails, and the region stays as it was.
#[test]
fn nothing_outside_the_window_and_nothing_that_it_does_not_allow() {
    type Change = fn(&Stage, Bind) -> (Bind, Remote);
    let cases: [(&str, Change); 6] = [
        ("before it", |s, b| (Bind { addr: s.mr.addr(100), ..b }, Remote { addr: s.mr.addr(99), rkey: b.key })),
        ("behind it", |s, b| (Bind { length: 100, ..b }, Remote { addr: s.mr.addr(94), rkey: b.key })),
        ("its old key", |_, b| (b, Remote { rkey: b.window, ..b.remote() })),
        ("another low byte", |_, b| (b, Remote { rkey: next_key(b.key), ..b.remote() })),
        ("the region's own key", |s, b| (b, s.mr.remote(0))),
        ("no right to write", |_, b| (Bind { access: Access::REMOTE_READ, ..b }, b.remote())),
    ];
    for kind in [MwType::One, MwType::Two] {
        for (name, change) in cases {
            let stage = Stage::new();
            let window = stage.window(kind);
            let (bind, remote) = change(&stage, Bind::whole(&window, &stage.mr));
            let bind = Bind { length: bind.length.min(4096), ..bind };
            assert_eq!(post(&stage.b, bind.op()), WcStatus::Success, "{name}");
            assert_eq!(stage.write(remote), WcStatus::RemAccessErr, "{name}");
            assert_eq!(stage.mr.read(0, 8192), vec![0; 8192], "{name}");
            stage.b.pd.guest().events().wait(EventType::QpAccessError, stage.b.qp.number(), SOON).unwrap();
        }
    }
}

#[test]
fn a_window_is_no_local_key() {
    let stage = Stage::new();
    let mut window = stage.window(MwType::One);
    let bind = stage.bind(&mut window);
    let sge = freeflow_tests::guest::verbs::Sge { addr: bind.addr, len: 8, lkey: bind.key };
    stage.b.qp.post(SendWr::new(1, Op::Write(stage.a.mr.remote(0)), &[sge])).unwrap();
    assert_eq!(stage.b.cq.next().status(), WcStatus::LocProtErr);
}

#[test]
fn a_zero_based_window_counts_from_its_own_start() {
    let stage = Stage::new();
    let window = stage.window(MwType::Two);
    let access = Access::REMOTE_WRITE | Access::ZERO_BASED;
    let bind = Bind { addr: stage.mr.addr(4000), length: 1000, access, ..Bind::whole(&window, &stage.mr) };
    assert_eq!(post(&stage.b, bind.op()), WcStatus::Success);
    assert_eq!(stage.write(Remote { addr: 993, rkey: bind.key }), WcStatus::Success);
    assert_eq!(stage.mr.read(4993, 7), b"through");
    assert_eq!(stage.write(Remote { addr: 994, rkey: bind.key }), WcStatus::RemAccessErr);
}

#[test]
fn a_type_1_window_is_the_protection_domains() {
    let stage = Stage::new();
    let (c, d) = stage.sibling();
    let mut window = stage.window(MwType::One);
    let bind = stage.bind(&mut window);
    assert_eq!(write(&c, bind.remote()), WcStatus::Success);
    let again = Bind::whole(&window, &stage.mr);
    assert_eq!(post(&d, again.op()), WcStatus::Success, "any of its QPs may bind it again");
    assert_eq!(stage.write(again.remote()), WcStatus::Success);
    assert_eq!(write(&c, bind.remote()), WcStatus::RemAccessErr, "the key of before");
    window.key = again.key;
    let nothing = Bind { length: 0, region: 0, ..Bind::whole(&window, &stage.mr) };
    assert_eq!(post(&stage.b, nothing.op()), WcStatus::Success);
    assert_eq!(stage.write(Remote { rkey: nothing.key, ..again.remote() }), WcStatus::RemAccessErr);
}

#[test]
fn a_type_2_window_is_the_queue_pairs_that_bound_it() {
    let stage = Stage::new();
    let (c, d) = stage.sibling();
    let mut window = stage.window(MwType::Two);
    let bind = stage.bind(&mut window);
    assert_eq!(write(&c, bind.remote()), WcStatus::RemAccessErr);
    eventually("error of the other QP", SOON, || d.qp.state().unwrap() == QpState::Err);
    assert_eq!(stage.write(bind.remote()), WcStatus::Success);
}

#[test]
fn another_protection_domain_has_no_part_in_a_window() {
    let stage = Stage::new();
    let mut window = stage.window(MwType::One);
    let bind = stage.bind(&mut window);
    let (c, d) = stage.bed.pair(64);
    assert_eq!(write(&c, bind.remote()), WcStatus::RemAccessErr);
    let (_c, d2) = stage.bed.pair(64);
    assert_eq!(post(&d2, Bind::whole(&window, &stage.mr).op()), WcStatus::MwBindErr);
    drop(d);
}

#[test]
fn local_invalidation_takes_access_away() {
    let stage = Stage::new();
    let mut window = stage.window(MwType::Two);
    let bind = stage.bind(&mut window);
    assert_eq!(stage.write(bind.remote()), WcStatus::Success);
    stage.b.qp.post(SendWr::new(9, Op::LocalInv(bind.key), &[])).unwrap();
    let wc = stage.b.cq.next().ok();
    assert_eq!((wc.wr_id(), wc.opcode()), (9, WcOpcode::LocalInv));
    // It is free, and can be bound again with any low byte.
    let again = Bind { key: bind.key ^ 0x55, ..Bind::whole(&window, &stage.mr) };
    assert_eq!(post(&stage.b, again.op()), WcStatus::Success);
    assert_eq!(stage.write(again.remote()), WcStatus::Success);
    assert_eq!(stage.write(bind.remote()), WcStatus::RemAccessErr);
}

#[test]
fn remote_invalidation_takes_access_away_before_its_message_is_seen() {
    let stage = Stage::new();
    let mut window = stage.window(MwType::Two);
    let bind = stage.bind(&mut window);
    stage.b.qp.post_recv(5, &[stage.b.mr.sge(0, 64)]).unwrap();
    stage.a.qp.post(SendWr::inline(3, Op::SendInv(bind.key), b"and done")).unwrap();
    assert_eq!(stage.a.cq.next().ok().opcode(), WcOpcode::Send);
    let wc = stage.b.cq.next().ok();
    assert_eq!((wc.wr_id(), wc.opcode(), wc.byte_len()), (5, WcOpcode::Recv, 8));
    assert_eq!((wc.flags(), wc.0.imm_data.get()), (WcFlags::WITH_INV, bind.key));
    assert_eq!(stage.b.mr.read(0, 8), b"and done");
    assert_eq!(stage.write(bind.remote()), WcStatus::RemAccessErr);
}

#[test]
fn invalidating_what_is_not_to_be_invalidated() {
    type Key = fn(&Stage, &mut Mw, &mut Vec<Rc>) -> u32;
    let cases: [(&str, Key); 5] = [
        ("a free window", |_, window, _| window.key),
        ("another low byte", |stage, window, _| next_key(stage.bind(window).key)),
        ("an ordinary region", |stage, _, _| stage.mr.key()),
        ("nothing", |_, window, _| window.key ^ 0x1234_5600),
        ("another QP's window", |stage, window, kept| {
            let (c, d) = stage.sibling();
            let bind = Bind::whole(window, &stage.mr);
            assert_eq!(post(&d, bind.op()), WcStatus::Success);
            kept.extend([c, d]);
            bind.key
        }),
    ];
    for (name, key) in cases {
        let mut kept = Vec::new();
        let stage = Stage::new();
        let mut window = stage.window(MwType::Two);
        let local = key(&stage, &mut window, &mut kept);
        assert_eq!(post(&stage.b, Op::LocalInv(local)), WcStatus::LocQpOpErr, "{name}");
        assert_eq!(stage.b.qp.state().unwrap(), QpState::Err);

        let stage = Stage::new();
        let mut window = stage.window(MwType::Two);
        let key = key(&stage, &mut window, &mut kept);
        stage.b.qp.post_recv(5, &[]).unwrap();
        assert_eq!(post(&stage.a, Op::SendInv(key)), WcStatus::RemInvReqErr, "{name}");
        assert_eq!(stage.b.cq.next().status(), WcStatus::RemInvReqErr, "{name}");
        assert_eq!(stage.b.qp.state().unwrap(), QpState::Err);
    }
}

#[test]
fn a_type_1_window_cannot_be_invalidated() {
    let stage = Stage::new();
    let mut window = stage.window(MwType::One);
    let bind = stage.bind(&mut window);
    let (c, d) = stage.sibling();
    assert_eq!(post(&d, Op::LocalInv(bind.key)), WcStatus::LocQpOpErr);
    assert_eq!(stage.write(bind.remote()), WcStatus::Success);
    drop((c, d));
}

#[test]
fn binds_that_are_refused_change_nothing() {
    type Change = fn(&Stage, Bind, &mut Option<Mw>) -> Bind;
    let cases: [(&str, MwType, Change); 8] = [
        ("no such window", MwType::One, |_, b, _| Bind { window: b.window ^ 1, ..b }),
        ("no such region", MwType::One, |_, b, _| Bind { region: b.region ^ 1, ..b }),
        ("beyond the region", MwType::One, |_, b, _| Bind { length: 8193, ..b }),
        ("around the end of addresses", MwType::One, |_, b, _| Bind { length: u64::MAX, ..b }),
        ("zero-based of type 1", MwType::One, |_, b, _| Bind { access: Access::ZERO_BASED, ..b }),
        ("length zero of type 2", MwType::Two, |_, b, _| Bind { length: 0, ..b }),
        ("over a region without bind access", MwType::Two, |s, b, _| Bind { region: s.b.mr.key(), ..b }),
        ("a window over a window", MwType::Two, |s, b, kept| {
            let region = s.bind(kept.insert(s.window(MwType::One))).key;
            Bind { region, ..b }
        }),
    ];
    for (name, kind, change) in cases {
        let stage = Stage::new();
        let window = stage.window(kind);
        let mut kept = None;
        let bind = change(&stage, Bind::whole(&window, &stage.mr), &mut kept);
        assert_eq!(post(&stage.b, bind.op()), WcStatus::MwBindErr, "{name}");
        assert_eq!(stage.b.qp.state().unwrap(), QpState::Err, "{name}");
    }
    let stage = Stage::new();
    let (window, readable) = (stage.window(MwType::Two), bindable(&stage.b, Access::MW_BIND));
    assert_eq!(post(&stage.b, Bind::whole(&window, &readable).op()), WcStatus::MwBindErr, "no local write beneath");
}

#[test]
fn a_window_that_is_bound_cannot_be_bound_again() {
    let stage = Stage::new();
    let mut window = stage.window(MwType::Two);
    let bind = stage.bind(&mut window);
    let (_c, d) = stage.sibling();
    assert_eq!(post(&d, Bind::whole(&window, &stage.mr).op()), WcStatus::MwBindErr);
    assert_eq!(stage.write(bind.remote()), WcStatus::Success, "it is what it was");
}

#[test]
fn uc_binds_but_does_not_invalidate() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let (a, b) = Rc::pair_with(guest_a, guest_b, &QpSpec::uc(), 4096, &RcOptions::default()).unwrap();
    let mr = bindable(&b, Access::LOCAL_WRITE | Access::MW_BIND);
    let window = b.pd.alloc_mw(MwType::Two).unwrap();
    let bind = Bind::whole(&window, &mr);
    assert_eq!(post(&b, bind.op()), WcStatus::Success);
    assert_eq!(write(&a, bind.remote()), WcStatus::Success);
    eventually("arrival", SOON, || mr.read(0, 7) == b"through");
    assert_eq!(post(&b, Op::LocalInv(bind.key)), WcStatus::LocQpOpErr);
    assert_eq!(b.qp.state().unwrap(), QpState::Sqe);
    assert_eq!(post(&a, Op::SendInv(bind.key)), WcStatus::LocQpOpErr);
}

#[test]
fn a_region_beneath_a_window_stays() {
    let mut stage = Stage::new();
    let mut window = stage.window(MwType::Two);
    let bind = stage.bind(&mut window);
    assert_eq!(stage.mr.dereg().unwrap_err().status(), Some(Status::Busy));
    assert_eq!(stage.mr.rereg_access(ALL).unwrap_err().status(), Some(Status::Busy));
    assert_eq!(stage.write(bind.remote()), WcStatus::Success, "nothing has changed");
    assert_eq!(post(&stage.b, Op::LocalInv(bind.key)), WcStatus::Success);
    stage.mr.rereg_access(ALL | Access::MW_BIND).unwrap();
    let again = Bind::whole(&window, &stage.mr);
    assert_eq!(post(&stage.b, again.op()), WcStatus::Success, "it can be bound after the change");
    window.dealloc().unwrap();
    stage.mr.dereg().unwrap();
    assert_eq!(stage.write(again.remote()), WcStatus::RemAccessErr);
}

#[test]
fn windows_end_with_the_queue_pair_that_bound_them() {
    for reset in [false, true] {
        let mut stage = Stage::new();
        let (c, d) = stage.sibling();
        let window = stage.window(MwType::Two);
        let bind = Bind::whole(&window, &stage.mr);
        assert_eq!(post(&d, bind.op()), WcStatus::Success);
        assert_eq!(write(&c, bind.remote()), WcStatus::Success);
        if reset {
            d.qp.modify_state(QpState::Reset).unwrap();
            c.qp.modify_state(QpState::Reset).unwrap();
            connect(&c.qp, &d.qp, &RcOptions::default()).unwrap();
            assert_eq!(write(&c, bind.remote()), WcStatus::RemAccessErr, "the QP's next life");
        } else {
            d.qp.destroy().unwrap();
        }
        let again = Bind { window: bind.key, ..bind };
        assert_eq!(post(&stage.b, again.op()), WcStatus::Success, "the window is free");
        assert_eq!(post(&stage.b, Op::LocalInv(bind.key)), WcStatus::Success);
        stage.mr.dereg().unwrap();
    }
}

#[test]
fn atomics_and_flushes_through_a_window() {
    let stage = Stage::new();
    let region = bindable(&stage.b, ALL | Access::MW_BIND | Access::FLUSH_GLOBAL);
    let window = stage.window(MwType::Two);
    let access = Access::REMOTE_ATOMIC | Access::REMOTE_WRITE;
    let bind = Bind { access, ..Bind::whole(&window, &region) };
    assert_eq!(post(&stage.b, bind.op()), WcStatus::Success);
    stage.a.qp.post(SendWr::new(1, Op::FetchAdd(bind.remote(), 5), &[stage.a.mr.sge(0, 8)])).unwrap();
    stage.a.cq.next().ok();
    stage.a.qp.post(SendWr::new(1, Op::FetchAdd(bind.remote(), 5), &[stage.a.mr.sge(0, 8)])).unwrap();
    stage.a.cq.next().ok();
    assert_eq!((stage.a.mr.read(0, 1), region.read(0, 1)), (vec![5], vec![10]));
    stage.a.qp.post(SendWr::inline(1, Op::AtomicWrite(bind.remote()), b"as a one").flags(SendFlags::SIGNALED)).unwrap();
    assert_eq!(stage.a.cq.next().ok().opcode(), WcOpcode::AtomicWrite);
    assert_eq!(region.read(0, 8), b"as a one");
    assert_eq!(post(&stage.a, Op::Read(bind.remote())), WcStatus::Success, "no bytes, no right needed");
}

#[test]
fn more_windows_than_the_quota() {
    let spec = freeflow_tests::router::RouterSpec {
        limits: freeflow_backend::Profile { max_mw: 3, ..freeflow_backend::Profile::default() },
        ..freeflow_tests::router::RouterSpec::of(1)
    };
    let bed = Bed::with(&spec, freeflow_tests::guest::mem::Placement::Contiguous);
    let pd = bed.guests[0].alloc_pd().unwrap();
    let windows: Vec<Mw> = (0..3).map(|_| pd.alloc_mw(MwType::One).unwrap()).collect();
    assert_eq!(pd.alloc_mw(MwType::Two).unwrap_err().status(), Some(Status::NoResources));
    drop(windows);
    pd.alloc_mw(MwType::Two).unwrap().dealloc().unwrap();
}

/// One end writes without pause, on its own worker, while another QP takes access away: after the completion nothing is written. A worker
/// that has the key from before keeps it for a whole quantum, which is long where nobody else waits.
#[test]
fn after_a_window_is_taken_away_nobody_writes() {
    const LEN: usize = 1 << 20;
    let stage = Stage::sized(LEN);
    let (a, b) = (&stage.a, &stage.b);
    // QPs take turns on the workers: one of these is on another than the writer.
    let siblings = [stage.sibling(), stage.sibling()];
    let mut window = stage.window(MwType::One);
    a.mr.fill(0, LEN, 0xaa);
    for round in 0..40u8 {
        let (_, d) = &siblings[usize::from(round) % 2];
        let bind = Bind::whole(&window, &stage.mr);
        assert_eq!(post(d, bind.op()), WcStatus::Success);
        for id in 0..120 {
            let sges = [a.mr.sge(0, LEN)];
            let wr = SendWr::new(id, Op::Write(bind.remote()), &sges);
            a.qp.post(wr.flags(SendFlags::empty())).unwrap();
        }
        eventually("a write", SOON, || stage.mr.read(0, 1) == [0xaa]);
        window.key = bind.key;
        let nothing = Bind { length: 0, ..Bind::whole(&window, &stage.mr) };
        assert_eq!(post(d, nothing.op()), WcStatus::Success);
        window.key = nothing.key;
        stage.mr.fill(0, LEN, round);
        std::thread::sleep(Duration::from_millis(1));
        assert!(stage.mr.read(0, LEN).iter().all(|&byte| byte == round), "written to after it was taken away");
        // The rest was refused, or all had been written.
        for end in [a, b] {
            end.qp.modify_state(QpState::Reset).unwrap();
            while end.cq.poll().is_some() {}
        }
        connect(&a.qp, &b.qp, &RcOptions { psn: 1000 + u32::from(round), ..RcOptions::default() }).unwrap();
    }
}

#[test]
fn a_window_over_memory_that_went() {
    let stage = Stage::new();
    let guest = stage.b.pd.guest().clone();
    let memory = guest.memory().plug(1 << 40, 1 << 20).unwrap();
    guest.with_connection(|v| v.add_region(&memory)).unwrap();
    let plugged = std::sync::Arc::new(guest.memory().view(1 << 40, 1 << 20).unwrap());
    let spec = MrSpec::whole(&plugged).access(Access::LOCAL_WRITE | Access::MW_BIND);
    let mut region = stage.b.pd.reg_spec(spec).unwrap();
    let window = stage.window(MwType::Two);
    let bind = Bind::whole(&window, &region);
    assert_eq!(post(&stage.b, bind.op()), WcStatus::Success);
    assert_eq!(stage.write(bind.remote()), WcStatus::Success);
    guest.memory().unplug(1 << 40).unwrap();
    guest.with_connection(|v| v.remove_region(&memory)).unwrap();
    assert_eq!(region.dereg().unwrap_err().status(), Some(Status::Busy), "it is bound all the same");
    assert_eq!(post(&stage.b, Op::LocalInv(bind.key)), WcStatus::Success);
    let (c, d) = stage.sibling();
    let again = Bind { window: bind.key, ..bind };
    assert_eq!(post(&d, again.op()), WcStatus::MwBindErr, "there is nothing to bind it to");
    region.dereg().unwrap();
    assert_eq!(stage.write(bind.remote()), WcStatus::RemAccessErr);
    drop(c);
}
