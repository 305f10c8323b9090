//! Control commands, extents, rings and virtqueues that no driver would make. Each is answered with a status or leaves the
//! attacker with a dead device; two other guests work all the time and notice nothing.
#![allow(missing_docs, reason = "a test program")]

use std::time::Duration;

use freeflow_backend::Profile;
use freeflow_tests::attack::Attack;
use freeflow_tests::guest::ctrl::Request;
use freeflow_tests::guest::mem::{PAGE, Placement};
use freeflow_tests::guest::verbs::{Op, QpSpec, Rc, Ring, SendWr, Sge};
use freeflow_tests::guest::virtq::{Desc, NEXT, Part, WRITE};
use freeflow_tests::guest::{Error, Guest};
use freeflow_tests::rng::Rng;
use freeflow_tests::router::{Objects, RouterSpec};
use virtio_rdma::area::AreaKind;
use virtio_rdma::ctrl::{
    CreateCq, CreateQp, ExtendMr, Extent, MAX_REQUEST, NO_OBJECT, ObjectRequest, ObjectResponse, Opcode, RegMr,
    RingDesc, SetArea, Status,
};
use virtio_rdma::ib::{QpType, WcStatus};
use zerocopy::IntoBytes;

fn raw(guest: &Guest, opcode: u16, flags: u16, length: u32, body: &[u8], room: usize) -> Status {
    let header = [&opcode.to_le_bytes()[..], &flags.to_le_bytes(), &length.to_le_bytes()].concat();
    let request = Request { bytes: [&header[..], body].concat(), room };
    guest.send(&request).unwrap().status().unwrap()
}

/// Whether the memory that a command describes was refused: which status a wrong length or alignment has is the device's choice.
fn refused(status: Status) -> bool {
    matches!(status, Status::Invalid | Status::BadAddress)
}

fn object(number: u32) -> ObjectRequest {
    ObjectRequest { number: number.into(), reserved: 0.into() }
}

/// Bytes of each command's structure, as far as it is fixed.
const SIZES: [(Opcode, usize); 29] = [
    (Opcode::Reset, 0),
    (Opcode::QueryDevice, 0),
    (Opcode::SetArea, 8),
    (Opcode::AddGid, 24),
    (Opcode::DelGid, 8),
    (Opcode::AllocPd, 0),
    (Opcode::DeallocPd, 8),
    (Opcode::RegMr, 32),
    (Opcode::ExtendMr, 8),
    (Opcode::ReregMr, 40),
    (Opcode::DeregMr, 8),
    (Opcode::AllocMr, 8),
    (Opcode::MapPages, 16),
    (Opcode::UnmapPages, 16),
    (Opcode::DenyPages, 16),
    (Opcode::CreateCq, 24),
    (Opcode::DestroyCq, 8),
    (Opcode::ResizeCq, 24),
    (Opcode::CreateQp, 72),
    (Opcode::ModifyQp, 80),
    (Opcode::QueryQp, 8),
    (Opcode::DestroyQp, 8),
    (Opcode::CreateSrq, 32),
    (Opcode::ModifySrq, 8),
    (Opcode::QuerySrq, 8),
    (Opcode::DestroySrq, 8),
    (Opcode::ResizeSrq, 24),
    (Opcode::AllocMw, 8),
    (Opcode::DeallocMw, 8),
];

#[test]
fn truncated_commands() {
    let attack = Attack::start();
    let guest = attack.attacker();
    for (opcode, size) in SIZES.into_iter().filter(|&(_, size)| size > 0) {
        for len in [0, 1, size / 2, size - 1] {
            let length = 8 + len as u32;
            assert_eq!(raw(guest, opcode.to_wire(), 0, length, &vec![0; len], 256), Status::Invalid, "{opcode:?}");
            // The header promises more than there is.
            let promised = 8 + size as u32;
            assert_eq!(raw(guest, opcode.to_wire(), 0, promised, &vec![0; len], 256), Status::Invalid, "{opcode:?}");
        }
    }
    for len in 0..8 {
        let request = Request { bytes: vec![1; len], room: 64 };
        assert_eq!(guest.send(&request).unwrap().status().unwrap(), Status::Invalid);
    }
    attack.finish();
}

