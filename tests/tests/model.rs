//! Random operations against a model: every byte of both sides is compared after every batch.
//!
//! `FREEFLOW_SEED` repeats a run, `FREEFLOW_OPS` changes its length.
#![allow(missing_docs, reason = "a test program")]

use std::ops::Range;
use std::sync::Arc;

use freeflow_tests::bed::Bed;
use freeflow_tests::guest::Guest;
use freeflow_tests::guest::mem::{Buf, Placement};
use freeflow_tests::guest::verbs::{Cq, Mr, MrSpec, Op, Pd, Qp, QpSpec, RcOptions, SendWr, Sge, connect};
use freeflow_tests::rng::Rng;
use virtio_rdma::ib::{SendFlags, WcOpcode};

/// Bytes of the memory of each end.
const SIZE: usize = 300 << 10;
/// Largest message.
const MAX: usize = 150 << 10;
const BATCH: usize = 24;
const SGES: usize = 8;
const INLINE: usize = 200;

/// One end: memory, its model, and regions that overlap in it.
struct End {
    buf: Arc<Buf>,
    model: Vec<u8>,
    mrs: Vec<(Mr, Range<usize>)>,
    qp: Qp,
    send_cq: Cq,
    recv_cq: Cq,
    _pd: Pd,
}

impl End {
    fn new(guest: &Guest, rng: &mut Rng) -> Self {
        let placement = if rng.one_in(2) { Placement::Fragmented } else { Placement::Contiguous };
        let buf = guest.alloc_placed(SIZE, placement).unwrap();
        let model = rng.bytes(SIZE);
        buf.write(0, &model);
        let pd = guest.alloc_pd().unwrap();
        let mrs = regions(&pd, &buf, rng);
        let (send_cq, recv_cq) = (guest.create_cq(256).unwrap(), guest.create_cq(256).unwrap());
        let spec =
            QpSpec { inline: INLINE as u32, placement: Some(placement), ..QpSpec::rc().depth(63).sges(SGES as u16) };
        let qp = pd.create_qp_on(spec, &send_cq, &recv_cq).unwrap();
        Self { buf, model, mrs, qp, send_cq, recv_cq, _pd: pd }
    }

    /// A region that contains a range, and the range's place in it.
    fn region_of(&self, range: &Range<usize>, rng: &mut Rng) -> (&Mr, usize) {
        let fitting: Vec<_> = self.mrs.iter().filter(|(_, r)| r.start <= range.start && range.end <= r.end).collect();
        let (mr, r) = fitting[rng.below(fitting.len())];
        (mr, range.start - r.start)
    }

    fn sges(&self, ranges: &[Range<usize>], rng: &mut Rng) -> Vec<Sge> {
        let sge = |r: &Range<usize>, rng: &mut Rng| {
            let (mr, off) = self.region_of(r, rng);
            mr.sge(off, r.len())
        };
        ranges.iter().map(|r| sge(r, rng)).collect()
    }

    fn gather(&self, ranges: &[Range<usize>]) -> Vec<u8> {
        ranges.iter().flat_map(|r| self.model[r.clone()].iter().copied()).collect()
    }

    fn scatter(&mut self, ranges: &[Range<usize>], bytes: &[u8]) {
        let mut rest = bytes;
        for r in ranges {
            let n = rest.len().min(r.len());
            self.model[r.start..r.start + n].copy_from_slice(&rest[..n]);
            rest = &rest[n..];
        }
        assert!(rest.is_empty());
    }

    #[track_caller]
    fn compare(&self, what: &str) {
        let real = self.buf.read_vec(0, SIZE);
        if real != self.model {
            let at = real.iter().zip(&self.model).position(|(a, b)| a != b);
            panic!("{what}: byte {at:?} differs from the model");
        }
    }
}

/// The whole memory as one region, and a few parts of it at odd places and other addresses.
fn regions(pd: &Pd, buf: &Arc<Buf>, rng: &mut Rng) -> Vec<(Mr, Range<usize>)> {
    let mut part = |i: usize| {
        let start = rng.below(SIZE / 2);
        if i == 0 { 0..SIZE } else { start..start + SIZE / 4 + rng.below(SIZE / 4) }
    };
    let ranges: Vec<Range<usize>> = (0..5).map(&mut part).collect();
    let reg = |r: &Range<usize>, iova| MrSpec::whole(buf).part(r.start, r.len()).iova(iova);
    ranges.into_iter().map(|r| (pd.reg_spec(reg(&r, rng.word() >> 17)).unwrap(), r)).collect()
}

/// Cuts a message of `len` bytes into ranges that do not overlap, in any order; some are empty.
fn cut(len: usize, rng: &mut Rng) -> Vec<Range<usize>> {
    let pieces = 1 + rng.below(SGES);
    let mut marks: Vec<usize> = (1..pieces).map(|_| rng.below(len + 1)).collect();
    marks.extend([0, len]);
    marks.sort_unstable();
    let mut gaps: Vec<usize> = (0..pieces).map(|_| rng.below(SIZE - len + 1)).collect();
    gaps.sort_unstable();
    let mut ranges: Vec<Range<usize>> = marks.windows(2).zip(gaps).map(|(m, gap)| m[0] + gap..m[1] + gap).collect();
    rng.shuffle(&mut ranges);
    ranges
}

/// What one work request of a batch is.
struct Planned {
    op: Op,
    sges: Vec<Sge>,
    inline: Option<Vec<u8>>,
    flags: SendFlags,
    completion: (WcOpcode, usize),
    /// What the responder's receive completes with.
    receive: Option<(usize, Option<u32>)>,
}

