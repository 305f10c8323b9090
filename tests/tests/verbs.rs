//! Connected transports over the host's NIC, which a fake one plays.
#![allow(missing_docs, reason = "a test program")]

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use freeflow_backend::NicQuota;
use freeflow_backend::verbs::Limits;
use freeflow_backend::verbs::fake::{Counts, FakeNic, Script};
use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::GuestConfig;
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{Mr, MrSpec, Op, QpSpec, Rc, RcOptions, Remote, SendWr, connect};
use freeflow_tests::rng::Rng;
use freeflow_tests::router::RouterSpec;
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{Access, AtomicCap, QpState, WcOpcode, WcStatus};

const SOON: Duration = Duration::from_secs(10);
const A_WHILE: Duration = Duration::from_millis(2);

/// Waits until so many send work requests were posted to the NIC, ever.
fn wait_posted(nic: &FakeNic, count: u64) {
    eventually("posting", SOON, || nic.counts().posted >= count);
}

fn bed(script: Script) -> (Arc<FakeNic>, Bed) {
    let nic = Arc::new(FakeNic::new(script));
    let bed = Bed::with(&RouterSpec::of(2).over(nic.clone()), Placement::Contiguous);
    (nic, bed)
}

fn scripts() -> [Script; 3] {
    [Script::default(), Script::shuffled(1), Script::shuffled(2)]
}

#[test]
fn a_write_goes_through_the_nic() {
    for script in scripts() {
        let (nic, bed) = bed(script);
        let (a, b) = bed.pair(8192);
        let bytes = Rng::new(1).bytes(5000);
        a.mr.write(100, &bytes);
        a.qp.post(SendWr::new(7, Op::Write(b.mr.remote(33)), &[a.mr.sge(100, 5000)])).unwrap();
        let wc = a.cq.next().ok();
        assert_eq!((wc.wr_id(), wc.opcode(), wc.qpn()), (7, WcOpcode::RdmaWrite, a.qp.number()));
        assert_eq!(b.mr.read(33, 5000), bytes);
        assert!(b.cq.poll().is_none(), "the responder sees no completion");
        assert_eq!((nic.counts().sent, nic.counts().bytes), (1, 5000));
        let paths: Vec<_> = bed.router.router().qps().into_iter().filter_map(|qp| qp.path).collect();
        assert_eq!(paths, ["verbs"], "one of the two has sent something");
    }
}

#[test]
fn a_send_finds_its_receive_on_the_nic() {
    for script in scripts() {
        let (nic, bed) = bed(script);
        let (a, b) = bed.pair(8192);
        for i in 0..4u8 {
            a.qp.post(SendWr::new(10 + u64::from(i), Op::SendImm(i.into()), &[a.mr.sge(1000 * usize::from(i), 500)]))
                .unwrap();
            a.mr.fill(1000 * usize::from(i), 500, i + 1);
        }
        // Nobody waits on the NIC for a receive: what has none is not given to it.
        std::thread::sleep(A_WHILE);
        assert_eq!((nic.counts().sent, nic.counts().not_ready), (0, 0));
        (0..4).for_each(|i| b.qp.post_recv(i, &[b.mr.sge(1000 * i as usize, 1000)]).unwrap());
        for i in 0..4u8 {
            let (sent, got) = (a.cq.next().ok(), b.cq.next().ok());
            assert_eq!((sent.wr_id(), sent.opcode()), (10 + u64::from(i), WcOpcode::Send));
            assert_eq!((got.wr_id(), got.opcode(), got.qpn()), (i.into(), WcOpcode::Recv, b.qp.number()));
            assert_eq!((got.byte_len(), got.imm()), (500, Some(i.into())));
            assert_eq!(b.mr.read(1000 * usize::from(i), 501), [vec![i + 1; 500], vec![0]].concat());
        }
        assert_eq!((nic.counts().sent, nic.counts().not_ready), (4, 0));
    }
}

#[test]
fn what_fails_on_the_nic_fails_the_queue_pair() {
    for script in scripts() {
        let (nic, bed) = bed(script);
        let (a, b) = bed.pair(4096);
        nic.fail_send(1, WcStatus::RetryExcErr);
        for id in 0..4 {
            a.qp.post(SendWr::new(id, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 8)])).unwrap();
        }
        let ends: Vec<_> = a.cq.take(4).iter().map(|wc| (wc.wr_id(), wc.status())).collect();
        let flushed = |id| (id, WcStatus::WrFlushErr);
        assert_eq!(ends, [(0, WcStatus::Success), (1, WcStatus::RetryExcErr), flushed(2), flushed(3)]);
    }
}

#[test]
fn nothing_stays_on_the_nic() {
    let (nic, bed) = bed(Script::shuffled(3));
    {
        let (a, b) = bed.pair(4096);
        b.qp.post_recv(1, &[b.mr.sge(0, 8)]).unwrap();
        a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, 8)])).unwrap();
        a.cq.next().ok();
        assert_eq!((nic.counts().pds, nic.counts().mrs, nic.counts().qps), (2, 2, 2));
    }
    drop(bed.guests);
    drop(bed.router);
    let Counts { pds, mrs, cqs, qps, .. } = nic.counts();
    assert_eq!((pds, mrs, cqs, qps), (0, 0, 0, 0));
}

