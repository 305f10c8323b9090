//! What a fake NIC has, and how it executes work requests (IBA 9.4, 9.7, 9.8; of packets nothing is left).

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use virtio_rdma::ib::{AtomicCap, QpType, SendFlags, WcOpcode, WcStatus};

use super::super::device::{
    Access, Capacity, Connection, DeviceError, Limits, PostError, PostedOp, QueuePairSpec, RecvRequest, SendList,
    Sending, Trouble, Wc,
};
use super::script::{Counts, Script, Timing};
use crate::mem::{self, AtomicOp, Seg, Source};
use crate::mr::Layout;
use crate::wqe::Sge;

/// All of it.
#[derive(Debug)]
pub(super) struct World {
    limits: Limits,
    memlock: u64,
    /// Bytes of all regions.
    pinned: u64,
    /// For late execution.
    dice: Option<StdRng>,
    hold: Hold,
    stopped: bool,
    removed: bool,
    numbers: u32,
    mrs: HashMap<u32, Region>,
    cqs: HashMap<u32, Queue>,
    qps: HashMap<u32, Pair>,
    /// Queue pairs that may have something to send.
    busy: Vec<u32>,
    /// The send that is executed after so many others fails like this.
    fault: Option<(u64, WcStatus)>,
    /// The connection after so many others is refused.
    refused: Option<u64>,
    /// What hosts have not been told yet, and for each a descriptor that is readable while there is some.
    trouble: Vec<(Vec<Trouble>, Arc<OwnedFd>)>,
    sending: Vec<Sending>,
    counts: Counts,
}

/// What is not executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    Nothing,
    All,
    /// All, until a completion queue is armed.
    UntilArmed,
}

#[derive(Debug)]
struct Region {
    pd: u32,
    access: Access,
    iova: u64,
    memory: Arc<Layout>,
}

#[derive(Debug)]
struct Queue {
    capacity: usize,
    /// Completions to be polled, with their queue pair.
    entries: VecDeque<(u32, Wc)>,
    /// Completions that nobody can see yet, in outboxes of queue pairs.
    late: usize,
    broken: bool,
    /// The next completion makes an event.
    armed: bool,
    event: Arc<OwnedFd>,
}

impl Queue {
    fn push(&mut self, of: u32, wc: Wc) {
        self.entries.push_back((of, wc));
        self.fire();
    }

