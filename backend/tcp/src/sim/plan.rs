//! What a seed stands for: QPs, what they send, and what happens to them. And the model: what each message must find and leave behind.

use virtio_rdma::ib::WcStatus;

use super::rng::Rng;
use crate::frame::{Op, Remote, Transport};
use crate::{Limits, Nanos, Retries};

/// Bytes of memory that a QP's peer may write to.
pub(super) const RAM: usize = 512;
/// READs of addresses from here on are of memory that never changes.
pub(super) const ROM: u64 = 1 << 20;
/// The word that atomics change.
pub(super) const WORD: u64 = 1 << 21;
/// What the application writes over a buffer as soon as it has seen that a message is there. Whatever is written there later was
/// written twice.
pub(super) const SCRIBBLE: u8 = 0xee;

/// What kind of life a seed stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Connections break, but patience has no end: all must arrive.
    Patient,
    /// Patience has an end: messages may fail, with one status only.
    Impatient,
    /// Receives come late, and RNR retries have an end.
    NotReady,
    /// Some messages are refused, or lose their memory on the way.
    Refused,
    /// A QP or a whole host forgets what it knew.
    Forgetful,
}

/// One message, what it carries, and what it must find.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) op: Op,
    pub(super) length: u32,
    pub(super) fence: bool,
    pub(super) solicited: bool,
    /// What a READ must read.
    pub(super) reads: Vec<u8>,
    /// What an atomic must find.
    pub(super) finds: u64,
    pub(super) fate: Fate,
}

/// What becomes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Fine,
    /// The responder refuses it.
    Refused,
    /// Its memory goes away while it is being sent.
    Void,
}

/// Byte `index` of the payload of message `seq` of QP `qp`.
pub(super) fn payload_byte(qp: usize, seq: u64, index: u32) -> u8 {
    (qp as u64 * 31 + seq * 7 + u64::from(index) * 13 + 1) as u8
}

/// A byte of memory that never changes.
pub(super) fn rom_byte(addr: u64) -> u8 {
    (addr * 17 + (addr >> 8)) as u8
}

/// A seed's plan.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) kind: Kind,
    pub(super) hosts: usize,
    /// How many of the hosts after it each has a link with.
    pub(super) neighbours: usize,
    pub(super) lanes: u16,
    pub(super) limits: Limits,
    pub(super) retries: Retries,
    pub(super) depth: u8,
    /// QPs of each host to each other host; a QP sends its script.
    pub(super) qps: usize,
    /// In a thousand steps: how often a connection is cut, stalls, and a dial fails.
    pub(super) cut: u64,
    pub(super) stall: u64,
    pub(super) dial_fails: u64,
    /// How often the device says "later".
    pub(super) later: u64,
    /// How often a receive is posted that is missing.
    pub(super) receive: u64,
    /// After this time nothing bad happens any more.
    pub(super) peace: Nanos,
    /// Bytes that a connection holds in each direction.
    pub(super) pipe: usize,
    pub(super) datagrams: u32,
}

impl Plan {
    pub(super) fn new(rng: &mut Rng) -> Self {
        let kind = match rng.below(10) {
            0..=4 => Kind::Patient,
            5 | 6 => Kind::Impatient,
            7 => Kind::NotReady,
            8 => Kind::Refused,
            _ => Kind::Forgetful,
        };
        let forever = kind == Kind::Patient || kind == Kind::NotReady || kind == Kind::Refused;
        let timeout = (!forever || rng.chance(100)).then(|| rng.micros(200, 3000));
        let rnr = if kind == Kind::NotReady { Some(rng.below(4) as u8) } else { None };
        let lost = if forever { u8::MAX } else { rng.below(4) as u8 };
        Self {
            kind,
            hosts: if rng.chance(150) { 3 } else { 2 },
            neighbours: usize::MAX / 2,
            lanes: rng.between(1, 4) as u16,
            limits: Self::limits(rng),
            retries: Retries { timeout: timeout.filter(|_| !forever), lost, not_ready: rnr },
            depth: rng.between(1, 5) as u8,
            qps: rng.between(1, 4) as usize,
            cut: if rng.chance(800) { rng.below(30) } else { 0 },
            stall: rng.below(20),
            dial_fails: rng.below(300),
            later: if rng.chance(500) { rng.below(60) } else { 0 },
            receive: rng.between(50, 1000),
            peace: rng.micros(500, 6000),
            pipe: rng.between(40, 1500) as usize,
            // A host that forgets does not say what became of them.
            datagrams: if kind == Kind::Forgetful { 0 } else { rng.below(6) as u32 },
        }
    }