#[test]
fn oversized_commands() {
    let attack = Attack::start();
    let guest = attack.attacker();
    for (opcode, size) in SIZES {
        let body = vec![0; size + 1];
        assert_eq!(raw(guest, opcode.to_wire(), 0, 8 + size as u32 + 1, &body, 256), Status::Invalid, "{opcode:?}");
    }
    for length in [MAX_REQUEST + 1, MAX_REQUEST + 4096] {
        let body = vec![0; length - 8];
        assert_eq!(raw(guest, Opcode::AllocPd.to_wire(), 0, length as u32, &body, 64), Status::Invalid);
        assert_eq!(raw(guest, Opcode::AllocPd.to_wire(), 0, u32::MAX, &body, 64), Status::Invalid);
    }
    assert_eq!(raw(guest, Opcode::AllocPd.to_wire(), 0, 7, &[], 64), Status::Invalid);
    assert_eq!(raw(guest, Opcode::AllocPd.to_wire(), 0, 0, &[], 64), Status::Invalid);
    attack.finish();
}

#[test]
fn unknown_commands() {
    let attack = Attack::start();
    for opcode in [0u16, 6, 0x00ff, 0x0100, 0x0103, 0x0405, 0x0500, 0x0603, 0x0600, 0x0700, 0x0800, 0x8000, 0xffff] {
        assert_eq!(raw(attack.attacker(), opcode, 0, 8, &[], 64), Status::Unsupported, "{opcode:#x}");
        assert_eq!(raw(attack.attacker(), opcode, 0, 72, &[0xff; 64], 64), Status::Unsupported, "{opcode:#x}");
    }
    attack.finish();
}

#[test]
fn flags_and_reserved_fields() {
    let attack = Attack::start();
    let guest = attack.attacker();
    assert_eq!(raw(guest, Opcode::AllocPd.to_wire(), 1, 8, &[], 64), Status::Invalid);
    let (pd, cq) = (guest.alloc_pd().unwrap(), guest.create_cq(10).unwrap());
    let ask = ObjectRequest { number: pd.number().into(), reserved: 1.into() };
    assert_eq!(guest.command_status(Opcode::DeallocPd, &ask, &[]).unwrap(), Status::Invalid);
    let ask = ObjectRequest { number: cq.number().into(), reserved: 0x8000_0000.into() };
    assert_eq!(guest.command_status(Opcode::DestroyCq, &ask, &[]).unwrap(), Status::Invalid);
    let body =
        RegMr { pdn: pd.number().into(), length: 8.into(), num_extents: 1.into(), flags: 2.into(), ..RegMr::default() };
    let extent = [Extent { addr: 0x1000.into(), len: 8.into() }];
    assert_eq!(create_status::<ObjectResponse>(guest, Opcode::RegMr, &body, &extent), Status::Invalid);
    attack.finish();
}

fn create_status<R>(
    guest: &Guest,
    opcode: Opcode,
    body: &(impl IntoBytes + zerocopy::Immutable),
    extents: &[Extent],
) -> Status
where
    R: zerocopy::FromBytes,
{
    let request = Request::typed::<_, R>(opcode, body, extents);
    guest.send(&request).unwrap().status().unwrap()
}

#[test]
fn no_room_for_the_answer() {
    let attack = Attack::start();
    let guest = attack.attacker();
    // Room for the header but not for the response: refused, and nothing was made.
    for room in [8, 12, 15] {
        assert_eq!(raw(guest, Opcode::AllocPd.to_wire(), 0, 8, &[], room), Status::Invalid);
    }
    // No room for a header: returned with length 0.
    for room in [0, 1, 7] {
        let request = [&Opcode::AllocPd.to_wire().to_le_bytes()[..], &[0; 2], &8u32.to_le_bytes()].concat();
        assert_eq!(guest.send(&Request { bytes: request, room }).unwrap().written, 0);
    }
    let gids = guest.gids().len();
    attack.bed.router.wait_objects(0, Objects { gids, ..Objects::default() });
    attack.finish();
}

