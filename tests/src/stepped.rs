//! Guests on a device that has no threads, no sockets and no clock: everything happens when it is asked for. What a run does
//! depends on nothing but what it is told (and on keys and QP numbers, which are random).

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use freeflow_backend::stepped::{SteppedHost, SteppedNic};
use freeflow_backend::{EngineConfig, NicId, Profile, Rates};
use freeflow_router::config::EngineSettings;
use freeflow_router::overlay::Addresses;

use crate::guest::{Guest, GuestConfig, Result};
use crate::router::{RouterSpec, TestRouter};

/// Bytes of each guest's memory.
pub const MEMORY: u64 = 16 << 20;

/// A host with one worker, virtual NICs with a guest on each, and the time.
#[derive(Debug)]
pub struct Stepped {
    /// The guests.
    pub guests: Vec<Guest>,
    nics: Vec<Arc<Mutex<SteppedNic>>>,
    host: SteppedHost,
    now: Instant,
}

impl Stepped {
    /// This many virtual NICs of one tenant.
    pub fn new(nics: usize, limits: &Profile) -> Result<Self> {
        Self::with_rates(nics, limits, &Rates::default())
    }

    /// The same, each of which may be only so fast.
    pub fn with_rates(nics: usize, limits: &Profile, rates: &Rates) -> Result<Self> {
        let overlay = Arc::new(Addresses::default());
        let engine = EngineSettings { workers: 1, ..EngineSettings::default() };
        let spec =
            RouterSpec { limits: limits.clone(), rates: rates.clone(), vectors: 1, engine, ..RouterSpec::of(nics) };
        // Nobody works while a command is executed.
        let timing = EngineConfig { last_words: Duration::ZERO, ..EngineConfig::default() };
        let mut host = SteppedHost::new(timing, overlay.clone(), spec.device.clone())?;
        let config = spec.config(Path::new("/"), |nic| format!("n{nic}"));
        let mut all = Vec::new();
        for (number, settings) in config.nic.iter().enumerate() {
            let (id, nic) = (NicId(number as u32), settings.to_nic());
            overlay.add(id, &nic);
            all.push(Arc::new(Mutex::new(host.add_nic(id, nic))));
        }
        let guest = |(number, nic): (usize, &Arc<Mutex<SteppedNic>>)| {
            let gids = TestRouter::gids_of(number);
            Guest::direct(nic, GuestConfig { memory_size: MEMORY, gids, ..GuestConfig::default() })
        };
        let guests = all.iter().enumerate().map(guest).collect::<Result<_>>()?;
        Ok(Self { guests, nics: all, host, now: Instant::now() })
    }

    /// The device side of a virtual NIC.
    pub fn nic(&self, nic: usize) -> MutexGuard<'_, SteppedNic> {
        self.nics[nic].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The worker looks everywhere once. True if there was something to do.
    pub fn step(&mut self) -> bool {
        self.host.step(0, self.now).0
    }

    /// The worker works for this long, by the clock that its own work turns.
    pub fn run(&mut self, time: Duration) {
        self.run_with(time, || {});
    }

    /// As [`run`](Self::run), with what the guests do between two steps.
    pub fn run_with(&mut self, time: Duration, mut guests: impl FnMut()) {
        let end = self.now + time;
        while self.now < end {
            guests();
            self.now += self.host.step(0, self.now).1;
        }
    }

    /// Steps until there is nothing to do now; how long that takes on a nominal machine.
    pub fn work(&mut self) -> Duration {
        let mut total = Duration::ZERO;
        for _ in 0..1_000_000 {
            let (worked, time) = self.host.step(0, self.now);
            if !worked {
                return total;
            }
            total += time;
        }
        panic!("the worker finds work for ever");
    }

    /// Time goes on.
    pub fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    /// Steps until there is nothing to do now; panics if that does not come.
    pub fn settle(&mut self) {
        for _ in 0..1_000_000 {
            if !self.step() {
                return;
            }
        }
        panic!("the worker finds work for ever");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::verbs::{Op, QpSpec, Rc, RcOptions, SendWr};
    use virtio_rdma::ib::WcStatus;

    fn pair(bed: &Stepped) -> (Rc, Rc) {
        Rc::pair_with(&bed.guests[0], &bed.guests[1], &QpSpec::rc(), 4096, &RcOptions::default()).unwrap()
    }

    #[test]
    fn nothing_happens_by_itself() {
        let mut bed = Stepped::new(2, &Profile::default()).unwrap();
        let (a, b) = pair(&bed);
        bed.settle();
        a.qp.post(SendWr::inline(1, Op::Write(b.mr.remote(0)), b"now")).unwrap();
        std::thread::sleep(Duration::from_millis(1));
        assert!(a.cq.poll().is_none());
        assert!(bed.step());
        // Over a NIC that is not all.
        bed.settle();
        a.cq.poll().unwrap().ok();
        assert_eq!(b.mr.read(0, 3), b"now");
    }

    #[test]
    fn waits_end_by_the_clock_that_is_told() {
        let mut bed = Stepped::new(2, &Profile::default()).unwrap();
        // 4.096 us x 2^18 is a second; the first try and one more.
        let options = RcOptions { timeout: 18, retry_cnt: 1, ..RcOptions::default() };
        let (a, b) = Rc::pair_with(&bed.guests[0], &bed.guests[1], &QpSpec::rc(), 64, &options).unwrap();
        drop(b);
        let id = 7;
        a.qp.post(SendWr::inline(id, Op::Send, b"nobody is there")).unwrap();
        for _ in 0..15 {
            bed.pass(Duration::from_millis(100));
            bed.settle();
            assert!(a.cq.poll().is_none());
        }
        bed.pass(Duration::from_secs(10));
        bed.settle();
        bed.pass(Duration::from_secs(10));
        bed.settle();
        assert_eq!(a.cq.poll().map(|wc| (wc.wr_id(), wc.status())), Some((id, WcStatus::RetryExcErr)));
    }
}