    fn limits(rng: &mut Rng) -> Limits {
        Limits {
            chunk: rng.between(16, 160) as u32,
            window: rng.between(32, 600) as u32,
            eager: rng.below(100) as u32,
            messages: rng.between(1, 9) as usize,
            datagrams: 2,
            strays: 8,
            notes: 16,
            datagram_patience: rng.micros(100, 3000),
            receive_patience: Nanos::from_micros(200),
            open_patience: Nanos::from_micros(2000),
            shortest_try: Nanos::from_micros(100),
            page_patience: Nanos::from_micros(5000),
            ask_again: rng.micros(100, 2000),
            keepalive: Nanos::from_micros(2000),
            silence: Nanos::from_micros(8000),
            redial: Nanos::from_micros(50),
            longest_redial: Nanos::from_micros(1000),
        }
    }

    /// What one QP sends. The model goes along: what memory and the word will be when each message is executed.
    pub(super) fn script(&self, rng: &mut Rng, transport: Transport) -> Vec<Item> {
        let mut model = Model { ram: vec![0; RAM], word: 0 };
        let count = rng.between(2, 14);
        let bad = (self.kind == Kind::Refused && transport == Transport::Rc).then(|| rng.below(count));
        let mut fence = false;
        (0..count)
            .map(|index| {
                let mut item = model.item(rng, transport);
                item.fence = std::mem::replace(&mut fence, item.must_be_fenced()) || rng.chance(100);
                if let Op::Read { at, .. } = &mut item.op {
                    // It names the READ.
                    at.rkey = index as u32;
                }
                let (fails, has_bytes) = (bad == Some(index), item.length > 0 && !item.is_word());
                let can_vanish = has_bytes && !matches!(item.op, Op::Flush { .. });
                item.fate = match fails {
                    true if can_vanish && rng.chance(600) => Fate::Void,
                    true => Fate::Refused,
                    false => Fate::Fine,
                };
                item
            })
            .collect()
    }
}

impl Item {
    fn is_word(&self) -> bool {
        self.op.is_atomic() || matches!(self.op, Op::AtomicWrite { .. })
    }

    /// How it completes, if it is one of those that fail.
    pub(super) fn fails_with(&self) -> Option<WcStatus> {
        match self.fate {
            Fate::Fine => None,
            Fate::Void if self.op.carries() => Some(WcStatus::LocProtErr),
            Fate::Void | Fate::Refused => Some(WcStatus::RemAccessErr),
        }
    }

    fn must_be_fenced(&self) -> bool {
        matches!(self.op, Op::Read { at, .. } if at.addr < ROM)
    }
}

/// Memory of the responder as the messages leave it, one after the other.
struct Model {
    ram: Vec<u8>,
    word: u64,
}

impl Model {
    fn item(&mut self, rng: &mut Rng, transport: Transport) -> Item {
        let length = if rng.chance(150) { 0 } else { rng.below(400) as u32 };
        let (mut reads, mut finds) = (Vec::new(), 0);
        let imm = rng.chance(500).then(|| rng.next() as u32);
        let at = Remote { addr: rng.below(RAM as u64 - 400), rkey: 7 };
        let word = Remote { addr: WORD, rkey: 7 };
        let choices = if transport == Transport::Rc { 10 } else { 4 };
        let (op, length) = match rng.below(choices) {
            0 | 1 => (Op::Send(imm), length),
            2 | 3 => {
                self.ram[at.addr as usize..][..length as usize].fill(SCRIBBLE);
                (Op::Write { at, imm }, length)
            }
            4 => {
                reads = self.ram[at.addr as usize..][..length as usize].to_vec();
                (Op::Read { at, again_from: None }, length)
            }
            5 => {
                let at = Remote { addr: ROM + at.addr, ..at };
                reads = (0..u64::from(length)).map(|i| rom_byte(at.addr + i)).collect();
                (Op::Read { at, again_from: None }, length)
            }
            6 => {
                let add = rng.below(1000);
                finds = self.word;
                self.word += add;
                (Op::FetchAdd { at: word, add }, 8)
            }
            7 => {
                let (compare, swap) = (if rng.chance(500) { self.word } else { 3 }, rng.below(1000));
                finds = self.word;
                self.word = if self.word == compare { swap } else { self.word };
                (Op::CompareSwap { at: word, compare, swap }, 8)
            }
            8 => {
                self.word = rng.below(1000);
                (Op::AtomicWrite { at: word, value: self.word }, 8)
            }
            _ if rng.chance(500) => (Op::SendInvalidate(rng.next() as u32), length),
            _ => (Op::Flush { at, whole: false, persistent: false }, length),
        };
        Item { op, length, fence: false, solicited: rng.chance(300), reads, finds, fate: Fate::Fine }
    }
}
