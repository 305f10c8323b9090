//! Data over reliable connections.
#![allow(missing_docs, reason = "a test program")]

use std::sync::atomic::Ordering::Acquire;
use std::time::{Duration, Instant};

use freeflow_router::config::EngineSettings;
use freeflow_tests::bed::Bed;
use freeflow_tests::guest::GuestConfig;
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{MrSpec, Op, QpSpec, Rc, RcOptions, SendWr, Sge, Wc, connect};
use freeflow_tests::rng::Rng;
use freeflow_tests::router::RouterSpec;
use virtio_rdma::ib::{QpState, SendFlags, WcOpcode, WcStatus};

#[test]
fn write_moves_bytes() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(8192);
    let bytes = Rng::new(1).bytes(5000);
    a.mr.write(100, &bytes);
    a.qp.post(SendWr::new(7, Op::Write(b.mr.remote(33)), &[a.mr.sge(100, 5000)])).unwrap();
    let wc = a.cq.next().ok();
    assert_eq!((wc.wr_id(), wc.opcode(), wc.qpn()), (7, WcOpcode::RdmaWrite, a.qp.number()));
    assert_eq!(b.mr.read(33, 5000), bytes);
    assert_eq!(b.mr.read(0, 33), [0; 33]);
    assert_eq!(b.mr.read(5033, 8192 - 5033), vec![0; 8192 - 5033]);
    assert!(b.cq.poll().is_none(), "the responder sees no completion");
}

#[test]
fn write_with_imm_takes_a_receive() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    a.mr.fill(0, 64, 0x42);
    b.qp.post_recv(99, &[]).unwrap();
    a.qp.post(SendWr::new(1, Op::WriteImm(b.mr.remote(0), 0x0102_0304), &[a.mr.sge(0, 64)])).unwrap();
    assert_eq!(a.cq.next().ok().opcode(), WcOpcode::RdmaWrite);
    let wc = b.cq.next().ok();
    assert_eq!((wc.wr_id(), wc.opcode(), wc.byte_len()), (99, WcOpcode::RecvRdmaWithImm, 64));
    assert_eq!((wc.imm(), wc.qpn()), (Some(0x0102_0304), b.qp.number()));
    assert_eq!(b.mr.read(0, 65), [vec![0x42; 64], vec![0]].concat());
}

/// Of the requests that follow a SEND most need no receive: those taken ahead for them are for later messages, or are flushed.
#[test]
fn receives_that_were_taken_ahead_keep_their_order() {
    const POSTED: u64 = 60;
    const LISTS: u64 = 7;
    let engine = EngineSettings { workers: 1, ..EngineSettings::default() };
    let spec = RouterSpec { engine, ..RouterSpec::of(2) };
    for at_once in [true, false] {
        let bed = Bed::guests(&spec, &GuestConfig::default());
        let (a, b) = bed.pair(64);
        for n in 0..POSTED {
            b.qp.post_recv(n, &[b.mr.sge(0, 8)]).unwrap();
        }
        let from = [a.mr.sge(0, 8)];
        let mut list = [SendWr::new(1, Op::Write(b.mr.remote(0)), &from); 16];
        (list[0], list[9]) = (SendWr::new(2, Op::Send, &from), SendWr::new(2, Op::Send, &from));
        for _ in 0..LISTS {
            a.qp.post_send(&list).unwrap();
            if !at_once {
                a.cq.take(list.len());
            }
        }
        let received: Vec<_> = b.cq.take(2 * LISTS as usize).into_iter().map(|wc| wc.ok().wr_id()).collect();
        assert_eq!(received, (0..2 * LISTS).collect::<Vec<_>>());
        b.qp.modify_state(QpState::Err).unwrap();
        let flushed = b.cq.take((POSTED - 2 * LISTS) as usize);
        assert!(flushed.iter().all(|wc| wc.status() == WcStatus::WrFlushErr));
        assert_eq!(flushed.iter().map(Wc::wr_id).collect::<Vec<_>>(), (2 * LISTS..POSTED).collect::<Vec<_>>());
    }
}

