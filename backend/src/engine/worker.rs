//! A data-path worker: a thread that looks at the doorbells of its virtual NICs, visits their QPs in turn, and sleeps when
//! there has been nothing to do for a while.
//!
//! Virtual NICs share it by deficit round robin over what their work costs ([`cost`]): each gets the same credit in each round, is
//! served while it has some, and what it used beyond that is missing in the next round.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::context::Context;
use super::serve::{Next, serve};
use super::tcp::Tell;
use super::timers::Timers;
use super::wake::Mailbox;
use super::{Engine, RESTING, cost, tcp, verbs};
use crate::nic::Nic;
use crate::nic::areas::DoorbellArea;
use crate::overlay::NicId;
use crate::qp::Qp;
use crate::verbs::Member;

/// Bitmap words (of 64 doorbells) that one round takes from one virtual NIC, so that a guest that rings everything does not hold up others.
const WORDS_PER_ROUND: usize = 2;
/// Visits in a row to the QP that was busy last before doorbells are looked at.
const STREAK: u32 = 4;
/// Rounds without work between two looks at the clock; a round is some tens of nanoseconds.
const ROUNDS_PER_CLOCK: u32 = 16;
/// Posts from other threads that one round takes.
const POSTS_PER_ROUND: usize = 64;
/// Timers that one round takes from one virtual NIC.
const TIMERS_PER_ROUND: usize = 64;

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

/// A worker without a thread: it works when it is told to.
#[derive(Debug)]
pub struct SteppedWorker(Worker);

impl SteppedWorker {
    pub(super) fn new(engine: Arc<Engine>, index: usize) -> Self {
        engine.seen[index].store(RESTING, Ordering::SeqCst);
        Self(Worker::new(engine, index))
    }

    /// Looks everywhere once, at this time. True if there was something to do; with how long that takes on a nominal machine.
    pub fn step(&mut self, now: Instant) -> (bool, Duration) {
        let worker = &mut self.0;
        // Before the version is looked at: whoever changes it then waits for us, or we see the change.
        worker.engine.seen[worker.index].store(worker.version, Ordering::SeqCst);
        worker.ctx.now = now;
        if let Some(fabric) = worker.engine.fabric() {
            verbs::see_to(&worker.engine, fabric);
        }
        let before = worker.spent;
        let worked = worker.round();
        worker.engine.seen[worker.index].store(RESTING, Ordering::SeqCst);
        // Nobody waits for its events here: there is something to do as long as it is at work.
        let worked = worked || worker.engine.fabric().is_some_and(|fabric| fabric.side(worker.index).is_busy());
        (worked, Duration::from_nanos(cost::ROUND + worker.spent - before))
    }
}

#[derive(Debug)]
struct Worker {
    engine: Arc<Engine>,
    index: usize,
    ctx: Context,
    ports: Vec<Port>,
    version: u64,
    last_work: Instant,
    /// Cost of all that was done.
    spent: u64,
    /// Whether the last round served anybody.
    served: bool,
    /// Everybody has all the credit there is: a round that finds nothing to do leaves it so.
    all_rich: bool,
    /// Whether any virtual NIC may have timers.
    timed: bool,
}

/// One virtual NIC as this worker sees it.
#[derive(Debug)]
struct Port {
    nic: Arc<Nic>,
    queue: usize,
    area: Option<Arc<DoorbellArea>>,
    /// Summary bits taken but not followed yet.
    pending: Vec<u64>,
    /// Whether there are any.
    is_pending: bool,
    /// QPs with something to do.
    run: VecDeque<Arc<Qp>>,
    /// QPs with something to do later.
    timers: Timers,
    /// What it may use still in this round, or has used too much.
    credit: i64,
    /// The QP that had something to do last. While the worker polls it looks at that one's ring directly, which is
    /// quicker than waiting for the doorbell.
    hot: Option<Arc<Qp>>,
    /// Visits to it since the doorbells were last looked at.
    streak: u32,
    /// Until when it is held to its rate.
    held: Option<Instant>,
}

impl Worker {
    fn new(engine: Arc<Engine>, index: usize) -> Self {
        let ctx = Context::new(engine.clone(), index);
        Self {
            engine,
            index,
            ctx,
            ports: Vec::new(),
            version: 0,
            last_work: Instant::now(),
            spent: 0,
            served: false,
            all_rich: false,
            timed: false,
        }
    }

