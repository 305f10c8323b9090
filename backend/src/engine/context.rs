//! What a worker carries from one quantum to the next: scratch memory, and what is settled at a quantum's end.

use std::sync::Arc;
use std::time::Instant;

use virtio_rdma::ib::Access;
use virtio_rdma::ring::Cqe;

use super::completions::{Completions, How};
use super::hand::Hand;
use super::job::Job;
use super::quiesce::Grace;
use super::sampler::Sampler;
use super::tally::Tally;
use super::tcp::Links;
use super::verbs::Scratch;
use super::{Engine, cost};
use crate::cq::{Cq, CqBroken};
use crate::mem::Seg;
use crate::mr::{KeyError, Mr};
use crate::nic::Nic;
use crate::nic::meters::Meter;
use crate::on_demand::{Absent, Fault, OnDemand};
use crate::overlay::NicId;
use crate::qp::Identity;
use crate::rate::Work;
use crate::tcp::PeerId;
use crate::wqe::Sge;

/// Bytes that one visit to a QP may move before others have their turn.
pub const QUANTUM_BYTES: u64 = 64 * 1024;
/// Work requests that one visit to a QP may start.
pub const QUANTUM_WQES: u32 = 32;

/// Jobs that are kept for reuse: as many as may be on their way to another host in a round.
const SPARE_JOBS: usize = 128;

/// Bytes that could be moved in the time that one more look-up takes.
const BYTES_PER_LOOKUP: u64 = 1024;

/// Quanta beyond the present one that memory is found for at once.
const STRETCH: u32 = 3;

/// How often a visit may go on because nobody else waits. It bounds how long a quantum lasts.
pub const REFILLS: u32 = 15;

/// What is left of a visit.
#[derive(Clone, Copy)]
pub struct Budget<'a> {
    /// Bytes.
    pub bytes: u64,
    /// Work requests.
    pub wqes: u32,
    refills: u32,
    /// Whether nobody else waits for the worker.
    alone: &'a dyn Fn() -> bool,
}

impl<'a> Budget<'a> {
    /// A whole visit.
    pub fn full(alone: &'a dyn Fn() -> bool) -> Self {
        Self { bytes: QUANTUM_BYTES, wqes: QUANTUM_WQES, refills: REFILLS, alone }
    }

    /// Nothing: whatever is checked only where bytes do not move at once, is.
    pub fn empty() -> Self {
        Self { bytes: 0, wqes: 0, refills: 0, alone: &|| false }
    }

    /// Bytes to find memory for at once, to be moved in strides of what [`bytes`](Self::bytes) says. To find it takes as long as to move some KiB.
    pub fn stretch(&self) -> u64 {
        if self.bytes == 0 { 0 } else { self.bytes + QUANTUM_BYTES * u64::from(self.refills.min(STRETCH)) }
    }

    /// Goes on with the visit after a look whether others wait; false if they do, or it has been long enough.
    pub fn refill(&mut self) -> bool {
        if self.refills == 0 || !(self.alone)() {
            return false;
        }
        *self = Self { refills: self.refills - 1, ..Self::full(self.alone) };
        true
    }

    /// Looking up keys and extents takes time too: a long list counts like bytes.
    pub fn charge_lookups(&mut self, count: usize) {
        self.bytes = self.bytes.saturating_sub(count.saturating_sub(1) as u64 * BYTES_PER_LOOKUP);
    }

    /// Whether this many bytes can be moved in what is left of the visit.
    pub fn fits(&self, bytes: u64) -> bool {
        bytes <= self.bytes
    }

    /// As [`take_wqe`](Self::take_wqe) for one that somebody else will move the bytes of: they count only if others wait.
    pub fn take_posted(&mut self) -> bool {
        if self.bytes == 0 && self.wqes > 0 && self.refills > 0 && (self.alone)() {
            self.bytes = QUANTUM_BYTES;
        }
        self.take_wqe()
    }

    /// So many more messages of this length are made of a work request that was taken.
    pub fn take_more(&mut self, messages: usize, bytes: u64) {
        let messages = u32::try_from(messages).unwrap_or(u32::MAX);
        self.wqes = self.wqes.saturating_sub(messages);
        self.bytes = self.bytes.saturating_sub(u64::from(messages).saturating_mul(bytes));
    }

