//! What the protocol asks of the device on its side. It never touches memory: it says which bytes belong where, and whoever does
//! the I/O takes them from there or puts them there.

use virtio_rdma::ib::WcStatus;

use crate::Nanos;
use crate::frame::{Datagram, NakCode, Note, Open, Remote, Request};

/// The device's own name for one of its QPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QpKey(pub u64);

/// The device's own name for a work request that it has posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// A QP that takes a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// The QP.
    pub qp: QpKey,
    /// Which life of it.
    pub incarnation: u64,
    /// Its `max_dest_rd_atomic`.
    pub depth: u8,
}

/// What a responder says to a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Yes,
    /// No receive is posted; with the RNR timer.
    NotReady(Nanos),
    /// Not yet: to be tried again after this time.
    Later(Nanos),
    /// The QP takes no messages now.
    NotThere,
    /// It is refused. What follows for the responder (its receive, its QP) has been done.
    Refused(Refusal),
}

/// Why a responder refuses a message for good (IBA 9.9.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Invalid request.
    Invalid,
    /// Remote access error.
    Access,
    /// Remote operational error.
    Operation,
}

impl Refusal {
    pub(crate) fn code(self) -> NakCode {
        match self {
            Self::Invalid => NakCode::Invalid,
            Self::Access => NakCode::Access,
            Self::Operation => NakCode::Operation,
        }
    }
}

/// Where the payload of a frame comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Whose memory.
    pub origin: Origin,
    /// First byte, counted within the message, the READ or the datagram.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
}

/// Memory that payload comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// That of a work request.
    Message(Token),
    /// What a READ asks for.
    Read(QpKey, Remote),
    /// That of a datagram.
    Datagram(Token),
}

/// Whether payload is to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Availability {
    /// It is.
    Now,
    /// Not yet.
    Later(Nanos),
    /// It may not be reached.
    Refused,
}

/// Where the payload of a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landing {
    /// There is none.
    Nothing,
    /// Nobody wants it.
    Discard,
    /// Into the receive or the memory that a message of a requester is for. The last byte of a message must not be seen before [`Host::finish`].
    Message {
        /// Responder.
        qp: QpKey,
        /// The message.
        request: Request,
        /// First byte in it.
        offset: u32,
    },
    /// Into the buffers of a work request that reads.
    Answer {
        /// The work request.
        token: Token,
        /// First byte in it.
        offset: u32,
    },
    /// Into a receive that [`Host::datagram`] has taken for it, or wherever it wants it.
    Datagram(Datagram),
}

/// What became of a payload on its way into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landed {
    /// All of it is there, and the sender says that it is good.
    Good,
    /// The sender says that it is not.
    Void,
    /// The memory is not to be had now.
    Later(Nanos),
    /// The memory may not be reached.
    Refused(Refusal),
}

/// A device, as the protocol sees it. Calls come from within those of the link, and must not make any of their own to it.
pub trait Host {
    /// A QP that accepts this flow: one that names the other as its peer, in the right state and with the right PSN, and that has
    /// accepted no other life of it.
    fn bind(&mut self, open: &Open) -> Option<Bound>;

    /// The peer's session has ended: no message of the flow that this QP accepted will come any more.
    fn unbound(&mut self, qp: QpKey);

    /// A message begins: checks it, and takes a receive for it if it needs one.
    fn admit(&mut self, qp: QpKey, request: &Request) -> Verdict;

    /// All bytes of the message have landed: makes its last byte visible, executes what has no payload, completes the receive. An
    /// answer other than [`Verdict::Yes`] means that nothing of this has been done.
    fn finish(&mut self, qp: QpKey, request: &Request) -> Verdict;

    /// Executes an atomic.
    ///
    /// # Errors
    /// Why it may not be; nothing has been done then.
    fn atomic(&mut self, qp: QpKey, request: &Request) -> Result<u64, Verdict>;

    /// A message of UC will not be finished; a receive that it has is for the next.
    fn abandon(&mut self, qp: QpKey);

    /// How many receives are posted, if that is known and they are this QP's own.
    fn posted(&mut self, qp: QpKey) -> Option<u32>;

    /// Whether bytes can be taken from there now.
    fn available(&mut self, source: &Source) -> Availability;

    /// A datagram has come; true if its payload is wanted.
    fn datagram(&mut self, datagram: &Datagram) -> bool;

    /// The payload of that datagram has landed.
    fn datagram_landed(&mut self, datagram: &Datagram);

    /// A datagram was sent, or dropped.
    fn datagram_sent(&mut self, token: Token, sent: bool);

    /// The peer says something of queue pairs that are connected over the hosts' NICs. Answers are [given to the link](crate::Link::say) after the
    /// call that this comes from.
    fn note(&mut self, note: &Note);

    /// An atomic of ours has found this.
    fn answered(&mut self, token: Token, value: u64);

    /// A work request is complete. Those of a flow complete in the order in which they were posted.
    fn completed(&mut self, token: Token, status: WcStatus);
}
