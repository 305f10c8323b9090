//! A guest that misbehaves, and two that must not notice.

use std::time::Duration;

use virtio_rdma::event::EventType;
use virtio_rdma::ib::{QpState, WcStatus};

use crate::bed::{Bed, Witness, eventually};
use crate::guest::Guest;
use crate::guest::verbs::{QpSpec, Rc, RcOptions, SendWr};
use crate::logs;
use crate::router::RouterSpec;

/// Most lines that one attack may cause. The router writes ten in ten seconds about each guest, and a few about sessions.
const LINES: usize = 30;
/// Longest wait for what must happen.
pub const SOON: Duration = Duration::from_secs(10);

/// Three guests: the first attacks the second; the second and the third talk all the time.
#[derive(Debug)]
pub struct Attack {
    /// The guests and their router.
    pub bed: Bed,
    witness: Witness,
}

impl Attack {
    /// With the usual limits.
    pub fn start() -> Self {
        Self::on(&RouterSpec::of(3))
    }

    /// On a router of three virtual NICs.
    pub fn on(spec: &RouterSpec) -> Self {
        logs::collect();
        let bed = Bed::with(spec, crate::guest::mem::Placement::Contiguous);
        let witness = Witness::start(&bed.guests[1], &bed.guests[2]);
        Self { bed, witness }
    }

    /// The attacker.
    pub fn attacker(&self) -> &Guest {
        &self.bed.guests[0]
    }

    /// A connection from the attacker to the second guest.
    pub fn pair(&self) -> (Rc, Rc) {
        let o = RcOptions { timeout: 8, retry_cnt: 2, ..RcOptions::default() };
        Rc::pair_with(&self.bed.guests[0], &self.bed.guests[1], &QpSpec::rc(), 4096, &o).expect("a pair")
    }

    /// Posts one request on a new connection, made by `wr` from both ends, and checks how it ends.
    #[track_caller]
    pub fn request(&self, expected: &[WcStatus], post: impl FnOnce(&Rc, &Rc)) {
        let (a, b) = self.pair();
        b.mr.fill(0, 4096, 0x77);
        post(&a, &b);
        let status = a.cq.next().status();
        assert!(expected.contains(&status), "{status:?}, not one of {expected:?}");
        assert_eq!(a.qp.state().expect("an answer"), QpState::Err);
        assert_eq!(b.mr.read(0, 4096), vec![0x77; 4096], "nothing was written");
    }

    /// As [`request`](Self::request) for requests that the responder refuses: it goes to ERR too, and says why.
    #[track_caller]
    pub fn refused(&self, post: impl FnOnce(&Rc, &Rc)) {
        let mut peer = 0;
        self.request(&[WcStatus::RemAccessErr], |a, b| {
            peer = b.qp.number();
            post(a, b);
            let error = || b.qp.state().expect("an answer") == QpState::Err;
            eventually("error of the responder", SOON, error);
        });
        self.bed.guests[1].events().wait(EventType::QpAccessError, peer, SOON).expect("an event");
    }

    /// Ends the attack: the others are well, the attacker can go on with new objects, and the log is short.
    #[track_caller]
    pub fn finish(self) {
        let (a, b) = self.pair();
        a.qp.post(SendWr::inline(1, crate::guest::verbs::Op::Write(b.mr.remote(0)), b"well")).expect("room");
        a.cq.next().ok();
        drop((a, b));
        self.finish_without();
    }

    /// As [`finish`](Self::finish), when the attacker has lost its device: it connects again.
    #[track_caller]
    pub fn reconnect_and_finish(mut self) {
        self.bed.guests[0] = self.bed.router.guest_after_end(0, &self.bed.guests[0]);
        self.finish();
    }

    /// As [`finish`](Self::finish), when the attacker has made itself unusable.
    #[track_caller]
    pub fn finish_without(self) {
        self.witness.finish();
        for nic in 0..3 {
            let lines = logs::lines_with(&self.bed.router.name_of(nic));
            assert!(lines.len() <= LINES, "{} lines in the log: {lines:#?}", lines.len());
        }
    }
}
