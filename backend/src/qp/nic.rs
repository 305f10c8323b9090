//! What a send queue remembers whose work requests go to the host's NIC.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_rdma::ib::WcOpcode;

use crate::engine::Seen;
use crate::verbs::{End, GrantBudget, GrantCache, KeySide};

/// Work requests on the NIC, and what is needed to put more there.
#[derive(Debug)]
pub struct NicQueue {
    /// The queue pair on the NIC.
    pub end: Arc<End>,
    /// That of the peer, once connected.
    pub peer: Option<Arc<End>>,
    /// The end that it is to be connected to, and whether that has been seen to.
    asked: Option<(Arc<End>, Arc<AtomicBool>)>,
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
}

impl NicQueue {
    /// Over this end; what it remembers counts there.
    pub fn new(end: Arc<End>, budget: &Arc<GrantBudget>) -> Self {
        Self {
            end,
            peer: None,
            asked: None,
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
            (self.end, self.peer, self.asked, self.seen) = (now, None, None, 0);
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