#[test]
fn handles_of_nobody_and_of_others() {
    let attack = Attack::start();
    let (guest, other) = (attack.attacker(), &attack.bed.guests[1]);
    let theirs = Rc::new(other, QpSpec::rc(), 64).unwrap();
    let own = Rc::new(guest, QpSpec::rc(), 64).unwrap();
    for opcode in [Opcode::DeallocPd, Opcode::DeregMr, Opcode::DestroyCq, Opcode::DestroyQp, Opcode::DestroySrq] {
        for number in [0x00ab_cdef, 0xffff, u32::MAX, theirs.qp.number(), theirs.mr.key()] {
            assert_eq!(guest.command_status(opcode, &object(number), &[]).unwrap(), Status::NotFound, "{opcode:?}");
        }
    }
    assert_eq!(guest.command_status(Opcode::DestroyQp, &object(own.mr.key()), &[]).unwrap(), Status::NotFound);
    let mut create = good_qp(&own);
    for spoil in [
        |c: &mut CreateQp| c.pdn = 0xffff.into(),
        |c: &mut CreateQp| c.send_cqn = 0xffff_0000.into(),
        |c: &mut CreateQp| c.recv_cqn = NO_OBJECT.into(),
    ] {
        let good = create.0;
        spoil(&mut create.0);
        assert_eq!(create_qp(guest, &create), Status::NotFound);
        create.0 = good;
    }
    assert_eq!(create_qp(guest, &create), Status::Ok);
    // The victim's objects are as they were.
    assert!(theirs.qp.query().is_ok());
    attack.finish();
}

#[test]
fn extents_outside_guest_memory() {
    let attack = Attack::start();
    let guest = attack.attacker();
    let pd = guest.alloc_pd().unwrap();
    let top = guest.memory().regions().iter().map(|r| r.gpa + r.len).max().unwrap();
    // In the VGA hole, across its edges, past the end, far away, and wrapping.
    let places =
        [(0xa_0000, 1), (0x9_ffff, 2), (0x9_f000, 0x3_0000), (0xb_ffff, 2), (top, 1), (top - 1, 2), (1 << 50, 8)];
    for (addr, len) in places.into_iter().chain([(u64::MAX, 1), (u64::MAX - 7, 16), (0x1000, u64::MAX)]) {
        let extent = [Extent { addr: addr.into(), len: len.into() }];
        let length = len.min(1 << 40);
        let body = RegMr { pdn: pd.number().into(), length: length.into(), num_extents: 1.into(), ..RegMr::default() };
        let status = create_status::<ObjectResponse>(guest, Opcode::RegMr, &body, &extent);
        let expected = [Status::BadAddress, Status::Invalid];
        assert!(expected.contains(&status), "{len} bytes at {addr:#x}: {status:?}");
        assert!(length != len || status == Status::BadAddress, "{len} bytes at {addr:#x}: {status:?}");
    }
    attack.finish();
}

#[test]
fn extents_and_lengths_that_disagree() {
    let attack = Attack::start();
    let guest = attack.attacker();
    let pd = guest.alloc_pd().unwrap();
    let buf = guest.alloc(8192).unwrap();
    let reg = |length: u64, num_extents: u32, extents: &[Extent]| {
        let body = RegMr {
            pdn: pd.number().into(),
            length: length.into(),
            num_extents: num_extents.into(),
            ..RegMr::default()
        };
        create_status::<ObjectResponse>(guest, Opcode::RegMr, &body, extents)
    };
    let extent = |len: u64| Extent { addr: buf.gpa(0).into(), len: len.into() };
    assert_eq!(reg(4096, 1, &[extent(4097)]), Status::Invalid, "more than the length");
    assert_eq!(reg(4096, 2, &[extent(4096), extent(1)]), Status::Invalid, "more than the length");
    assert!(refused(reg(4096, 1, &[extent(0)])), "an extent of nothing");
    assert_eq!(reg(0, 0, &[]), Status::Invalid, "a region of nothing");
    assert_eq!(reg(4096, 2, &[extent(4096)]), Status::Invalid, "fewer extents than said");
    assert_eq!(reg(4096, 0, &[extent(4096)]), Status::Invalid, "more extents than said");
    assert_eq!(reg(4096, u32::MAX, &[extent(4096)]), Status::Invalid, "count that wraps");
    assert_eq!(reg(4096, 0x1000_0001, &[extent(4096)]), Status::Invalid, "count whose size wraps");
    assert_eq!(reg(u64::MAX, 1, &[extent(4096)]), Status::Invalid, "length beyond all memory");
    let mr = pd.reg(&buf).unwrap();
    let body = ExtendMr { key: mr.key().into(), num_extents: 1.into() };
    let status = guest.command_status(Opcode::ExtendMr, &body, &[extent(1)]).unwrap();
    assert!(matches!(status, Status::Invalid | Status::BadState), "extended beyond its length: {status:?}");
    attack.finish();
}

