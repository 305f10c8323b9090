//! Sequences of operations of two guests against a model that says how each ends and what memory holds afterwards.
//!
//! The model knows RC queue pairs, whose outcome is certain; it is written from `docs/device.md`, 7.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use virtio_rdma::ib::{Access, QpState, WcStatus};

use super::{Input, bed, start_over};
use crate::guest::mem::Buf;
use crate::guest::verbs::{Mr, MrSpec, Op, Pd, Qp, QpSpec, RcOptions, SendWr, Sge, connect};
use crate::guest::{Guest, verbs::Cq};
use crate::stepped::Stepped;

thread_local! {
    static BED: RefCell<Stepped> = RefCell::new(bed());
}

/// Bytes of each guest's memory that the model knows.
const SIZE: usize = 24 << 10;
/// Regions of each guest, which overlap.
const REGIONS: usize = 4;
/// Connections.
const PAIRS: usize = 2;
/// All that a region may allow.
const ALL: Access =
    Access::LOCAL_WRITE.union(Access::REMOTE_WRITE).union(Access::REMOTE_READ).union(Access::REMOTE_ATOMIC);
/// More than the device waits for anything.
const LONG: Duration = Duration::from_secs(30);

/// Does operations one after another and compares each outcome, and all memory at the end.
pub fn operations(data: &[u8]) {
    BED.with_borrow_mut(|bed| {
        for (nic, guest) in bed.guests.clone().iter().enumerate() {
            start_over(bed, nic, guest);
        }
        let mut world = World::new(&bed.guests.clone());
        let mut input = Input(data);
        while !input.is_empty() {
            world.operate(bed, &mut input);
        }
        for side in &world.sides {
            let real = side.buf.read_vec(0, SIZE);
            let at = real.iter().zip(&side.memory).position(|(a, b)| a != b);
            assert!(at.is_none(), "byte {at:?} differs from the model");
        }
    });
}

/// A region and what the model knows of it.
struct Region {
    mr: Mr,
    start: usize,
    len: usize,
    access: Access,
    alive: bool,
}

/// One guest.
struct Side {
    pd: Pd,
    buf: Arc<Buf>,
    memory: Vec<u8>,
    regions: Vec<Region>,
    /// Its ends of the connections.
    ends: Vec<End>,
}

struct End {
    qp: Qp,
    send_cq: Cq,
    recv_cq: Cq,
    /// Whether it is in RTS; else in ERR.
    works: bool,
    /// Receives posted, each with the key that its region had then.
    receives: VecDeque<(Piece, u32)>,
}

/// Bytes of a region, maybe beyond its end.
#[derive(Clone, Copy)]
struct Piece {
    region: usize,
    offset: usize,
    len: usize,
}

struct World {
    sides: [Side; 2],
}

/// How an operation ends: the requester's status, and the responder's if its receive was taken.
struct Outcome {
    status: WcStatus,
    receive: Option<WcStatus>,
    /// Whether the responder fails with it.
    responder_fails: bool,
}

impl Outcome {
    fn local(status: WcStatus) -> Self {
        Self { status, receive: None, responder_fails: false }
    }

    fn remote(status: WcStatus) -> Self {
        Self { status, receive: None, responder_fails: true }
    }

    fn receive(status: WcStatus, receive: WcStatus) -> Self {
        Self { status, receive: Some(receive), responder_fails: receive != WcStatus::Success }
    }
}

const SUCCESS: Outcome = Outcome { status: WcStatus::Success, receive: None, responder_fails: false };

fn options() -> RcOptions {
    RcOptions { timeout: 8, retry_cnt: 1, rnr_retry: 0, ..RcOptions::default() }
}

impl Side {
    fn new(guest: &Guest) -> Self {
        let pd = guest.alloc_pd().expect("a PD");
        let buf = guest.alloc(SIZE).expect("memory");
        let memory: Vec<u8> = (0..SIZE).map(|i| (i * 7 + i / 251) as u8).collect();
        buf.write(0, &memory);
        let mut side = Self { pd, buf, memory, regions: Vec::new(), ends: Vec::new() };
        for i in 0..REGIONS {
            let region = side.register(i * 4000 + i, 8000, ALL);
            side.regions.push(region);
        }
        side.ends = (0..PAIRS).map(|_| End::new(guest, &side.pd)).collect();
        side
    }

    fn register(&self, start: usize, len: usize, access: Access) -> Region {
        let spec = MrSpec { access, ..MrSpec::whole(&self.buf).part(start, len) };
        let mr = self.pd.reg_spec(spec).expect("a region");
        Region { mr, start, len, access, alive: true }
    }

    /// Where a piece lies in memory, if it may be accessed this way.
    fn find(&self, piece: Piece, need: Access) -> Option<std::ops::Range<usize>> {
        let region = &self.regions[piece.region];
        let fits = region.alive && region.access.contains(need) && piece.offset + piece.len <= region.len;
        let start = region.start + piece.offset;
        fits.then(|| start..start + piece.len)
    }

