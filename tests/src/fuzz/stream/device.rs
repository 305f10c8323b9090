//! The device at an end: it takes nearly everything, and looks whether what it is asked for can be.

use std::collections::BTreeMap;

use freeflow_tcp::frame::{Datagram, Note, Open, Request, Transport};
use freeflow_tcp::host::{Availability, Bound, Host, Landed, Landing, Origin, QpKey, Refusal, Source, Token, Verdict};
use freeflow_tcp::{Nanos, Outgoing};
use virtio_rdma::ib::WcStatus;

/// QPs of each end.
pub const QPS: u32 = 3;
/// READs and atomics that may be under way.
pub const DEPTH: u8 = 3;

/// The last one is of UC.
pub fn transport_of(qp: u32) -> Transport {
    if qp + 1 == QPS { Transport::Uc } else { Transport::Rc }
}

pub fn key(qp: u32) -> QpKey {
    QpKey(qp.into())
}

/// A work request that is not complete.
#[derive(Debug)]
pub struct Posted {
    pub flow: usize,
    pub length: u32,
    pub reads: bool,
}

#[derive(Debug, Default)]
pub struct Device {
    calls: u32,
    tokens: u64,
    pub posted: BTreeMap<u64, Posted>,
    /// What was completed last, since the last frame was made.
    last: Option<(u64, Posted)>,
    /// After the last message that each RC responder has executed of its present flow.
    next: BTreeMap<QpKey, u64>,
}

impl Device {
    pub fn next_token(&mut self) -> Token {
        self.tokens += 1;
        Token(self.tokens)
    }

    /// A QP begins another life.
    pub fn forget(&mut self, qp: QpKey) {
        self.next.remove(&qp);
    }

    /// Most is good. Which is not depends on nothing but the number of calls.
    fn verdict(&mut self) -> Verdict {
        self.calls += 1;
        match self.calls % 32 {
            28 => Verdict::NotReady(Nanos::from_micros(20)),
            29 => Verdict::Later(Nanos::from_micros(20)),
            30 => Verdict::NotThere,
            31 if self.calls.is_multiple_of(7) => Verdict::Refused(Refusal::Access),
            _ => Verdict::Yes,
        }
    }

    /// A message is executed: once, and those of a reliable flow in order. Of READs nothing is heard.
    fn executed(&mut self, qp: QpKey, request: &Request) {
        if transport_of(qp.0 as u32) == Transport::Rc {
            let next = self.next.entry(qp).or_default();
            assert!(request.seq >= *next, "{qp:?}: {request:?} after {next}");
            *next = request.seq + 1;
        }
    }

    /// Payload has come, and its trailer.
    pub fn land(&mut self, landing: &Landing) -> Landed {
        self.calls += 1;
        match self.calls % 32 {
            _ if matches!(landing, Landing::Nothing | Landing::Discard) => Landed::Good,
            30 => Landed::Later(Nanos::from_micros(20)),
            31 if self.calls.is_multiple_of(5) => Landed::Refused(Refusal::Access),
            _ => Landed::Good,
        }
    }

    /// Payload goes where it may.
    pub fn check_landing(&self, landing: &Landing, payload: u32) {
        let within = |offset: u32, length: u32| offset.checked_add(payload).is_some_and(|end| end <= length);
        match *landing {
            Landing::Nothing => assert_eq!(payload, 0),
            Landing::Discard => assert!(payload > 0),
            Landing::Message { qp, request, offset } => {
                assert!(qp.0 < QPS.into() && within(offset, request.length), "{landing:?} {payload}");
            }
            Landing::Answer { token, offset } => {
                let posted = self.posted.get(&token.0).filter(|posted| posted.reads);
                assert!(posted.is_some_and(|posted| within(offset, posted.length)), "{landing:?} {payload} {posted:?}");
            }
            Landing::Datagram(_) => assert!(payload <= 4096),
        }
    }

    /// A frame is about to be made.
    pub fn begin_frame(&mut self) {
        self.last = None;
    }

    /// Payload comes from where it may.
    pub fn check_source(&self, out: &Outgoing) {
        let Some(source) = &out.source else { return assert_eq!(out.packet.payload, 0, "{out:?}") };
        assert_eq!(source.len, out.packet.payload, "{out:?}");
        if let Origin::Message(token) = source.origin {
            let last = self.last.as_ref().filter(|(last, _)| *last == token.0).map(|(_, posted)| posted);
            // An unreliable message is complete when its last frame is made, whose bytes are taken at once.
            let last = last.filter(|posted| transport_of(posted.flow as u32) == Transport::Uc);
            let posted = self.posted.get(&token.0).or(last).expect("a message that is under way");
            let fits = source.offset.checked_add(source.len).is_some_and(|end| end <= posted.length);
            assert!(fits && !posted.reads, "{out:?} {posted:?}");
        }
    }
}

impl Host for Device {
    fn bind(&mut self, open: &Open) -> Option<Bound> {
        let qp = open.destination_qpn;
        let known = qp < QPS && open.incarnation == 1 && open.transport == transport_of(qp);
        known.then(|| {
            // Of another flow, or of the same one from its beginning.
            self.forget(key(qp));
            Bound { qp: key(qp), incarnation: 1, depth: DEPTH }
        })
    }

    fn unbound(&mut self, qp: QpKey) {
        self.forget(qp);
    }

    fn admit(&mut self, _: QpKey, _: &Request) -> Verdict {
        self.verdict()
    }

    fn finish(&mut self, qp: QpKey, request: &Request) -> Verdict {
        let verdict = self.verdict();
        if verdict == Verdict::Yes {
            self.executed(qp, request);
        }
        verdict
    }

    fn atomic(&mut self, qp: QpKey, request: &Request) -> Result<u64, Verdict> {
        match self.verdict() {
            Verdict::Yes => {
                self.executed(qp, request);
                Ok(1)
            }
            other => Err(other),
        }
    }

    fn abandon(&mut self, _: QpKey) {}

    fn posted(&mut self, _: QpKey) -> Option<u32> {
        Some(self.calls % 3)
    }

    fn available(&mut self, _: &Source) -> Availability {
        self.calls += 1;
        match self.calls % 64 {
            62 => Availability::Later(Nanos::from_micros(20)),
            63 => Availability::Refused,
            _ => Availability::Now,
        }
    }

    fn datagram(&mut self, _: &Datagram) -> bool {
        true
    }

    fn datagram_landed(&mut self, _: &Datagram) {}

    fn datagram_sent(&mut self, _: Token, _: bool) {}

    fn note(&mut self, _: &Note) {}

    fn answered(&mut self, token: Token, _: u64) {
        assert!(self.posted.contains_key(&token.0), "an answer to nothing: {token:?}");
    }

    fn completed(&mut self, token: Token, _: WcStatus) {
        let done =
            self.posted.remove(&token.0).unwrap_or_else(|| panic!("{token:?} completes twice, or was not posted"));
        let flow = done.flow;
        self.last = Some((token.0, done));
        let oldest = self.posted.iter().find(|(_, posted)| posted.flow == flow);
        assert!(oldest.is_none_or(|(first, _)| *first > token.0), "{token:?} completes before {oldest:?}");
    }
}