#[test]
fn send_fills_receives_in_order() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(8192);
    for i in 0..4 {
        b.qp.post_recv(i, &[b.mr.sge(1000 * i as usize, 1000)]).unwrap();
    }
    for i in 0..4u8 {
        a.mr.fill(1000 * usize::from(i), 1000, i + 1);
        let sge = a.mr.sge(1000 * usize::from(i), 100 * (usize::from(i) + 1));
        a.qp.post(SendWr::new(i.into(), Op::Send, &[sge])).unwrap();
    }
    for i in 0..4u8 {
        let (sent, got) = (a.cq.next().ok(), b.cq.next().ok());
        assert_eq!((sent.wr_id(), sent.opcode()), (i.into(), WcOpcode::Send));
        assert_eq!((got.wr_id(), got.opcode()), (i.into(), WcOpcode::Recv));
        let len = 100 * (usize::from(i) + 1);
        assert_eq!((got.byte_len(), got.imm()), (len, None));
        assert_eq!(b.mr.read(1000 * usize::from(i), len), vec![i + 1; len]);
        assert_eq!(b.mr.read(1000 * usize::from(i) + len, 1000 - len), vec![0; 1000 - len]);
    }
}

#[test]
fn send_with_imm_carries_it() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    b.qp.post_recv(5, &[b.mr.sge(0, 16)]).unwrap();
    a.mr.write(0, b"sixteen bytes ok");
    a.qp.post(SendWr::new(1, Op::SendImm(0xdead_beef), &[a.mr.sge(0, 16)])).unwrap();
    a.cq.next().ok();
    let wc = b.cq.next().ok();
    assert_eq!((wc.imm(), wc.byte_len()), (Some(0xdead_beef), 16));
    assert_eq!(b.mr.read(0, 16), b"sixteen bytes ok");
}

#[test]
fn read_fetches_bytes() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(8192);
    let bytes = Rng::new(2).bytes(4097);
    b.mr.write(17, &bytes);
    a.qp.post(SendWr::new(3, Op::Read(b.mr.remote(17)), &[a.mr.sge(5, 4097)])).unwrap();
    let wc = a.cq.next().ok();
    assert_eq!((wc.opcode(), wc.byte_len()), (WcOpcode::RdmaRead, 4097));
    assert_eq!(a.mr.read(5, 4097), bytes);
    assert_eq!(a.mr.read(0, 5), [0; 5]);
}

#[test]
fn inline_data_need_no_key() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    for len in [0usize, 1, 15, 16, 17, 127, 128] {
        let bytes: Vec<u8> = (0..len as u8).map(|i| i ^ 0x33).collect();
        a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(8)), &bytes)).unwrap();
        a.cq.next().ok();
        assert_eq!(b.mr.read(8, len), bytes);
        b.qp.post_recv(2, &[b.mr.sge(1024, 128)]).unwrap();
        a.qp.post(SendWr::inline(1, Op::Send, &bytes)).unwrap();
        a.cq.next().ok();
        assert_eq!(b.cq.next().ok().byte_len(), len);
        assert_eq!(b.mr.read(1024, len), bytes);
    }
}

