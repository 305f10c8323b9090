//! Objects: limits, creation, change, destruction, states.
#![allow(missing_docs, reason = "a test program")]

use freeflow_tests::bed::Bed;
use freeflow_tests::guest::mem::Placement;
use freeflow_tests::guest::verbs::{
    MrSpec, Op, QpSpec, RC_INIT, RC_RTR, RC_RTS, Rc, RcOptions, Remote, SendWr, UD_INIT, connect,
};
use freeflow_tests::guest::{Error, Guest, link_local};
use freeflow_tests::router::Objects;
use virtio_rdma::config::STATUS_LINK_UP;
use virtio_rdma::ctrl::{AddGid, Opcode, QpAttr, REREG_ACCESS, ReregMr, Status};
use virtio_rdma::ib::{Access, QpMask, QpState, QpType, WcStatus};

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> Status {
    result.expect_err("a refusal").status().expect("a status of the device")
}

fn write_status(a: &Rc, to: Remote, len: usize) -> WcStatus {
    a.qp.post(SendWr::new(1, Op::Write(to), &[a.mr.sge(0, len)])).unwrap();
    a.cq.next().status()
}

#[test]
fn configuration_tells_the_truth() {
    let bed = Bed::new(2);
    let (a, b) = bed.two();
    let (config, other) = (a.config(), b.config());
    assert!(config.is_ours());
    assert_eq!(config.status.get() & STATUS_LINK_UP, STATUS_LINK_UP);
    assert!((1..=5).contains(&config.active_mtu) && config.active_mtu <= config.max_mtu);
    assert_ne!(config.mac, other.mac);
    assert_eq!(config.node_guid, link_local(config.mac)[8..]);
    assert!(config.reserved.iter().all(|r| r.get() == 0));
}

#[test]
fn limits_are_sensible() {
    let bed = Bed::new(1);
    let attr = bed.guests[0].attr();
    assert_eq!(attr.max_doorbells.get() % 64, 0);
    assert!(attr.max_qp.get() >= 10_000 && attr.max_sge.get() >= 16 && attr.max_inline_data.get() >= 64);
    assert_eq!(attr.qp_types.get() & (1 << QpType::Rc.to_wire()), 1 << QpType::Rc.to_wire());
    assert_eq!(attr.qp_types.get() & (1 << QpType::Ud.to_wire()), 1 << QpType::Ud.to_wire());
    assert!(attr.max_srq.get() >= 1024);
    assert!(attr.max_mw.get() >= 1024 && attr.max_fast_reg_extents.get() >= 256);
    assert!(attr.max_mcast_grp.get() >= 256 && attr.max_mcast_qp_attach.get() >= 32);
    assert_eq!(attr.qp_types.get() & (1 << QpType::Gsi.to_wire()), 1 << QpType::Gsi.to_wire());
    assert_eq!(attr.max_msg_size.get(), 1 << 31);
}

#[test]
fn only_own_addresses_are_gids() {
    let bed = Bed::new(2);
    let (a, b) = bed.two();
    for gid in b.gids() {
        assert_eq!(refused(a.add_gid(9, *gid)), Status::NotPermitted);
    }
    assert_eq!(refused(a.add_gid(9, [1; 16])), Status::NotPermitted);
    assert_eq!(refused(a.add_gid(9, [0; 16])), Status::NotPermitted);
    a.add_gid(9, a.gids()[1]).unwrap();
    a.add_gid(9, a.gids()[2]).unwrap();
    a.del_gid(9).unwrap();
    let beyond = a.attr().max_gids.get() as u16;
    assert_eq!(refused(a.add_gid(beyond, a.gids()[1])), Status::Invalid);
    let body = AddGid { index: 9.into(), roce_version: 3, reserved: [0; 5], gid: a.gids()[1] };
    assert_eq!(a.command_status(Opcode::AddGid, &body, &[]).unwrap(), Status::Invalid);
}

#[test]
fn without_its_gid_a_qp_sends_nothing() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let o = RcOptions { gid_index: 2, timeout: 8, retry_cnt: 2, ..RcOptions::default() };
    let (a, b) = Rc::pair_with(guest_a, guest_b, &QpSpec::rc(), 64, &o).unwrap();
    assert_eq!(write_status(&a, b.mr.remote(0), 8), WcStatus::Success);
    guest_a.del_gid(2).unwrap();
    assert_eq!(write_status(&a, b.mr.remote(0), 8), WcStatus::RetryExcErr);
}

