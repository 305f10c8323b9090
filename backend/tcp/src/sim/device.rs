//! A device whose every QP knows what its peer will send: it checks each message as it is executed, and each completion as it comes.

use std::collections::BTreeMap;
use std::rc::Rc;

use virtio_rdma::ib::WcStatus;

use super::plan::{Fate, Item, RAM, ROM, SCRIBBLE, payload_byte, rom_byte};
use super::rng::Rng;
use crate::Nanos;
use crate::frame::{Datagram, Note, Op, Open, Request, Transport};
use crate::host::{Availability, Bound, Host, Landed, Landing, Origin, QpKey, Refusal, Source, Token, Verdict};

/// One QP of a device: it sends its own script, and gets its peer's.
#[derive(Debug)]
pub(super) struct Qp {
    pub(super) transport: Transport,
    pub(super) depth: u8,
    /// Number of the QP in the whole world, and its peer's.
    pub(super) number: usize,
    pub(super) peer: usize,
    pub(super) script: Rc<Vec<Item>>,
    pub(super) peers_script: Rc<Vec<Item>>,
    /// As a requester: how many were posted and completed, and answers that are arriving.
    pub(super) posted: usize,
    pub(super) completed: usize,
    pub(super) failed: Option<WcStatus>,
    failed_index: Option<usize>,
    answers: BTreeMap<usize, Vec<u8>>,
    atomics: BTreeMap<usize, u64>,
    /// As a responder: how many were executed.
    pub(super) executed: usize,
    pub(super) delivered: usize,
    pub(super) receives: u32,
    pub(super) shared: bool,
    /// Takes no messages any more.
    pub(super) gone: bool,
    bound: bool,
    receive: Option<Vec<u8>>,
    /// Last byte of the message that is arriving.
    last: u8,
    ram: Vec<u8>,
    model: Vec<u8>,
    word: u64,
}

impl Qp {
    pub(super) fn new(number: usize, peer: usize, transport: Transport, depth: u8) -> Self {
        Self {
            transport,
            depth,
            number,
            peer,
            script: Rc::default(),
            peers_script: Rc::default(),
            posted: 0,
            completed: 0,
            failed: None,
            failed_index: None,
            answers: BTreeMap::new(),
            atomics: BTreeMap::new(),
            executed: 0,
            delivered: 0,
            receives: 0,
            shared: false,
            gone: false,
            bound: false,
            receive: None,
            last: 0,
            ram: vec![0; RAM],
            model: vec![0; RAM],
            word: 0,
        }
    }

    /// Nothing is where nothing belongs: called when no message is half here.
    fn check_memory(&self) {
        assert!(self.ram == self.model, "QP {}: memory was written twice or elsewhere", self.number);
    }

    /// The first message that did not complete well.
    pub(super) fn failed_at(&self) -> usize {
        self.failed_index.unwrap_or(self.completed)
    }

    fn item(&self, request: &Request) -> &Item {
        let item = &self.peers_script[request.seq as usize];
        let same = (item.op, item.length, item.solicited) == (request.op, request.length, request.solicited);
        assert!(same, "QP {}: message {} is another", self.number, request.seq);
        item
    }

    /// The message is here: checks it, and has the application use it.
    fn execute(&mut self, request: &Request) {
        match request.op {
            Op::Send(_) | Op::SendInvalidate(_) => {
                let mut buffer = self.receive.take().expect("a receive was taken");
                self.put_last(request, &mut buffer);
                self.check_payload(request, &buffer);
            }
            Op::Write { at, imm } => {
                let mut ram = std::mem::take(&mut self.ram);
                let range = at.addr as usize..at.addr as usize + request.length as usize;
                self.put_last(request, &mut ram[range.clone()]);
                self.check_payload(request, &ram[range.clone()]);
                ram[range.clone()].fill(SCRIBBLE);
                self.model[range].fill(SCRIBBLE);
                self.ram = ram;
                assert!(imm.is_none() || self.receive.take().is_some());
            }
            Op::AtomicWrite { value, .. } => self.word = value,
            Op::Flush { .. } => {}
            Op::Read { .. } | Op::CompareSwap { .. } | Op::FetchAdd { .. } => unreachable!("has its own way"),
        }
        self.done();
    }

    fn done(&mut self) {
        self.executed += 1;
        self.delivered += 1;
        self.check_memory();
    }

    fn put_last(&self, request: &Request, buffer: &mut [u8]) {
        if let Some(last) = buffer[..request.length as usize].last_mut() {
            *last = self.last;
        }
    }

    fn check_payload(&self, request: &Request, buffer: &[u8]) {
        for index in 0..request.length {
            let wanted = payload_byte(self.peer, request.seq, index);
            assert_eq!(buffer[index as usize], wanted, "QP {}: byte {index} of {request:?}", self.number);
        }
    }

