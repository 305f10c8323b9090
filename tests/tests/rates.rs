//! Rate limits of virtual NICs and their QPs, under a virtual clock: what is allowed in a second is what gets through.
#![allow(missing_docs, reason = "a test program")]

use std::num::NonZeroU64;
use std::time::Duration;

use freeflow_backend::{Profile, Rates};
use freeflow_tests::guest::Guest;
use freeflow_tests::guest::verbs::{Op, QpSpec, Rc, RcOptions, SendWr};
use freeflow_tests::router::device_of_tests;
use freeflow_tests::stepped::Stepped;
use virtio_rdma::ib::QpState;

/// How long each run takes.
const RUN: Duration = Duration::from_millis(40);
/// A fortieth of it.
const BURST_MS: u32 = 1;

fn rates(bits: &str, ops: u64) -> Rates {
    Rates { bits: bits.parse().ok(), ops: NonZeroU64::new(ops), burst_ms: BURST_MS, ..Rates::default() }
}

fn bed(rates: &Rates) -> Stepped {
    Stepped::with_rates(4, &Profile { max_qp: 256, max_cq: 256, max_mr: 256, ..Profile::default() }, rates).unwrap()
}

/// Work without end on some QPs.
struct Load {
    ends: Vec<(Rc, Rc)>,
    len: usize,
    read: bool,
    done: Vec<u64>,
}

impl Load {
    fn new(a: &Guest, b: &Guest, qps: usize, len: usize) -> Self {
        let spec = QpSpec::rc().depth(31);
        let pair = |_| Rc::pair_with(a, b, &spec, len.max(64), &RcOptions::default()).unwrap();
        Self { ends: (0..qps).map(pair).collect(), len, read: false, done: vec![0; qps] }
    }

    fn pump(&mut self) {
        for ((a, b), done) in self.ends.iter().zip(&mut self.done) {
            while let Some(wc) = a.cq.poll() {
                wc.ok();
                *done += 1;
            }
            let op = if self.read { Op::Read(b.mr.remote(0)) } else { Op::Write(b.mr.remote(0)) };
            while a.qp.post(SendWr::new(1, op, &[a.mr.sge(0, self.len)])).is_ok() {}
        }
    }

    fn total(&self) -> u64 {
        self.done.iter().sum()
    }

    fn bytes(&self) -> u64 {
        self.total() * self.len as u64
    }
}

/// What is allowed in a run, and the burst.
fn allowed(per_second: u64) -> u64 {
    per_second * (RUN.as_millis() as u64 + u64::from(BURST_MS)) / 1000
}

#[track_caller]
fn assert_near(got: u64, wanted: u64) {
    assert!(100 * got.abs_diff(wanted) <= 5 * wanted, "{got}, not {wanted}");
}

fn run(rates: &Rates, qps: usize, len: usize, read: bool) -> Load {
    let mut bed = bed(rates);
    let guests = bed.guests.clone();
    let mut load = Load { read, ..Load::new(&guests[0], &guests[1], qps, len) };
    bed.run_with(RUN, || load.pump());
    load
}

#[test]
fn bits_of_a_virtual_nic() {
    for (qps, len) in [(1, 4096), (1, 65_536), (7, 1000), (2, 256 << 10)] {
        assert_near(run(&rates("8G", 0), qps, len, false).bytes(), allowed(1_000_000_000));
    }
    assert_near(run(&rates("8G", 0), 2, 65_536, true).bytes(), allowed(1_000_000_000));
}

#[test]
fn operations_of_a_virtual_nic() {
    for qps in [1, 16] {
        assert_near(run(&rates("", 50_000), qps, 8, false).total(), allowed(50_000));
    }
}

#[test]
fn each_queue_pair_has_its_own_limits() {
    let rates = Rates { qp_bits: "400M".parse().ok(), burst_ms: BURST_MS, ..Rates::default() };
    for done in run(&rates, 4, 10_000, false).done {
        assert_near(done * 10_000, allowed(50_000_000));
    }
    let rates = Rates { qp_ops: NonZeroU64::new(10_000), burst_ms: BURST_MS, ..Rates::default() };
    for done in run(&rates, 4, 8, false).done {
        assert_near(done, allowed(10_000));
    }
}

#[test]
fn what_its_queue_pairs_may_together_is_not_more_than_the_virtual_nic_may() {
    let rates = Rates { qp_ops: NonZeroU64::new(10_000), ..rates("", 25_000) };
    assert_near(run(&rates, 4, 8, false).total(), allowed(25_000));
}

#[test]
fn a_limited_virtual_nic_does_not_hold_up_others() {
    let mut bed = bed(&Rates::default());
    let guests = bed.guests.clone();
    let mut free = Load::new(&guests[0], &guests[1], 1, 4096);
    bed.run_with(RUN / 2, || free.pump());
    let alone = free.total();
    bed.nic(2).nic().pacer.set(rates("100M", 0));
    let mut limited = Load::new(&guests[2], &guests[3], 4, 4096);
    free.done = vec![0];
    bed.run_with(RUN / 2, || {
        free.pump();
        limited.pump();
    });
    assert!(100 * free.total() >= 95 * alone, "{} beside a limited one, {alone} alone", free.total());
    assert!(limited.total() > 0);
}

/// From a limit to none and back, at once.
/// In SQD what has begun is finished, and a message may be long.
#[test]
fn a_message_that_is_drained_keeps_to_the_limit_of_its_queue_pair() {
    if device_of_tests().is_some() {
        return; // A NIC has all of it at once.
    }
    let rates = Rates { qp_bits: "8M".parse().ok(), burst_ms: BURST_MS, ..Rates::default() };
    let mut bed = bed(&rates);
    let (a, b) = Rc::pair(&bed.guests[0], &bed.guests[1], 1 << 20).unwrap();
    a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &[a.mr.sge(0, 1 << 20)])).unwrap();
    bed.run(Duration::from_micros(100));
    a.qp.modify_state(QpState::Sqd).unwrap();
    bed.run(RUN);
    assert!(a.cq.poll().is_none(), "1 MiB takes a second");
    let rest = (1..2000).find(|_| {
        bed.pass(Duration::from_millis(1));
        bed.settle();
        a.cq.poll().is_some()
    });
    assert!(rest.is_some_and(|rest| (950..=1060).contains(&rest)), "{rest:?} ms for the rest");
}

#[test]
fn limits_may_change() {
    let mut bed = bed(&rates("1k", 0));
    let guests = bed.guests.clone();
    let mut load = Load::new(&guests[0], &guests[1], 2, 4096);
    bed.run_with(RUN / 4, || load.pump());
    // One message passes, and is paid for during half a minute.
    assert!(load.total() <= 32, "{}", load.total());
    bed.nic(0).nic().pacer.set(Rates::default());
    bed.run_with(RUN / 4, || load.pump());
    let unlimited = load.total();
    assert!(unlimited > 1000, "{unlimited}");
    bed.nic(0).nic().pacer.set(rates("", 50_000));
    load.done = vec![0, 0];
    bed.run_with(RUN, || load.pump());
    assert_near(load.total(), allowed(50_000));
    let waits = bed.nic(0).nic().counters.values().rate_waits;
    assert!(waits > 0);
}
