//! What a guest could once do to others, or to the router, and what a QP's end must keep from its next life.
#![allow(missing_docs, reason = "a test program")]

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use freeflow_backend::Rates;
use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::mem::{PAGE, Placement};
use freeflow_tests::guest::verbs::{AhAttr, Cq, Mr, Op, PART, QpSpec, Rc, RcOptions, SendWr, Sge, connect};
use freeflow_tests::router::{RouterSpec, device_of_tests};
use virtio_rdma::area::{ARM_NEXT, AreaKind};
use virtio_rdma::ctrl::{CreateQp, CreateQpResponse, Extent, NO_OBJECT, Opcode, RingDesc, Status};
use virtio_rdma::ib::{QpState, QpType, WcStatus};
use virtio_rdma::ring::Format;

const SOON: Duration = Duration::from_secs(10);

/// Two guests whose messages of 128 MiB take half a second: where memory is fast and the machine is busy, one at full speed is over before this
/// thread has looked twice.
fn slow_bed() -> Bed {
    let rates = Rates { bits: "2G".parse().ok(), burst_ms: 1, ..Rates::default() };
    Bed::with(&RouterSpec { rates, ..RouterSpec::of(2) }, Placement::Contiguous)
}

/// A pair whose first end sends a message of 128 MiB into a receive of the second, and is in the middle of it.
fn half_a_message(bed: &Bed, options: &RcOptions, receives: u64) -> (Rc, Rc) {
    let (guest_a, guest_b) = bed.two();
    let len = 4 << 20;
    let (a, b) = Rc::pair_with(guest_a, guest_b, &QpSpec::rc().sges(32), len, options).unwrap();
    for id in 0..receives {
        b.qp.post_recv(100 + id, &[b.mr.sge(0, len); 32]).unwrap();
    }
    a.mr.fill(0, 1, 1);
    a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, len); 32])).unwrap();
    eventually("the first bytes", SOON, || b.mr.read(0, 1) == [1]);
    (a, b)
}

fn completions(cq: &Cq, wait: Duration) -> Vec<(u64, WcStatus)> {
    std::iter::from_fn(|| cq.poll_for(wait)).map(|wc| (wc.wr_id(), wc.status())).collect()
}

fn flushed(ids: std::ops::Range<u64>) -> Vec<(u64, WcStatus)> {
    ids.map(|id| (id, WcStatus::WrFlushErr)).collect()
}

/// Queue pairs take turns on the two workers: with another one first, those of a pair are on different ones.
fn turn(bed: &Bed, apart: bool) -> Option<Rc> {
    apart.then(|| Rc::new(&bed.guests[0], QpSpec::rc(), 64).unwrap())
}

/// A NIC moves a message as one: there is no half of one to be found. What it has is flushed in `verbs.rs`.
fn moves_pieces() -> bool {
    device_of_tests().is_none()
}

#[test]
fn a_receive_that_is_being_filled_is_flushed_first() {
    if !moves_pieces() {
        return;
    }
    let impatient = RcOptions { timeout: 12, retry_cnt: 1, ..RcOptions::default() };
    let patient = RcOptions { timeout: 0, ..RcOptions::default() };
    for (options, apart) in [(&impatient, false), (&patient, false), (&impatient, true), (&patient, true)] {
        let bed = slow_bed();
        let _other = turn(&bed, apart);
        let (_a, b) = half_a_message(&bed, options, 4);
        b.qp.modify_state(QpState::Err).unwrap();
        assert_eq!(completions(&b.cq, Duration::from_millis(500)), flushed(100..104));
    }
}

#[test]
fn a_receive_of_one_life_does_not_complete_in_the_next() {
    if !moves_pieces() {
        return;
    }
    [false, true].into_iter().for_each(receive_of_one_life);
}

fn receive_of_one_life(apart: bool) {
    let bed = slow_bed();
    let _other = turn(&bed, apart);
    let (a, b) = half_a_message(&bed, &RcOptions { timeout: 12, retry_cnt: 1, ..RcOptions::default() }, 1);
    b.qp.modify_state(QpState::Reset).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::RetryExcErr);
    assert!(b.cq.poll().is_none());
    let other = Rc::new(&bed.guests[0], QpSpec::rc(), 64).unwrap();
    connect(&other.qp, &b.qp, &RcOptions { psn: 77, ..RcOptions::default() }).unwrap();
    b.qp.post_recv(200, &[b.mr.sge(0, 8)]).unwrap();
    b.qp.modify_state(QpState::Err).unwrap();
    assert_eq!(completions(&b.cq, Duration::from_millis(300)), flushed(200..201));
}

#[test]
fn nothing_happens_after_reset_was_answered() {
    // The larger one takes several visits.
    for (len, apart) in [(512 << 10, false), (512 << 10, true), (4 << 10, false), (4 << 10, true)] {
        nothing_after_reset(len, apart);
    }
}