#[test]
fn domains_are_busy_while_used() {
    let bed = Bed::new(1);
    let guest = &bed.guests[0];
    let pd = guest.alloc_pd().unwrap();
    let dealloc = |number: u32| {
        let body = virtio_rdma::ctrl::ObjectRequest { number: number.into(), reserved: 0.into() };
        guest.command_status(Opcode::DeallocPd, &body, &[]).unwrap()
    };
    let mr = pd.reg_new(100).unwrap();
    assert_eq!(dealloc(pd.number()), Status::Busy);
    drop(mr);
    let cq = guest.create_cq(10).unwrap();
    let qp = pd.create_qp(QpSpec::rc(), &cq).unwrap();
    assert_eq!(dealloc(pd.number()), Status::Busy);
    let body = virtio_rdma::ctrl::ObjectRequest { number: cq.number().into(), reserved: 0.into() };
    assert_eq!(guest.command_status(Opcode::DestroyCq, &body, &[]).unwrap(), Status::Busy);
    drop(qp);
    assert_eq!(dealloc(pd.number()), Status::Ok);
    assert_eq!(dealloc(pd.number()), Status::NotFound);
}

#[test]
fn numbers_and_keys_differ() {
    let bed = Bed::new(1);
    let guest = &bed.guests[0];
    let (pd, cq) = (guest.alloc_pd().unwrap(), guest.create_cq(10).unwrap());
    let qps: Vec<_> = (0..50).map(|_| pd.create_qp(QpSpec::rc().depth(1), &cq).unwrap()).collect();
    let mut qpns: Vec<u32> = qps.iter().map(freeflow_tests::guest::verbs::Qp::number).collect();
    assert!(qpns.iter().all(|&n| n > 1 && n < 1 << 24));
    assert!(qpns.windows(2).any(|w| w[1] != w[0] + 1), "QP numbers can be guessed");
    qpns.sort_unstable();
    qpns.dedup();
    assert_eq!(qpns.len(), 50);
    let mrs: Vec<_> = (0..50).map(|_| pd.reg_new(1).unwrap()).collect();
    let mut keys: Vec<u32> = mrs.iter().map(freeflow_tests::guest::verbs::Mr::key).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 50);
}

#[test]
fn regions_of_any_length_and_place() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let buf = b.pd.guest().alloc(5 * 4096).unwrap();
    for (offset, len) in [(0, 1), (4095, 1), (4095, 2), (1, 4096), (100, 8192), (0, 5 * 4096), (5 * 4096 - 1, 1)] {
        let mr = b.pd.reg_spec(MrSpec::whole(&buf).part(offset, len)).unwrap();
        let n = len.min(4096);
        assert_eq!(write_status(&a, mr.remote(len - n), n), WcStatus::Success, "{len} bytes at {offset}");
    }
}

#[test]
fn a_region_of_most_of_the_memory() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let buf = b.pd.guest().alloc_placed(56 << 20, Placement::Anywhere).unwrap();
    assert!(buf.extents(0, buf.len()).len() > 1, "spans regions of guest memory");
    let mr = b.pd.reg(&buf).unwrap();
    a.mr.fill(0, 4096, 6);
    for off in [0, (28 << 20) - 100, (56 << 20) - 4096] {
        assert_eq!(write_status(&a, mr.remote(off), 4096), WcStatus::Success);
        assert_eq!(mr.read(off, 4096), vec![6; 4096]);
    }
}

#[test]
fn zero_based_regions() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let buf = b.pd.guest().alloc(4096).unwrap();
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ | Access::ZERO_BASED;
    let spec = MrSpec::whole(&buf).part(33, 1000).access(access).iova(0);
    let mr = b.pd.reg_spec(spec.clone()).unwrap();
    assert_eq!(mr.addr(0), 0);
    a.mr.fill(0, 1000, 4);
    assert_eq!(write_status(&a, mr.remote(0), 1000), WcStatus::Success);
    assert_eq!(buf.read_vec(33, 1000), vec![4; 1000]);
    assert_eq!(refused(b.pd.reg_spec(spec.iova(4096))), Status::Invalid);
    assert_eq!(write_status(&a, mr.remote(1), 1000), WcStatus::RemAccessErr);
}

