//! What a hostile guest might try with words, groups, extents, its share of a worker, and rings that move. All but the last has worked once.
#![allow(missing_docs, reason = "a test program")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use freeflow_backend::Profile;
use freeflow_tests::attack::Attack;
use freeflow_tests::bed::Bed;
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{Ah, AhAttr, Op, QpSpec, Rc, RcOptions, SendWr, Sge, connect, ip_gid};
use freeflow_tests::guest::{Gid, Guest};
use freeflow_tests::rng::Rng;
use freeflow_tests::router::{RouterSpec, nic_is_late};
use freeflow_tests::stepped::Stepped;
use virtio_rdma::ctrl::{Extent, ObjectRequest, ObjectResponse, Opcode, RegMr, ResizeCq, RingDesc, Status};
use virtio_rdma::ib::{Access, MULTICAST_QPN, QpState, SendFlags, WcStatus};

const QKEY: u32 = 0x0102_0304;

fn group() -> Gid {
    ip_gid([239, 1, 2, 3].into())
}

fn datagrams(guest: &Guest) -> Rc {
    let spec = QpSpec { send_depth: 3, recv_depth: 3, ..QpSpec::ud() };
    let end = Rc::new(guest, spec, 4096).unwrap();
    end.qp.to_ud(QKEY).unwrap();
    end
}

fn members(guest: &Guest, count: usize) -> Vec<Rc> {
    let all: Vec<_> = (0..count).map(|_| datagrams(guest)).collect();
    for end in &all {
        end.qp.attach(group()).unwrap();
    }
    all
}

/// Until the message is sent, what is returned must live.
#[must_use]
fn post_to_group(from: &Rc, bytes: &[u8]) -> Ah {
    let ah = from.pd.create_ah(AhAttr::to(group(), 1)).unwrap();
    let op = Op::UdSend { ah: ah.number(), qpn: MULTICAST_QPN, qkey: QKEY, imm: None };
    from.qp.post(SendWr::inline(1, op, bytes)).unwrap();
    ah
}

/// A word is stored as one, or not at all: what the visit has moved before must not cut it.
#[test]
fn a_word_is_not_cut_by_what_came_before_it() {
    const BEFORE: usize = (64 << 10) - 4;
    let bed = Bed::new(2);
    let (a, b) = bed.pair(128 << 10);
    for round in 0..8u64 {
        let bytes = round.to_le_bytes();
        let word = SendWr::inline(2, Op::AtomicWrite(b.mr.remote(BEFORE + 4)), &bytes);
        let long = [a.mr.sge(0, BEFORE)];
        let long = SendWr::new(1, Op::Write(b.mr.remote(0)), &long);
        a.qp.post_send(&[long, word.flags(SendFlags::SIGNALED)]).unwrap();
        a.cq.next().ok();
        assert_eq!(a.cq.next().status(), WcStatus::Success, "round {round}");
        assert_eq!(b.mr.read(BEFORE + 4, 8), bytes);
    }
}

/// A message to a large group takes several visits. Who leaves between two of them gets it no more.
#[test]
fn who_has_left_a_group_gets_nothing_of_what_is_under_way() {
    let mut bed = Stepped::new(2, &Profile { max_mcast_qp_attach: 100, ..Profile::default() }).unwrap();
    let guests = bed.guests.clone();
    let (sender, members) = (datagrams(&guests[0]), members(&guests[1], 100));
    // Another virtual NIC has work too, so that a visit ends.
    let other = Rc::pair(&guests[1], &guests[0], 64).unwrap();
    bed.settle();
    for end in &members {
        end.qp.post_recv(9, &[end.mr.sge(0, 4096)]).unwrap();
    }
    other.0.qp.post(SendWr::inline(1, Op::Write(other.1.mr.remote(0)), b"work")).unwrap();
    let _ah = post_to_group(&sender, &[7; 32]);
    while members.iter().all(|end| end.cq.poll().is_none()) {
        assert!(bed.step());
    }
    let waiting: Vec<_> = members.iter().filter(|end| end.mr.read(40, 1) == [0]).collect();
    let last = waiting.last().expect("some have still to get it");
    last.qp.detach(group()).unwrap();
    bed.settle();
    assert_eq!(last.mr.read(40, 1), [0], "it has left");
    assert!(last.cq.poll().is_none());
    assert!(waiting[..waiting.len() - 1].iter().all(|end| end.mr.read(40, 1) == [7]));
}

