//! Many of everything: queue pairs, memory regions, virtual NICs and workers.
#![allow(missing_docs, reason = "a test program")]

use std::collections::HashSet;
use std::time::Duration;

use freeflow_router::config::EngineSettings;
use freeflow_tests::bed::Bed;
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{Mr, MrSpec, Op, Qp, QpSpec, Rc, RcOptions, SendWr, connect_side};
use freeflow_tests::guest::{Guest, GuestConfig};
use freeflow_tests::router::{Objects, RouterSpec, is_spread};

/// Guests on a router with four workers; a virtual NIC uses this many of them.
fn bed(nics: usize, nic_workers: u16, memory_size: u64) -> Bed {
    let engine = EngineSettings { workers: 4, ..EngineSettings::default() };
    let spec = RouterSpec { engine, nic_workers: Some(nic_workers), vectors: 1, ..RouterSpec::of(nics) };
    Bed::guests(&spec, &GuestConfig { memory_size, rings: Placement::Contiguous, ..GuestConfig::default() })
}

/// Guests go as if they were killed; their virtual NICs have nothing left then.
fn end(bed: &Bed) {
    bed.guests.iter().for_each(Guest::disconnect);
    (0..bed.guests.len()).for_each(|nic| bed.router.wait_objects(nic, Objects::default()));
}

/// A region in which every eight bytes have a value of their own.
fn numbered(end: &Rc, count: usize) -> &Mr {
    (0..count).for_each(|i| end.mr.write(8 * i, &number(i)));
    &end.mr
}

fn number(i: usize) -> [u8; 8] {
    (0x5eed_0000_0000 + i as u64 * 7).to_le_bytes()
}

#[test]
fn ten_thousand_qps_are_active_at_once() {
    const COUNT: usize = 10_000;
    let bed = bed(2, 4, 256 << 20);
    let (guest_a, guest_b) = bed.two();
    let (a, b) =
        (Rc::new(guest_a, QpSpec::rc(), 8 * COUNT).unwrap(), Rc::new(guest_b, QpSpec::rc(), 8 * COUNT).unwrap());
    let (cq_a, cq_b) = (guest_a.create_cq(COUNT as u32).unwrap(), guest_b.create_cq(COUNT as u32).unwrap());
    let spec = QpSpec { inline: 0, ..QpSpec::rc().depth(3) };
    let qps = a.pd.create_qps(&spec, &cq_a, COUNT).unwrap();
    let peers = b.pd.create_qps(&spec, &cq_b, COUNT).unwrap();
    assert_eq!(qps.iter().map(Qp::number).collect::<HashSet<_>>().len(), COUNT);
    connect_side(&qps, &peers, &RcOptions::default()).unwrap();
    connect_side(&peers, &qps, &RcOptions::default()).unwrap();
    assert_eq!(bed.router.objects(0).qps, COUNT + 1);

    let from = numbered(&a, COUNT);
    for (i, qp) in qps.iter().enumerate() {
        let to = Op::WriteImm(b.mr.remote(8 * i), i as u32);
        peers[i].post_recv(i as u64, &[]).unwrap();
        qp.post(SendWr::new(i as u64, to, &[from.sge(8 * i, 8)])).unwrap();
    }
    let (sent, received) = (cq_a.take(COUNT), cq_b.take(COUNT));
    let ids = |wcs: &[freeflow_tests::guest::verbs::Wc]| wcs.iter().map(|wc| wc.ok().wr_id()).collect::<HashSet<_>>();
    assert_eq!((ids(&sent).len(), ids(&received).len()), (COUNT, COUNT));
    assert!(received.iter().all(|wc| wc.imm() == Some(wc.wr_id() as u32)));
    assert_eq!(b.mr.read(0, 8 * COUNT), (0..COUNT).flat_map(number).collect::<Vec<_>>());
    end(&bed);
}

#[test]
fn a_hundred_thousand_regions_work_and_go() {
    const COUNT: usize = 100_000;
    let bed = bed(2, 1, 64 << 20);
    let (a, b) = bed.pair(4096);
    let page = bed.guests[1].alloc(4096).unwrap();
    let mut regions = b.pd.reg_many(&MrSpec::whole(&page), COUNT).unwrap();
    assert_eq!(regions.iter().map(Mr::key).collect::<HashSet<_>>().len(), COUNT);
    assert_eq!(bed.router.objects(1).mrs, COUNT + 1);

    let from = numbered(&a, 512);
    for (turn, region) in regions.iter().step_by(197).enumerate() {
        let at = 8 * (turn % 512);
        a.qp.post(SendWr::new(1, Op::Write(region.remote(at)), &[from.sge(at, 8)])).unwrap();
        a.cq.next().ok();
        assert_eq!(region.read(at, 8), number(turn % 512));
    }
    // One of them goes; its neighbours stay.
    let mut gone = regions.swap_remove(COUNT / 2);
    gone.dereg().unwrap();
    a.qp.post(SendWr::new(1, Op::Write(regions[COUNT / 2].remote(0)), &[from.sge(0, 8)])).unwrap();
    a.cq.next().ok();
    a.qp.post(SendWr::new(1, Op::Write(gone.remote(0)), &[from.sge(0, 8)])).unwrap();
    assert_eq!(a.cq.next().status(), virtio_rdma::ib::WcStatus::RemAccessErr);
    end(&bed);
}

/// Every guest sends to the next and writes to the one after that, all at once.
fn around(nics: usize, nic_workers: u16) {
    const LEN: usize = 8192;
    let bed = bed(nics, nic_workers, 16 << 20);
    let pairs = |step: usize| {
        let to = |from: usize| &bed.guests[(from + step) % nics];
        (0..nics).map(|from| Rc::pair(&bed.guests[from], to(from), LEN).unwrap()).collect::<Vec<_>>()
    };
    let (sends, writes) = (pairs(1), pairs(2));
    for (i, (a, b)) in sends.iter().chain(&writes).enumerate() {
        a.mr.fill(0, LEN, i as u8);
        b.qp.post_recv(i as u64, &[b.mr.sge_all()]).unwrap();
    }
    for (a, _) in &sends {
        a.qp.post(SendWr::new(0, Op::Send, &[a.mr.sge_all()])).unwrap();
    }
    for (i, (a, b)) in writes.iter().enumerate() {
        a.qp.post(SendWr::new(0, Op::WriteImm(b.mr.remote(0), i as u32), &[a.mr.sge_all()])).unwrap();
    }
    for (i, (a, b)) in sends.iter().chain(&writes).enumerate() {
        a.cq.next().ok();
        let got = b.cq.poll_for(Duration::from_secs(20)).expect("a receive").ok();
        assert_eq!((got.wr_id(), got.byte_len()), (i as u64, LEN));
        assert_eq!(b.mr.read(0, LEN), [i as u8; LEN]);
    }
    drop((sends, writes));
    end(&bed);
}

#[test]
fn sixty_four_virtual_nics_are_spread_over_four_workers() {
    // A host for each has threads of its own: fewer of them.
    around(if is_spread() { 12 } else { 64 }, 1);
}

#[test]
fn sixteen_virtual_nics_use_four_workers_each() {
    around(if is_spread() { 6 } else { 16 }, 4);
}