fn nothing_after_reset(len: usize, apart: bool) {
    let bed = Bed::new(2);
    let _other = turn(&bed, apart);
    let (guest_a, guest_b) = bed.two();
    let (a, b) = (Rc::new(guest_a, QpSpec::rc(), len).unwrap(), Rc::new(guest_b, QpSpec::rc(), len).unwrap());
    for round in 0..100 {
        let options = RcOptions { timeout: 1, retry_cnt: 0, psn: 5 + round, ..RcOptions::default() };
        connect(&a.qp, &b.qp, &options).unwrap();
        b.qp.post_recv(100, &[b.mr.sge(0, len)]).unwrap();
        a.mr.fill(len - 1, 1, 1);
        b.mr.fill(len - 1, 1, 0);
        a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, len)])).unwrap();
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(u64::from(round % 40)) {}
        b.qp.modify_state(QpState::Reset).unwrap();
        let (completed, byte) = (b.cq.poll().is_some(), b.mr.read(len - 1, 1));
        std::thread::sleep(Duration::from_millis(1));
        assert!(b.cq.poll().is_none() || completed, "a completion after the answer");
        assert_eq!(b.mr.read(len - 1, 1), byte, "data after the answer");
        a.qp.modify_state(QpState::Reset).unwrap();
        while a.cq.poll().is_some() {}
    }
}

#[test]
fn a_malformed_request_does_not_tell_the_length_of_somebody_elses() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(65_536);
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 54_321)])).unwrap();
    a.cq.next().ok();
    b.qp.post(SendWr::inline(7, Op::Raw(99, [0; PART]), b"")).unwrap();
    let wc = b.cq.next();
    assert_eq!((wc.status(), wc.byte_len()), (WcStatus::LocQpOpErr, 0));
}

/// Mappings of guest memory in this process.
fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("truly-unique-guest")).count()
}

#[test]
fn an_idle_peer_does_not_keep_a_dead_guests_memory() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(64);
    let region = bed.guests[1].memory().plug_named(1 << 40, 1 << 20, "truly-unique-guest").unwrap();
    let own = mappings();
    bed.guests[1].with_connection(|v| v.add_region(&region)).unwrap();
    move_areas(&bed, 1, 1 << 40);
    drop(b);
    let b = Rc::new(&bed.guests[1], QpSpec::rc(), 64).unwrap();
    let other = Rc::new(&bed.guests[0], QpSpec::rc(), 64).unwrap();
    connect(&other.qp, &b.qp, &RcOptions::default()).unwrap();
    other.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x")).unwrap();
    other.cq.next().ok();
    assert_eq!(mappings(), own + 1);
    bed.guests[1].disconnect();
    eventually("end of the session", SOON, || !bed.router.is_connected(1));
    eventually("the router's mapping to go", SOON, || mappings() == own);
    drop(a);
}

/// Starts the device of a guest over with the arm words of CQs at `gpa`.
fn move_areas(bed: &Bed, guest: usize, gpa: u64) -> freeflow_tests::guest::mem::Buf {
    let guest = &bed.guests[guest];
    guest.reset().unwrap();
    for (index, area) in guest.doorbells().iter().enumerate() {
        guest.set_area(AreaKind::Doorbell, index as u16, area.buf()).unwrap();
    }
    let bytes = (u64::from(guest.attr().max_cq.get()) * 4).next_multiple_of(PAGE);
    let arm = guest.memory().view(gpa, bytes).unwrap();
    guest.set_area(AreaKind::CqArm, 0, &arm).unwrap();
    guest.set_area(AreaKind::AddressHandle, 0, guest.ahs().buf()).unwrap();
    for (index, gid) in guest.gids().iter().enumerate() {
        guest.add_gid(index as u16, *gid).unwrap();
    }
    arm
}

#[test]
fn arm_words_in_memory_that_went_are_left_alone() {
    let bed = Bed::new(2);
    let guest = &bed.guests[0];
    let region = guest.memory().plug(1 << 40, 1 << 20).unwrap();
    guest.with_connection(|v| v.add_region(&region)).unwrap();
    let arm = move_areas(&bed, 0, 1 << 40);
    let (a, b) = bed.pair(64);
    let word = arm.word32(4 * a.cq.number() as usize);
    guest.memory().unplug(1 << 40).unwrap();
    guest.with_connection(|v| v.remove_region(&region)).unwrap();
    word.store(ARM_NEXT, Relaxed);
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x")).unwrap();
    b.qp.post(SendWr::inline(1, Op::Write(a.mr.remote(0)), b"x")).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(word.load(Relaxed), ARM_NEXT);
}