fn good_qp(own: &Rc) -> (CreateQp, Vec<Extent>) {
    let guest = own.pd.guest();
    let ring = Ring::new(guest.memory(), 16, 512, Placement::Contiguous).unwrap();
    let (desc, mut extents) = ring.desc();
    extents.extend(desc_of(&ring));
    // The ring's memory goes back to the guest, as far as it knows; the device need not care.
    let body = CreateQp {
        pdn: own.pd.number().into(),
        qp_type: QpType::Rc.to_wire(),
        send_cqn: own.cq.number().into(),
        recv_cqn: own.cq.number().into(),
        srqn: NO_OBJECT.into(),
        max_send_sge: 4.into(),
        max_recv_sge: 4.into(),
        max_inline_data: 64.into(),
        sq: desc,
        rq: desc,
        ..CreateQp::default()
    };
    (body, extents)
}

fn desc_of(ring: &Ring) -> Vec<Extent> {
    ring.desc().1
}

fn create_qp(guest: &Guest, (body, extents): &(CreateQp, Vec<Extent>)) -> Status {
    create_status::<virtio_rdma::ctrl::CreateQpResponse>(guest, Opcode::CreateQp, body, extents)
}

type Spoil<'a> = &'a dyn Fn(&mut CreateQp);

#[test]
fn queue_pairs_no_driver_would_make() {
    let attack = Attack::start();
    let guest = attack.attacker();
    let own = Rc::new(guest, QpSpec::rc(), 64).unwrap();
    let (good, extents) = good_qp(&own);
    let attr = guest.attr();
    let (sges, inline) = (attr.max_sge.get() as u16 + 1, attr.max_inline_data.get() + 1);
    let spoils: [(&str, Spoil<'_>); 18] = [
        ("type 0", &|c| c.qp_type = 0),
        ("type 200", &|c| c.qp_type = 200),
        ("sq_sig_all 2", &|c| c.sq_sig_all = 2),
        ("flags", &|c| c.flags = 2.into()),
        ("reserved", &|c| c.reserved[2] = 1.into()),
        ("format", &|c| c.sq.format = 1),
        ("ring reserved", &|c| c.sq.reserved[1] = 1),
        ("no entries", &|c| c.sq.entries = 0.into()),
        ("one entry", &|c| c.sq.entries = 1.into()),
        ("entries not a power of two", &|c| c.sq.entries = 15.into()),
        ("entries beyond the ring", &|c| c.rq.entries = 32.into()),
        ("entries beyond all limits", &|c| c.sq.entries = 0x8000_0000.into()),
        ("stride not a power of two", &|c| c.sq.stride = 500.into()),
        ("stride too small", &|c| c.sq.stride = 128.into()),
        ("stride beyond the ring", &|c| c.sq.stride = 0x8000_0000.into()),
        ("extents", &|c| c.sq.num_extents = 9.into()),
        ("more SGEs than there are", &|c| c.max_send_sge = sges.into()),
        ("more inline data than there is", &|c| c.max_inline_data = inline.into()),
    ];
    for (what, spoil) in spoils {
        let mut body = good;
        spoil(&mut body);
        let status = create_qp(guest, &(body, extents.clone()));
        assert!(refused(status) || status == Status::Unsupported, "{what}: {status:?}");
    }
    let srq = CreateQp { srqn: 1.into(), ..good };
    assert_eq!(create_qp(guest, &(srq, extents.clone())), Status::NotFound);
    let mut unaligned = extents.clone();
    unaligned[0].addr += 8;
    assert!(refused(create_qp(guest, &(good, unaligned))));
    let mut outside = extents.clone();
    outside[1].addr = 0xa_0000.into();
    assert_eq!(create_qp(guest, &(good, outside)), Status::BadAddress);
    assert_eq!(create_qp(guest, &(good, extents)), Status::Ok);
    attack.finish();
}

#[test]
fn completion_queues_no_driver_would_make() {
    let attack = Attack::start();
    let guest = attack.attacker();
    let ring = Ring::new(guest.memory(), 64, 64, Placement::Contiguous).unwrap();
    let (desc, extents) = ring.desc();
    let status = |desc: RingDesc, vector: u16, reserved: u8| {
        let body = CreateCq { vector: vector.into(), reserved: [reserved; 6], ring: desc };
        create_status::<ObjectResponse>(guest, Opcode::CreateCq, &body, &extents)
    };
    for (entries, stride) in [(0, 64), (1, 64), (63, 64), (64, 32), (64, 63), (64, 48), (128, 64), (1 << 30, 64)] {
        let desc = RingDesc { entries: entries.into(), stride: stride.into(), ..desc };
        assert!(refused(status(desc, 0, 0)), "{entries} x {stride}");
    }
    assert_eq!(status(desc, 0xffff, 0), Status::Invalid);
    assert_eq!(status(desc, 0, 1), Status::Invalid);
    assert_eq!(status(RingDesc { format: 7, ..desc }, 0, 0), Status::Invalid);
    assert_eq!(status(desc, 0, 0), Status::Ok);
    attack.finish();
}

#[test]
fn areas_no_driver_would_make() {
    let attack = Attack::start();
    let guest = attack.attacker();
    let set = |kind: u16, index: u16, extents: &[Extent]| {
        let body = SetArea { kind: kind.into(), index: index.into(), num_extents: (extents.len() as u32).into() };
        guest.command_status(Opcode::SetArea, &body, extents).unwrap()
    };
    let buf = guest.alloc(1 << 20).unwrap();
    let whole = buf.extents(0, 1 << 20);
    let arm = AreaKind::CqArm.to_wire();
    assert_eq!(set(arm, 0, &whole), Status::BadState, "set twice");
    guest.reset().unwrap();
    let one = |addr: u64, len: u64| [Extent { addr: addr.into(), len: len.into() }];
    let base = buf.gpa(0);
    assert_eq!(set(9, 0, &whole), Status::Invalid);
    assert_eq!(set(arm, 1, &whole), Status::Invalid);
    assert_eq!(set(AreaKind::Doorbell.to_wire(), 99, &whole), Status::Invalid);
    assert!(refused(set(arm, 0, &one(base + 8, 1 << 19))), "not aligned");
    assert!(refused(set(arm, 0, &one(base, (1 << 19) + 8))), "not whole pages");
    assert!(refused(set(arm, 0, &one(base, PAGE))), "too short");
    assert!(refused(set(arm, 0, &[])), "nothing");
    assert_eq!(set(arm, 0, &one(1 << 50, 1 << 19)), Status::BadAddress);
    assert_eq!(guest.create_cq(10).unwrap_err().status(), Some(Status::BadState));
    guest.reload().unwrap();
    attack.finish();
}

fn small() -> RouterSpec {
    let limits = Profile {
        max_qp: 4,
        max_qp_wr: 64,
        max_cq: 3,
        max_cqe: 127,
        max_mr: 5,
        max_extents: 100,
        max_pd: 2,
        ..Profile::default()
    };
    RouterSpec { limits, ..RouterSpec::of(3) }
}

#[track_caller]
fn exhausted<T>(result: Result<T, Error>) {
    assert_eq!(result.map(|_| ()).expect_err("a quota").status(), Some(Status::NoResources));
}

#[test]
fn quotas() {
    let attack = Attack::on(&small());
    let guest = attack.attacker();
    let pds = [guest.alloc_pd().unwrap(), guest.alloc_pd().unwrap()];
    exhausted(guest.alloc_pd());
    let cqs: Vec<_> = (0..3).map(|_| guest.create_cq(10).unwrap()).collect();
    exhausted(guest.create_cq(10));
    let spec = QpSpec::rc().depth(3);
    let qps: Vec<_> = (0..4).map(|_| pds[0].create_qp(spec.clone(), &cqs[0]).unwrap()).collect();
    exhausted(pds[0].create_qp(spec.clone(), &cqs[0]));
    let mrs: Vec<_> = (0..5).map(|_| pds[0].reg_new(100).unwrap()).collect();
    exhausted(pds[0].reg_new(100));
    drop((mrs, qps, cqs, pds));
    // What was freed can be had again.
    for _ in 0..3 {
        let pd = guest.alloc_pd().unwrap();
        let cq = guest.create_cq(10).unwrap();
        let _qps: Vec<_> = (0..4).map(|_| pd.create_qp(spec.clone(), &cq).unwrap()).collect();
        let many = guest.alloc_placed(90 * PAGE as usize, Placement::Fragmented).unwrap();
        let _mr = pd.reg(&many).unwrap();
        exhausted(pd.reg(&many));
        assert!(guest.create_cq(128).is_err(), "more entries than a CQ may have");
        assert!(pd.create_qp(QpSpec::rc().depth(65), &cq).is_err(), "more entries than a QP may have");
    }
    attack.finish_without();
}

#[test]
fn quota_of_extents_by_extension() {
    let attack = Attack::on(&small());
    let guest = attack.attacker();
    let pd = guest.alloc_pd().unwrap();
    let buf = guest.alloc(4096).unwrap();
    let body = RegMr { pdn: pd.number().into(), length: (1 << 30).into(), num_extents: 1.into(), ..RegMr::default() };
    let one = [Extent { addr: buf.gpa(0).into(), len: PAGE.into() }];
    let mr: ObjectResponse = guest.command(Opcode::RegMr, &body, &one).unwrap();
    let body = ExtendMr { key: mr.number, num_extents: 50.into() };
    // The same page again and again: not adjacent, so that nothing can be merged.
    let fifty = [one[0]; 50];
    assert_eq!(guest.command_status(Opcode::ExtendMr, &body, &fifty).unwrap(), Status::Ok);
    assert_eq!(guest.command_status(Opcode::ExtendMr, &body, &fifty).unwrap(), Status::NoResources);
    assert_eq!(guest.command_status(Opcode::DeregMr, &object(mr.number.get()), &[]).unwrap(), Status::Ok);
    attack.finish_without();
}

#[test]
fn the_same_memory_many_times() {
    let attack = Attack::start();
    let guest = attack.attacker();
    let (a, b) = attack.pair();
    let buf = guest.alloc(4096).unwrap();
    let extents = [Extent { addr: buf.gpa(0).into(), len: PAGE.into() }; 1000];
    let body = RegMr {
        pdn: a.pd.number().into(),
        access: 7.into(),
        length: (1000 * PAGE).into(),
        num_extents: 1000.into(),
        ..RegMr::default()
    };
    let mr: ObjectResponse = guest.command(Opcode::RegMr, &body, &extents).unwrap();
    let sge = Sge { addr: 100, len: 4096, lkey: mr.number.get() };
    buf.fill(0, 4096, 0x31);
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[sge])).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::Success);
    assert_eq!(b.mr.read(0, 4096), vec![0x31; 4096]);
    assert_eq!(guest.command_status(Opcode::DeregMr, &object(mr.number.get()), &[]).unwrap(), Status::Ok);
    attack.finish();
}

