//! A data-path worker: a thread that looks at the doorbells of its virtual NICs, visits their QPs in turn, and sleeps when
//! there has been nothing to do for a while.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::thread::JoinHandle;
use std::time::Instant;

use super::Engine;
use super::context::Context;
use super::serve::{Next, serve};
use super::timers::Timers;
use super::wake::Mailbox;
use crate::nic::Nic;
use crate::nic::areas::DoorbellArea;
use crate::overlay::NicId;
use crate::qp::Qp;

/// Bitmap words (of 64 doorbells) that one round takes from one virtual NIC, so that a guest that rings everything does not hold up others.
const WORDS_PER_ROUND: usize = 2;
/// Posts from other threads that one round takes.
const POSTS_PER_ROUND: usize = 64;

/// Starts worker `index`.
pub fn spawn(engine: Arc<Engine>, index: usize) -> io::Result<JoinHandle<()>> {
    let name = format!("worker{index}");
    std::thread::Builder::new().name(name).spawn(move || {
        if let Some(&core) = engine.config.cores.get(index) {
            pin(core);
        }
        Worker::new(engine, index).run();
    })
}

struct Worker {
    engine: Arc<Engine>,
    index: usize,
    ctx: Context,
    ports: Vec<Port>,
    version: u64,
    timers: Timers,
    last_work: Instant,
}

/// One virtual NIC as this worker sees it.
struct Port {
    nic: Arc<Nic>,
    queue: usize,
    area: Option<Arc<DoorbellArea>>,
    /// Summary bits taken but not followed yet.
    pending: Vec<u64>,
    /// QPs with something to do.
    run: VecDeque<Arc<Qp>>,
}

impl Worker {
    fn new(engine: Arc<Engine>, index: usize) -> Self {
        let ctx = Context::new(engine.clone());
        let last_work = Instant::now();
        Self { engine, index, ctx, ports: Vec::new(), version: 0, timers: Timers::new(), last_work }
    }