fn statuses(end: &Rc, count: usize) -> Vec<(u64, WcStatus)> {
    end.cq.take(count).iter().map(|wc| (wc.wr_id(), wc.status())).collect()
}

fn post_write(id: u64, a: &Rc, b: &Rc) {
    a.qp.post(SendWr::new(id, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 8)])).unwrap();
}

#[test]
fn a_key_that_was_used_on_the_nic_is_gone_with_its_region() {
    for script in scripts() {
        let (nic, bed) = bed(script);
        let (a, b) = bed.pair(4096);
        let mut other = b.pd.reg_new(4096).unwrap();
        let key = other.remote(0);
        a.qp.post(SendWr::new(1, Op::Write(key), &[a.mr.sge(0, 8)])).unwrap();
        a.cq.next().ok();
        other.dereg().unwrap();
        assert_eq!(nic.counts().mrs, 2, "the NIC has forgotten it, too");
        a.qp.post(SendWr::new(2, Op::Write(key), &[a.mr.sge(0, 8)])).unwrap();
        assert_eq!(a.cq.next().status(), WcStatus::RemAccessErr);
        assert_eq!(nic.counts().sent, 1, "the NIC was not asked");
    }
}

#[test]
fn a_region_can_go_while_the_nic_is_at_it() {
    let (nic, bed) = bed(Script::default());
    let (a, mut b) = bed.pair(4096);
    nic.hold(true);
    let target = b.mr.buf().clone();
    let first_bytes = || {
        let mut bytes = [0xff; 8];
        target.read(0, &mut bytes);
        bytes
    };
    a.mr.fill(0, 8, 0xee);
    post_write(1, &a, &b);
    wait_posted(&nic, 1);
    b.mr.dereg().unwrap();
    nic.hold(false);
    assert_eq!(statuses(&a, 1), [(1, WcStatus::RemAccessErr)]);
    assert_eq!(first_bytes(), [0; 8], "memory that was given back is left alone");
}

#[test]
fn a_queue_pair_can_go_while_the_nic_has_its_work() {
    let (nic, bed) = bed(Script::default());
    let (a, b) = bed.pair(4096);
    b.qp.post_recv(7, &[b.mr.sge(0, 8)]).unwrap();
    nic.hold(true);
    a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, 8)])).unwrap();
    post_write(2, &a, &b);
    wait_posted(&nic, 2);
    let Rc { qp, cq, mr: _mr, pd: _pd } = a;
    drop(qp);
    nic.hold(false);
    assert_eq!(nic.counts().qps, 1);
    assert!(cq.poll().is_none(), "a queue pair that is gone completes nothing");
    b.qp.modify_state(QpState::Err).unwrap();
    assert_eq!(statuses(&b, 1), [(7, WcStatus::WrFlushErr)], "the receive that the NIC had");
}

#[test]
fn what_the_nic_has_is_flushed_before_what_it_has_not() {
    let (nic, bed) = bed(Script::default());
    let spec = QpSpec { send_depth: 63, recv_depth: 63, ..QpSpec::rc() };
    let (a, b) = Rc::pair_with(&bed.guests[0], &bed.guests[1], &spec, 4096, &RcOptions::default()).unwrap();
    (0..10).for_each(|id| b.qp.post_recv(id, &[b.mr.sge(0, 8)]).unwrap());
    nic.hold(true);
    for id in 0..40 {
        a.qp.post(SendWr::new(id, if id < 5 { Op::Send } else { Op::Write(b.mr.remote(0)) }, &[a.mr.sge(0, 8)]))
            .unwrap();
    }
    wait_posted(&nic, 1);
    a.qp.modify_state(QpState::Err).unwrap();
    b.qp.modify_state(QpState::Err).unwrap();
    nic.hold(false);
    assert_eq!(statuses(&a, 40), (0..40).map(|id| (id, WcStatus::WrFlushErr)).collect::<Vec<_>>());
    assert_eq!(statuses(&b, 10), (0..10).map(|id| (id, WcStatus::WrFlushErr)).collect::<Vec<_>>());
}

#[test]
fn a_guest_that_stops_is_left_alone_by_the_nic() {
    let (nic, bed) = bed(Script::default());
    let (a, b) = bed.pair(4096);
    post_write(1, &a, &b);
    a.cq.next().ok();
    nic.hold(true);
    a.mr.fill(0, 8, 0xee);
    post_write(2, &a, &b);
    wait_posted(&nic, 2);
    // The NIC does nothing for so long that it is not waited for.
    let bases = bed.guests[1].stop_queues().unwrap();
    nic.hold(false);
    std::thread::sleep(A_WHILE);
    assert_eq!(b.mr.read(0, 8), [0; 8]);
    bed.guests[1].start_queues_at(&bases).unwrap();
    assert_eq!(b.qp.state().unwrap(), QpState::Err);
    assert_eq!(a.cq.next().status(), WcStatus::RetryExcErr);
}