#[test]
fn sge_lists_gather_and_scatter() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let sges = guest_a.attr().max_sge.get() as u16;
    let spec = QpSpec::rc().sges(sges);
    let (a, b) = Rc::pair_with(guest_a, guest_b, &spec, 64 << 10, &RcOptions::default()).unwrap();
    let mut rng = Rng::new(3);
    let bytes = rng.bytes(64 << 10);
    a.mr.write(0, &bytes);
    // 1 to 97 bytes each, at odd distances; the receive is cut in other places than the send.
    let cut = |mr: &freeflow_tests::guest::verbs::Mr, step: usize, len: usize| -> Vec<Sge> {
        (0..usize::from(sges)).map(|i| mr.sge(i * step, len + i % 3)).collect()
    };
    let (from, to) = (cut(&a.mr, 1013, 60), cut(&b.mr, 401, 90));
    let sent: Vec<u8> =
        from.iter().enumerate().flat_map(|(i, s)| bytes[i * 1013..][..s.len as usize].to_vec()).collect();
    b.qp.post_recv(1, &to).unwrap();
    a.qp.post(SendWr::new(2, Op::Send, &from)).unwrap();
    a.cq.next().ok();
    assert_eq!(b.cq.next().ok().byte_len(), sent.len());
    let mut rest = &sent[..];
    for (i, sge) in to.iter().enumerate() {
        let n = rest.len().min(sge.len as usize);
        assert_eq!(b.mr.read(i * 401, n), rest[..n]);
        rest = &rest[n..];
    }
    assert!(rest.is_empty());
}

#[test]
fn unsignalled_requests_complete_silently() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    for i in 0..100u8 {
        let flags = if i % 10 == 9 { SendFlags::SIGNALED } else { SendFlags::empty() };
        let wr = SendWr::inline(i.into(), Op::Write(b.mr.remote(usize::from(i))), std::slice::from_ref(&i));
        a.qp.post(wr.flags(flags)).unwrap();
    }
    let ids: Vec<u64> = a.cq.take(10).iter().map(|wc| wc.ok().wr_id()).collect();
    assert_eq!(ids, (0..10).map(|i| i * 10 + 9).collect::<Vec<u64>>());
    assert!(a.cq.poll().is_none());
    assert_eq!(b.mr.read(0, 100), (0..100).collect::<Vec<u8>>());
}

#[test]
fn a_qp_that_signals_all_signals_all() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let spec = QpSpec { signal_all: true, ..QpSpec::rc() };
    let (a, b) = Rc::pair_with(guest_a, guest_b, &spec, 4096, &RcOptions::default()).unwrap();
    let wr = SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x").flags(SendFlags::empty());
    a.qp.post_send(&[wr; 20]).unwrap();
    a.cq.take(20).iter().for_each(|wc| assert_eq!(wc.status(), WcStatus::Success));
}

#[test]
fn zero_length_needs_no_valid_key() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let nowhere = freeflow_tests::guest::verbs::Remote { addr: u64::MAX, rkey: 0xffff_ffff };
    let nothing = Sge { addr: 1, len: 0, lkey: 0x1234 };
    for sges in [&[][..], &[nothing][..]] {
        for op in [Op::Write(nowhere), Op::Read(nowhere)] {
            a.qp.post(SendWr::new(1, op, sges)).unwrap();
            a.cq.next().ok();
        }
        b.qp.post_recv(1, &[nothing]).unwrap();
        b.qp.post_recv(2, &[]).unwrap();
        a.qp.post(SendWr::new(1, Op::Send, sges)).unwrap();
        a.qp.post(SendWr::new(2, Op::WriteImm(nowhere, 9), sges)).unwrap();
        a.cq.take(2).iter().for_each(|wc| assert_eq!(wc.status(), WcStatus::Success));
        let (send, write) = (b.cq.next().ok(), b.cq.next().ok());
        assert_eq!((send.byte_len(), write.byte_len(), write.imm()), (0, 0, Some(9)));
    }
}

#[test]
fn lists_ring_once() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(1 << 16);
    let bytes = Rng::new(4).bytes(1 << 16);
    a.mr.write(0, &bytes);
    let sges: Vec<[Sge; 1]> = (0..100).map(|i| [a.mr.sge(i * 600, 600)]).collect();
    let wrs: Vec<SendWr<'_>> =
        (0..100).map(|i| SendWr::new(i as u64, Op::Write(b.mr.remote(i * 600)), &sges[i])).collect();
    a.qp.post_send(&wrs).unwrap();
    for i in 0..100 {
        assert_eq!(a.cq.next().ok().wr_id(), i);
    }
    assert_eq!(b.mr.read(0, 60_000), bytes[..60_000]);
}