    fn fire(&mut self) {
        if std::mem::take(&mut self.armed) {
            signal(&self.event);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Init,
    Rtr,
    Rts,
    Err,
}

#[derive(Debug)]
struct Pair {
    kind: QpType,
    pd: u32,
    cq: u32,
    capacity: Capacity,
    state: State,
    connection: Option<Connection>,
    sends: VecDeque<Send>,
    recvs: VecDeque<(u64, Vec<Sge>)>,
    /// Completions of sends and of receives that nobody can see yet.
    outboxes: [VecDeque<Wc>; 2],
}

/// Index of an outbox.
#[derive(Debug, Clone, Copy)]
enum Side {
    Send = 0,
    Recv = 1,
}

#[derive(Debug)]
struct Send {
    id: u64,
    op: PostedOp,
    flags: SendFlags,
    remote: (u64, u32),
    sges: Vec<Sge>,
    inline: Vec<u8>,
}

impl Send {
    fn length(&self) -> u64 {
        self.inline.len() as u64 + self.sges.iter().map(|sge| u64::from(sge.length)).sum::<u64>()
    }
}

/// How a send ended.
enum End {
    /// It is complete.
    Done(u32),
    /// It waits for a receive, or for the peer to be connected.
    Waits,
    /// It failed at this side.
    Failed(WcStatus),
    /// The responder refused it: what both sides are told.
    Refused(WcStatus, Option<WcStatus>),
}

impl World {
    pub fn new(script: &Script) -> Self {
        let dice = match script.timing {
            Timing::AtOnce => None,
            Timing::Shuffled { seed } => Some(StdRng::seed_from_u64(seed)),
        };
        Self {
            limits: script.limits,
            memlock: script.memlock,
            pinned: 0,
            dice,
            hold: Hold::Nothing,
            stopped: false,
            removed: false,
            // Numbers and keys are unlike those that the engine gives to guests, should one appear where it must not.
            numbers: 0x00f0_0000,
            mrs: HashMap::new(),
            cqs: HashMap::new(),
            qps: HashMap::new(),
            busy: Vec::new(),
            fault: None,
            refused: None,
            trouble: Vec::new(),
            sending: Vec::new(),
            counts: Counts::default(),
        }
    }

    fn number(&mut self) -> u32 {
        self.numbers += 1;
        self.numbers
    }

    fn must_be_there(&self) -> Result<(), DeviceError> {
        if self.removed { Err(DeviceError::Gone) } else { Ok(()) }
    }

    /// It is gone, with all that it was at.
    pub fn remove(&mut self) {
        self.removed = true;
        for pair in self.qps.values_mut() {
            pair.state = State::Err;
            pair.sends.clear();
            pair.recvs.clear();
        }
        self.tell(Trouble::Removed);
    }

    pub fn add_pd(&mut self) -> Result<u32, DeviceError> {
        self.must_be_there()?;
        self.counts.pds += 1;
        Ok(self.number())
    }

    pub fn remove_pd(&mut self) {
        self.counts.pds -= 1;
    }

    pub fn add_mr(&mut self, pd: u32, memory: Arc<Layout>, iova: u64, access: Access) -> Result<u32, DeviceError> {
        self.must_be_there()?;
        if self.mrs.len() >= self.limits.mrs as usize {
            return Err(DeviceError::Limit("memory regions"));
        }
        if self.pinned.saturating_add(memory.length()) > self.memlock {
            let source = std::io::Error::from_raw_os_error(libc::ENOMEM);
            return Err(DeviceError::pinning(memory.length(), Some(self.memlock), source));
        }
        self.pinned += memory.length();
        let key = self.number();
        self.mrs.insert(key, Region { pd, access, iova, memory });
        self.counts.registrations += 1;
        Ok(key)
    }

    pub fn remove_mr(&mut self, key: u32) {
        if let Some(region) = self.mrs.remove(&key) {
            self.pinned -= region.memory.length();
        }
    }

    pub fn add_cq(&mut self, entries: u32, event: Arc<OwnedFd>) -> Result<u32, DeviceError> {
        self.must_be_there()?;
        if self.cqs.len() >= self.limits.cqs as usize || entries > self.limits.cqes {
            return Err(DeviceError::Limit("completion queues"));
        }
        let number = self.number();
        let queue =
            Queue { capacity: entries as usize, entries: VecDeque::new(), late: 0, broken: false, armed: false, event };
        self.cqs.insert(number, queue);
        Ok(number)
    }

    pub fn remove_cq(&mut self, number: u32) {
        self.cqs.remove(&number);
    }

    pub fn add_qp(&mut self, pd: u32, cq: u32, spec: &QueuePairSpec<'_>) -> Result<u32, DeviceError> {
        let Capacity { sends, recvs, sges, inline } = spec.capacity;
        self.must_be_there()?;
        if self.qps.len() >= self.limits.qps as usize {
            return Err(DeviceError::Limit("queue pairs"));
        }
        if sends.max(recvs) > self.limits.wrs || sges > self.limits.sges || inline > self.limits.inline {
            return Err(DeviceError::Limit("a queue pair of this size"));
        }
        let number = self.number();
        let pair = Pair {
            kind: spec.kind,
            pd,
            cq,
            capacity: spec.capacity,
            state: State::Init,
            connection: None,
            sends: VecDeque::new(),
            recvs: VecDeque::new(),
            outboxes: Default::default(),
        };
        self.qps.insert(number, pair);
        Ok(number)
    }

    pub fn remove_qp(&mut self, number: u32) {
        let Some(pair) = self.qps.remove(&number) else { return };
        if let Some(queue) = self.cqs.get_mut(&pair.cq) {
            queue.late -= pair.outboxes.iter().map(VecDeque::len).sum::<usize>();
            queue.entries.retain(|(of, _)| *of != number);
        }
    }

    pub fn qp_numbers(&self) -> Vec<u32> {
        self.qps.keys().copied().collect()
    }

    pub fn connect(&mut self, number: u32, connection: &Connection) -> Result<(), DeviceError> {
        self.must_be_there()?;
        if self.refused.take_if(|after| *after == 0).is_some() {
            return Err(DeviceError::Limit("connections"));
        }
        self.refused = self.refused.map(|after| after - 1);
        let pair = self.qps.get_mut(&number).ok_or(DeviceError::Invalid("the queue pair"))?;
        if pair.state != State::Init || connection.answers > self.limits.reads || connection.mtu > self.limits.mtu {
            return Err(DeviceError::Invalid("the connection"));
        }
        (pair.state, pair.connection) = (State::Rtr, Some(*connection));
        Ok(())
    }

    pub fn start_sending(&mut self, number: u32, sending: Sending) -> Result<(), DeviceError> {
        let pair = self.qps.get_mut(&number).ok_or(DeviceError::Invalid("the queue pair"))?;
        if pair.state != State::Rtr || sending.reads > self.limits.reads {
            return Err(DeviceError::Invalid("how to send"));
        }
        pair.state = State::Rts;
        self.sending.push(sending);
        Ok(())
    }

    /// What its queue pairs were made to send with, ever.
    pub fn sending(&self) -> Vec<Sending> {
        self.sending.clone()
    }

    pub fn fail_send(&mut self, after: u64, status: WcStatus) {
        self.fault = Some((after, status));
    }

    pub fn refuse_connection(&mut self, after: u64) {
        self.refused = Some(after);
    }

    pub fn hold(&mut self, hold: bool) {
        self.hold = if hold { Hold::All } else { Hold::Nothing };
        self.work();
    }

    pub fn hold_until_armed(&mut self) {
        self.hold = Hold::UntilArmed;
        self.cqs.values_mut().for_each(Queue::fire);
    }

    pub fn arm(&mut self, number: u32) {
        if self.hold == Hold::UntilArmed {
            self.hold(false);
        }
        if let Some(queue) = self.cqs.get_mut(&number) {
            queue.armed = true;
        }
    }

    pub fn stop(&mut self) {
        self.stopped = true;
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Whether it executes late.
    pub fn is_late(&self) -> bool {
        self.dice.is_some()
    }

    /// Whether somebody waits for an event that more work may bring.
    pub fn is_waited_for(&self) -> bool {
        let some_late = self.cqs.values().any(|queue| queue.late > 0);
        let armed = self.cqs.values().any(|queue| queue.armed);
        self.hold == Hold::Nothing && armed && (some_late || !self.busy.is_empty())
    }

    pub fn counts(&self) -> Counts {
        Counts { mrs: self.mrs.len(), cqs: self.cqs.len(), qps: self.qps.len(), ..self.counts }
    }

    /// Another host has a NIC on it: which one it is.
    pub fn add_port(&mut self, trouble_event: Arc<OwnedFd>) -> usize {
        self.trouble.push((Vec::new(), trouble_event));
        self.trouble.len() - 1
    }

    pub fn take_trouble(&mut self, port: usize, out: &mut Vec<Trouble>) {
        let (trouble, event) = &mut self.trouble[port];
        clear(event);
        out.append(trouble);
    }

    pub fn has_trouble(&self) -> bool {
        self.trouble.iter().any(|(list, _)| !list.is_empty())
    }

    /// All hosts hear of it. Whose queue pair it is not takes no notice.
    pub fn tell(&mut self, trouble: Trouble) {
        for (list, event) in &mut self.trouble {
            list.push(trouble);
            signal(event);
        }
    }

    pub fn post_send(&mut self, number: u32, list: &SendList) -> Result<(), PostError> {
        if self.removed {
            return Err(PostError { posted: 0 });
        }
        for (posted, request) in list.requests().iter().enumerate() {
            let send = Send {
                id: request.id,
                op: request.op,
                flags: request.flags,
                remote: (request.remote_addr, request.rkey),
                sges: list.sges(request).to_vec(),
                inline: list.inline(request).to_vec(),
            };
            if !self.take_send(number, send) {
                return Err(PostError { posted });
            }
        }
        self.work_if_at_once();
        Ok(())
    }

    fn take_send(&mut self, number: u32, send: Send) -> bool {
        let Some(pair) = self.qps.get_mut(&number) else { return false };
        let fits = send.sges.len() <= pair.capacity.sges as usize && send.inline.len() <= pair.capacity.inline as usize;
        if !fits || pair.sends.len() >= pair.capacity.sends as usize {
            return false;
        }
        match pair.state {
            State::Init | State::Rtr => return false,
            State::Rts => {
                pair.sends.push_back(send);
                self.counts.posted += 1;
                if !self.busy.contains(&number) {
                    self.busy.push(number);
                }
            }
            State::Err => self.complete(number, Side::Send, flushed(send.id)),
        }
        true
    }

    pub fn post_recv(&mut self, number: u32, request: &RecvRequest<'_>) -> Result<(), PostError> {
        let pair = self.qps.get_mut(&number).ok_or(PostError { posted: 0 })?;
        let Capacity { recvs, sges, .. } = pair.capacity;
        if self.removed || request.sges.len() > sges as usize || pair.recvs.len() >= recvs as usize {
            return Err(PostError { posted: 0 });
        }
        if pair.state == State::Err {
            self.complete(number, Side::Recv, flushed(request.id));
        } else {
            pair.recvs.push_back((request.id, request.sges.to_vec()));
            self.work_if_at_once();
        }
        Ok(())
    }

    /// Takes a queue pair to ERR.
    pub fn fail(&mut self, number: u32, tell: bool) {
        let Some(pair) = self.qps.get_mut(&number).filter(|pair| pair.state != State::Err) else { return };
        pair.state = State::Err;
        let (sends, recvs) = (std::mem::take(&mut pair.sends), std::mem::take(&mut pair.recvs));
        if tell {
            self.tell(Trouble::QueuePair(number));
        }
        for send in sends {
            self.complete(number, Side::Send, flushed(send.id));
        }
        for (id, _) in recvs {
            self.complete(number, Side::Recv, flushed(id));
        }
    }

    pub fn poll(&mut self, number: u32, most: usize, out: &mut Vec<Wc>) {
        self.work();
        let Some(queue) = self.cqs.get_mut(&number) else { return };
        let count = most.min(queue.entries.len());
        out.extend(queue.entries.drain(..count).map(|(_, wc)| wc));
    }

    fn work_if_at_once(&mut self) {
        if self.dice.is_none() {
            self.work();
        }
    }

    /// Executes what can be executed, or some of it.
    pub fn work(&mut self) {
        if self.hold != Hold::Nothing {
            return;
        }
        let Some(mut dice) = self.dice.take() else {
            while self.sweep() {}
            return;
        };
        for _ in 0..dice.random_range(0..4) {
            if !self.busy.is_empty() {
                let index = dice.random_range(0..self.busy.len());
                let number = self.busy[index];
                self.execute(number);
            }
        }
        self.busy.retain(|number| self.qps.get(number).is_some_and(|pair| !pair.sends.is_empty()));
        for _ in 0..dice.random_range(0..4) {
            self.deliver_one(&mut dice);
        }
        self.dice = Some(dice);
    }

    /// One step of every busy queue pair. False when none got further.
    fn sweep(&mut self) -> bool {
        let busy = self.busy.clone();
        let moved = busy.into_iter().filter(|&number| self.execute(number)).count() > 0;
        self.busy.retain(|number| self.qps.get(number).is_some_and(|pair| !pair.sends.is_empty()));
        moved
    }

    /// One late completion is seen.
    fn deliver_one(&mut self, dice: &mut StdRng) {
        let mut full: Vec<_> =
            self.qps.iter().filter(|(_, pair)| pair.outboxes.iter().any(|o| !o.is_empty())).collect();
        full.sort_by_key(|(number, _)| **number);
        if full.is_empty() {
            return;
        }
        let number = *full[dice.random_range(0..full.len())].0;
        let Some(pair) = self.qps.get_mut(&number) else { return };
        let side = usize::from(dice.random_bool(0.5));
        let wc = pair.outboxes[side].pop_front().or_else(|| pair.outboxes[1 - side].pop_front());
        let queue = self.cqs.get_mut(&pair.cq);
        if let (Some(wc), Some(queue)) = (wc, queue) {
            queue.late -= 1;
            queue.push(number, wc);
        }
    }

    /// Executes the next send of a queue pair. True if it got further.
    fn execute(&mut self, number: u32) -> bool {
        let Some(send) = self.qps.get_mut(&number).and_then(|pair| pair.sends.pop_front()) else { return false };
        let end = match self.injected() {
            Some(status) => End::Failed(status),
            None => self.attempt(number, &send),
        };
        match end {
            End::Waits => {
                if let Some(pair) = self.qps.get_mut(&number) {
                    pair.sends.push_front(send);
                }
                return false;
            }
            End::Done(byte_len) => self.done(number, &send, byte_len),
            End::Failed(status) => self.failed(number, &send, status),
            End::Refused(status, receive) => {
                if let Some(peer) = self.peer_of(number) {
                    self.refuse(peer, receive);
                }
                self.failed(number, &send, status);
            }
        }
        true
    }

    fn injected(&mut self) -> Option<WcStatus> {
        match &mut self.fault {
            Some((0, status)) => {
                let status = *status;
                self.fault = None;
                Some(status)
            }
            Some((after, _)) => {
                *after -= 1;
                None
            }
            None => None,
        }
    }

    fn done(&mut self, number: u32, send: &Send, byte_len: u32) {
        self.counts.sent += 1;
        self.counts.bytes += u64::from(byte_len);
        if send.flags.contains(SendFlags::SIGNALED) {
            let opcode = send.op.opcode();
            self.complete(
                number,
                Side::Send,
                Wc { id: send.id, status: WcStatus::Success, opcode, byte_len, imm: None },
            );
        }
    }

    fn failed(&mut self, number: u32, send: &Send, status: WcStatus) {
        self.complete(number, Side::Send, Wc { status, ..flushed(send.id) });
        self.fail(number, false);
    }

    fn refuse(&mut self, number: u32, receive: Option<WcStatus>) {
        let recv = self.qps.get_mut(&number).filter(|_| receive.is_some()).and_then(|pair| pair.recvs.pop_front());
        if let (Some(status), Some((id, _))) = (receive, recv) {
            self.complete(number, Side::Recv, Wc { status, ..flushed(id) });
        }
        self.fail(number, true);
    }

    fn peer_of(&self, number: u32) -> Option<u32> {
        Some(self.qps.get(&number)?.connection?.peer.qpn)
    }

    fn attempt(&mut self, number: u32, send: &Send) -> End {
        let Some(pair) = self.qps.get(&number) else { return End::Waits };
        let reliable = pair.kind == QpType::Rc;
        // An unreliable message that does not arrive is complete all the same.
        let lost = |end: End| if reliable { end } else { End::Done(send.length() as u32) };
        let need = if send.op.fetches() { Access::LOCAL_WRITE } else { Access::empty() };
        let Some(own) = self.gather(pair.pd, need, &send.sges) else { return End::Failed(WcStatus::LocProtErr) };
        let peer_number = pair.connection.map(|connection| connection.peer.qpn);
        let peer = peer_number.and_then(|peer| self.qps.get(&peer)).filter(|peer| peer.state != State::Err);
        let Some(peer) = peer else { return lost(End::Failed(WcStatus::RetryExcErr)) };
        let Some(connection) = peer.connection.filter(|c| c.peer.qpn == number) else { return lost(End::Waits) };
        let length = send.length();
        let recv = peer.recvs.front().filter(|_| send.op.takes_receive());
        if send.op.takes_receive() && recv.is_none() {
            self.counts.not_ready += 1;
            return lost(End::Waits);
        }
        let there = match send.op {
            PostedOp::Send | PostedOp::SendImm(_) => {
                let sges = recv.map_or(&[][..], |(_, sges)| sges);
                if sges.iter().map(|sge| u64::from(sge.length)).sum::<u64>() < length {
                    return lost(End::Refused(WcStatus::RemInvReqErr, Some(WcStatus::LocLenErr)));
                }
                let Some(there) = self.gather(peer.pd, Access::LOCAL_WRITE, sges) else {
                    return lost(End::Refused(WcStatus::RemOpErr, Some(WcStatus::LocProtErr)));
                };
                there
            }
            PostedOp::Write | PostedOp::WriteImm(_) | PostedOp::Read | PostedOp::Atomic(_) => {
                let need = match send.op {
                    PostedOp::Read => Access::REMOTE_READ,
                    PostedOp::Atomic(_) => Access::REMOTE_ATOMIC,
                    _ => Access::REMOTE_WRITE,
                };
                if !connection.access.contains(need) {
                    return lost(End::Refused(WcStatus::RemInvReqErr, None));
                }
                let Some(there) = self.reach(peer.pd, need, send.remote, length) else {
                    return lost(End::Refused(WcStatus::RemAccessErr, None));
                };
                there
            }
        };
        if let PostedOp::Atomic(op) = send.op {
            let Some(old) = self.atomic(&there, op) else { return End::Refused(WcStatus::RemInvReqErr, None) };
            mem::copy_ordered(Source { own: &[&old.to_ne_bytes()], guest: &[] }, &own);
        } else if send.op == PostedOp::Read {
            mem::copy_ordered(Source { own: &[], guest: &there }, &own);
        } else {
            mem::copy_ordered(Source { own: &[&send.inline], guest: &own }, &there);
        }
        if let (Some(peer), true) = (peer_number, send.op.takes_receive()) {
            self.received(peer, send, length as u32);
        }
        End::Done(length as u32)
    }

    /// The value from before. One that is atomic with its own only reads and then writes, and who looks between the two may be lost.
    fn atomic(&self, at: &[Seg], op: AtomicOp) -> Option<u64> {
        let &[word] = at else { return None };
        if self.limits.atomics == AtomicCap::Glob {
            return mem::atomic(word, op);
        }
        let mut old = [0; 8];
        mem::read(word, &mut old);
        let old = u64::from_ne_bytes(old);
        std::thread::yield_now();
        let new = match op {
            AtomicOp::CompareSwap { compare, swap } => {
                if old == compare {
                    swap
                } else {
                    old
                }
            }
            AtomicOp::FetchAdd(add) => old.wrapping_add(add),
        };
        mem::write(&new.to_ne_bytes(), word);
        Some(old)
    }

    fn received(&mut self, number: u32, send: &Send, byte_len: u32) {
        let recv = self.qps.get_mut(&number).and_then(|pair| pair.recvs.pop_front());
        let Some((id, _)) = recv else { return };
        let (opcode, imm) = match send.op {
            PostedOp::WriteImm(imm) => (WcOpcode::RecvRdmaWithImm, Some(imm)),
            PostedOp::SendImm(imm) => (WcOpcode::Recv, Some(imm)),
            _ => (WcOpcode::Recv, None),
        };
        self.complete(number, Side::Recv, Wc { id, status: WcStatus::Success, opcode, byte_len, imm });
    }

    /// Where an SGE list is, if its keys hold.
    fn gather(&self, pd: u32, need: Access, sges: &[Sge]) -> Option<Vec<Seg>> {
        let mut segs = Vec::new();
        for sge in sges.iter().filter(|sge| sge.length > 0) {
            segs.extend(self.reach(pd, need, (sge.addr, sge.lkey), sge.length.into())?);
        }
        Some(segs)
    }

    fn reach(&self, pd: u32, need: Access, (addr, key): (u64, u32), length: u64) -> Option<Vec<Seg>> {
        let mut segs = Vec::new();
        if length == 0 {
            return Some(segs);
        }
        let region = self.mrs.get(&key).filter(|region| region.pd == pd && region.access.contains(need))?;
        let offset = addr.checked_sub(region.iova)?;
        if offset.checked_add(length)? > region.memory.length() {
            return None;
        }
        region.memory.segments(offset, length, &mut segs);
        Some(segs)
    }

    fn complete(&mut self, number: u32, side: Side, wc: Wc) {
        let late = self.dice.is_some();
        let Some(pair) = self.qps.get_mut(&number) else { return };
        let Some(queue) = self.cqs.get_mut(&pair.cq).filter(|queue| !queue.broken) else { return };
        if queue.entries.len() + queue.late >= queue.capacity {
            queue.broken = true;
            let broken = pair.cq;
            return self.overrun(broken);
        }
        if late {
            queue.late += 1;
            pair.outboxes[side as usize].push_back(wc);
        } else {
            queue.push(number, wc);
        }
    }

    /// Nobody took its completions: its queue pairs are of no use any more.
    fn overrun(&mut self, cq: u32) {
        self.tell(Trouble::CompletionQueue);
        let users: Vec<_> = self.qps.iter().filter(|(_, pair)| pair.cq == cq).map(|(number, _)| *number).collect();
        for number in users {
            self.fail(number, true);
        }
    }
}

fn flushed(id: u64) -> Wc {
    Wc { id, status: WcStatus::WrFlushErr, opcode: WcOpcode::Send, byte_len: 0, imm: None }
}

/// Makes a descriptor readable.
fn signal(event: &OwnedFd) {
    // Fails only when it has been a number of times beyond counting.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// Makes it quiet.
pub(super) fn clear(event: &OwnedFd) {
    let _ = rustix::io::read(event, &mut [0; 8]);
}
