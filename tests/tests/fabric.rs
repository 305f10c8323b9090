//! Connected transports between two hosts, over NICs of both on the same network, which fake ones play.
#![allow(missing_docs, reason = "a test program")]

use std::sync::Arc;
use std::time::Duration;

use freeflow_backend::verbs::fake::{FakeNic, Script};
use freeflow_tests::bed::{Bed, eventually};
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{MrSpec, Op, Rc, Remote, SendWr, Wc};
use freeflow_tests::mesh::Network;
use freeflow_tests::rng::Rng;
use freeflow_tests::router::{Hosts, RouterSpec};
use virtio_rdma::ctrl::Status;
use virtio_rdma::ib::{Access, QpState, WcOpcode, WcStatus};

const SOON: Duration = Duration::from_secs(10);

fn bed(script: Script) -> (Arc<FakeNic>, Bed) {
    let nic = Arc::new(FakeNic::new(script));
    let bed = Bed::with(&RouterSpec::of(2).between(nic.clone()), Placement::Contiguous);
    (nic, bed)
}

fn scripts() -> [Script; 3] {
    [Script::default(), Script::shuffled(1), Script::shuffled(2)]
}

#[test]
fn a_write_goes_from_nic_to_nic() {
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
        assert_eq!(paths, ["verbs"]);
    }
}