    fn run(&mut self) {
        let mut idle_rounds = 0u32;
        while !self.engine.stop.load(Ordering::Relaxed) {
            if idle_rounds.is_multiple_of(ROUNDS_PER_CLOCK) {
                self.ctx.now = Instant::now();
            }
            if self.round() {
                self.last_work = self.ctx.now;
                idle_rounds = 0;
            } else {
                idle_rounds += 1;
                std::hint::spin_loop();
            }
            if self.ctx.now - self.last_work >= self.engine.config.poll {
                self.sleep();
                idle_rounds = 0;
            }
        }
    }

    /// Looks everywhere once. True if there was something to do.
    fn round(&mut self) -> bool {
        let mut worked = self.enter();
        worked |= self.poll_nic();
        worked |= self.with_links(tcp::poll);
        worked |= self.take_posts();
        worked |= self.take_timers();
        self.all_rich &= !worked;
        self.grant();
        let mut port = 0;
        while port < self.ports.len() {
            worked |= self.turn(port);
            port += 1;
        }
        worked |= self.with_links(tcp::flush);
        self.leave();
        self.all_rich &= !worked;
        worked
    }

    /// A new round: everybody gets the same credit. Where nobody had any left, that is as much as the first one needs.
    fn grant(&mut self) {
        if self.all_rich {
            return;
        }
        let waiting = self.ports.iter().filter(|port| port.is_in_debt() && !port.is_quiet());
        let debt = if self.served { 0 } else { waiting.map(|port| -port.credit).min().unwrap_or(0) };
        self.all_rich = true;
        for port in &mut self.ports {
            port.credit = (port.credit + debt + cost::QUANTUM).min(cost::QUANTUM);
            self.all_rich &= port.credit == cost::QUANTUM;
        }
        self.served = false;
    }

    /// One virtual NIC's turn: it is served until its credit is used up. True if it had something to do, whether it was served or
    /// must wait.
    fn turn(&mut self, index: usize) -> bool {
        let mut worked = false;
        let now = self.ctx.now;
        while let Some(port) = self.ports.get_mut(index) {
            if (port.nic.pacer.is_limited() || port.held.is_some()) && port.is_held(now) {
                return worked;
            }
            if port.is_in_debt() {
                return worked || !port.is_quiet();
            }
            let before = self.ctx.work();
            if !self.visit(index) {
                return worked;
            }
            self.leave();
            self.charge(index);
            self.ports[index].nic.pacer.count(now, self.ctx.work() - before);
            self.enter();
            (worked, self.served) = (true, true);
        }
        worked
    }

    /// What was done since the last time was for this virtual NIC.
    fn charge(&mut self, index: usize) {
        let (spent, posted) = (self.ctx.take_spent(), self.ctx.take_posted());
        self.spent += spent;
        self.ports[index].charge_visit(spent, posted);
    }

    /// A quantum begins: what is looked up from here on stays valid until it ends. What the worker remembers from earlier is
    /// brought up to date; true if that was needed.
    fn enter(&mut self) -> bool {
        self.engine.quiesce.enter(self.index);
        self.refresh()
    }