/// How long the worker would take for what `post` gives it, on a nominal machine: what virtual NICs are charged with.
fn cost<T>(bed: &mut Stepped, post: impl FnOnce() -> T) -> Duration {
    bed.settle();
    let _lives = post();
    bed.work()
}

#[test]
fn members_that_take_nothing_cost_their_visit_all_the_same() {
    const MEMBERS: usize = 64;
    let mut bed = Stepped::new(2, &Profile::default()).unwrap();
    let guests = bed.guests.clone();
    let sender = datagrams(&guests[0]);
    let alone = members(&guests[1], 1);
    let one = cost(&mut bed, || post_to_group(&sender, b"x"));
    let deaf = members(&guests[1], MEMBERS - 1);
    let all = cost(&mut bed, || post_to_group(&sender, b"x"));
    let least = Duration::from_nanos(50 * (MEMBERS as u64 - 1));
    assert!(all >= one + least, "{MEMBERS} members cost {all:?}, one costs {one:?}");
    drop((alone, deaf));
}

#[test]
fn a_receive_of_many_pieces_costs_its_sender() {
    let mut bed = Stepped::new(2, &Profile::default()).unwrap();
    let guests = bed.guests.clone();
    let (a, b) = Rc::pair_with(&guests[0], &guests[1], &QpSpec::rc().sges(32), 4096, &RcOptions::default()).unwrap();
    let mut send = |pieces: usize| {
        cost(&mut bed, || {
            let sges: Vec<Sge> = (0..pieces).map(|i| b.mr.sge(i * 8, 1)).collect();
            b.qp.post_recv(1, &sges).unwrap();
            a.qp.post(SendWr::inline(1, Op::Send, b"")).unwrap();
        })
    };
    // The first message may be the one that connects the two on a NIC.
    send(1);
    let (one, many) = (send(1), send(32));
    assert!(many >= one + Duration::from_nanos(31 * 20), "32 pieces cost {many:?}, one costs {one:?}");
}

/// Until its receive comes, a message's list is looked through again and again.
#[test]
fn looking_for_a_receive_again_costs_again() {
    let mut bed = Stepped::new(2, &Profile::default()).unwrap();
    let guests = bed.guests.clone();
    let (a, _b) = Rc::pair_with(&guests[0], &guests[1], &QpSpec::rc().sges(32), 4096, &RcOptions::default()).unwrap();
    bed.settle();
    let sges: Vec<Sge> = (0..32).map(|i| a.mr.sge(i * 8, 1)).collect();
    a.qp.post(SendWr::new(1, Op::Send, &sges)).unwrap();
    bed.settle();
    bed.pass(Duration::from_micros(10));
    let again = bed.work();
    assert!(again >= Duration::from_nanos(32 * 20), "{again:?}");
}

