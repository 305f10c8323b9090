//! One end of a connection over the NIC: the queue pair there that stands for one life of a guest's queue pair.
//!
//! The guest's worker posts sends and, for messages that it sends, the receives of its peer. Whoever polls a completion notes it here; what
//! the guest sees of it is written by the engine.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use freeflow_tcp::frame::NicEnd;
use parking_lot::{Mutex, MutexGuard, RwLock};
use virtio_rdma::ib::WcStatus;

use super::device::{
    Capacity, Connection, DeviceError, Endpoint, PostError, ProtectionDomain, QueuePair, RecvRequest, SendList, Sending,
};
use super::fabric::Side;
use super::quota::Share;
use crate::wqe::{Recv, Sge};

/// Names a work request in its completion: the end, which queue, and which element of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag(u64);

/// In place of the number of an end: it is on another host.
const ELSEWHERE: u64 = u64::MAX;

/// Bits of a tag for the count within a queue. No queue has as many elements.
const COUNT_BITS: u32 = 23;

impl Tag {
    /// For an end.
    pub fn new(end: u64) -> Self {
        Self(end << (COUNT_BITS + 1))
    }

    /// For a send.
    pub fn send(self, count: u32) -> u64 {
        self.0 | u64::from(count & ((1 << COUNT_BITS) - 1)) << 1
    }

    /// For a receive. They complete in order, so it need not say which.
    pub fn recv(self) -> u64 {
        self.0 | 1
    }

    /// The end.
    pub fn end(id: u64) -> u64 {
        id >> (COUNT_BITS + 1)
    }

    /// Whether it is a receive.
    pub fn is_recv(id: u64) -> bool {
        id & 1 == 1
    }

    /// How many sends from `from` on end with this one.
    pub fn sends_since(id: u64, from: u32) -> u32 {
        let count = (id >> 1) as u32;
        (count.wrapping_sub(from) & ((1 << COUNT_BITS) - 1)) + 1
    }
}

/// A guest's receive that is on the NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostedRecv {
    /// Of the guest.
    pub wr_id: u64,
    /// The message that it is there for asks for an event.
    pub solicited: bool,
}

/// A receive that the NIC is done with. It counts as one that the NIC has until it is dropped: when the guest has its completion.
#[derive(Debug)]
pub struct Completing<'a> {
    end: &'a End,
    recv: PostedRecv,
}

impl std::ops::Deref for Completing<'_> {
    type Target = PostedRecv;

    fn deref(&self) -> &PostedRecv {
        &self.recv
    }
}

impl Drop for Completing<'_> {
    fn drop(&mut self) {
        self.end.recvs.lock().completing -= 1;
    }
}

/// Receives of an end that are on the NIC, locked.
#[derive(Debug)]
pub struct Recvs<'a> {
    end: &'a End,
    all: MutexGuard<'a, PostedRecvs>,
}

impl Recvs<'_> {
    /// Whether another one may be posted.
    pub fn has_room(&self) -> bool {
        self.all.list.len() < self.end.capacity.recvs as usize
    }

    /// Posts a guest's receive, whose list is this in terms of the NIC, for a message that is about to be sent.
    ///
    /// # Errors
    /// When the NIC refuses it, or the end is gone. It is the last of those for [`take_recv`](End::take_recv) all the same: once the end is
    /// [destroyed](End::destroy) all are flushed, in their order.
    pub fn post(mut self, recv: &Recv, solicited: bool, sges: &[Sge]) -> Result<(), PostError> {
        self.end.side.0.expect(1);
        self.all.list.push_back(PostedRecv { wr_id: recv.wr_id, solicited });
        if self.end.unreliable {
            self.all.sges.extend(recv.sges.as_slice());
            self.all.counts.push_back(recv.sges.as_slice().len());
        }
        let pair = self.end.pair.read();
        pair.as_ref().ok_or(PostError { posted: 0 })?.post_recv(&RecvRequest { id: self.end.tag.recv(), sges })
    }
}

/// How sends ended since somebody looked.
#[derive(Debug, Default)]
pub struct Ended {
    /// Those that succeeded.
    pub done: u32,
    /// Those that followed and did not.
    pub failed: VecDeque<WcStatus>,
    /// The end is destroyed: nothing more is noted.
    closed: bool,
}

