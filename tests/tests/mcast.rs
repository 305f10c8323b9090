//! Multicast groups.
#![allow(missing_docs, reason = "a test program")]

use std::time::Duration;

use freeflow_backend::Profile;
use freeflow_tests::bed::{Bed, Witness};
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{AhAttr, Op, QpSpec, Rc, SendWr, ip_gid};
use freeflow_tests::guest::{Error, Gid, Guest};
use freeflow_tests::router::RouterSpec;
use virtio_rdma::ctrl::{Mcast, Opcode, Status};
use virtio_rdma::ib::{MULTICAST_QPN, QpState, WcFlags, WcStatus};
use virtio_rdma::ring::GRH_SIZE;

const QKEY: u32 = 0x0102_0304;
const A_WHILE: Duration = Duration::from_millis(60);

fn group(last: u8) -> Gid {
    ip_gid([239, 1, 2, last].into())
}

fn end(guest: &Guest) -> Rc {
    let end = Rc::new(guest, QpSpec::ud(), 16 << 10).unwrap();
    end.qp.to_ud(QKEY).unwrap();
    end
}

/// A member of a group with a receive posted.
fn member(guest: &Guest, mgid: Gid) -> Rc {
    let end = end(guest);
    end.qp.attach(mgid).unwrap();
    post_recv(&end, 9);
    end
}

fn post_recv(end: &Rc, id: u64) {
    end.qp.post_recv(id, &[end.mr.sge(8 << 10, 8 << 10)]).unwrap();
}

