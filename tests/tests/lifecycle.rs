//! Ends and beginnings: disconnect, reset, stop, reload, memory that comes and goes, each in the middle of traffic.
#![allow(missing_docs, reason = "a test program")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use freeflow_tests::bed::{Bed, Witness, eventually};
use freeflow_tests::guest::mem::Buf;
use freeflow_tests::guest::verbs::{Mr, MrSpec, Op, QpSpec, Rc, RcOptions, SendWr};
use freeflow_tests::guest::{Guest, GuestConfig};
use freeflow_tests::router::{Objects, RouterSpec, TestRouter};
use virtio_rdma::event::EventType;
use virtio_rdma::ib::{QpState, WcStatus};

const SOON: Duration = Duration::from_secs(10);
/// Long enough for a worker that has not stopped to show.
const A_WHILE: Duration = Duration::from_millis(50);

/// Fast failure when the peer goes.
fn impatient() -> RcOptions {
    RcOptions { timeout: 8, retry_cnt: 2, ..RcOptions::default() }
}

fn pair(bed: &Bed, len: usize) -> (Rc, Rc) {
    let (a, b) = bed.two();
    Rc::pair_with(a, b, &QpSpec::rc(), len, &impatient()).unwrap()
}

/// Keeps a queue full of WRITEs until told to stop or the QP fails; returns the last status.
fn traffic(end: &Rc, peer: &Mr, len: usize, stop: &AtomicBool) -> WcStatus {
    let op = Op::Write(peer.remote(0));
    let mut status = WcStatus::Success;
    let sges = [end.mr.sge(0, len)];
    while !stop.load(Relaxed) {
        while end.qp.post(SendWr::new(1, op, &sges)).is_ok() {}
        while let Some(wc) = end.cq.poll() {
            if status == WcStatus::Success {
                status = wc.status();
            }
        }
        if status != WcStatus::Success {
            break;
        }
        std::thread::yield_now();
    }
    status
}

/// All memory of a guest, to see that nobody writes it.
struct Canary {
    views: Vec<Buf>,
    before: Vec<Vec<u8>>,
}

impl Canary {
    fn of(guest: &Guest) -> Self {
        let memory = guest.memory();
        let views: Vec<Buf> = memory.regions().iter().map(|r| memory.view(r.gpa, r.len).unwrap()).collect();
        let before = views.iter().map(|v| v.read_vec(0, v.len())).collect();
        Self { views, before }
    }

    #[track_caller]
    fn unchanged(&self) {
        for (view, before) in self.views.iter().zip(&self.before) {
            let now = view.read_vec(0, view.len());
            if &now != before {
                let at = now.iter().zip(before).position(|(a, b)| a != b).unwrap();
                panic!("memory at {:#x} was written after the end", view.gpa(at));
            }
        }
    }
}

/// Runs traffic in both directions between two guests, calls `end` on the first, and returns both statuses.
fn in_the_middle(bed: &Bed, end: impl FnOnce(&Guest)) -> (WcStatus, WcStatus) {
    let (a, b) = pair(bed, 1 << 20);
    let (stop_a, stop_b) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let from_a = scope.spawn(|| traffic(&a, &b.mr, 300_000, &stop_a));
        let from_b = scope.spawn(|| traffic(&b, &a.mr, 300_000, &stop_b));
        std::thread::sleep(Duration::from_millis(30));
        // The guest's own processors stop first, as they do when a driver resets its device or a VMM dies.
        stop_a.store(true, Relaxed);
        let status_a = from_a.join().unwrap();
        end(&bed.guests[0]);
        let deadline = Instant::now() + SOON;
        while !from_b.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        stop_b.store(true, Relaxed);
        (status_a, from_b.join().unwrap())
    })
}

fn works_again(bed: &Bed) {
    let (a, b) = bed.pair(64);
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"again")).unwrap();
    a.cq.next().ok();
    assert_eq!(b.mr.read(0, 5), b"again");
}