/// Doorbells of a guest that does not run are no reason to hurry for its neighbours.
#[test]
fn a_stopped_guests_doorbells_hold_up_nobody() {
    if nic_is_late() {
        return;
    }
    let mut bed = Stepped::new(3, &Profile::default()).unwrap();
    let guests = bed.guests.clone();
    let (a, b) = Rc::pair_with(&guests[0], &guests[1], &QpSpec::rc().depth(127), 64, &RcOptions::default()).unwrap();
    let (c, _d) = Rc::pair(&guests[2], &guests[2], 64).unwrap();
    bed.settle();
    let served = |bed: &mut Stepped| {
        let time = cost(bed, || while a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x")).is_ok() {});
        (a.cq.poll_many(1000).len(), time)
    };
    // The first time may be the one that connects the two on a NIC.
    served(&mut bed);
    let alone = served(&mut bed);
    bed.nic(2).set_running(false);
    c.qp.post(SendWr::inline(1, Op::Write(c.mr.remote(0)), b"stopped")).unwrap();
    assert_eq!(served(&mut bed), alone, "visits are as long as before");
    assert_eq!(c.qp.state().unwrap(), QpState::Rts);
}

/// One extent of the guest's may be many pieces, where the VMM has told of memory in many regions.
#[test]
fn an_extent_over_many_regions_counts_for_each() {
    const PAGES: u64 = 16;
    const START: u64 = 1 << 40;
    let spec = RouterSpec { limits: Profile { max_extents: 40, ..Profile::default() }, ..RouterSpec::of(2) };
    let bed = Bed::with(&spec, Placement::Contiguous);
    let (a, b) = bed.two();
    let (_a, b) = Rc::pair_with(a, b, &QpSpec::kernel(), 64, &RcOptions::default()).unwrap();
    let guest = b.pd.guest();
    for page in 0..PAGES {
        let region = guest.memory().plug(START + page * 4096, 4096).unwrap();
        guest.with_connection(|v| v.add_region(&region)).unwrap();
    }
    let one = Extent { addr: START.into(), len: (PAGES * 4096).into() };
    let body = RegMr {
        pdn: b.pd.number().into(),
        access: Access::LOCAL_WRITE.bits().into(),
        iova: START.into(),
        length: (PAGES * 4096).into(),
        num_extents: 1.into(),
        flags: 0.into(),
    };
    let register = || guest.command::<_, ObjectResponse>(Opcode::RegMr, &body, &[one]);
    // The pair has two of the forty for itself, and fast registration four.
    let fast = b.pd.alloc_fast_mr(4).unwrap();
    let first = register().unwrap().number;
    register().unwrap();
    assert_eq!(register().unwrap_err().status(), Some(Status::NoResources));
    let dereg = ObjectRequest { number: first, reserved: 0.into() };
    guest.command_ok(Opcode::DeregMr, &dereg, &[]).unwrap();
    register().unwrap();
    b.qp.post(SendWr::new(1, fast.register_extents(&[one], PAGES * 4096, START, Access::LOCAL_WRITE), &[])).unwrap();
    assert_eq!(b.cq.next().status(), WcStatus::LocQpOpErr);
}

/// Indices of rings say anything, at any time, while the rings are exchanged and peers fill them.
#[test]
fn indices_lie_while_rings_move() {
    let attack = Attack::start();
    let guest = attack.attacker();
    let mut answers = HashMap::new();
    for seed in 0..40 {
        let (pd, cq) = (guest.alloc_pd().unwrap(), guest.create_cq(63).unwrap());
        let (srq, mr) = (pd.create_srq(63, 1, 0).unwrap(), pd.reg_new(4096).unwrap());
        let qp = pd.create_qp_srq(QpSpec::rc(), &cq, &srq).unwrap();
        let peer = Rc::new(guest, QpSpec::rc(), 64).unwrap();
        connect(&peer.qp, &qp, &RcOptions { rnr_retry: 0, ..RcOptions::default() }).unwrap();
        for id in 0..40 {
            srq.post_recv(id, &[mr.sge(0, 64)]).unwrap();
        }
        let words = [cq.ring().producer(), cq.ring().consumer(), srq.ring().producer(), srq.ring().consumer()];
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let liar = scope.spawn(|| {
                let mut rng = Rng::new(seed);
                while !stop.load(Relaxed) {
                    // Mostly what could be an index.
                    let lie = if rng.one_in(8) { rng.word() as u32 } else { rng.below(64) as u32 };
                    words[rng.below(4)].store(lie, Relaxed);
                }
            });
            for round in 0..20 {
                let _ = peer.qp.post(SendWr::inline(1, Op::Send, b"fill").flags(SendFlags::empty()));
                let size = [7, 63, 255][round % 3];
                // Into the same rings again: what the liar writes to stays the device's.
                for (opcode, number, ring) in
                    [(Opcode::ResizeCq, cq.number(), cq.ring()), (Opcode::ResizeSrq, srq.number(), srq.ring())]
                {
                    let (desc, extents) = ring.desc();
                    let desc = RingDesc { entries: (ring.entries().min(size + 1)).into(), ..desc };
                    let body = ResizeCq { cqn: number.into(), reserved: 0.into(), ring: desc };
                    *answers.entry(guest.command_status(opcode, &body, &extents).unwrap()).or_insert(0) += 1;
                }
            }
            stop.store(true, Relaxed);
            liar.join().unwrap();
        });
    }
    assert!([Status::Ok, Status::BadState].iter().all(|status| answers.contains_key(status)), "{answers:?}");
    attack.finish();
}
