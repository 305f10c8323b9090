//! The send queue of a QP: what its worker remembers between two visits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Qp;
use super::nic::NicQueue;
use super::remote::RemoteFlow;
use crate::engine::job::Job;
use crate::mem::Map;
use crate::nic::Nic;
use crate::nic::meters::{Meter, Path, Way};
use crate::rate::Pace;
use crate::ring::rxe::{Caps, guess_keys, parse_send, prefetch_send};
use crate::ring::{BadIndex, Ring};
use crate::wqe::Send;

/// Why a work request waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitKind {
    /// The peer has no receive posted (RNR NAK).
    Rnr,
    /// The peer does not answer: not there, not ready, or not the one we were connected to.
    Lost,
    /// Its own memory: a page of an on-demand region is missing.
    Page,
    /// The peer's memory: the same there. As long as the peer would be waited for that does not answer.
    PeerPage,
    /// A datagram's destination has no receive posted; patience before it is dropped.
    Datagram,
    /// The connection to a datagram's host has no room for it; the same.
    Room,
}

/// A work request that waits for the peer.
#[derive(Debug, Clone, Copy)]
pub struct Wait {
    /// For what.
    pub kind: WaitKind,
    /// When this wait began.
    pub since: Instant,
    /// When this try is over and counts as a retry.
    pub deadline: Instant,
    /// When to look again.
    pub next_look: Instant,
}

impl Wait {
    /// A wait that ends after `period`.
    pub fn new(kind: WaitKind, now: Instant, period: Duration) -> Self {
        Self { kind, since: now, deadline: now + period, next_look: now + Self::SHORTEST_LOOK }
    }

    /// The first look.
    pub const SHORTEST_LOOK: Duration = Duration::from_micros(2);
    const LONGEST_LOOK: Duration = Duration::from_millis(100);

    /// Sets when to look again: soon at first, later the longer it takes, and when this try is over.
    pub fn look_later(&mut self, now: Instant) {
        let gap = (now - self.since) / 8;
        self.next_look = now + gap.clamp(Self::SHORTEST_LOOK, Self::LONGEST_LOOK);
        if self.deadline > now {
            self.next_look = self.next_look.min(self.deadline);
        }
    }
}

/// The peer that a connected QP has found.
#[derive(Debug, Clone)]
pub struct Binding {
    /// Its virtual NIC.
    pub nic: Arc<Nic>,
    /// The peer.
    pub qp: Arc<Qp>,
    /// Which life of it.
    pub incarnation: u64,
    /// [`Nic::gid_epoch`] of both sides when it was found.
    pub gid_epochs: (u64, u64),
}

/// Send ring, our side of it, and what is under way.
#[derive(Debug)]
pub struct SendQueue {
    ring: Option<Ring>,
    /// What elements are held to.
    pub caps: Caps,
    consumer: u32,
    /// The guest's producer index when we last looked.
    posted: u32,
    /// Our index that the guest knows.
    published: u32,
    /// A work request that took more than one visit.
    pub job: Option<Box<Job>>,
    /// What it waits for, if it does.
    pub wait: Option<Wait>,
    /// The peer, once found.
    pub binding: Option<Binding>,
    /// Incarnation of the only peer that this life of the QP talks to, once the first message went.
    pub bound_to: Option<u64>,
    /// Retries used for the present work request.
    pub retries: u8,
    /// RNR retries used for the present work request.
    pub rnr_retries: u8,
    /// SQD: an event is due when what is under way is done.
    pub notify_drained: bool,
    /// How much it has done, where that is limited.
    pub pace: Pace,
    /// Work requests completed.
    pub completed: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Its way over the host's NIC, if it has one.
    pub nic: Option<Box<NicQueue>>,
    /// Where its work requests are counted that go this way.
    pub meter: Option<(Way, Arc<Meter>)>,
    /// Its way to another host, if its peer is there.
    pub remote: Option<Box<RemoteFlow>>,
    /// Elements before `consumer` whose work requests are on the NIC, or on their way to another host: the guest may not use them again yet.
    on_nic: u32,
}

impl SendQueue {
    /// Over this ring.
    pub fn new(ring: Ring, caps: Caps) -> Self {
        Self {
            ring: Some(ring),
            caps,
            consumer: 0,
            posted: 0,
            published: 0,
            job: None,
            wait: None,
            binding: None,
            bound_to: None,
            retries: 0,
            rnr_retries: 0,
            notify_drained: false,
            pace: Pace::default(),
            completed: 0,
            bytes: 0,
            nic: None,
            meter: None,
            remote: None,
            on_nic: 0,
        }
    }

    /// The ring and the index of the next element; `None` when there is none. The guest's index is looked at only when what it
    /// said last is used up.
    ///
    /// # Errors
    /// When the guest wrote an index outside the ring.
    pub fn peek(&mut self) -> Result<Option<(&Ring, u32)>, BadIndex> {
        let Some(ring) = &self.ring else {
            return Ok(None);
        };
        if self.posted == self.consumer {
            self.posted = ring.producer()?;
            if self.posted == self.consumer {
                return Ok(None);
            }
            // They were last written by another core: under way together they cost little more than one.
            (0..Self::AHEAD).for_each(|n| self.prefetch(ring, n));
        }
        self.prefetch(ring, Self::AHEAD);
        Ok(Some((ring, self.consumer)))
    }

    /// Whether anything that was posted is not done, or not handed over to the NIC or another host.
    pub fn has_more(&mut self) -> bool {
        self.job.is_some() || matches!(self.peek(), Ok(Some(_)))
    }

