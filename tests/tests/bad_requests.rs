//! Work requests and rings that no driver would write. Each ends in a status or an error of its own queue pair;
//! two other guests work all the time and notice nothing.
#![allow(missing_docs, reason = "a test program")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use freeflow_tests::attack::{Attack, SOON};
use freeflow_tests::bed::eventually;
use freeflow_tests::guest::mem::Buf;
use freeflow_tests::guest::verbs::{MrSpec, Op, PART, Payload, Rc, RcOptions, Remote, SendWr, Sge, connect};
use freeflow_tests::rng::Rng;
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{QpState, SendFlags, WcStatus};
use virtio_rdma::ring::{DmaInfo, RecvWqe, SendWqe};

const NUM_SGE: usize = std::mem::offset_of!(SendWqe, dma) + std::mem::offset_of!(DmaInfo, num_sge);
const LENGTH: usize = std::mem::offset_of!(SendWqe, dma) + std::mem::offset_of!(DmaInfo, length);
const RECV_NUM_SGE: usize = std::mem::offset_of!(RecvWqe, dma) + std::mem::offset_of!(DmaInfo, num_sge);

fn post(a: &Rc, op: Op, sge: Sge) {
    a.qp.post(SendWr::new(1, op, &[sge])).unwrap();
}

/// WRITEs from `sge`, then READs into it, then SENDs from it: each is `LOC_PROT_ERR`.
fn local(attack: &Attack, sge: impl Fn(&Rc) -> Sge) {
    for kind in 0..3 {
        attack.request(&[WcStatus::LocProtErr], |a, b| {
            b.qp.post_recv(1, &[b.mr.sge_all()]).unwrap();
            let op = [Op::Write(b.mr.remote(0)), Op::Read(b.mr.remote(0)), Op::Send][kind];
            post(a, op, sge(a));
        });
    }
}

/// WRITEs to `remote`, WRITEs with immediate, and READs: each is `REM_ACCESS_ERR`.
fn remote(attack: &Attack, remote: impl Fn(&Rc) -> Remote, len: usize) {
    for op in [Op::Write, Op::Read, |r| Op::WriteImm(r, 1)] {
        attack.refused(|a, b| {
            b.qp.post_recv(1, &[]).unwrap();
            post(a, op(remote(b)), a.mr.sge(0, len));
        });
    }
}

#[test]
fn wrong_lkey() {
    let attack = Attack::start();
    for bits in [1, 0x100, 0x8000_0000, 0xffff_ffff] {
        local(&attack, |a| Sge { lkey: a.mr.key() ^ bits, ..a.mr.sge(0, 8) });
    }
    local(&attack, |a| Sge { lkey: 0, ..a.mr.sge(0, 8) });
    attack.finish();
}

#[test]
fn wrong_rkey() {
    let attack = Attack::start();
    for bits in [1, 0x100, 0x8000_0000, 0xffff_ffff] {
        remote(&attack, |b| Remote { rkey: b.mr.key() ^ bits, ..b.mr.remote(0) }, 8);
    }
    attack.finish();
}

#[test]
fn local_key_of_another_guest() {
    let attack = Attack::start();
    attack.request(&[WcStatus::LocProtErr], |a, b| post(a, Op::Write(b.mr.remote(0)), b.mr.sge(0, 8)));
    attack.finish();
}

#[test]
fn own_key_as_remote_key() {
    let attack = Attack::start();
    attack.refused(|a, _| post(a, Op::Write(a.mr.remote(0)), a.mr.sge(8, 8)));
    attack.finish();
}

#[test]
fn local_out_of_bounds_by_one_byte() {
    let attack = Attack::start();
    local(&attack, |a| a.mr.sge(4096 - 7, 8));
    local(&attack, |a| a.mr.sge(1, 4096));
    local(&attack, |a| Sge { addr: a.mr.addr(0) - 1, ..a.mr.sge(0, 8) });
    local(&attack, |a| a.mr.sge(4096, 1));
    attack.finish();
}

#[test]
fn remote_out_of_bounds_by_one_byte() {
    let attack = Attack::start();
    remote(&attack, |b| b.mr.remote(4096 - 7), 8);
    remote(&attack, |b| b.mr.remote(1), 4096);
    remote(&attack, |b| Remote { addr: b.mr.addr(0) - 1, ..b.mr.remote(0) }, 8);
    remote(&attack, |b| b.mr.remote(4096), 1);
    attack.finish();
}