/// A connected pair, with a SEND and its receive on a NIC that does nothing.
fn with_a_send_on_the_nic(nic: &FakeNic, bed: &Bed) -> (Rc, Rc) {
    let (a, b) = bed.pair(4096);
    post_write(1, &a, &b);
    a.cq.next().ok();
    b.qp.post_recv(3, &[b.mr.sge(0, 8)]).unwrap();
    nic.hold(true);
    a.qp.post(SendWr::new(2, Op::Send, &[a.mr.sge(0, 8)])).unwrap();
    wait_posted(nic, 2);
    (a, b)
}

/// What was on the NIC is flushed, and both guests are told.
#[track_caller]
fn both_have_failed(bed: &Bed, a: &Rc, b: &Rc) {
    for (end, guest, id) in [(a, &bed.guests[0], 2), (b, &bed.guests[1], 3)] {
        guest.events().wait(EventType::QpFatal, end.qp.number(), SOON).unwrap();
        assert_eq!(statuses(end, 1), [(id, WcStatus::WrFlushErr)]);
        assert_eq!(end.qp.state().unwrap(), QpState::Err);
    }
}

#[test]
fn a_queue_pair_that_breaks_on_the_nic_breaks_for_its_guest() {
    for script in scripts() {
        let (nic, bed) = bed(script);
        let (a, b) = with_a_send_on_the_nic(&nic, &bed);
        nic.qps().into_iter().for_each(|number| nic.break_qp(number));
        both_have_failed(&bed, &a, &b);
        nic.hold(false);
    }
}

/// The NIC is pulled out under load: nothing that was on it completes there, and nothing of it stays here.
#[test]
fn a_nic_that_is_taken_away_fails_its_queue_pairs() {
    for script in scripts() {
        let (nic, bed) = bed(script);
        let (a, b) = with_a_send_on_the_nic(&nic, &bed);
        nic.remove();
        both_have_failed(&bed, &a, &b);
        let (x, y) = bed.two();
        assert!(x.alloc_pd().is_err(), "a protection domain that would not be there");
        assert!(Rc::pair(x, y, 64).is_err());
        let mr = a.pd.reg_new(4096).unwrap();
        assert_eq!(nic.counts().mrs, 2, "a region goes without it");
        drop((a, b, mr));
        drop(bed);
        let Counts { pds, mrs, cqs, qps, .. } = nic.counts();
        assert_eq!((pds, mrs, cqs, qps), (0, 0, 0, 0));
    }
}

/// What does not fit on the NIC goes without it; what needs it is refused.
#[test]
fn a_small_nic() {
    let limits = Limits { mrs: 3, qps: 4, ..Script::default().limits };
    let (nic, bed) = bed(Script { limits, ..Script::default() });
    let (a, b) = bed.pair(4096);
    let (_third, fourth) = (b.pd.reg_new(4096).unwrap(), b.pd.reg_new(4096).unwrap());
    a.qp.post(SendWr::new(1, Op::Write(fourth.remote(0)), &[a.mr.sge(0, 8)])).unwrap();
    a.cq.next().ok();
    assert_eq!((nic.counts().mrs, nic.counts().sent), (3, 0));
    post_write(2, &a, &b);
    a.cq.next().ok();
    assert_eq!(nic.counts().sent, 1);
    let _second = bed.pair(64);
    let (x, y) = bed.two();
    assert!(Rc::pair(x, y, 64).is_err(), "a fifth queue pair");
    let end = Rc::new(x, QpSpec::rc(), 64).unwrap();
    end.qp.to_init(RcOptions::default().access).unwrap();
    assert!(end.qp.to_rtr(y.gids()[0], 77, 1, &RcOptions::default()).is_err(), "one that is connected needs the NIC");
    assert_eq!(end.qp.state().unwrap(), QpState::Init);
}

/// A receive whose list is longer than the NIC takes is filled without the NIC; none is lost.
#[test]
fn receives_that_are_too_long_for_the_nic() {
    let limits = Limits { sges: 1, ..Script::default().limits };
    let (nic, bed) = bed(Script { limits, ..Script::default() });
    let (a, b) = bed.pair(4096);
    a.mr.write(0, b"in two pieces");
    for id in 0..20 {
        b.qp.post_recv(id, &[b.mr.sge(0, 6), b.mr.sge(100, 64)]).unwrap();
        b.qp.post_recv(100 + id, &[b.mr.sge(200, 64)]).unwrap();
        for _ in 0..2 {
            a.qp.post(SendWr::new(id, Op::Send, &[a.mr.sge(0, 13)])).unwrap();
            a.cq.next().ok();
        }
        let ids = [(); 2].map(|()| b.cq.next().ok().wr_id());
        assert_eq!(ids, [id, 100 + id]);
        assert_eq!((b.mr.read(0, 6), b.mr.read(100, 7)), (b"in two".to_vec(), b" pieces".to_vec()));
        assert_eq!(b.mr.read(200, 13), b"in two pieces");
    }
    assert_eq!(nic.counts().sent, 20);
}