fn message_len(rng: &mut Rng) -> usize {
    let small = !rng.one_in(20);
    rng.size(if small { 9000 } else { MAX })
}

/// Plans one operation and does it in the model.
fn plan(from: &mut End, to: &mut End, after_read: &mut bool, rng: &mut Rng) -> Planned {
    let len = message_len(rng);
    let kind = rng.below(5);
    let ranges = cut(len, rng);
    let sges = from.sges(&ranges, rng);
    let start = rng.below(SIZE - len + 1);
    let (mr, off) = to.region_of(&(start..start + len), rng);
    let remote = mr.remote(off);
    let imm = rng.word() as u32;
    let mut flags = SendFlags::empty();
    flags.set(SendFlags::SIGNALED, !rng.one_in(3));
    flags.set(SendFlags::SOLICITED, rng.one_in(4));
    // What a READ fetches may be used by a later request only behind a fence.
    flags.set(SendFlags::FENCE, *after_read || rng.one_in(10));
    *after_read = kind == 4;
    let bytes = from.gather(&ranges);
    let inline = (kind != 4 && len <= INLINE && rng.one_in(2)).then(|| bytes.clone());
    let (op, opcode, receive) = match kind {
        0 => (Op::Write(remote), WcOpcode::RdmaWrite, None),
        1 => (Op::WriteImm(remote, imm), WcOpcode::RdmaWrite, Some((len, Some(imm)))),
        2 => (Op::Send, WcOpcode::Send, Some((len, None))),
        3 => (Op::SendImm(imm), WcOpcode::Send, Some((len, Some(imm)))),
        _ => (Op::Read(remote), WcOpcode::RdmaRead, None),
    };
    match op {
        Op::Read(_) => {
            let bytes = to.model[start..start + len].to_vec();
            from.scatter(&ranges, &bytes);
        }
        Op::Send | Op::SendImm(_) => receive_in_model(to, &bytes, rng),
        _ => to.scatter(std::slice::from_ref(&(start..start + len)), &bytes),
    }
    if matches!(op, Op::WriteImm(..)) {
        to.qp.post_recv(0, &[]).unwrap();
    }
    Planned { op, sges, inline, flags, completion: (opcode, len), receive }
}

/// Posts a receive that is long enough, and fills it in the model.
fn receive_in_model(to: &mut End, bytes: &[u8], rng: &mut Rng) {
    let room = bytes.len() + if rng.one_in(2) { rng.below(1000) } else { 0 };
    let ranges = cut(room, rng);
    let sges = to.sges(&ranges, rng);
    to.qp.post_recv(0, &sges).unwrap();
    to.scatter(&ranges, bytes);
}

fn batch(from: &mut End, to: &mut End, rng: &mut Rng) -> usize {
    let count = 1 + rng.below(BATCH);
    let mut after_read = false;
    let mut planned: Vec<Planned> = (0..count).map(|_| plan(from, to, &mut after_read, rng)).collect();
    planned.last_mut().expect("at least one").flags |= SendFlags::SIGNALED;
    let wrs: Vec<SendWr<'_>> = planned.iter().enumerate().map(|(i, p)| request(i as u64, p)).collect();
    for chunk in wrs.chunks(1 + rng.below(count)) {
        from.qp.post_send(chunk).unwrap();
    }
    for (i, p) in planned.iter().enumerate().filter(|(_, p)| p.flags.contains(SendFlags::SIGNALED)) {
        let wc = from.send_cq.next().ok();
        assert_eq!((wc.wr_id(), wc.opcode()), (i as u64, p.completion.0));
        if wc.opcode() == WcOpcode::RdmaRead {
            assert_eq!(wc.byte_len(), p.completion.1);
        }
    }
    for (len, imm) in planned.iter().filter_map(|p| p.receive) {
        let wc = to.recv_cq.next().ok();
        assert_eq!((wc.byte_len(), wc.imm()), (len, imm));
    }
    count
}

fn request(id: u64, p: &Planned) -> SendWr<'_> {
    match &p.inline {
        Some(bytes) => SendWr::inline(id, p.op, bytes),
        None => SendWr::new(id, p.op, &p.sges),
    }
    .flags(p.flags)
}

fn run(seed: u64, operations: usize) {
    let mut rng = Rng::new(seed);
    let bed = Bed::new(2);
    let (a, b) = bed.two();
    let mut pairs: Vec<(End, End)> = [(a, b), (b, a), (a, a), (a, b)]
        .into_iter()
        .map(|(x, y)| (End::new(x, &mut rng), End::new(y, &mut rng)))
        .collect();
    for (x, y) in &pairs {
        connect(&x.qp, &y.qp, &RcOptions::default()).unwrap();
    }
    let mut done = 0;
    while done < operations {
        let which = rng.below(pairs.len());
        let (x, y) = &mut pairs[which];
        done += if rng.one_in(2) { batch(x, y, &mut rng) } else { batch(y, x, &mut rng) };
        x.compare("requester or responder x");
        y.compare("requester or responder y");
    }
}

#[test]
fn random_operations_agree_with_the_model() {
    let seed = Rng::seed();
    let operations = std::env::var("FREEFLOW_OPS").ok().and_then(|s| s.parse().ok()).unwrap_or(40_000);
    println!("FREEFLOW_SEED={seed}");
    run(seed, operations);
}

#[test]
fn a_seed_that_is_always_run() {
    run(20_240_607, 5_000);
}