#[test]
fn sizes_around_pages_and_pieces() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(9 << 20);
    let mut rng = Rng::new(5);
    let pages = [1usize, 4095, 4096, 4097, 65_535, 65_536, 65_537, 131_072, 1 << 20, (8 << 20) + 1, 8 << 20];
    for len in pages {
        let bytes = rng.bytes(len);
        a.mr.write(3, &bytes);
        a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(1)), &[a.mr.sge(3, len)])).unwrap();
        a.cq.next().ok();
        assert!(b.mr.read(1, len) == bytes, "WRITE of {len} bytes");
        a.mr.fill(0, len + 8, 0);
        a.qp.post(SendWr::new(1, Op::Read(b.mr.remote(1)), &[a.mr.sge(2, len)])).unwrap();
        assert_eq!(a.cq.next().ok().byte_len(), len);
        assert!(a.mr.read(2, len) == bytes, "READ of {len} bytes");
    }
}

#[test]
fn rings_wrap() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let spec = QpSpec::rc().depth(3);
    let (a, b) = Rc::pair_with(guest_a, guest_b, &spec, 4096, &RcOptions::default()).unwrap();
    for i in 0..1000u64 {
        b.qp.post_recv(i, &[b.mr.sge(0, 8)]).unwrap();
        a.qp.post(SendWr::inline(i, Op::Send, &i.to_le_bytes())).unwrap();
        assert_eq!((a.cq.next().ok().wr_id(), b.cq.next().ok().wr_id()), (i, i));
        assert_eq!(b.mr.read(0, 8), i.to_le_bytes());
    }
}

#[test]
fn smallest_rings_work() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let spec = QpSpec::rc().depth(1);
    let (a, b) = Rc::pair_with(guest_a, guest_b, &spec, 4096, &RcOptions::default()).unwrap();
    assert_eq!(a.qp.sq().entries(), 2);
    for i in 0..10u64 {
        a.qp.post(SendWr::inline(i, Op::Write(b.mr.remote(0)), &i.to_le_bytes())).unwrap();
        assert_eq!(a.cq.next().ok().wr_id(), i);
    }
}

#[test]
fn rings_and_regions_in_single_pages() {
    let bed = Bed::fragmented(2);
    let (guest_a, guest_b) = bed.two();
    // 208 + 20 * 16 bytes do not divide a page: stride 1024, the header 384, so elements straddle pages.
    let spec = QpSpec::rc().sges(20);
    let (a, b) = Rc::pair_with(guest_a, guest_b, &spec, 4096, &RcOptions::default()).unwrap();
    let scattered = |end: &Rc| {
        let buf = end.pd.guest().alloc_placed(1 << 20, Placement::Fragmented).unwrap();
        end.pd.reg_spec(MrSpec::whole(&buf).part(777, (1 << 20) - 2000)).unwrap()
    };
    let (from, to) = (scattered(&a), scattered(&b));
    let mut rng = Rng::new(6);
    for i in 0..600 {
        let bytes = rng.bytes(5000);
        from.write(i * 11, &bytes);
        let sges: Vec<Sge> = (0..20).map(|n| from.sge(i * 11 + n * 250, 250)).collect();
        a.qp.post(SendWr::new(i as u64, Op::Write(to.remote(i * 1000)), &sges)).unwrap();
        assert_eq!(a.cq.next().ok().wr_id(), i as u64);
        assert!(to.read(i * 1000, 5000) == bytes, "round {i}");
    }
}