/// One end.
#[derive(Debug)]
pub struct End {
    tag: Tag,
    /// Which life of the guest's queue pair it is for.
    pub incarnation: u64,
    worker: usize,
    side: (Arc<Side>, usize),
    endpoint: Endpoint,
    capacity: Capacity,
    pd: Arc<dyn ProtectionDomain>,
    /// Whether messages to it may get lost, and their receives be given back.
    unreliable: bool,
    /// Of its virtual NIC's quotas.
    _shares: [Share; 2],
    /// `None` once it is destroyed.
    pair: RwLock<Option<Box<dyn QueuePair>>>,
    /// The end that it is connected to.
    peer: AtomicU64,
    /// The same, if that is on another host.
    elsewhere: OnceLock<NicEnd>,
    /// That host sends nothing to it now, as far as we have heard.
    held: AtomicBool,
    /// Sends may be posted.
    sends: AtomicBool,
    failed: AtomicBool,
    /// Sends posted so far.
    sent: AtomicU32,
    /// Sends that ended so far.
    ended: AtomicU32,
    /// How they ended.
    ends: Mutex<Ended>,
    recvs: Mutex<PostedRecvs>,
}

/// A guest's receives that are on the NIC, oldest first.
#[derive(Debug, Default)]
struct PostedRecvs {
    list: VecDeque<PostedRecv>,
    /// Those that were there before, whose completions are being written.
    completing: usize,
    /// Of an unreliable end: the guest's SGEs of all of them, with how many each has.
    sges: VecDeque<Sge>,
    counts: VecDeque<usize>,
}

impl PostedRecvs {
    fn pop(&mut self) -> Option<PostedRecv> {
        let count = self.counts.pop_front().unwrap_or(0);
        self.sges.drain(..count);
        self.list.pop_front()
    }

    /// As the guest posted them.
    fn take(&mut self) -> Vec<Recv> {
        let (list, counts) = (std::mem::take(&mut self.list), std::mem::take(&mut self.counts));
        let mut sges = std::mem::take(&mut self.sges).into_iter();
        let whole = |(posted, count): (PostedRecv, usize)| {
            let mut recv = Recv { wr_id: posted.wr_id, ..Recv::default() };
            sges.by_ref().take(count).for_each(|sge| recv.sges.push(sge));
            recv
        };
        list.into_iter().zip(counts).map(whole).collect()
    }
}

impl End {
    pub(super) fn new(
        (tag, incarnation): (Tag, u64),
        worker: usize,
        side: (Arc<Side>, usize),
        endpoint: Endpoint,
        capacity: Capacity,
        (pd, unreliable, shares): (&Arc<dyn ProtectionDomain>, bool, [Share; 2]),
        pair: Box<dyn QueuePair>,
    ) -> Self {
        Self {
            tag,
            incarnation,
            worker,
            side,
            endpoint,
            capacity,
            pd: pd.clone(),
            unreliable,
            _shares: shares,
            pair: RwLock::new(Some(pair)),
            peer: AtomicU64::new(0),
            elsewhere: OnceLock::new(),
            held: AtomicBool::new(true),
            sends: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            sent: AtomicU32::new(0),
            ended: AtomicU32::new(0),
            ends: Mutex::default(),
            recvs: Mutex::default(),
        }
    }

    /// Its protection domain on the NIC.
    pub(super) fn pd(&self) -> &Arc<dyn ProtectionDomain> {
        &self.pd
    }

    pub(super) fn id(&self) -> u64 {
        Tag::end(self.tag.0)
    }

    /// Who it is on the fabric.
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// Its sizes.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The worker that polls its completions.
    pub fn worker(&self) -> usize {
        self.worker
    }

    /// Whether these two are connected.
    pub(super) fn is_connected_to(&self, other: &Self) -> bool {
        let (mine, theirs) = (self.peer.load(Ordering::Acquire), other.peer.load(Ordering::Acquire));
        mine == other.id() && theirs == self.id()
    }

    /// Whether these two are connected, and this one may send.
    pub fn sends_to(&self, other: &Self) -> bool {
        self.sends.load(Ordering::Acquire) && self.is_connected_to(other)
    }

    /// The end that it is connected to; zero for none.
    pub(super) fn peer_id(&self) -> u64 {
        self.peer.load(Ordering::Acquire)
    }

    /// Whether all its sends have ended.
    pub fn is_quiet(&self) -> bool {
        self.sent.load(Ordering::Acquire) == self.ended.load(Ordering::Acquire) || self.is_destroyed()
    }

    pub(super) fn is_free(&self) -> bool {
        self.peer.load(Ordering::Acquire) == 0
    }

    /// Connects this side of it.
    pub(super) fn connect(&self, peer: &Self, connection: &Connection) -> Result<(), DeviceError> {
        self.with_pair(|pair| pair.connect(connection))?;
        self.peer.store(peer.id(), Ordering::Release);
        Ok(())
    }