fn send_to(from: &Rc, mgid: Gid, bytes: &[u8]) {
    let ah = from.pd.create_ah(AhAttr::to(mgid, 1)).unwrap();
    from.mr.write(0, bytes);
    let op = Op::UdSend { ah: ah.number(), qpn: MULTICAST_QPN, qkey: QKEY, imm: Some(7) };
    from.qp.post(SendWr::new(1, op, &[from.mr.sge(0, bytes.len())])).unwrap();
    let wc = loop {
        // A sender that is a member may see its own message first.
        let wc = from.cq.next();
        if wc.wr_id() == 1 {
            break wc;
        }
    };
    assert_eq!(wc.status(), WcStatus::Success);
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> Status {
    result.expect_err("a refusal").status().expect("a status of the device")
}

#[test]
fn everybody_in_the_group_gets_it_and_nobody_else() {
    let bed = Bed::new(3);
    let mgid = group(1);
    let sender = end(&bed.guests[0]);
    let members: Vec<Rc> = [0, 1, 1, 2].map(|guest| member(&bed.guests[guest], mgid)).into();
    let outsiders = [member(&bed.guests[1], group(2)), end(&bed.guests[2])];
    post_recv(&outsiders[1], 9);
    send_to(&sender, mgid, b"to all");
    for member in &members {
        let wc = member.cq.next().ok();
        assert_eq!((wc.wr_id(), wc.byte_len(), wc.imm()), (9, GRH_SIZE + 6, Some(7)));
        assert_eq!(wc.0.src_qp.get(), sender.qp.number());
        assert!(wc.flags().contains(WcFlags::GRH));
        let bytes = member.mr.read(8 << 10, GRH_SIZE + 6);
        assert_eq!(bytes[32..36], bed.guests[0].gids()[1][12..]);
        assert_eq!(bytes[36..40], [239, 1, 2, 1]);
        assert_eq!(&bytes[40..], b"to all");
    }
    assert!(outsiders.iter().all(|end| end.cq.poll_for(A_WHILE).is_none()));
}

#[test]
fn groups_of_ipv6_work_too() {
    let bed = Bed::new(2);
    let mgid = ip_gid("ff0e::1:2".parse().unwrap());
    let (sender, to) = (end(&bed.guests[0]), member(&bed.guests[1], mgid));
    send_to(&sender, mgid, b"six");
    assert_eq!(to.cq.next().ok().byte_len(), GRH_SIZE + 3);
    assert_eq!(to.mr.read((8 << 10) + 24, 16), mgid);
}

#[test]
fn a_sender_in_the_group_hears_itself() {
    let bed = Bed::new(1);
    let only = member(&bed.guests[0], group(1));
    let ah = only.pd.create_ah(AhAttr::to(group(1), 1)).unwrap();
    let op = Op::UdSend { ah: ah.number(), qpn: MULTICAST_QPN, qkey: QKEY, imm: None };
    only.qp.post(SendWr::inline(1, op, b"x")).unwrap();
    let mut ids: Vec<_> = only.cq.take(2).iter().map(|wc| wc.ok().wr_id()).collect();
    ids.sort_unstable();
    assert_eq!(ids, [1, 9]);
}

#[test]
fn who_cannot_take_it_does_not_keep_it_from_others() {
    let bed = Bed::new(2);
    let mgid = group(1);
    let (a, b) = bed.two();
    let sender = end(a);
    let hungry = end(b);
    hungry.qp.attach(mgid).unwrap();
    let small = end(b);
    small.qp.attach(mgid).unwrap();
    small.qp.post_recv(9, &[small.mr.sge(0, 41)]).unwrap();
    let other_key = Rc::new(b, QpSpec::ud(), 16 << 10).unwrap();
    other_key.qp.to_ud(QKEY + 1).unwrap();
    other_key.qp.attach(mgid).unwrap();
    post_recv(&other_key, 9);
    let failed = member(b, mgid);
    failed.qp.modify_state(QpState::Err).unwrap();
    assert_eq!(failed.cq.next().status(), WcStatus::WrFlushErr);
    let well = member(b, mgid);
    for round in 0..20 {
        send_to(&sender, mgid, b"to those who can");
        assert_eq!(well.cq.next().ok().wr_id(), 9, "round {round}");
        post_recv(&well, 9);
    }
    for end in [&hungry, &small, &other_key, &failed] {
        assert!(end.cq.poll_for(Duration::from_millis(5)).is_none());
    }
    assert_eq!(hungry.qp.state().unwrap(), QpState::Rts);
}

#[test]
fn a_bad_receive_fails_its_own_queue_pair_alone() {
    let bed = Bed::new(2);
    let (a, b) = bed.two();
    let sender = end(a);
    let bad = end(b);
    bad.qp.attach(group(1)).unwrap();
    bad.qp.post_recv(9, &[freeflow_tests::guest::verbs::Sge { lkey: 0x7777, ..bad.mr.sge(0, 4096) }]).unwrap();
    let good = member(b, group(1));
    send_to(&sender, group(1), b"x");
    assert_eq!(bad.cq.next().status(), WcStatus::LocProtErr);
    good.cq.next().ok();
    assert_eq!(sender.qp.state().unwrap(), QpState::Rts);
}

#[test]
fn after_leaving_nothing_comes() {
    let bed = Bed::new(2);
    let (a, b) = bed.two();
    let (sender, to) = (end(a), member(b, group(1)));
    to.qp.detach(group(1)).unwrap();
    send_to(&sender, group(1), b"x");
    assert!(to.cq.poll_for(A_WHILE).is_none());
    assert_eq!(refused(to.qp.detach(group(1))), Status::NotFound);
    to.qp.attach(group(1)).unwrap();
    to.qp.attach(group(1)).expect("joining twice is joining");
    send_to(&sender, group(1), b"x");
    to.cq.next().ok();
    post_recv(&to, 10);
    assert!(to.cq.poll_for(A_WHILE).is_none(), "twice in the group, twice the message");
    to.qp.detach(group(1)).unwrap();
    to.qp.destroy().unwrap();
}

#[test]
fn what_is_not_multicast_on_both_counts_goes_nowhere() {
    let bed = Bed::new(2);
    let (a, b) = bed.two();
    let (sender, to) = (end(a), member(b, group(1)));
    for (gid, qpn) in [(b.gids()[1], MULTICAST_QPN), (group(1), to.qp.number()), (group(9), MULTICAST_QPN)] {
        let ah = sender.pd.create_ah(AhAttr::to(gid, 1)).unwrap();
        let op = Op::UdSend { ah: ah.number(), qpn, qkey: QKEY, imm: None };
        sender.qp.post(SendWr::inline(1, op, b"x")).unwrap();
        sender.cq.next().ok();
    }
    assert!(to.cq.poll_for(A_WHILE).is_none());
}

#[test]
fn a_group_of_another_tenant_is_another_group() {
    let tenants = ["red", "blue", "red"].map(str::to_owned).to_vec();
    let bed = Bed::with(&RouterSpec { tenants, ..RouterSpec::of(3) }, Placement::Contiguous);
    let sender = end(&bed.guests[0]);
    let (blue, red) = (member(&bed.guests[1], group(1)), member(&bed.guests[2], group(1)));
    send_to(&sender, group(1), b"x");
    red.cq.next().ok();
    assert!(blue.cq.poll_for(A_WHILE).is_none());
}

#[test]
fn only_datagram_queue_pairs_join_only_groups() {
    let bed = Bed::new(1);
    let guest = &bed.guests[0];
    let (ud, rc) = (end(guest), Rc::new(guest, QpSpec::rc(), 4096).unwrap());
    let gsi = Rc::new(guest, QpSpec::gsi(), 4096).unwrap();
    assert_eq!(refused(rc.qp.attach(group(1))), Status::Invalid);
    assert_eq!(refused(gsi.qp.attach(group(1))), Status::Invalid);
    assert_eq!(refused(ud.qp.attach(guest.gids()[1])), Status::Invalid);
    assert_eq!(refused(ud.qp.attach([0; 16])), Status::Invalid);
    let nobody = Mcast { qpn: (ud.qp.number() ^ 1).into(), mgid: group(1), ..Mcast::default() };
    assert_eq!(refused(guest.command_ok(Opcode::AttachMcast, &nobody, &[])), Status::NotFound);
    let reserved = Mcast { qpn: ud.qp.number().into(), reserved: 1.into(), mgid: group(1) };
    assert_eq!(refused(guest.command_ok(Opcode::AttachMcast, &reserved, &[])), Status::Invalid);
}

#[test]
fn a_queue_pair_in_a_group_cannot_be_destroyed() {
    let bed = Bed::new(1);
    let to = member(&bed.guests[0], group(1));
    let request = virtio_rdma::ctrl::ObjectRequest { number: to.qp.number().into(), reserved: 0.into() };
    assert_eq!(refused(bed.guests[0].command_ok(Opcode::DestroyQp, &request, &[])), Status::Busy);
    to.qp.detach(group(1)).unwrap();
    to.qp.destroy().unwrap();
}

#[test]
fn groups_and_members_have_quotas() {
    let limits = Profile { max_mcast_grp: 2, max_mcast_qp_attach: 2, ..Profile::default() };
    let bed = Bed::with(&RouterSpec { limits, ..RouterSpec::of(2) }, Placement::Contiguous);
    let guest = &bed.guests[0];
    let ends: Vec<Rc> = (0..3).map(|_| end(guest)).collect();
    ends[0].qp.attach(group(1)).unwrap();
    ends[0].qp.attach(group(2)).unwrap();
    assert_eq!(refused(ends[0].qp.attach(group(3))), Status::NoResources);
    ends[1].qp.attach(group(1)).unwrap();
    assert_eq!(refused(ends[2].qp.attach(group(1))), Status::NoResources);
    // Quotas are of a virtual NIC: they take nothing from others.
    let other = member(&bed.guests[1], group(1));
    ends[0].qp.detach(group(2)).unwrap();
    ends[2].qp.attach(group(3)).unwrap();
    for (end, mgid) in [(&ends[0], group(1)), (&ends[1], group(1)), (&ends[2], group(3)), (&other, group(1))] {
        end.qp.detach(mgid).unwrap();
    }
}

#[test]
fn a_guest_that_goes_leaves_its_groups() {
    let mut bed = Bed::new(2);
    let gone = member(&bed.guests[1], group(1));
    let here = member(&bed.guests[0], group(1));
    bed.guests[1].reset().unwrap();
    bed.guests[1].give_areas_and_gids().unwrap();
    drop(gone);
    let sender = end(&bed.guests[0]);
    send_to(&sender, group(1), b"x");
    here.cq.next().ok();
    let again = member(&bed.guests[1], group(1));
    drop(bed.guests.pop());
    drop(again);
    post_recv(&here, 9);
    send_to(&sender, group(1), b"x");
    here.cq.next().ok();
}

#[test]
fn a_large_group_is_served_to_the_last_and_leaves_time_for_others() {
    const MEMBERS: usize = 600;
    let limits = Profile { max_mcast_qp_attach: MEMBERS as u32, ..Profile::default() };
    let bed = Bed::with(&RouterSpec { limits, ..RouterSpec::of(2) }, Placement::Contiguous);
    let (a, b) = bed.two();
    let witness = Witness::start(a, b);
    let sender = end(a);
    let (pd, cq) = (b.alloc_pd().unwrap(), b.create_cq(4096).unwrap());
    let mr = pd.reg_new(4096).unwrap();
    let spec = || QpSpec { send_depth: 1, recv_depth: 3, inline: 0, send_sges: 1, recv_sges: 1, ..QpSpec::ud() };
    let qps: Vec<_> = (0..MEMBERS).map(|_| pd.create_qp(spec(), &cq).unwrap()).collect();
    for (id, qp) in qps.iter().enumerate() {
        qp.to_ud(QKEY).unwrap();
        qp.attach(group(1)).unwrap();
        qp.post_recv(id as u64, &[mr.sge(0, 4096)]).unwrap();
    }
    send_to(&sender, group(1), &[3; 1000]);
    let mut ids: Vec<_> = cq.take(MEMBERS).iter().map(|wc| wc.ok().wr_id()).collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..MEMBERS as u64));
    witness.finish();
    for qp in qps {
        qp.detach(group(1)).unwrap();
    }
}