    /// Bytes of a message arrive. Its last byte waits for the end.
    fn land(&mut self, request: &Request, offset: u32, bytes: &[u8]) {
        let Self { receive, ram, last, .. } = self;
        let target = match request.op {
            Op::Write { at, .. } => &mut ram[at.addr as usize..],
            _ => receive.as_mut().expect("a receive was taken"),
        };
        for (index, &byte) in (offset..).zip(bytes) {
            if index + 1 == request.length {
                *last = byte;
            } else {
                target[index as usize] = byte;
            }
        }
    }
}

/// All QPs of a host.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) qps: Vec<Qp>,
    pub(super) rng: Rng,
    /// How often it says "later", in a thousand.
    pub(super) later: u64,
    pub(super) datagrams_sent: Vec<u32>,
    pub(super) datagrams_got: Vec<u32>,
    pub(super) unbound: usize,
    landing_datagrams: BTreeMap<u32, Vec<u8>>,
}

pub(super) fn token(qp: usize, index: usize) -> Token {
    Token((qp as u64) << 32 | index as u64)
}

fn of_token(token: Token) -> (usize, usize) {
    ((token.0 >> 32) as usize, (token.0 & 0xffff_ffff) as usize)
}

impl Device {
    pub(super) fn new(rng: Rng, later: u64) -> Self {
        Self {
            qps: Vec::new(),
            rng,
            later,
            datagrams_sent: Vec::new(),
            datagrams_got: Vec::new(),
            unbound: 0,
            landing_datagrams: BTreeMap::new(),
        }
    }

    fn qp(&mut self, key: QpKey) -> &mut Qp {
        &mut self.qps[key.0 as usize]
    }

    fn busy(&mut self) -> Option<Nanos> {
        let later = self.later;
        self.rng.chance(later).then(|| self.rng.micros(0, 100))
    }

    /// Takes the payload of a frame from memory, if that is there to its end.
    pub(super) fn gather(&mut self, source: &Source) -> Option<Vec<u8>> {
        let void = match source.origin {
            Origin::Message(token) => {
                let (qp, index) = of_token(token);
                self.qps[qp].script[index].fate == Fate::Void
            }
            Origin::Read(key, at) => {
                let read = Op::Read { at, again_from: None };
                self.qp(key).peers_script.iter().any(|item| item.fate == Fate::Void && item.op == read)
            }
            Origin::Datagram(_) => false,
        };
        (!void).then(|| self.bytes(source))
    }

    fn bytes(&mut self, source: &Source) -> Vec<u8> {
        let range = source.offset..source.offset + source.len;
        match source.origin {
            Origin::Message(token) => {
                let (qp, index) = of_token(token);
                let number = self.qps[qp].number;
                range.map(|i| payload_byte(number, index as u64, i)).collect()
            }
            Origin::Read(key, at) if at.addr >= ROM => {
                let _ = key;
                range.map(|i| rom_byte(at.addr + u64::from(i))).collect()
            }
            Origin::Read(key, at) => {
                self.qp(key).ram[at.addr as usize..][range.start as usize..range.end as usize].to_vec()
            }
            Origin::Datagram(token) => range.map(|i| payload_byte(99, token.0, i)).collect(),
        }
    }

    /// Puts some of the payload of a frame into memory; `at` counts within the payload. May say that it cannot, before the first byte.
    pub(super) fn scatter(&mut self, landing: &Landing, at: u32, bytes: &[u8]) -> Landed {
        if at == 0
            && *landing != Landing::Discard
            && let Some(wait) = self.busy()
        {
            return Landed::Later(wait);
        }
        match landing {
            Landing::Nothing => panic!("payload for nobody"),
            Landing::Discard => {}
            Landing::Message { qp, request, offset } => self.qp(*qp).land(request, offset + at, bytes),
            Landing::Answer { token, offset } => {
                let (qp, index) = of_token(*token);
                let buffer = self.qps[qp].answers.entry(index).or_default();
                let start = (offset + at) as usize;
                buffer.resize(buffer.len().max(start + bytes.len()), 0);
                buffer[start..start + bytes.len()].copy_from_slice(bytes);
            }
            Landing::Datagram(datagram) => {
                let buffer = self.landing_datagrams.entry(datagram.imm.unwrap_or(0)).or_default();
                assert_eq!(buffer.len(), at as usize);
                buffer.extend_from_slice(bytes);
            }
        }
        Landed::Good
    }
}

impl Host for Device {
    fn note(&mut self, _: &Note) {}

    fn bind(&mut self, open: &Open) -> Option<Bound> {
        let key = open.destination_qpn as usize;
        let qp = &mut self.qps[key];
        let taken = qp.bound && qp.transport == Transport::Rc;
        let meant = open.transport == qp.transport && open.source_qpn as usize == qp.peer;
        if qp.gone || taken || !meant {
            return None;
        }
        qp.bound = true;
        Some(Bound { qp: QpKey(key as u64), incarnation: 1, depth: qp.depth })
    }

    fn unbound(&mut self, _qp: QpKey) {
        self.unbound += 1;
    }

