//! On-demand paging: commands that make no sense, quotas, and what a driver does not get that does not know it.
#![allow(missing_docs, reason = "a test program")]

use std::time::Duration;

use freeflow_backend::Profile;
use freeflow_tests::bed::Bed;
use freeflow_tests::guest::ctrl::Request;
use freeflow_tests::guest::mem::{Buf, Placement};
use freeflow_tests::guest::verbs::{Fault, Op, PagedMr, Pd, SendWr};
use freeflow_tests::guest::{Error, GuestConfig, Result};
use freeflow_tests::router::{RouterSpec, TestRouter};
use virtio_rdma::config::F_ON_DEMAND;
use virtio_rdma::ctrl::{
    ExtendMr, MapPages, ObjectResponse, Opcode, PageRange, REG_DMA, REG_ON_DEMAND, REREG_ACCESS, REREG_TRANS, RegMr,
    ReregMr, Status,
};
use virtio_rdma::ib::{Access, WcStatus};

const SOON: Duration = Duration::from_secs(10);
const PAGE: usize = 4096;
const ALL: Access = Access::LOCAL_WRITE.union(Access::REMOTE_READ).union(Access::REMOTE_WRITE);

/// A region of whole pages and a bit, whose pages lie scattered.
fn paged(pd: &Pd, pages: usize) -> PagedMr {
    let buf = pd.guest().alloc_placed((pages + 1) * PAGE, Placement::Fragmented).unwrap();
    pd.reg_on_demand(&buf, 0x200, pages * PAGE, ALL).unwrap()
}

#[test]
fn fields_that_make_no_sense() {
    let bed = Bed::new(1);
    let guest = &bed.guests[0];
    let pd = guest.alloc_pd().unwrap();
    let region = paged(&pd, 4);
    let buf = guest.alloc(8 * PAGE).unwrap();
    let good = RegMr {
        pdn: pd.number().into(),
        access: ALL.bits().into(),
        iova: 0x1000.into(),
        length: 0x1000.into(),
        flags: REG_ON_DEMAND.into(),
        ..RegMr::default()
    };
    let reg = |body: RegMr, extents: &[_]| {
        guest.send(&Request::typed::<_, ObjectResponse>(Opcode::RegMr, &body, extents)).unwrap().status().unwrap()
    };
    assert_eq!(reg(good, &[]), Status::Ok);
    let extents = buf.extents(0, PAGE);
    assert_eq!(reg(RegMr { num_extents: 1.into(), ..good }, &extents), Status::Invalid);
    for bad in [
        RegMr { flags: (REG_ON_DEMAND | REG_DMA).into(), ..good },
        RegMr { flags: 4.into(), ..good },
        RegMr { length: 0.into(), ..good },
        RegMr { iova: u64::MAX.into(), ..good },
        RegMr { length: (1 << 44).into(), ..good },
        RegMr { iova: 0x1fff.into(), length: (1 << 43).into(), ..good },
        RegMr { access: Access::REMOTE_WRITE.bits().into(), ..good },
    ] {
        assert_eq!(reg(bad, &[]), Status::Invalid, "{bad:?}");
    }
    assert_eq!(reg(RegMr { pdn: 999.into(), ..good }, &[]), Status::NotFound);
    let range = PageRange { key: region.key().into(), flags: 0.into(), first: 0.into(), count: 1.into() };
    let ordinary = pd.reg(&buf).unwrap();
    for opcode in [Opcode::UnmapPages, Opcode::DenyPages] {
        let status = |body: PageRange| guest.command_status(opcode, &body, &[]).unwrap();
        for bad in [
            PageRange { count: 0.into(), ..range },
            PageRange { first: 5.into(), ..range },
            PageRange { count: 6.into(), ..range },
            PageRange { first: 1.into(), count: u32::MAX.into(), ..range },
            PageRange { flags: 2.into(), ..range },
        ] {
            assert_eq!(status(bad), Status::Invalid, "{bad:?}");
        }
        assert_eq!(status(PageRange { key: (region.key() ^ 0x100).into(), ..range }), Status::NotFound);
        assert_eq!(status(PageRange { key: ordinary.key().into(), ..range }), Status::BadState);
        assert_eq!(status(PageRange { count: 5.into(), ..range }), Status::Ok);
    }
    assert_eq!(
        guest.command_status(Opcode::UnmapPages, &PageRange { flags: 1.into(), ..range }, &[]).unwrap(),
        Status::Invalid
    );
    let map = |body: MapPages, buf: &Buf, off: usize, len: usize| {
        let extents = buf.extents(off, len);
        let body = MapPages { num_extents: (extents.len() as u32).into(), ..body };
        guest.command_status(Opcode::MapPages, &body, &extents).unwrap()
    };
    let body = MapPages { key: region.key().into(), flags: 1.into(), first: 0.into(), num_extents: 0.into() };
    assert_eq!(map(MapPages { flags: 2.into(), ..body }, &buf, 0, PAGE), Status::Invalid);
    assert_eq!(map(MapPages { first: 1.into(), ..body }, &buf, 0, 5 * PAGE), Status::Invalid);
    assert_eq!(map(MapPages { first: u32::MAX.into(), ..body }, &buf, 0, PAGE), Status::Invalid);
    assert_eq!(map(body, &buf, 1, PAGE), Status::Invalid);
    assert_eq!(map(body, &buf, 0, PAGE - 1), Status::Invalid);
    assert_eq!(map(MapPages { key: ordinary.key().into(), ..body }, &buf, 0, PAGE), Status::BadState);
    assert_eq!(guest.command_status(Opcode::MapPages, &body, &[]).unwrap(), Status::Invalid);
    let mut nowhere = extents[0];
    nowhere.addr = (1 << 50).into();
    let body = MapPages { num_extents: 1.into(), ..body };
    assert_eq!(guest.command_status(Opcode::MapPages, &body, &[nowhere]).unwrap(), Status::BadAddress);
    assert_eq!(map(body, &buf, 0, 5 * PAGE), Status::Ok);
}

