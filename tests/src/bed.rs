//! Guests on a router, ready to use, and a witness that they are undisturbed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::guest::mem::Placement;
use crate::guest::verbs::{Op, QpSpec, Rc, RcOptions, SendWr};
use crate::guest::{Guest, GuestConfig};
use crate::router::{RouterSpec, TestRouter};

/// A router and a guest on each of its virtual NICs.
#[derive(Debug)]
pub struct Bed {
    /// The guests; dropped before the router.
    pub guests: Vec<Guest>,
    /// The router.
    pub router: TestRouter,
}

impl Bed {
    /// A router with this many virtual NICs and a guest on each.
    pub fn new(nics: usize) -> Self {
        Self::with(&RouterSpec::of(nics), Placement::Contiguous)
    }

    /// As [`new`](Self::new), with no two adjacent pages in any ring or area.
    pub fn fragmented(nics: usize) -> Self {
        Self::with(&RouterSpec::of(nics), Placement::Fragmented)
    }

    /// With limits and the like, and rings placed as asked.
    pub fn with(spec: &RouterSpec, rings: Placement) -> Self {
        Self::guests(spec, &GuestConfig { rings, ..GuestConfig::default() })
    }

    /// With everything chosen.
    pub fn guests(spec: &RouterSpec, config: &GuestConfig) -> Self {
        let nics = spec.nics;
        let router = TestRouter::start(spec);
        let guests = (0..nics).map(|nic| router.guest(nic, config.clone())).collect();
        Self { guests, router }
    }

    /// Two guests, the usual case.
    pub fn two(&self) -> (&Guest, &Guest) {
        (&self.guests[0], &self.guests[1])
    }

    /// A connected pair of RC ends of the first two guests, with regions of `len` bytes.
    pub fn pair(&self, len: usize) -> (Rc, Rc) {
        let (a, b) = self.two();
        Rc::pair(a, b, len).expect("a connected pair")
    }
}

/// Asks until something holds; panics with `what` when it does not in `timeout`.
#[track_caller]
pub fn eventually(what: &str, timeout: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + timeout;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not happen within {timeout:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A connection between two guests that works all the time, and notices when something is wrong.
#[derive(Debug)]
pub struct Witness {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Witness {
    /// Starts to write from one guest to the other and back, comparing every byte.
    pub fn start(a: &Guest, b: &Guest) -> Self {
        Self::start_with(a, b, &RcOptions::default())
    }

    /// The same, with retries and the like as asked.
    pub fn start_with(a: &Guest, b: &Guest, options: &RcOptions) -> Self {
        let spec = QpSpec { send_depth: 7, recv_depth: 7, ..QpSpec::rc() };
        let (a, b) = Rc::pair_with(a, b, &spec, 4096, options).expect("the witness connects");
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&rounds));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Relaxed) {
                let round = counter.load(Relaxed);
                exchange(&a, &b, round);
                exchange(&b, &a, round);
                counter.store(round + 1, Relaxed);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        Self { stop, rounds, thread }
    }

    /// Stops it; panics if it saw anything wrong or made no progress since now.
    #[track_caller]
    pub fn finish(self) {
        let before = self.rounds.load(Relaxed);
        eventually("progress of the witness", Duration::from_secs(10), || {
            self.thread.is_finished() || self.rounds.load(Relaxed) >= before + 2
        });
        self.stop.store(true, Relaxed);
        self.thread.join().expect("the witness saw nothing wrong");
    }
}

fn exchange(from: &Rc, to: &Rc, round: u64) {
    let bytes: Vec<u8> = (0..1024u64).map(|i| (i * 31 + round * 7) as u8).collect();
    from.mr.write(0, &bytes);
    let sge = from.mr.sge(0, bytes.len());
    from.qp.post(SendWr::new(round, Op::Write(to.mr.remote(2048)), &[sge])).expect("room in the ring");
    let wc = from.cq.next().ok();
    assert_eq!(wc.wr_id(), round);
    assert_eq!(to.mr.read(2048, bytes.len()), bytes);
}
