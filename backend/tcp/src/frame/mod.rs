//! What travels on a connection, as typed values (`docs/tcp.md`, section 3). Bytes become these in [`codec`](self::Packet::parse), and
//! nothing after it sees bytes again.
//!
//! Not here: whether a frame makes sense at this moment. That is for whom it is addressed to.

mod codec;
mod layout;
mod note;
#[cfg(test)]
pub(crate) mod tests;

use crate::Nanos;

pub use codec::Header;
pub use note::{Apart, NicEnd, NicKey, Note, PairId, Short, Wanted};

/// Bytes of every frame that say what it is and how long.
pub const HEAD: usize = 8;
/// Bytes of the longest head and body.
pub const MAX_HEADER: usize = HEAD + 104;
/// Bytes after a payload.
pub const TRAILER: usize = 4;
/// Largest payload of a frame.
pub const MAX_PAYLOAD: u32 = 64 * 1024;
/// Largest datagram: the port's MTU.
pub const MAX_DATAGRAM: u32 = 4096;
/// Largest message (IBA 9.7.7).
pub const MAX_MESSAGE: u32 = 1 << 31;
/// First word of the first frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"FFTP");
/// Versions of this protocol that this end speaks, oldest and newest.
pub const VERSIONS: (u16, u16) = (1, 2);
/// The first version with [notes](Note).
pub const VERSION_OF_NOTES: u16 = 2;

/// Why bytes are not a frame. The connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// No such kind.
    #[error("unknown kind of frame {0}")]
    Kind(u8),
    /// The body of this kind has another length.
    #[error("wrong length of the body of {0}")]
    Body(&'static str),
    /// More payload than that kind may have, or than its message has bytes.
    #[error("payload of {1} bytes in {0}")]
    Payload(&'static str, u32),
    /// A field has a value that it cannot have.
    #[error("invalid {0}")]
    Field(&'static str),
}

/// One side's send queue of one life of a QP, as far as the other side's receive queue: messages in one direction. Numbered by the side
/// that sends the messages, and never again while its session lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId(pub u64);

/// A host's name among hosts.
pub type HostId = [u8; 16];

/// A frame without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// What it says.
    pub frame: Frame,
    /// Bytes that follow it, and a trailer if there are any.
    pub payload: u32,
}

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// First frame of both directions.
    Hello(Hello),
    /// Asks for a responder for a flow.
    Open(Open),
    /// There is one.
    Opened(Opened),
    /// On a new connection: asks how far the responder came on the one before.
    Resume {
        /// The flow.
        flow: FlowId,
        /// Messages before this one are complete: their answers are not needed any more.
        oldest: u64,
    },
    /// How far it came.
    Resumed(Position),
    /// Begins a message; its first bytes may follow.
    Request(Request),
    /// More of a message.
    Data(Piece),
    /// How far the responder is.
    Ack(Ack),
    /// The responder has not taken a message, or what came after it.
    Nak(Nak),
    /// Some of what a READ asked for.
    ReadData(Piece),
    /// What an atomic has found.
    AtomicReply(AtomicReply),
    /// A datagram.
    Datagram(Datagram),
    /// Asks for a [`Frame::Pong`].
    Ping(u64),
    /// Answers a [`Frame::Ping`].
    Pong(u64),
    /// Last frame before the connection is closed.
    Bye(Bye),
    /// Of queue pairs that are connected over the hosts' NICs.
    Note(Note),
}

/// Who is on the other end of a connection, and what it can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Oldest and newest version that the sender speaks; in an answer both are the one that is spoken.
    pub versions: (u16, u16),
    /// Who sends it.
    pub host: HostId,
    /// Whom it means.
    pub peer: HostId,
    /// Life of the sender: another one has none of the records of before.
    pub epoch: u64,
    /// Which attempt for this lane it is; only the highest counts.
    pub generation: u64,
    /// Which of the connections between the two.
    pub lane: u16,
    /// How many there are.
    pub lanes: u16,
    /// Proves that the connection belongs to the session that gave it out.
    pub ticket: [u8; 32],
}

/// Transport of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Reliable connected.
    Rc,
    /// Unreliable connected.
    Uc,
}

/// Names both ends of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// The flow.
    pub flow: FlowId,
    /// Tenant network.
    pub tenant: u32,
    /// Transport of both QPs.
    pub transport: Transport,
    /// READs and atomics that the requester may have outstanding.
    pub depth: u8,
    /// Life of the requesting QP.
    pub incarnation: u64,
    /// Its GID.
    pub source: [u8; 16],
    /// GID of the QP that it is connected to.
    pub destination: [u8; 16],
    /// Number of the requesting QP.
    pub source_qpn: u32,
    /// Number of the QP that it is connected to.
    pub destination_qpn: u32,
    /// `sq_psn` of the requesting QP.
    pub psn: u32,
}

/// Answers [`Open`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    /// The flow.
    pub flow: FlowId,
    /// Life of the responding QP.
    pub incarnation: u64,
    /// READs and atomics that it takes at a time.
    pub depth: u8,
}

/// How far a responder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The flow.
    pub flow: FlowId,
    /// Messages before this one are executed.
    pub next: u64,
    /// Bytes of it that have arrived.
    pub got: u32,
    /// It has been accepted: its receive is taken.
    pub taken: bool,
}

/// Answers messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    /// How far the responder is.
    pub at: Position,
    /// So many messages of this flow that take a receive find one, counted from the first; `None`: not known.
    pub credit: Option<u64>,
}