#[test]
fn reset_in_the_middle_of_traffic() {
    let bed = Bed::new(2);
    let (_, status) = in_the_middle(&bed, |guest| {
        guest.reset().unwrap();
        let canary = Canary::of(guest);
        std::thread::sleep(A_WHILE);
        canary.unchanged();
    });
    assert_eq!(status, WcStatus::RetryExcErr);
    bed.router.wait_objects(0, Objects::default());
    bed.guests[0].reload().unwrap();
    works_again(&bed);
}

#[test]
fn virtio_reset_in_the_middle_of_traffic() {
    let bed = Bed::new(2);
    let (_, status) = in_the_middle(&bed, |guest| {
        guest.reset_virtio().unwrap();
        let canary = Canary::of(guest);
        std::thread::sleep(A_WHILE);
        canary.unchanged();
    });
    assert_eq!(status, WcStatus::RetryExcErr);
    bed.router.wait_objects(0, Objects::default());
    bed.guests[0].restart().unwrap();
    works_again(&bed);
}

#[test]
fn stopped_queues_in_the_middle_of_traffic() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 1 << 20);
    let sge = [a.mr.sge(0, 1 << 20)];
    let wrs = [SendWr::new(1, Op::Write(b.mr.remote(0)), &sge); 50];
    b.qp.post_send(&[SendWr::new(1, Op::Write(a.mr.remote(0)), &[b.mr.sge(0, 1 << 20)]); 50]).unwrap();
    a.qp.post_send(&wrs).unwrap();
    let bases = bed.guests[0].stop_queues().unwrap();
    let canary = Canary::of(&bed.guests[0]);
    std::thread::sleep(A_WHILE);
    canary.unchanged();
    // Objects live on: what was posted is done after the start, unless the peer lost patience meanwhile.
    bed.guests[0].start_queues_at(&bases).unwrap();
    assert!(matches!(a.qp.state().unwrap(), QpState::Rts | QpState::Err));
    works_again(&bed);
}

#[test]
fn a_short_stop_of_an_idle_guest_costs_nothing() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(4096);
    for _ in 0..5 {
        let bases = bed.guests[0].stop_queues().unwrap();
        bed.guests[0].start_queues_at(&bases).unwrap();
        a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x")).unwrap();
        a.cq.next().ok();
        b.qp.post(SendWr::inline(1, Op::Write(a.mr.remote(0)), b"x")).unwrap();
        b.cq.next().ok();
    }
}

/// User-mode Linux tells the base of a virtqueue before its addresses, QEMU after. Where the used ring stands is found in
/// the new memory either way.
#[test]
fn virtqueues_that_start_again_elsewhere() {
    for base_first in [false, true] {
        let bed = Bed::new(2);
        let guest = &bed.guests[0];
        if base_first {
            let told = guest.with_connection(|c| {
                c.tell_base_first();
                Ok(())
            });
            told.unwrap();
        }
        works_again(&bed);
        for _ in 0..3 {
            guest.reload_elsewhere().unwrap();
            works_again(&bed);
        }
        let (a, b) = bed.pair(64);
        a.cq.arm(false);
        a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"x")).unwrap();
        a.cq.wait_event(SOON).unwrap();
    }
}

#[test]
fn disconnect_in_the_middle_of_traffic() {
    let bed = Bed::new(2);
    let memory = Arc::clone(bed.guests[0].memory());
    let (_, status) = in_the_middle(&bed, |guest| {
        guest.disconnect();
        eventually("end of the session", SOON, || !bed.router.is_connected(0));
        let canary = Canary::of(guest);
        std::thread::sleep(A_WHILE);
        canary.unchanged();
    });
    assert_eq!(status, WcStatus::RetryExcErr);
    bed.router.wait_objects(0, Objects::default());
    let back = bed.router.guest(0, GuestConfig { memory: Some(memory), ..GuestConfig::default() });
    let (a, b) = Rc::pair(&back, &bed.guests[1], 64).unwrap();
    a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"back")).unwrap();
    a.cq.next().ok();
}

