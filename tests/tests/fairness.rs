//! Virtual NICs that share a worker: whatever one of them does, the others get what is theirs. Under a virtual clock, which the
//! worker's own work turns: one second is a second of a worker that has nothing else to do.
#![allow(missing_docs, reason = "a test program")]

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use freeflow_backend::Profile;
use freeflow_tests::guest::mem::Word64;
use freeflow_tests::guest::verbs::{MrSpec, MwType, Op, QpSpec, Rc, RcOptions, Remote, SendWr, Sge};
use freeflow_tests::guest::{Guest, doorbell::DoorbellArea};
use freeflow_tests::router::{device_of_tests, nic_is_late};
use freeflow_tests::stepped::Stepped;
use virtio_rdma::ctrl::QpAttr;
use virtio_rdma::ib::{QpMask, QpState, SendFlags};

/// How long each run takes.
const RUN: Duration = Duration::from_millis(5);
/// Least part of its fair share that a virtual NIC gets, in percent.
const FAIR: u64 = 95;

/// The victim, its peer, the attacker, its peer.
fn bed() -> Stepped {
    Stepped::new(4, &Profile { max_qp: 1024, max_cq: 1024, max_mr: 1100, max_mw: 256, ..Profile::default() }).unwrap()
}

/// WRITEs of one length without end, on some QPs.
struct Load {
    ends: Vec<(Rc, Rc)>,
    len: usize,
    served: u64,
}

impl Load {
    fn new(a: &Guest, b: &Guest, qps: usize, len: usize) -> Self {
        // What a NIC does is complete a step later: with less posted, there would not always be something to do.
        let spec = QpSpec::rc().depth(if device_of_tests().is_some() { 127 } else { 31 });
        let pair = || Rc::pair_with(a, b, &spec, len.max(64), &RcOptions::default()).unwrap();
        Self { ends: (0..qps).map(|_| pair()).collect(), len, served: 0 }
    }

    fn pump(&mut self) {
        for (a, b) in &self.ends {
            while let Some(wc) = a.cq.poll() {
                wc.ok();
                self.served += 1;
            }
            let op = Op::Write(b.mr.remote(0));
            while a.qp.post(SendWr::new(1, op, &[a.mr.sge(0, self.len)])).is_ok() {}
        }
    }
}

/// What an attacker does before each step.
type Attack<'a> = Box<dyn FnMut() + 'a>;

/// How many messages of `len` bytes the victim gets through beside an attack.
fn served(len: usize, attack: impl for<'a> FnOnce(&'a Guest, &'a Guest) -> Attack<'a>) -> u64 {
    let mut bed = bed();
    let guests = bed.guests.clone();
    let mut victim = Load::new(&guests[0], &guests[1], 1, len);
    let mut attack = attack(&guests[2], &guests[3]);
    victim.pump();
    attack();
    bed.run_with(RUN, || {
        victim.pump();
        attack();
    });
    victim.served
}

fn load<'a>(a: &Guest, b: &Guest, qps: usize, len: usize) -> Attack<'a> {
    let mut load = Load::new(a, b, qps, len);
    Box::new(move || load.pump())
}

/// Fails if a victim of any size gets less beside this attack than beside one that does just what it does itself.
#[track_caller]
fn assert_fair(attack: impl for<'a> Fn(&'a Guest, &'a Guest) -> Attack<'a>) {
    if nic_is_late() {
        return;
    }
    for len in [8, 4096, 65536] {
        let fair = served(len, |a, b| load(a, b, 1, len));
        let got = served(len, &attack);
        assert!(fair > 100, "{fair} messages of {len} bytes are too few to tell");
        assert!(100 * got >= FAIR * fair, "{len} bytes: {got} messages, {fair} were fair");
    }
}

#[test]
fn alone_it_gets_all() {
    if nic_is_late() {
        return;
    }
    for len in [8, 4096, 65536] {
        let fair = served(len, |a, b| load(a, b, 1, len));
        let all = served(len, |_, _| Box::new(|| {}));
        assert!(100 * all >= 2 * FAIR * fair, "{len} bytes: {all} messages alone, {fair} with another");
    }
}