#[test]
fn regions_at_the_end_of_the_address_space() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let buf = b.pd.guest().alloc(4096).unwrap();
    // The last byte of the address space cannot be registered, as in Linux, where address + length must not wrap.
    let last = MrSpec::whole(&buf).iova(u64::MAX - 4096);
    let mr = b.pd.reg_spec(last.clone()).unwrap();
    assert_eq!(write_status(&a, mr.remote(4000), 96), WcStatus::Success);
    assert_eq!(refused(b.pd.reg_spec(last.iova(u64::MAX - 4095))), Status::Invalid);
    assert_eq!(write_status(&a, mr.remote(4000), 97), WcStatus::RemAccessErr);
}

#[test]
fn remote_write_needs_local_write() {
    let bed = Bed::new(1);
    let pd = bed.guests[0].alloc_pd().unwrap();
    let buf = bed.guests[0].alloc(64).unwrap();
    for bad in [Access::REMOTE_WRITE, Access::REMOTE_ATOMIC, Access::REMOTE_WRITE | Access::REMOTE_READ] {
        assert_eq!(refused(pd.reg_spec(MrSpec::whole(&buf).access(bad))), Status::Invalid);
    }
    let unknown = Access::from_bits_retain(1 << 15);
    assert_eq!(refused(pd.reg_spec(MrSpec::whole(&buf).access(unknown))), Status::Invalid);
    pd.reg_spec(MrSpec::whole(&buf).access(Access::RELAXED_ORDERING)).unwrap();
}

#[test]
fn rereg_moves_the_memory() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let guest = b.pd.guest();
    let (first, second) = (guest.alloc(4096).unwrap(), guest.alloc_placed(30 << 12, Placement::Fragmented).unwrap());
    let mut mr = b.pd.reg(&first).unwrap();
    let key = mr.key();
    mr.rereg_memory(MrSpec::whole(&second).iova(0x1000_0000)).unwrap();
    assert_eq!(mr.key(), key);
    a.mr.fill(0, 4096, 9);
    assert_eq!(write_status(&a, mr.remote((30 << 12) - 4096), 4096), WcStatus::Success);
    assert_eq!(second.read_vec((30 << 12) - 4096, 4096), vec![9; 4096]);
    assert_eq!(first.read_vec(0, 4096), vec![0; 4096]);
    let old = Remote { addr: MrSpec::whole(&first).iova, rkey: key };
    assert_eq!(write_status(&a, old, 8), WcStatus::RemAccessErr);
}

#[test]
fn rereg_changes_rights() {
    let bed = Bed::new(2);
    let (a, mut b) = bed.pair(4096);
    b.mr.rereg_access(Access::LOCAL_WRITE | Access::REMOTE_WRITE).unwrap();
    assert_eq!(write_status(&a, b.mr.remote(0), 8), WcStatus::Success);
    b.mr.rereg_access(Access::LOCAL_WRITE | Access::REMOTE_READ).unwrap();
    assert_eq!(write_status(&a, b.mr.remote(0), 8), WcStatus::RemAccessErr);
    assert_eq!(refused(b.mr.rereg_access(Access::REMOTE_WRITE)), Status::Invalid);
}

#[test]
fn rereg_changes_the_domain() {
    let bed = Bed::new(2);
    let (a, mut b) = bed.pair(4096);
    let other = b.pd.guest().alloc_pd().unwrap();
    b.mr.rereg_pd(&other).unwrap();
    assert_eq!(write_status(&a, b.mr.remote(0), 8), WcStatus::RemAccessErr);
    b.mr.rereg_pd(&b.pd.clone()).unwrap();
    drop(other);
}

#[test]
fn rereg_changes_everything() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let (a, b) = bed.pair(4096);
    let buf = guest_b.alloc(8192).unwrap();
    let elsewhere = Rc::new(guest_b, QpSpec::rc(), 64).unwrap();
    let mut mr = elsewhere.pd.reg_new(64).unwrap();
    let access = Access::LOCAL_WRITE | Access::REMOTE_WRITE;
    mr.rereg_all(&b.pd, MrSpec::whole(&buf).part(1, 5000).access(access)).unwrap();
    assert_eq!(write_status(&a, mr.remote(5000 - 8), 8), WcStatus::Success);
    let (c, _d) = Rc::pair(guest_a, guest_b, 64).unwrap();
    assert_eq!(write_status(&c, mr.remote(0), 8), WcStatus::RemAccessErr);
}