#[test]
fn second_sge_out_of_bounds() {
    let attack = Attack::start();
    attack.request(&[WcStatus::LocProtErr], |a, b| {
        let sges = [a.mr.sge(0, 4000), a.mr.sge(4000, 97)];
        a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &sges)).unwrap();
    });
    attack.finish();
}

#[test]
fn address_that_wraps() {
    let attack = Attack::start();
    local(&attack, |a| Sge { addr: u64::MAX - 3, ..a.mr.sge(0, 8) });
    local(&attack, |a| Sge { addr: u64::MAX, len: 1 << 31, ..a.mr.sge(0, 8) });
    remote(&attack, |b| Remote { addr: u64::MAX - 3, ..b.mr.remote(0) }, 8);
    remote(&attack, |b| Remote { addr: 0u64.wrapping_sub(b.mr.addr(0)), ..b.mr.remote(0) }, 8);
    attack.finish();
}

#[test]
fn lengths_that_wrap_together() {
    let attack = Attack::start();
    attack.request(&[WcStatus::LocProtErr, WcStatus::LocLenErr, WcStatus::LocQpOpErr], |a, b| {
        let sges = [Sge { len: 1 << 31, ..a.mr.sge(0, 0) }; 3];
        a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &sges)).unwrap();
    });
    attack.finish();
}

#[test]
fn key_of_another_domain() {
    let attack = Attack::start();
    let pd = attack.attacker().alloc_pd().unwrap();
    let foreign = pd.reg_new(4096).unwrap();
    local(&attack, |_| foreign.sge(0, 8));
    let pd = attack.bed.guests[1].alloc_pd().unwrap();
    let foreign = pd.reg_new(4096).unwrap();
    remote(&attack, |_| foreign.remote(0), 8);
    attack.finish();
}

#[test]
fn key_that_was_freed() {
    let attack = Attack::start();
    attack.request(&[WcStatus::LocProtErr], |a, b| {
        let mut mr = a.pd.reg_new(4096).unwrap();
        mr.dereg().unwrap();
        post(a, Op::Write(b.mr.remote(0)), mr.sge(0, 8));
    });
    attack.refused(|a, b| {
        let mut mr = b.pd.reg_new(4096).unwrap();
        mr.dereg().unwrap();
        post(a, Op::Write(mr.remote(0)), a.mr.sge(0, 8));
    });
    attack.finish();
}

#[test]
fn region_that_is_not_complete() {
    use virtio_rdma::ctrl::{ObjectResponse, Opcode, RegMr};
    let attack = Attack::start();
    attack.request(&[WcStatus::LocProtErr], |a, b| {
        let buf = attack.attacker().alloc(8192).unwrap();
        let body = RegMr {
            pdn: a.pd.number().into(),
            access: 7.into(),
            iova: 0x10000.into(),
            length: 8192.into(),
            num_extents: 1.into(),
            ..RegMr::default()
        };
        let half = buf.extents(0, 4096);
        let mr: ObjectResponse = attack.attacker().command(Opcode::RegMr, &body, &half).unwrap();
        post(a, Op::Write(b.mr.remote(0)), Sge { addr: 0x10000, len: 8, lkey: mr.number.get() });
    });
    attack.finish();
}

/// Writes a request, spoils it with `spoil`, and only then makes it available.
fn spoiled(a: &Rc, op: Op, spoil: impl FnOnce(&Buf, usize)) {
    let ring = a.qp.sq();
    let index = ring.index();
    // The QP is in RTS: write the element by hand, so that the device does not see it before it is spoiled.
    let at = ring.offset_of(index);
    let mut wqe = SendWqe { wr_id: 1.into(), send_flags: SendFlags::SIGNALED.bits().into(), ..SendWqe::default() };
    let (opcode, target) = match op {
        Op::Write(r) => (0, r),
        Op::Raw(opcode, _) => (opcode, Remote { addr: 0, rkey: 0 }),
        _ => (2, Remote { addr: 0, rkey: 0 }),
    };
    wqe.opcode = opcode.into();
    wqe.wr[..8].copy_from_slice(&target.addr.to_le_bytes());
    wqe.wr[8..12].copy_from_slice(&target.rkey.to_le_bytes());
    ring.buf().write(at, zerocopy::IntoBytes::as_bytes(&wqe));
    let sge = a.mr.sge(0, 8);
    let bytes = [&sge.addr.to_le_bytes()[..], &sge.len.to_le_bytes(), &sge.lkey.to_le_bytes()].concat();
    ring.buf().write(at + size_of::<SendWqe>(), &bytes);
    spoil(ring.buf(), at);
    ring.publish(ring.after(index));
    a.qp.doorbell().ring();
}