    fn run(&mut self) {
        while !self.engine.stop.load(Ordering::Relaxed) {
            self.ctx.now = Instant::now();
            if self.round() {
                self.last_work = self.ctx.now;
            } else if self.ctx.now - self.last_work >= self.engine.config.poll {
                self.sleep();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// Looks everywhere once. True if there was something to do.
    fn round(&mut self) -> bool {
        let mut worked = self.quantum(Self::refresh);
        worked |= self.take_posts();
        worked |= self.take_timers();
        for port in 0..self.ports.len() {
            worked |= self.quantum(|worker| worker.visit(port));
        }
        worked
    }

    /// Does something during which what it looks up stays valid.
    fn quantum<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let engine = self.engine.clone();
        engine.quiesce.enter(self.index);
        let result = work(self);
        self.ctx.settle();
        engine.quiesce.leave(self.index);
        result
    }

    /// Takes over a changed list of virtual NICs or areas.
    fn refresh(&mut self) -> bool {
        let version = self.engine.version.load(Ordering::SeqCst);
        if version == self.version {
            return false;
        }
        self.version = version;
        let mut old = std::mem::take(&mut self.ports);
        for nic in self.engine.nics() {
            for (queue, doorbells) in nic.doorbells.iter().enumerate() {
                if doorbells.worker == self.index {
                    let known = old.iter().position(|p| p.nic.id == nic.id && p.queue == queue);
                    let port = known.map(|i| old.swap_remove(i));
                    self.ports.push(Port::refreshed(port, &nic, queue));
                }
            }
        }
        true
    }

    fn take_posts(&mut self) -> bool {
        let mut any = false;
        for _ in 0..POSTS_PER_ROUND {
            let Some((nic, qp)) = self.mailbox().take() else {
                break;
            };
            self.schedule(nic.id, qp);
            any = true;
        }
        any
    }

    fn take_timers(&mut self) -> bool {
        let mut any = false;
        while let Some((nic, qp)) = self.timers.pop_due(self.ctx.now) {
            self.schedule(nic.id, qp);
            any = true;
        }
        any
    }

    fn schedule(&mut self, nic: NicId, qp: Arc<Qp>) {
        let queue = qp.id.doorbell_queue;
        if let Some(port) = self.ports.iter_mut().find(|p| p.nic.id == nic && p.queue == queue) {
            port.schedule(qp);
        }
    }

    /// Takes doorbells of one virtual NIC and visits one of its QPs.
    fn visit(&mut self, index: usize) -> bool {
        let port = &mut self.ports[index];
        if !port.nic.is_running() {
            return false;
        }
        let rang = port.take_doorbells();
        let Some(qp) = port.run.pop_front() else {
            return rang;
        };
        qp.scheduled.store(false, Ordering::Relaxed);
        let nic = port.nic.clone();
        match serve(&mut self.ctx, &nic, &qp) {
            Next::Idle => {}
            Next::Again => self.ports[index].schedule(qp),
            Next::At(at) => self.timers.push(at, nic, qp),
        }
        true
    }

    fn sleep(&mut self) {
        self.mailbox().prepare_sleep();
        self.quantum(|worker| worker.tell_guests(true));
        // Pairs with the driver's barrier between ringing and looking whether we sleep.
        fence(Ordering::SeqCst);
        let stop = self.engine.stop.load(Ordering::SeqCst);
        if stop
            || self.engine.version.load(Ordering::SeqCst) != self.version
            || self.mailbox().has_posts()
            || self.quantum(Self::rung)
        {
            self.mailbox().stay_awake();
        } else {
            let limit = self.timers.next().map(|at| at.saturating_duration_since(Instant::now()));
            self.mailbox().sleep(limit);
        }
        self.quantum(|worker| worker.tell_guests(false));
        self.last_work = Instant::now();
    }

    fn tell_guests(&mut self, sleeping: bool) {
        for port in self.ports.iter().filter(|p| p.nic.is_running()) {
            if let Some(area) = &port.area {
                area.set_sleeping(sleeping);
            }
        }
    }

    /// Whether any doorbell is waiting.
    fn rung(&mut self) -> bool {
        let mut ports = self.ports.iter_mut().filter(|p| p.nic.is_running());
        ports.any(|port| port.take_doorbells() || !port.run.is_empty())
    }

    fn mailbox(&self) -> &Mailbox {
        &self.engine.mailboxes[self.index]
    }
}

impl Port {
    fn refreshed(old: Option<Self>, nic: &Arc<Nic>, queue: usize) -> Self {
        let area = nic.doorbells[queue].area.read().clone();
        let same = |port: &Self| match (&port.area, &area) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        if let Some(port) = old.filter(same) {
            return port;
        }
        let words = area.as_ref().map_or(0, |a| a.summary_words());
        Self { nic: nic.clone(), queue, area, pending: vec![0; words], run: VecDeque::new() }
    }

    fn schedule(&mut self, qp: Arc<Qp>) {
        if !qp.scheduled.swap(true, Ordering::Relaxed) {
            self.run.push_back(qp);
        }
    }

    /// Follows doorbells to their QPs. True if there were any.
    fn take_doorbells(&mut self) -> bool {
        let Some(area) = self.area.clone() else {
            return false;
        };
        let mut words = WORDS_PER_ROUND;
        let mut any = false;
        for index in 0..self.pending.len() {
            self.pending[index] |= area.take_summary(index);
            while self.pending[index] != 0 && words > 0 {
                let bit = self.pending[index].trailing_zeros() as usize;
                self.pending[index] &= self.pending[index] - 1;
                let word = index * 64 + bit;
                self.follow(word, area.take_doorbells(word));
                words -= 1;
                any = true;
            }
        }
        any || self.pending.iter().any(|&p| p != 0)
    }

    fn follow(&mut self, word: usize, mut doorbells: u64) {
        if doorbells == 0 {
            return;
        }
        let nic = self.nic.clone();
        let slots = nic.doorbells[self.queue].slots.read();
        while doorbells != 0 {
            let slot = word * 64 + doorbells.trailing_zeros() as usize;
            doorbells &= doorbells - 1;
            if let Some(Some(qp)) = slots.get(slot) {
                self.schedule(qp.clone());
            }
        }
    }
}

/// Keeps the calling thread on one core. A machine without that core is no reason to fail.
fn pin(core: usize) {
    if let Err(error) = crate::affinity::pin_to(core) {
        log::warn!("cannot pin a worker to core {core}: {error}");
    }
}