#[test]
fn guests_come_and_go() {
    let bed = Bed::new(2);
    for round in 0..20 {
        let guest = bed.router.guest_after_end(1, &bed.guests[1]);
        let (a, b) = Rc::pair_with(&bed.guests[0], &guest, &QpSpec::rc(), 64, &impatient()).unwrap();
        a.qp.post(SendWr::inline(round, Op::Write(b.mr.remote(0)), b"x")).unwrap();
        a.cq.next().ok();
        guest.disconnect();
        eventually("end of the session", SOON, || !bed.router.is_connected(1));
        a.qp.post(SendWr::inline(round, Op::Write(b.mr.remote(0)), b"x")).unwrap();
        assert_eq!(a.cq.next().status(), WcStatus::RetryExcErr);
        bed.router.wait_objects(1, Objects::default());
    }
}

#[test]
fn driver_reload() {
    let bed = Bed::new(2);
    for _ in 0..5 {
        let (a, _b) = bed.pair(4096);
        a.qp.post_recv(1, &[a.mr.sge(0, 8)]).unwrap();
        bed.guests[0].reload().unwrap();
        bed.router.wait_objects(0, Objects { gids: 3, ..Objects::default() });
        drop(a);
        works_again(&bed);
    }
}

#[test]
fn reset_forgets_areas() {
    let bed = Bed::new(1);
    let guest = &bed.guests[0];
    guest.reset().unwrap();
    let refused = guest.create_cq(10).unwrap_err();
    assert_eq!(refused.status(), Some(virtio_rdma::ctrl::Status::BadState));
    guest.give_areas_and_gids().unwrap();
    guest.create_cq(10).unwrap();
}

#[test]
fn router_stop_in_the_middle_of_traffic() {
    let bed = Bed::new(2);
    let (a, b) = pair(&bed, 1 << 20);
    let sge = [a.mr.sge(0, 1 << 20)];
    let wrs = [SendWr::new(1, Op::Write(b.mr.remote(0)), &sge); 100];
    a.qp.post_send(&wrs).unwrap();
    let Bed { guests, router } = bed;
    let start = Instant::now();
    router.stop();
    assert!(start.elapsed() < SOON, "the router stops soon");
    let canaries: Vec<Canary> = guests.iter().map(Canary::of).collect();
    std::thread::sleep(A_WHILE);
    canaries.iter().for_each(Canary::unchanged);
    guests.iter().for_each(Guest::disconnect);
}

#[test]
fn regions_over_memory_that_went_fail_and_nothing_else() {
    let bed = Bed::new(3);
    let (guest_a, guest_b) = bed.two();
    let witness = Witness::start(guest_a, &bed.guests[2]);
    let (a, b) = bed.pair(1 << 20);
    let (c, d) = bed.pair(1 << 20);
    let region = guest_b.memory().plug(1 << 40, 16 << 20).unwrap();
    guest_b.with_connection(|v| v.add_region(&region)).unwrap();
    let plugged = Arc::new(guest_b.memory().view(1 << 40, 16 << 20).unwrap());
    let mr = b.pd.reg_spec(MrSpec::whole(&plugged)).unwrap();
    a.qp.post(SendWr::new(1, Op::Write(mr.remote(100)), &[a.mr.sge(0, 1 << 20)])).unwrap();
    a.cq.next().ok();
    let stop = AtomicBool::new(false);
    let status = std::thread::scope(|scope| {
        let going = scope.spawn(|| traffic(&a, &mr, 500_000, &AtomicBool::new(false)));
        let staying = scope.spawn(|| traffic(&c, &d.mr, 500_000, &stop));
        std::thread::sleep(Duration::from_millis(20));
        guest_b.memory().unplug(1 << 40).unwrap();
        guest_b.with_connection(|v| v.remove_region(&region)).unwrap();
        let before = plugged.read_vec(0, plugged.len());
        let status = going.join().unwrap();
        assert!(plugged.read_vec(0, plugged.len()) == before, "memory that went was written");
        std::thread::sleep(Duration::from_millis(20));
        stop.store(true, Relaxed);
        assert_eq!(staying.join().unwrap(), WcStatus::Success);
        status
    });
    assert_eq!(status, WcStatus::RemAccessErr);
    witness.finish();
}