#[test]
fn registrations_may_take_their_time() {
    let script = Script { registration: Duration::from_millis(50), ..Script::default() };
    let (_nic, bed) = bed(script);
    let (a, b) = bed.pair(4096);
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| (0..10).map(|_| a.pd.reg_new(4096).unwrap()).collect::<Vec<_>>());
        let mut rounds = 0u32;
        while !slow.is_finished() {
            post_write(1, &b, &a);
            b.cq.next().ok();
            rounds += 1;
        }
        assert!(rounds > 10, "others go on meanwhile: {rounds}");
    });
}

#[test]
fn unreliable_messages_go_through_the_nic() {
    for script in scripts() {
        let (nic, bed) = bed(script);
        let (x, y) = bed.two();
        let (a, b) = Rc::pair_with(x, y, &QpSpec::uc(), 4096, &RcOptions::default()).unwrap();
        a.mr.write(0, b"datagram");
        for id in 0..100 {
            b.qp.post_recv(id, &[b.mr.sge(8, 8)]).unwrap();
            a.qp.post(SendWr::new(id, Op::SendImm(5), &[a.mr.sge(0, 8)])).unwrap();
            a.cq.next().ok();
            assert_eq!((b.cq.next().ok().wr_id(), b.mr.read(8, 8)), (id, b"datagram".to_vec()));
        }
        post_write(1, &a, &b);
        a.cq.next().ok();
        eventually("the WRITE", SOON, || b.mr.read(0, 8) == b"datagram");
        assert_eq!(nic.counts().sent, 101);
    }
}

/// A new life of one side of a UC connection.
fn reborn(b: &Rc, a: &Rc) {
    let options = RcOptions::default();
    b.qp.modify_state(QpState::Reset).unwrap();
    b.qp.to_init(options.access).unwrap();
    b.qp.to_rtr(a.qp.guest().gids()[0], a.qp.number(), options.psn, &options).unwrap();
    b.qp.to_rts(options.psn + 1, &options).unwrap();
}

#[test]
fn an_unreliable_queue_pair_goes_on_over_the_nic_when_its_peer_starts_over() {
    for script in scripts() {
        let (nic, bed) = bed(script);
        let (x, y) = bed.two();
        let (a, b) = Rc::pair_with(x, y, &QpSpec::uc(), 4096, &RcOptions::default()).unwrap();
        a.mr.write(0, b"message");
        for life in 0..4u64 {
            let before = nic.counts().sent;
            for (id, (from, to)) in [(2 * life, (&a, &b)), (2 * life + 1, (&b, &a))] {
                to.qp.post_recv(id, &[to.mr.sge(8, 8)]).unwrap();
                from.qp.post(SendWr::new(id, Op::Send, &[from.mr.sge(0, 7)])).unwrap();
                from.cq.next().ok();
                assert_eq!(to.cq.next().ok().wr_id(), id);
            }
            assert_eq!(nic.counts().sent, before + 2, "life {life}");
            assert_eq!(nic.counts().qps, 2);
            reborn(&b, &a);
        }
    }
}

/// Its peer starts over while it and its worker have nothing to do. With the queue pair on the NIC that it gets then comes a completion queue
/// of which that worker does not know yet.
#[test]
fn a_worker_that_sleeps_hears_of_a_queue_pair_that_was_replaced() {
    let limits = Limits { cqes: 256, ..Script::default().limits };
    let (nic, bed) = bed(Script { limits, ..Script::default() });
    let (x, y) = bed.two();
    let (a, b) = Rc::pair_with(x, y, &QpSpec::uc(), 4096, &RcOptions::default()).unwrap();
    for life in 0..4 {
        b.qp.post_recv(life, &[b.mr.sge(8, 8)]).unwrap();
        a.qp.post(SendWr::new(life, Op::Send, &[a.mr.sge(0, 7)])).unwrap();
        a.cq.next().ok();
        assert_eq!(b.cq.next().ok().wr_id(), life);
        assert_eq!(nic.counts().sent, life + 1);
        reborn(&a, &b);
        wait_asleep(&bed);
    }
}

/// What was on the NIC for messages that got lost with their sender is for those of its next life.
#[test]
fn receives_of_lost_messages_are_not_lost() {
    let (nic, bed) = bed(Script::default());
    let (x, y) = bed.two();
    let (a, b) = Rc::pair_with(x, y, &QpSpec::uc(), 4096, &RcOptions::default()).unwrap();
    post_write(1, &b, &a);
    b.cq.next().ok();
    nic.hold(true);
    for id in 10..13 {
        a.qp.post_recv(id, &[a.mr.sge(100, 3), a.mr.sge(200, 5)]).unwrap();
        b.qp.post(SendWr::new(id, Op::Send, &[b.mr.sge(0, 8)])).unwrap();
    }
    wait_posted(&nic, 4);
    reborn(&b, &a);
    nic.hold(false);
    b.mr.write(0, b"new life");
    for id in 10..13 {
        b.qp.post(SendWr::new(id, Op::Send, &[b.mr.sge(0, 8)])).unwrap();
        b.cq.next().ok();
        assert_eq!(a.cq.next().ok().wr_id(), id);
        assert_eq!((a.mr.read(100, 3), a.mr.read(200, 5)), (b"new".to_vec(), b" life".to_vec()));
    }
    assert_eq!(nic.counts().sent, 4);
}