#[test]
fn rereg_that_fails_changes_nothing() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    let guest = b.pd.guest();
    let rereg = |flags: u32, pdn: u32, access: u32| {
        let body = ReregMr {
            key: b.mr.key().into(),
            flags: flags.into(),
            pdn: pdn.into(),
            access: access.into(),
            ..ReregMr::default()
        };
        guest.command_status(Opcode::ReregMr, &body, &[]).unwrap()
    };
    assert_eq!(rereg(2, 0x7777, 0), Status::NotFound);
    assert_eq!(rereg(8, 0, 0), Status::Invalid);
    assert_eq!(rereg(2 | REREG_ACCESS, 0x7777, 1), Status::NotFound);
    assert_eq!(rereg(2 | REREG_ACCESS, b.pd.number(), 2), Status::Invalid);
    assert_eq!(write_status(&a, b.mr.remote(0), 8), WcStatus::Success);
}

#[test]
fn qp_attributes_come_back() {
    let bed = Bed::new(2);
    let o = RcOptions {
        gid_index: 1,
        timeout: 9,
        retry_cnt: 5,
        rnr_retry: 4,
        min_rnr_timer: 21,
        access: Access::REMOTE_WRITE,
        psn: 0x00ff_fffe,
    };
    let (guest_a, guest_b) = bed.two();
    let (a, b) = Rc::pair_with(guest_a, guest_b, &QpSpec::rc(), 64, &o).unwrap();
    let attr = a.qp.query().unwrap();
    assert_eq!((attr.qp_state, attr.timeout, attr.retry_cnt, attr.rnr_retry), (3, 9, 5, 4));
    assert_eq!((attr.min_rnr_timer, attr.port_num, attr.sq_draining), (21, 1, 0));
    assert_eq!((attr.sq_psn.get(), attr.rq_psn.get()), (0x00ff_fffe, 0x00ff_ffff));
    assert_eq!((attr.dest_qpn.get(), attr.access_flags.get()), (b.qp.number(), Access::REMOTE_WRITE.bits()));
    assert_eq!((attr.av.dgid, attr.av.sgid_index.get(), attr.av.hop_limit), (guest_b.gids()[1], 1, 64));
    assert_eq!((attr.max_rd_atomic, attr.max_dest_rd_atomic), (1, 1));
    assert_eq!(attr.path_mtu, guest_a.config().active_mtu);
}

fn fresh(guest: &Guest, spec: QpSpec) -> freeflow_tests::guest::verbs::Qp {
    let (pd, cq) = (guest.alloc_pd().unwrap(), guest.create_cq(10).unwrap());
    pd.create_qp(spec, &cq).unwrap()
}

#[test]
fn states_follow_the_specification() {
    let bed = Bed::new(2);
    let guest = &bed.guests[0];
    let qp = fresh(guest, QpSpec::rc());
    assert_eq!(qp.state().unwrap(), QpState::Reset);
    for state in [QpState::Init, QpState::Rtr, QpState::Rts, QpState::Sqd, QpState::Sqe] {
        assert!(qp.modify_state(state).is_err(), "RESET to {state:?} without attributes");
    }
    let o = RcOptions::default();
    assert!(qp.to_rtr([1; 16], 1, 0, &o).is_err(), "RESET to RTR");
    qp.to_init(o.access).unwrap();
    qp.to_init(Access::REMOTE_WRITE).unwrap();
    assert!(qp.to_rts(0, &o).is_err(), "INIT to RTS");
    qp.to_rtr([1; 16], 1, 0, &o).unwrap();
    assert!(qp.to_rtr([1; 16], 1, 0, &o).is_err(), "RTR to RTR");
    assert!(qp.to_init(o.access).is_err(), "RTR to INIT");
    assert!(qp.modify_state(QpState::Sqd).is_err(), "RTR to SQD");
    qp.to_rts(0, &o).unwrap();
    qp.modify_state(QpState::Rts).unwrap();
    assert!(qp.modify_state(QpState::Sqe).is_err(), "RTS to SQE");
    qp.modify_state(QpState::Sqd).unwrap();
    qp.modify_state(QpState::Rts).unwrap();
    qp.modify_state(QpState::Err).unwrap();
    qp.modify_state(QpState::Err).unwrap();
    assert!(qp.modify_state(QpState::Rts).is_err(), "ERR to RTS");
    qp.modify_state(QpState::Reset).unwrap();
    qp.modify_state(QpState::Reset).unwrap();
    assert_eq!(qp.state().unwrap(), QpState::Reset);
}