    fn admit(&mut self, key: QpKey, request: &Request) -> Verdict {
        if let Some(wait) = self.busy() {
            return Verdict::Later(wait);
        }
        let wait = self.rng.micros(1, 200);
        let qp = self.qp(key);
        if qp.transport == Transport::Uc {
            qp.executed = qp.executed.max(request.seq as usize);
        }
        assert_eq!(qp.executed as u64, request.seq, "QP {}: not the next message: {request:?}", qp.number);
        if qp.gone {
            return Verdict::NotThere;
        }
        if qp.item(request).fate == Fate::Refused {
            qp.gone = true;
            return Verdict::Refused(Refusal::Access);
        }
        if request.op.takes_receive() {
            if qp.receives == 0 {
                return Verdict::NotReady(wait);
            }
            assert!(qp.receive.is_none(), "QP {}: two receives for a message", qp.number);
            qp.receives -= 1;
            qp.receive = Some(vec![0; request.length as usize]);
        }
        if matches!(request.op, Op::Read { .. }) {
            qp.done();
        }
        Verdict::Yes
    }

    fn finish(&mut self, key: QpKey, request: &Request) -> Verdict {
        if let Some(wait) = self.busy() {
            return Verdict::Later(wait);
        }
        let qp = self.qp(key);
        assert_eq!(qp.executed as u64, request.seq, "QP {}: executed twice or not in order: {request:?}", qp.number);
        qp.item(request);
        qp.execute(request);
        Verdict::Yes
    }

    fn atomic(&mut self, key: QpKey, request: &Request) -> Result<u64, Verdict> {
        if let Some(wait) = self.busy() {
            return Err(Verdict::Later(wait));
        }
        let qp = self.qp(key);
        assert_eq!(qp.executed as u64, request.seq, "QP {}: executed twice or not in order: {request:?}", qp.number);
        let before = qp.word;
        assert_eq!(before, qp.item(request).finds, "QP {}: word before {request:?}", qp.number);
        match request.op {
            Op::FetchAdd { add, .. } => qp.word += add,
            Op::CompareSwap { compare, swap, .. } if before == compare => qp.word = swap,
            _ => {}
        }
        qp.done();
        Ok(before)
    }

    fn abandon(&mut self, key: QpKey) {
        let qp = self.qp(key);
        assert_eq!(qp.transport, Transport::Uc, "QP {}", qp.number);
        qp.receives += u32::from(qp.receive.take().is_some());
        qp.executed += 1;
        // A WRITE that is half here has left what it has left.
        qp.model.clone_from(&qp.ram);
    }

    fn posted(&mut self, key: QpKey) -> Option<u32> {
        let qp = self.qp(key);
        (!qp.shared).then_some(qp.receives)
    }

    fn available(&mut self, _source: &Source) -> Availability {
        self.busy().map_or(Availability::Now, Availability::Later)
    }

    fn datagram(&mut self, datagram: &Datagram) -> bool {
        assert!(datagram.imm.is_some());
        true
    }

    fn datagram_landed(&mut self, datagram: &Datagram) {
        let id = datagram.imm.unwrap_or(0);
        let payload = self.landing_datagrams.remove(&id).unwrap_or_default();
        for (index, &byte) in (0..).zip(&payload) {
            assert_eq!(byte, payload_byte(99, id.into(), index), "datagram {id}");
        }
        assert!(!self.datagrams_got.contains(&id), "datagram {id} came twice");
        self.datagrams_got.push(id);
    }

    fn datagram_sent(&mut self, token: Token, _sent: bool) {
        assert!(!self.datagrams_sent.contains(&(token.0 as u32)), "datagram {} was done twice", token.0);
        self.datagrams_sent.push(token.0 as u32);
    }

    fn answered(&mut self, token: Token, value: u64) {
        let (qp, index) = of_token(token);
        let twice = self.qps[qp].atomics.insert(index, value);
        assert_eq!(twice, None, "atomic {index} was answered twice");
    }

    fn completed(&mut self, token: Token, status: WcStatus) {
        let (key, index) = of_token(token);
        let qp = &mut self.qps[key];
        assert_eq!(index, qp.completed, "QP {}: completed twice or not in order", qp.number);
        assert!(index < qp.posted, "QP {}: completed before it was posted", qp.number);
        qp.completed += 1;
        let item = &qp.script[index];
        match (status, qp.failed) {
            (WcStatus::Success, None) => {
                let answer = qp.answers.remove(&index).unwrap_or_default();
                assert_eq!(answer, item.reads, "QP {}: what READ {index} has read", qp.number);
                if item.op.is_atomic() {
                    assert_eq!(qp.atomics.remove(&index), Some(item.finds), "QP {}: atomic {index}", qp.number);
                }
            }
            (WcStatus::WrFlushErr, Some(_)) => {}
            (WcStatus::Success | WcStatus::WrFlushErr, _) | (_, Some(_)) => {
                panic!("QP {}: message {index} completes with {status:?} after {:?}", qp.number, qp.failed)
            }
            (status, None) => (qp.failed, qp.failed_index) = (Some(status), Some(index)),
        }
    }
}