/// Pieces smaller than pages would make the work of a request grow without its bytes.
#[test]
fn regions_in_crumbs() {
    let attack = Attack::start();
    let guest = attack.attacker();
    let pd = guest.alloc_pd().unwrap();
    let buf = guest.alloc(4 * PAGE as usize).unwrap();
    let status = |extents: &[(u64, u64)], length: u64| {
        let extents: Vec<_> =
            extents.iter().map(|&(at, len)| Extent { addr: (buf.gpa(0) + at).into(), len: len.into() }).collect();
        let num_extents = (extents.len() as u32).into();
        let body = RegMr { pdn: pd.number().into(), length: length.into(), num_extents, ..RegMr::default() };
        create_status::<ObjectResponse>(guest, Opcode::RegMr, &body, &extents)
    };
    assert_eq!(status(&[(0, 1); 100], 100), Status::Invalid);
    assert_eq!(status(&[(100, 10), (PAGE, PAGE)], 10 + PAGE), Status::Invalid, "ends in the middle of a page");
    assert_eq!(status(&[(0, PAGE), (PAGE + 8, 8)], PAGE + 8), Status::Invalid, "begins in the middle of a page");
    assert_eq!(status(&[(0, PAGE), (PAGE, 8)], 1 << 20), Status::Invalid, "more is to come");
    assert_eq!(status(&[(PAGE - 10, 10), (2 * PAGE, PAGE), (PAGE, 8)], PAGE + 18), Status::Ok);
    attack.finish();
}