/// Why a message was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NakCode {
    /// No receive is posted (RNR NAK).
    NotReady,
    /// Something that passes, a page that is missing for example: come again.
    Later,
    /// No QP takes messages of this flow now.
    NotThere,
    /// There is no record of this flow, and never will be one again.
    Gone,
    /// Invalid request.
    Invalid,
    /// Remote access error.
    Access,
    /// Remote operational error.
    Operation,
}

/// Refuses a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nak {
    /// Which one, and how far the responder is in it. An access error may also name a READ before `next`.
    pub at: Position,
    /// Why.
    pub code: NakCode,
    /// How long to wait before it is tried again.
    pub wait: Nanos,
}

/// Bytes of a message or of an answer to a READ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The flow.
    pub flow: FlowId,
    /// The message.
    pub seq: u64,
    /// Where in it they are.
    pub offset: u32,
}

/// Answers an atomic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtomicReply {
    /// The flow.
    pub flow: FlowId,
    /// The message.
    pub seq: u64,
    /// What was there before.
    pub value: u64,
}

/// What a message does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// SEND, maybe with immediate data.
    Send(Option<u32>),
    /// SEND with invalidate.
    SendInvalidate(u32),
    /// RDMA WRITE.
    Write {
        /// First byte and key.
        at: Remote,
        /// With immediate data.
        imm: Option<u32>,
    },
    /// RDMA READ.
    Read {
        /// First byte and key.
        at: Remote,
        /// Asked for again from this byte of it on: the answers were lost.
        again_from: Option<u32>,
    },
    /// Compare and swap.
    CompareSwap {
        /// The word.
        at: Remote,
        /// What it must be.
        compare: u64,
        /// What it becomes then.
        swap: u64,
    },
    /// Fetch and add.
    FetchAdd {
        /// The word.
        at: Remote,
        /// What is added.
        add: u64,
    },
    /// Stores 8 bytes as one.
    AtomicWrite {
        /// The word.
        at: Remote,
        /// What it becomes, as it lies in memory.
        value: u64,
    },
    /// FLUSH.
    Flush {
        /// First byte and key.
        at: Remote,
        /// The whole region is meant.
        whole: bool,
        /// Persistence is asked for.
        persistent: bool,
    },
}

/// Memory of a responder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remote {
    /// Address.
    pub addr: u64,
    /// Key.
    pub rkey: u32,
}

impl Op {
    /// Whether bytes of the message travel to the responder.
    pub fn carries(self) -> bool {
        matches!(self, Self::Send(_) | Self::SendInvalidate(_) | Self::Write { .. })
    }

    /// Whether it takes a receive.
    pub fn takes_receive(self) -> bool {
        matches!(self, Self::Send(_) | Self::SendInvalidate(_) | Self::Write { imm: Some(_), .. })
    }

    /// Whether it is an atomic that answers.
    pub fn is_atomic(self) -> bool {
        matches!(self, Self::CompareSwap { .. } | Self::FetchAdd { .. })
    }

    /// Whether something comes back.
    pub fn fetches(self) -> bool {
        self.is_atomic() || matches!(self, Self::Read { .. })
    }

    /// Whether UC knows it.
    pub fn is_for_uc(self) -> bool {
        matches!(self, Self::Send(_) | Self::Write { .. })
    }
}

/// Begins a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The flow.
    pub flow: FlowId,
    /// Its number in the flow, from 0.
    pub seq: u64,
    /// What to do.
    pub op: Op,
    /// Bytes of the message, or that are asked for.
    pub length: u32,
    /// The receive's completion is a solicited one.
    pub solicited: bool,
    /// The requester waits for an answer before it goes on.
    pub probe: bool,
}

/// An unreliable datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagram {
    /// Tenant network.
    pub tenant: u32,
    /// Number of the sending QP.
    pub source_qpn: u32,
    /// Number of the receiving QP, or that of a group.
    pub destination_qpn: u32,
    /// `Q_Key`.
    pub qkey: u32,
    /// GID of the sender.
    pub source: [u8; 16],
    /// GID of the receiver or of a group.
    pub destination: [u8; 16],
    /// Immediate data.
    pub imm: Option<u32>,
    /// The receive's completion is a solicited one.
    pub solicited: bool,
    /// For the header that the receiver sees.
    pub traffic_class: u8,
    /// For the header that the receiver sees.
    pub hop_limit: u8,
    /// For the header that the receiver sees.
    pub flow_label: u32,
}

/// Why a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bye {
    /// No version in common.
    Version,
    /// Not the host that was meant, a wrong ticket or lane, or a connection that is not the newest of its lane.
    Refused,
    /// What came was not a frame, or made no sense.
    Protocol,
    /// Nothing came for too long.
    Silent,
    /// The session ends.
    Shutdown,
}

/// Bytes after a payload that say whether it is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trailer {
    /// It is.
    Good,
    /// The sender lost hold of its memory; what has arrived means nothing.
    Void,
}

impl Trailer {
    /// As it travels.
    pub fn to_wire(self) -> [u8; TRAILER] {
        match self {
            Self::Good => *b"good",
            Self::Void => *b"void",
        }
    }

    /// From what travelled.
    ///
    /// # Errors
    /// When it is neither: the stream is out of step.
    pub fn parse(raw: [u8; TRAILER]) -> Result<Self, Malformed> {
        match &raw {
            b"good" => Ok(Self::Good),
            b"void" => Ok(Self::Void),
            _ => Err(Malformed::Field("trailer")),
        }
    }
}