#[test]
fn sge_count_no_driver_would_write() {
    let attack = Attack::start();
    for count in [5u32, 33, 255, 0x1_0000, 0x1000_0001, u32::MAX] {
        attack.request(&[WcStatus::LocQpOpErr], |a, b| {
            spoiled(a, Op::Write(b.mr.remote(0)), |buf, at| buf.write(at + NUM_SGE, &count.to_le_bytes()));
        });
    }
    attack.finish();
}

#[test]
fn inline_length_no_driver_would_write() {
    let attack = Attack::start();
    let flags = (SendFlags::INLINE | SendFlags::SIGNALED).bits();
    for length in [129u32, 4096, 0x8000_0000, u32::MAX] {
        attack.request(&[WcStatus::LocQpOpErr, WcStatus::LocLenErr], |a, b| {
            spoiled(a, Op::Write(b.mr.remote(0)), |buf, at| {
                buf.write(at + LENGTH, &length.to_le_bytes());
                buf.write(at + std::mem::offset_of!(SendWqe, send_flags), &flags.to_le_bytes());
            });
        });
    }
    attack.finish();
}

#[test]
fn opcode_no_driver_would_write() {
    let attack = Attack::start();
    // 7: to invalidate a key that there is not; 32: REG_MR, which is the kernel's; the others do not exist.
    for opcode in [7u32, 10, 11, 12, 13, 32, 255, 0x100, 0x8000_0000, u32::MAX] {
        attack.request(&[WcStatus::LocQpOpErr], |a, _| spoiled(a, Op::Raw(opcode, [0; PART]), |_, _| ()));
    }
    attack.finish();
}

#[test]
fn flags_no_driver_would_write() {
    let attack = Attack::start();
    let (a, b) = attack.pair();
    let wr = SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x");
    a.qp.post(wr.flags(SendFlags::from_bits_retain(0xffff_fff0) | SendFlags::SIGNALED)).unwrap();
    assert!(matches!(a.cq.next().status(), WcStatus::Success | WcStatus::LocQpOpErr));
    attack.finish();
}

#[test]
fn inline_read() {
    // The flag means nothing for a READ: it is refused, or the READ is one of no elements.
    let attack = Attack::start();
    let (a, b) = attack.pair();
    let before = a.mr.read(0, 4096);
    let wr = SendWr { payload: Payload::Inline(b"12345678"), ..SendWr::new(1, Op::Read(b.mr.remote(0)), &[]) };
    a.qp.post(wr).unwrap();
    assert!(matches!(a.cq.next().status(), WcStatus::Success | WcStatus::LocQpOpErr));
    assert_eq!(a.mr.read(0, 4096), before);
    attack.finish();
}

#[test]
fn producer_index_beyond_the_ring() {
    let attack = Attack::start();
    for index in [128u32, 129, 0x8000_0000, u32::MAX] {
        let (a, _b) = attack.pair();
        a.qp.sq().producer().store(index, Relaxed);
        a.qp.doorbell().ring();
        attack.attacker().events().wait(EventType::QpFatal, a.qp.number(), SOON).unwrap();
        assert_eq!(a.qp.state().unwrap(), QpState::Err);
    }
    attack.finish();
}

#[test]
fn receive_index_beyond_the_ring() {
    let attack = Attack::start();
    for index in [128u32, u32::MAX] {
        let (a, b) = attack.pair();
        a.qp.rq().producer().store(index, Relaxed);
        b.qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
        attack.attacker().events().wait(EventType::QpFatal, a.qp.number(), SOON).unwrap();
        assert_eq!(a.qp.state().unwrap(), QpState::Err);
        // The victim's request fails like one to a peer in error.
        assert!(matches!(b.cq.next().status(), WcStatus::RetryExcErr | WcStatus::RemOpErr));
    }
    attack.finish();
}