#[test]
fn random_commands() {
    let attack = Attack::start();
    let guest = attack.attacker();
    let seed = Rng::seed();
    println!("FREEFLOW_SEED={seed}");
    let mut rng = Rng::new(seed);
    let mut body = [0u8; 400];
    for _ in 0..3000 {
        let (opcode, size) = SIZES[1 + rng.below(SIZES.len() - 1)];
        let size = if rng.one_in(3) { rng.below(body.len()) } else { size + 16 * rng.below(3) };
        for byte in &mut body[..size] {
            *byte = [0, 0, 0, 0, 0, 0, 1, rng.word() as u8][rng.below(8)];
        }
        raw(guest, opcode.to_wire(), 0, 8 + size as u32, &body[..size], 200);
    }
    guest.reload().unwrap();
    attack.finish();
}

#[test]
fn chains_no_driver_would_make() {
    let attack = Attack::start();
    let guest = attack.attacker().clone();
    let base = guest.ctrl().scratch().gpa(0);
    let desc = |addr: u64, len: u32, flags: u16, next: u16| Desc {
        addr: addr.into(),
        len: len.into(),
        flags: flags.into(),
        next: next.into(),
    };
    let chains: [&[Desc]; 9] = [
        &[desc(base, 8, NEXT, 0)],
        &[desc(base, 8, NEXT, 1), desc(base, 8, NEXT, 0)],
        &[desc(base, 8, NEXT, 0xfff0)],
        &[desc(base, 0, NEXT, 1), desc(base, 0, WRITE, 0)],
        &[desc(1 << 50, 8, NEXT, 1), desc(base, 64, WRITE, 0)],
        &[desc(base, 8, NEXT, 1), desc(1 << 50, 64, WRITE, 0)],
        &[desc(u64::MAX - 3, 8, NEXT, 1), desc(base, 64, WRITE, 0)],
        &[desc(base, u32::MAX, NEXT, 1), desc(base, u32::MAX, WRITE, 0)],
        &[desc(base, 16, 4, 0)],
    ];
    for chain in chains {
        // Whatever the device does with it, at most the attacker's own device is lost.
        let _ = guest.ctrl().send_raw(chain, Duration::from_millis(50));
        if guest.ctrl().virtq.free_descriptors() < 8 || guest.alloc_pd().is_err() {
            break;
        }
    }
    attack.reconnect_and_finish();
}