#[test]
fn memory_truncated_in_the_middle_of_traffic() {
    let bed = Bed::new(4);
    let (c, d) = Rc::pair(&bed.guests[2], &bed.guests[3], 1 << 20).unwrap();
    let (a, b) = pair(&bed, 1 << 20);
    let guest = &bed.guests[1];
    let region = guest.memory().plug(1 << 40, 16 << 20).unwrap();
    guest.with_connection(|v| v.add_region(&region)).unwrap();
    let plugged = Arc::new(guest.memory().view(1 << 40, 16 << 20).unwrap());
    let mr = b.pd.reg_spec(MrSpec::whole(&plugged)).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let going = scope.spawn(|| traffic(&a, &mr, 500_000, &AtomicBool::new(false)));
        let staying = scope.spawn(|| traffic(&c, &d.mr, 500_000, &stop));
        std::thread::sleep(Duration::from_millis(20));
        region.truncate().unwrap();
        eventually("end of the session", SOON, || !bed.router.is_connected(1));
        assert_eq!(going.join().unwrap(), WcStatus::RetryExcErr);
        stop.store(true, Relaxed);
        assert_eq!(staying.join().unwrap(), WcStatus::Success);
    });
    bed.router.wait_objects(1, Objects::default());
}

#[test]
fn local_keys_over_memory_that_went() {
    let bed = Bed::new(2);
    let (guest_a, _) = bed.two();
    let (a, b) = bed.pair(4096);
    let region = guest_a.memory().plug(1 << 40, 1 << 20).unwrap();
    guest_a.with_connection(|v| v.add_region(&region)).unwrap();
    let mr = a.pd.reg_spec(MrSpec::whole(&Arc::new(guest_a.memory().view(1 << 40, 4096).unwrap()))).unwrap();
    guest_a.memory().unplug(1 << 40).unwrap();
    guest_a.with_connection(|v| v.remove_region(&region)).unwrap();
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[mr.sge(0, 8)])).unwrap();
    assert_eq!(a.cq.next().status(), WcStatus::LocProtErr);
}

#[test]
fn rings_in_memory_that_went() {
    let bed = Bed::new(2);
    let (guest_a, guest_b) = bed.two();
    let region = guest_a.memory().plug(1 << 40, 4 << 20).unwrap();
    guest_a.with_connection(|v| v.add_region(&region)).unwrap();
    let (fine, peer) = bed.pair(64);
    let pd = guest_a.alloc_pd().unwrap();
    let cq = guest_a.create_cq(64).unwrap();
    let hog = guest_a.hog_below(1 << 40);
    let qp = pd.create_qp(QpSpec::rc(), &cq).unwrap();
    assert!(qp.sq().buf().gpa(0) >= 1 << 40, "the rings are in the new memory");
    let other = Rc::new(guest_b, QpSpec::rc(), 64).unwrap();
    freeflow_tests::guest::verbs::connect(&qp, &other.qp, &RcOptions::default()).unwrap();
    guest_a.memory().unplug(1 << 40).unwrap();
    guest_a.with_connection(|v| v.remove_region(&region)).unwrap();
    guest_a.events().wait(EventType::QpFatal, qp.number(), SOON).unwrap();
    assert_eq!(qp.state().unwrap(), QpState::Err);
    fine.qp.post(SendWr::inline(1, Op::Write(peer.mr.remote(0)), b"fine")).unwrap();
    fine.cq.next().ok();
    drop(hog);
}