#[test]
fn more_extents_than_one_request_holds() {
    let config = GuestConfig { memory_size: 160 << 20, ..GuestConfig::default() };
    let bed = Bed::guests(&RouterSpec::of(2), &config);
    let (a, b) = bed.pair(4096);
    let buf = b.pd.guest().alloc_placed(20 << 20, Placement::Fragmented).unwrap();
    let mr = b.pd.reg(&buf).unwrap();
    assert!(buf.extents(0, buf.len()).len() > freeflow_tests::guest::verbs::MAX_EXTENTS);
    for off in [0usize, 10 << 20, (20 << 20) - 100] {
        a.mr.fill(0, 100, off.to_le_bytes()[2] | 1);
        a.qp.post(SendWr::new(1, Op::Write(mr.remote(off)), &[a.mr.sge(0, 100)])).unwrap();
        a.cq.next().ok();
        assert_eq!(mr.read(off, 100), a.mr.read(0, 100));
    }
}

#[test]
fn within_one_guest() {
    let bed = Bed::new(1);
    let guest = &bed.guests[0];
    let (a, b) = Rc::pair(guest, guest, 4096).unwrap();
    a.mr.fill(0, 100, 5);
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 100)])).unwrap();
    a.cq.next().ok();
    assert_eq!(b.mr.read(0, 100), [5; 100]);
    a.qp.post_recv(2, &[a.mr.sge(1000, 100)]).unwrap();
    b.qp.post(SendWr::new(3, Op::Send, &[b.mr.sge(0, 100)])).unwrap();
    b.cq.next().ok();
    assert_eq!(a.cq.next().ok().byte_len(), 100);
    assert_eq!(a.mr.read(1000, 100), [5; 100]);
}

#[test]
fn a_qp_connected_to_itself() {
    let bed = Bed::new(1);
    let end = Rc::new(&bed.guests[0], QpSpec::rc(), 4096).unwrap();
    connect(&end.qp, &end.qp, &RcOptions::default()).unwrap();
    end.mr.fill(0, 10, 1);
    end.qp.post(SendWr::new(1, Op::Write(end.mr.remote(100)), &[end.mr.sge(0, 10)])).unwrap();
    end.cq.next().ok();
    end.qp.post(SendWr::new(2, Op::Read(end.mr.remote(100)), &[end.mr.sge(200, 10)])).unwrap();
    end.cq.next().ok();
    end.qp.post_recv(3, &[end.mr.sge(300, 10)]).unwrap();
    end.qp.post(SendWr::new(4, Op::Send, &[end.mr.sge(200, 10)])).unwrap();
    let mut ids: Vec<u64> = end.cq.take(2).iter().map(|wc| wc.ok().wr_id()).collect();
    ids.sort_unstable();
    assert_eq!(ids, [3, 4]);
    assert_eq!(end.mr.read(300, 10), [1; 10]);
}

#[test]
fn a_write_within_one_region() {
    let bed = Bed::new(1);
    let end = Rc::new(&bed.guests[0], QpSpec::rc(), 1 << 20).unwrap();
    connect(&end.qp, &end.qp, &RcOptions::default()).unwrap();
    // Source and destination overlap: any mixture of the two is allowed, a crash is not.
    end.mr.fill(0, 1 << 20, 3);
    end.qp.post(SendWr::new(1, Op::Write(end.mr.remote(100)), &[end.mr.sge(0, 900_000)])).unwrap();
    end.cq.next().ok();
    assert_eq!(end.mr.read(0, 1 << 20), vec![3; 1 << 20]);
}

#[test]
fn sixty_four_pairs_at_once() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let pairs: Vec<(Rc, Rc)> = (0..64).map(|_| Rc::pair(guest_a, guest_b, 4096).unwrap()).collect();
    for round in 0..20u8 {
        for (i, (a, b)) in pairs.iter().enumerate() {
            a.mr.fill(0, 1000, round ^ i as u8);
            b.qp.post_recv(1, &[b.mr.sge(2000, 1000)]).unwrap();
            a.qp.post(SendWr::new(2, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 1000)])).unwrap();
            a.qp.post(SendWr::new(3, Op::Send, &[a.mr.sge(0, 1000)])).unwrap();
        }
        for (i, (a, b)) in pairs.iter().enumerate() {
            a.cq.take(2).iter().for_each(|wc| assert_eq!(wc.status(), WcStatus::Success));
            b.cq.next().ok();
            assert_eq!(b.mr.read(0, 1000), vec![round ^ i as u8; 1000]);
            assert_eq!(b.mr.read(2000, 1000), vec![round ^ i as u8; 1000]);
        }
    }
}