#[test]
fn messages_of_different_sizes_share_the_bytes() {
    if nic_is_late() {
        return;
    }
    let mut bed = bed();
    let guests = bed.guests.clone();
    let mut small = Load::new(&guests[0], &guests[1], 1, 64 << 10);
    let mut large = Load::new(&guests[2], &guests[3], 1, 1 << 20);
    bed.run_with(20 * RUN, || {
        small.pump();
        large.pump();
    });
    let (small, large) = (small.served * 64, large.served * 1024);
    // A large one that a NIC moves costs us the work of one small one.
    let fair = if device_of_tests().is_some() { 90 } else { FAIR };
    assert!(100 * small >= fair * large, "{small} KiB in small messages, {large} in large ones");
    assert!(100 * large >= fair * small, "{small} KiB in small messages, {large} in large ones");
}

#[test]
fn large_messages() {
    assert_fair(|a, b| load(a, b, 1, 1 << 20));
}

#[test]
fn many_queue_pairs() {
    assert_fair(|a, b| load(a, b, 64, 8));
    assert_fair(|a, b| load(a, b, 8, 65536));
}

#[test]
fn long_lists() {
    assert_fair(|a, b| {
        let spec = QpSpec::rc().depth(31).sges(32);
        let (a, b) = Rc::pair_with(a, b, &spec, 4096, &RcOptions::default()).unwrap();
        Box::new(move || {
            while a.cq.poll().is_some() {}
            let sges: Vec<Sge> = (0..32).map(|i| a.mr.sge(i * 64, 1)).collect();
            while a.qp.post(SendWr::new(1, Op::Write(b.mr.remote(0)), &sges)).is_ok() {}
        })
    });
}

#[test]
fn doorbells_without_work() {
    assert_fair(|a, b| {
        let pair = |_| Rc::pair_with(a, b, &QpSpec::rc().depth(7), 64, &RcOptions::default()).unwrap();
        let idle: Vec<_> = (0..256).map(pair).collect();
        let bits: Vec<_> = doorbell_words(&a.doorbells()[0], 1024);
        Box::new(move || {
            for (word, ones) in &bits {
                word.store(*ones, SeqCst);
            }
            assert!(!idle.is_empty());
        })
    });
}

/// All words of a doorbell area, to be filled with ones: the bitmap, then the summary.
fn doorbell_words(area: &DoorbellArea, doorbells: usize) -> Vec<(Word64, u64)> {
    let layout = virtio_rdma::area::DoorbellLayout::new(doorbells as u32);
    let bitmap = (0..doorbells / 64).map(|i| area.buf().word64(layout.bitmap() + 8 * i));
    let summary = std::iter::once(area.buf().word64(virtio_rdma::area::DoorbellLayout::SUMMARY));
    bitmap.chain(summary).map(|word| (word, u64::MAX)).collect()
}

#[test]
fn guessing_keys() {
    assert_fair(|a, b| {
        let ends: Vec<_> = (0..32).map(|_| Rc::pair(a, b, 64).unwrap()).collect();
        let mut guess = 0x1234_5678u32;
        Box::new(move || {
            for (a, b) in &ends {
                while a.cq.poll().is_some() {}
                if a.qp.state().unwrap() == QpState::Err {
                    reconnect(a, b);
                }
                guess = guess.wrapping_mul(0x9e37_79b9).wrapping_add(1);
                let remote = Remote { rkey: guess, ..b.mr.remote(0) };
                while a.qp.post(SendWr::new(1, Op::Write(remote), &[a.mr.sge(0, 8)])).is_ok() {}
            }
        })
    });
}

fn reconnect(a: &Rc, b: &Rc) {
    for end in [a, b] {
        end.qp.modify_state(QpState::Reset).unwrap();
    }
    freeflow_tests::guest::verbs::connect(&a.qp, &b.qp, &RcOptions::default()).unwrap();
}

#[test]
fn waiting_for_peers_that_are_not_there() {
    assert_fair(|a, b| {
        let spec = QpSpec::rc().depth(7);
        let options = RcOptions { timeout: 1, retry_cnt: 7, ..RcOptions::default() };
        let pair = |_| Rc::pair_with(a, b, &spec, 64, &options).unwrap();
        let ends: Vec<_> = (0..512).map(pair).map(|(a, _)| a).collect();
        Box::new(move || {
            for a in &ends {
                let _ = a.qp.post(SendWr::inline(1, Op::Send, b"hello?"));
            }
        })
    });
}

