//! Datagrams.
#![allow(missing_docs, reason = "a test program")]

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use freeflow_tests::bed::Bed;
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{Ah, AhAttr, Cq, Mr, MrSpec, Op, Pd, Qp, QpSpec, SendWr};
use freeflow_tests::guest::{Gid, Guest};
use freeflow_tests::router::RouterSpec;
use virtio_rdma::area::AddressHandle;
use virtio_rdma::ib::{Access, QpState, WcFlags, WcOpcode, WcStatus};
use virtio_rdma::ring::{GRH_SIZE, SL_ROCE_V2_IPV4, SL_ROCE_V2_IPV6};

const QKEY: u32 = 0x1122_3344;
/// Long enough for a datagram to have come if it were to come.
const A_WHILE: Duration = Duration::from_millis(60);

struct End {
    qp: Qp,
    cq: Cq,
    mr: Mr,
    pd: Pd,
}

impl End {
    fn new(guest: &Guest, qkey: u32) -> Self {
        let pd = guest.alloc_pd().unwrap();
        let cq = guest.create_cq(256).unwrap();
        let mr = pd.reg_new(64 << 10).unwrap();
        let qp = pd.create_qp(QpSpec::ud(), &cq).unwrap();
        qp.to_ud(qkey).unwrap();
        Self { qp, cq, mr, pd }
    }

    fn gid(&self, index: u16) -> Gid {
        self.pd.guest().gids()[usize::from(index)]
    }

    fn ah_to(&self, peer: &Self, index: u16) -> Ah {
        self.pd.create_ah(AhAttr::to(peer.gid(index), index)).unwrap()
    }

    fn recv(&self, id: u64, len: usize) {
        self.qp.post_recv(id, &[self.mr.sge(32 << 10, len)]).unwrap();
    }

    fn received(&self, len: usize) -> Vec<u8> {
        self.mr.read(32 << 10, len)
    }

    fn send(&self, ah: &Ah, peer: &Self, qkey: u32, len: usize) {
        let op = Op::UdSend { ah: ah.number(), qpn: peer.qp.number(), qkey, imm: None };
        self.qp.post(SendWr::new(1, op, &[self.mr.sge(0, len)])).unwrap();
    }
}

fn ends(bed: &Bed) -> (End, End) {
    let (a, b) = bed.two();
    (End::new(a, QKEY), End::new(b, QKEY))
}

#[test]
fn datagram_with_ipv4_header() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let ah = a.ah_to(&b, 1);
    b.recv(9, 4096);
    a.mr.write(0, b"datagram");
    a.send(&ah, &b, QKEY, 8);
    assert_eq!(a.cq.next().ok().opcode(), WcOpcode::Send);
    let wc = b.cq.next().ok();
    assert_eq!((wc.wr_id(), wc.opcode(), wc.byte_len()), (9, WcOpcode::Recv, GRH_SIZE + 8));
    assert_eq!(wc.0.src_qp.get(), a.qp.number());
    assert!(wc.flags().contains(WcFlags::GRH));
    assert_eq!(wc.0.sl, SL_ROCE_V2_IPV4);
    let bytes = b.received(GRH_SIZE + 8);
    assert_eq!(bytes[..20], [0; 20]);
    assert_eq!(bytes[20], 0x45);
    assert_eq!(bytes[32..36], a.gid(1)[12..]);
    assert_eq!(bytes[36..40], b.gid(1)[12..]);
    assert_eq!(&bytes[40..], b"datagram");
}

#[test]
fn datagram_with_ipv6_header() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    for index in [0, 2] {
        let attr = AhAttr { flow_label: 0x12345, traffic_class: 0x28, hop_limit: 7, ..AhAttr::to(b.gid(index), index) };
        let ah = a.pd.create_ah(attr).unwrap();
        b.recv(9, 4096);
        a.send(&ah, &b, QKEY, 100);
        a.cq.next().ok();
        let wc = b.cq.next().ok();
        assert_eq!((wc.byte_len(), wc.0.sl), (GRH_SIZE + 100, SL_ROCE_V2_IPV6));
        let grh = b.received(GRH_SIZE);
        assert_eq!(grh[..4], 0x6281_2345u32.to_be_bytes());
        assert_eq!(grh[7], 7);
        assert_eq!(grh[8..24], a.gid(index));
        assert_eq!(grh[24..40], b.gid(index));
    }
}

#[test]
fn immediate_data_and_inline() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let ah = a.ah_to(&b, 1);
    b.recv(1, 4096);
    let op = Op::UdSend { ah: ah.number(), qpn: b.qp.number(), qkey: QKEY, imm: Some(77) };
    a.qp.post(SendWr::inline(1, op, b"inline")).unwrap();
    a.cq.next().ok();
    let wc = b.cq.next().ok();
    assert_eq!((wc.imm(), wc.byte_len()), (Some(77), GRH_SIZE + 6));
    assert_eq!(&b.received(GRH_SIZE + 6)[GRH_SIZE..], b"inline");
}

