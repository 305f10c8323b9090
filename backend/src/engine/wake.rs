//! How a worker sleeps, and what wakes it: guests' kicks, other threads, time.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_queue::SegQueue;
use parking_lot::Mutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::rest::{Rest, Spent};
use super::tcp::Command;
use crate::handshake;
use crate::nic::Nic;
use crate::overlay::NicId;
use crate::qp::Qp;

/// One worker's, shared with those who want something of it.
#[derive(Debug)]
pub struct Mailbox {
    posts: SegQueue<(Arc<Nic>, Arc<Qp>)>,
    commands: SegQueue<Command>,
    asleep: AtomicU32,
    sleeps: AtomicU64,
    rest: Rest,
    epoll: Epoll,
    wake: EventFd,
    timer: Mutex<TimerFd>,
    kicks: Mutex<HashMap<(NicId, usize), File>>,
}

impl Mailbox {
    /// An empty one, of a worker that is woken by this descriptor, too.
    pub fn new(also: Option<RawFd>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let timer = TimerFd::new().map_err(io::Error::from)?;
        // Edge-triggered: nobody has to read the counters to make the next write count.
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(edge, 0))?;
        epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), EpollEvent::new(edge, 0))?;
        if let Some(fd) = also {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Self {
            posts: SegQueue::new(),
            commands: SegQueue::new(),
            asleep: AtomicU32::new(0),
            sleeps: AtomicU64::new(0),
            rest: Rest::new(Instant::now()),
            epoll,
            wake,
            timer: Mutex::new(timer),
            kicks: Mutex::default(),
        })
    }

    /// The worker is woken by this descriptor, too, as long as it can be read.
    pub fn also_wake(&self, fd: RawFd) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))
    }

    /// Puts a QP before the worker. Once is enough: a guest that has it done without end fills nothing, and nobody waits behind it.
    pub fn post(&self, nic: Arc<Nic>, qp: Arc<Qp>) {
        if !qp.is_put.swap(true, Ordering::AcqRel) {
            self.posts.push((nic, qp));
        }
        self.wake();
    }

    /// The next QP that somebody put here.
    pub fn take(&self) -> Option<(Arc<Nic>, Arc<Qp>)> {
        let (nic, qp) = self.posts.pop()?;
        // Not just stored: whoever puts it here from now on does so again, and of those before what they did is seen.
        qp.is_put.swap(false, Ordering::AcqRel);
        Some((nic, qp))
    }

    /// Tells the worker something about links.
    pub fn command(&self, command: Command) {
        self.commands.push(command);
        self.wake();
    }

    /// The next thing that it was told.
    pub fn next_command(&self) -> Option<Command> {
        // Asked for in every round, and nearly never so: to look whether there is one costs less than to take none.
        if self.commands.is_empty() { None } else { self.commands.pop() }
    }

    /// Wakes the worker if it sleeps or is about to.
    pub fn wake(&self) {
        if handshake::must_wake(&self.asleep) {
            // Fails only when the counter is full, and then the worker is being woken.
            let _ = self.wake.write(1);
        }
    }

    /// Sets, replaces or removes the eventfd of a doorbell queue.
    pub fn set_kick(&self, nic: NicId, queue: usize, kick: Option<File>) -> io::Result<()> {
        let mut kicks = self.kicks.lock();
        if let Some(old) = kicks.remove(&(nic, queue)) {
            self.epoll.ctl(ControlOperation::Delete, old.as_raw_fd(), EpollEvent::default())?;
        }
        if let Some(new) = kick {
            let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
            self.epoll.ctl(ControlOperation::Add, new.as_raw_fd(), EpollEvent::new(edge, 0))?;
            kicks.insert((nic, queue), new);
        }
        Ok(())
    }

    /// From here on others wake the worker. It looks once more for work, then calls [`sleep`](Self::sleep) or [`stay_awake`](Self::stay_awake).
    pub fn prepare_sleep(&self) {
        handshake::begin_sleep(&self.asleep);
    }

    /// There was work after all.
    pub fn stay_awake(&self) {
        handshake::end_sleep(&self.asleep);
    }

    /// Whether somebody has put something here.
    pub fn has_posts(&self) -> bool {
        !self.posts.is_empty() || !self.commands.is_empty()
    }

    /// Sleeps until woken, or for this long.
    pub fn sleep(&self, limit: Option<Duration>) {
        self.sleeps.fetch_add(1, Ordering::Relaxed);
        self.rest.begin(Instant::now());
        if let Err(error) = self.wait(limit) {
            log::error!("a data-path worker cannot sleep: {error}");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.rest.end(Instant::now());
        self.stay_awake();
    }

    /// How many times the worker has slept.
    pub fn sleeps(&self) -> u64 {
        self.sleeps.load(Ordering::Relaxed)
    }

    /// What it did with its time.
    pub fn spent(&self) -> Spent {
        self.rest.spent(Instant::now)
    }

    fn wait(&self, limit: Option<Duration>) -> io::Result<()> {
        let mut timer = self.timer.lock();
        match limit {
            Some(limit) => timer.reset(limit.max(Duration::from_nanos(1)), None).map_err(io::Error::from)?,
            None => timer.clear().map_err(io::Error::from)?,
        }
        drop(timer);
        let mut events = [EpollEvent::default(); 16];
        match self.epoll.wait(-1, &mut events) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}