    /// Takes a work request out of the budget; false when it is used up.
    pub fn take_wqe(&mut self) -> bool {
        let left = self.wqes > 0 && self.bytes > 0;
        self.wqes = self.wqes.saturating_sub(1);
        left
    }
}

/// Worker state that belongs to no QP.
#[derive(Debug)]
pub struct Context {
    /// The engine.
    pub engine: Arc<Engine>,
    /// The worker's number.
    pub worker: usize,
    /// The time, as of the present round.
    pub now: Instant,
    /// Source of the present copy.
    pub src: Vec<Seg>,
    /// Destination of the present copy.
    pub dst: Vec<Seg>,
    /// What the present request waits for, if it does for a page.
    pub paging: Paging,
    /// For the host's NIC.
    pub verbs: Scratch,
    /// Links to other hosts, once there are any.
    pub tcp: Option<Box<Links>>,
    keys: KeyCache,
    #[expect(clippy::vec_box, reason = "jobs move between here and queues, and are large")]
    spare: Vec<Box<Job>>,
    completions: Completions,
    pub(super) hand: Hand,
    /// Cost of what was done since somebody asked.
    spent: u64,
    /// What the present visit may do at most, for the sake of rates.
    room: Option<Work>,
    /// All that was done for guests, of what rates limit.
    work: Work,
    /// The most of it that one work request for the host's NIC came to.
    posted: u64,
    /// Picks work requests that are timed.
    pub(super) sampler: Sampler,
    sent: Tally<Meter>,
    received: Tally<Nic>,
}

impl Context {
    /// For one worker of `engine`.
    pub fn new(engine: Arc<Engine>, worker: usize) -> Self {
        Self {
            engine,
            worker,
            now: Instant::now(),
            src: Vec::new(),
            dst: Vec::new(),
            paging: Paging::default(),
            verbs: Scratch::default(),
            tcp: None,
            keys: KeyCache::default(),
            spare: Vec::new(),
            completions: Completions::default(),
            hand: Hand::default(),
            spent: 0,
            room: None,
            work: Work::default(),
            posted: 0,
            sampler: Sampler::new(Instant::now()),
            sent: Tally::default(),
            received: Tally::default(),
        }
    }

    /// Counts work, in units of [`cost`].
    pub fn charge(&mut self, cost: u64) {
        self.spent += cost;
    }

    /// Counts a work request that is begun.
    pub fn count_op(&mut self) {
        self.work.ops += 1;
    }

    /// Counts payload that is moved.
    pub fn count_bytes(&mut self, len: u64) {
        self.work.bytes += len;
    }

    /// Visits may do this much from now on, and not go on when they have; without, what a visit may.
    pub fn limit_visits(&mut self, room: Option<Work>) {
        self.room = room;
    }