/// Who sends datagrams and ends (`mckey`) waits for no completion: a NIC has sent them by then. The worker sleeps here, and has to be woken first.
#[test]
fn what_was_posted_is_sent_though_its_queue_pair_is_destroyed_at_once() {
    const COUNT: usize = 64;
    let mut spec = RouterSpec::of(2);
    spec.engine.poll_us = 0;
    let bed = Bed::with(&spec, Placement::Contiguous);
    for _ in 0..50 {
        let (a, b) = ends(&bed);
        let ah = a.ah_to(&b, 1);
        (0..COUNT).for_each(|id| b.recv(id as u64, 4096));
        (0..COUNT).for_each(|_| a.send(&ah, &b, QKEY, 8));
        a.qp.destroy().unwrap();
        b.cq.take(COUNT);
    }
}

/// Those that cannot be sent are not waited for for long, however many queue pairs have some.
#[test]
fn what_cannot_be_sent_does_not_keep_queue_pairs() {
    let mut spec = RouterSpec::of(2);
    spec.rates.ops = NonZeroU64::new(1);
    let bed = Bed::with(&spec, Placement::Contiguous);
    let b = End::new(&bed.guests[1], QKEY);
    let queues: Vec<_> = (0..40)
        .map(|_| {
            let end = End::new(&bed.guests[0], QKEY);
            let ah = end.ah_to(&b, 1);
            (0..2).for_each(|_| end.send(&ah, &b, QKEY, 8));
            (end, ah)
        })
        .collect();
    let started = Instant::now();
    for (end, _ah) in queues {
        end.qp.destroy().unwrap();
    }
    assert!(started.elapsed() < Duration::from_millis(1500), "200 ms each would be 8 s: {:?}", started.elapsed());
}

#[test]
fn header_and_payload_across_sges() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let ah = a.ah_to(&b, 1);
    a.mr.write(0, b"0123456789");
    b.qp.post_recv(1, &[b.mr.sge(0, 13), b.mr.sge(100, 30), b.mr.sge(200, 100)]).unwrap();
    a.send(&ah, &b, QKEY, 10);
    a.cq.next().ok();
    assert_eq!(b.cq.next().ok().byte_len(), 50);
    assert_eq!(b.mr.read(127, 3), b"012");
    assert_eq!(b.mr.read(200, 8), b"3456789\0");
}

#[test]
fn nothing_but_a_header() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let ah = a.ah_to(&b, 1);
    b.recv(1, GRH_SIZE);
    a.send(&ah, &b, QKEY, 0);
    a.cq.next().ok();
    assert_eq!(b.cq.next().ok().byte_len(), GRH_SIZE);
}

#[test]
fn wrong_qkey_is_dropped() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let ah = a.ah_to(&b, 1);
    b.recv(1, 4096);
    a.send(&ah, &b, QKEY + 1, 8);
    a.cq.next().ok();
    assert!(b.cq.poll_for(A_WHILE).is_none());
    a.send(&ah, &b, QKEY, 8);
    a.cq.next().ok();
    assert_eq!(b.cq.next().ok().wr_id(), 1);
}

#[test]
fn top_bit_means_the_own_qkey() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let (a, b) = (End::new(guest_a, 0x8765_4321), End::new(guest_b, 0x8765_4321));
    let ah = a.ah_to(&b, 1);
    b.recv(1, 4096);
    a.send(&ah, &b, 0xffff_ffff, 8);
    a.cq.next().ok();
    b.cq.next().ok();
}

#[test]
fn nobody_there_is_dropped() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let (right, elsewhere) = (a.ah_to(&b, 1), a.pd.create_ah(AhAttr::to([9; 16], 1)).unwrap());
    b.recv(1, 4096);
    a.send(&elsewhere, &b, QKEY, 8);
    a.cq.next().ok();
    let op = Op::UdSend { ah: right.number(), qpn: b.qp.number() ^ 1, qkey: QKEY, imm: None };
    a.qp.post(SendWr::new(1, op, &[a.mr.sge(0, 8)])).unwrap();
    a.cq.next().ok();
    assert!(b.cq.poll_for(A_WHILE).is_none());
}

#[test]
fn without_a_receive_it_is_dropped_in_the_end() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let ah = a.ah_to(&b, 1);
    for _ in 0..20 {
        a.send(&ah, &b, QKEY, 8);
    }
    a.cq.take(20).iter().for_each(|wc| assert_eq!(wc.status(), WcStatus::Success));
    std::thread::sleep(A_WHILE);
    b.recv(5, 4096);
    assert!(b.cq.poll_for(A_WHILE).is_none());
}

#[test]
fn up_to_the_mtu_and_no_further() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let ah = a.ah_to(&b, 1);
    let mtu = 128usize << bed.guests[0].config().active_mtu;
    b.recv(1, GRH_SIZE + mtu);
    a.send(&ah, &b, QKEY, mtu);
    a.cq.next().ok();
    assert_eq!(b.cq.next().ok().byte_len(), GRH_SIZE + mtu);
    a.send(&ah, &b, QKEY, mtu + 1);
    // Not an error of the request: it is just not sent (IBA C10-93.1.1).
    a.cq.next().ok();
    b.recv(2, 2 * mtu);
    assert!(b.cq.poll_for(A_WHILE).is_none());
    assert_eq!(a.qp.state().unwrap(), QpState::Rts);
}

