//! What a send queue remembers whose work requests go to the host's NIC.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use freeflow_tcp::frame::Open;
use virtio_rdma::ib::WcOpcode;

use crate::engine::Seen;
use crate::nic::meters::{Path, Way};
use crate::verbs::{End, GrantBudget, GrantCache, KeySide, Pair};

/// Work requests on the NIC, and what is needed to put more there.
#[derive(Debug)]
pub struct NicQueue {
    /// The queue pair on the NIC.
    pub end: Arc<End>,
    /// That of the peer, once connected.
    pub peer: Option<Arc<End>>,
    /// The end that it is to be connected to, and whether that has been seen to.
    asked: Option<(Arc<End>, Arc<AtomicBool>)>,
    /// The peer, if it is on another host.
    pub between: Option<Box<Between>>,
    /// Why the peer is not reached over the NIC, if it is not.
    pub apart: Option<&'static str>,
    /// Work requests that were not for the NIC.
    pub alone: u64,
    /// Work requests that are there, oldest first.
    pub posted: VecDeque<Posted>,
    /// Work requests whose end was seen, of all that were ever there.
    pub seen: u32,
    /// Own keys.
    pub own: GrantCache,
    /// The peer's.
    pub theirs: GrantCache,
}

/// What is remembered of a peer on another host that is reached from NIC to NIC.
#[derive(Debug)]
pub struct Between {
    /// What that host has said.
    pub pair: Arc<Pair>,
    /// Who is to be connected to whom, as that host is told.
    pub open: Open,
    /// [`Nic::gid_epoch`](crate::nic::Nic::gid_epoch) when the own GID was last looked for.
    pub gid_epoch: u64,
    /// When it was asked for the peer's end, first and last.
    pub asked: (Instant, Instant),
    /// Set when the own end was connected to the peer's, or could not be.
    pub done: Option<Arc<AtomicBool>>,
    /// The key that is asked for, since when, and when last.
    pub key: Option<(u32, Instant, Instant)>,
    /// Receives that are asked for.
    pub receives: Asked,
    /// Until then messages that take a receive do without the NIC: the peer's receives are not for it.
    pub aloof: Option<Instant>,
}

/// Receives of a peer on another host.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked {
    /// Messages that have taken one.
    pub used: u64,
    /// Messages for which there is to be one.
    pub wanted: u64,
    /// Of the last 64 of those: with a solicited event, and without anything that is put there.
    pub masks: (u64, u64),
    /// When it was asked last, if it has not answered yet, and since when.
    pub open: Option<(Instant, Instant)>,
    /// Answers that were looked at.
    pub answers: u64,
}

/// A work request on the NIC.
#[derive(Debug, Clone, Copy)]
pub struct Posted {
    /// Of the application.
    pub wr_id: u64,
    /// What its completion names.
    pub opcode: WcOpcode,
    /// Bytes of payload.
    pub length: u32,
    /// It makes a completion when it succeeds.
    pub signaled: bool,
    /// When it was seen, if it is timed.
    pub seen: Option<Seen>,
    /// Its way.
    pub way: Way,
}

impl NicQueue {
    /// Over this end; what it remembers counts there.
    pub fn new(end: Arc<End>, budget: &Arc<GrantBudget>) -> Self {
        Self {
            end,
            peer: None,
            asked: None,
            between: None,
            apart: None,
            alone: 0,
            posted: VecDeque::new(),
            seen: 0,
            own: GrantCache::new(KeySide::Local, budget),
            theirs: GrantCache::new(KeySide::Remote, budget),
        }
    }

    /// The queue pair has this end now, in place of one that is gone and of which nothing is left to complete.
    pub fn change_end(&mut self, now: Arc<End>) {
        if self.posted.is_empty() && !Arc::ptr_eq(&self.end, &now) {
            (self.end, self.peer, self.asked, self.between, self.seen) = (now, None, None, None, 0);
        }
    }

    /// It is to be connected to this end: what will say that this was seen to, if it was not asked for before.
    pub fn ask(&mut self, theirs: &Arc<End>) -> Option<Arc<AtomicBool>> {
        if self.asked.as_ref().is_some_and(|(end, _)| Arc::ptr_eq(end, theirs)) {
            return None;
        }
        let done = Arc::new(AtomicBool::new(false));
        self.asked = Some((theirs.clone(), done.clone()));
        Some(done)
    }

    /// The way of what is handed over to the NIC.
    pub fn way(&self) -> Way {
        let between = self.between.as_ref();
        between.map_or(Way::here(Path::Verbs), |between| Way::to(Path::Verbs, between.pair.peer))
    }

    /// Whether a peer on another host has receives on its NIC, or may have, for messages that were not posted yet.
    pub fn awaits_messages(&self) -> bool {
        self.between.as_ref().is_some_and(|between| between.receives.used < between.receives.wanted)
    }

    /// Whether what was asked for last has been seen to.
    pub fn is_answered(&self) -> bool {
        self.asked.as_ref().is_none_or(|(_, done)| done.load(Ordering::Acquire))
    }

    /// Work requests with these keys follow: the peer's, and one's own.
    #[inline]
    pub fn prefetch(&self, (theirs, own): (u32, u32)) {
        self.theirs.prefetch(theirs);
        self.own.prefetch(own);
    }

    /// Another peer, with keys of its own.
    pub fn set_peer(&mut self, peer: Arc<End>) {
        if !self.peer.as_ref().is_some_and(|known| Arc::ptr_eq(known, &peer)) {
            self.theirs.forget();
            self.peer = Some(peer);
            self.asked = None;
        }
    }
}