/// Tries a transition with each required attribute left out, and with each forbidden one added.
fn masks(qp: &freeflow_tests::guest::verbs::Qp, full: QpMask, attr: QpAttr, optional: QpMask) {
    for bit in full.iter().filter(|&bit| bit != QpMask::STATE) {
        assert!(qp.modify(full & !bit, attr).is_err(), "without {bit:?}");
    }
    for bit in QpMask::all().iter().filter(|&bit| !(full | optional | QpMask::CUR_STATE).contains(bit)) {
        assert!(qp.modify(full | bit, attr).is_err(), "with {bit:?}");
    }
    let unknown = QpMask::from_bits_retain(1 << 30);
    assert!(qp.modify(full | unknown, attr).is_err());
}

#[test]
fn attribute_masks_of_connected_qps() {
    let bed = Bed::new(2);
    let guest = &bed.guests[0];
    let qp = fresh(guest, QpSpec::rc());
    let mut attr = QpAttr {
        qp_state: 1,
        port_num: 1,
        path_mtu: 3,
        dest_qpn: 77.into(),
        max_dest_rd_atomic: 1,
        max_rd_atomic: 1,
        min_rnr_timer: 1,
        timeout: 10,
        retry_cnt: 1,
        rnr_retry: 1,
        ..QpAttr::default()
    };
    attr.av.dgid = [7; 16];
    masks(&qp, RC_INIT, attr, QpMask::empty());
    qp.modify(RC_INIT, attr).unwrap();
    attr.qp_state = 2;
    masks(&qp, RC_RTR, attr, QpMask::ALT_PATH | QpMask::ACCESS_FLAGS | QpMask::PKEY_INDEX);
    assert!(qp.modify(RC_RTR | QpMask::ALT_PATH, attr).is_err(), "no alternate path is offered");
    qp.modify(RC_RTR, attr).unwrap();
    attr.qp_state = 3;
    let optional = QpMask::ALT_PATH | QpMask::ACCESS_FLAGS | QpMask::MIN_RNR_TIMER | QpMask::PATH_MIG_STATE;
    masks(&qp, RC_RTS, attr, optional);
    qp.modify(RC_RTS | QpMask::MIN_RNR_TIMER, attr).unwrap();
}

#[test]
fn attribute_masks_of_datagram_qps() {
    let bed = Bed::new(2);
    let qp = fresh(&bed.guests[0], QpSpec::ud());
    let attr = QpAttr { qp_state: 1, port_num: 1, qkey: 5.into(), ..QpAttr::default() };
    masks(&qp, UD_INIT, attr, QpMask::empty());
    qp.modify(UD_INIT, attr).unwrap();
    qp.modify(QpMask::STATE | QpMask::QKEY, QpAttr { qp_state: 2, qkey: 6.into(), ..attr }).unwrap();
    assert!(qp.modify_state(QpState::Rts).is_err(), "RTS needs a PSN");
    qp.modify(QpMask::STATE | QpMask::SQ_PSN, QpAttr { qp_state: 3, ..attr }).unwrap();
    assert_eq!(qp.query().unwrap().qkey.get(), 6);
}