#[test]
fn one_cq_for_many_qps() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let (pd, cq) = (guest_a.alloc_pd().unwrap(), guest_a.create_cq(1000).unwrap());
    let ends: Vec<_> = (0..8)
        .map(|_| {
            let (qp, peer) = (pd.create_qp(QpSpec::rc(), &cq).unwrap(), Rc::new(guest_b, QpSpec::rc(), 4096).unwrap());
            connect(&qp, &peer.qp, &RcOptions::default()).unwrap();
            (qp, peer)
        })
        .collect();
    for (i, (qp, peer)) in ends.iter().enumerate() {
        let wr = SendWr::inline(i as u64, Op::Write(peer.mr.remote(0)), b"abc");
        qp.post_send(&[wr; 50]).unwrap();
    }
    let mut counts = [0; 8];
    for wc in cq.take(400) {
        let id = wc.ok().wr_id() as usize;
        assert_eq!(wc.qpn(), ends[id].0.number());
        counts[id] += 1;
    }
    assert_eq!(counts, [50; 8]);
}

#[test]
fn over_ipv4_and_ipv6_gids() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    for gid_index in 0..3 {
        let options = RcOptions { gid_index, ..RcOptions::default() };
        let (a, b) = Rc::pair_with(guest_a, guest_b, &QpSpec::rc(), 4096, &options).unwrap();
        a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"gid")).unwrap();
        a.cq.next().ok();
        assert_eq!(b.mr.read(0, 3), b"gid");
    }
}

#[test]
fn fenced_request_sees_what_was_read() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(1 << 20);
    for i in 1..50u8 {
        b.mr.fill(0, 200_000, i);
        a.qp.post(SendWr::new(1, Op::Read(b.mr.remote(0)), &[a.mr.sge(0, 200_000)])).unwrap();
        let sge = [a.mr.sge(0, 200_000)];
        let write = SendWr::new(2, Op::Write(b.mr.remote(500_000)), &sge);
        a.qp.post(write.flags(SendFlags::FENCE | SendFlags::SIGNALED)).unwrap();
        a.cq.take(2).iter().for_each(|wc| assert_eq!(wc.status(), WcStatus::Success));
        assert!(b.mr.read(500_000, 200_000) == vec![i; 200_000]);
    }
}

#[test]
fn last_byte_comes_last() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(256 << 10);
    let len = 200_000;
    let last = b.mr.buf().word32((len - 1) & !3);
    let shift = 8 * ((len - 1) & 3);
    for round in 1..200u8 {
        a.mr.fill(0, len, round);
        a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, len)])).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while (last.load(Acquire) >> shift) as u8 != round {
            assert!(Instant::now() < deadline);
            std::hint::spin_loop();
        }
        assert!(b.mr.read(0, len) == vec![round; len], "round {round}: last byte seen before others");
        a.cq.next().ok();
    }
}

#[test]
fn a_read_only_region_can_be_sent_from() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let buf = a.pd.guest().alloc(4096).unwrap();
    let mr = a.pd.reg_spec(MrSpec::whole(&buf).access(virtio_rdma::ib::Access::empty())).unwrap();
    mr.write(0, b"hello");
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[mr.sge(0, 5)])).unwrap();
    a.cq.next().ok();
    assert_eq!(b.mr.read(0, 5), b"hello");
    assert_eq!(a.qp.state().unwrap(), QpState::Rts);
}