    /// For a visit. `alone` tells whether nobody else waits for the worker.
    pub fn budget<'a>(&self, alone: &'a dyn Fn() -> bool) -> Budget<'a> {
        let full = Budget::full(alone);
        let Some(room) = self.room else { return full };
        Budget {
            bytes: full.bytes.min(room.bytes),
            wqes: full.wqes.min(room.ops.try_into().unwrap_or(u32::MAX)),
            refills: 0,
            ..full
        }
    }

    /// All that was done so far.
    pub fn work(&self) -> Work {
        self.work
    }

    /// Counts keys or extents that are looked up, also in what is left of a visit.
    pub fn charge_lookups(&mut self, budget: &mut Budget<'_>, count: usize) {
        self.charge(cost::LOOKUP * count as u64);
        budget.charge_lookups(count);
    }

    /// Counts bytes that the host's NIC is given to move, as if we did: its time is shared like ours.
    pub fn charge_posted(&mut self, bytes: u64) {
        let cost = cost::bytes(bytes);
        self.charge(cost);
        self.posted = self.posted.max(cost);
    }

    /// The largest of those since the last call.
    pub fn take_posted(&mut self) -> u64 {
        std::mem::take(&mut self.posted)
    }

    /// What was done since the last call cost this much.
    pub fn take_spent(&mut self) -> u64 {
        std::mem::take(&mut self.spent) + std::mem::take(&mut self.paging.spent)
    }

    /// A cleared job.
    pub fn new_job(&mut self) -> Box<Job> {
        self.spare.pop().unwrap_or_default()
    }

    /// Takes a job back for reuse.
    pub fn recycle(&mut self, mut job: Box<Job>) {
        if self.spare.len() < SPARE_JOBS {
            job.clear();
            self.spare.push(job);
        }
    }

    /// The region of a key, remembered until the quantum ends.
    ///
    /// # Errors
    /// When there is none.
    pub fn key(&mut self, nic: &Nic, key: u32) -> Result<&Arc<Mr>, KeyError> {
        self.keys.get(nic, key)
    }

    /// This key does not give access any more, to what it did: what to wait for until nobody uses that.
    pub fn forget_key(&mut self, nic: &Nic, key: u32) -> Grace {
        self.keys.forget(nic, key);
        self.engine.quiesce().begin(self.worker)
    }

    /// Appends where bytes of a responder are that a key gives its peer access to.
    ///
    /// # Errors
    /// What does not hold, or that a page is missing.
    pub fn reach(&mut self, side: Side, nic: &Nic, qp: &Identity, at: Remote, len: u64) -> Result<(), Unreachable> {
        let mr = self.keys.get(nic, at.rkey)?;
        mr.check_remote((qp.pdn, qp.qpn), at.need, at.addr, len)?;
        let out = match side {
            Side::Source => &mut self.src,
            Side::Destination => &mut self.dst,
        };
        let found = mr.segments(at.need, at.addr, len, out);
        found.map_err(|(pages, absent)| self.paging.miss(nic, pages, absent, self.now))
    }

    /// Whether a page of what one of these keys gives access to may be missing.
    pub fn any_on_demand(&mut self, nic: &Nic, mut keys: impl Iterator<Item = u32>) -> bool {
        keys.any(|key| self.keys.get(nic, key).is_ok_and(|mr| mr.is_on_demand()))
    }

    /// Checks every key of an SGE list.
    ///
    /// # Errors
    /// What does not hold.
    pub fn check_sges(&mut self, nic: &Nic, pdn: u32, need: Access, sges: &[Sge]) -> Result<(), KeyError> {
        for sge in sges.iter().filter(|s| s.length > 0) {
            self.keys.get(nic, sge.lkey)?.check(pdn, need, sge.addr, sge.length.into())?;
        }
        Ok(())
    }

    /// Appends where bytes `from` to `from + len` of an SGE list are, checking keys again: they may have gone since the request started.
    ///
    /// # Errors
    /// What does not hold, or that a page is missing.
    pub fn gather(&mut self, side: Side, list: &Gather<'_>) -> Result<(), Unreachable> {
        let out = match side {
            Side::Source => &mut self.src,
            Side::Destination => &mut self.dst,
        };
        let (mut skip, mut left) = (list.from, list.len);
        for sge in list.sges {
            let length = u64::from(sge.length);
            if skip >= length {
                skip -= length;
                continue;
            }
            let len = (length - skip).min(left);
            if len == 0 {
                break;
            }
            let mr = self.keys.get(list.nic, sge.lkey)?;
            let addr = sge.addr.wrapping_add(skip);
            mr.check(list.pdn, list.need, addr, len)?;
            let found = mr.segments(list.need, addr, len, out);
            found.map_err(|(pages, absent)| self.paging.miss(list.nic, pages, absent, self.now))?;
            left -= len;
            skip = 0;
        }
        Ok(())
    }

    /// Writes a completion, maybe a little later together with others. Whether the guest wants an event is looked at when the quantum
    /// ends.
    ///
    /// # Errors
    /// When the CQ is broken; that was reported to the guest.
    #[inline]
    pub(super) fn push_cqe(&mut self, nic: &Arc<Nic>, cq: &Arc<Cq>, cqe: &Cqe, how: How) -> Result<(), CqBroken> {
        self.charge(cost::CQE);
        self.completions.push(&self.engine, (nic, cq), cqe, how)
    }

    /// Shows guests the completions so far.
    pub fn publish(&mut self) {
        self.completions.publish(&self.engine);
    }

    /// Shows guests the completions so far, and raises events where they wait for them.
    pub fn announce(&mut self) {
        self.spent += self.completions.announce(&self.engine);
    }

    /// A send work request has succeeded.
    #[inline]
    pub fn count_sent(&mut self, meter: &Arc<Meter>, bytes: u64) {
        self.sent.add(meter, bytes);
    }

    /// A receive of `nic` has succeeded.
    #[inline]
    pub fn count_received(&mut self, nic: &Arc<Nic>, bytes: u64) {
        self.received.add(nic, bytes);
    }

    /// What people call a host that there is a link to.
    pub fn host_name(&self, peer: PeerId) -> Option<Arc<str>> {
        self.tcp.as_ref()?.name_of(peer)
    }

    /// The quantum ends: events go out, and nothing that was looked up is used any more.
    pub fn settle(&mut self) {
        self.hand.give_back();
        self.announce();
        self.sent.settle();
        self.received.settle();
        self.keys.entries.clear();
        self.src.clear();
        self.dst.clear();
    }
}