#[test]
fn producer_index_that_jumps() {
    let attack = Attack::start();
    // Elements that were never written hold rubbish: the first of them fails, the rest is flushed.
    for jump in [1u32, 50, 126, 127] {
        let (a, _b) = attack.pair();
        a.qp.sq().producer().store(jump, Relaxed);
        a.qp.doorbell().ring();
        let wcs = a.cq.take(jump as usize);
        assert_ne!(wcs[0].status(), WcStatus::Success);
        assert!(wcs[1..].iter().all(|wc| wc.status() == WcStatus::WrFlushErr));
        assert!(a.cq.poll().is_none());
    }
    attack.finish();
}

#[test]
fn producer_index_that_goes_back() {
    let attack = Attack::start();
    let (a, b) = attack.pair();
    for i in 0..20 {
        a.qp.post(SendWr::inline(i, Op::Write(b.mr.remote(0)), b"x")).unwrap();
        a.cq.next().ok();
    }
    a.qp.sq().producer().store(10, Relaxed);
    a.qp.doorbell().ring();
    // A ring that is full but for ten: the rubbish in it ends the QP.
    eventually("error of the QP", SOON, || a.qp.state().unwrap() == QpState::Err);
    attack.finish();
}

#[test]
fn indices_of_the_device_are_never_read() {
    let attack = Attack::start();
    let (a, b) = attack.pair();
    for i in 0..300u64 {
        a.qp.sq().consumer().store(u32::MAX, Relaxed);
        b.qp.rq().consumer().store(77 + i as u32, Relaxed);
        a.cq.ring().producer().store(a.cq.ring().index(), Relaxed);
        b.qp.post_recv(i, &[b.mr.sge(0, 8)]).unwrap();
        a.qp.post(SendWr::inline(i, Op::Send, b"x")).unwrap();
        assert_eq!((a.cq.next().ok().wr_id(), b.cq.next().ok().wr_id()), (i, i));
    }
    attack.finish();
}

#[test]
fn completion_index_beyond_the_ring() {
    let attack = Attack::start();
    let (a, b) = attack.pair();
    a.cq.ring().consumer().store(0x4000_0000, Relaxed);
    // The device may look at the index only when the ring seems full to it.
    let event = || {
        let _ = a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x"));
        attack.attacker().events().take(EventType::CqError, a.cq.number()).unwrap().is_some()
    };
    eventually("error of the CQ", SOON, event);
    eventually("error of the QP", SOON, || a.qp.state().unwrap() == QpState::Err);
    attack.finish();
}

#[test]
fn receives_no_driver_would_write() {
    let attack = Attack::start();
    for count in [5u32, 33, 0x1000_0001, u32::MAX] {
        let (a, b) = attack.pair();
        let ring = a.qp.rq();
        ring.buf().write(ring.offset_of(0) + RECV_NUM_SGE, &count.to_le_bytes());
        ring.publish(1);
        b.qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
        let wc = a.cq.next();
        assert!(matches!(wc.status(), WcStatus::LocQpOpErr | WcStatus::LocLenErr | WcStatus::LocProtErr));
        assert!(matches!(b.cq.next().status(), WcStatus::RemOpErr | WcStatus::RemInvReqErr));
    }
    attack.finish();
}

/// Flips bytes of buffers until told to stop.
fn corrupt(bufs: &[&Buf], from: usize, seed: u64, stop: &AtomicBool) {
    let mut rng = Rng::new(seed);
    while !stop.load(Relaxed) {
        let buf = bufs[rng.below(bufs.len())];
        let at = from + rng.below(buf.len() - from);
        buf.write(at, &[if rng.one_in(3) { 0 } else { rng.word() as u8 }]);
    }
}

#[test]
fn rings_rewritten_while_they_are_read() {
    let attack = Attack::start();
    let seed = Rng::seed();
    println!("FREEFLOW_SEED={seed}");
    let end = Instant::now() + Duration::from_millis(1500);
    let mut round = 0;
    while Instant::now() < end {
        round += 1;
        let (a, b) = attack.pair();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Elements only, then indices too.
            let from = if round % 2 == 0 { 384 } else { 0 };
            let bufs = [a.qp.sq().buf(), a.qp.rq().buf(), a.cq.ring().buf()];
            let stop_ref = &stop;
            scope.spawn(move || corrupt(&bufs, from, seed + round, stop_ref));
            for i in 0..200u64 {
                let sges = [a.mr.sge(0, 100), a.mr.sge(500, 77)];
                let _ = a.qp.post(SendWr::new(i, Op::Write(b.mr.remote(8)), &sges));
                let _ = a.qp.post_recv(i, &sges);
                let _ = b.qp.post(SendWr::inline(i, Op::Send, b"x"));
                // The index is spoiled too: this loop must have an end.
                for _ in 0..16 {
                    if a.cq.ring().has_element() {
                        a.cq.ring().advance();
                    }
                }
                while b.cq.poll().is_some() {}
            }
            stop.store(true, Relaxed);
        });
    }
    attack.finish();
}