    /// Connects it to an end of another host.
    pub(super) fn connect_elsewhere(&self, peer: NicEnd, connection: &Connection) -> Result<(), DeviceError> {
        self.with_pair(|pair| pair.connect(connection))?;
        // Nobody else connects it: that is one thread's.
        let _ = self.elsewhere.set(peer);
        self.peer.store(ELSEWHERE, Ordering::Release);
        Ok(())
    }

    /// The end of another host that it is connected to.
    pub fn elsewhere(&self) -> Option<&NicEnd> {
        self.elsewhere.get()
    }

    /// The other host may send to it, or has said that it does not.
    pub fn set_held(&self, held: bool) {
        self.held.store(held, Ordering::Release);
    }

    /// Whether nothing comes from another host.
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire) || self.is_destroyed()
    }

    /// Whether it is connected to this end of another host, and may send.
    pub fn sends_elsewhere(&self, peer: &NicEnd) -> bool {
        self.sends.load(Ordering::Acquire) && self.elsewhere() == Some(peer)
    }

    /// Lets it send, once.
    pub(super) fn start_sending(&self, sending: Sending) -> Result<(), DeviceError> {
        if !self.sends.load(Ordering::Acquire) {
            self.with_pair(|pair| pair.start_sending(sending))?;
            self.sends.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn with_pair(&self, act: impl FnOnce(&dyn QueuePair) -> Result<(), DeviceError>) -> Result<(), DeviceError> {
        act(&**self.pair.read().as_ref().ok_or(DeviceError::Invalid("a queue pair that is gone"))?)
    }

    /// Sends that may be posted now.
    pub fn room(&self) -> usize {
        let under_way = self.sent.load(Ordering::Relaxed).wrapping_sub(self.ended.load(Ordering::Acquire));
        (self.capacity.sends - under_way.min(self.capacity.sends)) as usize
    }

    /// What names the send that is posted `ahead` after the next one.
    pub fn send_id(&self, ahead: usize) -> u64 {
        self.tag.send(self.sent.load(Ordering::Relaxed).wrapping_add(ahead as u32))
    }

    /// Posts sends. Only the worker that serves the queue pair does.
    ///
    /// # Errors
    /// When the NIC refuses one, or the end is gone: nothing more will complete then, once it is [destroyed](Self::destroy).
    pub fn post_send(&self, list: &SendList) -> Result<(), PostError> {
        // Held throughout: who destroys it counts what was posted before, and nothing may be added after that.
        let pair = self.pair.read();
        let pair = pair.as_ref().ok_or(PostError { posted: 0 })?;
        self.side.0.expect(list.len());
        self.sent.fetch_add(list.len() as u32, Ordering::Relaxed);
        pair.post_send(list)
    }

    /// Its receives, for one more. As long as the caller has them nobody finds that it has none: what is taken from the guest's
    /// queue meanwhile is flushed before what is left there.
    pub fn recvs(&self) -> Recvs<'_> {
        Recvs { end: self, all: self.recvs.lock() }
    }

    /// Receives that are on the NIC, or whose completions the guest does not have yet.
    pub fn num_recvs(&self) -> usize {
        let recvs = self.recvs.lock();
        recvs.list.len() + recvs.completing
    }

    /// A receive has completed: which. They do so in order.
    pub fn take_recv(&self) -> Option<Completing<'_>> {
        let mut recvs = self.recvs.lock();
        let recv = recvs.pop()?;
        recvs.completing += 1;
        self.side.0.finished(1);
        Some(Completing { end: self, recv })
    }

    /// Destroys an unreliable one: receives whose messages were lost, as the guest posted them.
    pub(super) fn retire(&self) -> Vec<Recv> {
        self.destroy();
        let lost = self.recvs.lock().take();
        self.side.0.finished(lost.len());
        lost
    }

    /// A send has completed, and with it those before it that made no completion.
    pub fn note_send(&self, id: u64, status: WcStatus) {
        let mut ends = self.ends.lock();
        let before = self.ended.load(Ordering::Relaxed);
        let count = Tag::sends_since(id, before);
        if ends.closed || count > self.sent.load(Ordering::Relaxed).wrapping_sub(before) {
            // Of a time before; there is none as long as the NIC does what it should.
            return;
        }
        if status == WcStatus::Success {
            ends.done = ends.done.wrapping_add(count);
        } else {
            ends.done = ends.done.wrapping_add(count - 1);
            ends.failed.push_back(status);
        }
        self.ended.store(before.wrapping_add(count), Ordering::Release);
        self.side.0.finished(count as usize);
    }

    /// Sends that have ended, of all that ever did.
    pub fn num_ended(&self) -> u32 {
        self.ended.load(Ordering::Acquire)
    }

    /// How they ended since the last call.
    pub fn take_ended(&self) -> Ended {
        let mut ends = self.ends.lock();
        let closed = ends.closed;
        std::mem::replace(&mut *ends, Ended { closed, ..Ended::default() })
    }

    /// Takes it to ERR, once: what is posted is flushed.
    pub fn fail(&self) {
        if !self.failed.swap(true, Ordering::AcqRel)
            && let Some(pair) = self.pair.read().as_ref()
        {
            pair.fail();
        }
    }

    /// Whether it is gone.
    pub fn is_destroyed(&self) -> bool {
        self.pair.read().is_none()
    }

    /// The NIC touches nothing on its behalf any more when this returns, and nothing of it completes. Receives that it had are lost, or for
    /// [`take_recv`](Self::take_recv).
    pub fn destroy(&self) {
        let Some(pair) = self.pair.write().take() else { return };
        drop(pair);
        self.ends.lock().closed = true;
        let unfinished = self.sent.load(Ordering::Relaxed).wrapping_sub(self.ended.load(Ordering::Acquire)) as usize;
        self.side.0.remove(self.id(), self.side.1, self.capacity, unfinished);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.destroy();
        while self.take_recv().is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use virtio_rdma::ib::SendFlags;

    use super::super::device::{Device, PostedOp};
    use super::super::fake::{FakeNic, Script};
    use super::super::quota::{NicQuota, NicUsage};
    use super::*;
    use crate::overlay::Gid;

    #[derive(Debug)]
    struct Refusing;

    impl QueuePair for Refusing {
        fn number(&self) -> u32 {
            1
        }

        fn connect(&self, _: &Connection) -> Result<(), DeviceError> {
            Ok(())
        }

        fn start_sending(&self, _: Sending) -> Result<(), DeviceError> {
            Ok(())
        }

        fn fail(&self) {}

        fn post_send(&self, _: &SendList) -> Result<(), PostError> {
            Err(PostError { posted: 0 })
        }

        fn post_recv(&self, _: &RecvRequest<'_>) -> Result<(), PostError> {
            Err(PostError { posted: 0 })
        }
    }

    /// A worker that thinks that the NIC is busy does not sleep.
    #[test]
    fn what_was_refused_or_came_too_late_is_not_waited_for() {
        let device = FakeNic::new(Script::default());
        let side = Arc::new(Side::new().unwrap());
        let capacity = Capacity { sends: 8, recvs: 8, sges: 1, inline: 0 };
        let (index, _cq) = side.reserve(&device, capacity).unwrap();
        let endpoint = Endpoint { qpn: 1, gid: Gid([0; 16]), psn: 0 };
        let pd = device.alloc_pd().unwrap();
        let shares = NicUsage::default().take_qp(&NicQuota::default(), 16).unwrap();
        let (side_of, pd) = ((side.clone(), index), (&pd, false, shares));
        let end = End::new((Tag::new(5), 0), 0, side_of, endpoint, capacity, pd, Box::new(Refusing));
        let mut list = SendList::default();
        list.push(end.send_id(0), PostedOp::Send, SendFlags::empty(), (0, 0));
        let recv = |wr_id| end.recvs().post(&Recv { wr_id, ..Recv::default() }, false, &[]);
        assert!(end.post_send(&list).is_err() && recv(1).is_err());
        end.destroy();
        assert!(end.post_send(&list).is_err() && recv(2).is_err());
        let flushed: Vec<_> = std::iter::from_fn(|| end.take_recv()).collect();
        assert!(flushed.iter().map(|recv| recv.wr_id).eq([1, 2]), "each once, in order");
        assert_eq!(end.num_recvs(), 2, "the guest has no completion yet");
        drop(flushed);
        assert_eq!(end.num_recvs(), 0);
        assert!(!side.is_busy());
    }

    #[test]
    fn tags_name_ends_queues_and_elements() {
        let tag = Tag::new(0xab_cdef);
        let id = tag.send(5);
        assert_eq!((Tag::end(id), Tag::is_recv(id), Tag::is_recv(tag.recv())), (0xab_cdef, false, true));
        assert_eq!((Tag::sends_since(id, 5), Tag::sends_since(id, 3)), (1, 3));
        // Counts wrap, in the tag earlier than in the end.
        assert_eq!(Tag::sends_since(tag.send(1 << COUNT_BITS), (1 << COUNT_BITS) - 1), 2);
        assert_eq!(Tag::sends_since(tag.send(0), u32::MAX), 2);
        assert_eq!(Tag::end(tag.send(u32::MAX)), 0xab_cdef);
    }
}