    /// The quantum ends.
    fn leave(&mut self) {
        self.ctx.settle();
        self.engine.quiesce.leave(self.index);
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
                    self.ports.push(Port::refreshed(port, &nic, queue, self.ctx.now));
                }
            }
        }
        drop(old);
        // Those that are new have no credit yet.
        self.all_rich = false;
        self.engine.seen[self.index].store(version, Ordering::Release);
        true
    }

    /// Takes completions of the host's NIC.
    fn poll_nic(&mut self) -> bool {
        let ports = &mut self.ports;
        verbs::poll(&mut self.ctx, &mut |Member { nic, qp, .. }, spent, wanted| {
            let queue = qp.id.doorbell_queue;
            if let Some(port) = ports.iter_mut().find(|p| p.nic.id == nic.id && p.queue == queue) {
                port.charge(spent);
                if wanted {
                    port.schedule(qp.clone());
                }
            }
        })
    }

    /// Sees to links, and has queue pairs visited that these say are to be.
    fn with_links(&mut self, see_to: impl FnOnce(&mut Context, &mut Tell<'_>) -> bool) -> bool {
        let ports = &mut self.ports;
        let worked = see_to(&mut self.ctx, &mut |nic, qp, spent| {
            let queue = qp.id.doorbell_queue;
            if let Some(port) = ports.iter_mut().find(|p| p.nic.id == nic.id && p.queue == queue) {
                port.charge(spent);
                port.schedule(qp.clone());
            }
        });
        // What peers have done here is no virtual NIC's to pay for.
        self.spent += self.ctx.take_spent();
        worked
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
        if !self.timed {
            return false;
        }
        let now = self.ctx.now;
        let mut any = false;
        self.timed = false;
        for port in &mut self.ports {
            any |= port.take_timers(now);
            self.timed |= port.timers.next().is_some();
        }
        any
    }

    fn schedule(&mut self, nic: NicId, qp: Arc<Qp>) {
        let queue = qp.id.doorbell_queue;
        if let Some(port) = self.ports.iter_mut().find(|p| p.nic.id == nic && p.queue == queue) {
            port.charge(cost::POST);
            port.schedule(qp);
        }
    }

    /// Takes doorbells of one virtual NIC and visits one of its QPs.
    fn visit(&mut self, index: usize) -> bool {
        let port = &mut self.ports[index];
        if !port.nic.is_running() {
            return false;
        }
        let mut rang = false;
        let hot = port.next_hot();
        let next = hot.or_else(|| {
            rang = port.take_doorbells();
            port.next_qp()
        });
        let Some(qp) = next else {
            return rang;
        };
        let (ports, mailbox) = (&self.ports, &self.engine.mailboxes[self.index]);
        let alone = || !mailbox.has_posts() && ports.iter().all(Port::is_quiet);
        let next = serve(&mut self.ctx, &ports[index].nic, &qp, &alone);
        let port = &mut self.ports[index];
        match next {
            Next::Idle => port.hot = Some(qp),
            Next::Again => port.schedule(qp),
            Next::At(at) => {
                port.timers.push(at, qp);
                self.timed = true;
            }
        }
        true
    }

    fn sleep(&mut self) {
        self.mailbox().prepare_sleep();
        self.enter();
        self.tell_guests(true);
        let wanted = self.is_wanted();
        self.leave();
        if wanted {
            self.mailbox().stay_awake();
        } else {
            let next = self.ports.iter().flat_map(|port| [port.timers.next(), port.held]).flatten();
            let next = next.chain(tcp::next_timer(&self.ctx)).min();
            let limit = next.map(|at| at.saturating_duration_since(Instant::now()));
            self.mailbox().sleep(limit);
        }
        self.enter();
        self.tell_guests(false);
        self.leave();
        self.ctx.now = Instant::now();
        self.last_work = self.ctx.now;
    }

    /// Whether something came while the worker was about to sleep.
    fn is_wanted(&mut self) -> bool {
        let changed = self.engine.version.load(Ordering::SeqCst) != self.version;
        changed
            || self.engine.stop.load(Ordering::SeqCst)
            || self.mailbox().has_posts()
            || !verbs::arm(&mut self.ctx)
            || tcp::is_wanted(&self.ctx)
            || self.rung()
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
        // Taking doorbells costs credit.
        self.all_rich = false;
        let mut ports = self.ports.iter_mut().filter(|p| p.nic.is_running() && p.held.is_none());
        ports.any(|port| port.take_doorbells() || !port.run.is_empty())
    }

    fn mailbox(&self) -> &Mailbox {
        &self.engine.mailboxes[self.index]
    }
}

impl Port {
    fn refreshed(old: Option<Self>, nic: &Arc<Nic>, queue: usize, now: Instant) -> Self {
        let area = nic.doorbells[queue].area.read().clone();
        let same = |port: &Self| match (&port.area, &area) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        let words = area.as_ref().map_or(0, |a| a.summary_words());
        match old.filter(|port| Arc::ptr_eq(&port.nic, nic)) {
            Some(port) if same(&port) => port,
            // QPs that wait to be visited still do.
            Some(port) => Self { area, pending: vec![0; words], is_pending: false, ..port },
            None => Self {
                nic: nic.clone(),
                queue,
                area,
                pending: vec![0; words],
                is_pending: false,
                run: VecDeque::new(),
                timers: Timers::new(now),
                credit: 0,
                hot: None,
                streak: 0,
                held: None,
            },
        }
    }

    fn charge(&mut self, cost: u64) {
        self.charge_visit(cost, 0);
    }