#[test]
fn values_out_of_range_are_refused() {
    let bed = Bed::new(2);
    let guest = &bed.guests[0];
    let qp = fresh(guest, QpSpec::rc());
    let init = |attr: QpAttr| qp.modify(RC_INIT, QpAttr { qp_state: 1, ..attr });
    assert!(init(QpAttr { port_num: 2, ..QpAttr::default() }).is_err());
    assert!(init(QpAttr { port_num: 0, ..QpAttr::default() }).is_err());
    assert!(init(QpAttr { port_num: 1, pkey_index: 1.into(), ..QpAttr::default() }).is_err());
    assert!(init(QpAttr { port_num: 1, reserved: [1; 6], ..QpAttr::default() }).is_err());
    qp.to_init(Access::REMOTE_WRITE).unwrap();
    let o = RcOptions::default();
    assert!(qp.to_rtr([1; 16], 1 << 24, 0, &o).is_err(), "QP number of 25 bits");
    assert!(qp.to_rtr([1; 16], 1, 1 << 24, &o).is_err(), "PSN of 25 bits");
    assert!(qp.to_rtr([1; 16], 1, 0, &RcOptions { min_rnr_timer: 32, ..o }).is_err());
    assert!(qp.to_rtr([1; 16], 1, 0, &RcOptions { gid_index: 0, ..o }).is_ok());
    assert!(qp.to_rts(0, &RcOptions { timeout: 32, ..o }).is_err());
    assert!(qp.to_rts(0, &RcOptions { retry_cnt: 8, ..o }).is_err());
    assert!(qp.to_rts(0, &RcOptions { rnr_retry: 8, ..o }).is_err());
    assert!(qp.to_rts(1 << 24, &o).is_err());
    qp.to_rts(0, &o).unwrap();
}

#[test]
fn everything_goes_back() {
    let bed = Bed::new(2);
    let before = bed.router.objects(0);
    {
        let (guest_a, guest_b) = bed.two();
        let pairs: Vec<_> = (0..10).map(|_| Rc::pair(guest_a, guest_b, 4096).unwrap()).collect();
        let more = Objects {
            pds: before.pds + 10,
            mrs: before.mrs + 10,
            cqs: before.cqs + 10,
            qps: before.qps + 10,
            gids: before.gids,
        };
        bed.router.wait_objects(0, more);
        drop(pairs);
    }
    bed.router.wait_objects(0, before);
}

#[test]
fn commands_in_a_pipeline_are_answered_in_order() {
    use freeflow_tests::guest::ctrl::{Request, SLOTS};
    use virtio_rdma::ctrl::{ObjectRequest, ObjectResponse};
    let bed = Bed::new(1);
    let guest = &bed.guests[0];
    for _ in 0..50 {
        let alloc = Request::typed::<[u8; 0], ObjectResponse>(Opcode::AllocPd, &[], &[]);
        let answers = guest.ctrl().pipeline(&vec![alloc; SLOTS]).unwrap();
        let numbers: Vec<u32> = answers.iter().map(|a| a.body::<ObjectResponse>().unwrap().number.get()).collect();
        let frees: Vec<Request> = numbers
            .iter()
            .map(|&number| {
                let body = ObjectRequest { number: number.into(), reserved: 0.into() };
                Request::new(Opcode::DeallocPd, &body, &[], 0)
            })
            .collect();
        let answers = guest.ctrl().pipeline(&frees).unwrap();
        assert!(answers.iter().all(|a| a.status().unwrap() == Status::Ok));
    }
}

#[test]
fn requests_in_many_descriptors() {
    use freeflow_tests::guest::ctrl::Request;
    use virtio_rdma::ctrl::DeviceAttr;
    let bed = Bed::new(1);
    let guest = &bed.guests[0];
    let query = Request::typed::<[u8; 0], DeviceAttr>(Opcode::QueryDevice, &[], &[]);
    for piece in [3, 7, 64] {
        let answer = guest.ctrl().send_scattered(&query, piece).unwrap();
        assert_eq!(&answer.body::<DeviceAttr>().unwrap(), guest.attr());
    }
}

#[test]
fn a_qp_can_be_connected_again_and_again() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let a = Rc::new(guest_a, QpSpec::rc(), 64).unwrap();
    for i in 0..20u8 {
        let b = Rc::new(guest_b, QpSpec::rc(), 64).unwrap();
        connect(&a.qp, &b.qp, &RcOptions::default()).unwrap();
        a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), &[i; 3])).unwrap();
        a.cq.next().ok();
        assert_eq!(b.mr.read(0, 3), [i; 3]);
        a.qp.modify_state(QpState::Reset).unwrap();
    }
}
