//! Connected transports over the host's NIC, which a fake one plays.
#![allow(missing_docs, reason = "a test program")]

use std::sync::Arc;

use freeflow_backend::verbs::fake::{Counts, FakeNic, Script};
use freeflow_tests::bed::Bed;
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{Op, SendWr};
use freeflow_tests::rng::Rng;
use freeflow_tests::router::RouterSpec;
use virtio_rdma::ib::{WcOpcode, WcStatus};

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
        std::thread::sleep(std::time::Duration::from_millis(2));
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