    /// A visit that gave the host's NIC, at most, a work request of cost `posted` at once: that cannot be taken in pieces, and is waited for.
    fn charge_visit(&mut self, cost: u64, posted: u64) {
        let limit = cost::MAX_DEBT.max(posted.cast_signed());
        self.credit = (self.credit - cost.cast_signed()).max(-limit);
    }

    fn is_in_debt(&self) -> bool {
        self.credit <= 0
    }

    /// Visits QPs whose time has come. True if there were any.
    fn take_timers(&mut self, now: Instant) -> bool {
        let mut any = false;
        for _ in 0..TIMERS_PER_ROUND {
            let due = if self.is_in_debt() { None } else { self.timers.pop_due(now) };
            let Some(qp) = due else {
                break;
            };
            self.charge(cost::TIMER);
            self.schedule(qp);
            any = true;
        }
        any
    }

    fn schedule(&mut self, qp: Arc<Qp>) {
        if !qp.scheduled.swap(true, Ordering::Relaxed) {
            self.run.push_back(qp);
        }
    }

    /// The QP that was visited last, if it has more and nobody else is known to wait. Its doorbell is left as it is for a few visits: taking
    /// it each time would cost both sides a cache line there and back.
    fn next_hot(&mut self) -> Option<Arc<Qp>> {
        let quiet = self.run.is_empty() && !self.is_pending;
        if self.streak < STREAK && quiet && self.hot.as_ref().is_some_and(|qp| qp.has_posted()) {
            self.streak += 1;
            return self.hot.take();
        }
        self.streak = 0;
        None
    }

    /// The next QP to visit.
    fn next_qp(&mut self) -> Option<Arc<Qp>> {
        if let Some(qp) = self.run.pop_front() {
            qp.scheduled.store(false, Ordering::Relaxed);
            return Some(qp);
        }
        self.hot.take_if(|qp| qp.has_posted())
    }

    /// Whether it must wait, for the sake of its rate.
    fn is_held(&mut self, now: Instant) -> bool {
        let was_held = self.held.is_some();
        self.held = self.nic.pacer.held(now);
        if self.held.is_some() && !was_held {
            self.nic.counters.rate_waits.add(1);
        }
        self.held.is_some()
    }

    /// Whether none of its QPs waits to be visited, or may be. Those of a guest that does not run do not, and its memory is left alone.
    fn is_quiet(&self) -> bool {
        if !self.nic.is_running() || self.held.is_some() {
            return true;
        }
        self.run.is_empty() && !self.is_pending && !self.is_rung()
    }

    fn is_rung(&self) -> bool {
        self.area.as_ref().is_some_and(|area| area.is_rung())
    }

    /// Follows doorbells to their QPs. True if there were any.
    fn take_doorbells(&mut self) -> bool {
        // Every round asks this of every virtual NIC: one that is quiet is to cost little.
        if !self.is_pending && !self.is_rung() {
            return false;
        }
        // Taken out while it is used, so that nothing is counted on this hot path.
        let Some(area) = self.area.take() else {
            return false;
        };
        let any = self.take_from(&area);
        self.area = Some(area);
        any
    }

    fn take_from(&mut self, area: &DoorbellArea) -> bool {
        let mut words = WORDS_PER_ROUND;
        let mut any = false;
        for index in 0..self.pending.len() {
            self.pending[index] |= area.take_summary(index);
            while self.pending[index] != 0 && words > 0 {
                let bit = self.pending[index].trailing_zeros() as usize;
                self.pending[index] &= self.pending[index] - 1;
                let word = index * 64 + bit;
                let doorbells = area.take_doorbells(word);
                self.charge(cost::DOORBELL_WORD + cost::DOORBELL * u64::from(doorbells.count_ones()));
                self.follow(word, doorbells);
                words -= 1;
                any = true;
            }
        }
        self.is_pending = self.pending.iter().any(|&p| p != 0);
        any || self.is_pending
    }

    fn follow(&mut self, word: usize, mut doorbells: u64) {
        if doorbells == 0 {
            return;
        }
        let slots = self.nic.doorbells[self.queue].slots.read();
        while doorbells != 0 {
            let slot = word as u32 * 64 + doorbells.trailing_zeros();
            doorbells &= doorbells - 1;
            if let Some(qp) = slots.get(slot)
                && !qp.scheduled.swap(true, Ordering::Relaxed)
            {
                self.run.push_back(qp.clone());
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