    fn sge(&self, piece: Piece) -> Sge {
        let region = &self.regions[piece.region];
        let base = region.mr.sge(0, 0);
        Sge { addr: base.addr + piece.offset as u64, len: piece.len as u32, ..base }
    }
}

impl End {
    fn new(guest: &Guest, pd: &Pd) -> Self {
        let (send_cq, recv_cq) = (guest.create_cq(63).expect("a CQ"), guest.create_cq(63).expect("a CQ"));
        let qp = pd.create_qp_on(QpSpec::rc().depth(15), &send_cq, &recv_cq).expect("a QP");
        Self { qp, send_cq, recv_cq, works: true, receives: VecDeque::new() }
    }

    /// It goes to ERR: what is posted is flushed.
    fn fail(&mut self) {
        self.works = false;
        for _ in self.receives.drain(..) {
            let wc = self.recv_cq.poll().expect("flushed receives complete");
            assert_eq!(wc.status(), WcStatus::WrFlushErr);
        }
    }
}

impl World {
    fn new(guests: &[Guest]) -> Self {
        let sides = [Side::new(&guests[0]), Side::new(&guests[1])];
        for pair in 0..PAIRS {
            connect(&sides[0].ends[pair].qp, &sides[1].ends[pair].qp, &options()).expect("a connection");
        }
        Self { sides }
    }

    fn operate(&mut self, bed: &mut Stepped, input: &mut Input<'_>) {
        let (kind, flags) = (input.byte(), input.byte());
        let (from, pair) = (usize::from(flags & 1), usize::from(flags >> 1) % PAIRS);
        match kind % 8 {
            0 => self.change_region(from, input),
            1 => self.reconnect(bed, pair),
            2 => self.post_receive(from, pair, input),
            3 => self.end(bed, from, pair),
            kind => self.request(bed, (from, pair), kind, input),
        }
        for side in &self.sides {
            for end in &side.ends {
                assert!(end.send_cq.poll().is_none() && end.recv_cq.poll().is_none(), "a completion too many");
            }
        }
    }

    /// Deregisters a region, or registers another in the place of one.
    fn change_region(&mut self, side: usize, input: &mut Input<'_>) {
        let which = input.below(REGIONS);
        let side = &mut self.sides[side];
        if side.regions[which].alive {
            side.regions[which].mr.dereg().expect("regions can be deregistered");
            side.regions[which].alive = false;
            return;
        }
        let start = input.below(SIZE);
        let len = 1 + input.below(SIZE - start);
        let access = Access::from_bits_truncate(u32::from(input.byte())) & ALL;
        side.regions[which] = side.register(start, len, access | Access::LOCAL_WRITE);
    }

    fn post_receive(&mut self, side: usize, pair: usize, input: &mut Input<'_>) {
        let piece = piece(input);
        let side = &mut self.sides[side];
        let sge = side.sge(piece);
        let end = &mut side.ends[pair];
        // In ERR nobody would look at it: receives ring no doorbell.
        if end.works && end.receives.len() < 8 {
            end.qp.post_recv(0, &[sge]).expect("room for receives");
            end.receives.push_back((piece, sge.lkey));
        }
    }

    /// Takes one end to ERR.
    fn end(&mut self, bed: &mut Stepped, side: usize, pair: usize) {
        let end = &mut self.sides[side].ends[pair];
        end.qp.modify_state(QpState::Err).expect("ERR can be reached");
        bed.settle();
        end.fail();
    }

    fn reconnect(&mut self, bed: &mut Stepped, pair: usize) {
        for side in &mut self.sides {
            let end = &mut side.ends[pair];
            end.qp.modify_state(QpState::Reset).expect("RESET can be reached");
            (end.works, end.receives) = (true, VecDeque::new());
        }
        bed.settle();
        let [a, b] = &self.sides;
        connect(&a.ends[pair].qp, &b.ends[pair].qp, &options()).expect("a connection");
    }

    fn request(&mut self, bed: &mut Stepped, (from, pair): (usize, usize), kind: u8, input: &mut Input<'_>) {
        let (local, mut remote) = (piece(input), piece(input));
        let atomic = kind == 7;
        let local = if atomic { Piece { len: 8, ..local } } else { local };
        remote.len = local.len;
        let peer = &self.sides[1 - from];
        let target = peer.regions[remote.region].mr.remote(0);
        let target = crate::guest::verbs::Remote { addr: target.addr + remote.offset as u64, ..target };
        let op = match kind {
            4 => Op::Write(target),
            5 => Op::Read(target),
            6 => Op::Send,
            _ => Op::FetchAdd(target, 0x0101_0101_0101_0101),
        };
        let expected = self.predict((from, pair), kind, local, remote);
        let sge = self.sides[from].sge(local);
        self.sides[from].ends[pair].qp.post(SendWr::new(9, op, &[sge])).expect("room for a request");
        bed.settle();
        for _ in 0..4 {
            bed.pass(LONG);
            bed.settle();
        }
        self.compare((from, pair), &expected);
    }