/// The page fault that a request waits for.
#[derive(Debug, Default)]
pub struct Paging {
    /// The fault.
    pub fault: Option<Arc<Fault>>,
    /// Cost of telling guests.
    spent: u64,
}

impl Paging {
    /// A page is missing: its guest is told, and the request waits unless that has been denied.
    #[cold]
    fn miss(&mut self, nic: &Nic, pages: &OnDemand, absent: Absent, now: Instant) -> Unreachable {
        let Absent::Missing(missing) = absent else { return Unreachable::Paging };
        let Ok((fault, tell)) = pages.fault(self.fault.take(), missing, now) else {
            return KeyError::NoPage(pages.key()).into();
        };
        if tell {
            self.spent += cost::EVENT;
            nic.raise_fault(pages.key(), missing);
        }
        self.fault = Some(fault);
        Unreachable::Paging
    }
}

/// Why bytes are not to be had now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// They may not be.
    #[error(transparent)]
    Refused(#[from] KeyError),
    /// A page is missing: the request waits for it ([`Context::paging`]).
    #[error("a page is missing")]
    Paging,
}

/// Which list of segments to append to.
#[derive(Debug, Clone, Copy)]
pub enum Side {
    /// Bytes come from there.
    Source,
    /// Bytes go there.
    Destination,
}

/// What a peer reaches.
#[derive(Debug, Clone, Copy)]
pub struct Remote {
    /// Access that is needed.
    pub need: Access,
    /// First byte.
    pub addr: u64,
    /// Key.
    pub rkey: u32,
}

/// Part of an SGE list.
#[derive(Debug)]
pub struct Gather<'a> {
    /// Whose keys they are.
    pub nic: &'a Nic,
    /// Protection domain of the QP.
    pub pdn: u32,
    /// Access that is needed.
    pub need: Access,
    /// The list.
    pub sges: &'a [Sge],
    /// First byte.
    pub from: u64,
    /// Bytes.
    pub len: u64,
}

/// Regions looked up in this quantum.
#[derive(Debug, Default)]
struct KeyCache {
    entries: Vec<(KeyOf, Arc<Mr>)>,
}

/// A key and whose it is.
type KeyOf = (NicId, u32);

impl KeyCache {
    const SIZE: usize = 8;

    #[inline]
    fn get(&mut self, nic: &Nic, key: u32) -> Result<&Arc<Mr>, KeyError> {
        let wanted = (nic.id, key);
        match self.entries.iter().position(|(known, _)| *known == wanted) {
            Some(index) => Ok(&self.entries[index].1),
            None => self.look_up(nic, key),
        }
    }

    #[inline(never)]
    fn look_up(&mut self, nic: &Nic, key: u32) -> Result<&Arc<Mr>, KeyError> {
        let mr = nic.keys.get(key)?;
        if self.entries.len() == Self::SIZE {
            self.entries.remove(0);
        }
        self.entries.push(((nic.id, key), mr));
        Ok(&self.entries[self.entries.len() - 1].1)
    }

    /// What this key gave access to is not to be found here any more.
    fn forget(&mut self, nic: &Nic, key: u32) {
        self.entries.retain(|(known, _)| *known != (nic.id, key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_to_many_hosts_is_as_many_messages() {
        let mut budget = Budget::full(&|| true);
        budget.take_more(9, 4096);
        assert_eq!((budget.wqes, budget.bytes), (QUANTUM_WQES - 9, QUANTUM_BYTES - 9 * 4096));
        budget.take_more(usize::MAX, 1);
        assert!(!budget.take_wqe());
    }
}