#[test]
fn a_send_finds_its_receive_on_the_peers_nic() {
    for script in scripts() {
        let (nic, bed) = bed(script);
        let (a, b) = bed.pair(8192);
        for i in 0..4u8 {
            a.mr.fill(1000 * usize::from(i), 500, i + 1);
            let sge = a.mr.sge(1000 * usize::from(i), 500);
            a.qp.post(SendWr::new(10 + u64::from(i), Op::SendImm(i.into()), &[sge])).unwrap();
        }
        // Nobody waits on the NIC for a receive: what has none is not given to it.
        std::thread::sleep(Duration::from_millis(30));
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

/// Paths of the queue pairs of the first host that have sent something, and why these.
fn paths(bed: &Bed) -> Vec<(String, String)> {
    let qps = bed.router.router().qps();
    qps.into_iter().filter_map(|qp| Some((qp.path?, qp.why.unwrap_or_default()))).collect()
}

fn write_over(bed: &Bed) -> Vec<(String, String)> {
    let (a, b) = bed.pair(4096);
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x")).unwrap();
    a.cq.next().ok();
    assert_eq!(b.mr.read(0, 1), b"x");
    paths(bed)
}

#[test]
fn messages_in_lists_are_asked_receives_for_together_and_their_bytes_not_touched() {
    let (nic, bed) = bed(Script::default());
    let (a, b) = bed.pair(1 << 16);
    for round in 0..10 {
        (0..64).for_each(|i| b.qp.post_recv(64 * round + i, &[b.mr.sge(1000 * i as usize, 1000)]).unwrap());
        let sge = [a.mr.sge(0, 1000)];
        let list: Vec<_> = (0..64).map(|i| SendWr::new(64 * round + i, Op::Send, &sge)).collect();
        a.qp.post_send(&list).unwrap();
        let (sent, got) = (a.cq.take(64), b.cq.take(64));
        assert!(sent.iter().chain(&got).all(|wc| wc.status() == WcStatus::Success), "{round}");
        assert!(got.iter().map(Wc::wr_id).eq(64 * round..64 * (round + 1)), "in order");
    }
    let counters = bed.router.status(0).counters;
    assert_eq!((nic.counts().sent, counters.nic_wqes, counters.copied_bytes), (640, 640, 0));
}

#[test]
fn a_key_that_is_gone_is_refused_and_the_next_one_found() {
    let (_nic, bed) = bed(Script::default());
    let (a, b) = bed.pair(4096);
    let write = |key: Remote| {
        a.qp.post(SendWr::inline(1, Op::Write(key), b"x")).unwrap();
        a.cq.next().status()
    };
    let (first, second) = (b.pd.reg_new(4096).unwrap(), b.pd.reg_new(4096).unwrap());
    assert_eq!((write(first.remote(0)), write(second.remote(0))), (WcStatus::Success, WcStatus::Success));
    let gone = first.remote(0);
    drop(first);
    assert_eq!(write(second.remote(8)), WcStatus::Success);
    assert_eq!(write(gone), WcStatus::RemAccessErr);
}

#[test]
fn a_host_without_a_nic_and_one_on_another_network_are_reached_over_tcp() {
    let nic = Arc::new(FakeNic::new(Script::default()));
    let one_without = RouterSpec { off_nic: 1, ..RouterSpec::of(2).between(nic.clone()) };
    let bed = Bed::with(&one_without, Placement::Contiguous);
    assert_eq!(write_over(&bed)[0].0, "tcp");
    assert_eq!(nic.counts().sent, 0);
}

/// Returns when hosts have heard of it.
fn set_link(nic: &FakeNic, up: bool) {
    nic.set_link(up);
    eventually("hearing of it", SOON, || !nic.has_trouble());
    // What is heard is done at once.
    std::thread::sleep(Duration::from_millis(50));
}

#[test]
fn without_a_link_new_connections_go_over_tcp_and_with_one_again_over_the_nic() {
    let (nic, bed) = bed(Script::default());
    let first = bed.pair(4096);
    let go = |(a, b): &(Rc, Rc)| {
        a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x")).unwrap();
        a.cq.next().ok();
        nic.counts().sent
    };
    assert_eq!(go(&first), 1);
    set_link(&nic, false);
    let second = bed.pair(4096);
    assert_eq!((go(&second), go(&first), go(&second)), (1, 2, 2), "a queue pair keeps its way");
    set_link(&nic, true);
    let third = bed.pair(4096);
    assert_eq!(go(&third), 3);
}

#[test]
fn a_queue_pair_that_breaks_on_one_nic_fails_at_both_ends() {
    let (nic, bed) = bed(Script::default());
    let (a, b) = bed.pair(4096);
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x")).unwrap();
    a.cq.next().ok();
    nic.qps().into_iter().for_each(|number| nic.break_qp(number));
    for end in [&a, &b] {
        eventually("the failure", SOON, || end.qp.state().unwrap() == QpState::Err);
    }
    assert_eq!(write_over(&bed)[0].0, "verbs", "others are not concerned");
}

/// The NIC tells of the queue pair's end in two ways, and the one that says less may be heard first.
#[test]
fn a_receive_that_is_too_short_is_not_taken_for_one_that_was_flushed() {
    let (_nic, bed) = bed(Script::default());
    for _ in 0..100 {
        let (a, b) = bed.pair(4096);
        for id in 1..3 {
            b.qp.post_recv(id, &[b.mr.sge(0, 9)]).unwrap();
        }
        a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, 10)])).unwrap();
        assert_eq!(a.cq.next().status(), WcStatus::RemInvReqErr);
        let ends = [b.cq.next(), b.cq.next()].map(|wc| (wc.wr_id(), wc.status()));
        assert_eq!(ends, [(1, WcStatus::LocLenErr), (2, WcStatus::WrFlushErr)]);
    }
}

/// Its key is the same, what it stands for is not: who was told before must have heard that when the guest is answered. Notes get lost with the
/// connections.
#[test]
fn a_region_that_changes_is_what_it_is_now_to_the_other_host() {
    for network in [Network::Good, Network::Cut] {
        let spec = RouterSpec {
            hosts: Hosts::Each(network),
            ..RouterSpec::of(2).over(Arc::new(FakeNic::new(Script::default())))
        };
        let bed = Bed::with(&spec, Placement::Contiguous);
        let (a, mut b) = bed.pair(4096);
        let bufs = [0, 1].map(|_| bed.guests[1].alloc(4096).unwrap());
        for round in 0..100u8 {
            let buf = &bufs[usize::from(round % 2)];
            b.mr.rereg_memory(MrSpec::whole(buf).iova(0x1000)).unwrap();
            a.mr.fill(0, 8, round);
            a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(8)), &[a.mr.sge(0, 8)])).unwrap();
            a.cq.next().ok();
            assert_eq!(buf.read_vec(8, 8), [round; 8]);
        }
    }
}