#[test]
fn receive_too_small() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let ah = a.ah_to(&b, 1);
    b.recv(1, GRH_SIZE + 7);
    a.send(&ah, &b, QKEY, 8);
    a.cq.next().ok();
    // Either it is dropped, or the receive says that it was too small: never a truncated success.
    if let Some(wc) = b.cq.poll_for(A_WHILE) {
        assert_eq!(wc.status(), WcStatus::LocLenErr);
    }
}

#[test]
fn bad_address_handles() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let other_pd = a.pd.guest().alloc_pd().unwrap();
    let foreign = other_pd.create_ah(AhAttr::to(b.gid(1), 1)).unwrap();
    let freed = a.ah_to(&b, 1).number();
    let beyond = a.pd.guest().attr().max_ah.get();
    for ah in [0, foreign.number(), freed, beyond, u32::MAX] {
        let op = Op::UdSend { ah, qpn: b.qp.number(), qkey: QKEY, imm: None };
        a.qp.post(SendWr::new(1, op, &[a.mr.sge(0, 8)])).unwrap();
        assert_eq!(a.cq.next().status(), WcStatus::LocQpOpErr, "handle {ah}");
        assert_eq!(a.qp.state().unwrap(), QpState::Sqe);
        a.qp.modify_state(QpState::Rts).unwrap();
    }
}

#[test]
fn rubbish_in_an_address_handle() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let ah = a.ah_to(&b, 1);
    let record = AddressHandle {
        flags: 1,
        port_num: 1,
        sgid_index: 0xffff.into(),
        pdn: a.pd.number().into(),
        dgid: b.gid(1),
        ..AddressHandle::default()
    };
    a.pd.guest().ahs().write(ah.number(), record);
    b.recv(1, 4096);
    a.send(&ah, &b, QKEY, 8);
    a.cq.next();
    assert!(b.cq.poll_for(A_WHILE).is_none(), "a source GID that there is not");
}

#[test]
fn local_error_stops_sending_not_receiving() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let (ah, back) = (a.ah_to(&b, 1), b.ah_to(&a, 1));
    let op = Op::UdSend { ah: ah.number(), qpn: b.qp.number(), qkey: QKEY, imm: None };
    let bad = [freeflow_tests::guest::verbs::Sge { lkey: 0x7777, ..a.mr.sge(0, 8) }];
    a.qp.post_send(&[SendWr::new(1, op, &bad), SendWr::new(2, op, &[a.mr.sge(0, 8)])]).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::LocProtErr);
    assert_eq!(a.cq.next().status(), WcStatus::WrFlushErr);
    a.recv(3, 4096);
    b.send(&back, &a, QKEY, 8);
    b.cq.next().ok();
    assert_eq!(a.cq.next().ok().wr_id(), 3);
    a.qp.modify_state(QpState::Rts).unwrap();
    b.recv(4, 4096);
    a.send(&ah, &b, QKEY, 8);
    a.cq.next().ok();
    b.cq.next().ok();
}

#[test]
fn receive_into_a_region_without_local_write() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    let ah = a.ah_to(&b, 1);
    let buf = b.pd.guest().alloc(4096).unwrap();
    let mr = b.pd.reg_spec(MrSpec::whole(&buf).access(Access::empty())).unwrap();
    b.qp.post_recv(1, &[mr.sge(0, 4096)]).unwrap();
    a.send(&ah, &b, QKEY, 8);
    a.cq.next().ok();
    assert_eq!(b.cq.next().status(), WcStatus::LocProtErr);
    assert_eq!(mr.read(0, 64), [0; 64]);
}

#[test]
fn rdma_over_datagrams_is_refused() {
    let bed = Bed::new(2);
    let (a, b) = ends(&bed);
    for op in [Op::Write(b.mr.remote(0)), Op::Read(b.mr.remote(0)), Op::WriteImm(b.mr.remote(0), 1)] {
        a.qp.post(SendWr::new(1, op, &[a.mr.sge(0, 8)])).unwrap();
        assert_eq!(a.cq.next().status(), WcStatus::LocQpOpErr);
        a.qp.modify_state(QpState::Rts).unwrap();
    }
}

#[test]
fn many_datagrams_between_many() {
    let bed = Bed::new(3);
    let ends: Vec<End> = bed.guests.iter().map(|g| End::new(g, QKEY)).collect();
    for round in 0..50u64 {
        for from in &ends {
            for to in &ends {
                let ah = from.ah_to(to, 1);
                to.recv(round, 4096);
                from.send(&ah, to, QKEY, 64);
                let (x, y) = (from.cq.next().ok(), to.cq.next().ok());
                let opcodes = [x.opcode(), y.opcode()];
                assert!(opcodes.contains(&WcOpcode::Send) || !std::ptr::eq(from, to));
            }
        }
    }
}