#[test]
fn waiting_for_receives() {
    assert_fair(|a, b| {
        let spec = QpSpec::rc().depth(7);
        let ends: Vec<_> = (0..256).map(|_| Rc::pair_with(a, b, &spec, 64, &RcOptions::default()).unwrap()).collect();
        Box::new(move || {
            for (a, _) in &ends {
                let _ = a.qp.post(SendWr::inline(1, Op::Send, b"anybody?"));
            }
        })
    });
}

#[test]
fn events_without_end() {
    assert_fair(|a, b| {
        let ends: Vec<_> = (0..32).map(|_| Rc::pair(a, b, 64).unwrap()).collect();
        Box::new(move || {
            for (a, b) in &ends {
                while a.cq.poll().is_some() {}
                a.cq.arm(false);
                b.cq.arm(false);
                let op = Op::Write(b.mr.remote(0));
                while a.qp.post(SendWr::inline(1, op, b"event").flags(SendFlags::SIGNALED)).is_ok() {}
            }
        })
    });
}

#[test]
fn flushing_without_end() {
    assert_fair(|a, b| {
        let ends: Vec<_> = (0..32).map(|_| Rc::pair(a, b, 64).unwrap()).collect();
        for (a, _) in &ends {
            a.qp.modify_state(QpState::Err).unwrap();
        }
        Box::new(move || {
            for (a, _) in &ends {
                while a.cq.poll().is_some() {}
                while a.qp.post(SendWr::inline(1, Op::Send, b"in vain")).is_ok() {}
            }
        })
    });
}

/// Commands are executed by threads that the worker does not wait for: what they put before it must not pile up.
#[test]
fn nobody_waits_behind_many_changes_of_one_queue_pair() {
    let mut bed = bed();
    let guests = bed.guests.clone();
    let (v, _w) = Rc::pair(&guests[0], &guests[1], 64).unwrap();
    let (a, _b) = Rc::pair(&guests[2], &guests[3], 64).unwrap();
    bed.settle();
    v.qp.post_recv(7, &[v.mr.sge(0, 8)]).unwrap();
    for _ in 0..10_000 {
        a.qp.modify(QpMask::empty(), QpAttr::default()).unwrap();
    }
    v.qp.modify_state(QpState::Err).unwrap();
    let rounds = (1..1000).find(|_| {
        bed.step();
        v.cq.poll().is_some()
    });
    assert!(rounds.is_some_and(|rounds| rounds < 10), "flushed after {rounds:?} rounds");
}

/// Commands that put queue pairs before the worker, one after another.
#[test]
fn changing_states_without_end() {
    assert_fair(|a, b| {
        let ends: Vec<_> = (0..64).map(|_| Rc::pair(a, b, 64).unwrap()).collect();
        Box::new(move || {
            for (a, b) in &ends {
                reconnect(a, b);
            }
        })
    });
}

/// Every table is full, and more is asked for without end.
#[test]
fn asking_for_more_than_the_quotas() {
    assert_fair(|a, b| {
        let mut busy = Load::new(a, b, 4, 8);
        let pd = busy.ends[0].0.pd.clone();
        let spec = MrSpec::whole(&a.alloc(64).unwrap());
        let cqs: Vec<_> = std::iter::from_fn(|| a.create_cq(1).ok()).collect();
        let windows: Vec<_> = std::iter::from_fn(|| pd.alloc_mw(MwType::One).ok()).collect();
        let regions: Vec<_> = std::iter::from_fn(|| pd.reg_spec(spec.clone()).ok()).collect();
        Box::new(move || {
            busy.pump();
            for _ in 0..16 {
                assert!(
                    a.create_cq(1).is_err() && pd.alloc_mw(MwType::One).is_err() && pd.reg_spec(spec.clone()).is_err()
                );
            }
            assert!(!cqs.is_empty() && !windows.is_empty() && !regions.is_empty());
        })
    });
}