    fn compare(&mut self, (from, pair): (usize, usize), expected: &Outcome) {
        let peer = &mut self.sides[1 - from].ends[pair];
        if let Some(status) = expected.receive {
            peer.receives.pop_front();
            let wc = peer.recv_cq.poll().expect("the responder's receive completes");
            assert_eq!(wc.status(), status, "of the receive");
        }
        if expected.responder_fails && peer.works {
            peer.fail();
        }
        let end = &mut self.sides[from].ends[pair];
        let wc = end.send_cq.poll().expect("the request completes");
        assert_eq!((wc.wr_id(), wc.status()), (9, expected.status));
        if expected.status != WcStatus::Success && end.works {
            end.fail();
        }
    }

    /// What will happen, done to the model's memory.
    fn predict(&mut self, (from, pair): (usize, usize), kind: u8, local: Piece, remote: Piece) -> Outcome {
        let (a, b) = (&self.sides[from], &self.sides[1 - from]);
        if !a.ends[pair].works {
            return Outcome::local(WcStatus::WrFlushErr);
        }
        let fetches = matches!(kind, 5 | 7);
        let need = if fetches { Access::LOCAL_WRITE } else { Access::empty() };
        let own = a.find(local, need);
        if own.is_none() && local.len > 0 {
            return Outcome::local(WcStatus::LocProtErr);
        }
        if !b.ends[pair].works {
            return Outcome::local(WcStatus::RetryExcErr);
        }
        let own = own.unwrap_or(0..0);
        if kind == 6 {
            return self.predict_send((from, pair), own);
        }
        let need = match kind {
            4 => Access::REMOTE_WRITE,
            5 => Access::REMOTE_READ,
            _ => Access::REMOTE_ATOMIC,
        };
        let there = b.find(remote, need);
        if local.len == 0 {
            return SUCCESS;
        }
        if kind == 7 {
            return self.predict_atomic(from, own, there, remote);
        }
        let Some(there) = there else {
            return Outcome::remote(WcStatus::RemAccessErr);
        };
        let (source, (side, target)) =
            if kind == 4 { ((from, own), (1 - from, there)) } else { ((1 - from, there), (from, own)) };
        let bytes = self.sides[source.0].memory[source.1].to_vec();
        self.sides[side].memory[target].copy_from_slice(&bytes);
        SUCCESS
    }

    fn predict_send(&mut self, (from, pair): (usize, usize), own: std::ops::Range<usize>) -> Outcome {
        let bytes = self.sides[from].memory[own].to_vec();
        let b = &mut self.sides[1 - from];
        let Some(&(receive, key)) = b.ends[pair].receives.front() else {
            return Outcome::local(WcStatus::RnrRetryExcErr);
        };
        if bytes.len() > receive.len {
            return Outcome::receive(WcStatus::RemInvReqErr, WcStatus::LocLenErr);
        }
        // All of the receive must be there, whatever of it is needed.
        let place = b.find(receive, Access::LOCAL_WRITE).filter(|_| b.regions[receive.region].mr.key() == key);
        match place {
            _ if receive.len == 0 => {}
            Some(place) => b.memory[place][..bytes.len()].copy_from_slice(&bytes),
            None => return Outcome::receive(WcStatus::RemOpErr, WcStatus::LocProtErr),
        }
        Outcome::receive(WcStatus::Success, WcStatus::Success)
    }

    fn predict_atomic(
        &mut self,
        from: usize,
        own: std::ops::Range<usize>,
        there: Option<std::ops::Range<usize>>,
        remote: Piece,
    ) -> Outcome {
        let b = &self.sides[1 - from];
        let address = b.regions[remote.region].mr.remote(0).addr + remote.offset as u64;
        if !address.is_multiple_of(8) {
            return Outcome::remote(WcStatus::RemInvReqErr);
        }
        let Some(there) = there else {
            return Outcome::remote(WcStatus::RemAccessErr);
        };
        if !there.start.is_multiple_of(8) {
            return Outcome::remote(WcStatus::RemInvReqErr);
        }
        let word = &mut self.sides[1 - from].memory[there];
        let old = u64::from_le_bytes(word.try_into().expect("8 bytes"));
        word.copy_from_slice(&old.wrapping_add(0x0101_0101_0101_0101).to_le_bytes());
        self.sides[from].memory[own].copy_from_slice(&old.to_le_bytes());
        SUCCESS
    }
}

fn piece(input: &mut Input<'_>) -> Piece {
    let region = usize::from(input.byte()) % REGIONS;
    Piece { region, offset: input.below(SIZE), len: input.below(SIZE) }
}