/// Of a request that fails there is no completion either, if there is no room for it: an event says so.
#[test]
fn a_failure_on_the_nic_that_no_completion_can_tell_is_an_event() {
    let (nic, bed) = bed(Script::default());
    let (x, y) = bed.two();
    let (pd, cq) = (x.alloc_pd().unwrap(), x.create_cq(3).unwrap());
    let qp = pd.create_qp(QpSpec::rc(), &cq).unwrap();
    let peer = Rc::new(y, QpSpec::rc(), 64).unwrap();
    connect(&qp, &peer.qp, &RcOptions::default()).unwrap();
    nic.fail_send(3, WcStatus::RetryExcErr);
    for id in 0..4 {
        qp.post(SendWr::inline(id, Op::Write(peer.mr.remote(0)), b"o")).unwrap();
    }
    x.events().wait(EventType::QpFatal, qp.number(), SOON).unwrap();
    assert_eq!((qp.state().unwrap(), nic.counts().sent), (QpState::Err, 3));
}

#[test]
fn workers_sleep_when_the_nic_has_nothing() {
    let (_nic, bed) = bed(Script::shuffled(4));
    let (a, b) = bed.pair(4096);
    for id in 0..50 {
        b.qp.post_recv(id, &[b.mr.sge(0, 8)]).unwrap();
        a.qp.post(SendWr::new(id, Op::Send, &[a.mr.sge(0, 8)])).unwrap();
        a.cq.next().ok();
        b.cq.next().ok();
        std::thread::sleep(Duration::from_micros(300));
    }
    let sleeps = sleeps(&bed);
    assert!(sleeps > 25, "{sleeps}");
}

fn sleeps(bed: &Bed) -> u64 {
    bed.router.router().workers().iter().map(|worker| worker.sleeps).sum()
}

/// Waits until the workers have nothing to do for a while, and so sleep.
fn wait_asleep(bed: &Bed) {
    eventually("sleep", SOON, || {
        let before = sleeps(bed);
        std::thread::sleep(A_WHILE);
        sleeps(bed) == before
    });
}

#[test]
fn workers_sleep_while_the_nic_is_at_work() {
    for script in scripts() {
        let (nic, bed) = bed(script);
        let (a, b) = bed.pair(4096);
        post_write(1, &a, &b);
        a.cq.next().ok();
        for id in 2..20 {
            nic.hold(true);
            let before = sleeps(&bed);
            post_write(id, &a, &b);
            eventually("sleep", SOON, || sleeps(&bed) > before);
            nic.hold(false);
            assert_eq!(statuses(&a, 1), [(id, WcStatus::Success)]);
        }
    }
}

/// The NIC completes something in the last moment in which that makes no event.
#[test]
fn what_completes_as_a_worker_goes_to_sleep_is_seen() {
    let (nic, bed) = bed(Script::default());
    let (a, b) = bed.pair(4096);
    post_write(1, &a, &b);
    a.cq.next().ok();
    for id in 2..20 {
        wait_asleep(&bed);
        nic.hold(true);
        post_write(id, &a, &b);
        wait_asleep(&bed);
        nic.hold_until_armed();
        assert_eq!(statuses(&a, 1), [(id, WcStatus::Success)]);
    }
}

#[test]
fn what_breaks_is_heard_of_while_all_sleep() {
    let (nic, bed) = bed(Script::default());
    let (a, b) = bed.pair(4096);
    post_write(1, &a, &b);
    a.cq.next().ok();
    b.qp.post_recv(3, &[b.mr.sge(0, 8)]).unwrap();
    wait_asleep(&bed);
    nic.qps().into_iter().for_each(|number| nic.break_qp(number));
    for (end, guest) in [(&a, &bed.guests[0]), (&b, &bed.guests[1])] {
        guest.events().wait(EventType::QpFatal, end.qp.number(), SOON).unwrap();
    }
    assert_eq!(statuses(&b, 1), [(3, WcStatus::WrFlushErr)]);
}

#[test]
fn others_go_on_while_queue_pairs_are_connected() {
    let (nic, bed) = bed(Script::default());
    let (a, b) = bed.pair(4096);
    post_write(0, &a, &b);
    a.cq.next().ok();
    let others: Vec<_> = (0..4).map(|_| bed.pair(64)).collect();
    nic.hold_connecting(true);
    for (x, y) in &others {
        post_write(1, x, y);
    }
    for _ in 0..100 {
        post_write(2, &a, &b);
        a.cq.next().ok();
    }
    assert!(others.iter().all(|(x, _)| x.cq.poll().is_none()));
    nic.hold_connecting(false);
    for (x, _) in &others {
        x.cq.next().ok();
    }
}

#[test]
fn the_nic_retries_as_the_guest_says() {
    let (nic, bed) = bed(Script::default());
    let (x, y) = bed.two();
    let options = RcOptions { timeout: 9, retry_cnt: 3, ..RcOptions::default() };
    let (a, b) = Rc::pair_with(x, y, &QpSpec::rc(), 64, &options).unwrap();
    post_write(1, &a, &b);
    a.cq.next().ok();
    let told: Vec<_> = nic.sending().iter().map(|sending| (sending.timeout, sending.retry_cnt)).collect();
    assert_eq!(told, [(9, 3)], "one has sent");
}