#[test]
fn available_index_that_jumps() {
    let attack = Attack::start();
    let guest = attack.attacker();
    {
        let ctrl = guest.ctrl();
        let at = 16 * usize::from(ctrl.virtq.size());
        for index in [1000u32, 0xffff, 0x8000] {
            ctrl.virtq.ring().word32(at).store(index << 16, std::sync::atomic::Ordering::Release);
            ctrl.virtq.notify_always();
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    attack.reconnect_and_finish();
}

#[test]
fn event_buffers_no_driver_would_give() {
    let attack = Attack::start();
    let guest = attack.attacker();
    let (a, b) = attack.pair();
    {
        let mut queue = guest.events().queue(0);
        let base = a.mr.buf().gpa(0);
        for part in [
            Part { addr: base, len: 8, writable: true },
            Part { addr: base, len: 16, writable: false },
            Part { addr: 1 << 50, len: 16, writable: true },
        ] {
            // All real buffers are with the device: there is no room until it gives some back.
            let _ = queue.virtq.push(&[part]);
            queue.virtq.notify();
        }
    }
    for _ in 0..100 {
        a.cq.arm(false);
        a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x")).unwrap();
        a.cq.next().ok();
    }
    drop((a, b));
    attack.finish();
}

#[test]
fn memory_tables_no_vmm_would_send() {
    use vhost::vhost_user::VhostUserFrontend;
    use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
    let attack = Attack::start();
    let guest = attack.attacker();
    let good = guest.memory().regions()[0].info();
    let bad = [
        VhostUserMemoryRegionInfo { guest_phys_addr: u64::MAX - 4095, memory_size: 1 << 20, ..good },
        VhostUserMemoryRegionInfo { mmap_offset: 1 << 60, ..good },
        VhostUserMemoryRegionInfo { memory_size: u64::MAX, ..good },
        VhostUserMemoryRegionInfo { userspace_addr: u64::MAX - 10, ..good },
    ];
    for region in bad {
        let _ = guest.with_connection(|c| Ok(c.frontend().add_mem_region(&region)));
        let _ = guest.with_connection(|c| Ok(c.frontend().set_mem_table(&[region, region])));
    }
    attack.reconnect_and_finish();
}