#[test]
fn commands_on_memory_that_pages_do_not_need() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(PAGE);
    let (guest, region) = (&bed.guests[1], paged(&b.pd, 4));
    let key = region.key().into();
    let extend = ExtendMr { key, num_extents: 0.into() };
    assert_eq!(guest.command_status(Opcode::ExtendMr, &extend, &[]).unwrap(), Status::BadState);
    let rereg = ReregMr { key, flags: REREG_TRANS.into(), length: 4096.into(), ..ReregMr::default() };
    assert_eq!(guest.command_status(Opcode::ReregMr, &rereg, &[]).unwrap(), Status::BadState);
    // What may be done with it can be changed, and its pages stay.
    assert_eq!(region.map(0..1, true), Status::Ok);
    let access = Access::REMOTE_READ.bits().into();
    let rereg = ReregMr { key, flags: REREG_ACCESS.into(), access, ..ReregMr::default() };
    assert_eq!(guest.command_status(Opcode::ReregMr, &rereg, &[]).unwrap(), Status::Ok);
    for (op, status) in
        [(Op::Read(region.remote(0)), WcStatus::Success), (Op::Write(region.remote(0)), WcStatus::RemAccessErr)]
    {
        a.qp.post(SendWr::new(1, op, &[a.mr.sge(0, 8)])).unwrap();
        assert_eq!(a.cq.next().status(), status);
    }
}

#[test]
fn the_quota_of_extents_is_for_pages_too() {
    let limits = Profile { max_extents: 12, ..Profile::default() };
    let bed = Bed::with(&RouterSpec { limits, ..RouterSpec::of(2) }, Placement::Contiguous);
    let (a, b) = bed.pair(PAGE);
    // Two extents are those of the pair's second region.
    let region = paged(&b.pd, 32);
    assert_eq!(region.map(0..10, true), Status::Ok);
    assert_eq!(region.map(10..12, true), Status::NoResources);
    assert_eq!(region.unmap(0..5), Status::Ok);
    // One extent, of which the middle is taken away: its end goes too where there is no room for another.
    let buf = b.pd.guest().alloc(8 * PAGE).unwrap();
    let whole = b.pd.reg_on_demand(&buf, 0, 8 * PAGE, ALL).unwrap();
    assert_eq!(whole.map(0..8, true), Status::Ok);
    assert_eq!(whole.unmap(1..2), Status::Ok);
    assert_eq!(region.map(0..3, true), Status::Ok);
    assert_eq!(whole.unmap(3..4), Status::Ok);
    assert_eq!(whole.unmap(5..6), Status::Ok);
    a.qp.post(SendWr::inline(1, Op::Write(whole.remote(4 * PAGE)), b"x")).unwrap();
    a.cq.next().ok();
    a.qp.post(SendWr::inline(1, Op::Write(whole.remote(6 * PAGE)), b"x")).unwrap();
    assert_eq!(whole.next_fault(SOON).unwrap(), Fault { page: 6, count: 1, write: true });
    drop((region, whole));
    let again = paged(&b.pd, 32);
    assert_eq!(again.map(0..10, true), Status::Ok, "all were given back");
}

#[test]
fn a_driver_that_does_not_know_it_is_not_offered_it() {
    let router = TestRouter::start(&RouterSpec::of(1));
    let config = GuestConfig { declined: 1 << F_ON_DEMAND, ..GuestConfig::default() };
    let guest = router.guest(0, config);
    let pd = guest.alloc_pd().unwrap();
    let buf = guest.alloc(PAGE).unwrap();
    let refused = |result: Result<PagedMr>| match result {
        Err(Error::Refused(status)) => status,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(pd.reg_on_demand(&buf, 0, PAGE, ALL)), Status::Invalid);
    for opcode in [Opcode::UnmapPages, Opcode::DenyPages] {
        assert_eq!(guest.command_status(opcode, &PageRange::default(), &[]).unwrap(), Status::Unsupported);
    }
}