/// Nothing goes to a NIC that has connected one side only.
#[test]
fn what_the_nic_does_not_connect_goes_without_it() {
    for after in 0..2 {
        let (nic, bed) = bed(Script::default());
        nic.refuse_connection(after);
        let (a, b) = bed.pair(64);
        for id in 0..2 {
            post_write(id, &a, &b);
            a.cq.next().ok();
        }
        assert_eq!(nic.counts().sent, 0);
        post_write(2, &b, &a);
        b.cq.next().ok();
        assert_eq!(nic.counts().sent, 1 - after, "both can still be connected if neither is");
    }
}

/// Every addition to one word counts, those of a peer on the NIC and those of one that is not.
#[test]
fn atomics_of_both_kinds_of_peers_on_one_word() {
    const ROUNDS: u64 = 2_000;
    for atomics in [AtomicCap::Hca, AtomicCap::Glob] {
        let limits = Limits { atomics, ..Script::default().limits };
        let nic = Arc::new(FakeNic::new(Script { limits, ..Script::default() }));
        let spec = RouterSpec { off_nic: 1, ..RouterSpec::of(3).over(nic.clone()) };
        let bed = Bed::with(&spec, Placement::Contiguous);
        let (a, b) = bed.pair(64);
        let third = Rc::new(&bed.guests[2], QpSpec::rc(), 64).unwrap();
        let (local, _end) = Rc::sibling((&third, &b), &QpSpec::rc(), 64).unwrap();
        let access = Access::LOCAL_WRITE | Access::REMOTE_ATOMIC;
        let word = b.pd.reg_spec(MrSpec::whole(b.mr.buf()).access(access)).unwrap();
        std::thread::scope(|scope| {
            for from in [&a, &local] {
                let remote = word.remote(8);
                scope.spawn(move || {
                    for id in 0..ROUNDS {
                        from.qp.post(SendWr::new(id, Op::FetchAdd(remote, 1), &[from.mr.sge(0, 8)])).unwrap();
                        from.cq.next().ok();
                    }
                });
            }
        });
        assert_eq!(b.mr.read(8, 8), (2 * ROUNDS).to_ne_bytes());
        assert_eq!(nic.counts().sent, if atomics == AtomicCap::Glob { ROUNDS } else { 0 });
        let swap = Op::CompareSwap(word.remote(8), 2 * ROUNDS, 7);
        a.qp.post(SendWr::new(1, swap, &[a.mr.sge(0, 8)])).unwrap();
        assert_eq!(a.cq.next().ok().opcode(), WcOpcode::CompSwap);
        assert_eq!(
            (a.mr.read(0, 8), b.mr.read(8, 8)),
            ((2 * ROUNDS).to_ne_bytes().to_vec(), 7u64.to_ne_bytes().to_vec())
        );
    }
}

fn copied(bed: &Bed, guest: usize) -> (u64, u64) {
    let counters = bed.router.status(guest).counters;
    (counters.copied_bytes, counters.copied_datagram_bytes)
}

/// What the router has touched is counted: nothing of what connected queue pairs send.
#[test]
fn no_payload_is_touched() {
    for spec in [QpSpec::rc(), QpSpec::uc()] {
        for script in scripts() {
            let (nic, bed) = bed(script);
            let (x, y) = bed.two();
            let (a, b) = Rc::pair_with(x, y, &spec, 1 << 20, &RcOptions::default()).unwrap();
            for (id, len) in [1, 4096, 65_536, 1 << 20].into_iter().enumerate() {
                b.qp.post_recv(id as u64, &[b.mr.sge(0, len)]).unwrap();
                a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, len)])).unwrap();
                a.qp.post(SendWr::new(2, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, len)])).unwrap();
                a.cq.next().ok();
                a.cq.next().ok();
                b.cq.next().ok();
            }
            assert_eq!((copied(&bed, 0), copied(&bed, 1)), ((0, 0), (0, 0)));
            assert_eq!(nic.counts().bytes, 2 * (1 + 4096 + 65_536 + (1 << 20)));
        }
    }
}

#[test]
fn what_goes_another_way_is_counted_and_told() {
    let limits = Limits { mrs: 2, ..Script::default().limits };
    let (_nic, bed) = bed(Script { limits, ..Script::default() });
    let (a, b) = bed.pair(4096);
    let why = || bed.router.router().qps().into_iter().find(|qp| qp.qpn == a.qp.number()).and_then(|qp| qp.why);
    assert_eq!(why(), None, "the peer has not been looked for");
    post_write(1, &a, &b);
    a.cq.next().ok();
    assert_eq!((why().as_deref(), copied(&bed, 0)), (Some("both are on the host's NIC"), (0, 0)));
    let off_nic = b.pd.reg_new(4096).unwrap();
    a.qp.post(SendWr::new(2, Op::Write(off_nic.remote(0)), &[a.mr.sge(0, 100)])).unwrap();
    a.cq.next().ok();
    assert_eq!(why().as_deref(), Some("both are on the host's NIC; not for it were 1 requests"));
    assert_eq!(copied(&bed, 0), (100, 0));
}

