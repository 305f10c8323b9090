//! Queue pairs of two hosts that are connected over both hosts' NICs (`docs/nic.md`, "Between hosts").
//!
//! Work requests go from NIC to NIC. What the two routers have to tell each other for that travels as notes over the link that the hosts have
//! for their messages over TCP: which queue pair on the NIC stands for whom, what a key stands for, which messages find a receive. [`asking`] is
//! the side of the queue pair that sends, [`answering`] that of its peer.
//!
//! Notes get lost with a connection, so whoever asks asks again, and every question can be asked twice. Whatever is not for the NIC goes
//! [as a message](super::super::tcp) when nothing of the queue pair is on the NIC any more.

mod answering;
mod asking;
mod recalled;

use std::sync::{Arc, Weak};

use freeflow_tcp::frame::{Note, PairId};
use freeflow_tcp::host::QpKey;
use freeflow_tcp::{Link, Nanos};
use rustc_hash::FxHashMap;

use self::answering::Answering;
pub(super) use self::asking::{Reach, ask, is_elsewhere, pairing, remote, say_held, stall, take_in_hand, take_receive};
use self::recalled::Recalled;
use crate::engine::Engine;
use crate::engine::context::Context;
use crate::engine::tcp::Tell;
use crate::nic::Nic;
use crate::qp::Qp;
use crate::tcp::{PeerId, Peering};
use crate::verbs::Pair;
use crate::verbs::grant::Recalls;

/// Messages that one note may ask receives for: its masks have as many bits.
const MOST_WANTED: u64 = 64;

/// What a link has of such queue pairs.
#[derive(Debug)]
pub struct Pairs {
    peer: PeerId,
    /// Its name.
    host: Arc<str>,
    link: u16,
    next: u64,
    /// Those that send to the peer's.
    asking: FxHashMap<PairId, Asking>,
    /// Those that the peer's send to.
    answering: FxHashMap<PairId, Answering>,
    /// Which of these a queue pair has now.
    by_qp: FxHashMap<QpKey, PairId>,
    /// Keys that the peer is to forget.
    recalls: Arc<Recalls>,
    /// Those of which it was told so.
    recalled: Recalled,
}

/// A queue pair of this host that sends.
#[derive(Debug)]
struct Asking {
    pair: Weak<Pair>,
    nic: Weak<Nic>,
    qp: Weak<Qp>,
}

impl Pairs {
    /// Of a link to this peer.
    pub fn new(peering: &Peering, link: u16, recalls: Arc<Recalls>) -> Self {
        let (asking, answering, by_qp, recalled) = Default::default();
        Self {
            peer: peering.peer,
            host: peering.name.clone(),
            link,
            next: 0,
            asking,
            answering,
            by_qp,
            recalls,
            recalled,
        }
    }

    /// Whether something is to be said that nobody will wake the worker for.
    pub fn is_wanted(&self) -> bool {
        !self.recalls.is_empty()
    }

    /// When something is to be said again.
    pub fn timer(&self) -> Option<Nanos> {
        self.recalled.timer()
    }

    /// Hears what the peer has said, and says what it must know. `tell` is told of queue pairs that are to be visited. True if there was something.
    pub fn hear(
        &mut self,
        notes: &mut Vec<Note>,
        link: &mut Link,
        now: Nanos,
        ctx: &mut Context,
        tell: &mut Tell<'_>,
    ) -> bool {
        let mut any = !notes.is_empty();
        for note in notes.drain(..) {
            match note {
                Note::Pair { open, end, fabric } => self.on_pair(&open, end, fabric, link, ctx),
                Note::Key { pair, key } => self.on_key(pair, key, link),
                Note::Held { pair } => self.on_held(pair),
                Note::Wanted(wanted) => self.on_wanted(&wanted, link, ctx),
                Note::Revoked { pair, key } => self.recalled.answered(pair, key),
                Note::Paired { .. } | Note::Grant { .. } | Note::Given { .. } | Note::Revoke { .. } => {
                    self.on_answer(note, ctx.now, link, tell);
                }
            }
        }
        while let Some(recall) = self.recalls.pop() {
            any = true;
            self.recalled.say(recall, now, link);
        }
        self.recalled.say_again(now, link);
        any
    }

    /// Lets go of queue pairs that are gone.
    pub fn sweep(&mut self) {
        self.asking.retain(|_, asking| asking.pair.strong_count() > 0);
        self.answering.retain(|_, answering| answering.is_there());
        self.by_qp.retain(|_, pair| self.answering.contains_key(pair));
    }

    /// The other host is gone: what is connected to its NIC fails.
    pub fn leave(&mut self, engine: &Engine) {
        for answering in self.answering.drain().map(|(_, answering)| answering) {
            answering.give_up(engine);
        }
        for asking in self.asking.drain().map(|(_, asking)| asking) {
            if let (Some(_), Some(nic), Some(qp)) = (asking.pair.upgrade(), asking.nic.upgrade(), asking.qp.upgrade())
                && let Some(end) = qp.end().filter(|end| end.elsewhere().is_some())
            {
                super::poll::give_up(engine, &nic, &qp, &end);
            }
        }
        self.by_qp.clear();
        self.recalled = Recalled::default();
        while self.recalls.pop().is_some() {}
    }
}