#[test]
fn rings_that_are_the_same_memory_many_times_are_refused() {
    let bed = Bed::new(2);
    let guest = &bed.guests[0];
    let (pd, cq) = (guest.alloc_pd().unwrap(), guest.create_cq(16).unwrap());
    let page = guest.alloc(PAGE as usize).unwrap();
    let extents = [Extent { addr: page.gpa(0).into(), len: PAGE.into() }; 400];
    let (entries, stride, num_extents) = (64.into(), 16_384.into(), 200.into());
    let ring = |num_extents| RingDesc { format: Format::Rxe.to_wire(), reserved: [0; 3], entries, stride, num_extents };
    let body = CreateQp {
        pdn: pd.number().into(),
        qp_type: QpType::Rc.to_wire(),
        send_cqn: cq.number().into(),
        recv_cqn: cq.number().into(),
        srqn: NO_OBJECT.into(),
        max_send_sge: 1.into(),
        max_recv_sge: 1.into(),
        sq: ring(num_extents),
        rq: ring(num_extents),
        ..CreateQp::default()
    };
    let mut bytes = 0;
    let memory: u64 = guest.memory().regions().iter().map(|r| r.len).sum();
    loop {
        // The ring's page of indices comes on top of its elements.
        let extents = &extents[..];
        let body = CreateQp { sq: ring(257.into()), rq: ring(257.into()), ..body };
        let all: Vec<Extent> = extents.iter().cycle().take(2 * 257).copied().collect();
        match guest.command::<_, CreateQpResponse>(Opcode::CreateQp, &body, &all) {
            Ok(_) => bytes += 2 * 64 * 16_384,
            Err(freeflow_tests::guest::Error::Refused(status)) => {
                assert_eq!(status, Status::NoResources);
                break;
            }
            Err(error) => panic!("{error}"),
        }
        assert!(bytes <= memory, "{bytes} bytes of rings in a guest of {memory}");
    }
    assert!(bytes > memory / 2);
}

const QKEY: u32 = 0x1122_3344;

#[test]
fn a_senders_fault_costs_the_receiver_no_receive() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let (pd, elsewhere) = (guest_a.alloc_pd().unwrap(), guest_a.alloc_pd().unwrap());
    let cq = guest_a.create_cq(256).unwrap();
    let qp = pd.create_qp(QpSpec::ud().sges(32), &cq).unwrap();
    qp.to_ud(QKEY).unwrap();
    let mut mrs: Vec<Mr> = (0..32).map(|_| pd.reg_new(4096).unwrap()).collect();
    let sges: Vec<Sge> = mrs.iter().map(|mr| mr.sge(0, 8)).collect();
    let victim = Rc::new(guest_b, QpSpec::ud(), 64 << 10).unwrap();
    victim.qp.to_ud(QKEY).unwrap();
    let ah = pd.create_ah(AhAttr::to(guest_b.gids()[0], 0)).unwrap();
    let stop = AtomicBool::new(false);
    let (mut posted, mut completed) = (0u64, 0u64);
    let mut moving = mrs.remove(0);
    std::thread::scope(|scope| {
        let (stop, pd, elsewhere) = (&stop, &pd, &elsewhere);
        scope.spawn(move || {
            while !stop.load(Relaxed) {
                let _ = moving.rereg_pd(elsewhere);
                let _ = moving.rereg_pd(pd);
            }
        });
        let start = Instant::now();
        // On a busy machine, or under a sanitizer, two seconds see few datagrams: longer then.
        let goes_on = |completed| start.elapsed() < Duration::from_secs(if completed > 100 { 2 } else { 60 });
        while goes_on(completed) {
            while victim.qp.post_recv(posted, &[victim.mr.sge(0, 4096)]).is_ok() {
                posted += 1;
            }
            let op = Op::UdSend { ah: ah.number(), qpn: victim.qp.number(), qkey: QKEY, imm: None };
            qp.post(SendWr::new(1, op, &sges)).unwrap();
            if cq.next().status() != WcStatus::Success {
                qp.modify_state(QpState::Rts).unwrap();
            }
            while victim.cq.poll().is_some() {
                completed += 1;
            }
        }
        stop.store(true, Relaxed);
    });
    while victim.cq.poll().is_some() {
        completed += 1;
    }
    assert_eq!(posted - completed, u64::from(victim.qp.rq().used()), "receives that were lost");
    assert!(completed > 100);
}

/// A destination that posts no receives delays what goes to others once, not with every datagram.
#[test]
fn a_deaf_destination_does_not_hold_up_others() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let end = |guest| {
        let end = Rc::new(guest, QpSpec::ud(), 4096).unwrap();
        end.qp.to_ud(QKEY).unwrap();
        end
    };
    let (a, deaf, b) = (end(guest_a), end(guest_b), end(guest_b));
    let ah = a.pd.create_ah(AhAttr::to(guest_b.gids()[0], 0)).unwrap();
    let to = |end: &Rc| Op::UdSend { ah: ah.number(), qpn: end.qp.number(), qkey: QKEY, imm: None };
    b.qp.post_recv(1, &[b.mr.sge(0, 200)]).unwrap();
    let start = Instant::now();
    for _ in 0..100 {
        a.qp.post(SendWr::inline(1, to(&deaf), b"?")).unwrap();
    }
    a.qp.post(SendWr::inline(1, to(&b), b"!")).unwrap();
    b.cq.next().ok();
    // Patience is 2 ms; a hundred times that would be 200.
    assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());
    while a.cq.poll().is_some() {}
    // With a receive posted it hears again.
    deaf.qp.post_recv(2, &[deaf.mr.sge(0, 200)]).unwrap();
    a.qp.post(SendWr::inline(1, to(&deaf), b"!")).unwrap();
    deaf.cq.next().ok();
}