/// One virtual NIC cannot use up the host's: memory beyond its quota goes without the NIC, queue pairs are refused.
#[test]
fn quotas_of_the_hosts_nic() {
    let nic = Arc::new(FakeNic::new(Script::default()));
    let quota = NicQuota { max_bytes: 8192, max_qp: 2, ..NicQuota::default() };
    let bed = Bed::with(&RouterSpec { quota, ..RouterSpec::of(2).over(nic.clone()) }, Placement::Contiguous);
    let (a, b) = bed.pair(4096);
    let (second, third) = (b.pd.reg_new(4096).unwrap(), b.pd.reg_new(4096).unwrap());
    assert_eq!(nic.counts().mrs, 3, "the third of one guest is not there");
    for (mr, sent) in [(&second, 1), (&third, 1)] {
        a.qp.post(SendWr::new(1, Op::Write(mr.remote(0)), &[a.mr.sge(0, 8)])).unwrap();
        a.cq.next().ok();
        assert_eq!(nic.counts().sent, sent);
    }
    drop(second);
    let _fourth = b.pd.reg_new(4096).unwrap();
    assert_eq!(nic.counts().mrs, 3, "what was given back can be had again");
    let _other = bed.pair(64);
    let (x, y) = bed.two();
    assert!(Rc::pair(x, y, 64).is_err(), "a third queue pair");
    drop((a, b));
    Rc::pair(x, y, 64).unwrap();
    let quota = NicQuota { max_cqe: 300, ..NicQuota::default() };
    let bed = Bed::with(&RouterSpec { quota, ..RouterSpec::of(2).over(nic) }, Placement::Contiguous);
    let _first = bed.pair(64);
    let (x, y) = bed.two();
    assert!(Rc::pair(x, y, 64).is_err(), "completions of a second queue pair");
}

/// The same of regions, the mappings that memory in pieces needs, and protection domains.
#[test]
fn quotas_of_regions_mappings_and_protection_domains() {
    let nic = Arc::new(FakeNic::new(Script::default()));
    let quota = NicQuota { max_mr: 3, max_map: 9, max_pd: 2, ..NicQuota::default() };
    let bed = Bed::with(&RouterSpec { quota, ..RouterSpec::of(1).over(nic.clone()) }, Placement::Contiguous);
    let guest = &bed.guests[0];
    let pd = guest.alloc_pd().unwrap();
    let buf = guest.alloc_placed(4 * 4096, Placement::Fragmented).unwrap();
    let on_nic = |expected| assert_eq!(nic.counts().mrs, expected);
    let first = pd.reg(&buf).unwrap();
    on_nic(1);
    // Five mappings each: the second time there are four left.
    let without = pd.reg(&buf).unwrap();
    on_nic(1);
    let whole = [(); 2].map(|()| pd.reg_new(4096).unwrap());
    on_nic(3);
    drop((whole, without, first));
    let whole = [(); 4].map(|()| pd.reg_new(4096).unwrap());
    on_nic(3);
    drop(whole);
    let _second = guest.alloc_pd().unwrap();
    assert!(guest.alloc_pd().is_err(), "a third protection domain");
    drop(pd);
    guest.alloc_pd().unwrap();
}

/// What cannot be pinned goes without the NIC, and the log says which limit it was.
#[test]
fn the_limit_of_pinned_memory_is_named() {
    freeflow_tests::logs::collect();
    let (nic, bed) = bed(Script { memlock: 10_000, ..Script::default() });
    let (a, b) = bed.pair(4096);
    let big = b.pd.reg_new(12_345).unwrap();
    a.qp.post(SendWr::new(1, Op::Write(big.remote(0)), &[a.mr.sge(0, 8)])).unwrap();
    a.cq.next().ok();
    assert_eq!((nic.counts().mrs, nic.counts().sent), (2, 0));
    let lines = freeflow_tests::logs::lines_with("12345 bytes more cannot be pinned: RLIMIT_MEMLOCK is 10000");
    assert_eq!(lines.len(), 1, "{lines:?}");
}