    /// After [`advance`](Self::advance): whether another element is known to be posted, without looking again.
    pub fn knows_more(&self) -> bool {
        self.posted != self.consumer
    }

    /// Work requests that are known to be posted, the present one and those that follow.
    pub fn known(&self) -> u32 {
        self.ring.as_ref().map_or(0, |ring| ring.between(self.consumer, self.posted))
    }

    /// Reads a work request that comes `n` after the present one, before it is its turn. False if it is malformed.
    pub fn parse_ahead(&self, n: u32, wqe: &mut Send) -> bool {
        let Some(ring) = self.ring.as_ref().filter(|_| n < self.known()) else { return false };
        parse_send(ring, ring.after(self.consumer, n), self.caps, wqe).is_ok()
    }

    /// Requests that are known to follow the present one and may go the way of this host's memory.
    pub fn followers(&self) -> usize {
        match &self.ring {
            Some(ring) if self.nic.is_none() => ring.between(self.consumer, self.posted).saturating_sub(1) as usize,
            _ => 0,
        }
    }

    /// Elements that are fetched before they are parsed.
    const AHEAD: u32 = 8;
    /// Elements whose keys are looked at before they are parsed.
    const KEYS_AHEAD: u32 = 4;

    /// Has what the keys of work requests that follow stand for on the NIC fetched. `first`: this was not done for the present one's
    /// predecessor.
    #[inline]
    pub fn prefetch_keys(&self, first: bool) {
        let (Some(ring), Some(queue)) = (&self.ring, &self.nic) else { return };
        let known = ring.between(self.consumer, self.posted);
        for n in (if first { 1 } else { Self::KEYS_AHEAD })..known.min(Self::KEYS_AHEAD + 1) {
            queue.prefetch(guess_keys(ring, ring.after(self.consumer, n)));
        }
    }

    /// Has the element that comes `n` after the next one fetched, if it was posted: of one that is being written fetching would only get in the way.
    fn prefetch(&self, ring: &Ring, n: u32) {
        if n < ring.between(self.consumer, self.posted) {
            prefetch_send(ring, ring.after(self.consumer, n));
        }
    }

    /// A try of the present work request has ended without success.
    pub fn count_retry(&mut self, kind: WaitKind) {
        let used = if kind == WaitKind::Rnr { &mut self.rnr_retries } else { &mut self.retries };
        *used = used.saturating_add(1);
    }

    /// The present work request is complete: the guest may use its element again once that is [published](Self::publish).
    pub fn advance(&mut self) {
        if let Some(ring) = &self.ring {
            self.consumer = ring.geometry().next(self.consumer);
        }
        self.wait = None;
        self.retries = 0;
        self.rnr_retries = 0;
        self.completed += 1;
    }

    /// The present work request goes to the NIC, or to another host: the next one can start.
    pub fn hand_over(&mut self) {
        self.advance();
        self.completed -= 1;
        self.on_nic += 1;
    }

    /// The oldest of those is complete.
    pub fn retire(&mut self) {
        self.completed += 1;
        self.on_nic = self.on_nic.saturating_sub(1);
    }

    /// Tells the guest which elements it may use again.
    pub fn publish(&mut self) {
        if let Some(ring) = &self.ring {
            let index = ring.before(self.consumer, self.on_nic);
            if index != self.published {
                ring.set_consumer(index);
                self.published = index;
            }
        }
    }

    /// The way of a connected queue pair's requests that are not handed over to the NIC.
    pub fn way(&self) -> Way {
        match &self.remote {
            Some(remote) => Way::to(Path::Tcp, remote.peer),
            // Its peer was found.
            None if self.bound_to.is_some() => Way::here(Path::Local),
            None => Way::default(),
        }
    }

    /// Work requests that were seen and are not complete.
    pub fn depth(&self) -> u32 {
        self.ring.as_ref().map_or(0, |ring| ring.between(self.consumer, self.posted) + self.on_nic)
    }

    /// Work requests on the NIC, or on their way to another host.
    pub fn handed_over(&self) -> u32 {
        self.on_nic
    }

    /// Whether something is under way.
    pub fn is_busy(&self) -> bool {
        self.job.is_some() || self.on_nic > 0
    }

    /// Elements of the ring.
    pub fn entries(&self) -> u32 {
        self.ring.as_ref().map_or(0, |ring| ring.geometry().entries)
    }

    /// Empties the ring and forgets the peer, as a transition to RESET does.
    pub fn reset(&mut self) {
        self.forget();
        (self.consumer, self.posted, self.published) = (0, 0, 0);
        if let Some(ring) = &self.ring {
            ring.set_consumer(0);
            ring.set_producer(0);
        }
    }

    /// Lets go of the ring and of all that is under way.
    pub fn close(&mut self) {
        self.forget();
        self.ring = None;
    }

    /// Lets go of the ring if its memory is no longer there; true if it did.
    pub fn close_if_gone(&mut self, map: &Map) -> bool {
        let gone = self.ring.as_ref().is_some_and(|r| !r.is_in(map));
        if gone {
            self.close();
        }
        gone
    }

    /// Gives up what is under way; a receive that it had taken goes back to the peer.
    pub fn abandon_job(&mut self) -> Option<Box<Job>> {
        let mut job = self.job.take()?;
        job.give_up_receive();
        Some(job)
    }

    fn forget(&mut self) {
        self.abandon_job();
        self.wait = None;
        self.binding = None;
        self.bound_to = None;
        self.retries = 0;
        self.rnr_retries = 0;
        self.notify_drained = false;
        self.nic = None;
        self.remote = None;
        self.on_nic = 0;
    }
}