#[test]
fn areas_rewritten_while_they_are_read() {
    let attack = Attack::start();
    let guest = attack.attacker().clone();
    let (a, b) = attack.pair();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let areas: Vec<&Buf> =
            guest.doorbells().iter().map(|d| d.buf()).chain([guest.arm_words(), guest.ahs().buf()]).collect();
        let stop_ref = &stop;
        scope.spawn(move || corrupt(&areas, 0, 5, stop_ref));
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end {
            let _ = a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x"));
            while a.cq.poll().is_some() {}
        }
        stop.store(true, Relaxed);
    });
    drop((a, b));
    guest.reload().unwrap();
    attack.finish();
}

#[test]
fn payload_rewritten_while_it_is_copied() {
    let attack = Attack::start();
    let (a, b) = attack.pair();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (buf, stop_ref): (&Arc<Buf>, _) = (a.mr.buf(), &stop);
        scope.spawn(move || corrupt(&[buf], 0, 9, stop_ref));
        for i in 0..2000 {
            a.qp.post(SendWr::new(i, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 4096)])).unwrap();
            a.cq.next().ok();
        }
        stop.store(true, Relaxed);
    });
    attack.finish();
}

#[test]
fn millions_of_doorbells() {
    let attack = Attack::start();
    let (a, _b) = attack.pair();
    let stop = AtomicBool::new(false);
    let rung = std::thread::scope(|scope| {
        let kicks = scope.spawn(|| {
            while !stop.load(Relaxed) {
                a.qp.doorbell().area().kick();
            }
        });
        let end = Instant::now() + Duration::from_secs(1);
        let mut rung = 0u64;
        while Instant::now() < end {
            for _ in 0..1000 {
                a.qp.doorbell().ring();
            }
            rung += 1000;
        }
        stop.store(true, Relaxed);
        kicks.join().unwrap();
        rung
    });
    println!("{rung} doorbells in a second");
    attack.finish();
}

#[test]
fn doorbells_of_nobody() {
    let attack = Attack::start();
    let end = Instant::now() + Duration::from_millis(500);
    while Instant::now() < end {
        for area in attack.attacker().doorbells() {
            area.buf().fill(64, area.buf().len() - 64, 0xff);
            area.kick();
        }
    }
    attack.finish();
}

#[test]
fn regions_over_the_own_rings() {
    // A guest may let others write its rings and virtqueues: its own loss.
    let attack = Attack::start();
    let guest = attack.attacker();
    let (a, b) = attack.pair();
    let (sq, len) = (a.qp.sq().buf().gpa(0), a.qp.sq().buf().len());
    let view = Arc::new(guest.memory().view(sq, len as u64).unwrap());
    let mr = a.pd.reg_spec(MrSpec::whole(&view)).unwrap();
    b.mr.fill(0, 4096, 0xee);
    for off in 0..8 {
        b.qp.post(SendWr::new(1, Op::Write(mr.remote(off * 256)), &[b.mr.sge(0, 4096)])).unwrap();
        assert!(matches!(b.cq.next().status(), WcStatus::Success | WcStatus::RetryExcErr | WcStatus::WrFlushErr));
        a.qp.doorbell().ring();
    }
    attack.finish();
}

#[test]
fn everybody_waits_for_everybody() {
    // Both ends of many pairs send without receives, so that all wait for each other at once.
    let attack = Attack::start();
    let pairs: Vec<(Rc, Rc)> = (0..50).map(|_| attack.pair()).collect();
    for (a, b) in &pairs {
        a.qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
        b.qp.post(SendWr::inline(1, Op::Send, b"x")).unwrap();
    }
    std::thread::sleep(Duration::from_millis(100));
    for (a, b) in &pairs {
        a.qp.modify_state(QpState::Reset).unwrap();
        b.qp.modify_state(QpState::Reset).unwrap();
        connect(&a.qp, &b.qp, &RcOptions::default()).unwrap();
    }
    attack.finish();
}