/// 100,000 keys at work, guesses at others, and keys that come after others went.
#[test]
fn a_hundred_thousand_keys() {
    const KEYS: usize = 100_000;
    let (nic, bed) = bed(Script::default());
    let spec = QpSpec { send_depth: 127, ..QpSpec::rc() };
    let (x, y) = bed.two();
    let (a, b) = Rc::pair_with(x, y, &spec, 4096, &RcOptions::default()).unwrap();
    let memory = y.alloc(4096).unwrap();
    let region = || b.pd.reg_spec(MrSpec::whole(&memory)).unwrap();
    let mut regions: Vec<_> = (0..KEYS).map(|_| region()).collect();
    let use_all = |a: &Rc, regions: &[Mr]| {
        let before = nic.counts().sent;
        for some in regions.chunks(100) {
            let sges = [a.mr.sge(0, 8)];
            let list: Vec<_> = some.iter().map(|mr| SendWr::new(1, Op::Write(mr.remote(0)), &sges)).collect();
            a.qp.post_send(&list).unwrap();
            (0..some.len()).for_each(|_| assert_eq!(a.cq.next().status(), WcStatus::Success));
        }
        assert_eq!(nic.counts().sent - before, regions.len() as u64, "all by the NIC");
    };
    use_all(&a, &regions);
    let gone: Vec<_> = regions.drain(..KEYS / 2).map(|mr| mr.remote(0)).collect();
    regions.extend((0..KEYS / 2).map(|_| b.pd.reg_spec(MrSpec::whole(&memory)).unwrap()));
    use_all(&a, &regions);
    let known: HashSet<u32> = regions.iter().map(|mr| mr.remote(0).rkey).chain([b.mr.remote(0).rkey]).collect();
    let mut rng = Rng::new(7);
    let like = regions[0].remote(0);
    let mut guess = || u32::from_ne_bytes(rng.bytes(4).try_into().unwrap());
    let random: Vec<_> = (0..50).map(|_| guess()).collect();
    // Those of the fake NIC start here.
    let of_nic = (0..20).map(|n| 0x00f0_0001 + n);
    let neighbours = regions.iter().take(20).map(|mr| mr.remote(0).rkey ^ 1);
    let others = [a.mr.remote(0).rkey];
    let used_before = gone.iter().step_by(KEYS / 100).map(|remote| remote.rkey);
    let guesses = random.into_iter().chain(of_nic).chain(neighbours).chain(others).chain(used_before);
    for rkey in guesses.filter(|key| !known.contains(key)) {
        let before = nic.counts().sent;
        a.qp.post(SendWr::new(1, Op::Write(Remote { rkey, ..like }), &[a.mr.sge(0, 8)])).unwrap();
        assert_eq!(a.cq.next().status(), WcStatus::RemAccessErr, "{rkey:#x}");
        assert_eq!(nic.counts().sent, before, "the NIC is not asked for {rkey:#x}");
        reconnect(&a, &b);
    }
    use_all(&a, &regions[..1000]);
}

fn reconnect(a: &Rc, b: &Rc) {
    for end in [a, b] {
        end.qp.modify_state(QpState::Reset).unwrap();
    }
    connect(&a.qp, &b.qp, &RcOptions::default()).unwrap();
}

/// A receive that the NIC had in one life of its queue pair completes in no other.
#[test]
fn a_receive_on_the_nic_does_not_complete_in_the_next_life() {
    let (nic, bed) = bed(Script::default());
    for _ in 0..100 {
        receive_of_one_life(&nic, &bed);
    }
}

fn receive_of_one_life(nic: &FakeNic, bed: &Bed) {
    let (a, b) = bed.pair(4096);
    post_write(1, &a, &b);
    a.cq.next().ok();
    let before = nic.counts().sent;
    nic.hold(true);
    b.qp.post_recv(100, &[b.mr.sge(0, 8)]).unwrap();
    a.qp.post(SendWr::new(2, Op::Send, &[a.mr.sge(0, 8)])).unwrap();
    wait_posted(nic, before + 1);
    b.qp.modify_state(QpState::Reset).unwrap();
    nic.hold(false);
    assert_eq!(a.cq.next().status(), WcStatus::RetryExcErr);
    let other = Rc::new(&bed.guests[0], QpSpec::rc(), 64).unwrap();
    connect(&other.qp, &b.qp, &RcOptions { psn: 77, ..RcOptions::default() }).unwrap();
    b.qp.post_recv(200, &[b.mr.sge(0, 8)]).unwrap();
    b.qp.modify_state(QpState::Err).unwrap();
    assert_eq!(statuses(&b, 1), [(200, WcStatus::WrFlushErr)]);
    assert!(b.cq.poll().is_none());
}

/// Threads of both guests send both ways over several connections at once, over workers of their own, and compare every byte.
#[test]
fn many_connections_at_once() {
    for script in scripts() {
        let nic = Arc::new(FakeNic::new(script));
        let spec = RouterSpec::of(2).over(nic.clone());
        let bed = Bed::guests(&spec, &GuestConfig { memory_size: 64 << 20, ..GuestConfig::default() });
        let (x, y) = bed.two();
        std::thread::scope(|scope| {
            for seed in 0..8u64 {
                scope.spawn(move || {
                    let (a, b) = Rc::pair(x, y, 64 << 10).unwrap();
                    let mut rng = Rng::new(seed);
                    for id in 0..100 {
                        let bytes = rng.bytes(1 + (seed as usize * 997 + id as usize * 131) % 5000);
                        let (from, to) = if id % 2 == 0 { (&a, &b) } else { (&b, &a) };
                        from.mr.write(0, &bytes);
                        to.qp.post_recv(id, &[to.mr.sge(8192, 8192)]).unwrap();
                        from.qp.post(SendWr::new(id, Op::Send, &[from.mr.sge(0, bytes.len())])).unwrap();
                        from.cq.next().ok();
                        let wc = to.cq.next().ok();
                        assert_eq!((wc.wr_id(), to.mr.read(8192, wc.byte_len())), (id, bytes));
                    }
                });
            }
        });
        assert_eq!((nic.counts().sent, nic.counts().not_ready), (800, 0));
    }
}
