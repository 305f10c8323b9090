//! Memory that the guest shares with the device, changed by a second thread while the device works on it.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use virtio_rdma::ib::Access;

use super::{Input, bed, start_over};
use crate::guest::mem::Buf;
use crate::guest::verbs::{Ah, AhAttr, Mr, MrSpec, Op, QpSpec, Rc, RcOptions, SendWr};
use crate::stepped::Stepped;

thread_local! {
    static BED: RefCell<Stepped> = RefCell::new(bed());
}

/// Bytes of each end's region, and of what lies beside it.
const SIZE: usize = 8192;
/// Steps of the device for each input.
const STEPS: usize = 48;

/// The first guest's rings, areas and completion queues are written to as the input says, over and over, while its queue pairs are
/// served. What the second guest has not given it must stay as it is.
pub fn rings(data: &[u8]) {
    BED.with_borrow_mut(|bed| {
        for (nic, guest) in bed.guests.clone().iter().enumerate() {
            start_over(bed, nic, guest);
        }
        Scene::new(bed).play(bed, data);
    });
}

struct Scene {
    ends: Vec<(Rc, Rc)>,
    /// Shared with the device: what the attacker writes.
    targets: Vec<Arc<Buf>>,
    /// The second guest's: registered without remote access, and not at all.
    canaries: Vec<Arc<Buf>>,
    _kept: (Mr, Ah),
}

impl Scene {
    fn new(bed: &Stepped) -> Self {
        let [a, b] = &bed.guests[..] else { unreachable!("two guests") };
        let spec = QpSpec::rc().depth(15);
        let options = RcOptions { timeout: 1, retry_cnt: 1, rnr_retry: 1, ..RcOptions::default() };
        let mut ends: Vec<_> =
            (0..2).map(|_| Rc::pair_with(a, b, &spec, SIZE, &options).expect("a pair of RC")).collect();
        ends.push(Rc::pair_with(a, b, &QpSpec::uc().depth(15), SIZE, &options).expect("a pair of UC"));
        let (pair, ah) = datagrams(bed);
        ends.push(pair);
        let closed = b.alloc(SIZE).expect("memory");
        let free = b.alloc(SIZE).expect("memory");
        let mr = ends[0].1.pd.reg_spec(MrSpec { access: Access::LOCAL_WRITE, ..MrSpec::whole(&closed) });
        for canary in [&closed, &free] {
            canary.fill(0, SIZE, 0x5a);
        }
        let view = |buf: &Buf| Arc::new(a.memory().view(buf.gpa(0), buf.len() as u64).expect("a view"));
        let mut targets = vec![view(a.arm_words()), view(a.ahs().buf()), view(a.doorbells()[0].buf())];
        for (end, _) in &ends {
            targets.push(view(end.qp.sq().buf()));
            targets.push(view(end.qp.rq().buf()));
            targets.push(view(end.cq.ring().buf()));
        }
        Self { ends, targets, canaries: vec![closed, free], _kept: (mr.expect("a region"), ah) }
    }

    fn play(&self, bed: &mut Stepped, data: &[u8]) {
        self.post();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                while !stop.load(Relaxed) {
                    self.scribble(data);
                }
            });
            for _ in 0..STEPS {
                bed.step();
                bed.pass(Duration::from_micros(50));
            }
            stop.store(true, Relaxed);
            // The scope alone would wait for the closure only: what the thread has of its own would look like a leak.
            writer.join().expect("the writer does not panic");
        });
        // Without a race, too: what is there now is what the device sees.
        self.scribble(data);
        for _ in 0..STEPS {
            bed.step();
            bed.pass(Duration::from_millis(1));
        }
        for canary in &self.canaries {
            assert!(canary.read_vec(0, SIZE) == [0x5a; SIZE], "memory was written that was not given");
        }
    }

    /// Good work, for the attack to spoil.
    fn post(&self) {
        for (a, b) in &self.ends[..3] {
            for i in 0..6 {
                let _ = b.qp.post_recv(i, &[b.mr.sge(0, 512)]);
                let op = if i % 2 == 0 { Op::Write(b.mr.remote(64)) } else { Op::Send };
                let _ = a.qp.post(SendWr::new(i, op, &[a.mr.sge(0, 300), a.mr.sge(4000, 100)]));
            }
        }
        let (a, b) = &self.ends[3];
        for i in 0..6 {
            let _ = b.qp.post_recv(i, &[b.mr.sge(0, 512)]);
            let op = Op::UdSend { ah: 1, qpn: b.qp.number(), qkey: 7, imm: None };
            let _ = a.qp.post(SendWr::new(i, op, &[a.mr.sge(0, 300)]));
        }
    }

    /// Each write is, in the input: where, its length, its bytes.
    fn scribble(&self, data: &[u8]) {
        let mut input = Input(data);
        while !input.is_empty() {
            let target = &self.targets[usize::from(input.byte()) % self.targets.len()];
            // Most of what matters lies in the first page.
            let at = match input.byte() {
                0xff => input.below(target.len()),
                page => usize::from(page) * 8,
            };
            let len = usize::from(input.byte() & 31) + 1;
            let bytes = input.take(len);
            if at + bytes.len() <= target.len() {
                target.write(at, bytes);
            }
        }
    }
}

/// A pair of UD ends, and the address handle of the second.
fn datagrams(bed: &Stepped) -> ((Rc, Rc), Ah) {
    let end = |guest: usize| {
        let end = Rc::new(&bed.guests[guest], QpSpec::ud().depth(15), SIZE).expect("a UD end");
        end.qp.to_ud(7).expect("RTS");
        end
    };
    let (a, b) = (end(0), end(1));
    let ah = a.pd.create_ah(AhAttr::to(bed.guests[1].gids()[1], 1)).expect("an address handle");
    assert_eq!(ah.number(), 1);
    ((a, b), ah)
}