/// One goes over the NICs, the next, whose memory is not for them, does not: the second may be there before the first one's completion was looked at.
#[test]
fn receives_of_messages_that_go_different_ways_complete_in_their_order() {
    let (nic, bed) = bed(Script::default());
    // Several at once, so that workers have something else to do in between.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| alternate(&bed, 500));
        }
    });
    assert_eq!(nic.counts().sent, 4 * 500);
}

fn alternate(bed: &Bed, rounds: usize) {
    let (a, b) = bed.pair(4096);
    let buf = bed.guests[0].alloc(8192).unwrap();
    let paged = a.pd.reg_on_demand(&buf, 0, 4096, Access::LOCAL_WRITE).unwrap();
    assert_eq!(paged.map(0..1, true), Status::Ok);
    for round in 0..rounds {
        (0..2).for_each(|id| b.qp.post_recv(id, &[b.mr.sge(0, 64)]).unwrap());
        let sges = [[a.mr.sge(0, 8)], [paged.sge(0, 8)]];
        let wrs = [1, 2].map(|n| SendWr::new(n, Op::SendImm(n as u32), &sges[n as usize - 1]));
        a.qp.post_send(&wrs).unwrap();
        let got = [b.cq.next().ok(), b.cq.next().ok()].map(|wc| (wc.wr_id(), wc.imm()));
        assert_eq!(got, [(0, Some(1)), (1, Some(2))], "round {round}");
        a.cq.take(2);
    }
}

#[test]
fn a_host_that_leaves_takes_its_connections_with_it() {
    let (nic, bed) = bed(Script::default());
    let (a, b) = bed.pair(4096);
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x")).unwrap();
    a.cq.next().ok();
    bed.router.mesh().leave(0, 1);
    eventually("the failure", SOON, || a.qp.state().unwrap() == QpState::Err);
    eventually("its end on the NIC", SOON, || nic.qps().len() == 1);
}

/// What waits for a receive is not begun while the queue is drained, however long that is.
#[test]
fn a_drained_queue_pair_goes_on_where_it_was() {
    let (nic, bed) = bed(Script::default());
    let (a, b) = bed.pair(4096);
    a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, 8)])).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    a.qp.modify_state(QpState::Sqd).unwrap();
    // Longer than all tries to reach a peer take.
    assert!(a.cq.poll_for(Duration::from_secs(1)).is_none());
    b.qp.post_recv(2, &[b.mr.sge(0, 8)]).unwrap();
    a.qp.modify_state(QpState::Rts).unwrap();
    assert_eq!((a.cq.next().status(), b.cq.next().status()), (WcStatus::Success, WcStatus::Success));
    assert_eq!(nic.counts().sent, 1);
}

#[test]
fn two_guests_that_are_stopped_at_once_stay_connected() {
    let (_nic, bed) = bed(Script::default());
    let (a, b) = bed.pair(4096);
    let write = |from: &Rc, to: &Rc| {
        from.qp.post(SendWr::inline(1, Op::Write(to.mr.remote(0)), b"x")).unwrap();
        from.cq.next().status()
    };
    assert_eq!((write(&a, &b), write(&b, &a)), (WcStatus::Success, WcStatus::Success));
    let bases: Vec<_> = bed.guests.iter().map(|guest| guest.stop_queues().unwrap()).collect();
    bed.guests.iter().zip(&bases).for_each(|(guest, bases)| guest.start_queues_at(bases).unwrap());
    assert_eq!((write(&a, &b), write(&b, &a)), (WcStatus::Success, WcStatus::Success));
}

#[test]
fn nothing_stays_on_the_nics() {
    let (nic, bed) = bed(Script::default());
    {
        let (a, b) = bed.pair(4096);
        b.qp.post_recv(1, &[b.mr.sge(0, 8)]).unwrap();
        a.qp.post(SendWr::new(1, Op::Send, &[a.mr.sge(0, 8)])).unwrap();
        a.cq.next().ok();
        assert_eq!((nic.counts().pds, nic.counts().mrs, nic.counts().qps), (2, 2, 2));
    }
    drop(bed);
    eventually("all is gone", SOON, || {
        let counts = nic.counts();
        (counts.pds, counts.mrs, counts.cqs, counts.qps) == (0, 0, 0, 0)
    });
}