#[test]
fn whole_memory_tables_while_traffic_runs() {
    let bed = Bed::new(2);
    let guest = &bed.guests[1];
    let (a, b) = bed.pair(1 << 20);
    let (c, d) = pair(&bed, 1 << 20);
    let stop = AtomicBool::new(false);
    let statuses = std::thread::scope(|scope| {
        let there = scope.spawn(|| traffic(&a, &b.mr, 400_000, &stop));
        let back = scope.spawn(|| traffic(&d, &c.mr, 100, &stop));
        for _ in 0..20 {
            guest.with_connection(|v| v.set_memory(&guest.memory().regions())).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        stop.store(true, Relaxed);
        (there.join().unwrap(), back.join().unwrap())
    });
    assert_eq!(statuses, (WcStatus::Success, WcStatus::Success));
}

#[test]
fn regions_come_and_go_while_traffic_runs() {
    let bed = Bed::new(2);
    let (a, b) = bed.pair(1 << 20);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let traffic = scope.spawn(|| traffic(&a, &b.mr, 10_000, &stop));
        for _ in 0..20 {
            let region = bed.guests[1].memory().plug(1 << 41, 1 << 20).unwrap();
            bed.guests[1].with_connection(|v| v.add_region(&region)).unwrap();
            bed.guests[1].memory().unplug(1 << 41).unwrap();
            bed.guests[1].with_connection(|v| v.remove_region(&region)).unwrap();
        }
        stop.store(true, Relaxed);
        assert_eq!(traffic.join().unwrap(), WcStatus::Success);
    });
}

#[test]
fn no_access_after_dereg() {
    let bed = Bed::new(2);
    for _ in 0..20 {
        let (a, mut b) = pair(&bed, 2 << 20);
        let sge = [a.mr.sge(0, 2 << 20)];
        let wrs = [SendWr::new(1, Op::Write(b.mr.remote(0)), &sge); 20];
        a.mr.fill(0, 2 << 20, 1);
        a.qp.post_send(&wrs).unwrap();
        std::thread::sleep(Duration::from_micros(300));
        b.mr.dereg().unwrap();
        b.mr.fill(0, 2 << 20, 0x55);
        std::thread::sleep(Duration::from_millis(2));
        assert!(b.mr.read(0, 2 << 20) == vec![0x55; 2 << 20], "written after DEREG_MR was answered");
        let last = a.cq.take(1)[0];
        assert!(matches!(last.status(), WcStatus::Success | WcStatus::RemAccessErr));
    }
}

#[test]
fn no_completion_after_destroy() {
    let bed = Bed::new(2);
    for _ in 0..20 {
        let (a, b) = bed.pair(1 << 20);
        let sge = [a.mr.sge(0, 1 << 20)];
        let wrs = [SendWr::new(1, Op::Write(b.mr.remote(0)), &sge); 50];
        a.qp.post_send(&wrs).unwrap();
        std::thread::sleep(Duration::from_micros(200));
        let (cq, qp) = (a.cq.clone(), a.qp);
        qp.destroy().unwrap();
        cq.poll_many(100);
        assert!(cq.poll_for(Duration::from_millis(3)).is_none());
    }
}

#[test]
fn starting_and_stopping_routers() {
    for _ in 0..5 {
        let router = TestRouter::start(&RouterSpec::of(1));
        let guest = router.guest(0, GuestConfig::default());
        let end = Rc::new(&guest, QpSpec::rc(), 64).unwrap();
        drop(end);
        guest.disconnect();
        router.stop();
    }
}

#[test]
fn sockets_are_for_the_owner_and_the_group() {
    use std::os::unix::fs::PermissionsExt;
    let bed = Bed::new(1);
    let mode = std::fs::metadata(bed.router.socket_of(0)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
}
